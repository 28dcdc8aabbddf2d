"""``embcache verify`` and ``extract --dry-run`` as they are typed: what they print, their JSON, their exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from embcache.cli import app
from embcache.data.dataset import ImageDataset
from embcache.errors import StoreNotFoundError, UsageError
from tests.maintain.conftest import Make, damage, ds, flip, images, make, quick_disk, tiny
from tests.refusal import refused
from tests.store.build import tree

__all__ = ["ds", "images", "make", "quick_disk", "tiny"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def test_damage_is_named_and_the_printed_command_mends_it(make: Make, ds: ImageDataset, home: Path) -> None:
    path = make("zarr")
    make("pixels")
    before = tree(home)
    assert run("verify").exit_code == 0
    flip(path / "shards/000001/data.zarr/features/c/0/0", 20)
    damage(home / ds.name / "dataset.parquet", "cut")
    told = run("verify", "--json", "-")
    answer = json.loads(told.stdout)
    assert (told.exit_code, answer["ok"]) == (1, False)
    (found,) = next(store for store in answer["stores"] if store["backbone"] == "random")["damage"]
    assert found["shard"] == 1
    assert (found["rows"]["first"], found["rows"]["last"], found["rows"]["count"]) == (8, 15, 8)
    assert "dataset.parquet" in answer["snapshots"][0]["path"]
    told = run("verify", "--backbone", "random")
    command = f"embcache verify --repair --dataset {ds.name} --backbone random"
    assert told.exit_code == 1
    assert command in told.stdout
    assert "shard 1, rows 8-15: 8 images" in told.stdout
    damage(home / ds.name / "dataset.parquet", "flip")
    # Who has lost the snapshot as well names the images.
    done = run("verify", "--repair", "--dataset", "folder", "--data-root", str(ds.root), "--json", "-")
    assert done.exit_code == 0
    answer = json.loads(done.stdout)
    repaired = [store["repaired"] for store in answer["stores"] if store["repaired"]]
    assert [each["left"] for each in repaired] == [[]]
    assert any("8 images computed again" in line for line in repaired[0]["done"])
    assert tree(home) == before


def test_source_and_sample_add_to_the_answer(make: Make, ds: ImageDataset, images: Path) -> None:
    make("hdf5")
    told = run("verify", "--source", "--sample", "5", "--json", "-")
    (answer,) = json.loads(told.stdout)["stores"]
    assert told.exit_code == 0
    assert answer["source"]["checked"] == 20
    assert (answer["sample"]["compared"], answer["sample"]["ok"]) == (5, True)
    (images / "benign" / "07.png").write_bytes((images / "benign" / "09.png").read_bytes())
    told = run("verify", "--source")
    assert told.exit_code == 1
    assert "changed: benign/07.png" in told.stdout
    assert "embcache extract --backbone random" in told.stdout


def test_a_refused_repair_is_one_message_and_status_1(
    make: Make, ds: ImageDataset, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make("zarr")
    flip(path / "shards/000001/commit.json", 20)
    before = tree(path)
    images.rename(images.with_name("moved"))
    told = run("verify", "--repair")
    assert told.exit_code == 1
    assert "not here" in told.stderr
    assert tree(path) == before


def test_a_repaired_link_leaves_the_numbers_of_the_store(make: Make, tmp_path: Path) -> None:
    path = make("zarr")
    (path / "staging").rmdir()
    (path / "staging").symlink_to(tmp_path)
    told = run("verify", "--repair", "--json", "-")
    (answer,) = json.loads(told.stdout)["stores"]
    assert (told.exit_code, answer["shards"], answer["rows"], answer["repaired"]["left"]) == (0, 3, 20, [])


def test_bad_requests(make: Make, home: Path) -> None:
    with refused(StoreNotFoundError, "store-not-found"):
        run("verify")
    with refused(UsageError, "one-dataset"):
        run("verify", "--dataset", "a,b", "--data-root", "x")
    with refused(UsageError, "option-bounds"):
        run("verify", "--sample", "-1")


def test_a_dry_run_prints_fields_and_images_and_computes_nothing(make: Make, ds: ImageDataset, home: Path) -> None:
    make("zarr")
    before = tree(home)
    told = run("extract", "--dry-run", "--backbone", "random", "--dataset", ds.name, "--precision", "bf16")
    assert told.exit_code == 0
    assert "precision  bf16    fp32" in told.stdout
    assert "would compute 20 of 20 images" in told.stdout
    told = run("extract", "--dry-run", "--backbone", "random", "--dataset", ds.name, "--json", "-")
    (answer,) = json.loads(told.stdout)
    assert (answer["owed"], answer["added"]["number"]) == (0, 0)
    assert tree(home) == before
