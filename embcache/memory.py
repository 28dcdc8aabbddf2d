"""How the C library handles memory in which large arrays come and go: activations, gradients."""

from __future__ import annotations

import ctypes
import sys

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Let the process keep freed memory and use it again, instead of returning it to the kernel after each layer.

    Activations of a batch are tens of megabytes; by default glibc maps and unmaps each of them, and the kernel zeroes
    the pages anew every time: a third of the processor time of an extraction on CPU, and a quarter of a training of
    DVME heads (docs/log.md). The cost is that the process holds its peak memory until it ends.

    Returns
    -------
    bool
        Whether it was done: False where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(_M_MMAP_THRESHOLD, 1 << 30) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
