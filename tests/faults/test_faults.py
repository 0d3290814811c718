"""Many faults, each caused for real, and the table of what they cost (some 10 minutes).

    make test-faults

Every test breaks a small training in one way, types the same command again until it ends, and
compares the end with that of the unbroken run, bit for bit. The short ones of the kind are in
tests/test_resume.py. The table is printed at the end.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from test_resume import assert_equal, end_of  # noqa: E402 (its folder is known only now)

FLAGS = ("--arch", "resnet18", "--size", 8, "--epochs", 3, "--batch-size", 16, "--lr", 0.01,
         "--print-freq", 1, "--normalize", "--warmup")
MODES = ("SimCLR", "SupCon", "SupCE")
ROWS = []


def typed(npz, mode="SupCE", *flags):
    """The command of a training, as a list."""
    return [sys.executable, str(ROOT / "train.py"), "--dataset", f"npz:{npz}",
            *map(str, FLAGS), "--training-mode", mode, *map(str, flags)]


def run(line, home, **kwargs):
    return subprocess.run(line, cwd=home, capture_output=True, text=True, check=False, **kwargs)


def record(fault, tries, lost, equal):
    ROWS.append(f"{fault:44} {tries:>5}   {lost:>14}   {equal}")


@pytest.fixture(scope="module", autouse=True)
def table(request):
    yield
    head = f"{'fault':44} {'tries':>5}   {'lost steps':>14}   end equal to the unbroken run"
    text = "\n".join([head, *ROWS])
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n\n{text}\n")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, tiny_npz):
    """Function (mode, flags) -> the end of a run that nothing broke."""
    ends = {}

    def train(mode="SupCE", *flags):
        if (mode, flags) not in ends:
            home = tmp_path_factory.mktemp("unbroken")
            done = run(typed(tiny_npz, mode, *flags), home)
            assert done.returncode == 0, done.stderr
            ends[mode, flags] = end_of(home)
            shutil.rmtree(home)
        return ends[mode, flags]

    return train


def steps_logged(home):
    """How many steps a run's log has, 0 without one."""
    logs = list((home / "results/temp").glob("1--*/log.jsonl"))
    lines = logs[0].read_text().splitlines(keepends=True) if logs else []
    return sum(line.endswith("\n") and json.loads(line)["event"] == "step" for line in lines)


def resumed_at(home, steps_per_epoch=3, warm=10):
    """The step of the whole run from which the last start went on."""
    log = next((home / "results/temp").glob("1--*/log.jsonl"))
    for line in reversed(log.read_text().splitlines()):
        event = json.loads(line)
        if event["event"] == "resume":
            return (event["epoch"] + warm) * steps_per_epoch + event["step"]
    return 0


@pytest.mark.parametrize("mode", MODES)
def test_kills_at_random_moments_cost_no_more_than_the_steps_since_the_last_save(
    mode, unbroken, tmp_path, tiny_npz
):
    """15 kills in all: a process is killed within seconds of its first step."""
    kills, rng = 5, random.Random(mode)
    line, lost, reached, home = typed(tiny_npz, mode, "--save-steps", 1), [], None, tmp_path / "0"
    home.mkdir()
    for kill in range(kills):
        process = subprocess.Popen(line, cwd=home, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        before, began = steps_logged(home), time.monotonic()
        # Importing takes longer than all else: wait for a step, not to kill that only
        while steps_logged(home) <= before and process.poll() is None:
            before = min(before, steps_logged(home))  # resuming a run cuts its log
            time.sleep(0.01)
            assert time.monotonic() - began < 240
        if reached is not None:
            lost.append(reached - resumed_at(home))
        time.sleep(rng.uniform(0, 0.8))
        process.kill()
        reached = steps_logged(home)
        if process.wait() == 0:  # it was at its end: that run is compared, and another begins
            assert_equal(unbroken(mode, "--save-steps", 1), end_of(home))
            home, reached = tmp_path / str(kill + 1), None
            home.mkdir()
    last = run(line, home)
    assert last.returncode == 0, last.stderr
    assert_equal(unbroken(mode, "--save-steps", 1), end_of(home))
    assert max(lost) <= 2  # the step whose save was cut off, and what was logged of the next
    record(f"SIGKILL at a random moment, {mode}", kills,
           f"{sum(lost) / len(lost):.1f}, at most {max(lost)}", "yes")


@pytest.mark.parametrize("place", ["sync", "rename", "link", "append", "monitor", "step"])
def test_kills_at_every_stage_of_a_save(place, unbroken, tmp_path, tiny_npz):
    line = typed(tiny_npz, "SupCE", "--save-steps", 2)
    tries = (1, 4) if place != "monitor" else (1, 2)
    for n in tries:
        killed = run([sys.executable, str(ROOT / "tests/kill_at.py"), place, str(n), *line[1:]],
                     tmp_path)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    last = run(line, tmp_path)
    assert last.returncode == 0, last.stderr
    assert_equal(unbroken("SupCE", "--save-steps", 2), end_of(tmp_path))
    record(f"SIGKILL just before a {place}", len(tries), "not counted", "yes")


@pytest.fixture(scope="module")
def half(tmp_path_factory, tiny_npz):
    """A run that was killed half-way, with a newest checkpoint and the one before."""
    home = tmp_path_factory.mktemp("half")
    killed = run([sys.executable, str(ROOT / "tests/kill_at.py"), "step", "20",
                  *typed(tiny_npz)[1:]], home)
    assert killed.returncode == -signal.SIGKILL
    return home


@pytest.mark.parametrize("percent", [0, 50, 90])
def test_a_checkpoint_cut_off_costs_the_steps_since_the_one_before(
    percent, half, unbroken, tmp_path, tiny_npz
):
    home = tmp_path / "home"
    shutil.copytree(half, home, symlinks=True)
    (newest,) = home.glob("results/temp/1--*/checkpoint/checkpoint.pth.tar")
    os.truncate(newest, newest.stat().st_size * percent // 100)
    last = run(typed(tiny_npz), home)
    assert last.returncode == 0, last.stderr
    assert "set aside as checkpoint.pth.tar.damaged" in last.stderr
    assert_equal(unbroken(), end_of(home))
    record(f"checkpoint cut at {percent} % of its length", 1, steps_logged(half) - resumed_at(home),
           "yes")
    shutil.rmtree(home)


def test_a_checkpoint_with_flipped_bytes_costs_the_same(half, unbroken, tmp_path, tiny_npz):
    rng = random.Random(0)
    lost = []
    for n in range(2):
        home = tmp_path / str(n)
        shutil.copytree(half, home, symlinks=True)
        (newest,) = home.glob("results/temp/1--*/checkpoint/checkpoint.pth.tar")
        with newest.open("r+b") as file:
            file.seek(rng.randrange(newest.stat().st_size))
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 0xFF]))
        last = run(typed(tiny_npz), home)
        assert last.returncode == 0, last.stderr
        assert_equal(unbroken(), end_of(home))
        lost.append(steps_logged(half) - resumed_at(home))
        shutil.rmtree(home)
    record("checkpoint with a flipped byte", len(lost), f"at most {max(lost)}", "yes")


@pytest.fixture
def disk(tmp_path, request):
    """A file system of its own, in memory, of the size that the test gives."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "tmpfs", str(place)],
        check=False, capture_output=True, text=True,
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("disk", ["150m"], indirect=True)  # room for one checkpoint, not for two
def test_a_full_disk_costs_nothing_once_there_is_room(disk, unbroken, tiny_npz):
    full = run(typed(tiny_npz), disk)
    assert full.returncode == 1
    assert "No space left on device" in full.stderr
    assert "could not be written" in full.stderr.splitlines()[-1]
    assert "Traceback" not in full.stderr
    reached = steps_logged(disk)
    subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
    last = run(typed(tiny_npz), disk)
    assert last.returncode == 0, last.stderr
    assert_equal(unbroken(), end_of(disk))
    record("full disk, the same command after making room", 1, reached - resumed_at(disk), "yes")


@pytest.mark.parametrize("disk", ["400m"], indirect=True)
def test_a_disk_full_to_the_last_byte_ends_no_run(disk, unbroken, tiny_npz):
    """Lines of the logs are lost, which the exit status says; the network is not."""
    process = subprocess.Popen(typed(tiny_npz), cwd=disk, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    while steps_logged(disk) < 7:
        assert process.poll() is None
        time.sleep(0.05)
    filler = disk / "filler"
    subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=4k"], check=False,
                   capture_output=True)
    time.sleep(2)
    filler.unlink()
    err = process.communicate(timeout=240)[1]
    assert process.returncode == 1, err
    assert err.count("No space left on device); lines of it are lost") <= 2
    assert "trained to the end, but lines of" in err.splitlines()[-1]
    expected, end = unbroken(), end_of(disk)
    assert_equal(expected["checkpoint"], end["checkpoint"])
    assert_equal(expected["model_best"], end["model_best"])
    record("disk full for two seconds", 1, 0, "yes, but for lines of the logs")


def test_files_of_limited_size_cost_no_run_and_the_exit_status_tells(unbroken, tmp_path, tiny_npz):
    """Checkpoints fail as on a full disk, logs do not; nothing half-written is left."""
    limited = ["bash", "-c", 'ulimit -f 2000; exec "$@"', "-", *typed(tiny_npz)]
    done = run(limited, tmp_path)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("train.py: error: trained to the end, but ")
    assert "checkpoint.pth.tar could not be written" in last
    assert "was not written (File too large)" in done.stderr
    (folder,) = (tmp_path / "results/temp").glob("1--*")
    assert not list((folder / "checkpoint").iterdir())
    assert run(typed(tiny_npz), tmp_path).returncode == 0
    assert_equal(unbroken(), end_of(tmp_path))


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGINT", "SIGHUP"])
@pytest.mark.usefixtures("terminal")
def test_a_signal_saves_the_state_at_the_next_step(name, unbroken, tmp_path, tiny_npz):
    process = subprocess.Popen(typed(tiny_npz), cwd=tmp_path, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    while "Warm-up epoch 1 " not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert f"stopped by {name} after epoch -" in out
    assert "the same command continues" in err
    assert "Traceback" not in err
    last = run(typed(tiny_npz), tmp_path)
    assert "continued: " in last.stdout
    assert_equal(unbroken(), end_of(tmp_path))
    record(f"{name} after the first epoch", 1, 0, "yes")


def test_a_clock_set_back_changes_nothing(half, unbroken, tmp_path, tiny_npz):
    """All that the run wrote lies a year in the future."""
    home = tmp_path / "home"
    shutil.copytree(half, home, symlinks=True)
    later = time.time() + 365 * 86400
    for path in home.rglob("*"):
        os.utime(path, (later, later), follow_symlinks=False)
    last = run(typed(tiny_npz), home)
    assert last.returncode == 0, last.stderr
    assert_equal(unbroken(), end_of(home))
    record("clock set back by a year", 1, steps_logged(half) - resumed_at(home), "yes")


def test_two_starts_at_once_never_share_a_run(tmp_path, tiny_npz):
    tries = 4
    line = typed(tiny_npz, "SupCE")
    for n in range(tries):
        home = tmp_path / str(n)
        home.mkdir()
        both = [subprocess.Popen(line, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                 text=True) for _ in range(2)]
        # The loser says so before it trains; then the winner has shown that it goes on
        while all(p.poll() is None for p in both):
            time.sleep(0.05)
        loser = next(p for p in both if p.poll() is not None)
        winner = next(p for p in both if p is not loser)
        assert loser.returncode == 2
        assert "is being trained by another process" in loser.communicate()[1]
        assert len(list((home / "results/temp").glob("[0-9]*"))) == 1
        assert winner.poll() is None
        winner.send_signal(signal.SIGKILL)
        winner.communicate()
        shutil.rmtree(home)
    record("two starts at once", tries, "-", "one trained, the other was refused")
