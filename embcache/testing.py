"""The contracts that plugins must keep, as functions that raise `AssertionError`; for the tests of plugin authors.

::

    from embcache.testing import check_dataset

    def test_my_dataset() -> None:
        check_dataset(embcache.load_dataset("my_package:read_lesions", "tests/lesions"))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from embcache.data.dataset import ImageDataset

__all__ = ["check_dataset"]


def check_dataset(dataset: ImageDataset, *, images: int = 20) -> None:
    """Check that a loaded dataset keeps its contract.

    Its table is complete and typed, images decode to the size that their header states, and the snapshot that
    extraction keeps returns the same dataset.

    Parameters
    ----------
    dataset : ImageDataset
        As `embcache.load_dataset` returns it.
    images : int
        Number of images that are decoded; the first ones.

    Raises
    ------
    AssertionError
        It breaks the contract.
    """
    import numpy as np

    from embcache.data.dataset import ImageDataset
    from embcache.data.images import read_image, read_size
    from embcache.data.tables import COLUMNS

    table = dataset.table
    assert list(table.columns[:6]) == list(COLUMNS), f"the first columns are {list(table.columns[:6])}, not {COLUMNS}"
    assert table.index.tolist() == list(range(len(dataset))), "rows are numbered from 0"
    assert table["id"].is_unique, "ids are unique"
    for column in ("id", "path", "group", "split"):
        assert all(isinstance(value, str) for value in table[column]), f"column {column!r} is text"
    absent = set(range(len(dataset.class_names))) - set(dataset.labels.tolist())
    assert not absent, f"classes without an image: {[dataset.class_names[c] for c in sorted(absent)]}"
    assert dataset.metric in {"auc", "macro_auc", "kappa"}, f"unknown metric {dataset.metric!r}"
    assert dataset.augment in {"patch", "fundus", "chest", "generic"}, f"unknown augmentation {dataset.augment!r}"
    sizes = dict(dataset.subset_sizes)
    assert set(sizes) == {"S", "M"}, "subsets S and M have a size, and no others"
    assert 0 < sizes["S"] < sizes["M"], "subset S is smaller than M"
    assert dataset.root is not None, "the dataset has a root"
    assert dataset.root.is_absolute(), "the root is an absolute path"
    assert f"{len(dataset):,} images" in repr(dataset)
    for path, place in table[["path", "place"]].head(images).itertuples(index=False):
        pixels, digest = read_image(dataset.root, path, place)
        assert pixels.dtype == np.uint8, f"{path} decodes to {pixels.dtype}"
        assert pixels.shape == (*read_size(dataset.root, path, place)[::-1], 3), f"{path} has shape {pixels.shape}"
        assert len(digest) == 64, "sha256, in hex"
    again = ImageDataset.from_parquet_bytes(dataset.to_parquet_bytes())
    assert again.table.equals(table), "the snapshot has the same table"
    assert {**vars(again), "table": None} == {**vars(dataset), "table": None}, "the snapshot has the same fields"
