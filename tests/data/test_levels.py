"""The level of the classes: found, or refused with the path to give."""

from pathlib import Path

import pytest

from embcache.data.dataset import load_dataset
from embcache.errors import DatasetError, DatasetNotFoundError
from tests.data.pictures import write_image
from tests.refusal import refused

SPLITS = [f"{split}/{c}/{split}{i}.png" for split in ("train", "test") for c in ("neg", "pos") for i in range(3)]
CLASSES = [f"{c}/{i}.png" for c in ("neg", "pos") for i in range(3)]


def fill(root: Path, *names: str, under: str = "") -> Path:
    for name in names:
        if not name.endswith((".csv", ".txt")):
            write_image(root / under / name, abs(hash(f"{under}/{name}")) % 2**32)
    return root


def put_table(root: Path, paths: list[str], name: str = "labels.csv", header: str = "path,label,group") -> Path:
    rows = [f"{path},{'ab'[i % 2]},p{i // 2}" for i, path in enumerate(paths)]
    (root / name).write_text("\n".join([header, *rows]) + "\n")
    return root


@pytest.mark.parametrize("wrap", ["", "download/my_archive", "images"])
@pytest.mark.parametrize("inside", [SPLITS, CLASSES])
def test_classes_are_found_below_folders_that_hold_nothing_else(tmp_path: Path, wrap: str, inside: list[str]) -> None:
    (tmp_path / "__MACOSX" / "x").mkdir(parents=True)
    (tmp_path / "README.md").touch()
    ds = load_dataset("folder", fill(tmp_path, *inside, under=wrap))
    assert ds.class_names == ("neg", "pos")
    assert sorted(ds.ids) == sorted(inside)  # as if the level itself had been named
    assert ds.root == tmp_path / wrap
    assert any(f"the folders in {wrap}/" in note for note in ds.notes) == bool(wrap)


def test_a_copy_of_the_classes_within_is_left_out_and_told(tmp_path: Path) -> None:
    fill(tmp_path, *CLASSES)
    fill(tmp_path, *CLASSES, under="cell_images")
    ds = load_dataset("folder", tmp_path)
    assert sorted(ds.ids) == sorted(CLASSES)
    assert "cell_images/ holds the class folders once more and is left out as a copy" in ds.notes
    fill(tmp_path, "neg/another.png", under="cell_images")
    with refused(DatasetNotFoundError, "classes-unclear"):
        load_dataset("folder", tmp_path)


@pytest.mark.parametrize("names", [("siteA", "siteB"), ("berlin", "boston")])
def test_two_archives_side_by_side_are_refused_with_a_path(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        fill(tmp_path, *CLASSES, under=name)
    with pytest.raises(DatasetNotFoundError) as caught:
        load_dataset("folder", tmp_path)
    assert names[0] in str(caught.value.found)
    assert "neg, pos" in str(caught.value.found)
    assert f"--data-root '{tmp_path / names[0]}'" in str(caught.value.fix)
    assert load_dataset("folder", tmp_path / names[1]).class_names == ("neg", "pos")


@pytest.mark.parametrize(
    "folders",
    [
        ("train", "test"), ("images_001", "images_002"), ("siteA", "siteB"), ("neg", "images"), ("neg", "pos", "test"),
    ],
)  # fmt: skip
def test_folders_that_name_no_class_are_never_classes(tmp_path: Path, folders: tuple[str, ...]) -> None:
    fill(tmp_path, *(f"{folder}/{i}.png" for folder in folders for i in range(2)))
    with pytest.raises(DatasetNotFoundError) as caught:
        load_dataset("folder", tmp_path)
    assert folders[0] in str(caught.value.found)
    assert "path,label" in str(caught.value.fix)


@pytest.mark.parametrize(
    "folders",
    [("grade 1", "grade 2"), ("0", "1"), ("case", "control"), ("slides", "photographs")],
)
def test_folders_that_may_name_classes_do(tmp_path: Path, folders: tuple[str, str]) -> None:
    fill(tmp_path, *(f"{folder}/{i}.png" for folder in folders for i in range(2)))
    assert load_dataset("folder", tmp_path).class_names == tuple(sorted(folders))


def test_years_sides_and_patients_below_classes_are_not_classes(tmp_path: Path) -> None:
    inner = ("2019", "2020", "left", "right", "patient1", "patient2")
    fill(tmp_path, *(f"{c}/{sub}/1.png" for c in ("neg", "pos") for sub in inner))
    assert load_dataset("folder", tmp_path).class_names == ("neg", "pos")


def test_splits_within_the_class_folders_are_splits(tmp_path: Path) -> None:
    ds = load_dataset("folder", fill(tmp_path, *(f"{c}/{s}/1.png" for c in ("neg", "pos") for s in ("Train", "test"))))
    rows = ds.table[["path", "split"]].itertuples(index=False)
    assert all(split == path.split("/")[1].lower() for path, split in rows)
    assert ds.class_names == ("neg", "pos")
    assert "the splits are the folders in each class folder" in ds.notes


def test_a_folder_of_images_within_the_splits_is_gone_into(tmp_path: Path) -> None:
    ds = load_dataset("folder", fill(tmp_path, *(name.replace("/", "/images/", 1) for name in SPLITS)))
    assert ds.class_names == ("neg", "pos")
    assert len(ds) == len(SPLITS)


@pytest.mark.parametrize("images", ["images", "images_00{}", "photos/{}"])
def test_a_table_beside_the_images_is_used(tmp_path: Path, images: str) -> None:
    paths = [f"{images.format(i % 2 + 1)}/{i}.png" for i in range(6)]
    put_table(fill(tmp_path, *paths), paths)
    ds = load_dataset("folder", tmp_path)
    assert ds.table["path"].tolist() == paths
    assert ds.class_names == ("a", "b")
    assert ds.groups.tolist() == ["p0", "p0", "p1", "p1", "p2", "p2"]
    assert "labels.csv, beside the images, is the table of labels" in ds.notes
    assert load_dataset("folder", tmp_path / "labels.csv").table.equals(ds.table)


def test_a_table_below_a_folder_of_the_archive_is_found_and_others_are_no_labels(tmp_path: Path) -> None:
    paths = [f"images/{i}.png" for i in range(6)]
    put_table(fill(tmp_path / "archive", *paths), paths)
    put_table(tmp_path / "archive", paths, "measurements.csv", "width,height,area")
    assert load_dataset("folder", tmp_path).table["path"].tolist() == paths


def test_several_tables_are_refused_with_a_path(tmp_path: Path) -> None:
    paths = [f"images/{i}.png" for i in range(6)]
    fill(tmp_path, *paths)
    put_table(put_table(tmp_path, paths, "a.csv"), paths, "b.tsv", "filename,diagnosis,group".replace(",", "\t"))
    with refused(DatasetNotFoundError, "classes-unclear") as caught:
        load_dataset("folder", tmp_path)
    assert "a.csv, b.tsv" in str(caught.value.found)
    assert str(tmp_path / "a.csv") in str(caught.value.fix)


def test_class_folders_come_before_a_table_which_is_named(tmp_path: Path) -> None:
    put_table(fill(tmp_path, *CLASSES), CLASSES)
    ds = load_dataset("folder", tmp_path)
    assert ds.class_names == ("neg", "pos")
    assert any("labels.csv beside the class folders is not used" in note for note in ds.notes)


def test_one_class_is_refused_with_what_may_be_meant(tmp_path: Path) -> None:
    fill(tmp_path / "one", "neg/1.png", "neg/2.png")
    with refused(DatasetError, "too-few-classes") as caught:
        load_dataset("folder", tmp_path / "one")
    assert caught.value.found == "neg"
    (tmp_path / "one" / "t.csv").write_text("path,label\nneg/1.png,x\nneg/2.png,x\n")
    with refused(DatasetError, "too-few-classes"):
        load_dataset("folder", tmp_path / "one" / "t.csv")
    (tmp_path / "one" / "t.csv").write_text("path,label\nneg/1.png,\nneg/2.png,\n")
    assert load_dataset("folder", tmp_path / "one" / "t.csv").class_names == ()


def test_a_class_folder_as_root_points_to_its_parent_and_train_to_test(tmp_path: Path) -> None:
    fill(tmp_path, *SPLITS)
    with pytest.raises(DatasetNotFoundError) as caught:
        load_dataset("folder", tmp_path / "train" / "neg")
    assert f"--data-root '{tmp_path / 'train'}'" in str(caught.value.fix)
    ds = load_dataset("folder", tmp_path / "train")
    assert any(f"test beside train/ is not used: --data-root '{tmp_path}' takes all" in note for note in ds.notes)


def test_the_folder_of_images_beside_a_table_points_to_it(tmp_path: Path) -> None:
    paths = [f"images/{i}.png" for i in range(6)]
    put_table(fill(tmp_path, *paths), paths)
    with pytest.raises(DatasetNotFoundError) as caught:
        load_dataset("folder", tmp_path / "images")
    assert str(tmp_path / "labels.csv") in str(caught.value.fix)


def test_what_a_scan_passes_over_is_counted_by_suffix(tmp_path: Path) -> None:
    fill(tmp_path, *CLASSES)
    for name in ("a.heic", "b.HEIC", "c.svs", "d.nii.gz", "e", "f.png.bak", ".DS_Store", "._x.png"):
        (tmp_path / "neg" / name).write_bytes(b"x" * 200)
    ds = load_dataset("folder", tmp_path)
    assert len(ds) == len(CLASSES)
    counts = "2 .heic, 1 .bak, 1 .nii.gz, 1 .svs, 1 no suffix"
    assert f"6 files that are not images, or of no format that is read, are left out: {counts}" in ds.notes


def test_folders_whose_files_cannot_be_read_are_named(tmp_path: Path) -> None:
    fill(tmp_path, *SPLITS[:6])
    for name in ("train/other/1.heic", "test/neg/1.heic", "test/neg/2.heic", "slide.svs", "labels.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a,b\n1,2\n")
    ds = load_dataset("folder", tmp_path)
    assert ds.class_names == ("neg", "pos")
    left_out = "test (2 .heic), train/other (1 .heic)"
    assert f"folders without an image that can be read are left out: {left_out}" in ds.notes
    assert any(note.endswith("3 .heic, 1 .csv, 1 .svs") for note in ds.notes)


def test_a_link_out_of_the_root_in_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    fill(tmp_path / "root", *CLASSES)
    fill(tmp_path / "outside", "1.png")
    (tmp_path / "root" / "c").mkdir()
    (tmp_path / "root" / "c" / "batch").symlink_to(tmp_path / "outside", target_is_directory=True)
    with refused(DatasetError, "outside-root") as caught:
        load_dataset("folder", tmp_path / "root")
    assert caught.value.found == "'c/batch'"


@pytest.mark.parametrize("odd", ["c/extra/1.png", "c/1.png"])
def test_images_beside_the_splits_of_class_folders_are_refused(tmp_path: Path, odd: str) -> None:
    fill(tmp_path, *(f"{c}/{s}/1.png" for c in "abc" for s in ("train", "test")), odd)
    with refused(DatasetNotFoundError, "classes-unclear") as caught:
        load_dataset("folder", tmp_path)
    assert odd.split("/")[1] in str(caught.value.found)
    fill(tmp_path / "x", *(f"{c}/{s}/1.png" for c in "abc" for s in ("val", "test")))
    with refused(DatasetNotFoundError, "classes-unclear"):
        load_dataset("folder", tmp_path / "x")


@pytest.mark.parametrize("inner", [("0", "1"), ("neg", "pos")])
@pytest.mark.parametrize(
    "layout", ["{s}/{c}/1.png", "train/{s}/{c}/1.png", "{s}/train/{c}/1.png", "{s}/images/{c}/1.png"]
)
def test_sites_and_patients_that_hold_the_classes_are_not_classes(
    tmp_path: Path, layout: str, inner: tuple[str, str]
) -> None:
    fill(tmp_path, *(layout.format(s=site, c=c) for site in ("mgh", "8863") for c in inner))
    with refused(DatasetNotFoundError, "classes-unclear") as caught:
        load_dataset("folder", tmp_path)
    assert f"each with {', '.join(inner)}" in str(caught.value.found)
    assert "path,label" in str(caught.value.fix)


def test_a_table_near_folders_that_are_no_classes_is_named(tmp_path: Path) -> None:
    paths = [f"images/{i}.png" for i in range(4)]
    put_table(fill(tmp_path / "a", *paths, *(f"masks/{i}.png" for i in range(4))), paths)
    with pytest.raises(DatasetNotFoundError) as caught:
        load_dataset("folder", tmp_path / "a")
    assert f"--data-root '{tmp_path / 'a' / 'labels.csv'}'" in str(caught.value.fix)
    fill(tmp_path / "b", *paths)
    (tmp_path / "b" / "metadata").mkdir()
    put_table(tmp_path / "b" / "metadata", paths)
    with pytest.raises(DatasetNotFoundError) as caught:
        load_dataset("folder", tmp_path / "b")
    assert f"{tmp_path / 'b' / 'metadata' / 'labels.csv'}" in str(caught.value.found)
    assert "move labels.csv into" in str(caught.value.fix)


@pytest.mark.parametrize("levels", [700])
def test_folders_nested_without_end_are_refused(tmp_path: Path, levels: int) -> None:
    deep = tmp_path / "neg"
    for _ in range(levels):
        deep = deep / "d"
    deep.mkdir(parents=True)
    fill(tmp_path, *CLASSES)
    with refused(DatasetError, "folders-too-deep"):
        load_dataset("folder", tmp_path)


def test_folders_of_several_images_within_a_class_are_noted(tmp_path: Path) -> None:
    fill(tmp_path, *(f"{c}/{c[0]}{k}/{i}.png" for c in ("neg", "pos") for k in range(4) for i in range(2)))
    notes = load_dataset("folder", tmp_path).notes
    assert any(note.startswith("8 folders within the class folders are not taken for groups") for note in notes)
