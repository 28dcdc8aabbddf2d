"""Saved results: finding them, and as learning curves over numbers of training labels."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from embcache.backbones.catalog import LIBRARIES
from embcache.data.classes import class_flags, target_words, task_flags
from embcache.errors import StoreNotFoundError, UsageError
from embcache.paths import PathLike, home_dir
from embcache.probe.metrics import metric_title
from embcache.probe.schedule import GENTLE, Schedule, gentle, rates_of
from embcache.probe.summary import in_metric
from embcache.results.layout import Table, bounds, record, score
from embcache.results.paper import Cell, Model
from embcache.runs.folders import Result, list_results

_PREFIXES = (*LIBRARIES, "random")  # before the colon of a backbone that is not `module:name`
# What differs from size to size along one curve, or is not part of the protocol.
_NOT_PROTOCOL = ("subset", "splits", "images", "dataset", "run")


def find_results(
    *,
    home: PathLike | None = None,
    datasets: Sequence[str] = (),
    backbones: Sequence[str] = (),
    heads: Sequence[str] = (),
    kinds: Sequence[str] = (),
    metrics: Sequence[str] = (),
) -> list[Result]:
    """Saved results that have a test score.

    Parameters
    ----------
    home : path, optional
        Folder of stores and runs. Default: ``$EMBCACHE_HOME`` or ``~/.cache/embcache``.
    datasets, heads, kinds : sequence of str
        Only results of these, where some are named; a kind is ``"probe"``, ``"finetune"`` or ``"kaggle"``.
    backbones : sequence of str
        Only results over no other backbones, where some are named.
    metrics : sequence of str
        Score the saved predictions by these instead of the runs' own metrics: for each metric, all results.

    Returns
    -------
    list of Result

    Raises
    ------
    StoreNotFoundError
        There is none.
    UsageError
        A metric is unknown or does not fit the classes.
    """
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
            "no saved result fits" if saved else "there are no saved results", code="no-result",
            found=f"{len(saved)} results, none of which is scored and matches" if saved else "none",
            where=home_dir(home),
            fix="embcache probe --head linear --subset 20,50,100,F, or embcache results to see what there is",
        )  # fmt: skip
    return [in_metric(result, metric, home) for metric in metrics for result in fitting] or fitting


def refuse_untrusted(result: Result, trusted: Sequence[str] = ()) -> None:
    """Refuse a `module:name` that only a run's file names: importing it would run whatever code it means here."""
    foreign = [name for name in result.models if ":" in name and name.partition(":")[0] not in _PREFIXES]
    head = str(result.request["head"]["name"])
    if unknown := [name for name in (*foreign, *[head] * (":" in head)) if name not in trusted]:
        raise UsageError(
            f"run {result.id} needs code that is not part of embcache", code="untrusted-name",
            expected="a registered name", found=", ".join(unknown),
            fix=(f"--trust {unknown[0]}, if you trust that module", "register it by an entry point of its package"),
        )  # fmt: skip


def request_flags(result: Result) -> list[str]:
    """Words of the command that made a run, where they are not the defaults: all but dataset, names and sizes."""
    request, usual, words = result.request, asdict(Schedule()), list[str]()
    for name, value in request.get("head", {}).items():
        if name != "name":
            text = ",".join(map(str, value)) if isinstance(value, list | tuple) else value
            words += ["--head-option", f"{name}={text}"]
    for name, default in (("folds", 5), ("seed", 0), ("val", "full"), ("repeats", 1), ("views", 1)):
        if request.get(name, default) != default:
            words += [f"--{name}", str(request[name])]
    words += task_flags(request)
    words += class_flags(request.get("classes", {}))
    words += ["--exclude-test-overlap"] * bool(request.get("exclude_test_overlap"))
    rates, schedule = rates_of(request), request.get("schedule") or {}
    if result.kind == "finetune":
        schedule, usual = usual | schedule, usual | (GENTLE if gentle(result.models) else {})
        rates = [schedule["lr"]]
    if rates not in ([], [usual["lr"]]):
        words += ["--lr", ",".join(f"{rate:g}" for rate in rates)]
    for name in ("max_epochs", "batch_size") if result.kind == "finetune" else ():
        if schedule[name] != usual[name]:
            words += [f"--{name.replace('_', '-')}", str(schedule[name])]
    return words


def by_task(results: Sequence[Result]) -> dict[tuple[str, str, str, tuple[str, ...]], list[Result]]:
    """Scored results by dataset, target, metric and classes."""
    tasks: dict[tuple[str, str, str, tuple[str, ...]], list[Result]] = {}
    for result in results:
        if result.mean is not None:
            key = (result.dataset, target_words(result.request), result.metric, result.class_names)
            tasks.setdefault(key, []).append(result)
    return tasks


def metric_words(result: Result) -> str:
    """The metric as an axis names it, with the class that an asymmetric one is of."""
    return metric_title(result.metric, "" if result.estimate is None else result.estimate.positive)


def band_words(results: Sequence[Result]) -> str:
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


def named_curves(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results of one dataset by model and protocol; a curve's name says what sets it apart from those like it.

    Of several results of one curve at one number of labels (``S`` and ``50``) the first is kept.
    """
    curves: dict[tuple[str, str, str, tuple[str, ...], str], list[Result]] = {}
    for result in results:
        variant = json.dumps({k: v for k, v in result.request.items() if k not in _NOT_PROTOCOL}, sort_keys=True)
        variant = "" if result.kind == "kaggle" else variant
        key = (result.kind, result.head, result.test_set, result.backbones, variant)
        members = curves.setdefault(key, [])
        if all(other.n_train != result.n_train for other in members):
            members.append(result)
    named: dict[str, list[Result]] = {}
    for members in curves.values():
        alike = [others for others in curves.values() if _model_words(others[0]) == _model_words(members[0])]
        name = ", ".join([_model_words(members[0]), *_differences(members[0], [others[0] for others in alike])])
        while name in named:  # two recipes whose differences have no short words
            name += "′"
        named[name] = members
    return named


def _model_words(result: Result) -> str:
    kind = {"probe": "", "finetune": ", finetuned", "kaggle": ", leaderboard"}.get(result.kind, f", {result.kind}")
    return f"{' + '.join(result.backbones)}, {result.head}{kind}"


def _differences(result: Result, alike: Sequence[Result]) -> list[str]:
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


def curve_table(results: Sequence[Result]) -> Table:
    """Saved results over sizes: one row per model, one column per number of training labels, intervals beneath."""
    scored = [result for result in results if result.mean is not None]
    sizes = sorted({result.n_train for result in scored})
    rows: list[tuple[str, ...]] = []
    records = []
    for (dataset, target, *_), group in by_task(scored).items():
        words = f"{dataset}{f', {target}' if target else ''} ({metric_words(group[0])})"
        for label, members in named_curves(group).items():
            at = {r.n_train: r for r in members}
            rows.append((words, label, *(score(at[n].mean or 0.0, at[n].std) if n in at else "" for n in sizes)))
            intervals = (bounds(at[n].interval, between=" – ") if n in at else "" for n in sizes)
            rows.append(("", "  95 % interval", *intervals))
            words = ""
            models = [Model(label, r.kind, r.head, r.backbones) for r in members]
            records += [record(Cell(r.dataset, m, r.subset, r)) for m, r in zip(models, members, strict=True)]
    used = {n: max(r.labels_used for r in scored if r.n_train == n) for n in sizes}
    notes = (
        f"columns: training labels per fold; labels used, validation included: "
        f"{', '.join(f'{n:,}: {labels:,}' for n, labels in used.items())}",
        f"mean ± sd over folds; {band_words(scored)}",
        *dict.fromkeys(f"{r.dataset}: {note}" for r in scored for note in r.left_out),
    )
    headers = ("dataset", "model", *(f"{n:,}" for n in sizes))
    title = "Saved results over numbers of training labels"
    return Table("curves", title, headers, tuple(rows), notes if rows else (), tuple(records))
