"""Views of an image: the center of its frame, and views augmented by modality (Section 5.2).

An augmentation is a flip, a rotation and a random crop, different for each image and repeatable: every choice is made
from the sha256 of a key, such as an image's ID with an epoch or the number of a view. So the same key gives the same
pixels in any process, thread or order, and no random state is read, kept or disturbed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from embcache.backbones.transforms import Transform, center, frame
from embcache.data.budget import Decoding
from embcache.data.images import ImageRef
from embcache.errors import UsageError
from embcache.extract.batching import AHEAD, Prepared, batches_ahead, prepare
from embcache.sealed import canonical_json

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
        raise UsageError(
            "unknown augmentation", code="unknown-augmentation", expected=", ".join(AUGMENTATIONS), found=kind
        )
    if frame_size[0] < size[0] or frame_size[1] < size[1]:
        raise UsageError(
            "a crop is larger than the images", code="crop-size", expected=f"at most {frame_size[1]}×{frame_size[0]}",
            found=f"{size[1]}×{size[0]}",
        )  # fmt: skip
    return Augmentation(kind, frame_size, size, *AUGMENTATIONS[kind])


# Frame, uint8 (H, W, 3), and digest of images, by id.
Frames = Mapping[str, tuple[NDArray[np.uint8], str]]
# Frames of those images of a batch, by id, that are cached; by frame key.
CachedFrames = Mapping[str, Callable[[Sequence[str]], Frames]]


@dataclass(frozen=True)
class Views:
    """What becomes of a decoded image before normalization; networks that agree on it share pixels."""

    frame: Transform = field(compare=False)  # gives what can be cached: the image before the crop
    frame_key: str  # identifies the frame, whatever its normalization
    size: tuple[int, int]  # height and width of a view
    number: int = 1  # view 0 is the center of the frame, the others are augmented
    augmentation: Augmentation | None = None  # none if there is one view

    def of(self, framed: NDArray[np.uint8], id_: str) -> tuple[NDArray[np.uint8], ...]:
        """The views of one frame, each uint8 (*size, 3); view v of an image does not depend on their number."""
        plain = np.ascontiguousarray(center(framed, self.size))
        if self.augmentation is None:
            return (plain,)
        return (plain, *(self.augmentation(framed, f"view {view} of {id_}") for view in range(1, self.number)))


def make_views(transform: Transform, number: int = 1, augmentation: Augmentation | None = None) -> Views:
    """The views that a transform gives of an image, with an augmentation if there are several."""
    framing = frame(transform)
    key = canonical_json(framing.geometry_dict())
    return Views(framing, key, transform.size, number, augmentation if number > 1 else None)


def prepare_views(
    root: Path,
    source: ImageRef,
    wanted: Sequence[Views],
    cached: Mapping[str, Future[Frames]],
    decoding: Decoding | None = None,
) -> Prepared:
    """As `prepare`, with the views of each of ``wanted`` one after another.

    An image is not read if all its frames are in ``cached``, by frame key; the pixels are the same either way.
    """
    framings = {views.frame_key: views.frame for views in wanted}
    # Frames of a batch are requested before its images, so that even a single thread has read them by now.
    known = [cached[key].result().get(source.id) for key in framings if key in cached]
    there = [each for each in known if each is not None]
    if len(there) == len(framings):
        prepared = Prepared(tuple(pixels for pixels, _ in there), there[0][1], "")
    else:
        prepared = prepare(root, source, [framing.geometry for framing in framings.values()], decoding)
    if not prepared.pixels:
        return prepared
    frames = dict(zip(framings, prepared.pixels, strict=True))
    views = [view for each in wanted for view in each.of(frames[each.frame_key], source.id)]
    return Prepared(tuple(views), prepared.digest, "")


def view_batches(
    root: Path,
    sources: Sequence[ImageRef],
    wanted: Sequence[Views],
    batch_size: int,
    pool: Executor,
    cached: CachedFrames,
    *,
    ahead: int = AHEAD,
    decoding: Decoding | None = None,
) -> Iterator[list[Prepared]]:
    """As `prepare_batches`; ``cached`` gives, by frame key, frames that need no decoding."""
    read = {views.frame_key: cached[views.frame_key] for views in wanted if views.frame_key in cached}

    def submit(chunk: Sequence[ImageRef]) -> list[Future[Prepared]]:
        frames = {key: pool.submit(get, [source.id for source in chunk]) for key, get in read.items()}
        return [pool.submit(prepare_views, root, source, wanted, frames, decoding) for source in chunk]

    return batches_ahead(sources, batch_size, submit, ahead)
