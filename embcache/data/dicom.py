"""DICOM files to ``uint8`` RGB (needs pydicom, the extra ``dicom``)."""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import TiffImagePlugin

from embcache.data.budget import Decoding, broken, quiet, too_large, unsupported
from embcache.data.files import has_dicom_suffix
from embcache.data.formats import codestream_size, gray_as_rgb, jpeg_frame, one_strip, widen_to_bytes
from embcache.errors import DatasetError

_DEFLATED, _PLAIN = b"1.2.840.10008.1.2.1.99", b"1.2.840.10008.1.2.1\0\0\0"  # transfer syntaxes
_MOST_INFLATED = 1 << 29
_LOSSLESS = 0xC3  # the JPEG marker of a frame that Huffman codes without loss
_HEAD = 1 << 20
_FIRST = 1 << 13
_PATIENT = 0x00100020  # the tag of PatientID
_BLOCK = 1 << 22  # pixels rendered at a time
# The one plugin of pydicom, and its package, that decodes a compression; what is not here is decoded by pydicom alone.
_PLUGINS = {
    "1.2.840.10008.1.2.4.50": ("pillow", "Pillow"),
    "1.2.840.10008.1.2.4.51": ("pillow", "Pillow"),
    "1.2.840.10008.1.2.4.57": ("gdcm", "python-gdcm"),
    "1.2.840.10008.1.2.4.70": ("gdcm", "python-gdcm"),
    "1.2.840.10008.1.2.4.80": ("pyjpegls", "pyjpegls"),
    "1.2.840.10008.1.2.4.81": ("pyjpegls", "pyjpegls"),
    **{f"1.2.840.10008.1.2.4.{n}": ("pylibjpeg", "pylibjpeg-openjpeg") for n in (90, 91, 201, 202, 203)},
    "1.2.840.10008.1.2.5": ("pydicom", "pydicom"),
}
# What an image's gray values hang on, and the macros of functional groups that state it for a frame.
_MACROS = {
    "PixelValueTransformationSequence": ("ModalityLUTSequence", "RescaleSlope", "RescaleIntercept"),
    "FrameVOILUTSequence": ("VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction"),
}
_ATTRIBUTES = (
    "PhotometricInterpretation", "PixelRepresentation", "BitsStored", "PixelPaddingValue", "PixelPaddingRangeLimit",
    "FloatPixelPaddingValue", "FloatPixelPaddingRangeLimit", "DoubleFloatPixelPaddingValue",
    "DoubleFloatPixelPaddingRangeLimit", *(name for names in _MACROS.values() for name in names),
)  # fmt: skip


def is_dicom(data: bytes, name: str = "") -> bool:
    """Whether bytes (or a file name) are a DICOM file's: the marker after 128 bytes, else the suffix."""
    return data[128:132] == b"DICM" or has_dicom_suffix(name)


def decode_dicom(data: bytes, name: str, decoding: Decoding) -> npt.NDArray[np.uint8]:
    """The first frame as a viewer shows it.

    Gray: stored values (of `BitsStored` below `HighBit`, or floating point), rescaled by slope and intercept or the
    modality's table; then the first table of interest, of its own bits, else the first window of a positive width, else
    the image's own range; MONOCHROME1 is inverted, so that more is always brighter; padding is black and outside the
    range. All of these are the frame's: what its functional group says comes before the group of all frames, and that
    before the file. Color and palette images become RGB.

    Each compression is decoded by one library, so that the pixels do not depend on what else is installed.

    Shapes: returns (H, W, 3).
    """
    with _pydicom(name) as pydicom:
        file = pydicom.dcmread(io.BytesIO(_inflated(data)), force=True)
        _check(pydicom, file, name, decoding)
        need = int(file.Rows) * int(file.Columns) * (int(file.get("SamplesPerPixel", 1)) + 2)
        with decoding.hold(need * (int(file.get("BitsAllocated", 8)) // 8 + 3)):
            if int(file.get("NumberOfFrames", 1) or 1) > 1:
                decoding.note("the first of several frames or pages is used", name)
            return _render(pydicom, file)


def _render(pydicom: Any, file: Any) -> npt.NDArray[np.uint8]:
    frame, photometric = _frame(pydicom, file)
    if photometric == "RGB":
        return _eight_bits(frame, int(file.BitsStored))
    rows = max(1, _BLOCK // max(1, frame.shape[1]))
    parts = [slice(top, top + rows) for top in range(0, len(frame), rows)]
    if photometric == "PALETTE COLOR":
        pixels = np.empty((*frame.shape[:2], 3), np.uint8)
        for part in parts:
            color = pydicom.pixels.apply_color_lut(frame[part], file)[..., :3]
            pixels[part] = _eight_bits(color, color.dtype.itemsize * 8)
        return pixels
    paint = _grays(pydicom, file, frame, parts)
    return gray_as_rgb(np.concatenate([paint(frame[part]) for part in parts]))


def dicom_size(file: IO[bytes], name: str, decoding: Decoding) -> tuple[int, int]:
    """(width, height) from the header of an open file. Raises as `decode_dicom`."""
    with _pydicom(name) as pydicom:
        data = file.read(_HEAD)
        whole = len(data) < _HEAD
        while True:
            try:
                if not whole and _DEFLATED in data:
                    raise EOFError("what is deflated is read whole")
                header = pydicom.dcmread(io.BytesIO(_inflated(data)), force=True, stop_before_pixels=True)
                _check(pydicom, header, name, decoding)
                return int(header.Columns), int(header.Rows)
            except Exception:  # cut short in the middle of what comes before the pixels, or broken
                if whole:
                    raise
                data, whole = data + file.read(), True


def dicom_patient(file: IO[bytes], name: str = "") -> str:
    """PatientID from the header of an open file; empty where there is none, or where the header cannot be read."""
    with _pydicom(name) as pydicom:
        try:
            first = file.read(_FIRST)
            if _DEFLATED not in first:  # in most files it is near the beginning: that must do for thousands of them
                start = io.BytesIO(first)
                header = pydicom.filereader.read_partial(start, lambda tag, *_: tag > _PATIENT, force=True)
                if start.tell() < _FIRST or len(first) < _FIRST:
                    return str(header.get("PatientID") or "").strip()
        except Exception:  # cut short in the middle of an element
            pass
        try:
            head = io.BytesIO(_inflated(first + file.read(_HEAD)))
            header = pydicom.dcmread(head, stop_before_pixels=True, specific_tags=["PatientID"], force=True)
            return str(header.get("PatientID") or "").strip()
        except Exception:  # whatever a broken file makes pydicom raise: decoding says what is wrong with it
            return ""


def _inflated(data: bytes) -> bytes:
    """The file as it would be without the deflated transfer syntax, which pydicom would unpack to any size."""
    if _DEFLATED not in data:
        return data
    start = 144 + int.from_bytes(data[140:144], "little")  # after the preamble and the group that says how to read on
    if data[132:140] != b"\x02\0\0\0UL\x04\0" or _DEFLATED not in data[:start]:
        raise unsupported("a deflated DICOM file with a header that does not say where it ends")
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    body = unpacker.decompress(data[start:], _MOST_INFLATED)
    if unpacker.unconsumed_tail:
        raise too_large(f"too large: it unpacks to more than {_MOST_INFLATED:,} bytes")
    # Nowhere: pydicom must not find another layer to unpack.
    return (data[:start] + body).replace(_DEFLATED, _PLAIN)


def _frame(pydicom: Any, file: Any) -> tuple[npt.NDArray[Any], str]:
    """Stored values of the first frame, (H, W) or (H, W, 3), and what they are: MONOCHROME…, PALETTE COLOR or RGB."""
    syntax, values = file.file_meta.TransferSyntaxUID, str(file.PhotometricInterpretation)
    # Floating-point values lie in an element of their own, and have no bits to choose from.
    whole = "PixelData" in file
    encoded = _encoded(pydicom, file) if whole and syntax.is_encapsulated else b""
    own = whole and (not syntax.is_encapsulated or syntax == pydicom.uid.RLELossless)  # bits as they were stored
    if encoded and not own and int(file.HighBit) != int(file.BitsStored) - 1:
        raise unsupported(f"a compressed DICOM frame of {file.BitsStored} bits, the highest {file.HighBit}"[:120])
    if syntax == pydicom.uid.JPEGExtended12Bit and int(file.BitsStored) > 8:
        frame = _twelve_bits(encoded, file)
    else:
        plugin = _PLUGINS.get(str(syntax), ("", ""))[0] if encoded else ""
        options = {"decoding_plugin": plugin} if plugin else {}
        frame, properties = pydicom.pixels.get_decoder(syntax).as_array(
            file, index=0, **options, **({"correct_unused_bits": False} if own else {})
        )
        values = str(properties["photometric_interpretation"])
    if frame.shape[:2] != (int(file.Rows), int(file.Columns)) or frame.shape[2:] != ((3,) if values == "RGB" else ()):
        raise broken(f"a DICOM file of {values} with a frame of the shape {frame.shape}"[:120])
    if values not in ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR", "RGB"):
        raise unsupported(f"a DICOM file with the photometric interpretation {values!r}, which is not decoded"[:120])
    return (_stored(file, frame) if own and int(file.BitsAllocated) > 1 else frame), values


def _encoded(pydicom: Any, file: Any) -> bytes:
    """The first frame's codestream; refused where it would unpack to something else than the frame."""
    frames = max(1, int(file.get("NumberOfFrames", 1) or 1))
    frame: bytes = next(iter(pydicom.encaps.generate_frames(file.PixelData, number_of_frames=frames)))
    rows, columns = int(file.Rows), int(file.Columns)
    if file.file_meta.TransferSyntaxUID == pydicom.uid.RLELossless:
        samples = rows * columns * int(file.SamplesPerPixel)  # pydicom unpacks all runs before it counts
        if len(frame) > 2 * samples * max(1, int(file.BitsAllocated) // 8) + 4096:
            raise broken("a DICOM frame of more run-length codes than it has pixels")
    elif (size := codestream_size(frame)) != (columns, rows):
        stated = f"{size[0]}×{size[1]}" if size else "no sure size"
        raise broken(f"a DICOM frame of {columns}×{rows} pixels with compressed data that state {stated}")
    if _PLUGINS.get(str(file.file_meta.TransferSyntaxUID), ("",))[0] == "gdcm":
        # Samples of another depth or number than the file says are written past the end of gdcm's buffer.
        _, _, bits, components, marker = jpeg_frame(frame) or (0,) * 5
        allocated, stored = int(file.BitsAllocated), int(file.BitsStored)
        narrow = allocated == 8 and stored <= bits <= 8
        wide = allocated == 16 and max(stored, 9) <= bits <= 16
        if marker != _LOSSLESS or components != int(file.SamplesPerPixel) or not (narrow or wide):
            raise unsupported(f"a DICOM frame with a lossless JPEG that states {components} components of {bits} bits")
    return frame


def _twelve_bits(encoded: bytes, file: Any) -> npt.NDArray[Any]:
    """JPEG of 12 bits, which no plugin of pydicom decodes: by the libtiff in Pillow, as the strip of a TIFF."""
    rows, columns = int(file.Rows), int(file.Columns)
    if int(file.SamplesPerPixel) != 1 or int(file.PixelRepresentation):
        raise unsupported("a DICOM file of 12-bit JPEG that is signed or in color is not decoded")
    wrapped = one_strip(encoded, {256: columns, 257: rows, 258: 12, 259: 7, 262: 1, 278: rows})
    image = TiffImagePlugin.TiffImageFile(io.BytesIO(wrapped), "")
    image.load()
    return np.asarray(image)


def _stored(file: Any, frame: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Values of the stored bits alone: above and below them there may be overlays."""
    if frame.dtype.kind == "f":
        return frame
    allocated, bits, high = frame.dtype.itemsize * 8, int(file.BitsStored), int(file.HighBit)
    if not (1 <= bits <= allocated and bits - 1 <= high < allocated):
        raise unsupported(f"a DICOM file with {bits} bits stored of {allocated}, the highest {high}")
    if bits == allocated:
        return frame
    frame = frame.astype(frame.dtype.newbyteorder("="), copy=False)
    raw = frame.view(f"u{frame.dtype.itemsize}")
    shift = high + 1 - bits
    kept = np.asarray(raw << raw.dtype.type(allocated - bits - shift))
    values = (kept.view(frame.dtype) >> (allocated - bits)).astype(frame.dtype, copy=False)
    overlays = [element for element in file.group_dataset(0x6000) if element.tag.element == 0x0102 and element.value]
    if shift == 0 and not overlays and (values != frame).any() and not _padding(file, frame)[values != frame].all():
        raise broken(f"a DICOM file with values that need more than the {bits} bits that it says are stored")
    # Padding may be a value that the stored bits cannot hold.
    return np.where(_padding(file, frame), frame, values) if shift == 0 else values


def _of_frame(pydicom: Any, file: Any) -> Any:
    """The file's attributes, with those of the functional groups of the first frame in their place."""
    header = pydicom.Dataset()
    for name in _ATTRIBUTES:
        if name in file:
            header[name] = file[name]
    for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for group in (file.get(groups) or ())[:1]:
            for macro, names in _MACROS.items():
                for item in (group.get(macro) or ())[:1]:
                    for name in names:  # a macro replaces all that an outer one says
                        if name in header:
                            del header[name]
                        if name in item:
                            header[name] = item[name]
    return header


_Values = Callable[[npt.NDArray[Any]], npt.NDArray[np.float64]]


def _grays(pydicom: Any, file: Any, frame: npt.NDArray[Any], parts: Sequence[slice]) -> Any:
    """Returns the function from rows of a gray image to RGB: as float64, all rows at once may take a gigabyte."""
    header = _of_frame(pydicom, file)
    order = ">" if file.file_meta.TransferSyntaxUID == pydicom.uid.ExplicitVRBigEndian else "<"
    slope, intercept = _number(header, "RescaleSlope", 1.0), _number(header, "RescaleIntercept", 0.0)
    signed = bool(header.get("PixelRepresentation"))
    modality = None
    if header.get("ModalityLUTSequence"):
        entries, first, _ = _table(header["ModalityLUTSequence"].value[0], order, signed)
        modality = partial(_look_up, entries, first)

    def rescale(rows: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        return modality(rows) if modality is not None else rows.astype(np.float64) * slope + intercept

    if header.get("VOILUTSequence"):
        stored = -(2 ** (int(header.BitsStored) - 1)) if signed else 0
        below = modality is None and stored * slope + intercept < 0
        entries, first, most = _table(header["VOILUTSequence"].value[0], order, below)
        shades: _Values = partial(_look_up, entries / most, first)
    else:
        shades = _window(header) or _own_range(header, frame, parts, rescale)

    def paint(rows: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        with np.errstate(all="ignore"):  # numbers that a broken header blows up
            gray = rescale(rows)
            light = np.nan_to_num(shades(gray), nan=0.0)
        if str(header.PhotometricInterpretation) == "MONOCHROME1":
            light = 1.0 - light
        light[_padding(header, rows) | np.isnan(gray)] = 0.0
        return np.rint(light * 255.0).astype(np.uint8)

    return paint


def _own_range(header: Any, frame: npt.NDArray[Any], parts: Sequence[slice], rescale: _Values) -> _Values:
    low, high = np.inf, -np.inf
    with np.errstate(all="ignore"):
        for part in parts:
            gray = rescale(frame[part])
            gray = gray[~_padding(header, frame[part]) & np.isfinite(gray)]
            if gray.size:
                low, high = min(low, float(gray.min())), max(high, float(gray.max()))

    def shades(gray: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.clip((gray - low) / (high - low), 0.0, 1.0) if high > low else np.zeros_like(gray)

    return shades


def _look_up(entries: npt.NDArray[np.float64], first: int, values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The entry of each value, rounded down to a whole one; those outside have the first or the last."""
    at = np.nan_to_num(np.floor(values.astype(np.float64)), nan=0.0, posinf=2e9, neginf=-2e9) - first
    return np.asarray(entries[np.clip(at, 0, len(entries) - 1).astype(np.int64)])


def _table(item: Any, order: str, signed: bool) -> tuple[npt.NDArray[np.float64], int, float]:
    """A lookup table's entries, the value that the first is for, and the largest value of its bits.

    DICOM part 3, C.11.1.1 and C.11.2.1.1.
    """
    number, first, bits = (int(value) for value in item.LUTDescriptor)
    number = number or 1 << 16
    if first < 0 and not signed:
        first += 1 << 16  # its VR depends on what the table is for, and may have been written or read as the other
    elif first >= 1 << 15 and signed:
        first -= 1 << 16
    data = item.LUTData
    if isinstance(data, bytes):
        narrow = len(data) in (number, number + number % 2) and bits <= 8
        data = np.frombuffer(data if narrow else data[: len(data) // 2 * 2], np.uint8 if narrow else f"{order}u2")
    entries = np.atleast_1d(np.asarray(data, np.float64))[:number]
    if not 1 <= bits <= 16 or len(entries) < number or entries.max() >= 1 << bits:
        raise broken(f"a DICOM lookup table of {bits} bits with {len(entries)} of {number} entries, or one too large")
    return entries, first, float((1 << bits) - 1)


def _window(header: Any) -> _Values | None:
    """The first window that has a width, as brightness from 0 to 1 (DICOM part 3, C.11.2.1.2 and C.11.2.1.3)."""
    function = str(header.get("VOILUTFunction") or "LINEAR").upper()
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise unsupported(f"a DICOM window with the function {function!r}"[:120])
    for center, width in zip(_numbers(header, "WindowCenter"), _numbers(header, "WindowWidth"), strict=False):
        if not math.isfinite(center + width) or width <= 0 or (function == "LINEAR" and width < 1):
            continue  # what programs that remove names leave behind
        if function == "LINEAR":
            center, width = center - 0.5, width - 1.0
        return partial(_windowed, center, width, function == "SIGMOID")
    return None


def _windowed(center: float, width: float, sigmoid: bool, gray: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    if sigmoid:
        return np.asarray(1.0 / (1.0 + np.exp(np.clip(-4.0 * (gray - center) / width, -700.0, 700.0))))
    if width == 0:  # a threshold
        return (gray > center).astype(np.float64)
    return np.clip((gray - center) / width + 0.5, 0.0, 1.0)


def _padding(header: Any, frame: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    kind = {4: "Float", 8: "DoubleFloat"}[frame.dtype.itemsize] if frame.dtype.kind == "f" else ""
    value = header.get(f"{kind}PixelPaddingValue")
    if value is None:
        return np.zeros(frame.shape, dtype=bool)
    limit = header.get(f"{kind}PixelPaddingRangeLimit")
    ends = [value, value if limit is None else limit]
    if not kind:  # of either VR, whatever it was written as
        span = 1 << 16
        signed = frame.dtype.kind == "i"
        ends = [int(end) % span - (span if signed and int(end) % span >= span // 2 else 0) for end in ends]
    return np.asarray((frame >= min(ends)) & (frame <= max(ends)))


def _eight_bits(color: npt.NDArray[Any], bits: int) -> npt.NDArray[np.uint8]:
    if bits < 8:
        return widen_to_bytes(color & ((1 << bits) - 1), bits)
    return np.ascontiguousarray(color >> (bits - 8)).astype(np.uint8)


def _numbers(header: Any, name: str) -> list[float]:
    value = header.get(name)
    several = isinstance(value, Sequence) and not isinstance(value, str)
    return [float(one) for one in (value if several else [value]) if one not in (None, "")]


def _number(header: Any, name: str, default: float) -> float:
    return next(iter(_numbers(header, name)), default)


def _check(pydicom: Any, file: Any, name: str, decoding: Decoding) -> None:
    if any(tag not in file for tag in ("Rows", "Columns", "PhotometricInterpretation")):
        raise unsupported("a DICOM file without an image")
    if min(int(file.Rows), int(file.Columns)) < 1:
        raise broken("a DICOM file with an image of no pixels")
    decoding.check_size(int(file.Columns), int(file.Rows))
    if "TransferSyntaxUID" not in file.file_meta:  # a file without the preamble; this is the standard's default
        file.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    syntax = file.file_meta.TransferSyntaxUID
    plugin, package = _PLUGINS.get(str(syntax), ("", ""))
    available = pydicom.pixels.get_decoder(syntax).available_plugins
    if plugin and plugin not in available:
        raise DatasetError(
            f"DICOM images compressed as {syntax.name} need a package that is not installed", code="package-missing",
            expected=package, found="it is not installed", where=name or None, fix='pip install "embcache[dicom]"',
        )  # fmt: skip


@contextmanager
def _pydicom(name: str) -> Iterator[Any]:
    try:
        import pydicom
        import pydicom.pixels
    except ImportError as error:
        raise DatasetError(
            "DICOM images need pydicom, which is not installed", code="package-missing", where=name or None,
            fix='pip install "embcache[dicom]"',
        ) from error  # fmt: skip
    with quiet(r"pydicom|PIL\."):
        yield pydicom
