"""Rows against the images they are of: hashed again, and computed again."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from embcache.cli import app
from embcache.data.dataset import ImageDataset, load_dataset
from embcache.io import discard
from embcache.maintain.repair import check_sample
from embcache.maintain.verify import check_source
from embcache.store.commit import ShardRows, commit_shard
from embcache.store.feature_store import FeatureStore
from tests.extract.conftest import draw
from tests.extract.tiny import run_extraction
from tests.maintain.conftest import Make, ds, images, make, quick_disk, tiny

__all__ = ["ds", "images", "make", "quick_disk", "tiny"]


def put_features(path: Path, number: int, features: np.ndarray) -> None:
    """A shard that is intact and holds other features."""
    store = FeatureStore(path)
    ids = tuple(entry.id for entry in store.plans()[number])
    digests = tuple(store.digests.get(id_, "") for id_ in ids)
    reasons = tuple(store.quarantined.get(id_, "") for id_ in ids)
    discard(path / "shards" / f"{number:06d}")
    commit_shard(path, number, ShardRows(ids, features, np.array([not reason for reason in reasons]), digests, reasons))


@pytest.mark.parametrize(("kind", "number"), [("hdf5", 6), ("views", 1000), ("pixels", 6)])
def test_cached_rows_are_those_that_the_images_give(kind: str, number: int, make: Make, ds: ImageDataset) -> None:
    path = make(kind)
    found = check_sample(path, ds, number)
    assert (found.compared, found.ok) == (min(number, len(FeatureStore(path))), True)
    assert found.difference <= (0 if kind == "pixels" else 1e-4)
    assert bool(found.worst) == (found.difference > 0)


def test_one_wrong_row_is_found_and_named(make: Make, ds: ImageDataset) -> None:
    path = make("zarr")
    store = FeatureStore(path)
    features = store.features[:][store.features.shards == 1].copy()
    features[3] *= 1.001
    put_features(path, 1, features)
    found = check_sample(path, ds, 100)
    assert not found.ok
    assert found.worst == store.plans()[1][3].id
    assert 5e-4 < found.difference < 2e-3
    told = CliRunner().invoke(app, ["verify", "--sample", "100"])
    assert told.exit_code == 1
    assert f"({found.worst}), BEYOND the tolerance of 1.0e-04" in told.stdout


def test_changed_images_are_left_out_and_told(make: Make, ds: ImageDataset, images: Path) -> None:
    path = make("zarr")
    file = images / "malignant" / "04.png"
    state = file.stat()
    draw(file, 99)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    (images / "benign" / "07.png").write_bytes(b"broken")
    found = check_sample(path, ds, 100)
    assert found.changed == ("malignant/04.png",)
    assert found.unreadable == ("benign/07.png",)
    assert found.compared == 17
    assert not found.ok
    assert found.difference <= 1e-4


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", "float32"), ("fp32", "float16")])
def test_the_tolerance_is_that_of_the_precision(
    precision: str, dtype: str, ds: ImageDataset, tiny: None, home: Path
) -> None:
    (done,) = run_extraction(["random"], ds, precision=precision, feature_dtype=dtype)
    found = check_sample(done.store.path, ds, 12)
    assert found.ok
    assert found.tolerance == pytest.approx(2e-2 if precision == "bf16" else 1.1e-3)


def test_hashing_finds_what_times_and_sizes_hide(make: Make, ds: ImageDataset, images: Path) -> None:
    path = make("zarr")
    intact = check_source(FeatureStore(path), ds)
    assert (intact.checked, intact.ok, intact.removed) == (20, True, 0)
    file = images / "malignant" / "04.png"
    state, data = file.stat(), bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    (images / "benign" / "07.png").unlink()
    found = check_source(FeatureStore(path), ds)
    assert (found.changed, found.missing) == (("malignant/04.png",), ("benign/07.png",))
    assert not found.ok
    fewer = check_source(FeatureStore(path), load_dataset("folder", images))
    assert (fewer.changed, fewer.missing, fewer.removed) == (("malignant/04.png",), (), 1)
