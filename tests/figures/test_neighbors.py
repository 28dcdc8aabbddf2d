"""Nearest neighbors in cached features; those that do not vary, as dead units give, change no cosine and no score."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.preprocessing import StandardScaler

from embcache.data.dataset import ImageDataset, load_dataset
from embcache.errors import UsageError
from embcache.figures.maps import embed_map, score_map
from embcache.figures.neighbors import draw_neighbors, find_neighbors, thumbnail
from embcache.figures.rank import centroid_logits, nearest_neighbors
from embcache.probe.layers import standard_directions, standardized
from tests.extract.conftest import draw
from tests.probe.build import make_dataset, make_features, put_store
from tests.refusal import refused


@pytest.fixture
def ds(home: Path) -> ImageDataset:
    ds = make_dataset([0, 1, 1, -1] * 10, split=["train"] * 30 + ["test"] * 10, n_classes=2)
    put_store(home, ds, "a", make_features(ds, 6), bad={"i3": "empty file"})
    put_store(home, ds, "b", make_features(ds, 4, seed=1))
    return ds


def test_neighbors_are_those_of_scikit_learns_cosine(ds: ImageDataset, home: Path) -> None:
    (found,) = find_neighbors(ds, "i7", ["a"], k=5, home=home)
    kept = [i for i in range(40) if i != 3]  # the quarantined image is not a neighbor
    x = StandardScaler().fit_transform(make_features(ds, 6)[kept].astype(np.float64))
    similar = cosine_similarity(x)[kept.index(7)]
    order = [kept[i] for i in np.argsort(-similar) if kept[i] != 7][:5]
    assert [n.id for n in found.nearest] == [f"i{i}" for i in order]
    np.testing.assert_allclose([n.similarity for n in found.nearest], np.sort(similar)[::-1][1:6], atol=1e-5)
    assert [n.label for n in found.nearest] == ds.labels[order].tolist()
    assert found.image.id == "i7"


def test_every_cached_backbone_and_no_more_neighbors_than_images(ds: ImageDataset, home: Path) -> None:
    found = find_neighbors(ds, "i0", k=1000, home=home)
    assert [(f.backbone, len(f.nearest)) for f in found] == [("a", 38), ("b", 39)]


def test_the_unique_end_of_an_id_will_do(ds: ImageDataset, home: Path) -> None:
    assert find_neighbors(ds, "12", ["b"], home=home)[0].image.id == "i12"
    for name in ("2", "nothing", ""):
        with refused(UsageError, "unknown-image"):
            find_neighbors(ds, name, ["b"], home=home)
    with refused(UsageError, "image-without-features"):
        find_neighbors(ds, "i3", ["a"], home=home)
    with refused(UsageError, "option-bounds"):
        find_neighbors(ds, "i0", ["a"], k=0, home=home)


def test_a_sheet_shows_what_is_there(home: Path, tmp_path: Path) -> None:
    for index in range(6):
        draw(tmp_path / "images" / "ab"[index % 2] / f"{index}.png", index)
    ds = load_dataset("folder", tmp_path / "images")
    put_store(home, ds, "a", make_features(ds, 5))
    (tmp_path / "images" / "b" / "5.png").write_bytes(b"no longer an image")
    found = find_neighbors(ds, "0.png", home=home)
    assert draw_neighbors(ds, found, tmp_path / "sheet.png").stat().st_size > 3000
    seen = thumbnail(ds, found[0].image.id, side=16)
    assert seen is not None
    assert max(seen.shape[:2]) == 16
    gone = next(id_ for id_ in ds.table["id"] if id_.endswith("5.png"))
    assert thumbnail(ds, gone) is None


def features(images: int = 200) -> np.ndarray:
    """50 live features beside 50 constant ones, float32."""
    rng = np.random.default_rng(42)
    live = rng.normal(size=(images, 50))
    return np.hstack([live, np.tile(rng.uniform(0.1, 3, 50), (images, 1))]).astype(np.float32)


def test_cosines_are_those_of_the_live_features() -> None:
    x = features()
    live = x[:, :50].astype(np.float64)
    right = cosine_similarity((live - live.mean(0)) / live.std(0))
    directions = standard_directions(x)
    np.testing.assert_allclose(directions @ directions.T, right, atol=1e-5)
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
