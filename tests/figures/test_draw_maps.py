"""Maps of cached embeddings: which images, which embedding, which scores, and what is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness
from sklearn.metrics import balanced_accuracy_score, silhouette_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from embcache.data.dataset import ImageDataset
from embcache.errors import StoreNotFoundError, UsageError
from embcache.figures import maps as module
from embcache.figures.maps import draw_maps, embed_map, neighbor_accuracy, score_map
from embcache.probe.probe import probe_features
from embcache.runs.folders import Result, load_heads, runs_dir
from tests.probe.build import make_dataset, make_features, put_store
from tests.refusal import refused

DIMS = {"a": 12, "b": 7}


@pytest.fixture
def ds(home: Path) -> ImageDataset:
    ds = make_dataset(np.tile([0, 1, 1], 60), split=["train"] * 120 + ["test"] * 60)
    for seed, (name, dim) in enumerate(DIMS.items()):
        put_store(home, ds, name, make_features(ds, dim, seed=seed), bad={"i179": "truncated"} if name == "b" else {})
    return ds


@pytest.fixture
def run(ds: ImageDataset, home: Path) -> Result:
    return probe_features(ds, list(DIMS), head="dvme", subset="S", folds=2, home=home, head_options={"proj_dim": 8})


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    made: list[str] = []
    real: Callable[..., np.ndarray] = module.embed_map

    def embed(features: np.ndarray, method: str, **options: float) -> np.ndarray:
        made.append(method)
        return real(features, method, **options)

    monkeypatch.setattr(module, "embed_map", embed)
    return made


def test_test_rows_that_every_store_could_read_are_shown_in_one_order(ds: ImageDataset, home: Path) -> None:
    maps = draw_maps(ds, ["a", "b"], method="pca", home=home)
    assert maps.shown.ids == [f"i{k}" for k in range(120, 179)]
    assert [panel.label for panel in maps.panels] == ["a", "b"]
    assert [panel.dim for panel in maps.panels] == [12, 7]
    for seed, panel in enumerate(maps.panels):
        x = StandardScaler().fit_transform(make_features(ds, DIMS[panel.label], seed=seed)[120:179])
        expected = PCA(2).fit_transform(x)
        signs = np.sign((expected * panel.coordinates).sum(0))
        np.testing.assert_allclose(panel.coordinates * signs, expected, atol=1e-3)
    train = draw_maps(ds, ["a"], method="pca", rows="train", home=home)
    assert set(train.shown.ids) == {f"i{k}" for k in range(120)}
    assert len(draw_maps(ds, ["a"], method="pca", rows="all", home=home).shown.ids) == 180
    few = draw_maps(ds, ["a"], method="pca", limit=20, home=home)
    assert len(few.shown.ids) == 20
    assert "20 drawn of 60 images" in few.shown.remark


def test_scores_are_scikit_learns(ds: ImageDataset, home: Path) -> None:
    (panel,) = draw_maps(ds, ["a"], home=home).panels
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
    ds: ImageDataset, run: Result, home: Path
) -> None:
    maps = draw_maps(ds, run=[run.id[:12]], method="pca", home=home)
    (panel,) = maps.panels
    assert "trained with labels" in panel.remark
    assert panel.source["run"] == run.id
    params = {n: p.double() for n, p in load_heads(runs_dir("toy", home) / run.id)[0].items()}
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
    ds: ImageDataset, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = counted(monkeypatch)
    first = draw_maps(ds, ["a"], home=home)
    assert np.array_equal(first.panels[0].coordinates, draw_maps(ds, ["a"], home=home).panels[0].coordinates)
    assert made == ["tsne"]
    draw_maps(ds, ["a"], home=home, seed=1)
    draw_maps(ds, ["a"], home=home, perplexity=5)
    draw_maps(ds, ["a"], home=home, limit=20)
    assert len(made) == 4
    for kept in (home / "toy" / "figures" / "coordinates").iterdir():
        kept.write_bytes(kept.read_bytes().replace(b"coordinates", b"coordinatez"))
    assert np.array_equal(draw_maps(ds, ["a"], home=home).panels[0].coordinates, first.panels[0].coordinates)
    assert len(made) == 5


def test_figures_are_written_in_every_format_asked_for(ds: ImageDataset, home: Path, tmp_path: Path) -> None:
    targets = [tmp_path / f"map.{suffix}" for suffix in ("png", "svg", "pdf")]
    maps = draw_maps(ds, ["a", "b"], home=home, targets=targets)
    assert list(maps.paths) == targets
    starts = [path.read_bytes()[:5] for path in targets]
    assert starts == [b"\x89PNG\r", b"<?xml", b"%PDF-"]
    with Image.open(targets[0]) as figure:
        assert figure.info["dpi"][0] == pytest.approx(300, abs=1)
    table = maps.table()
    assert list(table.columns) == ["embedding", "id", "label", "class_name", "x", "y"]
    assert len(table) == 2 * len(maps.shown.ids)


def test_what_cannot_be_shown_is_said(ds: ImageDataset, run: Result, home: Path) -> None:
    with refused(UsageError, "option-choice"):
        draw_maps(ds, ["a"], method="isomap", home=home)
    with refused(UsageError, "option-choice"):
        draw_maps(ds, ["a"], rows="val", home=home)
    with pytest.raises(StoreNotFoundError):
        draw_maps(ds, ["c"], home=home)
    other = probe_features(ds, ["a"], subset="S", folds=2, home=home)
    with refused(UsageError, "other-head"):
        draw_maps(ds, run=[other.id], home=home)
    seeded = probe_features(
        ds, list(DIMS), head="dvme", subset="S", folds=2, seed=1, home=home, head_options={"proj_dim": 8}
    )
    with refused(UsageError, "different-test-sets"):
        draw_maps(ds, run=[run.id, seeded.id], home=home)
    empty = make_dataset([0, 1] * 10, name="empty")
    with refused(StoreNotFoundError, "store-not-found"):
        draw_maps(empty, home=home)
    moved = make_dataset([0, 1] * 10, name="moved")
    with refused(UsageError, "other-dataset"):
        draw_maps(moved, run=[run.id], home=home)


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
