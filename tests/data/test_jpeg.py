"""The fast decoder of JPEG files gives Pillow's pixels, and Pillow's verdicts."""

from __future__ import annotations

import io

import numpy as np
import pytest
import simplejpeg  # noqa: F401 - a dependency: without it the tests would compare Pillow with itself
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from embcache.data import images
from embcache.data.images import decode_image
from embcache.errors import ImageError


def picture(width: int = 61, height: int = 47, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(width * height).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encode(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def by_pillow(data: bytes, monkeypatch: pytest.MonkeyPatch) -> np.ndarray | str:
    with monkeypatch.context() as patch:
        patch.setattr(images, "_decode_jpeg", lambda *_: None)
        return outcome(data)


def outcome(data: bytes) -> np.ndarray | str:
    try:
        return decode_image(data)
    except ImageError as error:
        return error.problem


def fast(data: bytes) -> bool:
    return images._decode_jpeg(data, Image.open(io.BytesIO(data))) is not None


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (17, 33), (224, 224)])
def test_pixels_are_those_of_pillow(
    size: tuple[int, int], progressive: bool, subsampling: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode(picture(*size), quality=83, subsampling=subsampling, progressive=progressive)
    assert fast(data)
    pixels = decode_image(data)
    assert pixels.shape == (size[1], size[0], 3)
    assert pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, by_pillow(data, monkeypatch))


@pytest.mark.parametrize("options", [{"quality": 1}, {"quality": 100}, {"optimize": True}, {"restart_marker_rows": 1}])
def test_ways_of_encoding(options: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(picture(), **options)
    assert fast(data)
    np.testing.assert_array_equal(decode_image(data), by_pillow(data, monkeypatch))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_gray_is_decoded_fast_and_cmyk_stays_with_pillow(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(picture(mode=mode))
    assert fast(data) == (mode == "L")
    np.testing.assert_array_equal(decode_image(data), by_pillow(data, monkeypatch))


def test_a_file_without_its_end_has_the_reason_of_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(picture())
    for length in range(len(data) - 1, 100, -37):
        found, expected = outcome(data[:length]), by_pillow(data[:length], monkeypatch)
        assert isinstance(found, str) == isinstance(expected, str)
        np.testing.assert_array_equal(found, expected)
    assert isinstance(outcome(data[: len(data) // 2]), str)


@given(st.data())
@settings(max_examples=20, deadline=None)
def test_damaged_files_end_as_with_pillow(data: st.DataObject) -> None:
    broken = bytearray(encode(picture(), progressive=data.draw(st.booleans())))
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(2, len(broken) - 3))] = data.draw(st.integers(0, 255))
    with pytest.MonkeyPatch.context() as monkeypatch:
        expected = by_pillow(bytes(broken), monkeypatch)
    np.testing.assert_array_equal(outcome(bytes(broken)), expected)


def test_decoders_that_differ_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = images._strict_jpeg
    monkeypatch.setattr(images, "_strict_jpeg", lambda *given: right(*given) ^ 1)  # type: ignore[operator]
    assert not images._same_pixels.__wrapped__()
    monkeypatch.undo()
    assert images._same_pixels.__wrapped__()
