"""Features that do not vary, as dead units give, change no cosine, no neighbor and no score."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.preprocessing import StandardScaler

from embcache.figures.maps import embed_map, score_map
from embcache.figures.neighbors import find_neighbors
from embcache.figures.rank import centroid_logits, nearest_neighbors
from embcache.probe.standard import standard_directions, standardized
from tests.probe.build import make_dataset, put_store


def features(images: int = 200) -> np.ndarray:
    """50 live features beside 50 constant ones, float32."""
    rng = np.random.default_rng(42)
    live = rng.normal(size=(images, 50))
    return np.hstack([live, np.tile(rng.uniform(0.1, 3, 50), (images, 1))]).astype(np.float32)


@pytest.mark.parametrize("images", [200, 2000])
def test_cosines_are_those_of_the_live_features(images: int) -> None:
    x = features(images)
    live = x[:, :50].astype(np.float64)
    right = cosine_similarity((live - live.mean(0)) / live.std(0))
    directions = standard_directions(x)
    np.testing.assert_allclose(directions @ directions.T, right, atol=1e-5)
    if images == 200:
        np.testing.assert_allclose(directions[1:4] @ directions[0], [-0.069, -0.015, 0.186], atol=5e-4)


def test_standardized_rows_are_scikit_learns() -> None:
    x, other = features(), features(2000)[200:]
    np.testing.assert_allclose(standardized(x), StandardScaler().fit_transform(x.astype(np.float64)), atol=1e-6)
    scaler = StandardScaler().fit(x.astype(np.float64))
    np.testing.assert_allclose(standardized(other, by=x), scaler.transform(other.astype(np.float64)), atol=1e-5)


def test_neighbors_as_a_user_sees_them(home: Path) -> None:
    ds = make_dataset([0, 1] * 100)
    put_store(home, ds, "dead", features())
    (found,) = find_neighbors(ds, "i0", k=199, home=home)
    cosines = {n.id: n.similarity for n in found.nearest}
    assert [cosines[f"i{k}"] for k in (1, 2, 3)] == pytest.approx([-0.069, -0.015, 0.186], abs=5e-4)


def test_constants_change_no_score() -> None:
    x, labels = features(), np.arange(200) % 2
    live = x[:, :50]
    assert set(map(frozenset, nearest_neighbors(x, 5))) == set(map(frozenset, nearest_neighbors(live, 5)))
    # Their mean is over all features, so twice as many halve it.
    alone = centroid_logits(live[:100], labels[:100], live[100:], 2)
    np.testing.assert_allclose(2 * centroid_logits(x[:100], labels[:100], x[100:], 2), alone, rtol=1e-6)
    points = embed_map(live, "pca")
    np.testing.assert_allclose(np.abs(embed_map(x, "pca")), np.abs(points), atol=1e-4)
    assert score_map(x, points, labels, range(200)) == score_map(live, points, labels, range(200))
