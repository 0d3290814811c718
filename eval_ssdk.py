#!/usr/bin/env python3
"""Detect outliers with the help of k known ones per class: SSDk.

    python eval_ssdk.py --ckpt results/temp/latest_exp/checkpoint/model_best.pth.tar --k 5
    python eval_ssdk.py --training-mode SimCLR --arch resnet50 --normalize --ckpt net.pth.tar --k 5

From each outlier set, k images of every class are taken as known, augmented `--copies` times, and
the others tested: distance to the training features less distance to the known outliers' features.
Appends a line per outlier set to RESULTS/EXP_ssdk.txt, of the form of eval_ssd.py's.
"""

import data
import detection
import evaluation
import utils
from infra import distributed, program
from report.records import Report
from utils import UserError, number


def parser():
    """Build the command line: the original's flags with its defaults, and ours."""
    p = utils.Parser(description=__doc__)
    evaluation.add_arguments(p)
    group = p.add_argument_group("detection")
    group.add_argument("--k", type=number(int, 1), default=1,
                       help="known outliers of each class of an outlier set")
    group.add_argument("--copies", type=number(int, 1), default=10,
                       help="augmented copies of each known outlier")
    group.add_argument("--clusters", type=number(int, 1), default=1, metavar="M",
                       help="must be 1: SSDk has a single cluster, as in the original")
    return p


def split_known(outliers, k, seed):
    """Divide each outlier set into k known images of each class and the rest: [(known, rest)]."""
    splits = []
    for ood in outliers:
        generator = utils.generator(seed, "known", ood.name.partition(":")[0])
        try:
            known, rest = data.few_shot(ood.labels, k, generator)
        except ValueError as error:
            raise UserError(f"--k {k} takes a whole class of {ood.name}: {error}") from None
        splits.append((ood.subset(known), ood.subset(rest)))
    return splits


def main(argv=None):
    args = utils.parse_args(parser(), argv)
    distributed.start()
    if args.clusters != 1:
        raise UserError(f"--clusters {args.clusters}: SSDk is for one cluster only")
    if args.gpu is not None:
        utils.note("--gpu does nothing")

    # The network as it was trained, every image set, and which outliers are known.
    given = {key: getattr(args, key) for key in evaluation.FOREIGN}
    source = evaluation.open_network(
        args.ckpt, given, args.classes, args.ood, seed=args.seed, download=not args.no_download,
        workers=args.workers, batch_size=args.batch_size, precision=args.precision,
        cache_dir=args.cache_dir, feature_store=args.feature_store)
    train, test = source.train, source.test
    splits = split_known(source.outliers, args.k, args.seed)

    # Of several processes, the main one does the rest; the others compute their batches of each
    # set, in the order in which it asks for them.
    if not distributed.is_main_process():
        source.features(train, args.data_mode)
        source.features(test)
        for known, rest in splits:
            source.features(known, copies=args.copies)
            source.features(rest)
        return
    report = Report(
        args.results_dir, args.exp_name, "ssdk", train=train, test=test, seed=args.seed,
        facts={**source.facts, "data_mode": args.data_mode, "k": args.k, "copies": args.copies},
        scores=args.scores, plot=args.plot)

    # Fit the Gaussian of the in-distribution images, once.
    detector = detection.SSDk.fit(source.features(train, args.data_mode), utils.device())
    x_test = source.features(test)
    test_distance = detector.distance(x_test)

    # Each outlier set: fit a Gaussian of its known images, score the rest of it.
    for known, rest in splits:
        x = source.features(known, copies=args.copies)  # [copies * k * classes, D]
        gaussian = detector.know(x)
        if gaussian.rank == 0:
            utils.note(f"{rest.name}: the known outliers have no extent (one image, one copy?), so "
                       "their distance is 0 everywhere and the scores are those of the inliers")
        x = source.features(rest)
        report.add(
            detector.score(x_test, gaussian, inside=test_distance), rest,
            detector.score(x, gaussian), clusters=1, against=rest.name,
            panel=f"{rest.name}, {args.k} known of each class",
            fields={"n_known": len(known), "known_rank": gaussian.rank})
    report.close()


if __name__ == "__main__":
    program.run(main)
