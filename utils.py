"""Configuration, files, checkpoints, seeds, devices: what the programs share.

Nothing here knows the method. Errors: UserError is bad input (exit status 2), RunError a failure
while running (1); either is one line on stderr (`program`).
"""

import argparse
import contextlib
import errno
import hashlib
import itertools
import math
import os
import pickle
import platform
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

import distributed


class UserError(Exception):
    """Bad input: the message names the flag or file, what was found, and what is allowed."""


class RunError(Exception):
    """A failure while running, in one line."""


class Stopped(Exception):
    """A signal ended the program, its state is saved: the same command goes on from there."""


STOPPED = 75  # exit status of Stopped; EX_TEMPFAIL of sysexits.h: try again


def program(main, bad_input=()):
    """Run a script's main; end on its errors with one line on stderr and the right exit status.

    Args:
        main: function without arguments.
        bad_input: types of exceptions that mean the same as UserError.

    Exit status: 2 bad input, 1 a failure while running, 75 stopped by a signal with the state
    saved, 130 interrupted; an error that nobody foresaw keeps its traceback. Of several processes
    one speaks: the first to fail.
    """
    for stream in (sys.stdout, sys.stderr):  # a file's name need not be text
        stream.reconfigure(errors="surrogateescape")
    try:
        main()
        distributed.leave()
    except (UserError, *bad_input) as error:
        _die(error, 2)
    except distributed.Ended as error:
        sys.exit(error.status)
    except distributed.LaunchError as error:
        _die(error, error.status)
    except Stopped as error:
        note(error)
        with contextlib.suppress(RuntimeError):  # another process did not wait for this one
            distributed.leave()
        sys.exit(STOPPED)
    except torch.cuda.OutOfMemoryError as error:
        _die(f"out of GPU memory: {str(error).splitlines()[0]} A smaller --batch-size helps.", 1)
    except MemoryError:
        _die("out of memory; a smaller --batch-size or --size helps", 1)
    except Exception as error:
        if "DefaultCPUAllocator" in str(error):
            _die("out of memory; a smaller --batch-size or --size helps", 1)
        if "DataLoader worker" in str(error):  # torch's words when one was killed
            _die(f"a process that decodes images has ended: {str(error).splitlines()[0]} Less "
                 "memory is taken by fewer --workers and a smaller --batch-size", 1)
        if distributed.is_loss(error):
            distributed.wait_for_the_end()
            _die(f"lost the other processes ({str(error).splitlines()[0]})", 1)
        if isinstance(error, (OSError, RunError)):
            _die(error, 1)
        if distributed.speaks():
            raise
        sys.exit(1)
    except KeyboardInterrupt:
        _die("interrupted", 130)


def _die(message, status):
    text = " ".join(str(message).split())
    if distributed.speaks():
        whose = distributed.who() if status == 1 or not distributed.is_lead() else ""
        print(f"{Path(sys.argv[0]).name}: error: {whose}{text}", file=sys.stderr, flush=True)
    sys.exit(status)


def note(text):
    """Say one line on stderr that is no error; of several processes, rank 0 says it."""
    if distributed.is_lead():
        with contextlib.suppress(OSError):  # stderr may be a file on a full disk
            print(f"{Path(sys.argv[0]).name}: note: {text}", file=sys.stderr, flush=True)


# --- configuration --------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with --config, whose errors are one line."""

    def __init__(self, description):
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=_HelpFormatter
        )
        self.add_argument(
            "--config", metavar="FILE.yaml", help="defaults for these flags; the command line wins"
        )

    def error(self, message):
        _die(message, 2)

    def print_help(self, file=None):
        if distributed.is_lead():
            super().print_help(file)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=34, width=100)

    def _get_help_string(self, action):
        text = action.help or ""
        shown = action.default not in (None, False, argparse.SUPPRESS) and "(default" not in text
        return f"{text} (default: %(default)s)" if shown and action.option_strings else text


def parse_args(parser, argv=None):
    """Parse a command line whose defaults a YAML file may replace.

    Args:
        parser: a Parser. argv: list of str; None is sys.argv[1:].

    Returns:
        argparse.Namespace. A key of the file is a flag's name, with - or _.

    Raises:
        SystemExit: status 2, after one line that names the key or flag and what is allowed.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    first.error = parser.error
    path = first.parse_known_args(argv)[0].config
    if path is not None and not {"-h", "--help"} & set(argv):
        try:
            _use_as_defaults(parser, path)
        except UserError as error:
            parser.error(error)
    return parser.parse_args(argv)


def _use_as_defaults(parser, path):
    actions = {a.dest: a for a in parser._actions if a.dest not in ("help", "config")}
    content = read_yaml(path)
    for key, value in content.items():
        other = str(key).replace("_", "-")
        if other != key and other in content:
            raise UserError(f"{path}: '{key}' and '{other}' are the same key")
        action = actions.get(str(key).replace("-", "_"))
        if action is None:
            known = ", ".join(sorted(d.replace("_", "-") for d in actions))
            raise UserError(f"{path}: unknown key '{key}'; known are {known}")
        try:
            action.default = _convert(action, value)
        except (argparse.ArgumentTypeError, ValueError, TypeError) as error:
            raise UserError(f"{path}: {key}: {value!r} does not do: {error}") from None
        action.required = False


def _convert(action, value):
    """A YAML value -> what argparse would have made of it on the command line."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError("true or false is needed")
        return value
    fixed = isinstance(action.nargs, int)
    if isinstance(value, list) != (fixed or action.nargs in ("+", "*")):
        if isinstance(value, list):
            raise ValueError("one value is needed, not a list")
        value = [value]
    if fixed and len(value) != action.nargs:
        raise ValueError(f"a list of {action.nargs} values is needed")
    if isinstance(value, list):
        if not value:
            raise ValueError("at least one value is needed")
        return [_convert_one(action, v) for v in value]
    return _convert_one(action, value)


def _convert_one(action, value):
    if value is None or isinstance(value, (bool, dict, list)) or "\0" in str(value):
        raise ValueError(f"{_metavar(action)} is needed")
    if action.type in (None, str, experiment) and not isinstance(value, str):
        raise ValueError("text is needed (quote it)")
    value = action.type(str(value)) if action.type else value
    if action.choices is not None and value not in action.choices:
        raise ValueError(f"choose from {', '.join(map(str, action.choices))}")
    return value


def _metavar(action):
    name = action.metavar or (action.choices and "one of its choices") or "a value"
    return " ".join(name) if isinstance(name, tuple) else name


def read_yaml(path, flag="--config"):
    """Read a YAML file of keys and values.

    Args:
        path: of the file. flag: what errors call it.

    Returns:
        dict; a key that stands twice is an error, which PyYAML lets pass.

    Raises:
        UserError: no file, not YAML, not keys and values, a key that stands twice.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader, node):
        keys = [loader.construct_object(k) for k, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise UserError(f"{path}: key '{key}' stands {keys.count(key)} times")
        return yaml.SafeLoader.construct_mapping(loader, node)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.load(file, Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {path}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{flag} {path} is not YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{flag} {path}: 'flag: value' lines are needed, found {content!r:.60}")
    return content


LARGEST = 2**31 - 1  # whole number on the command line; more overflows further on


def number(kind, low=-math.inf, high=None, above=None, below=None):
    """Make an argparse type: an int or float within bounds.

    Args:
        kind: int or float. low, high: allowed bounds. above, below: bounds not allowed themselves.
    """
    limits = [f"at least {low}"] if low != -math.inf else []
    limits += [f"at most {high}"] if high is not None else []
    limits += [f"above {above}"] if above is not None else []
    limits += [f"below {below}"] if below is not None else []
    wanted = f"{'a whole number' if kind is int else 'a number'} {' and '.join(limits)}".strip()

    if high is None:
        high = LARGEST if kind is int else math.inf

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not {wanted}") from None
        inside = low <= value <= high and (above is None or value > above)
        if not inside or (below is not None and value >= below) or not math.isfinite(value):
            limit = f" at most {high}" if value > high and str(high) not in wanted else ""
            raise argparse.ArgumentTypeError(f"{text} is not {wanted}{limit}")
        return value

    return convert


def experiment(text):
    """An argparse type: the name of a folder or file below a results folder."""
    if not text.strip() or Path(text).is_absolute() or ".." in Path(text).parts:
        raise argparse.ArgumentTypeError(f"'{text}' is no name below the results folder")
    return text


MOST_CLASSES = 100_000


def class_list(text):
    """An argparse type: "0-5" or "0,3,7" or both mixed -> sorted tuple of ints."""
    chosen = []
    try:
        for part in text.split(","):
            low, dash, high = part.partition("-")
            if max(int(low), int(high or 0)) >= MOST_CLASSES:
                raise argparse.ArgumentTypeError(f"'{text}': no set has {MOST_CLASSES} classes")
            chosen += range(int(low), int(high) + 1) if dash else [int(low)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form 0-5 or 0,3,7") from None
    if not chosen or len(set(chosen)) < len(chosen) or min(chosen) < 0:
        raise argparse.ArgumentTypeError(f"'{text}' names no class, or one of them twice")
    return tuple(sorted(chosen))


def plain(config):
    """Return a configuration dict with tuples and paths made lists and text, for JSON and torch."""
    made = {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}
    return {k: str(v) if isinstance(v, Path) else v for k, v in made.items()}


# --- randomness, devices, versions ----------------------------------------------------------------


def generator(seed, *key):
    """Make a generator whose draws are a function of its arguments alone.

    Args:
        seed: int >= 0. key: ints >= 0 or words that say what the draws are for.

    Returns:
        torch.Generator on the CPU: draws are the same whatever device computes.
    """
    words = [seed]
    for part in key:
        words += part.encode() if isinstance(part, str) else [part]
    state = np.random.SeedSequence(words).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def device():
    """Return the device to compute on: the first visible GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(device, precision):
    """Return the context in which a network computes at a precision, "fp32" or "bf16"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def versions():
    """Return what a record should say of the machine: a dict of short texts."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("torchvision", "numpy", "scipy", "scikit-learn", "faiss-gpu", "faiss-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def available_memory():
    """Return the bytes that this process may still take: of the machine, and of its cgroups."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    left = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    groups = Path("/proc/self/cgroup").read_text().splitlines()
    here = next((g[3:].strip("/") for g in groups if g.startswith("0::")), "")
    for folder in (Path("/sys/fs/cgroup", here), *Path("/sys/fs/cgroup", here).parents):
        with contextlib.suppress(OSError, ValueError):  # no such limit: no file, or "max"
            limit = int((folder / "memory.max").read_text())
            used = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            left.append(limit - int(used["anon"]))  # what is cached gives way
    return min(left, default=math.inf)


# --- files ----------------------------------------------------------------------------------------


def file_hash(path, algorithm="sha256"):
    """Return the hex digest of a file, read in pieces."""
    with open(path, "rb") as file:
        digest = hashlib.new(algorithm, usedforsecurity=False)
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def make_folder(path, flag):
    """Make a folder with its parents and see that it can be written to.

    Raises:
        UserError: names `flag` and the reason.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{flag} {path} cannot be written to: a file stands in its place") from None
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written to: {error.strerror}") from None


def umask():
    """Return the permissions that files of this process are not given."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def whole_file(path, mode="wb", before_naming=None, **kwargs):
    """Open a file that appears under its name only once it is whole and on the disk.

    Written to a temporary file beside its place, flushed, synced, renamed; on an error the
    temporary file goes and what stood there before stays.

    Args:
        path: where. mode, kwargs: of open().
        before_naming: function called when the file is on the disk, before it takes its name.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a device, say, which a rename would replace
        raise UserError(f"{path} is not a regular file")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, mode, **kwargs) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~umask())  # mkstemp makes files that only their owner reads
        if before_naming is not None:
            before_naming()
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # some file systems refuse; the file itself is there
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # the rename itself
            finally:
                os.close(folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def append_whole(path, data, sync=False):
    """Append lines to a file, all or nothing: what a full disk cut off is taken back.

    Args:
        path: of a file, made where there is none. data: bytes, whole lines. They begin a line of
            their own even where a crash cut the last one.
        sync: see them to the disk.

    Raises:
        OSError: the file is as it was.
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


# --- checkpoints ----------------------------------------------------------------------------------


def _as_numpy_names(module):
    """numpy's function that makes a scalar of its bytes, under the name a pickle calls it by."""

    def scalar(dtype, data):
        if dtype != np.float64:
            raise pickle.UnpicklingError(f"GLOBAL {module}.scalar of {dtype}")
        return float(np.frombuffer(data, np.float64)[0])

    scalar.__module__, scalar.__qualname__ = module, "scalar"
    return scalar


# What a checkpoint may hold besides tensors and plain types; none of it runs code. SupContrast
# keeps its arguments in `opt`; the original's `best_prec1` of SimCLR and SupCon is a numpy float64.
HARMLESS = [
    argparse.Namespace, np.dtype, np.dtypes.Float64DType,
    _as_numpy_names("numpy.core.multiarray"), _as_numpy_names("numpy._core.multiarray"),
]


def read_checkpoint(path, flag=""):
    """Read a file of torch.save without running code from it, and see that it is whole.

    Args:
        path: of the file. flag: what an error calls it by, as "--ckpt ".

    Returns:
        what was saved, on the CPU.

    Raises:
        UserError: missing, empty, truncated, changed or foreign file, or code in it.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{flag}{path}: no such file")
    if path.stat().st_size == 0:
        raise UserError(f"{flag}{path} is empty")
    try:
        if zipfile.is_zipfile(path):  # torch itself does not look at the checksums in it
            with zipfile.ZipFile(path) as file:
                if (record := file.testzip()) is not None:
                    raise UserError(f"{flag}{path} is damaged: {record} has changed")
        torch.serialization.add_safe_globals(HARMLESS)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        # torch's message is a page long; the one thing to know in it is the refused name
        words = str(error).replace("`", " ").split()
        refused = [w for before, w in itertools.pairwise(words) if before == "GLOBAL"]
        if refused:
            raise UserError(f"{flag}{path} holds more than tensors and plain types "
                            f"({refused[0]}) and was not loaded: it could run code") from None
        raise UserError(f"{flag}{path} is not a torch checkpoint, or damaged") from None
    except MemoryError:
        raise
    except Exception as error:  # truncated archives, foreign bytes: torch raises many types for it
        # The disk's or the memory's fault is not the file's; but a wild offset in it is EINVAL
        if getattr(error, "errno", None) not in (None, errno.EINVAL):
            raise
        if "DefaultCPUAllocator" in str(error):
            raise
        raise UserError(f"{flag}{path} is not a torch checkpoint, or damaged") from None
    return content


def load_checkpoint(path):
    """Read a checkpoint of any dialect without running code from it.

    Args:
        path: the original's ("state_dict"), SupContrast's ("model"), or a bare state dict; keys
            with or without the "module." of DataParallel and DDP.

    Returns:
        (state, rest): {name: tensor} on the CPU with the prefixes gone, and the other entries of
        the file ({} for a bare state dict); rest["config"] is there in our own checkpoints only.

    Raises:
        UserError: missing, empty, truncated or foreign file, code in it, or weights not finite.
    """
    content = read_checkpoint(path, "--ckpt ")
    if not isinstance(content, dict) or not content:
        raise UserError(f"--ckpt {path} holds no weights: found {type(content).__name__}")
    key = next((k for k in ("state_dict", "model") if isinstance(content.get(k), dict)), None)
    state = content[key] if key else content
    rest = {k: v for k, v in content.items() if k != key} if key else {}
    named = all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items())
    if not state or not named:
        raise UserError(f"--ckpt {path} holds no weights: no 'state_dict', no 'model', and not "
                        "a state dict itself")
    wrappers = ("module", "_orig_mod")  # DataParallel and DDP; torch.compile
    state = {".".join(p for p in k.split(".") if p not in wrappers): v for k, v in state.items()}
    for name, value in state.items():
        if value.layout != torch.strided or value.is_complex() or value.device.type != "cpu":
            raise UserError(f"--ckpt {path}: {name} is no plain tensor of real numbers")
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"--ckpt {path}: {name} is not finite")
    return state, rest
