#!/usr/bin/env python3
"""Detect outliers by the Mahalanobis distance of their features to clusters of the training ones.

    python eval_ssd.py --training-mode SimCLR --arch resnet50 --normalize --ckpt network.pth.tar
    python eval_ssd.py --ckpt results/temp/latest_exp/checkpoint/model_best.pth.tar --clusters 1 10
    python eval_ssd.py --features mine.npz

The first evaluates a published network, the second one of train.py, which says itself how it was
trained, the third features that someone else extracted. A SupCon network makes it SSD+. Appends a
line per outlier set to RESULTS/EXP_ssd.txt:
In-data = cifar10, OOD = cifar100, Clusters = 1, FPR95 = 0.5078, AUROC = 0.9063, AUPR = 0.8919
"""

import detection
import evaluation
import trainers
import utils
from infra import distributed, program, storage
from report import exchange, figures
from report.records import Report
from utils import UserError, number

# The flags that mean something where features come from a file
WITH_FEATURES = {"config", "exp_name", "results_dir", "seed", "scores", "plot", "gpu", "clusters",
                 "training_mode", "features", "export"}


def parser():
    """Build the command line: the original's flags with its defaults, and ours."""
    p = utils.Parser(description=__doc__)
    evaluation.add_arguments(p, needs_network=False)
    group = p.add_argument_group("detection")
    group.add_argument("--clusters", type=number(int, 1), nargs="+", default=[1], metavar="M",
                       help="clusters of the training features, one or several numbers; of a SupCE "
                       "network the classes are the clusters wherever M is above 1")
    group = p.add_argument_group("exchange", "features in a file; docs/features.md has its layout")
    group.add_argument("--features", metavar="FILE.npz",
                       help="score the features in this file instead of a network's")
    group.add_argument("--export", metavar="FILE.npz", help="write features and scores")
    return p


def open_source(args):
    """Open the source of features that the flags name: a file, or a network and its images."""
    if args.features is None:
        if args.ckpt is None:
            raise UserError("--ckpt FILE is needed, the trained network, or --features FILE.npz")
        given = {key: getattr(args, key) for key in evaluation.FOREIGN}
        return evaluation.open_network(
            args.ckpt, given, args.classes, args.ood, seed=args.seed, workers=args.workers,
            download=not args.no_download, batch_size=args.batch_size, precision=args.precision,
            cache_dir=args.cache_dir, feature_store=args.feature_store)
    for key, value in vars(args).items():
        if key not in WITH_FEATURES and value != parser().get_default(key):
            raise UserError(f"--{key.replace('_', '-')} does not go with --features {args.features}"
                            ": there is no network and no image, only what is in the file")
    return exchange.read(args.features, args.training_mode)


def main(argv=None):
    args = utils.parse_args(parser(), argv)
    if args.features is None:  # features in a file are for one process
        distributed.start()
    if args.gpu is not None:
        utils.note("--gpu does nothing")

    # Source of features, and every image set, so that none is found missing after an hour.
    source = open_source(args)
    train, test, outliers = source.train, source.test, source.outliers
    mode = trainers.TRAINING_MODES.get(source.training_mode)
    labels = train.labels if mode is not None and mode.label_clusters else None
    most = max(args.clusters)
    if labels is not None and most > 1 and train.class_names is None:
        raise UserError(f"--clusters {most} of a {source.training_mode} network are its classes; "
                        f"the images of {train.name} have none")
    if labels is None and most > len(train):
        raise UserError(f"--clusters {most} is more than the {len(train)} training images")

    # Of several processes, the main one does the rest; the others compute their batches of each
    # set, in the order in which it asks for them.
    if not distributed.is_main_process():
        source.features(train, args.data_mode)
        for images in (test, *outliers):
            source.features(images)
        return
    if args.export is not None:
        storage.check_output_file(args.export, "--export")
        for flag in ("scores", "features"):
            if args.export == getattr(args, flag):
                raise UserError(f"--export and --{flag} are the same file, {args.export}")
    facts = {"data_mode": args.data_mode, **source.facts}
    report = Report(args.results_dir, args.exp_name, "ssd", train=train, test=test, seed=args.seed,
                    facts=facts, scores=args.scores, plot=args.plot)
    export = exchange.Export(args.export)

    # Fit. Features are standardised once, and there is a detector for each number of clusters.
    x = source.features(train, args.data_mode)  # [N, D]
    export.add(train, x, key="train")
    detectors = detection.fit_each(x, args.clusters, labels, args.seed, utils.device())
    del x  # of all sets together, no more than one is in memory
    for m, detector in detectors.items():
        note_singular(m, detector)

    # Score the test images once, and each outlier set; larger is more outlying.
    x = source.features(test)
    test_scores = detection.score_each(detectors, x)
    export.add(test, x, test_scores, "test")
    single, shares = detectors.get(1) if args.plot else None, {}
    if single is not None:
        eigenvalues, axes = single.gaussians[0].directions()
        shares[test.name] = spectrum_share(single, axes, x)
    for ood in outliers:
        x = source.features(ood)
        scores = detection.score_each(detectors, x)
        export.add(ood, x, scores)
        if single is not None:
            shares[ood.name] = spectrum_share(single, axes, x)
        for m in detectors:
            report.add(test_scores[m], ood, scores[m], clusters=m,
                       panel=f"{test.name}, {m} cluster{'s' * (m > 1)}")
    if single is not None:
        report.plot("spectrum", figures.spectrum, eigenvalues.cpu().numpy(), shares, test.name)
    report.written += export.close(test.name, facts)
    report.close()


def spectrum_share(detector, axes, x):
    """Return the mean squared coordinates of features [N, D] along axes of a Gaussian: [rank]."""
    return detector.gaussians[0].along(detector.standardize(x), axes).cpu().numpy()


def note_singular(m, detector):
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
    program.run(main)
