"""Weights that timm's configurations point to are fetched as data, and nothing that they say is run."""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError
from timm.models import PretrainedCfg
from torch import Tensor

from embcache.backbones import timm_models
from embcache.backbones.catalog import find_backbone, load_backbone
from embcache.backbones.checkpoints import hash_state
from embcache.backbones.pooling import choose_pooling
from embcache.backbones.timm_models import describe as describe_timm
from embcache.errors import UsageError, WeightsError
from tests.refusal import refused

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "timm:hf-hub:someone/net"


@pytest.fixture(autouse=True)
def fresh_rows() -> Iterator[None]:
    describe_timm.cache_clear()
    yield
    describe_timm.cache_clear()


@pytest.fixture(autouse=True)
def timm_fetches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def guarded(name: str, pretrained: bool = False, **more: Any) -> Any:
        assert not pretrained or more["pretrained_cfg_overlay"]["state_dict"], "timm would fetch weights itself"
        return create(name, pretrained=pretrained, **more)

    monkeypatch.setattr(timm, "create_model", guarded)


@pytest.fixture
def hub(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, without a network."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(timm_models.hub_constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(timm_models.hub_constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **more: pytest.fail("asked the network"))
    return folder


def publish(hub: Path, repository: str = "someone/net", **config: Any) -> Path:
    """Put a repository with a configuration into the hub's cache; return where its files lie."""
    folder = hub / f"models--{repository.replace('/', '--')}"
    files = folder / "snapshots" / COMMIT
    files.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    row = {"input_size": [3, 64, 64], "num_classes": 5, "classifier": "fc", "first_conv": "conv1.0", **config}
    (files / "config.json").write_text(json.dumps({"architecture": "resnet10t", "pretrained_cfg": row}))
    return files


def tensors(seed: int = 0) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state: dict[str, Tensor] = timm.create_model("resnet10t", num_classes=5).state_dict()
    return state


def digest_of(state: dict[str, Tensor]) -> str:
    model = timm.create_model("resnet10t", num_classes=5)
    model.load_state_dict(state)
    model.reset_classifier(0)
    return hash_state(model)


class Malicious:
    """Makes a folder when a pickle of it is loaded without care."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.mkdir, (self.trace,)


def write_malicious(path: Path, trace: Path, *, zipped: bool) -> None:
    content = {"state_dict": tensors(), "more": Malicious(trace)}
    if zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize(
    ("config", "safe", "pickled"),
    [
        ({}, "model.safetensors", "pytorch_model.bin"),
        ({"hf_hub_filename": "teacher.bin"}, "teacher.safetensors", "teacher.bin"),
    ],
)
def test_safetensors_come_before_the_pickle_that_is_named(
    hub: Path, config: dict[str, str], safe: str, pickled: str
) -> None:
    files = publish(hub, **config)
    torch.save(tensors(1), files / pickled)
    assert hash_state(load_backbone(NAME).module) == digest_of(tensors(1))
    safetensors.torch.save_file(tensors(2), files / safe)
    loaded = load_backbone(NAME)
    assert hash_state(loaded.module) == digest_of(tensors(2))
    assert loaded.weights_sha256 == hashlib.sha256((files / safe).read_bytes()).hexdigest()
    assert loaded.weights_source == f"{safe} of someone/net"


@pytest.mark.parametrize(("filename", "zipped"), [("pytorch_model.bin", True), ("teacher.pth", False)])
def test_a_pickle_that_would_run_code_is_refused(hub: Path, tmp_path: Path, filename: str, zipped: bool) -> None:
    files = publish(hub, hf_hub_filename=filename)
    write_malicious(files / filename, tmp_path / "trace", zipped=zipped)
    with refused(WeightsError, "checkpoint-unsafe"):
        load_backbone(NAME)
    assert not (tmp_path / "trace").exists()
    # The file is one that does run code where it is let.
    if not zipped:
        pickle.loads((files / filename).read_bytes())
        assert (tmp_path / "trace").is_dir()


def test_a_repository_without_weights_is_one_error(hub: Path) -> None:
    files = publish(hub)
    with refused(WeightsError, "download-failed"):  # whether the hub has them is unknown offline
        load_backbone(NAME)

    def absent(*args: object, **more: object) -> str:
        raise EntryNotFoundError("404")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub, "hf_hub_download", absent)
        with pytest.raises(WeightsError, match=r"holds no weights[\s\S]*model.safetensors or pytorch_model.bin"):
            load_backbone(NAME)
    assert sorted(path.name for path in files.iterdir()) == ["config.json"]


ARCHITECTURE = '{"architecture": "resnet10t", "pretrained_cfg": '


@pytest.mark.parametrize(
    "config",
    [
        "[]", "[" * 100_000, '{"architecture": 5}', ARCHITECTURE + "[]}",
        ARCHITECTURE + '{"input_size": "wide"}}', ARCHITECTURE + '{"input_size": [3, 64, 64], "mean": {"a": 1}}}',
        ARCHITECTURE + '{"input_size": [3, 64, 64], "crop_pct": "most"}}',
        ARCHITECTURE + '{"input_size": [3, 64, 64]}, "model_args": {"no_such": 1}}',
    ],
)  # fmt: skip
def test_a_configuration_of_other_types_is_bad_usage(hub: Path, config: str) -> None:
    (publish(hub) / "config.json").write_text(config)
    with pytest.raises(UsageError, match="hf-hub:someone/net"):
        load_backbone(NAME)


# Weights at a URL


def at_url(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: PretrainedCfg(url=url))


def test_weights_at_a_url_are_kept_in_the_weights_folder(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(tensors(), tmp_path / "net")
    sha256 = hashlib.sha256((tmp_path / "net").read_bytes()).hexdigest()
    source = (tmp_path / "net").rename(tmp_path / f"net-{sha256[:8]}.pth")
    at_url(monkeypatch, source.as_uri())
    loaded = load_backbone("timm:resnet10t")
    assert hash_state(loaded.module) == digest_of(tensors())
    assert loaded.weights_sha256 == sha256
    source.unlink()
    assert load_backbone("timm:resnet10t", allow_download=False).weights_sha256 == sha256


def test_what_comes_from_a_url_is_held_to_the_digest_in_its_name(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "net-0123abcd.pth"
    torch.save(tensors(), source)
    at_url(monkeypatch, source.as_uri())
    with pytest.raises(WeightsError, match="not the published 0123abcd"):
        load_backbone("timm:resnet10t")


# What timm's own conversion must not let through


@pytest.mark.parametrize("converted", [False, True])
def test_values_that_are_not_finite_are_refused_under_any_names(tmp_path: Path, converted: bool) -> None:
    state = timm.create_model("vit_small_patch14_dinov2", num_classes=0).state_dict()
    state["norm.bias"] = torch.full_like(state["norm.bias"], float("nan"))
    if converted:
        state["mask_token"] = torch.zeros(1, 384)
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(state, path)
    with pytest.raises(WeightsError, match=r"not finite[\s\S]*norm\.bias"):
        load_backbone("timm:vit_small_patch14_dinov2", weights=path)


def test_a_checkpoint_of_a_classifier_alone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({"fc.weight": torch.zeros(5, 512)}, path)
    with refused(WeightsError, "checkpoint-mismatch"):
        load_backbone("timm:resnet10t", weights=path)


def test_a_file_of_mae_gives_its_encoder(tmp_path: Path) -> None:
    """As MAE's code saves it, and RETFound's: decoder, optimizer and options are beside the encoder."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    state = model.state_dict() | {
        "mask_token": torch.ones(1, 1, 192),
        "decoder_pos_embed": torch.ones(1, 197, 64),
        "decoder_embed.weight": torch.ones(64, 192),
        "decoder_blocks.0.norm1.weight": torch.ones(64),
    }
    adam = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 3, 224, 224)).sum().backward()
    adam.step()
    before = {key: value.clone() for key, value in state.items()}
    args = argparse.Namespace(model="mae_vit_large_patch16", lr=1e-3)
    torch.save({"model": before, "optimizer": adam.state_dict(), "epoch": 799, "args": args}, tmp_path / "mae.pth")
    loaded = load_backbone("mine=timm:vit_tiny_patch16_224", weights=tmp_path / "mae.pth")
    images = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        model.load_state_dict({key: value for key, value in before.items() if key in model.state_dict()})
        assert torch.equal(loaded.module(images), model.eval()(images))


@pytest.mark.parametrize(("depth", "fix"), [(6, "--layers last4"), (2, "--layers last2"), (0, "leave out --layers")])
def test_advice_on_layers_is_of_layers_that_there_are(depth: int, fix: str) -> None:
    spec = find_backbone("timm:test_vit")
    with refused(UsageError, "unknown-layers") as caught:
        choose_pooling(spec, "mean", "last9", ("mean",), depth, 8)
    assert caught.value.fix == fix
    if depth:
        assert choose_pooling(spec, "mean", fix.split()[1], ("mean",), depth, 8)["dim"] == 8 * min(4, depth)
