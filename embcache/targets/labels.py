"""Classes: one of C for each image; and the arithmetic of their logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from embcache.targets.target import BoolArray, FloatArray, IntArray, Target, finish, refuse_part

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor


@dataclass(frozen=True)
class Classes(Target):
    """``names[c]`` is the class of the rows whose value is ``c``; −1 is unknown. Softmax cross-entropy."""

    kind = "classes"
    losses: ClassVar[tuple[str, ...]] = ("softmax",)
    metric = "auc"

    def values(self, table: pd.DataFrame) -> IntArray:
        """The column ``label``."""
        return table["label"].to_numpy(dtype=np.int64)

    def known(self, y: NDArray[Any]) -> BoolArray:
        """Rows with a class."""
        return np.asarray(y >= 0)

    def blank(self, n: int) -> IntArray:
        """−1."""
        return np.full(n, -1, dtype=np.int64)

    def counts(self, y: NDArray[Any]) -> tuple[int, ...]:
        """Rows of each class."""
        return tuple(np.bincount(y[y >= 0], minlength=len(self.names)).tolist())

    def strata(self, y: NDArray[Any], rows: IntArray, least: int = 1) -> IntArray:
        """The classes."""
        return y

    def check_part(self, y: NDArray[Any], where: str, fix: Sequence[str]) -> None:
        """Two classes are needed."""
        if (classes := len(np.unique(y))) < 2:
            found = f"{len(y)} images of {classes} class"
            raise refuse_part(where, "holds fewer than two classes", found, fix, "one-class")

    def absent(self, y: NDArray[Any]) -> list[int]:
        """Classes without a row."""
        return [c for c, n in enumerate(self.counts(y)) if n == 0]

    def draw_weights(self, y: NDArray[Any]) -> FloatArray | None:
        """Classes equally likely, where they are not balanced."""
        return None if is_balanced(y, len(self.names)) else np.asarray(1.0 / np.bincount(y)[y])

    def seen(self, y: NDArray[Any], weighs: bool) -> list[float]:
        """Share of each class."""
        counts = np.bincount(y, minlength=len(self.names)).astype(np.float64)
        if weighs and not is_balanced(y, len(self.names)):
            counts = (counts > 0).astype(np.float64)
        return (counts / counts.sum()).tolist()  # type: ignore[no-any-return]

    def row_losses(self, out: Tensor, y: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """Cross-entropy."""
        import torch.nn.functional as F

        logits = finish(params, out)
        return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)

    def predicted(self, logits: NDArray[Any]) -> FloatArray:
        """Class probabilities."""
        return softmax(logits)

    def average(self, logits: NDArray[Any], axis: int = 0) -> FloatArray:
        """By log-mean-exp."""
        return mean_logits(logits, axis)

    def group_value(self, y: NDArray[Any]) -> Any:
        """The class that all rows have."""
        return y[0] if (y == y[0]).all() else -1

    def baseline(self, train: NDArray[Any], test: NDArray[Any]) -> FloatArray:
        """The shares of classes in training."""
        counts = np.bincount(train, minlength=len(self.names))
        return np.tile(np.log(np.maximum(counts, 1e-12) / counts.sum()), (len(test), 1))


def is_balanced(labels: NDArray[Any], n_classes: int) -> bool:
    """Whether class counts are equal, but for a remainder of one."""
    counts = np.bincount(labels, minlength=n_classes)
    return int(counts.max() - counts.min()) <= 1


def softmax(logits: ArrayLike) -> FloatArray:
    """Class probabilities in float64, of logits of shape (..., C)."""
    z = np.asarray(logits, dtype=np.float64)
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def log_odds(logits: ArrayLike) -> FloatArray:
    """log(p / (1 − p)) of each class, of logits of shape (..., C): ranks as p does, without its ties near 0 and 1."""
    z = np.asarray(logits, dtype=np.float64)
    if z.shape[-1] == 2:
        difference = z[..., 1] - z[..., 0]
        return np.stack([-difference, difference], axis=-1)
    # In ascending order, so that images whose other logits are the same in another order tie.
    order, columns = np.argsort(z, axis=-1), []
    ranked = np.take_along_axis(z, order, -1)
    for c in range(z.shape[-1]):
        others = np.delete(ranked, c, axis=-1)
        top = others[..., -1:]
        columns.append(ranked[..., c] - top[..., 0] - np.log(np.exp(others - top).sum(axis=-1)))
    return np.take_along_axis(np.stack(columns, axis=-1), np.argsort(order, axis=-1), -1)


def log_probabilities(logits: ArrayLike) -> FloatArray:
    """Log p of each class, of logits of shape (..., C): exact near p = 1 too, so that it can be used as logits."""
    return np.asarray(-np.logaddexp(0.0, -log_odds(logits)))


def mean_logits(logits: ArrayLike, axis: int = 0) -> FloatArray:
    """Logits of the mean of probabilities over an axis, by log-mean-exp: what an ensemble predicts."""
    return log_mean_exp(log_probabilities(logits), axis)


def log_mean_exp(values: FloatArray, axis: int) -> FloatArray:
    """The logarithm of the mean of exponentials over an axis."""
    top = values.max(axis=axis, keepdims=True)
    mean = np.log(np.exp(values - top).mean(axis=axis, keepdims=True)) + top
    return np.asarray(mean.squeeze(axis))
