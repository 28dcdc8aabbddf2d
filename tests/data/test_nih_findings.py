from pathlib import Path

import pytest

from embcache.data.dataset import load_dataset
from embcache.data.published import find_layout
from tests.data.pictures import write_image
from tests.data.test_nih import write_labels


def write_layout(root: Path) -> Path:
    write_labels(root)
    for i, name in enumerate(["01_000", "01_001", "02_000", "03_000", "04_000", "05_000", "06_000"]):
        write_image(root / "images" / f"{name}.png", i)
    return root


def test_images_with_several_findings_are_kept(tmp_path: Path) -> None:
    ds = load_dataset("nih-findings", write_layout(tmp_path))
    assert (ds.kind, ds.metric) == ("findings", "macro_auc")
    assert ds.class_names == ds.columns == ("airspace opacity", "nodule or mass", "fracture", "pneumothorax")
    assert ds.labels[:4].tolist() == [[0, 0, 0, 0], [0, 0, 1, 0], [1, 1, 0, 0], [0, 1, 0, 0]]
    assert ds.labels[-1].tolist() == [1, 1, 1, 1]
    assert ds.table["label"].tolist() == [0] * 7
    assert ds.groups.tolist() == ["1", "1", "2", "3", "4", "5", "6"]


def test_images_lie_where_those_of_nih_do(home: Path) -> None:
    write_layout(home.parent / "data" / "nih")
    assert len(load_dataset("nih-findings")) == 7


@pytest.mark.shared
def test_the_published_label_files_give_the_published_counts(shared_data: Path) -> None:
    ds = find_layout("nih-findings").read(shared_data / "nih", "nih-findings")
    train, test = ds.select("train"), ds.select("test")
    assert (len(train), len(set(train.groups))) == (2414, 835)
    assert (len(test), len(set(test.groups))) == (1962, 860)
    assert not set(train.groups) & set(test.groups)
