"""Backbones and head as one model: its size, its names, its arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models import get_pretrained_cfg

from embcache.backbones.catalog import find_backbone
from embcache.backbones.transforms import Transform, choose_transform
from embcache.config import FinetuneConfig
from embcache.data.dataset import ImageDataset
from embcache.errors import StoreError, UsageError, WeightsError
from embcache.extract.worker import freeze
from embcache.finetune.finetune import finetune_images
from embcache.finetune.finetune_plan import choose_schedule, choose_transforms
from embcache.finetune.model import ImageModel, assemble, check_head, empty_backbone, load_finetuned
from embcache.probe.heads import heads, make_head
from embcache.probe.schedule import gentle
from embcache.probe.stack import stream_generator
from embcache.runs.folders import runs_dir
from tests.finetune.conftest import QUICK, RESNET, VIT
from tests.refusal import refused

CPU = torch.device("cpu")


def build(head: str, backbones: list[str], classes: int = 5) -> ImageModel:
    specs = [find_backbone(name) for name in backbones]
    model = check_head(make_head(head), backbones)
    transforms = {spec.name: choose_transform(spec, "paper", {(96, 96)}) for spec in specs}
    networks = {spec.name: empty_backbone(spec, (96, 96)) for spec in specs}
    params = model.init(stream_generator("0", "init"), {spec.name: spec.dim for spec in specs}, classes)
    return assemble(networks, transforms, model, params, CPU, "fp32")


@pytest.mark.parametrize(
    ("head", "backbones", "total"),
    [
        ("linear", ["dino"], 21_677_957),
        ("dvme", ["simclr", "swav", "dino"], 72_364_045),
    ],
)
def test_finetuned_models_have_the_paper_s_sizes(head: str, backbones: list[str], total: int) -> None:
    assert sum(value.numel() for value in build(head, backbones).trainable().values()) == total


def test_every_parameter_is_trained(ds: ImageDataset) -> None:
    model = build("dvme", [RESNET, VIT], classes=2)
    pixels = torch.randint(0, 256, (4, 96, 96, 3), dtype=torch.uint8)
    masks = {"hidden": torch.ones(4, 512)}
    model.train()
    model.logits(pixels, masks).square().sum().backward()
    without = [name for name, value in model.trainable().items() if value.grad is None]
    assert not without


def test_features_are_those_of_extraction(ds: ImageDataset) -> None:
    from embcache.backbones.catalog import load_backbone

    loaded = load_backbone(VIT, image_size=(32, 32))
    transform = choose_transform(loaded.spec, "paper", {(32, 32)})
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    features = freeze(loaded, transform, "cpu", "fp32").features(pixels)
    params = {"classifier.weight": torch.eye(loaded.spec.dim)[:5], "classifier.bias": torch.zeros(5)}
    head = check_head(make_head("linear"), [VIT])
    model = assemble({VIT: loaded.module}, {VIT: transform}, head, params, CPU, "fp32")
    model.train(False)
    assert np.allclose(model.logits(torch.from_numpy(pixels)).detach().numpy(), features[:, :5], atol=1e-5)


def test_sets_of_backbones_are_checked() -> None:
    with refused(UsageError, "head-takes-one-backbone"):
        check_head(make_head("linear"), ["random", "dino"])
    with refused(UsageError, "repeated-backbone"):
        check_head(make_head("dvme"), ["dino", "dino"])
    with refused(UsageError, "no-backbone"):
        check_head(make_head("linear"), [])


@pytest.mark.parametrize("name", heads.names())
def test_heads_that_need_fixed_features_are_refused(name: str) -> None:
    head = make_head(name)
    backbones = ["random", "dino"] if head.fuses else ["random"]
    if name in ("concat", "knn", "logreg", "ridge"):
        with refused(UsageError, "head-needs-features") as caught:
            check_head(head, backbones)
        assert caught.value.expected is not None
        assert name not in caught.value.expected.split(", ")
    else:
        assert check_head(head, backbones) is head


def test_dino_is_trained_gently() -> None:
    dino, random = (find_backbone(name) for name in ("dino", "random"))
    for specs in ([dino], [random, dino], [find_backbone("timm:vit_small_patch8_224.dino")]):
        schedule = choose_schedule(specs, FinetuneConfig())
        assert (schedule.lr, schedule.batch_size) == (1e-4, 16)
    assert (choose_schedule([random], FinetuneConfig()).lr, choose_schedule([random], FinetuneConfig()).batch_size) == (
        1e-3,
        64,
    )
    chosen = choose_schedule([dino], FinetuneConfig(lr=3e-4, batch_size=8, max_epochs=4))
    assert (chosen.lr, chosen.batch_size, chosen.max_epochs) == (3e-4, 8, 4)


@pytest.mark.parametrize(
    ("backbones", "expected"),
    [
        (["simclr", "swav", "dino"], True),
        (["timm:vit_small_patch8_224"], True),  # its default tag is dino
        (["timm:vit_small_patch8_224_dino"], True),  # timm's name of it before tags
        (["timm:hf-hub:1aurent/vit_small_patch8_224.lunit_dino"], True),
        (["timm:vit_small_patch8_224.dinov2"], False),
        (["timm:vit_small_patch16_224.dino"], False),
        (["timm:hf-hub:vit_small_patch8_224.dino/resnet50.lunit_swav"], False),
        (["random", "effnet_lite0"], False),
        ([], False),
    ],
)
def test_gentle_is_for_vit_s8_trained_by_dino(backbones: list[str], expected: bool) -> None:
    assert gentle(backbones) == expected


def test_timm_means_dino_where_a_vit_s8_has_no_tag() -> None:
    config = get_pretrained_cfg("vit_small_patch8_224")
    assert config is not None
    assert config.tag == "dino"


def test_backbones_that_are_trained_together_see_the_same_pixels() -> None:
    random, dino = find_backbone("random"), find_backbone("dino")
    assert choose_transforms([random], None, {(90, 90)})["random"].size == (90, 90)
    chosen = choose_transforms([random, dino], None, {(90, 90)})  # 90 does not divide by 8
    assert {t.size for t in chosen.values()} == {(224, 224)}
    assert {t.size for t in choose_transforms([random, dino], None, {(96, 96)}).values()} == {(96, 96)}
    with refused(UsageError, "different-transforms"):
        choose_transforms([random, dino], "imagenet", {(300, 300)})  # bilinear and bicubic


def test_a_saved_model_predicts_what_the_run_predicted(ds: ImageDataset, pictures: Path) -> None:
    from PIL import Image

    from embcache.runs.folders import load_predictions

    result = finetune_images(ds, [RESNET, VIT], **{**QUICK, "head": "dvme-noattn", "max_epochs": 1})
    run = runs_dir(ds.name) / result.id
    table = load_predictions(run)
    paths = dict(zip(ds.table["id"], ds.table["path"], strict=True))
    for fold in range(2):
        model = load_finetuned(result.id, fold)
        assert isinstance(model.transform, Transform)
        rows = table[table["fold"] == fold]
        pixels = np.stack([model.transform.geometry(np.asarray(Image.open(pictures / paths[i]))) for i in rows["id"]])
        assert np.allclose(model.predict(pixels), rows[["p_0", "p_1"]], atol=1e-6)


def test_what_cannot_be_loaded_is_said(ds: ImageDataset) -> None:
    result = finetune_images(ds, RESNET, **{**QUICK, "max_epochs": 1, "models": False})
    run = runs_dir(ds.name) / result.id
    assert not list(run.glob("*.safetensors"))
    with refused(StoreError, "models-not-kept"):
        load_finetuned(result.id)
    with refused(UsageError, "unknown-model"):
        load_finetuned(result.id, 7)


def test_a_model_of_another_network_is_refused() -> None:
    model = build("linear", ["random"])
    state = {name: value for name, value in model.state().items() if not name.startswith("head.")}
    with refused(WeightsError, "weights-do-not-fit"):
        model.load(state)
