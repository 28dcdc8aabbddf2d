"""Two sentences from saved results: which backbone to take, and whether more labels help.

A backbone is chosen on validation alone. More labels help where the slope of the score over log2 of training labels is
above 0 beyond chance (`doubling`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from embcache.errors import EmbcacheError
from embcache.paths import PathLike
from embcache.probe.metrics import find_metric, is_loss, merit, metric_title
from embcache.probe.statistics import NOTHING, RESAMPLES, Scores, deviations, estimate, satterthwaite
from embcache.results.compare import Comparison, Difference, Tested, compare_tested, judge, load_tested, same_test
from embcache.results.curves import by_task, metric_words, named_curves
from embcache.results.layout import bounds, signed
from embcache.runs.folders import Result, runs_dir
from embcache.sealed import Plain

LEVEL = 0.05
"""A corrected p below it distinguishes two models."""

Verdict = Literal["worse", "undecided", "better", "unknown"]
Trend = Literal["rising", "unclear", "plateau", "flat", "falling", "one size", "unknown"]
Namer = Callable[[str], str]
"""From a model's name to what a sentence calls it."""


@dataclass(frozen=True)
class Contender:
    """A model beside the chosen one."""

    name: str
    run: str
    difference: Difference  # its test score minus that of the chosen model
    p_holm: float | None  # corrected for all models compared at this size
    verdict: Verdict  # on this model


@dataclass(frozen=True)
class BackboneAdvice:
    """Which backbone to take."""

    text: str  # one sentence
    name: str
    run: str
    n_train: int  # training labels per fold
    metric: str
    mean: float  # its test score, over folds
    interval: tuple[float, float] | None  # 95 %, as tables show it
    rivals: tuple[Contender, ...]  # by falling validation score


@dataclass(frozen=True)
class LabelsAdvice:
    """Whether more labels help one model."""

    text: str  # one sentence
    name: str  # the model
    metric: str
    trend: Trend  # of a loss, rising is getting better
    sizes: tuple[int, ...]  # training labels per fold, ascending
    means: tuple[float, ...]  # test scores
    doubling: Difference | None = None  # change of the score with twice the labels, over all sizes; None for one size
    plateau_from: int | None = None  # the size that begins a plateau
    last_doubling: Difference | None = None  # like ``doubling``, over the last sizes


@dataclass(frozen=True)
class Advice(Plain):
    """Both sentences for saved results of one dataset, target and metric."""

    dataset: str
    target: str
    metric: str
    backbone: BackboneAdvice | None  # none where no size has two backbones that can be compared
    labels: LabelsAdvice | None  # of the chosen model, or the one of the most sizes; None without validation scores
    problems: tuple[str, ...] = ()  # runs whose predictions cannot be read

    @property
    def title(self) -> str:
        """Dataset, and the target where it is not the label."""
        return self.dataset + (f", {self.target}" if self.target else "")

    @property
    def sentences(self) -> list[str]:
        """What stands beneath a table of these results: nothing for one backbone, nothing for one size."""
        found = [] if self.backbone is None else [self.backbone.text]
        return found if self.labels is None or len(self.labels.sizes) < 2 else [*found, self.labels.text]


def advise(results: Sequence[Result], *, home: PathLike | None = None, resamples: int = RESAMPLES) -> list[Advice]:
    """Both sentences for every dataset, target and metric among saved results."""
    tasks = by_task(list(filter(rankable, results)))
    return [_advise(named_curves(members), home, resamples) for members in tasks.values()]


def sentences(advice: Sequence[Advice]) -> list[str]:
    """What stands beneath a table of results, each with its dataset and target where there are several."""
    several = len({each.title for each in advice}) > 1
    return [
        f"{each.title}: {line}" if several else line
        for each in advice
        for line in (*each.sentences, *(f"not read: {p}" for p in each.problems))
    ]


def _advise(models: Mapping[str, Sequence[Result]], home: PathLike | None, resamples: int) -> Advice:
    first = next(iter(models.values()))[0]
    problems = dict[str, None]()
    chosen: BackboneAdvice | None = None
    for n in sorted({r.n_train for members in models.values() for r in members}, reverse=True):
        at = {name: r for name, members in models.items() for r in members if r.n_train == n}
        family = comparable(at)
        if len({at[name].backbones for name in family}) < 2:
            continue
        alike, unread = load_alike({name: at[name] for name in family}, home)
        problems |= dict.fromkeys(f"{at[name].id}: {problem}" for name, problem in unread.items())
        if len({at[name].backbones for name in alike}) >= 2:
            chosen = advise_backbone([*alike], compare_tested([*alike.values()], resamples=resamples), n)
            break
    labels, unread = advise_curve(models, chosen, home, resamples)
    problems |= dict.fromkeys(f"{run}: {problem}" for run, problem in unread.items())
    return Advice(first.dataset, first.target, first.metric, chosen, labels, tuple(problems))


def rankable(result: Result) -> bool:
    """Whether its validation score may choose it."""
    return result.val_mean is not None and result.kind != "kaggle"


def advise_curve(
    models: Mapping[str, Sequence[Result]], chosen: BackboneAdvice | None, home: PathLike | None, resamples: int
) -> tuple[LabelsAdvice | None, dict[str, str]]:
    """Whether more labels help the chosen model; of one size, or where none was chosen, the one with the most sizes.

    Also why runs, by ID, cannot be read.
    """
    models = {name: kept for name, of in models.items() if (kept := [result for result in of if rankable(result)])}
    if not models:
        return None, {}
    largest = {name: max(members, key=lambda r: r.n_train) for name, members in models.items()}
    order = sorted(models, key=lambda name: (-len(models[name]), -_validated(largest[name])))
    name = chosen.name if chosen is not None and len(models[chosen.name]) > 1 else order[0]
    curve, unread = load_readable({r.id: r for r in models[name]}, home)
    if not curve:
        return None, unread
    return advise_labels(name, [*curve.values()], shortened=_namer(models), resamples=resamples), unread


def _validated(result: Result) -> float:
    return merit(result.metric, result.val_mean)


def comparable(at: Mapping[str, Result]) -> list[str]:
    """Names of the models at one size whose validation scores can be compared, the best first.

    These share the digest of their splits; of several such families, the one with the most backbones, then the most
    models, then the most labels is taken. The test set plays no part in the order.
    """
    families: dict[str, list[str]] = {}
    for name, result in at.items():
        families.setdefault(str(result.request.get("splits", "")), []).append(name)
    family = max(families.values(), key=lambda f: (len({at[n].backbones for n in f}), len(f), at[f[0]].labels_used))
    return sorted(family, key=lambda name: (-_validated(at[name]), name))


def load_readable(found: Mapping[str, Result], home: PathLike | None) -> tuple[dict[str, Tested], dict[str, str]]:
    """Results by name with their predictions, and the reason for each that cannot be read or scored."""
    tested, unread = {}, {}
    for name, result in found.items():
        try:
            find_metric(result.metric, result.task)  # its package may be gone
            tested[name] = load_tested(result, runs_dir(result.dataset, home) / result.id)
        except EmbcacheError as error:
            unread[name] = error.problem
    return tested, unread


def load_alike(found: Mapping[str, Result], home: PathLike | None) -> tuple[dict[str, Tested], dict[str, str]]:
    """`load_readable` of those that were tested on the same images as the first."""
    tested, unread = load_readable(found, home)
    return {name: t for name, t in tested.items() if same_test(next(iter(tested.values())), t)}, unread


def advise_backbone(names: Sequence[str], rows: Sequence[Comparison], n_train: int) -> BackboneAdvice:
    """Which backbone to take, of models at one number of training labels."""
    first = rows[0]
    loss = is_loss(first.metric)
    rivals = []
    for name, row in zip(names[1:], rows[1:], strict=True):
        assert row.difference is not None
        verdict: Verdict = "undecided"
        if row.difference.interval is None:
            verdict = "unknown"
        elif row.p_holm is not None and row.p_holm < LEVEL:
            verdict = "better" if (row.difference.difference > 0) is not loss else "worse"
        rivals.append(Contender(name, row.run, row.difference, row.p_holm, verdict))
    short = _namer(names)
    listed = {v: _listed([short(r.name) for r in rivals if r.verdict == v]) for v in get_args(Verdict)}
    these = "" if all(r.difference.trained for r in rivals) else " (as trained here)"
    parts = {
        "worse": f"it is better than {listed['worse']}{these}, Holm-corrected p < {LEVEL:g}",
        "undecided": f"it cannot be distinguished from {listed['undecided']}{these}",
        "better": f"{listed['better']} scored better on the test images{these}, which play no part in the choice",
        "unknown": f"there are too few patients to compare it with {listed['unknown']}",
    }
    text = (
        f"Take {short(names[0])}: it scored best on validation with {n_train:,} training labels and reaches a test "
        f"{metric_title(first.metric, first.estimate.positive)} of {signed(first.mean, 3)}"
        f"{_bounds(first.interval) or f' ({first.estimate.why})'}; "
        f"{'; '.join(words for verdict, words in parts.items() if listed[verdict])}."
    )
    return BackboneAdvice(text, names[0], first.run, n_train, first.metric, first.mean, first.interval, tuple(rivals))


def advise_labels(
    name: str, tested: Sequence[Tested], *, shortened: Namer | None = None, resamples: int = RESAMPLES
) -> LabelsAdvice:
    """Whether more labels help one model."""
    ordered = sorted(tested, key=lambda t: t.result.n_train)
    last = ordered[-1]
    ordered = [t for t in ordered if same_test(last, t)]
    result = last.result
    sizes, means = tuple(t.result.n_train for t in ordered), tuple(float(t.result.mean or 0.0) for t in ordered)
    if len(sizes) == 1:
        text = f"One size, {sizes[0]:,} training labels, does not show whether more labels help"
        return LabelsAdvice(
            f"{text}; --subset 20,50,100,F gives several.", name, result.metric, "one size", sizes, means
        )
    positive = last.predictions.positive
    scores = [replace(t.predictions, positive=positive).scores(result.metric, resamples) for t in ordered]
    slopes = {k: doubling(scores[k:], ordered[k:]) for k in range(len(sizes) - 1)}
    better = -1 if find_metric(result.metric, result.task).loss else 1

    def ends(d: Difference) -> tuple[float, float]:
        """Bounds of a change for the better: the least and the most; without an interval nothing is excluded."""
        low, high = sorted(better * end for end in d.interval or (-math.inf, math.inf))
        return low, high

    overall, plateau = slopes[0], None
    # The end of the curve spans at least a doubling, so that two sizes close together do not pass for a plateau.
    start = max([k for k, n in enumerate(sizes) if 2 * n <= sizes[-1]], default=0)
    trend: Trend = "rising"
    if overall.interval is None:
        trend = "unknown"
    elif ends(overall)[0] <= 0:
        trend = "falling" if ends(overall)[1] < 0 else "flat"
    elif ends(slopes[start])[0] <= 0:
        level = [k for k in range(1, start + 1) if ends(slopes[k])[0] <= 0]
        flatter = [k for k in level if ends(slopes[k])[1] < better * overall.difference]
        trend, start = "unclear", level[0]
        if flatter:
            trend, start, plateau = "plateau", flatter[0], sizes[flatter[0]]
    begin = {
        "rising": "More labels still help",
        "unclear": f"More labels help, though from {sizes[start]:,} on alone no gain was shown",
        "plateau": f"More labels help up to {sizes[start]:,}, beyond which no further gain was shown",
        "flat": "No gain from more labels was shown",
        "falling": "More labels make it worse",
        "unknown": f"Whether more labels help cannot be determined ({overall.why})",
    }[trend]
    text = (
        f"{begin}: {(shortened or _in_brackets)(name)} reaches a test {metric_words(result)} of "
        f"{_listed([signed(m, 3) for m in means], 12)} with {_listed([f'{n:,}' for n in sizes], 12)} training labels"
    )
    if overall.interval is not None:
        text += f"; a doubling changes it by {_change(overall)}"
        if trend in ("rising", "unclear", "plateau") and start:
            text += f", from {sizes[start]:,} on by {_change(slopes[start])}"
    return LabelsAdvice(text + ".", name, result.metric, trend, sizes, means, overall, plateau, slopes[start])


def doubling(scores: Sequence[Scores], tested: Sequence[Tested]) -> Difference:
    """Change of the score with twice the labels: the least-squares slope over log2 of training labels.

    The slope is a weighted sum of the means at each size. Its variance is that of the same sum over the test groups,
    which all sizes share, and of each size's training, with the share of training images that its own models have in
    common. Sizes count as trained independently; where one's images are among the next one's, that is conservative.
    """
    x = np.log2([t.result.n_train for t in tested])
    weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    slope = float(sum(w * s.mean for w, s in zip(weights, scores, strict=True)))
    why = scores[0].test.too_few(scores[0].metric) or ("" if np.isfinite(slope) else "no value")
    df = min(s.df for s in scores)
    moves = sum(w * (s.moves if s.draws is None else s.draws).mean(0) for w, s in zip(weights, scores, strict=True))
    if scores[0].draws is not None:
        moves = deviations(moves[None], df)[0]
    parts = [(float((moves**2).sum()), df)]
    for w, s, t in zip(weights, scores, tested, strict=True):
        k, own = len(s.values), t.predictions
        found = estimate(s, own.overlap, own.folds)
        if found.training_variance is not None and own.overlap is not None:
            parts.append((w**2 * found.training_variance * (1 / k + (1 - 1 / k) * own.overlap), own.folds - 1))
    trained = len(parts) == 1 + len(scores)
    parts = parts if trained else parts[:1]
    variance = sum(v for v, _ in parts)
    if why or variance <= NOTHING:
        return judge(slope, 0.0, df, trained=trained, why=why)
    return judge(slope, variance, satterthwaite(*parts), trained=trained)


def _change(d: Difference) -> str:
    words = _bounds(d.interval, plus=True, words="" if d.trained else ", these models")
    return f"{signed(d.difference, 3, plus=True)}{words}"


def _bounds(interval: tuple[float, float] | None, *, plus: bool = False, words: str = "") -> str:
    return "" if interval is None else f" (95 % interval {bounds(interval, plus=plus)}{words})"


def _in_brackets(name: str) -> str:
    first, _, rest = name.partition(", ")
    return f"{first} ({rest})" if rest else first


def _namer(names: Iterable[str]) -> Namer:
    """Models are called by their backbones alone where nothing else sets them apart."""
    alone = len({name.partition(", ")[2] for name in names}) == 1
    return (lambda name: _backbone(name.partition(", ")[0])) if alone else _in_brackets


def _backbone(name: str) -> str:
    """A backbone in a sentence, in which ``random`` alone reads as chance."""
    return f"the backbone {name}" if name.partition(":")[0] == "random" else name


def _listed(names: Sequence[str], most: int = 6) -> str:
    """``a, b and c``; of many the first and how many others; nothing of none."""
    if len(names) > most:
        return f"{', '.join(names[: most - 1])} and {len(names) - most + 1} others"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
