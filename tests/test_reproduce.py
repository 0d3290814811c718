"""Tables from their files to the page: what is run, once and in order, and what is made of it.

One test runs the real programs from the beginning to the end. The others run stand-ins, which leave
behind what the real ones do, while the real parsers check what they are given.
"""

import base64
import csv
import json
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import filelock
import numpy as np
import pytest
import yaml
from conftest import ROOT

import eval_ssd
import eval_ssdk
import reproduce
import train
import utils
from detection import Choice
from report import tables

PARSERS = {"train.py": train.parser, "eval_ssd.py": eval_ssd.parser,
           "eval_ssdk.py": eval_ssdk.parser}
STATES = re.compile(r"^# ((?:train|evaluate) .+): (to do|unfinished|done)", re.M)

# What train.py and the evaluations leave behind. --lr 1000 fails. A training with --epochs 7 has a
# signal sent to its parent once and ends as a stopped one when that is handed on to it.
START = """
import json, os, signal, sys, time
from pathlib import Path
words = sys.argv[1:]
value = lambda flag: words[words.index(flag) + 1]
with open(Path(__file__).with_name("calls"), "a") as file:
    print(*sys.argv, file=file)
home = Path(value("--results-dir"))
"""
TRAIN = START + """
run = home / value("--exp-name") / "1--run"
if value("--lr") == "1000" if "--lr" in words else False:
    sys.exit("train.py: error: loss is nan")
first = not run.is_dir()
(run / "checkpoint").mkdir(parents=True, exist_ok=True)
if first:
    (run.parent / "latest_exp").symlink_to(run.name)
log = run / "log.jsonl"
record = dict(event="epoch", epoch=0, loss=1.5, monitor=80.0, monitor_name="accuracy", lr=0.1)
with open(log, "a") as file:
    print(json.dumps(record), file=file)
if "--epochs" in words and value("--epochs") == "7" and first:
    number = int(os.environ["SIGNAL"])
    signal.signal(number, lambda *_: sys.exit(75))
    os.kill(os.getppid(), number)
    time.sleep(60)
    sys.exit("no signal came")
(run / "checkpoint/checkpoint.pth.tar").write_text(value("--seed"))
with open(log, "a") as file:
    print(json.dumps(dict(event="end")), file=file)
"""
EVALUATE = START + """
seed = int(Path(value("--ckpt")).read_text()) if "--ckpt" in words else 0
base = home / (value("--exp-name") + Path(__file__).stem.removeprefix("eval"))
many = lambda flag: [w for w in words[words.index(flag) + 1:][:99]]
ood = words[words.index("--ood") + 1:]
ood = ood[:next(i for i, word in enumerate(ood) if word.startswith("--"))]
clusters = [1, 2] if "ssdk" not in __file__ and "--clusters" in words else [1]
choices = [dict(clusters=m) for m in clusters]
if "--score" in words:
    choices += [dict(score="knn", neighbours=5), dict(score="crossval")]
with open(f"{base}.jsonl", "a") as file:
    for i, name in enumerate(ood):
        for m, choice in enumerate(choices, 1):
            auroc = 0.5 + 0.1 * i + 0.03 * m + 0.01 * seed + 0.001 * int(value("--seed"))
            record = dict(ood=name, auroc=auroc, fpr95=1 - auroc, seconds=7 + i, **choice)
            print(json.dumps(record), file=file)
for kind in ("images_a", "histograms", "precision_recall"):
    Path(f"{base}_{kind}.png").write_bytes(f"{base}_{kind}".encode())
"""


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Stand-ins in the place of train.py and the evaluations, in a folder that is returned."""
    folder = tmp_path / "programs"
    folder.mkdir()
    (folder / "train.py").write_text(TRAIN)
    for name in ("eval_ssd.py", "eval_ssdk.py"):
        (folder / name).write_text(EVALUATE)
    (folder / "calls").touch()
    monkeypatch.setattr(reproduce, "HERE", folder)
    return folder


@pytest.fixture
def calls(programs):
    """Function () -> [name of the script of each command that was run]."""
    def names():
        return [Path(line.split()[0]).name
                for line in (programs / "calls").read_text().splitlines()]

    return names


@pytest.fixture
def make_table(tmp_path, other_npz):
    """Function (recipe={...}, **changes) -> path of a table of two rows on one network."""

    def make(recipe=(), **changes):
        settings = {"training-mode": "SimCLR", "dataset": "digits", "arch": "resnet18",
                    "size": 8, **dict(recipe)}
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
        network = {"config": str(tmp_path / "tiny.yaml")}
        content = {
            "title": "A <tiny> table", "about": "Ours.", "metrics": ["auroc", "fpr95"],
            "sets": {"mine": {"label": "My images", "needs": "a folder of yours"}},
            "rows": {
                "ssd": {"label": "SSD", "train": network,
                        "eval": {"method": "ssd", "clusters": [1, 2], "ood": ["svhn", "mine"]},
                        "published": [{"ood": "svhn", "auroc": 0.5, "source": "a | paper"}]},
                "ssdk": {"label": "SSDk", "train": network, "draws": 2,
                         "eval": {"method": "ssdk", "k": 2, "copies": 2, "ood": ["svhn"]}},
            },
            "means": [{"label": "SSD, m = 1", "outliers": "both", "rows": ["ssd"],
                       "ood": ["svhn", "mine"]}],
        }
        path = tmp_path / "tiny_table.yaml"
        path.write_text(yaml.safe_dump({**content, **changes}, sort_keys=False))
        return path

    return make


@pytest.fixture
def run(call, make_table, tmp_path):
    """Function (*arguments, table=None, seeds=1) -> reproduce.py, as a command, in tmp_path."""

    def reproduced(*arguments, table=None, seeds=1):
        return call("reproduce.py", table or make_table(), "--seeds", seeds, "--results-dir", "out",
                    *arguments, cwd=tmp_path)

    return reproduced


@pytest.fixture
def done(programs, run, tmp_path):
    """The folder of a table that was run with one seed, and without the user's set."""
    finished = run()
    assert finished.returncode == 0, finished.stderr
    return tmp_path / "out/tiny_table"


def states(text):
    return dict(STATES.findall(text))


def refused(finished, status, *words):
    lines = finished.stderr.splitlines()
    assert finished.returncode == status, finished.stderr
    assert len(lines) == 1, finished.stderr
    for word in words:
        assert str(word) in lines[0]


def table_rows(folder):
    with (folder / "table.csv").open() as file:
        return list(csv.DictReader(file))


# --- from nothing to the page ---------------------------------------------------------------------


@pytest.mark.slow
def test_the_programs_themselves_make_a_table(command, make_table, tiny_npz, other_npz, tmp_path):
    recipe = {"dataset": f"npz:{tiny_npz}", "epochs": 1, "batch-size": 16, "lr": 0.05,
              "normalize": True}
    table = make_table(recipe)
    content = yaml.safe_load(table.read_text().replace("svhn", f"npz:{other_npz}"))
    content["rows"]["ssdk"]["draws"] = 1
    table.write_text(yaml.safe_dump(content, sort_keys=False))
    finished = command("reproduce.py", table, "--seeds", 1, "--results-dir", "out", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    rows = table_rows(tmp_path / "out/tiny_table")
    (path,) = tmp_path.glob("out/tiny_table/ssd-*/ssd_ssd.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert float(rows[0]["mean"]) == records[0]["auroc"]
    assert float(rows[1]["mean"]) == records[0]["fpr95"]
    assert all(r["mean"] for r in rows if r["row"] == "ssdk")
    page = (tmp_path / "out/tiny_table/index.html").read_text()
    for name in ("ssd_ssd_roc", "ssdk_ssdk_histograms", "ssd_ssd_precision_recall"):
        assert f'alt="{name}"' in page


def test_rows_that_share_a_network_train_it_once_and_each_draw_is_evaluated(done, calls, run):
    assert calls() == ["train.py", "eval_ssd.py", "eval_ssdk.py", "eval_ssdk.py"]
    assert len(list((done.parent / "networks").iterdir())) == 1
    finished = run()  # what is done is not run again
    assert finished.returncode == 0, finished.stderr
    assert len(calls()) == 4


def test_the_csv_holds_the_records_numbers_beside_the_published(done):
    rows = table_rows(done)
    assert [(r["row"], r["outliers"], r["clusters"], r["metric"]) for r in rows[:4]] == [
        ("ssd", "SVHN", "1", "auroc"), ("ssd", "SVHN", "1", "fpr95"),
        ("ssd", "My images", "1", "auroc"), ("ssd", "My images", "1", "fpr95")]
    (path,) = done.glob("ssd-*/ssd_ssd.jsonl")
    record = json.loads(path.read_text().splitlines()[0])
    assert float(rows[0]["mean"]) == record["auroc"]
    assert float(rows[0]["difference"]) == record["auroc"] - 0.5
    assert (rows[0]["n"], rows[0]["deviation"], rows[0]["source"]) == ("1", "", "a | paper")
    assert (rows[2]["mean"], rows[2]["n"], rows[2]["published"]) == ("", "0", "")
    drawn = [r for r in rows if r["row"] == "ssdk"]
    assert [(r["n"], r["draws"]) for r in drawn] == [("1", "2")] * 2
    assert all(float(r["draws_deviation"]) > 0 for r in drawn)
    assert rows[-1]["mean"] == ""  # a mean over a set that is left out


def test_the_page_is_one_file_with_every_figure_in_it(done):
    text = (done / "index.html").read_text()
    assert "A &lt;tiny&gt; table" in text
    assert '<th colspan="2">SVHN</th>' in text
    assert re.search(r'<tr class="published"><td>published \[1\]</td><td>0.5</td>', text)
    sources = re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', text)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"@import|url\(|<script|<link", text)
    shown = {base64.b64decode(source.partition(",")[2]) for source in sources}
    assert shown == {path.read_bytes() for path in done.rglob("*.png")}
    names = re.findall(r'<img alt="([^"]*)"', text)
    assert sum(name.endswith("_precision_recall") for name in names) == 3  # of three evaluations
    assert names[:3] == ["ssd_ssd_histograms", "ssd_ssd_precision_recall", "ssd_ssd_images_a"]
    assert names[-1].startswith("tiny-")  # the curves of the training
    folded = re.findall(r"<details>.*?</details>", text, re.DOTALL)
    assert [re.findall(r'alt="([^"]*)"', part) for part in folded] == [
        ["ssd_ssd_images_a"], *[["ssdk_ssdk_images_a"]] * 2]
    assert re.search(r"# evaluate ssd, seed 1: done, commit \S+, 7 s\n", text)
    assert "color-scheme: light dark" in text
    assert "eval_ssdk.py --ckpt" in text


def test_a_set_that_the_user_names_later_adds_an_evaluation_and_repeats_none(
    done, calls, run, other_npz, tmp_path
):
    assert "Left out: My images, a folder of yours (--sets mine=PATH)." in (
        done / "table.md").read_text()
    shutil.copy(other_npz, tmp_path / "mine.npz")
    finished = run("--sets", "mine=mine.npz", "--only", "ssd")
    assert finished.returncode == 0, finished.stderr
    assert calls()[4:] == ["eval_ssd.py"]
    rows = table_rows(done)
    assert all(r["mean"] for r in rows)  # --only chooses what is run, not what is shown
    assert float(rows[-2]["mean"]) == pytest.approx(float(rows[0]["mean"]))  # the stand-in's
    assert "Left out" not in (done / "table.md").read_text()


# --- commands and states --------------------------------------------------------------------------


def test_a_dry_run_prints_commands_that_a_shell_runs_and_writes_nothing(programs, run, tmp_path):
    text = run("--dry-run").stdout
    assert list(states(text).values()) == ["to do"] * 4
    assert not (tmp_path / "out").exists()
    typed = shlex.split(text.splitlines()[1])
    assert typed[0] == "python"
    subprocess.run([sys.executable, *typed[1:]], cwd=tmp_path, check=True)
    text = run("--dry-run").stdout
    assert list(states(text).values()) == ["done", "to do", "to do", "to do"]
    assert text.count("\npython ") == 3  # what is done is a comment


def test_what_is_done_is_a_comment_to_its_last_line(done, run, tmp_path):
    for path in (tmp_path / "out").rglob("identity.json"):
        path.write_text('{"commit": "1\\ntouch trace"}')
    text = run("--dry-run", "--data-dir", "a\ntouch trace").stdout
    assert "touch trace" in text
    assert all(line.startswith("#") for line in text.splitlines())


def test_text_of_a_table_stays_in_its_line_and_is_text(run, make_table, programs, tmp_path):
    needs, label = "a folder\ntouch trace\n", "<b>Mine</b>\n| all"
    table = make_table(sets={"mine": {"label": label, "needs": needs}}, about="On\nlines.\n")
    assert "touch trace" not in run("--dry-run", table=table).stdout
    assert run(table=table).returncode == 0
    text = (tmp_path / "out/tiny_table/table.md").read_text()
    assert "\nLeft out: &lt;b&gt;Mine&lt;/b&gt; | all, a folder touch trace (--sets" in text


@pytest.mark.parametrize("text", ["a\x1b[31m", "\u202ea", "a\0"])
def test_text_of_a_table_that_cannot_be_printed_is_refused(text, run, make_table, programs):
    refused(run(table=make_table(title=text)), 2, "title: expected text")


def test_a_line_that_is_no_result_of_a_table_breaks_nothing(done, run, tmp_path):
    before = table_rows(done)
    for path in (tmp_path / "out").rglob("*_ssd.jsonl"):
        with path.open("a") as file:
            file.write('{"ood": ["svhn"], "clusters": 1}\n{"ood": "svhn", "clusters": {}}\n'
                       '{"ood": "svhn", "clusters": 1, "auroc": "x"}\n[1]\n' + "[" * 100_000)
    finished = run("--report")
    assert (finished.returncode, finished.stderr) == (0, "")
    assert table_rows(done) == before
    with next((tmp_path / "out").rglob("*_ssd.jsonl")).open("a") as file:
        file.write('\n{"ood": "svhn", "clusters": 1}\n')  # a result without metrics: none
    assert run("--report").returncode == 0


@pytest.mark.parametrize("target", ["tiny_table.yaml", "out/tiny_table/table.md"])
def test_a_readme_that_is_read_or_written_as_something_else_too_is_refused(
    target, run, make_table, programs, tmp_path
):
    path = tmp_path / target
    table = make_table()
    path.parent.mkdir(parents=True, exist_ok=True)
    marked = "# <!-- table tiny_table -->\n# <!-- end of table tiny_table -->\n"
    path.write_text((path.read_text() if path.exists() else "") + marked)
    before = path.read_bytes()
    refused(run("--readme", path, table=table), 2, "--readme and")
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", [*tables.names(), *map(str, ROOT.glob("benchmarks/*.yaml"))])
def test_the_commands_of_every_shipped_table_are_taken_by_their_programs(name):
    table = tables.read(name)
    sets = {key: (f"folder:{key}", "") for key in table["sets"]}
    jobs = reproduce.plan(table, 2, Path("r"), {}, sets, ["--no-download"])
    assert {job.row for job in jobs if job.records} == table["rows"].keys()
    for job in jobs:
        args = utils.parse_args(PARSERS[Path(job.words[0]).name](), job.words[1:])
        assert args.no_download
        assert args.seed in range(1, 6)
    order = [job.home for job in jobs]
    assert all(order.index(job.network) < order.index(job.home) for job in jobs if job.network)


def test_the_published_values_are_those_with_a_source():
    found = {}
    for name in tables.names():
        for row, _, _, (_, m), [(_, ood), *_], published in tables.read(name)["entries"]:
            found |= {(name, row, ood, m, metric): entry[metric] for entry in published
                      for metric in tables.METRICS if metric in entry}
    readme = {"cifar100": (0.5078, 0.90632, 0.89196), "svhn": (0.02067, 0.99624, 0.99856),
              "texture": (0.14645, 0.9761, 0.95566), "blobs": (0.0467, 0.98791, 0.98431)}
    classes = {"plane": 0.827, "car": 0.985, "bird": 0.842, "cat": 0.845, "deer": 0.848,
               "dog": 0.909, "frog": 0.917, "horse": 0.952, "ship": 0.929, "truck": 0.944}
    expected = {("readme", "simclr", ood, 1, metric): value for ood, values in readme.items()
                for metric, value in zip(("fpr95", "auroc", "aupr"), values, strict=True)}
    expected |= {("scores", *key[1:]): value for key, value in expected.items()}
    expected |= {("clusters", "simclr", ood, 1, "auroc"): v[1] for ood, v in readme.items()}
    expected |= {("one_class", name, "rest", 1, "auroc"): v for name, v in classes.items()}
    expected |= {("one_class", "", "rest", 1, "auroc"): 0.9,
                 ("ssd_plus", "supcon", "cifar100", 1, "fpr95"): 0.385,
                 ("ssd_plus", "supcon", "cifar100", 1, "auroc"): 0.934,
                 ("fix", "simclr", "lsun_fix", 1, "auroc"): 0.965}
    assert found == expected
    assert abs(sum(classes.values()) / 10 - 0.9) < 5e-4


def test_the_ten_classes_are_ten_networks_and_the_readme_network_serves_four_tables():
    def networks(name):
        jobs = reproduce.plan(tables.read(name), 1, Path("r"), {}, {}, [])
        return {job.home.name for job in jobs if job.records is None}

    assert len(networks("one_class")) == 10
    assert networks("readme") == networks("clusters") == networks("few_shot") == networks("scores")
    assert networks("demo") < networks("digits")
    assert networks("fix") == set()  # nothing to evaluate without the user's sets
    assert networks("pretrained") == networks("pretrained_one_class") == set()


def test_an_encoder_that_others_trained_is_evaluated_once_whatever_the_seeds(
    programs, calls, run, make_table, tmp_path
):
    flags = {"method": "ssd", "size": 96, "ood": ["svhn"]}
    row = {"label": "Theirs", "encoder": "efficientnet-lite0", "outliers": "houses", "eval": flags}
    table = make_table(means=[], rows={"theirs": row, "drawn": row | {"draws": 2}})
    refused(run("--override", "epochs=1", table=table), 2, "--override", table, "trains nothing")
    finished = run(table=table, seeds=3)
    assert finished.returncode == 0, finished.stderr
    assert calls() == ["eval_ssd.py"] * 3
    assert "--ckpt" not in (programs / "calls").read_text()
    assert "--encoder efficientnet-lite0" in (programs / "calls").read_text()
    assert not (tmp_path / "out/networks").exists()
    lines = table_rows(tmp_path / "out/tiny_table")
    assert {(x["outliers"], x["n"], x["draws"]) for x in lines} == {("houses", "1", "1"),
                                                                     ("houses", "1", "2")}
    assert "3 networks" not in finished.stdout


def test_another_recipe_or_override_goes_to_another_place(done, calls, run, make_table):
    old = {path: path.read_bytes() for path in done.parent.rglob("*.jsonl")}
    pages = {path: path.read_bytes() for path in done.iterdir() if path.is_file()}
    assert set(states(run("--dry-run").stdout).values()) == {"done"}
    make_table({"size": 9, "exp-name": "other"})
    assert set(states(run("--dry-run", table=done.parents[1] / "tiny_table.yaml").stdout
                      ).values()) == {"to do"}
    finished = run("--override", "batch_size=9", "cycle_momentum=false", "--only", "ssd")
    assert finished.returncode == 0, finished.stderr
    (other,) = done.parent.glob("tiny_table-override-*")  # with a page of its own
    assert "--batch-size 9 --no-cycle-momentum" in (other / "table.md").read_text()
    assert "--batch-size 9" in (other / "index.html").read_text()
    assert {path: path.read_bytes() for path in pages} == pages
    assert calls()[4:] == ["train.py", "eval_ssd.py"]
    assert {path: path.read_bytes() for path in old} == old
    make_table({"exp-name": "other", "print-freq": 7})  # which decide no number
    finished = run("--dry-run", table=done.parents[1] / "tiny_table.yaml")
    assert set(states(finished.stdout).values()) == {"done"}


def test_the_commit_is_kept_and_results_of_another_one_count_but_are_said(
    programs, run, tmp_path, monkeypatch
):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *words], check=True,
                       cwd=programs, capture_output=True)

    assert reproduce.commit() == "unknown"
    git("init")
    assert reproduce.commit() == "unknown"  # the project is not in this repository
    (programs / "reproduce.py").touch()
    (programs / "README.md").touch()
    git("add", "-A")
    git("commit", "-m", "first")
    first = reproduce.commit()
    assert re.fullmatch("[0-9a-f]{7,}", first)
    run()
    (identity,) = tmp_path.glob("out/networks/*/identity.json")
    assert json.loads(identity.read_text())["commit"] == first
    assert "Commits" not in (tmp_path / "out/tiny_table/table.md").read_text()
    (programs / "README.md").write_text("more")
    assert reproduce.commit() == first
    (programs / "reproduce.py").write_text("pass")
    assert reproduce.commit() == f"{first}+changes"
    finished = run()
    assert "$ python" not in finished.stdout
    said = f"Commits: {first}; the present one is {first}+changes."
    assert said in finished.stdout
    for name in ("table.md", "index.html"):
        assert said in (tmp_path / "out/tiny_table" / name).read_text()
    assert f"train tiny, seed 1: done, commit {first}" in run("--dry-run").stdout


def test_a_row_that_fails_is_said_and_the_others_go_on(programs, run, make_table, tmp_path):
    content = yaml.safe_load(make_table().read_text())
    bad = {**content["rows"]["ssd"], "published": []}
    bad["train"] = {**bad["train"], "lr": 1000}
    finished = run(table=make_table(rows={"bad": bad, **content["rows"]}, means=[]))
    assert finished.returncode == 1
    assert finished.stderr.splitlines()[-1] == (
        "reproduce.py: error: 2 of 6 jobs failed: train tiny-lr1000, seed 1, evaluate bad, seed 1")
    text = (tmp_path / "out/tiny_table/table.md").read_text()
    assert "Failed: train tiny-lr1000, seed 1: exit status 1." in text
    assert "Failed: evaluate bad, seed 1: its training failed." in text
    assert "| SSD, m = 1 | 0.541" in text


# --- stopped, continued, and at the same time -----------------------------------------------------


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_is_handed_on_and_the_same_command_continues(
    programs, calls, run, make_table, monkeypatch, name
):
    table = make_table({})
    content = yaml.safe_load(table.read_text())
    for row in content["rows"].values():
        row["train"]["epochs"] = 7
    table.write_text(yaml.safe_dump(content, sort_keys=False))
    monkeypatch.setenv("SIGNAL", str(int(signal.Signals[name])))
    finished = run(table=table)
    assert finished.returncode == 75, finished.stderr
    assert finished.stderr.splitlines()[-1] == (
        f"reproduce.py: note: stopped by {name}; the same command continues")
    assert calls() == ["train.py"]
    assert list(states(run("--dry-run", table=table).stdout).values()) == [
        "unfinished", "to do", "to do", "to do"]
    finished = run(table=table)
    assert finished.returncode == 0, finished.stderr
    assert calls() == ["train.py"] * 2 + ["eval_ssd.py", "eval_ssdk.py", "eval_ssdk.py"]


@pytest.mark.parametrize("place", [reproduce.LOCK, "latest_exp/.lock"])
def test_a_training_that_another_process_runs_is_waited_for(programs, calls, run, tmp_path, place):
    """The lock of another reproduce.py, or that of a training which outlived its own."""
    name = re.search(r"--exp-name (\S+)", run("--dry-run").stdout)[1]
    run_folder = tmp_path / "out/networks" / name / "latest_exp"
    (run_folder / "checkpoint").mkdir(parents=True)
    (run_folder / "checkpoint/checkpoint.pth.tar").write_text("1")
    lock = filelock.FileLock(run_folder.parent / place, thread_local=False)
    lock.acquire()

    def finish():
        (run_folder / "log.jsonl").write_text('{"event": "end"}\n')
        lock.release()

    timer = threading.Timer(2.5, finish)
    timer.start()
    finished = run("--only", "ssd")
    timer.join()
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.count("train tiny, seed 1: waits for the process that runs it") == 1
    assert calls() == ["eval_ssd.py"]


@pytest.fixture
def slurm(programs, tmp_path, monkeypatch):
    """A `sbatch` that keeps its arguments, and a `squeue` that prints the file queue, in PATH."""
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "sbatch").write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/submitted\nwc -l < {tmp_path}/submitted\n')
    (fake / "squeue").write_text(f"#!/bin/sh\ncat {tmp_path}/queue\n")
    for name in ("sbatch", "squeue"):
        (fake / name).chmod(0o755)
    (tmp_path / "queue").write_text("99 somebody's  other job\n")
    monkeypatch.setenv("PATH", f"{fake}:/usr/bin:/bin")
    monkeypatch.setattr(reproduce, "HERE", tmp_path)
    return tmp_path


def test_slurm_gets_evaluations_behind_their_training_and_nothing_twice(slurm, run):
    finished = run("--slurm", seeds=2)
    assert finished.returncode == 0, finished.stderr
    lines = (slurm / "submitted").read_text().splitlines()
    assert len(lines) == 8  # two networks, and three evaluations of each
    trained = [re.fullmatch(r"--parsable --job-name=(tiny-\w{8}-seed[12]) slurm/train.sbatch "
                            r"--config tiny.yaml --seed [12] --exp-name \1 --results-dir "
                            r"out/networks", line) for line in lines]
    numbers = {match[1]: i + 1 for i, match in enumerate(trained) if match}
    assert len(numbers) == 2
    for line in lines:
        if "eval.sbatch" in line:
            words = re.fullmatch(r"--parsable --job-name=(ssdk?-\S+) --dependency=afterok:(\d) "
                                 r"--kill-on-invalid-dep=yes slurm/eval.sbatch eval_ssdk?.py "
                                 r"--ckpt out/networks/([^/]+)/.*--results-dir out/\S+/\1", line)
            assert int(words[2]) == numbers[words[3]]
    assert set(states(run("--dry-run", seeds=2).stdout).values()) == {"unfinished"}

    names = re.findall(r"--job-name=(\S+)", "\n".join(lines))
    with (slurm / "queue").open("a") as file:
        file.writelines(f"{i + 1} {name}\n" for i, name in enumerate(names[:-1]))
    finished = run("--slurm", seeds=2)
    assert finished.stdout.count("in the queue as") == 7
    (again,) = (slurm / "submitted").read_text().splitlines()[8:]
    assert again == lines[-1]


def test_a_dry_run_of_slurm_shows_what_would_be_submitted(slurm, run, monkeypatch):
    shown = run("--slurm", "--dry-run", seeds=2)
    assert shown.returncode == 0, shown.stderr
    monkeypatch.setenv("PATH", str(slurm))  # a machine without Slurm shows it too
    assert run("--slurm", "--dry-run", seeds=2).stdout == shown.stdout
    assert not (slurm / "submitted").exists()
    assert not (slurm / "out").exists()
    monkeypatch.setenv("PATH", f"{slurm / 'fake'}:/usr/bin:/bin")
    submitted = run("--slurm", seeds=2).stdout
    names = re.findall(r"--job-name=(\S+)", submitted)
    for number, name in enumerate(names, 1):
        submitted = submitted.replace(f"afterok:{number} ", f"afterok:NUMBER_OF_{name} ")
    assert submitted == shown.stdout
    assert "slurm/train.sbatch --config tiny.yaml" in submitted


def test_slurm_without_sbatch_or_with_one_that_refuses_says_so(slurm, run, monkeypatch):
    (slurm / "fake/sbatch").write_text("#!/bin/sh\necho 'no such partition' >&2\nexit 1\n")
    refused(run("--slurm"), 1, "sbatch did not take train tiny, seed 1")
    monkeypatch.setenv("PATH", str(slurm))
    refused(run("--slurm"), 2, "--slurm needs sbatch", slurm)
    assert not (slurm / "out/networks").exists()


# --- numbers and how they are laid out ------------------------------------------------------------


def pick(lines, **wanted):
    return next(x for x in lines if all(x[key] == value for key, value in wanted.items()))


def test_a_line_is_the_mean_over_networks_of_the_mean_over_draws(make_table):
    table = tables.read(make_table())
    values = {1: [0.8, 0.9], 2: [0.6, 0.6], 3: [0.1]}  # the third has a draw to come
    runs = {seed: [{"auroc": v, "fpr95": 1 - v} for v in drawn] for seed, drawn in values.items()}
    lines = tables.lines(table, {("ssdk", "svhn", Choice("ssd", 1)): runs})
    line = pick(lines, row="ssdk", metric="auroc")
    assert line["mean"] == pytest.approx(0.725)
    assert line["deviation"] == pytest.approx(0.25 / 2**0.5)  # of a sample of two
    assert line["draws_deviation"] == pytest.approx(0.1 / 2**0.5 / 2)  # mean over two networks
    assert (line["n"], line["draws"]) == (2, 2)
    assert "0.7250 ± 0.1768 (draws ± 0.0354)" in tables.markdown(table, lines)


def test_a_mean_over_sets_is_taken_per_network_and_only_where_all_are_there(make_table):
    table = tables.read(make_table())

    def runs(*values):
        return {i: [{"auroc": v, "fpr95": v}] for i, v in enumerate(values) if v is not None}

    one = Choice("ssd", 1)
    measured = {("ssd", "svhn", one): runs(0.5, 0.7, 0.9),
                ("ssd", "mine", one): runs(0.1, None, 0.3)}
    line = pick(tables.lines(table, measured), row="", metric="auroc")
    assert (line["label"], line["outliers"], line["n"]) == ("SSD, m = 1", "both", 2)
    assert line["mean"] == pytest.approx(0.45)
    assert line["deviation"] == pytest.approx(0.3 / 2**0.5)


def test_a_row_of_several_scores_has_a_line_for_each(programs, make_table, run, tmp_path):
    content = yaml.safe_load(make_table().read_text())
    content["rows"] = {"net": content["rows"]["ssd"] | {"published": [
        {"ood": "svhn", "score": "knn", "auroc": 0.5, "source": "a paper"}]}}
    content["rows"]["net"]["eval"] |= {"score": ["ssd", "knn", "crossval"], "neighbours": 5}
    table = make_table(**content | {"means": []})
    finished = run(table=table)
    assert finished.returncode == 0, finished.stderr
    assert "--score ssd knn crossval" in finished.stdout
    rows = [r for r in table_rows(tmp_path / "out/tiny_table") if r["mean"]]
    shown = [(r["label"], r["score"], r["clusters"], r["neighbours"], r["published"])
             for r in rows if r["metric"] == "auroc"]
    assert shown == [("SSD, ssd, m = 1", "ssd", "1", "", ""),
                     ("SSD, ssd, m = 2", "ssd", "2", "", ""),
                     ("SSD, knn, k = 5", "knn", "", "5", "0.5"),
                     ("SSD, crossval", "crossval", "", "", "")]
    assert len({r["mean"] for r in rows}) == len(rows)


def test_openoods_layout_has_its_columns_in_percent_and_its_deviation(make_table):
    content = yaml.safe_load(make_table(layout="openood", metrics=[
        "fpr95_ood_positive", "auroc", "aupr_in", "aupr"]).read_text())
    content["rows"]["ssd"]["eval"]["clusters"] = 1
    content["means"][0] |= {"label": "SSD", "outliers": "farood", "ood": ["svhn"]}
    table = tables.read(make_table(**content))
    runs = {seed: [{"auroc": x, "fpr95_ood_positive": 1 - x, "aupr": 0.5, "aupr_in": 0.25}]
            for seed, x in enumerate((0.8, 0.9, 0.94), 1)}
    found = tables.lines(table, {("ssd", "svhn", Choice("ssd", 1)): runs})
    spread = 100 * np.std((0.8, 0.9, 0.94))
    cells = f"12.00 ± {spread:.2f} | 88.00 ± {spread:.2f} | 25.00 ± 0.00 | 50.00 ± 0.00 |"
    assert tables.markdown(table, found).splitlines()[:5] == [
        "| network | FPR@95 | AUROC | AUPR_IN | AUPR_OUT |", "| --- | --- | --- | --- | --- |",
        f"| SSD: SVHN | {cells}", "| *published [1]* |  | *50* |  |  |",
        f"| SSD: farood | {cells}"]


@pytest.fixture
def laid_out(make_table):
    """A table and its lines: of one set both metrics, of the other only one that is published."""
    content = yaml.safe_load(make_table().read_text())
    content["rows"]["ssd"]["published"].append(
        {"ood": "mine", "clusters": 2, "fpr95": 0.25, "source": "a book"})
    content["means"][0] |= {"label": "mean of all", "outliers": "SVHN", "ood": ["svhn"]}
    table = tables.read(make_table(**content))
    runs = {1: [{"auroc": 0.9, "fpr95": 0.4}], 2: [{"auroc": 0.8, "fpr95": 0.4}]}
    return table, tables.lines(table, {("ssd", "svhn", Choice("ssd", 1)): runs})


def test_markdown_has_a_column_for_each_metric_of_a_set_and_published_below_ours(laid_out):
    assert tables.markdown(*laid_out).splitlines() == [
        "| network | SVHN<br>AUROC ↑ | SVHN<br>FPR95 ↓ | My images<br>FPR95 ↓ |",
        "| --- | --- | --- | --- |",
        "| SSD, m = 1 | 0.8500 ± 0.0707 | 0.4000 ± 0.0000 |  |",
        "| *published [1]* | *0.5* |  |  |",
        "| SSD, m = 2 |  |  | – |",
        "| *published [2]* |  |  | *0.25* |",
        "| mean of all | 0.8500 ± 0.0707 | 0.4000 ± 0.0000 |  |",
        "",
        "Ours: mean ± standard deviation over 2 networks. [1] a | paper. [2] a book.",
    ]


def test_the_terminal_gets_columns_that_fit_and_the_others_below(laid_out):
    wide, narrow = (tables.text(*laid_out, width) for width in (100, 50))
    assert wide.splitlines()[:4] == [
        "                 SVHN             SVHN             My images",
        "                 AUROC ↑          FPR95 ↓          FPR95 ↓",
        "SSD, m = 1       0.8500 ± 0.0707  0.4000 ± 0.0000",
        "  published [1]  0.5",
    ]
    assert max(map(len, wide.splitlines()[:7])) <= 100
    assert max(len(line) for line in narrow.splitlines() if "networks" not in line) <= 50
    assert narrow.count("SSD, m = 1") == 2
    assert set(re.findall(r"0\.\d+", narrow)) == set(re.findall(r"0\.\d+", wide))


def test_the_readme_gets_the_table_between_its_markers_and_nothing_else(done, run, tmp_path):
    begin, end = "<!-- table tiny_table -->", "<!-- end of table tiny_table -->"
    (tmp_path / "R.md").write_text(f"# Top\n\n{begin}\nold\n{end}\n\nBottom\n")
    finished = run("--report", "--readme", "R.md")
    assert finished.returncode == 0, finished.stderr
    text = (tmp_path / "R.md").read_text()
    assert text.startswith(f"# Top\n\n{begin}\n| network |")
    assert text.endswith(f".\n{end}\n\nBottom\n")
    assert "old" not in text
    assert "My images" not in text  # neither ours nor published
    run("--report", "--readme", "R.md")
    assert (tmp_path / "R.md").read_text() == text


@pytest.mark.parametrize(("page", "name"), [
    (page.relative_to(ROOT), name) for page in (ROOT / "README.md", *ROOT.glob("docs/*.md"))
    for name in re.findall(r"<!-- table (\w+) -->", page.read_text(encoding="utf-8"))])
def test_the_pages_published_numbers_are_the_tables(page, name):
    _, shown, _ = reproduce.split_readme(ROOT / page, name)
    table = tables.read(name)
    expected = tables.markdown(table, tables.lines(table, {}))
    assert re.findall(r"\*([\d.]+)\*", shown) == re.findall(r"\*([\d.]+)\*", expected)
    assert [s for s in re.findall(r"\[\d\] [^*.]+\.", expected) if s not in shown] == []


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (["row"], {}, ["unknown 'row'", "rows"]),
        (["rows", "ssd", "training"], {}, ["rows: ssd", "unknown 'training'", "train"]),
        (["rows", "ssd", "encoder"], "efficientnet-lite0", ["rows: ssd", "train or encoder"]),
        (["rows", "more"], {"label": "x", "eval": {"method": "ssd", "ood": ["svhn"]}},
         ["rows: more", "either train or encoder"]),
        (["rows", "ssd", "train", "config"], "configs/gone.yaml",
         ["rows: ssd: train: config", "path of a recipe", "configs/gone.yaml"]),
        (["rows", "ssd", "train", "lr"], {"a": 1}, ["rows: ssd: train: lr", "a number"]),
        (["rows", "ssd", "published", 0, "auroc"], "high", ["rows: ssd", "auroc", "'high'"]),
        (["rows", "ssd", "published", 0, "auroc"], 96.5, ["96.5", "from 0 to 1"]),
        (["rows", "ssd", "published", 0, "source"], "",
         ["rows: ssd", "source is missing or empty"]),
        (["rows", "ssd", "published", 0], {"ood": "mine", "auroc": 0.5},
         ["rows: ssd", "source is missing or empty"]),
        (["rows", "ssd", "published", 0, "ood"], "lsun", ["ood", "lsun", "mine"]),
        (["rows", "ssd", "published", 0, "clusters"], 3, ["rows: ssd", "clusters", "3"]),
        (["rows", "ssd", "eval", "method"], "knn", ["eval: method", "ssd, ssdk", "'knn'"]),
        (["rows", "ssd", "eval", "score"], ["cnn"], ["eval: score", "ssd, tied", "'cnn'"]),
        (["layout"], "wide", ["layout: expected openood", "'wide'"]),
        (["rows", "ssd", "eval", "ood"], "svhn", ["eval: ood: expected a list"]),
        (["rows", "ssd", "eval", "k"], 5, ["evaluate ssd", "unrecognized arguments: --k 5"]),
        (["rows", "ssd", "eval", "clusters"], [0], ["evaluate ssd", "--clusters", "at least 1"]),
        (["rows", "ssd", "draws"], 0, ["draws: expected an integer of at least 1, not 0"]),
        (["rows", "a/b"], {"label": "x", "train": {"config": str(ROOT / "configs/stl_supcon.yaml")},
                           "eval": {"method": "ssd", "ood": ["svhn"]}}, ["'a/b'", "letters"]),
        (["rows"], {}, ["rows is missing or empty"]),
        (["metrics"], ["accuracy"], ["metrics", "'accuracy'", "auroc"]),
        (["means", 0, "rows"], ["gone"], ["means", "unknown 'gone'"]),
        (["means", 0, "ood"], ["svhn", "blobs"], ["means", "blobs", "mine"]),
        (["means", 0, "clusters"], 4, ["means", "clusters", "4"]),
    ],
)
def test_a_wrong_table_is_refused_before_anything_runs(
    programs, run, make_table, tmp_path, place, value, words
):
    table = make_table()
    content = changed = yaml.safe_load(table.read_text())
    for key in place[:-1]:
        changed = changed[key]
    changed[place[-1]] = value
    table.write_text(yaml.safe_dump(content, sort_keys=False))
    refused(run(table=table), 2, table, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "ssd", "gone"], ["--only", "'gone'", "ssd, ssdk"]),
        (["--sets", "yours=x"], ["--sets", "'yours'", "mine"]),
        (["--sets", "mine=nowhere"], ["nowhere", "a folder or an .npz file"]),
        (["--sets", "mine=a", "mine=b"], ["--sets", "each name once"]),
        (["--override", "epochs"], ["--override epochs", "NAME=VALUE"]),
        (["--override", "seed=3"], ["--override", "seed"]),
        (["--override", "data_dir=x"], ["--override", "places"]),
        (["--seeds", "0"], ["--seeds", "at least 1"]),
        (["--readme", "R.md", "--override", "epochs=1"], ["--readme", "--override"]),
        (["--readme", "R.md"], ["--readme R.md", "<!-- table tiny_table -->"]),
        (["--override", "nosuch=1"], ["train tiny-nosuch1", "unrecognized arguments: --nosuch 1"]),
        (["--override", "epochs=x", "--dry-run"], ["train tiny-epochsx", "--epochs", "'x'"]),
        (["--report"], ["--report: no folder --results-dir out"]),
        (["--report", "--slurm"], ["--slurm", "not allowed with"]),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_runs(
    programs, run, tmp_path, arguments, words
):
    (tmp_path / "R.md").write_text("# Top\n")
    refused(run(*arguments), 2, *words)
    assert not (tmp_path / "out").exists()


def test_an_unknown_table_is_refused_with_those_that_are_there(call, tmp_path):
    refused(call("reproduce.py", "gone", cwd=tmp_path), 2, "no table gone", "digits", "readme")


def test_a_disk_that_fills_is_one_line_and_what_stood_there_stays(done, make_table, tmp_path):
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    finished = subprocess.run(
        [sys.executable, ROOT / "reproduce.py", make_table(), "--seeds", "1", "--results-dir",
         "out", "--report"], cwd=tmp_path, capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)))
    refused(finished, 1, "File too large")
    assert {p: p.read_bytes() for p in before} == before
