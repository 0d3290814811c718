"""Plant one fault at a time in a copy of the programs, and see whether a test finds it.

    make mutants                        # all, two at a time: minutes
    python tests/mutants.py few_shot    # those with this word in the file's name or the text

A mutant is a file, a text that stands in it once, the fault in its place, and the tests that should
fail then, as words for pytest. Survivors are printed at the end. The exit status is 1 if there is
one, if a text is no longer found once (the mutant is stale), or if tests fail without a fault.
"""

import multiprocessing
import os
import queue
import shlex
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
WORKERS = 2  # each in a copy of its own
LIMIT = 300  # seconds for the tests of a mutant; a fault that hangs is found too
# Each pytest starts as a fork of a process that has imported what takes seconds.
PROCESSES = multiprocessing.get_context("forkserver")
IMPORTED = ["pytest", "torch._dynamo.testing", "torchvision", "faiss", "scipy.ndimage",
            "sklearn.covariance", "sklearn.metrics", "sklearn.model_selection", "sklearn.neighbors"]
LEFT_OUT = (".git", ".venv", "__pycache__", "datasets", "results", "eval_results", "demo_results")

LOSSES = "tests/test_losses.py"
TRAINER = "tests/test_literal_trainer.py"
SIMCLR = f"{TRAINER} -k SimCLR"
SUPCON = f"{TRAINER} -k SupCon"
SUPCE = f"{TRAINER} -k SupCE"
SCHEDULE = "tests/test_trainers.py -k lr_and_momentum"
RECIPE = "tests/test_trainers.py -k recipe"
KNN = "tests/test_trainers.py -k knn"
META = "tests/test_meta.py"
DETECTOR = "tests/test_literal_detector.py"
DETECTOR_SSD = f"{DETECTOR} -k 'ssd_ and SimCLR'"
DETECTOR_SUPCE = f"{DETECTOR} -k 'ssd_ and SupCE'"
DETECTOR_SSDK = f"{DETECTOR} -k ssdk_"
P_VALUES = "tests/test_detect.py -k share_of_good_pictures"
DETECT = "tests/test_detect.py -k 'come_first or have_no_part or one_folder'"
PRETRAINED = "tests/test_pretrained.py -k embedded"
PROPERTIES = "tests/test_properties.py"
METRICS = "tests/test_detection.py -k 'metrics or fpr95 or aupr or auroc'"
MODELS = "tests/test_models.py -k 'resnet18 or fresh or length'"


def augment(words):
    return f"tests/test_augment.py -k '{words}'"


def data(words):
    return f"tests/test_data.py -k '{words}'"


def score(name):
    return f"tests/test_detection.py -k test_{name}"


def flags(words):
    return f"tests/test_flags.py -k '{words}'"


class Mutant(NamedTuple):
    """A fault, and what should find it."""

    file: str
    text: str
    fault: str
    tests: str


MUTANTS = [Mutant(*row) for row in [
    # --- the loss
    ("losses.py", "BASE_TEMPERATURE = 0.07", "BASE_TEMPERATURE = 0.1", LOSSES),
    ("losses.py", "z_i @ z.T / self.temperature", "z_i @ z.T", LOSSES),
    ("losses.py", " & ~itself", "", LOSSES),
    ("losses.py", "masked_fill(itself, -torch.inf)", "masked_fill(itself, -50.0)", LOSSES),
    ("losses.py", "/ positive.sum(dim=1)", "/ len(z)", LOSSES),
    ("losses.py", ".sum() / len(z)\n", ".sum() / len(z_i)\n", LOSSES),
    ("losses.py", "(self.temperature / BASE_TEMPERATURE) * part", "part", LOSSES),
    ("losses.py", "labels.repeat(views)", "labels.repeat_interleave(views)", LOSSES),

    # --- training: schedule, step, epoch, monitor
    ("trainers.py", "WARMUP_EPOCHS = 10", "WARMUP_EPOCHS = 9", SCHEDULE),
    ("trainers.py", "LR_START, LR_END = 0.01,", "LR_START, LR_END = 0.02,", SCHEDULE),
    ("trainers.py", "LR_END = 0.01, 1e-4", "LR_END = 0.01, 0", SCHEDULE),
    ("trainers.py", "MOMENTUM_END = 0.9, 0.8", "MOMENTUM_END = 0.9, 0.85", SCHEDULE),
    ("trainers.py", "min(step / warmup_steps, 1)", "step / warmup_steps", SCHEDULE),
    ("trainers.py", "angle = math.pi *", "angle = 3 *", SCHEDULE),
    ("trainers.py", 'group["lr"], group["momentum"] = lr, momentum', 'group["lr"] = lr', SIMCLR),
    ("trainers.py", 'group["lr"], group["momentum"] = lr, momentum',
     'group["momentum"] = momentum', SIMCLR),
    ("trainers.py", "self.optimizer.zero_grad(set_to_none=True)", "pass", SUPCE),
    ("trainers.py", 'utils.generator(self.seed, "augment", epoch, step))',
     'utils.generator(self.seed, "augment", epoch))', SUPCE),
    ("trainers.py", "SupConLoss(temperature) if", "SupConLoss() if", SIMCLR),
    ("trainers.py", '"SupCon": TrainingMode("ssl", 2, "projection", True, True',
     '"SupCon": TrainingMode("ssl", 2, "projection", True, False', SUPCON),
    ("trainers.py", 'TrainingMode("org", 1', 'TrainingMode("ssl", 1', SUPCE),
    ("trainers.py", '"top-1 accuracy", True)', '"top-1 accuracy")', DETECTOR_SUPCE),
    ("trainers.py", 'reduction="sum") / len(index)', 'reduction="sum")', SUPCE),
    ("trainers.py", "torch.tensor(v, device=self.device) for v in (mean, std)",
     "torch.tensor(v, device=self.device) for v in (std, mean)", SUPCE),
    ("trainers.py", "train_step.seed, epoch)", "train_step.seed, 0)", SUPCE),
    ("trainers.py", "epochs(s) >= SMALL_EPOCHS", "epochs(s) < SMALL_EPOCHS", RECIPE),
    ("trainers.py", "float((losses * sizes).sum() / sizes.sum())", "float(losses.mean())", SUPCE),
    ("trainers.py", "features.extract(network, images", "features.extract(network.encoder, images",
     TRAINER),
    ("trainers.py", "z = F.normalize(outputs.float(), dim=1)", "z = outputs.float()", KNN),
    ("trainers.py", "labels, k=20, folds=5", "labels, k=10, folds=5", KNN),
    ("trainers.py", "labels, k=20, folds=5", "labels, k=20, folds=4", KNN),
    ("trainers.py", "(votes * classes - torch.arange", "(votes * classes + torch.arange", KNN),
    ("trainers.py", "self._losses[step] = loss", "self._losses[step] = float(loss)", META),
    ("trainers.py", "return loss.detach()", "return torch.tensor(loss.item())", META),
    ("trainers.py", "channels_last = self._speed.channels_last", "channels_last = False", META),
    ("train.py", "weight_decay=args.weight_decay", "weight_decay=0", SIMCLR),
    ("train.py", "momentum=args.momentum, warmup=args.warmup", "momentum=0.9, warmup=args.warmup",
     SUPCE),
    ("train.py", "temperature=args.temperature", "temperature=0.5", SIMCLR),
    ("train.py", 'utils.generator(args.seed, "weights")', 'utils.generator(0, "weights")', SUPCE),
    ("train.py", "mean=mean, std=std, seed=args.seed", "mean=mean, std=std, seed=0", SUPCE),
    ("train.py", "epochs=args.epochs, lr=args.lr,", "epochs=args.epochs, lr=0.5,", SUPCE),
    ("train.py", "cycle_momentum=args.cycle_momentum", "cycle_momentum=True", SUPCE),
    ("train.py", "score > progress.best", "score < progress.best",
     "tests/test_commands.py -k 'training_writes and SupCE'"),
    ("utils.py", "state >> np.uint64(1)", "state >> np.uint64(2)", SUPCE),
    ("infra/image_files.py", 'utils.generator(seed, "augment", epoch, step)',
     'utils.generator(seed, "augment", epoch)', "tests/test_trainers.py -k views_of_files"),

    # --- augmentation
    ("augment.py", "CROP_SCALE = (0.2, 1.0)", "CROP_SCALE = (0.08, 1.0)",
     augment("crops_are_distributed")),
    ("augment.py", "CROP_RATIO = (3 / 4,", "CROP_RATIO = (2 / 3,",
     augment("crops_are_distributed")),
    ("augment.py", "CROP_TRIES = 10", "CROP_TRIES = 9", augment("parameters_of_a_seed")),
    ("augment.py", "GRAYSCALE = 0.5, 0.8, 0.2", "GRAYSCALE = 0.5, 0.8, 0.1",
     augment("probabilities")),
    ("augment.py", "GRAYSCALE = 0.5, 0.8, 0.2", "GRAYSCALE = 0.5, 0.7, 0.2",
     augment("probabilities")),
    ("augment.py", "STRENGTH = (0.4, 0.4, 0.4, 0.1)", "STRENGTH = (0.4, 0.4, 0.4, 0.2)",
     augment("factors_are_distributed")),
    ("augment.py", "PADDING = 4", "PADDING = 3", augment("org")),
    ("augment.py", "LUMA = (0.2989, 0.587,", "LUMA = (0.2989, 0.577,", augment("grey")),
    ("augment.py", ".amin(dim=1, keepdim=True)\n    none", ".amax(dim=1, keepdim=True)\n    none",
     augment("distributed")),
    ("augment.py", "step.clamp(min=1)", "step", augment("resampling")),
    ("augment.py", "(out + 0.5) * step", "out * step", augment("resampling")),
    ("augment.py", "x.sub_(mean).div_(std)", "x.sub_(mean).mul_(std)", DETECTOR_SSD),
    ("augment.py", "pixels.float().div_(255)", "pixels.float().div_(256)", DETECTOR_SSD),
    ("augment.py", "torch.minimum(k, 4 - k)", "torch.minimum(k, 3 - k)", augment("operation")),
    ("augment.py", "of_mean = torch.where(operation == CONTRAST",
     "of_mean = torch.where(operation == BRIGHTNESS", augment("operation")),
    ("augment.py", "torch.arange(views * batch).view(views, batch)[:, rows]",
     "torch.arange(views * batch).view(batch, views).T[:, rows]", SUPCON),

    # --- networks
    ("models.py", "(1, 2, 2, 2), strict=True", "(1, 2, 2, 1), strict=True", MODELS),
    ("models.py", "torch.float32)), dim=-1)", "torch.float32)), dim=0)", MODELS),
    ("models.py", 'mode="fan_out"', 'mode="fan_in"', MODELS),
    ("models.py", "module.in_features**-0.5", "module.in_features**-1", MODELS),
    ("models.py", "nn.init.uniform_(module.weight, -bound, bound,",
     "nn.init.uniform_(module.weight, 0, bound,", MODELS),
    ("models.py", "width), nn.ReLU(),", "width), nn.Identity(),", MODELS),

    # --- features
    ("features.py", "    network.eval()\n", "    network.train()\n", DETECTOR_SSD),
    ("features.py", "settings.mode, _kind(images), copy)", "settings.mode, copy)", DETECTOR_SSDK),
    ("features.py", "settings.mode, _kind(images), copy)", "settings.mode, _kind(images))",
     DETECTOR_SSDK),
    ("features.py", 'replace(settings, mode="ssl"), copy)', 'replace(settings, mode="base"), copy)',
     DETECTOR_SSDK),
    ("features.py", "    mean, std = settings.mean, settings.std\n", "    mean = std = None\n",
     DETECTOR_SSD),

    # --- detection: SSD
    ("detection.py", "keepdim=True).add_(GUARD))", "keepdim=True))", PROPERTIES),
    ("detection.py", "torch.where(deviation > GUARD", "torch.where(deviation > 1e-6", PROPERTIES),
    ("detection.py", "CONDITION = 1e9", "CONDITION = 1e13",
     "tests/test_detection.py -k near_singular"),
    ("detection.py", "(square / len(train)).sqrt()", "(square / (len(train) - 1)).sqrt()",
     "tests/test_detection.py -k standardised"),
    ("detection.py", "    rows = rows.to(device, torch.float64, copy=True)\n",
     "    return rows.to(device, torch.float64, copy=True)\n", DETECTOR_SSD),
    ("detection.py", "covariance / len(x), fourth", "covariance / (len(x) - 1), fourth",
     DETECTOR_SSD),
    ("detection.py", "centred = rows - self.mean", "centred = rows", DETECTOR_SSD),
    ("detection.py", ".amin(dim=0)", ".amax(dim=0)", DETECTOR_SSD),
    ("detection.py", "dtype).eps", "dtype).tiny",
     "tests/test_detection.py -k fewer_rows"),
    ("detection.py", "if g.rank)\n", ")\n", "tests/test_detection.py -k cluster_of_one"),
    ("detection.py", "niter=100", "niter=1",
     "tests/test_detection.py -k kmeans"),
    ("detection.py", "seed=seed % 2**31", "seed=0", DETECTOR_SSD),
    ("detection.py", "order = np.random.default_rng(seed)", "order = np.random.default_rng(0)",
     DETECTOR_SSD),
    ("detection.py", " > 1:\n            y =", " > 1 or labels is not None:\n            y =",
     DETECTOR_SUPCE),

    # --- detection: SSDk
    ("detection.py", "return inside - known.score(self.standardize(features)).cpu().numpy()",
     "return inside",
     DETECTOR_SSDK),
    ("detection.py", "return Gaussian.fit(x, shrink=True, device=self.standardize.mean.device)",
     "return self.gaussians[0]", DETECTOR_SSDK),
    ("detection.py", "return Gaussian.fit(x, shrink=True, device=self.standardize.mean.device)",
     "return Gaussian.fit(x, device=self.standardize.mean.device)", DETECTOR_SSDK),
    ("detection.py", "class SSDk(Shrunk)", "class SSDk(SSD)", DETECTOR_SSDK),
    ("detection.py", "spread = (fourth - size) / n", "spread = (fourth - size) / (n - 1)",
     DETECTOR_SSDK),
    ("detection.py", "size - dim * target**2", "size - target**2", DETECTOR_SSDK),

    # --- detection: tied, shrunk, knn, crossval
    ("detection.py", "for k, _, own in parts) / n, n)", "for k, _, own in parts) / (n - 1), n)",
     score("tied")),
    ("detection.py", "replace(tied, mean=mean)", "replace(tied, mean=parts[0][1])", score("tied")),
    ("detection.py", "shrink: ClassVar = True", "shrink: ClassVar = False", score("shrunk")),
    ("detection.py", "nearest.amax(dim=1).square_()", "nearest.amax(dim=1)", score("knn")),
    ("detection.py", "nearest.amax(dim=1)", "nearest.amin(dim=1)", score("knn")),
    ("detection.py", "unit = _unit(rows, self.train.device)",
     "unit = rows.to(self.train.device).double()", score("knn")),
    ("detection.py", "% min(5, len(x))", "% min(4, len(x))", score("crossval")),
    ("detection.py", "default_rng(seed).permutation(len(x)) %",
     "default_rng(0).permutation(len(x)) %", score("crossval")),
    ("detection.py", " + ((mean - centre) @ axes).square()", "", score("crossval")),
    ("detection.py", "variances[:beyond] = variances[:beyond].mean()", "pass", score("crossval")),
    ("detection.py", "isotonic_regression(variances.cpu().numpy())", "variances.cpu().numpy()",
     score("crossval")),

    # --- metrics
    ("detection.py", "np.percentile(inside, 95)", "np.percentile(inside, 94)", METRICS),
    ("detection.py", "np.mean(outside < np", "np.mean(outside <= np", METRICS),
    ("detection.py", "roc_auc_score(outlier, scores)", "roc_auc_score(outlier, -scores)", METRICS),
    ("detection.py", "average_precision_score(outlier, scores)",
     "average_precision_score(1 - outlier, scores)", METRICS),
    ("detection.py", "1 - outlier, -scores", "1 - outlier, scores", METRICS),
    ("detection.py", "searchsorted(true_rate, 0.95)", "searchsorted(true_rate, 0.9)", METRICS),

    # --- image sets
    ("data.py", 'utils.generator(seed, "order", epoch)', 'utils.generator(seed, "order")', SUPCE),
    ("data.py", "known.append(mine[:k])", "known.append(mine[-k:])", DETECTOR_SSDK),
    ("data.py", "(0.491, 0.482, 0.447)", "(0.4914, 0.482, 0.447)", data("originals_sets")),
    ("data.py", "(0.2675, 0.2565, 0.2761)", "(0.2675, 0.2565, 0.2671)", data("originals_sets")),
    ("data.py", "rng.random(shape) < 0.7", "rng.random(shape) < 0.6", data("blobs")),
    ("data.py", "sigma=(0, 1.5, 1.5, 1.5)", "sigma=(0, 1.5, 1.5, 0)", data("blobs")),
    ("data.py", "blurred[blurred < 0.75]", "blurred[blurred < 0.7]", data("blobs")),
    ("data.py", "rng.normal(0.5, 0.25, shape)", "rng.normal(0.5, 0.2, shape)", data("gaussian")),
    ("data.py", "[3::4]", "[3::5]", data("digit")),
    ("data.py", "(square - mean**2)", "(square - mean)", data("own_mean")),
    ("data.py", "default_rng([self.seed, *self.kind", "default_rng([0, *self.kind", data("seeds")),
    ("data.py", "math.sqrt(0.2 * 3 / 4)", "math.sqrt(0.2)", data("narrowest")),
    ("data.py", "labels=new[kept.labels]", "labels=kept.labels", data("restricting")),

    # --- evaluations
    ("infra/evaluation.py", "trained.constants or data.normalisation(", "data.normalisation(",
     DETECTOR_SSD),
    ("infra/evaluation.py", "mean and tuple(mean), std and tuple(std)",
     "std and tuple(std), mean and tuple(mean)", DETECTOR_SSD),
    ("infra/evaluation.py", "seed=args.seed,\n                           precision",
     "precision", DETECTOR_SSDK),
    ("infra/evaluation.py", "precision=args.precision", 'precision="fp32"',
     flags("precision and eval")),
    ("infra/evaluation.py", "replace(self.settings, mode=mode, copies=copies)",
     "replace(self.settings, copies=copies)", flags("data-mode and eval_ssd.py")),
    ("infra/evaluation.py", "(data.restrict(s, trained.in_classes) for s in (train, test))",
     "(train, test)", flags("in-classes and eval")),
    ("eval_ssd.py", "labels if mode is not None and mode.label_clusters else None",
     "labels if False else None", DETECTOR_SUPCE),
    ("eval_ssd.py", "labels, args.seed", "labels, 0", DETECTOR_SSD),
    ("eval_ssd.py", "args.data_mode)  # [N, D]", '"base")  # [N, D]',
     flags("data-mode and eval_ssd.py")),
    ("eval_ssdk.py", "few_shot(ood.labels, k,", "few_shot(ood.labels, 1,", DETECTOR_SSDK),
    ("eval_ssdk.py", 'utils.generator(seed, "known",', 'utils.generator(0, "known",',
     DETECTOR_SSDK),
    ("eval_ssdk.py", "source.features(known, copies=args.copies)  # [",
     "source.features(known)  # [", DETECTOR_SSDK),
    ("eval_ssdk.py", "ood.subset(known), ood.subset(rest)", "ood.subset(known), ood",
     DETECTOR_SSDK),
    ("eval_ssdk.py", "detector.score(x_test, gaussian, inside=test_distance)", "test_distance",
     DETECTOR_SSDK),

    # --- detect.py: the decision
    ("detection.py", "return (1 + len(known) -", "return (len(known) -", P_VALUES),
    ("detection.py", 'scores, side="left"', 'scores, side="right"', P_VALUES),
    ("detect.py", "return p <= share", "return p < share / 2", DETECT),
    ("detect.py", "detector = fit(args, detection.select(x, fitted))",
     "detector = fit(args, x)", DETECT),
    ("detect.py", "others = torch.cat([*parts[:i], *parts[i + 1 :]])", "others = asked", DETECT),
    ("detect.py", 'order = np.argsort(-scores, kind="stable")', "order = np.argsort(scores)",
     DETECT),
    ("models.py", "round((x.shape[-1] - self._side) / 2)", "0", PRETRAINED),
    ("models.py", '"size": 256, "crop": 224, **', '"size": 224, "crop": 224, **', PRETRAINED),
    ("models.py", '"mean": (0.485, 0.456, 0.406)', '"mean": (0.491, 0.482, 0.447)', PRETRAINED),
]]


def copy_of_the_programs(folder):
    """Copy what the tests need."""
    return Path(shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT)))


def pytest_in(copy, tests):
    """Be a pytest that was started in a copy."""
    os.chdir(copy)
    with open(copy / "pytest.out", "wb") as out:
        for stream in (1, 2):
            os.dup2(out.fileno(), stream)
    sys.path[:] = [folder for folder in sys.path if folder not in ("", str(ROOT / "tests"))]
    # A file that is changed twice in a second could be taken for its own bytecode.
    sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = True, "1"
    import pytest

    sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", f"--basetemp={copy / 'pytest'}",
                          *shlex.split(tests)]))


def run_tests(copy, tests):
    """Run tests in a copy: pytest's exit status, None past the limit; and what it printed."""
    process = PROCESSES.Process(target=pytest_in, args=(copy, tests))
    process.start()
    process.join(LIMIT)
    if process.is_alive():
        process.kill()
        process.join()
        return None, ""
    return process.exitcode, (copy / "pytest.out").read_text(encoding="utf-8", errors="replace")


def try_mutant(copy, mutant):
    """Run the tests of a mutant in a copy, which is restored: "killed", "survived" or "broken"."""
    path = copy / mutant.file
    before = path.read_text(encoding="utf-8")
    path.write_text(before.replace(mutant.text, mutant.fault), encoding="utf-8")
    try:
        status, out = run_tests(copy, mutant.tests)
    finally:
        path.write_text(before, encoding="utf-8")
    # Other statuses than of failed tests: nothing was collected, the fault is no Python, ...
    return {0: "survived", 1: "killed", None: "killed"}.get(status, "broken"), out


def try_without_fault(copy, tests):
    """Run tests in a copy as it is: "passed", or "broken" where a fault could not be told."""
    status, out = run_tests(copy, tests)
    return "passed" if status == 0 else "broken", out


def work_off(jobs):
    """Do jobs, (title, function (copy) -> (verdict, output)), in WORKERS copies.

    Returns: [(verdict, title)] of those that went wrong.
    """
    waiting, wrong, lock = queue.SimpleQueue(), [], threading.Lock()
    for number, job in enumerate(jobs, 1):
        waiting.put((number, *job))

    def work():
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            copy = copy_of_the_programs(Path(folder) / "copy")
            while True:
                try:
                    number, title, job = waiting.get_nowait()
                except queue.Empty:
                    return
                began = time.perf_counter()
                verdict, out = job(copy)
                with lock:
                    print(f"{number:3} of {len(jobs)}  {verdict:8} "
                          f"{time.perf_counter() - began:5.1f} s  {title}", flush=True)
                    if verdict == "broken":
                        print(out[-2000:])
                    if verdict in ("survived", "broken"):
                        wrong.append((verdict, title))

    threads = [threading.Thread(target=work) for _ in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong


def title_of(mutant):
    one, other = (" ".join(text.split()) or "nothing" for text in (mutant.text, mutant.fault))
    return f"{mutant.file}: {one}  ->  {other}"


def main(words):
    """Try the mutants that have one of the words in them, or all; returns the exit status."""
    mutants = [m for m in MUTANTS if not words or any(w in m.file + m.text for w in words)]
    wrong = []
    for mutant in mutants:
        found = (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.text)
        if found != 1:
            wrong.append((f"stale ({found} times there)", title_of(mutant)))
    stale = {title for _, title in wrong}
    mutants = [m for m in mutants if title_of(m) not in stale]
    jobs = [(tests, lambda copy, tests=tests: try_without_fault(copy, tests))
            for tests in dict.fromkeys(m.tests for m in mutants)]
    jobs += [(title_of(m), lambda copy, m=m: try_mutant(copy, m)) for m in mutants]
    os.environ["OMP_NUM_THREADS"] = "1"
    PROCESSES.set_forkserver_preload(IMPORTED)
    wrong += work_off(jobs)
    for verdict, title in wrong:
        print(f"{verdict}: {title}")
    print(f"{len(mutants)} mutants, {len(wrong)} not killed, stale or broken")
    return 1 if wrong or not mutants else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
