"""DICOM's PatientID as the group, and kept nowhere; DICOM files without a suffix."""

import sys
from pathlib import Path

import numpy as np
import pytest

from embcache.data.dataset import ImageDataset, load_dataset
from embcache.data.groups import UNGROUPED
from tests.data.pictures import write_image
from tests.data.test_dicom import dicom, pydicom

N = 24


def collection(root: Path, patients: list[str], *, names: str = "IM{:06}.dcm", **tags: object) -> ImageDataset:
    """Class folders neg and pos with one DICOM file per patient given, loaded."""
    for i, patient in enumerate(patients):
        pixels = np.random.default_rng(i).integers(0, 255, (4, 4), dtype=np.uint8)
        place = root / ("neg", "pos")[i % 2] / names.format(i)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(dicom(pixels, PatientID=patient, **tags))
    return load_dataset("folder", root)


def secret(k: int) -> str:
    return f"MUELLER^{k:03}"


def test_images_of_one_patient_are_one_group_named_after_an_image(tmp_path: Path) -> None:
    patients = [secret(i // 2 % 12) for i in range(N)]
    ds = collection(tmp_path, patients)
    of = dict(zip(sorted(ds.ids, key=lambda path: path[4:]), patients, strict=True))
    for group, members in ds.table.groupby("group")["id"]:
        assert group == min(members)
        assert len({of[member] for member in members}) == 1
    assert ds.table["group"].nunique() == 12
    assert ds.notes == (
        "groups are those of the PatientID in the DICOM files (12 patients), named after an image of each",
    )
    assert b"MUELLER" not in ds.to_parquet_bytes()


def test_a_long_header_before_the_patient_is_read_to_its_end(tmp_path: Path) -> None:
    item = pydicom.Dataset()
    item.ReferencedSOPInstanceUID = "1.2.3"
    ds = collection(tmp_path, [secret(i // 2) for i in range(N)], ReferencedImageSequence=[item] * 500)
    assert (tmp_path / ds.ids[0]).stat().st_size > 10_000
    assert ds.table["group"].nunique() == 12


@pytest.mark.parametrize(
    ("patients", "why"),
    [
        ([""] * N, "it has 0 values"),
        (["ANONYMOUS"] * N, "it has 1 value"),
        (["x", "y"] * (N // 2), "it follows from the label"),
        ([f"site{i // 3}" for i in range(N)], "fewer than 10"),
    ],
)
def test_what_cannot_be_patients_is_not_taken_and_said_so(tmp_path: Path, patients: list[str], why: str) -> None:
    ds = collection(tmp_path, patients)
    assert ds.groups.tolist() == ds.ids.tolist()
    assert UNGROUPED in ds.notes
    assert any(note.startswith("the PatientID of the DICOM files is not taken") and why in note for note in ds.notes)


def test_images_without_a_patient_are_counted(tmp_path: Path) -> None:
    write_image(tmp_path / "neg" / "other.png", 99)
    ds = collection(tmp_path, [secret(i // 2) if i > 1 else "" for i in range(N)])
    assert "3 of 25 images have no PatientID: each is a group of its own" in ds.notes
    assert ds.table["group"].nunique() == 11 + 3


@pytest.mark.parametrize("names", ["IM{:06}", "1.2.840.113619.2.{}", "{}.IMA"])
def test_dicom_without_a_suffix_is_found_by_its_content(tmp_path: Path, names: str) -> None:
    for name in ("README", "notes.1", "short"):
        (tmp_path / "neg").mkdir(exist_ok=True)
        (tmp_path / "neg" / name).write_bytes(b"no image" * (1 if name == "short" else 100))
    ds = collection(tmp_path, [secret(i // 2) for i in range(N)], names=names)
    assert len(ds) == N
    assert ds.table["group"].nunique() == 12
    assert any("3 files that are not images" in note for note in ds.notes)


def test_without_pydicom_or_beyond_so_many_images_patients_are_not_looked_for_and_a_note_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patients = [secret(i // 2) for i in range(N)]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pydicom", None)
        ds = collection(tmp_path, patients)
    assert ds.table["group"].nunique() == N
    assert any("PatientID is not read" in note and "pip install" in note for note in ds.notes)
    monkeypatch.setattr("embcache.data.groups.LOOKED_AT_LOADING", N - 1)
    ds = load_dataset("folder", tmp_path)
    assert f"the PatientID of DICOM files is not looked at: there are {N} images" in ds.notes
