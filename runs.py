"""Run folders: which run a command starts or continues, who holds it, and what is kept in it.

    run = open_run("results", "temp", label, config, images)   # a new folder, or an unfinished run
    store = Checkpoints(run.folder / "checkpoint")
    saved = store.newest()                                     # None where nothing was saved yet
    log = Log(run.folder, keep=saved and saved["progress"]["log_bytes"])
    with stop_on_signals() as stop: ...                        # SIGTERM, SIGINT, ...

The state of a run is its checkpoint: what was logged or saved after it is made again when the run
is taken up. Nothing here depends on a clock being right.
"""

import atexit
import contextlib
import errno
import fcntl
import io
import json
import os
import signal
import socket
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import distributed
import utils
from utils import UserError

# Flags that say where things are and how often they are written: no weight depends on them, so a
# run may be continued with others. Mean and deviation follow from the images, which have a hash, or
# were given: then they stand in "constants" too. Whether there are workers stands in "in_files".
UNCOUNTED = ("config", "results_dir", "exp_name", "data_dir", "no_download", "no_resume",
             "print_freq", "save_freq", "save_steps", "fast", "method", "gpu",
             "workers", "mean", "std")


# --- which run ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run folder that this process holds.

    Attributes:
        folder: RESULTS/EXP/N--label. taken_up: whether it was there before.
        claim: Claim, held until the exit.
    """

    folder: Path
    taken_up: bool
    claim: "Claim"


def open_run(results_dir, exp_name, label, config, images, resume=True):
    """Take up the newest run of this name and configuration, or start the next number.

    Args:
        results_dir, exp_name: the run folders are RESULTS/EXP/N--label.
        label: of a new folder.
        config: dict of plain types, the resolved configuration; UNCOUNTED keys don't count.
        images: dict of hashes of the training and test images.
        resume: False starts the next number whatever is there.

    Returns:
        Run. A finished run is never taken up.

    Raises:
        UserError: another live process holds the run, its images were others, or the place can't
            be written to.
    """
    home = Path(results_dir) / exp_name
    utils.make_folder(home, "--results-dir")
    settings = json.loads(json.dumps({"config": config, "images": images}))
    while True:
        with _alone(home):  # two equal commands at once must not both find nothing
            known = _known_runs(home) if resume else []
            same = next((k for k in known if not _changed(k[1], settings)), None)
            if same is None or finished(same[0]):
                _say_what_changed(known, settings)
                folder, claim = _start(home, label, settings)
                _point(home, folder)
                return Run(folder, False, claim)
        folder, before = same
        for split, digest in settings["images"].items():
            if before["images"].get(split) != digest:
                raise UserError(
                    f"the {split} images are not those that {folder} was started with: their "
                    f"sha256 is {digest}, it was {before['images'].get(split)}; put the old ones "
                    "back, or start anew with --no-resume")
        claim = Claim(folder)
        claim.take()
        if not finished(folder):  # while we waited for the claim
            _point(home, folder)
            return Run(folder, True, claim)
        claim.release()


def finished(folder):
    """Tell whether a run is done: whether its last record is that of the end."""
    try:
        with open(Path(folder) / "log.jsonl", "rb") as file:
            file.seek(max(0, os.path.getsize(file.name) - 4096))
            last = file.read().splitlines(keepends=True)[-1:]
        return bool(last) and last[0].endswith(b"\n") and json.loads(last[0])["event"] == "end"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _known_runs(home):
    """(folder, settings) of the runs of a name, newest first; those of the original have none."""
    found = []
    for folder in home.iterdir():
        number, path = folder.name.partition("--")[0], folder / "config.json"
        if not number.isdecimal() or not path.is_file():
            continue
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            utils.note(f"{path} is no JSON ({error}); its run is not continued")
            continue
        parts = settings if isinstance(settings, dict) else {}
        if all(isinstance(parts.get(key), dict) for key in ("config", "images")):
            found.append((int(number), folder, settings))
    found.sort(key=lambda run: run[0], reverse=True)
    return [(folder, settings) for _, folder, settings in found]


def _changed(before, settings):
    """Keys of the configuration that count and differ."""
    old, new = before["config"], settings["config"]
    keys = [*new, *(k for k in old if k not in new)]
    # A setting that there was not yet, when the run was started, was off
    return [k for k in keys if k not in UNCOUNTED and (old.get(k) or None) != (new.get(k) or None)]


def _say_what_changed(known, settings):
    """Note why the newest unfinished run is not continued."""
    for folder, before in known:
        changed = _changed(before, settings)
        if changed and not finished(folder):
            what = ", ".join(f"{k.replace('_', '-')} {before['config'].get(k)} there, "
                             f"{settings['config'].get(k)} here" for k in changed)
            utils.note(f"{folder} is unfinished, but its settings differ ({what}): a new run")
            return


def _start(home, label, settings):
    """Make and claim the next run folder: (folder, claim). It takes its name once it is whole."""
    made = Path(tempfile.mkdtemp(dir=home, prefix=".new-run."))
    made.chmod(0o777 & ~utils.umask())
    (made / "checkpoint").mkdir()
    with utils.whole_file(made / "config.json", "w", encoding="utf-8") as file:
        json.dump(settings, file, indent=1)
        file.write("\n")
    taken = [int(n) for d in home.iterdir() if (n := d.name.partition("--")[0]).isdecimal()]
    number = max(taken, default=0) + 1
    while True:
        folder = home / f"{number}--{label}"
        try:
            made.rename(folder)
            break
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            number += 1  # another program was faster
    claim = Claim(folder)
    claim.take()
    return folder, claim


def _point(home, folder):
    """Let RESULTS/EXP/latest_exp be the run that is trained now."""
    latest, pointer = home / "latest_exp", home / f".latest_exp.{folder.name}"
    try:
        pointer.unlink(missing_ok=True)
        pointer.symlink_to(folder.name)
        os.replace(pointer, latest)
    except OSError as error:  # a real folder of the original's stands there, or no symbolic links
        pointer.unlink(missing_ok=True)
        utils.note(f"{latest} was not updated: {error.strerror}")


@contextlib.contextmanager
def _alone(home):
    """Hold the lock of an experiment's folder; where the file system has none, go on without."""
    with open(home / ".lock", "a") as file:
        with contextlib.suppress(OSError):
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


# --- who holds it ---------------------------------------------------------------------------------

BEAT = 10.0  # seconds between two signs of life of a claim
BEATS_MISSED = 3  # after which a claim of another machine counts as dead


class Claim:
    """Hold a run folder for one live process.

    The claim is a lock on RUN/claim.json, which ends with its process however that dies, and the
    file says who: host, pid, start time of the process. Locks do not reach other machines on every
    file system, and may outlive them on others, so of a claim that was written on another machine
    the beat decides: it is dead once that stands still. No two clocks are compared.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder):
        self._folder, self._path = Path(folder), Path(folder) / "claim.json"
        self._me = {"host": socket.gethostname(), "boot": _boot(), "pid": os.getpid(),
                    "started": _started(os.getpid())}
        self._ended, self._thread, self._lost = threading.Event(), None, None

    def take(self):
        """Take the claim, over from a dead process where there was one; held until the exit.

        Raises:
            UserError: a live process holds it.
        """
        locked = self._open()
        holder = self._read()
        if holder and not self._is_here(holder):
            locked = self._watch(holder)
        elif locked is None and holder and _started(holder["pid"]) == holder["started"]:
            locked = False  # no locks here, but the process is found
        if locked is False:
            self._refuse()
        if holder:
            utils.note(f"{self._folder}: process {holder['pid']} on {holder['host']} is gone; "
                       "its run is taken over")
        self._write(0)
        if locked is None or (holder and not self._is_here(holder)):
            time.sleep(BEAT)  # somebody else may have judged so too: who wrote last has it
            if self._read_again() != self._me | {"beat": 0}:
                self._refuse()
        self._thread = threading.Thread(target=self._keep_beating, daemon=True)
        self._thread.start()
        atexit.register(self.release)

    def check(self):
        """Stop if another process has taken the run over, since this one seemed dead.

        Raises:
            utils.RunError: names it.
        """
        if self._lost:
            raise utils.RunError(f"{self._folder} was taken over by process {self._lost['pid']} on "
                                 f"{self._lost['host']}, to which this one seemed dead; stopped")

    def release(self):
        """Give the claim back, so that nobody has to find out whether its process lives."""
        if not self._ended.is_set():
            self._ended.set()
            self._thread.join()
            with contextlib.suppress(OSError):
                if not self._lost:
                    os.ftruncate(self._handle, 0)
                os.close(self._handle)

    def _open(self):
        """Whether the lock is ours; None where the file system has no locks."""
        self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        return self._lock()

    def _lock(self):
        try:
            fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except (BlockingIOError, PermissionError):
            return False
        except OSError:
            return None

    def _read(self):
        """What the file says of its holder, None where it is empty."""
        with contextlib.suppress(ValueError, KeyError, TypeError):
            holder = json.loads(os.pread(self._handle, LINE, 0))
            return {k: holder[k] for k in (*self._me, "beat")}
        return None

    def _read_again(self):
        """The same through a new handle: a network file system looks again when a file is opened.

        The lock goes with the old handle and is taken anew.
        """
        os.close(self._handle)
        return self._read() if self._open() is not False else {}

    def _is_here(self, holder):
        return holder["boot"] == self._me["boot"] is not None

    def _watch(self, holder):
        """Wait whether a claim of another machine beats: False if so, else as `_lock`.

        A lock of a machine that died may stay for a minute or two; nobody else has it then.
        """
        wait = BEAT * BEATS_MISSED
        utils.note(f"{self._folder} was claimed by process {holder['pid']} on {holder['host']}; "
                   f"waiting {wait:.0f} s for a sign of life")
        for _ in range(5):
            time.sleep(wait)
            os.close(self._handle)
            locked = self._open()
            if self._read() != holder:
                return False
            if locked is not False:
                break
        return locked

    def _refuse(self):
        holder = self._read()
        os.close(self._handle)
        who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
        raise UserError(f"{self._folder} is being trained by {who}; --no-resume starts another "
                        "run with the same settings")

    def _write(self, beat):
        line = json.dumps(self._me | {"beat": beat}).encode().ljust(LINE - 1) + b"\n"
        with contextlib.suppress(OSError):  # a full disk takes no beat, and must not end the run
            os.pwrite(self._handle, line, 0)
            os.fsync(self._handle)  # other machines see it now, not when the system likes

    def _keep_beating(self):
        beat = 0
        while not self._ended.wait(BEAT):
            holder = self._read()
            if holder and holder != self._me | {"beat": beat}:
                self._lost = holder
                return
            beat += 1
            self._write(beat)


LINE = 512  # bytes of a claim: always as many, so that no reader finds half of one


def _boot():
    """What tells this start of this machine, and this container, from others; None if nothing."""
    with contextlib.suppress(OSError):
        return (Path("/proc/sys/kernel/random/boot_id").read_text().strip()
                + " " + os.readlink("/proc/self/ns/pid"))
    return None


def _started(pid):
    """When a process of this machine was started, in ticks since boot; None where there is none."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return None


# --- what is kept in it ---------------------------------------------------------------------------


class Log:
    """Two logs of a run: readable lines (setup.log, and stdout) and JSON records (log.jsonl).

    Lines are written whole. Where the disk takes none, they wait in memory and go first the next
    time; a full disk never ends a run.

    Args:
        folder: the run folder.
        keep: bytes of the records that stay; later ones are of steps that will be made again.
    """

    def __init__(self, folder, keep=0):
        self._waiting, self._noted = {}, set()
        for name in ("setup.log", "log.jsonl"):
            path = Path(folder) / name
            self._waiting[path] = b""
            path.touch()
        self._text, self._records = self._waiting
        os.truncate(self._records, min(keep, self.size))

    @property
    def size(self):
        """Bytes of the records, those that wait included."""
        return self._records.stat().st_size + len(self._waiting[self._records])

    def line(self, text):
        """Write one readable line."""
        with contextlib.suppress(OSError):  # a closed pipe, a full disk behind stdout
            print(text, flush=True)
        self._add(self._text, text)

    def record(self, **fields):
        """Write one JSON line."""
        self._add(self._records, json.dumps(fields))

    def sync(self):
        """Bring the records to the disk, those that wait too; returns whether all are there.

        Checkpoints name a length of the records, so these go first.
        """
        self._flush(self._records)
        with contextlib.suppress(OSError), open(self._records, "rb+") as file:
            os.fsync(file.fileno())
            return not self._waiting[self._records]
        return False

    def _add(self, path, text):
        self._waiting[path] += text.encode(errors="surrogateescape") + b"\n"
        self._flush(path)

    def _flush(self, path):
        if not self._waiting[path]:
            return
        try:
            utils.append_whole(path, self._waiting[path])
            self._waiting[path] = b""
        except OSError as error:
            if path not in self._noted:
                utils.note(f"{path} cannot be written to ({error.strerror}); its lines wait")
            self._noted.add(path)
        else:
            self._noted.discard(path)


class NoLog:
    """The logs of a process that has none: rank 0 writes those of the run."""

    size = 0

    def line(self, text):
        """Write nothing."""

    def record(self, **fields):
        """Write nothing."""

    def sync(self):
        """Have nothing to write."""
        return True


class Checkpoints:
    """The checkpoints of a run: written whole, the one before kept, failed writes tried again.

    Args:
        folder: where they are.
    """

    NEWEST, BEFORE = "checkpoint.pth.tar", "checkpoint_before.pth.tar"

    def __init__(self, folder):
        self._folder = Path(folder)
        self._waiting = {}
        for left in self._folder.glob(".*.pth.tar*"):  # by saves that were killed
            left.unlink()

    @property
    def missing(self):
        """Names of checkpoints that could not be written yet."""
        return list(self._waiting)

    def save(self, state, names=(), hold=False):
        """Write the newest checkpoint, after copies of it under other names.

        A kill between two of them loses none: the newest, from which a run goes on, comes last. A
        failed write is noted and tried again at the next call; the file that was there stays.

        Args:
            state: tensors and plain types only.
            names: of the copies, as "model_best.pth.tar".
            hold: only keep it for the next call, since the log that it counts on is not written.
        """
        buffer = io.BytesIO()  # torch's own writer does not say why a write to a file fails
        torch.save(state, buffer)
        self._waiting.pop(self.NEWEST, None)
        self._waiting |= dict.fromkeys([*names, self.NEWEST], buffer.getbuffer())
        for name in () if hold else list(self._waiting):
            try:
                before = self._keep_the_one_before if name == self.NEWEST else None
                with utils.whole_file(self._folder / name, before_naming=before) as file:
                    file.write(self._waiting[name])
            except OSError as error:
                utils.note(f"{self._folder / name} was not written ({error.strerror}); what was "
                           "there stays, training goes on and tries again")
                return
            del self._waiting[name]

    def _keep_the_one_before(self):
        """Give the newest checkpoint a second name, which stays when the next one takes its first.

        Called once the next one is whole on the disk, so at any moment one whole file has a name.
        """
        newest, link = self._folder / self.NEWEST, self._folder / f".{self.BEFORE}"
        if not newest.exists():
            return
        link.unlink(missing_ok=True)
        try:
            os.link(newest, link)
        except OSError:  # a file system without links: the name moves
            os.replace(newest, self._folder / self.BEFORE)
        else:
            os.replace(link, self._folder / self.BEFORE)

    def newest(self):
        """Read the newest checkpoint that is whole.

        Returns:
            what was saved, on the CPU; None where nothing was. A damaged file is noted and put
            aside, and the one before it is read.

        Raises:
            UserError: there are checkpoints and none is whole.
        """
        numbered = sorted(self._folder.glob("checkpoint_[0-9]*.pth.tar"),
                          key=lambda f: -int("0" + "".join(filter(str.isdigit, f.name))))
        damaged = []
        for path in (self._folder / self.NEWEST, self._folder / self.BEFORE, *numbered):
            if not path.exists():
                continue
            try:
                content = utils.read_checkpoint(path)
                if isinstance(content, dict) and "progress" in content:
                    break
                damaged.append((path, f"{path} has no record of its progress"))
            except UserError as error:
                damaged.append((path, str(error)))
        else:
            if damaged:
                raise UserError(f"no whole checkpoint in {self._folder} ({damaged[0][1]}); "
                                "--no-resume starts a new run")
            return None
        for bad, reason in damaged:  # or it would take the place of a whole one at the next save
            os.replace(bad, bad.with_name(f"{bad.name}.damaged"))
            utils.note(f"{reason}; put aside as {bad.name}.damaged")
        if damaged:
            utils.note(f"continuing from {path}, the newest whole checkpoint")
        return content


# --- signals --------------------------------------------------------------------------------------


class Stop:
    """Whether a signal asked the program to end.

    Attributes:
        number: of the signal, 0 as long as there was none.
    """

    number = 0


@contextlib.contextmanager
def stop_on_signals():
    """Let the signals of distributed.asking() ask for an end instead of bringing it; yields a Stop.

    A second SIGINT ends the program at once.
    """
    stop = Stop()

    def ask(number, frame):
        stop.number = number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    with distributed.handling(dict.fromkeys(distributed.asking(), ask)):
        try:
            yield stop
        except Exception as error:
            # Another process died, and this is the one SIGTERM by which the launcher ends the rest
            if stop.number == signal.SIGTERM and distributed.is_loss(error):
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGTERM)
            raise
