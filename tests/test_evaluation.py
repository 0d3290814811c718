"""Results are recorded whole and once, whatever is killed, repeated or run at the same time."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import ROOT, environment

import data
import evaluation
import features
import utils
from evaluation import Records, Report, identity, line_of, read_records

RESULT = {"in": "cifar10", "ood": "cifar100", "clusters": 1, "fpr95": 0.5078,
          "auroc": 0.9063240349999999, "aupr": 0.8919609510086947}
LINE = ("In-data = cifar10, OOD = cifar100, Clusters = 1, FPR95 = 0.5078, "
        "AUROC = 0.9063240349999999, AUPR = 0.8919609510086947")


def record(name="a", **fields):
    return {**RESULT, "id": name, **fields}


def lines(path):
    return path.read_text().splitlines()


def consistent(base):
    """Assert that both files hold the same results, whole lines only; return the records."""
    records = [json.loads(line) for line in lines(base.with_suffix(".jsonl"))]
    assert Counter(map(line_of, records)) == Counter(lines(base.with_suffix(".txt")))
    return records


# --- the two files --------------------------------------------------------------------------------


def test_the_line_of_a_record_is_the_originals():
    assert line_of(record()) == LINE


def test_a_record_is_added_once_and_twice_only_if_asked(tmp_path):
    records = Records(tmp_path / "e")
    assert records.add(record(), again=False)
    assert not records.add(record(), again=False)
    assert not Records(tmp_path / "e").add(record(auroc=0.5), again=False)
    assert lines(tmp_path / "e.txt") == [LINE]
    assert records.add(record(), again=True)
    assert lines(tmp_path / "e.txt") == [LINE, LINE]
    assert len(consistent(tmp_path / "e")) == 2


@pytest.mark.parametrize("length", [1, 40, -2, -1])
def test_a_line_that_a_crash_cut_is_ignored_and_never_joins_the_next(tmp_path, length):
    records = Records(tmp_path / "e")
    records.add(record("a"), again=False)
    whole = (tmp_path / "e.jsonl").read_bytes()
    text = json.dumps(record("b", auroc=0.5)) + "\n"
    (tmp_path / "e.jsonl").write_bytes(whole + text[:length].encode())
    again = Records(tmp_path / "e")
    known = {"a", "b"} if length == -1 else {"a"}  # only the end of its line was lost
    assert again.read().keys() == known
    assert again.add(record("b", auroc=0.5), again=False) == (length != -1)
    again.add(record("c"), again=False)
    assert [r["id"] for r in read_records(tmp_path / "e.jsonl")] == ["a", "b", "c"]
    found = [line_of(r) for r in read_records(tmp_path / "e.jsonl")]
    assert lines(tmp_path / "e.txt") == found


@pytest.mark.parametrize("left", ["", LINE + "\n", LINE + "\n" + LINE[:30], None])
def test_lines_that_a_crash_kept_from_being_written_are_added(tmp_path, left):
    records = Records(tmp_path / "e")
    for name, auroc in (("a", RESULT["auroc"]), ("b", 0.5), ("c", 0.25)):
        records.add(record(name, auroc=auroc), again=False)
    expected = lines(tmp_path / "e.txt")
    if left is None:
        (tmp_path / "e.txt").unlink()
    else:
        (tmp_path / "e.txt").write_text(left)
    Records(tmp_path / "e")
    assert [line for line in lines(tmp_path / "e.txt") if line != LINE[:30]] == expected


def test_lines_of_the_original_and_records_of_others_stay_as_they_are(tmp_path):
    (tmp_path / "e.txt").write_text("a line of the original, without an end")
    (tmp_path / "e.jsonl").write_text('{"other": 1}\n[1]\nnot json\n')
    Records(tmp_path / "e").add(record(), again=False)
    assert lines(tmp_path / "e.txt") == ["a line of the original, without an end", LINE]
    assert lines(tmp_path / "e.jsonl")[:3] == ['{"other": 1}', "[1]", "not json"]


def test_many_programs_write_at_once_and_no_line_is_lost_doubled_or_mixed(tmp_path):
    def write(i):
        return Records(tmp_path / "e").add(record(str(i % 50), auroc=i % 50 / 64), again=False)

    with ThreadPoolExecutor(8) as pool:
        added = list(pool.map(write, range(100)))  # each record twice
    assert sum(added) == 50
    assert {r["id"] for r in consistent(tmp_path / "e")} == {str(i) for i in range(50)}


def test_without_locks_records_are_still_whole(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no locks here")

    monkeypatch.setattr(evaluation.fcntl, "flock", refuse)
    assert Records(tmp_path / "e").add(record(), again=False)
    assert len(consistent(tmp_path / "e")) == 1


def test_a_disk_that_fills_up_leaves_no_part_of_a_record(tmp_path):
    import resource

    records = Records(tmp_path / "e")
    records.add(record("a"), again=False)
    size = (tmp_path / "e.jsonl").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))
    try:
        with pytest.raises(OSError, match="No space"):
            records.add(record("b"), again=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "e.jsonl").stat().st_size == size
    assert records.add(record("b"), again=False)
    assert len(consistent(tmp_path / "e")) == 2


def test_a_set_whose_name_breaks_a_line_has_one_line(tmp_path):
    for _ in range(2):
        Records(tmp_path / "e").add(record(ood="npz:a\nb"), again=False)
    assert len(lines(tmp_path / "e.txt")) == 1


# --- what is the same evaluation ------------------------------------------------------------------


FACTS = {"in": "a", "ood": "b", "clusters": 1, "checkpoint": "net.pth", "sha256": "1f",
         "size": 32, "normalize": True, "seed": 1, "data_mode": "base", "precision": "fp32",
         "batch_size": 32, "images": {"train": "2", "in": "3", "ood": "4"},
         "versions": {"torch": "2.4"}}


@pytest.mark.parametrize("key", [k for k in FACTS if k != "checkpoint"])
def test_an_evaluation_is_another_one_if_anything_that_is_known_before_differs(key):
    assert identity(FACTS) != identity(FACTS | {key: "another"})


def test_an_evaluation_is_the_same_wherever_the_checkpoint_lies():
    assert identity(FACTS) == identity(FACTS | {"checkpoint": "elsewhere.pth"})


def image_sets(*names):
    return [data.ImageSet(n, torch.full((6, 3, 2, 2), i, dtype=torch.uint8), torch.zeros(6).long())
            for i, n in enumerate(names)]


def report(tmp_path, **kwargs):
    (train,) = image_sets("train")
    return Report(tmp_path, "e", "ssd", train=train, seed=1, common={}, **kwargs)


def fill(a_report, test, pairs):
    for ood, m in pairs:
        a_report.add(test, np.arange(6.0), ood, np.arange(6.0) + m, clusters=m, panel="p")


@pytest.mark.parametrize(
    ("done", "left"),
    [([], [("b", [1, 3]), ("c", [1, 3])]), ([(0, 1)], [("b", [3]), ("c", [1, 3])]),
     ([(0, 1), (0, 3), (1, 3)], [("c", [1])]), ([(0, 1), (0, 3), (1, 1), (1, 3)], [])],
)
def test_only_what_is_missing_is_to_do(tmp_path, done, left, capsys):
    test, *outliers = image_sets("a", "b", "c")
    fill(report(tmp_path), test, [(outliers[i], m) for i, m in done])
    capsys.readouterr()
    todo = report(tmp_path).todo(test, outliers, [1, 3, 1])
    assert [(ood.name, clusters) for ood, clusters in todo] == left
    shown = capsys.readouterr()
    assert shown.out.splitlines() == lines(tmp_path / "e_ssd.txt") if done else shown.out == ""
    assert (f"{len(done)} of 4 results stand in" in shown.err) == bool(done)


@pytest.mark.parametrize("kwargs", [{"scores": "s.csv"}, {"plot": True}, {"again": True}], ids=str)
def test_all_is_to_do_where_scores_of_all_are_wanted(tmp_path, monkeypatch, kwargs):
    monkeypatch.chdir(tmp_path)
    test, ood = image_sets("a", "b")
    fill(report(tmp_path), test, [(ood, 1)])
    second = report(tmp_path, **kwargs)
    assert second.todo(test, [ood], [1]) == [(ood, [1])]
    fill(second, test, [(ood, 1)])
    assert len(consistent(tmp_path / "e_ssd")) == (2 if "again" in kwargs else 1)


# --- the programs ---------------------------------------------------------------------------------


@pytest.fixture
def evaluate(command, trained, tmp_path):
    """Function (script, *arguments) -> the finished evaluation of `trained`, in tmp_path."""

    def run(script, *arguments):
        done = command(script, "--ckpt", trained, *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done

    return run


@pytest.mark.parametrize(
    ("script", "flags"),
    [("eval_ssd.py", ["--clusters", 1, 3]), ("eval_ssdk.py", ["--k", 2, "--copies", 2])],
)
def test_a_repeated_evaluation_says_so_and_computes_nothing(
    evaluate, tmp_path, other_npz, script, flags
):
    common = (script, "--ood", f"npz:{other_npz}", "digits", *flags)
    kind = script.removesuffix(".py").removeprefix("eval_")
    base = tmp_path / f"eval_results/temp_eval_ssd_{kind}"
    first = evaluate(*common)
    before = base.with_suffix(".jsonl").read_bytes()
    second = evaluate(*common, "--cache-dir", "cache")
    n = len(consistent(base))
    assert f"{n} of {n} results stand in" in second.stderr
    assert "--again" in second.stderr
    assert not (tmp_path / "cache").exists()  # no features were computed
    assert base.with_suffix(".jsonl").read_bytes() == before
    assert first.stdout.startswith(second.stdout)
    assert second.stdout.splitlines() == lines(base.with_suffix(".txt"))
    evaluate(*common, "--again", "--cache-dir", "cache")
    assert len(consistent(base)) == 2 * n
    assert lines(base.with_suffix(".txt"))[n:] == second.stdout.splitlines()


@pytest.mark.parametrize(
    "change", [["--seed", 1], ["--data-mode", "ssl"], ["--precision", "bf16"]], ids=str
)
def test_an_evaluation_with_another_option_is_recorded(evaluate, tmp_path, other_npz, change):
    common = ("eval_ssd.py", "--ood", f"npz:{other_npz}")
    evaluate(*common)
    evaluate(*common, *change)
    assert len(consistent(tmp_path / "eval_results/temp_eval_ssd_ssd")) == 2


@pytest.mark.parametrize(
    ("script", "flags", "files"),
    [("eval_ssd.py", ["--clusters", 1, 2], 4), ("eval_ssdk.py", ["--k", 2, "--copies", 2], 6)],
)
def test_a_second_evaluation_takes_all_features_from_the_cache(
    evaluate, tmp_path, other_npz, tiny_npz, script, flags, files
):
    common = (script, "--ood", f"npz:{other_npz}", "digits", "--cache-dir", "cache", *flags,
              "--again", "--scores", "s.csv")
    first = evaluate(*common)
    scores = (tmp_path / "s.csv").read_bytes()
    kept = {f: f.read_bytes() for f in (tmp_path / "cache").rglob("*.npy")}
    assert len(kept) == files
    assert "cache" not in first.stderr
    second = evaluate(*common)
    assert second.stdout == first.stdout
    assert (tmp_path / "s.csv").read_bytes() == scores
    assert second.stderr.count(": from the cache") == files
    assert f"features of npz:{tiny_npz}: from the cache" in second.stderr
    assert kept == {f: f.read_bytes() for f in (tmp_path / "cache").rglob("*.npy")}


@pytest.mark.parametrize(
    ("script", "flags"),
    [("eval_ssd.py", ["--clusters", 1, 2, "--plot", "--export", "e.npz"]),
     ("eval_ssdk.py", ["--k", 2, "--copies", 2])],
)
def test_an_evaluation_from_a_feature_store_is_that_from_memory(
    evaluate, tmp_path, other_npz, script, flags
):
    common = (script, "--ood", f"npz:{other_npz}", *flags, "--again", "--scores", "s.csv")
    kind = script.removesuffix(".py").removeprefix("eval_")
    base = tmp_path / f"eval_results/temp_eval_ssd_{kind}"

    def files():
        made = [tmp_path / "s.csv", *tmp_path.glob("e.npz"), *tmp_path.rglob("*.png")]
        return {path: path.read_bytes() for path in made}

    in_memory = evaluate(*common)
    expected = files()
    for said in ("", ": from the cache"):
        in_file = evaluate(*common, "--feature-store", "store")
        assert said in in_file.stderr
        assert in_file.stdout == in_memory.stdout
        assert files() == expected
    records = consistent(base)
    assert len({r["id"] for r in records}) == len(records) / 3


def start(trained, tmp_path, *arguments):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "eval_ssd.py"), "--ckpt", str(trained), *arguments],
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=environment(),
    )


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.usefixtures("terminal")
def test_a_killed_evaluation_goes_on_with_the_sets_that_are_missing(
    command, trained, tmp_path, other_npz, number
):
    other = f"npz:{other_npz}"
    base = tmp_path / "eval_results/temp_eval_ssd_ssd"
    process = start(trained, tmp_path, "--ood", other, "gaussian")  # the second takes seconds
    while process.poll() is None and not read_records(base.with_suffix(".jsonl")):
        time.sleep(0.01)
    process.send_signal(number)
    process.wait()
    assert process.returncode != 0
    assert [r["ood"] for r in read_records(base.with_suffix(".jsonl"))] == [other]
    done = command("eval_ssd.py", "--ckpt", trained, "--ood", other, "gaussian",
                   "--cache-dir", "cache", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [r["ood"] for r in consistent(base)] == [other, "gaussian"]
    assert "1 of 2 results stand in" in done.stderr
    names = sorted(f.name.partition("-")[0] for f in (tmp_path / "cache").rglob("*.npy"))
    assert names == ["gaussian", "npz", "npz"]  # train, test; not the set that was recorded


def test_two_evaluations_of_one_name_at_once_record_each_result_once(
    trained, tmp_path, other_npz
):
    flags = ("--ood", f"npz:{other_npz}", "digits", "--clusters", "1", "2", "--cache-dir", "cache")
    processes = [start(trained, tmp_path, *flags) for _ in range(2)]
    assert [p.wait() for p in processes] == [0, 0]
    found = [(r["ood"], r["clusters"]) for r in
             consistent(tmp_path / "eval_results/temp_eval_ssd_ssd")]
    assert sorted(found) == [("digits", 1), ("digits", 2),
                             (f"npz:{other_npz}", 1), (f"npz:{other_npz}", 2)]
    for path in (tmp_path / "cache").rglob("*"):
        assert path.is_dir() or np.load(path).ndim == 2


def test_a_cache_that_cannot_be_written_to_does_not_stop_the_evaluation(
    evaluate, tmp_path, other_npz
):
    (tmp_path / "file").write_text("in the way")
    done = evaluate("eval_ssd.py", "--ood", f"npz:{other_npz}", "--cache-dir", "file/cache")
    assert done.stderr.count("cannot be written") == 1
    assert len(consistent(tmp_path / "eval_results/temp_eval_ssd_ssd")) == 1


@pytest.mark.parametrize(
    ("script", "processes", "flags"),
    [("eval_ssd.py", n, ["--clusters", 1, 3, "--data-mode", "ssl"]) for n in (1, 2, 3)]
    + [("eval_ssdk.py", 2, ["--k", 2, "--copies", 2, "--feature-store", "store"])],
)
def test_many_processes_record_what_one_records(
    evaluate, trained, tmp_path, other_npz, monkeypatch, script, processes, flags
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # sums of more threads have other last digits
    flags = ("--ood", f"npz:{other_npz}", "--batch-size", 5, *flags)
    kind = script.removesuffix(".py").removeprefix("eval_")
    evaluate(script, *flags, "--scores", "one.csv", "--results-dir", "one")
    many = ("--scores", "many.csv", "--results-dir", "many")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
         str(processes), ROOT / script, "--ckpt", trained, *map(str, (*flags, *many))],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )
    assert done.returncode == 0, done.stderr
    one, many = (consistent(tmp_path / folder / f"temp_eval_ssd_{kind}")
                 for folder in ("one", "many"))
    assert [r | {"time": ""} for r in many] == [r | {"time": ""} for r in one]
    assert (tmp_path / "many.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()
    assert [line for line in done.stdout.splitlines() if line.startswith("In-data")] == lines(
        tmp_path / f"many/temp_eval_ssd_{kind}.txt")


@pytest.mark.parametrize("script", ["eval_ssd.py", "eval_ssdk.py"])
def test_a_bad_checkpoint_of_two_processes_is_one_line(command, tmp_path, script):
    (tmp_path / "bad.pth").write_bytes(b"no network")
    done = command(script, "--ckpt", "bad.pth", cwd=tmp_path,
                   env=environment(PET_NPROC_PER_NODE=2))
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{script}: error: ")
    assert line.endswith("--ckpt bad.pth is not a torch checkpoint, or damaged")


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--feature-store", "file/s"], "--feature-store file/s cannot be written to"),
     (["--feature-store", "s", "--cache-dir", "s"], "--cache-dir and --feature-store")],
)
def test_a_store_that_cannot_be_is_refused_with_one_line(
    command, trained, tmp_path, other_npz, flags, words
):
    (tmp_path / "file").write_text("in the way")
    done = command("eval_ssd.py", "--ckpt", trained, "--ood", f"npz:{other_npz}", *flags,
                   cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert words in line


@pytest.mark.parametrize("processes", [1, 2])
def test_a_store_on_a_full_disk_ends_the_evaluation_with_one_line(
    trained, tmp_path, other_npz, processes
):
    import resource

    done = subprocess.run(
        [sys.executable, str(ROOT / "eval_ssd.py"), "--ckpt", str(trained), "--ood",
         f"npz:{other_npz}", "--feature-store", "store"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env=environment(PET_NPROC_PER_NODE=processes),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("eval_ssd.py: error: ")
    assert "--feature-store: store/" in line
    assert line.endswith("cannot be written (File too large)")


def test_records_say_which_images_were_looked_at(evaluate, tmp_path, other_npz):
    evaluate("eval_ssd.py", "--ood", f"npz:{other_npz}", "digits")
    one, two = consistent(tmp_path / "eval_results/temp_eval_ssd_ssd")
    assert one["images"].keys() == {"train", "in", "ood"}
    assert one["images"]["in"] == two["images"]["in"]
    assert len({*one["images"].values(), *two["images"].values()}) == 4
    assert one["batch_size"] == features.default_batch_size(utils.device())
    assert one["versions"] == utils.versions()
