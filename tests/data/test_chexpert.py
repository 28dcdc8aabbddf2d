"""CheXpert's label files; counts are those of its ``train.csv``."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from embcache.config import DatasetRef
from embcache.data.classes import as_in_run, task_flags, task_of
from embcache.data.dataset import find_dataset, load_dataset
from embcache.data.datasets.chexpert import OBSERVATIONS
from embcache.data.published import find_layout
from embcache.errors import DatasetError, DatasetNotFoundError, UsageError
from embcache.probe.protocol import plan_splits
from tests.data.pictures import write_image
from tests.refusal import refused

HEADER = ",".join(["Path,Sex,Age,Frontal/Lateral,AP/PA", *OBSERVATIONS])
TRAIN = {  # rows with 1.0, -1.0 and 0.0; the others are empty
    "No Finding": (22381, 0, 0), "Enlarged Cardiomediastinum": (10798, 12403, 21638),
    "Cardiomegaly": (27000, 8087, 11116), "Lung Opacity": (105581, 5598, 6599), "Lung Lesion": (9186, 1488, 1270),
    "Edema": (52246, 12984, 20726),
    "Consolidation": (14783, 27742, 28097), "Pneumonia": (6039, 18770, 2799), "Atelectasis": (33376, 33739, 1328),
    "Pneumothorax": (19448, 3145, 56341), "Pleural Effusion": (86187, 11628, 35396), "Pleural Other": (3523, 2653, 316),
    "Fracture": (9040, 642, 2512), "Support Devices": (116001, 1079, 6137),
}  # fmt: skip


def row(path: str, cells: Mapping[str, str]) -> str:
    return ",".join([f"CheXpert-v1.0-small/{path},Female,61,Frontal,AP", *(cells.get(o, "") for o in OBSERVATIONS)])


def write_layout(root: Path) -> Path:
    base = root / "CheXpert-v1.0-small"
    ill, well = dict.fromkeys(OBSERVATIONS[1:], "1.0"), dict.fromkeys(OBSERVATIONS[1:], "0.0") | {"No Finding": "1.0"}
    unsure = {"Edema": "-1.0", "Pneumonia": "0.0", "Fracture": "1.0"}
    rows = {
        "train": {f"train/patient0000{k}/study1/view1_frontal.jpg": c for k, c in enumerate((ill, well, unsure))},
        "valid": {f"valid/patient6454{k}/study1/view1_frontal.jpg": c for k, c in enumerate((well, ill))},
    }
    base.mkdir(parents=True)
    for split, of in rows.items():
        (base / f"{split}.csv").write_text("\n".join([HEADER, *(row(*each) for each in of.items()), ""]))
        for k, path in enumerate(of):
            write_image(base / path, k + 10 * (split == "valid"))
    return root


def test_empty_and_uncertain_findings_are_unknown(tmp_path: Path) -> None:
    ds = load_dataset("chexpert", write_layout(tmp_path))
    assert (ds.kind, ds.metric, ds.columns) == ("findings", "macro_auc", OBSERVATIONS)
    assert ds.labels[:2].tolist() == [[0, *[1] * 13], [1, *[0] * 13]]
    expected = dict.fromkeys(OBSERVATIONS, -1) | {"No Finding": 0, "Pneumonia": 0, "Fracture": 1}
    assert dict(zip(OBSERVATIONS, ds.labels[2].tolist(), strict=True)) == expected
    assert ds.ids[0] == "train/patient00000/study1/view1_frontal.jpg"
    assert ds.groups.tolist() == ["patient00000", "patient00001", "patient00002", "patient64540", "patient64541"]
    assert ds.table["split"].tolist() == ["train"] * 3 + ["test"] * 2
    first = ds.table.iloc[0]
    assert (first["sex"], first["age"], first["view"], first["view_position"]) == ("Female", 61, "Frontal", "AP")
    assert any("1 uncertain values are left out as unknown" in note for note in ds.notes)


@pytest.mark.parametrize(("uncertain", "value"), [("unknown", -1), ("zero", 0), ("one", 1)])
@pytest.mark.parametrize("unmentioned", ["unknown", "zero"])
def test_the_user_says_what_uncertain_and_empty_ones_are(
    tmp_path: Path, uncertain: str, value: int, unmentioned: str
) -> None:
    write_layout(tmp_path)
    ds = load_dataset("chexpert", tmp_path, uncertain=uncertain, unmentioned=unmentioned)
    assert ds.table["Edema"].tolist() == [1, 0, value, 0, 1]
    assert ds.table["Atelectasis"].tolist() == [1, 0, 0 if unmentioned == "zero" else -1, 0, 1]
    # Some of the findings are read as all of them were: an unknown one is not an uncertain one.
    some = load_dataset("chexpert", tmp_path, target="Edema,Atelectasis", uncertain=uncertain, unmentioned=unmentioned)
    assert some.labels.tolist() == ds.table[["Edema", "Atelectasis"]].to_numpy().tolist()


def test_a_run_says_how_its_findings_were_read(tmp_path: Path) -> None:
    for k in range(4):
        write_image(tmp_path / f"{k}.png", k)
    (tmp_path / "labels.csv").write_text("path,edema,mass\n0.png,1,0\n1.png,0,1\n2.png,-1,1\n3.png,,0\n")
    plain = load_dataset("folder", tmp_path / "labels.csv", target="edema,mass")
    assert task_of(plain) == {"kind": "findings", "loss": "bce"}
    ds = load_dataset("folder", tmp_path / "labels.csv", target="edema,mass", uncertain="one", unmentioned="zero")
    assert ds.labels.tolist() == [[1, 0], [0, 1], [1, 1], [0, 0]]
    request = {"target": ds.target, "task": task_of(ds)}
    assert task_flags(request)[-4:] == ["--uncertain", "one", "--unmentioned", "zero"]
    again = as_in_run(plain.whole or plain, request)
    assert (again.labels.tolist(), again.read_options()) == (ds.labels.tolist(), ds.read_options())
    chexpert = load_dataset("chexpert", write_layout(tmp_path / "data"), uncertain="one", target="Edema,Fracture")
    assert task_of(chexpert)["uncertain"] == "one"


def test_small_subsets_have_images_with_and_without_each_finding(tmp_path: Path) -> None:
    """Reports seldom deny some findings: one in a hundred images of atelectasis in the original."""
    rng, base = np.random.default_rng(0), write_layout(tmp_path) / "CheXpert-v1.0-small"
    paths = [f"train/patient{k:05d}/study1/view1_frontal.jpg" for k in range(2000)]
    values = rng.choice(["1.0", "-1.0", "0.0", ""], (2000, 14), p=[0.2, 0.1, 0.02, 0.68])
    rows = [row(path, dict(zip(OBSERVATIONS, each, strict=True))) for path, each in zip(paths, values, strict=True)]
    (base / "train.csv").write_text("\n".join([HEADER, *rows, ""]))
    ds = find_layout("chexpert").read(base, "chexpert")
    splits = plan_splits(ds, subsets=("S",))
    for fold in range(splits.n_folds):
        y = splits.labels[splits.train[fold, "S"]]
        assert len(y) == 200
        assert min((y == 1).sum(0).min(), (y == 0).sum(0).min()) >= 8


def test_columns_are_those_that_are_published(tmp_path: Path) -> None:
    with refused(UsageError, "columns-published"):
        load_dataset("chexpert", write_layout(tmp_path), group_column="Sex")


def test_a_snapshot_keeps_how_its_findings_were_read(tmp_path: Path, home: Path) -> None:
    ds = load_dataset("chexpert", write_layout(tmp_path / "data"), uncertain="one")
    (home / "chexpert").mkdir(parents=True)
    (home / "chexpert" / "dataset.parquet").write_bytes(ds.to_parquet_bytes())
    (tmp_path / "data").rename(tmp_path / "moved")
    found, origin = find_dataset("chexpert")
    assert (origin, found.table["Edema"].tolist()) == ("snapshot", [1, 0, 1, 0, 1])
    assert found.notes[-1] == "the findings are those of the snapshot, read with --uncertain one"
    with refused(DatasetNotFoundError, "columns-differ"):
        find_dataset("chexpert", DatasetRef(uncertain="zero"))


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("Edema", "Oedema", "column-missing"),
        ("-1.0", "2.0", "finding-values"),
        ("patient00002/", "", "chexpert-path"),
        ("patient00002", "patient00001", "duplicate-ids"),
        (",61,", ",old,", "not-a-number"),
        ("Female,61", "Female", "table-unreadable"),
    ],
)
def test_broken_label_files_are_refused(tmp_path: Path, old: str, new: str, code: str) -> None:
    path = write_layout(tmp_path) / "CheXpert-v1.0-small" / "train.csv"
    path.write_text(path.read_text().replace(old, new))
    with refused(DatasetError, code):
        load_dataset("chexpert", tmp_path)


def test_label_files_of_the_published_size_give_the_published_counts(tmp_path: Path) -> None:
    paths = [f"CheXpert-v1.0/train/patient{1 + k % 64540:05d}/study1/{k}.jpg" for k in range(223_414)]
    cells = {"Path": np.array(paths)}
    for name, counts in TRAIN.items():
        texts = np.repeat(["1.0", "-1.0", "0.0", ""], [*counts, 223_414 - sum(counts)])
        cells[name] = np.roll(texts, 7919 * len(cells))
    middle = ",Male,60,Frontal,AP,"
    rows = (path + middle + ",".join(each) for path, *each in zip(*cells.values(), strict=True))
    (tmp_path / "train.csv").write_text("\n".join([HEADER, *rows, ""]))
    well = dict.fromkeys(OBSERVATIONS, "0.0")
    rows = (row(f"valid/patient{64541 + k % 200}/study1/{k}.jpg", well) for k in range(234))
    (tmp_path / "valid.csv").write_text("\n".join([HEADER, *rows, ""]))
    ds = find_layout("chexpert").read(tmp_path, "chexpert")
    train = ds.select("train")
    assert (len(train), train.table["group"].nunique(), len(ds.select("test"))) == (223_414, 64_540, 234)
    assert ds.select("test").table["group"].nunique() == 200
    present, _, absent = zip(*TRAIN.values(), strict=True)
    assert train.task.counts(train.labels) == present
    assert (train.labels == 0).sum(0).tolist() == [223_414 - 22_381, *absent[1:]]
