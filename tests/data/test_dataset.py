import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embcache.config import DatasetRef
from embcache.data.dataset import ImageDataset, find_dataset, load_dataset
from embcache.data.published import find_layout
from embcache.errors import DatasetError, DatasetNotFoundError, UsageError
from embcache.paths import slug
from tests.data.pictures import write_image
from tests.refusal import refused


def table(**changes: object) -> pd.DataFrame:
    columns: dict[str, object] = {
        "id": ["a", "b", "c"],
        "path": ["a.png", "b.png", "c.png"],
        "place": ["", "", ""],
        "label": [0, 1, -1],
        "group": ["p", "p", "q"],
        "split": ["train", "train", "test"],
    }
    return pd.DataFrame(columns | changes)


def dataset(**changes: object) -> ImageDataset:
    return ImageDataset("toy", Path("/nowhere"), ("cat", "dog"), "auc", "generic", table(**changes))


def test_columns_are_given_as_arrays_and_one_split_can_be_selected() -> None:
    ds = dataset()
    assert ds.ids.tolist() == ["a", "b", "c"]
    assert ds.labels.dtype == np.int64
    assert ds.groups.tolist() == ["p", "p", "q"]
    assert len(ds) == 3
    assert ds.select("test").ids.tolist() == ["c"]
    assert ds.select("test").table.index.tolist() == [0]
    assert ds.file_path(1) == Path("/nowhere/b.png")
    assert "train: 2 (1 cat, 1 dog)" in repr(ds)
    assert "1 unlabeled" in repr(ds)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"id": ["a", "a", "c"]}, "duplicate-ids"),
        ({"id": ["a", "", "c"]}, "cell-not-text"),
        ({"id": ["a", "b\0", "c"]}, "cell-not-text"),
        ({"id": pd.Series(["a", "caf\udce9", "c"], dtype=object)}, "cell-not-text"),
        ({"path": ["a.png", "../b.png", "c.png"]}, "outside-root"),
        ({"path": ["a.png", "C:\\b.png", "c.png"]}, "outside-root"),
        ({"path": ["a.png", "..\\b.png", "c.png"]}, "outside-root"),
        ({"id": ["a", "../b", "c"]}, "outside-root"),
        ({"label": [0, 2, -1]}, "unknown-label"),
        ({"label": [0.0, 1.0, -1.0]}, "column-types"),
        ({"split": ["train", "held-out", "test"]}, "unknown-split"),
    ],
)
def test_a_table_that_breaks_the_contract_is_refused(changes: dict[str, object], code: str) -> None:
    with refused(DatasetError, code):
        dataset(**changes)


NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20)

IDS = NAMES.filter(lambda name: name[0] not in "/\\" and ":" not in name and ".." not in name)


@settings(max_examples=25)
@given(st.lists(IDS, unique=True, min_size=1, max_size=8), st.data())
def test_a_snapshot_returns_the_same_dataset(ids: list[str], data: st.DataObject) -> None:
    n = len(ids)
    columns = pd.DataFrame(
        {
            "id": ids,
            "path": [f"{i}.png" for i in range(n)],
            "place": [str(i) for i in range(n)],
            "label": data.draw(st.lists(st.integers(-1, 1), min_size=n, max_size=n)),
            "group": data.draw(st.lists(NAMES, min_size=n, max_size=n)),
            "split": data.draw(st.lists(st.sampled_from(["train", "val", "test"]), min_size=n, max_size=n)),
            "age": data.draw(st.lists(st.integers(0, 99), min_size=n, max_size=n)),
            "spacing": [0.5 * i for i in range(n)],
        }
    )
    ds = ImageDataset(
        name="toy",
        root=Path("somewhere"),
        class_names=("cat", "dög"),
        metric="auc",
        augment="patch",
        table=columns,
        layout="patchcam",
        subset_sizes={"S": 5},
        pool_limit=9,
        leaderboard_alpha=0.5,
        grouped=False,
        synthetic=True,
        notes=("one\ntwo",),
        missing=("x.png",),
        origin=Path("somewhere/labels.csv"),
    )
    again = ImageDataset.from_parquet_bytes(ds.to_parquet_bytes())
    assert again.table.to_dict("list") == ds.table.to_dict("list")
    assert {**vars(again), "table": None} == {**vars(ds), "table": None}
    assert again.to_parquet_bytes() == ds.to_parquet_bytes()


def test_what_probing_loads_decodes_no_image(tmp_path: Path) -> None:
    """Every source is known, a live dataset and a snapshot load, and neither Pillow nor the decoder is imported."""
    for split in ("train", "test"):
        for seed, label in enumerate(("NORMAL", "PNEUMONIA")):
            write_image(tmp_path / "chest_xray" / split / label / f"{split}.jpeg", seed + 2 * (split == "test"))
    (tmp_path / "home" / "toy").mkdir(parents=True)
    (tmp_path / "home" / "toy" / "dataset.parquet").write_bytes(dataset().to_parquet_bytes())
    script = (
        "import sys\n"
        "from embcache.data.dataset import find_dataset, load_dataset\n"
        "from embcache.data.published import DATASETS\n"
        "root, home = sys.argv[1:]\n"
        "assert set(DATASETS) >= {'aptos', 'folder', 'nih', 'patchcam', 'pneumonia', 'sample'}, set(DATASETS)\n"
        "assert len(load_dataset('pneumonia', root)) == 4\n"
        "assert find_dataset('toy', home=home)[1] == 'snapshot'\n"
        "loaded = {'PIL', 'pydicom', 'embcache.data.images', 'embcache.data.dicom'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path), str(tmp_path / "home")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_unknown_dataset_names_those_there_are(home: Path) -> None:
    with pytest.raises(DatasetNotFoundError) as caught:
        load_dataset("pnuemonia")
    assert "pneumonia" in str(caught.value)
    assert caught.value.fix == "embcache datasets"


@pytest.mark.parametrize("name", ["aptos", "nih", "patchcam", "pneumonia"])
def test_a_root_that_is_not_there_tells_the_layout_and_the_download(name: str, home: Path) -> None:
    with pytest.raises(DatasetNotFoundError) as caught:
        load_dataset(name)
    message = str(caught.value)
    assert find_layout(name).expected.split("\n")[0] in message
    assert f"kagglehub.{find_layout(name).download}" in message
    assert str(home.parent / "data" / name) in message


def test_a_folder_dataset_needs_a_folder(home: Path) -> None:
    with refused(UsageError, "root-missing"):
        load_dataset("folder")


@pytest.mark.parametrize("name", ["pneumonia", "", " ", "a,b", "a\nb", "x" * 201])
def test_a_name_that_would_mislead_is_refused(tmp_path: Path, name: str) -> None:
    write_image(tmp_path / "cat" / "a.png")
    with pytest.raises(UsageError):
        load_dataset("folder", tmp_path, name=name)


def test_a_folder_that_may_not_be_read_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "cat" / "a.png")

    def refuse(folder: object) -> object:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr("os.scandir", refuse)
    with refused(DatasetError, "dataset-unreadable") as caught:
        load_dataset("folder", tmp_path)
    assert caught.value.where == str(tmp_path)


def keep(ds: ImageDataset, home: Path) -> None:
    path = home / slug(ds.name) / "dataset.parquet"
    path.parent.mkdir(parents=True)
    path.write_bytes(ds.to_parquet_bytes())


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    for i, name in enumerate(["cat/a.png", "cat/b.png", "dog/c.png"]):
        write_image(tmp_path / "pets" / name, i)
    return tmp_path / "pets"


def test_the_snapshot_serves_when_the_folder_is_gone(home: Path, pets: Path) -> None:
    ds = load_dataset("folder", pets)
    keep(ds, home)
    pets.rename(pets.parent / "moved")
    for name, ref in ((ds.name, DatasetRef()), ("folder", DatasetRef(data_root=pets))):
        found, origin = find_dataset(name, ref)
        assert origin == "snapshot"
        assert found.table.equals(ds.table)


def test_a_root_given_a_level_up_is_recognised_when_it_is_gone(home: Path, tmp_path: Path) -> None:
    for i, name in enumerate(["NORMAL/IM-0001-0001.jpeg", "PNEUMONIA/person1_virus_1.jpeg"]):
        write_image(tmp_path / "given" / "chest_xray" / "train" / name, i)
    keep(load_dataset("pneumonia", tmp_path / "given"), home)
    (tmp_path / "given").rename(tmp_path / "moved")
    for ref in (DatasetRef(), DatasetRef(data_root=tmp_path / "given")):
        assert find_dataset("pneumonia", ref)[1] == "snapshot"


def test_who_extracted_without_missing_images_goes_on_without_them(home: Path, pets: Path) -> None:
    (pets / "labels.csv").write_text("path,label\ncat/a.png,0\ncat/gone.png,0\ndog/c.png,1\n")
    ds = load_dataset("folder", pets / "labels.csv", allow_missing=True)
    keep(ds, home)
    assert len(find_dataset(ds.name)[0]) == 2


def test_the_snapshot_serves_when_the_folder_is_empty(home: Path, pets: Path) -> None:
    ds = load_dataset("folder", pets)
    keep(ds, home)
    pets.rename(pets.parent / "moved")
    pets.mkdir()
    assert find_dataset(ds.name)[1] == "snapshot"


def test_a_wrong_root_is_an_error_even_with_a_snapshot(home: Path, pets: Path) -> None:
    ds = load_dataset("folder", pets, name="pets")
    keep(ds, home)
    with pytest.raises(DatasetNotFoundError):
        find_dataset("pets", DatasetRef(data_root=pets.parent / "nowhere"))


def test_a_named_dataset_keeps_its_name_when_it_is_moved(home: Path, pets: Path) -> None:
    ds = load_dataset("folder", pets, name="pets")
    keep(ds, home)
    moved = pets.rename(pets.parent / "moved")
    found, origin = find_dataset("pets", DatasetRef(data_root=moved))
    assert (found.name, found.root, origin) == ("pets", moved, "live")


def test_without_files_or_snapshot_the_error_is_that_of_loading(home: Path) -> None:
    with refused(DatasetNotFoundError, "dataset-layout"):
        find_dataset("aptos")


def test_a_kind_that_is_named_is_loaded_whatever_is_cached_by_that_name(home: Path, pets: Path, tmp_path: Path) -> None:
    keep(load_dataset("folder", pets, name="mine"), home)
    for i, name in enumerate(["NORMAL/IM-0001-0001.jpeg", "PNEUMONIA/person1_virus_1.jpeg"]):
        write_image(tmp_path / "xray" / "train" / name, i)
    found, _ = find_dataset("pneumonia", DatasetRef(data_root=tmp_path / "xray", name="mine"))
    assert (found.layout, found.name) == ("pneumonia", "mine")


def test_columns_that_no_file_can_hold_are_refused() -> None:
    with refused(DatasetError, "column-types"):
        dataset(extra=["a", 1, object()]).to_parquet_bytes()


def test_a_damaged_snapshot_stands_in_nobodys_way_where_the_images_are(tmp_path: Path, home: Path) -> None:
    root = tmp_path / "mine"
    for name in ("a", "b"):
        write_image(root / name / "1.png")
    ds = load_dataset("folder", root)
    snapshot = home / slug(ds.name) / "dataset.parquet"
    snapshot.parent.mkdir(parents=True)
    snapshot.write_bytes(b"torn")
    found, source = find_dataset("folder", DatasetRef(data_root=root))
    assert (found.name, source) == (ds.name, "live")
    with refused(DatasetError, "snapshot-damaged"):
        find_dataset(ds.name)
