"""The built-in sample: synthetic tiles in the manner of stained tissue, drawn here and the same on every machine.

Sixty "patients", each with a stain of its own and four tiles of each of four kinds of tissue; fifteen are the test.
"""

from __future__ import annotations

import csv
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from embcache.data.dataset import ImageDataset
from embcache.data.folder import read_label_table
from embcache.data.source import DatasetSource
from embcache.data.tiles import CLASSES, draw_tile
from embcache.errors import DatasetError

GROUPS, TEST_GROUPS, TILES_PER_CLASS = 60, 15, 4


def read_sample(root: Path, name: str) -> ImageDataset:
    """Read the drawn sample through its label table, as anyone's table would be read."""
    if not (root / "labels.csv").is_file():
        raise SOURCE.layout_error(root)
    ds = read_label_table(root / "labels.csv", name)
    if ds.class_names != CLASSES or len(ds) != GROUPS * len(CLASSES) * TILES_PER_CLASS:
        raise SOURCE.layout_error(root, "this is another sample than the one this version draws")
    return replace(
        ds,
        kind="sample",
        metric="macro_auc",
        augment="patch",
        subset_sizes={"S": 40, "M": 200},
        synthetic=True,
        notes=("synthetic images, drawn by embcache: the scores say nothing of real tissue",),
    )


def draw_sample(root: Path) -> None:
    """Draw all tiles into ``root``: beside it first, then renamed, so that the folder is whole or absent.

    Raises
    ------
    DatasetError
        The folder cannot be written.
    """
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
        try:
            _draw_all(staging)
            staging.chmod(0o755)
            try:
                staging.rename(root)
            except OSError:
                if not (root / "labels.csv").is_file():  # else another process was faster, with the same tiles
                    raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise DatasetError(
            "the sample cannot be drawn",
            found=str(error.strerror),
            where=root,
            fix="name a writable folder with --home",
        ) from error


def _draw_all(folder: Path) -> None:
    from PIL import Image  # only drawing needs it: probing from a cache loads this module too

    with (folder / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["id", "path", "label", "group", "split"])
        for group in range(GROUPS):
            split = "test" if group % (GROUPS // TEST_GROUPS) == 3 else "train"
            (folder / f"patient{group:02d}").mkdir()
            for label, class_name in enumerate(CLASSES):
                for tile in range(TILES_PER_CLASS):
                    path = f"patient{group:02d}/{class_name}-{tile}.png"
                    pixels = draw_tile(group, label, tile)
                    Image.fromarray(pixels).save(folder / path, compress_level=1)
                    table.writerow([path.removesuffix(".png"), path, class_name, f"patient{group:02d}", split])
    (folder / "README.txt").write_text("Synthetic images, drawn by embcache for its demonstration.\n", encoding="utf-8")


SOURCE = DatasetSource(
    name="sample",
    description="synthetic tiles in the manner of stained tissue, drawn by embcache",
    expected="labels.csv and patient00/ to patient59/, as `embcache demo` draws them",
    download=None,
    read=read_sample,
    draw=draw_sample,
)
