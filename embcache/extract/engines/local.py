"""The owed shards of one or more stores, computed and committed; shared with other processes by leases.

What a shard's rows are made of is the caller's: features of networks, or pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch
from tqdm import tqdm

from embcache.data.dataset import ImageDataset
from embcache.data.images import ImageRef, image_refs
from embcache.errors import EmbcacheError
from embcache.extract.quarantine import Guard
from embcache.extract.shard_plan import Plan, Shard
from embcache.extract.signals import Stop
from embcache.memory import is_shortage
from embcache.store.commit import ShardRows, commit_shard, is_committed, refresh_view
from embcache.store.feature_store import FeatureStore
from embcache.store.lease import Lease

# How long to wait before looking again at shards that another process is computing.
_POLL_SECONDS = 1.0


class Job(Protocol):
    """A store with what it owes."""

    @property
    def store(self) -> FeatureStore:
        """Where the rows go."""

    @property
    def plan(self) -> Plan:
        """What is owed."""

    @property
    def batch_size(self) -> int:
        """Images of one batch."""


J = TypeVar("J", bound=Job)
_R = TypeVar("_R")
# (jobs that owe the shard, its images in order, images of one batch, told the images done) → rows of each job
Compute = Callable[[Sequence[J], Sequence[ImageRef], int, Callable[[int], object]], Sequence[ShardRows]]


@dataclass(frozen=True)
class Terms:
    """The terms on which shards are computed, whatever their rows are."""

    guard: Guard | None = None  # judges rows before they are committed; default: every row is
    stop: Stop = field(default_factory=Stop)  # asked before each shard
    threads: int | None = None
    say: Callable[[str], object] = lambda line: None
    quiet: bool = False  # no progress bar


def compute_owed(
    jobs: Sequence[J],
    dataset: ImageDataset,
    compute: Compute[J],
    *,
    part: tuple[int, int] | None = None,
    only: Mapping[str, Collection[int]] | None = None,
    label: str = "extract",
    terms: Terms | None = None,
) -> list[int]:
    """Compute and commit every owed shard of every job; return the images computed per job.

    Jobs that owe the same shard are computed together, so that its images are decoded once. A shard that another
    process is computing is waited for: should that process die, it is computed here.
    """
    terms = terms or Terms()
    sources = {source.id: source for source in image_refs(dataset.table)}
    passes = _passes(jobs, part, only)
    decodings = sum(len(shard.ids) for shard, _ in passes)
    once = len({image for shard, _ in passes for image in shard.ids})
    if decodings > once:
        terms.say(f"the backbones do not owe the same shards: {decodings - once} images are decoded in a second pass")
    computed = [0] * len(jobs)
    total = sum(len(shard.ids) * len(sharing) for (shard, _), sharing in passes.items())
    bar = tqdm(total=total, unit="img", desc=f"{label} {dataset.name}", disable=terms.quiet or None, smoothing=0.05)
    with bar:
        worker = _Worker(compute, terms, bar.update)
        terms.stop.complete = not passes
        while passes and not terms.stop.asked:
            progress = False
            for (shard, batch_size), sharing in list(passes.items()):
                if terms.stop.asked:
                    break
                # At hand from its lease on: a signal meanwhile waits for its commit.
                with terms.stop.at_hand(len(shard.ids)), ExitStack() as leases:
                    leased = [index for index in sharing if _lease(leases, jobs[index].store, shard.number)]
                    # A shard that another process committed since the plan was read costs nothing.
                    owed = [index for index in leased if not is_committed(jobs[index].store.path, shard.number)]
                    if owed:
                        # An image that left the dataset after its shard was planned keeps its row, marked unreadable.
                        wanted = [sources.get(image, ImageRef(image, "", "")) for image in shard.ids]
                        worker.commit([jobs[index] for index in owed], shard, wanted, batch_size)
                bar.update(len(shard.ids) * (len(leased) - len(owed)))
                for index in owed:
                    computed[index] += len(shard.ids)
                left = [index for index in sharing if index not in leased]
                if left:
                    passes[shard, batch_size] = left
                else:
                    del passes[shard, batch_size]
                    terms.stop.complete = not passes
                progress |= bool(leased)
            if passes and not progress:
                terms.stop.wait(_POLL_SECONDS)
    for job in jobs:
        refresh_view(job.store.path)
    return computed


def _passes(
    jobs: Sequence[J], part: tuple[int, int] | None, only: Mapping[str, Collection[int]] | None
) -> dict[tuple[Shard, int], list[int]]:
    """Owed shards, with the batch size of each, and which of the jobs owe them: those share one decoding."""
    passes: dict[tuple[Shard, int], list[int]] = {}
    for index, job in enumerate(jobs):
        for shard in job.plan.shards:
            if is_asked(shard.number, job.store.recipe.fingerprint, part, only):
                passes.setdefault((shard, job.batch_size), []).append(index)
    return passes


def is_asked(
    number: int, fingerprint: str, part: tuple[int, int] | None, only: Mapping[str, Collection[int]] | None
) -> bool:
    """Whether a shard of the store of this recipe is one that `compute_owed` is asked for."""
    if part is not None and number % part[1] != part[0] - 1:
        return False
    return only is None or number in only.get(fingerprint, ())


class _Worker(Generic[J]):
    """Computes one shard after the other: decode, features, judgement, commit."""

    def __init__(self, compute: Compute[J], terms: Terms, on_rows: Callable[[int], object]) -> None:
        self._compute, self._terms, self._on_rows = compute, terms, on_rows
        self._halving = Halving(terms.say)

    def commit(self, jobs: Sequence[J], shard: Shard, sources: Sequence[ImageRef], batch_size: int) -> None:
        """Compute a shard for some jobs and commit it to the store of each."""
        # Nothing is kept of its rows: they are let go of before the next shard's are made.
        with self._terms.stop.at_hand(len(sources)):
            every, used = self._halving.run(lambda size: self._rows(jobs, sources, size), batch_size)
            if self._terms.guard is not None:
                self._terms.guard.admit([(job.store, rows) for job, rows in zip(jobs, every, strict=True)], sources)
            for job, rows in zip(jobs, every, strict=True):
                commit_shard(job.store.path, shard.number, rows, batch_size=used, threads=self._terms.threads)

    def _rows(self, jobs: Sequence[J], sources: Sequence[ImageRef], batch_size: int) -> Sequence[ShardRows]:
        shown = 0

        def through(images: int) -> None:
            nonlocal shown
            shown += images
            self._on_rows(images)
            self._terms.stop.through(images / len(jobs))

        try:
            return self._compute(jobs, sources, batch_size, through)
        except BaseException:
            self._on_rows(-shown)  # they are computed again, or not at all
            raise


class Halving:
    """The batch size of a run: smaller from the moment at which the memory did not hold it."""

    def __init__(self, say: Callable[[str], object] = lambda line: None) -> None:
        self._say = say
        self._most: int | None = None

    def run(self, compute: Callable[[int], _R], batch_size: int) -> tuple[_R, int]:
        """What ``compute`` makes of a shard at ``batch_size`` or less, and the batch size that it was.

        Never two sizes in one shard, so that a shard's rows follow from the one that is recorded.
        """
        size = min(batch_size, self._most or batch_size)
        while True:
            try:
                return compute(size), size
            except (RuntimeError, MemoryError) as error:
                if not is_shortage(error):
                    raise
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                if size == 1:
                    raise EmbcacheError(
                        "the memory does not hold the network and one image",
                        found=reason,
                        fix=(
                            "--device cpu or another device",
                            "end what else uses the memory; the same command goes on from what is committed",
                        ),
                    ) from error
            # Outside the clause: the error keeps the tensors of its frames alive.
            size = self._most = size // 2
            self._say(f"out of memory ({reason}): the batch is {size} from here on, recorded with each shard")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _lease(stack: ExitStack, store: FeatureStore, number: int) -> bool:
    lease = Lease.acquire(store.path, number)
    if lease is None:
        return False
    stack.callback(lease.release)
    return True
