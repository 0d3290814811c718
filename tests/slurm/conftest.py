"""Fixtures: a real Slurm for the session, and a folder to submit jobs in."""

import shutil
import sys
import tempfile
from pathlib import Path
from types import MappingProxyType

import pytest
from cluster import Cluster, why_not

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def slurm(request):
    """A running Cluster; its logs are shown at the end if a test failed."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="ssd-slurm-"))  # munged's user can't enter pytest's own
    folder.chmod(0o755)
    cluster = Cluster(folder, requeue_exit=1)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        if request.session.testsfailed:
            for log in sorted(folder.glob("*.out")):
                print(f"--- {log.name}\n{log.read_text(errors='replace')[-8000:]}")
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A folder with the programs and the templates, as a user's checkout has them."""
    folder = tmp_path_factory.mktemp("home")
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    shutil.copytree(ROOT / "slurm", folder / "slurm", ignore=shutil.ignore_patterns("*.log"))
    return folder


@pytest.fixture(scope="session")
def submit(slurm, home):
    """Function (options of sbatch, template, *arguments, env={}) -> number of the job."""

    def run(options, template, *arguments, env=MappingProxyType({})):
        env = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | env
        return slurm.command(
            "sbatch", "--parsable", *options, f"slurm/{template}.sbatch", *map(str, arguments),
            cwd=home, env=env,
        ).strip()

    return run
