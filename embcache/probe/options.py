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
    """Options of `embcache.probe.probe.probe_features`, `probe_grid` and `find_saved`."""

    head: str = "linear"  # A name that ``embcache heads`` lists
    head_options: Mapping[str, Any] | None = None  # hyperparameters of the head
    folds: int = 5  # how many folds the pool is divided into
    seed: int = 0  # of pool, folds, subsets, initial weights, order and dropout
    repeats: int = 1  # R: the whole with seeds ``seed``, ``seed + 1`` …, R × ``folds`` models in one result
    home: PathLike | None = None  # folder of stores and runs; default ``$EMBCACHE_HOME``, else ``~/.cache/embcache``
    val: str = "full"  # validate on the whole fold, or on as many images as train
    test: str = "local"  # see `embcache.probe.protocol.plan_splits`
    recipe: str | None = None  # first digits of a fingerprint, where several recipes of a backbone are cached
    views: int | None = None  # train on stores with so many views of each image, another one drawn each epoch
    lr: float | Sequence[float] | None = None  # first learning rate, instead of the protocol's 1e-3
    target: str | None = None  # A column of the dataset's table to tell apart instead of the labels
    metric: str | None = None  # scores the models and chooses their epochs on validation
    positive: str | None = None  # the positive class of two, of which asymmetric metrics are
    splits: PathLike | None = None  # A splits file to use instead of drawing
    exclude_test_overlap: bool = False  # leave out of the pool images that share a group with the official test set
    device: str = "cpu"  # where heads are trained: ``"cpu"``, ``"cuda"`` …
    buffer: int | None = None  # stream features from their shards through a shuffle buffer of so many rows
    save: bool = True  # write the run folder
    reuse: bool = True  # take a saved result of the same request

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
    """`ProbeOptions` from keywords."""
    unknown = sorted(set(options) - {field.name for field in fields(ProbeOptions)})
    if unknown:
        raise TypeError(f"a probe has no option {', '.join(map(repr, unknown))}")
    return ProbeOptions(**options)
