"""From decoded images to what a network is given: one geometry per dataset and backbone, then normalisation."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from embcache.backbones.catalog import Backbone
from embcache.errors import UsageError, check_number

MOST_SIDE = 4096
MOST_RESIZED = 1 << 25  # 134 MB in Pillow; a shorter side of 256 reaches it where the longer one is 512 times as long
KINDS = ("paper", "imagenet", "model")

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Transform:
    """Resize, centre crop, normalise: all that lies between a decoded image and a network."""

    kind: str  # the rule it was chosen by
    resize: tuple[int, int] | int | None  # exact height and width, or length of the shorter side, or no resizing
    crop: tuple[int, int] | None  # height and width of the centre crop
    size: tuple[int, int]  # height and width of the result
    interpolation: str  # pillow's filter, which antialiases when it shrinks; the result is always uint8
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def geometry(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Resize and crop one RGB image: uint8 (H, W, 3) → uint8 (*size, 3), contiguous."""
        height, width = image.shape[:2]
        target = _resized(self.resize, height, width)
        if (
            target != (height, width) and max(target[0], height) * target[1] > MOST_RESIZED
        ):  # the rows are resized before the columns
            raise ValueError(
                f"an image of {width:,}×{height:,} pixels is too thin for the transform: it would become "
                f"{target[1]:,}×{max(target[0], height):,} pixels on the way"
            )
        if target != (height, width):
            resized = Image.fromarray(image).resize((target[1], target[0]), _FILTERS[self.interpolation])
            image = np.asarray(resized)
        if self.crop is not None:
            image = centre(image, self.crop)
        if image.shape[:2] != self.size:
            kept = "" if self.resize else ": the images of this store keep their size"
            raise ValueError(f"an image of {width}×{height} pixels does not become {self.size[1]}×{self.size[0]}{kept}")
        return np.ascontiguousarray(image)

    def geometry_dict(self) -> dict[str, object]:
        """What decides the pixels before they are normalised, as JSON; transforms that agree on it share pixels."""
        return {
            "resize": list(self.resize) if isinstance(self.resize, tuple) else self.resize,
            "crop": list(self.crop) if self.crop else None,
            "size": list(self.size),
            "interpolation": self.interpolation,
        }

    def to_dict(self) -> dict[str, object]:
        """Every parameter, as JSON: part of the recipe."""
        return {"kind": self.kind, **self.geometry_dict(), "mean": list(self.mean), "std": list(self.std)}


def frame(transform: Transform) -> Transform:
    """A transform without its crop, where every image comes to one size before it: what is kept of an image.

    A centre crop of the frame is the transform's result; a random one is an augmentation. Where only the shorter side
    is resized, images differ in size until they are cropped: their frame is the result itself.
    """
    resized = transform.resize
    if transform.crop is None or not isinstance(resized, tuple) or min(resized) < max(transform.crop):
        return transform
    return replace(transform, crop=None, size=resized)


def centre(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The centre of an image, uint8 (H, W, 3) → uint8 (*size, 3): a view, of the whole where the size is the same."""
    # round() is banker's rounding, as in torchvision's center_crop, which published features were made with.
    top, left = (round((have - want) / 2.0) for have, want in zip(image.shape[:2], size, strict=True))
    return image[top : top + size[0], left : left + size[1]]


def _resized(resize: tuple[int, int] | int | None, height: int, width: int) -> tuple[int, int]:
    if resize is None:
        return height, width
    if isinstance(resize, tuple):
        return resize
    # The longer side rounds down, as in torchvision.
    if height <= width:
        return resize, int(resize * width / height)
    return int(resize * height / width), resize


def choose_transform(backbone: Backbone, kind: str | None, image_sizes: Collection[tuple[int, int]]) -> Transform:
    """Choose what is done to the images of a dataset before a backbone sees them."""
    own = backbone.pooling == "timm"
    kind = kind or ("model" if own else "paper")
    if kind not in KINDS:
        raise UsageError(
            "unknown transform", expected=", ".join(KINDS), found=kind, fix="embcache extract --transform paper …"
        )
    if kind == "model":
        if not own:
            raise UsageError(
                f"{backbone.name} has no preprocessing of its own to use", expected="paper or imagenet", found=kind,
                fix="embcache extract --transform imagenet …",
            )  # fmt: skip
        return _model_transform(backbone)
    if kind == "paper":
        as_is = _size_to_keep(image_sizes, backbone.patch)
        if as_is is not None:
            return Transform("paper", None, None, as_is, "bilinear", backbone.mean, backbone.std)
        chosen = Transform("paper", (256, 256), (224, 224), (224, 224), "bilinear", backbone.mean, backbone.std)
    else:
        chosen = Transform("imagenet", 256, (224, 224), (224, 224), backbone.interpolation, backbone.mean, backbone.std)
    if 224 % backbone.patch:
        raise UsageError(
            f"{backbone.name} cannot take the 224×224 images of the transform {kind!r}",
            expected=f"sides that divide by its patch of {backbone.patch}", found="224×224",
            fix="embcache extract --transform model …",
        )  # fmt: skip
    return chosen


def _size_to_keep(image_sizes: Collection[tuple[int, int]], patch: int) -> tuple[int, int] | None:
    """(height, width) of images that the paper's transform leaves as they are, else None."""
    if len(set(image_sizes)) != 1:
        return None
    ((width, height),) = set(image_sizes)
    if max(width, height) > 224 or width % patch or height % patch:
        return None
    return height, width


def _model_transform(backbone: Backbone) -> Transform:
    """The evaluation transform that timm makes from a model's configuration."""
    height, width = backbone.input_size
    check_number("the side of a model's input", max(height, width), 1, MOST_SIDE)  # a file of others says it
    scaled = (math.floor(height / backbone.crop_pct), math.floor(width / backbone.crop_pct))
    if backbone.crop_mode == "center" and height == width:
        resize: tuple[int, int] | int = scaled[0]
    elif backbone.crop_mode == "squash":
        resize = scaled
    else:
        raise UsageError(
            f"the preprocessing of {backbone.name} is not one that embcache has",
            expected="a centre crop of square images, or images squashed to one size",
            found=f"crop mode {backbone.crop_mode!r} at {width}×{height}",
            fix="embcache extract --transform imagenet …",
        )  # fmt: skip
    return Transform(
        "model", resize, backbone.input_size, backbone.input_size, backbone.interpolation, backbone.mean, backbone.std
    )


def normalise(batch: torch.Tensor, transform: Transform, device: torch.device | str) -> torch.Tensor:
    """Turn pixels into a network's input, on ``device``."""
    pixels = batch.to(device, non_blocking=True).permute(0, 3, 1, 2).to(torch.float32).div_(255)
    return pixels.sub_(_channels(transform.mean, device)).div_(_channels(transform.std, device))


@lru_cache(maxsize=64)
def _channels(values: tuple[float, float, float], device: torch.device | str) -> torch.Tensor:
    # Once for all batches: taking numbers to a GPU would wait for all that it has still to do.
    with torch.inference_mode(mode=False):
        return torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1)
