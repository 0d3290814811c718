"""Results are recorded whole, whatever is killed, repeated or run at the same time."""

import contextlib
import csv
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, environment

import data
import features
import utils
from detection import Choice
from infra.storage import read_records
from report.records import Report, line_of

RESULT = {"in": "cifar10", "ood": "cifar100", "clusters": 1, "fpr95": 0.5078,
          "auroc": 0.9063240349999999, "aupr": 0.8919609510086947}
LINE = ("In-data = cifar10, OOD = cifar100, Clusters = 1, FPR95 = 0.5078, "
        "AUROC = 0.9063240349999999, AUPR = 0.8919609510086947")
TIMES = {"time": 0, "seconds": 0}  # what differs between equal evaluations


def lines(path):
    return path.read_text().splitlines()


def consistent(base):
    """Assert that both files hold the same results, whole lines only; return the records."""
    records = [json.loads(line) for line in lines(base.with_suffix(".jsonl"))]
    assert Counter(map(line_of, records)) == Counter(lines(base.with_suffix(".txt")))
    return records


@contextlib.contextmanager
def full_disk(size):
    """Files cannot grow beyond a size in bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- the two files --------------------------------------------------------------------------------


def image_set(name, level=0):
    pixels = torch.full((6, 3, 2, 2), level, dtype=torch.uint8)
    return data.ImageSet(name, pixels, torch.zeros(6).long())


@pytest.fixture
def report(tmp_path):
    """Function () -> a Report of RESULTS/e_ssd, the way a program makes one."""
    train, test = image_set("a", 1), image_set("a", 2)
    return lambda **facts: Report(tmp_path, "e", "ssd", train=train, test=test, seed=1, facts=facts)


def add(report, ood="b", shift=1.0):
    report.add(np.arange(6.0), image_set(ood, 3), np.arange(6.0) + shift,
               choice=Choice("ssd", 1))


@pytest.mark.parametrize(("choice", "which"), [
    (Choice("ssd", 1), "Clusters = 1"), (Choice("tied", 6), "Score = tied, m = 6"),
    (Choice("knn", 50), "Score = knn, k = 50"), (Choice("crossval", None), "Score = crossval")])
def test_the_line_of_a_record_is_the_originals_with_the_score_for_clusters(choice, which):
    record = {k: v for k, v in RESULT.items() if k != "clusters"} | choice.fields()
    assert line_of(record) == LINE.replace("Clusters = 1", which)
    assert Choice.of(record) == choice


def test_a_second_evaluation_is_appended_with_all_that_is_known(report, tmp_path, capsys):
    add(report(arch="resnet18"))
    add(report(arch="resnet50"), shift=2.0)
    one, two = consistent(tmp_path / "e_ssd")
    assert (one["arch"], two["arch"]) == ("resnet18", "resnet50")
    assert one["auroc"] < two["auroc"]
    assert len(set(one["images"].values())) == 3
    assert one["images"].keys() == {"train", "in", "ood"}
    assert (one["n_train"], one["n_in"], one["n_ood"], one["seed"]) == (6, 6, 6, 1)
    assert one["versions"] == utils.versions()
    assert capsys.readouterr().out.splitlines() == lines(tmp_path / "e_ssd.txt")


@pytest.mark.parametrize("length", [1, 40, -2, -1])
def test_a_line_that_a_crash_cut_is_ignored_and_never_joins_the_next(length, report, tmp_path):
    path = tmp_path / "e_ssd.jsonl"
    for name in "abc":
        if name == "c":  # the record of b lost its end
            whole = path.read_bytes()
            start = whole.index(b"\n") + 1
            path.write_bytes(whole[:start] + whole[start:][:length])
        add(report(), name)
    left = "abc" if length == -1 else "ac"  # only the end of its line was lost
    assert [r["ood"] for r in read_records(path)] == list(left)


def test_lines_of_the_original_and_records_of_others_stay_as_they_are(report, tmp_path):
    (tmp_path / "e_ssd.txt").write_text("a line of the original, without an end")
    (tmp_path / "e_ssd.jsonl").write_text('{"other": 1}\n[1]\nnot json\n')
    add(report())
    other, record = read_records(tmp_path / "e_ssd.jsonl")
    assert other == {"other": 1}
    assert lines(tmp_path / "e_ssd.txt") == ["a line of the original, without an end",
                                             line_of(record)]
    assert lines(tmp_path / "e_ssd.jsonl")[:3] == ['{"other": 1}', "[1]", "not json"]
    assert read_records(tmp_path / "none.jsonl") == []


def test_many_programs_write_at_once_and_no_line_is_lost_or_mixed(report, tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: add(report(), f"set{i}" * i, i / 8), range(1, 33)))
    names = [f"set{i}" * i for i in range(1, 33)]
    assert sorted(r["ood"] for r in consistent(tmp_path / "e_ssd")) == sorted(names)


def test_a_disk_that_fills_up_leaves_no_part_of_a_record(report, tmp_path):
    add(report())
    size = (tmp_path / "e_ssd.jsonl").stat().st_size
    with full_disk(size + 20), pytest.raises(OSError, match="No space"):
        add(report())
    assert (tmp_path / "e_ssd.jsonl").stat().st_size == size
    add(report())
    assert len(read_records(tmp_path / "e_ssd.jsonl")) == 2


def test_a_set_whose_name_breaks_a_line_has_one_line(report, tmp_path):
    add(report(), "npz:a\nb\r\udcff")
    raw = (tmp_path / "e_ssd.txt").read_bytes()
    assert raw.count(b"\n") == 1
    assert b"OOD = npz:a b \xff, Clusters" in raw
    assert [r["ood"] for r in read_records(tmp_path / "e_ssd.jsonl")] == ["npz:a\nb\r\udcff"]


def test_a_line_that_is_no_record_is_skipped_however_strange_it_is(report, tmp_path):
    path = tmp_path / "e_ssd.jsonl"
    path.write_text("[" * 100_000 + "\n" + '{"a": ' * 100_000 + "\n[1]\n3\n" + "1" * 5000 + "\n")
    add(report())
    assert [r["ood"] for r in read_records(path)] == ["b"]
    os.mkfifo(tmp_path / "fifo.jsonl")
    assert read_records(tmp_path / "fifo.jsonl") == []


def test_no_cell_of_the_scores_is_a_formula(tmp_path):
    names = ("=1+1", "+1", "-1", "@a", "\t=1", "a=1", "")
    test, ood = image_set("a", 2), image_set("=b", 3)
    ood = replace(ood, class_names=names[:1], paths=names[:6])
    report = Report(tmp_path, "e", "ssd", train=test, test=test, seed=1, facts={},
                    scores=tmp_path / "scores.csv")
    report.add(np.arange(6.0), ood, -np.arange(6.0), choice=Choice("ssd", 1), against="=b")
    report.close()
    with (tmp_path / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))[len(test) :]
    assert [row["image"] for row in rows] == ["'=1+1", "'+1", "'-1", "'@a", "'\t=1", "a=1"]
    assert {(row["set"], row["label"], row["against"]) for row in rows} == {("'=b", "'=1+1", "'=b")}
    assert [float(row["score"]) for row in rows] == [0, -1, -2, -3, -4, -5]


# --- the programs ---------------------------------------------------------------------------------


@pytest.fixture
def evaluate(call, trained, tmp_path):
    """Function (script, *arguments) -> the finished evaluation of `trained`, in tmp_path."""

    def run(script, *arguments):
        done = call(script, "--ckpt", trained, *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done

    return run


SSD = ("eval_ssd.py", ["--clusters", 1, 3])
SSDK = ("eval_ssdk.py", ["--k", 2, "--copies", 2])


def result_files(script, folder):
    return folder / f"temp_eval_ssd_{script.removesuffix('.py').removeprefix('eval_')}"


@pytest.mark.parametrize(("script", "flags", "files"), [(*SSD, 4), (*SSDK, 6)])
def test_a_repeated_evaluation_takes_features_from_the_cache_and_records_the_same(
    evaluate, tmp_path, other_npz, tiny_npz, script, flags, files
):
    common = (script, "--ood", f"npz:{other_npz}", "digits", "--cache-dir", "cache", *flags,
              "--scores", "s.csv", "--seed", 3, "--data-mode", "ssl")
    first = evaluate(*common)
    scores = (tmp_path / "s.csv").read_bytes()
    kept = {f: f.read_bytes() for f in (tmp_path / "cache").rglob("*.npy")}
    assert len(kept) == files
    assert "cache" not in first.stderr
    second = evaluate(*common)
    assert second.stdout == first.stdout
    assert second.stderr.count(": from the cache") == files
    assert f"features of npz:{tiny_npz}: from the cache" in second.stderr
    assert (tmp_path / "s.csv").read_bytes() == scores
    assert kept == {f: f.read_bytes() for f in (tmp_path / "cache").rglob("*.npy")}
    records = [r | TIMES for r in consistent(result_files(script, tmp_path / "eval_results"))]
    half = len(records) // 2
    assert records[:half] == records[half:]
    assert {(r["seed"], r["data_mode"], r["precision"]) for r in records} == {(3, "ssl", "fp32")}
    assert records[0]["images"]["in"] == records[-1]["images"]["in"]
    assert records[0]["images"]["ood"] != records[half - 1]["images"]["ood"]
    assert records[0]["batch_size"] == features.default_batch_size(utils.device())


@pytest.mark.parametrize(
    ("script", "flags", "plot"), [("eval_ssd.py", ["--export", "e.npz"], ["--plot"]), (*SSDK, [])])
def test_an_evaluation_from_a_feature_store_is_that_from_memory(
    evaluate, tmp_path, other_npz, script, flags, plot
):
    common = (script, "--ood", f"npz:{other_npz}", *flags, "--scores", "s.csv")

    def files():
        made = [tmp_path / "s.csv", *tmp_path.glob("e.npz"), *tmp_path.rglob("*.png")]
        return {path: path.read_bytes() for path in made}

    in_memory = evaluate(*common, *plot)
    expected = files()
    in_file = evaluate(*common, *plot, "--feature-store", "store")
    assert in_file.stdout == in_memory.stdout
    assert files() == expected
    again = evaluate(*common, "--feature-store", "store")
    assert ": from the cache" in again.stderr
    assert files() == expected


def test_features_that_cannot_be_kept_do_not_stop_the_evaluation(evaluate, tmp_path, other_npz):
    (tmp_path / "file").write_text("in the way")
    done = evaluate("eval_ssd.py", "--ood", f"npz:{other_npz}", "--cache-dir", "file/cache")
    assert done.stderr.count("cannot be written") == 1
    assert len(consistent(result_files("eval_ssd.py", tmp_path / "eval_results"))) == 1


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [(["--feature-store", "file/s"], 2, "--feature-store file/s cannot be written to"),
     (["--feature-store", "s", "--cache-dir", "s"], 2, "--cache-dir and --feature-store"),
     (["--feature-store", "s"], 1, "cannot be written (File too large)")],
)
def test_a_store_that_cannot_be_or_fills_the_disk_is_one_line(
    call, trained, tmp_path, other_npz, flags, status, words
):
    (tmp_path / "file").write_text("in the way")
    with full_disk(20_000):
        done = call("eval_ssd.py", "--ckpt", trained, "--ood", f"npz:{other_npz}", *flags,
                    cwd=tmp_path)
    assert (done.returncode, done.stdout) == (status, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("eval_ssd.py: error: ")
    assert words in line


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.usefixtures("terminal")
def test_a_killed_evaluation_leaves_whole_records_and_features(
    evaluate, trained, tmp_path, other_npz, number
):
    common = ("--ood", f"npz:{other_npz}", "--cache-dir", "cache", "--batch-size", "32")
    base = result_files("eval_ssd.py", tmp_path / "eval_results")
    process = subprocess.Popen(
        [sys.executable, ROOT / "eval_ssd.py", "--ckpt", trained, *common[:2], "gaussian",
         *common[2:]], cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True)  # "gaussian" takes seconds
    while process.poll() is None and not read_records(base.with_suffix(".jsonl")):
        time.sleep(0.01)
    process.send_signal(number)
    _, error = process.communicate()
    assert process.returncode == (143 if number == signal.SIGTERM else -number), error
    assert error.endswith("error: ended by SIGTERM\n" if number == signal.SIGTERM else "")
    (record,) = consistent(base)
    again = evaluate("eval_ssd.py", *common)
    assert again.stderr.count(": from the cache") == 3  # training and test images, the first set
    assert consistent(base)[-1] | TIMES == record | TIMES


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "processes", "flags"),
    [(SSD[0], 3, [*SSD[1], "--data-mode", "ssl"]), (SSDK[0], 2, [*SSDK[1], "--feature-store", "s"])]
)
def test_many_processes_record_what_one_records(
    command, trained, tmp_path, other_npz, script, processes, flags
):
    flags = ("--ckpt", trained, "--ood", f"npz:{other_npz}", "--batch-size", 5, *flags)
    one = command(script, *flags, "--scores", "one.csv", "--results-dir", "one", cwd=tmp_path,
                  env=environment())  # sums of more threads have other last digits
    assert one.returncode == 0, one.stderr
    many = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
         str(processes), ROOT / script, *map(str, flags), "--scores", "many.csv", "--results-dir",
         "many"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False,
    )
    assert many.returncode == 0, many.stderr
    expected, found = (consistent(result_files(script, tmp_path / n)) for n in ("one", "many"))
    assert [r | TIMES for r in found] == [r | TIMES for r in expected]
    assert (tmp_path / "many.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()
    assert [line for line in many.stdout.splitlines() if line.startswith("In-data")] == lines(
        result_files(script, tmp_path / "many").with_suffix(".txt"))
