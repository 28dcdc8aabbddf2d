"""Standardization, everywhere by the same means and scales; inside a head they are parameters that are not trained."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray

Params = dict[str, torch.Tensor]

_WIDENED = 8192  # rows that are float64 at a time


class Standard:
    """Mean and scale of every feature, as scikit-learn's ``StandardScaler``, from rows that come in parts."""

    def __init__(self) -> None:
        self._n = 0
        self._mean: Params = {}
        self._squares: Params = {}  # sum of squared deviations from the mean

    def add(self, x: Mapping[str, torch.Tensor]) -> None:
        """Add rows: float32 Tensors of shape (n, D)."""
        n = len(next(iter(x.values())))
        if not n:
            return
        before, self._n = self._n, self._n + n
        for backbone, features in x.items():
            wide = features.double()
            mean = wide.mean(0)
            squares = wide.var(0, correction=0) * n
            if before:  # moments of two parts make those of the whole (Chan, Golub and LeVeque)
                apart = mean - self._mean[backbone]
                squares += self._squares[backbone] + apart * apart * (before * n / self._n)
                mean = self._mean[backbone] + apart * (n / self._n)
            self._mean[backbone], self._squares[backbone] = mean, squares

    def params(self) -> Params:
        """``standard.<backbone>.mean`` and ``standard.<backbone>.scale``, float32 of shape (D,).

        The scale is the standard deviation (divided by n), 1 where a feature does not vary.
        """
        params: Params = {}
        for backbone, mean in self._mean.items():
            scale = (self._squares[backbone] / self._n).sqrt()
            # What rounding leaves of a constant feature is no variation.
            constant = scale <= 10 * torch.finfo(torch.float64).eps * mean.abs()
            params[f"standard.{backbone}.mean"] = mean.float()
            params[f"standard.{backbone}.scale"] = scale.masked_fill(constant, 1.0).float()
        return params


def standard_params(x: Mapping[str, torch.Tensor]) -> Params:
    """Mean and scale of every feature over the rows given.

    Shapes: x (n, D); returns (D,).
    """
    standard = Standard()
    standard.add(x)
    return standard.params()


def standardize(params: Mapping[str, torch.Tensor], backbone: str, x: torch.Tensor) -> torch.Tensor:
    """Features (K, B, D) of a backbone by the means and scales (K, D) of each head."""
    return (x - params[f"standard.{backbone}.mean"][:, None]) / params[f"standard.{backbone}.scale"][:, None]


def standardized(x: ArrayLike, by: ArrayLike | None = None) -> NDArray[np.float32]:
    """Features (n, D) of which each is standardized by the rows ``by`` (m, D), by default by ``x`` itself."""
    rows, known = (torch.from_numpy(np.require(a, np.float32, ["C", "W"])) for a in (x, x if by is None else by))
    standard = Standard()
    for part in torch.split(known, _WIDENED):
        standard.add({"": part})
    params = {name: p[None] for name, p in standard.params().items()}
    return np.asarray(standardize(params, "", rows[None])[0].numpy())


def standard_directions(x: ArrayLike, by: ArrayLike | None = None) -> NDArray[np.float32]:
    """Features as `standardized`, each row then scaled to length 1: their products are cosines."""
    return np.asarray(F.normalize(torch.from_numpy(standardized(x, by)), dim=-1).numpy())
