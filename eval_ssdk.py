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
import utils
from infra import distributed, evaluation, program
from report.records import Report
from utils import UserError, number


def parser():
    """Build the command line: the original's flags with its defaults, and ours."""
    p = utils.Parser(description=__doc__)
    evaluation.add_arguments(p)
    add = p.add_argument_group("detection").add_argument
    add("--k", type=number(int, 1), default=1,
        help="known outliers of each class of an outlier set")
    add("--copies", type=number(int, 1), default=10, help="augmented copies of each known outlier")
    add("--clusters", type=int, choices=[1], default=1,
        help="SSDk has a single cluster, as in the original")
    return p


def split_known(ood, k, seed):
    """Divide an outlier set into k known images of each class and the rest."""
    generator = utils.generator(seed, "known", ood.name.partition(":")[0])
    try:
        known, rest = data.few_shot(ood.labels, k, generator)
    except ValueError as error:
        raise UserError(f"--k {k} takes a whole class of {ood.name}: {error}") from None
    return ood.subset(known), ood.subset(rest)


def main(argv=None):
    args = utils.parse_args(parser(), argv)
    distributed.start()
    if args.gpu is not None:
        utils.note("--gpu does nothing")

    # The network as it was trained, every image set, and which outliers are known.
    source = evaluation.open_network(args)
    train, test = source.train, source.test
    splits = [split_known(ood, args.k, args.seed) for ood in source.outliers]

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
        scores=args.scores, plot=args.plot,
        inputs={"--config": args.config, **source.inputs})

    # Fit the Gaussian of the in-distribution images, once.
    detector = detection.SSDk.fit(source.features(train, args.data_mode), device=utils.device())
    x_test = source.features(test)
    test_distance = detector.inlier_score(x_test)

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
            detector.score(x, gaussian), choice=detection.Choice("ssd", 1), against=rest.name,
            detector=f"ssdk, {args.k} known of each class",
            fields={"n_known": len(known), "known_rank": gaussian.rank})
    report.close()


if __name__ == "__main__":
    program.run(main)
