"""Repair computes just what is damaged, gives the same bytes, and refuses what it could not make again."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import embcache.extract.recipes as run
import embcache.maintain.repair as repair
from embcache.data.dataset import ImageDataset, load_dataset
from embcache.data.images import ImageRef
from embcache.errors import CorruptStoreError, DatasetError, DatasetNotFoundError, RecipeError, StoreError
from embcache.extract.worker import FrozenNetwork
from embcache.maintain.repair import Maker, Rebuild, repair_store
from embcache.maintain.verify import StoreCheck, verify_store
from embcache.store.commit import ShardRows
from embcache.store.feature_store import FeatureStore
from embcache.store.lease import Lease
from tests.extract.conftest import draw
from tests.extract.tiny import load_tiny, run_extraction
from tests.maintain.conftest import KINDS, Make, damage, ds, files_of, flip, images, make, quick_disk, stamps, tiny
from tests.refusal import refused
from tests.store.build import tree

__all__ = ["ds", "images", "make", "quick_disk", "tiny"]


def repaired(path: Path, ds: ImageDataset, done: list[str] | None = None, **how: Any) -> StoreCheck:
    return repair_store(verify_store(path), lambda: ds, Rebuild(**how), done=done)


def watch(patch: pytest.MonkeyPatch, before: Callable[..., object]) -> None:
    """Call ``before`` with the images and how they are computed, each time a repair computes rows."""
    original = repair.make_again

    def make_again(*arguments: Any, **keywords: Any) -> Maker:
        maker = original(*arguments, **keywords)

        def watched(*how: Any) -> ShardRows:
            before(*how)
            return maker(*how)

        return watched

    patch.setattr(repair, "make_again", make_again)


@pytest.mark.parametrize(("kind", "how"), [*zip(KINDS, ("flip", "remove", "cut", "flip"), strict=True)])
def test_only_the_damaged_shard_is_computed_again_and_equals_what_it_was(
    kind: str, how: str, make: Make, ds: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(kind)
    before, others = tree(path), {n: stamps(path / "shards" / n) for n in ("000000", "000002")}
    damage(max(files_of(path / "shards" / "000001"), key=lambda file: file.stat().st_size), how)
    images: list[ImageRef] = []
    watch(monkeypatch, lambda sources, *_: images.extend(sources))
    (found,) = verify_store(path).damage
    assert (found.kind, found.shard) == ("shard", 1)
    after = repaired(path, ds)
    assert (after.damage, after.notes) == ((), ())
    assert len(images) == 8
    assert tree(path) == before
    assert {n: stamps(path / "shards" / n) for n in others} == others


@pytest.mark.parametrize("kind", ["zarr", "hdf5"])
def test_every_file_can_be_repaired(kind: str, make: Make, ds: ImageDataset) -> None:
    path = make(kind)
    before = tree(path)
    for file in (file for file in files_of(path) if "000001" in file.as_posix()):  # a plan and a shard
        flip(file, 40, bit=2)
        assert not repaired(path, ds).damage
        assert tree(path) == before, file


def test_everything_at_once(make: Make, ds: ImageDataset) -> None:
    path = make("zarr")
    before = tree(path)
    for name in ("plan/000000.json", "shards/000001/commit.json", "plan/000002.json"):
        damage(path / name, "cut")
    shutil.rmtree(path / "shards" / "000002" / "data.zarr")
    (path / "shards" / "000000" / "extra").write_text("x")
    (path / "shards" / "mine.txt").write_text("x")
    done: list[str] = []
    assert not repaired(path, ds, done).damage
    assert tree(path) == before
    assert any("plan 0: written anew from its shard" in line for line in done)
    assert any("plan 2: written anew for 4 images that no other plan names" in line for line in done)
    assert sum("computed again" in line for line in done) == 2


def test_a_damaged_plan_of_nothing_computed_is_planned_anew(make: Make, ds: ImageDataset) -> None:
    path = make("zarr")
    before = tree(path)
    shutil.rmtree(path / "shards" / "000002")
    flip(path / "plan" / "000002.json", 30)
    assert not repaired(path, ds).damage
    assert not (path / "plan" / "000002.json").exists()
    run_extraction(["random"], ds)
    assert tree(path) == before


@pytest.mark.parametrize(("kind", "moment"), [("zarr", "compute"), ("hdf5", "commit"), ("pixels", "view")])
def test_a_repair_that_is_killed_is_finished_by_the_next(
    kind: str, moment: str, make: Make, ds: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(kind)
    before = tree(path)
    for number in ("000000", "000001"):
        damage(path / "shards" / number / "commit.json", "flip")

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "compute":
            watch(patch, die)
        else:
            patch.setattr(repair, {"commit": "commit_shard", "view": "write_view"}[moment], die)
        with pytest.raises(KeyboardInterrupt):
            repaired(path, ds)
    left = verify_store(path)
    assert [(each.kind, each.shard) for each in left.damage] == [("shard", 0), ("shard", 1)] * (moment != "view")
    assert not repaired(path, ds).damage
    assert tree(path) == before


def test_a_shard_that_a_repair_put_aside_is_computed_by_an_extraction(make: Make, ds: ImageDataset) -> None:
    """As a repair leaves it that is killed between two renames, where the system cannot exchange two names."""
    path = make("zarr")
    before = tree(path)
    (path / "shards" / "000001").rename(path / "staging" / f"shard-000001-{16 * '0'}-00000000")
    (done,) = run_extraction(["random"], ds)
    assert done.computed == 8
    assert not verify_store(path).damage
    assert {name: data for name, data in tree(path).items() if not name.startswith("staging/")} == before


def test_what_cannot_be_made_again_is_refused_and_nothing_is_touched(
    make: Make, ds: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make("zarr")
    damage(path / "shards" / "000001" / "commit.json", "flip")
    before = stamps(path)

    def other_weights(name: str, **_: object) -> object:
        return dataclasses.replace(load_tiny(name), weights_sha256="cd" * 32)

    with monkeypatch.context() as patch:
        patch.setattr(run, "load_backbone", other_weights)
        with refused(RecipeError, "recipe-differs") as caught:
            repaired(path, ds)
    assert "--weights random=FILE" in str(caught.value.fix)
    newer = repair.make_recipe

    def numerics(network: FrozenNetwork) -> object:
        return dataclasses.replace(newer(network), numerics=newer(network).numerics + 1)

    with monkeypatch.context() as patch:
        patch.setattr(repair, "make_recipe", numerics)
        with refused(RecipeError, "recipe-differs") as caught:
            repaired(path, ds)
    assert "a new extraction" in str(caught.value.fix)
    assert "embcache extract --backbone random" in str(caught.value.fix)
    with refused(DatasetNotFoundError, "images-not-here"):
        repaired(path, dataclasses.replace(ds, root=None))
    assert stamps(path) == before


def test_images_that_are_gone_are_not_turned_into_unreadable_rows(make: Make, ds: ImageDataset, images: Path) -> None:
    path = make("zarr")
    damage(path / "shards" / "000001" / "commit.json", "flip")
    before = stamps(path)
    second = FeatureStore(path).plans()[1]
    gone = second[0].id
    (images / ds.table.set_index("id")["path"][gone]).unlink()
    fewer = load_dataset("folder", images)
    with refused(DatasetError, "images-not-here") as caught:
        repaired(path, fewer)
    assert "--allow-missing" in str(caught.value.fix)
    assert stamps(path) == before
    assert not repaired(path, fewer, allow_missing=True).damage
    assert FeatureStore(path).quarantined[gone] == "no longer in the dataset"


def test_a_row_of_a_changed_image_is_of_its_new_bytes(make: Make, ds: ImageDataset, images: Path) -> None:
    path = make("zarr")
    changed = FeatureStore(path).plans()[1][0].id
    draw(images / ds.table.set_index("id")["path"][changed], 99)
    damage(path / "shards" / "000001" / "commit.json", "flip")
    assert not repaired(path, ds).damage
    data = (images / ds.table.set_index("id")["path"][changed]).read_bytes()
    assert FeatureStore(path).digests[changed] == hashlib.sha256(data).hexdigest()


def test_the_threads_and_the_batch_are_those_of_the_store(
    make: Make, ds: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make("zarr")
    threads, seen = torch.get_num_threads(), list[tuple[int, int]]()
    watch(monkeypatch, lambda _, __, batch_size, *___: seen.append((torch.get_num_threads(), batch_size)))
    damage(path / "shards" / "000001" / "commit.json", "flip")
    torch.set_num_threads(threads + 1)
    try:
        repaired(path, ds)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert seen == [(FeatureStore(path).threads, FeatureStore(path).batch_size)]


def test_a_shard_that_another_process_computes_is_left_to_it(make: Make, ds: ImageDataset) -> None:
    path = make("zarr")
    damage(path / "shards" / "000001" / "commit.json", "flip")
    with Lease.acquire(path, 1) as lease:  # type: ignore[union-attr]
        assert lease.held
        with refused(StoreError, "shard-claimed"):
            repaired(path, ds)
    assert not repaired(path, ds).damage


def test_a_store_with_a_damaged_recipe_is_not_repaired(make: Make, ds: ImageDataset) -> None:
    path = make("zarr")
    damage(path / "shards" / "000001" / "commit.json", "flip")
    os.truncate(path / "recipe.json", 10)
    before = stamps(path)
    with refused(CorruptStoreError, "file-damaged") as caught:
        repaired(path, ds)
    assert f"move the store away and extract again: mv {path} FOLDER" in str(caught.value.fix)
    assert stamps(path) == before


def test_a_repair_keeps_what_a_higher_limit_on_pixels_had_let_in(
    make: Make, ds: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make("zarr")
    before = tree(path)
    (features, *_) = [file for file in files_of(path / "shards" / "000001") if "features" in file.as_posix()]
    monkeypatch.setenv("EMBCACHE_MAX_PIXELS", "1000")  # the images have 1,600
    flip(features, 40)
    said: list[str] = []
    assert not repaired(path, ds, said).damage
    assert any("higher --max-pixels, at least 1,600" in line for line in said)
    assert tree(path) == before


def test_where_a_damaged_index_hides_what_was_valid_the_limit_on_pixels_is_asked_for(
    make: Make, ds: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make("hdf5")  # features and index are one file
    before = tree(path)
    monkeypatch.setenv("EMBCACHE_MAX_PIXELS", "1000")
    for number in ("000000", "000001"):
        flip(max(files_of(path / "shards" / number), key=lambda file: file.stat().st_size), 4000)
    broken = tree(path)
    with refused(DatasetError, "images-unreadable") as caught:
        repaired(path, ds)
    assert "--max-pixels 1600 computes them; --max-pixels 1000 leaves them out" in str(caught.value.fix)
    assert tree(path) == broken
    assert not repaired(path, ds, max_pixels=1600).damage
    assert tree(path) == before


def test_an_image_that_broke_since_is_not_repaired_into_a_row_without_features(
    make: Make, ds: ImageDataset, images: Path
) -> None:
    path = make("zarr")
    for number in ("000000", "000002"):
        flip(max(files_of(path / "shards" / number), key=lambda file: "features" in file.as_posix()), 40)
    first = FeatureStore(path).plans()[0]
    name = next(entry.id for entry in first if entry.id != "benign/01.png")
    (images / name).write_bytes(b"broken")
    with refused(DatasetError, "images-unreadable") as caught:
        repaired(path, ds)
    assert repr(name) in str(caught.value)
    assert [each.shard for each in verify_store(path).damage] == [0]  # the other one is repaired
