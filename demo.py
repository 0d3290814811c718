#!/usr/bin/env python3
"""Train SimCLR on real digits and tell other digits and noise from them: the whole job, small.

    make demo          # or: python demo.py [--results-dir DIR]

ResNet-18 on scikit-learn's 8x8 images of 0-5, then SSD with 1 and 6 clusters and SSDk with 5 known
outliers per class, against the digits 6-9, blobs, Gaussian and uniform noise. About 2 minutes on
two cores, no download. It types the commands that a person would; README shows what they print.
"""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import utils

HERE = Path(__file__).resolve().parent
OOD = ("rest", "blobs", "gaussian", "uniform")


def run(script, *arguments):
    """Show and run one of the programs; stop with its exit status if it fails."""
    command = [script, *map(str, arguments)]
    print(f"\n$ python {shlex.join(command)}", flush=True)
    done = subprocess.run([sys.executable, str(HERE / script), *command[1:]], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def table(records):
    """Print a row per outlier set and a column per detector, from JSON records."""
    columns = {
        "SSD m=1": {"clusters": 1, "k": None},
        "SSD m=6": {"clusters": 6, "k": None},
        "SSDk k=5": {"clusters": 1, "k": 5},
    }
    print(f"\n{'digits 0-5 against':20}" + "".join(f"{c:>22}" for c in columns))
    print(f"{'':20}" + f"{'AUROC':>13}{'FPR95':>9}" * len(columns))
    for ood in OOD:
        row = f"{'digits 6-9' if ood == 'rest' else ood:20}"
        for wanted in columns.values():
            found = next(
                r for r in records
                if r["ood"] == ood and all(r.get(key) == v for key, v in wanted.items())
            )
            row += f"{found['auroc']:13.4f}{found['fpr95']:9.4f}"
        print(row)


def main():
    p = utils.Parser(description=__doc__)
    p.add_argument("--results-dir", default="demo_results", help="where everything is written")
    p.add_argument("--epochs", type=utils.number(int, 1), default=30, help="of the training")
    args = utils.parse_args(p)
    results = Path(args.results_dir) / time.strftime("%Y%m%d-%H%M%S")
    began = time.perf_counter()

    recipe = HERE / "configs/digits_simclr.yaml"
    run("train.py", "--config", recipe, "--epochs", args.epochs, "--results-dir", results)
    trained = (results / "digits_simclr/latest_exp").resolve()
    run("figures.py", trained)
    network = trained / "checkpoint/checkpoint.pth.tar"
    common = ("--ckpt", network, "--ood", *OOD, "--exp-name", "digits", "--results-dir", results)
    run("eval_ssd.py", *common, "--clusters", 1, 6, "--plot", "--scores", results / "scores.csv")
    run("eval_ssdk.py", *common, "--k", 5, "--plot")

    records = []
    for kind in ("ssd", "ssdk"):
        text = (results / f"digits_{kind}.jsonl").read_text(encoding="utf-8")
        records += [json.loads(line) for line in text.splitlines()]
    table(records)
    print(f"""
AUROC: 0.5 is chance, 1 is perfect. FPR95: share of outliers taken for digits 0-5, 0 is perfect.
{time.perf_counter() - began:.0f} s in all. What lies where:
  network          {network}
  training curve   {trained / 'training.png'}
  results          {results / 'digits_ssd.txt'}, {results / 'digits_ssdk.txt'} (and .jsonl)
  score of images  {results / 'scores.csv'}
  plots            {results / 'digits_ssd_histograms.png'}, {results / 'digits_ssd_roc.png'},
                   {results / 'digits_ssdk_histograms.png'}, {results / 'digits_ssdk_roc.png'}""")


if __name__ == "__main__":
    utils.program(main)
