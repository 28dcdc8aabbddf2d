"""Ridge regression in closed form, all strengths from one decomposition; for classes and findings one against rest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embcache.cores import threads_for
from embcache.errors import ProtocolError, check_number
from embcache.probe.heads.solved import ABSENT, SolvedLinear
from embcache.probe.layers import Tensors, standard_params, standard_rows
from embcache.probe.metrics import Metric, scorer
from embcache.probe.stack import Solution
from embcache.targets import target_of

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Ridge(SolvedLinear):
    """L2-regularized least squares on standardized features with an intercept, its strength chosen on validation.

    Of a number, its values; of classes and findings 1 for and −1 against each, like scikit-learn's
    ``RidgeClassifier``: the logit of a finding is twice what is regressed, and softmax takes the logits of classes, so
    that probabilities only rank. A finding is regressed on the images of which it is known. The alpha with the best
    validation score is kept, the larger (the stronger regularization) on a tie; without validation rows the one nearest
    to 1.
    """

    alphas: tuple[float, ...] = (1e6, 1e5, 1e4, 1e3, 1e2, 1e1, 1.0, 1e-1, 1e-2)  # strengths to choose from

    name = "ridge"
    summary = "ridge regression in closed form on standardized features, alpha chosen on validation"
    fits = ("classes", "ordinal", "findings", "number")

    def __post_init__(self) -> None:
        values = self.alphas if isinstance(self.alphas, tuple | list) else (self.alphas,)
        object.__setattr__(self, "alphas", tuple(values))
        for value in self.alphas or (None,):
            check_number("--head-option alphas", value, 1e-12, 1e15)

    def solve(
        self, x: Tensors, y: Tensor, x_val: Tensors | None, y_val: Tensor | None, n_classes: int, metric: str | Metric
    ) -> Solution:
        """Solve for every alpha and keep the best."""
        params = standard_params(x)
        values, train = y.cpu().numpy(), standard_rows(params, x)
        if not np.isfinite(train).all():
            raise ProtocolError(
                "ridge regression cannot be solved", code="features-not-finite", expected="finite features",
                found="features not finite", fix="look for features that are not finite: embcache info",
            )  # fmt: skip
        alphas = sorted(set(map(float, self.alphas)), reverse=True)
        with threads_for(train.size):
            weights, biases = ridge_path(train, *_regressed(values, n_classes), alphas)
        scale = 2.0 if values.ndim == 2 else 1.0
        best = int(np.argmin(np.abs(np.log(alphas))))
        if x_val is not None and y_val is not None and len(y_val):
            held = standard_rows(params, x_val)
            value = scorer(metric, y_val.cpu().numpy(), target_of(values, n_classes))
            scores = [value(scale * (held @ w + b)) for w, b in zip(weights, biases, strict=True)]
            best = int(np.argmax(scores))  # the first of equals, and alphas descend
        if values.ndim == 1 and values.dtype.kind == "i":  # no image is called what none was trained on
            biases[:, np.bincount(values, minlength=n_classes) == 0] = ABSENT
        weight, bias = (torch.tensor(scale * a[best].T).float().contiguous().to(y.device) for a in (weights, biases))
        return Solution({**params, "classifier.weight": weight, "classifier.bias": bias}, {"alpha": alphas[best]})


def _regressed(y: NDArray[np.generic], n_classes: int) -> tuple[Array, NDArray[np.bool_]]:
    """What is regressed (n, C), and where it is known."""
    if y.dtype.kind == "f":
        values = y.astype(np.float64)[:, None]
        return values, np.ones(values.shape, dtype=bool)
    if y.ndim == 2:
        return np.where(y == 1, 1.0, -1.0), np.asarray(y) >= 0
    values = np.where(y[:, None] == np.arange(n_classes), 1.0, -1.0)
    return values, np.ones(values.shape, dtype=bool)


def ridge_path(x: Array, y: Array, known: NDArray[np.bool_], alphas: list[float]) -> tuple[Array, Array]:
    """Weights (A, D, C) and intercepts (A, C) for every alpha; columns that are known alike share a decomposition.

    Shapes: x (n, D); y, known (n, C).
    """
    weights, biases = np.zeros((len(alphas), x.shape[1], y.shape[1])), np.zeros((len(alphas), y.shape[1]))
    patterns, of = np.unique(known, axis=1, return_inverse=True)
    for number, rows in enumerate(patterns.T):
        columns = np.flatnonzero(of.reshape(-1) == number)
        own, wanted = x[rows], y[rows][:, columns]
        middle, mean = own.mean(0), wanted.mean(0)
        own, wanted = own - middle, wanted - mean
        wide = len(own) < own.shape[1]
        # Eigenvectors of the smaller of both products: their squares are those of the singular values.
        values, vectors = np.linalg.eigh(own @ own.T if wide else own.T @ own)
        along = vectors.T @ (wanted if wide else own.T @ wanted)
        for k, alpha in enumerate(alphas):
            solved = vectors @ (along / (np.maximum(values, 0.0) + alpha)[:, None])
            weights[k][:, columns] = own.T @ solved if wide else solved
            biases[k, columns] = mean - middle @ weights[k][:, columns]
    return weights, biases
