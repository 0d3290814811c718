"""detect.py: which pictures are odd, with what guarantee, on what page, and what it refuses."""

import csv
import os
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import detection
from report.pictures import MARK
from report.saved_detector import PictureDetector

FLAGS = ("--score", "shrunk")  # the fastest that does not degenerate on few pictures


def picture(path, rng, odd=False):
    """Write a picture of 14 x 12 pixels: dark noise, or bright stripes where it is odd."""
    image = rng.integers(0, 90, (12, 14, 3))
    if odd:
        image[:, ::2] += 160
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with photos/ (100 good ones, in two folders) and inbox/ (20 good and 6 odd ones)."""
    root, rng = tmp_path_factory.mktemp("detect"), np.random.default_rng(0)
    for i in range(100):
        picture(root / f"photos/{'ab'[i % 2]}/{i}.png", rng)
    for i in range(26):
        picture(root / f"inbox/{'odd' if i < 6 else 'good'}{i}.png", rng, odd=i < 6)
    return root


def rows_of(folder):
    with open(folder / "scores.csv", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run(folders, call, trained):
    """Function (*arguments, of a folder) -> the finished detect.py with a tiny network."""
    def detect(*arguments, cwd=folders):
        network = () if {"--detector", "--encoder", "--train"} & set(arguments) else (
            "--ckpt", trained)
        return call("detect.py", *arguments, *network, *FLAGS * ("--score" not in arguments),
                    cwd=cwd)
    return detect


@pytest.fixture(scope="module")
def compared(run, folders):
    """What `detect.py inbox --good photos --out odd` printed; the results are in odd/."""
    done = run("inbox", "--good", "photos", "--out", "odd")
    assert done.returncode == 0, done.stderr
    return done


# --- the decision ---------------------------------------------------------------------------------


def test_p_is_the_share_of_good_pictures_that_look_at_least_as_odd():
    calibration, scores = [3.0, 1.0, 2.0, 2.0], [0.0, 1.0, 1.5, 2.0, 3.0, 3.1]
    literal = [(1 + sum(c >= s for c in calibration)) / (len(calibration) + 1) for s in scores]
    assert detection.p_values(scores, calibration).tolist() == literal


@pytest.mark.parametrize("score", ["crossval", "knn"])
def test_on_200_splits_of_real_images_the_share_of_false_alarms_is_what_was_asked(score):
    x, y = load_digits(return_X_y=True)
    x = torch.from_numpy(x[y < 5] + 1).float()
    setting = {"neighbours": 2} if score == "knn" else {}
    n, asked, shares = 79, 0.1, []
    for seed in range(200):
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(x)))
        fitted, held_out, new = order[:160], order[160 : 160 + n], order[160 + n : 460]
        detector = detection.SCORES[score].fit(x[fitted], **setting)
        p = detection.p_values(detector.score(x[new]), detector.score(x[held_out]))
        shares.append(np.mean(p <= asked))
    # Each split is one draw of a share whose mean is exactly 8 / 80
    error = np.std(shares) / np.sqrt(len(shares))
    assert abs(np.mean(shares) - asked) < 4 * error
    assert error < 0.004


def test_the_odd_pictures_come_first_and_are_flagged(compared, folders):
    rows = rows_of(folders / "odd")
    assert list(rows[0]) == ["rank", "image", "score", "p", "flagged", "reason"]
    assert [int(row["rank"]) for row in rows] == list(range(1, 27))
    assert all(row["image"].startswith("inbox/odd") for row in rows[:6])
    assert {row["flagged"] for row in rows[:6]} == {"yes"}
    scores, p = ([float(row[key]) for row in rows] for key in ("score", "p"))
    assert scores == sorted(scores, reverse=True)
    assert min(p) == pytest.approx(1 / 21, abs=1e-5)  # of 20 that calibrate
    assert [row["flagged"] == "yes" for row in rows] == [value <= 0.05 for value in p]
    assert re.search(r"\d+ of 26 pictures flagged; were all good, 1.3 would be on average",
                     compared.stdout)
    assert compared.stdout.count("\n") == 12  # a heading, ten pictures, the summary


def test_pictures_that_calibrate_have_no_part_in_the_fit(compared, folders):
    found = PictureDetector.load(folders / "odd/detector.ssd", torch.device("cpu"))
    fitted = found.detector.gaussians[0].n
    assert (len(found.calibration), fitted, len(found.names)) == (20, 80, 100)


def test_a_detector_gives_the_same_scores_when_the_good_pictures_are_gone(
        compared, run, folders, tmp_path):
    shutil.copytree(folders / "inbox", tmp_path / "inbox")
    done = run("inbox", "--detector", folders / "odd/detector.ssd", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert rows_of(tmp_path / "odd") == rows_of(folders / "odd")
    one = tmp_path / "inbox/odd3.png"
    assert not (tmp_path / "odd/detector.ssd").exists()  # it would be the same
    done = run(one, "--detector", folders / "odd/detector.ssd", "--out", "one", cwd=tmp_path)
    (row,) = rows_of(tmp_path / "one")
    before = {r["image"]: r for r in rows_of(folders / "odd")}["inbox/odd3.png"]
    assert float(row["score"]) == pytest.approx(float(before["score"]), rel=1e-5)
    assert (row["p"], row["image"]) == (before["p"], str(one))


def test_pictures_of_one_folder_are_ranked_by_what_the_others_look_like(run, folders):
    done = run("inbox", "--out", "mixed")
    assert done.returncode == 0, done.stderr
    rows = rows_of(folders / "mixed")
    assert sum("odd" in row["image"] for row in rows[:8]) >= 5
    assert {(row["p"], row["flagged"]) for row in rows} == {("", "")}
    assert "26 pictures ranked" in done.stdout
    assert "none is flagged" in (folders / "mixed/index.html").read_text()


def test_with_too_few_good_pictures_nothing_is_decided(run, folders):
    done = run("inbox", "--good", "photos/a", "--out", "few")
    assert "--false-alarms 0.05 needs 19 good pictures that calibrate" in done.stderr
    assert {row["flagged"] for row in rows_of(folders / "few")} == {""}
    done = run("inbox", "--good", "photos/a", "--out", "few", "--false-alarms", 0.2)
    assert "yes" in {row["flagged"] for row in rows_of(folders / "few")}


def test_training_first_is_planned_and_said_and_leaves_out_what_calibrates(run, folders):
    good = [f"photos/a/{i}.png" for i in range(0, 20, 2)]
    flags = ("inbox", "--good", *good, "--train", "--minutes", 0.001, "--size", 8, "--out", "own")
    first = run(*flags)
    assert first.returncode == 0, first.stderr
    assert "training resnet18 by SimCLR on 8 pictures of 8 pixels: 1 epochs" in first.stdout
    (recipe,) = (folders / "own/training").glob("*/recipe.yaml")
    learnt = {os.path.realpath(link) for link in recipe.parent.glob("pictures/train/*")}
    held_out = {os.path.realpath(folders / path) for path in good} - learnt
    assert (len(learnt), len(held_out)) == (8, 2)
    found = PictureDetector.load(folders / "own/detector.ssd", torch.device("cpu"))
    again = run(*flags)
    assert "training resnet18" not in again.stdout  # it is done
    done = run(*sorted(held_out), "--detector", "own/detector.ssd", "--out", "held_out")
    assert done.returncode == 0, done.stderr
    scores = [float(row["score"]) for row in rows_of(folders / "held_out")]
    assert scores == pytest.approx(found.calibration[::-1], rel=1e-5)


# --- the page -------------------------------------------------------------------------------------


def test_the_page_shows_pictures_and_what_they_are_like_and_fetches_nothing(compared, folders):
    page = (folders / "odd/index.html").read_text()
    assert MARK in page[:500]
    sources = re.findall(r'src="([^"]{0,30})', page)
    assert len(sources) == 1 + 26 * 4  # the histogram, each picture, three that it is like
    assert all(source.startswith("data:image/") for source in sources)
    assert "http" not in page
    flagged = [row for row in rows_of(folders / "odd") if row["flagged"] == "yes"]
    assert page.count('class="flagged"') == len(flagged)


def test_names_of_all_kinds_and_pictures_that_cannot_be_read_end_nothing(run, tmp_path):
    rng = np.random.default_rng(1)
    names = ["a,b.png", 'quote".png', "<script>alert(1)<", "new\nline.png", "=1+2.png"]
    names = [name if name.endswith(".png") else f"{name}.png" for name in names]
    for name in [*names, os.fsdecode(b"\xff.png"), *(f"{i}.png" for i in range(4))]:
        picture(tmp_path / "inbox" / name.replace("/", "_"), rng)
    (tmp_path / "inbox/broken.png").write_bytes(b"no picture")
    (tmp_path / "inbox/gone.png").symlink_to(tmp_path / "nowhere")
    done = run("inbox", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "broken.png" in done.stderr
    rows = rows_of(tmp_path / "odd")
    read = {row["image"] for row in rows if row["rank"]}
    assert len(read) == 10
    assert {"inbox/a,b.png", "inbox/new\nline.png"} <= read
    unread = [row for row in rows if not row["rank"]]
    assert {row["image"] for row in unread} == {"inbox/broken.png", "inbox/gone.png"}
    assert all(row["reason"] for row in unread)
    page = (tmp_path / "odd/index.html").read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "message"), [
    (["nowhere"], "nowhere: no such folder or file"),
    (["empty"], "empty: no pictures"),
    (["inbox", "--good", "empty"], "--good empty: no pictures"),
    (["inbox", "--good", "inbox"], "is among the pictures to search"),
    (["inbox", "--good", "inbox/../inbox"], "without --good, the odd ones of a single folder"),
    (["inbox/odd0.png"], "1 pictures that can be read, and 2 are needed"),
    (["inbox", "--good", "photos/a/0.png"], "2 are needed"),
    (["equal"], "all equal"),
    (["broken"], "0 pictures that can be read (cannot decode"),
    (["inbox", "--out", "inbox"], "--out inbox is the folder of pictures"),
    (["inbox", "--out", "photos/a/0.png"], "--out photos/a/0.png cannot be written to"),
    (["inbox", "--out", "site"], "holds an index.html that detect.py did not write"),
    (["inbox", "--detector", "nowhere"], "--detector nowhere: no such file"),
    (["inbox", "--detector", "inbox/odd0.png"], "is not a torch checkpoint"),
    (["inbox", "--detector", "other.ssd"], "expected format 1, found 99"),
    (["inbox", "--detector", "odd/detector.ssd", "--good", "photos"], "--good does not go with"),
    (["inbox", "--detector", "cut.ssd"], "is damaged"),
    (["inbox", "--train"], "--good DIR is needed"),
    (["inbox", "--train", "--encoder", "efficientnet-lite0"], "one network makes the features"),
    (["inbox", "--encoder", "nothing"], "--encoder nothing is not known"),
    (["inbox", "--false-alarms", "1"], "expected a number above 0 and below 1"),
])
def test_bad_input_is_one_line_and_status_2(arguments, message, compared, run, folders):
    rng = np.random.default_rng(2)
    (folders / "empty").mkdir(exist_ok=True)
    for i in range(4):
        (folders / "equal").mkdir(exist_ok=True)
        Image.new("RGB", (9, 9), (7, 7, 7)).save(folders / f"equal/{i}.png")
    picture(folders / "broken/x.png", rng)
    (folders / "broken/x.png").write_bytes(b"")
    (folders / "site").mkdir(exist_ok=True)
    (folders / "site/index.html").write_text("<html>my site</html>")
    content = torch.load(folders / "odd/detector.ssd", weights_only=True)
    torch.save(content | {"format": 99}, folders / "other.ssd")
    torch.save(content | {"units": content["units"][:, :3]}, folders / "cut.ssd")
    done = run(*arguments)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if ": note: " not in line]
    assert line.startswith("detect.py: error: ")
    assert message in line
    assert (folders / "site/index.html").read_text() == "<html>my site</html>"


@pytest.mark.parametrize("change", [
    {"detector": {"type": "Popen", "args": ["true"]}}, {"detector": 3}, {"weights": {}},
    {"settings": {}}, {"names": 3}, {"calibration": "many"},
    {"crop": -5, "encoder": "torchvision:x"}, {"encoder": ["resnet18"]}, {"score": "knn"},
    {"settings": {"size": 10**9, "mean": None, "std": None, "interpolation": "bilinear"}},
], ids=str)
def test_a_detector_with_impossible_content_is_refused_in_one_line(change, compared, run, folders):
    content = torch.load(folders / "odd/detector.ssd", weights_only=True)
    torch.save(content | change, folders / "hostile.ssd")
    done = run("inbox", "--detector", "hostile.ssd", "--out", "hostile")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("detect.py: error: --detector hostile.ssd")
    assert done.stderr.count("\n") == 1
