"""Files that appear whole or not at all, and the folders they go into.

    with atomic_write("results/scores.csv", "w") as file: ...
    append_lines("results/log.jsonl", b'{"event": "end"}\n')
"""

import contextlib
import errno
import hashlib
import os
import secrets
import tempfile
from pathlib import Path

from utils import UserError


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
        is_file = isinstance(error, (FileExistsError, NotADirectoryError))
        reason = "it is a file" if is_file else error.strerror
        raise UserError(f"{flag} {path} cannot be written to: {reason}") from None


def check_output_file(path, flag):
    """Check that a file can be written, before hours are spent on it; a UserError names `flag`."""
    if Path(path).is_dir():
        raise UserError(f"{flag} {path} is a folder; expected the name of a file")
    make_output_folder(Path(path).parent, flag)


@contextlib.contextmanager
def atomic_write(path, mode="wb", before_rename=None, **kwargs):
    """Open a file that appears under its name only once it is whole and on the disk.

    After an error the temporary file beside it is removed, and what was there before stays.

    Args:
        path: of the file. mode, kwargs: of open(). before_rename: function that is called once the
            file is on the disk, before it takes its name.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a rename would replace a device, for example
        raise UserError(f"{path} is not a regular file")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, mode.replace("w", "x"), **kwargs) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if before_rename is not None:
            before_rename()
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # Some file systems refuse to sync a folder.
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def append_lines(path, data, sync=False):
    """Append whole lines to a file, all or nothing: what a full disk cut off is taken back.

    Args:
        path: of the file, created where there is none. sync: wait until they are on the disk.
        data: bytes. They start a new line even where a crash cut the last one.

    Raises: OSError: the file is as it was.
    """
    with open(path, "a+b", buffering=0) as file:
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
