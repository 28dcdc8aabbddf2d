"""Why says what differs, which images, and writes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from embcache.commands.why import duration_words
from embcache.data.dataset import ImageDataset, load_dataset
from embcache.extract.run import run_extraction
from embcache.upkeep.why import explain
from tests.extract.conftest import draw
from tests.store.build import tree
from tests.upkeep.conftest import Make, damage, ds, images, make, quick_disk, tiny

__all__ = ["ds", "images", "make", "quick_disk", "tiny"]


def test_nothing_is_cached(ds: ImageDataset, tiny: None, home: Path) -> None:
    (answer,) = explain(["random"], ds)
    assert (answer.match, answer.cached, answer.held) == (None, (), 0)
    assert answer.added == tuple(ds.table["id"])
    assert answer.cost.images == 20
    assert answer.cost.bytes == 20 * 6 * 4
    assert answer.cost.rate is not None
    assert answer.cost.seconds == pytest.approx(20 / answer.cost.rate)
    assert not home.exists()  # nothing is written
    json.dumps(answer.to_json(), allow_nan=False)


def test_a_complete_store_costs_nothing(make: Make, ds: ImageDataset, home: Path) -> None:
    path = make("zarr")
    before = tree(home)
    (answer,) = explain(["random"], ds)
    assert answer.match is not None
    assert answer.match.path == path
    assert (answer.held, answer.added, answer.changed, answer.removed) == (20, (), (), ())
    assert (answer.cost.images, answer.cost.rate) == (0, None)
    assert tree(home) == before


def test_every_field_that_differs_is_named(make: Make, ds: ImageDataset) -> None:
    make("zarr")
    make("views")
    (done,) = run_extraction(["random"], ds, precision="bf16", feature_dtype="float16")
    damage(done.store.path / "shards" / "000000" / "commit.json", "flip")
    (answer,) = explain(["random"], ds, transform="imagenet", precision="bf16")
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
    (answer,) = explain(["random"], now)
    assert (answer.added, answer.changed) == (("benign/new.png",), ("malignant/04.png",))
    assert answer.removed == ("malignant/06.png",)
    assert (answer.images, answer.held, answer.cost.images) == (20, 18, 2)
    (done,) = run_extraction(["random"], now)
    assert done.computed == answer.cost.images


def test_an_interrupted_run_owes_what_it_planned(make: Make, ds: ImageDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    import embcache.extract.compute as compute

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compute, "commit_shard", die)
        with pytest.raises(KeyboardInterrupt):
            make("zarr")
    (answer,) = explain(["random"], ds)
    assert answer.match is not None
    assert len(answer.added) == 20


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(3.21, "3.2 s"), (42, "42 s"), (600, "10 min"), (19200, "5 h 20 min"), (864000, "10.0 days")],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert duration_words(seconds) == words
