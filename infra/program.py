"""How a program runs and ends: every error is one line on stderr and an exit status.

    if __name__ == "__main__":
        program.run(main)

Exit statuses: 0 done, 1 a failure while running, 2 bad input, 75 stopped by a signal with the state
saved, 130 interrupted. An error that nobody foresaw keeps its traceback. Of several processes the
first to fail speaks.
"""

import contextlib
import sys
from pathlib import Path

import torch

import utils
from infra import distributed
from utils import RunError, Stopped, UserError

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the same command continues
SMALLER = "a smaller --batch-size or --size helps"


def run(main):
    """Run a script's main, a function without arguments; see above for how it ends."""
    for stream in (sys.stdout, sys.stderr):  # the name of a file need not be text
        stream.reconfigure(errors="surrogateescape")
    distributed.read_slurm()
    try:
        main()
        distributed.shutdown()
    except UserError as error:
        _fail(error, 2)
    except Stopped as error:
        utils.note(error)
        with contextlib.suppress(RuntimeError):  # another process did not wait for this one
            distributed.shutdown()
        sys.exit(STOPPED)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except Exception as error:
        if distributed.is_peer_failure(error):
            distributed.wait_for_launcher()
        message = _foreseen(error)
        if message is None:
            distributed.let_main_speak()
            raise
        _fail(message, 1)


def _foreseen(error):
    """The one line that an error while running is worth, or None."""
    first = str(error).partition("\n")[0]
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return f"out of GPU memory: {first} {SMALLER.capitalize()}."
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return f"out of memory; {SMALLER}"
    if "DataLoader worker" in str(error):  # torch's words when one was killed
        return (f"a process that decodes images has ended: {first} Fewer --workers and a smaller "
                "--batch-size take less memory")
    if distributed.is_peer_failure(error):
        return f"lost the other processes ({first})"
    return error if isinstance(error, (OSError, RunError)) else None


def _fail(message, status):
    distributed.let_main_speak()
    text = " ".join(str(message).split())
    label = "" if status == 2 and distributed.is_main_process() else distributed.process_label()
    print(f"{Path(sys.argv[0]).name}: error: {label}{text}", file=sys.stderr, flush=True)
    sys.exit(status)
