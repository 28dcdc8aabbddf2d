"""Ridge, neighbors and logistic regression of every kind of target against scikit-learn; heads alone and in a stack."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier, RidgeCV
from sklearn.metrics import r2_score, roc_auc_score
from sklearn.multioutput import MultiOutputClassifier
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.preprocessing import StandardScaler

from embcache.errors import ProtocolError, UsageError
from embcache.probe.heads import check_fits, heads, make_head
from embcache.probe.heads.ridge import Ridge as RidgeHead
from embcache.probe.heads.ridge import ridge_path
from embcache.probe.heads.solved import KNN, LogReg
from embcache.probe.schedule import Schedule
from embcache.probe.stack import TrainedHead, make_job, predict_logits, train_heads
from embcache.targets import Target, make_target, targets
from tests.refusal import refused

NUMBER, FINDINGS, CLASSES = make_target("number", ["n"]), make_target("findings", "abc"), make_target("classes", "abc")
ALPHAS = RidgeHead().alphas


def draw(n: int, dim: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Features of very different sizes, a number, findings with unknown ones, and classes."""
    rng, way = np.random.default_rng(seed), np.random.default_rng(7).normal(size=(dim, 3))
    z = rng.normal(size=(n, dim))
    along = z @ way / np.sqrt(dim) + 0.7 * rng.normal(size=(n, 3))
    findings = (along > 0.3).astype(np.int64)
    findings[rng.random((n, 3)) < 0.15] = -1
    scales = np.geomspace(0.01, 100, dim)
    return (z * scales + 3 * scales).astype(np.float32), 40 + 9 * along[:, 0], findings, along.argmax(1)


def standard(x: np.ndarray, held: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scaler = StandardScaler().fit(x.astype(np.float64))
    return scaler.transform(x.astype(np.float64)), scaler.transform(held.astype(np.float64))


SIZES = [(150, 20), (40, 90)]  # more rows than features, and fewer


# --- ridge


@pytest.mark.parametrize(("n", "dim"), SIZES)
def test_ridge_is_scikit_learns_at_every_strength(n: int, dim: int) -> None:
    x, number, findings, classes = draw(n, dim)
    z, _ = standard(x, x)
    y = np.column_stack([number, np.where(findings == 1, 1.0, -1.0), 2.0 * (classes[:, None] == np.arange(3)) - 1])
    known = np.column_stack([np.ones(n, bool), findings >= 0, np.ones((n, 3), bool)])
    weights, biases = ridge_path(z, y, known, list(ALPHAS))
    for k, alpha in enumerate(ALPHAS):
        for c in range(y.shape[1]):
            theirs = Ridge(alpha=alpha, solver="svd").fit(z[known[:, c]], y[known[:, c], c])
            np.testing.assert_allclose(weights[k][:, c], theirs.coef_, rtol=1e-6, atol=1e-9)
            assert biases[k, c] == pytest.approx(theirs.intercept_, rel=1e-8)


@pytest.mark.parametrize(("n", "dim"), SIZES)
def test_ridge_chooses_its_strength_on_validation(n: int, dim: int) -> None:
    x, y, _, _ = draw(n, dim)
    held, y_held, _, _ = draw(60, dim, 1)
    fitted = make_head("ridge").fit({"a": x}, y, x_val={"a": held}, y_val=y_held, target=NUMBER)
    z, z_held = standard(x, held)
    scores = {a: r2_score(y_held, Ridge(alpha=a, solver="svd").fit(z, y).predict(z_held)) for a in ALPHAS}
    assert fitted.trained.chosen["alpha"] == max(scores, key=lambda a: scores[a])
    assert fitted.trained.val_score == pytest.approx(max(scores.values()), abs=1e-5)
    # The same rows in RidgeCV, which has one fold here: training rows train, held rows validate.
    split = [(np.arange(n), n + np.arange(60))]
    theirs = RidgeCV(ALPHAS, cv=split, scoring="r2").fit(np.vstack([z, z_held]), np.append(y, y_held))
    assert fitted.trained.chosen["alpha"] == theirs.alpha_


def test_ridge_of_classes_and_findings_ranks_as_ridge_classifier() -> None:
    x, _, findings, classes = draw(150, 20)
    held, _, _, _ = draw(60, 20, 1)
    z, z_held = standard(x, held)
    head = make_head("ridge", alphas=[3.0])
    fitted = head.fit({"a": x}, classes, target=CLASSES)
    logits = predict_logits(head, fitted.trained.params, {"a": torch.from_numpy(held)}, torch.arange(60))
    theirs = RidgeClassifier(alpha=3.0, solver="svd").fit(z, classes)
    np.testing.assert_allclose(logits, theirs.decision_function(z_held), atol=2e-5)
    whole = np.abs(findings)
    several = MultiOutputClassifier(RidgeClassifier(alpha=3.0, solver="svd")).fit(z, whole)
    fitted = head.fit({"a": x}, whole, target=FINDINGS)
    logits = predict_logits(head, fitted.trained.params, {"a": torch.from_numpy(held)}, torch.arange(60))
    for c, one in enumerate(several.estimators_):
        np.testing.assert_allclose(logits[:, c], 2 * one.decision_function(z_held), atol=5e-5)
    np.testing.assert_array_equal(fitted.predict_proba({"a": held}) > 0.5, several.predict(z_held))


def test_integers_are_numbers_where_the_target_is_one() -> None:
    x, y, _, _ = draw(80, 10)
    whole = y.round().astype(int)
    for name in ("ridge", "knn", "linear"):
        options = {"target": NUMBER, "schedule": Schedule(max_epochs=2)}
        one = make_head(name).fit({"a": x}, whole, x_val={"a": x}, y_val=y, **options).predict_proba({"a": x})
        same = make_head(name).fit({"a": x}, whole.astype(float), x_val={"a": x}, y_val=y, **options)
        np.testing.assert_array_equal(one, same.predict_proba({"a": x}))


# --- neighbors


@pytest.mark.parametrize("k", [1, 7])
def test_knn_of_numbers_and_findings_is_scikit_learns(k: int) -> None:
    x, number, findings, _ = draw(120, 40)
    held, _, _, _ = draw(50, 40, 1)
    z, z_held = standard(x, held)
    options = {"metric": "cosine", "weights": lambda d: np.exp((1 - d) / 0.07)}
    head = KNN(k=k)
    regressor = KNeighborsRegressor(k, **options).fit(z, number)
    distances, _ = regressor.kneighbors(z_held, k + 1)
    clear = distances[:, -1] - distances[:, -2] > 2e-4  # half precision may swap a neighbor for one as near
    assert clear.sum() >= 46
    found = head.fit({"a": x}, number, target=NUMBER).predict_proba({"a": held})[:, 0]
    np.testing.assert_allclose(found[clear], regressor.predict(z_held)[clear], rtol=1e-3)
    found = head.fit({"a": x}, np.abs(findings), target=FINDINGS).predict_proba({"a": held})
    for c in range(3):
        theirs = KNeighborsClassifier(k, **options).fit(z, np.abs(findings[:, c]))
        np.testing.assert_allclose(found[clear, c], theirs.predict_proba(z_held)[clear, 1], atol=1e-3)


def test_neighbors_of_which_a_finding_is_not_known_do_not_vote() -> None:
    x, _, findings, _ = draw(120, 40)
    findings[0] = -1
    z, _ = standard(x, x)
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    cosines = unit[:30] @ unit.T
    found = KNN(k=9).fit({"a": x}, findings, target=FINDINGS).predict_proba({"a": x[:30]})
    for row in range(30):
        near = np.argsort(-cosines[row])[:9]
        weights = np.exp((cosines[row, near] - 1) / 0.07)
        for c in range(3):
            known = findings[near, c] >= 0
            p = (weights * (findings[near, c] == 1))[known].sum() / weights[known].sum() if known.any() else 0.5
            assert found[row, c] == pytest.approx(p, abs=2e-3)


# --- logistic regression


@pytest.mark.parametrize(("n", "dim"), SIZES)
def test_logreg_of_findings_is_one_regression_each(n: int, dim: int) -> None:
    x, _, findings, _ = draw(n, dim)
    held, _, y_held, _ = draw(80, dim, 1)
    z, z_held = standard(x, held)
    for C in (0.01, 1.0):
        found = LogReg(Cs=(C,)).fit({"a": x}, findings, target=FINDINGS).predict_proba({"a": held})
        for c in range(3):
            known = findings[:, c] >= 0
            y = findings[known, c]
            weight = None if abs(2 * y.sum() - len(y)) <= 1 else "balanced"
            theirs = LogisticRegression(C=C, class_weight=weight, max_iter=1000, tol=1e-6).fit(z[known], y)
            np.testing.assert_allclose(found[:, c], theirs.predict_proba(z_held)[:, 1], atol=3e-3)
    fitted = make_head("logreg").fit({"a": x}, findings, x_val={"a": held}, y_val=y_held, target=FINDINGS)
    p = fitted.predict_proba({"a": held})
    each = [roc_auc_score(y_held[known, c], p[known, c]) for c in range(3) for known in [y_held[:, c] >= 0]]
    assert fitted.trained.val_score == pytest.approx(np.mean(each), abs=1e-6)


def test_logreg_is_for_no_number() -> None:
    for name in heads:
        head = make_head(name)
        for kind in targets:
            target = make_target(kind, ("0",) if kind == "number" else ("0", "1"))
            if kind in head.fits:
                check_fits(head, target)
                continue
            with refused(UsageError, "head-does-not-fit") as caught:
                check_fits(head, target)
            assert "--head ridge" in str(caught.value.fix)
    assert "number" not in make_head("logreg").fits


# --- alone and in a stack

KINDS = [
    make_target("findings", "abc", (), "bce"), make_target("findings", "abc", (), "weighted-bce"),
    make_target("number", "n", (), "squared"), make_target("number", "n", (), "huber"),
    make_target("ordinal", "012", (), "softmax"), make_target("ordinal", "012", (), "cumulative"),
]  # fmt: skip
TRAINED = [name for name in heads if isinstance(make_head(name), TrainedHead)]


@pytest.mark.parametrize("target", KINDS, ids=lambda target: f"{target.kind}-{target.loss}")
@pytest.mark.parametrize("name", TRAINED)
def test_a_head_alone_is_the_head_in_a_stack(name: str, target: Target) -> None:
    x, number, findings, classes = draw(260, 33)
    y = {"number": number, "findings": findings}.get(target.kind, classes)
    head = make_head(name, **({"proj_dim": 8} if name.startswith("dvme") else {"hidden": 8} if name == "mlp" else {}))
    features = {"a": torch.from_numpy(x)} | ({"b": torch.from_numpy(x[:, :7])} if head.fuses else {})
    rows = np.arange(260)
    jobs = [
        make_job(y, rows[rows % 5 != k][: 90 + 31 * k], rows[rows % 5 == k][: 20 + 7 * k], target, f"s{k}", lr)
        for k, lr in enumerate((1e-3, 3e-2, 1e-2, 3e-3, 1e-4))
    ]
    jobs += [make_job(y, rows[:70], rows[70:90], target, f"t{k}", 1e-2) for k in range(2)]  # the same rows
    plan, values = Schedule(max_epochs=4, min_epochs=2), torch.from_numpy(y)
    together = train_heads(head, features, values, jobs, target, target.metric, plan)
    for job, one in zip(jobs, together, strict=True):
        (alone,) = train_heads(head, features, values, [job], target, target.metric, plan)
        assert (alone.losses, alone.val_scores) == (one.losses, one.val_scores)
        assert alone.best_epoch == one.best_epoch
        assert alone.params.keys() == one.params.keys()
        assert all(torch.equal(one.params[key], value) for key, value in alone.params.items())


def test_a_finding_that_no_row_has() -> None:
    x, _, findings, _ = draw(60, 8)
    findings[:, 1] = np.minimum(findings[:, 1], 0)
    for name in ("ridge", "knn", "linear"):
        options = {"target": FINDINGS, "schedule": Schedule(max_epochs=20, min_epochs=20, lr=0.1)}
        p = make_head(name).fit({"a": x}, findings, **options).predict_proba({"a": x})
        assert (p[:, 1] < 0.4).all()
    with refused(ProtocolError, "one-class"):
        make_head("logreg").fit({"a": x}, findings, target=FINDINGS)
