"""Others who measure the same get the same: metrics and scores of pytorch-ood and scikit-learn.

Their outliers have labels below 0 and are the positive class; a larger score is more outlying, as
here.
"""

import numpy as np
import pytest
import torch
from pytorch_ood.detector import Mahalanobis
from pytorch_ood.metrics import OODMetrics
from pytorch_ood.metrics import functional as outside
from sklearn.metrics import (
    auc,
    average_precision_score,
    precision_recall_curve,
    roc_auc_score,
    roc_curve,
)

import detection

# (in-distribution, outliers); 20 k + 1 where the 95th percentile is itself a score: position
# 0.95 (n - 1) of n scores in order is then a whole number.
SIZES = [(201, 60), (61, 400), (1001, 1000)]
KINDS = ["overlapping", "tied", "apart", "reversed"]


def scores(kind, n_in, n_out):
    """Scores of both sides, float64."""
    rng = np.random.default_rng([n_in, n_out])
    shift = {"overlapping": 1.0, "tied": 1.0, "apart": 50.0, "reversed": -1.0}[kind]
    sides = rng.normal(size=n_in), rng.normal(shift, 1.5, size=n_out)
    return tuple(s.round(1) for s in sides) if kind == "tied" else sides


def theirs(inside, outliers):
    """pytorch-ood's form of a pair: (scores, labels) as tensors."""
    labels = torch.cat([torch.zeros(len(inside)), -torch.ones(len(outliers))]).long()
    return torch.from_numpy(np.concatenate([inside, outliers])), labels


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_auroc_is_pytorch_oods_and_scikit_learns(kind, sizes):
    inside, outliers = scores(kind, *sizes)
    measured = detection.metrics(inside, outliers)
    values, labels = theirs(inside, outliers)
    collected = OODMetrics().update(values, labels).compute()
    assert measured["auroc"] == pytest.approx(collected["AUROC"], abs=1e-14)
    assert measured["auroc"] == pytest.approx(roc_auc_score(labels < 0, values), abs=1e-14)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_aupr_of_either_side_is_the_sum_of_steps_under_pytorch_oods_curve(kind, sizes):
    """pytorch-ood's own area joins the points of the same curve by straight lines instead."""
    inside, outliers = scores(kind, *sizes)
    measured = detection.metrics(inside, outliers)
    values, labels = theirs(inside, outliers)
    sides = [("aupr", "ood", "AUPR-OUT", labels < 0, values),
             ("aupr_in", "id", "AUPR-IN", labels == 0, -values)]
    for ours, positive, key, truth, ranked in sides:
        precision, recall, _ = outside.pr_curve(values, labels, positive)
        steps = float(((recall[:-1] - recall[1:]) * precision[:-1]).sum())
        assert measured[ours] == pytest.approx(steps, abs=1e-13)
        assert measured[ours] == pytest.approx(average_precision_score(truth, ranked), abs=1e-13)

        precision, recall, _ = precision_recall_curve(truth, ranked)
        collected = OODMetrics().update(values, labels).compute()
        assert collected[key] == pytest.approx(auc(recall, precision), abs=1e-13)


@pytest.mark.parametrize("sizes", [*SIZES, (100, 73), (40, 40), (7, 19)])
@pytest.mark.parametrize("kind", KINDS)
def test_fpr95_with_outliers_positive_is_pytorch_oods_and_scikit_learns(kind, sizes):
    inside, outliers = scores(kind, *sizes)
    measured = detection.metrics(inside, outliers)["fpr95_ood_positive"]
    values, labels = theirs(inside, outliers)
    assert measured == OODMetrics().update(values, labels).compute()["FPR95TPR"]
    false, true, _ = roc_curve(labels < 0, values, drop_intermediate=False)
    assert measured == false[np.searchsorted(true, 0.95)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", ["overlapping", "apart", "reversed"])
def test_fpr95_of_the_ssd_paper_is_pytorch_oods_with_the_sides_exchanged(kind, sizes):
    inside, outliers = scores(kind, *sizes)
    measured = detection.metrics(inside, outliers)["fpr95"]
    values, labels = theirs(inside, outliers)
    assert measured == float(outside.fpr_at_tpr(-values, -1 - labels, 0.95))
    false, true, _ = roc_curve(labels == 0, -values, drop_intermediate=False)
    assert measured == false[np.searchsorted(true, 0.95)]


@pytest.mark.parametrize("n_in", range(200, 220))
def test_fpr95_of_the_ssd_paper_differs_only_by_outliers_between_two_neighbouring_scores(n_in):
    """Its percentile lies between the two, pytorch-ood's threshold is one of them."""
    inside, outliers = scores("overlapping", n_in, 500)
    measured = detection.metrics(inside, outliers)["fpr95"]
    values, labels = theirs(inside, outliers)
    exchanged = float(outside.fpr_at_tpr(-values, -1 - labels, 0.95))
    place = 0.95 * (n_in - 1)
    low, high = np.sort(inside)[[int(np.floor(place)), int(np.ceil(place))]]
    between = np.sum((outliers >= low) & (outliers <= high))
    assert round(500 * abs(exchanged - measured)) <= between <= 25


@pytest.fixture
def in_float64():
    """pytorch-ood keeps its means and covariance in torch's default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def features(n, mean, seed):
    """Correlated float32 features [n, 12]."""
    mix = np.random.default_rng(99).normal(size=(12, 12))
    x = np.random.default_rng(seed).normal(mean, 1, size=(n, 12)) @ mix + 2
    return torch.from_numpy(x.astype(np.float32))


@pytest.mark.usefixtures("in_float64")
def test_the_score_with_one_cluster_is_pytorch_oods_mahalanobis_times_2_n():
    """It halves the distance and does not divide the covariance by N; its ridge is 1e-6."""
    train, test, ood = features(300, 0, 0), features(80, 0, 1), features(90, 0.5, 2)
    detector = detection.SSD.fit(train)
    other = Mahalanobis(None).fit_features(
        detector.standardize(train)[:].double(), torch.zeros(len(train), dtype=torch.int64)
    )
    for x in (test, ood):
        half = other.predict_features(detector.standardize(x)[:].double()).numpy()
        np.testing.assert_allclose(detector.score(x), 2 * len(train) * half, rtol=1e-6)


@pytest.mark.usefixtures("in_float64")
def test_metrics_of_scores_that_pytorch_ood_computed_are_ours():
    """The whole way by other hands: its detector on raw features scaled in numpy, its metrics."""
    train, test, ood = features(300, 0, 0), features(81, 0, 1), features(90, 0.5, 2)
    detector = detection.SSD.fit(train)
    measured = detection.metrics(detector.score(test), detector.score(ood))

    unit = [x.double() / x.double().norm(dim=1, keepdim=True) for x in (train, test, ood)]
    mean, deviation = unit[0].mean(dim=0), unit[0].std(dim=0, correction=0)
    train, test, ood = ((x - mean) / deviation for x in unit)
    other = Mahalanobis(None).fit_features(train, torch.zeros(len(train), dtype=torch.int64))
    collected = OODMetrics()
    collected.update(other.predict_features(test), torch.zeros(81, dtype=torch.int64))
    collected.update(other.predict_features(ood), -torch.ones(90, dtype=torch.int64))
    found = collected.compute()
    assert measured["auroc"] == pytest.approx(found["AUROC"], abs=1e-12)
    assert measured["fpr95_ood_positive"] == found["FPR95TPR"]
