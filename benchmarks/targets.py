"""Heads of numbers and findings beside scikit-learn's equivalents on the same features, by processor time, in turns.

All standardize by the training rows and choose among the same strengths by the same validation rows; the last column is
the score on other rows (R², macro AUC). Features are synthetic, or those of ``embcache export FILE.npz``, whose targets
are then drawn along random directions.

    python benchmarks/targets.py [--repeats 5] [--rows 500,4173] [--features FILE.npz]
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from common import print_table
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge, RidgeCV
from sklearn.metrics import r2_score, roc_auc_score
from sklearn.multioutput import MultiOutputClassifier
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.preprocessing import StandardScaler

from embcache.probe.heads import make_head
from embcache.targets import make_target

FINDINGS, VALIDATION, TEST, DIM = 14, 500, 1000, 1280
Array = NDArray[Any]
NUMBER, SEVERAL = make_target("number", ["n"]), make_target("findings", [str(c) for c in range(FINDINGS)])


def draw(n: int, features: Array | None) -> tuple[list[Array], list[Array], list[Array]]:
    """Features, numbers and findings of training, validation and test rows."""
    rng = np.random.default_rng(0)
    x = np.abs(rng.standard_normal((n + VALIDATION + TEST, DIM), np.float32)) if features is None else features
    x = x[rng.permutation(len(x))[: n + VALIDATION + TEST]]
    z = StandardScaler().fit_transform(x.astype(np.float64))
    along = z @ rng.normal(size=(z.shape[1], 1 + FINDINGS))
    along = along / along.std(0) + 0.7 * rng.normal(size=along.shape)
    shares = np.geomspace(0.05, 0.5, FINDINGS)
    findings = (along[:, 1:] > np.quantile(along[:, 1:], 1 - shares, axis=0).diagonal()).astype(np.int64)
    ends = [n, n + VALIDATION]
    return np.split(x, ends), np.split(50 + 10 * along[:, 0], ends), np.split(findings, ends)


def standard(x: list[Array]) -> list[Array]:
    scaler = StandardScaler().fit(x[0].astype(np.float64))
    return [scaler.transform(part.astype(np.float64)) for part in x]


def ours(head: str, x: list[Array], y: list[Array]) -> Array:
    of = SEVERAL if y[0].ndim == 2 else NUMBER
    fitted = make_head(head).fit({"a": x[0]}, y[0], x_val={"a": x[1]}, y_val=y[1], target=of)
    return fitted.predict_proba({"a": x[2]})


def ridge_cv(x: list[Array], y: list[Array]) -> Array:
    z, alphas = standard(x), make_head("ridge").alphas  # type: ignore[attr-defined]
    n = len(z[0])
    split = [(np.arange(n), n + np.arange(VALIDATION))]
    found = RidgeCV(alphas, cv=split, scoring="r2").fit(np.vstack(z[:2]), np.concatenate(y[:2]))
    # RidgeCV ends by a fit to all rows; the head keeps those of training.
    return np.asarray(Ridge(found.alpha_).fit(z[0], y[0]).predict(z[2]))


def ridge_each(x: list[Array], y: list[Array]) -> Array:
    z, signs = standard(x), 2.0 * y[0] - 1
    fits = [Ridge(alpha).fit(z[0], signs) for alpha in make_head("ridge").alphas]  # type: ignore[attr-defined]
    best = max(fits, key=lambda fit: roc_auc_score(y[1], fit.predict(z[1])))
    return np.asarray(best.predict(z[2]))


def logistic_each(x: list[Array], y: list[Array]) -> Array:
    z, head = standard(x), make_head("logreg")
    fits = []
    for C in head.Cs:  # type: ignore[attr-defined]
        model = LogisticRegression(C=C, max_iter=1000, class_weight="balanced")
        fits.append(MultiOutputClassifier(model).fit(z[0], y[0]))

    def p(fit: Any, rows: Array) -> Array:
        return np.stack([each[:, 1] for each in fit.predict_proba(rows)], axis=1)

    best = max(fits, key=lambda fit: roc_auc_score(y[1], p(fit, z[1])))
    return p(best, z[2])


def neighbors(x: list[Array], y: list[Array]) -> Array:
    z = standard(x)
    options = {"metric": "cosine", "weights": lambda d: np.exp((1 - d) / 0.07)}
    if y[0].ndim == 1:
        return np.asarray(KNeighborsRegressor(20, **options).fit(z[0], y[0]).predict(z[2]))
    parts = KNeighborsClassifier(20, **options).fit(z[0], y[0]).predict_proba(z[2])
    return np.stack([part[:, 1] for part in parts], axis=1)


def score(y: Array, p: Array) -> float:
    return float(r2_score(y, p.reshape(len(y), -1)[:, 0]) if y.ndim == 1 else roc_auc_score(y, p))


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", default="500,4173")
    parser.add_argument("--features")
    asked = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    features = np.load(asked.features)["features"] if asked.features else None
    work: list[tuple[str, str, bool, str, Callable[[list[Array], list[Array]], Array]]] = [
        ("number", "ridge", False, "RidgeCV, one fold, and Ridge", ridge_cv),
        (f"{FINDINGS} findings", "ridge", True, "Ridge for each alpha", ridge_each),
        (f"{FINDINGS} findings", "logreg", True, "MultiOutputClassifier(LogisticRegression) for each C", logistic_each),
        ("number", "knn", False, "KNeighborsRegressor", neighbors),
        (f"{FINDINGS} findings", "knn", True, "KNeighborsClassifier", neighbors),
    ]
    rows = []
    for n in map(int, asked.rows.split(",")):
        x, number, findings = draw(n, features)
        for what, head, several, title, theirs in work:
            y = findings if several else number
            ours(head, x, y), theirs(x, y)  # what they import
            times: dict[str, list[float]] = {"ours": [], "theirs": []}
            for _ in range(asked.repeats):
                began = time.process_time()
                one = ours(head, x, y)
                between = time.process_time()
                other = theirs(x, y)
                times["theirs"].append(time.process_time() - between)
                times["ours"].append(between - began)
            ratio = statistics.median(t / o for o, t in zip(*times.values(), strict=True))
            rows.append([
                f"{what}, {n:,} × {x[0].shape[1]}", f"`{head}` {statistics.median(times['ours']):.2f} s",
                f"{title} {statistics.median(times['theirs']):.2f} s", f"{ratio:.1f} ×",
                f"{score(y[2], one):.4f} beside {score(y[2], other):.4f}",
            ])  # fmt: skip
            print(" ".join(rows[-1]), flush=True)
    print_table(["work", "embcache", "scikit-learn", "ratio", "score"], rows)


if __name__ == "__main__":
    main()
