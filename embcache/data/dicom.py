"""DICOM files to ``uint8`` RGB (needs pydicom, the extra ``dicom``)."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from embcache.data.files import has_dicom_suffix
from embcache.data.quiet import quiet
from embcache.errors import DatasetError, ImageError

_DEFLATED, _PLAIN = b"1.2.840.10008.1.2.1.99", b"1.2.840.10008.1.2.1\0\0\0"  # transfer syntaxes
_MOST_INFLATED = 1 << 29
_HEAD = 1 << 20
_FIRST = 1 << 13
_PATIENT = 0x00100020  # the tag of PatientID
_BLOCK = 1 << 22  # pixels rendered at a time


def is_dicom(data: bytes, name: str = "") -> bool:
    """Whether bytes (or a file name) are a DICOM file's: the marker after 128 bytes, else the suffix."""
    return data[128:132] == b"DICM" or has_dicom_suffix(name)


def decode_dicom(data: bytes, name: str = "") -> npt.NDArray[np.uint8]:
    """The first frame as a viewer shows it.

    Grey: rescaled (slope and intercept, or the modality's table); then the first window or table of interest if the
    file has one, else the image's own range; MONOCHROME1 is inverted, so that more is always brighter; padding is
    black. Colour and palette images become RGB.

    Parameters
    ----------
    data : bytes
        The whole file.
    name : str
        Its name, for messages.

    Returns
    -------
    ndarray of shape (H, W, 3), uint8

    Raises
    ------
    DatasetError
        pydicom, or the package that knows the file's compression, is not installed: that says nothing about the image.
    ImageError
        The file holds no image, or it is too large. What pydicom raises on broken files passes through.
    """
    with _pydicom(name) as pydicom:
        file = pydicom.dcmread(io.BytesIO(_inflated(data)), force=True)
        _check(pydicom, file, name)
        _check_runs(pydicom, file)
        frame = pydicom.pixels.pixel_array(file, index=0)
        if frame.shape[:2] != (int(file.Rows), int(file.Columns)) or frame.shape[2:] not in ((), (3,)):
            raise ImageError(f"a DICOM file whose frame has the shape {frame.shape}"[:120])
        if not _has_palette(file) and frame.ndim == 3:  # YBR has been made RGB
            return _eight_bits(frame, int(file.BitsStored))
        pixels = np.empty((*frame.shape[:2], 3), np.uint8)
        rows = max(1, _BLOCK // max(1, frame.shape[1]))
        parts = [slice(top, top + rows) for top in range(0, len(frame), rows)]
        paint = _colours(pydicom, file) if _has_palette(file) else _greys(pydicom, file, frame, parts)
        for part in parts:
            pixels[part] = paint(frame[part])
    return pixels


def dicom_size(file: IO[bytes], name: str = "") -> tuple[int, int]:
    """(width, height) from the header of an open file. Raises as `decode_dicom`."""
    with _pydicom(name) as pydicom:
        head = file.read(_HEAD)
        try:
            if len(head) == _HEAD and _DEFLATED in head:
                raise EOFError("what is deflated is read whole")
            header = pydicom.dcmread(io.BytesIO(_inflated(head)), force=True, stop_before_pixels=True)
            _check(pydicom, header, name)
        except Exception:  # cut short in the middle of what comes before the pixels, or broken
            if len(head) < _HEAD:
                raise
            header = pydicom.dcmread(io.BytesIO(_inflated(head + file.read())), force=True, stop_before_pixels=True)
            _check(pydicom, header, name)
        return int(header.Columns), int(header.Rows)


def dicom_patient(file: IO[bytes], name: str = "") -> str:
    """PatientID from the header of an open file; empty where there is none, or where the header cannot be read.

    Raises
    ------
    DatasetError
        pydicom is not installed.
    """
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
        raise ImageError("a deflated DICOM file whose header does not say where it ends")
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    body = unpacker.decompress(data[start:], _MOST_INFLATED)
    if unpacker.unconsumed_tail:
        raise ImageError(f"too large: it unpacks to more than {_MOST_INFLATED:,} bytes")
    # Nowhere: pydicom must not find another layer to unpack.
    return (data[:start] + body).replace(_DEFLATED, _PLAIN)


def _check_runs(pydicom: Any, file: Any) -> None:
    """Refuse run-length codes that hold more than the frame: pydicom unpacks them all before it counts."""
    if file.file_meta.TransferSyntaxUID != pydicom.uid.RLELossless or "PixelData" not in file:
        return
    frames = max(1, int(file.get("NumberOfFrames", 1) or 1))
    frame = next(iter(pydicom.encaps.generate_frames(file.PixelData, number_of_frames=frames)))
    samples = int(file.Rows) * int(file.Columns) * int(file.SamplesPerPixel)
    if len(frame) > 2 * samples * max(1, int(file.BitsAllocated) // 8) + 4096:
        raise ImageError("a DICOM frame of more run-length codes than it has pixels")


def _has_palette(file: Any) -> bool:
    return str(file.PhotometricInterpretation) == "PALETTE COLOR"


_Painter = Callable[[npt.NDArray[Any]], npt.NDArray[np.uint8]]


def _colours(pydicom: Any, file: Any) -> _Painter:
    """What makes RGB of rows of a palette image."""

    def paint(frame: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        colour = pydicom.pixels.apply_color_lut(frame, file)[..., :3]
        return _eight_bits(colour, colour.dtype.itemsize * 8)

    return paint


def _greys(pydicom: Any, file: Any, frame: npt.NDArray[Any], parts: Sequence[slice]) -> _Painter:
    """What makes RGB of rows of a grey image, some at a time: as float64 a whole one may take a gigabyte."""

    def rescale(rows: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        grey = np.asarray(pydicom.pixels.apply_modality_lut(rows, file), dtype=np.float64)
        if file.get("VOILUTSequence"):
            table = pydicom.pixels.apply_voi_lut(grey.astype(np.int64), file, prefer_lut=True)
            grey = np.asarray(table, dtype=np.float64)
        return grey

    def paint(rows: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        with np.errstate(all="ignore"):  # numbers that a broken header blows up
            shades = np.nan_to_num(_shades(file, rescale(rows), low, high), nan=0.0)
        if str(file.PhotometricInterpretation) == "MONOCHROME1":
            shades = 1.0 - shades
        shades[_padding(file, rows)] = 0.0
        return np.repeat(np.rint(shades * 255.0).astype(np.uint8)[..., None], 3, axis=2)

    low, high = np.inf, -np.inf
    if file.get("VOILUTSequence") or not _has_window(file):  # a window needs no range
        with np.errstate(all="ignore"):
            for part in parts:
                grey = rescale(frame[part])
                grey = grey[~_padding(file, frame[part]) & np.isfinite(grey)]
                if grey.size:
                    low, high = min(low, float(grey.min())), max(high, float(grey.max()))
    return paint


def _has_window(file: Any) -> bool:
    return file.get("WindowCenter") is not None and file.get("WindowWidth") is not None


def _shades(file: Any, grey: npt.NDArray[np.float64], low: float, high: float) -> npt.NDArray[np.float64]:
    """Rescaled values to brightness, 0 to 1 (DICOM part 3, C.11.2.1.2 and C.11.2.1.3)."""
    if not file.get("VOILUTSequence") and _has_window(file):
        centre, width = _first(file.WindowCenter), _first(file.WindowWidth)
        function = str(file.get("VOILUTFunction", "LINEAR")).upper()
        if function == "SIGMOID" and width > 0:
            return np.asarray(1.0 / (1.0 + np.exp(np.clip(-4.0 * (grey - centre) / width, -700.0, 700.0))))
        if function == "LINEAR":
            centre, width = centre - 0.5, width - 1.0
        # A window of no width is a threshold, as the standard has it for LINEAR and width 1.
        return np.clip((grey - centre) / width + 0.5, 0.0, 1.0) if width > 0 else (grey > centre).astype(np.float64)
    return np.clip((grey - low) / (high - low), 0.0, 1.0) if high > low else np.zeros_like(grey)


def _padding(file: Any, frame: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which pixels are padding around the image, by the file's own account."""
    value = file.get("PixelPaddingValue")
    if value is None:
        return np.zeros(frame.shape, dtype=bool)
    limit = file.get("PixelPaddingRangeLimit", value)
    return np.asarray((frame >= min(value, limit)) & (frame <= max(value, limit)))


def _eight_bits(colour: npt.NDArray[Any], bits: int) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(colour >> max(bits - 8, 0)).astype(np.uint8)


def _first(value: Any) -> float:
    return float(value[0] if isinstance(value, Sequence) and not isinstance(value, str) else value)


def _check(pydicom: Any, file: Any, name: str) -> None:
    if any(tag not in file for tag in ("Rows", "Columns", "PhotometricInterpretation")):
        raise ImageError("a DICOM file without an image")
    if min(int(file.Rows), int(file.Columns)) < 1:
        raise ImageError("a DICOM file whose image has no pixels")
    limit = Image.MAX_IMAGE_PIXELS
    if limit and int(file.Rows) * int(file.Columns) > limit:
        raise ImageError(f"too large: more than {limit:,} pixels")
    if "TransferSyntaxUID" not in file.file_meta:  # a file without the preamble; this is the standard's default
        file.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    syntax = file.file_meta.TransferSyntaxUID
    decoder = pydicom.pixels.get_decoder(syntax)
    if not decoder.is_available:
        raise DatasetError(
            f"DICOM images compressed as {syntax.name} need a package that is not installed",
            expected="one of: " + "; ".join(decoder.missing_dependencies),
            found="none of them",
            where=name or None,
            fix="pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg",
        )


@contextmanager
def _pydicom(name: str) -> Iterator[Any]:
    try:
        import pydicom
        import pydicom.pixels
    except ImportError as error:
        raise DatasetError(
            "DICOM images need pydicom, which is not installed",
            where=name or None,
            fix='pip install "embcache[dicom]"',
        ) from error
    with quiet(r"pydicom|PIL\.", fatal=Image.DecompressionBombWarning):
        yield pydicom
