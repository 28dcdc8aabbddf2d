"""How many threads linear algebra may use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

_SMALL = 20_000_000  # numbers in the matrices that are worked on


@contextmanager
def threads_for(size: int) -> Iterator[None]:
    """One BLAS thread inside, where the matrices that are worked on hold ``size`` numbers and that is not many.

    A step on them is over before a second thread has started, and on a busy machine the wait for that thread takes ten
    times as long as the work (measured: 32 s instead of 2.7 s to rank three backbones on 382 images).
    """
    if size >= _SMALL:
        yield
        return
    with threadpool_limits(limits=1, user_api="blas"):
        yield
