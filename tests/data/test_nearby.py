"""Paths that name no file: what is certain is settled, what is not is named."""

import unicodedata
from pathlib import Path

import pytest

from embcache.data.dataset import ImageDataset, load_dataset
from embcache.data.files import near_misses
from embcache.errors import DatasetError
from tests.data.pictures import write_image
from tests.refusal import refused

NAMES = ("train/0.PNG", "train/1.PNG", "train/2.PNG", "train/3.PNG")


def table(root: Path, paths: list[str], *names: str) -> ImageDataset:
    for i, name in enumerate(names or NAMES):
        write_image(root / name, i)
    rows = "".join(f"{path},{'ab'[i % 2]}\n" for i, path in enumerate(paths))
    (root / "labels.csv").write_text("path,label\n" + rows, "utf-8")
    return load_dataset("folder", root / "labels.csv")


@pytest.mark.parametrize("form", ["{}", "./{}", "{root}/{}", "{root}/train/../{}"])
def test_paths_inside_the_root_are_as_good_as_relative_ones(tmp_path: Path, form: str) -> None:
    ds = table(tmp_path, [form.format(name, root=tmp_path) for name in NAMES])
    assert ds.ids.tolist() == ds.table["path"].tolist() == list(NAMES)
    assert any("4 paths are absolute paths inside the folder" in note for note in ds.notes) == ("root" in form)


@pytest.mark.parametrize("form", ["{}", ".\\{}"])
def test_backslashes_are_slashes_where_no_file_is_called_so(tmp_path: Path, form: str) -> None:
    ds = table(tmp_path, [form.format(name.replace("/", "\\")) for name in NAMES])
    assert ds.table["path"].tolist() == list(NAMES)
    assert any("4 paths have backslashes" in note for note in ds.notes)


def test_a_file_whose_name_has_a_backslash_keeps_it(tmp_path: Path) -> None:
    if Path("a\\b").name != "a\\b":
        pytest.skip("a backslash divides paths here")
    ds = table(tmp_path, ["a\\1.png", "a\\2.png"], "a\\1.png", "a\\2.png", "a/1.png", "a/2.png")
    assert ds.table["path"].tolist() == ["a\\1.png", "a\\2.png"]


@pytest.mark.parametrize(("written", "stored"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_another_unicode_form_finds_its_file(tmp_path: Path, written: str, stored: str) -> None:
    names = [f"{name}.png" for name in ("Ménière", "Zoë", "Ångström", "über")]
    paths = [unicodedata.normalize(written, name) for name in names]
    ds = table(tmp_path, paths, *(unicodedata.normalize(stored, name) for name in names))
    assert all(ds.file_path(row).is_file() for row in range(4))
    if ds.table["path"].tolist() != paths:  # some file systems take either form for the other
        assert ds.table["path"].tolist() == [unicodedata.normalize(stored, name) for name in names]
        assert any(f"which have {stored}" in note for note in ds.notes)


@pytest.mark.parametrize(
    ("paths", "near", "fix"),
    [
        ([n.lower() for n in NAMES], "train/0.png is there as train/0.PNG", "train/0.PNG"),
        ([n[:-4] for n in NAMES], "train/0 is there as train/0.PNG", "PATH.PNG"),
        ([n[6:] for n in NAMES], "0.PNG is there as train/0.PNG", "train/PATH"),
        (["C:\\data\\0.PNG", *NAMES[1:]], "C:\\data\\0.PNG is there as train/0.PNG", "train/0.PNG"),
    ],
)
def test_a_near_miss_is_named_with_what_to_do(tmp_path: Path, paths: list[str], near: str, fix: str) -> None:
    if (tmp_path / "A").mkdir() or (tmp_path / "a").exists():
        pytest.skip("this file system does not tell letter case")
    with pytest.raises(DatasetError) as caught:
        table(tmp_path, paths)
    assert near in str(caught.value.found)
    assert str(caught.value.fix).partition(", or")[0].endswith(f"are called: {fix}")


def test_a_table_one_folder_too_low_is_told(tmp_path: Path) -> None:
    for i, name in enumerate(NAMES):
        write_image(tmp_path / name, i)
    with refused(DatasetError, "images-missing") as caught:
        table(tmp_path / "lists", list(NAMES), "spare.png")
    assert "../PATH" in str(caught.value.fix)


def test_a_name_that_several_folders_have_is_left_to_the_user(tmp_path: Path) -> None:
    for i in range(4):
        write_image(tmp_path / ("train", "test")[i % 2] / f"{i // 2}.png", i)
    near, advice = near_misses(tmp_path, ["0.png", "1.png"])
    assert "0.png is there as test/0.png or train/0.png" in near
    assert advice == "write which file is meant: test/0.png or train/0.png for 0.png"
