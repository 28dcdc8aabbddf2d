"""What to predict: images and folders as a user names them, or the images of a dataset."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from embcache.data.dataset import ImageDataset
from embcache.data.files import IMAGE_SUFFIXES, is_image_name, is_litter
from embcache.errors import DatasetNotFoundError
from embcache.extract.batching import Source
from embcache.extract.request import image_root
from embcache.paths import PathLike


@dataclass(frozen=True)
class Asked:
    """Images to predict.

    Attributes
    ----------
    root : Path
        What the paths of the sources are relative to.
    sources : tuple of Source
        Their ids are what the user calls them.
    reasons : tuple of str
        Why an image need not be tried; ``""`` where it may be.
    """

    root: Path
    sources: tuple[Source, ...]
    reasons: tuple[str, ...]


def images_of_dataset(ds: ImageDataset) -> Asked:
    """All images of a dataset, by their ids; `DatasetNotFoundError` where its folder is not here."""
    columns = [ds.table[name].tolist() for name in ("id", "path", "member")]
    sources = tuple(Source(image, path, member) for image, path, member in zip(*columns, strict=True))
    return Asked(image_root(ds), sources, ("",) * len(sources))


def images_of_paths(paths: Sequence[PathLike]) -> Asked:
    """Images anywhere in the file system, by their paths as named; links are followed to where they lead."""
    sources, reasons = [], []
    for path in list_images(paths):
        real = os.path.realpath(path)
        sources.append(Source(str(path), real.removeprefix(Path(real).anchor), -1))
        reasons.append(_not_readable(real))
    return Asked(Path(Path.cwd().anchor), tuple(sources), tuple(reasons))


def list_images(paths: Sequence[PathLike]) -> list[Path]:
    """The named files, and the images in and below the named folders (sorted), each once.

    A file that was named is kept whatever its name; linked folders inside folders are not followed.

    Raises
    ------
    DatasetNotFoundError
        A folder holds no image.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            found[path] = None
            continue
        inside = [image for image in _walk(path) if is_image_name(image.name)]
        if not inside:
            raise DatasetNotFoundError(
                "a folder holds no images",
                expected="files that end in " + ", ".join(sorted(IMAGE_SUFFIXES)),
                found=", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "an empty folder",
                where=path,
                fix="name the images themselves, or the folder they are in",
            )
        found |= dict.fromkeys(inside)
    return list(found)


def _not_readable(path: str) -> str:
    """Why a file need not even be opened; ``""`` where it may be tried."""
    try:
        os.stat(path)  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        return "the file is not there"
    except (OSError, ValueError) as error:
        return str(getattr(error, "strerror", None) or error)
    return "" if os.access(path, os.R_OK) else "the file may not be read"


def _walk(folder: Path) -> Iterator[Path]:
    for top, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_litter(name))
        yield from (Path(top) / name for name in sorted(files))
