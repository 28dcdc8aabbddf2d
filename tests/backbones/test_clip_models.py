"""Image towers of open_clip: features and pixels are the library's own, from a folder as from a copy, without texts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants as hub_constants
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from embcache.backbones import clip_models
from embcache.backbones.catalog import find_backbone, load_backbone, repool, weights_status
from embcache.backbones.transforms import choose_transform, normalize
from embcache.data.dataset import load_dataset
from embcache.errors import UsageError, WeightsError
from embcache.extract.extract import extract_features
from embcache.extract.recipes import recipe_network
from embcache.maintain.listing import dry_run
from embcache.probe.probe import probe_features
from embcache.results.predict import predict
from embcache.store.feature_store import FeatureStore
from embcache.testing import check_backbone
from tests.extract.conftest import draw
from tests.refusal import refused

oc: Any = pytest.importorskip("open_clip", reason="an extra: pip install 'embcache[clip]'")

_TEXT = {"context_length": 4, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
_VIT = {"image_size": 64, "patch_size": 16, "width": 32, "head_width": 16, "layers": 4}
_NET: dict[str, dict[str, Any]] = {
    "vit": {"vision_cfg": _VIT},
    "quick": {"vision_cfg": _VIT, "quick_gelu": True},
    "average": {"vision_cfg": {**_VIT, "pool_type": "avg", "final_ln_after_pool": True, "patch_dropout": 0.5}},
    "resnet": {"vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32}},
    "timm": {"vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear"}},
    "convnet": {"vision_cfg": {"image_size": 64, "timm_model_name": "resnet10t", "timm_proj": "mlp"}},
    "coca": {
        "vision_cfg": {**_VIT, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "multimodal_cfg": {**_TEXT, "mlp_ratio": 2}, "custom_text": True,
    },
}  # fmt: skip


def make(kind: str, folder: Path, **preprocess: Any) -> Any:
    """A tiny random model, saved by open_clip as it would be pushed to the hub, and as open_clip reads it."""
    config = {"embed_dim": 24, "text_cfg": _TEXT, **_NET[kind]}
    torch.manual_seed(0)
    parts = {key: value for key, value in config.items() if key != "custom_text"}
    model = (oc.CoCa if kind == "coca" else oc.CLIP)(**parts)
    for module in model.modules():  # some start as zero
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.running_mean, std=0.1)
    given = {"mean": (0.5, 0.4, 0.3), "std": (0.3, 0.2, 0.25), "interpolation": "bicubic", "resize_mode": "shortest"}
    oc.set_model_preprocess_cfg(model, {**given, **preprocess})
    tokenizer = SimpleNamespace(save_pretrained=lambda folder: None)
    oc.push_to_hf_hub.__globals__["save_for_hf"](model, tokenizer, config, str(folder), safe_serialization=True)
    read, own = oc.create_model_from_pretrained(f"local-dir:{folder}")
    return read.eval(), own


def pixels_of(image: np.ndarray, name: str) -> Tensor:
    """The network's input, (1, 3, H, W), of an image."""
    transform = find_backbone(name).transform
    assert transform is not None
    return normalize(torch.from_numpy(transform.geometry(image).copy())[None], transform, torch.device("cpu"))


def encode(model: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        features: Tensor = model.encode_image(x, normalize=False)
    return features


def features(spec: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        made: Tensor = load_backbone(spec).module(x)
    return made


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", _NET)
@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_features_and_pixels_are_those_of_open_clip(kind: str, mode: str, tmp_path: Path, image: np.ndarray) -> None:
    model, own = make(
        kind, tmp_path / "net", resize_mode=mode, interpolation="bilinear" if mode == "squash" else "bicubic"
    )
    name = f"open_clip:{tmp_path / 'net'}"
    x = pixels_of(image, name)
    theirs = own(Image.fromarray(image))[None]
    assert theirs.shape == x.shape
    torch.testing.assert_close(x, theirs, rtol=0, atol=1e-6)
    spec = find_backbone(name)
    torch.testing.assert_close(features(spec, x), encode(model, x), rtol=1e-5, atol=1e-6)
    assert (spec.name, spec.dim, spec.pooling) == ("open_clip:net", 24, "projected")
    assert spec.parameters == sum(p.numel() for p in model.visual.parameters())


@pytest.mark.parametrize("kind", ["average", "resnet", "coca"])
def test_towers_keep_the_contract_of_a_backbone(kind: str, tmp_path: Path) -> None:
    make(kind, tmp_path / kind)
    check_backbone(f"open_clip:{tmp_path / kind}", size=(64, 64))


def test_texts_are_not_needed_and_the_activation_is_that_of_the_configuration(
    tmp_path: Path, image: np.ndarray
) -> None:
    plain, _ = make("vit", tmp_path / "plain")
    quick, _ = make("quick", tmp_path / "quick")
    names = [f"open_clip:{tmp_path / kind}" for kind in ("plain", "quick")]
    x = pixels_of(image, names[0])
    for name, model in zip(names, (plain, quick), strict=True):
        path = Path(name.removeprefix("open_clip:")) / "open_clip_config.json"
        config = json.loads(path.read_text())
        # As BiomedCLIP's: neither on this machine nor to be fetched.
        config["model_cfg"]["text_cfg"] = {"hf_model_name": "nowhere/text", "hf_tokenizer_name": "nowhere/text"}
        path.write_text(json.dumps(config))
        torch.testing.assert_close(features(name, x), encode(model, x), rtol=1e-5, atol=1e-6)
    one, other = (load_backbone(name) for name in names)
    assert one.weights_sha256 == other.weights_sha256
    assert one.spec.network != other.spec.network
    assert (features(names[0], x) - features(names[1], x)).abs().max() > 1e-4


def test_tags_say_which_activation_their_weights_need() -> None:
    by_name = {name: find_backbone(f"open_clip:{name}") for name in (
        "ViT-B-32/openai", "ViT-B-32-quickgelu/openai", "ViT-B/32/OpenAI", "ViT-B-32/laion2b_s34b_b79k",
        "roberta-ViT-B-32/laion2b_s12b_b32k", "RN50/openai", "RN50-quickgelu/openai",
    )}  # fmt: skip
    openai = by_name["ViT-B-32/openai"]
    assert (openai.name, openai.dim, openai.patch) == ("open_clip:ViT-B-32/openai", 512, 32)
    assert by_name["ViT-B/32/OpenAI"] == openai
    assert openai.network == by_name["ViT-B-32-quickgelu/openai"].network
    assert openai.network == by_name["roberta-ViT-B-32/laion2b_s12b_b32k"].network
    assert openai.network != by_name["ViT-B-32/laion2b_s34b_b79k"].network
    assert by_name["RN50/openai"].network == by_name["RN50-quickgelu/openai"].network  # it has neither
    expected = oc.create_model("ViT-B-32-quickgelu", load_weights=False, pretrained_text=False)
    with torch.device("meta"):
        built = clip_models.build(openai, (224, 224))
    assert [type(m) for m in built.modules()] == [type(m) for m in expected.visual.modules()]


@pytest.mark.parametrize("kind", ["vit", "average", "timm"])
def test_tokens_and_layers_are_those_of_the_blocks(kind: str, tmp_path: Path, image: np.ndarray) -> None:
    model, _ = make(kind, tmp_path / kind)
    spec = find_backbone(f"open_clip:{tmp_path / kind}")
    x = pixels_of(image, f"open_clip:{tmp_path / kind}")
    kept: list[Tensor] = []
    visual = model.visual
    blocks = visual.trunk.blocks if kind == "timm" else visual.transformer.resblocks
    norm = visual.trunk.norm if kind == "timm" else visual.ln_post
    for block in blocks:
        block.register_forward_hook(lambda _m, _i, out: kept.append(out))
    with torch.inference_mode():
        encode(model, x)
        states = [norm(state) for state in kept]
        expected = {
            ("cls", None): states[-1][:, 0],
            ("mean", "last2"): torch.cat([state[:, 1:].mean(1) for state in states[-2:]], 1),
            ("cls+mean", "0,1"): torch.cat([p for s in states[:2] for p in (s[:, 0], s[:, 1:].mean(1))], 1),
            ("patches", None): states[-1][:, 1:],
        }
        for (tokens, layers), value in expected.items():
            other = repool(spec, tokens, layers)
            assert other.row_shape == tuple(value.shape[1:])
            torch.testing.assert_close(features(other, x), value, rtol=1e-5, atol=1e-6)
        before = repool(spec, "pooler", None)
        proj = visual.head.proj.weight.T if kind == "timm" else visual.proj
        torch.testing.assert_close(features(before, x) @ proj, encode(model, x), rtol=1e-4, atol=1e-5)
    assert repool(before, "projected", None) == spec
    for each in (spec, before, repool(spec, "mean", "last2")):  # a finetuned model is filled by names
        trained = load_backbone(each, image_size=(64, 64) if kind != "timm" else None).module
        clip_models.build(each, spec.input_size).load_state_dict(trained.state_dict())


def test_towers_without_such_tokens_say_which_they_have(tmp_path: Path) -> None:
    offered = {"resnet": "projected", "convnet": "projected, pooler", "coca": "projected, pooler"}
    for kind, tokens in offered.items():
        make(kind, tmp_path / kind)
        spec = find_backbone(f"open_clip:{tmp_path / kind}")
        with refused(UsageError, "no-tokens" if kind == "convnet" else "no-such-token") as caught:
            repool(spec, "mean", None)
        assert kind == "convnet" or caught.value.expected == tokens
    assert repool(find_backbone(f"open_clip:{tmp_path / 'coca'}"), "pooler", None).dim == 24
    with refused(UsageError, "pooler-layers"):
        repool(find_backbone(f"open_clip:{tmp_path / 'coca'}"), "projected", "last2")


@pytest.mark.parametrize("kind", ["vit", "timm"])
def test_other_sizes_are_those_of_open_clip(kind: str, tmp_path: Path) -> None:
    make(kind, tmp_path / "net")
    model = oc.create_model_from_pretrained(f"local-dir:{tmp_path / 'net'}", force_image_size=(96, 128))[0].eval()
    loaded = load_backbone(f"open_clip:{tmp_path / 'net'}", image_size=(96, 128))
    assert loaded.weights_sha256 == load_backbone(f"open_clip:{tmp_path / 'net'}").weights_sha256
    x = torch.randn(2, 3, 96, 128)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.module(x), encode(model, x), rtol=1e-5, atol=1e-6)
    with refused(UsageError, "image-size"):
        load_backbone(f"open_clip:{tmp_path / 'net'}", image_size=(100, 128))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for k in range(16):
        draw(tmp_path / "images" / ("benign", "malignant")[k % 2] / f"{k}.png", k)
    return tmp_path / "images"


def test_a_copy_is_the_same_store_and_predicts_from_its_folder(images: Path, home: Path, tmp_path: Path) -> None:
    make("timm", tmp_path / "net")
    mirror = tmp_path / "elsewhere" / "mirror"
    shutil.copytree(tmp_path / "net", mirror)
    dataset = load_dataset("folder", images)
    store = extract_features(f"open_clip:{tmp_path / 'net'}", dataset)
    again = extract_features(f"open_clip:{mirror}", dataset)
    assert isinstance(store, FeatureStore)
    assert isinstance(again, FeatureStore)
    assert (again.path, again.recipe.backbone) == (store.path, "open_clip:net")
    assert str(tmp_path) not in (store.path / "recipe.json").read_text()
    (planned,) = dry_run([f"open_clip:{mirror}"], dataset)
    assert (planned.owed, planned.match is not None) == (0, True)
    assert recipe_network(store.recipe, weights=mirror).backbone.weights_sha256 == store.recipe.weights_sha256
    with refused(UsageError, "unknown-backbone"):
        recipe_network(store.recipe)
    result = probe_features(dataset, ["open_clip:net"], subset="F", folds=2)
    table = predict(result.id, [images], weights={"open_clip:net": mirror})
    assert (len(table.images), table.failed) == (16, {})
    shutil.copytree(mirror, tmp_path / "weights" / "net")  # now in the weights folder
    assert recipe_network(store.recipe).backbone.weights_sha256 == store.recipe.weights_sha256
    assert weights_status("open_clip:net") == f"here: {tmp_path / 'weights' / 'net'}"


def test_weights_of_a_tag_come_from_the_weights_folder_or_a_file(home: Path, tmp_path: Path, monkeypatch: Any) -> None:
    make("vit", tmp_path / "net")
    config = {"embed_dim": 24, "text_cfg": _TEXT, "vision_cfg": _VIT}
    monkeypatch.setattr(oc, "get_model_config", lambda name: dict(config) if name == "Tiny" else None)
    row = {"hf_hub": "nowhere/tiny/", "mean": (0.5,) * 3, "std": (0.5,) * 3, "quick_gelu": True}
    monkeypatch.setattr(oc, "get_pretrained_cfg", lambda name, tag: row if (name, tag) == ("Tiny", "few") else {})
    file, x = tmp_path / "net" / "open_clip_model.safetensors", torch.randn(1, 3, 64, 64)
    quick, _ = make("quick", tmp_path / "quick")
    (tmp_path / "weights").mkdir()
    given = load_backbone("open_clip:Tiny/few", weights=file)
    torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in load_file(file).items()}}, tmp_path / "own.pt")
    trained = load_backbone("open_clip:Tiny/few", weights=tmp_path / "own.pt")
    save_file(load_file(file), tmp_path / "weights" / "Tiny--few.safetensors")
    found = load_backbone("open_clip:Tiny/few")
    assert weights_status("open_clip:Tiny/few").startswith("here: ")
    for loaded in (given, trained, found):
        assert loaded.weights_sha256 == given.weights_sha256
        with torch.inference_mode():
            torch.testing.assert_close(loaded.module(x), encode(quick, x), rtol=1e-5, atol=1e-6)
    assert trained.inferred
    with refused(UsageError, "unknown-backbone"):
        find_backbone("open_clip:Tiny/many")


@pytest.mark.parametrize("pickled", [False, True])
def test_a_repository_of_the_hub_is_the_same_network(
    pickled: bool, tmp_path: Path, monkeypatch: Any, home: Path
) -> None:
    make("vit", tmp_path / "net")
    folder, commit = tmp_path / "hub" / "models--someone--clip", "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    with refused(WeightsError, "download-failed"):
        find_backbone("open_clip:hf-hub:someone/clip")
    with refused(WeightsError, "download-failed"):
        load_backbone("open_clip:ViT-B-32/openai")
    shutil.copytree(tmp_path / "net", folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    if pickled:
        file = folder / "snapshots" / commit / "open_clip_model.safetensors"
        torch.save(load_file(file), file.with_name("open_clip_pytorch_model.bin"))
        file.unlink()
    known = load_backbone(f"open_clip:{tmp_path / 'net'}")
    for name in ("open_clip:hf-hub:someone/clip", f"open_clip:hf-hub:someone/clip@{commit}"):
        loaded = load_backbone(name)
        assert (loaded.weights_sha256, loaded.spec.network) == (known.weights_sha256, known.spec.network)
        assert loaded.spec.name == "open_clip:hf-hub:someone/clip"


def test_what_cannot_be_used_is_one_message(tmp_path: Path, home: Path) -> None:
    make("vit", tmp_path / "net")
    config = json.loads((tmp_path / "net" / "open_clip_config.json").read_text())

    def changed(name: str, vision: Any = (), preprocess: Any = (), **model: Any) -> str:
        folder = tmp_path / name
        shutil.copytree(tmp_path / "net", folder)
        new = {
            "model_cfg": config["model_cfg"] | {"vision_cfg": config["model_cfg"]["vision_cfg"] | dict(vision)} | model,
            "preprocess_cfg": config["preprocess_cfg"] | dict(preprocess),
        }
        (folder / "open_clip_config.json").write_text(json.dumps(new))
        return f"open_clip:{folder}"

    for spec in (
        find_backbone(changed("letterbox", preprocess={"resize_mode": "longest"})),
        find_backbone(changed("oblong", vision={"image_size": [64, 96]})),
    ):
        with refused(UsageError, "no-model-transform"):
            choose_transform(spec, None, {(80, 60)})
        stated = choose_transform(spec, "imagenet", {(80, 60)})
        assert (stated.interpolation, stated.mean) == ("bicubic", (0.5, 0.4, 0.3))
    with refused(WeightsError, "open-clip-refuses"):
        find_backbone(changed("words", preprocess={"mean": ["a", "b", "c"]}))
    with refused(WeightsError, "open-clip-refuses"):
        find_backbone(changed("unknown", vision={"no_such_key": 1}))
    with refused(WeightsError, "open-clip-refuses"):
        find_backbone(changed("hub", vision={"timm_model_name": "hf-hub:nowhere/net"}))
    with refused(UsageError, "no-vector"):
        find_backbone(changed("sequence", vision={"pool_type": "none"}))
    with refused(WeightsError, "checkpoint-mismatch"):
        load_backbone(changed("deeper", vision={"layers": 6}))
    (tmp_path / "hub" / "open_clip_config.json").write_text("[1]")
    with refused(WeightsError, "open-clip-refuses"):
        find_backbone(f"open_clip:{tmp_path / 'hub'}")
    empty = changed("empty")
    (tmp_path / "empty" / "open_clip_model.safetensors").unlink()
    with refused(WeightsError, "weights-not-found"):
        load_backbone(empty)
    with refused(UsageError, "unknown-backbone"):
        find_backbone("open_clip:nowhere")
    assert replace(find_backbone(f"open_clip:{tmp_path / 'net'}"), name="x").library == "open_clip"
