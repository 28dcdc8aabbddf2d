"""From stored values to brightness: a matrix of synthetic files against pydicom's own functions and NumPy."""

from __future__ import annotations

import io
import itertools
from typing import Any

import numpy as np
import pytest

from embcache.data.images import decode_image
from embcache.errors import ImageError
from tests.data.test_dicom import dicom, gray_levels

pydicom = pytest.importorskip("pydicom", reason='DICOM needs pydicom: pip install "embcache[dicom]"')

VALUES = np.random.default_rng(5).integers(0, 4096, (12, 17), dtype=np.uint16)


def item(**attributes: Any) -> Any:
    found = pydicom.Dataset()
    for name, value in attributes.items():
        setattr(found, name, value)
    return found


def table(entries: np.ndarray, first: int, bits: int, vr: str = "OW") -> Any:
    found = item(LUTDescriptor=[len(entries) % 65536, first, bits])
    found["LUTDescriptor"].VR = "SS" if first < 0 else "US"
    found.LUTData = entries.astype("<u2").tobytes() if vr == "OW" else entries.tolist()
    found["LUTData"].VR = vr
    return found


def unit(values: np.ndarray) -> np.ndarray:
    return (values - values.min()) / np.ptp(values)


MATRIX = list(
    itertools.product(
        ["plain", "rescaled", "modality"],
        ["none", "LINEAR", "LINEAR_EXACT", "SIGMOID", "voi8", "voi12", "voi16"],
        ["MONOCHROME1", "MONOCHROME2"],
        [False, True],
        ["file", "shared", "frame"],
    )
)


@pytest.mark.parametrize(("modality", "voi"), sorted({case[:2] for case in MATRIX}))
def test_gray_is_what_pydicoms_functions_make_of_it(modality: str, voi: str) -> None:
    """Over photometric interpretation, sign, and the place of the attributes: root, shared and per-frame groups."""
    cases = [case for case in MATRIX if case[:2] == (modality, voi)]
    for _, _, interpretation, signed, place in cases[len(modality + voi) % 4 :: 4]:
        stored = (VALUES.astype(np.int16) - 2000) if signed else VALUES
        transformation: dict[str, Any] = {}
        if modality == "rescaled":
            transformation = {"RescaleSlope": 2, "RescaleIntercept": -1024}
        elif modality == "modality":
            entries = np.arange(4096)[::-1] * 3 % 4096
            transformation = {
                "ModalityLUTSequence": [table(entries, -2000 if signed else 0, 16)]
            }  # pydicom knows 8 and 16
        display: dict[str, Any] = {}
        if voi.startswith("voi"):
            bits = int(voi[3:])
            entries = np.rint(((1 << bits) - 1) / (1 + np.exp(-(np.arange(4096) - 2048) / 400)))
            first = -1500 if signed and modality != "modality" else 100
            display = {"VOILUTSequence": [table(entries, first, bits)]}
        elif voi != "none":
            display = {"WindowCenter": 1000, "WindowWidth": 1801, "VOILUTFunction": voi}
        whole = {"PhotometricInterpretation": interpretation, "BitsStored": 16 if signed else 12}
        whole["HighBit"] = whole["BitsStored"] - 1
        flat = pydicom.dcmread(io.BytesIO(dicom(stored, **whole, **transformation, **display)))
        groups = item(PixelValueTransformationSequence=[item(**transformation)], FrameVOILUTSequence=[item(**display)])
        attributes = transformation | display
        if place == "shared":
            attributes = {"SharedFunctionalGroupsSequence": [groups], "WindowCenter": 7, "WindowWidth": 9}
        elif place == "frame":
            other = item(FrameVOILUTSequence=[item(WindowCenter=7, WindowWidth=9)])
            attributes = {"SharedFunctionalGroupsSequence": [other], "PerFrameFunctionalGroupsSequence": [groups]}
        found = decode_image(dicom(stored, **whole, **attributes))

        values = pydicom.pixels.apply_modality_lut(stored, flat)
        if voi == "voi8":  # pydicom 3.0 keeps places in such a table in 8 bits, where they wrap round
            shades = entries[np.clip(values.astype(np.int64) - first, 0, 4095)] / 255
        elif voi.startswith("voi"):
            shades = pydicom.pixels.apply_voi(values.astype(np.int64), flat) / (2.0 ** int(voi[3:]) - 1)
        elif voi == "none":
            shades = unit(values.astype(float))
        else:
            windowed = pydicom.pixels.apply_windowing(values, flat)
            low, high = (0.0, 4095.0) if not signed else (-32768.0, 32767.0)
            if modality == "modality":
                low, high = 0.0, 65535.0
            elif modality == "rescaled":
                low, high = low * 2 - 1024, high * 2 - 1024
            shades = (windowed - low) / (high - low)
        shades = 1 - shades if interpretation == "MONOCHROME1" else shades
        difference = np.abs(found.astype(int) - gray_levels(shades))
        assert difference.max() <= 1, (interpretation, signed, place)  # half a level, rounded either way
        assert (difference > 0).mean() < 0.02


@pytest.mark.parametrize(
    ("center", "width", "function"),
    [(0, 0, "LINEAR"), (5, 0.5, "LINEAR"), (5, 0, "SIGMOID"), (5, -1, "LINEAR_EXACT")],
)
def test_a_window_without_a_width_is_none(center: float, width: float, function: str) -> None:
    plain = decode_image(dicom(VALUES))
    assert np.array_equal(
        decode_image(dicom(VALUES, WindowCenter=center, WindowWidth=width, VOILUTFunction=function)), plain
    )
    several = dicom(VALUES, WindowCenter=[center, 2000], WindowWidth=[width, 1000], VOILUTFunction=function)
    right = dicom(VALUES, WindowCenter=2000, WindowWidth=1000, VOILUTFunction=function)
    assert np.array_equal(decode_image(several), decode_image(right))


def test_a_window_of_one_is_a_threshold() -> None:
    found = decode_image(dicom(VALUES, WindowCenter=2000, WindowWidth=1))[..., 0]
    assert np.array_equal(found, np.where(VALUES > 1999.5, 255, 0))  # PS3.3 C.11.2.1.2.1


def test_an_unknown_window_function_is_refused() -> None:
    with pytest.raises(ImageError, match="CUBIC"):
        decode_image(dicom(VALUES, WindowCenter=1, WindowWidth=2, VOILUTFunction="CUBIC"))


@pytest.mark.parametrize("high", [11, 15])
@pytest.mark.parametrize("signed", [False, True])
def test_values_lie_in_the_stored_bits_and_overlays_outside_them(high: int, signed: bool) -> None:
    values = VALUES.astype(np.int32) - (2048 if signed else 0)
    kept = (values & 0xFFF) << (high - 11)
    marks = np.random.default_rng(6).integers(0, 1 << 16, values.shape) & ~(0xFFF << (high - 11)) & 0xFFFF
    for above in (0, marks):
        raw = (kept | above).astype(np.uint16).view(np.int16 if signed else np.uint16)
        data = dicom(raw, BitsStored=12, HighBit=high, RescaleSlope=1, RescaleIntercept=0)
        file = pydicom.dcmread(io.BytesIO(data))
        file.add_new(0x60000100, "US", 16)
        file.add_new(0x60000102, "US", 15 if high < 15 else 3)
        sink = io.BytesIO()
        file.save_as(sink)
        assert np.array_equal(decode_image(sink.getvalue()), gray_levels(unit(values)))


def test_values_beyond_the_stored_bits_are_refused_where_no_overlay_explains_them() -> None:
    with pytest.raises(ImageError, match="more than the 12 bits"):
        decode_image(dicom(VALUES + np.uint16(5000)))
    with pytest.raises(ImageError, match="the highest 15"):
        decode_image(dicom(VALUES.astype(np.uint8), BitsStored=8, HighBit=15))


@pytest.mark.parametrize("interpretation", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(("value", "limit"), [(63536, None), (60000, 65535), (0, 10)])
def test_padding_is_out_of_the_range_and_black(interpretation: str, value: int, limit: int | None) -> None:
    pixels = VALUES.clip(100)
    pixels[:3], pixels[3, 3] = value, value if limit is None else limit
    extra = {} if limit is None else {"PixelPaddingRangeLimit": limit}
    gone = pixels == value if limit is None else (pixels >= value) & (pixels <= limit)
    shades = (pixels - pixels[~gone].min()) / np.ptp(pixels[~gone])
    shades = 1 - shades if interpretation == "MONOCHROME1" else shades
    data = dicom(pixels, PixelPaddingValue=value, PhotometricInterpretation=interpretation, **extra)
    assert np.array_equal(decode_image(data), gray_levels(np.where(gone, 0, shades)))


def test_signed_padding_is_known_whatever_its_representation() -> None:
    pixels = VALUES.astype(np.int16) - 1000
    pixels[:3] = -2000
    data = dicom(pixels)
    for number, vr in ((63536, "US"), (-2000, "SS")):
        file = pydicom.dcmread(io.BytesIO(data))
        file.add_new("PixelPaddingValue", vr, number)
        sink = io.BytesIO()
        file.save_as(sink)
        found = decode_image(sink.getvalue())[..., 0]
        assert not found[:3].any()
        assert np.array_equal(found[3:], gray_levels(unit(pixels[3:]))[..., 0])


@pytest.mark.parametrize("kind", ["Float", "DoubleFloat"])
def test_floating_point_pixels_are_scaled_by_their_range(kind: str) -> None:
    values = np.random.default_rng(7).normal(size=(6, 8)).astype(np.float32 if kind == "Float" else np.float64)
    values[0, 0], values[0, 1] = np.nan, -999
    file = pydicom.dcmread(io.BytesIO(dicom(VALUES[:6, :8])))
    del file.PixelData, file.BitsStored, file.HighBit, file.PixelRepresentation
    file.BitsAllocated = values.dtype.itemsize * 8
    setattr(file, f"{kind}PixelData", values.tobytes())
    setattr(file, f"{kind}PixelPaddingValue", -999.0)
    sink = io.BytesIO()
    file.save_as(sink)
    used = np.isfinite(values) & (values != -999)
    shades = (values.astype(float) - values[used].min()) / np.ptp(values[used].astype(float))
    assert np.array_equal(decode_image(sink.getvalue()), gray_levels(np.where(used, shades, 0)))


@pytest.mark.parametrize("bits", [8, 16])
def test_palettes_are_followed(bits: int) -> None:
    indices = np.random.default_rng(8).integers(0, 16, (5, 6), dtype=np.uint8)
    entries = np.random.default_rng(9).integers(0, 1 << bits, (3, 16))
    names = ("Red", "Green", "Blue")
    tables = {f"{n}PaletteColorLookupTableDescriptor": [16, 0, bits] for n in names}
    tables |= {
        f"{n}PaletteColorLookupTableData": row.astype("<u2" if bits == 16 else "u1").tobytes()
        for n, row in zip(names, entries, strict=True)
    }
    data = dicom(indices, PhotometricInterpretation="PALETTE COLOR", **tables)
    assert np.array_equal(decode_image(data), (entries.T[indices] >> (bits - 8)).astype(np.uint8))


def test_tables_of_false_bits_are_refused() -> None:
    lying = table(np.arange(4096), 0, 8)
    with pytest.raises(ImageError, match="table of 8 bits"):
        decode_image(dicom(VALUES, VOILUTSequence=[lying]))
