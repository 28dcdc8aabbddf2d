from collections import Counter
from pathlib import Path

import pytest

from embcache.data.dataset import load_dataset
from embcache.data.published import find_layout
from embcache.errors import DatasetError, DatasetNotFoundError
from tests.data.pictures import write_image
from tests.refusal import refused

HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
    "Fracture,Pneumothorax,Airspace opacity,Nodule or mass,Set Id"
)
PREFIX = "four_findings_expert_labels_"


def row(image: str, patient: int, findings: str) -> str:
    answers = ",".join("YES" if letter in findings else "NO" for letter in "FPAN")
    return f"{image},No Finding,8,{patient},60,M,AP,3056,2544,0.139,0.139,{answers},x"


def write_labels(root: Path, header: str = HEADER, prefix: str = PREFIX) -> None:
    root.mkdir(parents=True, exist_ok=True)
    train = [row("01_000.png", 1, ""), row("01_001.png", 1, "F"), row("02_000.png", 2, "AN"), row("03_000.png", 3, "N")]
    test = [row("04_000.png", 4, "P"), row("05_000.png", 5, "A"), row("06_000.png", 6, "FPAN")]
    for part, rows in {"validation": train, "test": test}.items():
        (root / f"{prefix}{part}_labels.csv").write_bytes("\r\n".join([header, *rows, ""]).encode())


def write_layout(root: Path) -> Path:
    write_labels(root)
    for i, name in enumerate(["01_000", "01_001", "03_000", "04_000", "05_000"]):
        write_image(root / f"images_{1 + i // 3:03d}" / "images" / f"{name}.png", i)
    return root


def test_findings_become_classes_and_images_with_several_are_left_out(tmp_path: Path) -> None:
    ds = load_dataset("nih", write_layout(tmp_path))
    named = {i: ds.class_names[y] for i, y in zip(ds.ids, ds.labels, strict=True)}
    assert named == {
        "01_000.png": "other", "01_001.png": "fracture", "03_000.png": "nodule or mass",
        "04_000.png": "pneumothorax", "05_000.png": "airspace opacity",
    }  # fmt: skip
    assert ds.groups.tolist() == ["1", "1", "3", "4", "5"]
    assert ds.table["split"].tolist() == ["train"] * 3 + ["test"] * 2
    assert ds.notes == (
        "1 train images with more than one of the four findings are left out",
        "1 test images with more than one of the four findings are left out",
    )
    first = ds.table.iloc[0]
    assert (first["patient_id"], first["age"], first["sex"], first["view_position"]) == ("1", 60, "M", "AP")
    assert (first["width"], first["height"], first["pixel_spacing_x"]) == (3056, 2544, 0.139)


@pytest.mark.parametrize(("prefix", "quoted"), [(PREFIX, True), ("", False)])
def test_both_spellings_of_names_and_header_are_read(tmp_path: Path, prefix: str, quoted: bool) -> None:
    header = HEADER
    if quoted:
        header = header.replace("OriginalImage[Width,Height]", '"OriginalImage[Width,Height]"')
        header = header.replace("OriginalImagePixelSpacing[x,y]", '"OriginalImagePixelSpacing[x,y]"')
    write_labels(tmp_path / "labels", header, prefix)
    for i, name in enumerate(["01_000", "01_001", "03_000", "04_000", "05_000"]):
        write_image(tmp_path / "images" / f"{name}.png", i)
    ds = load_dataset("nih", tmp_path)
    assert ds.table["path"].tolist()[0] == "images/01_000.png"
    assert len(ds) == 5


def test_an_image_that_lies_in_two_folders_is_taken_from_the_first(tmp_path: Path) -> None:
    write_layout(tmp_path)
    write_image(tmp_path / "images_012" / "images" / "01_000.png", 77)
    assert load_dataset("nih", tmp_path).table["path"].tolist()[0] == "images_001/images/01_000.png"


def test_images_that_are_not_there_are_counted_and_can_be_left_out(tmp_path: Path) -> None:
    write_layout(tmp_path)
    (tmp_path / "images_001" / "images" / "01_001.png").unlink()
    with refused(DatasetError, "images-missing") as caught:
        load_dataset("nih", tmp_path)
    assert "01_001.png" in str(caught.value)
    assert "--allow-missing" in str(caught.value)
    ds = load_dataset("nih", tmp_path, allow_missing=True)
    assert len(ds) == 4
    assert ds.missing == ("images/01_001.png",)


def test_a_linked_image_folder_that_leads_out_is_refused(tmp_path: Path) -> None:
    write_layout(tmp_path / "nih")
    (tmp_path / "nih" / "images_002").rename(tmp_path / "elsewhere")
    (tmp_path / "nih" / "images_002").symlink_to(tmp_path / "elsewhere")
    with refused(DatasetError, "outside-root"):
        load_dataset("nih", tmp_path / "nih")


def test_images_without_label_files_tell_where_those_are(tmp_path: Path) -> None:
    write_layout(tmp_path)
    (tmp_path / f"{PREFIX}test_labels.csv").unlink()
    with refused(DatasetNotFoundError, "dataset-layout"):
        load_dataset("nih", tmp_path)
    (tmp_path / f"{PREFIX}validation_labels.csv").unlink()
    with pytest.raises(DatasetNotFoundError, match="gcs-public-data--healthcare-nih-chest-xray-labels"):
        load_dataset("nih", tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("NO,YES,NO,NO,x", "NO,maybe,NO,NO,x", "unknown-label"),
        ("05_000.png", "04_000.png", "duplicate-ids"),
        ("05_000.png", "01_000.png", "duplicate-ids"),
        ("05_000.png", "../05_000.png", "outside-root"),
        (",60,M", ",sixty,M", "not-a-number"),
    ],
)
def test_broken_labels_are_refused(tmp_path: Path, old: str, new: str, code: str) -> None:
    path = write_layout(tmp_path) / f"{PREFIX}test_labels.csv"
    path.write_text(path.read_text().replace(old, new))
    with refused(DatasetError, code):
        load_dataset("nih", tmp_path)


@pytest.mark.shared
def test_the_published_label_files_give_the_published_counts(shared_data: Path) -> None:
    source = find_layout("nih")
    ds = source.read(shared_data / "nih", "nih")
    train, test = ds.select("train"), ds.select("test")
    names = ("other", "airspace opacity", "nodule or mass", "fracture", "pneumothorax")
    assert ds.class_names == names
    assert [Counter(train.labels.tolist())[c] for c in range(5)] == [1217, 787, 114, 38, 11]
    assert [Counter(test.labels.tolist())[c] for c in range(5)] == [660, 795, 82, 30, 46]
    assert (len(train), len(test)) == (2167, 1613)
    assert not set(train.groups) & set(test.groups)
    assert ds.notes[0].startswith("247 train images")  # of 2,414 rows
    assert ds.notes[1].startswith("349 test images")  # of 1,962 rows
