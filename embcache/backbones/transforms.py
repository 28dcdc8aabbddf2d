"""From decoded images to a network's input: one geometry per dataset and backbone, augmentations, normalization.

An augmentation (Section 5.2) is a flip, a rotation and a random crop, different for each image and repeatable: every
choice is made from the sha256 of a key, such as an image's ID with an epoch or the number of a view. So the same key
gives the same pixels in any process, thread or order, and no random state is read, kept or disturbed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from embcache.data.images import Least
from embcache.errors import UsageError, check_choice, check_number
from embcache.sealed import typed

if TYPE_CHECKING:
    from embcache.backbones.catalog import Backbone

MOST_SIDE = 4096
MOST_RESIZED = 1 << 25  # 134 MB in Pillow; a shorter side of 256 reaches it where the longer one is 512 times as long
KINDS = ("paper", "imagenet", "model")

_FILTERS = {each.name.lower(): each for each in Image.Resampling}


@dataclass(frozen=True)
class Transform:
    """Resize, center crop, normalize: everything between a decoded image and a network. Sizes are (height, width)."""

    kind: str  # rule by which it was chosen: "paper", "imagenet" or "model"
    resize: tuple[int, int] | int | None  # exact size, or length of the shorter side, or no resizing
    crop: tuple[int, int] | None  # size of the center crop
    size: tuple[int, int]  # of the result
    interpolation: str  # filter of Pillow, which antialiases when it shrinks; the result is always uint8
    mean: tuple[float, float, float]  # normalization of RGB values scaled to [0, 1]
    std: tuple[float, float, float]
    decode: str = "full"  # of JPEGs: "reduced" decodes them at a scale (1/2, 1/4, 1/8) that leaves twice `resize`

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> Transform:
        """The inverse of :meth:`to_dict`; `ValueError` if a key is unknown or missing, or a value of another type."""
        made: Transform = typed(cls, data)
        if made.interpolation not in _FILTERS:
            raise ValueError(f"interpolation: {made.interpolation!r}, not one of {', '.join(_FILTERS)}")
        if made.decode not in ("full", "reduced"):
            raise ValueError(f"decode: {made.decode!r}, not full or reduced")
        return made

    def to_dict(self) -> dict[str, object]:
        """Every parameter, as JSON: part of the recipe; ``decode`` only where it is not full."""
        data = {name: value for name, value in asdict(self).items() if name != "decode" or self.least}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in data.items()}

    def geometry_dict(self) -> dict[str, object]:
        """What decides the pixels before normalization, as JSON; transforms that agree on it share pixels."""
        return {name: value for name, value in self.to_dict().items() if name not in ("kind", "mean", "std")}

    @property
    def least(self) -> Least:
        """What decoding has to leave twice, where it may reduce."""
        return self.resize if self.decode == "reduced" else None

    def shown(self) -> dict[str, Any]:
        """Normalization and filter, as fields of a `Backbone`."""
        return {name: vars(self)[name] for name in ("mean", "std", "interpolation")}

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
            gray = not image.strides[2]  # one channel, seen three times
            picture = Image.fromarray(image[..., 0] if gray else image)
            resized = np.asarray(picture.resize((target[1], target[0]), _FILTERS[self.interpolation]))
            image = np.broadcast_to(resized[..., None], (*target, 3)) if gray else resized
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


def choose_transform(
    backbone: Backbone, kind: str | None, image_sizes: Collection[tuple[int, int]], decode: str = "full"
) -> Transform:
    """Choose the transform of a dataset's images, given their sizes (width, height), for a backbone."""
    chosen = _choose(backbone, kind, image_sizes)
    return chosen if decode == "full" or not chosen.resize else replace(chosen, decode=decode)


def _choose(backbone: Backbone, kind: str | None, image_sizes: Collection[tuple[int, int]]) -> Transform:
    if kind is None and backbone.transform is not None:
        return backbone.transform
    kind = kind or ("model" if backbone.library else "paper")
    check_choice("--transform", kind, KINDS)
    if kind == "model":
        if backbone.transform is not None:
            return backbone.transform
        if backbone.library != "timm":
            own, size = backbone.library == "onnx", backbone.input_size
            usual = [] if own and size != (224, 224) else ["embcache extract --transform imagenet …"]
            raise UsageError(
                f"{backbone.name} has no preprocessing of its own that embcache can make", code="no-model-transform",
                expected="its own in FILE.json beside the ONNX file" if own else "paper or imagenet",
                found="none in the file or beside it" if own else "none, or another, in its files",
                fix=[*([statement(backbone, size)] if own else []), *usual],
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


def statement(backbone: Backbone, size: tuple[int, int]) -> str:
    """How to state the preprocessing of a network in an ONNX file that takes images of a height and width."""
    file = backbone.origin.removesuffix("#" + backbone.pooling.removeprefix("output "))
    return (
        f'state it in {file}.json: {{"resize": {max(size)}, "crop": {list(size)}, "interpolation": "bicubic", '
        '"mean": [3 numbers], "std": [3 numbers]}'
    )


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


# Raised whenever a key no longer gives the pixels that it gave: it is part of every recipe with views.
_AUGMENTATION = 1

# What a modality has no up, left or right for: (flip left-right, flip top-bottom, largest rotation in degrees).
AUGMENTATIONS: Mapping[str, tuple[bool, bool, float]] = {
    "patch": (True, True, 0.0),
    "fundus": (True, True, 180.0),
    "chest": (True, False, 10.0),
    "generic": (True, False, 0.0),
}


@dataclass(frozen=True)
class Augmentation:
    """Flips, a rotation and a crop of one image, drawn anew for every key."""

    kind: str  # the rule it was chosen by
    frame: tuple[int, int]  # height and width of what goes in
    size: tuple[int, int]  # height and width of what comes out
    left_right: bool
    top_bottom: bool
    degrees: float  # a rotation about the center is drawn from ±degrees, bilinear

    def __call__(self, pixels: NDArray[np.uint8], key: str) -> NDArray[np.uint8]:
        """One image augmented: uint8 (*frame, 3) → uint8 (*size, 3), contiguous."""
        if pixels.shape != (*self.frame, 3):
            raise ValueError(f"an image to augment is {pixels.shape}, not {(*self.frame, 3)}")
        mirrored, overturned, angle, top, left = self.draw(key)
        # (3, H, W); a copy, because a tensor may not share memory that cannot be written.
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        if mirrored:
            image = functional.horizontal_flip(image)
        if overturned:
            image = functional.vertical_flip(image)
        if angle:
            image = functional.rotate(image, angle, interpolation=InterpolationMode.BILINEAR, fill=[0.0])
        image = image[:, top : top + self.size[0], left : left + self.size[1]]
        result: NDArray[np.uint8] = image.permute(1, 2, 0).contiguous().numpy()
        return result

    def draw(self, key: str) -> tuple[bool, bool, float, int, int]:
        """What a key decides: mirrored, overturned, angle in degrees, and the crop's top and left in pixels."""
        # Numbers in [0, 1): uniform, and one never shifts another whatever the modality leaves out.
        bits = np.frombuffer(hashlib.sha256(key.encode("utf-8")).digest(), dtype=">u4")
        uniform = (bits / 2.0**32).tolist()
        angle = (2 * uniform[2] - 1) * self.degrees
        room = [have - want + 1 for have, want in zip(self.frame, self.size, strict=True)]
        return (
            self.left_right and uniform[0] < 0.5,
            self.top_bottom and uniform[1] < 0.5,
            angle,
            int(uniform[3] * room[0]),
            int(uniform[4] * room[1]),
        )

    def describe(self) -> dict[str, object]:
        """Every parameter, as JSON: part of a recipe or of a run's request."""
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return plain | {"version": _AUGMENTATION}


def augmentation(kind: str, frame_size: tuple[int, int], size: tuple[int, int]) -> Augmentation:
    """The augmentation of a modality."""
    if kind not in AUGMENTATIONS:
        raise UsageError(
            "unknown augmentation", code="unknown-augmentation", expected=", ".join(AUGMENTATIONS), found=kind
        )
    if frame_size[0] < size[0] or frame_size[1] < size[1]:
        raise UsageError(
            "a crop is larger than the images", code="crop-size", expected=f"at most {frame_size[1]}×{frame_size[0]}",
            found=f"{size[1]}×{size[0]}",
        )  # fmt: skip
    return Augmentation(kind, frame_size, size, *AUGMENTATIONS[kind])
