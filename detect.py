#!/usr/bin/env python3
"""Find the odd pictures of a folder: no labels needed, and a decision with a known error rate.

    python detect.py photos/                              # which pictures of this folder are odd?
    python detect.py inbox/ --good photos/                # which of these differ from those?
    python detect.py inbox/ --detector odd/detector.ssd   # again, later, without photos/
    python detect.py inbox/ --good photos/ --train        # SimCLR on photos/ first, 10 minutes

Pictures lie at any depth. Their features are those of a pretrained encoder, their score a distance
to the good pictures. A fifth of the good ones is kept out of the fit: p is the share of good
pictures that look at least as odd, and on average --false-alarms of the good ones are flagged,
whatever the distribution of scores. Writes OUT/index.html, OUT/scores.csv and OUT/detector.ssd.
"""

import contextlib
import hashlib
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import detection
import train
import trainers
import utils
from infra import evaluation, image_files, program, runs, storage
from report import pictures
from report.records import write_csv
from report.saved_detector import Encoder, PictureDetector
from utils import UserError, number

CALIBRATION = 5  # one good picture in so many calibrates
FOLDS = 5  # of a single folder: each is scored by what was fitted to the others
TOP = 10  # pictures on the terminal


def parser():
    """Build the command line."""
    p = utils.Parser(description=__doc__)
    p.add_argument("pictures", nargs="+", help="folders or files to search")
    add = p.add_argument_group("what is good").add_argument
    add("--good", nargs="+", metavar="DIR", help="good pictures (default: the others)")
    add("--detector", metavar="FILE", help="the detector.ssd of an earlier run, in place of --good")
    add("--false-alarms", type=number(float, above=0, below=1), default=0.05, metavar="SHARE",
        help="of good pictures, to be flagged on average")

    add = p.add_argument_group("detection").add_argument
    add("--score", choices=list(detection.SCORES), default="crossval",
        help="docs/detect.md compares them; knn takes the 2nd neighbour")
    evaluation.add_network_arguments(p)
    add("--train", action="store_true", help="train SimCLR ResNet-18 on the good pictures first")
    add("--minutes", type=number(float, above=0, high=1e5), default=10, help="of --train")

    add = p.add_argument_group("run").add_argument
    add("--out", default="odd", metavar="DIR", help="where results go")
    add("--seed", type=number(int, 0, 2**31 - 1), default=12345,
        help="of which good pictures calibrate, of folds and of --train")
    return p


def check_flags(args):
    """Stop if flags contradict each other."""
    given = [f"--{name}" for name in ("encoder", "ckpt", "train") if getattr(args, name)]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)}: one network makes the features")
    if args.detector is not None:
        for name in ("good", "encoder", "ckpt", "train", "size"):  # in the file
            if getattr(args, name):
                raise UserError(f"--{name} does not go with --detector {args.detector}, which has "
                                "its own encoder and good pictures")
    if args.train and args.good is None:
        raise UserError("--train learns from good pictures: --good DIR is needed")


def list_pictures(places, flag, unread):
    """Return the image files of folders, {real path: path as given}; broken links go to unread."""
    found = {}
    for place in places:
        if not os.path.exists(place):
            raise UserError(f"{flag}{place}: no such folder or file")
        files = [place]
        if os.path.isdir(place):
            files, others = image_files.find_images(place, unread)
            image_files.note_unread(place, others, len(files))
        found |= {os.path.realpath(file): file for file in files}
    if not found:
        raise UserError(f"{flag}{' '.join(places)}: no pictures ({image_files.SUFFIXES})")
    return found


def read_inputs(args, unread):
    """Return the pictures and the good pictures (or None), two lists of paths."""
    pictures = list_pictures(args.pictures, "", unread)
    if args.good is None:
        return list(pictures.values()), None
    good = list_pictures(args.good, "--good ", unread)
    if good.keys() <= pictures.keys():
        raise UserError(f"--good {' '.join(args.good)} is among the pictures to search; without "
                        "--good, the odd ones of a single folder are found")
    if both := good.keys() & pictures.keys():
        utils.note(f"{len(both)} pictures to search are among the good ones too, and do not count "
                   "as good")
    return list(pictures.values()), [path for real, path in good.items() if real not in pictures]


# --- the encoder ----------------------------------------------------------------------------------


def open_encoder(args):
    """Return the Encoder that the flags name: a pretrained one, or the network of a checkpoint."""
    trained = evaluation.open_trained(args)
    network = trained.encoder.eval().requires_grad_(False)
    return Encoder(trained.arch, network, evaluation.settings_of(trained))


def train_encoder(args, paths, folder):
    """Train SimCLR ResNet-18 on pictures for --minutes; returns the path of its checkpoint.

    The recipe, for these pictures and this machine, is kept in `folder`, so that the same command
    continues a training that was broken off.
    """
    import yaml

    key = f"{args.minutes} {args.size} {args.seed} {[(p, os.path.getsize(p)) for p in paths]}"
    home = folder / hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    recipe = home / "recipe.yaml"
    if not recipe.is_file():
        links = home / "pictures/train"
        links.mkdir(parents=True, exist_ok=True)
        for i, path in enumerate(paths):
            link = links / f"{i:07d}{Path(path).suffix}"
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.realpath(path))
        settings = trainers.recipe_for(len(paths), args.minutes, args.size, utils.device())
        settings |= {"training-mode": "SimCLR", "dataset": f"folder:{home.resolve() / 'pictures'}",
                     "seed": args.seed, "results-dir": str(home.resolve()), "exp-name": "run"}
        with storage.atomic_write(recipe, "w") as file:
            yaml.safe_dump(settings, file, sort_keys=False)
    settings = yaml.safe_load(recipe.read_text())
    run = home / "run/latest_exp"
    if not runs.is_finished(run):
        utils.say(f"training {settings['arch']} by SimCLR on {len(paths)} pictures of "
                  f"{settings['size']} pixels: {settings['epochs']} epochs, about "
                  f"{args.minutes:g} minutes; python train.py --config {recipe} does the same")
        with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
            train.main(["--config", str(recipe)])
    return str(run / "checkpoint/checkpoint.pth.tar")


# --- the detector ---------------------------------------------------------------------------------


def calibration_split(n, seed):
    """Divide n good pictures at random into those that calibrate and the rest: int64 indices."""
    order = torch.randperm(n, generator=utils.generator(seed, "calibration"))
    return order.tensor_split([n // CALIBRATION])


def fit(args, rows):
    """Fit the score that the flags name to features, float [n, D]."""
    settings = {"clusters": 1, "neighbours": min(2, len(rows))}
    value = settings.get(detection.SCORES[args.score].setting)
    return detection.Choice(args.score, value).fit(rows, seed=args.seed, device=utils.device())


def fit_to_good(args, encoder, paths, x):
    """Fit to the features x [n, D] of good pictures but a fifth, which calibrates."""
    held_out, fitted = calibration_split(len(paths), args.seed)
    detector = fit(args, detection.select(x, fitted))
    scores = detector.score(detection.select(x, held_out)) if len(held_out) else np.empty(0)
    return PictureDetector.of(encoder, args.score, detector, np.sort(scores), paths, x)


def score_each_other(args, encoder, paths, x):
    """Score each picture by what was fitted to four fifths that it is not in.

    Odd ones may be among them, so it is not known how good pictures score, and no p can be given.
    Returns: (PictureDetector of all, scores float64 [n]).
    """
    order = torch.randperm(len(paths), generator=utils.generator(args.seed, "folds"))
    scores, parts = np.empty(len(paths)), order.tensor_split(min(FOLDS, len(paths)))
    for i, asked in enumerate(parts):
        others = torch.cat([*parts[:i], *parts[i + 1 :]])
        detector = fit(args, detection.select(x, others))
        scores[asked.numpy()] = detector.score(detection.select(x, asked))
    return PictureDetector.of(encoder, args.score, fit(args, x), np.empty(0), paths, x), scores


def decide(p, share, calibration):
    """Return which pictures are flagged, bool [n], or None where that cannot be decided."""
    least = int(np.ceil(1 / share)) - 1
    if p is None:
        return None
    if len(calibration) < least:
        utils.note(f"--false-alarms {share:g} needs {least} good pictures that calibrate, a fifth "
                   f"of them all; there are {len(calibration)}: the pictures are ranked only")
        return None
    return p <= share


# --- what comes out -------------------------------------------------------------------------------


def check_places(args, out):
    """Return the paths of page, scores and detector (None if one is given), all ours to write."""
    page, scores, detector = (out / name for name in ("index.html", "scores.csv", "detector.ssd"))
    detector = None if args.detector else detector
    storage.check_outputs({"--out": [page, scores, detector]}, {
        "the pictures": args.pictures, "--good": args.good, "--ckpt": args.ckpt,
        "--config": args.config})
    for place in [*args.pictures, *(args.good or [])]:
        if os.path.realpath(place) == os.path.realpath(out):
            raise UserError(f"--out {out} is the folder of pictures {place}; choose another")
    if page.exists() and not pictures.is_ours(page):
        raise UserError(f"--out {out} holds an {page.name} that detect.py did not write; choose "
                        "another folder")
    return page, scores, detector


def write_scores(path, rows, unread):
    """Write the CSV of all pictures: rows of `Row`, then {path: UserError} of those not read."""
    table = [("rank", "image", "score", "p", "flagged", "reason")]
    for row in rows:
        p = "" if row.p is None else f"{row.p:.6g}"
        flagged = "" if row.flagged is None else "yes" if row.flagged else "no"
        table.append((row.rank, row.path, row.score, p, flagged, ""))
    write_csv(path, table + [("", file, "", "", "", str(e)) for file, e in unread.items()])


def print_summary(args, rows, unread, page):
    """Print the oddest pictures and one line on all."""
    utils.say("rank  p       picture")
    for row in rows[:TOP]:
        p = "      " if row.p is None else f"{row.p:.4f}"
        utils.say(f"{row.rank:4}  {p}  {' '.join(row.path.splitlines())}"
                  f"{'  FLAGGED' if row.flagged else ''}")
    for error in list(unread.values())[:TOP]:
        utils.note(f"not read: {error}")
    text = f"{len(rows)} pictures ranked"
    if rows[0].flagged is not None:
        text = (f"{sum(row.flagged for row in rows)} of {len(rows)} pictures flagged; were all "
                f"good, {args.false_alarms * len(rows):.1f} would be on average")
    text += f"; {len(unread)} could not be read" * bool(unread)
    utils.say(f"{text}; see {page}")


def main(argv=None):
    args = utils.parse_args(parser(), argv)
    began = time.perf_counter()
    check_flags(args)
    os.environ.setdefault("RANK", "0")  # one process is enough, however many GPUs are visible

    # Pictures, and the places of the results, before anything is computed.
    unread = {}  # {path: reason}
    searched, good = read_inputs(args, unread)
    out = Path(args.out)
    page_path, scores_path, detector_path = check_places(args, out)

    # Features lie on disk until the end, so that memory does not grow with the pictures.
    with tempfile.TemporaryDirectory(prefix=".features-", dir=out) as work:
        # Detector: an earlier one, or fitted to the good pictures but a fifth, which calibrates.
        found = args.detector and PictureDetector.load(args.detector, utils.device())
        if args.train:
            image_files.decode(good, 8, upright=True, failed=unread)  # which can be read at all
            good = [path for path in good if path not in unread]
            _, learnt = calibration_split(len(good), args.seed)
            args.ckpt = train_encoder(args, [good[i] for i in learnt.tolist()], out / "training")
        encoder = found.encoder if found else open_encoder(args)
        if good is not None:
            good, x, failed = encoder.features(good, "good pictures", work)
            unread |= failed
            if len(good) < 2:
                raise UserError(f"--good {' '.join(args.good)}: {len(good)} pictures that can be "
                                "read, and 2 are needed")
            found = fit_to_good(args, encoder, good, x)

        # Scores: larger = more outlying. Without good pictures by those of the same folder.
        paths, x, failed = encoder.features(searched, "pictures", work)
        unread |= failed
        if len(paths) < (1 if found else 2):
            raise UserError(
                f"{' '.join(args.pictures)}: {len(paths)} pictures that can be read"
                + (f" ({next(iter(unread.values()))})" if unread else "")
                + (", and 2 are needed; --good DIR names good ones" if not found else ""))
        if found:
            scores = found.detector.score(x, "the features of the pictures")
        else:
            found, scores = score_each_other(args, encoder, paths, x)

        # Decide, and look for the good pictures that the oddest are like.
        p = detection.p_values(scores, found.calibration) if len(found.calibration) else None
        flagged = decide(p, args.false_alarms, found.calibration)
        order = np.argsort(-scores, kind="stable").tolist()
        shown = order[:pictures.SHOWN]
        alike = found.nearest(x[torch.tensor(shown)], 3, [paths[i] for i in shown])

    # Write, the page last, since it is what people wait for.
    rows = [pictures.Row(rank, paths[i], float(scores[i]), None if p is None else float(p[i]),
                         None if flagged is None else bool(flagged[i]))
            for rank, i in enumerate(order, 1)]
    write_scores(scores_path, rows, unread)
    if detector_path:
        found.save(detector_path)
    title = f"The odd ones of {' '.join(args.pictures)}"
    if args.good or args.detector:
        title += f", compared with {' '.join(args.good or [args.detector])}"
    facts = {"encoder": encoder.name, "size": f"{encoder.settings.size} pixels",
             "score": found.score, "seconds": round(time.perf_counter() - began)}
    pictures.write(page_path, title, rows, alike, unread, found.calibration, args.false_alarms,
                   facts)
    print_summary(args, rows, unread, page_path)


if __name__ == "__main__":
    program.run(main)
