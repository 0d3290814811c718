"""Run folders: which run a command starts or continues, its logs, and the signals that stop it.

    run = open_run("results", "temp", config, images, label="x")  # a new run or an unfinished one
    run.saved                                                     # its newest checkpoint, or None
    with stop_on_signals() as stop: ...                           # SIGTERM, SIGINT, ...
    run.save(state)
    run.finish()

The state of a run is its checkpoint (checkpoints.py): what was logged or saved after it is made
again when the run is resumed. Nothing here depends on a clock being right.
"""

import contextlib
import errno
import json
import os
import secrets
import shlex
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import filelock
import torch

import utils
from infra import distributed, storage
from infra.checkpoints import Checkpoints
from utils import RunError, Stopped, UserError

# No weight depends on these flags, so a run may be continued with others. Mean and standard
# deviation follow from the images, or stand in "constants" too; workers stand in "in_files".
NOT_IN_IDENTITY = ("config", "results_dir", "exp_name", "data_dir", "no_download", "no_resume",
                   "print_freq", "save_freq", "save_steps", "fast", "method", "gpu",
                   "workers", "mean", "std")


# --- which run ------------------------------------------------------------------------------------


@dataclass
class Run:
    """A run: its folder, its logs, its checkpoints. All processes have one; the main one writes."""

    folder: Path  # RESULTS/EXP/N--label
    saved: dict | None  # the newest checkpoint of a resumed run
    log: "Log"
    _lock: object = None  # held until the process ends, however it ends
    _checkpoints: Checkpoints | None = None

    def save(self, state, names=()):
        """Save the state of trainers.checkpoint_state with the length of the log, and copies."""
        if self._checkpoints is not None:
            state["progress"]["log_bytes"] = self.log.sync()
            self._checkpoints.save(state, names)

    def stop(self, number, where):
        """Raise Stopped after a signal, in all processes; RunError if nothing could be saved."""
        name = signal.Signals(number).name
        # Nobody ends before the main process has saved.
        unwritten = distributed.broadcast_object(
            self._checkpoints and list(self._checkpoints.unwritten))
        if unwritten:
            raise RunError(f"stopped by {name}, and {unwritten[-1]} could not be written; the same "
                           "command continues from the checkpoint before")
        self.log.line(f"stopped by {name} after {where}; saved, the same command continues")
        raise Stopped(f"stopped by {name}; the same command continues {self.folder} after {where}")

    def finish(self, **fields):
        """Record the end; RunError if a checkpoint or lines of the logs could not be written."""
        if self._checkpoints is None:
            return
        if names := ", ".join(self._checkpoints.unwritten):
            raise RunError(f"trained to the end, but {names} could not be written; the same "
                           "command trains again from the checkpoint before")
        self.log.record(event="end", **fields)
        self.log.sync()
        if self.log.lost:
            raise RunError(f"trained to the end, but lines of {' and '.join(self.log.lost)} could "
                           f"not be written to {self.folder}")
        self.log.line(f"done: {self.folder / 'checkpoint' / Checkpoints.NEWEST}")


def open_run(results_dir, exp_name, config, images, *, label, resume=True, fits=lambda state: True):
    """Resume the unfinished run of this name and configuration, or start the next: a Run.

    Args: results_dir, exp_name, label: the run folders are RESULTS/EXP/N--label. config: dict of
        plain types; NOT_IN_IDENTITY keys don't count. images: dict of hashes. resume: False starts
        the next number whatever is there. fits: see Checkpoints.newest.
    Raises: UserError: another live process holds the run, its images were others, the processes
        were started with different settings, or the place can't be written to.
    """
    settings = {f"--{key.replace('_', '-')}": value for key, value in config.items()
                if key not in ("config", "data_dir", "dataset", "results_dir")}  # may be elsewhere
    hashes = {f"the sha256 of the {split} images": value for split, value in images.items()}
    distributed.check_same({**settings, **hashes, "the version of torch": torch.__version__})
    # A job that Slurm has requeued was typed once.
    if not resume and os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
        utils.note("--no-resume does not count at a restart by Slurm: the run is continued")
        resume = True
    folder = saved = lock = store = None
    if distributed.is_main_process():
        folder, resumed, lock = _find_or_start(Path(results_dir) / exp_name, label,
                                               {"config": config, "images": images}, resume)
        store = Checkpoints(folder / "checkpoint")
        saved = store.newest(lambda state: fits(state) and not _changed_keys(
            state.get("config", config), config))
        if resumed and saved is None:
            utils.note(f"{folder} was broken off before anything was saved, and begins again")
    log = Log(folder, keep=saved["progress"]["log_bytes"] if saved else 0)
    folder, saved = distributed.broadcast_object((folder, saved))
    return Run(folder, saved, log, lock, store)


def _find_or_start(home, label, identity, resume):
    """(folder, whether it was there before, its lock)."""
    storage.make_output_folder(home, "--results-dir")
    identity = json.loads(json.dumps(identity))
    with _lock(home / ".lock"):  # or two equal commands started together would both find nothing
        known = list(_known_runs(home)) if resume else []
        same = (k for k in known if not _changed_keys(k[1]["config"], identity["config"]))
        folder, before = next(same, (None, None))
        if resumed := folder is not None and not is_finished(folder):
            for split, digest in identity["images"].items():
                if (then := before["images"].get(split)) != digest:
                    raise UserError(
                        f"the {split} images are not those that {folder} was started with: their "
                        f"sha256 is {digest}, it was {then}; put the old ones back, or start a new "
                        "run with --no-resume")
        else:
            _note_changed_settings(known, identity)
            folder = _new_folder(home, label, identity)
        try:
            lock = _lock(folder / ".lock", timeout=0)
        except filelock.Timeout:
            starts = [f" (process {r['pid']} on {r['host']})"
                      for r in storage.read_records(folder / "log.jsonl") if "pid" in r]
            raise UserError(f"{folder} is being trained by another process{''.join(starts[-1:])}; "
                            "--no-resume starts another run with the same settings") from None
        _point_latest(home, folder)
        return folder, resumed, lock


def is_finished(folder):
    """Tell whether a run has ended: whether its last record is that of the end."""
    records = storage.read_records(Path(folder) / "log.jsonl")
    return bool(records) and records[-1].get("event") == "end"


def _numbered(home):
    return [(int(n), d) for d in home.iterdir() if (n := d.name.partition("--")[0]).isdecimal()]


def _known_runs(home):
    """(folder, identity) of the runs of a name, newest first; those of the original have none."""
    for _, folder in sorted(_numbered(home), reverse=True):
        with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
            identity = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if all(isinstance(identity.get(key), dict) for key in ("config", "images")):
                yield folder, identity


def _changed_keys(old, new):
    """Keys of two configurations that count and differ."""
    keys = [k for k in {**new, **old} if k not in NOT_IN_IDENTITY]
    # A setting that did not exist yet when the run was started was off.
    return [k for k in keys if (old.get(k) or None) != (new.get(k) or None)]


def _note_changed_settings(known, identity):
    """Say why the newest unfinished run is not continued."""
    for folder, before in known:
        changed = _changed_keys(before["config"], identity["config"])
        if changed and not is_finished(folder):
            what = ", ".join(f"{k.replace('_', '-')} {before['config'].get(k)} there, "
                             f"{identity['config'].get(k)} here" for k in changed)
            utils.note(f"{folder} is unfinished, but its settings differ ({what}): a new run")
            return


def _new_folder(home, label, identity):
    """Make the next run folder; it takes its name once it is whole."""
    made = home / f".new-run.{secrets.token_hex(4)}"
    (made / "checkpoint").mkdir(parents=True)
    with storage.atomic_write(made / "config.json", "w", encoding="utf-8") as file:
        json.dump(identity, file, indent=1)
        file.write("\n")
    number = max((n for n, _ in _numbered(home)), default=0) + 1
    while True:
        try:
            return made.rename(home / f"{number}--{label}")
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            number += 1  # another program was faster, where files cannot be locked


def _lock(path, timeout=-1):
    """Lock a file until the process ends, or filelock.Timeout; without locks here, go on."""
    try:
        return filelock.FileLock(path, fallback_to_soft=False).acquire(timeout=timeout)
    except filelock.Timeout:
        raise
    except (OSError, NotImplementedError):  # a soft lock would outlive a process that is killed
        utils.note(f"{path} cannot be locked on this file system; do not start the same training "
                   "twice")
        return contextlib.nullcontext()


def _point_latest(home, folder):
    """Let RESULTS/EXP/latest_exp be the run that is trained now."""
    latest, pointer = home / "latest_exp", home / f".latest_exp.{folder.name}"
    if latest.exists() and not latest.is_symlink():  # a folder that the original made
        aside = home / f"latest_exp.{secrets.token_hex(4)}"
        latest.rename(aside)
        utils.note(f"{latest} was no link to a run; it is now {aside}")
    try:
        pointer.unlink(missing_ok=True)
        pointer.symlink_to(folder.name)
        os.replace(pointer, latest)
    except OSError as error:  # a file system without symbolic links
        utils.note(f"{latest} was not updated: {error.strerror}")


# --- logs -----------------------------------------------------------------------------------------


class Log:
    """Two logs of a run: readable lines (setup.log, and stdout) and JSON records (log.jsonl).

    A write that fails, on a full disk for example, is reported once and never ends a run; `lost`
    names the logs that lack a line.

    Args: folder: the run folder; None writes nothing, for the processes that do not write. keep:
        bytes of the records that stay, 0 for a new run.
    """

    def __init__(self, folder, keep=0):
        self.lost, self._resumed = [], keep > 0
        self._text, self._records = (folder and Path(folder) / name
                                     for name in ("setup.log", "log.jsonl"))
        if folder is not None:
            self._text.touch(), self._records.touch()
            os.truncate(self._records, min(keep, self._records.stat().st_size))

    def line(self, text):
        """Write one readable line."""
        if self._text is not None:
            utils.say(text)
            self._append(self._text, text)

    def record(self, **fields):
        """Write one JSON line."""
        if self._records is not None:
            self._append(self._records, json.dumps(fields))

    def start(self, **fields):
        """Record a start or resume: what was typed, and which process on which machine runs it."""
        self.record(event="resume" if self._resumed else "start",
                    command=shlex.join(["python", *sys.argv]), host=socket.gethostname(),
                    pid=os.getpid(), processes=distributed.world_size(),
                    versions=utils.versions(), **fields)

    def sync(self):
        """Bring the records to the disk; returns how many bytes they have, for a checkpoint."""
        with contextlib.suppress(OSError), open(self._records, "rb+") as file:
            os.fsync(file.fileno())
        return self._records.stat().st_size

    def _append(self, path, text):
        try:
            storage.append_lines(path, text.encode(errors="surrogateescape") + b"\n")
        except OSError as error:
            if path.name not in self.lost:
                utils.note(f"{path} cannot be written to ({error.strerror}); lines of it are lost")
                self.lost.append(path.name)


# --- signals --------------------------------------------------------------------------------------


@contextlib.contextmanager
def handled(handler, numbers):
    """Handle signals by a function (number, frame) inside this context."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def stop_on_signals():
    """Let the signals that ask for an end set the `number` of what this yields, 0 before."""
    stop = SimpleNamespace(number=0)

    def ask(number, frame):
        stop.number = number
        if number == signal.SIGINT:  # a second one ends the program at once
            signal.signal(number, signal.default_int_handler)

    with handled(ask, distributed.stop_signals()):
        yield stop
