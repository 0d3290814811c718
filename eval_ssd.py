#!/usr/bin/env python3
"""Detect outliers by the distance of their features to the training ones, SSD's or another.

    python eval_ssd.py --training-mode SimCLR --arch resnet50 --normalize --ckpt network.pth.tar
    python eval_ssd.py --ckpt results/temp/latest_exp/checkpoint/model_best.pth.tar --clusters 1 10
    python eval_ssd.py --ckpt network.pth.tar --score ssd tied knn crossval
    python eval_ssd.py --features mine.npz

The first evaluates a published network, the second one of train.py, which says itself how it was
trained, the third compares scores, the fourth scores features that someone else extracted. A SupCon
network makes it SSD+. Appends a line per outlier set to RESULTS/EXP_ssd.txt:
In-data = cifar10, OOD = cifar100, Clusters = 1, FPR95 = 0.5078, AUROC = 0.9063, AUPR = 0.8919
"""

import detection
import trainers
import utils
from infra import distributed, evaluation, program
from report import exchange, figures
from report.records import Report
from utils import UserError, number

# The flags that mean something where features come from a file
WITH_FEATURES = {"config", "exp_name", "results_dir", "seed", "scores", "plot", "gpu", "score",
                 *detection.DEFAULTS, "training_mode", "features", "export"}


def parser():
    """Build the command line: the original's flags with its defaults, and ours."""
    p = utils.Parser(description=__doc__)
    evaluation.add_arguments(p)
    group = p.add_argument_group("detection")
    group.add_argument("--score", choices=list(detection.SCORES), nargs="+", default=["ssd"],
                       help="one or several: Mahalanobis distance to the nearest cluster (ssd), "
                       "with one covariance for all (tied), Ledoit and Wolf's (shrunk), or "
                       "cross-validated eigenvalues (crossval); distance to a neighbour (knn)")
    group.add_argument("--clusters", type=number(int, 1), nargs="+", default=[1], metavar="M",
                       help="clusters of the training features, one or several numbers; of a SupCE "
                       "network the classes are the clusters wherever M is above 1")
    group.add_argument("--neighbours", type=number(int, 1), nargs="+", default=[50], metavar="K",
                       help="of knn: which nearest training feature counts")
    group = p.add_argument_group("exchange", "features in a file; docs/features.md has its layout")
    group.add_argument("--features", metavar="FILE.npz",
                       help="score the features in this file instead of a network's")
    group.add_argument("--export", metavar="FILE.npz", help="write features and scores")
    return p


def open_source(args):
    """Open the source of features that the flags name: a file, or a network and its images."""
    if args.features is None:
        return evaluation.open_network(args)
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
    mode = trainers.TRAINING_MODES.get(source.facts["training_mode"])
    labels = train.labels if mode is not None and mode.label_clusters else None
    choices = detection.choices(args.score, vars(args))
    check_settings(args, choices, labels, train)

    # Of several processes, the main one does the rest; the others compute their batches of each
    # set, in the order in which it asks for them.
    if not distributed.is_main_process():
        source.features(train, args.data_mode)
        for images in (test, *outliers):
            source.features(images)
        return
    facts = {"data_mode": args.data_mode, **source.facts}
    report = Report(args.results_dir, args.exp_name, "ssd", train=train, test=test, seed=args.seed,
                    facts=facts, scores=args.scores, plot=args.plot,
                    outputs={"--export": args.export},
                    inputs={"--config": args.config, **source.inputs})
    export = exchange.Export(args.export)

    # Fit a detector for each score and each value of its setting.
    x = source.features(train, args.data_mode)  # [N, D]
    export.add(train, x, key="train")
    detectors = {choice: choice.fit(x, labels, args.seed, utils.device()) for choice in choices}
    del x  # of all sets together, no more than one is in memory
    for choice, detector in detectors.items():
        for remark in detector.remarks():
            utils.note(f"{choice}: {remark}")

    # Score the test images once, and each outlier set; larger is more outlying.
    single, shares = detectors.get(detection.Choice("ssd", 1)) if args.plot else None, {}
    eigenvalues, axes = single.gaussians[0].directions() if single else (None, None)
    for images in (test, *outliers):
        x = source.features(images)
        scores = detection.score_each(detectors, x)
        export.add(images, x, scores, "test" if images is test else None)
        if single:
            share = single.gaussians[0].along(single.standardize(x), axes)
            shares[images.name] = share.cpu().numpy()
        if images is test:
            test_scores = scores
            continue
        for choice in detectors:
            report.add(test_scores[choice], images, scores[choice], choice=choice)
    if single:
        report.plot("spectrum", figures.spectrum, eigenvalues.cpu().numpy(), shares, test.name)
    report.written += export.close(test.name, facts)
    report.close()


def check_settings(args, choices, labels, train):
    """Stop if no score has a setting that was given, or the training images are too few for one."""
    used = {detection.SCORES[score].setting for score in args.score}
    for flag, default in detection.DEFAULTS.items():
        if getattr(args, flag) != [default] and flag not in used:
            raise UserError(f"--{flag} is no setting of --score {' '.join(args.score)}")
    for score, value in choices:
        flag = detection.SCORES[score].setting
        if flag == "clusters" and labels is not None:
            if value > 1 and train.class_names is None:
                raise UserError(f"--clusters {value} of a classifier are its classes; the images of"
                                f" {train.name} have none")
        elif flag and value > len(train):
            raise UserError(f"--{flag} {value} is more than the {len(train)} training images")


if __name__ == "__main__":
    program.run(main)
