"""How many processor cores this process may use, and how many threads linear algebra takes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_SMALL_MATRICES = 20_000_000  # numbers


def usable_cores() -> int:
    """Cores that the process may run on: a cluster's job, or a container, seldom has all that the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers() -> int:
    """Threads that decode images by default: one per core, at most 8."""
    return min(usable_cores(), 8)


@contextmanager
def threads_for(size: int) -> Iterator[None]:
    """One BLAS thread inside, where the matrices that are worked on hold ``size`` numbers and that is not many.

    A step on them is over before a second thread has started, and on a busy machine the wait for that thread takes ten
    times as long as the work (measured: 32 s instead of 2.7 s to rank three backbones on 382 images).
    """
    if size >= _SMALL_MATRICES:
        yield
        return
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with threadpool_limits(limits=1, user_api="blas"):
        yield
