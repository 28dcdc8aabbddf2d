"""CKA against its definition on kernel matrices, mutual neighbors against scikit-learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

from embcache.config import DatasetRef
from embcache.errors import UsageError
from embcache.figures import shown as module
from embcache.figures.rank import (
    linear_cka,
    nearest_neighbors,
    shared_neighbors,
    similarity,
)
from tests.probe.build import make_dataset, make_features, put_store
from tests.refusal import refused


def embeddings(n: int, d: int, e: int, *, related: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, d)) * np.geomspace(0.1, 10, d) + 5
    y = related * x @ rng.normal(size=(d, e)) + rng.normal(size=(n, e)) * 20
    return x.astype(np.float32), y.astype(np.float32)


def kernel_hsic(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """Gretton et al. (2005): tr(KHLH) with the centring matrix H."""
    n = len(k)
    centring = np.eye(n) - np.ones((n, n)) / n
    return float(np.trace(k @ centring @ l @ centring))


def unbiased_hsic(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """Song et al. (2012), equation 5."""
    n, ones = len(k), np.ones(len(k))
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
    middle = (ones @ k @ ones) * (ones @ l @ ones) / ((n - 1) * (n - 2))
    return float((np.trace(k @ l) + middle - 2 / (n - 2) * ones @ k @ l @ ones) / (n * (n - 3)))


@pytest.mark.parametrize("related", [0.0, 1.0])
@pytest.mark.parametrize(("n", "d", "e"), [(60, 8, 5), (20, 40, 30), (30, 5, 50)])
def test_cka_is_its_definition_on_kernels(n: int, d: int, e: int, related: float) -> None:
    x, y = embeddings(n, d, e, related=related)
    k, l = (f.astype(np.float64) @ f.astype(np.float64).T for f in (x, y))  # noqa: E741
    for debiased, hsic in ((False, kernel_hsic), (True, unbiased_hsic)):
        expected = hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l))
        assert linear_cka(x, y, debiased=debiased) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_cka_ignores_rotation_scale_and_shift() -> None:
    x, _ = embeddings(50, 10, 10, related=1)
    rotation, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(10, 10)))
    for debiased in (False, True):
        assert linear_cka(x, 3 * x @ rotation + 7, debiased=debiased) == pytest.approx(1)


def test_debiased_cka_of_unrelated_wide_embeddings_is_near_zero() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(100, 400)), rng.normal(size=(100, 400))
    assert abs(linear_cka(x, y)) < 0.02
    assert linear_cka(x, y, debiased=False) > 0.7  # what it would be without


def test_cka_of_what_does_not_vary_is_not_a_number() -> None:
    assert np.isnan(linear_cka(np.ones((10, 3)), np.arange(30.0).reshape(10, 3) ** 2))


def test_neighbors_are_scikit_learns() -> None:
    x, y = embeddings(80, 12, 9, related=1)
    found = []
    for f in (x, y):
        theirs = NearestNeighbors(n_neighbors=6, metric="cosine").fit(StandardScaler().fit_transform(f))
        expected = theirs.kneighbors(return_distance=False)
        mine = nearest_neighbors(f, 6)
        assert [set(row) for row in mine.tolist()] == [set(row) for row in expected.tolist()]
        found.append(expected)
    overlap = np.mean([len(set(a) & set(b)) / 6 for a, b in zip(*found, strict=True)])
    assert shared_neighbors(nearest_neighbors(x, 6), nearest_neighbors(y, 6)) == pytest.approx(overlap)


def test_compares_all_cached_backbones_on_training_images(home: Path) -> None:
    ds = make_dataset([0, 1] * 60, split=["train"] * 100 + ["test"] * 20)
    x = make_features(ds, 16)
    spoiled = x.copy()
    spoiled[100:] = 1e6  # test rows must not matter
    put_store(home, ds, "one", x)
    put_store(home, ds, "twin", spoiled * 2)
    put_store(home, ds, "other", make_features(ds, 12, shift=0, seed=5))
    found = similarity(ds, home=home)
    assert found.backbones == ("one", "other", "twin")
    assert found.n == 100
    assert found.cka[0, 2] == pytest.approx(1)
    assert found.neighbors[0, 2] == 1
    assert abs(found.cka[0, 1]) < 0.2
    for matrix in (found.cka, found.cka_biased, found.neighbors):
        np.testing.assert_allclose(np.diag(matrix), 1)
        np.testing.assert_array_equal(matrix, matrix.T)
    assert similarity(ds, ["twin", "one"], home=home).backbones == ("twin", "one")


def test_draws_images_where_there_are_many(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 50)
    ds = make_dataset([0, 1] * 60, split=["train"] * 100 + ["test"] * 20)
    for name in ("one", "two"):
        put_store(home, ds, name, make_features(ds, 8))
    found = similarity(ds, home=home)
    assert found.n == 50
    assert any("50 of 100 training images" in note for note in found.notes)


def test_one_backbone_is_refused_and_datasets_with_one_are_left_out(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    several, single = (make_dataset([0, 1] * 60, name=name) for name in ("several", "single"))
    for name in ("one", "two"):
        put_store(home, several, name, make_features(several, 8))
    put_store(home, single, "one", make_features(single, 8))
    with refused(UsageError, "too-few-backbones"):
        similarity(single, home=home)
    caplog.set_level("INFO", "embcache")
    (found,) = module.open_datasets([], DatasetRef(), home, several=True)
    assert found.name == "several"
    assert caplog.messages == ["single left out: fewer than two backbones cached"]
