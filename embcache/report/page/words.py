"""The summary: sentences drawn from the numbers. What wins is chosen on validation; the test set only says how far."""

from __future__ import annotations

from collections.abc import Sequence

from embcache.probe.metrics import metric_title
from embcache.report.layout import signed
from embcache.report.page.choice import Choice, Rival, beyond, told_apart
from embcache.report.page.collect import Task

RULE = (
    "“Best” is always the highest mean validation score over folds; the test set is only read off. Two models differ "
    "“beyond the interval” where the 95 % bootstrap interval of their difference, on the same resamples of test "
    "groups, leaves 0 out; p is corrected by Holm for all models compared at that size."
)
_MOST = 4  # names in a list


def headline(task: Task, choices: Sequence[Choice]) -> str:
    """One sentence on a task: what is best at each size, and how far the test score goes from the first to the last."""
    if not choices:
        return f"{task.title}: no results that can be ranked."
    metric = metric_title(task.metric)
    winners = list(dict.fromkeys(choice.chosen.name for choice in choices))
    first, last = choices[0], choices[-1]
    if len(choices) == 1:
        what = (
            f"{winners[0]} is best on validation at {size_words(last)}, with a test {metric} of {_score(last.chosen)}"
        )
    else:
        if len(winners) == 1:
            what = f"{winners[0]} is best on validation at every size"
        else:
            parts = [f"{choice.chosen.name} at {choice.subset}" for choice in choices]
            what = f"best on validation are {'; '.join(parts)}"
        what += (
            f". The test {metric} of the best goes from {_score(first.chosen)} with {first.n_train:,} training labels "
            f"to {_score(last.chosen)} with {last.n_train:,}"
        )
    return f"{task.title}{' (synthetic images)' if task.synthetic else ''}: {what}."


def size_words(choice: Choice) -> str:
    """``S (50 training labels; 1,093 with validation)``."""
    return f"{choice.subset} ({choice.n_train:,} training labels; {choice.labels_used:,} with validation)"


def sentences(task: Task, choice: Choice) -> list[str]:
    """What one size says, as sentences of plain text."""
    metric, best, others = metric_title(task.metric), choice.chosen, choice.rivals[1:]
    told = [
        f"{best.name} has the {'best' if others else 'only'} validation {metric}"
        + (f" of {len(choice.rivals)} models" if others else "")
        + f" ({_number(best.validated)}); its test {metric} is {_score(best)}{_interval(best)}."
    ]
    if others:
        told.append(_next_best(others[0], metric))
    if len(others) > 1:
        told.append(_against_all(others))
    if best.result.backbones and len(best.result.backbones) > 1:
        single = next((rival for rival in others if len(rival.result.backbones) == 1), None)
        if single is not None and single is not others[0]:
            told.append(f"Of single backbones, {single.name} is best on validation. " + _beside(single, metric))
    higher = [rival for rival in others if rival.row.mean > best.row.mean]
    if higher:
        told.append(
            f"A higher test {metric} was reached by {_listed(higher, scores=True)}: not chosen, for a choice by test "
            "score would make the test set part of training."
        )
    return told


def _next_best(rival: Rival, metric: str) -> str:
    return f"Next on validation is {rival.name} ({_number(rival.validated)}). " + _beside(rival, metric)


def _beside(rival: Rival, metric: str) -> str:
    """A rival's test score beside that of the best; ``row.difference`` is the rival's less the best's."""
    row = rival.row
    words = f"On the test set it reaches {_score(rival)}"
    if row.difference is None or row.difference.interval is None or row.p_holm is None:
        return words + "."
    return f"{words}: its {metric} is {_apart(row.difference.difference)} {verdict(rival)}."


def _apart(difference: float) -> str:
    return f"{_number(abs(difference), 4)} {'lower' if difference < 0 else 'higher'}"


def verdict(rival: Rival) -> str:
    """``(interval of the difference …, p …), beyond the interval``, or within it."""
    row = rival.row
    if row.difference is None or row.difference.interval is None or row.p_holm is None:
        return ""
    told = "beyond the interval" if beyond(row) else "within the interval: this test set does not tell them apart"
    if beyond(row) and not told_apart(row):
        told += ", though not after correction"
    low, high = row.difference.interval
    return f"(interval of the difference {_bounds(low, high, plus=True)}, p {p_words(row.p_holm)}), {told}"


def _against_all(others: Sequence[Rival]) -> str:
    ahead = [r for r in others if told_apart(r.row) and _difference(r) < 0]
    behind = [r for r in others if told_apart(r.row) and _difference(r) > 0]
    if not ahead and not behind:
        return f"After correction none of the {len(others)} other models differs from it on the test set."
    if len(ahead) == len(others):
        return f"After correction it is ahead of all {len(others)} other models on the test set."
    words = f"After correction it is ahead of {len(ahead)} of the {len(others)} other models on the test set"
    if ahead:
        rest = [r for r in others if r not in ahead]
        words += f" (all but {_listed(rest)})" if len(rest) < len(ahead) else f" ({_listed(ahead)})"
    return words + (f", and behind {_listed(behind)}." if behind else ".")


def _difference(rival: Rival) -> float:
    return 0.0 if rival.row.difference is None else rival.row.difference.difference


def _interval(rival: Rival) -> str:
    bounds = rival.row.interval
    return f" ({rival.row.estimate.why})" if bounds is None else f", 95 % interval {_bounds(*bounds)}"


def _listed(rivals: Sequence[Rival], scores: bool = False) -> str:
    names = [f"{r.name} ({_number(r.row.mean)})" if scores else r.name for r in rivals[:_MOST]]
    more = len(rivals) - len(names)
    return "; ".join(names) + (f"; and {more} more" if more > 0 else "")


def _score(rival: Rival) -> str:
    spread = "" if rival.row.std is None else f" ± {rival.row.std:.3f}"
    return f"{_number(rival.row.mean)}{spread}"


def _number(value: float, digits: int = 3) -> str:
    return signed(value, digits)


def _bounds(low: float, high: float, *, plus: bool = False) -> str:
    digits = 4 if plus else 3
    return f"{signed(low, digits, plus=plus)} to {signed(high, digits, plus=plus)}"


def p_words(p: float) -> str:
    """``= 0.012``, or ``< 0.001``."""
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"
