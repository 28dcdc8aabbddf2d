"""The built-in sample: synthetic tiles in the manner of stained tissue, drawn here and the same on every machine.

Sixty "patients", each with a stain of its own and four tiles of each of four kinds of tissue; fifteen are the test.
"""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from pathlib import Path

from embcache.data.dataset import ImageDataset
from embcache.data.datasets.folder import read_label_table
from embcache.data.datasets.tiles import CLASSES, draw_tile
from embcache.data.published import DatasetSource
from embcache.errors import DatasetError
from embcache.io import make_folder, rename_new, staged_name, sweep, write_tree

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
    """Draw all tiles into ``root``, whole or not at all, unless it exists; `DatasetError` if it cannot be written."""
    staged = root.with_name(staged_name(f".{root.name}-"))
    try:
        make_folder(root.parent)
        write_tree(staged, _draw_all())
        rename_new(staged, root)
        sweep(root.parent, root.name)
    except OSError as error:
        raise DatasetError(
            "the sample cannot be drawn",
            found=str(error.strerror),
            where=root,
            fix="name a writable folder with --home",
        ) from error


def _draw_all() -> dict[str, bytes]:
    from PIL import Image  # only drawing needs it: probing from a cache loads this module too

    files = {"README.txt": b"Synthetic images, drawn by embcache for its demonstration.\n"}
    lines = ["id,path,label,group,split"]
    for group in range(GROUPS):
        split = "test" if group % (GROUPS // TEST_GROUPS) == 3 else "train"
        for label, class_name in enumerate(CLASSES):
            for tile in range(TILES_PER_CLASS):
                name, drawn = f"patient{group:02d}/{class_name}-{tile}", BytesIO()
                Image.fromarray(draw_tile(group, label, tile)).save(drawn, "PNG", compress_level=1)
                files[f"{name}.png"] = drawn.getvalue()
                lines.append(f"{name},{name}.png,{class_name},patient{group:02d},{split}")
    return {**files, "labels.csv": ("\n".join(lines) + "\n").encode()}


SOURCE = DatasetSource(
    name="sample",
    description="synthetic tiles in the manner of stained tissue, drawn by embcache",
    expected="labels.csv and patient00/ to patient59/, as `embcache demo` draws them",
    download=None,
    read=read_sample,
    draw=draw_sample,
)
