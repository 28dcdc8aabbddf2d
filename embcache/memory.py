"""Memory in which large arrays come and go (activations, gradients), and how it is said that there is none left."""

from __future__ import annotations

import ctypes
import sys

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

# How the CPU allocator of torch, oneDNN, and older CUDA libraries say it: a RuntimeError with no class of its own.
_SAID = (
    "not enough memory", "can't allocate memory", "out of memory", "cublas_status_alloc_failed",
    "could not create a primitive", "could not create a memory", "could not execute a primitive",
)  # fmt: skip


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of the processor or of a device."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _SAID)
    )


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
