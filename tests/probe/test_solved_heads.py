"""knn and logreg against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from embcache.errors import ProtocolError
from embcache.probe.heads import make_head
from embcache.probe.heads.solved import LogReg
from embcache.probe.layers import standard_params


def draw(n: int, dim: int, n_classes: int, seed: int, *, rare: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = np.arange(n) % n_classes
    if rare:
        y[rng.random(n) < 0.6] = 0
    centres = np.random.default_rng(7).normal(size=(n_classes, dim)) * 0.5
    scales = np.geomspace(0.01, 100, dim)  # features of very different sizes, as embeddings have
    return ((rng.normal(size=(n, dim)) + centres[y]) * scales + 3 * scales).astype(np.float32), y


@pytest.mark.parametrize(("n_classes", "k", "temperature"), [(2, 20, 0.07), (4, 1, 0.07), (4, 5, 1.0)])
def test_knn_is_scikit_learns_with_dinos_weights(n_classes: int, k: int, temperature: float) -> None:
    x, y = draw(120, 40, n_classes, 0)
    held, _ = draw(50, 40, n_classes, 1)
    p = make_head("knn", k=k, temperature=temperature).fit({"a": x}, y).predict_proba({"a": held})
    scaler = StandardScaler().fit(x.astype(np.float64))
    theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / temperature))
    theirs.fit(scaler.transform(x), y)
    queries = scaler.transform(held.astype(np.float64))
    distances, _ = theirs.kneighbors(queries, k + 1)
    clear = distances[:, -1] - distances[:, -2] > 2e-4  # half precision may swap a neighbor for one as near
    assert clear.sum() >= 48
    np.testing.assert_allclose(p[clear], theirs.predict_proba(queries)[clear], atol=1e-3)


def test_knn_does_not_weigh_classes() -> None:
    x = np.random.default_rng(0).normal(size=(200, 3000)).astype(np.float32)  # all nearly orthogonal, none informative
    y = (np.arange(200) % 10 == 0).astype(np.int64)
    p = make_head("knn", k=200, temperature=1.0).fit({"a": x}, y).predict_proba({"a": x[:5] * 0 + 1})
    np.testing.assert_allclose(p[:, 1], 0.1, atol=0.02)


def test_half_precision_of_the_bank_moves_no_cosine_that_matters() -> None:
    x, y = draw(300, 500, 2, 3)
    solved = make_head("knn").solve({"a": torch.from_numpy(x)}, torch.from_numpy(y), None, None, 2, "auc")  # type: ignore[attr-defined]
    bank = solved.params["bank.features"]
    assert bank.dtype == torch.float16
    exact = StandardScaler().fit_transform(x.astype(np.float64))
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    assert np.abs(bank.double().numpy() @ exact.T - exact @ exact.T).max() < 2e-4


@pytest.mark.parametrize(("n", "n_classes", "rare"), [(200, 2, True), (200, 3, False), (36, 3, True)])
def test_logreg_is_scikit_learns_at_the_c_that_validates_best(n: int, n_classes: int, rare: bool) -> None:
    x, y = draw(n, 60, n_classes, 0, rare=rare)
    held, y_held = draw(90, 60, n_classes, 1)
    fitted = make_head("logreg").fit({"a": x}, y, x_val={"a": held}, y_val=y_held)
    scaler = StandardScaler().fit(x.astype(np.float64))
    train, val = scaler.transform(x), scaler.transform(held.astype(np.float64))
    found = {}
    for c in LogReg().Cs:
        model = LogisticRegression(C=c, class_weight="balanced", max_iter=10_000, tol=1e-8).fit(train, y)
        p = model.predict_proba(val)
        one_vs_rest = [roc_auc_score(y_held == k, p[:, k]) for k in range(n_classes)]
        found[c] = (np.mean(one_vs_rest), p)
    chosen = fitted.trained.chosen["C"]
    best = max(score for score, _ in found.values())
    assert found[chosen][0] == pytest.approx(best, abs=2e-3)
    np.testing.assert_allclose(fitted.predict_proba({"a": held}), found[chosen][1], atol=5e-3)
    assert fitted.trained.val_score == pytest.approx(best, abs=2e-3)


def test_logreg_prefers_the_stronger_regularisation_of_equals() -> None:
    rng = np.random.default_rng(0)
    y = np.arange(40) % 2
    x = (rng.normal(size=(40, 5)) * 0.01 + y[:, None]).astype(np.float32)  # every C tells these apart
    fitted = make_head("logreg").fit({"a": x}, y, x_val={"a": x}, y_val=y)
    assert fitted.trained.chosen == {"C": min(LogReg().Cs)}
    assert make_head("logreg", Cs=[5.0, 0.5]).fit({"a": x}, y, x_val={"a": x}, y_val=y).trained.chosen == {"C": 0.5}


def test_logreg_without_validation_takes_the_usual_c() -> None:
    x, y = draw(40, 10, 2, 0)
    assert make_head("logreg").fit({"a": x}, y).trained.chosen == {"C": 1.0}


def test_logreg_says_where_it_did_not_converge() -> None:
    x, y = draw(200, 30, 3, 0)
    assert make_head("logreg", Cs=10.0, max_iter=2).fit({"a": x}, y).trained.chosen == {"C": 10.0, "converged": False}


def test_logreg_of_one_class_is_refused() -> None:
    x, _ = draw(10, 4, 2, 0)
    with pytest.raises(ProtocolError, match="cannot be solved"):
        make_head("logreg").fit({"a": x}, np.zeros(10, int))


def test_standardisation_is_scikit_learns_and_constant_features_stay() -> None:
    x, _ = draw(50, 8, 2, 0)
    x[:, 3] = 0.1
    x[:, 5] = 0.0
    params = standard_params({"a": torch.from_numpy(x)})
    scaler = StandardScaler().fit(x.astype(np.float64))
    np.testing.assert_allclose(params["standard.a.mean"].numpy(), scaler.mean_, rtol=1e-6)
    np.testing.assert_allclose(params["standard.a.scale"].numpy(), scaler.scale_, rtol=1e-6)
    assert params["standard.a.scale"][[3, 5]].tolist() == [1.0, 1.0]
