"""The machine: processor cores that may be used, threads of linear algebra, memory and how a lack of it is reported."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from embcache.errors import EmbcacheError

_SMALL_MATRICES = 20_000_000  # numbers

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

# How the CPU allocator of torch, oneDNN, and older CUDA libraries say it: a RuntimeError with no class of its own.
_SAID = (
    "not enough memory", "can't allocate memory", "out of memory", "cublas_status_alloc_failed",
    "could not create a primitive", "could not create a memory", "could not execute a primitive",
)  # fmt: skip


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


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of the processor or of a device."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _SAID)
    )


def out_of_memory(error: BaseException) -> EmbcacheError:
    """The error for memory that does not hold the network and one image."""
    return EmbcacheError(
        "the memory does not hold the network and one image", code="out-of-memory",
        found=str(error).splitlines()[0] if str(error) else type(error).__name__,
        fix=(
            "--device cpu or another device",
            "end other processes that use the memory; the same command then continues",
        ),
    )  # fmt: skip


def keep_freed_memory() -> bool:
    """Let the process keep freed memory and use it again, instead of returning it to the kernel after each layer.

    Activations of a batch are tens of megabytes; by default glibc maps and unmaps each of them, and the kernel zeroes
    the pages anew every time: a third of the processor time of an extraction on CPU, and a quarter of a training of
    DVME heads (docs/log.md). The cost is that the process holds its peak memory until it ends.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(_M_MMAP_THRESHOLD, 1 << 30) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
