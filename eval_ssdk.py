#!/usr/bin/env python3
"""Tell outliers with the help of k known ones per class: SSDk.

    python eval_ssdk.py --ckpt results/temp/latest_exp/checkpoint/model_best.pth.tar --k 5
    python eval_ssdk.py --training-mode SimCLR --arch resnet50 --normalize --ckpt net.pth.tar --k 5

From each outlier set, k images of every class are taken as known, augmented `--copies` times, and
the others tested: distance to the training features less distance to the known outliers' features.
Appends a line per outlier set to RESULTS/EXP_ssdk.txt, of the form of eval_ssd.py's.
"""

import itertools

import data
import detection
import distributed
import evaluation
import features
import utils
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


def main(argv=None):
    args = utils.parse_args(parser(), argv)
    distributed.start()
    if args.clusters != 1:
        raise UserError(f"--clusters {args.clusters}: SSDk is for one cluster only")
    if args.gpu is not None:
        utils.note("--gpu does nothing")

    # The network as it was trained, every image set, and which outliers are known
    trained = evaluation.restore(
        args.ckpt, utils.device(), classes=args.classes, training_mode=args.training_mode,
        arch=args.arch, dataset=args.dataset, data_dir=args.data_dir, in_classes=args.in_classes,
        size=args.size, normalize=args.normalize,
    )
    with distributed.first_on_machine():  # which may have to download
        train, test, outliers = evaluation.load_images(
            trained, args.ood, seed=args.seed, download=not args.no_download,
            workers=args.workers,
        )
    splits = []
    for ood in outliers:
        try:
            known, rest = data.few_shot(
                ood.labels, args.k,
                utils.generator(args.seed, "known", ood.name.partition(":")[0]),
            )
        except ValueError as error:
            raise UserError(f"--k {args.k} takes a whole class of {ood.name}: {error}") from None
        splits.append((ood.take(known), ood.take(rest)))
    crew = features.Crew(trained.encoder, [train, test, *itertools.chain(*splits)])
    if not distributed.is_lead():  # from here on, the others only compute features
        return crew.serve()
    kwargs = evaluation.extraction(
        trained, train, batch_size=args.batch_size, seed=args.seed, precision=args.precision,
        cache_dir=args.cache_dir, feature_store=args.feature_store,
    ) | {"crew": crew}
    report = evaluation.Report(
        args.results_dir, args.exp_name, "ssdk", train=train, seed=args.seed, scores=args.scores,
        plot=args.plot, again=args.again,
        common=evaluation.facts_of(trained, data_mode=args.data_mode, precision=args.precision,
                                   batch_size=kwargs["batch_size"], k=args.k, copies=args.copies),
    )
    todo = report.todo(test, [rest for _, rest in splits], [args.clusters])
    if not todo:
        crew.dismiss()
        return
    left = [rest.name for rest, _ in todo]

    # Features of the in-distribution images; their Gaussian is fitted once
    detector = detection.SSDk.fit(
        evaluation.take_features(trained, train, mode=args.data_mode, **kwargs), trained.device
    )
    x_test = evaluation.take_features(trained, test, **kwargs)
    d_test = detector.distance(x_test)

    # Each outlier set: a Gaussian of its known images, scores of the rest
    for known, rest in (pair for pair in splits if pair[1].name in left):
        x = evaluation.take_features(trained, known, copies=args.copies, **kwargs)
        gaussian = detector.know(x)  # of [copies * k * classes, D]
        if gaussian.rank == 0:
            utils.note(f"{rest.name}: the known outliers have no extent (one image, one copy?), so "
                       "their distance is 0 everywhere and the scores are those of the inliers")
        x = evaluation.take_features(trained, rest, **kwargs)
        report.add(
            test, detector.score(x_test, gaussian, inside=d_test), rest,
            detector.score(x, gaussian), clusters=1,
            panel=f"{rest.name}, {args.k} known of each class", against=rest.name,
            n_known=len(known), known_rank=gaussian.rank,
        )
    report.close()
    crew.dismiss()


if __name__ == "__main__":
    utils.program(main, bad_input=(detection.FeatureError,))
