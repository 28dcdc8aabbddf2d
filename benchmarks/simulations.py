"""What `statistics.py` runs: the cells of its tables, the old method beside the new one, and the counting."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import worlds
from common import machine
from worlds import Array, Drawn, World

from embcache.probe.metrics import find_metric, metric_title
from embcache.probe.statistics import Scores, TestSet, estimate, sample
from embcache.results.compare import compare_scores as compare
from embcache.targets import as_target

RESAMPLES = 500
OLD = 300  # repetitions and resamples of the old method at most: it takes ten times as long
TRAINED = 400  # repetitions at most where heads are trained


@dataclass(frozen=True)
class Cell:
    """One row of a table. The truth is that given, else of two models on the ``population``, else each draw's own."""

    section: str
    title: str
    metric: str
    world: World
    truth: float | None = None
    population: World | None = None
    folds: int | None = None


def intervals() -> Iterator[Cell]:
    for auc in (0.80, 0.95, 0.99):
        for n in (100, 30, 10):
            yield Cell("auc", f"{n} + {n} patients", "auc", worlds.two_classes(n, n, auc), auc)
    for p, n, trait in (
        (10, 190, ""), (5, 5, ""), (100, 100, "uneven"), (30, 30, "uneven"), (10, 10, "uneven"),
        (30, 30, "unequal"), (10, 190, "unequal"),
    ):  # fmt: skip
        world = worlds.two_classes(p, n, 0.9, **({trait: True} if trait else {}))
        yield Cell("auc", f"{p} + {n} patients{', ' if trait else ''}{trait}", "auc", world, 0.9)
    many = worlds.two_classes(50_000, 50_000, 0.9, coarse=True)
    yield Cell("auc", "30 + 30 patients, coarse", "auc", worlds.two_classes(30, 30, 0.9, coarse=True), None, many)

    fundus, single, rare = worlds.fundus(100_000, 2), worlds.single_images(300_000, 2), worlds.rare(400_000, 2)
    for n in (200, 55, 20):
        yield Cell("kappa", f"fundus, {n} patients", "kappa", worlds.fundus(n), None, fundus)
    for n in (366, 100):
        yield Cell("kappa", f"{n} single images", "kappa", worlds.single_images(n), None, single)

    for n in (200, 55):
        yield Cell("macro", f"fundus, {n} patients", "macro_auc", worlds.fundus(n), None, fundus)
    for n, classes, images, gain in ((100, 8, 4, 0.7), (60, 8, 4, 0.7), (30, 5, 3, 0.7), (30, 5, 3, 3.0)):
        many = worlds.several(20_000, classes, images, gain=gain, models=2)
        title = f"several, {n} patients, {images} of {classes} classes each"
        yield Cell("macro", title, "macro_auc", worlds.several(n, classes, images, gain=gain), None, many)
    for per_class, gain in (((30,) * 3, 2.0), ((10,) * 5, 2.0), ((6, 10, 40, 80, 30), 2.0)):
        many = worlds.one_class(tuple(400 * n for n in per_class), gain, 2)
        title = f"one class, {' + '.join(map(str, per_class))} patients"
        yield Cell("macro", title, "macro_auc", worlds.one_class(per_class, gain), None, many)

    for metric, sizes in (
        ("auprc", (300, 100, 60)), ("accuracy", (300, 40)), ("sensitivity", (300, 60)), ("specificity", (60,)),
        ("ppv", (300, 60)), ("npv", (60,)), ("balanced_accuracy", (300, 60)), ("f1", (300, 60)), ("mcc", (100,)),
        ("brier", (100,)), ("log_loss", (100,)), ("sensitivity_at_95_specificity", (300, 100)),
    ):  # fmt: skip
        for n in sizes:
            yield Cell("others", f"rare, {n} images", metric, worlds.rare(n), None, rare)
    many = worlds.several(20_000, 8, 4, models=2)
    yield Cell("others", "several, 60 patients, 4 of 8 classes each", "accuracy", worlds.several(60, 8, 4), None, many)
    many = worlds.two_classes(50_000, 50_000, 0.99)
    for metric in ("accuracy", "sensitivity", "balanced_accuracy", "mcc", "auprc"):
        world = worlds.two_classes(10, 10, 0.99)
        yield Cell("others", "two classes, 10 + 10 patients, AUC 0.99", metric, world, None, many)

    for n, prevalences in ((400, (0.3, 0.1, 0.05)), (100, (0.3, 0.1, 0.1)), (200, (0.5, 0.1) * 7)):
        many = worlds.findings(100_000, prevalences, models=2)
        title = f"{len(prevalences)} findings, {n} patients, {min(prevalences):.0%} to {max(prevalences):.0%}"
        for metric in ("macro_auc", "micro_auc", "auprc"):
            yield Cell("targets", title, metric, worlds.findings(n, prevalences), None, many)
    for n, traits in ((400, {}), (100, {}), (25, {}), (200, {"skewed": True}), (100, {"bias": 2.0})):
        many = worlds.numbers(200_000, models=2, **traits)
        title = f"numbers, {n} patients{''.join(f', {name}' for name in traits)}"
        for metric in ("mae", "rmse", "r2", "pearson", "spearman"):
            yield Cell("targets", title, metric, worlds.numbers(n, **traits), None, many)


def pairs() -> Iterator[Cell]:
    for p, n, auc in ((100, 100, 0.9), (30, 30, 0.9), (10, 10, 0.9), (10, 10, 0.99), (10, 190, 0.9)):
        yield Cell("fixed", f"{p} + {n} patients, AUC {auc}", "auc", worlds.equal_models(p, n, auc))
    for metric, n, classes, images in (("macro_auc", 60, 8, 4), ("macro_auc", 100, 20, 3), ("accuracy", 60, 8, 4),
                                       ("kappa", 60, 8, 4), ("balanced_accuracy", 60, 8, 4)):  # fmt: skip
        title = f"several, {n} patients, {images} of {classes} classes each"
        yield Cell("fixed", title, metric, worlds.several(n, classes, images))
    for labeled, test in ((50, 600), (50, 200), (500, 600)):
        yield Cell("heads", f"{labeled} labels, {test} test images", "auc", worlds.heads(labeled, test))
    yield Cell("heads", "50 labels, 600 test images, 2 × 5 folds", "auc", worlds.heads(50, 600, repeats=2), folds=5)


def new_models() -> Iterator[Cell]:
    for labeled, test in ((50, 600), (50, 200), (500, 600)):
        yield Cell("new", f"{labeled} labels, {test} test images", "auc", worlds.heads(labeled, test))
    yield Cell("new", "50 labels, 600 test images, 2 × 5 folds", "auc", worlds.heads(50, 600, repeats=2), folds=5)
    yield Cell("new", "50 labels, 600 test images, 10 folds", "auc", worlds.heads(50, 600, folds=10))
    yield Cell("new", "50 labels, 600 test images, 3 folds", "auc", worlds.heads(50, 600, folds=3))
    yield Cell("new", "50 labels of its own for each of 5 models", "auc", worlds.heads(50, 600, apart=True))


def old_resamples(drawn: Drawn, metric: str, *models: Array) -> list[Array]:
    """As it was until 0.1.0: groups are drawn within strata of the exact set of classes that they hold."""
    groups, classes = int(drawn.groups.max()) + 1, models[0].shape[-1]
    holds = np.zeros((groups, classes), dtype=bool)
    holds[drawn.groups, drawn.labels] = True
    stratum = np.unique(holds, axis=0, return_inverse=True)[1].reshape(-1)
    rng, counts = np.random.default_rng(0), np.zeros((OLD, groups))
    for members in (np.flatnonzero(stratum == s) for s in np.unique(stratum)):
        counts[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), OLD)
    form, weights = find_metric(metric, classes).form, counts[:, drawn.groups]
    return [np.mean([form(drawn.labels, z, 1)(weights) for z in side], axis=0) for side in models]


def old_interval(drawn: Drawn, metric: str) -> tuple[float, float]:
    low, high = np.quantile(old_resamples(drawn, metric, drawn.logits)[0], [0.025, 0.975])
    return float(low), float(high)


def old_p(drawn: Drawn, metric: str) -> float:
    assert drawn.other is not None
    one, other = old_resamples(drawn, metric, drawn.logits, drawn.other)
    d = np.round(one - other, 12)
    return float(min(1.0, 2 * (min((d <= 0).sum(), (d >= 0).sum()) + 1) / (OLD + 1)))


def scored(drawn: Drawn, metric: str, logits: Array) -> Scores:
    target = drawn.target or as_target(logits.shape[-1])
    test = TestSet(drawn.labels, drawn.groups, target.names, target=drawn.target)
    return sample(find_metric(metric, target), test, logits, resamples=RESAMPLES)


@dataclass
class Tally:
    """How often intervals held the truth, lay below it or above it, or were refused."""

    inside: int = 0
    below: int = 0
    above: int = 0
    refused: int = 0

    def add(self, interval: tuple[float, float] | None, truth: float) -> None:
        if interval is None:
            self.refused += 1
            return
        self.below += interval[1] < truth
        self.above += interval[0] > truth
        self.inside += interval[0] <= truth <= interval[1]

    def cells(self) -> list[str]:
        given = self.inside + self.below + self.above
        if not given:
            return ["–", "–"]
        return [share(self.inside, given), f"{self.below / given:.3f} / {self.above / given:.3f}"]


def share(count: int, of: int) -> str:
    p = count / of
    return f"{p:.3f} ± {math.sqrt(p * (1 - p) / of):.3f}"


def truth_of(cell: Cell) -> float | None:
    if cell.population is None:
        return cell.truth
    drawn = cell.population(np.random.default_rng(1))
    form = find_metric(cell.metric, drawn.target or drawn.logits.shape[-1]).form
    once = np.ones((1, len(drawn.labels)))
    return float(np.mean([form(drawn.labels, z, 1)(once)[0] for z in drawn.logits]))


def covered(cell: Cell, repetitions: int) -> list[str]:
    truth, rng, before, after = truth_of(cell), np.random.default_rng(0), Tally(), Tally()
    assert truth is not None
    for number in range(repetitions):
        drawn = cell.world(rng)
        if number < OLD and drawn.target is None:
            before.add(old_interval(drawn, cell.metric), truth)
        after.add(estimate(scored(drawn, cell.metric, drawn.logits)).these_models, truth)
    refused = f"{after.refused / repetitions:.3f}"
    return [cell.title, metric_title(cell.metric), f"{truth:.3f}", *before.cells(), *after.cells(), refused]


def called_different(cell: Cell, repetitions: int) -> list[str]:
    rng, before, after, given = np.random.default_rng(0), 0, 0, 0
    for number in range(repetitions):
        drawn = cell.world(rng)
        assert drawn.other is not None
        before += number < OLD and old_p(drawn, cell.metric) < 0.05
        one, other = (scored(drawn, cell.metric, z) for z in (drawn.logits, drawn.other))
        p = compare(one, other, overlap=drawn.overlap, folds=cell.folds).p
        if p is not None:
            given += 1
            after += p < 0.05
    return [cell.title, metric_title(cell.metric), share(before, min(OLD, repetitions)), share(after, given)]


def newly_trained(cell: Cell, repetitions: int) -> list[str]:
    rng, before, naive, after, overlaps = np.random.default_rng(0), Tally(), Tally(), Tally(), []
    for number in range(repetitions):
        drawn = cell.world(rng)
        assert drawn.truth is not None
        assert drawn.overlap is not None
        found = estimate(scored(drawn, cell.metric, drawn.logits), drawn.overlap, cell.folds)
        if number < OLD:
            before.add(old_interval(drawn, cell.metric), drawn.truth)
        half = 1.96 * math.sqrt(found.test_variance + (found.std or 0.0) ** 2 / len(drawn.logits))
        naive.add((found.mean - half, found.mean + half), drawn.truth)
        after.add(found.new_model, drawn.truth)
        overlaps.append(drawn.overlap)
    return [cell.title, f"{np.mean(overlaps):.2f}", *(t.cells()[0] for t in (before, naive)), *after.cells()]


TABLES = (
    (
        "What nominal 95 % intervals for new patients and these models cover; lies below / above the truth",
        ("world", "metric", "truth", "before", "below / above", "after", "below / above", "too few patients"),
        intervals, covered,
    ),
    (
        "P(p < .05) for equally good models (fixed), and for backbones that differ by chance alone (heads)",
        ("world", "metric", "before", "after"),
        pairs, called_different,
    ),
    (
        "What they cover of the score of one model trained anew on other rows",
        ("world", "overlap", "before", "s²/K added", "after", "below / above"),
        new_models, newly_trained,
    ),
)  # fmt: skip


def main(description: str | None) -> None:
    """Measure, and print tables."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=2000, help=f"of a cell; at most {TRAINED} with heads")
    parser.add_argument("--only", default="auc,kappa,macro,others,targets,fixed,heads,new", help="sections, by commas")
    asked = parser.parse_args()
    began = time.process_time()
    for title, header, cells, measure in TABLES:
        chosen = [cell for cell in cells() if cell.section in asked.only.split(",")]
        if not chosen:
            continue
        print(f"{title}:\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
        for cell in chosen:
            trained = cell.section in ("heads", "new")
            print(f"| {' | '.join(measure(cell, min(asked.repetitions, TRAINED if trained else 10**9)))} |", flush=True)
            print(f"{time.process_time() - began:.0f} s: {cell.section}, {cell.title}", file=sys.stderr)
        print(flush=True)
    used = f"{time.process_time() - began:,.0f} s of processors"
    print(f"{asked.repetitions:,} repetitions of a cell, {TRAINED} where heads are trained, {RESAMPLES} resamples; "
          f"before: {OLD} of either at most; {used}; {machine(('numpy', 'scipy', 'scikit-learn'))}")  # fmt: skip
