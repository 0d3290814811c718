#!/usr/bin/env python3
"""Train one network on images: SimCLR (no labels), SupCon or SupCE (labels).

    python train.py --training-mode SimCLR --dataset cifar10 --normalize --warmup
    python train.py --config configs/digits_simclr.yaml

The first is the paper's recipe (ResNet-50, 510 epochs); the second trains for minutes on a CPU.
Writes RESULTS/EXP/N--dataset-D-arch-A-lr-L_epochs-E/ with setup.log, log.jsonl and checkpoint/.
The same command continues a run that was broken off, and ends with the weights of an unbroken one.
All visible GPUs are used; several machines by torchrun, srun or slurm/train_nodes.sbatch.
"""

import argparse
import functools
import math
import os
import time
from pathlib import Path

import torch

import data
import features
import models
import trainers
import utils
from infra import checkpoints, distributed, program, runs
from infra.image_files import ImageFiles
from utils import UserError, number


def parser():
    """Build the command line: the original's flags with its defaults, and ours."""
    # Every setting is defined here once, and goes by its name to the one function that reads it.
    p, on_off = utils.Parser(description=__doc__), argparse.BooleanOptionalAction
    add = p.add_argument_group("run").add_argument
    add("--exp-name", type=utils.experiment, default="temp", help="folder below --results-dir")
    add("--results-dir", "--results_dir", default="./results", help="where runs are written")
    add("--seed", type=number(int, 0, 2**31 - 1), default=12345, help="decides every random draw")
    add("--print-freq", type=number(int, 1), default=100, help="steps between records of the loss")
    add("--save-freq", type=number(int, 1), default=50, help="epochs between kept checkpoints")
    add("--save-steps", type=number(int, 1), metavar="N",
        help="save every N steps of an epoch too (default: after each epoch, and at a signal)")
    add("--val-freq", type=number(int, 1), default=1, help="epochs between validations")
    add("--no-resume", action="store_true",
        help="start a new run even where an unfinished one could be continued")
    add("--method", help="does nothing; accepted because the original had it")
    add("--gpu", help="does nothing; CUDA_VISIBLE_DEVICES chooses the GPU")

    add = p.add_argument_group("network").add_argument
    add("--training-mode", choices=list(trainers.TRAINING_MODES), required=True,
        help="the loss: without labels, with labels, cross-entropy")
    add("--arch", choices=list(models.ARCHITECTURES), default="resnet50", help="the encoder")
    add("--num-classes", type=number(int, 1),
        help="outputs of the SupCE classifier (default: the data set's classes)")
    add("--ckpt", metavar="FILE", help="start from the weights of a checkpoint")

    add = p.add_argument_group("images").add_argument
    add("--dataset", default="cifar10", metavar="SET",
        help=f"{', '.join(data.TRAINABLE)}; folder:PATH and npz:PATH say where")
    add("--data-dir", default="./datasets",
        help="where image sets are and are downloaded to; for folder and npz without PATH, the "
        "folder (with train/ and test/) or the file itself")
    add("--no-download", action="store_true", help="never fetch a missing set")
    add("--in-classes", type=utils.class_list, metavar="LIST",
        help="train on these classes only, as 0-5 or 0,3,7")
    add("--size", type=number(int, 8, 4096), default=32, help="side of images in pixels")
    add("--normalize", action=on_off, default=False, help="normalise by the set's constants")
    add("--mean", type=number(float, 0, 1), nargs=3, metavar=("R", "G", "B"),
        help="for --normalize, from 0 to 1 (default: the data set's, measured where it has none)")
    add("--std", type=number(float, above=0, high=1), nargs=3, metavar=("R", "G", "B"),
        help="goes with --mean")
    add("--workers", type=number(int, 0, 1024), metavar="N",
        help="processes that decode and crop images of folder and imagenet as they are needed; 0 "
        "decodes all into memory first (default: 0, for imagenet the processor's cores, "
        f"{data.MAX_WORKERS} at most)")

    add = p.add_argument_group("optimisation").add_argument
    add("--epochs", type=number(int, 1), default=500, help="passes after the warm-up")
    add("--batch-size", type=number(int, 1), default=512, help="images a step, of all processes")
    add("--lr", type=number(float, above=0, high=1e30), default=0.5,
        help="learning rate at the start of the cosine")
    add("--momentum", type=number(float, 0, below=1), default=0.9, help="of SGD, no Nesterov")
    add("--weight-decay", type=number(float, 0, 1e30), default=1e-4, help="on every parameter")
    add("--warmup", action=on_off, default=False,
        help=f"{trainers.WARMUP_EPOCHS} more epochs before the others, in which the learning rate "
        "rises from 0.01")
    add("--cycle-momentum", action=on_off, default=True,
        help="let momentum fall from 0.9 to 0.8 in the warm-up and stay there, whatever --momentum "
        "says, as the original does (default: on)")
    add("--temperature", type=number(float, above=0), default=0.5, help="T of the contrastive loss")
    add("--sync-bn", action="store_true",
        help="take the statistics of batch norm over the batch of all processes; needs GPUs "
        "(default: each over its shard, as the original does)")

    add = p.add_argument_group("speed", "all off by default: plain float32").add_argument
    add("--precision", choices=features.PRECISIONS,
        help="bf16: the network computes in bfloat16; weights, batch statistics, normalisation and "
        "loss stay in float32 (default: fp32)")
    add("--channels-last", action=on_off, help="memory layout, channels innermost (default: off)")
    add("--compile", action=on_off, help="torch.compile of network and augmentation (default: off)")
    add("--fast", action="store_true",
        help="those of the three that pay on this device, and says which")
    add("--deterministic", action="store_true",
        help="the same weights from the same command on a GPU too, slower; a CPU does so anyway")
    return p


def resolve_speed(args, device):
    """Return trainers.Speed and resolve its flags: what was asked for, --fast for the rest."""
    # What was chosen is part of the configuration, so that a resumed run computes in the same way.
    default = trainers.fast_speed(device) if args.fast else trainers.Speed()
    asked = {name: getattr(args, name) for name in trainers.Speed._fields}
    speed = default._replace(**{k: v for k, v in asked.items() if v is not None})
    vars(args).update(speed._asdict())
    if args.fast:
        utils.note(f"--fast is here {speed.precision}, "
                   f"{'' if speed.channels_last else 'no '}channels-last, "
                   f"{'' if speed.compile else 'no '}compile")
    # On a CPU the same command gives the same weights anyway.
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not args.deterministic  # shapes hardly ever change
    return speed


def load_images(args, mode):
    """Load the images that the flags name: (train, test, classes of a classifier, mean, std)."""
    if (args.mean is None) != (args.std is None):
        raise UserError("--mean and --std go together: one is given without the other")
    if args.mean is not None and not args.normalize:
        raise UserError("--mean and --std are the constants of --normalize, and that is off")
    # Sets that are larger than memory are decoded as they are needed, unless the user says how.
    workers = data.default_workers(args.dataset) if args.workers is None else args.workers
    where = dict(data_dir=args.data_dir, size=args.size, download=not args.no_download,
                 workers=workers)
    with distributed.main_process_first():  # which may have to download
        train = data.load(args.dataset, "train", crops=True, **where)
        has_test = data.has_split(args.dataset, "test", data_dir=args.data_dir)
        test = data.load(args.dataset, "test", **where) if has_test else None
    if workers and not isinstance(train.pixels, ImageFiles):
        utils.note(f"--workers does nothing: {args.dataset} is not a set of image files")
    if args.in_classes:
        train, test = (images and data.restrict(images, args.in_classes)
                       for images in (train, test))
    classes = len(train.class_names or ())
    if mode.needs_labels and classes < 2:
        raise UserError(f"--training-mode {args.training_mode} needs images of at least 2 classes, "
                        f"{args.dataset} has {classes}; SimCLR needs none")
    # The original asks for the number of classes; here the images say it, but a flag may add some.
    num_classes = args.num_classes or classes
    if not mode.contrastive and num_classes < classes:
        raise UserError(f"--num-classes {num_classes} is less than the {classes} of {args.dataset}")
    trainers.check_batches(mode, len(train), args.batch_size, args.size, args.sync_bn)
    # Constants of a set that has none are measured on the training images; checkpoints keep them.
    mean, std = args.mean, args.std
    if args.normalize and mean is None:
        mean, std = data.normalisation(args.dataset, train)
    return train, test, num_classes, mean, std


def load_weights(network, args):
    """Start from the weights of --ckpt, and say which settings it was trained with otherwise."""
    state, rest = checkpoints.load_checkpoint(args.ckpt)
    try:
        models.restore(network, state)
    except ValueError as error:
        raise UserError(f"--ckpt {args.ckpt} does not fit --arch {args.arch} --training-mode "
                        f"{args.training_mode}: {error}") from None
    # Weights of another size or normalisation are no error, but seldom what was meant.
    config = rest.get("config")
    for key, now in (("size", args.size), ("normalize", args.normalize)):
        if isinstance(config, dict) and (before := config.get(key, now)) != now:
            utils.note(f"--ckpt {args.ckpt} was trained with {key} {before}, this is {key} {now}")


def main(argv=None):
    args = utils.parse_args(parser(), argv)
    distributed.start()
    mode = trainers.TRAINING_MODES[args.training_mode]
    for flag in ("method", "gpu"):  # commands written for the original have them
        if getattr(args, flag) is not None:
            utils.note(f"--{flag} does nothing")

    # Speed. Everything faster is off by default, so that numbers are those of plain float32.
    device = utils.device()
    speed = resolve_speed(args, device)

    # Images. The whole set lies on the device as uint8, so that a batch is an index and no step
    # waits for a loader; sets too large for that stay in files, for worker processes to decode.
    train, test, num_classes, mean, std = load_images(args, mode)
    hashes = {split: images and data.fingerprint(images.pixels, images.labels)
              for split, images in (("train", train), ("test", test))}
    train = data.to(train, device)

    # Network and optimiser. Weights have a generator of their own, so that they do not depend on
    # what else is drawn; weight decay is on every parameter, without Nesterov, as in the original.
    network = models.build_model(args.arch, mode.head, num_classes,
                                 utils.generator(args.seed, "weights"))
    if args.ckpt:
        load_weights(network, args)
    layout = torch.channels_last if speed.channels_last else torch.preserve_format
    network.to(device, memory_format=layout)
    if args.sync_bn:
        network = distributed.sync_batch_norm(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=args.lr, momentum=args.momentum,
                                weight_decay=args.weight_decay, fused=device.type == "cuda")

    # Run folder. Configuration and images are the identity of a run, by which the same command
    # finds its unfinished one; what the logs say of steps after its checkpoint is made again.
    name, path = data.parse_spec(args.dataset)
    config = utils.to_json_types(vars(args)) | {
        "num_classes": num_classes, "mean": mean, "std": std,
        "data_dir": str(Path(args.data_dir).resolve()),  # evaluation may be started elsewhere
        "dataset": f"{name}:{path.resolve()}" if path else name,
        "in_files": isinstance(train.pixels, ImageFiles),  # their crops are others than in memory
        "constants": args.mean and [args.mean, args.std],  # measured ones follow from the images
    }
    run = runs.open_run(args.results_dir, args.exp_name, config, hashes, resume=not args.no_resume,
                        fits=functools.partial(trainers.fits, network, optimizer),
                        label=f"dataset-{name}-arch-{args.arch}-lr-{args.lr}_epochs-{args.epochs}")
    progress = trainers.restore_training(run.saved, network, optimizer, device)
    steps = math.ceil(len(train) / args.batch_size)  # of an epoch; the last batch may be partial
    warmup_epochs = trainers.WARMUP_EPOCHS if args.warmup else 0
    run.log.line(str(args))
    run.log.start(epoch=progress.epoch - warmup_epochs, step=progress.step, config=config,
                  device=str(device))
    run.log.line(f"{len(train)} training images, {len(test or ())} test images of {args.dataset}; "
                 f"{distributed.world_size()} x {device}; run folder {run.folder}")
    if run.saved:
        run.log.line(f"continued: {progress.epoch} of {warmup_epochs + args.epochs} epochs are "
                     f"done, and {progress.step} of {steps} steps of the next")

    # Epochs have one count, from the start of the warm-up: every draw and the schedule follow it.
    # The logs count from its end, as the original's do, so that warm-up epochs are negative there.
    train_step = trainers.Step(
        network, optimizer, train, mode, size=args.size, mean=mean, std=std, seed=args.seed,
        temperature=args.temperature, speed=speed, sync_bn=args.sync_bn)
    lr_and_momentum = functools.partial(
        trainers.schedule, steps_per_epoch=steps, epochs=args.epochs, lr=args.lr,
        momentum=args.momentum, warmup=args.warmup, cycle_momentum=args.cycle_momentum)
    settings = features.FeatureSettings(args.size, args.batch_size, mean, std,
                                        precision=speed.precision)
    stop_flag = distributed.SharedFlag()
    with runs.stop_on_signals() as stop:
        for epoch in range(progress.epoch, warmup_epochs + args.epochs):
            logged, began = epoch - warmup_epochs, time.perf_counter()
            with trainers.Epoch(train_step, epoch, args.batch_size, f"epoch {logged}",
                                progress.step, progress.losses,
                                warmup_epochs + args.epochs) as batches:
                for step, batch in batches:
                    # Train. The host does not wait for the device here.
                    lr, momentum = lr_and_momentum(epoch * steps + step)
                    batches.add(step, train_step(batch, epoch, step, lr, momentum))

                    # Log. Reading the losses waits for the device, so this is not done at each.
                    if (step + 1) % args.print_freq == 0 or step + 1 == steps:
                        loss = float(batches.losses()[-1])
                        run.log.record(event="step", epoch=logged, step=step, loss=loss, lr=lr,
                                       momentum=momentum,
                                       views_per_s=round(batches.views_per_second(), 1))

                    # Save if due, stop if asked: a signal in one process stops all at one step.
                    signalled = stop_flag.poll(stop.number)
                    due = args.save_steps and (step + 1) % args.save_steps == 0 and step + 1 < steps
                    if due or signalled:
                        progress = trainers.Progress(epoch, step + 1, batches.losses().cpu(),
                                                     progress.best)
                        run.save(trainers.checkpoint_state(network, optimizer, config, progress))
                    if signalled:
                        run.stop(signalled, f"epoch {logged}, step {step + 1} of {steps}")

            # Validate. The warm-up is not, as in the original: the best network comes after it.
            loss, (lr, momentum) = batches.mean_loss(), lr_and_momentum((epoch + 1) * steps - 1)
            validated, score, monitor_name = time.perf_counter(), None, "none in this epoch"
            if logged >= 0 and ((logged + 1) % args.val_freq == 0 or logged + 1 == args.epochs):
                score, monitor_name = trainers.validate(network, test, mode, settings, loss)
            is_best = score is not None and score > progress.best
            progress = trainers.Progress(epoch + 1, best=score if is_best else progress.best)
            record = dict(
                event="epoch", epoch=logged, loss=loss, monitor=score, monitor_name=monitor_name,
                best=progress.best if math.isfinite(progress.best) else None, lr=lr,
                momentum=momentum, views_per_s=round(batches.views_per_second(), 1),
                monitor_seconds=round(time.perf_counter() - validated, 3),
                seconds=round(time.perf_counter() - began, 3))
            run.log.record(**record)
            run.log.line(trainers.describe_epoch(record, warmup_epochs))

            # Save, under the names of the original too, and stop if asked.
            names = ["model_best.pth.tar"] if is_best else []
            if logged >= 0 and (logged + 1) % args.save_freq == 0:
                names.append(f"checkpoint_{logged + 1}.pth.tar")
            run.save(trainers.checkpoint_state(network, optimizer, config, progress), names)
            if (signalled := stop_flag.sync(stop.number)) and logged + 1 < args.epochs:
                run.stop(signalled, f"epoch {logged}")
    run.finish(epochs=args.epochs, warmup_epochs=warmup_epochs)


if __name__ == "__main__":
    program.run(main)
