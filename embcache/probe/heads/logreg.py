"""Logistic regression solved to the optimum: a linear probe without learning rate, epochs or luck."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from embcache.cores import threads_for
from embcache.errors import ProtocolError, check_number
from embcache.probe.layers import affine
from embcache.probe.metrics import Metric, scorer
from embcache.probe.stack import ClosedFormHead, Solution, is_balanced
from embcache.probe.standard import Params, standard_params, standardize

_ABSENT = -1e4  # logit of a class that no training image has: probability 0


@dataclass(frozen=True)
class LogReg(ClosedFormHead):
    """L2-regularized multinomial logistic regression by L-BFGS, its strength chosen on validation.

    On features standardized by the fold's training rows. Classes weigh alike where the training set is not balanced,
    as oversampling does for trained heads. The C with the best validation score is kept, the smaller (the stronger
    regularization) on a tie; without validation rows the one nearest to scikit-learn's 1.
    """

    Cs: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # inverse strengths to choose from
    max_iter: int = 1000  # iterations of L-BFGS at most, for each C

    name = "logreg"
    summary = "logistic regression by L-BFGS on standardized features, C chosen on validation"
    weighs = True

    def __post_init__(self) -> None:
        values = self.Cs if isinstance(self.Cs, tuple | list) else (self.Cs,)
        object.__setattr__(self, "Cs", tuple(values))
        for value in self.Cs or (None,):
            check_number("--head-option Cs", value, 1e-12, 1e12)
        check_number("--head-option max_iter", self.max_iter, 1, 100_000)

    def solve(
        self,
        x: Mapping[str, torch.Tensor],
        y: torch.Tensor,
        x_val: Mapping[str, torch.Tensor] | None,
        y_val: torch.Tensor | None,
        n_classes: int,
        metric: str | Metric,
    ) -> Solution:
        """Fit for every C and keep the best."""
        ((backbone, features),) = x.items()
        params = standard_params(x)
        stacked = {name: p[None] for name, p in params.items()}

        def rows(part: torch.Tensor) -> NDArray[np.float64]:
            return np.asarray(standardize(stacked, backbone, part[None])[0].cpu().double().numpy())

        labels = y.cpu().numpy()
        train = rows(features)
        if len(np.unique(labels)) < 2 or not np.isfinite(train).all():
            raise ProtocolError(
                "logistic regression cannot be solved",
                code="features-not-finite" if len(np.unique(labels)) > 1 else "one-class",
                expected="finite features of two classes at least",
                found=f"{len(np.unique(labels))} class" if len(np.unique(labels)) < 2 else "features not finite",
                fix=("a larger --subset", "look for features that are not finite: embcache info"),
            )
        with threads_for(train.size):
            solutions = list(self._path(train, labels, n_classes))
        if x_val is None or y_val is None or not len(y_val):
            best = min(solutions, key=lambda solution: abs(np.log(solution.C)))
        else:
            held, held_labels = rows(x_val[backbone]), y_val.cpu().numpy()
            # max keeps the first of equals, and the path ascends in C
            value = scorer(metric, held_labels, n_classes)
            best = max(solutions, key=lambda s: value(held @ s.weight.T + s.bias))
        chosen = {"C": best.C} if best.converged else {"C": best.C, "converged": False}
        weight, bias = (torch.from_numpy(a).to(features) for a in (best.weight, best.bias))
        return Solution({**params, "classifier.weight": weight, "classifier.bias": bias}, chosen)

    def apply(
        self, params: Params, x: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Logits (K, B, C) from features (K, B, D)."""
        ((backbone, features),) = x.items()
        return affine(params, "classifier", standardize(params, backbone, features))

    def _path(self, x: NDArray[np.float64], y: NDArray[np.int64], n_classes: int) -> Iterator[_Solution]:
        """A solution for every C, ascending; each starts from the one before."""
        from sklearn.exceptions import ConvergenceWarning  # here, so that other heads do without scikit-learn
        from sklearn.linear_model import LogisticRegression

        # The solution lies in the span of the rows, so with fewer rows than features it is found among n numbers a
        # class instead of D: the same solution, sooner.
        basis, reduced = None, x
        if len(x) < x.shape[1]:
            basis, triangle = np.linalg.qr(x.T)  # (D, n), (n, n)
            reduced = triangle.T
        weight = None if is_balanced(y, n_classes) else "balanced"
        model = LogisticRegression(solver="lbfgs", max_iter=self.max_iter, warm_start=True, class_weight=weight)
        for C in sorted(set(self.Cs)):
            model.set_params(C=C)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # recorded in `chosen` instead
                model.fit(reduced, y)
            coefficients = model.coef_ if basis is None else model.coef_ @ basis.T
            yield _solution(C, coefficients, model, n_classes, int(np.max(model.n_iter_)) < self.max_iter)


@dataclass(frozen=True, eq=False)
class _Solution:
    C: float
    weight: NDArray[np.float64]  # (C, D)
    bias: NDArray[np.float64]  # (C,)
    converged: bool


def _solution(C: float, coefficients: NDArray[np.float64], model: Any, n_classes: int, converged: bool) -> _Solution:
    weight, bias = np.zeros((n_classes, coefficients.shape[1])), np.full(n_classes, _ABSENT)
    if len(model.classes_) == 2:  # scikit-learn gives the log odds of the second class
        weight[model.classes_[1]] = coefficients[0]
        bias[model.classes_] = [0.0, float(model.intercept_[0])]
    else:
        weight[model.classes_], bias[model.classes_] = coefficients, model.intercept_
    return _Solution(float(C), weight, bias, converged)
