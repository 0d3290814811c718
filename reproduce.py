#!/usr/bin/env python3
"""Reproduce a published table: run what is missing, set ours beside the published numbers.

    python reproduce.py demo --seeds 1            # minutes on a CPU, no download
    python reproduce.py readme --dry-run          # the commands, and how far each has come
    python reproduce.py readme --seeds 3 --slurm  # into the queue; then --report
    python reproduce.py readme --report --readme docs/reproduce.md

A table is configs/tables/TABLE.yaml. Networks are trained once below RESULTS/networks, whatever
rows and tables use them; evaluations and table.md, table.csv and index.html go to RESULTS/TABLE.
The same command continues. Exit status: 0 all there, 1 a part failed, 2 bad input, 75 stopped.
"""

import contextlib
import functools
import hashlib
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from itertools import product
from pathlib import Path
from signal import Signals
from typing import NamedTuple

import filelock

import utils
from detection import Choice
from infra import program, runs, storage
from infra.storage import read_records
from report import figures, page, tables
from utils import RunError, Stopped, UserError, number

HERE = Path(__file__).resolve().parent
NETWORK, LOCK = "latest_exp/checkpoint/checkpoint.pth.tar", "reproduce.lock"
# Settings that decide no number. A run resolves what the four mean; in a recipe they count.
NOT_IN_IDENTITY = {key.replace("_", "-") for key in runs.NOT_IN_IDENTITY} - {
    "fast", "mean", "std", "workers"}


def parser():
    """Build the command line."""
    p = utils.Parser(description=__doc__)
    add = p.add_argument
    add("table", metavar="TABLE", help=f"{', '.join(tables.names())}, or a .yaml file")
    add("--seeds", type=number(int, 1, 1000), default=3, metavar="N",
        help="networks of each row that is trained")
    add("--only", nargs="+", metavar="ROW", help="run these rows of the table only")
    add("--results-dir", default="results/tables", help="where networks and tables are written")
    add("--data-dir", help="where image sets are (default: as the programs' own)")
    add("--no-download", action="store_true", help="never fetch a missing set")
    add("--sets", nargs="+", metavar="NAME=PATH", help="your outlier sets: folders, .npz files")
    add("--override", nargs="+", metavar="FLAG=VALUE", help="flags of every training, as epochs=1")
    add("--readme", metavar="FILE.md", help="also write the table between its markers here")
    add("--dry-run", action="store_true",
        help="write nothing: print commands and their states, with --slurm what would be submitted")
    add = p.add_mutually_exclusive_group().add_argument
    add("--slurm", action="store_true", help="submit what is missing with sbatch, and end")
    add("--report", action="store_true", help="run nothing, write what is there")
    return p


class Job(NamedTuple):
    """A training or an evaluation: its command, where its results lie, what they depend on."""

    title: str
    home: Path  # of the results; a digest of the identity is in its name
    words: list  # the command less its python
    identity: dict  # the settings that the numbers depend on
    seed: int
    network: Path | None = None  # folder of the training whose network is evaluated, if it is ours
    row: str = ""
    records: Path | None = None  # of an evaluation
    places: dict | None = None  # {(set, Choice) of a record: (row, set, Choice) in the table}


def plan(table, seeds, results, overrides, sets, where):
    """List the jobs of a table, each network once, before the evaluations that need it.

    Args: table: see `tables.read`. overrides: flags of every training. sets: see `_user_sets`.
        where: words of a command line that say where image sets are.
    """
    jobs = {}
    for (name, row), seed in product(table["rows"].items(), range(1, seeds + 1)):
        groups = {}  # a set of the user's is evaluated alone, so that a later one repeats nothing
        for ood in row["eval"]["ood"]:
            if ood in sets or "needs" not in table["sets"].get(ood, {}):
                groups.setdefault(f"-{ood}" if ood in sets else "", []).append(ood)
        if not groups or ("encoder" in row and seed > 1):  # others trained it, and only one
            continue
        network, source = None, ["--encoder", row.get("encoder")]
        if "train" in row:
            training = _training(row["train"] | overrides, seed, results, where)
            jobs[training.home], network = training, training.home
            source = ["--ckpt", str(network / NETWORK)]
        for draw, (alone, ood) in product(range(1, row["draws"] + 1), groups.items()):
            specs = {sets.get(o, [o])[0]: o for o in ood}
            identity = {"network": network.name if network else row["encoder"], **row["eval"],
                        "ood": {o: sets.get(o, [o])[-1] for o in ood}}
            which = [f"seed {seed}"] + [f"draw {draw}"] * (row["draws"] > 1)
            home = "-".join([name + alone, _digest(identity), *which]).replace(" ", "")
            home, script = results / table["name"] / home, tables.METHODS[row["eval"]["method"]]
            words = [os.path.relpath(HERE / script), *source,
                     "--ood", *specs, *_words(row["eval"]), "--plot",
                     "--seed", str(draw if row["draws"] > 1 else seed), "--exp-name", name,
                     "--cache-dir", str(results / "features"), "--results-dir", str(home), *where]
            places = {(s, c): (name, o, c) for s, o in specs.items() for c in row["choices"]}
            records = home / f"{name}_{row['eval']['method']}.jsonl"
            jobs[home] = Job(", ".join([f"evaluate {name}{alone}", *which]), home, words, identity,
                             seed, network, name, records, places)
    return list(jobs.values())


def _training(flags, seed, results, where):
    """The job that trains the network of a row, {"config": its recipe, flag: value}."""
    recipe = HERE / flags["config"]
    settings = {str(key): value for key, value in (utils.read_yaml(recipe) | flags).items()
                if key not in NOT_IN_IDENTITY}
    kind = "-".join([recipe.stem, *(f"{k}{v}" for k, v in flags.items() if k != "config")])
    kind = re.sub(r"[^A-Za-z0-9_.-]+", "_", kind)
    home = results / "networks" / f"{kind}-{_digest(settings)}-seed{seed}"
    words = [os.path.relpath(HERE / "train.py"), "--config", os.path.relpath(recipe),
             *_words(flags), "--seed", str(seed), "--exp-name", home.name,
             "--results-dir", str(home.parent), *where]
    return Job(f"train {kind}, seed {seed}", home, words, settings, seed)


def _words(flags):
    """{"epochs": 3, "sync-bn": True} -> ["--epochs", "3", "--sync-bn"]."""
    words = []
    for key, value in flags.items():
        if key not in ("config", "method", "ood"):
            words.append(("--no-" if value is False else "--") + key.replace("_", "-"))
            values = value if isinstance(value, list) else [value]
            words += [] if isinstance(value, bool) else map(str, values)
    return words


def _digest(content):
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:8]


def state(job):
    """Return how far a job has come: done, unfinished (broken off, or running now) or to do."""
    if job.records is None:
        is_done = runs.is_finished(job.home / "latest_exp")
    else:
        found = _measured(job)
        last = job.records.with_name(f"{job.records.stem}_precision_recall.png")
        is_done = job.places.keys() <= found.keys() and last.is_file()
    started = job.home.is_dir() and any(path.name != LOCK for path in job.home.iterdir())
    return "done" if is_done else "unfinished" if started else "to do"


def _measured(job):
    """{(outlier set, Choice): last record} of an evaluation, without what is no record of one."""
    return {(r["ood"], Choice.of(r)): r for r in read_records(job.records)
            if isinstance(r.get("ood"), str) and isinstance(r.get("score", ""), str)
            and isinstance(Choice.of(r).value, int | None)
            and all(isinstance(r.get(metric, 0.0), float) for metric in tables.METRICS)}


def commit():
    """Return the project's commit, with "+changes" where programs differ; "unknown" outside git."""
    git = functools.partial(subprocess.check_output, cwd=HERE, text=True, stderr=subprocess.DEVNULL)
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        if git(shlex.split("git ls-files reproduce.py")):  # or it is not the project's
            changes = git(shlex.split("git diff --name-only HEAD -- *.py :!tests :!benchmarks"))
            return git(["git", "rev-parse", "--short", "HEAD"]).strip() + "+changes" * bool(changes)
    return "unknown"


def commit_of(job):
    """Return the commit that a job was last started with."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        return str(json.loads((job.home / "identity.json").read_text(encoding="utf-8"))["commit"])
    return "unknown"


def _write_identity(job):
    content = {"identity": job.identity, "command": ["python", *job.words], "commit": commit()}
    _write(job.home / "identity.json", json.dumps(content, indent=1, default=str) + "\n")


def _write(path, text):
    with storage.atomic_write(path, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)


def listing(jobs):
    """Return the commands of jobs, each below a comment that says how far it has come."""
    text = ""
    for job in jobs:
        now, command = state(job), shlex.join(["python", *job.words])
        said = f"{job.title}: {now}"
        said += f", commit {commit_of(job)}{_took(job)}" * (now != "to do")
        text += f"# {' '.join(said.split())}\n"
        # An argument may hold the end of a line: a shell would run what comes after it.
        text += ("# " + command.replace("\n", "\n# ") if now == "done" else command) + "\n"
    return text


def _took(job):
    """How long a training, or the last run of an evaluation, took, as far as it has come."""
    seconds = [record["seconds"] for record in read_records(
        job.records or job.home / "latest_exp/log.jsonl") if "seconds" in record]
    return f", {seconds[-1] if job.records else sum(seconds):.0f} s" if seconds else ""


def run_all(jobs):
    """Run jobs in order; return {folder of a job: why it failed}. A signal goes to the command."""
    failed = {}
    with runs.stop_on_signals() as stop:
        for job in jobs:
            why = "its training failed" if job.network in failed else _attempt(job, stop)
            if stop.number:
                raise Stopped(f"stopped by {Signals(stop.number).name}; the same command continues")
            if why:
                failed[job.home] = why
            utils.say(f"{job.title}: {why or 'done'}")
    return failed


def _attempt(job, stop):
    """Run a job once no other process does, unless it is done; return why it failed, or ""."""
    storage.make_output_folder(job.home, "--results-dir")
    run, said = job.home / "latest_exp", False
    while not stop.number:
        with contextlib.suppress(filelock.Timeout), filelock.FileLock(job.home / LOCK, timeout=1):
            if run.is_dir():  # a training may have outlived the reproduce.py that started it
                filelock.FileLock(run / ".lock", timeout=1).acquire().lock.release()
            if state(job) == "done":
                return ""
            _write_identity(job)
            utils.say(f"\n$ {shlex.join(['python', *job.words])}")
            # In its own session, or Ctrl-C would reach it twice: from the terminal and from here
            with subprocess.Popen([sys.executable, *job.words], start_new_session=True) as child:
                while child.poll() is None and not stop.number:
                    time.sleep(0.1)
                child.send_signal(stop.number)  # 0 does nothing
            return "" if state(job) == "done" else f"exit status {child.returncode}"
        if not said:
            utils.note(f"{job.title}: waits for the process that runs it")
        said = True
    return ""


def submit(jobs, dry_run=False):
    """Submit, or in a dry run show, what is not in the queue; evaluations wait for trainings."""
    if not dry_run and (shutil.which("sbatch") is None or Path.cwd() != HERE):
        raise UserError(f"--slurm needs sbatch on PATH, and to be typed in {HERE}")
    queue = ""
    if shutil.which("squeue") is not None:  # a dry run may be elsewhere
        queue = subprocess.run(["squeue", "--me", "--noheader", "--format=%i %j"], text=True,
                               stdout=subprocess.PIPE, check=False).stdout
    numbers = dict(line.strip().split(" ", 1)[::-1] for line in queue.splitlines())
    for job in jobs:
        if job.home.name in numbers:
            print(f"# {job.title}: in the queue as {numbers[job.home.name]}")
            continue
        command = ["sbatch", "--parsable", f"--job-name={job.home.name}"]
        if job.network and job.network.name in numbers:
            command += [f"--dependency=afterok:{numbers[job.network.name]}",
                        "--kill-on-invalid-dep=yes"]
        command += (["slurm/eval.sbatch", *job.words] if job.records else
                    ["slurm/train.sbatch", *job.words[1:]])
        utils.say(f"$ {shlex.join(command)}")
        if dry_run:
            numbers[job.home.name] = f"NUMBER_OF_{job.home.name}"
            continue
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise RunError(f"sbatch did not take {job.title}")
        numbers[job.home.name] = done.stdout.strip().partition(";")[0]
        storage.make_output_folder(job.home, "--results-dir")
        _write_identity(job)
    print("when the jobs have ended: the same command with --report in place of --slurm")


def measure(jobs):
    """Collect the records of done evaluations: {(row, outlier set, Choice): {seed: [record]}}."""
    found = {}
    for job in (job for job in jobs if job.records and state(job) == "done"):
        last = _measured(job)
        for key, place in job.places.items():
            found.setdefault(place, {}).setdefault(job.seed, []).append(last[key])
    return found


def write_report(table, jobs, lines, remarks, home):
    """Write table.md, table.csv and index.html, with remarks, sentences, below the table."""
    storage.make_output_folder(home / "figures", "--results-dir")
    drawn = {job.title: {path.stem.removeprefix(f"{job.records.stem}_"): path
                         for path in sorted(job.home.glob("*.png"))} for job in jobs if job.records}
    for job in jobs:
        log = read_records(job.home / "latest_exp/log.jsonl")
        if any(record.get("event") == "epoch" for record in log):
            drawn[job.title] = {"training": home / "figures" / f"{job.home.name}.png"}
            figures.training_curves(log, drawn[job.title]["training"])
    below = "".join(f"\n{tables.plain(remark)}\n" for remark in remarks)
    _write(home / "table.md", tables.markdown(table, lines) + below)
    _write(home / "table.csv", tables.as_csv(lines))
    columns, rows, notes = tables.grid(table, lines)
    _write(home / "index.html", page.fill(
        "table", table=table, columns=columns, rows=rows, notes=notes, remarks=remarks,
        commands=listing(jobs), figures=drawn))


def split_readme(path, name):
    """Return the text of a Markdown file before, between and after the markers of a table."""
    begin, end = f"<!-- table {name} -->\n", f"<!-- end of table {name} -->"
    text = Path(path).read_text(encoding="utf-8") if Path(path).is_file() else ""
    parts = re.split(f"(?<={begin})|(?={end})", text)
    if len(parts) != 3 or not parts[0].endswith(begin):
        raise UserError(f"--readme {path}: expected a file with one line '{begin.strip()}' and "
                        f"below it one '{end}', for the table to stand between")
    return parts


def _pairs(flag, given):
    """["a=b"] -> {"a": "b"}."""
    pairs = [text.partition("=") for text in given or []]
    if not all(map(all, pairs)) or len({name for name, _, _ in pairs}) < len(pairs):
        raise UserError(f"{flag} {' '.join(given)}: expected NAME=VALUE, each name once")
    return {name: value for name, _, value in pairs}


def _user_sets(given, table):
    """{"tin": PATH} -> {"tin": (its name for --ood, a digest of its files)}."""
    known = dict.fromkeys(ood for row in table["rows"].values() for ood in row["eval"]["ood"])
    tables.check_known("--sets", given, known)
    found = {}
    for name, path in given.items():
        path = Path(os.path.expanduser(path)).resolve()
        kind = "folder" if path.is_dir() else path.suffix[1:]
        if kind not in ("folder", "npz") or not path.exists():
            raise UserError(f"--sets {name}={path}: expected a folder or an .npz file")
        files = [(str(file), file.stat().st_size, file.stat().st_mtime)
                 for file in [path, *sorted(path.rglob("*"))]]
        found[name] = f"{kind}:{path}", _digest(files)
    return found


def main(argv=None):
    args = utils.parse_args(parser(), argv)
    table, results = tables.read(args.table), Path(args.results_dir)
    rows = args.only or [*table["rows"]]
    tables.check_known("--only", rows, table["rows"])
    if args.readme and not (args.override or args.only):
        split_readme(args.readme, table["name"])
    elif args.readme:
        raise UserError("--readme takes the whole table as it is: without --only and --override")
    if args.report and not results.is_dir():
        raise UserError(f"--report: no folder --results-dir {results}")
    overrides = {key.replace("_", "-"): {"true": True, "false": False}.get(value, value)
                 for key, value in _pairs("--override", args.override).items()}
    if overrides.keys() & {"seed", *NOT_IN_IDENTITY}:
        raise UserError("--override: not for seed, places and flags that decide no number")
    given = _pairs("--sets", args.sets)
    sets = _user_sets(given, table)
    where = ["--data-dir", args.data_dir] if args.data_dir else []
    where += ["--no-download"] * args.no_download
    jobs = plan(table, args.seeds, results, overrides, sets, where)
    if overrides and all(job.records for job in jobs):
        raise UserError(f"--override: {table['path']} trains nothing")
    needed = {job.network for job in jobs if job.row in rows}
    chosen = [job for job in jobs if job.row in rows or job.home in needed]
    for job in chosen:
        try:
            script = importlib.import_module(Path(job.words[0]).stem)
            utils.parse_args(script.parser(), job.words[1:])
        except UserError as error:
            raise UserError(f"{table['path']}, {job.title}: {error}") from None
    missing = [job for job in chosen if args.slurm and state(job) != "done"]
    if args.dry_run:
        return submit(missing, dry_run=True) if args.slurm else print(listing(chosen), end="")
    home = results / (table["name"] + f"-override-{_digest(overrides)}" * bool(overrides))
    storage.check_outputs(
        {"--results-dir": [home / name for name in ("table.md", "table.csv", "index.html")],
         "--readme": args.readme},
        {"TABLE": table["path"], "--config": args.config, "--sets": [*given.values()]})
    if args.slurm:
        storage.make_output_folder(results, "--results-dir")
        with filelock.FileLock(results / LOCK):  # or two commands would submit a training twice
            return submit(missing)

    failed = {} if args.report else run_all(chosen)
    lines = tables.lines(table, measure(jobs))
    done = [job for job in jobs if state(job) == "done"]
    remarks = [f"Left out: {facts['label']}, {facts['needs']} (--sets {ood}=PATH)."
               for ood, facts in table["sets"].items() if "needs" in facts and ood not in sets]
    remarks += [f"Failed: {job.title}: {failed[job.home]}." for job in jobs if job.home in failed]
    if overrides:
        remarks.append(f"Not the table's recipe: {shlex.join(_words(overrides))}.")
    if (commits := {commit_of(job) for job in done}) - {commit()}:
        remarks.append(f"Commits: {', '.join(sorted(commits))}; the present one is {commit()}.")
    write_report(table, jobs, lines, remarks, home)
    if args.readme:
        above, _, below = split_readme(args.readme, table["name"])
        _write(args.readme, above + tables.markdown(table, lines) + below)
    width = shutil.get_terminal_size((100, 24)).columns
    print("", textwrap.fill(table["about"], width), "", tables.text(table, lines, width), *remarks,
          "", f"page      {home / 'index.html'} (and table.md, table.csv)", sep="\n")
    print(*(f"records   {job.home} (and figures)" if job.records else
            f"network   {job.home / NETWORK}" for job in done), sep="\n")
    if failed:
        raise RunError(f"{len(failed)} of {len(chosen)} jobs failed: "
                       f"{', '.join(job.title for job in chosen if job.home in failed)}")


if __name__ == "__main__":
    program.run(main)
