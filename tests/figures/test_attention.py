"""Attention: of heads against timm's layer, of runs against a transcription in float64, of one image by its formula."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.models.vision_transformer import Attention

from embcache.backbones.catalog import find_backbone, load_backbone
from embcache.backbones.transforms import choose_transform, normalize
from embcache.data.dataset import ImageDataset
from embcache.data.images import read_image
from embcache.errors import UsageError
from embcache.figures import attention as module
from embcache.figures.attention import (
    class_attention,
    draw_attention,
    image_attention,
    mass_table,
    mean_attention,
    mean_entropy,
    mean_mass,
    run_attention,
)
from embcache.figures.plots import plot_heads
from embcache.figures.shown import fold_heads
from embcache.probe.heads import make_head
from embcache.probe.probe import probe_features
from embcache.runs.folders import Result, load_heads, runs_dir
from tests.probe.build import make_dataset, make_features, put_store
from tests.refusal import refused

DIMS = {"a": 9, "b": 6}
WIDTH = 8
NAME = "timm:test_vit"


def setting(name: str, proj_dim: int = 8, n: int = 7) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    head: Any = make_head(name, proj_dim=proj_dim)
    params = head.init(torch.Generator().manual_seed(0), DIMS, 3)
    params["attn.qkv.weight"] = params["attn.qkv.weight"] * 3  # attention that is far from even
    return params, {b: torch.randn(n, d, generator=torch.Generator().manual_seed(d)) for b, d in DIMS.items()}


def timm_weights(params: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Attention weights (B, N, N) of timm's unfused path: what its dropout sees."""
    layer = Attention(tokens.shape[-1], num_heads=1, qkv_bias=True).eval()
    layer.load_state_dict({n.removeprefix("attn."): p for n, p in params.items() if n.startswith("attn.")})
    layer.fused_attn = False
    seen: list[torch.Tensor] = []
    layer.attn_drop.register_forward_hook(lambda module, given, out: seen.append(out))
    layer(tokens)
    return seen[0][:, 0].detach()


@pytest.mark.parametrize(("name", "width"), [("dvme", 1), ("dvme-token", 8)])
def test_is_the_mean_of_timms_weights(name: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    params, x = setting(name)
    meta = torch.cat([x[b] @ params[f"project.{b}.weight"].T + params[f"project.{b}.bias"] for b in DIMS], dim=1)
    expected = timm_weights(params, meta.view(7, -1, width)).mean(0)
    found = mean_attention(params, x)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
    monkeypatch.setattr(module, "_TOGETHER", 1)  # an image at a time
    np.testing.assert_allclose(mean_attention(params, x), found, rtol=1e-5)


@pytest.mark.parametrize(("name", "proj_dim"), [("dvme", 8), ("dvme", 60), ("dvme-token", 8)])
def test_mass_of_either_head_is_that_of_its_map(name: str, proj_dim: int) -> None:
    params, x = setting(name, proj_dim)
    np.testing.assert_allclose(mean_mass(params, x), mass_table(mean_attention(params, x), 2), atol=1e-5)


def test_mass_is_what_a_backbones_tokens_give_to_each_backbone() -> None:
    params, x = setting("dvme", proj_dim=4)
    weights = mean_attention(params, x)  # (8, 8)
    table = mass_table(weights, 2)
    for a in range(2):
        for b in range(2):
            block = weights[4 * a : 4 * a + 4, 4 * b : 4 * b + 4]
            assert table[a, b] == pytest.approx(block.sum(1).mean())
    np.testing.assert_allclose(table.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(mass_table(np.full((6, 6), 1 / 6), 3), 1 / 3)


def test_a_head_without_attention_or_without_images_is_refused() -> None:
    params, x = setting("dvme")
    identity: Any = make_head("dvme-identity", proj_dim=8)
    with refused(UsageError, "no-attention"):
        mean_attention(identity.init(torch.Generator().manual_seed(0), DIMS, 3), x)
    with refused(UsageError, "no-images"):
        mean_attention(params, {b: f[:0] for b, f in x.items()})
    with pytest.raises(ValueError):
        mass_table(mean_attention(params, x), 3)


@pytest.fixture(scope="module")
def ds() -> ImageDataset:
    return make_dataset(np.tile([0, 1, 1], 40), split=["train"] * 90 + ["test"] * 30)


@pytest.fixture(scope="module")
def cache(ds: ImageDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with features of two backbones."""
    home = tmp_path_factory.mktemp("attention")
    for seed, (name, dim) in enumerate(DIMS.items()):
        put_store(home, ds, name, make_features(ds, dim, seed=seed))
    return home


def probed(ds: ImageDataset, home: Path, head: str = "dvme", folds: int = 2) -> tuple[Result, Path]:
    result = probe_features(ds, list(DIMS), head=head, subset="S", folds=folds, home=home, head_options={"proj_dim": 8})
    return result, runs_dir("toy", home) / result.id


def all_weights(ds: ImageDataset, params: dict[str, torch.Tensor]) -> NDArray[np.float64]:
    """Attention weights of each test image, (30, 16, 16), as Section 3.3 writes them."""
    p = {name: value.double() for name, value in params.items()}
    parts = [
        torch.from_numpy(make_features(ds, dim, seed=seed)[90:]).double() @ p[f"project.{name}.weight"].T
        + p[f"project.{name}.bias"]
        for seed, (name, dim) in enumerate(DIMS.items())
    ]
    meta = torch.cat(parts, 1)[..., None]
    q, k = (meta * p["attn.qkv.weight"].view(3)[i] + p["attn.qkv.bias"][i] for i in (0, 1))
    return np.asarray((q @ k.transpose(1, 2)).softmax(-1).numpy())


def blocks(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    return weights.reshape(2, WIDTH, 2, WIDTH).sum(3).mean(1)


def test_averages_over_images_and_folds(ds: ImageDataset, cache: Path) -> None:
    result, folder = probed(ds, cache)
    found = run_attention(ds, result, folder, home=cache)
    each = [all_weights(ds, params) for params in load_heads(folder)]
    np.testing.assert_allclose(found.weights, np.mean([w.mean(0) for w in each], axis=0), rtol=1e-3)
    masses = np.stack([blocks(w.mean(0)) for w in each])
    np.testing.assert_allclose(found.mass, masses.mean(0), atol=1e-4)
    np.testing.assert_allclose(found.mass_std, masses.std(0, ddof=1), atol=1e-4)
    y = ds.labels[90:]
    for label, name in enumerate(ds.class_names):
        part = np.mean([blocks(w[y == label].mean(0)) for w in each], axis=0)
        np.testing.assert_allclose(found.by_class[name], part, atol=1e-4)
    entropies = [-(w * np.log(w)).sum(-1).mean() / math.log(2 * WIDTH) for w in each]
    assert found.entropy == pytest.approx(np.mean(entropies), abs=1e-4)
    assert found.entropy_std == pytest.approx(np.std(entropies, ddof=1), abs=1e-4)
    assert found.folds == 2
    shares = found.weights.mean(0)
    backbone, component, share = found.received[0]
    assert share == pytest.approx(shares.max(), rel=1e-5)
    assert list(DIMS).index(backbone) * WIDTH + component == shares.argmax()
    assert sum(s for _, _, s in found.received) <= 1 + 1e-5


@pytest.mark.parametrize("spread", [0.01, 2.0, 100.0])
def test_the_entropy_of_few_queries_is_that_of_all(spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = torch.Generator().manual_seed(0)
    tokens = 1000
    params = {
        "project.a.weight": torch.randn(tokens, 6, generator=rng), "project.a.bias": torch.zeros(tokens),
        "attn.qkv.weight": torch.tensor([[1.0], [spread], [1.0]]), "attn.qkv.bias": torch.zeros(3),
    }  # fmt: skip
    x = {"a": torch.randn(5, 6, generator=rng)}
    found = mean_entropy(params, x)
    monkeypatch.setattr(module, "_GRID", tokens)  # never fewer than tokens / 2: every query is computed
    assert found == pytest.approx(mean_entropy(params, x), abs=1e-4)


def test_one_fold_has_no_spread(ds: ImageDataset, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result, folder = probed(ds, cache)
    monkeypatch.setattr(module, "fold_heads", lambda *run: {0: fold_heads(*run)[0]})
    found = run_attention(ds, result, folder, home=cache)
    assert found.folds == 1
    assert np.isnan(found.mass_std).all()
    assert math.isnan(found.entropy_std)
    assert found.to_json()["mass_std"] == [[None, None]] * 2


def test_a_figure_is_drawn(ds: ImageDataset, cache: Path, tmp_path: Path) -> None:
    result, folder = probed(ds, cache, "dvme-token")
    found = run_attention(ds, result, folder, home=cache)
    np.testing.assert_allclose(found.mass.sum(1), 1, atol=1e-5)
    assert 0 < found.entropy <= 1
    assert draw_attention(found, True, tmp_path / "attention.png").stat().st_size > 5000


def test_heads_without_attention_and_other_datasets_are_refused(ds: ImageDataset, cache: Path) -> None:
    result, folder = probed(ds, cache, "dvme-noattn")
    with refused(UsageError, "no-attention"):
        run_attention(ds, result, folder, home=cache)
    with refused(UsageError, "other-dataset"):
        run_attention(make_dataset([0, 1] * 20, name="other"), result, folder, home=cache)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=0)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    return tmp_path / "vit.pth"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (200, 180, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def test_is_the_softmax_of_the_last_blocks_queries_and_keys(weights: Path) -> None:
    transform = choose_transform(find_backbone(NAME), None, {(200, 180)})
    loaded = load_backbone(NAME, weights=weights)
    pixels = np.random.default_rng(1).integers(0, 256, (*transform.size, 3), dtype=np.uint8)
    module = loaded.module.double()
    block = module.blocks[-1]
    seen: list[torch.Tensor] = []
    hook = block.norm1.register_forward_hook(lambda m, given, out: seen.append(out))
    with torch.no_grad():
        module(normalize(torch.from_numpy(pixels[None]), transform, "cpu").double())
        hook.remove()
        tokens = seen[-1][0]  # (T, D)
        heads, width = block.attn.num_heads, tokens.shape[1] // block.attn.num_heads
        qkv = (tokens @ block.attn.qkv.weight.T + block.attn.qkv.bias).view(len(tokens), 3, heads, width)
        q, k = (block.attn.q_norm(qkv[:, 0]), block.attn.k_norm(qkv[:, 1]))
        scores = torch.einsum("hd,thd->ht", q[0], k) / width**0.5
        expected = scores.softmax(-1)[:, module.num_prefix_tokens :]
    module.float()
    fused = block.attn.fused_attn
    found = class_attention(loaded, transform, pixels)
    assert block.attn.fused_attn == fused
    rows, columns = (side // found.patch for side in transform.size)
    assert found.heads.shape == (heads, rows, columns)
    np.testing.assert_allclose(found.heads.reshape(heads, -1), expected.numpy(), rtol=1e-3, atol=1e-6)
    assert (found.heads.sum((1, 2)) < 1).all()  # the rest goes to the class token itself


def test_an_image_file_is_seen_as_extraction_sees_it(weights: Path, image: Path, tmp_path: Path) -> None:
    found = image_attention(image, NAME, weights=weights)
    transform = choose_transform(find_backbone(NAME), None, {(180, 200)})
    assert found.pixels.shape == (*transform.size, 3)
    np.testing.assert_array_equal(found.pixels, transform.geometry(read_image(image.parent, image.name)[0]))
    target = plot_heads(found.pixels, found.heads, "title", tmp_path / "heads.png")
    with Image.open(target) as figure:
        assert figure.size[0] > 500


@pytest.mark.parametrize("name", ["random", "timm:test_resnet", "timm:mixer_s32_224"])
def test_networks_without_a_class_token_are_refused(name: str, image: Path, tmp_path: Path) -> None:
    weights = None
    if name.startswith("timm:"):
        weights = tmp_path / "weights.pth"
        torch.save(timm.create_model(name.partition(":")[2], num_classes=0).state_dict(), weights)
    with refused(UsageError, "no-class-token"):
        image_attention(image, name, weights=weights)
