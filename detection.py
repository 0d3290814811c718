"""Features -> scores -> metrics: how outliers are detected (SSD paper, sections 3 and 4).

    detector = SSD.fit(train, clusters=1)                 # or any other of SCORES
    metrics(detector.score(test), detector.score(ood))    # {"fpr95": ..., "auroc": ..., ...}

Three rules hold for all of it:
- a larger score is more outlying, and outliers are the positive class; distances are squared;
- fitting happens once, scoring as often as wished;
- arguments are never written to.
Features are float [N, D]; scores and metrics are float64. Features are tensors, arrays, or anything
with a length, a `shape` and a `device` that gives its rows at a slice or at an int64 index on that
device as a tensor (features.DiskFeatures). Rows are brought to float64, and to the device that
computes, a chunk at a time; no more of features in a file is in memory, and the results are those
of a tensor to the last bit.

What takes time at 2,048 dimensions is matrix products, so half of each is left out: a covariance is
symmetric, and its inverse's Cholesky factor triangular (benchmarks/bench_detection.py).
"""

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import numpy as np
import torch

from utils import UserError

ROWS = 1024  # rows brought to float64 at a time: 16 MiB at 2,048 dimensions
BLOCK = 512  # columns of a product at a time; what is known to be zero or mirrored is left out
CONDITION = 1e9  # largest condition at which a Cholesky factor has the scores to 1e-6
LARGEST = 1e150  # features whose squares overflow in float64 are larger
GUARD = 1e-10  # what the original adds to a norm or standard deviation before it divides


class FeatureError(UserError, ValueError):
    """Features that no score can be computed from: not finite, of wrong shape, or too few."""


@dataclass(frozen=True)
class Standardizer:
    """Scale rows to unit length, then coordinates to mean 0 and standard deviation 1 in training.

    Source: same as the original, but for dead coordinates, which are constant in training: there
    their guard of 1e-10 blows a difference up 10^10 times, in a direction that the pseudo-inverse
    then ignores.
    """

    mean: torch.Tensor  # float64 [D]
    scale: torch.Tensor  # float64 [D], 1 / (standard deviation + GUARD); 0 if dead

    @classmethod
    def fit(cls, train, device=None):
        """Measure mean and population standard deviation of training features [N, D].

        Args: device: that computes, here and later; None is the features'.
        Raises a FeatureError: not two-dimensional, empty, not finite, or without a direction.
        """
        train = _shaped(train, "the training features")
        device = train.device if device is None else torch.device(device)
        mean = sum(_unit(rows, device).sum(dim=0) for rows in _chunks(train)) / len(train)
        if not mean.isfinite().all():
            checked(train, "the training features")  # says in how many rows
        square = sum(_unit(x, device).sub_(mean).square_().sum(dim=0) for x in _chunks(train))
        deviation = (square / len(train)).sqrt()
        # Of scaled rows the mean square length is 1, unless GUARD is more than their length was.
        vanish = (mean.square() + deviation.square()).sum() < 0.01 and mean.any()
        if vanish or train.shape[1] == 1:
            what = f"are shorter than {GUARD:g}" if vanish else "have a single dimension"
            raise FeatureError(f"the training features {what}: scaled to unit length they say "
                               "nothing")
        return cls(mean, torch.where(deviation > GUARD, 1 / (deviation + GUARD), 0.0))

    def __call__(self, features, name="the features"):
        """Standardise features [N, D] when rows are asked for: LazyRows, float32 [N, D].

        Raises a FeatureError: not finite or of another width; `name` is in the message.
        """
        features = checked(features, name, width=len(self.mean))
        return LazyRows(features, len(features), lambda rows: self.rows(features[rows]))

    def rows(self, rows):
        """Standardise some rows [n, D], not checked: float32 [n, D] on the device that computes."""
        return _unit(rows, self.mean.device).sub_(self.mean).mul_(self.scale).float()


class LazyRows:
    """Features [n, D] that a function makes of x, like a tensor, when rows are asked for."""

    def __init__(self, x, n, function):
        self.shape, self.device, self._function = (n, x.shape[1]), x.device, function

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        return self._function(rows)


def select(x, index):
    """Return the rows of x at an int64 index [n], gathered when some of them are asked for."""
    return LazyRows(x, len(index), lambda rows: x[index[rows]])


def _chunks(x):
    """The rows of x in order, ROWS at a time."""
    return (x[start : start + ROWS] for start in range(0, len(x), ROWS))


def _fill(out, function, x):
    """Write function(rows) of x, a chunk at a time, into the rows of `out`, and return it."""
    # Small results that stay between the chunks would keep the allocator from using the memory of
    # the last chunk for the next.
    for rows, target in zip(_chunks(x), _chunks(out), strict=True):
        target[:] = function(rows)
    return out


def _unit(rows, device):
    """Rows [n, D] -> new float64 rows of length 1 on a device."""
    rows = rows.to(device, torch.float64, copy=True)
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True).add_(GUARD)
    # A length that overflows would make the row 0, which looks like any other.
    return rows.div_(length.masked_fill_(length.isinf(), torch.nan))


def checked(features, name, width=None):
    """Return features [N, D], arrays as tensors; a FeatureError says what is wrong with `name`."""
    features = _shaped(features, name, width)
    bad = sum(int((~(rows.abs() < LARGEST)).any(dim=1).sum()) for rows in _chunks(features))
    if bad:
        raise FeatureError(f"{name} are not finite in {bad} of {len(features)} rows, or above "
                           f"{LARGEST:g}, where their squares are not")
    return features


def _shaped(features, name, width=None):
    """Return features, arrays as tensors, if [N, D] of the right width; no value is read."""
    features = torch.from_numpy(features) if isinstance(features, np.ndarray) else features
    shape = list(features.shape)
    if len(shape) != 2 or 0 in shape:
        raise FeatureError(f"{name} must be [N, D] with N and D above 0, not {shape}")
    if width is not None and shape[1] != width:
        raise FeatureError(f"{name} have {shape[1]} dimensions, the training ones {width}")
    return features


@dataclass(frozen=True)
class Gaussian:
    """A mean and the pseudo-inverse of a covariance, as a factor."""

    mean: torch.Tensor  # float64 [D]
    whiten: torch.Tensor  # float64 [D, rank] with whiten @ whiten.T = pinv(covariance)
    n: int  # number of rows it was fitted on
    triangular: bool = False  # whether `whiten` is zero below its diagonal

    # Of the covariance: the number of directions in which distance counts
    rank = property(lambda self: self.whiten.shape[1])

    @classmethod
    def fit(cls, x, shrink=False, device=None):
        """Fit mean and covariance (1/N, or Ledoit and Wolf's with `shrink`) to rows.

        Args: x: float [N >= 1, D], finite. device: that computes, here and later; None is x's.
        Source: SSD paper, equation 3; scores as from numpy's pinv in the original, but for singular
        covariances: eigenvalues up to D * eps of the largest count as zero, numpy's 1e-15 keeps
        directions of pure rounding noise among them.
        """
        mean, covariance, fourth = moments(x, device)
        if shrink:
            covariance = ledoit_wolf(covariance, fourth, len(x))
        return cls.of(mean, covariance, len(x))

    @classmethod
    def of(cls, mean, covariance, n):
        """Make a Gaussian of the mean [D] and the covariance [D, D] of n rows, float64."""
        whiten = _inverse_factor(covariance)
        if whiten is not None:
            return cls(mean, whiten, n, triangular=True)
        return cls.of_axes(mean, *torch.linalg.eigh(covariance), n)

    @classmethod
    def of_axes(cls, mean, variances, axes, n):
        """Make a Gaussian of variances [D] along orthonormal axes [D, D]; tiny ones count as 0."""
        largest = variances.max().clamp(min=0)
        keep = variances > largest * len(variances) * torch.finfo(variances.dtype).eps
        return cls(mean, axes[:, keep] / variances[keep].sqrt(), n)

    def score(self, x):
        """Return the squared Mahalanobis distance of rows [N, D]: float64 tensor [N]."""
        return _fill(self.mean.new_empty(len(x)),
                     lambda rows: self.distance(rows.to(self.mean)), x)

    def distance(self, rows):
        """Score a few rows, float64 [n, D] on the device that computes, at once."""
        centred = rows - self.mean
        total = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        for start in range(0, self.rank, BLOCK):
            end = min(start + BLOCK, self.rank)
            high = end if self.triangular else len(self.mean)
            block = centred[:, :high] @ self.whiten[:high, start:end]
            total += block.square_().sum(dim=1)
        return total

    def directions(self):
        """Return the eigenvalues of the covariance, float64 [rank], falling, and axes [D, rank].

        These have length 1 / sqrt(eigenvalue): squared coordinates along them sum to the score.
        """
        vectors, scale, _ = torch.linalg.svd(self.whiten, full_matrices=False)
        return scale.flip(0) ** -2, (vectors * scale).flip(1)

    def along(self, x, axes):
        """Divide the mean score of rows [N, D] among axes: float64 [rank], 1 for fitted rows."""
        parts = ((rows.to(self.mean) - self.mean) @ axes for rows in _chunks(x))
        return sum(part.square().sum(dim=0) for part in parts) / len(x)


def _inverse_factor(covariance):
    """Triangular W [D, D] with W @ W.T = inverse(covariance); None unless well conditioned."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed:
        return None
    one = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(factor, one, upper=False)
    # The norm is at least the largest eigenvalue, the trace of the inverse at least that of the
    # inverse: no eigenvalue that counts as zero in Gaussian.fit comes near the limit.
    condition = torch.linalg.matrix_norm(covariance, float("inf")) * inverse.square().sum()
    return inverse.T if condition <= CONDITION else None


def moments(x, device=None):
    """Accumulate mean and covariance (1/N) of rows [N, D] on a device; None is that of x.

    Returns: float64 [D], [D, D], and a scalar, the mean fourth power of a centred row's length.
    """
    like = torch.empty(0, dtype=torch.float64, device=x.device if device is None else device)
    mean = sum(rows.to(like).sum(dim=0) for rows in _chunks(x)) / len(x)
    lower, fourth = like.new_zeros(len(mean), len(mean)), like.new_zeros(())
    for rows in _chunks(x):
        centred = rows.to(like) - mean
        for start in range(0, len(mean), BLOCK):
            end = start + BLOCK
            lower[start:end, :end].addmm_(centred[:, start:end].T, centred[:, :end])
        fourth += torch.linalg.vector_norm(centred, dim=1).pow_(4).sum()
    covariance = lower.tril() + lower.tril(-1).T
    return mean, covariance / len(x), fourth / len(x)


def ledoit_wolf(covariance, fourth, n):
    """Shrink a covariance S of n rows to Ledoit and Wolf's (1 - s) S + s (trace S / D) I.

    Args: fourth: the scalar of `moments`.
    Source: Ledoit and Wolf 2004, lemma 3.2-3.4; same as scikit-learn's ledoit_wolf. Its sum over
    all pairs of coordinates of squared products is the sum of the rows' fourth powers of length.
    """
    dim = len(covariance)
    target = covariance.trace() / dim
    size = covariance.square().sum()
    spread = (fourth - size) / n  # of S around the true covariance
    distance = size - dim * target**2  # of S from the target
    s = float((spread / distance).clamp(max=1)) if spread > 0 and distance > 0 else 0.0
    covariance = (1 - s) * covariance
    covariance.diagonal().add_(s * target)
    return covariance


def kmeans(x, clusters, seed):
    """Assign rows, float32 [N, D], to m <= N k-means clusters.

    Returns: int64 tensor [N] where x is, values 0..m-1; a cluster may be empty.
    Raises a FeatureError: more clusters than rows.

    Source: as the original: faiss, 100 iterations on a random permutation of the rows, at most 256
    of them per centroid. On the GPU where faiss sees one.
    """
    import faiss

    if clusters > len(x):
        raise FeatureError(f"{clusters} clusters are more than the {len(x)} training images")
    machine = faiss.Kmeans(
        x.shape[1], clusters, niter=100, seed=seed % 2**31,  # faiss takes an int
        min_points_per_centroid=1, gpu=faiss.get_num_gpus() > 0)  # 1 only silences a warning
    order = np.random.default_rng(seed).permutation(len(x))
    most = clusters * machine.cp.max_points_per_centroid
    if len(x) > most:  # the rows that faiss would choose of all, so that it need not be given all
        chosen = np.empty(len(x), np.int32)
        faiss.rand_perm(faiss.swig_ptr(chosen), len(x), machine.cp.seed)
        order = order[chosen[:most]]
    sample = select(x, torch.from_numpy(order).to(x.device))
    machine.train(np.concatenate([rows.cpu().numpy() for rows in _chunks(sample)]))
    found = _fill(np.empty(len(x), np.int64),
                  lambda rows: machine.index.search(rows.cpu().numpy(), 1)[1][:, 0], x)
    return torch.from_numpy(found).to(x.device)


class Detector:
    """What the scores share; each is a frozen dataclass of tensors and plain values.

    A score has fit(features, labels=None, *, its own setting, seed=0, device=None), width, the D of
    features, and distance(rows), the scores of a few raw rows [n, D]. device: that computes, here
    and in scoring; None is the features'. A FeatureError: not finite, misshapen, equal, too few.
    """

    setting: ClassVar = None  # its own argument of fit, a key of DEFAULTS

    def remarks(self):
        """Return sentences on what the fit leaves out."""
        return []

    def score(self, features, name="the features"):
        """Return the score of each row [N, D], larger = more outlying: float64 array [N]."""
        return score_each({0: self}, features, name)[0]


@dataclass(frozen=True)
class SSD(Detector):
    """Detect outliers by the distance to the nearest cluster of the training features (SSD, SSD+).

    A cluster of a single image, or of equal ones, has no extent and would give every image the
    score 0: it is left out of the minimum.
    """

    standardize: Standardizer
    gaussians: tuple[Gaussian, ...]  # one per cluster that has an extent
    left_out: int = 0  # images in the clusters that have none

    setting: ClassVar = "clusters"
    shrink: ClassVar = False
    width = property(lambda self: len(self.standardize.mean))

    @classmethod
    def fit(cls, features, labels=None, *, clusters=1, seed=0, device=None):
        """Fit a Gaussian to each of m clusters of training features, raw [N, D].

        Where m > 1, labels, int [N], are the clusters whatever m (SupCE), else k-means by seed.
        """
        standardize = Standardizer.fit(features, device)
        x = standardize(features, "the training features")
        members = [x]
        if clusters > 1:
            y = kmeans(x, clusters, seed) if labels is None else torch.as_tensor(labels)
            members = (select(x, (y == c).nonzero().squeeze(1).to(x.device)) for c in y.unique())
        fitted = cls._gaussians(members, device)
        usable = tuple(g for g in fitted if g.rank)
        if not usable:
            raise FeatureError("the training features are all equal within each cluster")
        return cls(standardize, usable, sum(g.n for g in fitted if not g.rank))

    @classmethod
    def _gaussians(cls, members, device):
        return [Gaussian.fit(rows, shrink=cls.shrink, device=device) for rows in members]

    def distance(self, rows):
        rows = self.standardize.rows(rows).double()
        return torch.stack([g.distance(rows) for g in self.gaussians]).amin(dim=0)

    def remarks(self):
        found, short = [], [g for g in self.gaussians if g.rank < len(g.mean)]
        if short:
            lowest = min(short, key=lambda g: g.rank)
            found.append(f"{len(short)} of {len(self.gaussians)} covariances are singular (lowest "
                         f"rank {lowest.rank} of {len(lowest.mean)}, from {lowest.n} images); "
                         "distance counts only in the directions they span")
        if self.left_out:
            found.append(f"clusters without extent, of {self.left_out} images in all, are left out "
                         "of the minimum: every image would score 0 there")
        return found


class Shrunk(SSD):
    """SSD with Ledoit and Wolf's covariance of each cluster."""

    shrink: ClassVar = True


class Tied(SSD):
    """SSD with one covariance, that of the rows less the means of their clusters.

    With the classes for clusters it is Mahalanobis++ (Mueller and Hein, ICML 2025). They do not
    standardise coordinates, which changes nothing: the distance is invariant to affine maps.
    """

    @classmethod
    def _gaussians(cls, members, device):
        parts = [(len(rows), *moments(rows, device)[:2]) for rows in members]
        n = sum(k for k, _, _ in parts)
        tied = Gaussian.of(None, sum(k * own for k, _, own in parts) / n, n)
        return [replace(tied, mean=mean) for _, mean, _ in parts]


@dataclass(frozen=True)
class KNN(Detector):
    """Detect outliers by the squared distance to the k-th nearest training feature.

    Features are of unit length and not standardised (Sun et al., ICML 2022).
    """

    train: torch.Tensor  # float32 [N, D] on the device that computes
    neighbours: int  # k

    setting: ClassVar = "neighbours"
    width = property(lambda self: self.train.shape[1])

    @classmethod
    def fit(cls, features, labels=None, *, neighbours=50, seed=0, device=None):
        """Keep training features [N, D] at unit length; labels and seed decide nothing."""
        x = _unit_rows(features, device)
        if neighbours > len(x):
            raise FeatureError(f"{neighbours} neighbours are more than {len(x)} training images")
        train = torch.empty(x.shape, device=x[:1].device)
        return cls(_fill(train, lambda rows: rows, x), neighbours)

    def distance(self, rows):
        unit = _unit(rows, self.train.device)
        nearest = unit.new_full((len(unit), self.neighbours), torch.inf)
        for block in self.train.split(4 * ROWS):  # or a million rows would be too many at once
            found = torch.cat([nearest, torch.cdist(unit, block.double())], dim=1)
            nearest = found.topk(self.neighbours, largest=False).values
        return nearest.amax(dim=1).square_()


@dataclass(frozen=True)
class CrossValidated(Detector):
    """Detect outliers by a Mahalanobis distance with cross-validated eigenvalues.

    The i-th is the variance of a fifth of the rows along the i-th eigenvector of the others, the
    mean of five, made monotone in i; beyond the rank of these fits all share the mean, so that a
    step out of the span of few rows counts. Features are of unit length and not standardised.
    """

    gaussian: Gaussian

    width = property(lambda self: len(self.gaussian.mean))

    @classmethod
    def fit(cls, features, labels=None, *, seed=0, device=None):
        """Fit to training features [N >= 2, D]; labels decide nothing. seed: of the fifths."""
        from sklearn.isotonic import isotonic_regression

        x = _unit_rows(features, device)
        if len(x) < 2:
            raise FeatureError("a cross-validation needs 2 training images at least, not 1")
        fold = torch.from_numpy(np.random.default_rng(seed).permutation(len(x)) % min(5, len(x)))
        members = [select(x, (fold == i).nonzero().squeeze(1).to(x.device)) for i in fold.unique()]
        parts = [(len(rows), *moments(rows, device)[:2]) for rows in members]
        variances = beyond = 0
        for i, (_, mean, covariance) in enumerate(parts):
            centre, others = _pooled(parts[:i] + parts[i + 1 :])
            values, axes = torch.linalg.eigh(others)  # rising
            beyond = max(beyond, len(axes) - Gaussian.of_axes(centre, values, axes, 0).rank)
            held_out = (covariance @ axes).mul_(axes).sum(dim=0) + ((mean - centre) @ axes).square()
            variances = variances + held_out / len(parts)
        variances[:beyond] = variances[:beyond].mean()
        variances = torch.from_numpy(isotonic_regression(variances.cpu().numpy())).to(variances)
        mean, covariance = _pooled(parts)
        axes = torch.linalg.eigh(covariance).eigenvectors
        gaussian = Gaussian.of_axes(mean, variances, axes, len(x))
        if not gaussian.rank:
            raise FeatureError("the training features are all equal")
        return cls(gaussian)

    def distance(self, rows):
        return self.gaussian.distance(_unit(rows, self.gaussian.mean.device))


def _unit_rows(features, device):
    """Training features at unit length, checked: float64 rows on the device that computes."""
    x = checked(features, "the training features")
    return LazyRows(x, len(x), lambda rows: _unit(x[rows], x.device if device is None else device))


def _pooled(parts):
    """Mean and covariance of the rows of all parts."""
    n = sum(k for k, _, _ in parts)
    mean = sum(k * own for k, own, _ in parts) / n
    return mean, sum(k * (own + torch.outer(m - mean, m - mean)) for k, m, own in parts) / n


SCORES = {"ssd": SSD, "tied": Tied, "shrunk": Shrunk, "knn": KNN, "crossval": CrossValidated}
DEFAULTS = {"clusters": 1, "neighbours": 50}  # of settings
LETTERS = {"clusters": "m", "neighbours": "k"}  # of settings, in print


class Choice(NamedTuple):
    """A score, and the value of its setting if it has one: a detector that is asked for."""

    score: str  # key of SCORES
    value: int | None = None

    @classmethod
    def of(cls, record):
        """Return the choice that a record of an evaluation is of."""
        score = record.get("score", "ssd")
        return cls(score, record.get(SCORES[score].setting) if score in SCORES else None)

    def fields(self):
        """Return what a record says of it: {flag: value}, with "score" unless that is ssd."""
        own = {flag: self.value for flag in DEFAULTS if flag == SCORES[self.score].setting}
        return own if self.score == "ssd" else {"score": self.score, **own}

    def fit(self, features, labels=None, seed=0, device=None):
        """Fit the score to features [N, D], see Detector."""
        own = {flag: value for flag, value in self.fields().items() if flag in DEFAULTS}
        return SCORES[self.score].fit(features, labels, seed=seed, device=device, **own)

    def __str__(self):
        setting = SCORES[self.score].setting
        return self.score + (f", {LETTERS[setting]} = {self.value}" if setting else "")


def choices(scores, settings):
    """List the Choices of several scores, each with every value of its setting: {flag: [value]}."""
    return [Choice(score, value) for score in dict.fromkeys(scores)
            for value in dict.fromkeys(settings.get(SCORES[score].setting, [None]))]


def score_each(detectors, features, name="the features"):
    """Return the scores of raw features [N, D], read once, by each detector of one width.

    Args: detectors: {key: Detector}. name: of the features, in messages.
    Returns: {key: float64 array [N]}.
    Raises a FeatureError: features not finite or of another width.
    """
    features = _shaped(features, name, width=next(iter(detectors.values())).width)
    scores = {key: torch.empty(len(features), dtype=torch.float64) for key in detectors}
    for start in range(0, len(features), ROWS):
        rows = features[start : start + ROWS]
        for key, detector in detectors.items():
            scores[key][start : start + ROWS] = detector.distance(rows)
    if not all(values.isfinite().all() for values in scores.values()):
        checked(features, name)  # says in how many rows
    return {key: values.numpy() for key, values in scores.items()}


class SSDk(Shrunk):
    """Detect outliers by their distance to the training features less that to known outliers.

    Both Gaussians have Ledoit and Wolf's covariance, since the known outliers are few.
    """

    def know(self, outliers):
        """Fit to the features of known outliers, float [n, D]; returns their Gaussian."""
        x = self.standardize(outliers, "the known outliers")
        return Gaussian.fit(x, shrink=True, device=self.standardize.mean.device)

    def inlier_score(self, features):
        """Return d_in of each row [N, D], the distance to the training features: array [N]."""
        return super().score(features)

    def score(self, features, known, inside=None):
        """Return d_in - d_out of each row [N, D]: float64 array [N], negative ones included.

        Args: known: from `know`. inside: `inlier_score` of these rows, if it is there already.
        """
        inside = self.inlier_score(features) if inside is None else inside
        return inside - known.score(self.standardize(features)).cpu().numpy()


def p_values(scores, calibration):
    """Return the share of good images that would score at least as much as each score.

    p = (1 + number of calibration scores >= s) / (n + 1). Of good images that neither the fit nor
    the calibration has seen, a share of at most a has p <= a on average, whatever the distribution.

    Args: scores: float [M]. calibration: float [n].
    Returns: float64 array [M], from 1 / (n + 1) to 1.
    Source: split-conformal p-values, Vovk 2012; Bates et al. 2023.
    """
    known = np.sort(np.asarray(calibration, dtype=np.float64))
    return (1 + len(known) - np.searchsorted(known, scores, side="left")) / (len(known) + 1)


def metrics(in_scores, ood_scores):
    """Measure how well scores detect outliers: float [N] of in-distribution images, [M] of others.

    Returns:
        dict of floats: `fpr95` (share of outliers below the 95th percentile of the in-distribution
        scores, as the SSD paper), `auroc`, `aupr` (average precision, outliers positive),
        `fpr95_ood_positive` (share of in-distribution scores not below the threshold that 95 % of
        the outliers reach, as OpenOOD and pytorch-ood) and `aupr_in` (in-distribution positive).

    Raises a ValueError: an empty set, or scores that are not finite or not one-dimensional.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

    inside, outside = (np.asarray(s, dtype=np.float64) for s in (in_scores, ood_scores))
    for name, scores in (("in-distribution", inside), ("outlier", outside)):
        if scores.ndim != 1 or not len(scores):
            raise ValueError(f"{name} scores must be [N >= 1], not {list(scores.shape)}")
        if not np.isfinite(scores).all():
            raise ValueError(f"{np.sum(~np.isfinite(scores))} {name} scores are not finite")
    scores = np.concatenate([inside, outside])
    outlier = np.concatenate([np.zeros(len(inside)), np.ones(len(outside))])
    false_rate, true_rate, _ = roc_curve(outlier, scores, drop_intermediate=False)
    return {
        "fpr95": float(np.mean(outside < np.percentile(inside, 95))),
        "auroc": float(roc_auc_score(outlier, scores)),
        "aupr": float(average_precision_score(outlier, scores)),
        "fpr95_ood_positive": float(false_rate[np.searchsorted(true_rate, 0.95)]),
        "aupr_in": float(average_precision_score(1 - outlier, -scores)),
    }
