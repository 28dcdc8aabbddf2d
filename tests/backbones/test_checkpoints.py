from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from embcache.backbones.catalog import load_backbone
from embcache.backbones.checkpoints import find_network, hash_state, load_strictly, read_checkpoint
from embcache.errors import WeightsError
from tests.extract import published
from tests.refusal import refused


def small_state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "conv1.weight": torch.randn(4, 3, 3, 3, generator=generator),
        "bn1.running_mean": torch.randn(4, generator=generator),
        "bn1.num_batches_tracked": torch.tensor(7),
    }


LAYOUTS: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "flat": dict,
    "parameters": lambda state: {key: nn.Parameter(v, requires_grad=v.is_floating_point()) for key, v in state.items()},
    "module. prefix and heads": published.swav,
    "VISSL": published.vissl,
    "VISSL, converted": lambda state: {"model_state_dict": published.prefixed(state, "_feature_blocks.")},
    "DINO's full checkpoint": published.dino_full,
    "state_dict": lambda state: {"epoch": 3, "state_dict": published.prefixed(state, "module.")},
    "model": lambda state: {"model": state, "lr": np.float64(0.1)},
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_published_layout_gives_the_trunk_and_nothing_else(tmp_path: Path, layout: str, legacy: bool) -> None:
    state = small_state()
    path = published.save(tmp_path / "weights.pth", LAYOUTS[layout](state), legacy=legacy)
    checkpoint = read_checkpoint(path)
    cleaned = find_network(checkpoint.state, state).state
    assert cleaned.keys() == state.keys()
    assert all(torch.equal(cleaned[key], state[key]) for key in state)
    assert not any(value.requires_grad for value in cleaned.values())
    assert checkpoint.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("legacy", [False, True])
def test_pytorch_files_are_read_whatever_the_file_is_called(tmp_path: Path, legacy: bool) -> None:
    state = small_state()
    path = published.save(tmp_path / "weights.safetensors", state, legacy=legacy)
    found = read_checkpoint(path).state
    assert all(torch.equal(found[key], state[key]) for key in state)


class Malicious:
    def __init__(self, call: Callable[..., object], *args: object) -> None:
        self.call = (call, args)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("container", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("call", [os.mkdir, eval, io.open], ids=lambda call: call.__name__)
def test_a_pickle_that_would_run_code_is_refused_and_not_run(
    tmp_path: Path, call: Callable[..., object], container: str
) -> None:
    trap = tmp_path / "trap"
    argument = f"__import__('os').mkdir({str(trap)!r})" if call is eval else str(trap)
    args: tuple[object, ...] = (argument, "w") if call is io.open else (argument,)
    content = {**small_state(), "bn1.bias": Malicious(call, *args)}
    path = tmp_path / "weights.pth"
    if container == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        published.save(path, content, legacy=container == "legacy")
    with pytest.raises(WeightsError) as error:
        read_checkpoint(path)
    assert not trap.exists()
    assert str(path) in str(error.value)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@settings(max_examples=12)
@given(data=st.data())
def test_a_truncated_file_is_one_error(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("truncated")
    path = folder / "weights.pth"
    if kind == "safetensors":
        safetensors.torch.save_file(small_state(), path)
    else:
        published.save(path, small_state(), legacy=kind == "legacy")
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    # Cut within the name of a type, it names an unknown one.
    with pytest.raises(WeightsError, match=r"not a checkpoint that can be read|is refused"):
        read_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"\x80\x02 no pickle"])
def test_nobody_is_told_to_delete_a_file_of_their_own(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "my own.pth"
    path.write_bytes(content)
    for name in ("dino", "timm:test_resnet"):
        with refused(WeightsError, "not-a-checkpoint") as caught:
            load_backbone(name, weights=path)
        assert "rm " not in str(caught.value)
        assert "--weights" in str(caught.value)
    # A file of the weights folder stands in the way of fetching it again.
    with refused(WeightsError, "not-a-checkpoint"):
        read_checkpoint(path)


def test_a_changed_byte_in_a_tensor_is_found(tmp_path: Path) -> None:
    path = published.save(tmp_path / "weights.pth", {"conv1.weight": torch.arange(1000.0)})
    content = bytearray(path.read_bytes())
    place = content.index(np.float32(500).tobytes() + np.float32(501).tobytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="checksum"):
        read_checkpoint(path)


NOT_CHECKPOINTS = {
    "an empty file": b"",
    "a web page": b"\n<!DOCTYPE html><html><body>Log in</body></html>",
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 86728949\n",
    "begins with": b"\x89PNG\r\n\x1a\n and so on, long enough to look at",
}


@pytest.mark.parametrize("found", NOT_CHECKPOINTS)
def test_what_is_no_checkpoint_is_called_what_it_is(tmp_path: Path, found: str) -> None:
    path = tmp_path / "dino_deitsmall8_pretrain.pth"
    path.write_bytes(NOT_CHECKPOINTS[found])
    with pytest.raises(WeightsError, match=found):
        read_checkpoint(path)


def test_a_missing_file_and_a_folder_are_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.pth", tmp_path):
        with refused(WeightsError, "file-not-readable"):
            read_checkpoint(path)


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = published.save(tmp_path / "weights.pth", {"conv1.weight": torch.zeros(5_000_000)})
    bomb = published.rezip(path, tmp_path / "bomb.pth", {}, compress=True)
    assert bomb.stat().st_size < 1_000_000
    with refused(WeightsError, "not-a-checkpoint"):
        read_checkpoint(bomb)


def test_a_tensor_that_claims_more_bytes_than_the_file_has_is_refused(tmp_path: Path) -> None:
    path = published.save(tmp_path / "weights.pth", {"conv1.weight": torch.zeros(1000)})
    # 1000 as the pickle writes it, for the storage and for the tensor's shape.
    greedy = published.rezip(path, tmp_path / "greedy.pth", {b"M\xe8\x03": b"M\xff\xff"})
    with refused(WeightsError, "not-a-checkpoint"):
        read_checkpoint(greedy)


@pytest.mark.parametrize("content", [[torch.zeros(2)], {}, torch.zeros(2)], ids=["list", "empty", "tensor"])
def test_a_file_without_named_tensors_is_refused(tmp_path: Path, content: object) -> None:
    with refused(WeightsError, "not-a-checkpoint"):
        read_checkpoint(published.save(tmp_path / "weights.pth", content))


def of(number: float) -> dict[str, torch.Tensor]:
    """A network of three tensors, told by its values."""
    return {"conv1.weight": torch.full((2,), number), "bn.bias": torch.full((3,), number), "n": torch.tensor(number)}


def under(prefix: str, number: float) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in of(number).items()}


HEAD = {"dino_head.mlp.0.weight": torch.zeros(4), "fc.weight": torch.zeros(2), "queue": torch.zeros(9)}
# Tensors of 1 are those that the tools' own evaluations use, others are not: prefix → what a file holds.
FILES: dict[str, object] = {
    "": of(1),
    "_orig_mod.": under("_orig_mod.", 1),
    "state_dict.model.net.vision.": {
        "state_dict": under("model.net.vision.", 1) | {"model.text.conv1.weight": torch.zeros(2)}
    },
    "state_dict.module.encoder_q.": {"state_dict": under("module.encoder_q.", 1) | under("module.encoder_k.", 2)},
    "state_dict.module.base_encoder.": {
        "state_dict": under("module.base_encoder.", 1) | under("module.momentum_encoder.", 2) | HEAD
    },
    "backbone.": under("backbone.", 1) | under("backbone_momentum.", 2) | HEAD,
    "teacher.backbone.": {"teacher": under("backbone.", 1) | HEAD, "student": under("module.backbone.", 2) | HEAD},
    "state_dict_ema.": {"state_dict": of(2), "state_dict_ema": of(1), "epoch": 3},
    "model_ema.module.": {"model": of(2), "model_ema": under("module.", 1) | {"n_averaged": torch.tensor(5)}},
    "state_dict_ema.encoder_q.": {
        "state_dict": under("encoder_q.", 2) | under("encoder_k.", 3),
        "state_dict_ema": under("encoder_q.", 1) | under("encoder_k.", 4),
    },
    "a.b.c.": {"a": {"b": under("c.", 1)}, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}},
}


@pytest.mark.parametrize("prefix", FILES)
def test_the_one_complete_network_is_found_under_any_prefix(tmp_path: Path, prefix: str) -> None:
    path = published.save(tmp_path / "weights.pth", FILES[prefix])
    found = find_network(read_checkpoint(path).state, of(0), where=path)
    assert found.prefix == prefix
    assert found.state.keys() == of(0).keys()
    assert all(bool((value == 1).all()) for value in found.state.values())
    assert found.describe(path).startswith(f"the weights are those under '{prefix}' of weights.pth" if prefix else "")


@pytest.mark.parametrize(
    "state",
    [
        of(1) | under("module.", 2),
        under("ema.", 1) | under("net.", 2),
        under("online_encoder.", 1) | under("target_encoder.", 2),
        under("a.teacher.x.", 1) | under("b.student.x.", 2),
    ],
)
def test_of_two_networks_of_which_either_may_be_meant_none_is_taken(state: dict[str, torch.Tensor]) -> None:
    with refused(WeightsError, "several-networks") as caught:
        find_network(state, of(0))
    assert " and tensors under '" in str(caught.value.found)


def test_a_larger_network_that_holds_every_name_is_not_taken() -> None:
    """As a ResNet-101 holds every name of a ResNet-50, with the same shapes."""
    deeper = under("backbone.", 1) | {
        "backbone.layer3.22.conv1.weight": torch.zeros(2),
        "backbone.fc.bias": torch.ones(1),
    }
    found = find_network(deeper, of(0))
    assert sorted(set(found.state) - set(of(0))) == ["layer3.22.conv1.weight"]  # load_strictly refuses it


def test_names_that_are_spelled_otherwise_come_from_the_fullest_wrapper() -> None:
    state = {"model.module.x.1": torch.ones(1), "model.module.x.2": torch.ones(1), "model.y": torch.ones(1)}
    found = find_network(state, of(0))
    assert (found.prefix, sorted(found.state)) == ("model.module.", ["x.1", "x.2"])
    both = {f"teacher.backbone.{name}": value for name, value in state.items()}
    both |= {f"student.backbone.{name}": value for name, value in state.items()}
    assert find_network(both, of(0)).prefix == "teacher.backbone.model.module."


def test_a_name_that_is_there_nested_and_with_dots_is_refused(tmp_path: Path) -> None:
    path = published.save(tmp_path / "weights.pth", {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}})
    with pytest.raises(WeightsError, match=r"a\.b is in it twice"):
        read_checkpoint(path)


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))


def test_a_strict_load_lists_what_is_missing_unknown_and_misshapen() -> None:
    state = network().state_dict()
    state["layer9.weight"] = torch.zeros(1)
    del state["1.bias"]
    state["0.weight"] = torch.zeros(4, 3, 5, 5)
    target = network()
    before = hash_state(target)
    with pytest.raises(WeightsError) as error:
        load_strictly(target, state, where="weights.pth")
    text = str(error.value)
    assert "1 missing: 1.bias" in text
    assert "1 unknown: layer9.weight" in text
    assert "0.weight (4, 3, 5, 5) instead of (4, 3, 3, 3)" in text
    assert "weights.pth" in text
    assert hash_state(target) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    state = network().state_dict()
    state["1.bias"][2] = value
    with pytest.raises(WeightsError, match=r"not finite[\s\S]*1\.bias"):
        load_strictly(network(), state)
