"""Many processes: how they start, which rows each has, what they exchange, how they end.

    distributed.start()              # in a program's main; may start the command anew, see there
    mine = distributed.shard(n)      # the rows of a batch of n that this process has
    z = distributed.gather(z, n)     # [n, D] of all processes, with gradients

torch.distributed carries it: gloo between CPUs, NCCL between GPUs. Processes are started by
torchrun, by srun, or by this module where one sees several GPUs. A single one costs nothing.
"""

import contextlib
import datetime
import functools
import inspect
import os
import re
import signal
import socket
import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from utils import RunError, UserError, note

# A process that dies is found by its launcher. Of a machine that dies nobody hears: the others end
# after this time. The main process, which may download or write, is waited for longer.
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)
MAIN_TIMEOUT = datetime.timedelta(hours=4)
HEAD_START = 5  # seconds that a process with an error leaves to those that know more of it
SHUTDOWN_SECONDS = 300  # that torchrun gives its processes to save before it kills them
PEER_FAILURES = ("gloo", "NCCL", "ProcessGroup", "Connection reset", "Connection closed")


# --- who is who -----------------------------------------------------------------------------------


def rank():
    """Return which of the processes this is, 0 ... world_size() - 1."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def local_rank():
    """Return which of the processes of this machine this is."""
    return int(os.environ.get("LOCAL_RANK", 0)) if world_size() > 1 else 0


def world_size():
    """Return how many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def local_world_size():
    """Return how many of the processes are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if world_size() > 1 else 1


def is_main_process():
    """Tell whether this is the one process that writes: rank 0."""
    return rank() == 0


# --- start and end --------------------------------------------------------------------------------


def start():
    """Become one of several processes where several are wanted; for programs.

    A process of torchrun, or of srun with several tasks, joins the others, or RunError says that it
    does not find them. One that was started by hand and sees several GPUs is replaced by torchrun,
    which starts this command once for each of them; then this function does not return.
    """
    read_slurm()
    if "RANK" not in os.environ and torch.cuda.device_count() > 1:
        _replace_by_torchrun(torch.cuda.device_count())
    if world_size() == 1:
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
        # NCCL wants a GPU for each process. With --gpus-per-task Slurm shows each only its own.
        gpus = max(torch.cuda.device_count(), int(os.environ.get("SLURM_GPUS_ON_NODE", 0)))
        if local_world_size() < torch.cuda.device_count():
            note(f"{torch.cuda.device_count()} GPUs are visible to {local_world_size()} processes")
        if local_world_size() <= gpus:
            backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
        _main_group()
    except (dist.DistError, ValueError, RuntimeError) as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RunError(f"the {world_size()} processes did not find each other at {place}: "
                       f"{str(error).splitlines()[0]}") from None


def read_slurm():
    """Let a task of srun know its rank, before anything is said."""
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        os.environ.update(slurm_variables(os.environ))


def slurm_variables(env):
    """Return torch.distributed's variables for a task of srun, by the environment of the task.

    MASTER_ADDR and MASTER_PORT are the first node and a port of the job's own, unless they are set.
    """
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", env["SLURM_STEP_TASKS_PER_NODE"])  # "4(x2),3"
    tasks = [int(n) for n, times in counts for _ in range(int(times or 1))]
    # The first of "gpu[07-09,12],other" is gpu07.
    nodes = re.sub(r"\[(\d+)[^\]]*\]", r"\1", env["SLURM_STEP_NODELIST"])
    return {"RANK": env["SLURM_PROCID"], "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
            "LOCAL_RANK": env["SLURM_LOCALID"],
            "LOCAL_WORLD_SIZE": str(tasks[int(env["SLURM_NODEID"])]),
            "MASTER_ADDR": env.get("MASTER_ADDR", nodes.partition(",")[0]),
            "MASTER_PORT": env.get("MASTER_PORT", str(10000 + int(env["SLURM_JOB_ID"]) % 20000))}


def _replace_by_torchrun(processes):
    """Start this command anew in several processes, in the place of this one."""
    signals = [*(s.name for s in stop_signals()), "SIGQUIT"]  # that it hands on
    threads = len(os.sched_getaffinity(0)) // processes
    for name, value in (("PET_SIGNALS_TO_HANDLE", ",".join(signals)),
                        ("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SHUTDOWN_SECONDS),
                        ("OMP_NUM_THREADS", max(1, threads))):
        os.environ.setdefault(name, str(value))
    sys.stdout.flush(), sys.stderr.flush()
    os.execvp(sys.executable, [sys.executable, "-m", "torch.distributed.run", "--standalone",
                               "--nproc-per-node", str(processes), *sys.argv])


def stop_signals():
    """The signals by which Slurm, a user or a closed terminal asks a program to end."""
    # nohup has SIGHUP ignored, and it stays ignored.
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT] + [signal.SIGHUP] * (not ignored)


@functools.cache
def _main_group():
    """The group of all processes in which the main one is waited for."""
    return dist.new_group(backend="gloo", timeout=MAIN_TIMEOUT)


def shutdown():
    """Leave the process group at an end that all processes come to."""
    if dist.is_initialized():
        barrier()  # or the launcher would end those that are not yet ready
        dist.destroy_process_group()


def let_others_speak(error):
    """Wait for those that know more of an error; then the launcher ends this process.

    Of an error that all have that is the main process, of peers that are gone the launcher.
    """
    if turns := (not is_main_process()) + is_peer_failure(error):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        time.sleep(turns * HEAD_START)


def is_peer_failure(error):
    """Tell whether an error only says that another process is gone."""
    return world_size() > 1 and (isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in PEER_FAILURES)
    ))


# --- what each process has, and what all have -----------------------------------------------------


def shard(n):
    """Return the slice of n rows that this process has; the first ranks have the larger shares."""
    return _shard(n, rank(), world_size())


def _shard(n, rank, world_size):
    each, more = divmod(n, world_size)
    start = rank * each + min(rank, more)
    return slice(start, start + each + (rank < more))


def gather(x, n):
    """Join the rows [b, ...] of all processes, shard(n) of each: [n, ...] on all of them.

    The gradient of a row is the sum of what the parts of the loss in all processes say of it.
    """
    return _Gather.apply(x, n) if world_size() > 1 else x


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, n):
        ctx.n = n
        parts = [_shard(n, r, world_size()) for r in range(world_size())]
        padded = x.new_zeros(parts[0].stop, *x.shape[1:])  # collectives want equal shapes
        padded[: len(x)] = x
        every = [torch.empty_like(padded) for _ in parts]
        dist.all_gather(every, padded)
        return torch.cat([e[: p.stop - p.start] for e, p in zip(every, parts, strict=True)])

    @staticmethod
    def backward(ctx, gradient):
        return all_reduce_sum(gradient)[shard(ctx.n)], None


def all_reduce_sum(x):
    """Return the sum of a tensor over all processes, as a new tensor."""
    x = x.clone(memory_format=torch.contiguous_format)
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def gather_to_main(x):
    """Return on rank 0 a list of the tensors of all processes, of one shape and on the CPU."""
    if world_size() == 1:
        return [x]
    every = [torch.empty_like(x) for _ in range(world_size())] if is_main_process() else None
    dist.gather(x, every, dst=0)
    return every


def broadcast_object(content):
    """Return what rank 0 was called with, any object that can be pickled; all have to call it."""
    box = [content]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0, group=_main_group())
    return box[0]


def all_gather_object(content):
    """Return what each process was called with, a list by rank."""
    everyone = [content] * world_size()
    if world_size() > 1:
        dist.all_gather_object(everyone, content, group=_main_group())
    return everyone


def check_same(settings):
    """Raise UserError unless all processes were started with the same settings, a flat dict."""
    for other, there in enumerate(all_gather_object(settings)):
        for key, here in settings.items():
            if there.get(key) != here:
                raise UserError(f"{key} is {here} in process {rank()}, on {socket.gethostname()}, "
                                f"and {there.get(key)} in process {other}; start all with the same "
                                "command, checkpoint and images")


def barrier():
    """Wait until all processes are here."""
    if world_size() > 1:
        dist.barrier(group=_main_group())


@contextlib.contextmanager
def main_process_first():
    """Let rank 0 go first, then one process of each other machine: what is fetched, others find."""
    turn = 0 if is_main_process() else 1 if local_rank() == 0 else 2
    for _ in range(turn):
        barrier()
    yield
    for _ in range(2 - turn):
        barrier()


class SharedFlag:
    """Let a number that one process knows reach all of them at the same step.

    Nobody waits: a value set at one step is read at the next, and travels while that computes.
    """

    def __init__(self):
        self._work = self._value = None

    def poll(self, value):
        """Set an int >= 0 for the next step; returns the largest of the step before, or 0."""
        if world_size() == 1:
            return value
        before = self._finish()
        self._value = torch.tensor(value)
        self._work = dist.all_reduce(self._value, dist.ReduceOp.MAX, async_op=True)
        return before

    def sync(self, value):
        """Set an int >= 0 and wait; returns the largest of this step and the one before."""
        return max(all_gather_object(max(value, self._finish())))

    def _finish(self):
        if self._work is None:
            return 0
        self._work.wait()
        self._work = None
        return int(self._value)


def parallel(network):
    """Return torch's DistributedDataParallel of a module; of a single process the module itself."""
    if world_size() == 1:
        return network
    # Statistics of batch norm stay those of each process, as in the original; torch renamed that.
    names = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    return DistributedDataParallel(network, gradient_as_bucket_view=True, **{sync: False})


def broadcast_buffers(network):
    """Give the buffers of a network, its statistics of batch norm, the values of rank 0's."""
    if world_size() > 1:
        for buffer in network.buffers():
            dist.broadcast(buffer, src=0)


def sync_batch_norm(network):
    """Return a network whose batch norm sees the batch of all processes; UserError on a CPU."""
    if not next(network.parameters()).is_cuda:
        raise UserError("--sync-bn needs GPUs: torch synchronises batch norm only there")
    return nn.SyncBatchNorm.convert_sync_batchnorm(network)
