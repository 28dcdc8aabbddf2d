"""The result of probing or finetuning: `Result` with its folds, and the id that its request hashes to."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Required, TypedDict

from embcache.errors import UsageError, first_few, printable
from embcache.notebook import html_table
from embcache.sealed import canonical_json, plain, typed
from embcache.targets import Target, make_target

_METRIC = re.compile(r"\w[\w.-]{0,99}", re.ASCII)  # no colon: no module is imported that only a file names

# Raised when the protocol changes, so that older runs are not taken for new ones. Arithmetic that gives the same but
# for rounding (another order of sums, attention by nodes) is the same protocol: a saved run answers for it.
PROTOCOL_VERSION = 3


class _Measured(TypedDict, total=False):
    absent_classes: list[int]
    predicted: list[int]
    per_class_auc: list[float | None]
    per_class_auprc: list[float | None]


class _Scores(TypedDict, total=False):
    estimate: Mapping[str, Any] | None
    metrics: _Measured


class _ByGroup(_Scores, total=False):
    why: str
    groups: int
    mixed: int
    ensemble: _Scores


class _Recipe(TypedDict, total=False):
    transform: Mapping[str, Any]
    model: str


class _Head(TypedDict):
    name: str


class _Request(TypedDict, total=False):
    """What is read of a request; of other keys any value will do."""

    kind: Required[str]
    head: Required[_Head]
    subset: Required[str]
    dataset: str
    splits: str
    recipes: list[tuple[str, str]]
    schedule: Mapping[str, float | str | None]
    classes: Mapping[str, Any]
    task: Mapping[str, str]
    lr: list[float] | float
    target: str
    run: str
    of: Mapping[str, Any]


@dataclass(frozen=True)
class Estimate:
    """A score with its two 95 % intervals."""

    metric: str
    positive: str  # the class that an asymmetric metric is of; else empty
    mean: float  # over the models
    std: float | None  # over the models, ddof 1
    these_models: tuple[float, float] | None  # for new patients and these models
    new_model: tuple[float, float] | None  # for new patients and a newly trained model
    why: str  # why an interval is missing; empty where none is
    groups: int  # of the test set
    test_variance: float
    training_variance: float | None
    overlap: float | None  # mean share of training rows that two models have in common
    lost: float  # share of bootstrap resamples without one of the classes: they were scored on the classes present

    @property
    def interval(self) -> tuple[float, float] | None:
        """The one that tables show: for a newly trained model where there is one, else for these models."""
        return self.new_model or self.these_models

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data, every field by its name."""
        data = asdict(self)
        for name in ("mean", "std", "test_variance"):  # None where they are not defined
            data[name] = data[name] if data[name] is not None and math.isfinite(data[name]) else None
        return plain(data)  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Estimate:
        """The inverse of `to_json`; raises a ValueError where a value is not of its type."""
        undefined = [name for name in ("mean", "test_variance") if data.get(name, 0.0) is None]
        found: Estimate = typed(cls, {**data, **dict.fromkeys(undefined, 0.0)}, "estimate")
        return replace(found, **dict.fromkeys(undefined, math.nan))  # type: ignore[arg-type]


@dataclass(frozen=True)
class FoldResult:
    """One fold's model."""

    fold: int  # index into the result's ``folds``, over all repeats
    score: float | None  # by the metric on the test set; None where labels are not known, or without a model
    val_score: float | None  # by the metric on the validation images, at ``best_epoch``
    best_epoch: int  # the epoch that was kept; 0 for a head that is solved
    epochs: int  # how many were trained
    n_train: int  # images, hence labels
    n_val: int
    lr: float | None  # first learning rate, the best on validation where several were tried; None for a solved head
    metrics: Mapping[str, Any]  # `embcache.probe.metrics.evaluate` on the test set; empty where there is no score
    diverged: bool = False  # training ended early because a loss or an output was not finite
    repeat: int = 0  # each has its own folds, subsets and random streams
    chosen: Mapping[str, float] = field(default_factory=dict)  # what validation chose of a solved head: ``{"C": 0.1}``
    lost_lrs: Sequence[float] = field(default_factory=list)  # learning rates of a sweep at which training diverged
    seen: Sequence[float] = field(default_factory=list)  # share of each class among what training saw

    @property
    def failed(self) -> bool:
        """Whether training diverged before a first usable epoch, so that there is no model."""
        return self.diverged and self.best_epoch == 0


@dataclass(frozen=True)
class Result:
    """What one head on one set of backbones reached at one subset.

    Scores are of models that were trained on each fold and tested on one test set: ``mean`` and ``std`` (ddof 1; None
    of a single fold) over ``folds``, and ``interval``, the 95 % interval for new patients and a newly trained model
    where there is one, else for new patients and these models. None where the labels of the test set are not known.
    """

    id: str  # name of the run; hashes ``request``
    kind: str  # "probe"; "finetune" for models trained on images; "kaggle" for scores that a leaderboard gave
    dataset: str
    backbones: tuple[str, ...]
    head: str
    subset: str
    n_train: int  # training images of a fold; like the next, averaged over folds and rounded
    n_val: int
    n_test: int  # test images that are scored; all of them where no test label is known
    labels_used: int  # training and validation images of a fold together
    metric: str  # that scores models and chose epochs
    mean: float | None
    std: float | None
    interval: tuple[float, float] | None
    val_mean: float | None  # mean validation score over folds: what may be used to choose between models
    folds: tuple[FoldResult, ...]
    test_set: str  # "official" or "local"
    synthetic: bool  # the images are drawn, not taken
    notes: tuple[str, ...]  # what a reader must know
    class_names: tuple[str, ...]
    request: Mapping[str, Any]  # everything that the result depends on
    seconds: float  # wall time
    versions: Mapping[str, str]  # of the libraries that computed it
    source: str  # "live" or "snapshot": labels from the dataset's own files, or from the copy kept at extraction
    target: str = ""  # column of the dataset's table that is predicted instead of the labels
    recipes: Mapping[str, Any] = field(default_factory=dict)  # of each backbone, so that a run can predict new images
    estimate: Estimate | None = None  # ``mean`` with both its intervals and what they are made of
    positive: str = ""  # class that asymmetric metrics refer to; of more than two only where one was given
    overlap: float | None = None  # mean share of training images that two models have in common
    test_counts: tuple[int, ...] = ()  # scored test images of each class, with each finding, or with a number
    # of the mean of the models' probabilities, as in ``predict``: ``estimate``, ``metrics`` as `FoldResult` has them
    ensemble: Mapping[str, Any] = field(default_factory=dict)
    # by patient: ``groups``, ``estimate``, ``ensemble``, ``mixed`` (left out), or ``why`` there are none
    by_group: Mapping[str, Any] = field(default_factory=dict)
    # scores by the run's metric and others of what training rows say without features, mean over folds
    baseline: Mapping[str, float] = field(default_factory=dict)

    @property
    def task(self) -> Target:
        """What is predicted: classes unless the request says otherwise."""
        of = self.request.get("of", self.request).get("task", {})
        return make_target(of.get("kind", "classes"), self.class_names, (), of.get("loss", ""))

    @property
    def estimates(self) -> dict[str, Estimate]:
        """Scores: ``""`` the mean over models, ``ensemble``, ``by patient``, ``by patient, ensemble``."""
        groups = self.by_group.get("ensemble", {})
        found = {
            "": None if self.estimate is None else self.estimate.to_json(),
            "ensemble": self.ensemble.get("estimate"),
            "by patient": self.by_group.get("estimate"),
            "by patient, ensemble": groups.get("estimate"),
        }
        return {name: Estimate.from_json(data) for name, data in found.items() if data is not None}

    @property
    def majority(self) -> tuple[str, float] | None:
        """The most frequent class of the test set and its share, which is the accuracy of always predicting it."""
        if not sum(self.test_counts) or self.task.kind in ("findings", "number"):
            return None
        most = max(self.test_counts)
        return self.class_names[self.test_counts.index(most)], most / sum(self.test_counts)

    @property
    def left_out(self) -> tuple[str, ...]:
        """The notes that say how many images could not be read: every table of scores repeats them."""
        return tuple(note for note in self.notes if " unreadable images " in note)

    @property
    def models(self) -> tuple[str, ...]:
        """The backbones, those with a name of the user's own as what it stands for."""
        return tuple(self.recipes.get(name, {}).get("model") or name for name in self.backbones)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data, every field by its name."""
        data = {**asdict(self), "estimate": None if self.estimate is None else self.estimate.to_json()}
        if not self.baseline:
            del data["baseline"]
        return plain(data)  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Result:
        """The inverse of `to_json`; what older versions did not write has its default.

        Raises a ValueError where a value is not of its type: in a shared home any user may have written it.
        """
        estimate = data.get("estimate")
        found: Result = typed(cls, {**data, "estimate": None})
        typed(_Request, found.request, "request")  # as they are: a request hashes to its id
        typed(_Scores, found.ensemble, "ensemble")
        typed(_ByGroup, found.by_group, "by_group")
        typed(Mapping[str, _Recipe], found.recipes, "recipes")
        try:
            _ = found.task
        except (UsageError, AttributeError, TypeError) as error:
            raise ValueError(str(error)[:200]) from error
        if not _METRIC.fullmatch(found.metric):
            raise ValueError(f"a metric called {found.metric!r}"[:200])
        if found.positive and found.positive not in found.class_names:
            raise ValueError(f"a positive class {found.positive!r} that is none of its classes"[:200])
        for number, fold in enumerate(found.folds):
            if fold.fold != number:
                raise ValueError(f"fold {fold.fold} in the place of fold {number}")
            typed(Mapping[str, float | list[Any] | None], fold.metrics, "metrics")
            measured = typed(_Measured, fold.metrics, "metrics")
            if not {*measured.get("absent_classes", ())} <= {*range(len(found.class_names))}:
                raise ValueError(f"absent classes {measured['absent_classes']} of {len(found.class_names)}"[:200])
        counts = (found.n_train, found.n_val, found.n_test, found.labels_used, *found.test_counts)
        if not found.class_names or len(found.test_counts) not in (0, len(found.class_names)) or min(counts) < 0:
            raise ValueError(f"counts {counts}, classes {found.class_names}"[:300])
        found = found if estimate is None else replace(found, estimate=Estimate.from_json(estimate))
        _ = found.estimates  # the others are read from where they lie
        return found

    def _facts(self) -> list[tuple[str, str]]:
        reached = "test labels not known" if self.mean is None else f"{self.mean:.4f}"
        reached += "" if self.std is None else f" ± {self.std:.4f}"
        reached += "" if self.interval is None else f", 95 % {self.interval[0]:.4f} to {self.interval[1]:.4f}"
        seen = f"{self.n_train:,} training + {self.n_val:,} validation = {self.labels_used:,} labels per fold"
        facts = [
            (self.metric, f"{reached}, over {len(self.folds)} folds, on {self.n_test:,} test images"),
            ("images", seen),
            ("test set", self.test_set + (" (synthetic images)" if self.synthetic else "")),
            ("classes", first_few(self.class_names, 12) + (f"; positive: {self.positive}" if self.positive else "")),
        ]
        prints = [f"{name} {digits[:12]}" for name, digits in self.request.get("recipes", ())]
        facts += [("target", f"column {self.target}")] if self.target else []
        facts += [("recipes", first_few(prints, 12))] if prints else []
        return [*facts, ("id", self.id)]

    def _headline(self) -> str:
        return f"{self.kind}: {' + '.join(self.backbones)}, {self.head} on {self.dataset}, subset {self.subset}"

    def __repr__(self) -> str:
        notes = [("notes", f"{len(self.notes):,}, in .notes")] if self.notes else []
        lines = [f"  {name}: {value}" for name, value in [*self._facts(), *notes]]
        return printable("\n".join([f"Result({self._headline()}", *lines]) + ")")

    def _repr_html_(self) -> str:
        def cell(value: float | None) -> str:
            return "–" if value is None else f"{value:.4f}"

        rows = [(f.fold, cell(f.score), cell(f.val_score), f.best_epoch, f.n_train, f.n_val) for f in self.folds]
        return html_table(
            f"Result {self._headline()}",
            [*self._facts(), *(("note", note) for note in self.notes)],
            [("fold", f"test {self.metric}", "validation", "best epoch", "training", "validation images"), *rows],
        )


def run_id(request: Mapping[str, Any]) -> str:
    """Readable name of a run: kind (but ``probe``), head, subset and twelve digits of the SHA-256 of the request."""
    kind = "" if request["kind"] == "probe" else f"{request['kind']}-"
    digits = hashlib.sha256(canonical_json(request).encode("utf-8")).hexdigest()[:12]
    head = request["head"]["name"].rpartition(":")[2]  # of ``module:name`` the name
    return f"{kind}{head}-{request['subset']}-{digits}"
