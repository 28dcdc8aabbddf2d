"""A number, such as an age or an ejection fraction: regression."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from embcache.errors import DatasetError, UsageError, first_few
from embcache.targets.target import BoolArray, FloatArray, IntArray, Target, refuse_part

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

MAX_AGE = 120.0
"""NIH lists ages up to 414: ages above any possible one are no value."""

PARTS = 5  # quantiles that folds and subsets balance


@dataclass(frozen=True)
class Number(Target):
    """Values float64 (n,); NaN is unknown. Trained on numbers that are standardized by the training rows."""

    kind = "number"
    noun, nouns = "number", "numbers"
    losses = ("squared", "huber")
    metric = "r2"
    metrics = ("mae", "rmse", "r2", "pearson", "spearman")
    group_words = "the mean of the predictions for a patient's images, against the mean of their values"

    @property
    def outputs(self) -> int:
        """One."""
        return 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.names) != 1:
            raise UsageError(
                "a number has one name", code="target-columns", found=first_few(self.names), expected="one"
            )
        object.__setattr__(self, "columns", self.columns or self.names)

    def values(self, table: pd.DataFrame) -> FloatArray:
        """Its column."""
        return table[self.columns[0]].to_numpy(dtype=np.float64)

    def known(self, y: NDArray[Any]) -> BoolArray:
        """Rows with a number."""
        return np.asarray(np.isfinite(y))

    def blank(self, n: int) -> FloatArray:
        """NaN."""
        return np.full(n, np.nan)

    def counts(self, y: NDArray[Any]) -> tuple[int, ...]:
        """Rows with a number."""
        return (int(self.known(y).sum()),)

    def plain(self, y: NDArray[Any]) -> list[Any]:
        """None where it is unknown."""
        return [value if there else None for value, there in zip(y.tolist(), self.known(y), strict=True)]

    def words(self, value: Any) -> str:
        """The number, shortened."""
        return f"{value:.6g}" if np.isfinite(value) else ""

    def strata(self, y: NDArray[Any], rows: IntArray, least: int = 1) -> IntArray:
        """Fifths of the values at ``rows``, fewer where values are equal or there are few."""
        basis = np.sort(y[rows][self.known(y[rows])])
        found, below = np.where(self.known(y), 0, -1), basis[basis < basis[-1:]].max(initial=-np.inf)
        for parts in range(PARTS, 1, -1) if len(basis) else ():
            ends = basis[[len(basis) * k // parts - 1 for k in range(1, parts) if len(basis) * k >= parts]]
            cuts = np.unique(np.minimum(ends, below))  # something is above the last
            of = np.searchsorted(cuts, basis, side="left")
            if len(cuts) and np.bincount(of, minlength=len(cuts) + 1).min() >= least:
                return np.where(self.known(y), np.searchsorted(cuts, y, side="left"), -1)
        return found

    def stratum(self, c: int) -> str:
        """The part of the values."""
        return f"part {c + 1} of the values of {self.names[0]}"

    def check_part(self, y: NDArray[Any], where: str, fix: Sequence[str]) -> None:
        """The numbers must vary."""
        if len(np.unique(y)) < 2:
            found = f"{len(y):,} images, all of {self.words(y[0])}" if len(y) else "no images"
            raise refuse_part(where, f"has one value of {self.names[0]}", found, fix, "constant-target")

    def absent(self, y: NDArray[Any]) -> list[int]:
        """The number, where it does not vary."""
        return [] if len(np.unique(y[self.known(y)])) > 1 else [0]

    def constants(self, y: NDArray[Any]) -> dict[str, Tensor]:
        """``target.mean`` and ``target.scale`` (1,), the standard deviation (divided by n)."""
        import torch

        scale = float(y.std()) or 1.0
        return {
            name: torch.tensor([value], dtype=torch.float64)
            for name, value in (("target.mean", float(y.mean())), ("target.scale", scale))
        }

    def row_losses(self, out: Tensor, y: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """Squared error, or Huber's with a threshold of one standard deviation, of the standardized number."""
        import torch.nn.functional as F

        wanted = ((y - params["target.mean"]) / params["target.scale"]).to(out.dtype)
        if self.loss == "huber":
            return F.huber_loss(out[..., 0], wanted, reduction="none")
        return F.mse_loss(out[..., 0], wanted, reduction="none")

    def predicted(self, logits: NDArray[Any]) -> FloatArray:
        """The numbers."""
        return np.asarray(logits, dtype=np.float64)

    def average(self, logits: NDArray[Any], axis: int = 0) -> FloatArray:
        """The mean."""
        return np.asarray(np.mean(logits, axis=axis, dtype=np.float64))

    def group_value(self, y: NDArray[Any]) -> Any:
        """The mean."""
        return y.mean()

    def baseline(self, train: NDArray[Any], test: NDArray[Any]) -> FloatArray:
        """The mean of training."""
        return np.full((len(test), 1), train.mean())


def read_numbers(name: str, texts: Sequence[str], *, where: object = None) -> tuple[FloatArray, list[str]]:
    """Values (n,) of a column of numbers, NaN where it is empty, and notes; ages above `MAX_AGE` are none."""
    y, wrong = np.full(len(texts), np.nan), list[str]()
    for row, text in enumerate(texts):
        try:
            y[row] = as_number(text)
        except ValueError:
            wrong.append(text)
    wrong += [text for text, value in zip(texts, y.tolist(), strict=True) if math.isinf(value)]
    if wrong:
        raise DatasetError(
            f"column {name!r} holds other values than finite numbers", code="not-a-number", where=where,
            expected="numbers such as 3.5, or empty for unknown", found=first_few(list(dict.fromkeys(wrong)), 4),
            fix=(
                "write decimals with a point: 1.5 for 1,5" if all(re.fullmatch(r"[+-]?\d*,\d+", w) for w in wrong)
                else f"correct {len(wrong):,} cells, leave them empty, or --task classes"
            ),
        )  # fmt: skip
    notes = list[str]()
    if is_age(name) and (impossible := (y < 0) | (y > MAX_AGE)).any():
        y[impossible] = np.nan
        notes.append(f"{impossible.sum():,} images have no {name}: theirs is below 0 or above {MAX_AGE:g}")
    return y, notes


def as_number(text: str) -> float:
    """A cell as a number, NaN where it is empty; a ValueError where it is none. Python would read 1_000 too."""
    return float(text.replace("_", "x")) if text else math.nan


def is_age(name: str) -> bool:
    """Whether a column is called an age."""
    return re.search(r"(^|[^a-z])age([^a-z]|$)", name.lower()) is not None
