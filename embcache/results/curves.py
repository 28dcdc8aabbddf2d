"""Learning curves: saved results over numbers of training labels, as lines to draw and as a table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from embcache.data.classes import target_words
from embcache.errors import StoreNotFoundError
from embcache.figures.plots import Curve, CurvePanel, plot_curves
from embcache.paths import PathLike, home_dir, slug
from embcache.probe.metrics import metric_title
from embcache.probe.schedule import rates_of
from embcache.probe.summary import in_metric
from embcache.results.grid import Cell, Grid, Model
from embcache.results.layout import Table, bounds, record, score
from embcache.runs.folders import ProbeResult, list_results

# What differs from size to size of one curve, or says nothing of the protocol.
_NOT_PROTOCOL = ("subset", "splits", "images", "dataset", "run")


def curve_panels(results: Sequence[ProbeResult]) -> list[CurvePanel]:
    """One panel a dataset and metric, one curve for every model and protocol.

    A point is the mean over folds at the number of training labels of a fold, its band the saved 95 % interval
    (`band_words` says which); of a leaderboard's scores ± one sd. Results that are not scored are left out.
    """
    panels: dict[tuple[str, str, str], list[ProbeResult]] = {}
    for result in results:
        if result.mean is not None:
            panels.setdefault(_panel_of(result), []).append(result)
    return [_panel(key, group) for key, group in panels.items()]


def _panel_of(result: ProbeResult) -> tuple[str, str, str]:
    return result.dataset, target_words(result.request), result.metric


def _panel(key: tuple[str, str, str], results: Sequence[ProbeResult]) -> CurvePanel:
    dataset, target, _ = key
    curves = tuple(_curve(label, members) for label, members in named_curves(results).items())
    title = dataset + (f", {target}" if target else "") + (" (synthetic)" if results[0].synthetic else "")
    return CurvePanel(title, _titled(results[0]), curves)


def _titled(result: ProbeResult) -> str:
    """The metric as a curve's axis names it, with the class that an asymmetric one is of."""
    return metric_title(result.metric, "" if result.estimate is None else result.estimate.positive)


def band_words(results: Sequence[ProbeResult]) -> str:
    """Which interval the bands of scored results are, in words."""
    estimates = [result.estimate for result in results if result.estimate is not None]
    anew = any(e.new_model is not None for e in estimates)
    fixed = any(e.new_model is None and e.these_models is not None for e in estimates)
    words = {
        "95 % interval for new patients and a newly trained model": anew,
        f"95 % interval for new patients and these models{', where the first is missing' * anew}": fixed,
        "no interval where there are too few patients": any(e.interval is None for e in estimates),
        "± sd over folds of leaderboard scores": any(r.estimate is None and r.std is not None for r in results),
    }
    return "; ".join(word for word, there in words.items() if there)


def _curve(label: str, results: Sequence[ProbeResult]) -> Curve:
    points = sorted({r.n_train: r for r in results}.values(), key=lambda r: r.n_train)
    bounds = [r.interval or _spread(r) for r in points]
    return Curve(
        label,
        tuple(float(r.n_train) for r in points),
        tuple(float(r.mean or 0.0) for r in points),
        tuple(low for low, _ in bounds),
        tuple(high for _, high in bounds),
        family=" + ".join(results[0].backbones),
        method=f"{results[0].head}, {results[0].kind}",
    )


def _spread(result: ProbeResult) -> tuple[float, float]:
    """Where there is no interval: nothing, but of a leaderboard's scores ± one sd."""
    if result.estimate is not None:
        return math.nan, math.nan
    mean, sd = result.mean or 0.0, result.std or 0.0
    return mean - sd, mean + sd


def named_curves(results: Sequence[ProbeResult]) -> dict[str, list[ProbeResult]]:
    """Results of one dataset by model and protocol; a curve's name tells what sets it apart from those like it.

    Of several results of one curve at one number of labels (``S`` and ``50``) the first is kept.
    """
    curves: dict[tuple[str, str, str, tuple[str, ...], str], list[ProbeResult]] = {}
    for result in results:
        variant = json.dumps({k: v for k, v in result.request.items() if k not in _NOT_PROTOCOL}, sort_keys=True)
        variant = "" if result.kind == "kaggle" else variant
        key = (result.kind, result.head, result.test_set, result.backbones, variant)
        members = curves.setdefault(key, [])
        if all(other.n_train != result.n_train for other in members):
            members.append(result)
    named: dict[str, list[ProbeResult]] = {}
    for members in curves.values():
        alike = [others for others in curves.values() if _model_words(others[0]) == _model_words(members[0])]
        name = ", ".join([_model_words(members[0]), *_differences(members[0], [others[0] for others in alike])])
        while name in named:  # two recipes whose differences have no short words
            name += "′"
        named[name] = members
    return named


def _model_words(result: ProbeResult) -> str:
    kind = {"probe": "", "finetune": ", finetuned", "kaggle": ", leaderboard"}.get(result.kind, f", {result.kind}")
    return f"{' + '.join(result.backbones)}, {result.head}{kind}"


def _differences(result: ProbeResult, alike: Sequence[ProbeResult]) -> list[str]:
    """The request's entries in which results of one model are not all the same, in words."""
    entries = [_flat(other.request) for other in alike]
    mine = _flat(result.request)
    return [f"{name} {value}" for name, value in mine.items() if any(other.get(name) != value for other in entries)]


def _flat(request: Mapping[str, Any]) -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in request.items():
        if name in _NOT_PROTOCOL:
            continue
        if isinstance(value, Mapping):
            flat |= {key: str(inner) for key, inner in value.items()}
        elif name == "recipes":
            flat["recipe"] = " ".join(str(fingerprint)[:6] for _, fingerprint in value)
        elif name == "lr":
            flat[name] = ", ".join(f"{rate:g}" for rate in rates_of(request))
        else:
            flat["epochs by" if name == "metric" else name] = str(value)
    return flat


def paper_curves(cells: Sequence[Cell]) -> dict[str, list[Curve]]:
    """The paper's values in a table, by dataset, as curves to draw beside ours."""
    curves: dict[str, dict[Model, list[tuple[int, float, float]]]] = {}
    for cell in cells:
        if cell.paper is None or cell.paper.mean is None or cell.result is None:
            continue
        points = curves.setdefault(cell.dataset, {}).setdefault(cell.model, [])
        points.append((cell.result.n_train, cell.paper.mean, cell.paper.std or 0.0))
    return {
        dataset: [
            Curve(
                f"{model.label}, paper",
                tuple(float(n) for n, _, _ in sorted(points)),
                tuple(mean for _, mean, _ in sorted(points)),
                tuple(mean - sd for _, mean, sd in sorted(points)),
                tuple(mean + sd for _, mean, sd in sorted(points)),
                dashed=True,
            )
            for model, points in models.items()
        ]
        for dataset, models in curves.items()
    }


def table_curves(grid: Grid, cells: Sequence[Cell]) -> list[CurvePanel]:
    """The curves of a table: ours with their intervals, the paper's dashed."""
    theirs = paper_curves(cells)
    panels = []
    for dataset in grid.datasets:
        curves = []
        metric = ""
        for model in grid.models:
            at = [c.result for c in cells if c.dataset == dataset and c.model == model and c.result is not None]
            scored = [result for result in at if result.mean is not None]
            if scored:
                metric = _titled(scored[0])
                curves.append(_curve(model.label, scored))
        if curves:
            panels.append(CurvePanel(dataset, metric, (*curves, *theirs.get(dataset, []))))
    return panels


def curve_table(results: Sequence[ProbeResult]) -> Table:
    """Saved results over sizes: a row a model, a column a number of training labels; the interval beneath the mean."""
    scored = [result for result in results if result.mean is not None]
    sizes = sorted({result.n_train for result in scored})
    rows: list[tuple[str, ...]] = []
    records = []
    for panel in dict.fromkeys(map(_panel_of, scored)):
        dataset, target, _ = panel
        group = [r for r in scored if _panel_of(r) == panel]
        words = f"{dataset}{f', {target}' if target else ''} ({_titled(group[0])})"
        for label, members in named_curves(group).items():
            at = {r.n_train: r for r in members}
            rows.append((words, label, *(score(at[n].mean or 0.0, at[n].std) if n in at else "" for n in sizes)))
            rows.append(
                ("", "  95 % interval", *(bounds(at[n].interval, between=" – ") if n in at else "" for n in sizes))
            )
            words = ""
            for cell in (Cell(r.dataset, Model(label, r.kind, r.head, r.backbones), r.subset, r) for r in members):
                records.append(record(cell))
    used = {n: max(r.labels_used for r in scored if r.n_train == n) for n in sizes}
    notes = (
        "columns: training labels of a fold; labels used, validation included: "
        + ", ".join(f"{n:,}: {labels:,}" for n, labels in used.items()),
        f"mean ± sd over folds; {band_words(scored)}",
        *dict.fromkeys(f"{r.dataset}: {note}" for r in scored for note in r.left_out),
    )
    return Table(
        "curves",
        "Saved results over numbers of training labels",
        ("dataset", "model", *(f"{n:,}" for n in sizes)),
        tuple(rows),
        notes if rows else (),
        tuple(records),
    )


def find_results(
    *,
    home: PathLike | None = None,
    datasets: Sequence[str] = (),
    backbones: Sequence[str] = (),
    heads: Sequence[str] = (),
    kinds: Sequence[str] = (),
    metrics: Sequence[str] = (),
) -> list[ProbeResult]:
    """The scored results that are saved and fit."""
    saved = [result for name in datasets for result in list_results(home, name)] if datasets else list_results(home)
    fitting = [
        result
        for result in saved
        if result.mean is not None
        and (not backbones or set(result.backbones) <= set(backbones))
        and (not heads or result.head in heads)
        and (not kinds or result.kind in kinds)
    ]
    if not fitting:
        raise StoreNotFoundError(
            "no saved result fits" if saved else "there are no saved results",
            found=f"{len(saved)} results, none of them scored and as asked" if saved else "none",
            where=home_dir(home),
            fix="embcache probe --head linear --subset 20,50,100,F, or embcache results to see what there is",
        )
    return [in_metric(result, metric, home) for metric in metrics for result in fitting] or fitting


def draw_curves(
    results: Sequence[ProbeResult], *, home: PathLike | None = None, target: Path | None = None
) -> tuple[Table, Path]:
    """Draw scored results, one panel per dataset and metric, and lay them out as a table."""
    names = list(dict.fromkeys(result.dataset for result in results))
    folder = home_dir(home) / slug(names[0]) / "figures" if len(names) == 1 else home_dir(home)
    path = plot_curves(
        curve_panels(results), "Learning curves", target or folder / "curves.png", bands=band_words(results)
    )
    return curve_table(results), path
