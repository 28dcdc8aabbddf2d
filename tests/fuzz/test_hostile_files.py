"""Files made to harm: each is refused with one clear reason, in little time and memory."""

from __future__ import annotations

import functools
import io
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import joblib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from embcache.backbones.checkpoints import read_checkpoint
from embcache.data import dicom as dicom_module
from embcache.data.dataset import load_dataset
from embcache.data.images import decode_image, read_image, read_size
from embcache.errors import CorruptStoreError, EmbcacheError, ImageError, WeightsError
from embcache.sealed import seal
from embcache.store.feature_store import FeatureStore
from tests.data.pictures import encode
from tests.fuzz.image_seeds import deflated, png_chunk
from tests.fuzz.limits import run_each
from tests.fuzz.store_seeds import damage, store_seeds, template
from tests.fuzz.weight_seeds import Canary, lying_safetensors, malicious
from tests.refusal import refused
from tests.store.build import add, make_store, quick_disk

__all__ = ["quick_disk"]


def bomb_png(side: int, depth: int, color: int) -> bytes:
    """An image of noughts, as small as deflate makes it."""
    row = bytes(1 + side * depth * (3 if color == 2 else 1) // 8)
    packer = zlib.compressobj(9)
    # Above the limit a few rows do: nothing may look at them.
    data = b"".join(packer.compress(row) for _ in range(side if side < 10_000 else 100)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")


def _reason(data: bytes, folder: Path) -> str:
    del folder
    try:
        return str(decode_image(data).shape)
    except ImageError as error:
        return error.problem


@pytest.mark.slow
def test_images_at_and_above_the_limit_take_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBCACHE_MAX_PIXELS", "20000000")  # 24 bytes per pixel, as at the default of 89 million
    huge, wide = bomb_png(40_000, 8, 2), bomb_png(4472, 16, 0)
    (_, refused), (_, read) = run_each(_reason, [huge, wide], memory=480 << 20, seconds=120)
    assert refused.result.startswith("too large: 1,600,000,000 pixels, more than 20,000,000")
    assert refused.memory < 200 << 20
    assert read.result == "(4472, 4472, 3)"
    assert not read.failure


def test_a_progressive_jpeg_of_thousands_of_scans_is_refused() -> None:
    data = encode(Image.new("RGB", (64, 64), "red"), "JPEG", progressive=True)
    assert decode_image(data).shape == (64, 64, 3)
    scan = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(ImageError, match=r"JPEG of 1,0.. scans"):
        decode_image(data[:-2] + scan * 1000 + data[-2:])


@pytest.mark.parametrize("format", ["ICO", "QOI", "SGI", "DDS"])
def test_formats_that_no_collection_of_images_uses_are_not_tried(format: str) -> None:
    with pytest.raises(ImageError, match="not an image that Pillow reads"):
        decode_image(encode(Image.new("RGBA", (32, 32), "red"), format))


def test_deflated_dicom_unpacks_to_so_much_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pydicom")
    from tests.data.test_dicom import dicom

    plain = dicom(np.arange(12, dtype=np.uint16).reshape(3, 4))
    data = deflated(plain)
    assert np.array_equal(decode_image(data), decode_image(plain))
    (tmp_path / "a.dcm").write_bytes(data)
    assert read_size(tmp_path, "a.dcm") == (4, 3)
    monkeypatch.setattr(dicom_module, "_MOST_INFLATED", 1 << 20)
    start = 144 + int.from_bytes(data[140:144], "little")
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    (tmp_path / "b.dcm").write_bytes(bomb := data[:start] + packer.compress(bytes(4 << 20)) + packer.flush())
    for read in (lambda: decode_image(bomb), lambda: read_size(tmp_path, "b.dcm")):
        with pytest.raises(ImageError, match="unpacks to more than"):
            read()


def _with_chunk_size(tmp_path: Path, size: int) -> Path:
    """An array file whose second chunk claims another size in the index; HDF5's own filter reads past its start."""
    path = tmp_path / "x.h5"
    with h5py.File(path, "w", libver="earliest") as file:
        values = np.arange(4 * 6 * 5 * 3, dtype=np.uint8).reshape(4, 6, 5, 3)
        file.create_dataset("x", data=values, chunks=(1, 6, 5, 3), fletcher32=True)
    data = path.read_bytes()
    spots = [at for at in range(len(data)) if data[at : at + 4] == struct.pack("<I", 94)]
    assert len(spots) == 4
    path.write_bytes(data[: spots[1]] + struct.pack("<I", size) + data[spots[1] + 4 :])
    return path


@pytest.mark.parametrize("size", [0, 1, 3, 93, 95, 2**31, 2**32 - 1])
def test_a_chunk_of_a_false_size_ends_no_process(tmp_path: Path, size: int) -> None:
    path = _with_chunk_size(tmp_path, size)
    assert read_image(tmp_path, path.name, "0")[0].shape == (6, 5, 3)
    with pytest.raises(ImageError):
        read_image(tmp_path, path.name, "1")


def test_a_flipped_pixel_under_a_checksum_is_noticed(tmp_path: Path) -> None:
    path = _with_chunk_size(tmp_path, 94)
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    with pytest.raises(ImageError, match="checksum"):
        read_image(tmp_path, path.name, "3")


@pytest.mark.parametrize("link", ["external", "soft"])
def test_links_in_an_array_file_are_not_followed_not_even_to_look(tmp_path: Path, link: str) -> None:
    os.mkfifo(tmp_path / "pipe")  # any process that opens it waits forever
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["y" if link == "soft" else "x"] = h5py.ExternalLink(str(tmp_path / "pipe"), "x")
        if link == "soft":
            file["x"] = h5py.SoftLink("/y")
    with pytest.raises(EmbcacheError, match="lies elsewhere"):
        read_image(tmp_path, "x.h5", "0")


# Pickles whose opcodes are written out: protocol 2, as torch reads them.
def _pickled(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


PICKLES = {
    "a bytearray of any size": (_pickled(b"c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R"), "could run code"),
    "tuples that take for ever to hash": (
        _pickled(b"}" + b")q\0" + b"".join(b"h\0h\0\x86q\0" for _ in range(60)) + b"K\1s"), "tuples within tuples"),
    "tuples deeper than the stack": (_pickled(b"})" + b"\x85" * 1_000 + b"K\1s"), "tuples within tuples"),
    "millions of dictionaries": (_pickled(b"(" + b"}" * 5_100 + b"l"), "more than 5,000 operations"),
    "an encoding that takes for ever": (
        _pickled(b"c_codecs\nencode\nX\1\0\0\0aX\4\0\0\0idna\x86R"), "an encoding that no checkpoint uses"),
    "a call of the system": (_pickled(b"cposix\nsystem\nX\1\0\0\0a\x85R"), "could run code"),
}  # fmt: skip


@pytest.mark.parametrize("what", list(PICKLES))
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_that_keep_one_busy_are_refused_at_sight(
    tmp_path: Path, what: str, zipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embcache.backbones.checkpoints.MOST_OPERATIONS", 5_000)
    data, reason = PICKLES[what]
    path = tmp_path / "weights.pth"
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/version", "3\n")
    else:
        path.write_bytes(data)
    with pytest.raises(WeightsError, match=reason):
        read_checkpoint(path)


def test_a_safetensors_header_of_megabytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    one = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    path.write_bytes(lying_safetensors({f"{k:0200}": one for k in range(70_000)}))
    with pytest.raises(WeightsError, match="header of more than"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "head", [b"SQLite format 3\0", b"\0\0\0\0\0\0\0\0DUCK", b"PAR1", b"\x89HDF\r\n\x1a\n", b"\x93NUMPY\1\0"]
)
def test_other_files_are_told_to_be_no_checkpoint_and_no_image(tmp_path: Path, head: bytes) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(head + bytes(5000))
    with pytest.raises(WeightsError, match="not a checkpoint that can be read"):
        read_checkpoint(path)
    with pytest.raises(ImageError):
        decode_image(path.read_bytes())


def _npy(folder: str) -> bytes:
    sink = io.BytesIO()
    np.save(sink, np.array([Canary(folder)], dtype=object), allow_pickle=True)
    return sink.getvalue()


def _npz(folder: str) -> bytes:
    sink = io.BytesIO()
    np.savez(sink, features=np.array([Canary(folder)], dtype=object))
    return sink.getvalue()


def _joblib(folder: str) -> bytes:
    sink = io.BytesIO()
    joblib.dump({"state_dict": Canary(folder)}, sink)
    return sink.getvalue()


def _parquet(folder: str) -> bytes:
    sink = io.BytesIO()
    pickled = pickle.dumps(Canary(folder))
    field = pa.field(
        "id",
        pa.binary(),
        metadata={b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": pickled},
    )
    schema = pa.schema([field], metadata={b"embcache": pickled, b"pandas": pickled})
    pq.write_table(pa.table([pa.array([pickled])], schema=schema), sink)
    return sink.getvalue()


MALICIOUS: dict[str, Callable[[str], bytes]] = {
    "pickle": malicious, "npy": _npy, "npz": _npz, "joblib": _joblib, "parquet": _parquet,
}  # fmt: skip


@pytest.mark.usefixtures("quick_disk")
@pytest.mark.parametrize("kind", list(MALICIOUS))
def test_no_pickle_runs_wherever_it_is_put(tmp_path: Path, home: Path, kind: str) -> None:
    canary = tmp_path / "canary"
    data = MALICIOUS[kind](str(canary))
    if kind in ("pickle", "joblib", "npy"):  # that it would, if anyone loaded it
        loaders: dict[str, Callable[[], Any]] = {
            "pickle": lambda: pickle.loads(data),
            "joblib": lambda: joblib.load(io.BytesIO(data)),
            "npy": lambda: np.load(io.BytesIO(data), allow_pickle=True),
        }
        loaders[kind]()
        assert canary.is_dir()
        canary.rmdir()
    folder = tmp_path / "mine"
    for path in ("a/x.png", "b/y.png", "b/z.dcm", "a/t.tif"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    ds = load_dataset("folder", folder)
    for path in ds.table["path"]:
        with pytest.raises(EmbcacheError):
            read_image(folder, path)
        with pytest.raises(EmbcacheError):
            read_size(folder, path)
    with pytest.raises(EmbcacheError):
        read_image(folder, "a/x.png", "0")  # as an array file
    for name in ("weights.pth", "weights.safetensors", "weights.bin"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(WeightsError):
            read_checkpoint(tmp_path / name)
    for name in ("table.csv", "table.parquet"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(EmbcacheError):
            load_dataset("folder", tmp_path / name)
    snapshot = home / "mine" / "dataset.parquet"
    snapshot.parent.mkdir(parents=True)
    snapshot.write_bytes(data)
    with pytest.raises(EmbcacheError):
        load_dataset("mine", home=home)
    for format in ("zarr", "hdf5"):
        for seed in store_seeds(format):
            store = damage(seed, (), tmp_path, [], format)
            target = store / seed.name
            target.write_bytes(data)
            try:
                opened = FeatureStore(store)
                opened.plans()
                np.asarray(opened.features[:])
            except EmbcacheError:
                pass
    assert not canary.exists()


@pytest.mark.usefixtures("quick_disk")
@pytest.mark.parametrize("format", ["zarr", "hdf5"])
def test_a_store_of_hostile_sizes_takes_no_memory(tmp_path: Path, format: str) -> None:
    from embcache.store.schema import StoreHeader
    from tests.store.build import RECIPE

    usual = functools.partial(StoreHeader, RECIPE, format, batch_size=1, threads=1, provenance={})
    usual(row_shape=(3,), rows_per_shard=4)
    for sizes in ({"row_shape": (2**40,), "rows_per_shard": 4}, {"row_shape": (3,), "rows_per_shard": 10**12}):
        with refused(EmbcacheError, "store-header"):
            usual(**sizes)
    store = make_store(tmp_path, format)
    add(store, 0, ["a"])
    (store / "shards" / "000000").rename(store / "shards" / "900000000")
    from embcache.store.commit import write_view

    with refused(EmbcacheError, "view-size"):
        write_view(store)
    assert template(format).is_dir()


@pytest.mark.usefixtures("quick_disk")
@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("shards/000000/commit.json", {"rows": 1, "files": {"a\0b": {"size": 1, "crc32c": "00000000"}}}),
        ("shards/000000/commit.json", {"rows": 1, "files": {"../x": {"size": 1, "crc32c": "00000000"}}}),
        ("shards/000000/commit.json", {"rows": 1, "files": 7}),
        ("shards/000000/commit.json", {"rows": "1", "files": {}}),
        ("shards/000000/commit.json", {"rows": 1, "files": {"x": {"size": -1, "crc32c": "00000000"}}}),
        ("shards/000000/commit.json", {}),
        ("plan/000000.json", {"number": 0, "rows": [["a", "", "1", 2, None]]}),
        ("plan/000000.json", {"number": 0, "rows": [[1, "", 1, 2, None]]}),
        ("plan/000000.json", {"number": 0, "rows": [["a", "", 1, 2, 7]]}),
        ("plan/000000.json", {"number": 0, "rows": 7}),
        ("plan/000000.json", {"number": 0}),
    ],
)
def test_sealed_files_that_embcache_cannot_have_written_are_told(
    tmp_path: Path, file: str, content: dict[str, Any]
) -> None:
    store = make_store(tmp_path)
    add(store, 0, ["a"])
    (store / file).write_bytes(seal(content, indent=None if file.startswith("plan") else 1))
    opened = FeatureStore(store)
    with pytest.raises(CorruptStoreError):
        opened.plans() if file.startswith("plan") else opened.features
