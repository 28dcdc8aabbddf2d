"""What a scan of the images may be spared, and what not."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from embcache.data.dataset import ImageDataset, load_dataset
from embcache.errors import DatasetError, DatasetNotFoundError
from embcache.extract import scan as scanning
from embcache.extract.backbones import find_backbone
from embcache.extract.scan import (
    ABSENT,
    UNREADABLE,
    ImageSizes,
    Scan,
    decode_scan,
    encode_scan,
    scan_dataset,
    scan_images,
)
from embcache.extract.transforms import choose_transform
from tests.extract.conftest import draw


@pytest.fixture
def pool() -> Iterator[Executor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture
def dataset(images: Path) -> ImageDataset:
    return load_dataset("folder", images)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the headers that are read, by the decoder or without it."""
    paths: list[str] = []
    decoder, bare = scanning.read_size, scanning.is_square_of

    def by_decoder(root: Path, path: str, member: int, decoding: object = None) -> tuple[int, int]:
        paths.append(path)
        return decoder(root, path, member)

    def without(path: str, side: int) -> bool:
        found = bare(path, side)
        paths.extend(["/".join(Path(path).parts[-2:])] * found)
        return found

    monkeypatch.setattr(scanning, "read_size", by_decoder)
    monkeypatch.setattr(scanning, "is_square_of", without)
    return paths


def kept(scan: Scan, folder: Path) -> pd.DataFrame | None:
    (folder / "scan.parquet").write_bytes(encode_scan(scan))
    return decode_scan(folder / "scan.parquet")


def test_headers_are_read_once(
    dataset: ImageDataset, images: Path, tmp_path: Path, pool: Executor, read: list[str]
) -> None:
    first = scan_images(dataset, images, None, pool)
    assert set(ImageSizes(first)) == {(40, 40)}
    assert sorted(read) == sorted(dataset.table["path"])
    again = scan_images(dataset, images, kept(first, tmp_path), pool)
    assert set(ImageSizes(again)) == {(40, 40)}
    assert (again.states, again.seen) == (first.states, first.seen)
    assert len(read) == 20


def test_no_header_is_read_that_no_transform_hangs_on(
    dataset: ImageDataset, images: Path, home: Path, pool: Executor, read: list[str]
) -> None:
    files = scan_dataset(dataset, home, pool)
    choose_transform(find_backbone("random"), "imagenet", files.sizes)
    assert len(read) == 1  # one of a suffix: that it can be decoded at all
    files.keep()
    assert decode_scan(files.folder / "scan.parquet")["width"].tolist() == [40] + [-1] * 19
    choose_transform(find_backbone("random"), "paper", files.sizes)
    assert len(read) == 20


@pytest.mark.parametrize("side", [225, 56])
def test_a_large_image_or_a_second_size_spares_the_other_headers(
    side: int, images: Path, pool: Executor, read: list[str], tmp_path: Path
) -> None:
    for index in range(100):
        draw(images / "benign" / f"more{index:03}.png", 100 + index)
    draw(images / "benign" / "0.png", 1, size=side)  # the first to be listed
    dataset = load_dataset("folder", images)
    scan = scan_images(dataset, images, None, pool)
    sizes = ImageSizes(scan)
    assert choose_transform(find_backbone("random"), None, sizes).resize == (256, 256)
    assert len(read) < 40
    before = len(read)
    again = scan_images(dataset, images, kept(scan, tmp_path), pool)
    assert choose_transform(find_backbone("random"), None, ImageSizes(again)).resize == (256, 256)
    assert len(read) == before
    # What decided has gone: the headers that nobody looked at are unknown, not unreadable.
    (images / "benign" / "0.png").unlink()
    left = scan_images(load_dataset("folder", images), images, kept(scan, tmp_path), pool)
    assert choose_transform(find_backbone("random"), None, ImageSizes(left)).resize is None
    assert set(left.seen.values()) == {(40, 40)}
    assert len(left.seen) == 120


SIZES = st.lists(st.tuples(st.integers(1, 260), st.integers(1, 260)) | st.just((96, 96)), min_size=1, max_size=6)


@given(SIZES, st.integers(1, 6), st.sampled_from(["random", "dino"]))
def test_sizes_that_settle_the_transform_give_that_of_all(sizes: list[tuple[int, int]], some: int, name: str) -> None:
    looked = set(sizes[:some])
    if scanning._decided(looked):
        backbone = find_backbone(name)
        assert choose_transform(backbone, None, looked) == choose_transform(backbone, None, sizes)


def test_every_header_of_small_images_of_one_size_counts(
    dataset: ImageDataset, images: Path, pool: Executor, tmp_path: Path
) -> None:
    Image.new("RGB", (40, 30)).save(images / dataset.table["path"].tolist()[-1])
    scan = scan_images(load_dataset("folder", images), images, None, pool)
    assert set(ImageSizes(scan)) == {(40, 40), (40, 30)}


def test_an_image_that_could_not_be_read_is_looked_at_again(
    dataset: ImageDataset, images: Path, tmp_path: Path, pool: Executor
) -> None:
    path = images / dataset.table["path"][0]
    good, state = path.read_bytes(), path.stat()
    path.write_bytes(b"\0" * len(good))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    first = scan_images(dataset, images, None, pool)
    assert set(ImageSizes(first)) == {(40, 40)}
    assert [first.seen[name] for name in dataset.table["path"]] == [UNREADABLE] + [(40, 40)] * 19
    path.write_bytes(good)  # as when a decoder was installed: neither size nor time of the file tell
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    again = scan_images(dataset, images, kept(first, tmp_path), pool)
    assert set(ImageSizes(again)) == {(40, 40)}
    assert [again.seen[name] for name in dataset.table["path"]] == [(40, 40)] * 20


def test_none_readable_is_told_and_one_is_enough(images: Path, home: Path, pool: Executor) -> None:
    files = sorted(images.rglob("*.png"))
    for path in files[:-1]:
        path.write_bytes(b"broken")
    dataset = load_dataset("folder", images)
    assert set(scan_dataset(dataset, home, pool).sizes) == {(40, 40)}
    files[-1].write_bytes(b"broken")
    with pytest.raises(DatasetNotFoundError, match="none of the dataset's images"):
        scan_dataset(load_dataset("folder", images), home, pool)


def test_a_file_that_has_gone_is_absent(dataset: ImageDataset, images: Path, pool: Executor) -> None:
    first = dataset.table["path"][0]
    (images / first).unlink()
    scan = scan_images(dataset, images, None, pool)
    assert scan.states[first] == (ABSENT, 0)
    assert set(ImageSizes(scan)) == {(40, 40)}
    assert first not in scan.seen


def test_a_link_that_leads_out_since_loading_is_refused(dataset: ImageDataset, images: Path, pool: Executor) -> None:
    path = images / dataset.table["path"].tolist()[-1]
    outside = images.parent / "outside.png"
    path.rename(outside)
    path.symlink_to(outside)
    with pytest.raises(DatasetError, match="leaves the dataset's root"):
        scan_images(dataset, images, None, pool)


def test_a_scan_of_another_decoder_is_not_used(
    dataset: ImageDataset, images: Path, tmp_path: Path, pool: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = scan_images(dataset, images, None, pool)
    found = kept(scan, tmp_path)
    assert found is not None
    assert found["path"].tolist() == list(scan.states)
    assert found["size"].tolist() == [size for size, _ in scan.states.values()]
    monkeypatch.setattr(scanning, "DECODER_VERSION", "pillow-3")
    assert decode_scan(tmp_path / "scan.parquet") is None
    found.to_parquet(tmp_path / "scan.parquet")  # without a version
    assert decode_scan(tmp_path / "scan.parquet") is None


def test_a_missing_decoder_ends_the_scan(images: Path, pool: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(
        images / "benign" / "0.png", 1, size=300
    )  # no other size matters: the one DICOM file is looked at all the same
    (images / "benign" / "x.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 50)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(DatasetError) as caught:
        scan_images(load_dataset("folder", images), images, None, pool)
    assert caught.value.fix == 'pip install "embcache[dicom]"'
