"""A dry run says what differs and which images would be computed, and writes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from embcache.config import ExtractConfig
from embcache.data.dataset import ImageDataset, load_dataset
from embcache.maintain.listing import dry_run
from tests.extract.conftest import draw
from tests.extract.tiny import run_extraction
from tests.maintain.conftest import Make, damage, ds, images, make, quick_disk, tiny

__all__ = ["ds", "images", "make", "quick_disk", "tiny"]


def test_nothing_is_cached(ds: ImageDataset, tiny: None, home: Path) -> None:
    (answer,) = dry_run(["random"], ds)
    assert (answer.match, answer.cached) == (None, ())
    assert answer.added == tuple(ds.table["id"])
    assert (answer.owed, answer.bytes) == (20, 20 * 6 * 4)
    assert not home.exists()  # nothing is written
    json.dumps(answer.to_json(), allow_nan=False)


def test_every_field_that_differs_is_named(make: Make, ds: ImageDataset) -> None:
    make("zarr")
    make("views")
    (done,) = run_extraction(["random"], ds, precision="bf16", feature_dtype="float16")
    damage(done.store.path / "shards" / "000000" / "commit.json", "flip")
    (answer,) = dry_run(["random"], ds, ExtractConfig(transform="imagenet", precision="bf16"))
    assert answer.match is None
    plain, views, broken = answer.cached
    assert dict(plain.differs)["precision"] == ("bf16", "fp32")
    assert dict(plain.differs)["transform.resize"] == (256, None)
    assert dict(plain.differs)["transform.crop"] == ([224, 224], None)
    assert "weights_sha256" not in plain.differs
    assert views.differs["transform.views"] == (None, 3)
    assert "embcache verify --repair" in broken.problem
    assert answer.to_json()["cached"][0]["differs"]["precision"] == {"wanted": "bf16", "cached": "fp32"}
    assert len(answer.added) == 20


def test_added_changed_and_removed_images_are_told_apart(make: Make, ds: ImageDataset, images: Path) -> None:
    make("zarr")
    draw(images / "benign" / "new.png", 100)
    draw(images / "malignant" / "04.png", 101)
    (images / "malignant" / "06.png").unlink()
    now = load_dataset("folder", images)
    (answer,) = dry_run(["random"], now)
    assert (answer.added, answer.changed) == (("benign/new.png",), ("malignant/04.png",))
    assert answer.removed == ("malignant/06.png",)
    assert (answer.images, answer.owed) == (20, 2)
    (done,) = run_extraction(["random"], now)
    assert done.computed == answer.owed


def test_quarantined_images_are_counted_where_they_are_looked_at_again(make: Make, ds: ImageDataset) -> None:
    make("zarr")
    (answer,) = dry_run(["random"], ds, ExtractConfig(retry_quarantined=True))
    assert answer.changed == ("benign/01.png",)


def test_an_interrupted_run_owes_what_it_planned(make: Make, ds: ImageDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    import embcache.extract.engines.local as compute

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compute, "commit_shard", die)
        with pytest.raises(KeyboardInterrupt):
            make("zarr")
    (answer,) = dry_run(["random"], ds)
    assert answer.match is not None
    assert len(answer.added) == 20
