"""How a program runs and ends: every error is one line on stderr and an exit status.

    if __name__ == "__main__":
        program.run(main)

Exit statuses: 0 done, 1 a failure while running, 2 bad input, 75 stopped by a signal with the state
saved; 128 and the number of a signal that ended it with nothing to continue: 130 of Ctrl-C, 143 of
SIGTERM. Results are recorded although stdout is closed, full or a pipe without a reader. An error
that nobody foresaw keeps its traceback. Of several processes the first to fail speaks.
"""

import codecs
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import torch

import utils
from infra import distributed, runs
from utils import RunError, Stopped, UserError

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the same command continues


def run(main):
    """Run a script's main, a function without arguments; see above for how it ends."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by >&-
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        getattr(sys, name).reconfigure(errors="any-text")
    distributed.read_slurm()
    try:
        with runs.handled(_interrupt, set(distributed.stop_signals()) - {signal.SIGINT}):
            main()
            distributed.shutdown()
    except Stopped as error:
        utils.note(error)
        with contextlib.suppress(RuntimeError):  # another process did not wait for this one
            distributed.shutdown()
        sys.exit(STOPPED)
    except (Exception, KeyboardInterrupt) as error:
        _let_threads_begin()
        distributed.let_others_speak(error)
        message, status = _verdict(error)
        if message is None:
            raise
        who, n = "", distributed.world_size()
        if n > 1 and (status != 2 or not distributed.is_main_process()):  # all have the same input
            who = f"process {distributed.rank()} of {n} on {socket.gethostname()}: "
        with contextlib.suppress(OSError):
            print(f"{Path(sys.argv[0]).name}: error: {who}{' '.join(str(message).split())}",
                  file=sys.stderr, flush=True)
        sys.exit(status)
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # what is left is dropped, or Python would complain of it at its exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _interrupt(number, frame):
    """End the program at a signal as Ctrl-C does, so that what is half-written is removed."""
    signal.signal(number, signal.SIG_IGN)  # it may come twice, from a launcher and a shell
    raise KeyboardInterrupt(number)


def _let_threads_begin():
    """Wait for threads that a signal caught while they were started.

    Python waits for a thread at its exit only once that has begun; one that was then to begin a
    computation would end the process by SIGABRT.
    """
    deadline = time.monotonic() + 1  # one that was caught still earlier never begins
    while time.monotonic() < deadline and not all(t.is_alive() for t in threading.enumerate()):
        time.sleep(0.01)


def _any_text(error):
    """Encode what a stream cannot: bytes in the name of a file as they are, the rest escaped."""
    character = error.object[error.start]
    is_byte = "\udc80" <= character <= "\udcff"
    text = character.encode("ascii", "surrogateescape" if is_byte else "backslashreplace")
    return text, error.start + 1


codecs.register_error("any-text", _any_text)


def _verdict(error):
    """(the one line that an error is worth, or None; exit status)."""
    first = str(error).partition("\n")[0]
    if isinstance(error, UserError):
        return error, 2
    if isinstance(error, KeyboardInterrupt):
        number = signal.Signals(*error.args or [signal.SIGINT])
        return f"ended by {number.name}", 128 + number
    memory = isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError))
    if memory or "DefaultCPUAllocator" in str(error):
        return f"out of memory; a smaller --batch-size or --size helps ({first or error!r})", 1
    if "DataLoader worker" in str(error):  # torch's words when one was killed
        return (f"a process that decodes images has ended: {first} Fewer --workers and a smaller "
                "--batch-size take less memory"), 1
    if distributed.is_peer_failure(error):
        return f"lost the other processes ({first})", 1
    return (error if isinstance(error, (OSError, RunError)) else None), 1
