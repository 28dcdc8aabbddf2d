"""ChestX-ray14's label files; counts are those of Wang et al. 2017 and of the official lists."""

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
)
FINDINGS = {  # images of both lists, and of the test list
    "Atelectasis": (11559, 3279), "Cardiomegaly": (2776, 1069), "Effusion": (13317, 4658),
    "Infiltration": (19894, 6112), "Mass": (5782, 1748), "Nodule": (6331, 1623), "Pneumonia": (1431, 555),
    "Pneumothorax": (5302, 2665),
    "Consolidation": (4667, 1815), "Edema": (2303, 925), "Emphysema": (2516, 1093), "Fibrosis": (1686, 435),
    "Pleural_Thickening": (3385, 1143), "Hernia": (227, 86),
}  # fmt: skip


def row(image: str, findings: str, patient: int) -> str:
    return f"{image},{findings},0,{patient},58,M,PA,2682,2749,0.143,0.143,"


def write_labels(root: Path, rows: dict[str, tuple[str, int]], tested: set[str]) -> None:
    root.mkdir(parents=True, exist_ok=True)
    lines = [HEADER, *(row(image, findings, patient) for image, (findings, patient) in rows.items()), ""]
    (root / "Data_Entry_2017.csv").write_text("\n".join(lines))
    (root / "train_val_list.txt").write_text("\n".join(i for i in rows if i not in tested))
    (root / "test_list.txt").write_text("\n".join(i for i in rows if i in tested) + "\n")


def write_layout(root: Path) -> Path:
    """One image with all of the findings and one without any, in training and in the test set."""
    every = "|".join(FINDINGS)
    rows = {f"0000000{k}_000.png": (every if k % 2 else "No Finding", k) for k in range(6)}
    write_labels(root, rows, {"00000004_000.png", "00000005_000.png"})
    for k, name in enumerate(rows):
        write_image(root / f"images_{1 + k // 3:03d}" / "images" / name, k)
    return root


def test_lists_of_findings_become_columns(tmp_path: Path) -> None:
    ds = load_dataset("nih14", write_layout(tmp_path))
    assert (ds.kind, ds.metric, ds.columns) == ("findings", "macro_auc", tuple(FINDINGS))
    assert ds.labels.tolist() == [[k % 2] * 14 for k in range(6)]
    assert ds.table["split"].tolist() == ["train"] * 4 + ["test"] * 2
    assert ds.groups.tolist() == [str(k) for k in range(6)]
    first = ds.table.iloc[0]
    assert (first["age"], first["sex"], first["view_position"], first["width"]) == (58, "M", "PA", 2682)
    assert first["finding_labels"] == "No Finding"


def test_the_later_file_is_read_and_images_outside_the_lists_are_counted(tmp_path: Path) -> None:
    write_layout(tmp_path)
    text = (tmp_path / "Data_Entry_2017.csv").read_text().replace("Gender", "Sex").replace(",\n", "\n")
    (tmp_path / "Data_Entry_2017_v2020.csv").write_text(text.rstrip(","))
    (tmp_path / "Data_Entry_2017.csv").unlink()
    (tmp_path / "test_list.txt").write_text("00000005_000.png\n")
    ds = load_dataset("nih14", tmp_path)
    assert len(ds) == 5
    assert any("1 images of Data_Entry_2017_v2020.csv are in neither" in note for note in ds.notes)


@pytest.mark.parametrize(
    ("file", "old", "new", "code"),
    [
        ("Data_Entry_2017.csv", "|Hernia", "|Hernias", "unknown-label"),
        ("Data_Entry_2017.csv", "Patient ID", "Patient", "column-missing"),
        ("test_list.txt", "00000004_000.png", "00000001_000.png", "split-twice"),
    ],
)
def test_broken_label_files_are_refused(tmp_path: Path, file: str, old: str, new: str, code: str) -> None:
    path = write_layout(tmp_path) / file
    path.write_text(path.read_text().replace(old, new))
    with refused(DatasetError, code):
        load_dataset("nih14", tmp_path)


def test_a_missing_list_is_named(tmp_path: Path) -> None:
    (write_layout(tmp_path) / "test_list.txt").unlink()
    with pytest.raises(DatasetNotFoundError, match=r"test_list\.txt is not there"):
        load_dataset("nih14", tmp_path)


def test_label_files_of_the_published_size_give_the_published_counts(tmp_path: Path) -> None:
    """112,120 rows of 30,805 patients, each finding as often as in the original, one finding after another."""
    rows: dict[str, tuple[str, int]] = {}
    tested = set[str]()
    for test, images, patients in ((False, 86524, 28008), (True, 25596, 2797)):
        of: list[list[str]] = [[] for _ in range(images)]
        at = 0
        for finding, (total, held_out) in FINDINGS.items():
            for _ in range(held_out if test else total - held_out):
                of[at % images].append(finding)
                at += 1
        for k, findings in enumerate(of):
            patient = k % patients + (28008 if test else 0)
            name = f"{patient:08d}_{k // patients:03d}.png"
            rows[name] = ("|".join(findings) or "No Finding", patient)
            tested |= {name} if test else set()
    write_labels(tmp_path, rows, tested)
    ds = find_layout("nih14").read(tmp_path, "nih14")
    assert (len(ds), ds.table["group"].nunique()) == (112_120, 30_805)
    assert (len(ds.select("train")), len(ds.select("test"))) == (86_524, 25_596)
    assert dict(zip(ds.class_names, ds.task.counts(ds.labels), strict=True)) == {k: n for k, (n, _) in FINDINGS.items()}
    assert ds.task.counts(ds.select("test").labels) == tuple(n for _, n in FINDINGS.values())
