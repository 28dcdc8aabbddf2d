"""What is cached, in words and numbers, and taking it to other tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import typer
import zarr
from typer.testing import CliRunner

from embcache.commands import cache as commands
from embcache.data.dataset import ImageDataset
from embcache.errors import StoreError, StoreNotFoundError, UsageError
from embcache.maintain.export import export_features
from embcache.maintain.listing import list_cached, store_info, transform_words
from embcache.store.commit import ShardRows, commit_shard, write_snapshot, write_view
from embcache.store.feature_store import FeatureStore, open_store
from tests.refusal import refused
from tests.store.build import add, make_store, plan, recipe

ODD = '=1+1,"é"\n' + "x" * 300


def dataset(ids: list[str], name: str = "ds") -> ImageDataset:
    """Two classes and an unlabelled image, every two rows a group; no files."""
    table = pd.DataFrame(
        {
            "id": ids,
            "path": [f"{i}.png" for i in range(len(ids))],
            "place": "",
            "label": [i % 3 - 1 for i in range(len(ids))],
            "group": [f"p{i // 2}" for i in range(len(ids))],
            "split": ["test" if i % 2 else "train" for i in range(len(ids))],
        }
    )
    return ImageDataset(name, None, ("normal", "pneumonia"), "auc", "generic", table)


@pytest.fixture
def cached(home: Path) -> tuple[FeatureStore, ImageDataset]:
    """A store of five images, one of them unreadable, and their dataset in another order."""
    path = make_store(home)
    add(path, 0, ["a", "b", ODD, "d"], bad=["b"])
    add(path, 1, ["e"])
    ds = dataset(["e", "d", ODD, "b", "a"])
    write_snapshot(path.parent, ds.to_parquet_bytes())
    write_view(path)
    return open_store("random", ds), ds


def test_ls_counts_against_the_snapshot(cached: tuple[FeatureStore, ImageDataset], home: Path) -> None:
    (row,) = list_cached()
    assert (row.dataset, row.backbone, row.rows, row.quarantined, row.owed) == ("ds", "random", 4, 1, 0)
    assert row.complete
    assert row.fingerprint == cached[0].recipe.fingerprint[:12]
    assert row.transform == "paper: resize 256×256, crop 224×224"
    assert row.bytes == sum(p.lstat().st_size for p in row.path.rglob("*") if p.is_symlink() or p.is_file())
    write_snapshot(home / "ds", dataset(["e", "new", "newer"]).to_parquet_bytes())
    (row,) = list_cached()
    assert (row.rows, row.quarantined, row.owed, row.complete) == (1, 0, 2, False)


def test_ls_without_a_snapshot_counts_against_the_plans(home: Path) -> None:
    path = make_store(home)
    add(path, 0, ["a", "b"])
    (row,) = list_cached()
    assert (row.dataset, row.rows, row.owed) == ("ds", 2, 0)
    plan(path, 1, ["c", "d"])
    write_snapshot(home / "ds", b"not parquet")
    (row,) = list_cached()
    assert (row.rows, row.owed) == (2, 2)


def test_a_damaged_store_is_listed_among_the_others(home: Path) -> None:
    add(make_store(home), 0, ["a"])
    for precision, name in (("bf16", "recipe.json"), ("fp16", "shards/000000/commit.json")):
        path = make_store(home, precision=precision)
        add(path, 0, ["a"])
        (path / name).write_bytes(b"x")
    rows = list_cached()
    assert len(rows) == 3
    assert [bool(row.problem) for row in rows].count(True) == 2
    assert not any(row.complete for row in rows if row.problem)


def test_info_says_what_a_store_is_made_of(cached: tuple[FeatureStore, ImageDataset], home: Path) -> None:
    path = cached[0].path
    add(path, 2, ["a", "gone"])
    plan(path, 5, ["later"])
    info = store_info(FeatureStore(path), home)
    assert (info.shards, info.uncommitted, info.superseded) == (3, (5,), 1)
    assert info.view == path / "view.zarr"
    data = json.loads(json.dumps(info.to_json()))
    assert data["recipe"] == recipe().to_json()
    assert data["quarantined"] == {"b": "truncated: b"}
    assert (data["rows"], data["row_shape"], data["created_with"]["device"]) == (4, [3], "cpu")


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        ({"kind": "imagenet", "resize": 256, "crop": [224, 224], "interpolation": "bicubic"},
         "imagenet: resize 256, crop 224×224, bicubic"),
        ({"kind": "paper", "resize": None, "crop": None, "size": [96, 96]}, "paper: as it is, 96×96"),
        ({"kind": "paper", "resize": [256, 256], "crop": [224, 224], "views": 4, "augment": {"kind": "chest"}},
         "paper: resize 256×256, crop 224×224, 4 views (chest)"),
        ({"kind": "own"}, "own"),
    ],
)  # fmt: skip
def test_a_transform_in_words(transform: dict[str, Any], words: str) -> None:
    assert transform_words(transform) == words


def read_back(path: Path) -> dict[str, Any]:
    """An export as plain libraries read it: ids, labels, groups, split, features."""
    if path.suffix == ".npz":
        with np.load(path) as file:
            return {name: file[name] for name in file.files}
    if path.suffix == ".zarr":
        group = zarr.open_group(path, mode="r")
        return {name: np.asarray(group[name][...]) for name in group.array_keys()}
    if path.suffix == ".h5":
        with h5py.File(path) as file:
            return {
                name: data.asstr()[...] if h5py.check_string_dtype(data.dtype) else data[...]
                for name, data in file.items()
            }
    table = (
        pd.read_parquet(path)
        if path.suffix == ".parquet"
        else pd.read_csv(path, keep_default_na=False, dtype={f"f{i}": np.float32 for i in range(3)})
    )
    assert table.columns.tolist() == ["id", "label", "class_name", "group", "split", "f0", "f1", "f2"]
    assert table["class_name"].tolist() == ["", "normal", "pneumonia", "normal"]
    return {
        "ids": table["id"].to_numpy(),
        "labels": table["label"].to_numpy(),
        "groups": table["group"].to_numpy(),
        "split": table["split"].to_numpy(),
        "features": table[["f0", "f1", "f2"]].to_numpy(),
        "class_names": np.array(["normal", "pneumonia"]),
    }


@pytest.mark.parametrize("suffix", ["npz", "parquet", "csv", "zarr", "h5"])
def test_every_export_holds_the_same_rows(
    suffix: str, cached: tuple[FeatureStore, ImageDataset], tmp_path: Path
) -> None:
    store, ds = cached
    target = tmp_path / f"out.{suffix}"
    assert export_features(FeatureStore(store.path), ds, target) == 4
    found = read_back(target)
    assert [str(id_) for id_ in found["ids"]] == ["e", "d", ODD, "a"]
    assert found["labels"].tolist() == [-1, 0, 1, 0]
    assert [str(group) for group in found["groups"]] == ["p0", "p0", "p1", "p2"]
    assert [str(split) for split in found["split"]] == ["train", "test", "train", "train"]
    assert [str(name) for name in found["class_names"]] == ["normal", "pneumonia"]
    assert found["features"].dtype == np.float32
    assert np.array_equal(found["features"], store.features[:])
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "home") == [target.name]


def test_an_export_replaces_nothing_unless_told(cached: tuple[FeatureStore, ImageDataset], tmp_path: Path) -> None:
    store, ds = cached
    for suffix in ("npz", "zarr"):
        target = tmp_path / f"out.{suffix}"
        export_features(store, ds, target)
        with refused(UsageError, "target-exists"):
            export_features(store, ds, target)
        assert export_features(store, ds, target, overwrite=True) == 4
        assert len(read_back(target)["ids"]) == 4
    images = tmp_path / "images.zarr"
    images.mkdir()
    (images / "precious.png").write_bytes(b"x")
    with refused(UsageError, "target-folder"):
        export_features(store, ds, images, overwrite=True)
    assert (images / "precious.png").exists()


def test_an_export_that_fails_leaves_nothing(cached: tuple[FeatureStore, ImageDataset], tmp_path: Path) -> None:
    store, ds = cached
    with refused(StoreError, "features-incomplete"):
        export_features(store, dataset(["a", "new"]), tmp_path / "out.npz")
    with refused(StoreError, "export-not-written"):
        export_features(store, ds, tmp_path / "nowhere" / "out.npz")
    with refused(UsageError, "export-format"):
        export_features(store, ds, tmp_path / "out.xlsx")
    with refused(UsageError, "export-format"):
        export_features(store, ds, tmp_path / "out.npz", format="xlsx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home"]


@pytest.fixture
def pixels(cached: tuple[FeatureStore, ImageDataset], home: Path) -> FeatureStore:
    """Pixels of two of the images, and one that is planned, beside the features."""
    transform = {"resize": [4, 4], "crop": None, "size": [4, 4], "interpolation": "bilinear"}
    path = make_store(home, row_shape=(4, 4, 3), backbone="pixels", dtype="uint8", transform=transform)
    values = np.zeros((2, 4, 4, 3), np.uint8)
    plan(path, 0, ["a", "b"])
    commit_shard(path, 0, ShardRows(("a", "b"), values, np.array([True, False]), ("", ""), ("", "broken")))
    plan(path, 1, ["d"])
    return FeatureStore(path)


def test_pixels_are_listed_as_what_they_are(pixels: FeatureStore, home: Path) -> None:
    row, features = list_cached()
    assert (row.backbone, row.precision, row.transform) == ("pixels", "uint8", "resize 4×4, bilinear")
    assert (row.rows, row.quarantined) == (1, 1)
    assert row.owed == 1  # what is planned; nothing needs the others
    assert (features.backbone, features.owed) == ("random", 0)
    assert store_info(pixels, home).to_json()["dtype"] == "uint8"


def test_pixels_are_not_exported(pixels: FeatureStore, tmp_path: Path) -> None:
    with refused(UsageError, "export-pixels"):
        export_features(pixels, dataset(["a", "b"]), tmp_path / "out.npz")
    assert not (tmp_path / "out.npz").exists()


@pytest.fixture
def app() -> typer.Typer:
    """The commands of this family alone."""
    app = typer.Typer()
    for command in (commands.ls, commands.info, commands.export):
        app.command()(command)
    return app


def test_commands_print_what_there_is(
    cached: tuple[FeatureStore, ImageDataset], app: typer.Typer, tmp_path: Path, home: Path
) -> None:
    run = CliRunner().invoke
    (home / "ds" / "runs" / "one").mkdir(parents=True)
    out = run(app, ["ls"], catch_exceptions=False).stdout
    assert "complete" in out
    assert "runs: ds 1" in out
    listed = json.loads(run(app, ["ls", "--json", "-"], catch_exceptions=False).stdout)
    assert listed["stores"][0]["rows"] == 4
    assert listed["runs"] == {"ds": 1}
    out = run(app, ["info", "--backbone", "random", "--dataset", "ds"], catch_exceptions=False).stdout
    for part in (cached[0].recipe.fingerprint, "truncated: b", "4 × (3,) float32, complete", "view.zarr"):
        assert part in out
    told = json.loads(run(app, ["info", "--json", "-"], catch_exceptions=False).stdout)
    assert told[0]["quarantined"] == {"b": "truncated: b"}
    target = tmp_path / "out.npz"
    done = run(app, ["export", str(target), "--backbone", "random", "--dataset", "ds"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "4 rows" in done.stdout
    assert "snapshot" in done.stderr
    assert "1 images that could not be read" in done.stderr
    assert len(read_back(target)["ids"]) == 4


def test_commands_know_pixels_and_views(pixels: FeatureStore, app: typer.Typer, tmp_path: Path, home: Path) -> None:
    views = {**recipe().transform, "views": 2, "augment": {"kind": "chest", "degrees": 10.0}}
    path = make_store(home, row_shape=(2, 3), transform=views)
    add(path, 0, ["a", "b", ODD, "d"], row_shape=(2, 3))
    add(path, 1, ["e"], row_shape=(2, 3))
    run = CliRunner().invoke
    listed = json.loads(run(app, ["ls", "--json", "-"], catch_exceptions=False).stdout)["stores"]
    assert sorted((s["backbone"], s["views"]) for s in listed) == [("pixels", 1), ("random", 1), ("random", 2)]
    out = run(app, ["info", "--backbone", "pixels"], catch_exceptions=False).stdout
    assert "1 × (4, 4, 3) uint8, 1 images to go" in out
    assert "weights" not in out
    out = run(app, ["info", "--recipe", FeatureStore(path).recipe.fingerprint[:12]], catch_exceptions=False).stdout
    assert "augment.degrees" in out
    for arguments, columns in (([], 3), (["--views", "2"], 6)):
        target = tmp_path / f"{columns}.csv"
        asked = ["export", str(target), "--backbone", "random", "--dataset", "ds", *arguments]
        assert run(app, asked, catch_exceptions=False).exit_code == 0
        names = pd.read_csv(target).columns.tolist()[5:]
        assert names == (["f0", "f1", "f2"] if columns == 3 else [f"v{v}_f{i}" for v in range(2) for i in range(3)])


def test_commands_on_an_empty_home_say_what_to_type(app: typer.Typer, home: Path) -> None:
    run = CliRunner().invoke
    done = run(app, ["ls"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "embcache demo" in done.stdout
    assert json.loads(run(app, ["ls", "--json", "-"]).stdout) == {"stores": [], "runs": {}, "interrupted": []}
    with refused(StoreNotFoundError, "store-not-found"):
        run(app, ["info", "--backbone", "dino"], catch_exceptions=False)
    with refused(UsageError, "export-one-store"):
        run(app, ["export", "x.npz", "--backbone", "a,b"], catch_exceptions=False)
