"""What to predict: images and folders as a user names them, or the images of a dataset."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from embcache.data.dataset import ImageDataset
from embcache.data.dicom import dicom_patient, has_dicom_suffix
from embcache.data.files import IMAGE_SUFFIXES, TABLE_SUFFIXES, is_image_name, is_litter
from embcache.data.folder import UNGROUPED
from embcache.data.labels import read_table
from embcache.errors import DatasetError, DatasetNotFoundError
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
    names : tuple of str
        What the user calls them: paths, which may be anything that the file system allows, or ids.
    sources : tuple of Source
        Where they are.
    reasons : tuple of str
        Why an image need not be tried; ``""`` where it may be.
    groups : tuple of str
        Patient, slide … of each image; ``""`` where it is not known.
    """

    root: Path
    names: tuple[str, ...]
    sources: tuple[Source, ...]
    reasons: tuple[str, ...]
    groups: tuple[str, ...]


def images_of_dataset(ds: ImageDataset) -> Asked:
    """All images of a dataset, by their ids; `DatasetNotFoundError` where its folder is not here."""
    columns = [ds.table[name].tolist() for name in ("id", "path", "member")]
    sources = tuple(Source(image, path, member) for image, path, member in zip(*columns, strict=True))
    known = ds.grouped and UNGROUPED not in ds.notes
    groups = tuple(ds.table["group"].tolist()) if known else ("",) * len(sources)
    return Asked(image_root(ds), tuple(columns[0]), sources, ("",) * len(sources), groups)


def images_of_paths(paths: Sequence[PathLike]) -> Asked:
    """Images anywhere in the file system, by their paths as named; links are followed to where they lead."""
    found = list_images(paths)
    real = [os.path.realpath(path) for path in found]
    sources = tuple(Source(str(k), path.removeprefix(Path(path).anchor), -1) for k, path in enumerate(real))
    reasons = tuple(map(_not_readable, real))
    groups = tuple(found[path] or ("" if why else _patient(path)) for path, why in zip(found, reasons, strict=True))
    return Asked(Path(Path.cwd().anchor), tuple(map(str, found)), sources, reasons, groups)


def list_images(paths: Sequence[PathLike]) -> dict[Path, str]:
    """The named files, those that tables name, and the images in and below the named folders (sorted), each once.

    A file that was named is kept whatever its name, but for a CSV, TSV or Parquet file: it is a table with a column
    ``path``, relative to its folder, and perhaps ``group``. Linked folders inside folders are not followed.

    Returns
    -------
    dict of Path to str
        Group of each image; empty where no table names one.

    Raises
    ------
    DatasetError
        A table cannot be read or lacks the column ``path``.
    DatasetNotFoundError
        A folder holds no image.
    """
    found: dict[Path, str] = {}
    for path in map(Path, paths):
        if path.is_file() and path.suffix.lower() in TABLE_SUFFIXES:
            found |= _listed(path)
            continue
        if not path.is_dir():
            found.setdefault(path, "")
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
        found |= {image: found.get(image, "") for image in inside}
    return found


def _listed(file: Path) -> dict[Path, str]:
    """Images that a table names, with their groups."""
    table = read_table(file, ["path"])
    if table.empty or not all(table["path"]):
        raise DatasetError("a row of a table names no image", expected="a path in every row", where=file)
    groups = table["group"] if "group" in table else [""] * len(table)
    return {file.parent / path: group for path, group in zip(table["path"], groups, strict=True)}


def _patient(path: Path) -> str:
    """PatientID of a DICOM file; empty for other files."""
    if not has_dicom_suffix(path.name):
        return ""
    with path.open("rb") as file:
        return dicom_patient(file, path.name)


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
    def refuse(error: OSError) -> None:  # a folder that may not be read is told, not passed over
        raise error

    for top, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not is_litter(name))
        yield from (Path(top) / name for name in sorted(files))
