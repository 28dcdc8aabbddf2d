from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from embcache.data.dataset import load_dataset
from embcache.data.images import read_image, read_size
from embcache.errors import DatasetError
from tests.data.pictures import write_image
from tests.refusal import refused

H5 = "camelyonpatch_level_2_split_{}_{}.h5"


def write_layout(root: Path) -> Path:
    rows = {"aa": 0, "bb": 1, "cc": 0, "dd": 1}
    for i, name in enumerate(rows):
        write_image(root / "train" / f"{name}.tif", i)
    for i, name in enumerate(["ee", "ff"]):
        write_image(root / "test" / f"{name}.tif", 10 + i)
    (root / "train_labels.csv").write_text("id,label\n" + "".join(f"{i},{y}\n" for i, y in rows.items()))
    (root / "sample_submission.csv").write_text("id,label\nff,0\nee,0\n")
    return root


def write_hdf5(root: Path, *, slides: bool = False) -> dict[str, np.ndarray]:
    pixels = {}
    for part, n in {"train": 4, "valid": 2, "test": 3}.items():
        pixels[part] = np.random.default_rng(n).integers(0, 256, (n, 6, 6, 3), dtype=np.uint8)
        with h5py.File(root / H5.format(part, "x"), "w") as file:
            file["x"] = pixels[part]
        with h5py.File(root / H5.format(part, "y"), "w") as file:
            file["y"] = (np.arange(n, dtype=np.uint8) % 2).reshape(n, 1, 1, 1)
        if slides:
            meta = "coord_x,tumor_patch,wsi\n" + "".join(f"{i},False,slide_{part}_{i // 2}\n" for i in range(n))
            (root / H5.format(part, "meta").replace(".h5", ".csv")).write_text(meta)
    return pixels


def test_kaggles_layout_gives_an_unlabeled_test_set_in_the_order_to_hand_in(tmp_path: Path) -> None:
    ds = load_dataset("patchcam", write_layout(tmp_path))
    assert ds.ids.tolist() == ["aa", "bb", "cc", "dd", "ff", "ee"]
    assert ds.labels.tolist() == [0, 1, 0, 1, -1, -1]
    assert ds.table["path"].tolist()[3:5] == ["train/dd.tif", "test/ff.tif"]
    assert (ds.metric, ds.pool_limit, ds.leaderboard_alpha, dict(ds.subset_sizes)) == (
        "auc",
        50_000,
        0.51,
        {"S": 500, "M": 5000},
    )
    assert not ds.grouped
    assert ds.notes[0] == "ungrouped: images of one patient or slide may be on both sides"


def test_the_slide_map_gives_the_groups(tmp_path: Path) -> None:
    write_layout(tmp_path)
    (tmp_path / "patch_id_wsi_full.csv").write_text("id,wsi\naa,s1\nbb,s1\ncc,s2\n")
    ds = load_dataset("patchcam", tmp_path)
    assert ds.grouped
    assert ds.groups.tolist()[:4] == ["slide s1", "slide s1", "slide s2", "dd"]
    assert ds.notes == ("1 training images are not in patch_id_wsi_full.csv: each is a group of its own",)


def test_a_row_repeated_with_the_same_label_counts_once_and_with_another_is_refused(tmp_path: Path) -> None:
    write_layout(tmp_path)
    with (tmp_path / "train_labels.csv").open("a") as file:
        file.write("bb,1\n")
    ds = load_dataset("patchcam", tmp_path)
    assert ds.ids.tolist()[:4] == ["aa", "bb", "cc", "dd"]
    assert any("1 rows" in note and "repeat" in note for note in ds.notes)
    with (tmp_path / "train_labels.csv").open("a") as file:
        file.write("bb,0\n")
    with refused(DatasetError, "duplicate-ids"):
        load_dataset("patchcam", tmp_path)


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ("zz,2", "unknown-label"),
        ("../train/aa,1", "outside-root"),
        (",1", "cell-not-text"),
    ],
)
def test_rows_that_cannot_be_are_refused(tmp_path: Path, row: str, code: str) -> None:
    write_layout(tmp_path)
    with (tmp_path / "train_labels.csv").open("a") as file:
        file.write(row + "\n")
    with refused(DatasetError, code):
        load_dataset("patchcam", tmp_path)


def test_images_without_a_row_are_left_out_and_counted(tmp_path: Path) -> None:
    write_image(write_layout(tmp_path) / "train" / "extra.tif", 99)
    ds = load_dataset("patchcam", tmp_path)
    assert len(ds) == 6
    assert any("1 images in train/ have no row" in note for note in ds.notes)


def test_the_original_release_is_read_from_its_arrays(tmp_path: Path) -> None:
    pixels = write_hdf5(tmp_path)
    ds = load_dataset("patchcam", tmp_path)
    assert ds.table["split"].tolist() == ["train"] * 6 + ["test"] * 3
    assert ds.ids.tolist()[:2] + ds.ids.tolist()[4:5] == ["train-000000", "train-000001", "valid-000000"]
    assert ds.labels.tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0]
    assert (ds.grouped, ds.leaderboard_alpha) == (False, None)
    assert (ds.pool_limit, dict(ds.subset_sizes)) == (50_000, {"S": 500, "M": 5000})
    for row in (0, 5, 8):
        part, place = ds.table.loc[row, "part"], ds.table.loc[row, "place"]
        decoded, _ = read_image(ds.root, ds.table.loc[row, "path"], place)
        assert np.array_equal(decoded, pixels[part][int(place)])


def test_the_originals_slide_lists_give_the_groups(tmp_path: Path) -> None:
    write_hdf5(tmp_path, slides=True)
    ds = load_dataset("patchcam", tmp_path)
    assert ds.grouped
    assert ds.groups.tolist()[:5] == [
        "slide_train_0",
        "slide_train_0",
        "slide_train_1",
        "slide_train_1",
        "slide_valid_0",
    ]


def test_a_packed_or_incomplete_original_says_what_to_do(tmp_path: Path) -> None:
    write_hdf5(tmp_path)
    (tmp_path / H5.format("valid", "x")).rename(tmp_path / (H5.format("valid", "x") + ".gz"))
    with pytest.raises(DatasetError) as caught:
        load_dataset("patchcam", tmp_path)
    assert caught.value.fix == f"gunzip --keep {H5.format('valid', 'x')}.gz"
    with h5py.File(tmp_path / H5.format("valid", "x"), "w") as file:
        file["x"] = np.zeros((9, 6, 6, 3), dtype=np.uint8)
    with refused(DatasetError, "counts-differ"):
        load_dataset("patchcam", tmp_path)
    (tmp_path / H5.format("valid", "y")).write_bytes(b"partial download")
    with refused(DatasetError, "array-unreadable"):
        load_dataset("patchcam", tmp_path)


def link_out(file: h5py.File, key: str, outside: Path) -> None:
    file[key] = h5py.ExternalLink(outside / "outside.h5", key)


def link_softly(file: h5py.File, key: str, outside: Path) -> None:
    file["hidden"] = h5py.ExternalLink(outside / "outside.h5", key)
    file[key] = h5py.SoftLink("/hidden")


def store_outside(file: h5py.File, key: str, outside: Path) -> None:
    shape, size = ((4, 6, 6, 3), 432) if key == "x" else ((4, 1, 1, 1), 4)
    file.create_dataset(key, shape, "u1", external=[(str(outside / "raw"), 0, size)])


def map_outside(file: h5py.File, key: str, outside: Path) -> None:
    shape = (4, 6, 6, 3) if key == "x" else (4, 1, 1, 1)
    layout = h5py.VirtualLayout(shape, "u1")
    layout[:] = h5py.VirtualSource(outside / "outside.h5", key, shape)
    file.create_virtual_dataset(key, layout)


@pytest.mark.parametrize(
    ("key", "lead_out"),
    [("x", link_out), ("y", link_softly), ("x", store_outside), ("y", store_outside), ("x", map_outside)],
)
def test_arrays_that_lie_outside_their_file_are_refused(
    tmp_path: Path, key: str, lead_out: Callable[[h5py.File, str, Path], None]
) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (outside / "raw").write_bytes(bytes(432))
    with h5py.File(outside / "outside.h5", "w") as file:
        file["x"] = np.zeros((4, 6, 6, 3), np.uint8)
        file["y"] = np.zeros((4, 1, 1, 1), np.uint8)
    write_hdf5(root)
    before = load_dataset("patchcam", root)
    path = H5.format("train", key)
    with h5py.File(root / path, "w") as file:
        lead_out(file, key, outside)
    with h5py.File(root / path) as file:
        assert file[key].size == (432 if key == "x" else 4), "plain h5py follows it"
    with refused(DatasetError, "array-elsewhere"):
        load_dataset("patchcam", root)
    if key == "x":  # a file that was changed after loading
        for read in (read_image, read_size):
            with refused(DatasetError, "array-elsewhere"):
                read(before.root, path, "0")


@pytest.mark.parametrize("what", ["x"])
def test_a_file_of_the_original_that_is_linked_from_outside_is_refused(tmp_path: Path, what: str) -> None:
    (tmp_path / "root").mkdir()
    write_hdf5(tmp_path / "root")
    path = tmp_path / "root" / H5.format("valid", what)
    path.rename(tmp_path / "outside.h5")
    path.symlink_to(tmp_path / "outside.h5")
    with refused(DatasetError, "outside-root"):
        load_dataset("patchcam", tmp_path / "root")


def test_labels_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    write_hdf5(tmp_path)
    with h5py.File(tmp_path / H5.format("train", "y"), "w") as file:
        file["y"] = np.array([b"0", b"1", b"0", b"1"])
    with refused(DatasetError, "unknown-label"):
        load_dataset("patchcam", tmp_path)


@pytest.mark.shared
def test_the_layout_at_hand_loads(shared_data: Path) -> None:
    ds = load_dataset("patchcam", shared_data / "patchcam")
    assert ds.table.groupby(["split", "label"]).size().to_dict() == {
        ("train", 0): 219,
        ("train", 1): 379,
        ("test", -1): 100,
    }
    assert any("2 rows" in note for note in ds.notes)
