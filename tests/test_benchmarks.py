"""The benchmarks: their arithmetic, their table, and the smallest run of each that is quick."""

import json
import math
import re
import time

import bench_step
import common
import numpy as np
import pytest
import scaling
import table
import torch
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

import features
import utils

FACTS = {"cpu": "A processor", "cores": 4, "torch_threads": 2, "device": "cpu",
         "versions": {"torch": "2.15.0"}, "time": "2026-01-02T03:04:05Z"}


def test_candidates_take_turns_and_warm_up_turns_are_not_counted():
    calls = []
    functions = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = common.interleaved(functions, repeats=2, warmup=1, device="cpu")
    assert "".join(calls) == "ababab"
    assert [len(s) for s in seconds.values()] == [2, 2]


def test_the_median_of_the_calls_is_returned_with_all_of_them():
    pauses = iter([0.0, 0.03, 0.0, 0.0])  # the first is warm-up
    median, seconds = common.median_seconds(lambda: time.sleep(next(pauses)), 3, 1, "cpu")
    assert seconds[0] >= 0.03
    assert median == sorted(seconds)[1]


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


def test_a_record_that_could_not_be_read_back_is_not_written(tmp_path):
    path = tmp_path / "x.json"
    common.write_record("x", {"rate": 1.5}, path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        common.write_record("x", {"rate": math.nan}, path)
    assert json.loads(path.read_text()) == {"rate": 1.5}
    assert list(tmp_path.iterdir()) == [path]


def test_facts_say_what_ran_where():
    facts = common.facts("cpu")
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["torch_threads"] >= 1
    assert facts["cpu"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", facts["time"])


# --- the table ------------------------------------------------------------------------------------

RECORDS = {
    "bench_step": {"facts": FACTS, "table": [common.row("a step", "views/s", 1000, 2500, 5000.4)]},
    "bench_other": {"facts": FACTS | {"gpu": "A card"},
                    "table": [common.row("a fit", "s", 10.0, 0.25)]},
}
TABLE = """\
| measured | unit | plain | ours | times as fast | products alone |
| --- | --- | ---: | ---: | ---: | ---: |
| a step | views/s | 1,000 | 2,500 | 2.5 | 5,000 |
| a fit | s | 10.0 | 0.250 | 40.0 |  |

bench_step: A processor, 4 cores, 2 used by torch; torch 2.15.0; 2026-01-02.
bench_other: A card, A processor, 4 cores, 2 used by torch; torch 2.15.0; 2026-01-02."""


@pytest.fixture
def records(tmp_path):
    for name, record in (RECORDS | {"costs": {"results": []}}).items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    return tmp_path


def test_the_table_has_a_row_for_each_of_the_records_rows_and_says_where_they_come_from(records):
    assert table.table(table.read_records(records)) == TABLE


def test_the_table_is_put_between_its_markers_and_nothing_else_changes():
    text = f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n"
    assert table.put(text, "new") == f"before\n{table.BEGIN}\nnew\n{table.END}\nafter\n"


@pytest.mark.parametrize("text", ["", table.BEGIN, table.END + table.BEGIN,
                                  table.BEGIN + table.END + table.END])
def test_a_file_without_its_two_markers_is_refused(text):
    with pytest.raises(utils.UserError, match=r"one line .* and one line .* after it are needed"):
        table.put(text, "new")


def test_check_tells_a_table_that_the_records_do_not_give(records, command):
    file = records / "README.md"
    file.write_text(f"{table.BEGIN}\n{TABLE}\n{table.END}\n")
    arguments = ("benchmarks/table.py", "--records", records)
    assert command(*arguments, "--check", file, cwd=records).returncode == 0
    file.write_text(file.read_text().replace("2,500", "9,999"))
    done = command(*arguments, "--check", file, cwd=records)
    assert (done.returncode, done.stderr) == (1, f"table.py: error: {file} holds another table; "
                                                 f"benchmarks/table.py --write {file}\n")
    assert command(*arguments, "--write", file, cwd=records).returncode == 0
    assert file.read_text() == f"{table.BEGIN}\n{TABLE}\n{table.END}\n"


def test_the_table_of_the_readme_is_what_the_records_give(command, tmp_path):
    done = command("benchmarks/table.py", "--check", ROOT / "README.md", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


# --- the programs ---------------------------------------------------------------------------------

SMALLEST = {
    "bench_step.py": ("--arch", "resnet18", "--size", 8, "--batch-size", 4, "--steps", 1,
                      "--repeats", 1, "--warmup", 0, "--channels-last", "--profile"),
    "bench_augment.py": ("--size", 8, "--source", 10, "--batch-size", 4, "--repeats", 1,
                         "--warmup", 0),
}


@pytest.mark.parametrize("script", SMALLEST)
def test_a_benchmark_writes_a_record_with_its_rows_and_the_facts_of_the_machine(
    script, command, tmp_path
):
    path = tmp_path / "record.json"
    done = command(f"benchmarks/{script}", *SMALLEST[script], "--record", path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"written: {path}" in done.stdout
    record = json.loads(path.read_text())
    assert record["facts"]["versions"]["torch"] == torch.__version__
    assert record["settings"]["batch_size"] == 4
    assert len(record["table"]) == (2 if script == "bench_step.py" else 1)
    for row in record["table"]:
        assert row["unit"] == "views/s"
        assert row["plain"] > 0
        assert row["ours"] > 0
    if script == "bench_step.py":
        assert set(record["results"]) == {"plain", "ours", "ours, channels-last"}
        shares = [share for _, share, _ in record["profile"]["most_expensive"]]
        assert len(shares) == 10
        assert shares == sorted(shares, reverse=True)


# --- how cost grows -------------------------------------------------------------------------------


def test_a_single_gpu_sends_nothing_and_is_busy_with_its_products():
    step = scaling.reckon(512, 1, draws=1e-3, uniform=3e-4, parameters=28e6, flop_per_view=7.8e9)
    assert step["step"] == step["products"] == 1024 * 7.8e9 / scaling.RATE
    assert step["gather_bytes"] == step["gradient_bytes"] == step["exposed"] == 0


@pytest.mark.parametrize(("gpus", "speed"), [(8, 450e9), (64, 50e9)])
def test_outputs_go_thrice_and_gradients_twice_round_a_ring_of_gpus(gpus, speed):
    step = scaling.reckon(32768, gpus, draws=0, uniform=0, parameters=28e6, flop_per_view=7.8e9)
    share = (gpus - 1) / gpus
    assert step["gather_bytes"] == pytest.approx(3 * share * 65536 * 128 * 4, rel=1e-12)
    assert step["gradient_bytes"] == pytest.approx(2 * share * 28e6 * 4, rel=1e-12)
    latencies = 2 * scaling.LATENCY
    assert step["gather"] == pytest.approx(step["gather_bytes"] / speed + latencies, rel=1e-12)
    assert step["exposed"] == 0
    assert step["step"] == step["products"] + step["gather"]


def test_gradients_that_outlast_the_backward_pass_and_a_slow_host_are_waited_for():
    step = scaling.reckon(512, 64, draws=0, uniform=0, parameters=28e6, flop_per_view=7.8e9)
    assert step["exposed"] == step["gradients"] - 2 / 3 * step["products"] > 0
    slow = scaling.reckon(512, 64, draws=16.75, uniform=0.75, parameters=28e6, flop_per_view=7.8e9)
    assert slow["step"] == slow["host"] == 1 + scaling.LAUNCHES


def test_detection_is_measured_on_files_as_a_feature_store_has_them(monkeypatch, tmp_path):
    path = tmp_path / "x.npy"
    scaling.write_features(path, 5000, 4, seed=0)  # more than a chunk
    stored = features.Stored(path)
    assert stored.shape == (5000, 4)
    assert np.array_equal(stored[4990:5000].numpy(), np.load(path)[4990:])
    monkeypatch.setattr(scaling, "SETS", {"test": 600, "ood": 600})
    monkeypatch.setattr(scaling, "DIMS", 8)
    monkeypatch.setattr(scaling, "KINDS", (("SSDk", 1),))
    [found] = scaling.measure_detection([700])
    assert (found["kind"], found["n"]) == ("SSDk", 700)
    assert 0 <= found["seconds_of_the_fit"] <= found["seconds"]
    assert 0 <= found["grew_by_mib"] < found["peak_mib"]


def test_training_is_measured_in_one_process_and_in_two():
    found = scaling.measure_training(turns=1, steps=1, size=8)
    rates = found["views_per_s"]
    assert set(rates) == {"1", "2"}
    assert found["ratio"] == rates["2"] / rates["1"] > 0


def test_the_tables_of_the_page_on_scaling_are_what_the_record_gives():
    record = json.loads((common.RECORDS / "scaling.json").read_text())
    page = (ROOT / "docs/scaling.md").read_text()
    assert table.put(page, scaling.tables(record)) == page
