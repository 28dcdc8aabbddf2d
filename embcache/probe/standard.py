"""Standardisation inside a head: means and scales of the training rows are parameters that nobody trains."""

from __future__ import annotations

from collections.abc import Mapping

import torch

Params = dict[str, torch.Tensor]


def standard_params(x: Mapping[str, torch.Tensor]) -> Params:
    """Mean and scale of every feature over the rows given, as scikit-learn's ``StandardScaler``.

    Parameters
    ----------
    x : mapping of backbone to float32 Tensor of shape (n, D)
        Training rows of one fold.

    Returns
    -------
    dict of float32 Tensor of shape (D,)
        ``standard.<backbone>.mean`` and ``standard.<backbone>.scale``: the standard deviation (divided by n), 1 where
        a feature does not vary.
    """
    params: Params = {}
    for backbone, features in x.items():
        wide = features.double()
        mean, scale = wide.mean(0), wide.std(0, correction=0)
        # What rounding leaves of a constant feature is no variation.
        constant = scale <= 10 * torch.finfo(torch.float64).eps * mean.abs()
        params[f"standard.{backbone}.mean"] = mean.float()
        params[f"standard.{backbone}.scale"] = scale.masked_fill(constant, 1.0).float()
    return params


def standardise(params: Mapping[str, torch.Tensor], backbone: str, x: torch.Tensor) -> torch.Tensor:
    """Features (K, B, D) of a backbone by the means and scales (K, D) of each head."""
    return (x - params[f"standard.{backbone}.mean"][:, None]) / params[f"standard.{backbone}.scale"][:, None]
