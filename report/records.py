"""The records of evaluations: a readable line and a JSON record each, scores, plots.

    report = Report("eval_results", "temp", "ssd", train=train, test=test, seed=1, facts=facts)
    report.add(test_scores, ood, ood_scores, choice=Choice("ssd", 1))
    report.close()

RESULTS/EXP_ssd.txt and RESULTS/EXP_ssd.jsonl are appended to, as the original does.
"""

import csv
import json
import time
from pathlib import Path

import numpy as np
import torch

import data
import detection
import utils
from detection import Choice
from infra import storage
from report import exchange, figures

SHEET = 20  # images on either end of a contact sheet
FORMULA = tuple("=+-@\t\r\n＝＋－＠")  # make a spreadsheet compute what follows them in a cell
# Of plots; the last one stands for those of the sheets, and is as long as they can be.
FIGURES = ("histograms", "roc", "clusters", "spectrum", "precision_recall", "images_" + "x" * 80)


def line_of(record):
    """Return the readable line of a record, in the form of the original's."""
    choice = Choice.of(record)
    which = f"Clusters = {choice.value}" if choice.score == "ssd" else f"Score = {choice}"
    line = (f"In-data = {record['in']}, OOD = {record['ood']}, {which}, "
            f"FPR95 = {record['fpr95']}, AUROC = {record['auroc']}, AUPR = {record['aupr']}")
    return line.replace("\n", " ").replace("\r", " ")  # a path may hold them


def write_csv(path, rows):
    """Write rows as CSV in which no text, as of a folder's name, is a spreadsheet's formula."""
    with storage.atomic_write(path, "w", encoding="utf-8", newline="",
                              errors="surrogateescape") as file:
        writer = csv.writer(file)
        for row in rows:
            writer.writerow(["'" + cell if isinstance(cell, str) and cell[:1] in FORMULA else cell
                             for cell in row])


class Report:
    """Write results as they come: lines and JSON records; scores and plots at the end.

    Args: results_dir, exp_name, kind: RESULTS/EXP_KIND.txt and .jsonl are appended to, KIND ssd or
        ssdk. train, test: data.ImageSet or exchange.FeatureSet of the in-distribution images.
        facts: dict, part of every record. scores: path of the CSV of all scores, or None.
        outputs, inputs: what else is written and was read, as of storage.check_outputs.
    Raises: UserError: a place that can't be written to, an output that would replace something.
    """

    def __init__(self, results_dir, exp_name, kind, *, train, test, seed, facts, scores=None,
                 plot=False, outputs=None, inputs=None):
        self.base = Path(results_dir) / f"{exp_name}_{kind}"
        self.written = [f"{self.base}.txt", f"{self.base}.jsonl"]
        plots = [f"{self.base}_{name}.png" for name in FIGURES] if plot else []
        storage.check_outputs({"--scores": scores, **(outputs or {}),
                               "--results-dir": [*self.written, *plots]}, inputs or {})
        self._test, self._scores, self._plot = test, scores, plot
        self._rows, self._panels, self._sweeps, self._plots, self._names = [], {}, {}, {}, {}
        self._images = {"train": exchange.fingerprint(train), "in": exchange.fingerprint(test)}
        self._facts = {**facts, "n_train": len(train), "seed": seed}
        self._began = time.perf_counter()

    def add(self, test_scores, ood, ood_scores, *, choice, detector=None, against="", fields=None):
        """Measure one outlier set, a data.ImageSet or FeatureSet; append its line and record.

        Args: test_scores, ood_scores: float64 [N], [M]. choice: detection.Choice. detector: another
            name of it. against: the outlier set that SSDk knows. fields: dict, for the record.
        """
        test, measured = self._test, detection.metrics(test_scores, ood_scores)
        if tied := int((ood_scores == np.percentile(test_scores, 95)).sum()):
            utils.note(f"{ood.name}: {tied} of {len(ood)} outliers score exactly the threshold of "
                       "FPR95 and count as detected: it says little")
        record = {
            "in": test.name, "ood": ood.name, **choice.fields(), **measured, **(fields or {}),
            "n_in": len(test), "n_ood": len(ood), **self._facts,
            "images": {**self._images, "ood": exchange.fingerprint(ood)},
            "versions": utils.versions(), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "seconds": round(time.perf_counter() - self._began, 3),
        }
        line = line_of(record)
        for path, text in zip(self.written, (line, json.dumps(record)), strict=False):
            storage.append_lines(path, text.encode("utf-8", "surrogateescape") + b"\n", sync=True)
        utils.say(line)
        detector = detector or str(choice)
        panel = f"{against or test.name}, {detector}"
        _, _, shown = self._panels.setdefault(panel, (panel, test.name, {}))
        for images, values in ((test, test_scores), (ood, ood_scores)):
            if self._scores is not None and images.name not in shown:
                paths, names = images.paths or range(len(images)), images.class_names
                labels = [names[label] if names else "" for label in images.labels.tolist()]
                own = choice.fields().get("clusters"), against, detector
                self._rows += [(images.name, path, label, float(score), *own)
                               for path, label, score in zip(paths, labels, values, strict=True)]
            shown[images.name] = values
            if images is ood or not against:
                self._sheet(images, values, detector)
        curves = self._sweeps.setdefault(detection.SCORES[choice.score].setting, {})
        curve = ood.name if choice.score == "ssd" else f"{ood.name}, {choice.score}"
        curves.setdefault(curve, []).append((choice.value, measured["auroc"]))

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
            header = ("set", "image", "label", "score", "clusters", "against", "detector")
            write_csv(self._scores, [header, *self._rows])
            self.written.append(str(self._scores))
        if self._plot:
            panels = list(self._panels.values())
            self.plot("histograms", figures.score_histograms, panels)
            self.plot("roc", figures.roc_curves, panels)
            for flag, curves in self._sweeps.items():
                if any(len(points) > 1 for points in curves.values()):
                    self.plot(flag, figures.sweep, curves, figures.SETTINGS[flag])
            # The last one, by which reproduce.py knows that an evaluation is complete.
            self.plot("precision_recall", figures.precision_recall_curves, panels)
        for name, (function, content) in self._plots.items():
            path = f"{self.base}_{name}.png"
            function(*content, path)
            self.written.append(path)
        utils.say(f"written: {' '.join(self.written)}")
