"""Heads that are solved: nearest neighbors, logistic regression, and any scikit-learn classifier.

scikit-learn is imported by the functions that need it: other heads do without.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from embcache.cores import threads_for
from embcache.errors import ProtocolError, UsageError, check_number
from embcache.probe.layers import Params, Tensors, affine, standard_params, standard_rows, standardize
from embcache.probe.metrics import Metric, scorer
from embcache.probe.stack import ClosedFormHead, Solution
from embcache.targets import target_of
from embcache.targets.labels import is_balanced

_FLOOR = 1e-12  # of a probability, so that its logarithm is finite
ABSENT = -1e4  # logit of a class that no training image has: probability 0


@dataclass(frozen=True)
class KNN(ClosedFormHead):
    """Weighted k-nearest neighbors (DINO's ``eval_knn.py``; Wu et al. 2018) by cosine on standardized features.

    A neighbor at cosine *s* votes for its class with weight exp(*s* / T); a class's probability is its share of the
    votes of the *k* nearest training images (of all, where there are fewer). Votes are not weighed by class: where the
    training set is not balanced, frequent classes have more neighbors. Of a finding those vote of which it is known; a
    number is the mean with these weights. Validation images choose nothing.
    """

    k: int = 20  # neighbors that vote
    temperature: float = 0.07  # T: smaller, and the nearest count for more

    name = "knn"
    summary = "weighted nearest neighbors by cosine, on standardized features (DINO's evaluation)"
    fits = ("classes", "ordinal", "findings", "number")

    def __post_init__(self) -> None:
        check_number("--head-option k", self.k, 1, 100_000)
        check_number("--head-option temperature", self.temperature, 1e-6, 1e6)

    def solve(
        self, x: Tensors, y: Tensor, x_val: Tensors | None, y_val: Tensor | None, n_classes: int, metric: str | Metric
    ) -> Solution:
        """Keep the training rows; validation rows and metric are not read."""
        params = standard_params(x)
        bank = self._unit({name: p[None] for name, p in params.items()}, {b: f[None] for b, f in x.items()})[0]
        kept = {**params, "bank.features": bank.half()}
        if y.is_floating_point():
            return Solution({**kept, "bank.numbers": y[:, None].to(bank)})
        if y.dim() == 2:
            return Solution({**kept, "bank.labels": (y == 1).to(bank), "bank.known": (y >= 0).to(bank)})
        return Solution({**kept, "bank.labels": F.one_hot(y, n_classes).to(bank)})

    def apply(self, params: Params, x: Tensors, masks: Tensors | None = None) -> Tensor:
        """Logits (K, B, C) from features (K, B, D): the logarithm of each class's share, or numbers."""
        rows = self._unit(params, x)
        cosines = rows @ params["bank.features"].to(rows).transpose(1, 2)  # (K, B, n)
        nearest, which = cosines.topk(min(self.k, cosines.shape[-1]), dim=-1)  # (K, B, k)
        votes = (nearest / self.temperature).softmax(-1)  # shares: the sum of exp cancels in a class's probability
        heads = torch.arange(len(which), device=which.device)[:, None, None]
        if "bank.numbers" in params:
            return (votes[..., None] * params["bank.numbers"][heads, which]).sum(-2)
        shares = (votes[..., None] * params["bank.labels"][heads, which]).sum(-2)  # (K, B, C)
        if "bank.known" not in params:
            return shares.clamp_min(_FLOOR).log()
        others = (votes[..., None] * params["bank.known"][heads, which]).sum(-2) - shares
        return shares.clamp_min(_FLOOR).log() - others.clamp_min(_FLOOR).log()

    def _unit(self, params: Params, x: Tensors) -> Tensor:
        ((backbone, features),) = x.items()
        return F.normalize(standardize(params, backbone, features), dim=-1)


class SolvedLinear(ClosedFormHead):
    """A head that is one linear layer on the standardized features of one backbone."""

    def apply(self, params: Params, x: Tensors, masks: Tensors | None = None) -> Tensor:
        """Logits, or numbers (K, B, C), from features (K, B, D)."""
        ((backbone, features),) = x.items()
        return affine(params, "classifier", standardize(params, backbone, features))


@dataclass(frozen=True)
class LogReg(SolvedLinear):
    """L2-regularized multinomial logistic regression by L-BFGS, its strength chosen on validation.

    On features standardized by the fold's training rows. Classes weigh alike where the training set is not balanced,
    as oversampling does for trained heads. The C with the best validation score is kept, the smaller (the stronger
    regularization) on a tie; without validation rows the one nearest to scikit-learn's 1. Each finding has a regression
    of its own, on the images of which it is known, all with one C.
    """

    Cs: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # inverse strengths to choose from
    max_iter: int = 1000  # iterations of L-BFGS at most, for each C

    name = "logreg"
    summary = "logistic regression by L-BFGS on standardized features, C chosen on validation"
    weighs = True
    fits = ("classes", "ordinal", "findings")

    def __post_init__(self) -> None:
        values = self.Cs if isinstance(self.Cs, tuple | list) else (self.Cs,)
        object.__setattr__(self, "Cs", tuple(values))
        for value in self.Cs or (None,):
            check_number("--head-option Cs", value, 1e-12, 1e12)
        check_number("--head-option max_iter", self.max_iter, 1, 100_000)

    def solve(
        self, x: Tensors, y: Tensor, x_val: Tensors | None, y_val: Tensor | None, n_classes: int, metric: str | Metric
    ) -> Solution:
        """Fit for every C and keep the best."""
        params = standard_params(x)
        labels, train = y.cpu().numpy(), standard_rows(params, x)
        present = min(len(np.unique(of[of >= 0])) for of in np.atleast_2d(labels.T))
        if present < 2 or not np.isfinite(train).all():
            raise ProtocolError(
                "logistic regression cannot be solved", code="features-not-finite" if present > 1 else "one-class",
                expected="finite features of two classes at least",
                found=f"{present} class" if present < 2 else "features not finite",
                fix=("a larger --subset", "look for features that are not finite: embcache info"),
            )  # fmt: skip
        with threads_for(train.size):
            solutions = self._findings(train, labels) if labels.ndim == 2 else self._path(train, labels, n_classes)
        if x_val is None or y_val is None or not len(y_val):
            best = min(solutions, key=lambda solution: abs(np.log(solution.C)))
        else:
            held = standard_rows(params, x_val)
            value = scorer(metric, y_val.cpu().numpy(), target_of(labels, n_classes))
            # max keeps the first of equals, and the path ascends in C
            best = max(solutions, key=lambda s: value(held @ s.weight.T + s.bias))
        chosen = {"C": best.C} if best.converged else {"C": best.C, "converged": False}
        weight, bias = (torch.from_numpy(a).float().to(y.device) for a in (best.weight, best.bias))
        return Solution({**params, "classifier.weight": weight, "classifier.bias": bias}, chosen)

    def _findings(self, x: NDArray[np.float64], y: NDArray[np.int64]) -> list[_Fit]:
        """Solutions of all findings (columns) for every C: log odds of each."""
        paths, (basis, reduced) = [], _span(x)  # one for all: it holds the rows of which any finding is known
        for values in y.T:
            known = values >= 0
            fits = self._path(reduced[known], values[known], 2, basis)
            paths.append([(f.C, f.weight[1] - f.weight[0], f.bias[1] - f.bias[0], f.converged) for f in fits])
        return [
            _Fit(each[0][0], np.stack([w for _, w, _, _ in each]), np.array([b for _, _, b, _ in each]),
                 all(converged for *_, converged in each))
            for each in zip(*paths, strict=True)
        ]  # fmt: skip

    def _path(
        self, x: NDArray[np.float64], y: NDArray[np.int64], n_classes: int, basis: NDArray[np.float64] | None = None
    ) -> list[_Fit]:
        """A solution for every C, ascending; each starts from the one before. Rows may be those of a `_span`."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        reduced = x
        if basis is None:
            basis, reduced = _span(x)
        weight = None if is_balanced(y, n_classes) else "balanced"
        model = LogisticRegression(solver="lbfgs", max_iter=self.max_iter, warm_start=True, class_weight=weight)
        found = []
        for C in sorted(set(self.Cs)):
            model.set_params(C=C)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # recorded in `chosen` instead
                model.fit(reduced, y)
            coefficients = model.coef_ if basis is None else model.coef_ @ basis.T
            weights, bias = np.zeros((n_classes, coefficients.shape[1])), np.full(n_classes, ABSENT)
            if len(model.classes_) == 2:  # scikit-learn gives the log odds of the second class
                weights[model.classes_[1]] = coefficients[0]
                bias[model.classes_] = [0.0, float(model.intercept_[0])]
            else:
                weights[model.classes_], bias[model.classes_] = coefficients, model.intercept_
            found.append(_Fit(float(C), weights, bias, int(np.max(model.n_iter_)) < self.max_iter))
        return found


def _span(x: NDArray[np.float64]) -> tuple[NDArray[np.float64] | None, NDArray[np.float64]]:
    """A basis (D, n) of the span of fewer rows than features, and the rows in it (n, n); else None and the rows.

    A solution lies in the span of the rows, so it is found among n numbers a class instead of D: the same, sooner.
    """
    if len(x) >= x.shape[1]:
        return None, x
    basis, triangle = np.linalg.qr(x.T)
    return basis, triangle.T


@dataclass(frozen=True, eq=False)
class _Fit:
    C: float
    weight: NDArray[np.float64]  # (C, D)
    bias: NDArray[np.float64]  # (C,)
    converged: bool


def is_classifier(found: object) -> bool:
    """Whether this is a scikit-learn classifier (or a pipeline, a search …), or a class of them."""
    from sklearn.base import BaseEstimator, ClassifierMixin

    return issubclass(found if isinstance(found, type) else type(found), BaseEstimator | ClassifierMixin)


@dataclass(frozen=True, eq=False)
class SklearnHead(ClosedFormHead):
    """Adapter of an estimator with ``fit`` and ``predict_proba``; ``params`` hold the number of a fitted copy.

    A fitted estimator can only be saved by pickle, which executes what it holds: a run keeps none of them.
    """

    estimator: Any
    _fitted: list[Any] = field(default_factory=list, repr=False)

    summary = "a scikit-learn classifier"
    keeps_models = False

    @classmethod
    def of(cls, found: Any, options: Mapping[str, Any]) -> SklearnHead:
        """The head of an estimator, or of a class of them, with some parameters set."""
        from sklearn.base import clone

        estimator = found() if isinstance(found, type) else clone(found)
        name = type(estimator).__name__
        if not callable(getattr(estimator, "predict_proba", None)):  # scikit-learn's contract, decided at run time
            raise UsageError(
                f"{name} predicts no probabilities", code="not-a-head",
                expected="a classifier with predict_proba", found=repr(estimator)[:80],
                fix="sklearn.calibration.CalibratedClassifierCV(estimator)",
            )  # fmt: skip
        try:
            return cls(estimator.set_params(**options))
        except ValueError as error:
            raise UsageError(
                f"{name} has no such parameter", code="unknown-hyperparameter",
                expected=", ".join(sorted(estimator.get_params(deep=False))), found=", ".join(options),
            ) from error  # fmt: skip

    @property
    def place(self) -> str:
        """``module:name`` of the estimator's class."""
        return f"{type(self.estimator).__module__}:{type(self.estimator).__qualname__}"

    def parameters(self) -> dict[str, Any]:
        """Parameters of the estimator that differ from its defaults; estimators within it by module and name."""
        found: dict[str, Any] = _describe(self.estimator)["parameters"]
        return found

    def solve(
        self, x: Tensors, y: Tensor, x_val: Tensors | None, y_val: Tensor | None, n_classes: int, metric: str | Metric
    ) -> Solution:
        """Fit a copy of the estimator on the training rows; validation rows and metric are not read."""
        from sklearn.base import clone

        (features,) = x.values()
        self._fitted.append((clone(self.estimator).fit(features.cpu().numpy(), y.cpu().numpy()), n_classes))
        return Solution({"fitted": torch.tensor(len(self._fitted) - 1)})

    def apply(self, params: Params, x: Tensors, masks: Tensors | None = None) -> Tensor:
        """Log probabilities (K, B, C) from features (K, B, D)."""
        (features,) = x.values()
        parts = []
        for number, rows in zip(params["fitted"].tolist(), features, strict=True):
            model, n_classes = self._fitted[number]
            p = np.zeros((len(rows), n_classes))
            p[:, model.classes_] = model.predict_proba(rows.cpu().numpy())
            parts.append(torch.from_numpy(np.log(np.maximum(p, _FLOOR))))
        return torch.stack(parts).to(features.device)


def _describe(value: Any) -> Any:
    """Parameters as JSON data: of an estimator its class and what differs from the defaults."""
    from sklearn.base import BaseEstimator

    if isinstance(value, list | tuple):
        return [_describe(each) for each in value]
    if not isinstance(value, BaseEstimator):
        return value
    kind, given = type(value), value.get_params(deep=False)
    try:
        usual = kind().get_params(deep=False)
    except TypeError:  # a parameter has no default
        usual = {}
    changed = {k: _describe(v) for k, v in given.items() if k not in usual or repr(v) != repr(usual[k])}
    return {"estimator": f"{kind.__module__}:{kind.__qualname__}", "parameters": changed}
