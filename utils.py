"""Configuration, seeds, devices, errors: what the programs share. Nothing here knows the method.

    args = parse_args(parser(), argv)                       # --config FILE.yaml, then the flags
    generator(args.seed, "augment", epoch, step)            # every random draw has its own
    raise UserError("--size 7: expected at least 8")        # one line, exit status 2
"""

import argparse
import collections
import contextlib
import math
import operator
import os
import platform
import re
import reprlib
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import torch


class UserError(Exception):
    """Bad input: the message names the flag or file, what was found, and what is allowed."""


class RunError(Exception):
    """A failure while running, in one line."""


class Stopped(Exception):
    """A signal ended the program and its state is saved: the same command continues."""


def note(text):
    """Print one line on stderr that is not an error; of several processes the main one does."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):  # stderr may be a file on a full disk
            print(f"{Path(sys.argv[0]).name}: note: {text}", file=sys.stderr, flush=True)


def say(text):
    """Print a line on stdout and go on where that fails; a pipe without a reader has had enough."""
    try:
        print(text, flush=True)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            note(f"stdout cannot be written to: {error.strerror}")


def is_name(text):
    """Tell whether text can name a file: no NUL, no surrogate but those of the names of files."""
    return not re.search("[\0\ud800-\udc7f\udd00-\udfff]", text)


# --- configuration --------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with --config, whose errors are UserErrors."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False, formatter_class=lambda prog:
                         _HelpFormatter(prog, max_help_position=34, width=100))
        self.add_argument("--config", metavar="FILE.yaml",
                          help="defaults for these flags; the command line wins")

    def error(self, message):
        raise UserError(message)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        text = action.help or ""
        shown = action.default not in (None, False, argparse.SUPPRESS) and "(default" not in text
        return f"{text} (default: %(default)s)" if shown and action.option_strings else text


def parse_args(parser, argv=None):
    """Parse a command line whose defaults a --config file may replace: an argparse.Namespace.

    Args: parser: a Parser; changed. argv: list of words; None is sys.argv[1:].
    Raises: UserError: names the flag, or the file and its key, and what is allowed.
    """
    argv = sys.argv[1:] if argv is None else [str(word) for word in argv]
    for word in argv:  # argparse would make an empty list of it
        if word.startswith("--") and word.partition("=")[2] == "--":
            raise UserError(f"{word[:-3]}: expected a value, not '--'")
    path = None if {"-h", "--help"} & set(argv) else Parser("").parse_known_args(argv)[0].config
    actions = {a.dest: a for a in parser._actions
               if a.option_strings and a.dest not in ("help", "config")}
    for key, value in ({} if path is None else read_yaml(path)).items():
        action = actions.get(str(key).replace("-", "_"))
        if action is None:
            known = ", ".join(sorted(dest.replace("_", "-") for dest in actions))
            raise UserError(f"{path}: unknown key '{key}'; known are {known}")
        try:
            action.default, action.required = _convert(action, value), False
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise UserError(f"{path}: {key}: {error}") from None
    args = parser.parse_args(argv)
    # A shell leaves --flag=~/x as it is, and YAML has no home folder.
    vars(args).update({key: os.path.expanduser(value) for key, value in vars(args).items()
                       if isinstance(value, str)})
    return args


def _convert(action, value):
    """Make of a YAML value what argparse makes of the words of a command line."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"expected true or false, not {reprlib.repr(value)}")
        return value
    takes_list, is_text = action.nargs is not None, action.type in (None, str, experiment)
    values = value if takes_list and isinstance(value, list) else [value]
    count = action.nargs if isinstance(action.nargs, int) else max(1, len(values))
    if len(values) != count:
        raise ValueError(f"expected a list of {count} values, not {reprlib.repr(value)}")
    for each in values:
        plain = isinstance(each, str if is_text else (str, int, float)) and "\0" not in str(each)
        if not plain or isinstance(each, bool):
            raise ValueError(f"expected {'text (quote it)' if is_text else 'one value'}, "
                             f"not {reprlib.repr(each)}")
    values = [action.type(str(v)) if action.type else v for v in values]
    if action.choices and not set(values) <= set(action.choices):
        raise ValueError(f"expected one of {', '.join(map(str, action.choices))}, not {value!r}")
    return values if takes_list else values[0]


def read_yaml(path, flag="--config"):
    """Read a YAML file of keys and values, a dict; errors call it `flag`.

    Raises: UserError: no file, not YAML, a value that cannot be made or printed, not keys and
        values, too many of them, or a key that is given twice (PyYAML takes the last one).
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def flatten_mapping(self, node):
            super().flatten_mapping(node)
            if len(node.value) > MAX_KEYS:  # merge keys (<<) can double them again and again
                raise UserError(f"{path}: more than {MAX_KEYS} keys in one place")

        def construct_object(self, node, deep=False):
            try:
                value = super().construct_object(node, deep)
                if isinstance(value, str | int):
                    str(value).encode("utf-8", "surrogateescape")
                return value
            except (AttributeError, LookupError, ValueError) as error:  # of dates, numbers, text
                problem = f"{reprlib.repr(node.value)} is no value ({error})"
                raise yaml.MarkedYAMLError(None, None, problem, node.start_mark) from None

        def construct_mapping(self, node, deep=False):
            keys = [str(k.value).replace("_", "-") for k, _ in node.value
                    if isinstance(k, yaml.ScalarNode)]
            for key, count in collections.Counter(keys).most_common(1):
                if count > 1:
                    raise UserError(f"{path}: key '{key}' is given {count} times")
            return super().construct_mapping(node, deep)

    try:
        content = yaml.load(Path(os.path.expanduser(path)).read_text(encoding="utf-8"), Loader)
    except (OSError, RecursionError, TypeError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{flag} {path} cannot be read or is not YAML: {error}") from None
    if not isinstance(content, dict | None):
        raise UserError(f"{flag} {path}: expected 'flag: value' lines, not {reprlib.repr(content)}")
    return content or {}


# --- types of flags -------------------------------------------------------------------------------

LARGEST = 2**31 - 1  # integer on the command line; larger ones overflow in torch and faiss
MAX_CLASSES = 100_000
MAX_KEYS = 100_000  # of a YAML file


def number(kind, low=None, high=None, above=None, below=None):
    """Make an argparse type: an int or float with low <= value <= high, above < value < below."""
    high = LARGEST if kind is int and high is None else high
    checks = [("at least", low, operator.ge), ("at most", high, operator.le),
              ("above", above, operator.gt), ("below", below, operator.lt)]
    checks = [check for check in checks if check[1] is not None]
    limits = " and ".join(f"{word} {bound}" for word, bound, _ in checks)
    wanted = f"{'an integer' if kind is int else 'a number'} {limits}".strip()

    def convert(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if all(holds(value, bound) for _, bound, holds in checks) and math.isfinite(value):
                return value
        raise argparse.ArgumentTypeError(f"expected {wanted}, not '{text}'")

    return convert


def experiment(text):
    """An argparse type: the name of a folder or file below a results folder."""
    if not text.strip() or Path(text).is_absolute() or ".." in Path(text).parts:
        raise argparse.ArgumentTypeError(f"'{text}' is not a name below the results folder")
    return text


def class_list(text):
    """An argparse type: "0-5" or "0,3,7" or both mixed -> sorted tuple of ints."""
    chosen = []
    try:
        for part in text.split(","):
            low, dash, high = part.partition("-")
            chosen += range(int(low), min(int(high if dash else low), MAX_CLASSES) + 1)
    except ValueError:
        chosen = []
    if not chosen or len(set(chosen)) < len(chosen) or MAX_CLASSES in chosen:
        raise argparse.ArgumentTypeError(f"expected 0-5 or 0,3,7, no class twice and all below "
                                         f"{MAX_CLASSES}, not '{text}'")
    return tuple(sorted(chosen))


def to_json_types(config):
    """Return a configuration dict with its tuples made lists, for JSON and torch."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}


# --- randomness, devices, versions ----------------------------------------------------------------


def generator(seed, *key):
    """Make a generator on the CPU whose draws are a function of its arguments alone.

    Args: seed: int >= 0. key: ints >= 0 or words that say what the draws are for.
    """
    words = [word for part in (seed, *key)
             for word in (part.encode() if isinstance(part, str) else [part])]
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
