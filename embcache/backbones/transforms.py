"""From decoded images to a network's input: one geometry per dataset and backbone, then normalization."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from embcache.errors import UsageError, check_choice, check_number
from embcache.sealed import typed

if TYPE_CHECKING:
    from embcache.backbones.catalog import Backbone

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
    """Resize, center crop, normalize: everything between a decoded image and a network.

    Parameters
    ----------
    kind : {"paper", "imagenet", "model"}
        Rule by which it was chosen.
    resize : (int, int) or int or None
        Exact height and width, or length of the shorter side, or no resizing.
    crop : (int, int) or None
        Height and width of the center crop.
    size : (int, int)
        Height and width of the result.
    interpolation : str
        Filter of Pillow, which antialiases when it shrinks; the result is always uint8.
    mean, std : (float, float, float)
        Normalization of RGB values scaled to [0, 1].
    """

    kind: str
    resize: tuple[int, int] | int | None
    crop: tuple[int, int] | None
    size: tuple[int, int]
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> Transform:
        """The inverse of :meth:`to_dict`; `ValueError` if a key is unknown or missing, or a value of another type."""
        made: Transform = typed(cls, data)
        if made.interpolation not in _FILTERS:
            raise ValueError(f"interpolation: {made.interpolation!r}, not one of {', '.join(_FILTERS)}")
        return made

    def to_dict(self) -> dict[str, object]:
        """Every parameter, as JSON: part of the recipe."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def geometry_dict(self) -> dict[str, object]:
        """What decides the pixels before normalization, as JSON; transforms that agree on it share pixels."""
        return {name: self.to_dict()[name] for name in ("resize", "crop", "size", "interpolation")}

    def geometry(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Resize and crop one RGB image: uint8 (H, W, 3) → uint8 (*size, 3), contiguous."""
        height, width = image.shape[:2]
        target = _resized(self.resize, height, width)
        if target != (height, width):
            between = max(target[0], height) * target[1]  # the rows are resized before the columns
            if between > MOST_RESIZED:
                raise ValueError(
                    f"an image of {width:,}×{height:,} pixels is too thin for the transform: it would become "
                    f"{target[1]:,}×{max(target[0], height):,} pixels on the way"
                )
            resized = Image.fromarray(image).resize((target[1], target[0]), _FILTERS[self.interpolation])
            image = np.asarray(resized)
        if self.crop is not None:
            image = center(image, self.crop)
        if image.shape[:2] != self.size:
            kept = "" if self.resize else ": the images of this store keep their size"
            raise ValueError(f"an image of {width}×{height} pixels does not become {self.size[1]}×{self.size[0]}{kept}")
        return np.ascontiguousarray(image)


def frame(transform: Transform) -> Transform:
    """A transform without its crop, if every image has one size before it: the part of an image that is cached.

    A center crop of the frame is the transform's result; a random one is an augmentation. If only the shorter side
    is resized, images differ in size until they are cropped: the frame is the result itself.
    """
    resized = transform.resize
    if transform.crop is None or not isinstance(resized, tuple) or min(resized) < max(transform.crop):
        return transform
    return replace(transform, crop=None, size=resized)


def center(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The center of an image: a view, uint8 (H, W, 3) → uint8 (*size, 3)."""
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
    """Choose the transform of a dataset's images, given their sizes (width, height), for a backbone."""
    if kind is None and backbone.transform is not None:
        return backbone.transform
    own = backbone.pooling == "timm"
    kind = kind or ("model" if own else "paper")
    check_choice("--transform", kind, KINDS)
    if kind == "model":
        if backbone.transform is not None:
            return backbone.transform
        if not own:
            raise UsageError(
                f"{backbone.name} has no preprocessing of its own", code="no-model-transform",
                expected="paper or imagenet", found=kind, fix="embcache extract --transform imagenet …",
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
            f"{backbone.name} cannot take the 224×224 images of the transform {kind!r}", code="image-size",
            expected=f"sides that divide by its patch of {backbone.patch}", found="224×224",
            fix="embcache extract --transform model …",
        )  # fmt: skip
    return chosen


def _size_to_keep(image_sizes: Collection[tuple[int, int]], patch: int) -> tuple[int, int] | None:
    """(height, width) of images that the paper's transform keeps as they are, else None."""
    distinct = set(image_sizes)
    if len(distinct) != 1:
        return None
    ((width, height),) = distinct
    return None if max(width, height) > 224 or width % patch or height % patch else (height, width)


def _model_transform(backbone: Backbone) -> Transform:
    """The evaluation transform that timm makes from a model's configuration."""
    height, width = size = backbone.input_size
    check_number("the side of a model's input", max(size), 1, MOST_SIDE)  # the configuration is a file of others
    scaled = (math.floor(height / backbone.crop_pct), math.floor(width / backbone.crop_pct))
    if backbone.crop_mode == "center" and height == width:
        resize: tuple[int, int] | int = scaled[0]
    elif backbone.crop_mode == "squash":
        resize = scaled
    else:
        raise UsageError(
            f"embcache cannot do the preprocessing of {backbone.name}", code="no-model-transform",
            expected="a center crop of square images, or images squashed to one size",
            found=f"crop mode {backbone.crop_mode!r} at {width}×{height}",
            fix="embcache extract --transform imagenet …",
        )  # fmt: skip
    return Transform("model", resize, size, size, backbone.interpolation, backbone.mean, backbone.std)


def normalize(batch: torch.Tensor, transform: Transform, device: torch.device | str) -> torch.Tensor:
    """Pixels, uint8 (B, H, W, 3), as a network's input on ``device``, float32 (B, 3, H, W)."""
    pixels = batch.to(device, non_blocking=True).permute(0, 3, 1, 2).to(torch.float32).div_(255)
    return pixels.sub_(_channels(transform.mean, device)).div_(_channels(transform.std, device))


@lru_cache(maxsize=64)
def _channels(values: tuple[float, float, float], device: torch.device | str) -> torch.Tensor:
    # Once for all batches: copying numbers to a GPU would wait for all the work queued there.
    with torch.inference_mode(mode=False):
        return torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1)
