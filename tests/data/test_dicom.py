import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embcache.data.budget import Decoding
from embcache.data.images import decode_image, read_image, read_size
from embcache.errors import DatasetError, ImageError

pydicom = pytest.importorskip("pydicom", reason='DICOM needs pydicom: pip install "embcache[dicom]"')

GRAY = np.array([[0, 1000, 2000], [3000, 4000, 4095]], dtype=np.uint16)


def dicom(pixels: np.ndarray, *, preamble: bool = True, **tags: Any) -> bytes:
    """A small uncompressed DICOM file with the given pixels and tags."""
    file = pydicom.Dataset()
    file.file_meta = pydicom.dataset.FileMetaDataset()
    file.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    file.file_meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID = "1.2.3"
    file.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    color = pixels.ndim == 3
    file.Rows, file.Columns = pixels.shape[:2]
    file.SamplesPerPixel = 3 if color else 1
    file.PhotometricInterpretation = "RGB" if color else "MONOCHROME2"
    if color:
        file.PlanarConfiguration = 0
    file.BitsAllocated = pixels.dtype.itemsize * 8
    file.BitsStored = 12 if pixels.dtype == np.uint16 else file.BitsAllocated
    file.HighBit = file.BitsStored - 1
    file.PixelRepresentation = int(pixels.dtype.kind == "i")
    for tag, value in tags.items():
        setattr(file, tag, value)
    file.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    sink = io.BytesIO()
    if preamble:
        pydicom.dcmwrite(sink, file, enforce_file_format=True)
    else:
        del file.file_meta
        pydicom.dcmwrite(sink, file, implicit_vr=True, little_endian=True)
    return sink.getvalue()


def gray_levels(shades: np.ndarray) -> np.ndarray:
    return np.repeat(np.rint(np.clip(shades, 0, 1) * 255).astype(np.uint8)[..., None], 3, axis=2)


def test_the_window_applies_to_rescaled_values() -> None:
    # PS3.3 C.11.2.1.2.1: y = (x - (c - 0.5)) / (w - 1) + 0.5
    data = dicom(GRAY, RescaleSlope=2, RescaleIntercept=-1000, WindowCenter=3000, WindowWidth=2001)
    x = GRAY.astype(float) * 2 - 1000
    assert np.array_equal(decode_image(data), gray_levels((x - 2999.5) / 2000 + 0.5))


def test_color_stays_as_it_is() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    assert np.array_equal(decode_image(dicom(pixels)), pixels)


def test_the_first_frame_of_several_counts() -> None:
    frames = np.stack([GRAY, GRAY[::-1]])
    data = dicom(GRAY, NumberOfFrames=2)
    file = pydicom.dcmread(io.BytesIO(data))
    file.PixelData = frames.tobytes()
    sink = io.BytesIO()
    file.save_as(sink)
    decoding = Decoding()
    assert np.array_equal(
        decode_image(sink.getvalue(), name="b.dcm", decoding=decoding), decode_image(dicom(GRAY), decoding=decoding)
    )
    assert decoding.notes() == ["1 images: the first of several frames or pages is used (b.dcm)"]


def test_a_file_without_the_preamble_is_known_by_its_suffix(tmp_path: Any) -> None:
    data = dicom(GRAY, preamble=False)
    assert np.array_equal(decode_image(data, name="x.dcm"), decode_image(dicom(GRAY)))
    (tmp_path / "x.dcm").write_bytes(data)
    assert read_size(tmp_path, "x.dcm") == (3, 2)


@pytest.mark.parametrize("keep", [140, 300, -4])
def test_broken_files_are_refused_with_one_line(keep: int) -> None:
    with pytest.raises(ImageError) as caught:
        decode_image(dicom(GRAY)[:keep])
    assert "\n" not in caught.value.problem


def test_an_image_beyond_the_limit_is_refused() -> None:
    with pytest.raises(ImageError, match="6 pixels, more than 5"):
        decode_image(dicom(GRAY), decoding=Decoding(5))


def test_without_pydicom_the_run_ends_and_the_message_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.dcm").write_bytes(dicom(GRAY))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    for read in (read_image, read_size):
        with pytest.raises(DatasetError) as caught:
            read(tmp_path, "x.dcm")
        assert caught.value.fix == 'pip install "embcache[dicom]"'
        assert caught.value.where == "x.dcm"


def test_a_compression_that_nobody_decodes_is_the_images_fault(tmp_path: Path) -> None:
    file = pydicom.dcmread(io.BytesIO(dicom(GRAY)))
    file.file_meta.TransferSyntaxUID = pydicom.uid.MPEG2MPML
    file.PixelData = pydicom.encaps.encapsulate([b"\0\0\1\xb3"])
    file.save_as(tmp_path / "x.dcm")
    with pytest.raises(ImageError, match="MPEG2"):
        read_image(tmp_path, "x.dcm")
