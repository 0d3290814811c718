#!/usr/bin/env python3
"""Train one network on images: SimCLR (no labels), SupCon or SupCE (labels).

    python train.py --training-mode SimCLR --dataset cifar10 --normalize --warmup
    python train.py --dataset digits --arch resnet18 --size 8 --epochs 20 --batch-size 128 --lr 0.1

The first is the paper's recipe (ResNet-50, 510 epochs); the second trains for minutes on a CPU.
Writes RESULTS/EXP/N--dataset-D-arch-A-lr-L_epochs-E/ with setup.log, log.jsonl and checkpoint/.
The same command continues a run that was broken off, and ends with the weights of an unbroken one.
All visible GPUs are used; several machines by torchrun or slurm/train_nodes.sbatch.
"""

import argparse
import math
import os
import platform
import shlex
import signal
import sys
import time
from pathlib import Path

import torch

import data
import distributed
import models
import runs
import trainers
import utils
from utils import UserError, number


def parser():
    """Build the command line: the original's flags with its defaults, and ours."""
    p = utils.Parser(description=__doc__)
    group = p.add_argument_group("run")
    group.add_argument("--exp-name", type=utils.experiment, default="temp",
                       help="folder of the run below --results-dir")
    group.add_argument("--results-dir", "--results_dir", default="./results",
                       help="where runs are written")
    group.add_argument("--seed", type=number(int, 0, 2**31 - 1), default=12345,
                       help="decides every random draw")
    group.add_argument("--print-freq", type=number(int, 1), default=100,
                       help="steps between two records of the loss")
    group.add_argument("--save-freq", type=number(int, 1), default=50,
                       help="epochs between two checkpoints that are kept")
    group.add_argument("--save-steps", type=number(int, 1), metavar="N",
                       help="save every N steps of an epoch too (default: after each epoch, and "
                       "when a signal asks for an end)")
    group.add_argument("--val-freq", type=number(int, 1), default=1,
                       help="epochs between two looks at the test images")
    group.add_argument("--no-resume", action="store_true",
                       help="start a new run even where an unfinished one could be continued")
    group.add_argument("--method", help="does nothing; accepted because the original had it")
    group.add_argument("--gpu", help="does nothing; CUDA_VISIBLE_DEVICES chooses the GPU")

    group = p.add_argument_group("network")
    group.add_argument("--training-mode", choices=list(trainers.MODES), default="SimCLR",
                       help="the loss: without labels, with labels, cross-entropy")
    group.add_argument("--arch", choices=list(models.ARCHITECTURES), default="resnet50",
                       help="the encoder")
    group.add_argument("--num-classes", type=number(int, 1),
                       help="outputs of the SupCE classifier (default: the data set's classes)")
    group.add_argument("--ckpt", metavar="FILE", help="start from the weights of a checkpoint")

    group = p.add_argument_group("images")
    group.add_argument("--dataset", default="cifar10", metavar="SET",
                       help=f"{', '.join(data.TRAINABLE)}; folder:PATH and npz:PATH say where")
    group.add_argument("--data-dir", default="./datasets",
                       help="where image sets are and are downloaded to; for folder and npz "
                       "without PATH, the folder (with train/ and test/) or the file itself")
    group.add_argument("--no-download", action="store_true", help="never fetch a missing set")
    group.add_argument("--in-classes", type=utils.class_list, metavar="LIST",
                       help="train on these classes only, as 0-5 or 0,3,7")
    group.add_argument("--size", type=number(int, 8, 4096), default=32,
                       help="side of images in pixels")
    group.add_argument("--normalize", action=argparse.BooleanOptionalAction, default=False,
                       help="normalise colours with the data set's constants")
    group.add_argument("--mean", type=number(float, 0, 1), nargs=3, metavar=("R", "G", "B"),
                       help="for --normalize, from 0 to 1 (default: the data set's, measured where "
                       "it has none)")
    group.add_argument("--std", type=number(float, above=0, high=1), nargs=3,
                       metavar=("R", "G", "B"), help="goes with --mean")
    group.add_argument("--workers", type=number(int, 0, 1024), metavar="N",
                       help="processes that decode and crop images of folder and imagenet as they "
                       "are needed; 0 decodes all into memory first (default: 0, for imagenet the "
                       f"processor's cores, {data.MOST_WORKERS} at most)")

    group = p.add_argument_group("optimisation")
    group.add_argument("--epochs", type=number(int, 1), default=500,
                       help="passes over the images, warm-up not counted")
    group.add_argument("--batch-size", type=number(int, 1), default=512,
                       help="images a step, of all processes together")
    group.add_argument("--lr", type=number(float, above=0, high=1e30), default=0.5,
                       help="learning rate at the start of the cosine")
    group.add_argument("--momentum", type=number(float, 0, below=1), default=0.9,
                       help="of SGD, without Nesterov")
    group.add_argument("--weight-decay", type=number(float, 0, 1e30), default=1e-4,
                       help="on every parameter")
    group.add_argument("--warmup", action=argparse.BooleanOptionalAction, default=False,
                       help=f"{trainers.WARMUP_EPOCHS} more epochs before the others, in which the "
                       "learning rate rises from 0.01")
    group.add_argument("--cycle-momentum", action=argparse.BooleanOptionalAction, default=True,
                       help="let momentum fall from 0.9 to 0.8 in the warm-up and stay there, "
                       "whatever --momentum says, as the original does (default: on)")
    group.add_argument("--temperature", type=number(float, above=0), default=0.5,
                       help="T of the contrastive loss")
    group.add_argument("--sync-bn", action="store_true",
                       help="take the statistics of batch norm over the batch of all processes "
                       "(default: each over its share, as the original does)")

    group = p.add_argument_group("speed", "all off by default: plain float32")
    group.add_argument("--precision", choices=["fp32", "bf16"],
                       help="bf16: the network computes in bfloat16; weights, batch statistics, "
                       "normalisation and loss stay in float32 (default: fp32)")
    group.add_argument("--channels-last", action=argparse.BooleanOptionalAction,
                       help="memory layout with the channels innermost (default: off)")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction,
                       help="torch.compile of network and augmentation (default: off)")
    group.add_argument("--fast", action="store_true",
                       help="those of the three that pay on this device, and says which")
    group.add_argument("--deterministic", action="store_true",
                       help="the same weights from the same command on a GPU too, slower; a CPU "
                       "does so anyway")
    return p


def _choose_speed(args, device):
    """Return {precision, channels_last, compile}: what was asked for, --fast for the rest."""
    plain = {"precision": "fp32", "channels_last": False, "compile": False}
    fast = trainers.fast_settings(device) if args.fast else plain
    given = {key: getattr(args, key) for key in plain}
    chosen = {key: fast[key] if value is None else value for key, value in given.items()}
    if args.fast:
        utils.note("--fast is here " + ", ".join(
            f"{'' if value else 'no '}{key}".replace("_", "-") if key != "precision" else value
            for key, value in chosen.items()))
    return chosen


def _check_batches(n, batch_size, size, mode, sync_bn):
    """Stop if a batch would be too small for the processes, the loss or batch norm."""
    world = distributed.world()
    if min(n, batch_size) < world:
        raise UserError(f"--batch-size {batch_size} with {n} training images: {world} processes "
                        "need at least an image each a step")
    if mode.contrastive and min(n, batch_size) < 2:
        raise UserError(f"--batch-size {batch_size} with {n} training images: a contrastive loss "
                        "needs at least 2 images a step")
    last = n % batch_size or batch_size
    least = last if sync_bn else min(batch_size, last) // world
    if not mode.contrastive and size == 8 and least <= 1:
        whose = f" for one of {world} processes" if world > 1 else ""
        raise UserError(f"--batch-size {batch_size} leaves a step of 1 image of {n}{whose}, too "
                        "few for batch norm at --size 8; choose another")


def _check_constants(mean, std, normalize):
    """Stop if constants of normalisation were given that would mean nothing."""
    if (mean is None) != (std is None):
        raise UserError("--mean and --std go together: one is given without the other")
    if mean is not None and not normalize:
        raise UserError("--mean and --std are what --normalize normalises with, and that is off")


def _note_what_differs(path, config, **settings):
    """Say which settings a checkpoint to start from was trained with otherwise."""
    for key, value in settings.items():
        before = config.get(key, value) if isinstance(config, dict) else value
        if str(before).partition(":")[0] != str(value).partition(":")[0]:
            utils.note(f"--ckpt {path} was trained with {key} {before}, this is {key} {value}")


def _compare(settings):
    """Stop if the processes were not started with the same settings, a flat dict."""
    for other, there in enumerate(distributed.everyones(settings)):
        for key, here in settings.items():
            if there.get(key) != here:
                raise UserError(f"{key} is {here} in process {distributed.rank()}, on "
                                f"{platform.node()}, and {there.get(key)} in process {other}; all "
                                "have to be started with the same command and images")


def _shown(device):
    """The devices that compute, in words."""
    world = distributed.world()
    return f"{device} in each of {world} processes" if world > 1 else str(device)


def _watch(network, test, mode, loss, batch_size, images):
    """Say how good the network is, and by what measure: (score, its name)."""
    score = None
    if test is not None:
        score = trainers.monitor(network, test, mode, batch_size=batch_size, **images)
    if score is None:
        return -loss, "minus the training loss (no classes of test images to tell apart)"
    kind = "20-NN" if mode.contrastive else "top-1"
    return score, f"{kind} accuracy on the test images"


def main(argv=None):
    args = utils.parse_args(parser(), argv)
    distributed.start()
    lead = distributed.is_lead()  # the one process that writes
    mode = trainers.MODES[args.training_mode]
    _check_constants(args.mean, args.std, args.normalize)
    for flag in ("method", "gpu"):
        if getattr(args, flag) is not None:
            utils.note(f"--{flag} does nothing")

    # Device, and what it computes with
    device = utils.device()
    speed_settings = _choose_speed(args, device)
    vars(args).update(speed_settings)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not args.deterministic  # shapes hardly ever change

    # Images: the whole set on the device, as uint8; or in files, for workers to decode
    workers = data.default_workers(args.dataset) if args.workers is None else args.workers
    where = dict(data_dir=args.data_dir, size=args.size, download=not args.no_download,
                 workers=workers)
    with distributed.first_on_machine():  # which may have to download
        train = data.load(args.dataset, "train", crops=True, **where)
        has_test = data.has_split(args.dataset, "test", data_dir=args.data_dir)
        test = data.load(args.dataset, "test", **where) if has_test else None
    in_files = isinstance(train.pixels, data.Files)
    if args.workers and not in_files:
        utils.note(f"--workers does nothing: {args.dataset} is not a set of image files")
    if args.in_classes:
        train = data.restrict(train, args.in_classes)
        test = data.restrict(test, args.in_classes) if has_test else None
    classes = len(train.class_names) if train.class_names else 0
    if mode.labels and classes < 2:
        raise UserError(f"--training-mode {args.training_mode} needs images of at least 2 classes, "
                        f"{args.dataset} has {classes}; SimCLR needs none")
    num_classes = args.num_classes or classes
    if args.training_mode == "SupCE" and num_classes < classes:
        raise UserError(f"--num-classes {num_classes} is less than the {classes} of {args.dataset}")
    _check_batches(len(train), args.batch_size, args.size, mode, args.sync_bn)
    mean, std = args.mean, args.std
    if args.normalize and mean is None:
        mean, std = data.normalisation(args.dataset, train)
    hashes = {split: images and data.fingerprint(images.pixels, images.labels)
              for split, images in (("train", train), ("test", test))}
    train = data.to(train, device)

    # Network and optimiser
    network = models.build_model(
        args.arch, args.training_mode, num_classes, utils.generator(args.seed, "weights")
    )
    if args.ckpt:
        state, rest = utils.load_checkpoint(args.ckpt)
        try:
            models.restore(network, state)
        except ValueError as error:
            raise UserError(f"--ckpt {args.ckpt} does not fit --arch {args.arch} --training-mode "
                            f"{args.training_mode}: {error}") from None
        _note_what_differs(args.ckpt, rest.get("config"), size=args.size, normalize=args.normalize,
                           dataset=args.dataset)
    layout = torch.channels_last if args.channels_last else torch.preserve_format
    network.to(device, memory_format=layout)
    if args.sync_bn:
        network = distributed.sync_batch_norm(network)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay,
        fused=device.type == "cuda",
    )

    # Run folder: a new one, or an unfinished one and where it stands
    label = (f"dataset-{data.parse_spec(args.dataset)[0]}-arch-{args.arch}-lr-{args.lr}"
             f"_epochs-{args.epochs}")
    config = utils.plain(vars(args)) | {
        "num_classes": num_classes, "mean": mean, "std": std,
        "data_dir": str(Path(args.data_dir).resolve()),  # evaluation may be started elsewhere
        "dataset": data.absolute(args.dataset),
        "in_files": in_files,  # the crops are others than of images in memory
        "constants": args.mean and [args.mean, args.std],  # as given; measured ones don't count
    }
    places = ("config", "data_dir", "dataset", "results_dir")  # others on another machine, maybe
    _compare({f"--{key.replace('_', '-')}": config[key] for key in config if key not in places}
             | {f"the sha256 of the {split} images": digest for split, digest in hashes.items()}
             | {"the version of torch": torch.__version__})
    again = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"  # a requeued job, typed once
    if args.no_resume and again:
        utils.note("--no-resume does not count at a restart by Slurm: the run is continued")
    run = checkpoints = found = None
    if lead:
        run = runs.open_run(args.results_dir, args.exp_name, label, config, hashes,
                            resume=again or not args.no_resume)
        checkpoints = runs.Checkpoints(run.folder / "checkpoint")
        found = run.folder, run.taken_up, checkpoints.newest()
    folder, taken_up, saved = distributed.from_lead(found)
    at = {"epoch": 0, "step": 0, "losses": None, "best": -math.inf, "log_bytes": 0}
    if saved:
        network.load_state_dict(saved["state_dict"])
        optimizer.load_state_dict(saved["optimizer"])
        at = saved["progress"]
        for key, now in (("device", device.type), ("processes", distributed.world())):
            if at.get(key, now) != now:
                utils.note(f"the run was trained with {key} {at[key]} so far and goes on with "
                           f"{now}")

    # Logs; what they say of later steps goes, since those are made again
    steps = math.ceil(len(train) / args.batch_size)
    warm = trainers.WARMUP_EPOCHS if args.warmup else 0
    log = runs.Log(folder, keep=at["log_bytes"]) if lead else runs.NoLog()
    log.line(str(args))
    event = {"event": "resume", "epoch": at["epoch"] - warm, "step": at["step"]}
    log.record(**(event if saved else {"event": "start"}),
               command=shlex.join(["python", *sys.argv]), config=config, run=str(folder),
               device=str(device), processes=distributed.world(), versions=utils.versions())
    log.line(f"{len(train)} training images, {len(test) if test else 0} test images of "
             f"{args.dataset}; {_shown(device)}; run folder {folder}")
    if saved:
        log.line(f"continued: {at['epoch']} of {warm + args.epochs} epochs are done, and "
                 f"{at['step']} of {steps} steps of the next")
    elif taken_up:
        log.line("it was broken off before anything was saved, and begins again")

    # Epochs: those of the main part count from 0, as in the original; the warm-up's come before
    images = dict(size=args.size, mean=mean, std=std)
    train_step = trainers.Step(
        network, optimizer, train, mode, temperature=args.temperature, seed=args.seed,
        sync_bn=args.sync_bn, **speed_settings, **images,
    )
    best = at["best"]
    agreement = distributed.Agreement()

    def rates(epoch, step):
        return trainers.schedule(
            (warm + epoch) * steps + step, steps, args.epochs, args.lr, args.momentum,
            args.warmup, args.cycle_momentum,
        )

    def report(epoch, step, loss, speed):
        lr, momentum = rates(epoch, step)
        log.record(event="step", epoch=epoch, step=step, loss=loss, lr=lr, momentum=momentum,
                   views_per_s=round(speed, 1))

    def save(epoch, step, losses=None, names=()):
        """Save the state at a step of an epoch; `epoch` may be the one after the last."""
        if not trainers.is_finite(network):  # the last step's loss came before its update
            where = f"step {step} of epoch {epoch}" if step else f"epoch {epoch - 1}"
            raise utils.RunError(f"weights are not finite after {where}; stopped, the checkpoints "
                                 "of earlier steps are untouched")
        if not lead:
            return
        run.claim.check()
        written = log.sync()
        checkpoints.save({
            "epoch": max(epoch, 0),  # of the main part that are done
            "arch": args.arch,
            "state_dict": network.state_dict(),
            "best_prec1": 100 * max(best, 0.0),  # per cent, as the original; no accuracy, no best
            "optimizer": optimizer.state_dict(),
            "config": config,
            "progress": {  # from which the run goes on; its epochs count the warm-up
                "epoch": warm + epoch, "step": step, "best": best, "log_bytes": log.size,
                "losses": None if losses is None else losses.cpu().clone(),
                "device": device.type, "processes": distributed.world(),
            },
        }, names, hold=not written)

    def after_step(epoch, step, losses):
        asked = agreement.hear(stop.number)
        due = args.save_steps and (step + 1) % args.save_steps == 0 and step + 1 < steps
        if due or asked:
            losses = distributed.total(losses)
            trainers.stop_if_not_finite(losses, epoch, rates)
            save(epoch, step + 1, losses)
        if asked:
            end(asked, f"epoch {epoch}, step {step + 1} of {steps}")

    def end(number, where):
        name, missing = signal.Signals(number).name, checkpoints and checkpoints.missing
        missing = distributed.from_lead(missing)  # and nobody ends before rank 0 has saved
        if missing:
            raise utils.RunError(f"stopped by {name}, and {missing[-1]} could not be written; the "
                                 "same command continues from the one before")
        log.line(f"stopped by {name} after {where}; saved, the same command continues")
        raise utils.Stopped(f"stopped by {name}; the same command continues {folder} after {where}")

    with runs.stop_on_signals() as stop:
        for epoch in range(at["epoch"] - warm, args.epochs):
            began = time.perf_counter()
            here = epoch + warm == at["epoch"]  # where the run was broken off
            loss, speed = trainers.train_epoch(
                train_step, epoch=epoch, draws=warm + epoch, rates=rates, seed=args.seed,
                batch_size=args.batch_size, print_freq=args.print_freq, report=report,
                after_step=after_step, first=at["step"] if here else 0,
                losses=at["losses"] if here else None,
            )
            lr, momentum = rates(epoch, steps - 1)

            # The warm-up is not watched, as in the original: the best is one of the main part
            watched_from = time.perf_counter()
            score, monitor_name = None, "none in this epoch"
            if epoch >= 0 and ((epoch + 1) % args.val_freq == 0 or epoch + 1 == args.epochs):
                score, monitor_name = _watch(network, test, mode, loss, args.batch_size,
                                             images | {"precision": args.precision})
            is_best = score is not None and score > best
            best = score if is_best else best
            log.record(event="epoch", epoch=epoch, loss=loss, monitor=score,
                       monitor_name=monitor_name, best=best if math.isfinite(best) else None,
                       lr=lr, momentum=momentum, views_per_s=round(speed, 1),
                       monitor_seconds=round(time.perf_counter() - watched_from, 3),
                       seconds=round(time.perf_counter() - began, 3))
            title = f"Epoch {epoch}"
            if epoch < 0:
                title = f"Warm-up epoch {epoch + warm + 1} of {warm}"
            if "accuracy" in monitor_name:
                title += f", validation accuracy {100 * score}, best_prec {100 * best}"
            log.line(f"{title}, loss {loss:.4f}, lr {lr:.6f}, {speed:.0f} views/s")
            names = ["model_best.pth.tar"] if is_best else []
            if epoch >= 0 and (epoch + 1) % args.save_freq == 0:
                names.append(f"checkpoint_{epoch + 1}.pth.tar")
            save(epoch + 1, 0, names=names)
            asked = agreement.now(stop.number)
            if asked and epoch + 1 < args.epochs:
                end(asked, f"epoch {epoch}")
    if not lead:
        return
    if checkpoints.missing:
        raise utils.RunError(f"trained to the end, but {', '.join(checkpoints.missing)} could not "
                             "be written; the same command trains again from the one before")
    log.record(event="end", epochs=args.epochs, warmup_epochs=warm)
    if not log.sync():
        raise utils.RunError(f"trained to the end, but {folder / 'log.jsonl'} could not be "
                             "written; the same command writes it")
    log.line(f"done: {folder / 'checkpoint' / 'checkpoint.pth.tar'}")


if __name__ == "__main__":
    utils.program(main)
