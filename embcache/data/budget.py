"""What decoding may take: pixels of one image, memory of all threads together; and what is noted on the way."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from embcache.errors import ImageError, UsageError

MAX_PIXELS = 89_478_485
"""Pixels of the largest image that is decoded unless another limit is given: Pillow's own default, 256 MiB of RGB."""

_MOST = 3 << 30  # bytes for one image at the default limit; 36 bytes per pixel; a 16-bit PNG takes 29
MOST_PIXELS = 1 << 32
"""The highest limit that may be given: larger images are never decoded."""
_SHOWN = 3
_TOO_LARGE = re.compile(r"too large: ([\d,]+) pixels")


class Budget:
    """Memory that the decoding threads of a process share: they wait until the sum of what they hold fits."""

    def __init__(self, total: int) -> None:
        self._total, self._used = total, 0
        self._free, self._own = threading.Condition(), threading.local()

    @contextmanager
    def hold(self, need: int) -> Iterator[None]:
        """Wait until ``need`` bytes are free, and hold them; what this thread holds already counts towards them."""
        before: int = getattr(self._own, "held", 0)
        # A thread that holds something asks for more only where it holds everything: nobody waits for each other.
        more = 0 if before else min(need, self._total)
        with self._free:
            self._free.wait_for(lambda: self._used + more <= self._total)
            self._used += more
        self._own.held = before + more
        try:
            yield
        finally:
            self._own.held = before
            with self._free:
                self._used -= more
                self._free.notify_all()

    @contextmanager
    def hold_all(self) -> Iterator[None]:
        """Decode alone: for files so large that reading them is the larger part."""
        with self.hold(self._total):
            yield


_shared = Budget(_MOST + (1 << 30))


@dataclass(frozen=True)
class Decoding:
    """How the images of one run are decoded."""

    max_pixels: int = field(default_factory=lambda: default_max_pixels())
    budget: Budget = _shared  # default: one for all threads of the process
    _noted: dict[str, list[str]] = field(default_factory=dict)

    def check_size(self, width: int, height: int) -> None:
        """Raise `ImageError` for an image above the limit."""
        if width * height > self.max_pixels:
            raise ImageError(
                f"too large: {width * height:,} pixels, more than {self.max_pixels:,}: "
                "cut it into tiles or scale it down, or raise --max-pixels (EMBCACHE_MAX_PIXELS)"
            )

    @contextmanager
    def hold(self, need: int) -> Iterator[None]:
        """Hold ``need`` bytes of the budget; `ImageError` where no image may take that much."""
        most = max(_MOST, _MOST // MAX_PIXELS * self.max_pixels)
        if need > most:
            raise ImageError(f"decoding would take {need / 1e9:.1f} GB of memory, more than {most / 1e9:.1f} GB")
        with self.budget.hold(need):
            yield

    def note(self, what: str, name: str) -> None:
        """Remember that ``what`` was inferred of the image ``name``."""
        self._noted.setdefault(what, []).append(name)

    def notes(self) -> list[str]:
        """One line for each thing that was noted."""
        return [
            f"{len(names):,} images: {what} ({', '.join(sorted(names)[:_SHOWN])}{', …' if len(names) > _SHOWN else ''})"
            for what, names in self._noted.items()
        ]


def default_max_pixels() -> int:
    """``$EMBCACHE_MAX_PIXELS``, else `MAX_PIXELS`."""
    return check_max_pixels(os.environ.get("EMBCACHE_MAX_PIXELS") or MAX_PIXELS)


def check_max_pixels(value: int | str) -> int:
    """The limit on pixels; `UsageError` where it cannot be one."""
    text = str(value)
    if not (text.isascii() and text.isdecimal() and len(text) <= 13 and 1 <= int(text) <= MOST_PIXELS):
        raise UsageError(
            "--max-pixels (EMBCACHE_MAX_PIXELS) cannot be that",
            expected=f"a number of pixels, 1 to {MOST_PIXELS:,}",
            found=text[:40],
            fix=f"--max-pixels {MAX_PIXELS}",
        )
    return int(text)


def pixels_of(reason: str) -> int:
    """Pixels of an image that was refused for its size, as ``reason`` says; 0 where another one was given."""
    match = _TOO_LARGE.match(reason)
    return int(match[1].replace(",", "")) if match else 0


def fits_now(reason: str, max_pixels: int) -> bool:
    """Whether ``reason``, kept with a quarantined image, is a limit on pixels that ``max_pixels`` no longer sets."""
    return 0 < pixels_of(reason) <= max_pixels
