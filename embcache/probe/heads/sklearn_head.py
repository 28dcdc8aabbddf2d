"""A scikit-learn classifier as a head: fitted per fold, kept in memory alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, clone

from embcache.errors import UsageError
from embcache.probe.metrics import Metric
from embcache.probe.stack import ClosedFormHead, Solution
from embcache.probe.standard import Params

_FLOOR = 1e-12  # of a probability, so that its logarithm is finite


def is_classifier(found: object) -> bool:
    """Whether this is a scikit-learn classifier (or a pipeline, a search …), or a class of them."""
    kind = found if isinstance(found, type) else type(found)
    return issubclass(kind, BaseEstimator | ClassifierMixin)


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
        estimator = found() if isinstance(found, type) else clone(found)
        if not callable(getattr(estimator, "predict_proba", None)):  # scikit-learn's contract, decided at run time
            raise UsageError(
                f"{type(estimator).__name__} predicts no probabilities", code="not-a-head",
                expected="a classifier with predict_proba", found=repr(estimator)[:80],
                fix="sklearn.calibration.CalibratedClassifierCV(estimator)",
            )  # fmt: skip
        try:
            return cls(estimator.set_params(**options))
        except ValueError as error:
            raise UsageError(
                f"{type(estimator).__name__} has no such parameter", code="unknown-hyperparameter",
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
        self,
        x: Mapping[str, torch.Tensor],
        y: torch.Tensor,
        x_val: Mapping[str, torch.Tensor] | None,
        y_val: torch.Tensor | None,
        n_classes: int,
        metric: str | Metric,
    ) -> Solution:
        """Fit a copy of the estimator on the training rows; validation rows and metric are not read."""
        (features,) = x.values()
        self._fitted.append((clone(self.estimator).fit(features.cpu().numpy(), y.cpu().numpy()), n_classes))
        return Solution({"fitted": torch.tensor(len(self._fitted) - 1)})

    def apply(
        self, params: Params, x: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
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
    if isinstance(value, list | tuple):
        return [_describe(each) for each in value]
    if not isinstance(value, BaseEstimator):
        return value
    kind = type(value)
    given = value.get_params(deep=False)
    try:
        usual = kind().get_params(deep=False)
    except TypeError:  # a parameter has no default
        usual = {}
    changed = {k: _describe(v) for k, v in given.items() if k not in usual or repr(v) != repr(usual[k])}
    return {"estimator": f"{kind.__module__}:{kind.__qualname__}", "parameters": changed}
