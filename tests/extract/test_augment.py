"""What augmentation may do to an image, and that a key settles all of it."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from embcache.backbones.transforms import AUGMENTATIONS, Augmentation, augmentation, center
from embcache.errors import UsageError
from tests.refusal import refused

KEYS = [f"image {i}" for i in range(400)]


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth image without any symmetry."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("kind", AUGMENTATIONS)
@pytest.mark.parametrize(("frame", "size"), [((96, 96), (96, 96)), ((50, 41), (33, 40))])
def test_an_augmented_image_has_the_size_of_the_network_s_input(
    kind: str, frame: tuple[int, int], size: tuple[int, int]
) -> None:
    result = augmentation(kind, frame, size)(picture(*frame), "a")
    assert (result.shape, result.dtype) == ((*size, 3), np.uint8)
    assert result.flags["C_CONTIGUOUS"]


def test_a_key_settles_everything_and_another_key_changes_it() -> None:
    image, augment = picture(48, 48), augmentation("chest", (48, 48), (40, 40))
    first = [augment(image, key) for key in KEYS[:40]]
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(lambda key: augment(image, key), reversed(KEYS[:40])))
    assert all(np.array_equal(a, b) for a, b in zip(first, reversed(again), strict=True))
    assert len({result.tobytes() for result in first}) == 40


def test_no_random_state_is_read_or_disturbed() -> None:
    image, augment = picture(48, 48), augmentation("fundus", (48, 48), (40, 40))
    results = []
    for seed in (0, 1):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002  # the global state is what is looked at
        torch.manual_seed(seed)
        before = (random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes())  # noqa: NPY002
        results.append(augment(image, "a"))
        after = (random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes())  # noqa: NPY002
        assert before == after
    assert np.array_equal(*results)


@pytest.mark.parametrize(("kind", "expected"), [("patch", 4), ("generic", 2)])
def test_flips_are_exact_and_each_of_them_occurs(kind: str, expected: int) -> None:
    image = picture(32, 32)
    flips = {f.tobytes(): i for i, f in enumerate([image, image[:, ::-1], image[::-1], image[::-1, ::-1]])}
    augment = augmentation(kind, (32, 32), (32, 32))
    counts = np.bincount([flips[augment(image, key).tobytes()] for key in KEYS], minlength=4)
    assert np.count_nonzero(counts) == expected
    # 400 draws: four standard deviations about the middle.
    assert np.abs(counts[:expected] - 400 / expected).max() < 40
    if kind == "generic":
        assert counts[2:].sum() == 0


@pytest.mark.parametrize(("kind", "degrees"), [("chest", 10.0), ("fundus", 180.0)])
def test_rotations_keep_to_their_bounds_and_use_them(kind: str, degrees: float) -> None:
    angles = np.array([augmentation(kind, (256, 256), (224, 224)).draw(key)[2] for key in KEYS])
    assert np.abs(angles).max() <= degrees
    assert angles.min() < -0.95 * degrees
    assert angles.max() > 0.95 * degrees
    # Uniform over ±d: mean 0, deviation d / √3.
    assert abs(angles.mean()) < 4 * degrees / np.sqrt(3 * len(KEYS))
    assert abs(angles.std() / degrees - 1 / np.sqrt(3)) < 0.06


def test_a_rotation_is_that_of_pillow() -> None:
    image = picture(61, 61)
    augment = Augmentation("chest", (61, 61), (61, 61), left_right=False, top_bottom=False, degrees=10.0)
    inside = np.hypot(*(np.mgrid[:61, :61] - 30)) < 28
    for key in KEYS[:4]:
        angle = augment.draw(key)[2]
        expected = np.asarray(Image.fromarray(image).rotate(angle, Image.Resampling.BILINEAR))
        difference = np.abs(augment(image, key).astype(int) - expected.astype(int))[inside]
        assert difference.max() <= 2
    # A quarter turn uncovers the corners.
    turned = augmentation("fundus", (61, 61), (61, 61))
    key = next(key for key in KEYS if 40 < abs(turned.draw(key)[2]) < 50)
    assert turned(np.full((61, 61, 3), 200, np.uint8), key)[0, 0].max() == 0


def test_crops_lie_anywhere_in_the_frame() -> None:
    image = picture(40, 44)
    augment = Augmentation("generic", (40, 44), (32, 32), left_right=False, top_bottom=False, degrees=0.0)
    places = set()
    for key in KEYS:
        top, left = augment.draw(key)[3:]
        places.add((top, left))
        assert np.array_equal(augment(image, key), image[top : top + 32, left : left + 32])
    assert {top for top, _ in places} == set(range(9))
    assert {left for _, left in places} == set(range(13))


def test_the_centre_is_that_of_torchvision() -> None:
    from torchvision.transforms.v2.functional import center_crop

    for height, width in ((256, 256), (257, 259), (225, 300)):
        image = picture(height, width)
        expected = center_crop(torch.from_numpy(image.copy()).permute(2, 0, 1), [224, 224]).permute(1, 2, 0).numpy()
        assert np.array_equal(center(image, (224, 224)), expected)


def test_what_cannot_be_augmented_is_refused() -> None:
    with refused(UsageError, "unknown-augmentation"):
        augmentation("x-ray", (96, 96), (96, 96))
    with refused(UsageError, "crop-size"):
        augmentation("patch", (96, 96), (96, 224))
    with pytest.raises(ValueError, match="not"):
        augmentation("patch", (96, 96), (96, 96))(picture(96, 95), "a")
