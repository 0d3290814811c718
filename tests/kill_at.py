"""Run a program and kill it from within, at a place and moment that no clock decides.

    python tests/kill_at.py PLACE N train.py --dataset digits ...

The N-th time (from 1) that it comes to PLACE the process sends itself SIGKILL, just before the
call. PLACES names them.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import trainers  # noqa: E402 (found only now)
from infra import storage  # noqa: E402

PLACES = {
    "step": (trainers.Step, "__call__"),
    "monitor": (trainers, "monitor"),
    "sync": (os, "fsync"),  # in a save, what is written is not yet on the disk
    "rename": (os, "replace"),  # in a save, the file is whole and has no name
    "link": (os, "link"),  # in a save, before the one before is kept
    "append": (storage, "append_lines"),  # in a log
}


def interrupt_at(place, n, interrupt):
    """Replace a function by one that calls `interrupt` just before its n-th call.

    Returns:
        function that puts the first one back.
    """
    owner, name = PLACES[place]
    function, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == n:
            interrupt()
        return function(*args, **kwargs)

    setattr(owner, name, counted)
    return lambda: setattr(owner, name, function)


if __name__ == "__main__":
    place, n, script, *arguments = sys.argv[1:]
    interrupt_at(place, int(n), lambda: os.kill(os.getpid(), signal.SIGKILL))
    sys.argv = [script, *arguments]
    runpy.run_path(str(ROOT / script), run_name="__main__")
