"""Features go out and come in by a file that numpy reads: the same numbers, nothing wrong in."""

import csv
import io
import json
import os
import re
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT

import data
import detection
from infra import storage
from report import exchange


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def features(n, width=5, seed=0, dtype=np.float32):
    return np.random.default_rng([seed, n]).normal(1, 1, (n, width)).astype(dtype)


SETS = {"train": features(40), "test": features(20, seed=1), "ood_far": features(15, seed=2)}


def content(path):
    with np.load(path, allow_pickle=False) as file:
        return {k: file[k] for k in file.files}


def settings_of(path):
    return json.loads(str(content(path)["settings"]))


@pytest.fixture
def refused(call, tmp_path):
    """Function (*arguments) -> the line of eval_ssd.py that refuses them, in tmp_path."""

    def run(*arguments):
        before = sorted(tmp_path.rglob("*"))
        done = call("eval_ssd.py", *arguments, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert done.stderr.startswith("eval_ssd.py: error: ")
        assert done.stderr.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return done.stderr

    return run


@pytest.fixture
def score(call, tmp_path):
    """Function (arrays, *arguments) -> (records, folder) of eval_ssd.py on a file of them."""

    def run(arrays, *arguments, name="mine.npz"):
        if arrays is not None:
            np.savez(tmp_path / name, **arrays)
        done = call("eval_ssd.py", "--features", name, *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return records(tmp_path / "eval_results/temp_eval_ssd_ssd.jsonl"), tmp_path

    return run


# --- out and in again -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(call, trained, other_npz, tmp_path_factory):
    """An evaluation that wrote its features, and one of those features: their folder."""
    home = tmp_path_factory.mktemp("exported")
    common = ("--clusters", 1, 3, "--seed", 7)
    for arguments in (
        ("--ckpt", trained, "--ood", f"npz:{other_npz}", "digits", "--data-mode", "ssl",
         "--export", "out/x.npz", "--exp-name", "a", "--scores", "a.csv", *common),
        ("--features", "out/x.npz", "--exp-name", "b", "--scores", "b.csv", *common),
    ):
        done = call("eval_ssd.py", *arguments, cwd=home)
        assert done.returncode == 0, done.stderr
    return home


def test_exported_features_give_the_same_lines_and_scores_to_the_last_digit(exported):
    first, second = ((exported / f"eval_results/{n}_ssd.txt").read_text() for n in "ab")
    assert first == second
    assert first.count("\n") == 4
    first, second = (list(csv.reader((exported / f"{n}.csv").open())) for n in "ab")
    assert first == second
    assert len(first) > 100


def test_exported_features_give_the_same_records_and_name_their_file(exported):
    first, second = (records(exported / f"eval_results/{n}_ssd.jsonl") for n in "ab")
    for one, other in zip(first, second, strict=True):
        assert other.pop("features") == "out/x.npz"
        assert other.pop("features_sha256") == storage.file_hash(exported / "out/x.npz")
        assert {**one, "time": 0, "seconds": 0} == {**other, "time": 0, "seconds": 0}
    assert first[0]["data_mode"] == "ssl"


def test_an_export_holds_the_arrays_that_the_documentation_says(exported, tiny_npz, other_npz):
    arrays = content(exported / "out/x.npz")
    other = "ood_npz_other.npz"
    digits = len(data.load("digits", "test", data_dir=".", size=8))
    expected = {"format": ((), "int64"), "train": ((48, 512), "float32"),
                "test": ((32, 512), "float32"), other: ((24, 512), "float32"),
                "ood_digits": ((digits, 512), "float32")}
    for key, n in (("train", 48), ("test", 32), (other, 24), ("ood_digits", digits)):
        expected[f"{key}_labels"] = ((n,), "int64")
        for m in (1, 3):
            if key != "train":
                expected[f"scores_m{m}_{key}"] = ((n,), "float64")
    assert arrays.pop("settings").dtype.kind == "U"
    assert {k: (v.shape, v.dtype.name) for k, v in arrays.items()} == expected
    assert arrays["format"] == 1

    settings = settings_of(exported / "out/x.npz")
    assert settings["in"] == f"npz:{tiny_npz}"
    assert settings["names"] == {other: f"npz:{other_npz}", "ood_digits": "digits"}
    assert settings["class_names"]["train"] == ["0", "1", "2", "3"]
    assert settings["record"]["arch"] == "resnet18"
    assert set(settings["record"]) == set(exchange.FACTS)


def test_exported_scores_are_those_of_the_exported_features(exported):
    arrays = content(exported / "out/x.npz")
    detector = detection.SSD.fit(arrays["train"])
    for key in ("test", "ood_digits"):
        np.testing.assert_array_equal(detector.score(arrays[key]), arrays[f"scores_m1_{key}"])


def test_an_export_of_imported_features_has_the_same_arrays(exported, score):
    _, home = score(content(exported / "out/x.npz"), "--export", "again.npz", "--clusters", 1, 3,
                    "--seed", 7)
    first, second = content(exported / "out/x.npz"), content(home / "again.npz")
    assert set(first) == set(second)
    assert all((first[k] == second[k]).all() for k in first)


# --- features of any network ----------------------------------------------------------------------


def test_outliers_that_score_exactly_the_threshold_are_said(call, tmp_path):
    same = np.tile(features(1), (30, 1))
    sets = {"train": features(40), "test": same[:20], "ood_same": same,
            "ood_partly": np.concatenate([same[:3], features(27)]), "ood_far": features(15, seed=2)}
    np.savez(tmp_path / "mine.npz", **sets)
    done = call("eval_ssd.py", "--features", "mine.npz", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "note: same: 30 of 30 outliers score exactly the threshold of FPR95" in done.stderr
    assert "note: partly: 3 of 30 outliers" in done.stderr
    assert "far" not in done.stderr


def test_three_arrays_are_enough(score):
    (record,), _ = score(SETS, name="my net.npz")
    detector = detection.SSD.fit(SETS["train"])
    expected = detection.metrics(detector.score(SETS["test"]), detector.score(SETS["ood_far"]))
    assert {k: record[k] for k in expected} == expected
    assert (record["in"], record["ood"], record["clusters"]) == ("my net", "far", 1)
    assert (record["n_train"], record["n_in"], record["n_ood"]) == (40, 20, 15)
    assert (record["checkpoint"], record["arch"], record["training_mode"]) == (None, None, None)


def test_the_documented_lines_make_a_file_that_is_scored(score, tmp_path, monkeypatch):
    pages = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    code, *_ = re.findall(r"```python\n(import numpy as np\n.*?)```", text, re.S)
    monkeypatch.chdir(tmp_path)
    exec(code, {name: features(30 + i, seed=i) for i, name in
                enumerate(("train_features", "test_features", "svhn_features"))})
    (made,) = tmp_path.glob("*.npz")
    assert f"python eval_ssd.py --features {made.name}" in text
    (record,), _ = score(None, name=made.name)
    assert (record["in"], record["ood"]) == (made.stem, "svhn")


def test_the_way_numbers_lie_in_a_file_changes_no_score(score):
    (expected,), _ = score(SETS)
    for change in (lambda x: x.astype(">f4"), np.asfortranarray,
                   lambda x: np.repeat(x, 2, axis=0)[::2], lambda x: x.astype(np.float64)):
        *_, found = score({k: change(x) for k, x in SETS.items()})[0]
        assert found["auroc"] == expected["auroc"]


def test_half_precision_is_read_as_it_is(score):
    half = {k: x.astype(np.float16) for k, x in SETS.items()}
    (first,), _ = score(half)
    second = score({k: x.astype(np.float32) for k, x in half.items()})[0][-1]
    assert first["auroc"] == second["auroc"]


@pytest.mark.parametrize("how", ["flag", "settings"])
def test_the_labels_of_a_classifier_are_its_clusters(how, score):
    labels = np.arange(40, dtype=np.uint8) % 2
    settings = {"record": {"training_mode": "SupCE"}} if how == "settings" else {}
    arrays = {**SETS, "train_labels": labels, "settings": np.array(json.dumps(settings))}
    flags = ("--training-mode", "SupCE") if how == "flag" else ()
    (record,), _ = score(arrays, "--clusters", 9, *flags)
    detector = detection.SSD.fit(SETS["train"], labels, clusters=9)
    assert record["auroc"] == detection.metrics(
        detector.score(SETS["test"]), detector.score(SETS["ood_far"])
    )["auroc"]
    assert record["training_mode"] == "SupCE"


def test_settings_name_the_sets_and_their_classes(score):
    settings = {"in": "far", "names": {"ood_far": "near"}, "class_names": {"ood_far": ["a", "b"]}}
    arrays = {**SETS, "ood_far_labels": np.arange(15) % 2, "settings": json.dumps(settings)}
    (record,), home = score(arrays, "--scores", "s.csv")
    assert (record["in"], record["ood"]) == ("far", "near")
    rows = list(csv.DictReader((home / "s.csv").open()))
    assert [r["label"] for r in rows if r["set"] == "near"][:3] == ["a", "b", "a"]
    assert {r["label"] for r in rows if r["set"] == "far"} == {""}


def test_a_file_cannot_say_what_was_measured(score):
    settings = {"record": {"auroc": 1.0, "arch": "vit"}}
    (record,), _ = score({**SETS, "settings": np.array(json.dumps(settings))})
    assert record["arch"] == "vit"
    assert record["auroc"] < 1


def test_features_of_a_file_are_plotted_without_the_images_that_are_not_there(score):
    _, home = score({**SETS, "ood__$x$": features(9)}, "--plot", "--clusters", 1, 2)
    names = {p.name.removeprefix("temp_eval_ssd_ssd_") for p in home.rglob("*.png")}
    assert names == {"histograms.png", "roc.png", "precision_recall.png", "spectrum.png",
                     "clusters.png"}


def test_every_score_is_told_from_the_others_in_lines_records_csv_figures_and_export(score):
    flags = ("--score", *detection.SCORES, "--clusters", 1, 2, "--neighbours", 3, 5, "--plot")
    found, home = score(SETS, *flags, "--scores", "s.csv", "--export", "out.npz")
    names = ["ssd, m = 1", "ssd, m = 2", "tied, m = 1", "tied, m = 2", "shrunk, m = 1",
             "shrunk, m = 2", "knn, k = 3", "knn, k = 5", "crossval"]
    assert [str(detection.Choice.of(record)) for record in found] == names
    assert found[0]["clusters"] == 1
    assert "score" not in found[0]  # as before there were others
    assert (found[6]["score"], found[6]["neighbours"], found[6].get("clusters")) == ("knn", 3, None)
    lines = (home / "eval_results/temp_eval_ssd_ssd.txt").read_text()
    assert re.findall(r"OOD = far, (.*?), FPR95", lines) == [
        "Clusters = 1", "Clusters = 2", *(f"Score = {name}" for name in names[2:])]
    with (home / "s.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(dict.fromkeys(r["detector"] for r in rows)) == names
    kept = content(home / "out.npz")
    for name, key in ((names[1], "m2"), (names[3], "tied_m2"), (names[7], "knn_k5"),
                      (names[8], "crossval")):
        far = [float(r["score"]) for r in rows if (r["detector"], r["set"]) == (name, "far")]
        np.testing.assert_array_equal(kept[f"scores_{key}_ood_far"], far)
    np.testing.assert_allclose(kept["scores_tied_m1_test"], kept["scores_m1_test"], rtol=1e-9)
    assert {path.name.rpartition("_")[2] for path in home.rglob("*.png")} == {
        "histograms.png", "roc.png", "recall.png", "spectrum.png", "clusters.png", "neighbours.png"}


def test_the_score_of_the_page_on_extending_runs_by_its_name(score, monkeypatch):
    page = (ROOT / "docs/extend.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```python\n(.*?)SCORES =", page, re.DOTALL)
    exec(block, names := {**vars(detection)})
    monkeypatch.setitem(detection.SCORES, "centroid", names["Centroid"])
    (record,), home = score(SETS, "--score", "centroid")
    unit = {k: x / np.linalg.norm(x, axis=1, keepdims=True) for k, x in SETS.items()}
    inside, far = (np.square(unit[k] - unit["train"].mean(axis=0)).sum(axis=1)
                   for k in ("test", "ood_far"))
    assert record["auroc"] == pytest.approx(detection.metrics(inside, far)["auroc"])
    assert "Score = centroid, FPR95" in (home / "eval_results/temp_eval_ssd_ssd.txt").read_text()


# --- names ----------------------------------------------------------------------------------------


def test_every_set_gets_a_plain_name_of_its_own():
    used = {}
    names = ["svhn", "npz:/a/x y.npz", "npz:/b/x y.npz", "folder:\udcff", "folder:my_labels",
             "folder:/" + "long" * 99, "svhn"]
    plain = [exchange.plain_name(name, used) for name in names]
    assert plain[:4] == ["svhn", "npz_x_y.npz", "npz_x_y.npz_", "folder__"]
    assert plain[4] == "folder_my_labels_"
    assert plain[6] == "svhn"
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]{1,81}", name) for name in plain)
    assert len(set(plain)) == 6


def test_sets_of_any_name_go_out_and_come_in_under_it(tmp_path):
    sets = [exchange.FeatureSet(name, torch.from_numpy(features(4, seed=i)),
                                torch.zeros(4, dtype=torch.int64))
            for i, name in enumerate(["in \udcff", "in \udcff", "folder:a/b", "folder:b", "ä$"])]
    export = exchange.Export(tmp_path / "x.npz")
    for images, key in zip(sets, ["train", "test", None, None, None], strict=True):
        export.add(images, images.features, {1: np.arange(4.0)}, key)
    assert export.close("in \udcff", {}) == [str(tmp_path / "x.npz")]
    found = exchange.read(tmp_path / "x.npz")
    for one, other in zip([found.train, found.test, *found.outliers], sets, strict=True):
        assert one.name == other.name
        assert torch.equal(one.features, other.features)
        assert one.class_names is None


def test_nothing_is_kept_or_written_where_no_export_is_wanted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export = exchange.Export(None)
    export.add(None, None)
    assert export.close("in", {}) == []
    assert list(tmp_path.iterdir()) == []


# --- bad input ------------------------------------------------------------------------------------


def pickled(path):
    array = np.empty(1, dtype=object)
    array[0] = {"a": 1}
    np.savez(path, **{**SETS, "train": array})


def no_array(path):
    np.savez(path, **SETS)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("notes.txt", "no array")


def cut_short(path):
    np.savez(path, **SETS)
    path.write_bytes(path.read_bytes()[:-100])


def corrupt(path):
    np.savez(path, **SETS)
    raw = bytearray(path.read_bytes())
    raw[300] ^= 255
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("write", "words"),
    [(lambda path: None, "no such file"),
     (lambda path: path.mkdir(), "no such file"),
     (lambda path: path.write_bytes(b""), "cannot be read as an .npz file"),
     (lambda path: path.write_text("features"), "cannot be read as an .npz file"),
     (lambda path: np.save(path.open("wb"), SETS["train"]), "it is no zip archive; np.savez"),
     (pickled, "cannot be read as an .npz file: Object arrays"),
     (no_array, "array 'notes.txt' is not known"),
     (cut_short, "cannot be read as an .npz file"),
     (corrupt, "cannot be read as an .npz file: Bad CRC-32")],
    ids=["missing", "folder", "empty", "text", "npy", "pickle", "other files", "cut", "corrupt"],
)
def test_a_file_of_another_kind_is_refused_by_name(write, words, refused, tmp_path):
    write(tmp_path / "f.npz")
    line = refused("--features", "f.npz")
    assert "--features f.npz" in line
    assert words in line


def text(**settings):
    return np.array(json.dumps(settings))


@pytest.mark.parametrize(
    ("change", "words"),
    [({"train": None}, "has no array 'train', only test, ood_far"),
     ({"test": None}, "has no array 'test', only train, ood_far"),
     ({"ood_far": None}, "has no array 'ood_NAME', only train, test"),
     ({"ood-near": features(3)}, "array 'ood-near' is not known; known are train, test"),
     ({"ood_near_labels": np.zeros(3, int)}, "array 'ood_near_labels' is not known"),
     ({"test": features(4)[0]}, "its test features must be [N, D] with N and D above 0, not [5]"),
     ({"train": features(4)[:0]}, "its train features must be [N, D] with N and D above 0, not"),
     ({"ood_far": features(9, 6)}, "its ood_far features have 6 dimensions, the training ones 5"),
     ({"test": features(4).astype(int)}, "test is int64; expected float16, float32 or float64"),
     ({"test": features(4).astype(complex)}, "test is complex128"),
     ({"test": features(4).astype("U9")}, "test is <U9"),
     ({"ood_far": np.full((4, 5), np.nan, np.float32)},
      "its ood_far features are not finite in 4 of 4 rows"),
     ({"train": np.full((4, 5), np.inf)}, "its train features are not finite in 4 of 4 rows"),
     ({"test": np.full((4, 5), 1e200)}, "above 1e+150, where their squares are not"),
     ({"train_labels": np.zeros(39, int)}, "train_labels is int64 [39]; expected an integer for "
      "each of the 40 rows"),
     ({"test_labels": np.zeros(20)}, "test_labels is float64 [20]"),
     ({"test_labels": np.full(20, -1)}, "test_labels goes from -1 to -1; classes are 0-99999"),
     ({"test_labels": np.full(20, 10**9)}, "test_labels goes from 1000000000"),
     ({"test_labels": np.ones(20, int), "settings": text(class_names={"test": ["a"]})},
      "its settings must name the 2 classes of test_labels, found ['a']"),
     ({"test_labels": np.ones(20, int), "settings": text(class_names={"test": [1, 2]})},
      "its settings must name the 2 classes of test_labels"),
     ({"format": np.int64(2)}, "its format is 2, not 1"),
     ({"format": np.array("1")}, "its format is 1, not 1"),
     ({"settings": np.array("{")}, "its settings are no JSON text"),
     ({"settings": np.zeros(3)}, "its settings are no JSON text"),
     ({"settings": np.array("[1]")}, "its settings are no JSON object: [1]"),
     ({"settings": text(out="x")}, "its settings have out = 'x'; known are in (str)"),
     ({"settings": text(names=["x"])}, "its settings have names = ['x']; known are"),
     ({"settings": text(names={"ood_far": 3})}, "names of its settings has ood_far = 3; expected"),
     ({"settings": text(**{"in": "far"})}, "two of its sets are called 'far'"),
     ({"settings": text(record={"training_mode": "BYOL"})}, "training_mode BYOL; known are SimCLR"),
     ({"ood_f": features(3), "settings": text(names={"ood_f": "far"})},
      "two of its sets are called 'far'")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arrays_that_are_no_features_are_refused_by_name(change, words, refused, tmp_path):
    arrays = {k: v for k, v in {**SETS, **change}.items() if v is not None}
    np.savez(tmp_path / "f.npz", **arrays)
    line = refused("--features", "f.npz")
    assert "--features f.npz" in line
    assert words in line


@pytest.mark.parametrize(
    "flags",
    ["--ckpt x.pth", "--arch resnet18", "--classes 3", "--dataset svhn", "--data-dir d",
     "--no-download", "--in-classes 0-3", "--ood svhn", "--size 64", "--normalize",
     "--no-normalize", "--data-mode ssl", "--batch-size 9", "--precision bf16", "--cache-dir d",
     "--feature-store d"],
)
def test_features_do_not_go_with_a_flag_that_asks_for_a_network_or_images(
    flags, refused, tmp_path
):
    np.savez(tmp_path / "f.npz", **SETS)
    line = refused("--features", "f.npz", *flags.split())
    flag = flags.split()[0].replace("--no-normalize", "--normalize")
    assert f"{flag} does not go with --features f.npz" in line


def test_a_config_that_asks_for_a_network_does_not_go_with_features_either(refused, tmp_path):
    np.savez(tmp_path / "f.npz", **SETS)
    (tmp_path / "c.yaml").write_text("size: 64\n")
    assert "--size does not go with --features" in refused("--config", "c.yaml", "--features",
                                                           "f.npz")


@pytest.mark.parametrize(
    ("flags", "words"),
    [("--clusters 41", "--clusters 41 is more than the 40 training"),
     ("--clusters 2 --training-mode SupCE", "the images of f have none"),
     ("--clusters 2 --score knn", "--clusters is no setting of --score knn"),
     ("--neighbours 2", "--neighbours is no setting of --score ssd"),
     ("--score knn crossval", "--neighbours 50 is more than the 40 training"),
     ("--score cnn", "'cnn'"),
     ("--export . ", "--export . is a folder"),
     ("--export f.npz/x.npz", "--export f.npz cannot be written to"),
     ("--export a --scores a", "--export and --scores are the same file, a"),
     ("--export ./f.npz", "--export and --features are the same file, ./f.npz"),
     ("--scores link", "--scores and --features are the same file, link"),
     ("--export hard", "--export and --features are the same file, hard"),
     ("--config c.yaml --scores c.yaml", "--scores and --config are the same file, c.yaml"),
     ("--export eval_results/temp_eval_ssd_ssd.txt", "--results-dir and --export are the same"),
     ("--plot --scores eval_results/temp_eval_ssd_ssd_roc.png", "--results-dir and --scores are"),
     ("--scores fifo", "--scores fifo is no regular file"),
     ("--export full", "--export full is no regular file"),
     ("--scores " + "x" * 300, "cannot be written to: File name too long"),
     (f"--plot --exp-name {'x' * 180}", "cannot be written to: File name too long"),
     ("--scores loop", "--scores loop cannot be written to: Too many levels"),
     ("--scores /proc/new/x", "--scores /proc/new cannot be written to"),
     ("--exp-name full", "--results-dir eval_results/full_ssd.jsonl is no regular file"),
     ("--exp-name fifo", "--results-dir eval_results/fifo_ssd.txt is no regular file")],
)
def test_features_are_refused_where_they_cannot_do_what_is_asked(flags, words, refused, tmp_path):
    np.savez(tmp_path / "f.npz", **SETS)
    (tmp_path / "c.yaml").write_text("clusters: 1")
    if "exp-name" in flags:
        (tmp_path / "eval_results").mkdir()
        os.mkfifo(tmp_path / "eval_results/fifo_ssd.txt")
        (tmp_path / "eval_results/full_ssd.jsonl").symlink_to("/dev/full")
    os.mkfifo(tmp_path / "fifo")
    os.link(tmp_path / "f.npz", tmp_path / "hard")
    for name, target in (("full", "/dev/full"), ("loop", "loop"), ("link", "f.npz")):
        (tmp_path / name).symlink_to(target)
    assert words in refused("--features", "f.npz", *flags.split())


def test_scores_cannot_have_the_name_of_the_folder_of_results(call, tmp_path):
    np.savez(tmp_path / "f.npz", **SETS)
    done = call("eval_ssd.py", "--features", "f.npz", "--scores", "eval_results", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--scores eval_results is a folder" in done.stderr


@pytest.mark.parametrize("shape", [(10**12, 5), (10**12, 1), (10**30, 5), (-1, 5), (10**12, 0)])
def test_an_array_that_is_declared_larger_than_memory_is_refused_with_the_file(
    shape, refused, tmp_path
):
    member = io.BytesIO()
    header = {"descr": "<f8", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(member, header)
    with zipfile.ZipFile(tmp_path / "f.npz", "w") as file:
        file.writestr("train.npy", member.getvalue())
    refused("--features", "f.npz")


@pytest.mark.parametrize(
    "settings",
    ["[" * 100_000, '{"in": "\\ud800"}', '{"names": {"ood_far": "a\\udfff"}}',
     '{"class_names": {"ood_far": ["\\ud900"]}}', '{"\\ud800": 1}'], ids=lambda text: text[:20])
def test_settings_that_no_record_can_hold_are_refused(settings, refused, tmp_path):
    np.savez(tmp_path / "f.npz", **SETS, settings=np.array(settings))
    assert "--features f.npz: its settings are no JSON text" in refused("--features", "f.npz")


def test_a_name_that_is_bytes_of_a_path_comes_in_as_it_went_out(score):
    (record,), _ = score(SETS | {"settings": text(names={"ood_far": "folder:\udcff"})})
    assert record["ood"] == "folder:\udcff"


def test_a_training_mode_that_contradicts_the_file_is_refused(refused, tmp_path):
    np.savez(tmp_path / "f.npz", **SETS, settings=text(record={"training_mode": "SupCon"}))
    line = refused("--features", "f.npz", "--training-mode", "SupCE")
    assert "--features f.npz: its settings have training_mode SupCon" in line
    assert "--training-mode is SupCE" in line


def test_an_evaluation_needs_a_network_or_features(refused):
    line = refused("--ood", "blobs")
    assert "--ckpt FILE" in line
    assert "--features FILE.npz" in line


def test_a_failed_export_leaves_what_stood_there(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    path.write_text("before")
    export = exchange.Export(path)
    images = exchange.FeatureSet("a", torch.ones(2, 3), torch.zeros(2, dtype=torch.int64))
    export.add(images, images.features, key="train")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space"):
        export.close("a", {})
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
