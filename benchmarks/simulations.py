"""What `statistics.py` runs: the cells, the old method beside the new one, and the tables."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import worlds
from common import machine
from worlds import Array, Drawn, World

from embcache.probe.metrics import find_metric
from embcache.probe.statistics import Scores, TestSet, compare, estimate, sample

LEVEL = 0.95


def old_resamples(drawn: Drawn, metric: str, resamples: int, *models: Array) -> list[Array]:
    """The method until 0.1.0: groups drawn within strata of the exact set of classes that they hold."""
    group = np.unique(drawn.groups, return_inverse=True)[1]
    holds = np.zeros((group.max() + 1, models[0].shape[-1]), dtype=bool)
    holds[group, drawn.labels] = True
    stratum = np.unique(holds, axis=0, return_inverse=True)[1].reshape(-1)
    rng, counts = np.random.default_rng(20_210_823), np.zeros((resamples, len(holds)))
    for members in (np.flatnonzero(stratum == s) for s in np.unique(stratum)):
        counts[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), resamples)
    form, weights = find_metric(metric, models[0].shape[-1]).form, counts[:, group]
    return [np.mean([form(drawn.labels, z, 1)(weights) for z in side], axis=0) for side in models]


def old_interval(drawn: Drawn, metric: str, resamples: int) -> tuple[float, float]:
    low, high = np.quantile(
        old_resamples(drawn, metric, resamples, drawn.logits)[0], [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    )
    return float(low), float(high)


def old_p(drawn: Drawn, metric: str, resamples: int) -> float:
    assert drawn.other is not None
    one, other = old_resamples(drawn, metric, resamples, drawn.logits, drawn.other)
    d = np.round(one - other, 12)
    return float(min(1.0, 2 * (min((d <= 0).sum(), (d >= 0).sum()) + 1) / (resamples + 1)))


def scores(drawn: Drawn, metric: str, resamples: int, logits: Array | None = None) -> Scores:
    z = drawn.logits if logits is None else logits
    names = tuple(map(str, range(z.shape[-1])))
    return sample(find_metric(metric, len(names)), TestSet(drawn.labels, drawn.groups, names), z, resamples=resamples)


@dataclass
class Tally:
    """How often intervals held the truth, lay below it and above it, or were refused."""

    inside: int = 0
    below: int = 0
    above: int = 0
    refused: int = 0

    def add(self, interval: tuple[float, float] | None, truth: float) -> None:
        if interval is None:
            self.refused += 1
            return
        low, high = interval
        self.below += high < truth
        self.above += low > truth
        self.inside += low <= truth <= high

    def cells(self) -> list[str]:
        given = self.inside + self.below + self.above
        if not given:
            return ["none", "", ""]
        share = self.inside / given
        error = math.sqrt(share * (1 - share) / given)
        return [f"{share:.3f} ± {error:.3f}", f"{self.below / given:.3f}", f"{self.above / given:.3f}"]


@dataclass(frozen=True)
class Cell:
    """A row of a table. A truth of None is the score of two models on 400,000 patients or images."""

    section: str
    title: str
    metric: str
    world: World
    truth: float | None = None
    population: World | None = None


def auc_cells() -> list[Cell]:
    rows = [
        Cell("auc", f"{n} + {n} patients", "auc", worlds.two_classes(n, n, auc), auc)
        for auc in (0.80, 0.95, 0.99)
        for n in (100, 30, 10)
    ]
    rows.append(Cell("auc", "10 + 190 patients", "auc", worlds.two_classes(10, 190, 0.9), 0.9))
    for n in (30, 10, 5):
        rows.append(Cell("auc", f"{n} + {n} patients, uneven", "auc", worlds.two_classes(n, n, 0.9, uneven=True), 0.9))
    for p, n in ((30, 30), (10, 190), (190, 10)):
        world = worlds.two_classes(p, n, 0.9, unequal=True)
        rows.append(Cell("auc", f"{p} + {n} patients, unequal", "auc", world, 0.9))
    rows.append(Cell("auc", "5 + 5 patients", "auc", worlds.two_classes(5, 5, 0.9), 0.9))
    big = worlds.two_classes(50_000, 50_000, 0.9, coarse=True)
    rows.append(Cell("auc", "30 + 30 patients, coarse", "auc", worlds.two_classes(30, 30, 0.9, coarse=True), None, big))
    return rows


def other_cells() -> list[Cell]:
    fundus, single, rare = worlds.fundus(100_000, 2), worlds.single_images(200_000, 2), worlds.rare(400_000, 2)
    rows = [Cell("kappa", f"{n} patients", "kappa", worlds.fundus(n), None, fundus) for n in (55, 200)]
    rows += [Cell("kappa", f"{n} single images", "kappa", worlds.single_images(n), None, single) for n in (100, 366)]
    rows += [Cell("macro", f"{n} patients, grades", "macro_auc", worlds.fundus(n), None, fundus) for n in (55, 200)]
    for patients, classes, images, gain in ((100, 8, 4, 0.7), (60, 8, 4, 0.7), (30, 5, 3, 0.7), (30, 5, 3, 3.0)):
        rows.append(
            Cell(
                "macro",
                f"{patients} patients, {images} of {classes} classes each",
                "macro_auc",
                worlds.several(patients, classes, images, gain=gain),
                None,
                worlds.several(20_000, classes, images, gain=gain, models=2),
            )
        )
    for metric in ("auprc", "accuracy", "sensitivity", "specificity", "ppv", "npv", "f1", "brier", "mcc",
                   "balanced_accuracy", "log_loss", "sensitivity_at_95_specificity"):  # fmt: skip
        for n in (300, 100, 40) if metric in ("auprc", "accuracy", "sensitivity", "ppv", "f1") else (300,):
            rows.append(Cell("others", f"{n} images", metric, worlds.rare(n), None, rare))
    rows.append(Cell("others", "60 patients, 4 of 8 classes each", "accuracy", worlds.several(60, 8, 4), None,
                     worlds.several(20_000, 8, 4, models=2)))  # fmt: skip
    return rows


CELLS: dict[str, Callable[[], list[Cell]]] = {"auc": auc_cells, "others": other_cells}


def pairs() -> list[Cell]:
    rows = [
        Cell("fixed", f"{p} + {n} patients", "auc", worlds.equal_models(p, n, auc))
        for p, n, auc in ((100, 100, 0.9), (30, 30, 0.9), (10, 10, 0.9), (10, 10, 0.99), (10, 190, 0.9))
    ]
    rows += [
        Cell("fixed", f"{p} patients, {i} of {c} classes each", m, worlds.several(p, c, i))
        for m, p, c, i in (
            ("macro_auc", 60, 8, 4),
            ("macro_auc", 100, 20, 3),
            ("accuracy", 60, 8, 4),
            ("kappa", 60, 8, 4),
        )
    ]
    rows += [
        Cell("heads", f"{n} labels, {t} test images", "auc", worlds.heads(n, t))
        for n, t in ((50, 600), (50, 200), (500, 600))
    ]
    return rows


def truth_of(cell: Cell) -> float:
    if cell.truth is not None:
        return cell.truth
    assert cell.population is not None
    drawn = cell.population(np.random.default_rng(1))
    form = find_metric(cell.metric, drawn.logits.shape[-1]).form
    once = np.ones((1, len(drawn.labels)))
    return float(np.mean([form(drawn.labels, z, 1)(once)[0] for z in drawn.logits]))


def coverage(cell: Cell, repetitions: int, resamples: int, old: int) -> list[str]:
    truth, rng, before, after = truth_of(cell), np.random.default_rng(0), Tally(), Tally()
    for _ in range(repetitions):
        drawn = cell.world(rng)
        if old:
            before.add(old_interval(drawn, cell.metric, old), truth)
        after.add(estimate(scores(drawn, cell.metric, resamples)).these_models, truth)
    return [
        cell.title,
        cell.metric,
        f"{truth:.3f}",
        *before.cells(),
        *after.cells(),
        f"{after.refused / repetitions:.3f}",
    ]


def false_positives(cell: Cell, repetitions: int, resamples: int, old: int) -> list[str]:
    rng, before, p = np.random.default_rng(0), [], []
    for _ in range(repetitions):
        drawn = cell.world(rng)
        if old:
            before.append(old_p(drawn, cell.metric, old))
        one, other = (scores(drawn, cell.metric, resamples, z) for z in (drawn.logits, drawn.other))
        found = compare(one, other, overlap=drawn.overlap).p
        if found is not None:
            p.append(found)
    shares = [float((np.array(values) < 0.05).mean()) if values else math.nan for values in (before, p)]
    error = [math.sqrt(s * (1 - s) / repetitions) for s in shares]
    return [
        cell.title,
        cell.metric,
        *(f"{s:.3f} ± {e:.3f}" for s, e in zip(shares, error, strict=True)),
        f"{1 - len(p) / repetitions:.3f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repetitions", type=int, default=2000)
    parser.add_argument("--resamples", type=int, default=500)
    parser.add_argument("--old", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--match", default="")
    asked = parser.parse_args()
    for name, make in CELLS.items():
        for cell in make():
            if asked.only in cell.section + " " + cell.metric and asked.match in cell.title:
                began = time.time()
                row = coverage(cell, asked.repetitions, asked.resamples, asked.old)
                print("|", " | ".join(row), "|", f"{time.time() - began:.0f}s", flush=True)
    for cell in pairs():
        if asked.only in cell.section + " " + cell.metric and asked.match in cell.title:
            began = time.time()
            row = false_positives(
                cell, 400 if cell.section == "heads" else asked.repetitions, asked.resamples, asked.old
            )
            print("|", " | ".join(row), "|", f"{time.time() - began:.0f}s", flush=True)


if __name__ == "__main__":
    main()
