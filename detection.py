"""Features -> scores -> metrics: how outliers are detected (SSD paper, sections 3 and 4).

    detector = SSD.fit(train, clusters=1)
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

from dataclasses import dataclass

import numpy as np
import torch

from utils import UserError

ROWS = 1024  # rows brought to float64 at a time: 16 MiB at 2,048 dimensions
BLOCK = 512  # columns of a product at a time; what is known to be zero or mirrored is left out
CONDITION = 1e9  # largest condition at which a Cholesky factor has the scores to 1e-6
GUARD = 1e-10  # what the original adds to a norm or standard deviation before it divides


class FeatureError(UserError, ValueError):
    """Features that no score can be computed from: not finite, of wrong shape, or too few."""


@dataclass(frozen=True)
class Standardizer:
    """Scale rows to unit length, then coordinates to mean 0 and standard deviation 1 in training.

    Attributes:
        mean: float64 [D]. scale: float64 [D], 1 / (standard deviation + 1e-10); 0 for a dead
            coordinate, which is constant in training and says nothing in any set.

    Source: same as the original, but for dead coordinates: there their guard of 1e-10 blows a
    difference up 10^10 times, in a direction that the pseudo-inverse then ignores.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def fit(cls, train, device=None):
        """Measure mean and population standard deviation of training features [N, D].

        Args: device: that computes, here and later; None is the features'.
        Raises a FeatureError: not two-dimensional, empty, or not finite.
        """
        train = _shaped(train, "the training features")
        device = train.device if device is None else torch.device(device)
        mean = sum(_unit(rows, device).sum(dim=0) for rows in _chunks(train)) / len(train)
        if not mean.isfinite().all():
            checked(train, "the training features")  # says in how many rows
        square = sum(_unit(x, device).sub_(mean).square_().sum(dim=0) for x in _chunks(train))
        deviation = (square / len(train)).sqrt()
        return cls(mean, torch.where(deviation > GUARD, 1 / (deviation + GUARD), 0.0))

    def __call__(self, features, name="the features"):
        """Standardise features [N, D].

        Returns: float32 [N, D], a new tensor on their device; LazyRows of features in a file.
        Raises a FeatureError: not finite or of another width; `name` is in the message.
        """
        features = checked(features, name, width=len(self.mean))
        if not isinstance(features, torch.Tensor):
            return LazyRows(features, len(features), lambda rows: self.rows(features[rows]))
        out = torch.empty(features.shape, dtype=torch.float32, device=features.device)
        return _fill(out, self.rows, features)

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


def _select(x, index):
    """The rows of x at an int64 index [n], gathered when some of them are asked for."""
    return LazyRows(x, len(index), lambda rows: x[index[rows]])


def _chunks(x):
    """The rows of x in order, ROWS at a time."""
    return (x[start : start + ROWS] for start in range(0, len(x), ROWS))


def _fill(out, function, x):
    """Write function(rows) of x, a chunk at a time, into the rows of `out`, and return it.

    Small results that stay between the chunks would keep the allocator from using the memory of
    the last chunk for the next.
    """
    for rows, target in zip(_chunks(x), _chunks(out), strict=True):
        target[:] = function(rows)
    return out


def _unit(rows, device):
    """Rows [n, D] -> new float64 rows of length 1 on a device."""
    rows = rows.to(device, torch.float64, copy=True)
    return rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True).add_(GUARD))


def checked(features, name, width=None):
    """Return features [N, D], arrays as tensors; a FeatureError says what is wrong with `name`."""
    features = _shaped(features, name, width)
    bad = sum(int((~rows.isfinite()).any(dim=1).sum()) for rows in _chunks(features))
    if bad:
        raise FeatureError(f"{name} are not finite in {bad} of {len(features)} rows")
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

    @property
    def rank(self):
        """Rank of the covariance: directions in which distance counts."""
        return self.whiten.shape[1]

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
        whiten = _inverse_factor(covariance)
        if whiten is not None:
            return cls(mean, whiten, len(x), triangular=True)
        values, vectors = torch.linalg.eigh(covariance)  # rising
        cut = values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
        keep = values > cut
        return cls(mean, vectors[:, keep] / values[keep].sqrt(), len(x))

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
        """Return the eigenvalues of the covariance, float64 [rank], falling, and their axes.

        The axes, float64 [D, rank], have length 1 / sqrt(eigenvalue): squared coordinates along
        them sum to the score.
        """
        vectors, scale, _ = torch.linalg.svd(self.whiten, full_matrices=False)
        return scale.flip(0) ** -2, (vectors * scale).flip(1)

    def along(self, x, axes):
        """Divide the mean score of rows [N, D] among the axes of `directions`: float64 [rank].

        Each is 1 where x are the rows of the fit (without shrinkage).
        """
        parts = ((rows.to(self.mean) - self.mean) @ axes for rows in _chunks(x))
        return sum(part.square().sum(dim=0) for part in parts) / len(x)


def _inverse_factor(covariance):
    """Triangular W [D, D] with W @ W.T = inverse(covariance); None unless well conditioned."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed:
        return None
    one = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(factor, one, upper=False)
    largest = torch.linalg.matrix_norm(covariance, float("inf"))  # at least the largest eigenvalue
    # The trace of the inverse bounds its largest eigenvalue, and so the product the condition: no
    # eigenvalue that counts as zero in Gaussian.fit comes near the limit.
    condition = largest * inverse.square().sum()
    return inverse.T if condition <= CONDITION else None


def moments(x, device=None):
    """Accumulate mean and covariance (1/N) of rows in float64.

    Args: x: float features [N, D]. device: that computes; None is that of x.
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
    """Shrink a covariance S to Ledoit and Wolf's (1 - s) S + s (trace S / D) I.

    Args: covariance, fourth: float64 [D, D] and scalar, from `moments`. n: number of rows.

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
    """Assign rows to k-means clusters.

    Args: x: float32 features [N, D]. clusters: m, 1 <= m <= N. seed: int >= 0.
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
    sample = _select(x, torch.from_numpy(order).to(x.device))
    machine.train(np.concatenate([rows.cpu().numpy() for rows in _chunks(sample)]))
    found = _fill(np.empty(len(x), np.int64),
                  lambda rows: machine.index.search(rows.cpu().numpy(), 1)[1][:, 0], x)
    return torch.from_numpy(found).to(x.device)


@dataclass(frozen=True)
class SSD:
    """Detect outliers by the distance to the nearest cluster of the training features (SSD, SSD+).

    Attributes:
        standardize: Standardizer. gaussians: one per cluster that has an extent.
        left_out: images in clusters that have none: a cluster of a single image, or of equal ones,
            would give every image the score 0 and is left out of the minimum.
    """

    standardize: Standardizer
    gaussians: tuple[Gaussian, ...]
    left_out: int = 0

    @classmethod
    def fit(cls, train, clusters=1, labels=None, seed=0, device=None):
        """Fit a Gaussian to each of m clusters of the training features, as `fit_each` does."""
        return fit_each(train, [clusters], labels, seed, device)[clusters]

    def score(self, features, name="the features"):
        """Return the distance of each row [N, D] to its nearest cluster: float64 array [N]."""
        return score_each({0: self}, features, name)[0]


def fit_each(train, clusters, labels=None, seed=0, device=None):
    """Fit a detector for each of several numbers of clusters; features are standardised once.

    A cluster with fewer images than dimensions measures distance only in the directions that its
    images span.

    Args:
        train: float features [N, D], raw. clusters: numbers m >= 1, by k-means where m > 1.
        labels: int [N]; with m > 1 these are the clusters, whatever m (SupCE).
        seed: of k-means. device: that computes, here and in scoring; None is the features'.

    Returns: {m: SSD}; all have the same Standardizer.
    Raises a FeatureError: features not finite or of wrong shape, more clusters than rows, or all
        features of each cluster equal.
    """
    standardize = Standardizer.fit(train, device)
    x = standardize(train, "the training features")
    detectors = {}
    for m in dict.fromkeys(clusters):
        members = [x]
        if m > 1:
            y = kmeans(x, m, seed) if labels is None else torch.as_tensor(labels, device=x.device)
            members = (_select(x, (y == c).nonzero().squeeze(1)) for c in y.unique())
        fitted = [Gaussian.fit(rows, device=device) for rows in members]
        usable = tuple(g for g in fitted if g.rank)
        if not usable:
            raise FeatureError("the training features are all equal within each cluster")
        detectors[m] = SSD(standardize, usable, sum(g.n for g in fitted if not g.rank))
    return detectors


def score_each(detectors, features, name="the features"):
    """Return the distance of rows to the nearest cluster of each detector: {key: float64 [N]}.

    Args:
        detectors: {key: SSD} of one `fit_each`; features are standardised once for all.
        features: float [N, D], raw. name: of them, in messages.

    Raises a FeatureError: features not finite or of another width. A ValueError:
        detectors that standardise differently.
    """
    standardize, *others = {id(d.standardize): d.standardize for d in detectors.values()}.values()
    if others:
        raise ValueError("the detectors were not fitted together: they standardise differently")
    features = _shaped(features, name, width=len(standardize.mean))
    scores = {key: torch.empty(len(features), dtype=torch.float64) for key in detectors}
    for start in range(0, len(features), ROWS):
        rows = standardize.rows(features[start : start + ROWS]).double()
        for key, detector in detectors.items():
            nearest = torch.stack([g.distance(rows) for g in detector.gaussians]).amin(dim=0)
            scores[key][start : start + ROWS] = nearest
    if not all(values.isfinite().all() for values in scores.values()):
        checked(features, name)  # says in how many rows
    return {key: values.numpy() for key, values in scores.items()}


@dataclass(frozen=True)
class SSDk:
    """Detect outliers by their distance to the training features less that to known outliers.

    Both Gaussians have Ledoit and Wolf's covariance, since the known outliers are few.
    """

    standardize: Standardizer
    inliers: Gaussian

    @classmethod
    def fit(cls, train, device=None):
        """Fit to the training features, float [N, D]; device and errors as for SSD.fit."""
        standardize = Standardizer.fit(train, device)
        x = standardize(train, "the training features")
        return cls(standardize, Gaussian.fit(x, shrink=True, device=device))

    def know(self, outliers):
        """Fit to the features of known outliers, float [n, D]; returns their Gaussian."""
        x = self.standardize(outliers, "the known outliers")
        return Gaussian.fit(x, shrink=True, device=self.standardize.mean.device)

    def distance(self, features, name="the features"):
        """Return d_in of each row [N, D], the distance to the training features: array [N]."""
        return self.inliers.score(self.standardize(features, name)).cpu().numpy()

    def score(self, features, known, name="the features", inside=None):
        """Return d_in - d_out of each row [N, D]: float64 array [N], negative ones included.

        Args: known: from `know`. inside: d_in of these rows, from `distance`, if known already.
        """
        x = self.standardize(features, name)
        inside = self.inliers.score(x).cpu().numpy() if inside is None else inside
        return inside - known.score(x).cpu().numpy()


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
