"""Augmentation by modality (Section 5.2): flips, rotation and a random crop, each image's own and repeatable.

Every choice is made from the sha256 of a key, such as an image's id with an epoch or the number of a view. So the same
key gives the same pixels in any process, thread or order, and no random state is read, kept or disturbed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from embcache.backbones.transforms import centre
from embcache.errors import UsageError

__all__ = ["AUGMENTATIONS", "Augmentation", "augmentation", "centre"]

# Raised whenever a key no longer gives the pixels that it gave: it is part of every recipe with views.
_VERSION = 1

# What a modality has no up, left or right for: (flip left-right, flip top-bottom, largest rotation in degrees).
AUGMENTATIONS: Mapping[str, tuple[bool, bool, float]] = MappingProxyType(
    {
        "patch": (True, True, 0.0),
        "fundus": (True, True, 180.0),
        "chest": (True, False, 10.0),
        "generic": (True, False, 0.0),
    }
)


@dataclass(frozen=True)
class Augmentation:
    """Flips, a rotation and a crop of one image, drawn anew for every key."""

    kind: str  # the rule it was chosen by
    frame: tuple[int, int]  # height and width of what goes in
    size: tuple[int, int]  # height and width of what comes out
    left_right: bool
    top_bottom: bool
    degrees: float  # A rotation about the centre is drawn from ±degrees, bilinear

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
        """What a key stands for: mirrored, overturned, angle in degrees, and the crop's top and left in pixels."""
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
        return {
            "kind": self.kind,
            "frame": list(self.frame),
            "size": list(self.size),
            "left_right": self.left_right,
            "top_bottom": self.top_bottom,
            "degrees": self.degrees,
            "version": _VERSION,
        }


def augmentation(kind: str, frame_size: tuple[int, int], size: tuple[int, int]) -> Augmentation:
    """The augmentation of a modality."""
    if kind not in AUGMENTATIONS:
        raise UsageError("unknown augmentation", expected=", ".join(AUGMENTATIONS), found=kind)
    if frame_size[0] < size[0] or frame_size[1] < size[1]:
        raise UsageError(
            "a crop is larger than the images",
            expected=f"at most {frame_size[1]}×{frame_size[0]}",
            found=f"{size[1]}×{size[0]}",
        )
    return Augmentation(kind, frame_size, size, *AUGMENTATIONS[kind])
