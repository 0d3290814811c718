"""The benchmarks: their arithmetic, their tables, and the smallest run of each."""

import json
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import bench_step
import common
import costs
import numpy as np
import pytest
import scaling
import table
import torch
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

import detection
import features
from infra import distributed
from trainers import Speed
from utils import RunError, UserError

FACTS = {"cpu": "A processor", "cores": 4, "torch_threads": 2, "device": "cpu",
         "versions": {"torch": "2.15.0"}, "time": "2026-01-02T03:04:05Z"}
PAGE = ROOT / "docs/costs.md"


@pytest.fixture(autouse=True)
def settings():
    """What a benchmark sets for its own process stays in its test."""
    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn.benchmark
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = cudnn


@pytest.fixture
def in_this_process(monkeypatch):
    """What is measured in processes of its own is measured in this one."""
    monkeypatch.setattr(common, "in_own_process", lambda part, *args, **_: part(*args))


def test_candidates_take_turns_and_warm_up_turns_are_not_counted():
    calls = []
    functions = {"a": lambda: calls.extend("a"), "b": lambda: calls.extend("bb")}
    seconds = common.interleaved(functions, repeats=2, warmup=1, device="cpu",
                                 clock=lambda: len(calls))
    assert "".join(calls) == "abbabbabb"
    assert seconds == {"a": [1, 1], "b": [2, 2]}
    assert common.medians({"a": [5, 1, 2]}) == {"a": 2}


def test_the_yardstick_counts_two_operations_for_a_multiply_add(monkeypatch):
    monkeypatch.setitem(common.MATMUL_SIDE, "cpu", 10)
    call, flop = common.products("cpu", torch.float32, count=3)
    with FlopCounterMode(display=False) as counter:
        call()
    assert flop == counter.get_total_flops() == 3 * 2 * 10**3


@pytest.mark.parametrize(("arch", "gflop"), [("resnet18", 3.3), ("resnet50", 7.8)])
def test_a_training_step_costs_three_forward_passes_of_each_view(arch, gflop):
    assert bench_step.flop_per_view(arch, 32) / 1e9 == pytest.approx(gflop, abs=0.05)


def test_the_longest_gap_is_that_in_which_no_kernel_of_several_streams_ran():
    spans = [(10, 20), (0, 4), (1, 12), (27, 30), (21, 22)]
    longest, busy = bench_step.gaps(spans)
    assert longest == 5
    assert busy == pytest.approx(1 - (1 + 5) / 30)
    assert bench_step.gaps([(3, 5)]) == (0, 1)


def test_a_step_is_timed_with_the_flags_of_train_py_beside_the_one_without():
    given = {"fast": False, "precision": "bf16", "channels_last": None, "compile": None}
    plain, device = Speed(), torch.device("cpu")
    assert bench_step.variants(SimpleNamespace(**given), device) == {
        "plain": plain, "ours": plain, "ours, bf16": Speed("bf16")}
    given |= {"fast": True, "precision": None, "channels_last": False}
    assert bench_step.variants(SimpleNamespace(**given), torch.device("cuda"))[
        "ours, bf16 compile"] == Speed("bf16", False, True)
    given |= {"compile": False, "precision": "fp32"}
    assert set(bench_step.variants(SimpleNamespace(**given), device)) == {"plain", "ours"}


def test_a_record_that_could_not_be_read_back_is_not_written(tmp_path):
    path = tmp_path / "x.json"
    common.write_record("x", {"rate": 1.5}, path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        common.write_record("x", {"rate": math.nan}, path)
    assert json.loads(path.read_text()) == {"rate": 1.5}
    assert list(tmp_path.iterdir()) == [path]


def test_facts_say_what_ran_where():
    facts = common.facts("cpu")
    assert set(facts) == set(FACTS)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["torch_threads"] >= 1
    assert facts["cpu"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", facts["time"])


def test_processes_of_their_own_are_a_group():
    assert common.in_own_process(distributed.all_gather_object, "here", threads=1, processes=2) == [
        "here", "here"]


# --- the table ------------------------------------------------------------------------------------

RECORDS = {
    "bench_step": {"facts": FACTS, "table": [common.row("a step", "views/s", 1000, 2500, 5000.4)]},
    "a_later_one": {"facts": FACTS | {"gpu": "A card"},
                    "table": [common.row("a fit", "s", 10.0, 0.25)]},
}
TABLE = """\
| measured | unit | plain | ours | times as fast | products alone |
| --- | --- | ---: | ---: | ---: | ---: |
| a step | views/s | 1,000 | 2,500 | 2.5 | 5,000 |
| a fit | s | 10.0 | 0.250 | 40.0 |  |

bench_step: A processor, 4 cores, 2 used by torch; torch 2.15.0; 2026-01-02.
a_later_one: A card, A processor, 4 cores, 2 used by torch; torch 2.15.0; 2026-01-02."""
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


def test_a_table_of_all_rows_and_machines_is_put_between_its_markers(call, tmp_path):
    for name, record in (RECORDS | {"costs": {"results": []}}).items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    page = tmp_path / "costs.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nbetween\n<!-- scaling: begin -->\nafter\n")
    arguments = ("table.py", "--records", tmp_path)
    done = call(*arguments, "--check", page, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, f"table.py: error: {page} holds another table; "
                                                 f"benchmarks/table.py --write {page}\n")
    for option in ("--write", "--check"):
        done = call(*arguments, option, page, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (0, f"{TABLE}\n")
        assert page.read_text() == (f"before\n{BEGIN}\n{TABLE}\n{END}\nbetween\n"
                                    "<!-- scaling: begin -->\nafter\n")


@pytest.mark.parametrize("text", ["", BEGIN, END + BEGIN, BEGIN + END + END])
def test_a_file_without_its_two_markers_is_refused(text, tmp_path):
    page = tmp_path / "costs.md"
    page.write_text(text)
    with pytest.raises(UserError, match=r"one line .* and one line .* after it are needed"):
        table.put(page, "new")
    assert page.read_text() == text


def test_the_tables_of_the_page_on_costs_are_what_the_records_give(command, tmp_path):
    done = command("benchmarks/table.py", "--check", PAGE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((common.RECORDS / "scaling.json").read_text())
    table.put(PAGE, scaling.tables(record), "scaling", check=True)
    record["training"]["ratio"] = 9.99
    with pytest.raises(RunError, match="holds another table"):
        table.put(PAGE, scaling.tables(record), "scaling", check=True)


# --- the programs ---------------------------------------------------------------------------------

SMALLEST = {
    "bench_step.py": ("--arch", "resnet18", "--size", 8, "--batch-size", 4, "--steps", 1,
                      "--repeats", 1, "--warmup", 0, "--channels-last", "--profile"),
    "bench_augment.py": ("--size", 8, "--source", 10, "--batch-size", 4, "--repeats", 1,
                         "--warmup", 0),
    "bench_extract.py": ("--quick", "--images", 2, "--repeats", 1),
    "bench_detection.py": ("--quick", "--rows", 99, "--dims", 6, "--scored", 20, "--sets", 2,
                           "--repeats", 1),
}
ROWS = {"bench_step.py": (2, "views/s"), "bench_augment.py": (1, "views/s"),
        "bench_extract.py": (2, "images/s"), "bench_detection.py": (6, "s")}


@pytest.mark.parametrize("script", SMALLEST)
def test_a_benchmark_writes_a_record_of_the_same_form_as_the_one_that_is_kept(
    script, call, tmp_path
):
    path = tmp_path / "record.json"
    done = call(script, *SMALLEST[script], "--record", path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"written: {path}" in done.stdout
    record, kept = json.loads(path.read_text()), json.loads(
        (common.RECORDS / script).with_suffix(".json").read_text())
    assert set(record) - {"profile"} == set(kept)
    assert set(record["settings"]) == set(kept["settings"])
    assert record["settings"]["repeats"] == 1
    assert record["facts"]["versions"]["torch"] == torch.__version__
    count, unit = ROWS[script]
    assert [row["unit"] for row in record["table"]] == [unit] * count
    for row in record["table"]:
        assert set(row) == set(kept["table"][0])
        assert min(row["plain"], row["ours"]) > 0
    if script == "bench_step.py":
        assert set(record["results"]) == {"plain", "ours", "ours, channels-last"}
        assert set(record["results"]["ours"]) == set(kept["results"]["ours"])
        shares = [share for _, share, _ in record["profile"]["most_expensive"]]
        assert len(shares) == 10
        assert shares == sorted(shares, reverse=True)
    if script == "bench_extract.py":
        assert set(record["images_per_s"]) == set(kept["images_per_s"])
        assert record["difference"] < 1e-5
    if script == "bench_detection.py":
        assert max(case.get("difference", 0) for case in record["cases"]) < 1e-6
        assert [set(case) for case in record["cases"]] == [set(case) for case in kept["cases"]]


@pytest.mark.parametrize(("kind", "clusters", "fits"), [("SSD", 1, 1), ("SSD", 3, 3),
                                                        ("SSDk", 1, 3)])
def test_each_training_feature_is_fitted_once_whatever_the_number_of_outlier_sets(
    kind, clusters, fits, monkeypatch
):
    monkeypatch.setattr(costs, "SCORED", 20)
    monkeypatch.setattr(costs, "KNOWN", 10)
    before = detection.Gaussian.__dict__["fit"]
    found = costs.part_detection(60, 4, 2, kind, clusters)
    assert (found["fits"], found["rows_fitted"]) == (fits, 60)
    assert 0 < found["seconds_of_the_fit"] <= found["seconds"]
    assert detection.Gaussian.__dict__["fit"] is before


@pytest.mark.usefixtures("in_this_process")
def test_the_costs_are_written_as_the_record_that_is_kept(call, monkeypatch, tmp_path):
    monkeypatch.setattr(costs, "IMAGES", (3,))
    monkeypatch.setattr(costs, "SCORED", 20)
    monkeypatch.setattr(costs, "KNOWN", 10)
    path = tmp_path / "costs.json"
    done = call("costs.py", "--rows", 90, "--dims", 4, "--record", path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("each training feature fitted 1 time(s)") == len(costs.CASES)
    record, kept = json.loads(path.read_text()), json.loads(
        (common.RECORDS / "costs.json").read_text())
    assert set(record) == set(kept)
    assert {tuple(sorted(r)) for r in record["results"]} == {
        tuple(sorted(r)) for r in kept["results"]}


# --- how cost grows -------------------------------------------------------------------------------


def test_a_single_gpu_sends_nothing_and_is_busy_with_its_products():
    step = scaling.estimate(512, 1, draws=1e-3, uniform=3e-4, parameters=28e6, flop_per_view=7.8e9)
    assert step["step"] == step["products"] == 1024 * 7.8e9 / scaling.RATE
    assert step["gather_bytes"] == step["gradient_bytes"] == step["exposed"] == 0


@pytest.mark.parametrize(("gpus", "speed"), [(8, 450e9), (64, 50e9)])
def test_outputs_go_thrice_and_gradients_twice_round_a_ring_of_gpus(gpus, speed):
    step = scaling.estimate(32768, gpus, draws=0, uniform=0, parameters=28e6, flop_per_view=7.8e9)
    share = (gpus - 1) / gpus
    assert step["gather_bytes"] == pytest.approx(3 * share * 65536 * 128 * 4, rel=1e-12)
    assert step["gradient_bytes"] == pytest.approx(2 * share * 28e6 * 4, rel=1e-12)
    latencies = 2 * scaling.LATENCY
    assert step["gather"] == pytest.approx(step["gather_bytes"] / speed + latencies, rel=1e-12)
    assert step["exposed"] == 0
    assert step["step"] == step["products"] + step["gather"]


def test_gradients_that_outlast_the_backward_pass_and_a_slow_host_are_waited_for():
    step = scaling.estimate(512, 64, draws=0, uniform=0, parameters=28e6, flop_per_view=7.8e9)
    assert step["exposed"] == step["gradients"] - 2 / 3 * step["products"] > 0
    slow = scaling.estimate(512, 64, draws=16.75, uniform=0.75, parameters=28e6,
                            flop_per_view=7.8e9)
    assert slow["step"] == slow["host"] == 1 + scaling.LAUNCHES


def test_detection_is_measured_on_files_as_a_feature_store_has_them(tmp_path):
    path = tmp_path / "x.npy"
    scaling.write_features(path, 5000, 4, seed=0)  # more than a chunk
    stored = features.DiskFeatures(path)
    assert stored.shape == (5000, 4)
    assert np.array_equal(stored[4990:5000].numpy(), np.load(path)[4990:])
    assert abs(float(stored[4096:5000].mean())) < 0.1
    assert float(stored[4096:5000].std()) == pytest.approx(1, abs=0.1)


def test_training_is_measured_in_one_process_and_in_two_with_all_cores_each_time(monkeypatch):
    asked = []

    def measured(part, *args, threads, processes):
        asked.append((part, threads, processes))
        return [1.0, 4.0, 2.0] if processes == 1 else [5.0, 0.5]

    monkeypatch.setattr(common, "in_own_process", measured)
    monkeypatch.setattr(common, "usable_cores", lambda: 4)
    found = scaling.measure_training(turns=2, steps=3)
    assert asked == 2 * [(scaling.part_training, 4, 1), (scaling.part_training, 2, 2)]
    assert found["views_per_s"] == {"1": 2 * scaling.BATCH / 2, "2": 2 * scaling.BATCH / 2.75}
    assert found["ratio"] == 2 / 2.75


@pytest.mark.usefixtures("in_this_process")
def test_how_cost_grows_is_measured_and_put_on_the_page(call, monkeypatch, tmp_path):
    small = {"SETS": {"test": 600, "ood": 600}, "DIMS": 8, "BATCH": 2, "BATCHES": (2, 4, 8),
             "QUICK": {"rows": (700,), "turns": 1, "steps": 1, "draws": 1}}
    monkeypatch.setattr(bench_step, "flop_per_view", lambda arch, size: 7.8e9)
    for name, value in small.items():
        monkeypatch.setattr(scaling, name, value)
    path, page = tmp_path / "scaling.json", tmp_path / "costs.md"
    page.write_text(f"{BEGIN}\n{END}\n<!-- scaling: begin -->\nold\n<!-- scaling: end -->\n")
    done = call("scaling.py", "--quick", "--record", path, "--write", page, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record, kept = json.loads(path.read_text()), json.loads(
        (common.RECORDS / "scaling.json").read_text())
    assert set(record) == set(kept)
    assert [set(record[key][0]) for key in ("detection", "draws")] == [
        set(kept[key][0]) for key in ("detection", "draws")]
    for found in record["detection"]:
        assert found["n"] == 700
        assert 0 <= found["seconds_of_the_fit"] <= found["seconds"]
        assert 0 <= found["grew_by_mib"] < found["peak_mib"]
    assert page.read_text() == (f"{BEGIN}\n{END}\n<!-- scaling: begin -->\n"
                                f"{scaling.tables(record)}\n<!-- scaling: end -->\n")


# --- all of it on a machine with a GPU ------------------------------------------------------------


@pytest.mark.slow
def test_the_steps_for_a_gpu_run_on_digits_and_go_on_where_time_was_over(tmp_path):
    left_out = ("tests", "bench_step_resnet18", "bench_step_resnet50", "supcon18", "simclr50",
                "precision")  # the same programs once more: their records say that they are done
    for name in left_out:
        (tmp_path / f"{name}.json").write_text("{}")

    def run(*arguments, **environment):
        clean = os.environ | {"PYTHON": sys.executable, "RESULTS": str(tmp_path)} | environment
        clean |= {"OMP_NUM_THREADS": "1"}
        return subprocess.run([ROOT / "benchmarks/gpu_evidence.sh", *arguments], env=clean,
                              capture_output=True, text=True, check=False, cwd=tmp_path)

    done = run("--smoke", LIMIT="1")
    assert done.returncode == 75, done.stderr
    assert "before the end of bench_detection; the same command goes on" in done.stdout
    assert {path.stem for path in tmp_path.iterdir()} == {*left_out}
    done = run("--smoke")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "bench_detection.json").read_text())["settings"]["rows"] == 99
    record = json.loads((tmp_path / "simclr18.json").read_text())
    assert record["command"].endswith("--only simclr18 simclr18_m10 simclr18_k1 simclr18_k5")
    assert "evaluate simclr18_k5, seed 1: done" in record["output"]
    assert "SSDk, k = 5" in (tmp_path / "gpu_smoke/table.md").read_text()
    trained = tmp_path.glob("networks/*/latest_exp/checkpoint/checkpoint.pth.tar")
    assert len(list(trained)) == 1
    assert [name for name in left_out if f"== {name}:" in done.stdout] == []
    for wrong in ((), ("nowhere",), ("--smoke", "more")):
        done = run(*wrong)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert "expected a folder of image sets or --smoke" in done.stderr
