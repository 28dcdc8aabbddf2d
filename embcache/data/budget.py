"""What decoding may take: pixels of one image, memory of all threads; its errors and notes; and no stray warnings."""

from __future__ import annotations

import errno
import functools
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from embcache.errors import EmbcacheError, ImageError, UsageError, first_few

MAX_PIXELS = 89_478_485
"""Default limit on the pixels of an image that is decoded: Pillow's own, 256 MiB of RGB."""
MOST_PIXELS = 1 << 32
"""The highest limit that may be given: larger images are never decoded."""

_MOST = 3 << 30  # bytes for one image at the default limit; 36 bytes per pixel; a 16-bit PNG takes 29


broken = functools.partial(ImageError, code="image-broken")  # bytes that contradict themselves or end too early
unsupported = functools.partial(ImageError, code="image-unsupported")  # whole, but of a variant that is not decoded
too_large = functools.partial(ImageError, code="image-too-large")


@contextmanager
def reasons(failed: str) -> Iterator[None]:
    """Turn whatever a decoder raises on broken bytes into an `ImageError`; trouble of the machine passes."""
    try:
        yield
    except (EmbcacheError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise ImageError("the file is not there", code="image-missing") from error
    except Exception as error:
        # The system's own errors stand in the text of h5py's, whatever their type.
        number = re.search(r"errno = (\d+)", str(error))
        code = int(number.group(1)) if number else getattr(error, "errno", None)
        if code not in (None, 0, errno.EINVAL):
            raise OSError(code, os.strerror(code)) from error
        text = re.sub(r"<[^<>]* object at 0x[0-9a-fA-F]+>", "", str(error))  # addresses differ from run to run
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())[:160]
        raise broken(f"{failed}: {text or type(error).__name__}") from error


class Budget:
    """Memory that the decoding threads of a process share: they wait until the sum of what they hold fits."""

    def __init__(self, total: int) -> None:
        self._total, self._used = total, 0
        self._free, self._own = threading.Condition(), threading.local()

    @contextmanager
    def hold(self, need: int | None = None) -> Iterator[None]:
        """Wait until ``need`` bytes (default: all) are free and hold them; those this thread holds already count."""
        before: int = getattr(self._own, "held", 0)
        # A thread that holds something only asks for more where it holds everything: no two wait for each other.
        more = 0 if before else self._total if need is None else min(need, self._total)
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


SHARED = Budget(_MOST + (1 << 30))
"""One for all threads of the process."""


def check_max_pixels(value: int | str | None = None) -> int:
    """The limit on pixels: ``value``, else ``$EMBCACHE_MAX_PIXELS``, else `MAX_PIXELS`; `UsageError` if it is none."""
    text = str(os.environ.get("EMBCACHE_MAX_PIXELS") or MAX_PIXELS if value is None else value)
    if not (text.isascii() and text.isdecimal() and len(text) <= 13 and 1 <= int(text) <= MOST_PIXELS):
        raise UsageError(
            "--max-pixels (EMBCACHE_MAX_PIXELS) is out of bounds", code="option-bounds",
            expected=f"a number of pixels, 1 to {MOST_PIXELS:,}", found=text[:40], fix=f"--max-pixels {MAX_PIXELS}",
        )  # fmt: skip
    return int(text)


@dataclass(frozen=True)
class Decoding:
    """How the images of one run are decoded."""

    max_pixels: int = field(default_factory=check_max_pixels)
    budget: Budget = SHARED
    _noted: dict[str, list[str]] = field(default_factory=dict)

    def check_size(self, width: int, height: int) -> None:
        """Raise `ImageError` for an image above the limit."""
        if width * height > self.max_pixels:
            raise too_large(
                f"too large: {width * height:,} pixels, more than {self.max_pixels:,}: "
                "cut it into tiles or scale it down, or raise --max-pixels (EMBCACHE_MAX_PIXELS)"
            )

    @contextmanager
    def hold(self, need: int) -> Iterator[None]:
        """Hold ``need`` bytes of the budget; `ImageError` where no image may take that much."""
        most = max(_MOST, _MOST // MAX_PIXELS * self.max_pixels)
        if need > most:
            raise too_large(f"decoding would take {need / 1e9:.1f} GB of memory, more than {most / 1e9:.1f} GB")
        with self.budget.hold(need):
            yield

    def note(self, what: str, name: str) -> None:
        """Remember that ``what`` was inferred of the image ``name``."""
        self._noted.setdefault(what, []).append(name)

    def notes(self) -> list[str]:
        """One line for each thing that was noted since the last call."""
        noted = dict(self._noted)
        self._noted.clear()
        return [f"{len(names):,} images: {what} ({first_few(sorted(names), 3)})" for what, names in noted.items()]


def pixels_of(reason: str) -> int:
    """Pixels of an image that was refused for its size, from the quarantined ``reason``; 0 for another reason."""
    match = re.match(r"too large: ([\d,]+) pixels", reason)
    return int(match[1].replace(",", "")) if match else 0


def fits_now(reason: str, max_pixels: int) -> bool:
    """Whether ``reason``, kept with a quarantined image, is a limit on pixels that ``max_pixels`` no longer sets."""
    return 0 < pixels_of(reason) <= max_pixels


# Warning filters belong to the process. They are set when the first thread begins to decode and put back when the last
# one ends; in between threads decode side by side, and filters are only ever added.
_lock = threading.Lock()
_inside = 0
_installed: set[str] = set()
_saved = warnings.catch_warnings()


@contextmanager
def quiet(module: str) -> Iterator[None]:
    """Ignore warnings raised in modules whose name matches ``module``, in any number of threads at once."""
    global _inside, _saved
    if getattr(sys.flags, "context_aware_warnings", False):  # each thread has filters of its own
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=module)
            yield
        return
    with _lock:
        if not _inside:
            _saved = warnings.catch_warnings()
            _saved.__enter__()
        _inside += 1
        if module not in _installed:
            warnings.filterwarnings("ignore", module=module)
            _installed.add(module)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _installed.clear()
                _saved.__exit__(None, None, None)
