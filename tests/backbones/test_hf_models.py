"""Models of transformers: features equal the library's own, from a folder as from a copy, and files decide nothing."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from embcache.backbones.catalog import find_backbone, load_backbone, repool
from embcache.backbones.networks import align
from embcache.backbones.transforms import normalize
from embcache.config import ExtractConfig
from embcache.data.dataset import load_dataset
from embcache.errors import RecipeError, StoreNotFoundError, UsageError, WeightsError
from embcache.extract.extract import extract_features
from embcache.extract.recipes import recipe_network
from embcache.finetune.finetune import finetune_images
from embcache.finetune.model import empty_backbone
from embcache.log import shown
from embcache.maintain.listing import dry_run
from embcache.probe.probe import probe_features
from embcache.results.predict import predict
from embcache.runs.folders import load_predictions, runs_dir
from embcache.store.feature_store import FeatureStore, open_store
from tests.extract.conftest import draw
from tests.refusal import refused

tf: Any = pytest.importorskip("transformers", reason="an extra: pip install 'embcache[hf]'")

_SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
_WIDE = {**_SMALL, "intermediate_size": 64}
_OF64 = {"image_size": 64, "patch_size": 16}
_TEXT = {**_WIDE, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
_SQUARE = {"size": {"height": 64, "width": 64}}
_CROPPED = {"size": {"shortest_edge": 70}, "crop_size": {"height": 56, "width": 56}}


def make(family: str, folder: Path) -> Any:
    """A tiny random model of a family and its processor, saved as its publisher would."""
    torch.manual_seed(0)
    configs = {
        "dinov2": lambda: tf.Dinov2Config(**_SMALL, image_size=56, patch_size=14),
        "dinov2_with_registers": lambda: tf.Dinov2WithRegistersConfig(**_SMALL, image_size=56, patch_size=14),
        "dinov3": lambda: tf.DINOv3ViTConfig(**_WIDE, **_OF64, num_register_tokens=4),
        "siglip": lambda: tf.SiglipConfig(vision_config={**_WIDE, **_OF64}, text_config=_TEXT),
        "siglip_vision": lambda: tf.SiglipVisionConfig(**_WIDE, **_OF64),
        "clip": lambda: tf.CLIPConfig(vision_config={**_WIDE, **_OF64}, text_config=_TEXT),
        "vit_mae": lambda: tf.ViTMAEConfig(**_WIDE, **_OF64),
        "vit": lambda: tf.ViTConfig(**_WIDE, **_OF64),
    }
    model = tf.AutoModel.from_config(configs[family]()).eval()
    model.save_pretrained(folder)
    processor = tf.BitImageProcessor(**_CROPPED) if family.startswith("dinov2") else tf.ViTImageProcessor(**_SQUARE)
    processor.save_pretrained(folder)
    return model


def pixels_of(image: np.ndarray, name: str) -> torch.Tensor:
    """The network's input, (1, 3, H, W), of an image."""
    transform = find_backbone(name).transform
    assert transform is not None
    return normalize(torch.from_numpy(transform.geometry(image).copy())[None], transform, torch.device("cpu"))


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)


FAMILIES = ("dinov2", "dinov2_with_registers", "dinov3", "siglip", "siglip_vision", "clip", "vit_mae", "vit")


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_those_of_the_library(family: str, tmp_path: Path, image: np.ndarray) -> None:
    model = make(family, tmp_path / family)
    name = f"hf:{tmp_path / family}"
    loaded = load_backbone(name)
    x = pixels_of(image, name)
    more: dict[str, Any] = {}
    if family == "vit_mae":
        model.config.mask_ratio = 0.0
        more = {"noise": torch.arange(16)[None]}
    with torch.inference_mode():
        output = getattr(model, "vision_model", model)(pixel_values=x, **more)
        pooled = family.startswith(("siglip", "clip"))
        expected = output.pooler_output if pooled else output.last_hidden_state[:, 0]
        assert torch.equal(loaded.module(x), expected)
        assert torch.equal(loaded.module(x), loaded.module(x))  # ViTMAE masks at random unless told otherwise
    assert loaded.spec.dim == expected.shape[1] == 32
    processor = tf.AutoImageProcessor.from_pretrained(tmp_path / family)
    theirs = processor(images=Image.fromarray(image), return_tensors="pt")["pixel_values"]
    assert theirs.shape == x.shape
    assert (theirs - x).abs().max() < 0.02  # one of 255 levels: torchvision rounds where Pillow does not


@pytest.mark.parametrize("family", ["dinov2", "dinov2_with_registers", "siglip_vision", "clip"])
def test_tokens_and_layers_are_hidden_states_after_the_norm(family: str, tmp_path: Path, image: np.ndarray) -> None:
    model = make(family, tmp_path / family)
    tower = getattr(model, "vision_model", model)
    name = f"hf:{tmp_path / family}"
    x, prefix = pixels_of(image, name), {"dinov2_with_registers": 5, "siglip_vision": 0}.get(family, 1)
    norm = tower.layernorm if family.startswith("dinov2") else tower.post_layernorm
    kept: list[torch.Tensor] = []
    layers = tower.get_submodule("encoder.layer" if family.startswith("dinov2") else "encoder.layers")
    for layer in layers:
        layer.register_forward_hook(lambda _m, _i, out: kept.append(out[0] if isinstance(out, tuple) else out))
    with torch.inference_mode():
        tower(pixel_values=x)
        states = [norm(state) for state in kept]
        mean = torch.cat([state[:, prefix:].mean(1) for state in states[-2:]], 1)
        spec = repool(find_backbone(name), "mean", "last2")
        assert (spec.dim, spec.pooling) == (64, "mean@2,3")
        torch.testing.assert_close(load_backbone(spec).module(x), mean, rtol=1e-5, atol=1e-6)
        patches = repool(find_backbone(name), "patches", None)
        assert patches.row_shape == (16, 32)
        torch.testing.assert_close(load_backbone(patches).module(x), states[-1][:, prefix:], rtol=1e-5, atol=1e-6)
    if not prefix:
        with refused(UsageError, "no-such-token"):
            repool(find_backbone(name), "cls+mean", None)
    else:
        both = repool(find_backbone(name), "cls+mean", "0,3")
        with torch.inference_mode():
            parts = [p for s in (states[0], states[3]) for p in (s[:, 0], s[:, prefix:].mean(1))]
            torch.testing.assert_close(load_backbone(both).module(x), torch.cat(parts, 1), rtol=1e-5, atol=1e-6)
    with refused(UsageError, "unknown-layers"):
        repool(find_backbone(name), "mean", "last5")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for k in range(16):
        draw(tmp_path / "images" / ("benign", "malignant")[k % 2] / f"{k}.png", k)
    return tmp_path / "images"


def test_a_copy_is_the_same_store_and_predicts_from_its_folder(
    images: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embcache.extract.extract.TICK_NS", -(10**10))
    make("dinov2", tmp_path / "net")
    shutil.copytree(tmp_path / "net", tmp_path / "elsewhere" / "mirror")
    dataset = load_dataset("folder", images)
    store = extract_features(f"hf:{tmp_path / 'net'}", dataset)
    assert isinstance(store, FeatureStore)
    with shown((said := list[str]()).append):
        again = extract_features(f"hf:{tmp_path / 'elsewhere' / 'mirror'}", dataset)
    assert isinstance(again, FeatureStore)
    assert said[0].startswith("hf:mirror has the same weights as hf:net, and these features are used")
    assert (again.path, again.recipe.backbone) == (store.path, "hf:net")
    with monkeypatch.context() as patch:  # once more, without a network
        patch.setattr("embcache.extract.recipes.load_backbone", None)
        with shown((known := list[str]()).append):
            extract_features(f"hf:{tmp_path / 'elsewhere' / 'mirror'}", dataset)
        assert known == said
        (tmp_path / "elsewhere" / "mirror" / "config.json").touch()
        with pytest.raises(TypeError, match="not callable"):
            extract_features(f"hf:{tmp_path / 'elsewhere' / 'mirror'}", dataset)
    assert str(tmp_path) not in (store.path / "recipe.json").read_text()
    with refused(StoreNotFoundError, "store-not-found") as typed:
        open_store(f"hf:{tmp_path / 'net'}", dataset)
    assert typed.value.fix == "--backbone hf:net"
    (planned,) = dry_run([f"hf:{tmp_path / 'elsewhere' / 'mirror'}"], dataset)
    assert (planned.owed, planned.match is not None) == (0, True)
    network = recipe_network(store.recipe, weights=tmp_path / "elsewhere" / "mirror")
    assert network.backbone.weights_sha256 == store.recipe.weights_sha256
    with refused(WeightsError, "weights-not-found"):
        recipe_network(store.recipe)
    patches = extract_features(f"hf:{tmp_path / 'net'}", dataset, config=ExtractConfig(tokens="patches"))
    assert isinstance(patches, FeatureStore)
    assert (patches.row_shape, patches.views) == ((16, 32), 1)
    larger = extract_features("hf:net", dataset, tokens="patches", transform="imagenet", weights=tmp_path / "net")
    assert isinstance(larger, FeatureStore)
    assert larger.row_shape == (256, 32)
    with refused(UsageError, "not-vectors"):
        probe_features(dataset, ["hf:net"], subset="F", folds=2, recipe=patches.recipe.fingerprint[:12])


def test_models_are_found_in_the_weights_folder_of_a_home(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EMBCACHE_WEIGHTS", raising=False)
    monkeypatch.setenv("EMBCACHE_HOME", str(tmp_path / "other"))
    make("dinov2", tmp_path / "own" / "weights" / "lab" / "net")
    store = extract_features("hf:lab/net", load_dataset("folder", images), home=tmp_path / "own")
    assert isinstance(store, FeatureStore)
    assert store.recipe.backbone == "hf:lab/net"
    assert find_backbone("hf:lab/net", home=tmp_path / "own").dim == 32
    network = recipe_network(store.recipe, home=tmp_path / "own")
    assert network.backbone.weights_sha256 == store.recipe.weights_sha256
    with refused(WeightsError, "weights-not-found"):
        find_backbone("hf:net", home=tmp_path / "other")


EVIL = "import pathlib\npathlib.Path({mark!r}).touch()\nclass Evil:\n    pass\n"


@pytest.mark.parametrize("family", FAMILIES)
def test_no_code_of_a_folder_is_run_nor_asked_for(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: np.ndarray
) -> None:
    folder = tmp_path / family
    model = make(family, folder)
    before = load_backbone(f"hf:{folder}").module(pixels_of(image, f"hf:{folder}"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (folder / "evil.py").write_text(EVIL.format(mark=str(tmp_path / "mark")))
    config = json.loads((folder / "config.json").read_text())
    for each in (config, config.get("vision_config", {})):
        each["attn_implementation"] = each["_attn_implementation"] = "someone/kernel"  # transformers fetches such code
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load_backbone(f"hf:{folder}").module(pixels_of(image, f"hf:{folder}"))
    assert torch.equal(loaded, before)
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    del processor["image_processor_type"]
    processor["auto_map"] = {"AutoImageProcessor": "evil.Evil", "AutoFeatureExtractor": "evil.Evil"}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    with contextlib.suppress(WeightsError):
        find_backbone(f"hf:{folder}")
    assert not (tmp_path / "mark").exists()
    assert model is not None


# What a config.json says that changes no feature: how the model was trained, its classes, the version that wrote it.
CHANGES_NOTHING = {
    "drop_path_rate": 0.3, "problem_type": "single_label_classification", "initializer_range": 0.5,
    "finetuning_task": "grading", "output_hidden_states": True, "return_dict": False, "transformers_version": "4.30.0",
    "architectures": ["Other"], "dtype": "bfloat16", "id2label": {"0": "a", "1": "b", "2": "c"},
    "label2id": {"a": 0, "b": 1, "c": 2}, "hidden_dropout_prob": 0.2, "attention_dropout": 0.1,
}  # fmt: skip


def test_the_recipe_counts_what_decides_features_and_nothing_else(tmp_path: Path, image: np.ndarray) -> None:
    make("dinov2", tmp_path / "net")
    plain = load_backbone(f"hf:{tmp_path / 'net'}")
    x = pixels_of(image, f"hf:{tmp_path / 'net'}")
    for key, value in CHANGES_NOTHING.items():
        shutil.copytree(tmp_path / "net", tmp_path / key)
        config = json.loads((tmp_path / key / "config.json").read_text())
        (tmp_path / key / "config.json").write_text(json.dumps({**config, key: value}))
        other = load_backbone(f"hf:{tmp_path / key}")
        assert (other.spec.network, other.weights_sha256) == (plain.spec.network, plain.weights_sha256), key
        assert torch.equal(other.module(x), plain.module(x)), key
    for key, value in {"hidden_act": "relu", "layer_norm_eps": 0.1, "num_attention_heads": 4}.items():
        shutil.copytree(tmp_path / "net", tmp_path / key)
        config = json.loads((tmp_path / key / "config.json").read_text())
        (tmp_path / key / "config.json").write_text(json.dumps({**config, key: value}))
        other = load_backbone(f"hf:{tmp_path / key}")
        assert other.spec.network != plain.spec.network, key
        assert not torch.equal(other.module(x), plain.module(x)), key


# Keys that the library's networks read and that show in their tensors, or matter in training or for texts only.
SHOWN = """
    apply_layernorm attention_dropout attention_probs_dropout_prob decoder_hidden_size decoder_intermediate_size
    decoder_num_attention_heads decoder_num_hidden_layers drop_path_rate encoder_stride eos_token_id
    hidden_dropout_prob hidden_size id initializer_factor initializer_range intermediate_size key_bias
    layerscale_value logit_scale_init_value mask_ratio max_position_embeddings mlp_bias mlp_ratio norm_pix_loss
    num_channels num_hidden_layers num_labels pooler_act pooler_output_size pos_embed_jitter pos_embed_rescale
    pos_embed_shift proj_bias projection_dim projection_size qkv_bias query_bias reshape_hidden_states
    return_class_token text_config use_gated_mlp use_mask_token use_swiglu_ffn value_bias vision_config
    vision_use_head vocab_size
"""


def test_every_key_that_the_networks_read_is_counted_or_known_not_to_matter() -> None:
    from embcache.backbones.hf_models import _COUNTED

    folder = Path(tf.__file__).parent / "models"
    for name in ("dinov2", "dinov2_with_registers", "dinov3_vit", "clip", "siglip", "vit", "vit_mae"):
        source = (folder / name / f"modeling_{name}.py").read_text("utf-8")
        read = set(re.findall(r"config\.([a-z][a-z_]*)", source))
        assert read <= {*SHOWN.split(), *_COUNTED}, name


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"patch_size": 0}), ("config.json", {"patch_size": [14, 14]}),
        ("config.json", {"hidden_size": "wide"}),
        ("preprocessor_config.json", {"image_mean": 0.5}), ("preprocessor_config.json", {"image_std": [0, 1, 1]}),
        ("preprocessor_config.json", {"resample": None}), ("preprocessor_config.json", {"rescale_factor": 0}),
    ],
)  # fmt: skip
def test_odd_values_in_the_files_of_a_model_are_one_message(tmp_path: Path, file: str, changes: dict[str, Any]) -> None:
    make("dinov2", tmp_path / "net")
    content = json.loads((tmp_path / "net" / file).read_text())
    (tmp_path / "net" / file).write_text(json.dumps({**content, **changes}))
    with refused(WeightsError, "transformers-refuses") as caught:
        find_backbone(f"hf:{tmp_path / 'net'}")
    assert str(tmp_path / "net") in str(caught.value)
    with refused(WeightsError, "weights-not-found"):
        find_backbone(f"hf:{tmp_path / 'net' / 'config.json'}")


def test_a_model_without_preprocessing_needs_one_that_is_stated(tmp_path: Path, images: Path) -> None:
    make("vit", tmp_path / "net")
    (tmp_path / "net" / "preprocessor_config.json").unlink()
    dataset = load_dataset("folder", images)
    with refused(UsageError, "no-model-transform"):
        extract_features(f"hf:{tmp_path / 'net'}", dataset, home=tmp_path / "home")
    store = extract_features(f"hf:{tmp_path / 'net'}", dataset, home=tmp_path / "home", transform="imagenet")
    assert isinstance(store, FeatureStore)
    assert len(store) == len(dataset)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_network_takes_the_tensors_of_a_loaded_one(family: str, tmp_path: Path) -> None:
    make(family, tmp_path / family)
    spec = find_backbone(f"hf:{tmp_path / family}")
    size = (56, 56) if family.startswith("dinov2") else (96, 64)
    loaded: Any = load_backbone(spec, image_size=size).module
    empty: Any = empty_backbone(spec, size)
    assert not all(torch.equal(a, b) for a, b in zip(loaded.parameters(), empty.parameters(), strict=True))
    empty.load_state_dict(loaded.state_dict())
    empty.eval().requires_grad_(False)  # else torch attends by another kernel
    x = torch.randn(2, 3, *size)
    with torch.inference_mode():
        assert torch.equal(empty(x), loaded(x))


def test_a_finetuned_model_predicts_without_the_weights(images: Path, home: Path, tmp_path: Path) -> None:
    make("dinov2", tmp_path / "net")
    make("dinov3", tmp_path / "another")
    dataset = load_dataset("folder", images)
    quick: dict[str, Any] = {"subset": 4, "folds": 2, "val": "matched", "max_epochs": 1, "batch_size": 8}
    result = finetune_images(dataset, f"hf:{tmp_path / 'net'}", **quick)
    assert (result.backbones, result.recipes["hf:net"]["pooling"]) == (("hf:net",), "cls")
    paths = [images / path for path in dataset.table["path"]]
    with refused(WeightsError, "weights-not-found"):
        predict(result.id, paths)
    (tmp_path / "net" / "model.safetensors").unlink()  # only the configuration is read
    expected = load_predictions(runs_dir(dataset.name) / result.id)
    got = predict(result.id, paths, weights=(f"hf:net={tmp_path / 'net'}",), folds=(0,))
    rows = dict(zip(dataset.table["id"], got.p, strict=True))
    table = expected[expected["fold"] == 0]
    assert np.allclose([rows[id_] for id_ in table["id"]], table[["p_0", "p_1"]], atol=1e-6)
    with refused(RecipeError, "recipe-differs"):
        predict(result.id, paths, weights=(f"hf:net={tmp_path / 'another'}",))
    own = finetune_images(dataset, f"mine=hf:{tmp_path / 'another'}", **quick)
    assert str(tmp_path) not in (runs_dir(dataset.name) / own.id / "result.json").read_text()
    assert np.isfinite(predict(own.id, paths, weights=(f"mine={tmp_path / 'another'}",)).p).all()
    with refused(WeightsError, "weights-not-found") as missing:
        predict(own.id, paths)
    assert missing.value.fix == "--weights mine=FOLDER"


def test_what_cannot_be_used_is_one_message(tmp_path: Path, home: Path, images: Path) -> None:
    make("dinov2", tmp_path / "net")
    path = tmp_path / "net" / "config.json"
    config = json.loads(path.read_text())

    def changed(name: str, **fields: Any) -> str:
        folder = tmp_path / name
        shutil.copytree(tmp_path / "net", folder)
        (folder / "config.json").write_text(json.dumps(config | fields))
        return f"hf:{folder}"

    with refused(UsageError, "remote-code"):
        find_backbone(changed("code", auto_map={"AutoModel": "modeling.Own"}))
    with refused(UsageError, "unknown-architecture"):
        find_backbone(changed("bert", model_type="bert"))
    with refused(WeightsError, "transformers-refuses"):
        find_backbone(changed("nothing", model_type="no-such-model"))
    with refused(WeightsError, "weights-mismatch"):
        load_backbone(changed("deeper", num_hidden_layers=6))
    (tmp_path / "code" / "model.safetensors").rename(tmp_path / "code" / "pytorch_model.bin")
    (tmp_path / "code" / "config.json").write_text(json.dumps(config))
    with refused(WeightsError, "weights-not-safetensors"):
        load_backbone(f"hf:{tmp_path / 'code'}")
    with refused(WeightsError, "weights-not-found"):
        find_backbone("hf:nowhere")
    with refused(UsageError, "image-size"):
        load_backbone(f"hf:{tmp_path / 'net'}", image_size=(57, 57))
    with refused(UsageError, "no-tokens"):
        extract_features("random", load_dataset("folder", images), tokens="mean")


@pytest.mark.parametrize("name", ["timm:test_vit", "timm:vit_small_patch14_reg4_dinov2"])
def test_tokens_of_timm_are_those_of_forward_features(name: str) -> None:
    import timm

    from embcache.backbones.pooling import Pooling
    from embcache.backbones.timm_models import TokenPooling

    torch.manual_seed(0)
    model: Any = timm.create_model(name.removeprefix("timm:"), num_classes=0, img_size=56, dynamic_img_size=False)
    model.eval()
    x = torch.randn(2, 3, 56, 56)
    with torch.inference_mode():
        tokens = model.forward_features(x)
        prefix = model.num_prefix_tokens
        expected = torch.cat([tokens[:, 0], tokens[:, prefix:].mean(1)], 1)
        torch.testing.assert_close(TokenPooling(model, Pooling("cls+mean"))(x), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(TokenPooling(model, Pooling("patches"))(x), tokens[:, prefix:])


@pytest.mark.parametrize("name", ["test_vit2", "test_vit4", "test_vit_relpos"])  # they norm what they average
def test_the_mean_of_timm_is_its_own_average_after_its_norm(name: str) -> None:
    import timm

    from embcache.backbones.pooling import Pooling
    from embcache.backbones.timm_models import TokenPooling

    torch.manual_seed(0)
    model: Any = timm.create_model(name, num_classes=0).eval()
    with torch.no_grad():
        model.fc_norm.weight.uniform_(0.5, 2)
    x = torch.randn(2, 3, *model.pretrained_cfg["input_size"][1:])
    with torch.inference_mode():
        assert not torch.equal(model.forward_features(x).mean(1), model(x))
        torch.testing.assert_close(TokenPooling(model, Pooling("mean"))(x), model(x), rtol=1e-5, atol=1e-6)


def test_an_empty_timm_model_pools_its_tokens_as_a_loaded_one(tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "vit.safetensors")
    spec = repool(find_backbone("timm:test_vit"), "cls+mean", None)
    loaded = load_backbone(spec, weights=tmp_path / "vit.safetensors", image_size=(96, 96)).module
    empty: Any = empty_backbone(spec, (96, 96)).eval()
    empty.load_state_dict(loaded.state_dict())
    x = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        assert torch.equal(empty(x), loaded(x))
        assert loaded(x).shape == (2, spec.dim) == (2, 128)


def test_weights_are_moved_to_where_torch_allocates_and_tied_ones_stay_tied() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = self.b = torch.nn.Parameter(torch.arange(33.0)[1:])
            self.register_buffer("c", torch.arange(33.0)[1:].to_sparse())

    module = Tied()
    align(module)
    assert module.a is module.b
    assert module.a.data_ptr() % 64 == 0
    assert module.a.tolist() == [*range(1, 33)]
