import hashlib
import io
import os
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from embcache.data.budget import Decoding
from embcache.data.formats import scale_to_bytes
from embcache.data.images import decode_image, read_image, read_size
from embcache.errors import DatasetError, ImageError
from tests.data.pictures import encode, write_image
from tests.refusal import refused

RGB = np.random.default_rng(7).integers(0, 256, (5, 9, 3), dtype=np.uint8)
PICTURE = Image.fromarray(RGB)


@pytest.mark.parametrize(
    ("mode", "format"),
    [("RGB", "PNG"), ("RGB", "BMP"), ("RGB", "TIFF"), ("RGB", "PPM"), ("RGB", "TGA"), ("L", "PNG"), ("1", "PNG"),
     ("P", "GIF"), ("P", "PNG"), ("LA", "PNG"), ("RGBA", "PNG"), ("RGBA", "WEBP"),
     ("CMYK", "JPEG"), ("CMYK", "TIFF"), ("YCbCr", "JPEG"), ("RGB", "JPEG"), ("RGB", "WEBP"), ("LAB", "TIFF")],
)  # fmt: skip
def test_every_mode_becomes_rgb_as_pillow_converts_it(mode: str, format: str) -> None:
    source = Image.merge("LAB", PICTURE.split()) if mode == "LAB" else PICTURE.convert(mode)
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(source, format, **options)
    with Image.open(io.BytesIO(data)) as opened:
        expected = np.asarray(opened.convert("RGBA").convert("RGB") if opened.mode == "P" else opened.convert("RGB"))
    decoded = decode_image(data)
    assert decoded.shape == (5, 9, 3)
    assert np.array_equal(decoded, expected)


def test_a_palette_with_transparency_decodes_without_a_warning() -> None:
    palette = PICTURE.convert("P")
    decoded = decode_image(encode(palette, "PNG", transparency=bytes([0, 128, 255] * 20)))
    assert np.array_equal(decoded, np.asarray(palette.convert("RGB")))


def test_floating_point_gray_passes_over_what_is_not_finite() -> None:
    gray = np.array([[0.0, 0.5], [1.0, np.nan]], dtype=np.float32)
    decoded = decode_image(encode(Image.fromarray(gray), "TIFF"))[..., 0]
    assert decoded.tolist() == [[0, 128], [255, 0]]


@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_scaling_keeps_the_order_of_values(values: list[float]) -> None:
    scaled = scale_to_bytes(np.array(values)).astype(int)
    assert scaled.min() >= 0
    assert scaled.max() <= 255
    for a, x in zip(values, scaled, strict=True):
        for b, y in zip(values, scaled, strict=True):
            if a < b:
                assert x <= y


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 2, 5, 6])
def test_exif_orientation_is_applied_as_pillow_applies_it(tmp_path: Path, format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned"
    path.write_bytes(encode(PICTURE, format, exif=exif, **({"lossless": True} if format == "WEBP" else {})))
    with Image.open(path) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    decoded, _ = read_image(tmp_path, "turned")
    assert np.array_equal(decoded, expected)
    assert decoded.shape[:2] == ((9, 5) if orientation >= 5 else (5, 9))
    assert read_size(tmp_path, "turned") == (decoded.shape[1], decoded.shape[0])


def test_a_broken_exif_block_leaves_the_pixels_readable() -> None:
    data = encode(PICTURE, "JPEG", exif=b"Exif\x00\x00garbage that is no TIFF header")
    assert decode_image(data).shape == (5, 9, 3)


def test_truncated_files_of_any_length_are_refused_with_one_line() -> None:
    for format in ("PNG", "JPEG", "TIFF", "GIF", "BMP"):
        whole = encode(PICTURE, format)
        for length in range(0, len(whole) // 2, max(1, len(whole) // 25)):
            with pytest.raises(ImageError) as caught:
                decode_image(whole[:length])
            assert "\n" not in caught.value.problem
            assert "0x" not in caught.value.problem


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "GIF", "WEBP"])
def test_the_limit_on_pixels_is_the_headers_and_no_filter_of_the_process(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode(PICTURE, format)
    (tmp_path / "big").write_bytes(data)
    for action in ("ignore", "error"):
        with warnings.catch_warnings():
            warnings.simplefilter(action)  # type: ignore[arg-type]
            assert read_image(tmp_path, "big", decoding=Decoding(45))[0].shape == (5, 9, 3)
            with pytest.raises(ImageError, match=r"45 pixels, more than 44.*--max-pixels"):
                read_image(tmp_path, "big", decoding=Decoding(44))
            with monkeypatch.context() as patch:
                patch.setenv("EMBCACHE_MAX_PIXELS", "44")
                assert read_size(tmp_path, "big") == (9, 5)  # a size is a size


def test_an_image_above_pillows_own_limit_is_decoded_where_it_is_allowed(tmp_path: Path) -> None:
    whole = encode(Image.new("1", (18_000, 10_000)), "PNG")  # twice the limit, at which Pillow refuses to open
    assert read_size(tmp_path, _write(tmp_path, whole)) == (18_000, 10_000)
    with pytest.raises(ImageError, match="180,000,000 pixels"):
        read_image(tmp_path, _write(tmp_path, whole))


def _write(folder: Path, data: bytes) -> str:
    (folder / "image").write_bytes(data)
    return "image"


def test_postscript_is_refused_before_any_program_runs() -> None:
    with pytest.raises(ImageError, match="PostScript"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")


def test_read_image_returns_the_digest_of_the_files_bytes(tmp_path: Path) -> None:
    pixels = write_image(tmp_path / "a" / "b.png")
    decoded, digest = read_image(tmp_path, "a/b.png")
    assert np.array_equal(decoded, pixels)
    assert digest == hashlib.sha256((tmp_path / "a" / "b.png").read_bytes()).hexdigest()
    assert read_size(tmp_path, "a/b.png") == (12, 8)


@pytest.mark.parametrize("read", [read_image, read_size])
def test_a_file_that_is_not_there_is_an_image_error(tmp_path: Path, read: object) -> None:
    with pytest.raises(ImageError, match="not there"):
        read(tmp_path, "absent.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ImageError, match="regular"):
        read(tmp_path, "folder.png")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="regular"):
        read(tmp_path, "pipe.png")


@pytest.mark.parametrize("read", [read_image, read_size])
@pytest.mark.parametrize("path", ["../secret.png", "link.png", "linked/secret.png"])
def test_a_path_that_leaves_the_root_is_refused(tmp_path: Path, read: object, path: str) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    write_image(outside / "secret.png")
    write_image(tmp_path / "secret.png")
    (root / "link.png").symlink_to(outside / "secret.png")
    (root / "linked").symlink_to(outside)
    with refused(DatasetError, "outside-root"):
        read(root, path)
    with refused(DatasetError, "outside-root"):
        read(root, str(outside / "secret.png"))


@pytest.fixture
def array_file(tmp_path: Path) -> tuple[Path, np.ndarray]:
    pixels = np.random.default_rng(3).integers(0, 256, (4, 6, 7, 3), dtype=np.uint8)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("x", data=pixels, compression="gzip", chunks=(1, 6, 7, 3))
    return tmp_path, pixels


def test_members_of_an_array_file_are_read_by_row(array_file: tuple[Path, np.ndarray]) -> None:
    root, pixels = array_file
    for row in (2, 0, 3):
        decoded, digest = read_image(root, "x.h5", str(row))
        assert np.array_equal(decoded, pixels[row])
        assert digest == hashlib.sha256(pixels[row].tobytes()).hexdigest()
    assert read_size(root, "x.h5", "1") == (7, 6)


def test_an_array_file_that_was_replaced_is_read_anew(array_file: tuple[Path, np.ndarray]) -> None:
    root, pixels = array_file
    read_image(root, "x.h5", "0")
    with h5py.File(root / "new.h5", "w") as file:
        file["x"] = 255 - pixels
    (root / "new.h5").replace(root / "x.h5")
    assert np.array_equal(read_image(root, "x.h5", "0")[0], 255 - pixels[0])


def test_array_files_that_do_not_fit_are_image_errors(array_file: tuple[Path, np.ndarray]) -> None:
    root, _ = array_file
    with pytest.raises(ImageError, match="no row 4"):
        read_image(root, "x.h5", "4")
    with h5py.File(root / "gray.h5", "w") as file:
        file["x"] = np.zeros((3, 4, 4), dtype=np.uint8)
    with pytest.raises(ImageError, match="uint8"):
        read_size(root, "gray.h5", "0")
    with h5py.File(root / "other.h5", "w") as file:
        file["y"] = np.zeros(3)
    with pytest.raises(ImageError, match="no array"):
        read_image(root, "other.h5", "0")
    (root / "broken.h5").write_bytes(b"not HDF5")
    with pytest.raises(ImageError):
        read_image(root, "broken.h5", "0")
    with pytest.raises(ImageError, match="not there"):
        read_image(root, "absent.h5", "0")


@pytest.mark.shared
def test_real_images_decode_to_the_size_their_header_says(shared_data: Path) -> None:
    folders = ["pneumonia/chest_xray/test/NORMAL", "aptos/train_images", "patchcam/train", "nih/images"]
    for folder in folders:
        for path in sorted((shared_data / folder).iterdir())[:5]:
            pixels, _ = read_image(shared_data, f"{folder}/{path.name}")
            assert pixels.shape == (*read_size(shared_data, f"{folder}/{path.name}")[::-1], 3)
            with Image.open(path) as opened:
                assert np.array_equal(pixels, np.asarray(opened.convert("RGB")))


def test_a_png_broken_in_its_middle_is_refused_not_half_decoded() -> None:
    """Pillow decodes the pixels to look for EXIF behind them; a second load would return what the first one got."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = bytearray(encode(Image.fromarray(pixels), "PNG"))
    assert np.array_equal(decode_image(bytes(data)), pixels)
    middle = data.index(b"IDAT") + 4 + 6000
    data[middle] ^= 0x10
    with pytest.raises(ImageError):
        decode_image(bytes(data))
