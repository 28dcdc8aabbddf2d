"""The logistic regression head against scikit-learn's LogisticRegression, fit anew for every C, at equal loss.

Both standardise by the training rows and solve by L-BFGS to scikit-learn's default tolerance for the head's values of
C; the ways take turns. "Loss" is the objective, ½‖w‖² + C Σ weight · cross-entropy, at the C that is compared last.

    python benchmarks/logreg.py [--repeats 5] [--dim 1536]
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings

import numpy as np
import torch
from common import print_table
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from synthetic import PNEUMONIA

from embcache.probe.heads import make_head

SIZES = (50, 500, 4173)


def features(n: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Features that tell two classes apart about as well as real ones do; classes as unequal as pneumonia's."""
    rng = np.random.default_rng(0)
    y = (rng.random(n) < PNEUMONIA[1] / (PNEUMONIA[0] + PNEUMONIA[1])).astype(np.int64)
    x = np.abs(0.4 * rng.standard_normal((n, dim), np.float32))
    x += (0.8 * y[:, None] - 0.4) * rng.standard_normal(dim, np.float32) / np.sqrt(dim, dtype=np.float32)
    return x, y


def objective(x: np.ndarray, y: np.ndarray, weight: np.ndarray, bias: float, C: float) -> float:
    """What scikit-learn minimizes with ``class_weight="balanced"``, for weights of the second class's log odds."""
    signs = 2.0 * y - 1
    balance = len(y) / (2 * np.bincount(y))[y]
    return float(0.5 * weight @ weight + C * (balance * np.logaddexp(0, -signs * (x @ weight + bias))).sum())


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dim", type=int, default=1536)
    asked = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    head = make_head("logreg")
    rows = []
    for n in SIZES:
        x, y = features(n, asked.dim)
        ours: list[float] = []
        theirs: list[float] = []
        for _ in range(asked.repeats):
            began = time.perf_counter()
            solved = head.solve({"a": torch.from_numpy(x)}, torch.from_numpy(y), None, None, 2, "auc")  # type: ignore[attr-defined]
            ours.append(time.perf_counter() - began)
            began = time.perf_counter()
            z = StandardScaler().fit_transform(x.astype(np.float64))
            models = [
                LogisticRegression(C=C, max_iter=head.max_iter, class_weight="balanced").fit(z, y)  # type: ignore[attr-defined]
                for C in sorted(head.Cs)  # type: ignore[attr-defined]
            ]
            theirs.append(time.perf_counter() - began)
        C = solved.chosen["C"]
        (model,) = [m for m in models if m.C == C]
        weight = (solved.params["classifier.weight"][1] - solved.params["classifier.weight"][0]).double().numpy()
        bias = float(solved.params["classifier.bias"][1] - solved.params["classifier.bias"][0])
        losses = [objective(z, y, weight, bias, C), objective(z, y, model.coef_[0], float(model.intercept_[0]), C)]
        ratio = statistics.median(t / o for o, t in zip(ours, theirs, strict=True))
        rows.append(
            [
                f"logreg, {n:,} × {asked.dim}, {len(models)} values of C",
                f"{statistics.median(ours):.2f} s (loss {losses[0]:.6g} at C = {C:g})",
                f"scikit-learn {statistics.median(theirs):.2f} s (loss {losses[1]:.6g})",
                f"{ratio:.1f} × as fast",
            ]
        )
    print_table(["work", "embcache", "beside it", "ratio"], rows)


if __name__ == "__main__":
    main()
