#!/usr/bin/env python3
"""Tell outliers by the Mahalanobis distance of their features to clusters of the training ones.

    python eval_ssd.py --training-mode SimCLR --arch resnet50 --normalize --ckpt network.pth.tar
    python eval_ssd.py --ckpt results/temp/latest_exp/checkpoint/model_best.pth.tar --clusters 1 10
    python eval_ssd.py --features mine.npz

The first evaluates a published network, the second one of train.py, which says itself how it was
trained, the third features that someone else extracted. A SupCon network makes it SSD+. Appends a
line per outlier set to RESULTS/EXP_ssd.txt:
In-data = cifar10, OOD = cifar100, Clusters = 1, FPR95 = 0.5078, AUROC = 0.9063, AUPR = 0.8919
"""

import detection
import distributed
import evaluation
import exchange
import features
import figures
import utils
from utils import UserError, number

# The flags that mean something where features come from a file
WITH_FEATURES = {"config", "exp_name", "results_dir", "seed", "scores", "plot", "gpu", "clusters",
                 "training_mode", "features", "export", "again"}


def parser():
    """Build the command line: the original's flags with its defaults, and ours."""
    p = utils.Parser(description=__doc__)
    evaluation.add_arguments(p, needs_network=False)
    group = p.add_argument_group("detection")
    group.add_argument("--clusters", type=number(int, 1), nargs="+", default=[1], metavar="M",
                       help="clusters of the training features, one or several numbers; of a SupCE "
                       "network the classes are the clusters wherever M is above 1")
    group = p.add_argument_group("exchange", "features in a file; the README has its layout")
    group.add_argument("--features", metavar="FILE.npz",
                       help="score the features in this file instead of a network's")
    group.add_argument("--export", metavar="FILE.npz", help="write features and scores")
    return p


def main(argv=None):
    args = utils.parse_args(parser(), argv)
    if args.features is None:  # features in a file are for one process
        distributed.start()
    if args.gpu is not None:
        utils.note("--gpu does nothing")

    # Every image set, and a way to its features: the network as it was trained, or a file
    device = utils.device()
    if args.features is not None:
        _refuse_what_asks_for_a_network(args.features, vars(args))
        content = exchange.read(args.features)
        train, test, outliers = content.train, content.test, content.outliers
        training_mode = _training_mode(args.features, args.training_mode, content.training_mode)
        common = {**content.facts, "training_mode": training_mode}

        def take(images, mode="base"):
            return images.features

        crew = features.Crew()
        if not distributed.is_lead():  # there is nothing to share
            return
    else:
        if args.ckpt is None:
            raise UserError("--ckpt FILE is needed, the trained network, or --features FILE.npz")
        trained = evaluation.restore(
            args.ckpt, device, classes=args.classes, training_mode=args.training_mode,
            arch=args.arch, dataset=args.dataset, data_dir=args.data_dir,
            in_classes=args.in_classes, size=args.size, normalize=args.normalize,
        )
        with distributed.first_on_machine():  # which may have to download
            train, test, outliers = evaluation.load_images(
                trained, args.ood, seed=args.seed, download=not args.no_download,
                workers=args.workers,
            )
        crew = features.Crew(trained.encoder, [train, test, *outliers])
        if not distributed.is_lead():  # from here on, the others only compute features
            return crew.serve()
        training_mode = trained.training_mode
        kwargs = evaluation.extraction(
            trained, train, batch_size=args.batch_size, seed=args.seed, precision=args.precision,
            cache_dir=args.cache_dir, feature_store=args.feature_store,
        )
        common = evaluation.facts_of(trained, data_mode=args.data_mode, precision=args.precision,
                                     batch_size=kwargs["batch_size"])

        def take(images, mode="base"):
            return evaluation.take_features(trained, images, crew=crew, mode=mode, **kwargs)

    by_class = training_mode == "SupCE"
    if by_class and max(args.clusters) > 1 and train.class_names is None:
        raise UserError(f"--clusters {max(args.clusters)} of a SupCE network are its classes; the "
                        f"images of {train.name} have none")
    if max(args.clusters) > len(train) and not by_class:
        raise UserError(f"--clusters {max(args.clusters)} is more than the {len(train)} training "
                        "images")
    for flag in ("scores", "features"):
        if args.export is not None and args.export == getattr(args, flag):
            raise UserError(f"--export and --{flag} are the same file, {args.export}")
    export = exchange.Export(args.export)
    report = evaluation.Report(args.results_dir, args.exp_name, "ssd", train=train, seed=args.seed,
                               common=common, scores=args.scores, plot=args.plot, again=args.again)

    # What is not recorded yet: [(outlier set, numbers of clusters)]
    todo = report.todo(test, outliers, args.clusters, everything=args.export is not None)
    if not todo:
        crew.dismiss()
        return

    # Features of the training images; a detector per number of clusters, each fitted once
    x = take(train, args.data_mode)  # [N, D]
    export.add(train, x, key="train")
    labels = train.labels if by_class else None
    wanted = [m for m in args.clusters if any(m in clusters for _, clusters in todo)]
    detectors = detection.fit_each(x, wanted, labels, args.seed, device)
    del x
    for m, detector in detectors.items():
        _say_what_is_singular(m, detector)

    # Scores of the test images and of each outlier set
    x = take(test)
    inside = detection.score_each(detectors, x)
    export.add(test, x, inside, "test")
    draw_spectrum = args.plot and 1 in detectors
    if draw_spectrum:
        eigenvalues, axes = detectors[1].gaussians[0].directions()
        shares = {test.name: _shares(detectors[1], x, axes)}
    for ood, clusters in todo:
        x = take(ood)
        scores = detection.score_each({m: detectors[m] for m in clusters}, x)
        export.add(ood, x, scores)
        if draw_spectrum:
            shares[ood.name] = _shares(detectors[1], x, axes)
        for m in clusters:
            report.add(test, inside[m], ood, scores[m], clusters=m,
                       panel=f"{test.name}, {m} cluster{'s' * (m > 1)}")
    if draw_spectrum:
        report.draw("spectrum", figures.spectrum, eigenvalues.cpu().numpy(), shares, test.name)
    report.written += export.close(test.name, common)
    report.close()
    crew.dismiss()


def _refuse_what_asks_for_a_network(path, given):
    """Stop at a flag that features in a file can't follow."""
    alone = parser()
    for key, value in given.items():
        if key not in WITH_FEATURES and value != alone.get_default(key):
            raise UserError(f"--{key.replace('_', '-')} does not go with --features {path}: there "
                            "is no network and no image to ask, only what is in the file")


def _training_mode(path, given, known):
    """How the network of a file was trained: what the file says, else the flag, else None."""
    if known not in (None, *evaluation.MODES):
        raise UserError(f"--features {path}: its settings have training_mode {known}; known are "
                        f"{', '.join(evaluation.MODES)}")
    if None not in (given, known) and given != known:
        raise UserError(f"--training-mode {given} contradicts --features {path}, whose network "
                        f"was trained with {known}")
    return known or given


def _shares(detector, x, axes):
    """Mean squared coordinates of raw features [N, D] along the axes of one Gaussian: [rank]."""
    return detector.gaussians[0].along(detector.standardize(x), axes).cpu().numpy()


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
