"""The machine: processor cores that may be used, threads of linear algebra, memory and how a lack of it is reported."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from embcache.errors import EmbcacheError

_SMALL_MATRICES = 20_000_000  # numbers

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

# How the CPU allocator of torch, oneDNN, and older CUDA libraries say it: a RuntimeError with no class of its own.
_SAID = (
    "not enough memory", "can't allocate memory", "out of memory", "cublas_status_alloc_failed",
    "could not create a primitive", "could not create a memory", "could not execute a primitive",
)  # fmt: skip


# How often a thread of GNU's OpenMP looks for work before it sleeps. Its default of 300,000 is for machines of one's
# own: beside other work, threads that look keep those that work from their cores (docs/log.md).
_SPINS = "3000"


def usable_cores(files: Path = Path("/")) -> int:
    """Cores that the process may run on: a cluster's job, or a container, seldom has all that the machine has.

    By its affinity and by the quota of its control group; ``files`` is the root of the file system.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _quota(files))))


def _quota(files: Path) -> float:
    """Cores that the control groups of the process allow, versions 1 and 2; infinity without a limit."""
    allowed = [math.inf]
    with suppress(OSError, ValueError):
        for line in (files / "proc/self/cgroup").read_text("ascii").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            root = files / "sys/fs/cgroup" / ("" if not controllers else "cpu")
            inner = root / path.strip("/")
            for group in (inner, *inner.parents):
                if not group.is_relative_to(root):
                    break
                with suppress(OSError, ValueError):
                    names = ("cpu.max",) if not controllers else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
                    quota, period = " ".join((group / name).read_text("ascii") for name in names).split()
                    if quota not in ("max", "-1"):
                        allowed.append(int(quota) / int(period))
    return min(allowed)


def proc_info(name: str) -> dict[str, str]:
    """``name: value`` lines of a file, the first of each name; none where the system is not Linux."""
    try:
        lines = Path("/proc", name).read_text("utf-8", "replace").splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}


def cpu_flags() -> set[str]:
    """What the processor can, as Linux names it; empty elsewhere."""
    info = proc_info("cpuinfo")
    return {*info.get("flags", "").split(), *info.get("Features", "").split()}


def settle_openmp() -> None:
    """Let threads of OpenMP share a machine: set before torch is imported, and only what the user has not set."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = _SPINS
    if "OMP_NUM_THREADS" not in os.environ and math.isfinite(_quota(Path("/"))):
        os.environ["OMP_NUM_THREADS"] = str(usable_cores())


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
