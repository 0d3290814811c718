#!/usr/bin/env python3
"""Reproduce a published table: run what is missing, set ours beside the published numbers.

    python reproduce.py digits --seeds 2          # minutes on a CPU, no download
    python reproduce.py readme --dry-run          # the commands, and how far each has come
    python reproduce.py readme --seeds 3 --slurm  # into the queue; then --report
    python reproduce.py readme --report --readme README.md

A table is configs/tables/TABLE.yaml. Networks are trained once below RESULTS/networks, whatever
rows and tables use them; evaluations and table.md, table.csv and index.html go to RESULTS/TABLE.
Typed again, the command goes on where it stopped. Exit status: 0 all there, 1 a part failed, 2 bad
input, 75 stopped by a signal (the same command continues).
"""

import ast
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import distributed
import evaluation
import figures
import page
import runs
import tables
import utils
from utils import RunError, UserError, number

HERE = Path(__file__).resolve().parent
# Settings of a training that decide no number, and those that this program gives itself. What
# some of the former mean is resolved in a run, but not here, so that they count.
UNCOUNTED = ({key.replace("_", "-") for key in runs.UNCOUNTED}
             - {"fast", "mean", "std", "workers"})
GIVEN = ("config", "seed", "exp-name", "results-dir", "data-dir", "no-download", "no-resume")

# The program files that decide numbers. A change of them, comments apart, makes a result stale.
SHARED_CODE = ("augment.py", "data.py", "distributed.py", "models.py", "utils.py")
TRAINING_CODE = ("train.py", "trainers.py", "losses.py", "stream.py", *SHARED_CODE)
FEATURE_CODE = ("features.py", *SHARED_CODE)
EVALUATION_CODE = ("evaluation.py", "detection.py", *FEATURE_CODE)


def parser():
    """Build the command line."""
    p = utils.Parser(description=__doc__)
    known = ", ".join(sorted(path.stem for path in tables.FOLDER.glob("*.yaml")))
    p.add_argument("table", metavar="TABLE", help=f"{known}, or the path of a .yaml file")
    p.add_argument("--seeds", type=number(int, 1, 1000), default=3, metavar="N",
                   help="networks of each row, with the seeds 1 to N")
    p.add_argument("--only", nargs="+", metavar="ROW", help="these rows of the table only")
    p.add_argument("--results-dir", default="results/tables",
                   help="where networks and tables are written")
    p.add_argument("--data-dir", help="where image sets are (default: as the programs' own)")
    p.add_argument("--no-download", action="store_true", help="never fetch a missing set")
    p.add_argument("--sets", nargs="+", default=[], metavar="NAME=PATH",
                   help="where your copy of an outlier set is: a folder of images, or an .npz file")
    p.add_argument("--override", nargs="+", default=[], metavar="FLAG=VALUE",
                   help="flags of every training, as epochs=1 or fast=true, instead of the table's")
    p.add_argument("--accept-stale", action="store_true",
                   help="take finished results of another version for what is not done in this one")
    p.add_argument("--readme", metavar="FILE.md",
                   help="also write the table into this file, between its markers")
    how = p.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true",
                     help="print the commands and their states; run and write nothing")
    how.add_argument("--slurm", action="store_true",
                     help="submit what is missing with sbatch (slurm/*.sbatch), and end")
    how.add_argument("--report", action="store_true",
                     help="run nothing; write the table and the page of what is there")
    return p


# --- what there is to do --------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One command, where its results lie, and what they depend on.

    Attributes:
        title: in messages.
        home: folder of the results, which has the digest in its name: another version of the
            recipe or of the programs gets another folder, and nothing is overwritten.
        arguments: script and its arguments. identity: all that the numbers depend on.
        after: the Job whose network is evaluated, None for a training.
        row, seed, draw: of an evaluation. sets: {as a record calls it: as the table calls it}.
        records: path of an evaluation's records. expected: (set, clusters) that they must hold.
        accepted: whether this is a stale result, taken because the user said so.
    """

    title: str
    home: Path
    arguments: tuple
    identity: dict
    after: "Job | None" = None
    row: str = ""
    seed: int = 0
    draw: int = 0
    sets: dict = field(default_factory=dict)
    records: Path | None = None
    expected: frozenset = frozenset()
    accepted: bool = False


@dataclass(frozen=True)
class Choices:
    """What the command line says about every job."""

    results: Path
    data_dir: str | None
    no_download: bool
    overrides: dict
    sets: dict
    accept_stale: bool

    def where(self):
        """Return the flags that say where image sets are."""
        flags = {"data-dir": self.data_dir, "no-download": self.no_download or None}
        return _flags({key: value for key, value in flags.items() if value is not None})


def plan(table, seeds, choices):
    """List the jobs of a table, each network once, before the evaluations that need it.

    Args:
        table: tables.Table. seeds: how many networks of each row. choices: Choices.

    Returns:
        (jobs, missing): list of Job; {(row, outlier set): why it is left out}.
    """
    jobs, missing = {}, {}
    for row in table.rows.values():
        groups = {}  # a set of the user's is evaluated alone: another one need not repeat it
        for ood in row.ood:
            if ood in choices.sets:
                groups[ood] = [ood]
            elif ood in table.sets:
                missing[row.name, ood] = f"it is {table.sets[ood]['needs']}; --sets {ood}=PATH"
            else:
                groups.setdefault("", []).append(ood)
        for seed in range(1, seeds + 1) if groups else ():
            network = training_job(row, seed, choices)
            network = jobs.setdefault(network.home, network)
            for draw in range(1, row.draws + 1):
                for only, ood in groups.items():
                    job = evaluation_job(table, row, network, draw, only, ood, choices)
                    jobs[job.home] = job
    return list(jobs.values()), missing


def of_rows(jobs, rows):
    """Return the evaluations of some rows, by name, and the trainings that they need."""
    needed = {job.after.home for job in jobs if job.row in rows}
    return [job for job in jobs if job.row in rows or job.home in needed]


def training_job(row, seed, choices):
    """Return the Job that trains the network of a row."""
    recipe = HERE / row.config
    overrides = {**row.overrides, **choices.overrides}
    settings = {str(k).replace("_", "-"): v for k, v in utils.read_yaml(recipe).items()}
    settings = {k: v for k, v in {**settings, **overrides}.items() if k not in UNCOUNTED}
    kind = "".join(f"-{key}{_flat(value)}" for key, value in overrides.items())
    name = recipe.stem + re.sub(r"[^A-Za-z0-9_.-]", "_", kind)
    identity = {"settings": settings, "code": code_digests(TRAINING_CODE)}
    home, identity, accepted = _home(
        choices, choices.results / "networks", name, f"seed{seed}", identity, is_trained
    )
    arguments = (
        "train.py", "--config", os.path.relpath(recipe), *_flags(overrides), "--seed", str(seed),
        "--exp-name", home.name, "--results-dir", str(home.parent), *choices.where(),
    )
    return Job(f"train {name}, seed {seed}", home, arguments, identity, seed=seed,
               accepted=accepted)


def evaluation_job(table, row, network, draw, only, ood, choices):
    """Return the Job that evaluates a row's network on some of its outlier sets.

    Args:
        only: name of the set, where the user has it and it is evaluated alone; else "".
    """
    script, _ = tables.METHODS[row.method]
    specs = {choices.sets[o][0] if o in choices.sets else o: o for o in ood}
    identity = {
        "network": network.identity, "method": row.method, "flags": row.flags,
        "sets": {o: choices.sets[o][1] if o in choices.sets else o for o in ood},
        "code": code_digests((script, *EVALUATION_CODE)),
    }
    expected = frozenset((spec, m) for spec in specs for m in row.clusters)
    base = f"{row.name}_{row.method}"
    name = row.name + f"-{only}" * bool(only)
    which = f"seed{network.seed}" + f"-draw{draw}" * (row.draws > 1)
    home, identity, accepted = _home(
        choices, choices.results / table.name, name, which, identity,
        lambda home: is_evaluated(home / f"{base}.jsonl", expected),
    )
    seed = draw if row.draws > 1 else network.seed  # draws differ in nothing else
    cache = choices.results / "features" / _digest(code_digests(FEATURE_CODE))
    arguments = (
        script, "--ckpt", str(network.home / "latest_exp/checkpoint/checkpoint.pth.tar"),
        "--ood", *specs, *_flags(row.flags), "--seed", str(seed), "--plot",
        "--cache-dir", str(cache),
        "--exp-name", row.name, "--results-dir", str(home), *choices.where(),
    )
    title = f"evaluate {name}, seed {network.seed}" + f", draw {draw}" * (row.draws > 1)
    return Job(title, home, arguments, identity, network, row.name, network.seed, draw, specs,
               home / f"{base}.jsonl", expected, accepted or network.accepted)


def _home(choices, parent, name, which, identity, is_finished):
    """The folder of a job, its identity, and whether it is an accepted stale one."""
    home = parent / f"{name}-{_digest(identity)}-{which}"
    if choices.accept_stale and not is_finished(home):
        for other in reversed(versions_of(home)):
            theirs = _identity(other).get("identity")
            if theirs and is_finished(other):
                return other, theirs, True
    return home, identity, False


def _digest(identity):
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]


def versions_of(home):
    """Return the folders of other versions of a job, the oldest first."""
    name, which = re.fullmatch(r"(.+)-[0-9a-f]{8}-(seed\d+(?:-draw\d+)?)", home.name).groups()
    pattern = re.compile(f"{re.escape(name)}-[0-9a-f]{{8}}-{which}")
    found = home.parent.iterdir() if home.parent.is_dir() else ()
    others = [p for p in found if pattern.fullmatch(p.name) and p != home and is_started(p)]
    return sorted(others, key=lambda p: p.stat().st_mtime)


def code_digests(files):
    """Return {file: digest of its code}; comments, docstrings and layout do not count."""
    return {name: _code_digest(HERE / name) for name in sorted(files)}


def _code_digest(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]


def _flags(settings):
    """{"epochs": 3, "normalize": True} -> ["--epochs", "3", "--normalize"]."""
    found = []
    for key, value in settings.items():
        if isinstance(value, bool):
            found.append(f"--{key}" if value else f"--no-{key}")
        else:
            values = value if isinstance(value, list) else [value]
            found += [f"--{key}", *map(str, values)]
    return found


def _flat(value):
    return "".join(map(str, value)) if isinstance(value, list) else str(value)


def command_line(job, python="python"):
    """Return the command of a job as a list."""
    script, *arguments = job.arguments
    return [python, os.path.relpath(HERE / script), *arguments]


# --- how far it has come --------------------------------------------------------------------------


def state(job):
    """Tell how far a job has come.

    Returns:
        (state, detail): "done", "running", "broken" (started, not finished), "stale" (finished or
        started in another version only; what differs) or "to do".
    """
    if is_done(job):
        return "done", "of another version, accepted" if job.accepted else ""
    if _is_locked(job.home):
        return "running", ""
    number = _identity(job.home).get("slurm")
    if is_queued(number):
        return "running", f"job {number} of the queue"
    if is_started(job.home):
        return "broken", "started, not finished"
    others = versions_of(job.home)
    if others:
        return "stale", f"{others[-1]} differs in {_difference(others[-1], job)}"
    return "to do", ""


def is_done(job):
    """Tell whether a job's results are complete."""
    if job.after is None:
        return is_trained(job.home)
    return is_evaluated(job.records, job.expected)


def is_started(home):
    """Tell whether a folder holds anything of a job, be it typed by hand."""
    return home.is_dir() and any(p.name != "lock" for p in home.iterdir())


def is_trained(home):
    """Tell whether the newest run below a folder has ended."""
    return runs.finished(home / "latest_exp")


def is_evaluated(path, expected):
    """Tell whether the records of an evaluation are all there, and its plots after them."""
    found = {(r.get("ood"), r.get("clusters")) for r in evaluation.read_records(path)}
    return expected <= found and path.with_name(f"{path.stem}_precision_recall.png").is_file()


def _identity(home):
    """What stands in a job's identity.json, {} without one."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((home / "identity.json").read_text(encoding="utf-8"))
    return {}


def write_identity(job, **more):
    """Write beside a job's results what they depend on, before there are any."""
    content = {"identity": job.identity, "command": command_line(job), **more,
               "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    write(job.home / "identity.json", json.dumps(content, indent=1) + "\n")


def _difference(other, job):
    """In what the version in a folder differs from a job, in words."""
    before, now = (_leaves(x) for x in (_identity(other).get("identity", {}), job.identity))
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    words = [key.removeprefix("code.") if key.startswith("code.")
             else f"{key} ({before.get(key, 'none')} there, {now.get(key, 'none')} now)"
             for key in changed]
    return ", ".join(words[:3]) + (f" and {len(words) - 3} more" if len(words) > 3 else "")


def _leaves(tree, above=""):
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    found = {}
    for key, value in tree.items():
        inner = isinstance(value, dict)
        found |= _leaves(value, f"{above}{key}.") if inner else {f"{above}{key}": value}
    return found


# --- running --------------------------------------------------------------------------------------


def _is_locked(home):
    try:
        with open(home / "lock", "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


class Runner:
    """Run commands one at a time and hand signals on to the one that runs.

    A command holds its job's lock as long as it lives, even if this program is killed: typed again,
    it sees that the job runs and waits for it.
    """

    def __init__(self):
        self.signal, self._child = None, None
        for each in distributed.asking():
            signal.signal(each, self._hand_on)

    def _hand_on(self, each, frame):
        self.signal = each
        if self._child is not None:
            self._child.send_signal(each)

    def stop_if_told(self, child_status=0):
        """Raise utils.Stopped if a signal has come, here or to the command itself."""
        if self.signal is not None or child_status == utils.STOPPED:
            by = signal.Signals(self.signal).name if self.signal else "a signal"
            raise utils.Stopped(f"stopped by {by}; the same command continues")

    def attempt(self, job, wait):
        """Run a job unless it is done or somebody else runs it.

        Args:
            job: Job. wait: whether to wait for somebody else to finish it.

        Returns:
            "done", "running", or why it failed.
        """
        utils.make_folder(job.home, "--results-dir")
        with open(job.home / "lock", "ab") as lock:
            if not self._lock(lock, wait):
                return "running"
            if is_done(job):
                return "done"
            if is_queued(_identity(job.home).get("slurm")):
                return "running"
            if not (job.home / "identity.json").is_file():
                write_identity(job)
            status = self._run(job, lock)
        if is_done(job):
            return "done"
        self.stop_if_told(status)
        by = f"signal {-status}" if status < 0 else f"exit status {status}"
        return f"ended with {by}" + " but its results are not complete" * (status == 0)

    def _lock(self, lock, wait):
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            if not wait:
                return False
            self.stop_if_told()
            time.sleep(0.5)

    def _run(self, job, lock):
        """Run the command of a job with the lock in its hands; return its exit status."""
        print(f"\n$ {shlex.join(command_line(job))}", flush=True)
        self._child = subprocess.Popen(
            command_line(job, sys.executable), pass_fds=[lock.fileno()],
            start_new_session=True,  # Ctrl-C comes here alone and is handed on once
        )
        if self.signal is not None:
            self._child.send_signal(self.signal)
        status = self._child.wait()
        self._child = None
        return status


def run_all(jobs):
    """Run jobs in order; what somebody else runs is waited for at the end.

    Args:
        jobs: list of Job, trainings before their evaluations.

    Returns:
        {folder: why it failed}.
    """
    runner, failed, left = Runner(), {}, jobs
    for wait in (False, True):
        waiting, left = left, []
        for job in waiting:
            runner.stop_if_told()
            if job.after is not None and job.after.home in failed:
                failed[job.home] = "its training failed"
                continue
            behind = any(job.after is other for other in left)
            result = "running" if behind else runner.attempt(job, wait)
            if result == "running" and not wait:
                left.append(job)
            elif result == "running":
                result = "is in the queue"
            if result not in ("done", "running"):
                failed[job.home] = result
                utils.note(f"{job.title}: {result}")
        if left and not wait:
            utils.note(f"waits for what runs already: {left[0].title}")
    return failed


# --- Slurm ----------------------------------------------------------------------------------------


def is_queued(number):
    """Tell whether the queue has a job, by its number ("12" or "12_0"); no for None."""
    if not number or shutil.which("squeue") is None:
        return False
    done = subprocess.run(["squeue", "--noheader", "--jobs", number], capture_output=True,
                          text=True, check=False)
    return done.returncode == 0 and bool(done.stdout.strip())


def submissions(jobs):
    """List what would be submitted: the seeds of a network as one array, then its evaluations.

    Args:
        jobs: list of Job that are neither done nor running.

    Returns:
        list of (jobs, arguments of sbatch).
    """
    arrays = {}
    for job in (j for j in jobs if j.after is None):
        arrays.setdefault(re.sub(r"seed\d+$", "", str(job.home)), []).append(job)
    found = []
    for together in arrays.values():
        arguments = list(together[0].arguments[1:])
        seed = str(together[0].seed)
        arguments[arguments.index("--seed") + 1] = "{}"
        arguments[arguments.index("--exp-name") + 1] = (
            together[0].home.name.removesuffix(seed) + "{}"
        )
        seeds = [str(job.seed) for job in together]
        found.append((together, [f"--array=0-{len(seeds) - 1}", "slurm/train.sbatch", *seeds,
                                 *arguments]))
    return found + [([j], ["slurm/eval.sbatch", *j.arguments]) for j in jobs if j.after is not None]


def submit(jobs):
    """Submit jobs with sbatch, evaluations to start when their training has ended well.

    Raises:
        UserError: no sbatch, or not in the project's folder. RunError: sbatch refused.
    """
    if shutil.which("sbatch") is None:
        raise UserError("--slurm needs sbatch, which is not on PATH; without --slurm the commands "
                        "are run here, and --dry-run prints them")
    if Path.cwd() != HERE:
        raise UserError(f"--slurm: the batch scripts start in the project's folder; cd {HERE}")
    numbers = {}
    for together, arguments in submissions(jobs):
        before = together[0].after
        waits_for = before and (numbers.get(before.home) or _identity(before.home).get("slurm"))
        if waits_for and not is_done(before):
            arguments = [f"--dependency=afterok:{waits_for}", *arguments]
        command = ["sbatch", "--parsable", *arguments]
        print(f"$ {shlex.join(command)}", flush=True)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        number = done.stdout.strip().partition(";")[0]
        if done.returncode or not number.isdecimal():
            said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
            raise RunError(f"sbatch did not take {together[0].title}: it said {said}")
        for task, job in enumerate(together):
            numbers[job.home] = number if job.after is not None else f"{number}_{task}"
            utils.make_folder(job.home, "--results-dir")
            write_identity(job, slurm=numbers[job.home])
    print(f"{len(numbers)} jobs submitted; when they have ended: the same command with --report "
          "instead of --slurm")


# --- the results ----------------------------------------------------------------------------------


def measure(jobs):
    """Collect what done evaluations measured.

    Returns:
        {(row, outlier set, clusters): {seed: [record of each draw]}}; seeds with all draws only.
    """
    draws, found = {}, {}
    for job in (j for j in jobs if j.after is not None and is_done(j)):
        for record in evaluation.read_records(job.records):  # of a repeated one the last counts
            key = record.get("ood"), record.get("clusters")
            if key in job.expected:
                cell = draws.setdefault((job.row, job.sets[key[0]], key[1], job.seed), {})
                cell[job.draw] = record
    wanted = {}
    for job in (j for j in jobs if j.after is not None):
        wanted[job.row] = max(wanted.get(job.row, 0), job.draw)
    for (row, ood, m, seed), cell in draws.items():
        if len(cell) == wanted[row]:
            found.setdefault((row, ood, m), {})[seed] = [cell[d] for d in sorted(cell)]
    return found


def write(path, text):
    """Write a whole text file.

    Raises:
        RunError: it can't be written; what stood there stays.
    """
    try:
        with utils.whole_file(path, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
    except OSError as error:
        raise RunError(f"{path} was not written ({error.strerror}); nothing was overwritten"
                       ) from None


def write_report(table, jobs, missing, failed, choices):
    """Write table.md, table.csv and index.html; return the table's lines and what to say of them.

    Args:
        table, jobs, missing, choices: as for `plan`. failed: as of `run_all`.
    """
    home = choices.results / table.name
    utils.make_folder(home, "--results-dir")
    lines = tables.lines(table, measure(jobs))
    remarks = [f"Left out: {tables.set_label(table, ood)} of {row}: {reason}."
               for (row, ood), reason in missing.items()]
    remarks += [f"Failed: {job.title}: {failed[job.home]}." for job in jobs if job.home in failed]
    remarks += [f"Of another version, accepted: {job.title}." for job in jobs if job.accepted]
    if choices.overrides:
        remarks.append(f"Not the table's recipe: {shlex.join(_flags(choices.overrides))}.")
    if any(line.deviation is not None for line in lines):
        remarks.append("Ours: mean ± standard deviation over n networks.")
    text = tables.markdown(table, lines)
    write(home / "table.md", text + "".join(f"\n{remark}\n" for remark in remarks))
    write(home / "table.csv", tables.as_csv(lines))
    shown = [_for_page(job, home / "figures") for job in jobs]
    write(home / "index.html", page.html(table, lines, remarks, shown))
    return lines, remarks


def _for_page(job, folder):
    """What the page shows of a job."""
    current, detail = state(job)
    run = job.home / "latest_exp"
    records = evaluation.read_records(run / "log.jsonl" if job.after is None else job.records)
    drawn = sorted(job.home.glob("*.png"))
    if job.after is None and any(r.get("event") == "epoch" for r in records):
        utils.make_folder(folder, "--results-dir")
        drawn = [folder / f"{job.home.name}.png"]
        figures.training_curves(records, drawn[0])
    versions = next((r["versions"] for r in records if "versions" in r), {})
    seconds = sum(r.get("seconds", 0) for r in records if r.get("event") == "epoch")
    return page.Shown(job.title, " ".join(filter(None, [current, detail])),
                      shlex.join(command_line(job)), versions, seconds, tuple(drawn))


def write_readme(path, table, lines):
    """Write a table between its markers in a Markdown file.

    Raises:
        UserError: no file, or not exactly one pair of markers.
    """
    begin, end = f"<!-- table {table.name} -->", f"<!-- end of table {table.name} -->"
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--readme {path}: {error}") from None
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed) or begin in rest or end in tail:
        raise UserError(f"--readme {path}: needs one line '{begin}' and after it one '{end}'; the "
                        "table is written between them")
    known = [x for x in lines if x.values or x.published is not None]
    write(Path(path), f"{head}{begin}\n{tables.markdown(table, known)}{end}{tail}")


# --- the program ----------------------------------------------------------------------------------


CHECK = """
import json, sys, train, utils
sys.argv[0] = "train.py"
for arguments in json.load(sys.stdin):
    utils.parse_args(train.parser(), arguments)
"""


def check_trainings(table, jobs):
    """See that train.py takes the flags of every training, before anything runs.

    Raises:
        UserError: it does not; with its words.
    """
    lines = [list(job.arguments[1:]) for job in jobs if job.after is None]
    done = subprocess.run(
        [sys.executable, "-c", CHECK], input=json.dumps(lines), text=True, capture_output=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path[1:]])}, check=False,
    )
    if done.returncode:
        said = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise UserError(f"{table.path}, with what --override says: {said}")


def _overrides(given):
    """["epochs=1", "fast=true"] -> {"epochs": "1", "fast": True}."""
    found = {}
    for text in given:
        key, equals, value = text.partition("=")
        key = key.lstrip("-").replace("_", "-")
        if not equals or not key or not value:
            raise UserError(f"--override {text}: FLAG=VALUE is needed, as epochs=1 or fast=true")
        if key in GIVEN:
            raise UserError(f"--override {text}: {key} is what this program gives each training "
                            "itself")
        if key in found:
            raise UserError(f"--override gives {key} twice")
        found[key] = {"true": True, "false": False}.get(value, value)
    return found


def _sets(given, table):
    """["tin=PATH"] -> {"tin": (its name for --ood, what its files are)}."""
    known = list(dict.fromkeys(ood for row in table.rows.values() for ood in row.ood))
    found = {}
    for text in given:
        name, _, path = text.partition("=")
        if name not in known or not path:
            raise UserError(f"--sets {text}: NAME=PATH is needed, the names of this table being "
                            f"{', '.join(known)}")
        path = Path(path).resolve()
        if path.is_dir():
            files = [(str(f), f.stat().st_size) for f in sorted(path.rglob("*")) if f.is_file()]
            digest = hashlib.sha256(repr(files).encode()).hexdigest()[:16]
            found[name] = f"folder:{path}", f"folder of {len(files)} files, {digest}"
        elif path.suffix == ".npz" and path.is_file():
            found[name] = f"npz:{path}", f"npz {utils.file_hash(path)[:16]}"
        else:
            raise UserError(f"--sets {text}: {path} is no folder and no .npz file")
    return found


def show(jobs, missing):
    """Print every command under its state; those of what is done or runs, as comments."""
    for job in jobs:
        current, detail = state(job)
        print(f"# {job.title}: {current}" + f" ({detail})" * bool(detail))
        print("# " * (current in ("done", "running")) + shlex.join(command_line(job)))
    for (row, ood), reason in missing.items():
        print(f"# left out: {ood} of {row}: {reason}")


def main():
    args = utils.parse_args(parser())
    table = tables.read(args.table)
    rows = args.only or list(table.rows)
    for name in rows:
        if name not in table.rows:
            raise UserError(f"--only {name}: no such row in {table.path}; its rows are "
                            f"{', '.join(table.rows)}")
    choices = Choices(Path(args.results_dir), args.data_dir, args.no_download,
                      _overrides(args.override), _sets(args.sets, table), args.accept_stale)
    if args.readme and (choices.overrides or args.only):
        raise UserError("--readme takes the whole table as it is: without --only and --override")
    jobs, missing = plan(table, args.seeds, choices)
    chosen = of_rows(jobs, rows)
    if args.report and not choices.results.is_dir():
        raise UserError(f"--report: no folder --results-dir {choices.results}")
    check_trainings(table, chosen)

    if args.dry_run:
        show(chosen, {key: why for key, why in missing.items() if key[0] in rows})
        return
    if args.slurm:
        submit([job for job in chosen if state(job)[0] not in ("done", "running")])
        return

    for job in chosen:
        current, detail = state(job)
        print(f"{job.title}: {current}" + f" ({detail})" * bool(detail), flush=True)
    failed = {} if args.report else run_all(chosen)
    lines, remarks = write_report(table, jobs, missing, failed, choices)
    if args.readme:
        write_readme(args.readme, table, lines)
    print("\n" + tables.markdown(table, lines) + "".join(f"\n{remark}" for remark in remarks))
    home = choices.results / table.name
    print(f"\nwritten: {home / 'table.md'} {home / 'table.csv'} {home / 'index.html'}")
    if failed:
        raise RunError(f"{len(failed)} of {len(chosen)} jobs failed: "
                       f"{', '.join(job.title for job in chosen if job.home in failed)}")


if __name__ == "__main__":
    utils.program(main)
