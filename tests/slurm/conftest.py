"""Fixtures: a real Slurm for the session, one of two hosts, and folders to submit jobs in."""

import contextlib
import shutil
import tempfile
from pathlib import Path

import cluster
import hosts
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def slurm(request):
    """A running Cluster of one node; its logs are shown at the end if a test failed."""
    with _running(request, [cluster.this_machine()]) as running:
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
    with _running(request, two_hosts.hosts) as running:
        yield running


def _skip(reason):
    if reason:
        pytest.skip(reason)


@contextlib.contextmanager
def _running(request, nodes):
    _skip(cluster.why_not())
    folder = Path(tempfile.mkdtemp(prefix="ssd-slurm-"))  # munged's user can't enter pytest's own
    folder.chmod(0o755)
    running = cluster.Cluster(folder, nodes)
    try:
        running.start()
        yield running
    finally:
        running.stop()
        if request.session.testsfailed:
            for log in sorted(folder.glob("*.out")):
                print(f"--- {log.name}\n{log.read_text(errors='replace')[-8000:]}")
        shutil.rmtree(folder)


def _checkout(folder, programs):
    """Copy the batch scripts, and programs with what they import, into a folder."""
    for name in ("infra", "report", "slurm"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.log"))
    for file in programs:
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the programs and the batch scripts, as a user's checkout has them."""
    return _checkout(tmp_path_factory.mktemp("home"), ROOT.glob("*.py"))


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """The same folder with stand-ins (stand_in.py) for train.py and an evaluation."""
    stand_in = Path(__file__).with_name("stand_in.py")
    folder = _checkout(tmp_path_factory.mktemp("stage"), [ROOT / "utils.py", stand_in])
    shutil.copy(stand_in, folder / "train.py")
    return folder
