"""Scores and metrics of the evaluations are those of numpy, from checkpoint and images on.

Everything after the network is written out here: unit length, standardisation, clusters,
covariances, distances, known outliers, metrics.
"""

import csv
import json

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf
from tiny import draws, sample_ssl, tiny_network, write_images

import augment

MEAN, STD = (0.5, 0.4, 0.45), (0.2, 0.3, 0.25)
SEED = 5


@pytest.fixture(scope="module")
def home(tiny_arch, call, tmp_path_factory):
    """A folder with good.npz, odd.npz and networks in SimCLR/ and SupCE/, trained with MEAN, STD.

    The images of odd.npz differ from those of good.npz in how strong their tints are.
    """
    folder = tmp_path_factory.mktemp("detector")
    write_images(folder / "good.npz", train=100, test=40)
    write_images(folder / "odd.npz", train=4, test=36, shift=70, seed=1)
    for mode in ("SimCLR", "SupCE"):
        done = call(
            "train.py", "--dataset", "npz:good.npz", "--training-mode", mode, "--arch", tiny_arch,
            "--size", 8, "--epochs", 1, "--batch-size", 20, "--lr", 0.05, "--normalize",
            "--mean", *MEAN, "--std", *STD, "--results-dir", mode, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


def checkpoint(home, mode):
    return home / mode / "temp/latest_exp/checkpoint/checkpoint.pth.tar"


def evaluate(call, home, tmp_path, script, mode, *flags):
    """Run an evaluation of odd.npz: (records, {(set, clusters): scores by image})."""
    done = call(script, "--ckpt", checkpoint(home, mode), "--dataset", f"npz:{home}/good.npz",
                "--ood", f"npz:{home}/odd.npz", "--seed", SEED, "--scores", "s.csv",
                "--batch-size", 100, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "eval_results").glob("*.jsonl")
    scores = {}
    for row in csv.DictReader((tmp_path / "s.csv").open()):
        key = row["set"].rpartition("/")[2].removesuffix(".npz"), int(row["clusters"])
        scores.setdefault(key, []).append(float(row["score"]))
    return [json.loads(line) for line in path.read_text().splitlines()], scores


# --- the method, a step at a time -----------------------------------------------------------------


class Images:
    """The images and labels of good.npz and odd.npz, and a network that makes features of them."""

    def __init__(self, home, mode):
        files = {name: np.load(home / f"{name}.npz") for name in ("good", "odd")}
        self.train, self.test, self.odd = (
            torch.from_numpy(files[name][f"{split}_images"]).permute(0, 3, 1, 2).contiguous() / 255
            for name, split in (("good", "train"), ("good", "test"), ("odd", "test")))
        self.labels = files["good"]["train_labels"]
        self.odd_labels = files["odd"]["test_labels"]
        state = torch.load(checkpoint(home, mode), weights_only=True)["state_dict"]
        network = tiny_network("classifier" if mode == "SupCE" else "projection", 4)
        network.load_state_dict(state)
        self.encoder = network.encoder.eval()

    def features(self, x):
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
        with torch.no_grad():
            return self.encoder((x - mean) / std).numpy().astype(np.float64)


def standardizer(train):
    """Unit length, then mean 0 and standard deviation 1 in training; the result in 32 bits.

    The original's guards are felt in the last of them.
    """
    def unit(x):
        return x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-10)

    mean, std = unit(train).mean(axis=0), unit(train).std(axis=0) + 1e-10
    return lambda x: ((unit(x) - mean) / std).astype(np.float32).astype(np.float64)


def distances(x, mean, covariance):
    """(x - mean)' pinv(covariance) (x - mean) of each row."""
    inverse = np.linalg.pinv(covariance)
    return np.array([(row - mean) @ inverse @ (row - mean) for row in x])


def kmeans_labels(x, m):
    """Clusters as the original makes them: faiss, on a permutation of the rows."""
    import faiss

    machine = faiss.Kmeans(x.shape[1], m, niter=100, seed=SEED, min_points_per_centroid=1,
                           gpu=faiss.get_num_gpus() > 0)
    x = np.ascontiguousarray(x, dtype=np.float32)
    machine.train(x[np.random.default_rng(SEED).permutation(len(x))])
    squares = ((x[:, None] - machine.centroids[None]) ** 2).sum(axis=2)
    return squares.argmin(axis=1)


def ssd(train, sets, labels):
    """The smallest distance to the Gaussian of a cluster, for each set of features."""
    standardize = standardizer(train)
    members = [standardize(train)[labels == c] for c in np.unique(labels)]
    return [np.min([distances(standardize(x), rows.mean(axis=0), np.cov(rows.T, bias=True))
                    for rows in members], axis=0) for x in sets]


def literal_metrics(inside, outside):
    """FPR95, AUROC and AUPR by their definitions, outliers positive."""
    order = np.sort(inside)
    place = 0.95 * (len(order) - 1)
    low = int(place)
    limit = order[low] + (place - low) * (order[min(low + 1, len(order) - 1)] - order[low])
    wins = [(o > i) + (o == i) / 2 for o in outside for i in inside]
    precision = [np.sum(outside >= o) / (np.sum(outside >= o) + np.sum(inside >= o))
                 for o in outside]  # at each outlier found
    return {"fpr95": np.mean(outside < limit), "auroc": np.mean(wins), "aupr": np.mean(precision)}


def assert_equals(record, scores, expected, clusters):
    """Compare a record and the scores by image with literal scores (test, odd)."""
    for name, values in zip(("good", "odd"), expected, strict=True):
        np.testing.assert_allclose(scores[name, clusters], values, rtol=1e-6, atol=1e-6)
    for name, value in literal_metrics(*expected).items():
        assert record[name] == pytest.approx(value, abs=1e-6), name


# --- eval_ssd.py, eval_ssdk.py --------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["SimCLR", "SupCE"])
def test_ssd_is_the_method_written_out(call, home, tmp_path, mode):
    records, scores = evaluate(call, home, tmp_path, "eval_ssd.py", mode, "--clusters", 1, 3)
    images = Images(home, mode)
    train, *sets = (images.features(x) for x in (images.train, images.test, images.odd))
    if mode == "SupCE":  # whatever the number of clusters, they are the classes
        several = images.labels
    else:
        several = kmeans_labels(standardizer(train)(train), 3)
        assert len(np.unique(several)) == 3
    for record, clusters, labels in zip(records, (1, 3), (0 * several, several), strict=True):
        assert record["clusters"] == clusters
        assert_equals(record, scores, ssd(train, sets, labels), clusters)
    assert not np.allclose(scores["odd", 1], scores["odd", 3], rtol=0.05)


@pytest.mark.parametrize("k", [1, 3])
def test_ssdk_is_the_method_written_out(call, home, tmp_path, k):
    copies = 4
    (record,), scores = evaluate(call, home, tmp_path, "eval_ssdk.py", "SimCLR", "--k", k,
                                 "--copies", copies)
    images = Images(home, "SimCLR")

    # The first k of each class in a random order are known; each is augmented, copy after copy.
    order = torch.randperm(len(images.odd), generator=draws(SEED, "known", "npz")).numpy()
    known = np.concatenate([order[images.odd_labels[order] == c][:k] for c in range(4)])
    rest = np.setdiff1d(np.arange(len(images.odd)), known)
    made = []
    for copy in range(copies):
        params = sample_ssl(len(known), 8, 8, draws(SEED, "ssl", "npz", copy))
        made.append(images.features(augment.apply_ssl(images.odd[known], params, 8)))

    train = images.features(images.train)
    standardize = standardizer(train)
    gaussians = [(x.mean(axis=0), ledoit_wolf(x)[0])
                 for x in (standardize(train), standardize(np.concatenate(made)))]

    def score(x):
        to_train, to_known = (distances(standardize(images.features(x)), *g) for g in gaussians)
        return to_train - to_known

    assert record["n_known"] == 4 * k
    assert_equals(record, scores, [score(images.test), score(images.odd[rest])], clusters=1)
