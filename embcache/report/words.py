"""What the numbers say in sentences. What is best is chosen on validation; the test set only says how good it is."""

from __future__ import annotations

from collections.abc import Sequence

from embcache.probe.metrics import metric_title
from embcache.probe.summary import training_notes
from embcache.report.choice import Choice
from embcache.report.collect import Task
from embcache.results.advice import Advice
from embcache.results.advice import Contender as Beside
from embcache.results.compare import Difference
from embcache.results.layout import bounds, score, signed
from embcache.runs.result import Estimate

NEW_MODEL = "new patients, a newly trained model"
THESE_MODELS = "new patients, these models"

RULE = (
    "The best model is the one with the best mean validation score over folds; the test set plays no part in the "
    f"choice. Every interval is a 95 % interval. “{THESE_MODELS}” says how far the score of the trained models may be "
    f"off, for other patients of this kind; “{NEW_MODEL}” adds how much a model varies that is trained anew on other "
    "images, and is given where the folds show it. p is two-sided and corrected by Holm for all models compared at one "
    "size."
)
_MOST = 4  # names in a list


def headline(task: Task, choices: Sequence[Choice], advice: Advice | None) -> str:
    """One sentence: which backbone to take, or what the only one reaches, at the most labels that tell."""
    title = task.title + (" (synthetic images)" if task.synthetic else "")
    if not choices:
        return f"{title}: no results that can be ranked."
    if advice is not None and advice.backbone is not None:
        return f"{title}: {advice.backbone.text}"
    last, e = choices[-1], choices[-1].chosen.row.estimate
    best = " is best on validation and" if len(last.rivals) > 1 else ""
    return (
        f"{title}: {last.chosen.name}{best} reaches a test {_title(task, last)} of {signed(e.mean, 3)} with "
        f"{last.n_train:,} training labels{_interval(e)}."
    )


def size_words(choice: Choice) -> str:
    """``S (50 training labels; 1,093 with validation)``."""
    name = "" if choice.subset.isdigit() else f"{choice.subset}: "
    return f"{name}{choice.n_train:,} training labels ({choice.labels_used:,} with validation)"


def sentences(task: Task, choice: Choice) -> list[str]:
    """What one size says, as sentences of plain text."""
    metric, best, others = _title(task, choice), choice.chosen, choice.advice.rivals
    of = f"the best of {len(choice.rivals)} models on validation" if others else "the only model"
    told = [
        f"{best.name} is {of} ({metric} {signed(best.validated, 3)}). On the test set it reaches "
        f"{score(best.row.mean, best.row.std)}{_interval(best.row.estimate)}."
    ]
    worse, better, alike, unknown = (
        [r for r in others if r.verdict == verdict] for verdict in ("worse", "better", "undecided", "unknown")
    )
    these = "" if all(r.difference.trained for r in others) else ", of these trained models"
    if worse:
        told.append(f"It is better than {_listed(worse)} (Holm-corrected p < 0.05{these}).")
    if better:
        told.append(
            f"{_listed(better)} scored higher on the test set (Holm-corrected p < 0.05{these}), which plays no part in "
            "the choice."
        )
    told += [not_shown(r.name, r.difference) for r in alike[:_MOST]]
    if len(alike) > _MOST:
        told.append(f"Nor was a difference shown from {len(alike) - _MOST} more models.")
    if unknown:
        told.append(f"There are too few patients to compare it with {_listed(unknown)}.")
    if task.metric == "accuracy" and best.result.majority is not None:
        name, share = best.result.majority
        told.append(f"Always predicting {name!r} has an accuracy of {share:.3f}.")
    told += [f"In this model, {note}." for note in training_notes(best.result)]
    return told


def not_shown(name: str, d: Difference) -> str:
    """What may be said where no difference was shown: its interval, and which one would have been found."""
    told = f"No difference from {name} was shown{'' if d.trained else ', of these trained models'}"
    if d.interval is None:
        return f"{told}: {d.why}."
    told += f": {signed(d.difference, 3, plus=True)} ({bounds(d.interval, plus=True)})"
    if d.smallest is None:
        return told + "."
    return f"{told}; one of {d.smallest:.3f} or more would have been found with 80 % power."


def change_words(d: Difference | None, loss: bool) -> str:
    """The difference between two sizes: ``+0.033 (−0.010 to +0.076): no rise shown``."""
    if d is None:
        return ""
    if d.interval is None:
        return f"{signed(d.difference, 3, plus=True)}: {d.why}"
    low, high = (-d.interval[1], -d.interval[0]) if loss else d.interval
    verdict = "better" if low > 0 else "worse" if high < 0 else "no gain shown"
    these = "" if d.trained else ", these models"
    return f"{signed(d.difference, 3, plus=True)} ({bounds(d.interval, plus=True)}{these}): {verdict}"


def bounded(told: str, interval: tuple[float, float] | None, why: str, reasons: dict[str, None]) -> str:
    """A score with its interval behind it; why there is none goes into ``reasons``, for the notes of the table."""
    if interval is None and why:
        reasons[f"no interval: {why}"] = None
    return told if interval is None else f"{told} ({bounds(interval)})"


def p_words(p: float) -> str:
    """``0.012``, or ``< 0.001``."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _title(task: Task, choice: Choice) -> str:
    return metric_title(task.metric, choice.chosen.row.estimate.positive)


def _interval(estimate: Estimate) -> str:
    if estimate.interval is None:
        return f" ({estimate.why})" if estimate.why else ""
    return f" ({bounds(estimate.interval)}: {THESE_MODELS if estimate.new_model is None else NEW_MODEL})"


def _listed(rivals: Sequence[Beside]) -> str:
    names = [r.name for r in rivals[:_MOST]]
    return "; ".join(names) + (f"; and {len(rivals) - _MOST} more" if len(rivals) > _MOST else "")
