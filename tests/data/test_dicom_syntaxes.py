"""Every transfer syntax of DICOM that free codecs decode: known arrays, encoded by others."""

from __future__ import annotations

import base64
import io
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embcache.data.images import decode_image, read_image, read_size
from embcache.errors import DatasetError, ImageError
from tests.data.pictures import encode
from tests.data.test_dicom import dicom, gray_levels

pydicom = pytest.importorskip("pydicom", reason='DICOM needs pydicom: pip install "embcache[dicom]"')

GRAY = ((np.add.outer(np.arange(9) * 31, np.arange(13) * 300)) % 4096).astype(np.uint16)
NOISE = np.random.default_rng(1).integers(0, 4096, (48, 64), dtype=np.uint16)
SMOOTH = np.rint(2000 + 1500 * np.sin(np.add.outer(np.arange(48) / 9, np.arange(64) / 13))).astype(np.uint16)

# GRAY, encoded by OpenJPH 0.25 (imagecodecs 2026.3.6): reversibly, and with a step of 0.001.
HTJ2K = {
    "lossless": b"""
    /0//UQApQAAAAAANAAAACQAAAAAAAAAAAAAADQAAAAkAAAAAAAAAAAABDwEB/1AACAACAAAACv9SAAwAAgABAAUEBEAB/1wAEyCI
    kJCQkJCQkJCQkJCQiIiI/2QAFwABT3BlbkpQSCBWZXIgMC4yNi4zLv+QAAoAAAAAADcAAf+TwAAme/QFB3QAAMAAE0AAEoAW9QOH
    dADuAYd0AMAAE4Be8coDAnQAAAD/2Q==
    """,
    "lossy": b"""
    /0//UQApQAAAAAANAAAACQAAAAAAAAAAAAAADQAAAAkAAAAAAAAAAAABDwEB/1AACAACAAAAJP9SAAwAAgABAAUEBEAA/1wAIyKH
    dIdFh0WHF39cf1x/PXeqd6p3wmA1YDVgeFgaWBpnv/9kABcAAU9wZW5KUEggVmVyIDAuMjYuMy7/kAAKAAAAAABIAAH/k8AATBX+
    BId0AADAAJoABKAE/gIHdADmAAd0AMABMKb5AIJ0AMAFQKSlV/7r23YAwAqAzP4yVL3xFgD/2Q==
    """,
}


def rewrapped(data: bytes, syntax: str, frame: bytes) -> bytes:
    file = pydicom.dcmread(io.BytesIO(data))
    file.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
    file.PixelData = pydicom.encaps.encapsulate([frame])
    file["PixelData"].VR = "OB"
    sink = io.BytesIO()
    file.save_as(sink)
    return sink.getvalue()


def by_gdcm(data: bytes, syntax: str) -> bytes:
    gdcm = pytest.importorskip("gdcm")
    with tempfile.TemporaryDirectory() as folder:
        plain, packed = Path(folder, "plain.dcm"), Path(folder, "packed.dcm")
        plain.write_bytes(data)
        reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
        reader.SetFileName(str(plain))
        assert reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        writer.SetFileName(str(packed))
        assert writer.Write()
        return packed.read_bytes()


def by_pydicom(data: bytes, syntax: str, **options: object) -> bytes:
    pytest.importorskip("openjpeg" if "2000" in syntax else "jpeg_ls" if "LS" in syntax else "pydicom")
    file = pydicom.dcmread(io.BytesIO(data))
    file.compress(getattr(pydicom.uid, syntax), **options)
    sink = io.BytesIO()
    file.save_as(sink)
    return sink.getvalue()


def big_endian(values: np.ndarray) -> bytes:
    file = pydicom.dcmread(io.BytesIO(dicom(values)))
    file.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRBigEndian
    file.PixelData = values.astype(">u2").tobytes()
    sink = io.BytesIO()
    pydicom.dcmwrite(sink, file, implicit_vr=False, little_endian=False)
    return sink.getvalue()


LOSSLESS = {
    "1.2.840.10008.1.2": lambda a: dicom(a, preamble=False),
    "1.2.840.10008.1.2.2": big_endian,
    "1.2.840.10008.1.2.1.99": lambda a: _deflated(dicom(a)),
    "1.2.840.10008.1.2.5": lambda a: by_pydicom(dicom(a), "RLELossless"),
    "1.2.840.10008.1.2.4.57": lambda a: by_gdcm(dicom(a), "JPEGLosslessProcess14"),
    "1.2.840.10008.1.2.4.70": lambda a: by_gdcm(dicom(a), "JPEGLosslessProcess14_1"),
    "1.2.840.10008.1.2.4.80": lambda a: by_pydicom(dicom(a), "JPEGLSLossless"),
    "1.2.840.10008.1.2.4.90": lambda a: by_pydicom(dicom(a), "JPEG2000Lossless"),
    "1.2.840.10008.1.2.4.201": lambda a: rewrapped(dicom(a), "HTJ2KLossless", base64.b64decode(HTJ2K["lossless"])),
    "1.2.840.10008.1.2.4.202": lambda a: rewrapped(dicom(a), "HTJ2KLosslessRPCL", base64.b64decode(HTJ2K["lossless"])),
}


def _deflated(data: bytes) -> bytes:
    from tests.fuzz.image_seeds import deflated

    return deflated(data)


@pytest.mark.parametrize("syntax", LOSSLESS)
def test_lossless_syntaxes_give_the_very_pixels(syntax: str, tmp_path: Path) -> None:
    values = GRAY if ".4.20" in syntax else NOISE
    data = LOSSLESS[syntax](values)
    if data[128:132] == b"DICM":
        assert pydicom.dcmread(io.BytesIO(data)).file_meta.TransferSyntaxUID == syntax
    shades = (values - values.min()) / np.ptp(values)
    (tmp_path / "a.dcm").write_bytes(data)
    assert np.array_equal(read_image(tmp_path, "a.dcm")[0], gray_levels(shades))
    assert read_size(tmp_path, "a.dcm") == values.shape[::-1]


def test_lossless_syntaxes_keep_negative_values() -> None:
    signed = NOISE.astype(np.int16) - 2000
    window = {"BitsStored": 16, "HighBit": 15, "WindowCenter": 0, "WindowWidth": 3000, "RescaleSlope": 1}
    expected = decode_image(dicom(signed, RescaleIntercept=0, **window))
    plain = dicom(signed, RescaleIntercept=0, **window)
    for data in (
        by_pydicom(plain, "RLELossless"),
        by_pydicom(plain, "JPEG2000Lossless"),
        by_pydicom(plain, "JPEGLSLossless"),
        by_gdcm(plain, "JPEGLosslessProcess14_1"),
    ):
        assert np.array_equal(decode_image(data), expected)


def eight_bits(syntax: str) -> bytes:
    values = (SMOOTH >> 4).astype(np.uint8)
    return rewrapped(dicom(values), syntax, encode(Image.fromarray(values), "JPEG", quality=95))


LOSSY = {
    "1.2.840.10008.1.2.4.50": lambda: eight_bits("JPEGBaseline8Bit"),
    "1.2.840.10008.1.2.4.51": lambda: eight_bits("JPEGExtended12Bit"),
    "1.2.840.10008.1.2.4.81": lambda: by_pydicom(dicom(SMOOTH), "JPEGLSNearLossless", jls_error=3),
    "1.2.840.10008.1.2.4.91": lambda: by_pydicom(dicom(SMOOTH), "JPEG2000", j2k_psnr=[60]),
}


@pytest.mark.parametrize("syntax", LOSSY)
def test_lossy_syntaxes_are_near_the_pixels(syntax: str) -> None:
    data = LOSSY[syntax]()
    assert pydicom.dcmread(io.BytesIO(data)).file_meta.TransferSyntaxUID == syntax
    found = decode_image(data)[..., 0].astype(int)
    right = np.rint((SMOOTH - SMOOTH.min()) / np.ptp(SMOOTH) * 255)
    assert np.abs(found - right).max() <= 5


def test_lossy_htj2k_is_near_the_pixels() -> None:
    pytest.importorskip("openjpeg")
    data = rewrapped(dicom(GRAY, WindowCenter=2048, WindowWidth=4096), "HTJ2K", base64.b64decode(HTJ2K["lossy"]))
    right = np.rint((GRAY - 2047.5) / 4095 * 255 + 127.5)
    assert np.abs(decode_image(data)[..., 0] - right).max() <= 2


def test_twelve_bit_jpeg_of_a_published_file_is_as_gdcm_decodes_it() -> None:
    gdcm = pytest.importorskip("gdcm")
    path = pydicom.data.get_testdata_file("JPGExtended.dcm", download=False)
    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    raw = reader.GetImage().GetBuffer().encode("utf-8", "surrogateescape")
    values = np.frombuffer(raw, "<u2").reshape(1024, 256)
    file = pydicom.dcmread(path)
    for name in ("WindowCenter", "WindowWidth", "VOILUTSequence"):
        if name in file:
            delattr(file, name)
    sink = io.BytesIO()
    file.save_as(sink)
    assert np.array_equal(decode_image(sink.getvalue()), gray_levels((values - values.min()) / np.ptp(values)))


@pytest.mark.parametrize("interpretation", ["RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT"])
def test_color_becomes_rgb_from_any_space(interpretation: str) -> None:
    columns, rows = np.meshgrid(np.arange(64), np.arange(48))
    rgb = np.stack([columns * 4, rows * 5, 255 - columns * 2 - rows], axis=2).astype(np.uint8)
    if interpretation.endswith("CT"):
        lossless = interpretation == "YBR_RCT"
        data = by_pydicom(
            dicom(rgb, PhotometricInterpretation="RGB"),
            "JPEG2000Lossless" if lossless else "JPEG2000",
            **({} if lossless else {"j2k_psnr": [60]}),
        )
        file = pydicom.dcmread(io.BytesIO(data))
        file.PhotometricInterpretation = interpretation
        sink = io.BytesIO()
        file.save_as(sink)
        data = sink.getvalue()
    elif interpretation == "RGB":
        data = dicom(rgb)
    else:
        ybr = np.asarray(Image.fromarray(rgb).convert("YCbCr"))
        if interpretation == "YBR_FULL_422":
            pairs = ybr.reshape(48, 32, 2, 3).astype(int)
            colors = pairs[..., 1:].mean(axis=2)
            packed = np.concatenate([pairs[..., 0], colors], axis=2).astype(np.uint8)
            file = pydicom.dcmread(io.BytesIO(dicom(ybr, PhotometricInterpretation=interpretation)))
            file.PixelData = packed.tobytes()
            sink = io.BytesIO()
            file.save_as(sink)
            data = sink.getvalue()
        else:
            data = dicom(ybr, PhotometricInterpretation=interpretation)
    difference = np.abs(decode_image(data).astype(int) - rgb)
    assert difference.mean() < 1.5  # colors of 422 are means of two pixels
    assert difference.max() <= 8


def test_planes_one_after_another_are_the_same_picture() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    data = dicom(rgb, PlanarConfiguration=1)
    file = pydicom.dcmread(io.BytesIO(data))
    file.PixelData = rgb.transpose(2, 0, 1).tobytes() + b"\0"
    sink = io.BytesIO()
    file.save_as(sink)
    assert np.array_equal(decode_image(sink.getvalue()), rgb)


@pytest.mark.parametrize("syntax", ["JPEGBaseline8Bit", "JPEG2000Lossless"])
def test_a_frame_that_would_unpack_to_something_else_is_refused_before_it_does(syntax: str) -> None:
    gray = np.zeros((9, 13), np.uint8)
    larger = Image.fromarray(np.zeros((900, 1300), np.uint8))
    frame = encode(larger, "JPEG") if "Baseline" in syntax else encode(larger, "JPEG2000", no_jp2=True)
    with pytest.raises(ImageError, match="13×9 pixels with compressed data that state 1300×900"):
        decode_image(rewrapped(dicom(gray), syntax, frame))


def test_lossless_jpeg_decodes_in_threads() -> None:
    files = [by_gdcm(dicom(np.roll(GRAY, k)), "JPEGLosslessProcess14_1") for k in range(4)]
    alone = [decode_image(data) for data in files]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            for one, other in zip(alone, pool.map(decode_image, files), strict=True):
                assert np.array_equal(one, other)


@pytest.mark.parametrize(
    ("syntax", "package"),
    [("JPEGLosslessSV1", "gdcm"), ("JPEGLSLossless", "pyjpegls"), ("JPEG2000Lossless", "openjpeg")],
)
def test_without_the_codec_the_extra_is_named(
    syntax: str, package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a.dcm").write_bytes(rewrapped(dicom(GRAY), syntax, b"\xff\xd8\xff\xd9"))
    monkeypatch.setattr(pydicom.pixels.get_decoder(getattr(pydicom.uid, syntax)), "_available", {})
    for read in (read_image, read_size):
        with pytest.raises(DatasetError, match=package) as caught:
            read(tmp_path, "a.dcm")
        assert caught.value.fix == 'pip install "embcache[dicom]"'
