"""What every dataset promises, whatever its layout.

A dataset joins by its own test module: ``tests/data/test_<name>.py`` has ``write_layout(root)``, which writes a small
layout of its kind and returns what to load.
"""

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from embcache.data.dataset import DATASETS, ImageDataset, find_dataset, load_dataset
from embcache.data.images import read_image, read_size
from embcache.errors import DatasetError, DatasetNotFoundError
from embcache.paths import slug
from tests.extract.test_augment import MODALITIES

Load = Callable[..., ImageDataset]


@pytest.fixture(scope="module", params=list(DATASETS))
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """(name, folder, what to load below it): written once for all tests of a dataset."""
    folder = tmp_path_factory.mktemp(request.param)
    target = importlib.import_module(f"tests.data.test_{request.param}").write_layout(folder)
    return request.param, folder, target.relative_to(folder)


@pytest.fixture
def load(written: tuple[str, Path, Path]) -> Load:
    """Load the dataset from the folder that all tests share."""
    name, folder, target = written
    return lambda **options: load_dataset(name, folder / target, **options)


@pytest.fixture
def own(written: tuple[str, Path, Path], tmp_path: Path) -> tuple[str, Path]:
    """The dataset's name and a copy that the test may change."""
    name, folder, target = written
    shutil.copytree(folder, tmp_path / "copy", symlinks=True)
    return name, tmp_path / "copy" / target


def test_the_table_holds_what_the_contract_says(load: Load) -> None:
    ds = load()
    assert list(ds.table.columns[:6]) == ["id", "path", "member", "label", "group", "split"]
    assert ds.table.index.tolist() == list(range(len(ds)))
    assert ds.table["id"].is_unique
    assert ds.table["member"].dtype == ds.table["label"].dtype == "int64"
    assert set(ds.labels.tolist()) >= set(range(len(ds.class_names)))
    assert all(isinstance(value, str) for column in ("id", "path", "group", "split") for value in ds.table[column])
    assert ds.metric in {"auc", "macro_auc", "kappa"}
    assert ds.augment == MODALITIES[ds.kind]
    assert "F" not in ds.subset_sizes
    assert 0 < ds.subset_sizes["S"] < ds.subset_sizes["M"]
    assert ds.kind in DATASETS
    assert ds.root is not None
    assert ds.root.is_absolute()
    assert str(len(ds.select("train"))) in repr(ds)


def test_loading_twice_gives_the_same(load: Load) -> None:
    one, two = load(), load()
    assert one.table.equals(two.table)
    assert {**vars(one), "table": None} == {**vars(two), "table": None}


def test_every_image_is_there_and_decodes_to_the_size_its_header_says(load: Load) -> None:
    ds = load()
    for path, member in ds.table[["path", "member"]].head(20).itertuples(index=False):
        pixels, digest = read_image(ds.root, path, member)
        assert pixels.dtype == np.uint8
        assert pixels.shape == (*read_size(ds.root, path, member)[::-1], 3)
        assert len(digest) == 64


def test_a_snapshot_returns_the_same_dataset(load: Load) -> None:
    ds = load()
    again = ImageDataset.from_parquet_bytes(ds.to_parquet_bytes())
    assert again.table.equals(ds.table)
    assert {**vars(again), "table": None} == {**vars(ds), "table": None}


def test_the_name_can_be_set_and_the_kind_stays(load: Load) -> None:
    ds = load(dataset_name="my own")
    assert (ds.name, ds.kind) == ("my own", load().kind)


def test_a_missing_or_empty_root_tells_what_is_expected(written: tuple[str, Path, Path], tmp_path: Path) -> None:
    name = written[0]
    (tmp_path / "empty").mkdir()
    for root in [tmp_path / "empty"] + ([tmp_path / "absent"] if DATASETS[name].draw is None else []):
        with pytest.raises(DatasetNotFoundError) as caught:
            load_dataset(name, root)
        assert caught.value.expected
        assert caught.value.fix
        assert str(root) in str(caught.value)


def test_an_image_that_disappears_is_an_error_or_leaves_the_table(own: tuple[str, Path]) -> None:
    name, root = own
    ds = load_dataset(name, root)
    if ds.table["member"].iloc[0] >= 0:
        pytest.skip("its images are rows of array files")
    gone = ds.ids[0]
    ds.file_path(0).unlink()
    if DATASETS[name].read(root.resolve(), name).ids[0] == gone:  # the labels are kept apart from the images
        with pytest.raises(DatasetError, match="--allow-missing"):
            load_dataset(name, root)
    after = load_dataset(name, root, allow_missing=True)
    assert gone not in after.ids
    assert len(after) == len(ds) - 1


def test_copies_share_a_group(own: tuple[str, Path]) -> None:
    name, root = own
    if not DATASETS[name].merge_identical:
        pytest.skip("its copies are found by the digests of their features")
    before = load_dataset(name, root)
    last = len(before) - 1
    assert before.groups[0] != before.groups[last]
    shutil.copyfile(before.file_path(0), before.file_path(last))
    after = load_dataset(name, root)
    assert after.groups[0] == after.groups[last]
    assert any("identical" in note for note in after.notes)


def test_a_link_that_leads_out_of_the_root_is_refused(own: tuple[str, Path], tmp_path: Path) -> None:
    name, root = own
    path = load_dataset(name, root).file_path(0)
    path.rename(tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    with pytest.raises(DatasetError):
        load_dataset(name, root)


def test_the_dataset_is_found_live_and_then_from_its_snapshot(
    own: tuple[str, Path], home: Path, tmp_path: Path
) -> None:
    name, root = own
    ds = load_dataset(name, root)
    (home / slug(ds.name)).mkdir(parents=True)
    (home / slug(ds.name) / "dataset.parquet").write_bytes(ds.to_parquet_bytes())
    found, origin = find_dataset(ds.name)
    assert origin == "live"
    assert found.table.equals(ds.table)
    (tmp_path / "copy").rename(tmp_path / "moved")
    found, origin = find_dataset(ds.name)
    assert origin == "snapshot"
    assert found.table.equals(ds.table)
