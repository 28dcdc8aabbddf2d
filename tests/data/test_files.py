from pathlib import Path

import pytest

from embcache.data.files import image_index, locate_files, walk_images
from embcache.errors import DatasetError
from tests.data.pictures import write_image
from tests.refusal import refused


def test_walking_is_sorted_and_passes_over_litter(tmp_path: Path) -> None:
    for name in ["b.png", "a/z.png", "a/y/x.png", "__MACOSX/b.png", ".hidden/c.png", "._b.png"]:
        write_image(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    assert list(walk_images(tmp_path)) == ["a/y/x.png", "a/z.png", "b.png"]


def test_a_linked_folder_inside_is_passed_over_and_one_leading_out_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_image(root / "a" / "x.png")
    (root / "b").symlink_to("a")
    assert list(walk_images(root)) == ["a/x.png"]
    write_image(tmp_path / "outside" / "y.png")
    (root / "c").symlink_to(tmp_path / "outside")
    with refused(DatasetError, "outside-root"):
        list(walk_images(root))


@pytest.mark.parametrize("path", ["link", "linked/x", "chain"])
def test_links_that_lead_out_are_refused_whether_or_not_their_target_is_there(tmp_path: Path, path: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "outside").mkdir()
    (root / "link").symlink_to(tmp_path / "outside" / "absent")
    (root / "linked").symlink_to(tmp_path / "outside")
    (root / "chain").symlink_to("link")
    with refused(DatasetError, "outside-root"):
        locate_files(root, [path])


def test_a_root_that_is_itself_a_link_is_no_way_out(tmp_path: Path) -> None:
    write_image(tmp_path / "real" / "x.png")
    (tmp_path / "link").symlink_to("real")
    assert locate_files(tmp_path / "link", ["x.png"])["x.png"] is not None


def test_two_images_of_one_stem_are_refused_with_both_names(tmp_path: Path) -> None:
    for name in ["a.jpg", "a.png", "b.png"]:
        write_image(tmp_path / name)
    with refused(DatasetError, "duplicate-ids") as caught:
        image_index(tmp_path)
    assert caught.value.found == "a.jpg and a.png"
    (tmp_path / "a.png").rename(tmp_path / "a.csv")
    assert image_index(tmp_path) == {"a": "a.jpg", "b": "b.png"}
