"""Many processes: how they start, which part of a batch each has, how they agree, how they end.

    distributed.start()              # in a program's main; may not return, see there
    mine = distributed.share(n)      # the rows of a batch of n that this process has
    z = distributed.gather(z, n)     # [n, D] of all processes, with gradients

The engine is torch.distributed: its elastic launcher starts the processes, gloo and NCCL carry what
they tell each other. All of this works, and costs nothing, in a single process too.
"""

import contextlib
import ctypes
import datetime
import functools
import inspect
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# A process that dies is found by its launcher. Of a machine that dies nobody hears: what the others
# wait for does not come, and after so long they end. Rank 0, or a download, may take longer.
SILENCE = datetime.timedelta(minutes=10)
PATIENCE = datetime.timedelta(hours=4)
HEAD_START = 0.5  # seconds that rank 0 has to say what is wrong, when it is wrong everywhere
END = 20  # seconds that a process which lost another waits to be ended by the launcher
LINGER = 5  # seconds that a launcher waits for those of other nodes to end
LOG_FATAL = 3  # of c10/util/logging_common.h
PR_SET_PDEATHSIG = 1  # of linux/prctl.h: the signal that a process gets when its parent ends
LOST_WORDS = ("gloo", "NCCL", "ProcessGroup", "Connection reset", "Connection closed")


class LaunchError(Exception):
    """Processes that could not be started or did not end well, in one line."""

    def __init__(self, message, status):
        super().__init__(message)
        self.status = status  # exit status of the program


class Ended(Exception):
    """The processes have ended, and said themselves why: what is left is the exit status."""

    def __init__(self, status):
        super().__init__(status)
        self.status = status


# --- who is who -----------------------------------------------------------------------------------


def rank():
    """Return which of the processes this is, 0 ... world() - 1."""
    return int(os.environ["RANK"]) if world() > 1 else 0


def local_rank():
    """Return which of the processes of this machine this is."""
    return int(os.environ.get("LOCAL_RANK", 0)) if world() > 1 else 0


def world():
    """Return how many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def local_world():
    """Return how many of the processes are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if world() > 1 else 1


def is_lead():
    """Tell whether this is the one process that writes: rank 0."""
    return rank() == 0


# --- start ----------------------------------------------------------------------------------------


def start():
    """Become one of several processes where several are wanted.

    A process of torchrun joins the others. One that was started by hand and sees several GPUs, or
    finds a variable of torchrun's in the environment (PET_NNODES, PET_NPROC_PER_NODE, ...), starts
    torch's elastic launcher, which runs this command in each of them; it waits for them, hands
    signals on to them, and does not return. It is for programs: the command is sys.argv.

    Raises:
        Ended: the processes have ended; an own line of theirs said why if it was not well.
        LaunchError: they could not be started, or one was killed.
    """
    if "RANK" in os.environ:
        if world() > 1:
            _join()
    elif torch.cuda.device_count() > 1 or any(name.startswith("PET_") for name in os.environ):
        _launch()


def _join():
    """Make the process group, and the GPU of this process the current one."""
    # A launcher that is killed must not leave its processes behind, which hold run and GPUs
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
        if local_world() <= torch.cuda.device_count():  # NCCL wants a GPU for each process
            backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend, store=dist.PrefixStore("work", _store()), rank=rank(), world_size=world(),
        timeout=SILENCE,
    )
    _patient()


@functools.cache
def _patient():
    """The group of all processes in which waiting takes as long as it takes."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def leave():
    """Give the process group back at an end that all processes come to."""
    if dist.is_initialized():
        barrier()  # or the launcher would hurry those that are not yet ready
        dist.destroy_process_group()


@functools.cache
def _store():
    """What the launcher keeps for its processes; there before a process group is."""
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=SILENCE))
    except (ValueError, RuntimeError) as error:
        raise LaunchError(f"RANK and WORLD_SIZE are set, but the processes cannot meet: {error}; "
                          "start them with torchrun", 2) from None
    return store


def asking():
    """The signals that ask a program for an end, by Slurm, a user, or a terminal that is closed.

    nohup has SIGHUP ignored, and so it stays.
    """
    numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return numbers if ignored else [*numbers, signal.SIGHUP]


@contextlib.contextmanager
def handling(handlers):
    """Handle signals inside by {number: handler}, and afterwards as before."""
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _launch():
    """Run this command in many processes by torch's elastic launcher."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import api as rendezvous
    from torch.distributed.launcher.api import elastic_launch

    logging.disable(logging.CRITICAL)  # what the launcher logs, we say
    _quiet()
    defaults = {"NNODES": 1, "NPROC_PER_NODE": max(1, torch.cuda.device_count()),
                "RDZV_BACKEND": "c10d", "RDZV_ENDPOINT": "localhost:0"}
    for name, value in defaults.items():
        os.environ.setdefault(f"PET_{name}", str(value))
    place, nodes = os.environ["PET_RDZV_ENDPOINT"], os.environ["PET_NNODES"]
    try:
        arguments = run.parse_args(sys.argv)
        with _log_dir(arguments), _signals_handed_on() as sent:
            config, program, words = _configuration(run, arguments)
            elastic_launch(config, program)(*words)
    except ChildFailedError as error:
        if nodes != "1":  # the store of all, which `error` holds, is in one launcher: it goes last
            time.sleep(LINGER)
        raise _why(error.failures, sent) from None
    except rendezvous.RendezvousTimeoutError:
        raise LaunchError(f"not all of the {nodes} nodes came to {place} in time; stopped", 1
                          ) from None
    except rendezvous.RendezvousError as error:
        reason = (str(error.__cause__ or error) or "closed").splitlines()[0]
        raise LaunchError(f"no meeting of the nodes at {place}: the port is in use, or the first "
                          f"node does not answer or has ended ({reason})", 1) from None
    except (ValueError, AssertionError, dist.DistError) as error:
        raise LaunchError(f"the processes could not be started: {error}", 2) from None
    raise Ended(0)


def _quiet():
    """Let torch's C++ say nothing of what we say in a line, unless the user wants to hear it.

    The launcher says all that it meets itself; of its processes only errors are heard.
    """
    if "TORCH_CPP_LOG_LEVEL" in os.environ:
        return
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    with contextlib.suppress(OSError, ValueError):  # a torch that is built in another way
        c10 = ctypes.CDLL(Path(torch.__file__).parent / "lib/libc10.so")  # has read that already
        ctypes.c_int.in_dll(c10, "FLAGS_caffe2_log_level").value = LOG_FATAL


def _configuration(run, arguments):
    """What torchrun makes of its arguments, with a share of the cores for each process."""
    threads = (len(os.sched_getaffinity(0))
               // run.determine_local_world_size(arguments.nproc_per_node))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
    return run.config_from_args(arguments)


def _log_dir(arguments):
    """Give the launcher a folder that goes when it ends, unless the user has named one."""
    if arguments.log_dir is not None:
        return contextlib.nullcontext()
    folder = tempfile.TemporaryDirectory(prefix="torchelastic_", ignore_cleanup_errors=True)
    arguments.log_dir = folder.name
    return folder


@contextlib.contextmanager
def _signals_handed_on():
    """Hand signals that ask for an end on to the processes; yields the list of those."""
    from torch.distributed.elastic.multiprocessing import api

    numbers, sent = asking(), []

    def hand_on(number, frame):
        if number == signal.SIGHUP and number not in numbers:
            return  # torch has set this handler for it
        number = number if number in numbers else signal.SIGTERM
        sent.append(number)
        children = _children()
        if not children:  # they are not there yet: the signal means this process
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    # torch's own handler, which it installs for some of them, kills what has not ended in 30 s
    torchs, api._terminate_process_handler = api._terminate_process_handler, hand_on
    try:
        with handling(dict.fromkeys(numbers, hand_on)):
            yield sent
    finally:
        api._terminate_process_handler = torchs


def _children():
    """Process ids of the children of this process."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            found += [int(folder.name)] if int(parent) == os.getpid() else []
    return found


def _why(failures, sent):
    """The exception that says how processes ended, from those that ended first."""
    # What the launcher ended itself, with SIGTERM, then with SIGKILL, may be among them
    first = min(failures.values(), key=lambda f: (
        f.exitcode == -signal.SIGTERM, f.exitcode < 0, f.timestamp, f.local_rank))
    if first.exitcode > 0:  # it has said why
        return Ended(first.exitcode)
    if -first.exitcode in sent:
        return Ended(128 - first.exitcode)
    name = signal.Signals(-first.exitcode).name
    number = next(r for r, f in failures.items() if f is first)
    return LaunchError(f"process {number} (pid {first.pid} on {socket.gethostname()}) was ended by "
                       f"{name}; the others were stopped", 1)


# --- end ------------------------------------------------------------------------------------------


def speaks():
    """Tell whether this process is the one to say why all end; of equal reasons it is rank 0."""
    if world() == 1:
        return True
    try:
        if not is_lead():
            time.sleep(HEAD_START)
        return _store().add("failed", 1) == 1
    except (RuntimeError, LaunchError):  # the launcher is gone
        return is_lead()


def who():
    """Return words that tell this process from the others, "" where it is the only one."""
    return f"process {rank()} of {world()} on {socket.gethostname()}: " if world() > 1 else ""


def is_loss(error):
    """Tell whether an error only says that another process is gone."""
    return world() > 1 and (isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in LOST_WORDS)
    ))


def wait_for_the_end():
    """Wait to be ended by the launcher, which has seen the process that died."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    time.sleep(END)


# --- what each has, and what all have -------------------------------------------------------------


def share(n):
    """Return the slice of n rows that this process has; the first ranks have the larger shares."""
    return _share(n, rank(), world())


def _share(n, rank, world):
    each, more = divmod(n, world)
    start = rank * each + min(rank, more)
    return slice(start, start + each + (rank < more))


def gather(x, n):
    """Join the rows of all processes; gradients flow back to the process of each row.

    Args:
        x: float [b, ...], rows share(n) of this process.
        n: rows of all.

    Returns:
        [n, ...], the same on all processes.

    The gradient of a row is the sum of those of all processes: each adds what its part of the loss
    says of that row.
    """
    return _Gather.apply(x, n) if world() > 1 else x


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, n):
        ctx.n = n
        parts = [_share(n, r, world()) for r in range(world())]
        most = parts[0].stop
        padded = x.new_zeros(most, *x.shape[1:])  # collectives want equal shapes
        padded[: len(x)] = x
        every = [torch.empty_like(padded) for _ in parts]
        dist.all_gather(every, padded)
        return torch.cat([e[: p.stop - p.start] for e, p in zip(every, parts, strict=True)])

    @staticmethod
    def backward(ctx, gradient):
        return total(gradient)[share(ctx.n)], None


def total(x):
    """Return the sum of a tensor over all processes, as a new tensor."""
    x = x.clone(memory_format=torch.contiguous_format)
    if world() > 1:
        dist.all_reduce(x)
    return x


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return total(x)

    @staticmethod
    def backward(ctx, gradient):
        return total(gradient)


def to_lead(x):
    """Return on rank 0 a list of the tensors of all processes, of one shape and on the CPU."""
    if world() == 1:
        return [x]
    every = [torch.empty_like(x) for _ in range(world())] if is_lead() else None
    dist.gather(x, every, dst=0)
    return every


def from_lead(content):
    """Return what rank 0 was called with, any object that can be pickled; all have to call it."""
    box = [content]
    if world() > 1:
        dist.broadcast_object_list(box, src=0, group=_patient())
    return box[0]


def everyones(content):
    """Return what each process was called with, a list by rank."""
    every = [content] * world()
    if world() > 1:
        dist.all_gather_object(every, content, group=_patient())
    return every


def barrier():
    """Wait until all processes are here."""
    if world() > 1:
        dist.barrier(group=_patient())


@contextlib.contextmanager
def first_on_machine():
    """Let rank 0 go first, then one process of each other machine: what is fetched, others find."""
    turn = 0 if is_lead() else 1 if local_rank() == 0 else 2
    for _ in range(turn):
        barrier()
    yield
    for _ in range(2 - turn):
        barrier()


class Agreement:
    """Let a number that one process knows reach all of them at the same step.

    Nobody waits: what is said at a step is heard at the next one, so that a step costs a small
    message that travels while it computes.
    """

    def __init__(self):
        self._work = self._said = None

    def hear(self, value):
        """Say a whole number >= 0; returns the largest that was said at the step before, or 0."""
        if world() == 1:
            return value
        heard = self._finish()
        self._said = torch.tensor(value)
        self._work = dist.all_reduce(self._said, dist.ReduceOp.MAX, async_op=True)
        return heard

    def now(self, value):
        """Say a whole number >= 0; returns the largest, of this step or the one before."""
        heard = self._finish()
        self.hear(max(value, heard))
        return self._finish() if world() > 1 else value

    def _finish(self):
        if self._work is None:
            return 0
        self._work.wait()
        self._work = None
        return int(self._said)


def parallel(network):
    """Return a network whose gradients are the means of those of all processes.

    Args:
        network: a module on its device, with the same weights everywhere.

    Returns:
        torch's DistributedDataParallel of it; of a single process the network itself. Statistics of
        batch norm stay those of each process: rank 0's are the ones that are saved.
    """
    if world() == 1:
        return network
    # Newer versions of torch warn of the old name
    names = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    device = next(network.parameters()).device
    return DistributedDataParallel(
        network, device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True, **{sync: False},
    )


def share_buffers(network):
    """Give the buffers of a network, its statistics of batch norm, the values of rank 0's."""
    if world() > 1:
        for buffer in network.buffers():
            dist.broadcast(buffer, src=0)


# --- batch norm over all processes ----------------------------------------------------------------


def sync_batch_norm(network):
    """Make every batch norm of a network take its statistics over the batches of all processes.

    Args:
        network: a module on its device.

    Returns:
        the network, its layers replaced; names, shapes and values of its state are the same. On a
        GPU they are torch's SyncBatchNorm, which is for GPUs only; on a CPU the same mathematics.
    """
    if next(network.parameters()).is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for parent in list(network.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.BatchNorm2d):
                synced = _SyncBatchNorm(layer.num_features, layer.eps, layer.momentum)
                synced.to(layer.weight).load_state_dict(layer.state_dict())
                setattr(parent, name, synced.train(layer.training))
    return network


class _SyncBatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d over the batches of all processes, some of which may be empty."""

    def forward(self, x):
        if not self.training or world() == 1:
            return super().forward(x)
        dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
        n = int(total(torch.tensor(x.numel() // x.shape[1])))
        mean = _Total.apply(x.sum(dim=(0, 2, 3))) / n
        centred = x - mean.view(1, -1, 1, 1)
        variance = _Total.apply(centred.square().sum(dim=(0, 2, 3))) / n
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (n / (n - 1)), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        out = torch.addcmul(self.bias.view(1, -1, 1, 1), centred, scale.view(1, -1, 1, 1))
        return out.to(dtype)
