"""Files that appear whole or not at all, and the folders they go into.

    with atomic_write("results/scores.csv", "w") as file: ...
    append_lines("results/log.jsonl", b'{"event": "end"}\n')
    read_records("results/log.jsonl")  # [{"event": "end"}]
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import stat
import tempfile
from pathlib import Path

from utils import UserError

PARTIAL = ".ssd-partial-"  # begins the name of a file that is being written, locked by its writer
# Of results: they may lie in a folder of images, and be replaced there.
RESULT_SUFFIXES = {".csv", ".html", ".json", ".jsonl", ".md", ".npz", ".txt"}


def file_hash(path, algorithm="sha256"):
    """Return the hex digest of a file, read in blocks."""
    with open(path, "rb") as file:
        digest = hashlib.new(algorithm, usedforsecurity=False)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def make_output_folder(path, flag):
    """Make a folder and its parents; a UserError names `flag` where it cannot be written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written to: {error.strerror}") from None


def check_outputs(outputs, inputs):
    """Check, before hours are spent on them, that files can be written and replace nothing.

    Args: outputs, inputs: {flag: path, list of paths, or None}. An input may be a folder: its files
        are inputs too, but for those with a suffix of results.
    Raises: UserError: an output is an input or another output, by whatever links or spelling, or
        its place can't be written to. Names both, or the place and the reason.
    """
    outputs, inputs = _by_path(outputs), _by_path(inputs)
    for i, (flag, path) in enumerate(outputs):
        for other, place in [*inputs, *outputs[:i]]:
            if _is_same(path, place):
                raise UserError(f"{flag} and {other} are the same file, {path}")
            if Path(path).suffix not in RESULT_SUFFIXES and _is_inside(path, place):
                raise UserError(f"{flag} {path} is a file of {other} {place}")
        _check_file(flag, path)
    for flag, path in outputs:
        for each in (path, os.path.realpath(path)):
            make_output_folder(Path(each).parent, flag)
    for flag, path in outputs:  # one of the folders may have the name of a file
        _check_file(flag, path)


def _check_file(flag, path):
    """Stop if a path is there and no regular file that can be written to, or too long a name."""
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"
            raise UserError(f"{flag} {path} is {kind}; expected the name of a file")
        open(path, "r+b").close()
    except (FileNotFoundError, NotADirectoryError):
        pass  # its folder is made next
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written to: {error.strerror}") from None


def _by_path(named):
    """The pairs (flag, path) of {flag: path, list of paths, or None}."""
    return [(flag, path) for flag, paths in named.items()
            for path in (paths if isinstance(paths, list) else [paths]) if path is not None]


def _is_same(path, other):
    """Whether two paths lead to one file, which need not be there yet."""
    there = os.path.exists(path) and os.path.exists(other)
    return os.path.samefile(path, other) if there else (
        os.path.realpath(path) == os.path.realpath(other))


def _is_inside(path, folder):
    """Whether a path leads to a file that is there, below a folder."""
    real = os.path.realpath(path)
    return os.path.isfile(real) and real.startswith(os.path.join(os.path.realpath(folder), ""))


def sweep(folder):
    """Remove what writers that were killed have left in a folder: files that nobody has locked."""
    for path in Path(folder).glob(f"{PARTIAL}*"):
        with contextlib.suppress(OSError), open(path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _new_partial(folder):
    """A new file in a folder, locked so that no sweep removes it: its path and descriptor."""
    while True:
        path = folder / f"{PARTIAL}{secrets.token_hex(8)}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        with contextlib.suppress(OSError):  # without locks nobody can sweep it either
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:  # or a sweep came between the two
            return path, descriptor
        os.close(descriptor)


@contextlib.contextmanager
def atomic_write(path, mode="wb", before_rename=None, **kwargs):
    """Open a file that appears under its name only once it is whole and on the disk.

    After an error the temporary file beside it is removed, and what was there before stays. What
    earlier writers left there, killed, is swept.

    Args: mode, kwargs: of open(). before_rename: called once the file is on the disk.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a rename would replace a device, for example
        raise UserError(f"{path} is not a regular file")
    sweep(path.parent)
    temporary, descriptor = _new_partial(path.parent)
    with open(descriptor, mode, **kwargs) as file:
        try:
            yield file
            file.flush()
            os.fsync(descriptor)
            if before_rename is not None:
                before_rename()
            os.replace(temporary, path)  # still locked
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    with contextlib.suppress(OSError):  # Some file systems refuse to open or sync a folder.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def append_lines(path, data, sync=False):
    """Append whole lines to a file, all or nothing: what a full disk cut off is taken back.

    Args: path: created where there is none. data: bytes; they start a new line even where a crash
        cut the last one. sync: wait until they are on the disk.
    Raises: OSError: the file is as it was.
    """
    with open(path, "a+b", buffering=0) as file:
        with contextlib.suppress(OSError):  # or of two writers one may see half a line of the other
            fcntl.flock(file, fcntl.LOCK_EX)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        data = b"\n" * (file.read(1) not in (b"", b"\n")) + data
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(size)
            raise
        if sync:
            os.fsync(file.fileno())


def read_records(path):
    """Return the records (dicts) of a file of JSON lines, without what a crash cut off."""
    records = []
    for line in Path(path).read_bytes().split(b"\n") if os.path.isfile(path) else ():
        with contextlib.suppress(ValueError, RecursionError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]
