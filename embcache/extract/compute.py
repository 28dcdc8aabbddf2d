"""The owed shards of one or more stores, computed and committed; shared with other processes by leases.

What a shard's rows are made of is the caller's: features of networks, or pixels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Protocol, TypeVar

from tqdm import tqdm

from embcache.data.dataset import ImageDataset
from embcache.extract.batching import Source
from embcache.extract.plan import Plan, Shard
from embcache.store.commit import ShardRows, commit_shard, refresh_view
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
# (jobs that owe the shard, its images in order, images of one batch, told the images done) → rows of each job
Compute = Callable[[Sequence[J], Sequence[Source], int, Callable[[int], object]], Sequence[ShardRows]]


def compute_owed(
    jobs: Sequence[J],
    dataset: ImageDataset,
    compute: Compute[J],
    *,
    part: tuple[int, int] | None = None,
    label: str = "extract",
    say: Callable[[str], object] = lambda line: None,
) -> list[int]:
    """Compute and commit every owed shard of every job; return the images computed per job.

    Jobs that owe the same shard are computed together, so that its images are decoded once.

    Parameters
    ----------
    jobs : sequence of Job
        Each with a store of its own.
    dataset : ImageDataset
        Says where the images lie.
    compute : callable
        Makes the rows of one shard for some of the jobs.
    part : (int, int), optional
        ``(i, n)``: only every n-th shard, from the i-th (1-based).
    label : str
        Begins the progress bar.
    say : callable
        Told where images must be decoded twice.
    """
    columns = [dataset.table[name].tolist() for name in ("id", "path", "member")]
    sources = {image: Source(image, path, member) for image, path, member in zip(*columns, strict=True)}
    passes: dict[tuple[Shard, int], list[int]] = {}
    for index, job in enumerate(jobs):
        for shard in job.plan.shards:
            if part is None or shard.number % part[1] == part[0] - 1:
                passes.setdefault((shard, job.batch_size), []).append(index)
    decodings = sum(len(shard.ids) for shard, _ in passes)
    once = len({image for shard, _ in passes for image in shard.ids})
    if decodings > once:
        say(f"the backbones do not owe the same shards: {decodings - once} images are decoded in a second pass")
    computed = [0] * len(jobs)
    total = sum(len(shard.ids) * len(sharing) for (shard, _), sharing in passes.items())
    with tqdm(total=total, unit="img", desc=f"{label} {dataset.name}", disable=None, smoothing=0.05) as bar:
        while passes:
            progress = False
            for (shard, batch_size), sharing in list(passes.items()):
                with ExitStack() as leases:
                    mine = [index for index in sharing if _lease(leases, jobs[index].store, shard.number)]
                    # A shard that another process committed since the plan was read costs nothing.
                    owed = [index for index in mine if shard.number not in jobs[index].store.committed()]
                    if owed:
                        # An image that left the dataset after its shard was planned keeps its row, marked unreadable.
                        wanted = [sources.get(image, Source(image, "", -1)) for image in shard.ids]
                        _commit([jobs[index] for index in owed], shard, wanted, batch_size, compute, bar.update)
                for index in owed:
                    computed[index] += len(shard.ids)
                left = [index for index in sharing if index not in mine]
                if left:
                    passes[shard, batch_size] = left
                else:
                    del passes[shard, batch_size]
                progress |= bool(mine)
            if not progress:
                time.sleep(_POLL_SECONDS)
    for job in jobs:
        refresh_view(job.store.path)
    return computed


def _commit(
    jobs: Sequence[J],
    shard: Shard,
    sources: Sequence[Source],
    batch_size: int,
    compute: Compute[J],
    on_rows: Callable[[int], object],
) -> None:
    # A function of its own: its rows are let go of before the next shard's are made.
    for job, rows in zip(jobs, compute(jobs, sources, batch_size, on_rows), strict=True):
        commit_shard(job.store.path, shard.number, rows)


def _lease(stack: ExitStack, store: FeatureStore, number: int) -> bool:
    lease = Lease.acquire(store.path, number)
    if lease is None:
        return False
    stack.callback(lease.release)
    return True
