"""A small program in the place of train.py or an evaluation: the batch scripts cannot tell.

It works until a signal, then saves and ends; after a restart by Slurm it is done at once.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--word", help="does nothing")
parser.add_argument("--end", type=int, help="end at once with this status, after restarts too")
parser.add_argument("--deaf", action="store_true", help="know no signals, never be done")
parser.add_argument("--stopped", type=int, default=75, help="exit status after a signal")
parser.add_argument("--saving", type=float, default=0, help="seconds that it takes")
parser.add_argument("--processes", type=int, default=1, help="as by so many GPUs")
args = parser.parse_args()

names = ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_GPUS", "SLURM_STEP_NUM_TASKS", "MASTER_PORT")
print("sees", *(f"{name}={os.environ.get(name)}" for name in names), flush=True)
if args.end is not None:
    sys.exit(args.end)
if "SLURM_RESTART_COUNT" in os.environ and not args.deaf:
    sys.exit()
if args.processes > 1 and "RANK" not in os.environ:
    from infra import distributed

    distributed._replace_by_torchrun(args.processes)

signals = []
for number in () if args.deaf else (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: signals.append(number))
rank = os.environ.get("RANK", os.environ["SLURM_PROCID"])
folder = Path(f"run-{os.environ['SLURM_JOB_ID']}")
print(f"process {rank} is at work; run folder {folder}", flush=True)
while not signals:
    time.sleep(0.1)
time.sleep(args.saving)
if rank == "0":
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "checkpoint/checkpoint.pth.tar").touch()
print(f"process {rank} saved at {signal.Signals(signals[0]).name}", flush=True)
sys.exit(args.stopped)
