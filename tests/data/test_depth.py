"""PNG and TIFF of every depth, sign, interpretation, byte order and number of channels, against NumPy's arrays."""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from embcache.data.budget import Decoding
from embcache.data.images import decode_image, read_image, read_size
from embcache.errors import ImageError
from tests.data.pictures import encode

tifffile = pytest.importorskip("tifffile")

SHAPE = (23, 37)
KINDS = ["uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float32", "float64"]


def drawn(dtype: str, channels: int) -> np.ndarray:
    """Values in a part of the type's range, as a detector of few bits leaves them."""
    dice = np.random.default_rng(len(dtype) * 10 + channels)
    shape = SHAPE if channels == 1 else (*SHAPE, channels)
    if dtype.startswith("float"):
        return dice.normal(scale=3, size=shape).astype(dtype)
    most = min(np.iinfo(dtype).max, 4095)
    return dice.integers(max(np.iinfo(dtype).min, -most), most, shape).astype(dtype)


def right(values: np.ndarray, inverted: bool = False, absent: np.ndarray | None = None) -> np.ndarray:
    """By the documented rule: one range for all colors, alpha apart; 8 unsigned bits as they are."""
    if values.dtype == np.uint8:
        shades = values.astype(float)
    else:
        used = values if absent is None else values[~absent]
        low, high = used.astype(np.float64).min(), used.astype(np.float64).max()
        shades = np.rint((np.clip(values.astype(np.float64), low, high) - low) / (high - low) * 255)
    shades = 255 - shades if inverted else shades
    if absent is not None:
        shades[absent] = 0
    shades = shades.astype(np.uint8)
    return shades if shades.ndim == 3 else np.repeat(shades[..., None], 3, axis=2)


def close(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal, but for values that lie half way between two levels."""
    assert found.shape == expected.shape
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


@pytest.mark.parametrize("dtype", KINDS)
def test_tiffs_of_every_kind_are_what_numpy_wrote(dtype: str, tmp_path: Path) -> None:
    """Over byte order, interpretation, alpha, planes, tiles, compression, and classic or big files: every fifth."""
    kinds = itertools.product("<>", ["minisblack", "miniswhite", "rgb"], [False, True])
    for number, (order, photometric, alpha) in enumerate(kinds):
        colors = 3 if photometric == "rgb" else 1
        values = drawn(dtype, colors + alpha)
        ways = itertools.product(["contig", "separate"], [None, (16, 16)], [None, "zlib"], [False, True])
        for planar, tile, compression, big in itertools.islice(ways, (number + KINDS.index(dtype)) % 5, None, 5):
            if colors + alpha == 1 and planar == "separate":
                continue
            sink = io.BytesIO()
            pixels = np.moveaxis(values, 2, 0) if planar == "separate" else values
            tifffile.imwrite(
                sink, pixels, photometric=photometric, byteorder=order, bigtiff=big, tile=tile, rowsperstrip=5,
                compression=compression, planarconfig=planar if values.ndim == 3 else None, metadata=None,
                extrasamples=["unassalpha"] if alpha else None,
            )  # fmt: skip
            color = values[..., 0] if colors == 1 and alpha else values[..., :colors] if colors == 3 else values
            (tmp_path / "a.tif").write_bytes(sink.getvalue())
            close(read_image(tmp_path, "a.tif")[0], right(color, photometric == "miniswhite"))
            assert read_size(tmp_path, "a.tif") == SHAPE[::-1]


def packed(values: np.ndarray, bits: int) -> bytes:
    """Rows of samples of any number of bits, the highest first, each row from a whole byte on."""
    rows = values.reshape(len(values), -1).astype(np.int64) & ((1 << bits) - 1)
    planes = (rows[..., None] >> np.arange(bits)[::-1]) & 1
    return np.packbits(planes.reshape(len(rows), -1).astype(np.uint8), axis=1).tobytes()


def tiff(body: bytes, shape: tuple[int, ...], bits: int, order: str = "<", **tags: Any) -> bytes:
    """A TIFF of one strip, written by hand; tags by number, as ``t262=0``."""
    channels = shape[2] if len(shape) == 3 else 1
    found = {256: shape[1], 257: shape[0], 258: bits, 259: 1, 262: 1, 273: 8, 277: channels, 278: shape[0]}
    found |= {279: len(body)}
    found |= {int(name[1:]): value for name, value in tags.items()}
    extra, entries = b"", b""
    padded = body + b"\0" * (len(body) % 2)
    after = 8 + len(padded) + 2 + 12 * len(found) + 4
    for tag, value in sorted(found.items()):
        if isinstance(value, bytes) and len(value) <= 4:
            entries += struct.pack(order + "HHI4s", tag, 2, len(value), value)
        elif isinstance(value, bytes):
            entries += struct.pack(order + "HHII", tag, 2, len(value), after + len(extra))
            extra += value
        elif isinstance(value, tuple):
            entries += struct.pack(order + "HHII", tag, 3, len(value), after + len(extra))
            extra += struct.pack(f"{order}{len(value)}H", *value)
        else:
            entries += struct.pack(order + "HHII", tag, 4, 1, value)
    magic = b"II*\0" if order == "<" else b"MM\0*"
    directory = struct.pack(order + "H", len(found)) + entries + bytes(4)
    return magic + struct.pack(order + "I", 8 + len(padded)) + padded + directory + extra


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8, 11, 12, 14, 16, 24, 31, 32])
def test_every_number_of_bits_from_1_to_32(bits: int) -> None:
    dice = np.random.default_rng(bits)
    unsigned = dice.integers(0, 1 << bits, SHAPE)
    kinds = itertools.product("<>", [False, True], [False, True], [False, True])
    for order, signed, white, reverse in itertools.islice(kinds, bits % 3, None, 3):
        if (signed and bits == 1) or (reverse and bits >= 8):
            continue
        values = unsigned - (1 << (bits - 1)) if signed else unsigned
        if bits in (8, 16, 32):
            body = values.astype(f"{order}{'i' if signed else 'u'}{bits // 8}").tobytes()
        elif bits == 24:
            body = values.astype(">i4").view(np.uint8).reshape(-1, 4)[:, 1:]
            body = np.ascontiguousarray(body if order == ">" else body[:, ::-1]).tobytes()
        else:
            body = packed(values, bits)
        if reverse:
            body = np.packbits(
                np.unpackbits(np.frombuffer(body, np.uint8).reshape(-1, 1), axis=1)[:, ::-1], axis=1
            ).tobytes()
        tags = {"t339": 2 if signed else 1, "t262": 0 if white else 1, "t266": 2 if reverse else 1}
        if bits <= 8 and not signed:
            shades = np.rint(values * (255 / ((1 << bits) - 1)))
        else:
            shades = np.rint((values - values.min()) / np.ptp(values) * 255)
        expected = np.repeat((255 - shades if white else shades)[..., None], 3, axis=2)
        close(decode_image(tiff(body, SHAPE, bits, order, **tags)), expected)


@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "tiff_adobe_deflate", "lzma", "zstd"])
@pytest.mark.parametrize("predictor", [1, 2, 3])
def test_compressions_and_predictors_of_deep_color(compression: str, predictor: int) -> None:
    values = drawn("float32" if predictor == 3 else "uint16", 3)
    for order in "<>":
        if predictor == 2:
            steps = np.diff(values, axis=1, prepend=np.zeros_like(values[:, :1]))
            body = steps.astype(f"{order}u2").tobytes()
        elif predictor == 3:  # Adobe's: the bytes of a row by significance, then their differences
            rows = values.astype(">f4").view(np.uint8).reshape(len(values), -1, 4).transpose(0, 2, 1)
            rows = rows.reshape(len(values), -1, 3)
            body = np.diff(rows, axis=1, prepend=np.zeros_like(rows[:, :1])).tobytes()
        else:
            body = values.astype(f"{order}u2").tobytes()
        wrapped = encode(Image.frombytes("L", (len(body), 1), body), "TIFF", compression=compression)
        with Image.open(io.BytesIO(wrapped)) as opened:
            number, start, count = (opened.tag_v2[tag] for tag in (259, 273, 279))
        strip = wrapped[start[0] : start[0] + count[0]]
        bits = 32 if predictor == 3 else 16
        tags = {"t259": number, "t262": 2, "t317": predictor, "t339": 3 if predictor == 3 else 1}
        close(decode_image(tiff(strip, values.shape, bits, order, **tags)), right(values))


@pytest.mark.parametrize("nodata", [b"-9999\0", b"-3.4028234663852886e+38\0", b"nan\0"])
def test_nodata_is_out_of_the_range_and_black(nodata: bytes) -> None:
    values = np.abs(drawn("float32", 1)) + 1
    absent = np.random.default_rng(0).random(SHAPE) < 0.2
    values[absent] = np.float32(nodata.rstrip(b"\0"))
    for white in (0, 1):
        data = tiff(values.tobytes(), SHAPE, 32, t339=3, t262=white, t42113=nodata)
        close(decode_image(data), right(np.where(absent, values[~absent].min(), values), white == 0, absent))


def test_nodata_of_integers_and_color() -> None:
    gray = drawn("uint8", 1)
    expected = np.repeat(np.where(gray == 200, 0, 255 - gray)[..., None], 3, axis=2)
    assert np.array_equal(decode_image(tiff(gray.tobytes(), SHAPE, 8, t262=0, t42113=b"200\0")), expected)
    color = drawn("uint16", 3)
    color[3:9] = 65535
    absent = (color == 65535).all(axis=2)
    data = tiff(color.tobytes(), color.shape, 16, t262=2, t42113=b"65535\0")
    close(decode_image(data), right(color, False, absent))
    with pytest.raises(ImageError, match="NODATA"):
        decode_image(tiff(gray.tobytes(), SHAPE, 8, t42113=b"none\0"))


def test_colors_multiplied_by_alpha_are_divided_by_it() -> None:
    color = np.random.default_rng(1).integers(0, 60000, (*SHAPE, 3))
    alpha = np.random.default_rng(2).integers(30000, 65536, (*SHAPE, 1))
    stored = np.concatenate([np.rint(color * (alpha / 65535)), alpha], axis=2).astype("<u2")
    found = decode_image(tiff(stored.tobytes(), stored.shape, 16, t262=2, t338=1))
    close(found, right(color.astype(np.uint16)))


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_palettes_of_every_depth(bits: int) -> None:
    dice = np.random.default_rng(bits)
    colors = dice.integers(0, 65536, (3, 1 << bits))
    indices = dice.integers(0, 1 << bits, SHAPE)
    body = packed(indices, 4) if bits == 4 else indices.astype(f"<u{bits // 8}").tobytes()
    data = tiff(body, SHAPE, bits, t262=3, t320=tuple(colors.reshape(-1).tolist()))
    assert np.array_equal(decode_image(data), (colors.T[indices] >> 8).astype(np.uint8))


@pytest.mark.parametrize("orientation", [1, 4, 6])
def test_the_orientation_of_deep_pages_is_applied(orientation: int, tmp_path: Path) -> None:
    values = drawn("uint16", 1)
    (tmp_path / "a.tif").write_bytes(tiff(values.tobytes(), SHAPE, 16, t274=orientation))
    eight = (tmp_path / "b.tif").write_bytes(tiff((values >> 4).astype(np.uint8).tobytes(), SHAPE, 8, t274=orientation))
    assert eight
    deep, flat = read_image(tmp_path, "a.tif")[0], read_image(tmp_path, "b.tif")[0]
    assert deep.shape == flat.shape
    assert np.abs(deep.astype(int) - flat).max() <= 2
    assert read_size(tmp_path, "a.tif") == read_size(tmp_path, "b.tif") == deep.shape[1::-1]


def test_the_first_page_that_is_no_thumbnail_is_the_image() -> None:
    small, large = drawn("uint16", 1)[:5, :6], drawn("uint16", 1)
    for deep in (True, False):
        sink = io.BytesIO()
        with tifffile.TiffWriter(sink) as file:
            for pixels, kind in ((small, 1), (small[1:], 1), (large, 0), (small, 1)):
                file.write(pixels if deep else pixels.astype(np.uint8), subfiletype=kind, metadata=None)
        decoding = Decoding()
        found = decode_image(sink.getvalue(), name="a.tif", decoding=decoding)
        close(found, right(large if deep else large.astype(np.uint8)))
        assert not decoding.notes()
    sink = io.BytesIO()
    tifffile.imwrite(sink, np.stack([large, large[::-1]]), photometric="minisblack")
    close(decode_image(sink.getvalue(), name="stack.tif", decoding=decoding), right(large))
    assert "first of several frames or pages" in decoding.notes()[0]


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"t277": 3}, "3 gray channels: it does not say which"),
        ({"t262": 8}, "color space 8"),
        ({"t339": 6}, "complex"),
        ({"t259": 34712}, "JPEG 2000"),
        ({"t279": 100}, "cut short"),
        ({"t273": 10**6}, "beyond the end"),
        ({"t277": 1000}, "1000 samples"),
        ({"t317": 3}, "predictor 3"),
        ({"t322": 46_000, "t323": 46_000, "t324": 8, "t325": 100}, "too large: 2,116,000,000 pixels"),
    ],
)
def test_what_cannot_be_known_is_refused_with_its_reason(tags: dict[str, int], reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        decode_image(tiff(drawn("uint16", 1).tobytes(), SHAPE, 16, **tags))


def png(values: np.ndarray, interlaced: bool = False, filters: int = 0, chunks: bytes = b"") -> bytes:
    """A PNG of 16 bits per channel; without a filter, or with that of differences to the left."""
    channels = 1 if values.ndim == 2 else values.shape[2]
    color = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, color, 0, 0, int(interlaced))

    def lines(part: np.ndarray) -> bytes:
        out = b""
        for line in part:
            raw = np.frombuffer(line.astype(">u2").tobytes(), np.uint8)
            if filters == 1:
                raw = np.concatenate([raw[: 2 * channels], raw[2 * channels :] - raw[: -2 * channels]])
            out += bytes([filters]) + raw.tobytes()
        return out

    if interlaced:
        steps = [(0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1)]
        body = b"".join(lines(values[y::dy, x::dx]) for y, dy, x, dx in steps)
    else:
        body = lines(values)
    pieces = [chunk(b"IHDR", header), chunks, chunk(b"IDAT", zlib.compress(body)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(pieces)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_pngs_of_sixteen_bits_keep_them_all(channels: int) -> None:
    values = drawn("uint16", channels)
    color = values if channels in (1, 3) else values[..., 0] if channels == 2 else values[..., :3]
    for interlaced, filters in itertools.product([False, True], [0, 1]):
        assert np.array_equal(decode_image(png(values, interlaced, filters)), right(color))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_deep_pngs_is_applied(orientation: int) -> None:
    values = drawn("uint16", 1 + orientation % 4)
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode_image(png(values, chunks=chunk(b"eXIf", exif.tobytes()[6:])))
    upright = decode_image(png(values))
    order = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.swapaxes(0, 1)}
    order |= {6: np.rot90(upright, -1), 7: upright[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(upright)}
    assert np.array_equal(found, order[orientation])


_BAD = [
    (b"iCCP", b"p\0\0" + zlib.compress(b"x" * 3_000_000)), (b"iCCP", b"no profile"), (b"gAMA", b""), (b"cHRM", b"\1"),
    (b"zTXt", b"a\0\0" + zlib.compress(b"x" * 3_000_000)), (b"iTXt", b"a\0\1\0\0\0" + zlib.compress(b"x" * 3_000_000)),
    (b"tEXt", b"a\0" + b"x" * 3_000_000), (b"pHYs", b"\0"), (b"sRGB", b""), (b"prVt", b"x" * 100), (b"iTXt", b"a"),
    (b"zTXt", b"XML:com.adobe.xmp\0\0broken"), (b"eXIf", b"broken"), (b"tIME", b""), (b"sBIT", b""),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "body"), _BAD, ids=lambda value: value[:4] if isinstance(value, bytes) else None)
def test_chunks_that_are_no_part_of_the_picture_never_make_it_unreadable(kind: bytes, body: bytes) -> None:
    values = drawn("uint8", 3)
    data = encode(Image.fromarray(values), "PNG")
    for bad in (chunk(kind, body), chunk(kind, body)[:-1] + b"?"):  # with a true checksum, and a false one
        if kind == b"eXIf" and bad.endswith(b"?"):
            continue
        assert np.array_equal(decode_image(data[:33] + bad + data[33:]), values)
        assert np.array_equal(decode_image(data[:-12] + bad + data[-12:]), values)


@pytest.mark.parametrize("size", [10, 2_000_000])
@pytest.mark.parametrize("kind", [b"iTXt", b"zTXt", b"tEXt"])
def test_an_orientation_in_a_long_text_is_followed(size: int, kind: bytes, tmp_path: Path) -> None:
    values = drawn("uint8", 3)
    xmp = b"<x:xmpmeta>" + b" " * size + b'<rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    bodies = {b"iTXt": b"\0\1\0\0\0" + zlib.compress(xmp), b"zTXt": b"\0\0" + zlib.compress(xmp), b"tEXt": b"\0" + xmp}
    data = encode(Image.fromarray(values), "PNG")
    data = data[:33] + chunk(kind, b"XML:com.adobe.xmp" + bodies[kind]) + data[33:]
    (tmp_path / "a.png").write_bytes(data)
    assert np.array_equal(read_image(tmp_path, "a.png")[0], np.rot90(values, -1))
    assert read_size(tmp_path, "a.png") == (SHAPE[0], SHAPE[1])


SEGMENTS = [
    b"", b"\0", b"Exif\0\0broken", b"http://ns.adobe.com/xap/1.0/\0<", b"ICC_PROFILE\0\1\2x", b"JFIF", b"x" * 65000,
    b"MPF\0II*\0\x08\0\0\0\xff\xff", b"Photoshop 3.0\x008BIM\x04\x04\0\0\xff\xff\xff\xff",
]  # fmt: skip


def test_application_segments_never_make_a_jpeg_unreadable() -> None:
    data = encode(Image.fromarray(drawn("uint8", 3)), "JPEG")
    for marker, body in itertools.product(range(0xE0, 0xF0), SEGMENTS):
        segment = bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body
        assert np.array_equal(decode_image(data[:20] + segment + data[20:]), decode_image(data)), (marker, body[:9])


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("order", "<>")
def test_differences_of_24_bit_samples_wrap_at_24_bits(order: str, signed: bool) -> None:
    values = np.random.default_rng(24).integers(0, 1 << 24, SHAPE)
    values -= (1 << 23) if signed else 0
    steps = np.diff(values, axis=1, prepend=0) % (1 << 24)
    body = steps.astype(">u4").view(np.uint8).reshape(-1, 4)[:, 1:]
    body = np.ascontiguousarray(body if order == ">" else body[:, ::-1]).tobytes()
    tags = {"t317": 2, "t339": 2 if signed else 1, "t262": 1}
    shades = np.rint((values - values.min()) / np.ptp(values) * 255)
    close(decode_image(tiff(body, SHAPE, 24, order, **tags)), np.repeat(shades[..., None], 3, axis=2))
