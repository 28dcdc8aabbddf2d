"""DICOM files to ``uint8`` RGB (needs pydicom, the extra ``dicom``)."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from embcache.data.quiet import quiet
from embcache.errors import DatasetError, ImageError

_SUFFIXES = (".dcm", ".dicom", ".dic")


def is_dicom(data: bytes, name: str = "") -> bool:
    """Whether bytes (or a file name) are a DICOM file's: the marker after 128 bytes, else the suffix."""
    return data[128:132] == b"DICM" or os.path.splitext(name)[1].lower() in _SUFFIXES  # noqa: PTH122


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
        file = pydicom.dcmread(io.BytesIO(data), force=True)
        _check(pydicom, file, name)
        frame = pydicom.pixels.pixel_array(file, index=0)
        photometric = str(file.PhotometricInterpretation)
        if photometric == "PALETTE COLOR":
            colour = pydicom.pixels.apply_color_lut(frame, file)[..., :3]
            return _eight_bits(colour, colour.dtype.itemsize * 8)
        if frame.ndim == 3:  # YBR has been made RGB
            return _eight_bits(frame, int(file.BitsStored))
        padding = _padding(file, frame)
        grey = np.asarray(pydicom.pixels.apply_modality_lut(frame, file), dtype=np.float64)
        shades = _shades(pydicom, file, grey, ~padding)
    if photometric == "MONOCHROME1":
        shades = 1.0 - shades
    shades[padding] = 0.0
    return np.repeat(np.rint(shades * 255.0).astype(np.uint8)[..., None], 3, axis=2)


def dicom_size(file: IO[bytes], name: str = "") -> tuple[int, int]:
    """(width, height) from the header of an open file. Raises as `decode_dicom`."""
    with _pydicom(name) as pydicom:
        header = pydicom.dcmread(file, force=True, stop_before_pixels=True)
        _check(pydicom, header, name)
        return int(header.Columns), int(header.Rows)


def _shades(
    pydicom: Any, file: Any, grey: npt.NDArray[np.float64], real: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64]:
    """Rescaled values to brightness, 0 to 1 (DICOM part 3, C.11.2.1.2 and C.11.2.1.3)."""
    if file.get("VOILUTSequence"):
        grey = np.asarray(pydicom.pixels.apply_voi_lut(grey.astype(np.int64), file, prefer_lut=True), dtype=np.float64)
    elif file.get("WindowCenter") is not None and file.get("WindowWidth") is not None:
        centre, width = _first(file.WindowCenter), _first(file.WindowWidth)
        function = str(file.get("VOILUTFunction", "LINEAR")).upper()
        if function == "SIGMOID" and width > 0:
            return np.asarray(1.0 / (1.0 + np.exp(np.clip(-4.0 * (grey - centre) / width, -700.0, 700.0))))
        if function == "LINEAR":
            centre, width = centre - 0.5, width - 1.0
        # A window of no width is a threshold, as the standard has it for LINEAR and width 1.
        return np.clip((grey - centre) / width + 0.5, 0.0, 1.0) if width > 0 else (grey > centre).astype(np.float64)
    low, high = (float(grey[real].min()), float(grey[real].max())) if real.any() else (0.0, 0.0)
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
    with quiet(r"pydicom"):
        yield pydicom
