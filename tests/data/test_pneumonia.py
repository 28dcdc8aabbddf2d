from pathlib import Path

import pytest

from embcache.data.dataset import load_dataset
from tests.data.pictures import write_image

FILES = (
    "train/NORMAL/IM-0115-0001.jpeg",
    "train/NORMAL/IM-0115-0002.jpeg",
    "train/NORMAL/NORMAL2-IM-0115-0001.jpeg",
    "train/PNEUMONIA/person1_bacteria_1.jpeg",
    "train/PNEUMONIA/person1_virus_2.jpeg",
    "val/NORMAL/NORMAL2-IM-1427-0001.jpeg",
    "test/NORMAL/IM-0001-0001.jpeg",
    "test/PNEUMONIA/person1_virus_6.jpeg",
)


def write_layout(root: Path) -> Path:
    for i, name in enumerate(FILES):
        write_image(root / "chest_xray" / name, i)
    return root


def test_labels_splits_and_patients_come_from_the_names(tmp_path: Path) -> None:
    ds = load_dataset("pneumonia", write_layout(tmp_path))
    rows = {
        i: (s, y, g, p)
        for i, s, y, g, p in ds.table[["id", "split", "label", "group", "pathogen"]].itertuples(index=False)
    }
    assert rows == {
        "train/NORMAL/IM-0115-0001.jpeg": ("train", 0, "IM-0115", ""),
        "train/NORMAL/IM-0115-0002.jpeg": ("train", 0, "IM-0115", ""),
        "train/NORMAL/NORMAL2-IM-0115-0001.jpeg": ("train", 0, "NORMAL2-IM-0115", ""),
        "train/PNEUMONIA/person1_bacteria_1.jpeg": ("train", 1, "person1", "bacteria"),
        "train/PNEUMONIA/person1_virus_2.jpeg": ("train", 1, "person1", "virus"),
        "test/NORMAL/IM-0001-0001.jpeg": ("test", 0, "IM-0001", ""),
        "test/PNEUMONIA/person1_virus_6.jpeg": ("test", 1, "person1", "virus"),
    }
    assert any("1 images of the official val split" in note for note in ds.notes)
    assert any("1 groups occur in both" in note for note in ds.notes)


def test_the_root_may_be_given_at_any_level_and_copies_and_litter_are_skipped(tmp_path: Path) -> None:
    write_layout(tmp_path / "a" / "versions")
    for i, name in enumerate(FILES):
        write_image(tmp_path / "a" / "versions" / "chest_xray" / "chest_xray" / name, i)
        write_image(tmp_path / "a" / "versions" / "__MACOSX" / "chest_xray" / name, i)
    litter = tmp_path / "a" / "versions" / "chest_xray" / "train" / "NORMAL"
    (litter / "._IM-0115-0001.jpeg").touch()
    (litter / ".DS_Store").touch()
    levels = [load_dataset("pneumonia", tmp_path / level) for level in ("a", "a/versions", "a/versions/chest_xray")]
    assert len(levels[0]) == 7
    for ds in levels[1:]:
        assert ds.table.equals(levels[0].table)
        assert ds.root == levels[0].root


def test_a_training_set_alone_loads_and_says_so(tmp_path: Path) -> None:
    for i, name in enumerate(FILES[:5]):
        write_image(tmp_path / name, i)
    ds = load_dataset("pneumonia", tmp_path)
    assert set(ds.table["split"]) == {"train"}
    assert any("local test set" in note for note in ds.notes)


@pytest.mark.shared
def test_the_published_images_give_the_published_counts(shared_data: Path) -> None:
    ds = load_dataset("pneumonia", shared_data / "pneumonia")
    counts = ds.table.groupby(["split", "label"]).size().to_dict()
    assert counts == {("train", 0): 1341, ("train", 1): 3875, ("test", 0): 234, ("test", 1): 390}
    assert any(note.startswith("62 images are byte-identical copies in 30 sets") for note in ds.notes)  # 32 too many
    assert not any("conflicting" in note for note in ds.notes)
    assert any(note.startswith("170 groups occur in both train and the official test set") for note in ds.notes)
    assert len(load_dataset("pneumonia", shared_data)) == len(ds)


def write_names(root: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        write_image(root / "chest_xray" / name, i)
    return root


def test_mendeleys_names_have_the_patient_in_the_middle(tmp_path: Path) -> None:
    names = (
        "train/PNEUMONIA/BACTERIA-1008087-0001.jpeg",
        "train/PNEUMONIA/BACTERIA-1008087-0002.jpeg",
        "train/PNEUMONIA/VIRUS-1008087-0003.jpeg",
        "train/NORMAL/NORMAL-1003233-0001.jpeg",
        "test/NORMAL/NORMAL-28501-0001.jpeg",
    )
    ds = load_dataset("pneumonia", write_names(tmp_path, *names))
    rows = dict(zip(ds.ids, zip(ds.groups, ds.table["pathogen"], strict=True), strict=True))
    assert rows == dict(
        zip(
            sorted(names),
            [("28501", ""), ("1003233", ""), *[("1008087", p) for p in ("bacteria", "bacteria", "virus")]],
            strict=True,
        )
    )
    assert ds.grouped
    assert ds.notes == ()


def test_names_of_no_known_scheme_are_counted_or_the_dataset_is_ungrouped(tmp_path: Path) -> None:
    names = ("train/PNEUMONIA/a.jpeg", "train/NORMAL/b.jpeg", "train/NORMAL/NORMALIZED-1-2.jpeg")
    ds = load_dataset("pneumonia", write_names(tmp_path / "1", *names))
    assert not ds.grouped
    assert ds.groups.tolist() == ds.ids.tolist()
    assert any(note.startswith("ungrouped: ") for note in ds.notes)
    ds = load_dataset("pneumonia", write_names(tmp_path / "2", *names, "train/NORMAL/IM-0115-0001.jpeg"))
    assert ds.grouped
    assert "3 of 4 images have names without a patient: each is a group of its own" in ds.notes
