#!/usr/bin/env python3
"""Tell outliers by the Mahalanobis distance of their features to clusters of the training ones.

    python eval_ssd.py --training-mode SimCLR --arch resnet50 --normalize --ckpt network.pth.tar
    python eval_ssd.py --ckpt results/temp/latest_exp/checkpoint/model_best.pth.tar --clusters 1 10

The first evaluates a published network, the second one of train.py, which says itself how it was
trained. A SupCon network makes it SSD+. Appends a line per outlier set to RESULTS/EXP_ssd.txt:
In-data = cifar10, OOD = cifar100, Clusters = 1, FPR95 = 0.5078, AUROC = 0.9063, AUPR = 0.8919
"""

import detection
import evaluation
import utils
from utils import UserError, number


def parser():
    """Build the command line: the original's flags with its defaults, and ours."""
    p = utils.Parser(description=__doc__)
    evaluation.add_arguments(p)
    group = p.add_argument_group("detection")
    group.add_argument("--clusters", type=number(int, 1), nargs="+", default=[1], metavar="M",
                       help="clusters of the training features, one or several numbers; of a SupCE "
                       "network the classes are the clusters wherever M is above 1")
    return p


def main(argv=None):
    args = utils.parse_args(parser(), argv)
    if args.gpu is not None:
        utils.note("--gpu does nothing")

    # The network as it was trained, and every image set
    trained = evaluation.restore(
        args.ckpt, utils.device(), classes=args.classes, training_mode=args.training_mode,
        arch=args.arch, dataset=args.dataset, data_dir=args.data_dir, in_classes=args.in_classes,
        size=args.size, normalize=args.normalize,
    )
    train, test, outliers = evaluation.load_images(
        trained, args.ood, seed=args.seed, download=not args.no_download
    )
    by_class = trained.training_mode == "SupCE"
    if by_class and max(args.clusters) > 1 and train.class_names is None:
        raise UserError(f"--clusters {max(args.clusters)} of a SupCE network are its classes; the "
                        f"images of {train.name} have none")
    if max(args.clusters) > len(train) and not by_class:
        raise UserError(f"--clusters {max(args.clusters)} is more than the {len(train)} training "
                        "images")
    kwargs = evaluation.extraction(
        trained, train, batch_size=args.batch_size, seed=args.seed, precision=args.precision,
        cache_dir=args.cache_dir,
    )
    report = evaluation.Report(
        args.results_dir, args.exp_name, "ssd", scores=args.scores, plot=args.plot,
        again=args.again,
        common=evaluation.facts_of(trained, train, seed=args.seed, data_mode=args.data_mode,
                                   precision=args.precision, batch_size=kwargs["batch_size"]),
    )
    todo = report.todo(test, outliers, args.clusters)  # [(outlier set, numbers of clusters)]
    if not todo:
        return

    # Features of the training images; a detector per number of clusters, each fitted once
    x = evaluation.take_features(trained, train, mode=args.data_mode, **kwargs)  # [N, D]
    labels = train.labels if by_class else None
    wanted = [m for m in args.clusters if any(m in clusters for _, clusters in todo)]
    detectors = detection.fit_each(x, wanted, labels, args.seed, trained.device)
    del x
    for m, detector in detectors.items():
        _say_what_is_singular(m, detector)

    # Scores of the test images and of each outlier set
    x = evaluation.take_features(trained, test, **kwargs)
    inside = detection.score_each(detectors, x)
    for ood, clusters in todo:
        x = evaluation.take_features(trained, ood, **kwargs)
        scores = detection.score_each({m: detectors[m] for m in clusters}, x)
        for m in clusters:
            report.add(test, inside[m], ood, scores[m], clusters=m,
                       panel=f"{test.name}, {m} cluster{'s' * (m > 1)}")
    report.close()


def _say_what_is_singular(m, detector):
    """Note covariances that leave directions out, which makes scores depend on the cut."""
    short = [g for g in detector.gaussians if g.rank < len(g.mean)]
    if short:
        lowest = min(short, key=lambda g: g.rank)
        utils.note(f"clusters {m}: {len(short)} of {len(detector.gaussians)} covariances are "
                   f"singular (lowest rank {lowest.rank} of {len(lowest.mean)}, from {lowest.n} "
                   "images); distance counts only in the directions they span")
    if detector.left_out:
        utils.note(f"clusters {m}: clusters without extent, of {detector.left_out} images in all, "
                   "are left out of the minimum: every image would score 0 there")


if __name__ == "__main__":
    utils.program(main, bad_input=(detection.FeatureError,))
