"""Image files of every kind that is read, and where their headers keep numbers."""

from __future__ import annotations

import functools
import importlib.util
import io
import struct
import zlib
from collections.abc import Iterator

import h5py
import numpy as np
from PIL import Image, features

from tests.data.pictures import encode
from tests.fuzz.mutate import Field, Seed


def pixels(mode: str = "RGB", size: tuple[int, int] = (24, 17)) -> Image.Image:
    """A gradient with noise: what codecs cannot fold away."""
    dice = np.random.default_rng(len(mode))
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    gray = (x * 7 + y * 5 + dice.integers(0, 9, x.shape)) % 256
    rgb = Image.fromarray(np.stack([gray, gray[::-1], 255 - gray], axis=2).astype(np.uint8))
    if mode == "I;16":
        return Image.fromarray((gray * 257).astype(np.uint16))
    if mode == "F":
        return Image.fromarray((gray / 3).astype(np.float32))
    if mode == "I":
        return Image.fromarray((gray * 70000).astype(np.int32))
    return rgb.convert(mode)


@functools.cache
def image_seeds() -> list[Seed]:
    """What Pillow reads."""
    made: list[tuple[str, bytes]] = [
        ("rgb.jpg", encode(pixels(), "JPEG", quality=80, exif=_exif())),
        ("progressive.jpg", encode(pixels(), "JPEG", progressive=True)),
        ("gray.jpg", encode(pixels("L"), "JPEG")),
        ("cmyk.jpg", encode(pixels("CMYK"), "JPEG")),
        ("rgb.png", encode(pixels(), "PNG", exif=_exif())),
        ("palette.png", encode(pixels("P"), "PNG", transparency=3)),
        ("alpha.png", encode(pixels("RGBA"), "PNG")),
        ("bits.png", encode(pixels("1"), "PNG")),
        ("wide.png", encode(pixels("I;16"), "PNG")),
        ("text.png", _with_text(encode(pixels("L"), "PNG"))),
        ("frames.png", encode(pixels(), "PNG", save_all=True, append_images=[pixels().rotate(90)])),
        ("rgb.tif", encode(pixels(), "TIFF")),
        ("lzw.tif", encode(pixels(), "TIFF", compression="tiff_lzw")),
        ("deflate.tif", encode(pixels("L"), "TIFF", compression="tiff_adobe_deflate")),
        ("packbits.tif", encode(pixels("P"), "TIFF", compression="packbits")),
        ("jpeg.tif", encode(pixels(), "TIFF", compression="jpeg")),
        ("fax.tif", encode(pixels("1"), "TIFF", compression="group4")),
        ("wide.tif", encode(pixels("I;16"), "TIFF")),
        ("widelzw.tif", encode(pixels("I;16"), "TIFF", compression="tiff_lzw")),
        ("float.tif", encode(pixels("F"), "TIFF")),
        ("int.tif", encode(pixels("I"), "TIFF")),
        ("big.tif", encode(pixels(), "TIFF", big_tiff=True)),
        ("deep.tif", _deep_tiff()),
        ("deep.png", deep_png()),
        ("lab.tif", encode(pixels("LAB"), "TIFF")),
        ("rgb.bmp", encode(pixels(), "BMP")),
        ("palette.bmp", encode(pixels("P"), "BMP")),
        ("bits.bmp", encode(pixels("1"), "BMP")),
        ("rgb.gif", encode(pixels("P"), "GIF", comment=b"made up")),
        ("frames.gif", encode(pixels("P"), "GIF", save_all=True, append_images=[pixels("P").rotate(90)])),
        ("rgb.tga", encode(pixels(), "TGA")),
        ("rle.tga", encode(pixels(), "TGA", compression="tga_rle")),
        ("rgb.ppm", encode(pixels(), "PPM")),
        ("wide.pgm", encode(pixels("I;16"), "PPM")),
        ("text.ppm", b"P3 4 3 255\n" + b"1 20 255\n" * 12),
        ("bits.pbm", b"P1 8 2\n0101010111110000\n"),
        ("rgb.pcx", encode(pixels(), "PCX")),
    ]
    made += [("frames.mpo", encode(pixels(), "MPO", save_all=True, append_images=[pixels().rotate(180)]))]
    if features.check("webp"):
        made += [("lossy.webp", encode(pixels(), "WEBP", quality=50, exif=_exif()))]
        made += [("lossless.webp", encode(pixels("RGBA"), "WEBP", lossless=True))]
        made += [("frames.webp", encode(pixels(), "WEBP", save_all=True, append_images=[pixels().rotate(90)]))]
    if features.check("avif"):
        made += [("rgb.avif", encode(pixels(), "AVIF"))]
    if features.check("jpg_2000"):
        made += [
            ("rgb.jp2", encode(pixels(), "JPEG2000")),
            ("tiles.j2k", encode(pixels(), "JPEG2000", no_jp2=True, tile_size=(8, 8))),
        ]
        made += [("wide.jp2", encode(pixels("I;16"), "JPEG2000"))]
    return [Seed(name, data, tuple(header(data)), mend_png if data[1:4] == b"PNG" else bytes) for name, data in made]


def _deep_tiff() -> bytes:
    """16-bit RGB in LZW strips, big-endian, with a NODATA value."""
    from tests.data.test_depth import tiff

    values = np.random.default_rng(3).integers(0, 4096, (17, 24, 3)).astype(">u2")
    with Image.open(io.BytesIO(encode(Image.frombytes("L", (values.nbytes, 1), values.tobytes()), "TIFF",
                                      compression="tiff_lzw"))) as packed:  # fmt: skip
        start, count = packed.tag_v2[273][0], packed.tag_v2[279][0]
        packed.fp.seek(start)
        strip = packed.fp.read(count)
    return tiff(strip, values.shape, 16, ">", t259=5, t262=2, t42113=b"65535\0")


def deep_png() -> bytes:
    """16-bit RGBA."""
    from tests.data.test_depth import png

    return png(np.random.default_rng(4).integers(0, 4096, (17, 24, 4)).astype(np.uint16))


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "made up"
    return exif


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk with a true checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _with_text(png: bytes) -> bytes:
    extra = png_chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 5000)) + png_chunk(
        b"iCCP", b"p\0\0" + zlib.compress(b"y" * 999)
    )
    return png[:33] + extra + png[33:]


def mend_png(data: bytes) -> bytes:
    """The chunks' checksums made true."""
    fixed, at = bytearray(data), 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        end = at + 8 + size
        if end + 4 > len(data):
            break
        fixed[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(fixed)


def header(data: bytes) -> Iterator[Field]:
    """Where the header of an image file keeps its numbers."""
    if data[1:4] == b"PNG":
        yield from [Field(16, 4, "big"), Field(20, 4, "big"), *(Field(at, 1) for at in range(24, 29))]
        at = 8
        while at + 12 <= len(data):
            yield from [Field(at, 4, "big"), Field(at + 4, 4, "big"), Field(at + 8, 4, "big")]
            at += 12 + int.from_bytes(data[at : at + 4], "big")
    elif data[:2] == b"\xff\xd8":
        at = 2
        while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xD9:
            size = int.from_bytes(data[at + 2 : at + 4], "big")
            yield from [Field(at + 1, 1), Field(at + 2, 2, "big")]
            yield from (Field(at + 4 + k, 1) for k in range(min(size - 2, 24)))
            if data[at + 1] in (0xC0, 0xC2):
                yield from [Field(at + 5, 2, "big"), Field(at + 7, 2, "big")] * 3
            if data[at + 1] == 0xDA:
                return
            at += 2 + size
    elif data[:4] in (b"II*\0", b"MM\0*"):
        order = "little" if data[:1] == b"I" else "big"
        start = int.from_bytes(data[4:8], "little" if order == "little" else "big")
        yield Field(4, 4, order)
        for k in range(int.from_bytes(data[start : start + 2], "little" if order == "little" else "big")):
            at = start + 2 + 12 * k
            yield from [Field(at, 2, order), Field(at + 2, 2, order), Field(at + 4, 4, order), Field(at + 8, 4, order)]
    elif data[:4] == b"II+\0":
        start = int.from_bytes(data[8:16], "little")
        for k in range(int.from_bytes(data[start : start + 8], "little")):
            at = start + 8 + 20 * k
            yield from [Field(at, 2), Field(at + 2, 2), Field(at + 4, 8), Field(at + 12, 8)]
    elif data[:2] == b"BM":
        yield from [Field(at, 4) for at in (2, 10, 14, 18, 22, 30, 34, 46, 50)] + [Field(26, 2), Field(28, 2)]
    elif data[:3] == b"GIF":
        yield from [Field(6, 2), Field(8, 2), Field(10, 1)]
        for at in range(13, len(data) - 10):
            if data[at] == 0x2C:
                yield from [Field(at + k, 2) for k in (1, 3, 5, 7)] + [Field(at + 9, 1), Field(at + 10, 1)]
    elif data[:4] == b"\0\0\1\0":
        yield from [*(Field(at, 1) for at in range(6, 14)), Field(14, 4), Field(18, 4)]
    elif data[:4] == b"RIFF":
        yield from [Field(4, 4), Field(16, 4), *(Field(at, 1) for at in range(20, 60))]
    elif data[:1] in (b"P", b"\x0a"):
        yield from (Field(at, 1) for at in range(min(len(data), 20)))
    else:  # boxes and markers of JPEG 2000 and AVIF, TGA's 18 bytes
        yield from (Field(at, size, "big") for at in range(0, min(len(data), 160)) for size in (1, 2, 4))


@functools.cache
def dicom_seeds() -> list[Seed]:
    """What pydicom reads."""
    from tests.data.test_dicom import dicom  # skips where there is no pydicom

    gray = np.arange(30, dtype=np.uint16).reshape(5, 6) * 99
    window = {"WindowCenter": 1500, "WindowWidth": 900, "RescaleSlope": 1.5, "RescaleIntercept": -10}
    color = np.arange(90, dtype=np.uint8).reshape(5, 6, 3)
    made = [
        ("wide.dcm", dicom(gray)),
        ("window.dcm", dicom(gray, PixelPaddingValue=0, **window)),
        ("bytes.dcm", dicom((gray % 256).astype(np.uint8), PhotometricInterpretation="MONOCHROME1")),
        ("color.dcm", dicom(color)),
        ("bare.dcm", dicom(gray, preamble=False)),
        ("rle.dcm", _compressed(dicom(gray), "RLELossless")),
        ("jpeg.dcm", _encapsulated(dicom(color), "JPEGBaseline8Bit", encode(pixels(), "JPEG"))),
        ("jpeg2000.dcm", _encapsulated(dicom(color), "JPEG2000Lossless", encode(pixels(), "JPEG2000", no_jp2=True))),
        ("deflated.dcm", deflated(dicom(gray))),
        ("groups.dcm", _with_groups(dicom(gray))),
    ]
    if importlib.util.find_spec("gdcm") and importlib.util.find_spec("jpeg_ls"):
        from tests.data.test_dicom_syntaxes import NOISE, by_gdcm, by_pydicom

        made += [
            ("lossless.dcm", by_gdcm(dicom(NOISE), "JPEGLosslessProcess14_1")),
            ("jpegls.dcm", by_pydicom(dicom(NOISE), "JPEGLSLossless")),
            ("openjpeg.dcm", by_pydicom(dicom(NOISE), "JPEG2000Lossless")),
        ]
    return [Seed(name, data, tuple(_elements(data))) for name, data in made]


def _with_groups(data: bytes) -> bytes:
    """Windows, tables and slopes in functional groups."""
    import pydicom

    from tests.data.test_dicom_values import item, table

    file = pydicom.dcmread(io.BytesIO(data))
    display = item(VOILUTSequence=[table(np.arange(64) * 64, 0, 12)])
    values = item(RescaleSlope=1, RescaleIntercept=-5)
    file.SharedFunctionalGroupsSequence = [item(PixelValueTransformationSequence=[values])]
    file.PerFrameFunctionalGroupsSequence = [item(FrameVOILUTSequence=[display])]
    sink = io.BytesIO()
    file.save_as(sink)
    return sink.getvalue()


def _compressed(data: bytes, syntax: str) -> bytes:
    import pydicom

    file = pydicom.dcmread(io.BytesIO(data))
    file.compress(getattr(pydicom.uid, syntax))
    sink = io.BytesIO()
    file.save_as(sink)
    return sink.getvalue()


def _encapsulated(data: bytes, syntax: str, frame: bytes) -> bytes:
    import pydicom

    file = pydicom.dcmread(io.BytesIO(data))
    file.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
    file.Columns, file.Rows = 24, 17
    file.PixelData = pydicom.encaps.encapsulate([frame])
    file["PixelData"].VR = "OB"
    sink = io.BytesIO()
    file.save_as(sink)
    return sink.getvalue()


def deflated(data: bytes) -> bytes:
    """The same file under the deflated transfer syntax."""
    import pydicom

    file = pydicom.dcmread(io.BytesIO(data))
    file.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    sink = io.BytesIO()
    file.save_as(sink)
    return sink.getvalue()


def _elements(data: bytes) -> Iterator[Field]:
    """Group 0028 (the image), the pixel data and the transfer syntax: lengths and values."""
    for mark in (b"\x28\0", b"\xe0\x7f\x10\0", b"\2\0\x10\0"):
        at = data.find(mark)
        while at >= 0:
            yield from [Field(at + 4, 2), Field(at + 6, 2), Field(at + 8, 2), Field(at + 8, 4), Field(at + 12, 4)]
            at = data.find(mark, at + 1)


@functools.cache
def array_seeds() -> list[Seed]:
    """HDF5 files as the original PatchCamelyon has them."""
    values = np.arange(4 * 6 * 5 * 3, dtype=np.uint8).reshape(4, 6, 5, 3)
    made = []
    for name, options in (
        ("plain.h5", {}),
        ("gzip.h5", {"chunks": (2, 6, 5, 3), "compression": "gzip", "shuffle": True}),
        ("checked.h5", {"chunks": (1, 6, 5, 3), "fletcher32": True}),
    ):
        for libver in ("earliest", "latest"):
            sink = io.BytesIO()
            with h5py.File(sink, "w", libver=libver) as file:
                file.create_dataset("x", data=values, **options)
            data = sink.getvalue()
            made.append(Seed(f"{libver}-{name}", data, tuple(hdf5_fields(data))))
    return made


def hdf5_fields(data: bytes) -> Iterator[Field]:
    """Every byte of the metadata that is not nought, as numbers of all widths."""
    spots = [at for at in range(min(len(data), 4096)) if data[at]]
    yield from (Field(at, size) for at in spots for size in (1, 4, 8))
