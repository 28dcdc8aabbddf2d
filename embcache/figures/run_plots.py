"""Results as figures: learning curves; ROC, precision–recall, confusion and calibration of one run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from embcache.errors import ProtocolError, UsageError, check_choice
from embcache.figures.plots import Curve, CurvePanel, plot_confusion, plot_curves, plot_numbers, plot_rates
from embcache.paths import PathLike, home_dir, slug
from embcache.probe.metrics import FloatArray, confusion, metric_title, positive_class
from embcache.probe.predictions import Predictions
from embcache.probe.statistics import wilson
from embcache.results.compare import INTERVALS, Tested
from embcache.results.curves import band_words, by_task, curve_table, metric_words, named_curves
from embcache.results.decisions import GRID, Value, against_rest, agreement_of, calibration, class_rates
from embcache.results.layout import Table, bounds, score, signed
from embcache.results.paper import Cell, Grid
from embcache.runs.result import Estimate, Result

OF_CLASSES, OF_NUMBERS = ("roc", "pr", "confusion", "calibration"), ("scatter", "residual")
KINDS = (*OF_CLASSES, *OF_NUMBERS)
MOST_CLASSES = 10
"""Classes, or findings, of a figure of curves: of more, those with the most test images."""

_THESE = "in brackets: 95 % interval, new patients and these models"
_BANDS = 4  # classes up to which bands can be distinguished
_EACH = {"class": "each class against the rest", "finding": "each finding on the images of which it is known"}
_CALLED = ("present, called", "present, not called", "absent, called", "absent, not called")
Part = tuple[Predictions, int]  # models, and a class of theirs; of a finding those of two classes


# Learning curves.


def draw_curves(
    results: Sequence[Result], *, home: PathLike | None = None, target: Path | None = None
) -> tuple[Table, Path]:
    """Draw scored results, one panel per dataset and metric, and lay them out as a table."""
    names = {result.dataset for result in results}
    folder = home_dir(home) / slug(*names) / "figures" if len(names) == 1 else home_dir(home)
    panels, path = curve_panels(results), target or folder / "curves.png"
    return curve_table(results), plot_curves(panels, "Learning curves", path, bands=band_words(results))


def curve_panels(results: Sequence[Result]) -> list[CurvePanel]:
    """One panel per dataset and metric, one curve per model and protocol.

    A point is the mean over folds at the number of training labels per fold, its band the saved 95 % interval
    (`band_words` names it); of a leaderboard's scores ± one sd. Results without a score are left out.
    """
    panels = []
    for (dataset, target, *_), members in by_task(results).items():
        title = dataset + (f", {target}" if target else "") + " (synthetic)" * members[0].synthetic
        curves = tuple(_learning(label, own) for label, own in named_curves(members).items())
        panels.append(CurvePanel(title, metric_words(members[0]), curves))
    return panels


def table_curves(grid: Grid, cells: Sequence[Cell]) -> list[CurvePanel]:
    """The curves of a table: ours with their intervals, the paper's, at our numbers of labels, dashed."""
    panels = []
    for dataset in grid.datasets:
        ours: list[Curve] = []
        paper: list[Curve] = []
        metric = ""
        for model in grid.models:
            at = [c for c in cells if (c.dataset, c.model) == (dataset, model) and c.result is not None]
            scored = [cell.result for cell in at if cell.result is not None and cell.result.mean is not None]
            if scored:
                metric = metric_words(scored[0])
                ours.append(_learning(model.label, scored))
            points = sorted(
                (float(c.result.n_train), c.paper.mean, c.paper.std or 0.0)
                for c in at if c.result is not None and c.paper is not None and c.paper.mean is not None
            )  # fmt: skip
            if points:
                x, mean, sd = np.array(points).T
                paper.append(_curve(f"{model.label}, paper", "", x, mean, mean - sd, mean + sd, dashed=True))
        if ours:
            panels.append(CurvePanel(dataset, metric, (*ours, *paper)))
    return panels


def _learning(label: str, results: Sequence[Result]) -> Curve:
    points = sorted({r.n_train: r for r in results}.values(), key=lambda r: r.n_train)
    x, means, sds = np.array([(r.n_train, r.mean or 0.0, r.std or 0.0) for r in points], dtype=np.float64).T
    # Where there is no interval: nothing, but of a leaderboard's scores ± one sd.
    none = np.where([r.estimate is None for r in points], sds, np.nan)
    known = [r.interval or (m - s, m + s) for r, m, s in zip(points, means, none, strict=True)]
    curve = _curve(label, " + ".join(results[0].backbones), x, means, *np.array(known).T)
    return replace(curve, method=f"{results[0].head}, {results[0].kind}")


# One run.


@dataclass(frozen=True)
class RunFigure:
    """A figure and its numbers."""

    kind: str
    title: str
    positive: str  # the class that is set against the rest; empty where each is
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]
    records: Sequence[dict[str, Any]]  # the numbers as plain data
    files: Sequence[Path]


def default_kind(result: Result) -> str:
    """The kind of figure that fits the target of a run first."""
    return (OF_NUMBERS if result.task.kind == "number" else OF_CLASSES)[0]


def draw_run(tested: Tested, kind: str, targets: Sequence[Path], *, positive: str | None = None) -> RunFigure:
    """Draw one run's test predictions."""
    result, predictions, task = tested.result, tested.predictions, tested.predictions.task
    check_choice("--kind", kind, KINDS)
    if kind not in (fitting := OF_NUMBERS if task.kind == "number" else OF_CLASSES):
        raise ProtocolError(
            f"a figure of kind {kind} does not fit a target of kind {task.kind}", code="figure-does-not-fit",
            expected=", ".join(fitting), found=f"{result.id}: {', '.join(task.names[:3])}", fix=f"--kind {fitting[0]}",
        )  # fmt: skip
    title = f"{result.dataset}{' (synthetic)' * result.synthetic}: {' + '.join(result.backbones)}, {result.id}"
    if positive is not None and ((kind == "confusion" and task.kind != "findings") or kind in OF_NUMBERS):
        raise UsageError(f"a figure of kind {kind} has no positive class", code="unused-option",
                         found=f"--positive {positive}", fix="leave it out")  # fmt: skip
    if kind in OF_NUMBERS:
        return _numbers(tested, kind, title, targets)
    if kind == "confusion" and task.kind != "findings":
        return _confusion(predictions, title, targets)
    parts, notes = _parts(predictions, positive)
    if kind == "confusion":
        return _findings_confusion(parts, title, targets, notes)
    draw = _calibration if kind == "calibration" else _rates
    return draw(parts, kind, task.noun, title, targets, [INTERVALS, *notes])


def _parts(predictions: Predictions, positive: str | None) -> tuple[list[Part], list[str]]:
    """The classes or findings of a figure, and notes on others; an error where there is none."""
    names, task = predictions.class_names, predictions.task
    findings = task.kind == "findings"
    counts, absent = np.array(task.counts(predictions.labels)), task.absent(predictions.labels)
    there = [c for c in range(len(names)) if c not in absent]
    if len(there) < 2 - findings:
        raise ProtocolError(
            f"curves need test images of two {task.nouns}" if not findings else "curves need test images with and "
            "without a finding", code="one-class", found=", ".join(names[c] for c in counts.nonzero()[0]),
        )  # fmt: skip
    alone = None
    if positive is not None and findings:
        predictions.finding(positive)  # refuses others
        alone = names.index(positive)
    elif positive is not None or (len(names) == 2 and not findings):
        alone = positive_class(names, positive) if positive is not None else predictions.positive
    if alone is not None and alone not in there:
        if findings:
            raise ProtocolError(f"no test image is known to be with, or none without, {names[alone]!r}",
                                code="absent-class", fix="leave --positive out")  # fmt: skip
        raise ProtocolError(f"no test image is of class {names[alone]!r}", code="absent-class",
                            fix="leave --positive out")  # fmt: skip
    most = sorted(sorted(there, key=lambda c: (-counts[c], c))[:MOST_CLASSES])
    classes, notes = [alone] if alone is not None else most, list[str]()
    if 1 < len(classes) < len(there):
        notes.append(
            f"shortened: the {len(classes)} {task.nouns} with the most test images of {len(there)}; "
            f"--positive {'NAME' if findings else 'CLASS'} draws another one"
        )
    if absent:
        lacking = ", ".join(names[c] for c in absent)
        notes.append(f"test images with and without it are needed of {lacking}" if findings else
                     f"no test image of {lacking}")  # fmt: skip
    return [(predictions.finding(names[c]), 1) if findings else (predictions, c) for c in classes], notes


def _rates(
    parts: Sequence[Part], kind: str, noun: str, title: str, targets: Sequence[Path], notes: list[str]
) -> RunFigure:
    metric = "auc" if kind == "roc" else "auprc"
    word, k, alone = metric_title(metric), len(parts[0][0].logits), len(parts) == 1
    band = k > 1 and len(parts) <= _BANDS
    found = [class_rates(predictions, c, metric) for predictions, c in parts]
    curves = []
    for rates in found:
        own, name = f"{word} {_score(rates.estimate)}", f"{rates.name} ({rates.images:,})"
        if k == 1:
            curves.append(_curve(own if alone else f"{name}: {own}", rates.name, rates.x, rates.y))
            continue
        low, high = (np.clip(rates.mean + side * rates.sd, 0, 1) if band else None for side in (-1, 1))
        label, other = f"mean of {k} models, {own}", f"ensemble, {word} {_score(rates.ensemble)}"
        if not alone:
            label, other = f"{name}: {own}, ensemble {signed(rates.ensemble.mean, 3)}", ""
        curves.append(_curve(label, rates.name, GRID, rates.mean, low, high))
        curves.append(_curve(other, "ensemble" if alone else rates.name, rates.x, rates.y, dashed=not alone))
    first = found[0]
    if alone:
        title += f"\npositive: {first.name}, {first.images:,} of {len(parts[0][0].labels):,} test images"
    else:
        title += f"\n{_EACH[noun]} (test images)"
    about = [f"band: ± sd over the {k} models"] * band
    about += [f"solid: mean of {k} models; dashed: ensemble"] * (k > 1 and not alone)
    if any(r.estimate.new_model for r in found):
        about.append("in brackets: 95 % interval, new patients and a newly trained model (ensemble: these models)")
    elif any(r.estimate.these_models for r in found):
        about.append(_THESE)
    about += [note for note in notes if note.startswith("shortened")]
    axes = ("1 − specificity", "sensitivity") if kind == "roc" else ("recall", "precision")
    reference: Any = "diagonal" if kind == "roc" else first.share if alone else None
    for target in targets:
        plot_rates(curves, title, target, axes=axes, reference=reference, note="\n".join(about))
    headers = [noun, "images", "groups", f"{word} ± sd", "95 % interval", f"{word} of the ensemble", "95 % interval"]
    rows = [[r.name, f"{r.images:,}", f"{r.groups:,}", *_cells(r.estimate), *_cells(r.ensemble)] for r in found]
    records = [
        {
            noun: r.name, "images": r.images, "groups": r.groups, "mean": asdict(r.estimate),
            "ensemble": asdict(r.ensemble),
        }
        for r in found
    ]  # fmt: skip
    return RunFigure(kind, title, first.name if alone else "", headers, rows, notes, records, targets)


def _confusion(predictions: Predictions, title: str, targets: Sequence[Path]) -> RunFigure:
    names, one = predictions.class_names, predictions.ensemble()
    counts = confusion(one.labels, one.logits[0])
    k = len(predictions.logits)
    models = f"ensemble of {k} models" if k > 1 else "one model"
    title += f"\n{models}, accuracy {_score(one.estimate('accuracy'))}"
    for target in targets:
        plot_confusion(counts, names, title, target)
    lines = list(zip(names, counts.tolist(), strict=True))
    rows = [[name, *(f"{count:,}" for count in line)] for name, line in lines]
    records = [{"class": name, "predicted": dict(zip(names, line, strict=True))} for name, line in lines]
    notes = [f"rows: true classes; columns: predicted by the {models}"]
    return RunFigure("confusion", title, "", ["class", *names], rows, notes, records, targets)


def _findings_confusion(parts: Sequence[Part], title: str, targets: Sequence[Path], notes: list[str]) -> RunFigure:
    """Counts of each finding above and below P = 0.5, of images with and without it."""
    k, names = len(parts[0][0].logits), [two.class_names[1] for two, _ in parts]
    counts = np.stack([confusion(two.labels, two.ensemble().logits[0])[::-1, ::-1].ravel() for two, _ in parts])
    models = f"ensemble of {k} models" if k > 1 else "one model"
    title += f"\n{models}, P > 0.5 of each finding, on the test images of which it is known"
    for target in targets:
        plot_confusion(counts, names, title, target, _CALLED)
    lines = list(zip(names, counts.tolist(), strict=True))
    rows = [[name, *(f"{count:,}" for count in line)] for name, line in lines]
    records = [{"finding": name, **dict(zip(_CALLED, line, strict=True))} for name, line in lines]
    notes = [f"called: P > 0.5 of the {models}; shares are of the images with, and of those without, the finding",
             *notes]  # fmt: skip
    return RunFigure("confusion", title, "", ["finding", *_CALLED], rows, notes, records, targets)


def _numbers(tested: Tested, kind: str, title: str, targets: Sequence[Path]) -> RunFigure:
    """Predicted over true numbers, or errors over predictions, of the ensemble."""
    predictions, baseline = tested.predictions, tested.result.baseline
    one, k = predictions.ensemble(), len(predictions.logits)
    name, predicted, y = one.class_names[0], one.p[0, :, 0], one.labels
    agreement = agreement_of(predicted - y)
    scores = {key: (predictions.estimate(key), one.estimate(key)) for key in predictions.task.metrics}
    models = f"ensemble of {k} models" if k > 1 else "one model"
    if kind == "scatter":
        words = ", ".join(f"{metric_title(key)} {_score(scores[key][1])}" for key in ("r2", "mae"))
        words = f"{models}: {words}"
    else:
        words = f"{models}: mean error {signed(agreement[0], 3, plus=True)}, limits of agreement (mean ± 1.96 sd) "
        words += f"{signed(agreement[1], 3)} to {signed(agreement[2], 3, plus=True)}"
    title += f"\n{len(y):,} test images"
    limits = agreement if kind == "residual" else None
    for target in targets:
        plot_numbers(y, predicted, name, words, title, target, limits, note=_THESE * (kind == "scatter"))
    guessed = {key: signed(value, 4) for key, value in baseline.items() if value is not None}
    rows = [
        [metric_title(key), *_cells(own), *_cells(ensemble), guessed.get(key, "")]
        for key, (own, ensemble) in scores.items()
    ]
    headers = ["metric", "mean ± sd", "95 % interval", "ensemble", "95 % interval", "always the training mean"]
    records: list[dict[str, Any]] = [
        {"metric": key, "mean": asdict(own), "ensemble": asdict(ensemble), "baseline": baseline.get(key)}
        for key, (own, ensemble) in scores.items()
    ]
    records.append(dict(zip(("mean_error", "low", "high"), agreement, strict=True)))
    notes = [INTERVALS, f"{name}: mean error {signed(agreement[0], 4, plus=True)}, limits of agreement "
             f"{signed(agreement[1], 4)} to {signed(agreement[2], 4)} (mean ± 1.96 sd) of the {models}"]  # fmt: skip
    return RunFigure(kind, title, "", headers, rows, notes, records, targets)


def _calibration(
    parts: Sequence[Part], kind: str, noun: str, title: str, targets: Sequence[Path], notes: list[str]
) -> RunFigure:
    k, alone = len(parts[0][0].logits), len(parts) == 1
    curves: list[Curve] = []
    rows, records = [], []
    for predictions, c in parts:
        name, two = predictions.class_names[c], against_rest(predictions, c)
        found = calibration(two)
        last = found[-1]  # the ensemble, or the single model
        x, y = np.array([(b.predicted, b.observed) for b in last.bins]).T
        label = f"slope {_value(last.slope, 2)}, Brier {_value(last.brier)}"
        if alone:
            for z in two.logits if k > 1 else ():
                bins = calibration(replace(two, logits=z[None]), resamples=1)[-1].bins
                curves.append(_curve("", "model", *np.array([(b.predicted, b.observed) for b in bins]).T, dashed=True))
            low, high = np.array([wilson(b.positives / b.images, b.images) for b in last.bins]).T
            label = "ensemble: " * (k > 1) + f"intercept {_value(last.intercept, 2)}, {label}"
            curves.append(_curve(label, "ensemble", x, y, low, high))
        else:
            curves.append(_curve(f"{name}: {label}", name, x, y))
        for each in found:
            numbers = [_value(each.intercept), _value(each.slope), _value(each.brier), f"{each.ece:.4f}"]
            rows.append([name, each.models, *numbers, f"{len(each.bins)}" if each.bins else ""])
            records.append({noun: name, **asdict(each)})
    predictions, c = parts[0]
    first = predictions.class_names[c]
    counts: list[int] = []
    if alone:
        one = against_rest(predictions.ensemble(), c)
        counts = np.histogram(one.p[0, :, 1], bins=np.linspace(0, 1, 21))[0].tolist()
        title += f"\npositive: {first}, {int((one.labels == 1).sum()):,} of {len(one.labels):,} test images"
    else:
        title += f"\n{_EACH[noun]}{', ensemble' if k > 1 else ''}"
    sizes = [b["images"] for record in records for b in record["bins"]]
    about = [
        f"{len(records[-1]['bins'])} bins of {min(sizes):,}{f' to {max(sizes):,}' * (max(sizes) > min(sizes))} images",
        *["bars: 95 % interval of the share"] * alone,
        *[f"dashed: each of the {k} models"] * (alone and k > 1),
    ]
    note = "\n".join(["; ".join(about), _THESE, *(note for note in notes if note.startswith("shortened"))])
    axes = (f"probability of {first if alone else f'the {noun}'}", "share observed")
    for target in targets:
        plot_rates(curves, title, target, axes=axes, reference="diagonal", points=True, counts=counts, note=note)
    headers = [noun, "models", "intercept", "slope", "Brier score", "calibration error", "bins"]
    return RunFigure(kind, title, first if alone else "", headers, rows, notes, records, targets)


def _curve(
    label: str, family: str, x: FloatArray, y: FloatArray, low: FloatArray | None = None,
    high: FloatArray | None = None, *, dashed: bool = False,
) -> Curve:  # fmt: skip
    none = np.full(len(x), np.nan)
    xs, ys, lows, highs = (tuple((none if values is None else values).tolist()) for values in (x, y, low, high))
    return Curve(label, xs, ys, lows, highs, dashed=dashed, family=family)


def _value(value: Value, digits: int = 3) -> str:
    if value.value is None:
        return f"– ({value.why})"
    return signed(value.value, digits) + (f" ({bounds(value.interval, digits=digits)})" if value.interval else "")


def _score(estimate: Estimate) -> str:
    """``0.912 (0.880 to 0.941)``."""
    return f"{signed(estimate.mean, 3)} ({bounds(estimate.interval) or estimate.why})"


def _cells(estimate: Estimate) -> tuple[str, str]:
    mean = score(estimate.mean, estimate.std, 4) if math.isfinite(estimate.mean) else ""
    return mean, bounds(estimate.interval, digits=4, between=" – ") or estimate.why
