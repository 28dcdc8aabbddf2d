"""The progress bar of long commands."""

from __future__ import annotations

import sys
from typing import Any


class ProgressBar:
    """A bar with rate and time left, on stderr and only on a terminal; it begins anew where what is counted changes."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._counts: tuple[int, str] | None = None
        self._bar: Any = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, done: int, total: int, label: str = "") -> None:
        """Show that ``done`` of ``total`` units of ``label`` are through."""
        if not sys.stderr.isatty():
            return
        if self._counts is None or self._counts[0] != total or (done < self._bar.n and self._counts[1] != label):
            from tqdm import tqdm

            if self._bar is not None:
                self._bar.close()
            self._bar = tqdm(total=total, unit=self._unit, leave=False, file=sys.stderr, smoothing=0.05)
        self._counts = (total, label)
        self._bar.set_description(label, refresh=False)
        self._bar.update(done - self._bar.n)
