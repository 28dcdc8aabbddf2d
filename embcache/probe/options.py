"""What can be asked of a probe, besides the dataset, the backbones and the subsets: one frozen set of options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from embcache.errors import UsageError
from embcache.paths import PathLike
from embcache.probe.heads import Head, make_head
from embcache.probe.schedule import Schedule
from embcache.probe.solve import is_solved
from embcache.probe.usage import check_options

_DRAWN_ANEW = "other folds, subsets and random streams"


@dataclass(frozen=True)
class ProbeOptions:
    """Options of `embcache.probe.run.probe_features`, `probe_grid` and `find_saved`.

    Attributes
    ----------
    head : str
        A name that ``embcache heads`` lists.
    head_options : mapping of str to value, optional
        Hyperparameters of the head.
    folds : int
        How many folds the pool is divided into.
    seed : int
        Of pool, folds, subsets, initial weights, order and dropout.
    repeats : int
        R: the whole with seeds ``seed``, ``seed + 1`` …, R × ``folds`` models in one result.
    home : path, optional
        Folder of stores and runs; default ``$EMBCACHE_HOME``, else ``~/.cache/embcache``.
    val : {"full", "matched"}
        Validate on the whole fold, or on as many images as train.
    test : {"local", "official"}
        See `embcache.probe.protocol.plan_splits`.
    recipe : str, optional
        First digits of a fingerprint, where several recipes of a backbone are cached; several separated by commas.
    views : int, optional
        Train on stores with so many views of each image, another one drawn each epoch; validation and test take the
        plain image. Default: plain images throughout.
    lr : float or sequence of float, optional
        First learning rate, instead of the protocol's 1e-3; of several, each fold keeps the one that is best on
        validation (the first of equals).
    target : str, optional
        A column of the dataset's table to tell apart instead of the labels.
    metric : str, optional
        Scores the models and chooses their epochs on validation; default the dataset's own. See
        `embcache.probe.metrics.METRICS`.
    positive : str, optional
        The positive class of two, of which asymmetric metrics are; see `embcache.probe.metrics.positive_class`.
        Nothing is trained anew for it, unless an asymmetric metric chooses epochs.
    splits : path, optional
        A splits file to use instead of drawing.
    exclude_test_overlap : bool
        Leave out of the pool images that share a group with the official test set.
    device : str
        Where heads are trained: ``"cpu"``, ``"cuda"`` …
    buffer : int, optional
        Stream features from their shards through a shuffle buffer of so many rows: see `embcache.probe.stream`.
        Default: all features are read into memory.
    save : bool
        Write the run folder.
    reuse : bool
        Take a saved result of the same request.

    Raises
    ------
    UsageError
        A value cannot be used.
    """

    head: str = "linear"
    head_options: Mapping[str, Any] | None = None
    folds: int = 5
    seed: int = 0
    repeats: int = 1
    home: PathLike | None = None
    val: str = "full"
    test: str = "local"
    recipe: str | None = None
    views: int | None = None
    lr: float | Sequence[float] | None = None
    target: str | None = None
    metric: str | None = None
    positive: str | None = None
    splits: PathLike | None = None
    exclude_test_overlap: bool = False
    device: str = "cpu"
    buffer: int | None = None
    save: bool = True
    reuse: bool = True

    def __post_init__(self) -> None:
        check_options(repeats=self.repeats, views=self.views, seed=self.seed, buffer=self.buffer)
        if self.buffer is not None and is_solved(self.model):
            raise UsageError(
                f"head {self.head!r} is solved on all features at once: they cannot be streamed",
                found=f"--buffer {self.buffer}",
                fix="leave --buffer out, or a head that is trained: --head linear",
            )
        for schedule in self.schedules:  # each checks its rate
            if self.lr is not None and is_solved(self.model):
                raise UsageError(
                    f"head {self.head!r} is solved, not trained: it has no learning rate",
                    found=f"--lr {schedule.lr:g}",
                    fix="leave --lr out",
                )
        if self.repeats > 1 and self.splits and is_solved(self.model):
            raise UsageError(
                "repeats of a solved head on the folds of a splits file are copies of each other",
                expected="folds drawn anew for each repeat, or a head that is trained",
                found=f"--head {self.head} --repeats {self.repeats} --splits {self.splits}",
                fix="leave --repeats or --splits out",
            )

    @cached_property
    def model(self) -> Head:
        """The head."""
        return make_head(self.head, **(self.head_options or {}))

    @cached_property
    def schedules(self) -> tuple[Schedule, ...]:
        """The optimisation at every learning rate asked for, in the order asked."""
        if self.lr is None:
            return (Schedule(),)
        rates = tuple(self.lr) if isinstance(self.lr, Sequence) else (self.lr,)
        if not rates:
            raise UsageError("no learning rate asked for", fix="--lr 1e-3")
        return tuple(Schedule(lr=rate) for rate in dict.fromkeys(rates))

    @property
    def n_views(self) -> int:
        """Views of each image that training draws from."""
        return self.views or 1

    def notes(self) -> list[str]:
        """What a reader must know of how these options differ from the protocol."""
        notes = []
        if len(self.schedules) > 1:
            rates = ", ".join(f"{schedule.lr:g}" for schedule in self.schedules)
            notes.append(f"learning rate chosen on validation, fold by fold, among {rates}")
        if self.repeats > 1:
            drawn = "other random streams on the folds of the splits file" if self.splits else _DRAWN_ANEW
            notes.append(f"{self.repeats} repeats with {drawn}, on one test set")
        if self.n_views > 1 and is_solved(self.model):
            notes.append(f"{self.head} is solved on the plain images: it takes no views")
        elif self.n_views > 1:
            notes.append(f"training draws one of {self.n_views} views of each image each epoch; others see it plain")
        if self.buffer is not None:
            shuffled = f"shuffled by shards, then within some {self.buffer:,} rows"
            notes.append(f"features were streamed: an epoch's order is {shuffled}")
        return notes


def make_options(options: Mapping[str, Any]) -> ProbeOptions:
    """`ProbeOptions` from keywords.

    Raises
    ------
    TypeError
        There is no such option.
    """
    unknown = sorted(set(options) - {field.name for field in fields(ProbeOptions)})
    if unknown:
        raise TypeError(f"a probe has no option {', '.join(map(repr, unknown))}")
    return ProbeOptions(**options)
