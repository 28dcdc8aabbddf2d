"""Maps of cached embeddings: which images, which embedding, which scores, and what is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness
from sklearn.metrics import balanced_accuracy_score, silhouette_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from embcache.data.dataset import ImageDataset
from embcache.errors import ProtocolError, StoreNotFoundError, UsageError
from embcache.figures import maps as module
from embcache.figures.maps import cached_map, draw_maps, embed_map, neighbor_accuracy, score_map
from embcache.probe.probe import probe_features
from embcache.runs.folders import Result, load_heads, runs_dir
from tests.probe.build import make_dataset, make_features, put_store
from tests.refusal import refused

DIMS = {"a": 12, "b": 7}


@pytest.fixture(scope="module")
def ds() -> ImageDataset:
    return make_dataset(np.tile([0, 1, 1], 60), split=["train"] * 120 + ["test"] * 60)


@pytest.fixture(scope="module")
def cache(ds: ImageDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with features of two backbones, one of which could not read an image."""
    home = tmp_path_factory.mktemp("maps")
    for seed, (name, dim) in enumerate(DIMS.items()):
        put_store(home, ds, name, make_features(ds, dim, seed=seed), bad={"i179": "truncated"} if name == "b" else {})
    return home


@pytest.fixture(scope="module")
def run(ds: ImageDataset, cache: Path) -> Result:
    return probe_features(ds, list(DIMS), head="dvme", subset="S", folds=2, home=cache, head_options={"proj_dim": 8})


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    made: list[str] = []
    real: Callable[..., np.ndarray] = module.embed_map

    def embed(features: np.ndarray, method: str, **options: float) -> np.ndarray:
        made.append(method)
        return real(features, method, **options)

    monkeypatch.setattr(module, "embed_map", embed)
    return made


def test_test_rows_that_every_store_could_read_are_shown_in_one_order(ds: ImageDataset, cache: Path) -> None:
    maps = draw_maps(ds, ["a", "b"], method="pca", home=cache)
    assert maps.shown.ids == [f"i{k}" for k in range(120, 179)]
    assert [panel.label for panel in maps.panels] == ["a", "b"]
    assert [panel.dim for panel in maps.panels] == [12, 7]
    for seed, panel in enumerate(maps.panels):
        x = StandardScaler().fit_transform(make_features(ds, DIMS[panel.label], seed=seed)[120:179])
        expected = PCA(2).fit_transform(x)
        signs = np.sign((expected * panel.coordinates).sum(0))
        np.testing.assert_allclose(panel.coordinates * signs, expected, atol=1e-3)
    train = draw_maps(ds, ["a"], method="pca", rows="train", home=cache)
    assert set(train.shown.ids) == {f"i{k}" for k in range(120)}
    assert len(draw_maps(ds, ["a"], method="pca", rows="all", home=cache).shown.ids) == 180
    few = draw_maps(ds, ["a"], method="pca", limit=20, home=cache)
    assert len(few.shown.ids) == 20
    assert "20 drawn of 60 images" in few.shown.remark


def test_scores_are_scikit_learns(ds: ImageDataset, cache: Path) -> None:
    (panel,) = draw_maps(ds, ["a"], home=cache).panels
    x = StandardScaler().fit_transform(make_features(ds, 12)[120:])
    y = ds.labels[120:]
    assert panel.scores.silhouette == pytest.approx(silhouette_score(x, y), abs=1e-5)
    assert panel.scores.trustworthiness == pytest.approx(trustworthiness(x, panel.coordinates, n_neighbors=10))
    # Odd, so that no vote of two classes is a tie.
    voted = [
        KNeighborsClassifier(9, algorithm="brute").fit(np.delete(x, i, 0), np.delete(y, i)).predict(x[i : i + 1])[0]
        for i in range(len(x))
    ]
    assert neighbor_accuracy(make_features(ds, 12)[120:], y, range(60), 9) == pytest.approx(
        balanced_accuracy_score(y, voted)
    )


def test_a_single_class_has_no_silhouette() -> None:
    x = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    scores = score_map(x, x[:, :2], np.zeros(12, dtype=np.int64), range(12))
    assert scores.silhouette is None
    assert scores.knn_accuracy == 1.0


def grouped(n: int = 240, classes: int = 2) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images that are nearest to those of their own patient; a patient's class is random."""
    rng = np.random.default_rng(3)
    patient = np.arange(n) // 8
    x = rng.normal(size=(n // 8, 16))[patient] + 0.2 * rng.normal(size=(n, 16))
    return x.astype(np.float32), rng.integers(0, classes, n // 8)[patient], [f"patient {p}" for p in patient]


@pytest.mark.parametrize("classes", [2, 3])
def test_a_patients_own_images_are_no_neighbors(classes: int) -> None:
    x, y, groups = grouped(classes=classes)
    z = StandardScaler().fit_transform(x.astype(np.float64))
    distances = np.linalg.norm(z[:, None] - z[None], axis=2)
    silhouettes, right = [], []
    for i in range(len(x)):
        others = np.array([group != groups[i] for group in groups])
        means = [distances[i, others & (y == c)].mean() for c in range(classes)]
        a, b = means[y[i]], min(mean for c, mean in enumerate(means) if c != y[i])
        silhouettes.append((b - a) / max(a, b))
        near = y[others][np.argsort(distances[i, others])[:9]]
        right.append(np.bincount(near, minlength=classes) @ np.eye(classes)[y[i]] == np.bincount(near).max())
    scores = score_map(x, x[:, :2], y, groups)
    assert scores.silhouette == pytest.approx(np.mean(silhouettes), abs=1e-5)
    if classes == 2:  # nine votes of two classes are no tie
        expected = np.mean([np.array(right)[y == c].mean() for c in range(2)])
        assert neighbor_accuracy(x, y, groups, 9) == pytest.approx(expected)
        alone = neighbor_accuracy(x, y, range(len(x)), 9)
        assert alone is not None
        assert alone > expected + 0.2
        assert silhouette_score(z, y) > np.mean(silhouettes)


def test_groups_that_hold_a_class_alone_or_everything() -> None:
    x, y, _ = grouped(40)
    assert score_map(x, x[:, :2], y, ["one"] * 40).knn_accuracy is None
    assert score_map(x, x[:, :2], y, ["one"] * 40).silhouette is None
    assert neighbor_accuracy(x, np.arange(40) // 20, ["ab"[i // 20] for i in range(40)]) == 0.0


def test_a_fused_embedding_is_the_heads_hidden_layer_and_says_that_it_saw_labels(
    ds: ImageDataset, run: Result, cache: Path
) -> None:
    maps = draw_maps(ds, run=[run.id[:12]], method="pca", home=cache)
    (panel,) = maps.panels
    assert "trained with labels" in panel.remark
    assert panel.source["run"] == run.id
    params = {n: p.double() for n, p in load_heads(runs_dir("toy", cache) / run.id)[0].items()}
    parts = []
    for seed, (name, dim) in enumerate(DIMS.items()):
        x = torch.from_numpy(make_features(ds, dim, seed=seed)[120:179]).double()
        parts.append(x @ params[f"project.{name}.weight"].T + params[f"project.{name}.bias"])
    meta = torch.cat(parts, 1)
    # Sections 3.2, 3.3: every component is a token of width 1; attention, layer norm, projection, ReLU.
    qkv = meta[..., None] * params["attn.qkv.weight"].view(3) + params["attn.qkv.bias"]
    q, k, v = qkv.unbind(-1)
    mixed = (q[:, :, None] * k[:, None]).softmax(-1) @ v[..., None]
    mixed = mixed[..., 0] * params["attn.proj.weight"].item() + params["attn.proj.bias"].item()
    normed = torch.nn.functional.layer_norm(
        mixed, mixed.shape[1:], params["normlayer.weight"], params["normlayer.bias"], 1e-5
    )
    hidden = (normed @ params["proj_head.weight"].T + params["proj_head.bias"]).relu().numpy()
    expected = PCA(2).fit_transform(StandardScaler().fit_transform(hidden))
    signs = np.sign((expected * panel.coordinates).sum(0))
    np.testing.assert_allclose(panel.coordinates * signs, expected, atol=1e-2)


def test_coordinates_are_kept_and_made_anew_when_something_differs(
    ds: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = counted(monkeypatch)
    x, ids = make_features(ds, 12), ds.table["id"].tolist()

    def cached(n: int = 60, seed: int = 0, perplexity: float = 10) -> NDArray[np.float32]:
        return cached_map(tmp_path, {}, ids[:n], x[:n], "tsne", seed=seed, perplexity=perplexity)

    first = cached()
    assert np.array_equal(first, cached())
    assert made == ["tsne"]
    for other in ({"seed": 1}, {"perplexity": 5}, {"n": 20}):
        cached(**other)
    assert len(made) == 4
    for kept in tmp_path.iterdir():
        kept.write_bytes(kept.read_bytes().replace(b"coordinates", b"coordinatez"))
    assert np.array_equal(cached(), first)
    assert len(made) == 5


def test_figures_are_written_in_every_format_asked_for(ds: ImageDataset, cache: Path, tmp_path: Path) -> None:
    targets = [tmp_path / "deep" / f"map.{suffix}" for suffix in ("png", "svg", "pdf")]
    maps = draw_maps(ds, ["a", "b"], method="pca", limit=20, home=cache, targets=targets)
    assert list(maps.paths) == targets
    starts = [path.read_bytes()[:5] for path in targets]
    assert starts == [b"\x89PNG\r", b"<?xml", b"%PDF-"]
    with Image.open(targets[0]) as figure:
        assert figure.info["dpi"][0] == pytest.approx(300, abs=1)
        pixels = np.asarray(figure.convert("RGB")).astype(int)
    for color in ((0, 0x72, 0xB2), (0xE6, 0x9F, 0)):  # of the two classes
        assert (np.abs(pixels - color).max(axis=2) < 70).any()
    table = maps.table()
    assert list(table.columns) == ["embedding", "id", "label", "class_name", "x", "y"]
    assert len(table) == 2 * len(maps.shown.ids)


def test_what_cannot_be_shown_is_said(ds: ImageDataset, run: Result, cache: Path) -> None:
    with refused(UsageError, "option-choice"):
        draw_maps(ds, ["a"], method="isomap", home=cache)
    with refused(UsageError, "option-choice"):
        draw_maps(ds, ["a"], rows="val", home=cache)
    with pytest.raises(StoreNotFoundError):
        draw_maps(ds, ["c"], home=cache)
    other = probe_features(ds, ["a"], subset="S", folds=2, home=cache)
    with refused(UsageError, "other-head"):
        draw_maps(ds, run=[other.id], home=cache)
    seeded = probe_features(
        ds, list(DIMS), head="dvme", subset="S", folds=2, seed=1, home=cache, head_options={"proj_dim": 8}
    )
    with refused(UsageError, "different-test-sets"):
        draw_maps(ds, run=[run.id, seeded.id], home=cache)
    empty = make_dataset([0, 1] * 10, name="empty")
    with refused(StoreNotFoundError, "store-not-found"):
        draw_maps(empty, home=cache)
    moved = make_dataset([0, 1] * 10, name="moved")
    with refused(UsageError, "other-dataset"):
        draw_maps(moved, run=[run.id], home=cache)


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


def test_umap_is_asked_for_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "umap", None)
    with refused(UsageError, "missing-package"):
        embed_map(np.random.default_rng(0).normal(size=(20, 5)), "umap")


def test_umap_maps_where_it_is_installed() -> None:
    pytest.importorskip("umap")
    x = np.concatenate([np.random.default_rng(c).normal(8 * c, size=(30, 6)) for c in range(2)])
    found = embed_map(x, "umap", seed=2)
    assert found.shape == (60, 2)
    assert np.array_equal(found, embed_map(x, "umap", seed=2))
    assert trustworthiness(x, found, n_neighbors=5) > 0.8
