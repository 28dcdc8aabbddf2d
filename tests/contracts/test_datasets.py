"""What every dataset promises, whatever its layout.

A dataset joins by its own test module: ``tests/data/test_<name>.py`` has ``write_layout(root)``, which writes a small
layout of its kind and returns what to load.
"""

import importlib
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from embcache.config import DatasetRef
from embcache.data.dataset import ImageDataset, find_dataset, load_dataset
from embcache.data.published import DATASETS, find_layout
from embcache.errors import DatasetError, DatasetNotFoundError, UsageError
from embcache.paths import slug
from embcache.testing import check_dataset
from tests.data.pictures import write_image
from tests.refusal import refused

Load = Callable[..., ImageDataset]


@pytest.fixture(scope="module", params=list(DATASETS))
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path, Path]]:
    """(name, folder, what to load below it): written once for all tests of a dataset."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:  # drawing the whole sample takes seconds
        patch.setattr("embcache.data.datasets.sample.GROUPS", 12)
        patch.setattr("embcache.data.datasets.sample.TEST_GROUPS", 3)
        module = importlib.import_module(f"tests.data.test_{request.param.replace('-', '_')}")
        target = module.write_layout(folder)
        yield request.param, folder, target.relative_to(folder)


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


def test_the_dataset_keeps_the_contract(load: Load) -> None:
    check_dataset(load())


def test_loading_twice_gives_the_same(load: Load) -> None:
    one, two = load(), load()
    assert one.table.equals(two.table)
    assert {**vars(one), "table": None} == {**vars(two), "table": None}


def test_the_name_can_be_set_and_the_kind_stays(load: Load) -> None:
    ds = load(name="my own")
    assert (ds.name, ds.layout) == ("my own", load().layout)


def test_a_missing_or_empty_root_tells_what_is_expected(written: tuple[str, Path, Path], tmp_path: Path) -> None:
    name = written[0]
    (tmp_path / "empty").mkdir()
    for root in [tmp_path / "empty"] + ([tmp_path / "absent"] if find_layout(name).draw is None else []):
        with pytest.raises(DatasetNotFoundError) as caught:
            load_dataset(name, root)
        assert caught.value.expected
        assert caught.value.fix
        assert str(root) in str(caught.value)


def test_an_image_that_disappears_is_an_error_or_leaves_the_table(own: tuple[str, Path]) -> None:
    name, root = own
    ds = load_dataset(name, root)
    if ds.table["place"].iloc[0]:
        pytest.skip("its images are rows of array files")
    gone = ds.ids[0]
    ds.file_path(0).unlink()
    if (
        find_layout(name).load(root.resolve(), name, DatasetRef()).ids[0] == gone
    ):  # the labels are kept apart from the images
        with refused(DatasetError, "images-missing"):
            load_dataset(name, root)
    after = load_dataset(name, root, allow_missing=True)
    assert gone not in after.ids
    assert len(after) == len(ds) - 1


def test_copies_share_a_group(own: tuple[str, Path]) -> None:
    name, root = own
    if not find_layout(name).merge_identical:
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


def test_a_function_of_another_package_is_a_dataset(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lesions_plugin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    for number, name in enumerate(("a/1.png", "a/2.png", "b/3.png", "b/4.png")):
        write_image(tmp_path / "lesions" / name, number)
    ds = load_dataset("lesions_plugin:read_lesions", tmp_path / "lesions", name="mine")
    check_dataset(ds)
    assert (ds.name, ds.layout, ds.origin) == ("mine", "lesions_plugin:read_lesions", tmp_path / "lesions")
    (home / "mine").mkdir(parents=True)
    (home / "mine" / "dataset.parquet").write_bytes(ds.to_parquet_bytes())
    assert find_dataset(ds.layout, DatasetRef(name="mine"))[1] == "live"
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail("a file names what is imported"))
    assert find_dataset("mine")[1] == "snapshot"
    with refused(UsageError, "unknown-option"):
        load_dataset("lesions", tmp_path, group_colum="patient")


def test_numbers_and_findings_of_a_plugin_keep_the_contract(tmp_path: Path) -> None:
    for k in range(4):
        write_image(tmp_path / f"{k}.png", k)
    names = [f"{k}.png" for k in range(4)]
    table = pd.DataFrame({"id": names, "path": names, "place": "", "label": 0, "group": names, "split": "train"})
    table = table.assign(age=[61.5, 48.0, 3.0, np.nan], edema=[1, 0, -1, -1], mass=[0, 1, -1, -1])
    ages = table.assign(label=[0, 0, 0, -1])
    dataset = partial(ImageDataset, "mine", tmp_path, augment="chest")
    check_dataset(dataset(("age",), metric="r2", table=ages, kind="number", columns=("age",)))
    both, table = ("edema", "mass"), table.assign(label=[0, 0, -1, -1])
    check_dataset(dataset(both, metric="macro_auc", table=table, kind="findings", columns=both))
    with pytest.raises(AssertionError, match="findings without an image"):
        check_dataset(dataset(both, metric="auc", table=table.assign(mass=0, label=0), kind="findings", columns=both))
    with pytest.raises(AssertionError, match="where nothing is known"):
        check_dataset(dataset(both, metric="auc", table=table.assign(label=0), kind="findings", columns=both))


PLUGIN = """
from pathlib import Path
import pandas as pd
from embcache import ImageDataset

def read_lesions(root, name):
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))
    labels = [int(path.startswith("b")) for path in paths]
    table = pd.DataFrame({"id": paths, "path": paths, "place": "", "label": labels, "group": paths, "split": "train"})
    return ImageDataset(name, root, ("benign", "malignant"), metric="auc", augment="generic", table=table)
"""
