"""The contract of targets: values, what is known of them, how they balance splits, loss, averages and words.

No torch at import: methods that train import it. Shapes: y are values, (n,) or (n, L); logits (…, C) are what
predictions are made of, (…, 1) for a number.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from embcache.errors import ProtocolError, check_choice

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class Target(ABC):
    """What is predicted.

    Attributes
    ----------
    names : tuple of str
        The classes, the findings, or the number.
    columns : tuple of str
        Columns of a dataset's table that hold the values; empty for the column ``label``.
    loss : str
        One of ``losses``; empty for the first.
    """

    names: tuple[str, ...]
    columns: tuple[str, ...] = ()
    loss: str = ""

    kind: ClassVar[str] = ""
    noun: ClassVar[str] = "class"  # what ``names`` are, one of them
    nouns: ClassVar[str] = "classes"
    losses: ClassVar[tuple[str, ...]] = ()
    metric: ClassVar[str] = ""  # that chooses epochs by default
    metrics: ClassVar[tuple[str, ...]] = ()  # that are shown, and scored of the baseline; empty for those of classes

    def __post_init__(self) -> None:
        if self.loss:
            check_choice("--loss", self.loss, self.losses)
        object.__setattr__(self, "loss", self.loss or self.losses[0])

    # Shapes.

    @property
    def outputs(self) -> int:
        """C, the logits per image."""
        return len(self.names)

    @property
    def width(self) -> int:
        """What a trained head puts out per image; `finish` makes the logits of it."""
        return self.outputs

    # Values.

    @abstractmethod
    def values(self, table: pd.DataFrame) -> NDArray[Any]:
        """The values y of a dataset's rows."""

    @abstractmethod
    def known(self, y: NDArray[Any]) -> BoolArray:
        """Rows of which anything is known, (n,)."""

    @abstractmethod
    def blank(self, n: int) -> NDArray[Any]:
        """Values of n rows of which nothing is known."""

    @abstractmethod
    def counts(self, y: NDArray[Any]) -> tuple[int, ...]:
        """Rows of each class, positive rows of each finding, or rows with a number."""

    def plain(self, y: NDArray[Any]) -> list[Any]:
        """The values of rows as JSON data; None for an unknown number."""
        return y.tolist()  # type: ignore[no-any-return]

    def words(self, value: Any) -> str:
        """One row's value for people; empty where it is not known."""
        return "" if value < 0 else self.names[int(value)]

    # Splits.

    @abstractmethod
    def strata(self, y: NDArray[Any], rows: IntArray, least: int = 1) -> IntArray:
        """What folds and subsets balance: a number per row (n,), −1 where it is unknown; or membership 0/1 (n, S).

        Bounds are those of the values at ``rows``; no stratum that is made up has fewer than ``least`` of them.
        """

    def stratum(self, c: int) -> str:
        """The name of a stratum."""
        return self.names[c]

    @abstractmethod
    def check_part(self, y: NDArray[Any], where: str, fix: Sequence[str]) -> None:
        """`ProtocolError` where the rows of one part of the splits can train or score nothing."""

    @abstractmethod
    def absent(self, y: NDArray[Any]) -> list[int]:
        """Numbers of the names that cannot be scored on these rows."""

    # Training.

    def draw_weights(self, y: NDArray[Any]) -> FloatArray | None:
        """Weights (n,) of training rows in draws with replacement; None where each is drawn once."""
        return None

    def seen(self, y: NDArray[Any], weighs: bool) -> list[float]:
        """Share of each class in training, those of unbalanced classes alike where a head ``weighs`` them."""
        return []

    def constants(self, y: NDArray[Any]) -> dict[str, Tensor]:
        """What training rows determine, kept with the parameters of a trained head."""
        return {}

    def init(self) -> dict[str, Tensor]:
        """Parameters that are trained in addition to the head's."""
        return {}

    @abstractmethod
    def row_losses(self, out: Tensor, y: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """Loss (K, B) of each row, of what K heads put out (K, B, width)."""

    # Predictions.

    @abstractmethod
    def predicted(self, logits: NDArray[Any]) -> FloatArray:
        """Probabilities, or numbers, float64 (…, C)."""

    @abstractmethod
    def average(self, logits: NDArray[Any], axis: int = 0) -> FloatArray:
        """Logits of the mean of what is predicted, over an axis before the last: what an ensemble predicts."""

    def of_group(self, logits: NDArray[Any]) -> FloatArray:
        """Logits (K, C) of a group from those (K, m, C) of its images."""
        return self.average(logits, axis=1)

    group_words: ClassVar[str] = "the mean of the probabilities of a patient's images"

    @abstractmethod
    def group_value(self, y: NDArray[Any]) -> Any:
        """The value of a group of images (m, …), as one row; unknown where they disagree."""

    @abstractmethod
    def baseline(self, train: NDArray[Any], test: NDArray[Any]) -> FloatArray:
        """Logits (n, C) of test rows by what training rows say without any features."""


CONSTANTS = ("target.mean", "target.scale", "target.positive")
"""Parameters of `Target.constants`, which are not trained."""


def refuse_part(where: str, problem: str, found: str, fix: Sequence[str], code: str) -> ProtocolError:
    """The error of `Target.check_part`."""
    return ProtocolError(f"{where} {problem}", code=code, found=found, fix=[*fix])


def finish(params: Mapping[str, Tensor], out: Tensor) -> Tensor:
    """Logits (K, B, C) from what heads put out: numbers in their unit, classes from cumulative logits, else as it is.

    The parameters that a target adds say which: a saved head predicts without knowing what it was trained for.
    """
    if "target.scale" in params:
        # In float64, for numbers far from 0.
        return out.double() * params["target.scale"][:, None] + params["target.mean"][:, None]
    if "target.first" in params:
        return class_logits(out, params["target.first"], params.get("target.gaps"))
    return out


def class_logits(score: Tensor, first: Tensor, gaps: Tensor | None) -> Tensor:
    """Log probabilities (K, B, C) from scores (K, B, 1), first cuts (K, 1) and log gaps (K, C − 2)."""
    import torch
    import torch.nn.functional as F

    parts = [first] if gaps is None else [first, first + gaps.exp().cumsum(-1)]
    below = torch.cat(parts, dim=-1)[:, None] - score  # (K, B, C − 1), logits of P(y ≤ c)
    up, down = F.logsigmoid(below), F.logsigmoid(-below)
    # σ(a) − σ(b) = σ(a) σ(−b) (1 − exp(b − a)), for a > b
    between = up[..., 1:] + down[..., :-1]
    if gaps is not None:
        between = between + torch.log(-torch.expm1(-gaps.exp()))[:, None]
    return torch.cat([up[..., :1], between, down[..., -1:]], dim=-1)
