"""Shards in HDF5: their values come from the verified bytes alone."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from embcache.store import hdf5_format as form
from tests.store.build import make_rows

IDS = ["a", "b", "c"]


def link_out(file: h5py.File, name: str, other: Path) -> None:
    file[name] = h5py.ExternalLink(other, name)


def link_softly(file: h5py.File, name: str, other: Path) -> None:
    file["hidden"] = h5py.ExternalLink(other, name)
    file[name] = h5py.SoftLink("/hidden")


def store_outside(file: h5py.File, name: str, other: Path) -> None:
    with h5py.File(other) as elsewhere:
        shape, dtype = elsewhere[name].shape, elsewhere[name].dtype
    size = int(np.prod(shape)) * dtype.itemsize
    file.create_dataset(name, shape, dtype, external=[(str(other), 0, size)])


def map_outside(file: h5py.File, name: str, other: Path) -> None:
    with h5py.File(other) as elsewhere:
        layout = h5py.VirtualLayout(elsewhere[name].shape, elsewhere[name].dtype)
        layout[:] = h5py.VirtualSource(elsewhere[name])
    file.create_virtual_dataset(name, layout)


@pytest.mark.parametrize("name", ["features", "ids", "valid", "digest", "reason"])
@pytest.mark.parametrize("lead_out", [link_out, link_softly, store_outside, map_outside])
def test_values_that_lie_outside_the_verified_bytes_are_refused(
    tmp_path: Path, name: str, lead_out: Callable[[h5py.File, str, Path], None]
) -> None:
    whole = form.encode_shard(make_rows(IDS), 4)[form.FILE]
    (tmp_path / "other.h5").write_bytes(whole)
    buffer = io.BytesIO(whole)
    with h5py.File(buffer, "r+") as file:
        del file[name]
        lead_out(file, name, tmp_path / "other.h5")
    decode = form.decode_features if name == "features" else form.decode_index
    decode({form.FILE: whole})
    with pytest.raises(ValueError, match=f"'{name}' is no array with its values in"):
        decode({form.FILE: buffer.getvalue()})


def test_an_absent_array_is_refused() -> None:
    buffer = io.BytesIO()
    h5py.File(buffer, "w").close()
    with pytest.raises(ValueError, match="'features' is no array"):
        form.decode_features({form.FILE: buffer.getvalue()})
