"""Images into batches of one fixed shape.

A batch never crosses a shard and always has ``batch_size`` rows: the tail and unreadable images are zero-padded and
their outputs discarded. So a shard's features depend on the shard alone, and a run that was killed and resumed equals
an uninterrupted one bit for bit. Importing this module imports no torch, so that `embcache verify --source` needs none.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from embcache.data.budget import Decoding
from embcache.data.images import ImageRef, read_image
from embcache.errors import DatasetError, ImageError

if TYPE_CHECKING:
    from torch import Tensor

# Reason of a row whose image left the dataset after its shard was planned: no fault of the image.
LEFT = "no longer in the dataset"

# Batches that are decoded while one is used, if another device than the decoding cores uses it.
AHEAD = 2

Geometry = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]


@dataclass(frozen=True)
class Prepared:
    """One image after decoding, once, and after each geometry.

    ``pixels`` holds a uint8 array of shape (H, W, 3) per geometry; it is empty if the image could not be read, and
    ``reason`` says why.
    """

    pixels: tuple[NDArray[np.uint8], ...]
    digest: str
    reason: str


def prepare(root: Path, source: ImageRef, geometries: Sequence[Geometry], decoding: Decoding | None = None) -> Prepared:
    """Read, decode and transform one image; an unreadable one is a reason, not an exception."""
    if not source.path:
        return Prepared((), "", LEFT)
    try:
        image, digest = read_image(root, source.path, source.place, decoding)
    except ImageError as error:
        return Prepared((), error.digest, error.problem)
    except OSError as error:
        raise medium_failed(root / source.path, error) from error
    try:
        return Prepared(tuple(geometry(image) for geometry in geometries), digest, "")
    except ValueError as error:
        # The file is of another size than when the dataset was scanned, or of one that the transform enlarges too much.
        return Prepared((), digest, str(error))


def medium_failed(path: Path, error: OSError) -> DatasetError:
    """The error for a file that the system does not give: it says nothing about the image, so the run stops."""
    return DatasetError(
        "an image cannot be read for now; it is not quarantined, for that says nothing about the image",
        code="image-not-readable", found=f"{errno.errorcode.get(error.errno or 0, 'error')}: {error.strerror or error}",
        where=path,
        fix="check the disk, the mount and the permissions, then run the same command: what is committed stays",
    )  # fmt: skip


def prepare_batches(
    root: Path,
    sources: Sequence[ImageRef],
    geometries: Sequence[Geometry],
    batch_size: int,
    pool: Executor,
    decoding: Decoding | None = None,
) -> Iterator[list[Prepared]]:
    """Yield the prepared images of one shard batch by batch, decoding the next batches while this one is used."""
    return batches_ahead(
        sources,
        batch_size,
        lambda chunk: [pool.submit(prepare, root, source, geometries, decoding) for source in chunk],
    )


def batches_ahead(
    sources: Sequence[ImageRef],
    batch_size: int,
    submit: Callable[[Sequence[ImageRef]], list[Future[Prepared]]],
    ahead: int = AHEAD,
) -> Iterator[list[Prepared]]:
    """Yield the results of ``submit`` for each batch; the next ``ahead`` batches are begun while this one is used."""
    chunks = [sources[start : start + batch_size] for start in range(0, len(sources), batch_size)]
    pending: deque[list[Future[Prepared]]] = deque()
    begun = 0
    try:
        for index in range(len(chunks)):
            pending.extend(submit(chunk) for chunk in chunks[begun : index + 1 + ahead])
            begun = min(max(begun, index + 1 + ahead), len(chunks))
            yield [future.result() for future in pending.popleft()]
    finally:
        for futures in pending:
            for future in futures:
                future.cancel()


def stack_batch(batch: Sequence[Prepared], geometry: int, out: Tensor) -> Tensor:
    """Stack one geometry of a batch into ``out``, uint8 (B, H, W, 3); absent and unreadable rows become zero."""
    pixels = out.numpy()
    for row, prepared in enumerate(batch):
        pixels[row] = prepared.pixels[geometry] if prepared.pixels else 0
    pixels[len(batch) :] = 0
    return out
