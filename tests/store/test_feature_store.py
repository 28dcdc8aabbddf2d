"""Finding stores, and the messages of those that are not there or not whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from embcache.errors import CorruptStoreError, RecipeError, StoreError, StoreNotFoundError
from embcache.sealed import seal
from embcache.store.feature_store import FeatureStore, list_stores, open_store
from tests.refusal import refused
from tests.store.build import add, make_store, make_table, recipe


def test_open_store_finds_by_name_and_restricts_to_a_dataset(tmp_path: Path) -> None:
    path = make_store(tmp_path)
    add(path, 0, ["a", "b", "c"])
    assert open_store("random", "ds", home=tmp_path).ids.tolist() == ["a", "b", "c"]
    assert open_store("random", make_table(["c", "a"]), home=tmp_path).ids.tolist() == ["c", "a"]


def test_nothing_cached_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError) as caught:
        open_store("dino", "nih", home=tmp_path)
    assert caught.value.fix == f"embcache extract --backbone dino --dataset nih --home {tmp_path}"
    make_store(tmp_path)
    with refused(StoreNotFoundError, "store-not-found"):
        open_store("dino", "ds", home=tmp_path)


def test_a_backbone_whose_name_begins_another_is_not_mistaken_for_it(tmp_path: Path) -> None:
    make_store(tmp_path, backbone="random-x")
    with pytest.raises(StoreNotFoundError):
        open_store("random", "ds", home=tmp_path)
    assert open_store("random-x", "ds", home=tmp_path).recipe.backbone == "random-x"


def test_several_recipes_are_told_apart_by_a_prefix(tmp_path: Path) -> None:
    paths = [make_store(tmp_path), make_store(tmp_path, precision="bf16")]
    prints = [FeatureStore(path).recipe.fingerprint for path in paths]
    with pytest.raises(RecipeError) as caught:
        open_store("random", "ds", home=tmp_path)
    message = str(caught.value)
    assert "precision = fp32" in message
    assert "precision = bf16" in message
    assert "decoder" not in message
    assert "--recipe" in str(caught.value.fix)
    for path, fingerprint in zip(paths, prints, strict=True):
        assert open_store("random", "ds", home=tmp_path, recipe=fingerprint[:8]).path == path
        assert open_store("random", "ds", home=tmp_path, recipe=fingerprint).path == path
    with refused(StoreNotFoundError, "store-not-found"):
        open_store("random", "ds", home=tmp_path, recipe="zz")


def test_list_stores_reads_no_shards(tmp_path: Path) -> None:
    path = make_store(tmp_path)
    add(path, 0, ["a"])
    (path / "shards" / "000000" / "commit.json").write_text("")
    (tmp_path / "ds" / ".random-abc").mkdir()
    (tmp_path / "ds" / "runs").mkdir()
    (tmp_path / "file").write_text("")
    assert [store.path for store in list_stores(tmp_path)] == [path]
    assert [store.path for store in list_stores(tmp_path, "ds")] == [path]
    assert list_stores(tmp_path, "other") == []
    assert list_stores(tmp_path / "nowhere") == []


def test_a_recipe_in_the_wrong_folder_is_refused(tmp_path: Path) -> None:
    path = make_store(tmp_path)
    moved = path.with_name(path.name[:-12] + "0" * 12)
    path.rename(moved)
    with refused(CorruptStoreError, "recipe-mismatch"):
        FeatureStore(moved)


def test_an_edited_recipe_is_refused_even_with_a_fresh_checksum(tmp_path: Path) -> None:
    path = make_store(tmp_path)
    content = json.loads((path / "recipe.json").read_text())
    del content["crc32c"]
    content["recipe"]["precision"] = "bf16"
    (path / "recipe.json").write_bytes(seal(content))
    with refused(CorruptStoreError, "recipe-mismatch"):
        FeatureStore(path)
    content["recipe"] = recipe().to_json()
    content["format"] = "parquet"
    (path / "recipe.json").write_bytes(seal(content))
    with refused(StoreError, "store-format"):
        FeatureStore(path)


def test_a_commit_cannot_name_files_outside_its_shard(tmp_path: Path) -> None:
    path = make_store(tmp_path)
    add(path, 0, ["a"])
    file = path / "shards" / "000000" / "commit.json"
    content = json.loads(file.read_text())
    del content["crc32c"]
    content["files"]["../../recipe.json"] = {"size": 1, "crc32c": "00000000"}
    file.write_bytes(seal(content))
    with refused(CorruptStoreError, "outside-shard"):
        len(FeatureStore(path))


def test_a_store_does_not_change_under_its_reader(tmp_path: Path) -> None:
    path = make_store(tmp_path)
    add(path, 0, ["a"])
    store = FeatureStore(path)
    assert store.ids.tolist() == ["a"]
    add(path, 1, ["b"])
    assert len(store.features[:]) == 1
    assert store.committed() == (0, 1)
    assert set(store.sources()) == {"a", "b"}
    assert len(FeatureStore(path)) == 2


def views_of(number: int) -> dict[str, object]:
    return {**recipe().transform, "views": number, "augment": {"kind": "chest"}}


def test_plain_features_come_before_views_and_a_number_of_views_is_that_number(tmp_path: Path) -> None:
    with_views = {number: make_store(tmp_path, row_shape=(number, 3), transform=views_of(number)) for number in (2, 4)}
    for number, path in with_views.items():
        assert FeatureStore(path).views == number
        assert open_store("random", "ds", home=tmp_path, views=number).path == path
    with refused(RecipeError, "several-recipes") as caught:
        open_store("random", "ds", home=tmp_path)
    assert str(caught.value.fix).startswith("--views 2, or --views 4, or --recipe ")
    with refused(StoreNotFoundError, "store-not-found") as missing:
        open_store("random", "ds", home=tmp_path, views=1)
    assert missing.value.fix == f"embcache extract --backbone random --dataset ds --home {tmp_path}"
    assert "(4 views)" in str(missing.value.found)
    plain = make_store(tmp_path)
    assert open_store("random", "ds", home=tmp_path).path == plain
    assert open_store("random", "ds", home=tmp_path, views=1).path == plain
    fingerprint = FeatureStore(with_views[4]).recipe.fingerprint
    assert open_store("random", "ds", home=tmp_path, recipe=fingerprint[:8]).path == with_views[4]
    with refused(StoreNotFoundError, "store-not-found"):
        open_store("random", "ds", home=tmp_path, recipe=fingerprint[:8], views=2)


def test_pixels_are_no_backbone(tmp_path: Path) -> None:
    path = make_store(tmp_path, row_shape=(4, 4, 3), backbone="pixels", dtype="uint8")
    assert FeatureStore(path).holds_pixels
    assert FeatureStore(path).views == 1
    assert list_stores(tmp_path) == []
    assert [store.path for store in list_stores(tmp_path, pixels=True)] == [path]
    for backbone in ("random", "pixels"):
        with refused(StoreNotFoundError, "store-not-found"):
            open_store(backbone, "ds", home=tmp_path)
