"""MIMIC-CXR-JPG's label files; the numbers of images, studies and patients are those of Johnson et al. 2019."""

import gzip
from pathlib import Path

import pytest

from embcache.data.dataset import load_dataset
from embcache.data.published import find_layout
from embcache.errors import DatasetError, DatasetNotFoundError
from tests.data.pictures import write_image
from tests.refusal import refused

LABELS = (
    "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Enlarged Cardiomediastinum", "Fracture", "Lung Lesion",
    "Lung Opacity", "No Finding", "Pleural Effusion", "Pleural Other", "Pneumonia", "Pneumothorax", "Support Devices",
)  # fmt: skip


def write_labels(root: Path, images: list[tuple[str, str, str, str]], studies: dict[tuple[str, str], str]) -> None:
    """``images`` are dicom, study, subject and split; ``studies`` the cells of a subject's study."""
    root.mkdir(parents=True, exist_ok=True)
    tables = {
        "chexpert": ["subject_id,study_id," + ",".join(LABELS), *(f"{p},{s},{c}" for (p, s), c in studies.items())],
        "split": ["dicom_id,study_id,subject_id,split", *(",".join(each) for each in images)],
        "metadata": [
            "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns",
            *(f'{d},{p},{s},"CHEST (PA, LAT)",PA,3056,2544' for d, s, p, _ in images),
        ],
    }
    for part, lines in tables.items():
        (root / f"mimic-cxr-2.0.0-{part}.csv.gz").write_bytes(gzip.compress("\n".join([*lines, ""]).encode(), 1))


def write_layout(root: Path) -> Path:
    ill, well = "1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0,,1.0,1.0,1.0,1.0,1.0", "0.0," * 8 + "1.0,0.0,0.0,0.0,0.0,0.0"
    unsure = ",,,-1.0,,,,0.0,,,,,,1.0"
    studies = {("10000032", "50414267"): ill, ("10000032", "53189527"): well, ("10000764", "57375967"): unsure}
    studies |= {("10000898", "50771383"): ill, ("10001217", "58913004"): well}
    splits = ["train", "train", "train", "validate", "test"]
    images = [(f"02aa804e-{k}", study, subject, splits[k]) for k, (subject, study) in enumerate(studies)]
    images.append(("02aa804e-9", "59999999", "19999999", "test"))
    write_labels(root, images, studies)
    for k, (dicom, study, subject, _) in enumerate(images):
        write_image(root / "files" / f"p{subject[:2]}" / f"p{subject}" / f"s{study}" / f"{dicom}.jpg", k)
    return root


def test_studies_label_their_images(tmp_path: Path) -> None:
    ds = load_dataset("mimic-cxr", write_layout(tmp_path))
    assert ds.file_path(0) == tmp_path / "files/p10/p10000032/s50414267/02aa804e-0.jpg"
    assert ds.groups.tolist() == ["10000032", "10000032", "10000764", "10000898", "10001217", "19999999"]
    assert ds.table["split"].tolist() == ["train", "train", "train", "val", "test", "test"]
    assert ds.table["Edema"].tolist() == [1, 0, -1, 1, 0, -1]
    assert ds.table["No Finding"].tolist() == [0, 1, 0, 0, 1, -1]
    assert ds.table["label"].tolist() == [0, 0, 0, 0, 0, -1]
    assert ds.table["view_position"].tolist() == ["PA"] * 6
    assert ds.notes[0] == "1 images of studies without labels"
    taken = load_dataset("mimic-cxr", tmp_path, uncertain="one", unmentioned="zero")
    assert taken.table["Edema"].tolist() == [1, 0, 1, 1, 0, -1]
    assert taken.table["Atelectasis"].tolist() == [1, 0, 0, 1, 0, -1]


@pytest.mark.parametrize(("old", "new", "code"), [("test", "tested", "unknown-split"), ("-4", "-3", "duplicate-ids")])
def test_broken_label_files_are_refused(tmp_path: Path, old: str, new: str, code: str) -> None:
    path = write_layout(tmp_path) / "mimic-cxr-2.0.0-split.csv.gz"
    path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()).replace(old.encode(), new.encode()))
    with refused(DatasetError, code):  # the unpacked file comes first
        load_dataset("mimic-cxr", tmp_path)


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    path = write_layout(tmp_path) / "mimic-cxr-2.0.0-metadata.csv.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with refused(DatasetError, "table-unreadable"):
        load_dataset("mimic-cxr", tmp_path)
    path.unlink()
    with pytest.raises(DatasetNotFoundError, match=r"metadata\.csv is not there"):
        load_dataset("mimic-cxr", tmp_path)


def test_label_files_of_the_published_size_give_the_published_counts(tmp_path: Path) -> None:
    """377,110 images of 227,835 studies, eight of them without labels, of 65,379 patients."""
    studies = [(str(10_000_000 + k % 65_379), str(50_000_000 + k)) for k in range(227_835)]
    splits = {str(10_000_000 + k): "validate" if k < 500 else "test" if k < 793 else "train" for k in range(65_379)}
    left = {"train": 368_960, "validate": 2_991, "test": 5_159}
    images = list[tuple[str, str, str, str]]()
    while any(left.values()):
        for subject, study in studies:
            split = splits[subject]
            if left[split]:
                left[split] -= 1
                images.append((f"{len(images):08x}-0", study, subject, split))
    write_labels(tmp_path, images, dict.fromkeys(studies[:-8], "1.0,,-1.0,0.0,,,,,,,,,,"))
    ds = find_layout("mimic-cxr").read(tmp_path, "mimic-cxr")
    assert (len(ds), ds.table["group"].nunique(), ds.table["study"].nunique()) == (377_110, 65_379, 227_835)
    assert [len(ds.select(s)) for s in ("train", "val", "test")] == [368_960, 2_991, 5_159]
    unlabeled = int((ds.table["label"] < 0).sum())
    assert ds.table.loc[ds.table["label"] < 0, "study"].nunique() == 8
    assert ds.task.counts(ds.labels)[OBSERVATION] == 377_110 - unlabeled


OBSERVATION = 8  # Atelectasis
