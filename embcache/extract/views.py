"""The views of an image that a network is given: its frame, cached or decoded, then the centre and augmentations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from embcache.backbones.transforms import Transform, centre, frame
from embcache.data.budget import Decoding
from embcache.data.images import ImageRef
from embcache.extract.augment import Augmentation
from embcache.extract.batching import AHEAD, Prepared, batches_ahead, prepare
from embcache.sealed import canonical_json

# Frame, uint8 (H, W, 3), and digest of images, by id.
Frames = Mapping[str, tuple[NDArray[np.uint8], str]]


class CachedFrames(Protocol):
    """Frames of images that need not be decoded again."""

    def read(self, ids: Sequence[str]) -> Frames:
        """Those of the asked images that are cached; the others are not in it."""


@dataclass(frozen=True)
class Views:
    """What becomes of a decoded image before normalisation; networks that agree on it share pixels."""

    frame: Transform = field(compare=False)  # gives what can be cached: the image before the crop
    frame_key: str  # what the frame is, whoever normalises it
    size: tuple[int, int]  # height and width of a view
    number: int = 1  # view 0 is the centre of the frame, the others are augmented
    augmentation: Augmentation | None = None  # none where there is one view

    def look(self, framed: NDArray[np.uint8], id_: str) -> tuple[NDArray[np.uint8], ...]:
        """The views of one frame, each uint8 (*size, 3); view v of an image is the same however many there are."""
        plain = np.ascontiguousarray(centre(framed, self.size))
        if self.augmentation is None:
            return (plain,)
        return (plain, *(self.augmentation(framed, f"view {view} of {id_}") for view in range(1, self.number)))


def make_views(transform: Transform, number: int = 1, augmentation: Augmentation | None = None) -> Views:
    """The views that a transform gives of an image, with an augmentation where there are several."""
    framing = frame(transform)
    key = canonical_json(framing.geometry_dict())
    return Views(framing, key, transform.size, number, augmentation if number > 1 else None)


def prepare_views(
    root: Path,
    source: ImageRef,
    wanted: Sequence[Views],
    framed: Mapping[str, Frames] | None = None,
    decoding: Decoding | None = None,
) -> Prepared:
    """As `embcache.extract.batching.prepare`, with the views of each of ``wanted`` one after another.

    An image of which every frame is in ``framed``, by frame key, is not read; the pixels are the same either way.
    """
    framings = {views.frame_key: views.frame for views in wanted}
    known = [(framed or {}).get(key, {}).get(source.id) for key in framings]
    there = [cached for cached in known if cached is not None]
    if there and len(there) == len(framings):
        prepared = Prepared(tuple(pixels for pixels, _ in there), there[0][1], "")
    else:
        prepared = prepare(root, source, [framing.geometry for framing in framings.values()], decoding)
    if not prepared.pixels:
        return prepared
    frames = dict(zip(framings, prepared.pixels, strict=True))
    looked = [view for views in wanted for view in views.look(frames[views.frame_key], source.id)]
    return Prepared(tuple(looked), prepared.digest, "")


def view_batches(
    root: Path,
    sources: Sequence[ImageRef],
    wanted: Sequence[Views],
    batch_size: int,
    pool: Executor,
    cached: Mapping[str, CachedFrames] | None = None,
    *,
    ahead: int = AHEAD,
    decoding: Decoding | None = None,
) -> Iterator[list[Prepared]]:
    """As `embcache.extract.batching.prepare_batches`; ``cached`` gives, by frame key, frames that need no decoding."""
    stores = {views.frame_key: cached[views.frame_key] for views in wanted if cached and views.frame_key in cached}

    def read_frames(ids: Sequence[str]) -> dict[str, Frames]:
        return {key: store.read(ids) for key, store in stores.items()}

    def read_one(source: ImageRef, frames: Future[dict[str, Frames]] | None) -> Prepared:
        # Submitted after the frames of its batch, so that even a single thread has read them by now.
        return prepare_views(root, source, wanted, frames.result() if frames else None, decoding)

    def submit(chunk: Sequence[ImageRef]) -> list[Future[Prepared]]:
        frames = pool.submit(read_frames, [source.id for source in chunk]) if stores else None
        return [pool.submit(read_one, source, frames) for source in chunk]

    return batches_ahead(sources, batch_size, submit, ahead)
