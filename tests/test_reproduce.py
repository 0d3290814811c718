"""Tables from their files to the page: what is run, once and in order, and what is made of it."""

import base64
import csv
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, environment

import eval_ssd
import eval_ssdk
import reproduce
import tables
import train

SHIPPED = sorted(path.stem for path in tables.FOLDER.glob("*.yaml"))
STATES = re.compile(r"^(?:# )?((?:train|evaluate) [^:]+): (to do|running|broken|done|stale)", re.M)


@pytest.fixture(scope="session")
def make_table(tiny_npz, other_npz):
    """Function (folder, epochs=1, **changes) -> path of a table of two rows on one network."""

    def make(folder, epochs=1, lr=0.05, **changes):
        recipe = {"dataset": f"npz:{tiny_npz}", "arch": "resnet18", "size": 8, "epochs": epochs,
                  "batch-size": 16, "lr": lr, "normalize": True}
        (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
        other = f"npz:{other_npz}"
        network = {"config": str(folder / "tiny.yaml")}
        content = {
            "title": "A <tiny> table", "about": "Ours.", "metrics": ["auroc", "fpr95"],
            "sets": {"mine": {"label": "My images", "needs": "a folder of yours"}},
            "rows": {
                "ssd": {"label": "SSD", "train": network,
                        "eval": {"method": "ssd", "clusters": [1, 2], "ood": [other, "mine"]},
                        "published": [{"ood": other, "auroc": 0.5, "source": "a | paper"}]},
                "ssdk": {"label": "SSDk", "train": network, "draws": 2,
                         "eval": {"method": "ssdk", "k": 2, "copies": 2, "ood": [other]}},
            },
            "means": [{"label": "SSD", "outliers": "both", "rows": ["ssd"],
                       "ood": [other, "mine"]}],
        }
        path = folder / "tiny_table.yaml"
        path.write_text(yaml.safe_dump({**content, **changes}, sort_keys=False))
        return path

    return make


@pytest.fixture(scope="module")
def reproduced(command, make_table, other_npz, tmp_path_factory):
    """A whole run with one seed and no set of the user's: (folder, table, stdout)."""
    home = tmp_path_factory.mktemp("reproduced")
    table = make_table(home)
    done = command("reproduce.py", table, "--seeds", 1, "--results-dir", "out", cwd=home)
    assert done.returncode == 0, done.stderr
    return home, table, done.stdout


@pytest.fixture
def again(reproduced, command, tmp_path):
    """Function (*arguments) -> reproduce.py on a copy of `reproduced`, in tmp_path."""
    home, table, _ = reproduced
    shutil.copytree(home / "out", tmp_path / "out", symlinks=True)

    def run(*arguments, **kwargs):
        return command("reproduce.py", table, "--seeds", 1, "--results-dir", "out", *arguments,
                       cwd=tmp_path, **kwargs)

    return run


def states(text):
    return dict(STATES.findall(text))


def commands(text):
    return [line for line in text.splitlines() if line.startswith("python ")]


def refused(done, status, *words):
    lines = done.stderr.splitlines()
    assert done.returncode == status, done.stderr
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert str(word) in lines[0]


# --- from nothing to the page ---------------------------------------------------------------------


def test_rows_that_share_a_network_train_it_once_and_each_draw_is_evaluated(reproduced):
    home, _, stdout = reproduced
    assert len(list((home / "out/networks").iterdir())) == 1
    scripts = [line.split()[2].rpartition("/")[2] for line in stdout.splitlines()
               if line.startswith("$ python ")]
    assert scripts == ["train.py", "eval_ssd.py", "eval_ssdk.py", "eval_ssdk.py"]
    kinds = sorted(p.name.partition("-")[0] for p in (home / "out/tiny_table").iterdir()
                   if p.is_dir())
    assert kinds == ["figures", "ssd", "ssdk", "ssdk"]


def test_the_csv_holds_the_records_numbers_beside_the_published(reproduced, other_npz):
    home, _, _ = reproduced
    rows = list(csv.DictReader((home / "out/tiny_table/table.csv").open()))
    assert [(r["row"], r["outliers"], r["clusters"], r["metric"]) for r in rows[:4]] == [
        ("ssd", f"npz:{other_npz}", "1", "auroc"), ("ssd", f"npz:{other_npz}", "1", "fpr95"),
        ("ssd", "My images", "1", "auroc"), ("ssd", "My images", "1", "fpr95"),
    ]
    (path,) = (home / "out/tiny_table").glob("ssd-*/ssd_ssd.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert float(rows[0]["mean"]) == records[0]["auroc"]
    assert float(rows[0]["difference"]) == records[0]["auroc"] - 0.5
    assert (rows[0]["n"], rows[0]["deviation"], rows[0]["source"]) == ("1", "", "a | paper")
    assert (rows[2]["mean"], rows[2]["n"], rows[2]["published"]) == ("", "0", "")
    drawn = [r for r in rows if r["row"] == "ssdk"]
    assert [(r["n"], r["draws"]) for r in drawn] == [("1", "2")] * 2
    assert all(float(r["draws_deviation"]) >= 0 for r in drawn)
    assert rows[-1]["mean"] == ""  # a mean over a set that is left out


def test_the_markdown_escapes_bars_and_says_what_is_left_out(reproduced):
    home, _, stdout = reproduced
    text = (home / "out/tiny_table/table.md").read_text()
    assert text.splitlines()[0] == (
        "| network | outliers | metric | ours | n | published | difference | source |"
    )
    assert re.search(r"\| SSD, m = 1 \| npz:\S+ \| AUROC \| 0\.\d{4} \| 1 \| 0\.5 \| "
                     r"[+-]0\.\d{4} \| a \\\| paper \|", text)
    assert "Left out: My images of ssd: it is a folder of yours; --sets mine=PATH." in text
    assert text.strip() in stdout


def test_the_page_is_one_file_with_every_figure_in_it(reproduced):
    home, _, _ = reproduced
    text = (home / "out/tiny_table/index.html").read_text()
    assert "A &lt;tiny&gt; table" in text
    sources = re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', text)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"@import|url\(|<script|<link", text)
    shown = {base64.b64decode(source.partition(",")[2]) for source in sources}
    drawn = {path.read_bytes() for path in (home / "out/tiny_table").rglob("*.png")}
    assert shown == drawn
    names = re.findall(r'<img alt="([^"]*)"', text)
    assert len(names) == len(sources)
    for kind in ("histograms", "roc", "precision_recall"):
        assert sum(name.endswith(f"_{kind}") for name in names) == 3  # of three evaluations
    assert sum(name.startswith("tiny-") for name in names) == 1  # the training's curves
    assert "color-scheme: light dark" in text
    assert "eval_ssdk.py --ckpt" in text
    assert "torch" in text


def test_what_is_done_is_not_run_again(again, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*_ssd*.jsonl")}
    done = again()
    assert done.returncode == 0, done.stderr
    assert set(states(done.stdout).values()) == {"done"}
    assert "$ python" not in done.stdout
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_set_that_the_user_names_later_adds_an_evaluation_and_repeats_none(
    again, tmp_path, other_npz
):
    shutil.copy(other_npz, tmp_path / "mine.npz")
    done = again("--sets", "mine=mine.npz", "--only", "ssd")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("$ python") == 1
    rows = list(csv.DictReader((tmp_path / "out/tiny_table/table.csv").open()))
    mine = next(r for r in rows if r["outliers"] == "My images")
    assert mine["mean"] == rows[0]["mean"]  # the same images
    assert float(rows[-2]["mean"]) == pytest.approx(float(rows[0]["mean"]))
    assert "Left out" not in (tmp_path / "out/tiny_table/table.md").read_text()
    assert all(r["mean"] for r in rows)  # --only chooses what is run, not what is shown


# --- commands and states --------------------------------------------------------------------------


def test_a_dry_run_prints_commands_that_a_shell_runs_and_writes_nothing(
    command, make_table, tmp_path
):
    table = make_table(tmp_path)

    def dry():
        done = command("reproduce.py", table, "--seeds", 1, "--results-dir", "a b", "--dry-run",
                       cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    text = dry()
    assert list(states(text).values()) == ["to do"] * 4
    assert not (tmp_path / "a b").exists()
    (tmp_path / "bin").mkdir()
    script = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n'  # a link would lose its venv
    (tmp_path / "bin/python").write_text(script)
    (tmp_path / "bin/python").chmod(0o755)
    typed = subprocess.run(
        ["sh", "-c", commands(text)[0]], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
    )
    assert typed.returncode == 0, typed.stderr
    text = dry()
    assert list(states(text).values()) == ["done", "to do", "to do", "to do"]
    assert len(commands(text)) == 3  # what is done is a comment


@pytest.mark.parametrize("name", SHIPPED)
def test_the_commands_of_every_shipped_table_are_taken_by_their_programs(name, capsys):
    table = tables.read(name)
    sets = {key: (f"folder:{key}", "") for key in table.sets}
    choices = reproduce.Choices(Path("r"), None, True, {}, sets, False)
    jobs, missing = reproduce.plan(table, 2, choices)
    assert not missing
    parsers = {"train.py": train, "eval_ssd.py": eval_ssd, "eval_ssdk.py": eval_ssdk}
    for job in jobs:
        script, *arguments = job.arguments
        args = reproduce.utils.parse_args(parsers[script].parser(), arguments)
        assert args.no_download
        assert args.seed in range(1, 6)
    order = [job.home for job in jobs]
    assert all(order.index(job.after.home) < order.index(job.home) for job in jobs if job.after)


def test_the_published_values_are_those_with_a_source():
    found = {}
    for name in SHIPPED:
        table = tables.read(name)
        for row in table.rows.values():
            for (ood, m, metric), number in row.published.items():
                found[name, row.name, ood, m, metric] = number.value
    readme = {"cifar100": (0.5078, 0.90632, 0.89196), "svhn": (0.02067, 0.99624, 0.99856),
              "texture": (0.14645, 0.9761, 0.95566), "blobs": (0.0467, 0.98791, 0.98431)}
    classes = {"plane": 0.827, "car": 0.985, "bird": 0.842, "cat": 0.845, "deer": 0.848,
               "dog": 0.909, "frog": 0.917, "horse": 0.952, "ship": 0.929, "truck": 0.944}
    expected = {("readme", "simclr", ood, 1, metric): value for ood, values in readme.items()
                for metric, value in zip(("fpr95", "auroc", "aupr"), values, strict=True)}
    expected |= {("clusters", "simclr", ood, 1, "auroc"): v[1] for ood, v in readme.items()}
    expected |= {("one_class", name, "rest", 1, "auroc"): v for name, v in classes.items()}
    expected |= {("ssd_plus", "supcon", "cifar100", 1, "fpr95"): 0.385,
                 ("ssd_plus", "supcon", "cifar100", 1, "auroc"): 0.934,
                 ("fix", "simclr", "lsun_fix", 1, "auroc"): 0.965}
    assert found == expected
    (mean,) = tables.read("one_class").means
    assert mean.published["auroc"].value == 0.9
    assert abs(sum(classes.values()) / 10 - 0.9) < 5e-4


def test_the_ten_classes_are_ten_networks_and_the_readme_network_serves_four_tables():
    choices = reproduce.Choices(Path("r"), None, False, {}, {}, False)

    def networks(name):
        table = tables.read(name)
        jobs, _ = reproduce.plan(table, 1, choices)
        return {job.home.name for job in jobs if job.after is None}

    assert len(networks("one_class")) == 10
    assert networks("readme") == networks("clusters") == networks("few_shot")
    assert networks("fix") == set()  # nothing to evaluate without the user's sets


def test_a_changed_recipe_is_stale_and_goes_to_a_new_place(again, reproduced, make_table, tmp_path):
    old = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    table = make_table(tmp_path, lr=0.06)
    shutil.copy(reproduced[0] / "tiny.yaml", tmp_path / "old.yaml")
    text = (tmp_path / "tiny.yaml").read_text()
    (reproduced[0] / "tiny.yaml").write_text(text)
    try:
        done = again("--dry-run")
        assert set(states(done.stdout).values()) == {"stale"}
        assert "settings.lr (0.05 there, 0.06 now)" in done.stdout
        done = again("--report")
        assert "0.5 | | a" in done.stdout  # ours is empty
        done = again("--report", "--accept-stale")
        assert "Of another version, accepted: train tiny, seed 1." in done.stdout
        assert "0.5 | | a" not in done.stdout
        done = again("--only", "ssd")
        assert done.returncode == 0, done.stderr
        assert set(states(again("--dry-run", "--only", "ssd").stdout).values()) == {"done"}
    finally:
        shutil.copy(tmp_path / "old.yaml", reproduced[0] / "tiny.yaml")
    assert table.is_file()
    kept = {p: b for p, b in old.items() if p.suffix in (".jsonl", ".tar", ".txt")}
    assert {p: p.read_bytes() for p in kept} == kept


def test_a_changed_program_is_another_version_but_a_changed_comment_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "HERE", tmp_path)

    def digest(text):
        (tmp_path / "x.py").write_text(text)
        return reproduce.code_digests(["x.py"])["x.py"]

    first = digest('"""What it is."""\n\ndef f(x):\n    """Add one."""\n    return x + 1\n')
    assert digest("def f(x):  # a comment\n\n    return (x +\n 1)\n") == first
    assert digest("def f(x):\n    return x + 2\n") != first


def test_a_row_that_fails_is_said_and_the_others_go_on(again, reproduced, make_table, tmp_path):
    content = yaml.safe_load(reproduced[1].read_text())
    bad = {**content["rows"]["ssd"], "published": []}
    bad["train"] = {**bad["train"], "lr": 1e30}  # its loss is soon not a number
    table = make_table(tmp_path, rows={"bad": bad, **content["rows"]}, means=[])
    shutil.copy(reproduced[0] / "tiny.yaml", tmp_path / "tiny.yaml")
    text = table.read_text().replace(str(reproduced[0]), str(tmp_path))
    table.write_text(text)
    done = subprocess.run(
        [sys.executable, ROOT / "reproduce.py", table, "--seeds", "1", "--results-dir", "out"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "reproduce.py: error: 2 of 6 jobs failed: train tiny-lr1e_30, seed 1, "
        "evaluate bad, seed 1"
    )
    assert "Traceback" not in done.stderr
    text = (tmp_path / "out/tiny_table/table.md").read_text()
    assert "Failed: train tiny-lr1e_30, seed 1: ended with exit status 1." in text
    assert "Failed: evaluate bad, seed 1: its training failed." in text
    assert re.search(r"\| SSD, m = 1 \| npz:\S+ \| AUROC \| 0\.\d{4} \| 1 \| 0\.5", text)


# --- stopped and continued ------------------------------------------------------------------------


def start(table, cwd, *by):
    return subprocess.Popen(
        [*by, sys.executable, ROOT / "reproduce.py", table, "--seeds", "1", "--results-dir", "out",
         "--only", "ssd"],
        cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env=environment(),
    )


def wait_for_epoch(folder, process):
    """Wait until a training below a folder has written an epoch."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        for path in folder.glob("out/networks/*/*/log.jsonl"):
            if '"event": "epoch"' in path.read_text():
                return
        time.sleep(0.1)
    raise AssertionError(f"no epoch; exit status {process.poll()}")


def finished_epochs(folder):
    (log,) = folder.glob("out/networks/*/latest_exp/log.jsonl")
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert records[-1]["event"] == "end"
    return sorted({r["epoch"] for r in records if r["event"] == "epoch"})


def test_a_signal_stops_the_training_and_the_same_command_continues(command, make_table, tmp_path):
    table = make_table(tmp_path, epochs=3)
    process = start(table, tmp_path)
    wait_for_epoch(tmp_path, process)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 75, stderr
    assert stderr.splitlines()[-1] == (
        "reproduce.py: note: stopped by SIGTERM; the same command continues"
    )
    common = (table, "--seeds", 1, "--results-dir", "out", "--only", "ssd")
    done = command("reproduce.py", *common, "--dry-run", cwd=tmp_path)
    assert list(states(done.stdout).values()) == ["broken", "to do"]
    done = command("reproduce.py", *common, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert finished_epochs(tmp_path) == [0, 1, 2]
    assert len(list(tmp_path.glob("out/networks/*/*--*"))) == 1  # the run was taken up


@pytest.mark.usefixtures("terminal")
def test_nohup_keeps_it_from_a_terminal_that_is_closed(make_table, tmp_path):
    process = start(make_table(tmp_path, epochs=3), tmp_path, "nohup")
    wait_for_epoch(tmp_path, process)
    process.send_signal(signal.SIGHUP)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert finished_epochs(tmp_path) == [0, 1, 2]


def test_a_training_that_outlives_a_killed_program_is_waited_for_not_started_twice(
    command, make_table, tmp_path
):
    table = make_table(tmp_path, epochs=3)
    process = start(table, tmp_path)
    wait_for_epoch(tmp_path, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    child = int(children)
    os.kill(child, signal.SIGSTOP)  # so that it cannot end before it is looked for
    try:
        process.kill()
        process.wait(timeout=60)  # its stderr stays open in the training
        done = command("reproduce.py", table, "--seeds", 1, "--results-dir", "out", "--only", "ssd",
                       "--dry-run", cwd=tmp_path)
        assert list(states(done.stdout).values()) == ["running", "to do"]
        second = start(table, tmp_path)
        said = second.stderr.readline()
        assert said == "reproduce.py: note: waits for what runs already: train tiny, seed 1\n"
    finally:
        os.kill(child, signal.SIGCONT)
    _, stderr = second.communicate(timeout=300)
    assert second.returncode == 0, stderr
    (run,) = tmp_path.glob("out/networks/*/*--*")
    assert run.name.startswith("1--")
    assert finished_epochs(tmp_path) == [0, 1, 2]


# --- Slurm ----------------------------------------------------------------------------------------


@pytest.fixture
def slurm(tmp_path):
    """Environment with a `sbatch` that records its arguments and a `squeue` that knows them."""
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "sbatch").write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/submitted\nwc -l < {tmp_path}/submitted\n'
    )
    (fake / "squeue").write_text("#!/bin/sh\necho job\n")
    for name in ("sbatch", "squeue"):
        (fake / name).chmod(0o755)
    return {**os.environ, "PATH": f"{fake}:{os.environ['PATH']}"}


def test_slurm_gets_the_seeds_as_an_array_and_evaluations_behind_their_training(
    command, make_table, slurm, tmp_path
):
    table = make_table(tmp_path)
    common = (table, "--seeds", 2, "--results-dir", tmp_path / "out")
    done = command("reproduce.py", *common, "--slurm", cwd=ROOT, env=slurm)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "submitted").read_text().splitlines()
    assert len(lines) == 7  # an array of two, and three evaluations of each network
    (name,) = {p.name[:-1] for p in (tmp_path / "out/networks").iterdir()}
    assert lines[0] == (
        f"--parsable --array=0-1 slurm/train.sbatch 1 2 --config "
        f"{os.path.relpath(tmp_path / 'tiny.yaml', ROOT)} --seed {{}} --exp-name {name}{{}} "
        f"--results-dir {tmp_path}/out/networks"
    )
    waits = [re.match(r"--parsable --dependency=afterok:(1_[01]) slurm/eval.sbatch (\S+) --ckpt "
                      rf"{tmp_path}/out/networks/{name}([12])/", line) for line in lines[1:]]
    assert [m and m.groups() for m in waits] == [
        ("1_0", "eval_ssd.py", "1"), ("1_1", "eval_ssd.py", "2"), ("1_0", "eval_ssdk.py", "1"),
        ("1_0", "eval_ssdk.py", "1"), ("1_1", "eval_ssdk.py", "2"), ("1_1", "eval_ssdk.py", "2"),
    ]
    done = command("reproduce.py", *common, "--dry-run", cwd=ROOT, env=slurm)
    assert set(states(done.stdout).values()) == {"running"}
    command("reproduce.py", *common, "--slurm", cwd=ROOT, env=slurm)
    assert len((tmp_path / "submitted").read_text().splitlines()) == 7  # nothing twice
    (tmp_path / "fake/squeue").write_text("#!/bin/sh\nexit 1\n")
    done = command("reproduce.py", *common, "--dry-run", cwd=ROOT, env=slurm)
    assert set(states(done.stdout).values()) == {"broken"}


def test_slurm_without_sbatch_or_with_one_that_refuses_says_so(
    command, make_table, slurm, tmp_path
):
    common = (make_table(tmp_path), "--results-dir", tmp_path / "out", "--slurm")
    done = command("reproduce.py", *common, cwd=ROOT, env={**slurm, "PATH": str(tmp_path)})
    refused(done, 2, "--slurm needs sbatch")
    (tmp_path / "fake/sbatch").write_text("#!/bin/sh\necho 'no such partition' >&2\nexit 1\n")
    done = command("reproduce.py", *common, cwd=ROOT, env=slurm)
    refused(done, 1, "sbatch did not take train tiny, seed 1", "no such partition")
    assert not (tmp_path / "out").exists()
    done = command("reproduce.py", *common, cwd=tmp_path, env=slurm)
    refused(done, 2, "--slurm", ROOT)


# --- numbers --------------------------------------------------------------------------------------


def test_a_line_is_the_mean_over_networks_of_the_mean_over_draws(make_table, tmp_path, other_npz):
    table = tables.read(make_table(tmp_path))
    other = f"npz:{other_npz}"
    values = {1: [0.8, 0.9], 2: [0.6, 0.6]}
    runs = {seed: [{"auroc": v, "fpr95": 1 - v} for v in drawn] for seed, drawn in values.items()}
    (line,) = (x for x in tables.lines(table, {("ssdk", other, 1): runs})
               if (x.row, x.metric) == ("ssdk", "auroc"))
    assert line.values == (pytest.approx(0.85), 0.6)
    assert line.mean == pytest.approx(0.725)
    assert line.deviation == pytest.approx(0.25 / 2**0.5)  # of a sample of two
    assert line.spread == pytest.approx(0.1 / 2**0.5 / 2)  # mean of those of the two networks
    assert tables.cells(table, line)[3:5] == ("0.7250 ± 0.1768 (draws ± 0.0354)", "2 × 2 draws")


def test_a_mean_over_sets_is_taken_per_network_and_only_where_all_are_there(
    make_table, tmp_path, other_npz
):
    table = tables.read(make_table(tmp_path))

    def runs(*values):
        return {i: [{"auroc": v, "fpr95": v}] for i, v in enumerate(values) if v is not None}

    measured = {("ssd", f"npz:{other_npz}", 1): runs(0.5, 0.7, 0.9),
                ("ssd", "mine", 1): runs(0.1, None, 0.3)}
    line = tables.lines(table, measured)[-2]
    assert (line.label, line.outliers, line.metric) == ("SSD", "both", "auroc")
    assert line.values == (pytest.approx(0.3), pytest.approx(0.6))


def test_the_readme_gets_the_table_between_its_markers_and_nothing_else(again, tmp_path):
    begin, end = "<!-- table tiny_table -->", "<!-- end of table tiny_table -->"
    (tmp_path / "R.md").write_text(f"# Top\n\n{begin}\nold\n{end}\n\nBottom\n")
    done = again("--report", "--readme", "R.md")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "R.md").read_text()
    assert text.startswith(f"# Top\n\n{begin}\n| network |")
    assert text.endswith(f"|\n{end}\n\nBottom\n")
    assert "old" not in text
    assert "My images" not in text  # neither ours nor published
    again("--report", "--readme", "R.md")
    assert (tmp_path / "R.md").read_text() == text


@pytest.mark.parametrize("name", re.findall(r"<!-- table (\w+) -->",
                                            (ROOT / "README.md").read_text(encoding="utf-8")))
def test_the_readmes_published_numbers_are_the_tables(name):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = text.split(f"<!-- table {name} -->\n")[1].split(f"<!-- end of table {name} -->")[0]
    published = [r.split("|")[6].strip() for r in shown.splitlines()[2:]]
    table = tables.read(name)
    lines = [x for x in tables.lines(table, {}) if x.published is not None]
    expected = [tables.cells(table, x)[5] for x in lines]
    assert [p for p in published if p] == expected


# --- bad input ------------------------------------------------------------------------------------


def _change(content, place, value):
    *above, last = place
    for key in above:
        content = content[key]
    content[last] = value


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (["row"], {}, ["unknown key 'row'", "rows"]),
        (["rows", "ssd", "training"], {}, ["row 'ssd'", "unknown key 'training'", "train"]),
        (["rows", "ssd", "train", "config"], "configs/gone.yaml",
         ["row 'ssd'", "recipe configs/gone.yaml is gone"]),
        (["rows", "ssd", "published", 0, "auroc"], "high", ["row 'ssd'", "'high'", "not a number"]),
        (["rows", "ssd", "published", 0, "auroc"], 96.5, ["96.5", "between 0 and 1"]),
        (["rows", "ssd", "published", 0, "source"], "", ["row 'ssd'", "source is empty"]),
        (["rows", "ssd", "published", 0], {"ood": "mine", "auroc": 0.5},
         ["row 'ssd'", "'source' is missing"]),
        (["rows", "ssd", "published", 0, "ood"], "lsun", ["ood", "unknown 'lsun'", "mine"]),
        (["rows", "ssd", "eval", "method"], "knn", ["'knn'", "ssd, ssdk"]),
        (["rows", "ssd", "eval", "k"], 5, ["unknown 'k'", "clusters"]),
        (["rows", "ssd", "draws"], 0, ["draws: 0", "at least 1"]),
        (["rows", "a/b"], {}, ["row 'a/b'", "letters"]),
        (["rows"], {}, ["rows", "at least one"]),
        (["metrics"], ["accuracy"], ["unknown 'accuracy'", "auroc"]),
        (["means", 0, "rows"], ["gone"], ["means", "unknown 'gone'"]),
    ],
)
def test_a_wrong_table_is_refused_before_anything_runs(
    command, make_table, tmp_path, place, value, words
):
    table = make_table(tmp_path)
    content = yaml.safe_load(table.read_text())
    _change(content, place, value)
    table.write_text(yaml.safe_dump(content, sort_keys=False))
    done = command("reproduce.py", table, "--results-dir", "out", cwd=tmp_path)
    refused(done, 2, table, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "ssd", "gone"], ["--only gone", "ssd, ssdk"]),
        (["--sets", "yours=x"], ["--sets yours=x", "mine"]),
        (["--sets", "mine=nowhere"], ["nowhere", "no folder and no .npz file"]),
        (["--override", "epochs"], ["--override epochs", "FLAG=VALUE"]),
        (["--override", "seed=3"], ["--override seed=3"]),
        (["--seeds", "0"], ["--seeds", "at least 1"]),
        (["--readme", "R.md", "--override", "epochs=1"], ["--readme", "--override"]),
        (["--override", "nosuch=1"], ["--override says", "unrecognized arguments: --nosuch 1"]),
        (["--override", "epochs=x", "--dry-run"], ["--override says", "--epochs: 'x' is not"]),
        (["--report"], ["--report: no folder --results-dir out"]),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_runs(
    command, make_table, tmp_path, arguments, words
):
    done = command("reproduce.py", make_table(tmp_path), "--results-dir", "out", *arguments,
                   cwd=tmp_path)
    refused(done, 2, *words)
    assert not (tmp_path / "out").exists()


def test_an_unknown_table_and_a_readme_without_markers_are_refused(command, again, tmp_path):
    refused(command("reproduce.py", "gone", cwd=tmp_path), 2, "no table gone", "digits", "readme")
    (tmp_path / "R.md").write_text("# Top\n")
    refused(again("--report", "--readme", "R.md"), 2, "R.md", "<!-- table tiny_table -->")
    assert (tmp_path / "R.md").read_text() == "# Top\n"


def test_a_disk_that_fills_is_one_line_and_what_stood_there_stays(reproduced, tmp_path):
    home, table, _ = reproduced
    shutil.copytree(home / "out", tmp_path / "out", symlinks=True)
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    done = subprocess.run(
        [sys.executable, ROOT / "reproduce.py", table, "--seeds", "1", "--results-dir", "out",
         "--report"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)),
    )
    refused(done, 1, "out/tiny_table/table.md was not written", "nothing was overwritten")
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before
