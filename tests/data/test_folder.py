import hashlib
from pathlib import Path

import pandas as pd
import pytest

from embcache.config import DatasetRef
from embcache.data.classes import with_ref
from embcache.data.dataset import ImageDataset, load_dataset
from embcache.errors import DatasetError, DatasetNotFoundError
from tests.data.pictures import write_image
from tests.refusal import refused


def write_layout(root: Path) -> Path:
    """A table of four images; returns what to load."""
    for i in range(4):
        write_image(root / f"{i}.png", i)
    rows = ["path,label,group,split,sex"] + [
        f"{i}.png,{'ab'[i % 2]},p{i},{'test' if i > 2 else 'train'},f" for i in range(4)
    ]
    (root / "labels.csv").write_text("\n".join(rows))
    return root / "labels.csv"


def fill(root: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        write_image(root / name, i)
    return root


def table(tmp_path: Path, text: str, *names: str) -> ImageDataset:
    fill(tmp_path, *(names or ("a.png", "b.png", "c.png")))
    (tmp_path / "labels.csv").write_text(text)
    return load_dataset("folder", tmp_path / "labels.csv")


def test_class_folders_are_classes_and_images_below_them_count(tmp_path: Path) -> None:
    ds = load_dataset("folder", fill(tmp_path, "dog/1.png", "cat/2.png", "cat/deep/3.jpg", "stray.png"))
    assert ds.class_names == ("cat", "dog")
    assert dict(zip(ds.ids, ds.labels, strict=True)) == {"cat/2.png": 0, "cat/deep/3.jpg": 0, "dog/1.png": 1}
    assert set(ds.table["split"]) == {"train"}
    assert ds.metric == "auc"
    assert any("1 images outside the class folders" in note for note in ds.notes)
    assert any("no group column" in note for note in ds.notes)


def test_split_folders_give_splits_and_flat_test_images_are_unlabeled(tmp_path: Path) -> None:
    root = fill(
        tmp_path, "train/a/1.png", "train/b/2.png", "valid/a/3.png", "test/b/4.png", "test/5.png", "docs/x/6.png"
    )
    ds = load_dataset("folder", root)
    rows = dict(zip(ds.ids, zip(ds.table["split"], ds.labels, strict=True), strict=True))
    assert rows == {
        "train/a/1.png": ("train", 0), "train/b/2.png": ("train", 1), "valid/a/3.png": ("val", 0),
        "test/b/4.png": ("test", 1), "test/5.png": ("test", -1),
    }  # fmt: skip
    assert any("docs" in note for note in ds.notes)


def test_split_folders_are_known_in_any_letter_case_and_paths_keep_it(tmp_path: Path) -> None:
    names = ["TRAINING/a/1.png", "TRAINING/b/2.png", "Valid/a/3.png", "Testing/b/4.png", "Testing/5.png"]
    ds = load_dataset("folder", fill(tmp_path, *names))
    rows = dict(zip(ds.table["path"], zip(ds.table["split"], ds.labels, strict=True), strict=True))
    assert rows == dict(zip(names, [("train", 0), ("train", 1), ("val", 0), ("test", 1), ("test", -1)], strict=True))


def test_a_test_class_that_training_lacks_is_an_unknown_label(tmp_path: Path) -> None:
    with refused(DatasetError, "unknown-label"):
        load_dataset("folder", fill(tmp_path, "train/a/1.png", "train/b/2.png", "test/c/3.png"))


@pytest.mark.parametrize("names", [(), ("a/b.txt",)])
def test_a_folder_without_class_folders_tells_what_is_expected(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with refused(DatasetNotFoundError, "dataset-layout"):
        load_dataset("folder", tmp_path)


def test_a_file_that_is_no_table_tells_what_is_expected(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    with refused(DatasetNotFoundError, "dataset-layout"):
        load_dataset("folder", tmp_path / "a.png")


def test_the_name_tells_the_folder_and_two_of_one_name_differ(tmp_path: Path) -> None:
    one = load_dataset("folder", fill(tmp_path / "x" / "mammo", "a/1.png", "b/2.png"))
    two = load_dataset("folder", fill(tmp_path / "y" / "mammo", "a/1.png", "b/2.png"))
    assert one.name == f"mammo-{hashlib.sha256(bytes((tmp_path / 'x' / 'mammo').resolve())).hexdigest()[:8]}"
    assert one.name != two.name
    assert load_dataset("folder", tmp_path / "x" / ".." / "x" / "mammo").name == one.name
    assert load_dataset("folder", tmp_path / "x" / "mammo", name="mine").name == "mine"
    assert one.layout == "folder"


def test_a_table_gives_all_its_columns(tmp_path: Path) -> None:
    ds = table(
        tmp_path,
        "path,label,group,split,id,sex,place\na.png,yes,p1,train,A,f,7\nb.png,no,p1,,B,m,8\n./c.png,,p2,Test,C,,9\n",
    )
    assert ds.root == tmp_path
    assert ds.class_names == ("no", "yes")
    assert ds.table.to_dict("list") == {
        "id": ["A", "B", "C"], "path": ["a.png", "b.png", "c.png"], "place": ["", "", ""], "label": [1, 0, -1],
        "group": ["p1", "p1", "p2"], "split": ["train", "train", "test"], "sex": ["f", "m", ""],
        "source_place": ["7", "8", "9"],
    }  # fmt: skip
    assert ds.notes == ()


def test_parquet_serves_as_well_as_csv(tmp_path: Path) -> None:
    fill(tmp_path, "a.png", "b.png")
    pd.DataFrame({"path": ["a.png", "b.png"], "label": [1, 0], "age": [3, 4]}).to_parquet(tmp_path / "t.parquet")
    ds = load_dataset("folder", tmp_path / "t.parquet")
    assert ds.class_names == ("0", "1")
    assert ds.labels.tolist() == [1, 0]
    assert ds.table["age"].tolist() == ["3", "4"]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("path,label\na.png,0\na.png,1\n", "duplicate-ids"),
        ("path,label,id\na.png,0,x\nb.png,1,x\n", "duplicate-ids"),
        ("path,label,split\na.png,0,train\nb.png,1,held-out\n", "unknown-split"),
        ("path,label,split\na.png,0,train\nb.png,1,test\n", "unknown-label"),
        ("path,label\n../a.png,0\nb.png,1\n", "outside-root"),
        ("path,label\n/etc/passwd,0\nb.png,1\n", "outside-root"),
        ("path,label,id\na.png,0,../../etc/passwd\nb.png,1,b\n", "outside-root"),
        ("path,label\n,0\nb.png,1\n", "cell-not-text"),
        ("path,kind\na.png,0\n", "column-missing"),
        ("path,label\n", "table-empty"),
    ],
)
def test_broken_tables_are_refused(tmp_path: Path, text: str, code: str) -> None:
    with refused(DatasetError, code):
        table(tmp_path, text)


def test_rows_without_a_file_are_counted_and_can_be_left_out(tmp_path: Path) -> None:
    rows = "".join(f"gone{i}.png,{i % 2}\n" for i in range(7))
    with pytest.raises(DatasetError) as caught:
        table(tmp_path, f"path,label\na.png,0\nb.png,1\n{rows}")
    message = str(caught.value)
    assert "7 of 9 images" in message
    assert "gone0.png, gone1.png, gone2.png, gone3.png, gone4.png, … and 2 more" in message
    assert ", or --allow-missing" in message
    ds = load_dataset("folder", tmp_path / "labels.csv", allow_missing=True)
    assert ds.ids.tolist() == ["a.png", "b.png"]
    assert ds.missing == tuple(f"gone{i}.png" for i in range(7))
    assert any("7 of 9 images are missing" in note for note in ds.notes)


def test_leaving_out_every_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("path,label\na.png,0\nb.png,1\n")
    with refused(DatasetError, "images-missing") as caught:
        load_dataset("folder", tmp_path / "labels.csv", allow_missing=True)
    assert "--allow-missing" not in str(caught.value)


def test_copies_share_a_group_and_conflicting_labels_are_told(tmp_path: Path) -> None:
    for name, seed in {"a.png": 1, "b.png": 1, "c.png": 2, "d.png": 2, "e.png": 3}.items():
        write_image(tmp_path / name, seed)
    (tmp_path / "t.csv").write_text("path,label,group\na.png,0,p\nb.png,1,q\nc.png,0,q\nd.png,0,r\ne.png,1,s\n")
    ds = load_dataset("folder", tmp_path / "t.csv")
    assert ds.groups.tolist() == ["p", "p", "p", "p", "s"]
    assert any("conflicting labels: a.png (0) = b.png (1)" in note for note in ds.notes)


def test_names_in_any_script_are_kept(tmp_path: Path) -> None:
    ds = load_dataset("folder", fill(tmp_path / "Bilder ü", "猫/ä b.png", "犬/ñ'\".png"))
    assert ds.class_names == ("犬", "猫")
    assert all(ds.file_path(i).is_file() for i in range(2))


def test_a_file_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, "a/1.png", "b/2.png")
    try:
        (tmp_path / "a" / "1.png").rename(tmp_path / "a" / "caf\udce9.png")
    except OSError:
        pytest.skip("this file system takes no such names")
    with refused(DatasetError, "cell-not-text"):
        load_dataset("folder", tmp_path)


def test_classes_that_look_alike_are_one_and_named(tmp_path: Path) -> None:
    ds = table(tmp_path, "path,label\na.png,Me\u0301nie\u0300re\nb.png,M\u00e9ni\u00e8re\nc.png,normal\n")
    assert ds.class_names == ("M\u00e9ni\u00e8re", "normal")
    assert ds.labels.tolist() == [0, 0, 1]
    assert any(r"'Me\u0301nie\u0300re' (1), 'M\xe9ni\xe8re' (1)" in note for note in ds.notes)


@pytest.mark.parametrize("layout", ["table", "folders"])
def test_classes_that_differ_in_case_are_merged_only_on_request(tmp_path: Path, layout: str) -> None:
    names = ["Normal/0.png", "normal/1.png", "sick/2.png", "normal/3.png"]
    root = fill(tmp_path, *names)
    if not (tmp_path / "NORMAL").exists() and layout == "table":
        root = tmp_path / "t.csv"
        root.write_text("path,label\n" + "".join(f"{name},{name.split('/')[0]}\n" for name in names))
    elif (tmp_path / "NORMAL").exists():
        pytest.skip("this file system does not tell letter case")
    with refused(DatasetError, "classes-differ-in-case") as caught:
        load_dataset("folder", root)
    assert caught.value.found == "Normal (1), normal (2)"
    assert caught.value.fix == "--merge-class Normal+normal=normal"
    ds = load_dataset("folder", root, merge_class=["Normal+normal=normal"])
    assert ds.class_names == ("normal", "sick")
    assert ds.ref.merge_class == ("Normal+normal=normal",)
    assert any("classes Normal, normal are one class, normal" in note for note in ds.notes)
    assert with_ref(ds, DatasetRef(merge_class="Normal+normal=normal")) is ds
