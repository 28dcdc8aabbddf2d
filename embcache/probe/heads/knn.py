"""Weighted nearest neighbors as in DINO's evaluation: no training at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from embcache.errors import check_number
from embcache.probe.metrics import Metric
from embcache.probe.stack import ClosedFormHead, Solution
from embcache.probe.standard import Params, standard_params, standardize

_FLOOR = 1e-12  # of a class without a neighbor, so that its logit is finite


@dataclass(frozen=True)
class KNN(ClosedFormHead):
    """Weighted k-nearest neighbors (DINO's ``eval_knn.py``; Wu et al. 2018) by cosine on standardized features.

    A neighbor at cosine *s* votes for its class with weight exp(*s* / T); a class's probability is its share of the
    votes of the *k* nearest training images (of all, where there are fewer). Votes are not weighed by class: where the
    training set is not balanced, frequent classes have more neighbors. Validation images choose nothing.
    """

    k: int = 20  # neighbors that vote
    temperature: float = 0.07  # T: smaller, and the nearest count for more

    name = "knn"
    summary = "weighted nearest neighbors by cosine, on standardized features (DINO's evaluation)"

    def __post_init__(self) -> None:
        check_number("--head-option k", self.k, 1, 100_000)
        check_number("--head-option temperature", self.temperature, 1e-6, 1e6)

    def solve(
        self,
        x: Mapping[str, torch.Tensor],
        y: torch.Tensor,
        x_val: Mapping[str, torch.Tensor] | None,
        y_val: torch.Tensor | None,
        n_classes: int,
        metric: str | Metric,
    ) -> Solution:
        """Keep the training rows; validation rows and metric are not read."""
        params = standard_params(x)
        ((backbone, features),) = x.items()
        rows = _unit(params, backbone, features)
        return Solution({**params, "bank.features": rows.half(), "bank.labels": F.one_hot(y, n_classes).to(rows)})

    def apply(
        self, params: Params, x: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Logits (K, B, C) from features (K, B, D): the logarithm of each class's share of the votes."""
        ((backbone, features),) = x.items()
        stacked = {name: p for name, p in params.items() if name.startswith("standard.")}
        centered = F.normalize(standardize(stacked, backbone, features), dim=-1)
        cosines = centered @ params["bank.features"].to(centered).transpose(1, 2)  # (K, B, n)
        nearest, which = cosines.topk(min(self.k, cosines.shape[-1]), dim=-1)  # (K, B, k)
        votes = (nearest / self.temperature).softmax(-1)  # shares: the sum of exp cancels in a class's probability
        heads = torch.arange(len(which), device=which.device)[:, None, None]
        shares = (votes[..., None] * params["bank.labels"][heads, which]).sum(-2)  # (K, B, C)
        return shares.clamp_min(_FLOOR).log()


def _unit(params: Params, backbone: str, features: torch.Tensor) -> torch.Tensor:
    """Standardized rows (n, D) of unit length."""
    stacked = {name: p[None] for name, p in params.items()}
    return F.normalize(standardize(stacked, backbone, features[None])[0], dim=-1)
