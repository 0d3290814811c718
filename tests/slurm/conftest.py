"""Fixtures: a real Slurm for the session, one of two hosts, and a folder to submit jobs in."""

import contextlib
import functools
import shutil
import sys
import tempfile
from pathlib import Path
from types import MappingProxyType

import cluster
import hosts
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def slurm(request):
    """A running Cluster of one node; its logs are shown at the end if a test failed."""
    with _running(request, cluster.why_not(), [cluster.this_machine()]) as running:
        yield running


@pytest.fixture(scope="session")
def two_hosts(tmp_path_factory):
    """hosts.Hosts: alpha and beta, in namespaces of their own."""
    _skip(hosts.why_not())
    with hosts.Hosts(tmp_path_factory.mktemp("hosts")) as two:
        yield two


@pytest.fixture(scope="session")
def slurm_of_two(request, two_hosts):
    """A running Cluster of two nodes, alpha and beta."""
    # Other numbers, since both Slurms write logs in the same folder
    with _running(request, cluster.why_not(), two_hosts.hosts, first_job=1001) as running:
        yield running


def _skip(reason):
    if reason:
        pytest.skip(reason)


@contextlib.contextmanager
def _running(request, why_not, nodes, **options):
    _skip(why_not)
    folder = Path(tempfile.mkdtemp(prefix="ssd-slurm-"))  # munged's user can't enter pytest's own
    folder.chmod(0o755)
    running = cluster.Cluster(folder, 1, nodes, **options)
    try:
        running.start()
        yield running
    finally:
        running.stop()
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
    return functools.partial(_submit, slurm, home)


@pytest.fixture(scope="session")
def submit_to_two(slurm_of_two, home):
    """The same on the Slurm of two nodes."""
    return functools.partial(_submit, slurm_of_two, home)


def _submit(slurm, home, options, template, *arguments, env=MappingProxyType({})):
    env = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | env
    return slurm.command(
        "sbatch", "--parsable", *options, f"slurm/{template}.sbatch", *map(str, arguments),
        cwd=home, env=env,
    ).strip()
