"""Where training takes its features from: an interface, and features that lie in memory as they were stored.

What trains or scores heads asks for rows by number and never for the whole, so that features in memory and features
that are streamed from shards (`embcache.probe.stream`) are the same to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

CHUNK = 1024  # rows scored at a time


@dataclass(frozen=True, eq=False)
class Step:
    """One batch of some neighbouring heads, equally long for all of them."""

    heads: slice  # which of the heads
    rows: torch.Tensor  # (k, B); the rows that each of them takes, on the device of the features
    x: dict[str, torch.Tensor]  # (k, B, D); their features


@dataclass(frozen=True, eq=False)
class Chunk:
    """Features of some rows of a set of rows."""

    number: int  # which of the sets
    places: torch.Tensor  # (B,); where in the set the rows stand
    x: dict[str, torch.Tensor]  # (B, D); their features; of several views the first, the image as it is


class FeatureRows(Protocol):
    """Features of N rows, of which training and scoring take what they need."""

    @property
    def dims(self) -> Mapping[str, int]:
        """Features of each backbone, D."""
        ...

    @property
    def n_views(self) -> int:
        """V: views of each image that training draws from."""
        ...

    @property
    def in_memory(self) -> bool:
        """Whether any row is at hand; where it is not, what needs many of them takes one pass of `chunks`."""
        ...

    def steps(
        self, orders: Sequence[torch.Tensor], views: Sequence[torch.Tensor], size: int, epoch: int
    ) -> Iterator[Step]:
        """One epoch of several heads, batch by batch.

        Shapes: orders (n_k,); views (n_k,).
        """
        ...

    def chunks(self, sets: Sequence[torch.Tensor]) -> Iterator[Chunk]:
        """Features of several sets of rows, in parts, every row of every set once."""
        ...

    def gather(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features of rows, float32 (n, D) of each backbone, all at once; of several views the first."""
        ...


@dataclass(frozen=True, eq=False)
class Resident:
    """Features in memory (or on a device), of any floating dtype: rows are gathered, then widened to float32."""

    x: Mapping[str, torch.Tensor]  # (N, D); never copied whole

    in_memory = True

    @property
    def dims(self) -> Mapping[str, int]:
        """Features of each backbone."""
        return {backbone: features.shape[-1] for backbone, features in self.x.items()}

    @property
    def n_views(self) -> int:
        """Views of each image."""
        return max((f.shape[1] if f.dim() == 3 else 1 for f in self.x.values()), default=1)

    def steps(
        self, orders: Sequence[torch.Tensor], views: Sequence[torch.Tensor], size: int, epoch: int
    ) -> Iterator[Step]:
        """One epoch of several heads; see `FeatureRows`."""
        device = next(iter(self.x.values())).device
        # Whole epochs go to the device once; neighbours of one length are one matrix, of which a batch is a slice.
        runs = [
            (heads, torch.stack([orders[k] for k in _numbers(heads)]).to(device), self._epoch_views(views, heads))
            for heads in equal_runs([len(order) for order in orders])
        ]
        for start in range(0, max(map(len, orders), default=0), size):
            for heads in _joined([(heads, min(size, rows.shape[1] - start)) for heads, rows, _ in runs]):
                parts = [(r[:, start : start + size], v) for h, r, v in runs if heads.start <= h.start < heads.stop]
                rows = parts[0][0] if len(parts) == 1 else torch.cat([r for r, _ in parts])
                view = None
                if parts[0][1] is not None:
                    view = torch.cat([v[:, start : start + size] for _, v in parts if v is not None])
                yield Step(heads, rows, {b: take(f, rows, view) for b, f in self.x.items()})

    def chunks(self, sets: Sequence[torch.Tensor]) -> Iterator[Chunk]:
        """Features of several sets of rows; see `FeatureRows`."""
        for number, rows in enumerate(sets):
            for start in range(0, len(rows), CHUNK):
                part = rows[start : start + CHUNK]
                x = {b: take(f, part.to(f.device)) for b, f in self.x.items()}
                yield Chunk(number, torch.arange(start, start + len(part)), x)

    def gather(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features of rows; see `FeatureRows`."""
        return {b: take(f, rows.to(f.device)) for b, f in self.x.items()}

    def _epoch_views(self, views: Sequence[torch.Tensor], heads: slice) -> torch.Tensor | None:
        if self.n_views == 1:
            return None
        return torch.stack([views[k] for k in _numbers(heads)]).to(next(iter(self.x.values())).device)


def as_rows(x: Mapping[str, torch.Tensor] | FeatureRows) -> FeatureRows:
    """Tensors of features as rows; rows as they are."""
    return Resident(x) if isinstance(x, Mapping) else x


def take(features: torch.Tensor, rows: torch.Tensor, view: torch.Tensor | None = None) -> torch.Tensor:
    """Rows of features (N, D) or (N, V, D), as float32 of shape (*rows.shape, D); of views ``view``, or the first."""
    if features.dim() == 2:
        # A lookup copies whole rows; indexing by a matrix takes four times as long.
        return torch.nn.functional.embedding(rows, features).float()
    return (features[rows, view] if view is not None else features[rows, 0]).float()


def kept_dtype(stored: np.dtype[Any]) -> torch.dtype:
    """The dtype in which features are kept in memory: half precision as it is, all else float32."""
    return torch.float16 if stored == np.float16 else torch.float32


def equal_runs(lengths: Sequence[int]) -> list[slice]:
    """Neighbours that are equally long; those of length 0 are left out."""
    starts = [k for k in range(len(lengths)) if k == 0 or lengths[k] != lengths[k - 1]]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(lengths)], strict=True) if lengths[a] > 0]


def _joined(runs: Sequence[tuple[slice, int]]) -> list[slice]:
    """Neighbouring runs of heads whose batches are equally long, as one run; those that have no batch left out.

    No batch is padded: a padded one would be rounded otherwise than the one a head has alone, and attention's
    vanishing gradients make much of that.
    """
    joined: list[tuple[slice, int]] = []
    for heads, length in runs:
        if length <= 0:
            continue
        if joined and joined[-1][1] == length and joined[-1][0].stop == heads.start:
            joined[-1] = (slice(joined[-1][0].start, heads.stop), length)
        else:
            joined.append((heads, length))
    return [heads for heads, _ in joined]


def _numbers(heads: slice) -> range:
    return range(heads.start, heads.stop)
