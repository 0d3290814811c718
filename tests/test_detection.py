"""Scores and metrics equal the original's, literal formulas, closed forms and scikit-learn's."""

import contextlib
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import covariance as sklearn_covariance
from sklearn.isotonic import isotonic_regression

import detection
import features
from detection import SCORES, SSD, Choice, FeatureError, Gaussian, SSDk, Standardizer


def rows(n, d, seed=0, dtype=np.float32):
    """Correlated features with a mean, as an encoder's are."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(d, d))
    return (rng.normal(size=(n, d)) @ mix + 0.5).astype(dtype)


def literal_distances(x, mean, covariance):
    """The quadratic form, image by image."""
    inverse = np.linalg.pinv(covariance)
    return np.array([(row - mean) @ inverse @ (row - mean) for row in x])


def literal_scale(train, *others):
    """Unit length, then the training mean and standard deviation (1/N), in float64."""
    unit = [x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
            for x in (train, *others)]
    mean, deviation = unit[0].mean(axis=0), unit[0].std(axis=0)
    return [(x - mean) / deviation for x in unit]


# --- against the original -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["one", "labels"])
def test_ssd_scores_are_those_of_the_original(golden, kind):
    g = golden("scores.npz")
    clusters, labels = (1, None) if kind == "one" else (4, g["labels"])
    detector = SSD.fit(g["train"], labels, clusters=clusters)
    test, ood = detector.score(g["test"]), detector.score(g["ood"])
    np.testing.assert_allclose(test, g[f"{kind}_score_test"], rtol=1e-6)
    np.testing.assert_allclose(ood, g[f"{kind}_score_ood"], rtol=1e-6)
    measured = detection.metrics(test, ood)
    three = [measured[k] for k in ("fpr95", "auroc", "aupr")]
    assert three == g[f"{kind}_fpr95_auroc_aupr"].tolist()


def test_ssdk_scores_are_those_of_the_original(golden):
    g = golden("scores.npz")
    detector = SSDk.fit(g["train"])
    known = detector.know(g["known"])
    for name in ("test", "ood"):
        # The original subtracted two distances in float32; its rounding is relative to these.
        x = detector.standardize(g[name])
        size = (detector.gaussians[0].score(x) + known.score(x)).numpy()
        error = np.abs(detector.score(g[name], known) - g[f"ssdk_score_{name}"])
        assert (error / size).max() < 1e-6
    measured = detection.metrics(
        detector.score(g["test"], known), detector.score(g["ood"], known)
    )
    three = [measured[k] for k in ("fpr95", "auroc", "aupr")]
    assert three == pytest.approx(g["ssdk_fpr95_auroc_aupr"].tolist(), abs=1e-12)


@pytest.mark.parametrize("case", range(5))
def test_metrics_are_those_of_the_original_exactly(golden, case):
    expected = golden("metrics.json")[case]
    measured = detection.metrics(expected["in"], expected["ood"])
    assert {k: measured[k] for k in ("fpr95", "auroc", "aupr")} == {
        k: expected[k] for k in ("fpr95", "auroc", "aupr")
    }


# --- against literal formulas and closed forms ----------------------------------------------------


def test_ssd_with_one_cluster_is_the_formula_written_out():
    train, test = rows(300, 12), rows(40, 12, seed=1)
    scaled_train, scaled_test = literal_scale(train, test)
    expected = literal_distances(
        scaled_test, scaled_train.mean(axis=0), np.cov(scaled_train.T, bias=True)
    )
    np.testing.assert_allclose(SSD.fit(train).score(test), expected, rtol=1e-4)


def test_ssd_with_labels_takes_the_nearest_class():
    train, test = rows(300, 8), rows(40, 8, seed=1)
    labels = np.arange(300) % 3
    scaled_train, scaled_test = literal_scale(train, test)
    expected = np.min(
        [
            literal_distances(scaled_test, part.mean(axis=0), np.cov(part.T, bias=True))
            for part in (scaled_train[labels == c] for c in range(3))
        ],
        axis=0,
    )
    detector = SSD.fit(train, clusters=2, labels=labels)  # of a classifier: the classes, whatever m
    assert len(detector.gaussians) == 3
    np.testing.assert_allclose(detector.score(test), expected, rtol=1e-4)


def literal_unit(*sets):
    """Rows of unit length in float64."""
    return [x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
            for x in sets]


@pytest.mark.parametrize(("m", "labels"), [(1, None), (2, np.arange(300) % 3)])
def test_tied_is_the_formula_on_unit_features_that_are_not_standardised(m, labels):
    train, test = rows(300, 8), rows(1100, 8, seed=1)
    unit, unit_test = literal_unit(train, test)
    groups = [unit == unit] if labels is None else [labels == c for c in range(3)]
    means = [unit[g].reshape(-1, 8).mean(axis=0) for g in groups]
    residuals = np.concatenate([unit[g].reshape(-1, 8) - mean
                                for g, mean in zip(groups, means, strict=True)])
    covariance = residuals.T @ residuals / 300
    expected = np.min([literal_distances(unit_test, mean, covariance) for mean in means], axis=0)
    found = SCORES["tied"].fit(train, labels, clusters=m).score(test)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize(("n", "columns"), [(300, 512), (300, 5), (7, 5)])
def test_tied_with_one_cluster_is_ssd(n, columns, monkeypatch):
    monkeypatch.setattr(detection, "BLOCK", columns)
    train, test = rows(n, 12), rows(40, 12, seed=1)
    np.testing.assert_allclose(SCORES["tied"].fit(train).score(test), SSD.fit(train).score(test),
                               rtol=1e-9)


def test_shrunk_is_the_formula_with_scikit_learns_covariance_of_each_cluster():
    train, test = rows(30, 8), rows(40, 8, seed=1)
    labels = np.arange(30) % 3
    scaled, scaled_test = literal_scale(train, test)
    expected = np.min([
        literal_distances(scaled_test, part.mean(axis=0), sklearn_covariance.ledoit_wolf(part)[0])
        for part in (scaled[labels == c] for c in range(3))], axis=0)
    found = SCORES["shrunk"].fit(train, labels, clusters=3).score(test)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (300, 1), (300, 7), (300, 300)])
def test_knn_is_the_squared_distance_to_the_kth_of_all_training_rows(n, k, monkeypatch):
    monkeypatch.setattr(detection, "ROWS", 11)  # training rows pass in blocks of 44
    train, test = rows(n, 6), rows(40, 6, seed=1)
    unit, unit_test = literal_unit(train, test)
    every = np.square(unit_test[:, None] - unit[None]).sum(axis=2)
    detector = SCORES["knn"].fit(train, neighbours=k)
    np.testing.assert_allclose(detector.score(test), np.sort(every, axis=1)[:, k - 1], rtol=1e-5)
    assert SCORES["knn"].fit(train, neighbours=1).score(train).max() < 1e-12


def literal_crossval(unit, unit_test, seed):
    """The eigenvalues of the other folds' axes, measured row by row, rising; and the scores."""
    n, d = unit.shape
    folds = min(5, n)
    fold = np.random.default_rng(seed).permutation(n) % folds
    variances, ranks = np.zeros(d), []
    for f in range(folds):
        others, held_out = unit[fold != f], unit[fold == f]
        _, axes = np.linalg.eigh(np.cov(others.T, bias=True))
        ranks.append(np.linalg.matrix_rank(others - others.mean(axis=0)))
        variances += np.mean(((held_out - others.mean(axis=0)) @ axes) ** 2, axis=0) / folds
    variances[: d - min(ranks)] = variances[: d - min(ranks)].sum() / max(1, d - min(ranks))
    variances = isotonic_regression(variances)
    _, axes = np.linalg.eigh(np.cov(unit.T, bias=True))
    return np.sum(((unit_test - unit.mean(axis=0)) @ axes) ** 2 / variances, axis=1)


@pytest.mark.parametrize("n", [2, 3, 7, 12, 200])
def test_crossval_takes_variances_along_the_axes_of_four_folds_from_the_fifth(n):
    train, test = rows(n, 9), rows(40, 9, seed=1)
    unit, unit_test = literal_unit(train, test)
    found = SCORES["crossval"].fit(train, seed=3).score(test)
    np.testing.assert_allclose(found, literal_crossval(unit, unit_test, 3), rtol=1e-6)


def test_crossval_counts_a_step_out_of_the_span_of_few_rows_where_ssd_does_not():
    train = np.pad(rows(8, 10), ((0, 0), (0, 10)))
    train[:, 10:] += 0.01 * rows(8, 10, seed=2)
    step = train.copy()
    step[:, 19] += 2.0
    detector = SCORES["crossval"].fit(train)
    assert (detector.score(step) > 1.2 * detector.score(train)).all()
    equal = np.ones((6, 3), np.float32)
    for broken, words in ((equal, "all equal"), (train[:1], "at least, not 1")):
        with pytest.raises(FeatureError, match=words):
            SCORES["crossval"].fit(broken)


def test_scores_are_those_of_pytorch_ood_where_it_has_them():
    detectors = pytest.importorskip("pytorch_ood.detector")
    train, test, labels = rows(300, 8), rows(40, 8, seed=1), np.arange(300) % 3
    unit, unit_test = (torch.from_numpy(x).float() for x in literal_unit(train, test))
    theirs = detectors.Mahalanobis(None).fit_features(unit, torch.from_numpy(labels))
    np.testing.assert_allclose(  # theirs is half the distance, by the sum over the rows for 1/N
        SCORES["tied"].fit(train, labels, clusters=3).score(test),
        2 * 300 * theirs.predict_features(unit_test), rtol=1e-3)
    theirs = detectors.KNN(None, k=7).fit_features(unit, torch.from_numpy(labels))
    np.testing.assert_allclose(SCORES["knn"].fit(train, neighbours=7).score(test) ** 0.5,
                               theirs.predict_features(unit_test), rtol=1e-3)


def test_the_mean_score_of_the_training_rows_is_the_dimension():
    train = rows(400, 20)
    assert SSD.fit(train).score(train).mean() == pytest.approx(20, rel=1e-9)


def test_scores_do_not_depend_on_the_length_of_features():
    train, test = rows(100, 6), rows(10, 6, seed=1)
    stretched = test * np.linspace(0.1, 50, 10, dtype=np.float32)[:, None]
    detector = SSD.fit(train)
    np.testing.assert_allclose(detector.score(stretched), detector.score(test), rtol=1e-4)


@pytest.mark.parametrize("rows_at_once", [7, 100])
def test_sums_in_pieces_are_the_sums_at_once(monkeypatch, rows_at_once):
    train, test = rows(250, 10), rows(33, 10, seed=1)
    expected = SSD.fit(train).score(test), SSDk.fit(train).gaussians[0].whiten
    monkeypatch.setattr(detection, "ROWS", rows_at_once)
    np.testing.assert_allclose(SSD.fit(train).score(test), expected[0], rtol=1e-6)
    fitted = SSDk.fit(train).gaussians[0].whiten
    torch.testing.assert_close(
        fitted @ fitted.T, expected[1] @ expected[1].T, rtol=1e-6, atol=1e-9
    )


def test_moments_are_numpys():
    x = rows(500, 15, dtype=np.float64)
    mean, covariance, fourth = detection.moments(torch.from_numpy(x))
    np.testing.assert_allclose(mean, x.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(x.T, bias=True), rtol=1e-12, atol=1e-12)
    lengths = np.linalg.norm(x - x.mean(axis=0), axis=1)
    assert fourth.item() == pytest.approx(np.mean(lengths**4), rel=1e-12)


def shrunk(x):
    """Ledoit and Wolf's covariance of rows [N, D]."""
    return detection.ledoit_wolf(*detection.moments(x)[1:], len(x))


@pytest.mark.parametrize(("n", "d"), [(500, 15), (30, 15), (8, 15), (2, 15), (1, 4), (50, 1)])
def test_ledoit_wolf_is_scikit_learns(n, d):
    x = rows(n, d, dtype=np.float64)
    # scikit-learn takes a single row for a single feature; its covariance is 0
    expected = np.zeros((d, d)) if n == 1 else sklearn_covariance.ledoit_wolf(x)[0]
    np.testing.assert_allclose(shrunk(torch.from_numpy(x)), expected, rtol=1e-10, atol=1e-12)


def test_directions_divide_the_mean_score_among_the_eigenvalues_of_the_covariance():
    x, other = (torch.from_numpy(rows(200, 6, seed=s)) for s in (0, 1))
    gaussian = Gaussian.fit(x)
    eigenvalues, axes = gaussian.directions()
    expected = np.linalg.eigvalsh(np.cov(x.double().numpy().T, bias=True))[::-1]
    np.testing.assert_allclose(eigenvalues, expected, rtol=1e-9)
    torch.testing.assert_close(axes.square().sum(dim=0), 1 / eigenvalues)
    torch.testing.assert_close((other.double() - gaussian.mean) @ axes @ axes.T,
                               (other.double() - gaussian.mean) @ gaussian.whiten
                               @ gaussian.whiten.T)
    torch.testing.assert_close(gaussian.along(other, axes).sum(), gaussian.score(other).mean())
    torch.testing.assert_close(gaussian.along(x, axes), torch.ones(6, dtype=torch.float64))


def test_directions_are_those_that_the_rows_span():
    eigenvalues, axes = Gaussian.fit(torch.from_numpy(rows(4, 6))).directions()
    assert (eigenvalues.shape, axes.shape) == ((3,), (6, 3))


def test_ledoit_wolf_of_equal_rows_is_zero():
    assert (shrunk(torch.ones(5, 3)) == 0).all()


def test_the_pseudo_inverse_is_numpys_where_the_covariance_is_regular():
    x = torch.from_numpy(rows(200, 9, dtype=np.float64))
    gaussian = Gaussian.fit(x)
    assert gaussian.rank == 9
    np.testing.assert_allclose(
        gaussian.whiten @ gaussian.whiten.T,
        np.linalg.pinv(np.cov(x.numpy().T, bias=True)), rtol=1e-9, atol=1e-12,
    )


@pytest.mark.parametrize("shrink", [False, True])
@pytest.mark.parametrize("decades", [0, 2, 4])
def test_a_cholesky_factor_has_the_scores_of_the_eigenvectors(monkeypatch, shrink, decades):
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(40, 40)))[0]
    x = torch.from_numpy((rng.normal(size=(300, 40)) * np.logspace(0, -decades / 2, 40)) @ turn)
    quick = Gaussian.fit(x, shrink)
    assert quick.triangular
    assert (quick.whiten.tril(-1) == 0).all()
    monkeypatch.setattr(detection, "CONDITION", 0)
    slow = Gaussian.fit(x, shrink)
    assert not slow.triangular
    torch.testing.assert_close(quick.score(x), slow.score(x), rtol=1e-9, atol=0)


@pytest.mark.parametrize("decades", [5, 7, 10, 20])
def test_a_covariance_near_singular_is_left_to_the_eigenvectors(decades):
    rng = np.random.default_rng(0)
    scale = np.logspace(0, -decades, 40)
    gaussian = Gaussian.fit(torch.from_numpy(rng.normal(size=(300, 40)) * scale))
    assert not gaussian.triangular
    kept = (scale**2 > 40 * np.finfo(float).eps).sum()
    assert abs(gaussian.rank - kept) <= 2  # the cut is on eigenvalues of a sample


@pytest.mark.parametrize("triangular", [False, True])
@pytest.mark.parametrize("columns", [1, 3, 10, 64])
def test_products_in_blocks_are_the_products_at_once(monkeypatch, triangular, columns):
    x = torch.from_numpy(rows(120, 10, dtype=np.float64))
    expected = literal_distances(x.numpy(), x.numpy().mean(axis=0), np.cov(x.numpy().T, bias=True))
    monkeypatch.setattr(detection, "BLOCK", columns)
    monkeypatch.setattr(detection, "CONDITION", 1e9 if triangular else 0)
    gaussian = Gaussian.fit(x)
    assert gaussian.triangular == triangular
    np.testing.assert_allclose(gaussian.score(x), expected, rtol=1e-9)
    np.testing.assert_allclose(
        detection.moments(x)[1], np.cov(x.numpy().T, bias=True), rtol=1e-12, atol=1e-12
    )


# --- singular, dead, alone ------------------------------------------------------------------------


def test_fewer_rows_than_dimensions_measure_distance_in_the_span_of_the_rows():
    train = rows(10, 30, dtype=np.float64)
    gaussian = Gaussian.fit(torch.from_numpy(train))
    assert gaussian.rank == 9  # centring takes one
    scores = gaussian.score(torch.from_numpy(train)).numpy()
    np.testing.assert_allclose(scores, 9, rtol=1e-9)  # n points in n - 1 directions lie alike
    # A step out of the span does not count.
    span = train - train.mean(axis=0)
    step = np.random.default_rng(5).normal(size=30)
    step -= np.linalg.pinv(span) @ (span @ step)
    np.testing.assert_allclose(gaussian.score(torch.from_numpy(train + step)), scores, rtol=1e-6)


@pytest.mark.parametrize("fit", [SSD.fit, SSDk.fit])
def test_a_coordinate_that_is_constant_in_training_counts_in_no_set(fit):
    # Unit length first: a coordinate stays constant only if it is 0, as a dead ReLU's is.
    train, test = rows(80, 6), rows(20, 6, seed=1)
    dead_train = np.insert(train, 3, 0, axis=1)
    dead_test = np.insert(test, 3, 0, axis=1)

    def score(train, test):
        detector = fit(train)
        known = (detector.know(train[:20] * 2 + 1),) if fit == SSDk.fit else ()
        return detector.score(test, *known)

    awake = dead_test.copy()
    awake[:, 3] = 1e-4
    assert np.isfinite(score(dead_train, awake)).all()
    if fit == SSD.fit:  # Ledoit and Wolf shrink towards a target that depends on the dimension
        np.testing.assert_allclose(score(dead_train, dead_test), score(train, test), rtol=1e-6)
        asleep = score(dead_train, dead_test)
        np.testing.assert_allclose(score(dead_train, awake), asleep, rtol=1e-2)


def test_a_cluster_of_one_image_is_left_out_of_the_minimum():
    train, test = rows(61, 5), rows(10, 5, seed=1)
    labels = np.array([0] * 60 + [1])
    detector = SSD.fit(train, labels, clusters=2)
    assert (len(detector.gaussians), detector.left_out) == (1, 1)
    scores = detector.score(test)
    assert np.isfinite(scores).all()
    assert scores.min() > 0


def test_features_that_are_all_equal_are_refused():
    with pytest.raises(FeatureError, match="all equal"):
        SSD.fit(np.ones((10, 4), np.float32))


def test_a_single_known_outlier_gives_finite_scores():
    detector = SSDk.fit(rows(50, 5))
    known = detector.know(rows(1, 5, seed=3))
    assert np.isfinite(detector.score(rows(9, 5, seed=1), known)).all()


@pytest.mark.parametrize(
    ("scale", "width", "reason"),
    [(1e-25, 6, "shorter than 1e-10"), (1e-200, 6, "shorter than 1e-10"),
     (1e200, 6, r"in 30 of 30 rows, or above 1e\+150"), (1.0, 1, "single dimension")],
)
def test_features_that_cannot_be_scaled_to_unit_length_are_refused_with_the_reason(
    scale, width, reason
):
    x = scale * np.random.default_rng(0).normal(1, 1, (30, width))
    for detector in (SSD, SSDk):
        with pytest.raises(FeatureError, match=reason):
            detector.fit(x)
    if width > 1:  # features of zeros have no length to be short of
        SSD.fit(np.concatenate([np.zeros((25, width)), x / scale]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e200])
@pytest.mark.parametrize("choice", detection.choices(SCORES, {"clusters": [2], "neighbours": [5]}),
                         ids=str)
def test_features_that_are_not_finite_are_refused_and_counted(choice, bad):
    train, test = rows(30, 4, dtype=np.float64), rows(10, 4, seed=1, dtype=np.float64)
    broken = train.copy()
    broken[[3, 7], 1] = bad
    with pytest.raises(FeatureError, match="training features are not finite in 2 of 30 rows"):
        choice.fit(broken)
    test[2] = bad
    with pytest.raises(FeatureError, match="cats are not finite in 1 of 10 rows"):
        choice.fit(train).score(test, "cats")


def test_features_of_another_width_are_refused():
    with pytest.raises(FeatureError, match="5 dimensions, the training ones 4"):
        SSD.fit(rows(30, 4)).score(rows(5, 5))


def test_more_clusters_than_rows_are_refused():
    with pytest.raises(FeatureError, match="7 clusters are more than the 6"):
        SSD.fit(rows(6, 3), clusters=7)
    with pytest.raises(FeatureError, match="7 neighbours are more than 6"):
        SCORES["knn"].fit(rows(6, 3), neighbours=7)


# --- clusters -------------------------------------------------------------------------------------


def test_kmeans_finds_clusters_that_lie_apart():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 400)  # two: k-means of more may end in a local optimum
    x = torch.from_numpy((np.eye(4)[truth] * 20 + rng.normal(size=(400, 4))).astype(np.float32))
    found = detection.kmeans(x, 2, seed=1)
    pairs = {(int(a), int(b)) for a, b in zip(truth, found, strict=True)}
    assert len(pairs) == 2  # one found cluster for each true one


def test_kmeans_is_a_function_of_the_seed():
    x = torch.from_numpy(rows(500, 6))
    first, again, other = (detection.kmeans(x, 5, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_kmeans_assigns_each_row_to_its_nearest_centre():
    x = torch.from_numpy(rows(300, 4))
    found = detection.kmeans(x, 3, seed=0)
    centres = torch.stack([x[found == c].mean(dim=0) for c in range(3)])
    nearest = torch.cdist(x, centres).argmin(dim=1)
    assert (nearest == found).float().mean() > 0.99  # 100 iterations have settled


def test_detectors_fitted_together_score_as_each_alone():
    train, test = rows(200, 6), rows(30, 6, seed=1)
    choices = detection.choices(["ssd", "tied", "ssd", "knn", "crossval"],
                                {"clusters": [1, 3, 1], "neighbours": [5]})
    assert choices == [("ssd", 1), ("ssd", 3), ("tied", 1), ("tied", 3), ("knn", 5),
                       ("crossval", None)]
    together = {choice: choice.fit(train, seed=4) for choice in choices}
    scores = detection.score_each(together, test)
    for choice, detector in together.items():
        np.testing.assert_array_equal(scores[choice], detector.score(test))


def test_a_known_distance_to_the_inliers_is_not_measured_again():
    train, test = rows(80, 5), rows(12, 5, seed=1)
    detector = SSDk.fit(train)
    known = detector.know(rows(20, 5, seed=2))
    expected, inside = detector.score(test, known), detector.inlier_score(test)
    blind = replace(detector, gaussians=None)
    np.testing.assert_array_equal(blind.score(test, known, inside=inside), expected)


def test_kmeans_on_its_sample_is_faiss_on_all_rows():
    import faiss

    x = rows(1500, 8)  # more than 256 a centroid
    machine = faiss.Kmeans(8, 4, niter=100, seed=7)
    machine.train(x[np.random.default_rng(7).permutation(1500)])
    expected = machine.index.search(x, 1)[1].ravel()
    np.testing.assert_array_equal(detection.kmeans(torch.from_numpy(x), 4, seed=7), expected)


def test_kmeans_is_given_no_more_rows_than_it_trains_on(monkeypatch):
    import faiss

    given, train = [], faiss.Kmeans.train
    monkeypatch.setattr(
        faiss.Kmeans, "train", lambda self, x: given.append(len(x)) or train(self, x))
    for n in (500, 1500):
        detection.kmeans(torch.from_numpy(rows(n, 4)), 3, seed=0)
    assert given == [500, 3 * 256]


# --- features in a file ---------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path):
    """Function (float32 array [N, D]) -> the same features in a file."""

    def store(x):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.npy"
        np.save(path, x)
        return features.DiskFeatures(path)

    return store


@pytest.mark.parametrize("rows_at_once", [100, 1024])
@pytest.mark.parametrize(
    ("clusters", "labels"),
    [(1, None), (3, None), (2, np.arange(1000) % 3 * 5), (2, np.arange(1000) // 999)],
    ids=["one", "kmeans", "labels", "class of one image"],
)
def test_features_in_a_file_have_the_scores_of_features_in_memory_to_the_last_bit(
    stored, monkeypatch, rows_at_once, clusters, labels
):
    monkeypatch.setattr(detection, "ROWS", rows_at_once)
    train, test = rows(1000, 12), rows(333, 12, seed=1)
    expected = SSD.fit(train, labels, clusters=clusters, seed=3)
    found = SSD.fit(stored(train), labels, clusters=clusters, seed=3)
    np.testing.assert_array_equal(found.score(stored(test)), expected.score(test))
    _, axes = expected.gaussians[0].directions()
    in_memory, in_file = (
        detector.gaussians[0].along(detector.standardize(x), axes)
        for detector, x in ((expected, test), (found, stored(test)))
    )
    assert torch.equal(in_file, in_memory)


@pytest.mark.parametrize("choice", [Choice("tied", 3), Choice("shrunk", 1), Choice("knn", 5),
                                    Choice("crossval")], ids=str)
def test_other_scores_of_features_in_a_file_are_those_in_memory_to_the_last_bit(stored, choice):
    train, test = rows(2100, 9), rows(1100, 9, seed=1)
    found = choice.fit(stored(train), seed=3).score(stored(test))
    np.testing.assert_array_equal(found, choice.fit(train, seed=3).score(test))


def test_ssdk_scores_of_features_in_a_file_are_those_in_memory_to_the_last_bit(stored):
    train, test, known = rows(1500, 9), rows(1100, 9, seed=1), rows(40, 9, seed=2)
    expected, found = SSDk.fit(train), SSDk.fit(stored(train))
    gaussian = found.know(stored(known))
    np.testing.assert_array_equal(
        found.score(stored(test), gaussian), expected.score(test, expected.know(known)))
    np.testing.assert_array_equal(
        found.score(stored(test), gaussian, inside=found.inlier_score(stored(test))),
        found.score(test, gaussian))


def test_bad_features_in_a_file_are_refused_and_counted(stored):
    broken = rows(30, 4)
    broken[[3, 7], 1] = np.nan
    with pytest.raises(FeatureError, match="training features are not finite in 2 of 30 rows"):
        SSD.fit(stored(broken))
    with pytest.raises(FeatureError, match="cats are not finite in 2 of 30 rows"):
        SSD.fit(rows(30, 4)).score(stored(broken), "cats")
    with pytest.raises(FeatureError, match="5 dimensions, the training ones 4"):
        SSD.fit(stored(rows(30, 4))).score(stored(rows(5, 5)))
    with pytest.raises(FeatureError, match="7 clusters are more than the 6"):
        SSD.fit(stored(rows(6, 3)), clusters=7)


def own_memory():
    """MiB that this process holds, without pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


@contextlib.contextmanager
def most_memory():
    """Yield a list whose last item is the most memory that was held, once this is left, in MiB."""
    seen, over = [own_memory()], threading.Event()

    def watch():
        while not over.wait(0.001):
            seen.append(max(seen[-1], own_memory()))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def detect_by_all(x):
    """Fit to features and score them, in all ways but by neighbours, which are kept."""
    kept = detection.choices(SCORES.keys() - {"knn"}, {"clusters": [1, 3]})
    for choice in kept:  # not at once: the scores of so many would be a good part of the bound
        choice.fit(x).score(x)
    detector = SSDk.fit(x)
    detector.score(x, detector.know(x), inside=detector.inlier_score(x))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_number_of_features_in_a_file(stored):
    few, many = stored(rows(6000, 128)), stored(np.tile(rows(1000, 128), (30, 1)))
    detect_by_all(few)  # buffers, for chunks of folds and clusters too, exist from here on
    with most_memory() as seen:
        detect_by_all(many)
    assert seen[-1] - seen[0] < 7  # of 15 MiB of features


# --- rules ----------------------------------------------------------------------------------------


def test_arguments_are_never_written_to():
    train, test = rows(60, 5), rows(10, 5, seed=1)
    labels = np.arange(60) % 2
    before = train.copy(), test.copy(), labels.copy()
    for score in SCORES:
        for given in (None, labels):
            Choice(score, 2).fit(train, given).score(test)
    detector = SSDk.fit(train)
    detector.score(test, detector.know(test))
    scores = np.arange(5.0), np.arange(3.0)
    detection.metrics(*scores)
    assert all((a == b).all() for a, b in zip(before, (train, test, labels), strict=True))
    assert (scores[0] == np.arange(5)).all()


def test_standardised_training_features_have_mean_0_and_standard_deviation_1():
    train = rows(200, 7)
    x = Standardizer.fit(train)(train)[:]
    assert x.dtype == torch.float32
    np.testing.assert_allclose(x.mean(dim=0), 0, atol=1e-6)
    np.testing.assert_allclose(x.std(dim=0, correction=0), 1, rtol=1e-6)


def test_ssdk_lowers_the_score_near_the_inliers_and_raises_it_near_the_known_outliers():
    rng = np.random.default_rng(0)

    def around(centre, n):
        return (np.array(centre) + 0.1 * rng.normal(size=(n, 3))).astype(np.float32)

    detector = SSDk.fit(around([1, 0, 0], 200))
    known = detector.know(around([0, 1, 0], 30))
    inside, outside = around([1, 0, 0], 50), around([0, 1, 0], 50)
    assert detector.score(inside, known).max() < detector.score(outside, known).min()


# --- metrics --------------------------------------------------------------------------------------


def test_scores_that_separate_perfectly_have_perfect_metrics():
    measured = detection.metrics(np.arange(100), np.arange(200, 260))
    assert measured["fpr95"] == measured["fpr95_ood_positive"] == 0
    assert measured["auroc"] == 1
    assert measured["aupr"] == pytest.approx(1)
    assert measured["aupr_in"] == pytest.approx(1)


@pytest.mark.parametrize("seed", range(2))
def test_auroc_is_the_share_of_pairs_in_the_right_order(seed):
    rng = np.random.default_rng(seed)
    inside, outside = rng.integers(0, 9, 60), rng.integers(3, 12, 45)  # with ties
    pairs = [(o > i) + 0.5 * (o == i) for o in outside for i in inside]
    assert detection.metrics(inside, outside)["auroc"] == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize("sizes", [(1, 1), (7, 3), (20, 20), (100, 40), (333, 1000)])
@pytest.mark.parametrize("ties", [False, True])
def test_both_fpr95_follow_their_definitions(sizes, ties):
    rng = np.random.default_rng(sum(sizes))
    inside, outside = rng.normal(0, 1, sizes[0]), rng.normal(1, 1, sizes[1])
    if ties:
        inside, outside = inside.round(), outside.round()
    measured = detection.metrics(inside, outside)
    limit = np.percentile(inside, 95)
    assert measured["fpr95"] == sum(o < limit for o in outside) / len(outside)
    limit = max(t for t in outside if sum(o >= t for o in outside) / len(outside) >= 0.95)
    assert measured["fpr95_ood_positive"] == sum(i >= limit for i in inside) / len(inside)


def test_aupr_of_the_inliers_is_that_of_the_mirrored_problem():
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(0, 1, 80), rng.normal(1, 1, 50)
    assert detection.metrics(inside, outside)["aupr_in"] == pytest.approx(
        detection.metrics(-outside, -inside)["aupr"]
    )


@pytest.mark.parametrize(
    ("inside", "outside", "words"),
    [
        ([], [1.0], "in-distribution scores must be"),
        ([1.0], [], "outlier scores must be"),
        ([1.0, np.nan], [1.0], "1 in-distribution scores are not finite"),
        ([1.0], [[1.0]], r"outlier scores must be \[N >= 1\], not \[1, 1\]"),
    ],
)
def test_scores_that_no_metric_can_be_of_are_refused(inside, outside, words):
    with pytest.raises(ValueError, match=words):
        detection.metrics(inside, outside)


@pytest.mark.gpu
@pytest.mark.parametrize("features_on", ["cpu", "cuda"])
def test_scores_on_the_gpu_are_those_of_the_cpu(features_on):
    train, test = rows(300, 16), rows(50, 16, seed=1)
    labels = np.arange(300) % 3
    there = {n: torch.from_numpy(x).to(features_on) for n, x in (("train", train), ("test", test))}
    expected = SSD.fit(train, labels, clusters=3).score(test)
    detector = SSD.fit(there["train"], labels, clusters=3, device="cuda")
    np.testing.assert_allclose(detector.score(there["test"]), expected, rtol=1e-6)
    expected, detector = SSDk.fit(train), SSDk.fit(there["train"], device="cuda")
    known = rows(20, 16, seed=2)
    np.testing.assert_allclose(
        detector.score(there["test"], detector.know(known)),
        expected.score(test, expected.know(known)), rtol=1e-6,
    )
