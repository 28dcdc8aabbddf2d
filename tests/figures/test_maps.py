"""Maps of features: neighborhoods are kept, figures are drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.manifold import trustworthiness

from embcache.errors import ProtocolError
from embcache.figures.maps import embed_map
from embcache.figures.plots import Map, plot_maps
from tests.refusal import refused


def blobs(n: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), n)
    return (rng.normal(size=(3, 20))[labels] * 4 + rng.normal(size=(3 * n, 20))).astype(np.float32), labels


def test_neighborhoods_are_kept_and_the_seed_fixes_the_map() -> None:
    features, _ = blobs()
    found = embed_map(features, seed=3)
    assert found.shape == (120, 2)
    assert found.dtype == np.float32
    assert trustworthiness(features, found, n_neighbors=10) > 0.85
    assert np.array_equal(found, embed_map(features, seed=3))


def test_few_images_lower_the_perplexity_and_too_few_are_refused() -> None:
    features, _ = blobs(2)
    assert np.isfinite(embed_map(features)).all()
    with refused(ProtocolError, "too-few-images"):
        embed_map(features[:3])


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_a_figure_holds_every_panel_whatever_its_names(tmp_path: Path, suffix: str) -> None:
    features, labels = blobs(10)
    maps = [Map(f"back$bone_{i}", features[:, :2], labels) for i in range(5)]
    target = plot_maps(maps, ["a $x", "b_{2}", "<script>"], "title $", tmp_path / "deep" / f"maps.{suffix}")
    assert target.stat().st_size > 1000
    if suffix == "png":
        pixels = np.asarray(Image.open(target).convert("RGB"))
        colors = {tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in ("#0072B2", "#E69F00", "#009E73")}
        for color in colors:
            assert (np.abs(pixels.astype(int) - color).max(axis=2) < 70).any()
