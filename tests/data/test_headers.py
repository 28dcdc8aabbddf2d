from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from embcache.data.formats import is_square_of, jpeg_frame
from embcache.data.images import read_size

FORMATS = [
    ("png", {}),
    ("jpg", {}),
    ("jpg", {"progressive": True}),
    ("jpg", {"icc_profile": bytes(60_000), "comment": b"\xff\xc0 not a frame"}),
    ("tif", {}),
    ("tif", {"compression": "tiff_lzw"}),
]


@pytest.mark.parametrize(("suffix", "options"), FORMATS)
def test_squares_are_known_and_nothing_else_is(suffix: str, options: dict[str, object], tmp_path: Path) -> None:
    for size in [(96, 96), (96, 64), (64, 96), (95, 95)]:
        path = tmp_path / f"image.{suffix}"
        Image.new("RGB", size).save(path, **options)
        assert is_square_of(str(path), 96) == (size == (96, 96))


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xd8\xff", b"II*\0", b"II*\0\xff\xff\xff\x7f", b"\x89PNG\r\n\x1a\n", b"GIF89a"]
)
def test_broken_or_other_files_are_not_sure(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    assert not is_square_of(str(tmp_path / "x"), 96)


def test_a_jpeg_with_two_frames_is_not_sure(tmp_path: Path) -> None:
    Image.new("RGB", (96, 96)).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    place = data.index(b"\xff\xc0")
    assert jpeg_frame(data)[:2] == (96, 96)
    assert jpeg_frame(data[:place] + data[place : place + 19] + data[place:]) is None


@settings(max_examples=30)
@given(st.sampled_from(["png", "jpeg", "tiff"]), st.data())
def test_whatever_happens_to_a_byte_the_decoder_agrees_or_refuses(
    tmp_path_factory: pytest.TempPathFactory, format: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("headers")
    Image.new("RGB", (24, 24)).save(folder / "x", format=format)
    content = bytearray((folder / "x").read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / "x").write_bytes(content)
    if is_square_of(str(folder / "x"), 24):
        try:
            size = read_size(folder, "x")
        except Exception:
            return  # unreadable: it is asked of files that are likely to have the size, and says no more
        assert size == (24, 24)
