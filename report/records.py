"""The records of evaluations: a readable line and a JSON record each, scores, plots.

    report = Report("eval_results", "temp", "ssd", train=train, test=test, seed=1, facts=facts)
    report.add(test_scores, ood, ood_scores, clusters=1, panel="cifar10, 1 cluster")
    report.close()

RESULTS/EXP_ssd.txt and RESULTS/EXP_ssd.jsonl are appended to, as the original does.
"""

import contextlib
import csv
import json
import os
import time
from pathlib import Path

import torch

import data
import detection
import utils
from infra import storage
from report import exchange, figures
from utils import UserError

SHEET = 20  # images on either end of a contact sheet


def line_of(record):
    """Return the readable line of a record, in the form of the original's."""
    line = (f"In-data = {record['in']}, OOD = {record['ood']}, Clusters = {record['clusters']}, "
            f"FPR95 = {record['fpr95']}, AUROC = {record['auroc']}, AUPR = {record['aupr']}")
    return line.replace("\n", " ").replace("\r", " ")  # a path may hold them


def read_records(path):
    """Return the records (dicts) of a file of JSON lines, without what a crash cut off."""
    records = []
    for line in Path(path).read_bytes().split(b"\n") if os.path.exists(path) else ():
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


class Report:
    """Write results as they come: lines and JSON records; scores and plots at the end.

    Args:
        results_dir, exp_name, kind: RESULTS/EXP_KIND.txt and .jsonl are appended to, KIND ssd or
            ssdk. train, test: data.ImageSet or exchange.FeatureSet of the in-distribution images.
        facts: dict, part of every record. scores: path of the CSV of all scores, or None.

    Raises: UserError: a place that can't be written to.
    """

    def __init__(self, results_dir, exp_name, kind, *, train, test, seed, facts, scores=None,
                 plot=False):
        self.base = Path(results_dir) / f"{exp_name}_{kind}"
        storage.make_output_folder(self.base.parent, "--results-dir")
        if scores is not None:
            storage.check_output_file(scores, "--scores")
        self.written = [f"{self.base}.txt", f"{self.base}.jsonl"]
        for path in filter(os.path.exists, self.written):
            try:
                open(path, "a").close()  # found out now, not after an hour
            except OSError as error:
                reason = f"{path} cannot be written to: {error.strerror}"
                raise UserError(f"--results-dir: {reason}") from None
        self._test, self._scores, self._plot = test, scores, plot
        self._rows, self._panels, self._sweep, self._plots, self._names = [], {}, {}, {}, {}
        self._images = {"train": exchange.fingerprint(train), "in": exchange.fingerprint(test)}
        self._facts = {**facts, "n_train": len(train), "seed": seed}
        self._began = time.perf_counter()

    def add(self, test_scores, ood, ood_scores, *, clusters, panel, against="", fields=None):
        """Measure one outlier set; append its line and record.

        Args:
            test_scores, ood_scores: float64 [N], [M]. ood: data.ImageSet or FeatureSet. panel:
                title of the pair's plot, "SET, DETECTOR". against: the outlier set that the
                detector knows, for SSDk. fields: dict, more for the record.
        """
        test, measured = self._test, detection.metrics(test_scores, ood_scores)
        record = {
            "in": test.name, "ood": ood.name, "clusters": clusters, **measured, **(fields or {}),
            "n_in": len(test), "n_ood": len(ood), **self._facts,
            "images": {**self._images, "ood": exchange.fingerprint(ood)},
            "versions": utils.versions(), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "seconds": round(time.perf_counter() - self._began, 3),
        }
        line = line_of(record)
        for path, text in zip(self.written, (line, json.dumps(record)), strict=False):
            storage.append_lines(path, text.encode("utf-8", "surrogateescape") + b"\n", sync=True)
        print(line, flush=True)
        _, _, shown = self._panels.setdefault(panel, (panel, test.name, {}))
        for images, values in ((test, test_scores), (ood, ood_scores)):
            if self._scores is not None and images.name not in shown:
                paths, names = images.paths or range(len(images)), images.class_names
                labels = [names[label] if names else "" for label in images.labels.tolist()]
                self._rows += [(images.name, path, label, repr(float(score)), clusters, against)
                               for path, label, score in zip(paths, labels, values, strict=True)]
            shown[images.name] = values
            if images is ood or not against:
                self._sheet(images, values, panel.rpartition(", ")[2])
        self._sweep.setdefault(ood.name, []).append((clusters, measured["auroc"]))

    def plot(self, name, function, *content):
        """Have `close` call function(*content, path of RESULTS/EXP_KIND_NAME.png), if plotting."""
        if self._plot:
            self._plots[name] = function, content

    def _sheet(self, images, scores, detector):
        """Keep the most and the least outlying images of a set for its contact sheet."""
        name = f"images_{exchange.plain_name(images.name, self._names)}"
        if not self._plot or images.pixels is None or name in self._plots:
            return
        order = torch.from_numpy(scores).argsort(descending=True, stable=True)
        rows = [(f"{images.name}, the {end} outlying and their scores ({detector})",
                 data.load_pixels(images.pixels, index).cpu(), scores[index])
                for end, index in (("most", order[:SHEET]), ("least", order.flip(0)[:SHEET]))]
        self.plot(name, figures.contact_sheet, rows)

    def close(self):
        """Write the scores, plot, and print where everything is."""
        if self._scores is not None:
            with storage.atomic_write(self._scores, "w", encoding="utf-8", newline="",
                                      errors="surrogateescape") as file:
                header = ("set", "image", "label", "score", "clusters", "against")
                csv.writer(file).writerows([header, *self._rows])
            self.written.append(str(self._scores))
        if self._plot:
            panels = list(self._panels.values())
            self.plot("histograms", figures.score_histograms, panels)
            self.plot("roc", figures.roc_curves, panels)
            if any(len(points) > 1 for points in self._sweep.values()):
                self.plot("clusters", figures.sweep, self._sweep, figures.SETTINGS["clusters"])
            # The last one, by which reproduce.py knows that an evaluation is complete.
            self.plot("precision_recall", figures.precision_recall_curves, panels)
        for name, (function, content) in self._plots.items():
            path = f"{self.base}_{name}.png"
            function(*content, path)
            self.written.append(path)
        print(f"written: {' '.join(self.written)}")
