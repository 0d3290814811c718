"""What changes no score, and what counts however small it is."""

import numpy as np
import pytest

from detection import SSD, SSDk, Standardizer, metrics

CLASSES = np.arange(90) % 3


def rows(n, seed, d=8):
    """Features of three classes that overlap, float64 [n, d], all positive as a ReLU's mean is."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).uniform(1, 2, (3, d))
    return np.abs(centres[np.arange(n) % 3] + 0.4 * rng.normal(size=(n, d)))


TRAIN, TEST, KNOWN = rows(90, 0), rows(40, 1), rows(20, 2)[:, ::-1] ** 2


def score_by_ssd(train, test, known):
    return SSD.fit(train).score(test)


def score_by_classes(train, test, known):
    return SSD.fit(train, clusters=3, labels=CLASSES).score(test)


def score_by_ssdk(train, test, known):
    detector = SSDk.fit(train)
    return detector.score(test, detector.know(known))


detectors = pytest.mark.parametrize("score", [score_by_ssd, score_by_classes, score_by_ssdk])


@detectors
def test_a_score_does_not_depend_on_what_else_is_scored(score):
    together = score(TRAIN, TEST, KNOWN)
    alone = [score(TRAIN, TEST[i : i + 1], KNOWN)[0] for i in range(5)]
    np.testing.assert_allclose(alone, together[:5], rtol=1e-10)
    np.testing.assert_allclose(score(TRAIN, TEST[::-1].copy(), KNOWN)[::-1], together, rtol=1e-10)


@detectors
def test_scores_do_not_depend_on_the_order_of_coordinates(score):
    order = np.random.default_rng(3).permutation(8)
    permuted = score(*(np.ascontiguousarray(x[:, order]) for x in (TRAIN, TEST, KNOWN)))
    np.testing.assert_allclose(permuted, score(TRAIN, TEST, KNOWN), rtol=1e-9)


@detectors
@pytest.mark.parametrize("power", [-6, 1, 10])
def test_scaling_all_features_by_a_power_of_two_changes_nothing(score, power):
    # The guard of 1e-10 in the unit length is felt in the last bits of 32.
    scaled = score(*(x * 2.0**power for x in (TRAIN, TEST, KNOWN)))
    np.testing.assert_allclose(scaled, score(TRAIN, TEST, KNOWN), rtol=1e-5)


@detectors
def test_a_row_of_zeros_has_a_score(score):
    train, test, known = TRAIN.copy(), TEST.copy(), KNOWN.copy()
    train[0] = test[0] = known[0] = 0
    assert np.isfinite(score(train, test, known)).all()


@pytest.mark.parametrize("deviation", [1e-3, 1e-7, 1e-9])
def test_a_coordinate_counts_however_little_it_varies(deviation):
    column = deviation * np.random.default_rng(4).normal(size=(90, 1))
    train = np.hstack([TRAIN, column])
    out = Standardizer.fit(train)(train)[:][:, -1]
    small = column[:, 0] / np.linalg.norm(train, axis=1)
    np.testing.assert_allclose(
        out, (small - small.mean()) / (small.std() + 1e-10), rtol=1e-4, atol=1e-6)
    assert out.std() > 0.5


def test_metrics_depend_on_the_order_of_scores_alone():
    inside, outside = score_by_ssd(TRAIN, TEST, None), score_by_ssd(TRAIN, KNOWN, None)
    found = metrics(inside, outside)
    assert found == metrics(4 * inside - 8, 4 * outside - 8)
    assert found == metrics(inside[::-1], outside[::-1])
    assert 0 < found["fpr95"] < 1
