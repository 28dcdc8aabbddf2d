"""Rows of catalog.toml: each can be read, and agrees with the network that its library builds without weights."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from embcache.backbones import catalog, hub, timm_models
from embcache.backbones.catalog import BACKBONES, Backbone, find_backbone, weights_status
from embcache.backbones.pooling import TOKENS
from embcache.data.published import DATASETS
from embcache.errors import WeightsError
from tests.backbones.test_catalog import RefusedError
from tests.refusal import refused

_TABLE = tomllib.loads((Path(catalog.__file__).parent / "catalog.toml").read_text("utf-8"))
ROWS = {name: row for name, row in _TABLE.items() if "model" in row}  # the others are tested in test_catalog.py
KEYS = {
    "model": str, "dim": int, "pooling": str, "parameters": int, "license": str, "gated": bool, "source": str,
    "contaminated": list, "arguments": dict,
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_row_can_be_read(name: str) -> None:
    row = ROWS[name]
    assert re.fullmatch(r"[a-z0-9][a-z0-9-]*", name)
    assert {"model", "dim", "source"} <= set(row) <= set(KEYS)
    for key, value in row.items():
        assert type(value) is KEYS[key], key
        assert value is not None
        assert value not in ("", 0, [], {}) or value is False, f"{key}: leave it out where it is not known"
    prefix, _, rest = row["model"].partition(":")
    assert prefix in ("hf", "timm", "open_clip")
    assert "@" not in rest
    assert row.get("pooling", "cls") in set(TOKENS) - {"patches"}
    assert set(row.get("contaminated", ())) <= set(DATASETS)
    assert prefix == "timm" or "arguments" not in row
    for key, value in row.get("arguments", {}).items():
        assert value in timm_models.LAYERS if key.endswith("_layer") else type(value) is not str or key == "global_pool"
    spec = BACKBONES[name]
    assert (spec.model, spec.dim, spec.gated) == (row["model"], row["dim"], row.get("gated"))
    if spec.gated:
        assert hub.page_of(spec.repository) == f"https://huggingface.co/{rest.removeprefix('hf-hub:')}"
    assert weights_status(name).startswith(("here", "not here"))


def test_no_model_has_two_rows() -> None:
    models = [(spec.repository or spec.model).lower() for spec in BACKBONES.values() if spec.model]
    assert len(models) == len(set(models)) == len(ROWS)


def close(spec: Backbone, row: Backbone) -> None:
    """The row's promises hold; its number of parameters may be as rounded by the publisher."""
    assert (spec.name, spec.dim) == (row.name, row.dim)
    assert spec.parameters == pytest.approx(row.parameters, rel=2e-3)
    assert not row.pooling or spec.pooling == row.pooling
    assert (spec.source, spec.contaminated, spec.gated) == (row.source, row.contaminated, row.gated)
    assert not row.license or spec.license == row.license


# What the configuration on the hub says beyond the arguments of the row: architecture and arguments.
_OF224: dict[str, Any] = {"img_size": 224, "pretrained_cfg_overlay": {"input_size": (3, 224, 224)}}
_VIRCHOW = {"mlp_ratio": 5.3375, "init_values": 1e-5, "global_pool": ""}
TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "uni": ("vit_large_patch16_224", {"init_values": 1.0}),
    "uni2-h": ("vit_giant_patch14_224", {}),
    "virchow": ("vit_huge_patch14_224", _VIRCHOW),
    "virchow2": ("vit_huge_patch14_224", {**_VIRCHOW, "reg_tokens": 4}),
    "h-optimus-0": ("vit_giant_patch14_reg4_dinov2", _OF224),
    "h-optimus-1": ("vit_giant_patch14_reg4_dinov2", _OF224),
    "h0-mini": ("vit_base_patch14_reg4_dinov2", {**_OF224, "mlp_ratio": 5.33334, "global_pool": ""}),
    "gigapath": ("vit_giant_patch14_dinov2", {**_OF224, "patch_size": 16}),
    "digepath": ("vit_large_patch16_224", {}),
    "mae-large": ("vit_large_patch16_224.mae", {}),
    **{name: (f"vit_{size}_patch{patch}_224", {}) for name, size, patch in (
        ("kaiko-vits8", "small", 8), ("kaiko-vits16", "small", 16), ("kaiko-vitb8", "base", 8),
        ("kaiko-vitb16", "base", 16), ("lunit-dino-s8", "small", 8), ("lunit-dino-s16", "small", 16),
    )},
    **{f"lunit-rn50-{way}": ("resnet50", {}) for way in ("bt", "mocov2", "swav")},
}  # fmt: skip


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Models of the hub are built from what `TIMM` says; the arguments of the last one are kept."""
    create, given = timm.create_model, dict[str, Any]()
    models = {BACKBONES[name].model.removeprefix("timm:").lower(): made for name, made in TIMM.items()}

    def from_hub(name: str, **arguments: Any) -> Any:
        architecture, more = models[name.lower()]
        given.clear()
        given.update(arguments)
        return create(architecture, **{**more, **arguments})

    monkeypatch.setattr(timm, "create_model", from_hub)
    monkeypatch.setattr(hub, "reach_hub", lambda *args: None)
    timm_models.describe.cache_clear()  # type: ignore[attr-defined]
    yield given
    timm_models.describe.cache_clear()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", TIMM)
def test_rows_of_timm_are_the_networks_that_it_builds(name: str, built: dict[str, Any]) -> None:
    close(find_backbone(name), BACKBONES[name])
    typed = find_backbone(BACKBONES[name].model.replace("MahmoodLab", "mahmoodlab"))
    assert typed.pooling == "timm"
    assert typed.gated == BACKBONES[name].gated
    assert typed.dim == BACKBONES[name].dim / (2 if BACKBONES[name].pooling == "cls+mean" else 1)


def test_uni2_has_the_thirteen_arguments_of_its_card(built: dict[str, Any]) -> None:
    from timm.layers import SwiGLUPacked

    find_backbone("uni2-h")
    assert given_by_card(built) == {
        "img_size": 224, "patch_size": 14, "depth": 24, "num_heads": 24, "init_values": 1e-5, "embed_dim": 1536,
        "mlp_ratio": 2.66667 * 2, "num_classes": 0, "no_embed_class": True, "mlp_layer": SwiGLUPacked,
        "act_layer": torch.nn.SiLU, "reg_tokens": 8, "dynamic_img_size": True,
    }  # fmt: skip


def given_by_card(arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key != "pretrained"}


def configs() -> dict[str, Any]:
    """Configuration of each model of transformers with a known architecture."""
    tf: Any = pytest.importorskip("transformers", reason="an extra: pip install 'embcache[hf]'")
    small, base, large = (
        {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, "intermediate_size": 4 * width}
        for width, depth, heads in ((384, 12, 6), (768, 12, 12), (1024, 24, 16))
    )
    giant = {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "use_swiglu_ffn": True}
    so400m = {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "intermediate_size": 4304}

    def dinov2(size: dict[str, Any], registers: bool = False, **more: Any) -> Any:
        make = tf.Dinov2WithRegistersConfig if registers else tf.Dinov2Config
        known = {key: value for key, value in size.items() if key != "intermediate_size"}
        return make(**{**known, "image_size": 518, "patch_size": 14, **more})

    def siglip(size: dict[str, Any], side: int, patch: int) -> Any:
        return tf.SiglipConfig(vision_config={**size, "image_size": side, "patch_size": patch}, text_config={})

    sizes = {"small": small, "base": base, "large": large, "giant": giant}
    dinov3 = {"dinov3-vits16": small, "dinov3-vitb16": base, "dinov3-vitl16": large}
    clip = {"vision_config": {**base, "patch_size": 32}, "text_config": {}}
    return {
        "rad-dino": dinov2(base),
        "phikon-v2": dinov2(large, image_size=224, patch_size=16),
        "midnight": dinov2(giant),
        **{f"dinov2-{name}": dinov2(size) for name, size in sizes.items()},
        **{f"dinov2-{name}-reg": dinov2(size, True) for name, size in sizes.items()},
        **{name: tf.DINOv3ViTConfig(**size, num_register_tokens=4, patch_size=16) for name, size in dinov3.items()},
        "medsiglip": siglip(so400m, 448, 14),
        "siglip-base": siglip(base, 224, 16),
        "siglip2-base": siglip(base, 224, 16),
        "siglip2-so400m": siglip(so400m, 384, 14),
        "plip": tf.CLIPConfig(**clip),
        "monet": tf.CLIPConfig(vision_config={**large, "patch_size": 14}, text_config={}),
        "phikon": tf.ViTConfig(),
        "mae-base": tf.ViTMAEConfig(),
    }


def test_rows_of_transformers_are_the_networks_that_it_builds(home: Path, tmp_path: Path) -> None:
    found = configs()
    processor = pytest.importorskip("transformers").ViTImageProcessor()
    for name, config in found.items():
        folder = tmp_path / "weights" / BACKBONES[name].repository
        config.save_pretrained(folder)
        processor.save_pretrained(folder)
        close(find_backbone(name), BACKBONES[name])
        assert find_backbone(BACKBONES[name].model).contaminated == BACKBONES[name].contaminated
    left = {name for name, row in BACKBONES.items() if row.model.startswith("hf:") and name not in found}
    assert left == {"rad-dino-maira-2", "xraysiglip-l16-384", "retfound-mae-meh"}  # their configurations are not known


def test_rows_of_open_clip_are_the_networks_that_it_builds() -> None:
    open_clip: Any = pytest.importorskip("open_clip", reason="an extra: pip install 'embcache[clip]'")
    towers = {"biomedclip": "", "dermlip": "ViT-B-16", "quiltnet-b32": "ViT-B-32", "quiltnet-b16": "ViT-B-16"}
    for name, row in BACKBONES.items():
        if not row.model.startswith("open_clip:") or towers.get(name) == "":
            continue
        model, _, tag = row.model.removeprefix("open_clip:").partition("/")
        config = open_clip.get_model_config(towers.get(name, model))
        with torch.device("meta"):
            tower = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"]).visual
        assert sum(parameter.numel() for parameter in tower.parameters()) == row.parameters
        assert tower.output_dim == row.dim
        if name not in towers:
            published = open_clip.get_pretrained_cfg(model, tag)
            assert published.get("quick_gelu", False) == config.get("quick_gelu", False)  # else features are others


def test_facts_of_a_row_hold_for_its_model_whatever_loads_it(built: dict[str, Any]) -> None:
    row = BACKBONES["rad-dino"]
    assert catalog.row_of("hf:microsoft/rad-dino") is row
    assert catalog.row_of("timm:hf-hub:Microsoft/RAD-DINO@main") is row
    assert catalog.row_of("timm:vit_large_patch16_224.mae") is BACKBONES["mae-large"]
    assert catalog.row_of("hf:someone/rad-dino") is None
    assert catalog.row_of("random:1") is None


@pytest.mark.parametrize("name", ["uni2-h", "medsiglip"])
def test_a_refusal_of_gated_weights_names_the_page(name: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*args: object, **more: object) -> None:
        raise RefusedError

    if name == "medsiglip":
        pytest.importorskip("transformers", reason="an extra: pip install 'embcache[hf]'")
    timm_models.describe.cache_clear()  # type: ignore[attr-defined]
    monkeypatch.setattr(hub, "reach_hub", lambda *args: None)
    monkeypatch.setattr(timm, "create_model", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with refused(WeightsError, "weights-gated") as caught:
        find_backbone(name)
    page = hub.page_of(BACKBONES[name].repository)
    assert caught.value.where == page
    assert page in (caught.value.fix or "")
    assert "hf auth login" in (caught.value.fix or "")
