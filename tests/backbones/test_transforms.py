from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms as oracle
from torchvision.transforms.functional import InterpolationMode

from embcache.backbones.catalog import BACKBONES, find_backbone
from embcache.backbones.transforms import Transform, choose_transform, normalize
from embcache.errors import UsageError
from tests.refusal import refused

RANDOM, DINO = BACKBONES["random"], BACKBONES["dino"]
RESIZED = ((256, 256), (224, 224), (224, 224))


def parts(transform: Transform) -> tuple[object, object, object]:
    return transform.resize, transform.crop, transform.size


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# Sizes are (width, height), as an image's header gives them.
@pytest.mark.parametrize(
    ("sizes", "backbone", "expected"),
    [
        ({(96, 96)}, "random", (None, None, (96, 96))),
        ({(224, 224)}, "random", (None, None, (224, 224))),
        ({(200, 120)}, "dino", (None, None, (120, 200))),
        ({(225, 100)}, "random", RESIZED),
        ({(100, 225)}, "random", RESIZED),
        ({(100, 100)}, "dino", RESIZED),
        ({(96, 96), (97, 96)}, "random", RESIZED),
        (set(), "random", RESIZED),
    ],
)
def test_the_papers_rule(sizes: set[tuple[int, int]], backbone: str, expected: tuple[object, ...]) -> None:
    transform = choose_transform(BACKBONES[backbone], None, sizes)
    assert parts(transform) == expected
    assert transform.kind == "paper"
    assert transform.interpolation == "bilinear"


@pytest.mark.parametrize(
    ("backbone", "interpolation"), [("random", "bilinear"), ("dino", "bicubic"), ("effnet_lite0", "bicubic")]
)
def test_imagenets_rule_uses_the_backbones_own_interpolation(backbone: str, interpolation: str) -> None:
    transform = choose_transform(BACKBONES[backbone], "imagenet", {(96, 96)})
    assert parts(transform) == (256, (224, 224), (224, 224))
    assert transform.interpolation == interpolation


def test_what_a_backbone_has_no_transform_for_is_bad_usage() -> None:
    with refused(UsageError, "option-choice"):
        choose_transform(RANDOM, "crop", {(96, 96)})
    with refused(UsageError, "no-model-transform"):
        choose_transform(RANDOM, "model", {(96, 96)})
    with refused(UsageError, "image-size"):
        choose_transform(replace(DINO, patch=15), "paper", {(96, 96)})


# Sides from 1: tall, wide, tiny. torchvision works on the same Pillow images.
sides = st.integers(1, 400)


@settings(max_examples=15)
@given(height=sides, width=sides, bicubic=st.booleans())
def test_imagenets_geometry_equals_torchvisions(height: int, width: int, bicubic: bool) -> None:
    image = noise(height, width)
    transform = choose_transform(DINO if bicubic else RANDOM, "imagenet", {(width, height)})
    mode = InterpolationMode.BICUBIC if bicubic else InterpolationMode.BILINEAR
    expected = oracle.Compose([oracle.Resize(256, mode), oracle.CenterCrop(224)])(Image.fromarray(image))
    np.testing.assert_array_equal(transform.geometry(image), np.asarray(expected))


@settings(max_examples=15)
@given(height=sides, width=sides)
def test_the_papers_geometry_equals_torchvisions(height: int, width: int) -> None:
    image = noise(height, width)
    transform = choose_transform(RANDOM, "paper", {(width, height), (1, 999)})
    expected = oracle.Compose([oracle.Resize((256, 256)), oracle.CenterCrop(224)])(Image.fromarray(image))
    found = transform.geometry(image)
    assert found.flags.c_contiguous
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, np.asarray(expected))


def test_an_image_of_another_size_than_the_transform_was_chosen_for_is_refused() -> None:
    with pytest.raises(ValueError, match="97×96 pixels does not become 96×96"):
        choose_transform(RANDOM, "paper", {(96, 96)}).geometry(noise(96, 97))


@pytest.mark.parametrize("backbone", ["swav_fb", "effnet_lite0"])
def test_normalise_equals_torchvisions(backbone: str) -> None:
    transform = choose_transform(BACKBONES[backbone], "paper", {(40, 24)})
    images = [noise(24, 40, seed) for seed in range(3)]
    steps = oracle.Compose([oracle.ToTensor(), oracle.Normalize(transform.mean, transform.std)])
    expected = torch.stack([steps(Image.fromarray(image)) for image in images])
    found = normalize(torch.from_numpy(np.stack(images)), transform, "cpu")
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["resnet10t", "vit_small_patch14_dinov2", "vit_base_patch16_siglip_224"])
def test_a_timm_models_own_transform_equals_timms(name: str) -> None:
    spec = find_backbone(f"timm:{name}")
    transform = choose_transform(spec, None, {(96, 96), (640, 480)})
    assert transform.kind == "model"
    config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    steps = timm.data.create_transform(**config, is_training=False)
    image = noise(120, 170)
    found = normalize(torch.from_numpy(transform.geometry(image)[None]), transform, "cpu")[0]
    torch.testing.assert_close(found, steps(Image.fromarray(image)), rtol=0, atol=1e-6)


def test_preprocessing_that_pads_is_refused() -> None:
    spec = replace(find_backbone("timm:resnet10t"), crop_mode="border")
    with refused(UsageError, "no-model-transform"):
        choose_transform(spec, None, {(96, 96)})
    assert choose_transform(replace(spec, crop_mode="squash"), None, {(96, 96)}).resize == (201, 201)


@pytest.mark.shared
def test_real_images_come_out_as_torchvision_makes_them(shared_data: Path) -> None:
    paths = sorted(path for path in shared_data.rglob("*") if path.suffix in {".png", ".jpeg", ".tif"})[:6]
    assert paths
    for path in paths:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        transform = choose_transform(RANDOM, "paper", {image.size, (1, 1)})
        expected = oracle.Compose([oracle.Resize((256, 256)), oracle.CenterCrop(224)])(image)
        np.testing.assert_array_equal(transform.geometry(np.asarray(image)), np.asarray(expected))
