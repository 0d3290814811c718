"""Many processes: exactly what one computes, one voice, and an end together."""

import os
import re
import subprocess
import sys

import pytest
import ranks
import torch
from conftest import ROOT, environment

import utils
from infra import distributed

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{world size: {case: {name: tensor}}} of 1, 2 and 3 processes, see ranks.py."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks.main(folder)
    for world in (2, 3):
        done = subprocess.run(
            [sys.executable, *TORCHRUN, str(world), str(ROOT / "tests/ranks.py"), str(folder)],
            env=environment(), capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
    return {world: torch.load(folder / f"{world}.pt", weights_only=True) for world in (1, 2, 3)}


def relative_error(ours, expected):
    """Of a tensor: the largest error against its largest value, or as it is where that is 0."""
    return float((ours - expected).abs().max()) / (float(expected.abs().max()) or 1)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("case", ["SimCLR, frozen", "SupCon, plain", "SupCE, plain"])
def test_losses_and_final_weights_are_those_of_one_process(results, world, case):
    ours, expected = results[world][case], results[1][case]
    assert len(ours["losses"]) == ranks.STEPS * ranks.EPOCHS
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        assert relative_error(value, expected[name]) < 1e-6, name


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("loss", ["SimCLR", "SupCon"])
@pytest.mark.parametrize("n", [2, 11])
def test_gathered_loss_and_gradient_are_those_of_one_process(results, world, loss, n):
    ours, expected = (results[w][f"contrast of {n}, {loss}"] for w in (world, 1))
    assert expected["gradient"].shape == (n, 2, 16)
    for name in ("loss", "gradient"):
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-10, atol=1e-14)


def test_a_run_of_two_processes_goes_on_with_three_as_if_nothing_had_been(results):
    ours, expected = results[3]["SimCLR, frozen, resumed"], results[1]["SimCLR, frozen"]
    done = ranks.BROKEN_AT[0] * ranks.STEPS + ranks.BROKEN_AT[1]
    torch.testing.assert_close(ours["losses"], expected["losses"][done:], rtol=1e-6, atol=0)
    torch.testing.assert_close(ours["means"], expected["means"][1:], rtol=1e-6, atol=0)
    for name in expected.keys() - {"losses", "means"}:
        assert relative_error(ours[name], expected[name]) < 1e-6, name


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("mode", ["SimCLR", "SupCE"])
def test_processes_validate_together_and_measure_the_network_of_rank_0(results, world, mode):
    ours, expected = (results[w][f"monitor of {mode}"] for w in (world, 1))
    assert 0 < expected["score"] < 1
    assert ours["score"] == expected["score"]
    assert torch.equal(ours["statistics"], torch.zeros(64))


@pytest.mark.parametrize("n", [0, 1, 2, 3, 10, 11, 512])
@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shards_are_a_partition_and_differ_by_one_at_most(n, world):
    shards = [distributed._shard(n, rank, world) for rank in range(world)]
    assert [i for s in shards for i in range(n)[s]] == list(range(n))
    sizes = [s.stop - s.start for s in shards]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)  # rank 0 has an image whenever there is one


def test_a_single_process_needs_no_group():
    x = torch.arange(6.0).view(3, 2)
    assert distributed.gather(x, 3) is x
    assert torch.equal(distributed.all_reduce_sum(x), x)
    assert distributed.all_reduce_sum(x) is not x
    assert distributed.broadcast_object("a") == "a"
    distributed.check_same({"a": 1})
    flag = distributed.SharedFlag()
    assert [flag.poll(v) for v in (0, 15, 0)] == [0, 15, 0]
    assert flag.sync(10) == 10
    distributed.barrier()


def test_batch_norm_is_synchronised_on_gpus_only():
    with pytest.raises(utils.UserError, match="--sync-bn needs GPUs"):
        distributed.sync_batch_norm(torch.nn.BatchNorm2d(3))


def test_several_gpus_replace_the_command_by_torchrun_with_all_its_words(monkeypatch):
    started = []
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(sys, "argv", ["train.py", "--exp-name", "a b", "--warmup"])
    monkeypatch.setattr(os, "execvp", lambda file, words: started.append((file, words)))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    distributed.start()
    assert started == [(sys.executable, [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4",
        "train.py", "--exp-name", "a b", "--warmup"])]
    assert "SIGUSR1" in os.environ["PET_SIGNALS_TO_HANDLE"]


# --- the command ----------------------------------------------------------------------------------


def test_what_is_wrong_everywhere_is_said_by_the_main_process(tmp_path, tiny_npz):
    done = subprocess.run(
        [sys.executable, *TORCHRUN, "2", ROOT / "train.py", "--dataset", f"npz:{tiny_npz}",
         "--training-mode", "SupCE", "--size", "8", "--batch-size", "5"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 1  # torchrun's, whatever its processes say
    lines = re.findall(r"train\.py: error: .*", done.stderr)
    assert "leaves a step of 1 image of 48 for one of 2 processes" in lines[0]
    assert len(lines) == 1 or "process 1 of 2" in "".join(lines)  # it was 5 s ahead of the main one


def test_processes_with_other_settings_are_refused_by_the_flag(tmp_path):
    code = ("import os, sys; sys.path.insert(0, sys.argv[1])\n"
            "from infra import distributed, program\n"
            "def main():\n    distributed.start()\n"
            "    distributed.check_same({'--momentum': 0.9 - 0.1 * distributed.rank()})\n"
            "program.run(main)\n")
    (tmp_path / "same.py").write_text(code)
    done = subprocess.run([sys.executable, *TORCHRUN, "2", tmp_path / "same.py", ROOT],
                          env=environment(), capture_output=True, text=True, check=False)
    errors = re.findall(r"same\.py: error: .*", done.stderr)
    assert len(errors) == 1
    assert "--momentum is 0.9 in process 0" in errors[0]
    assert "and 0.8 in process 1" in errors[0]


@pytest.mark.slow
def test_processes_that_do_not_find_each_other_are_one_line(tmp_path, tiny_npz):
    meeting = dict(RANK=1, WORLD_SIZE=2, LOCAL_RANK=0, MASTER_ADDR="localhost", MASTER_PORT=9)
    done = subprocess.run(
        [sys.executable, "-c", "import datetime, sys; sys.argv[0] = 'train.py'\n"
         "from infra import distributed, program\n"
         "distributed.COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=2)\n"
         "program.run(distributed.start)"],
        cwd=ROOT, env=environment(**meeting), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("train.py: error: ")]
    assert len(lines) == 1, done.stderr
    assert "the 2 processes did not find each other at localhost:9" in lines[0]
