import functools
import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import embcache.data.datasets.sample as sample_module
from embcache.data.dataset import ImageDataset, load_dataset
from embcache.data.datasets.sample import draw_tile
from embcache.data.published import find_layout, resolve_root
from embcache.errors import DatasetError, DatasetNotFoundError
from embcache.io import write_tree
from tests.refusal import refused

GROUPS = 12  # drawing a tile takes milliseconds
drawn = functools.cache(sample_module._draw_all)


def write_layout(root: Path) -> Path:
    write_tree(root / "sample", drawn())
    return root / "sample"


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ImageDataset]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_module, "GROUPS", GROUPS)
        patch.setattr(sample_module, "TEST_GROUPS", GROUPS // 4)
        patch.setattr(sample_module, "_draw_all", drawn)
        yield load_dataset("sample", tmp_path_factory.mktemp("home") / "sample-images")


def test_patients_have_four_kinds_each_and_a_quarter_of_them_is_held_out(sample: ImageDataset) -> None:
    assert len(sample) == GROUPS * 16
    assert sample.class_names == ("fibres", "glands", "lymphoid", "tumour")
    train, test = sample.select("train"), sample.select("test")
    assert (len(set(train.groups)), len(set(test.groups))) == (9, 3)
    assert not set(train.groups) & set(test.groups)
    assert Counter(zip(sample.groups, sample.labels.tolist(), strict=True)).most_common()[0][1] == 4
    assert set(Counter(sample.labels.tolist()).values()) == {GROUPS * 4}


def test_it_says_that_it_is_synthetic(sample: ImageDataset) -> None:
    assert sample.synthetic
    assert any("synthetic" in note for note in sample.notes)
    assert (sample.layout, sample.metric, dict(sample.subset_sizes)) == ("sample", "macro_auc", {"S": 40, "M": 200})


def test_the_pixels_are_the_same_on_every_machine() -> None:
    digest = hashlib.sha256()
    for group, label in [(0, 0), (1, 1), (31, 2), (59, 3)]:
        digest.update(draw_tile(group, label, 0).tobytes())
    assert digest.hexdigest() == "1942e9fc6973b21ec1eeec8bda3084cd3864cf1c9e5a24a98b3306973296a789"


def test_no_two_tiles_are_alike_and_patients_differ_in_stain(sample: ImageDataset) -> None:
    assert not any("identical" in note for note in sample.notes)
    colors = {draw_tile(group, 0, 0).mean(axis=(0, 1)).round().astype(int).tobytes() for group in range(12)}
    assert len(colors) == 12


def test_a_folder_that_is_something_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with refused(DatasetNotFoundError, "dataset-layout"):
        load_dataset("sample", tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_sample_that_is_not_drawn_yet_is_drawn_by_other_commands(tmp_path: Path) -> None:
    with refused(DatasetNotFoundError, "dataset-layout") as caught:
        resolve_root(find_layout("sample"), None, tmp_path, draw=False)
    assert caught.value.fix == "embcache demo, or embcache extract --backbone random --dataset sample"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_module, "_draw_all", lambda: {"labels.csv": b""})
    (tmp_path / "file").touch()
    with refused(DatasetError, "folder-not-writable") as caught:
        load_dataset("sample", tmp_path / "file" / "sample-images")
    assert caught.value.fix == "name a writable folder with --home"
