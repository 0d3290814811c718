"""Run folders: which one a command gets, who holds it, and what survives a fault."""

import errno
import fcntl
import functools
import json
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from conftest import ROOT

import trainers
import utils
from infra import runs, storage
from infra.checkpoints import Checkpoints

CONFIG = {"arch": "resnet18", "lr": 0.1, "in_classes": [0, 1], "print_freq": 100, "mean": None}
IMAGES = {"train": "aa", "test": None}


@pytest.fixture
def start(tmp_path):
    """Function (config changes) -> the Run that a command would get; its lock is given back."""

    def run(resume=True, images=IMAGES, label="x", fits=lambda state: True, **changes):
        run = runs.open_run(tmp_path, "exp", CONFIG | changes, images, label=label, resume=resume,
                            fits=fits)
        run._lock.lock.release()
        return run

    return run


def finish(run):
    (run.folder / "log.jsonl").write_text('{"event": "start"}\n{"event": "end"}\n')


def test_runs_are_numbered_and_latest_exp_points_to_the_last(start, tmp_path):
    first, second = start(label="x"), start(label="y", lr=0.2)
    assert (first.folder.name, second.folder.name) == ("1--x", "2--y")
    latest = tmp_path / "exp/latest_exp"
    assert os.readlink(latest) == "2--y"
    (tmp_path / "exp/7--of-the-original").mkdir()
    assert start(label="z", lr=0.3).folder.name == "8--z"
    assert (latest / "checkpoint").is_dir()


STARTER = """
import sys, time
from infra import runs
known = runs._known_runs
runs._known_runs = lambda home: (known(home), time.sleep(0.5))[0]  # the other one is here by now
try:
    run = runs.open_run(sys.argv[1], "exp", {config!r}, {images!r}, label="x")
    print(run.folder.name, flush=True)
    sys.stdin.read()
except runs.UserError as error:
    print("refused")
"""


def test_two_programs_that_start_at_once_get_one_run_and_a_refusal(tmp_path):
    code = STARTER.format(config=CONFIG, images=IMAGES)
    both = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
    said = [p.stdout.readline().strip() for p in both]
    for process in both:
        process.communicate()
    assert sorted(said) == ["1--x", "refused"]


def test_threads_that_cannot_be_locked_out_never_get_the_same_run_folder(start):
    got = []
    threads = [threading.Thread(target=lambda: got.append(start(resume=False))) for _ in range(16)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len({g.folder for g in got}) == 16


def test_an_unfinished_run_of_the_same_configuration_is_resumed(start, capsys):
    first = start()
    assert start().folder == first.folder
    assert "broken off before anything was saved" in capsys.readouterr().err
    (first.folder.parent / "latest_exp").unlink()  # a kill may have come before it was made
    start()
    assert (first.folder.parent / "latest_exp").resolve() == first.folder.resolve()


def test_how_often_things_are_written_is_no_other_configuration(start):
    assert start(print_freq=1, save_steps=5, no_resume=False).folder == start().folder


def test_settings_that_came_later_than_a_run_count_only_where_they_are_used(start, capsys):
    first = start()
    assert start(workers=None, in_files=False, constants=None).folder == first.folder
    files = start(workers=2, in_files=True)
    assert files.folder.name == "2--x"
    assert start(workers=9, in_files=True).folder == files.folder
    given = start(mean=[0.5] * 3, std=[0.2] * 3, constants=[[0.5] * 3, [0.2] * 3])
    assert given.folder.name == "3--x"
    said = capsys.readouterr().err
    assert "constants None there, [[0.5, 0.5, 0.5], [0.2, 0.2, 0.2]] here" in said


def test_a_finished_run_starts_the_next_number(start):
    first = start()
    finish(first)
    assert start().folder.name == "2--x"


@pytest.mark.parametrize("kind", ["folder", "file", "link to nothing"])
def test_what_is_called_latest_exp_and_is_no_link_of_ours_is_moved_aside(
    start, tmp_path, capsys, kind
):
    latest = tmp_path / "exp/latest_exp"
    latest.parent.mkdir()
    if kind == "folder":
        (latest / "checkpoint").mkdir(parents=True)
        (latest / "checkpoint/model_best.pth.tar").write_text("the original's")
    elif kind == "file":
        latest.write_text("the original's")
    else:
        latest.symlink_to("gone")
    folder = start().folder
    assert latest.resolve() == folder.resolve()
    aside = list(latest.parent.glob("latest_exp.*"))
    assert len(aside) == (kind != "link to nothing")
    for path in aside:
        kept = path / "checkpoint/model_best.pth.tar" if kind == "folder" else path
        assert kept.read_text() == "the original's"
        assert f"it is now {path}" in capsys.readouterr().err


@pytest.mark.parametrize("last", ['{"event": "end"', "", '{"event": "epoch"}\n', "[]\n"])
def test_a_run_whose_last_record_is_not_a_whole_end_is_unfinished(start, last):
    first = start()
    (first.folder / "log.jsonl").write_text('{"event": "start"}\n' + last)
    assert start().folder == first.folder


def test_no_resume_starts_the_next_number(start):
    start()
    assert start(resume=False).folder.name == "2--x"


def test_a_changed_configuration_starts_the_next_number_and_names_the_keys(start, capsys):
    start()
    assert start(lr=0.5, arch="resnet50").folder.name == "2--x"
    said = capsys.readouterr().err
    assert "1--x is unfinished" in said
    assert "arch resnet18 there, resnet50 here, lr 0.1 there, 0.5 here" in said


def test_the_newest_run_of_a_configuration_is_found_among_others(start):
    start(), start(lr=0.5)
    assert start().folder.name == "1--x"


def test_other_images_than_the_run_was_started_with_are_refused_with_both_hashes(start):
    start()
    with pytest.raises(utils.UserError, match=r"train images are not.*sha256 is bb, it was aa"):
        start(images={"train": "bb", "test": None})
    with pytest.raises(utils.UserError, match="sha256 is bb"):  # a measured mean follows them
        start(images={"train": "bb", "test": None}, mean=[0.5] * 3)
    assert start(images={"train": "bb", "test": None}, resume=False).folder.name == "2--x"


@pytest.mark.parametrize("content", ["[]", "1", '{"config": null, "images": {}}', "{", ""])
def test_a_folder_whose_configuration_cannot_be_read_is_left_alone(start, content):
    folder = start().folder
    (folder / "config.json").write_text(content)
    assert start().folder.name == "2--x"


HOLDER = """
import sys, time
from infra import runs
run = runs.open_run(sys.argv[1], "exp", {config!r}, {images!r}, label="x")
run.log.start()
print(run.folder, flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds run 1."""
    code = HOLDER.format(config=CONFIG, images=IMAGES)
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT,
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip().endswith("1--x")
    yield process
    process.kill()
    process.wait()


def test_a_run_is_refused_as_long_as_the_process_that_holds_it_lives(start, holder):
    said = rf"being trained by another process \(process {holder.pid} on .*--no-resume"
    with pytest.raises(utils.UserError, match=said):
        start()
    assert start(resume=False).folder.name == "2--x"
    assert start(lr=0.7).folder.name == "3--x"
    holder.kill()
    holder.wait()
    assert start().folder.name == "2--x"  # the newest of these settings
    assert start(lr=0.7).folder.name == "3--x"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_files_cannot_be_locked_a_run_starts_with_a_warning(
    number, tmp_path, monkeypatch, capsys
):
    def no_locks(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    run = runs.open_run(tmp_path, "exp", CONFIG, IMAGES, label="x")
    assert run.folder.name == "1--x"
    assert "cannot be locked" in capsys.readouterr().err


def test_a_job_that_slurm_requeued_is_continued_in_spite_of_no_resume(start, monkeypatch, capsys):
    first = start()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert start(resume=False).folder == first.folder
    assert "--no-resume does not count" in capsys.readouterr().err


# --- logs and checkpoints -------------------------------------------------------------------------


def test_a_log_is_cut_back_to_what_the_checkpoint_knows(tmp_path):
    log = runs.Log(tmp_path)
    log.record(step=1)
    known = log.sync()
    log.record(step=2)
    log.line("text stays")
    log = runs.Log(tmp_path, keep=known)
    log.record(step=3)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n{"step": 3}\n'
    assert (tmp_path / "setup.log").read_text() == "text stays\n"


def test_lines_that_a_full_disk_refuses_are_reported_once_and_make_the_end_a_failure(
    start, monkeypatch, capsys
):
    run = start()
    run.log.record(step=1)
    with monkeypatch.context() as full:
        full.setattr(storage, "append_lines", lambda *_: (_ for _ in ()).throw(
            OSError(28, "No space left on device")))
        run.log.record(step=2)
        run.log.record(step=3)
    run.log.record(step=4)
    assert capsys.readouterr().err.count("No space left on device") == 1
    steps = [json.loads(line)["step"] for line in (run.folder / "log.jsonl").open()]
    assert steps == [1, 4]
    with pytest.raises(utils.RunError, match=r"lines of log\.jsonl could not be written"):
        run.finish()
    assert runs.is_finished(run.folder)


def test_what_a_full_disk_cuts_off_is_taken_back(tmp_path):
    code = (
        "import resource, sys\nfrom infra import storage\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
        "storage.append_lines(sys.argv[1], b'123456\\n')\n"
        "try:\n    storage.append_lines(sys.argv[1], b'abcdef\\n')\n"
        "except OSError as error:\n    print(error.strerror)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], cwd=ROOT,
                          capture_output=True, text=True, check=True)
    assert done.stdout
    assert (tmp_path / "x").read_bytes() == b"123456\n"


def state(step):
    generator = torch.Generator().manual_seed(step)
    return {"state_dict": {"w": torch.rand(50, 40, generator=generator)},
            "progress": {"epoch": 0, "step": step}}


def step_of(folder):
    saved = Checkpoints(folder).newest()
    return saved and saved["progress"]["step"]


def test_the_newest_checkpoint_and_the_one_before_are_kept(tmp_path):
    store = Checkpoints(tmp_path)
    assert store.newest() is None
    for step in (1, 2, 3):
        store.save(state(step), ["model_best.pth.tar"] if step == 2 else [])
    saved = {f.name: torch.load(f, weights_only=True)["progress"]["step"]
             for f in tmp_path.iterdir()}
    assert saved == {"checkpoint.pth.tar": 3, "previous.pth.tar": 2,
                     "model_best.pth.tar": 2}
    assert step_of(tmp_path) == 3


@pytest.mark.parametrize("percent", [0, 10, 50, 90])
def test_a_checkpoint_cut_anywhere_gives_way_to_the_one_before(tmp_path, percent, capsys):
    store = Checkpoints(tmp_path)
    store.save(state(1))
    store.save(state(2))
    newest = tmp_path / "checkpoint.pth.tar"
    os.truncate(newest, newest.stat().st_size * percent // 100)
    assert step_of(tmp_path) == 1
    said = capsys.readouterr().err
    assert "set aside as checkpoint.pth.tar.damaged" in said
    assert "continuing from" in said
    store.save(state(3))  # the damaged file must not push the whole one out
    assert step_of(tmp_path) == 3
    os.truncate(newest, 10)
    assert step_of(tmp_path) == 1


def test_a_checkpoint_with_flipped_bytes_is_refused_or_holds_what_was_saved(tmp_path):
    store = Checkpoints(tmp_path)
    store.save(state(1))
    store.save(state(2))
    newest = tmp_path / "checkpoint.pth.tar"
    whole = newest.read_bytes()
    refused = 0
    for at in range(0, len(whole), max(1, len(whole) // 100)):
        flipped = bytearray(whole)
        flipped[at] ^= 0xFF
        newest.write_bytes(flipped)
        saved = Checkpoints(tmp_path).newest()
        if saved["progress"]["step"] == 1:
            refused += 1
        else:
            assert torch.equal(saved["state_dict"]["w"], state(2)["state_dict"]["w"]), at
    assert refused > 66  # the rest is padding, dates, and the like


def test_numbered_checkpoints_are_the_last_resort_and_no_whole_one_an_error(tmp_path):
    store = Checkpoints(tmp_path)
    store.save(state(9), ["checkpoint_9.pth.tar"])
    store.save(state(10), ["checkpoint_10.pth.tar"])
    store.save(state(11))
    for name in (store.NEWEST, store.PREVIOUS):
        (tmp_path / name).write_bytes(b"")
    assert step_of(tmp_path) == 10
    for path in tmp_path.glob("*.pth.tar"):
        path.write_bytes(b"x")
    for _ in range(2):  # nothing is moved, so the next start does not begin anew either
        with pytest.raises(utils.UserError, match=r"no whole checkpoint.*--no-resume"):
            step_of(tmp_path)


OTHERS = {  # what stands in the newest checkpoint of a run instead of its state
    "progress of another kind": lambda s: s | {"progress": [1]},
    "progress without losses": lambda s: s | {"progress": {"epoch": 0, "step": 1, "log_bytes": 0}},
    "an epoch that is text": lambda s: s | {"progress": s["progress"] | {"epoch": "0"}},
    "an epoch after the last": lambda s: s | {"progress": s["progress"] | {"epoch": 10**9}},
    "weights of another network": lambda s: s | {"state_dict": {"weight": torch.zeros(3)}},
    "weights that are text": lambda s: s | {"state_dict": "x"},
    "no optimiser": lambda s: s | {"optimizer": None},
    "an optimiser of another network": lambda s: s | {
        "optimizer": s["optimizer"] | {"state": {0: {"momentum_buffer": torch.zeros(7)}}}},
    "another optimiser": lambda s: s | {"optimizer": {"state": {}, "param_groups": []}},
    "settings of another run": lambda s: s | {"config": s["config"] | {"lr": 0.2}},
    "settings that are text": lambda s: s | {"config": "x"},
    "a list": lambda s: [s],
    "a number": lambda s: 3,
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_checkpoint_of_something_else_gives_way_to_the_one_before(kind, start, capsys):
    network = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    settings = {"epochs": 2, "warmup": False}
    fits = functools.partial(trainers.fits, network, optimizer)
    run = start(fits=fits, **settings)
    for step in (1, 2):
        progress = trainers.Progress(0, step, torch.zeros(step), 0.5)
        run.save(trainers.checkpoint_state(network, optimizer, CONFIG | settings, progress))
    assert start(fits=fits, **settings).saved["progress"]["step"] == 2
    newest = run.folder / "checkpoint/checkpoint.pth.tar"
    torch.save(OTHERS[kind](torch.load(newest, weights_only=True)), newest)
    capsys.readouterr()
    assert start(fits=fits, **settings).saved["progress"]["step"] == 1
    first, second = capsys.readouterr().err.splitlines()
    assert f"{newest} is whole, but no checkpoint of this run; set aside as" in first
    assert "continuing from" in second


@pytest.mark.parametrize("line", ["[" * 4000, "[1]", "3", '"end"', '{"event": ["end"]}'])
def test_a_strange_line_in_the_log_or_settings_of_a_run_is_passed_over(line, start):
    first = start()
    (first.folder / "log.jsonl").write_text(f"{line}\n")
    assert start().folder == first.folder  # it is unfinished
    (first.folder / "config.json").write_text(line)
    assert start().folder != first.folder


def test_a_disk_or_memory_that_fails_in_reading_is_no_damaged_checkpoint(tmp_path, monkeypatch):
    store = Checkpoints(tmp_path)
    store.save(state(1))
    for error in (OSError(5, "Input/output error"), MemoryError(),
                  RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(torch, "load", fail)
        with pytest.raises(type(error)):
            store.newest()
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoint.pth.tar"]


def test_a_failed_write_keeps_the_old_file_and_is_tried_again(tmp_path, monkeypatch, capsys):
    store = Checkpoints(tmp_path)
    store.save(state(1))
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
        store.save(state(2), ["model_best.pth.tar"])
        assert list(store.unwritten) == ["model_best.pth.tar", "checkpoint.pth.tar"]
    assert "model_best.pth.tar was not written (No space left)" in capsys.readouterr().err
    assert sorted(f.name for f in tmp_path.iterdir()) == ["checkpoint.pth.tar"]
    store.save(state(3))
    assert not store.unwritten
    best = torch.load(tmp_path / "model_best.pth.tar", weights_only=True)
    assert best["progress"]["step"] == 2  # the best was that of step 2
    assert step_of(tmp_path) == 3


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"])
@pytest.mark.usefixtures("terminal")
def test_a_signal_sets_a_flag_and_a_second_interrupt_ends_at_once(name):
    before = signal.getsignal(signal.SIGINT)
    with runs.stop_on_signals() as stop:
        assert stop.number == 0
        os.kill(os.getpid(), getattr(signal, name))
        assert stop.number == signal.Signals[name]
        if name == "SIGINT":
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.usefixtures("terminal")
def test_what_nohup_has_ignored_stays_so():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with runs.stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.number == 0
