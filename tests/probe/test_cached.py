"""Questions to whatever is cached, and the commands that ask them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from embcache.cli import app
from embcache.data.dataset import ImageDataset
from embcache.errors import EmbcacheError, ProtocolError, StoreNotFoundError, UsageError
from embcache.log import shown
from embcache.probe.inputs import (
    cached_backbones,
    cached_datasets,
    find_splits,
    import_splits,
    plan_cached,
)
from embcache.runs.folders import runs_dir
from tests.probe.build import make_dataset, make_features, put_store, run_cached


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[ImageDataset]]:
    """One dataset with two backbones, one with another, both without files."""
    home = tmp_path_factory.mktemp("two")
    first = make_dataset([0, 1] * 70, split=["train"] * 100 + ["test"] * 40, name="first")
    second = make_dataset([0, 1, 2] * 50, name="second")
    put_store(home, first, "a", make_features(first))
    put_store(home, first, "b", make_features(first, 6))
    put_store(home, first, "pixels", np.zeros((140, 2, 2, 3), np.uint8))
    put_store(home, second, "a", make_features(second))
    return home, [first, second]


@pytest.fixture
def two(home: Path, template: tuple[Path, list[ImageDataset]]) -> list[ImageDataset]:
    shutil.copytree(template[0], home)
    return template[1]


def cli(*arguments: str, status: int = 0) -> Result:
    result = CliRunner().invoke(app, arguments)
    if status == 0 and result.exception is not None:
        raise result.exception
    assert (result.exit_code == 0) == (status == 0), result.output
    return result


def test_what_is_cached(two: list[ImageDataset], home: Path) -> None:
    assert cached_datasets(home) == ["first", "second"]
    assert cached_backbones("first", home) == ["a", "b"]  # pixels are not one vector per image
    assert cached_datasets(home / "nowhere") == []


def test_by_default_everything_cached_is_probed(two: list[ImageDataset], home: Path) -> None:
    results = run_cached(home=home, subsets=["S", 30], head="knn")
    got = [(r.dataset, r.backbones, r.subset) for r in results]
    assert got == [(d, (b,), s) for d, b in (("first", "a"), ("first", "b"), ("second", "a")) for s in ("S", "30")]
    assert {r.source for r in results} == {"snapshot"}


def test_datasets_without_the_backbones_are_left_out_and_named(two: list[ImageDataset], home: Path) -> None:
    said: list[str] = []
    with shown(said.append):
        results = run_cached(backbones=["a", "b"], head="dvme-noattn", home=home)
    assert [(r.dataset, r.backbones) for r in results] == [("first", ("a", "b"))]
    assert said == ["second left out: b not cached"]
    said.clear()
    with shown(said.append):
        (result,) = run_cached(head="dvme-noattn", home=home)
    assert result.backbones == ("a", "b")
    assert said == [
        "second left out: fewer than two backbones cached",
        "first: dvme-noattn fuses a, b, which are cached",
    ]
    with pytest.raises(StoreNotFoundError, match="one is cached"):
        run_cached(["second"], head="concat", home=home)
    with pytest.raises(StoreNotFoundError, match="no dataset has two"):
        run_cached(head="dvme", home=home, views=2)


def test_fusing_heads_fuse_the_papers_set_by_default(home: Path) -> None:
    ds = make_dataset([0, 1] * 60)
    for name in ("dino", "simclr", "swav", "other"):
        put_store(home, ds, name, make_features(ds, 6))
    put_store(home, ds, "seen", np.zeros((120, 2, 6), np.float32))
    (result,) = run_cached(["toy"], head="dvme-noattn", home=home)
    assert result.backbones == ("simclr", "swav", "dino")
    shutil.rmtree(next((home / "toy").glob("swav-*")))
    (result,) = run_cached(["toy"], head="concat", home=home)
    assert result.backbones == ("dino", "other", "simclr")  # not what is cached as views alone


def test_nothing_cached(home: Path) -> None:
    with pytest.raises(StoreNotFoundError, match="nothing is cached"):
        run_cached(home=home)


def test_probe_works_with_the_root_gone(two: list[ImageDataset], home: Path) -> None:
    done = cli("probe", "--dataset", "first", "--subset", "S,F", "--backbone", "a")
    assert "images' folder is not there" in done.stdout
    assert "100 (80 + 20)" in done.stdout  # labels used at F: training and validation
    assert "95 % interval" in done.stdout
    assert done.stderr == "next: embcache results\n"


def test_probe_prints_json(two: list[ImageDataset], home: Path, tmp_path: Path) -> None:
    printed = json.loads(cli("probe", "--dataset", "first", "--json", "-").stdout)
    assert [(r["dataset"], r["backbones"], r["head"]) for r in printed] == [
        ("first", ["a"], "linear"),
        ("first", ["b"], "linear"),
    ]
    cli("probe", "--dataset", "first", "--json", str(tmp_path / "r.json"))
    assert json.loads((tmp_path / "r.json").read_text()) == printed  # the second time from the saved runs
    listed = json.loads(cli("results", "--json", "-").stdout)
    assert sorted(r["id"] for r in listed) == sorted(r["id"] for r in printed)


def test_what_is_asked_beyond_the_default_has_columns_of_its_own(two: list[ImageDataset], home: Path) -> None:
    plain = cli("probe", "--dataset", "first", "--backbone", "a").stdout
    assert not any(header in plain for header in ("learning rate ", "repeats", "target", "chosen"))
    done = cli("probe", "--dataset", "first", "--backbone", "a", "--lr", "1e-30,1e-2", "--lr", "1e-3", "--repeats", "2")
    row = next(line for line in done.stdout.splitlines() if line.startswith("first"))
    assert sum(int(part.split(",")[0]) for part in row.split("×")[1:]) == 10
    assert "over folds of all repeats" in done.stdout
    cli("probe", "--dataset", "first", "--backbone", "a", "--head", "logreg", "--head-option", "Cs=[0.01, 0.1]")
    listed = cli("results").stdout
    assert "C 0.01" in listed
    assert "logreg (Cs=[0.01, 0.1])" in listed


def test_results_lists_run_ids(two: list[ImageDataset], home: Path) -> None:
    assert "no results" in cli("results").stdout
    (result, _) = run_cached(["first"], home=home)
    assert result.id in cli("results", "--dataset", "first").stdout
    assert "no results" in cli("results", "--dataset", "second").stdout
    (runs_dir("second", home) / "linear-S-0").mkdir(parents=True)
    told = cli("results")
    assert "1 run could not be read (made by another version, or damaged): " in told.stderr
    assert told.stderr.splitlines()[0].endswith("second/runs/linear-S-0")
    assert "linear-S-0" not in cli("results", "--dataset", "first").stderr


def test_attention_is_for_the_dvme_among_several_heads(two: list[ImageDataset], home: Path) -> None:
    line = ("probe", "--dataset", "first", "--backbone", "a,b", "--head", "linear,dvme", "--attention", "exact")
    printed = json.loads(cli(*line, "--folds", "2", "--json", "-").stdout)
    assert [(r["head"], len(r["backbones"])) for r in printed] == [("linear", 1), ("linear", 1), ("dvme", 2)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--head", "lineer"], UsageError, "unknown-head"),
        (["--subset", "L"], UsageError, "unknown-subset"),
        (["--subset", "500", "--dataset", "first"], ProtocolError, "subset-too-large"),
        (["--dataset", "first", "--backbone", "dino"], StoreNotFoundError, "no features of dino"),
        (["--lr", "1e-3,fast"], UsageError, "not-a-number"),
        (["--head", "knn", "--head-option", "k=few", "--dataset", "first"], UsageError, "option-bounds"),
        (["--head", "dvme", "--backbone", "a,b", "--attention", "quick"], UsageError, "option-choice"),
        (["--attention", "fast", "--dataset", "first"], UsageError, "option-of-another-head"),
        (["--views", "4"], StoreNotFoundError, "store-not-found"),
        (["--target", "sex", "--dataset", "first"], UsageError, "no column 'sex'"),
        (["--dataset", "first", "--splits", "none"], UsageError, "splits-not-found"),
        (["--dataset", "first,"], UsageError, "empty-name"),
    ],
)
def test_bad_requests_are_one_error(
    two: list[ImageDataset], arguments: list[str], error: type[EmbcacheError], message: str
) -> None:
    result = cli("probe", *arguments, status=1)
    assert isinstance(result.exception, error)
    assert message == result.exception.code or message in str(result.exception)


# --- splits


def test_exported_splits_are_those_of_the_probe(two: list[ImageDataset], home: Path, tmp_path: Path) -> None:
    file = tmp_path / "splits.json"
    done = cli("splits", "export", "--dataset", "first", "--subset", "S,F", "--output", str(file))
    assert done.stderr.splitlines()[-1].startswith("next: embcache probe")
    (drawn,) = run_cached(["first"], ["a"], subsets=["S"], home=home)
    (read,) = run_cached(["first"], ["a"], subsets=["S"], home=home, splits=str(file))
    assert read.request["splits"] == drawn.request["splits"]
    assert [f.score for f in read.folds] == [f.score for f in drawn.folds]
    printed = json.loads(cli("splits", "export", "--dataset", "first", "--subset", "S,F").stdout)
    assert printed == json.loads(file.read_text())


def test_export_works_before_anything_is_cached(tmp_path: Path, home: Path) -> None:
    pytest.importorskip("PIL")
    from PIL import Image

    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = tmp_path / "pets" / split / name
            folder.mkdir(parents=True)
            for k in range(12):
                Image.new("RGB", (8, 8), (k * 20, 0 if name == "cat" else 255, 0 if split == "test" else 9)).save(
                    folder / f"{k}.png"
                )
    root = str(tmp_path / "pets")
    done = cli("splits", "export", "--dataset", "folder", "--data-root", root, "--subset", "F")
    assert len(json.loads(done.stdout)["test"]) == 24
    assert "no features cached yet" in done.stderr


def test_imported_splits_are_found_by_name(two: list[ImageDataset], home: Path, tmp_path: Path) -> None:
    file = tmp_path / "theirs.json"
    cli("splits", "export", "--dataset", "first", "--subset", "S", "--seed", "9", "--output", str(file))
    done = cli("splits", "import", str(file), "--dataset", "first")
    name = import_splits(file, two[0], home).name
    assert f"--splits {name}" in done.stderr
    file.unlink()
    (result,) = run_cached(["first"], ["a"], home=home, splits=name)
    (drawn,) = run_cached(["first"], ["a"], home=home, seed=9)
    assert result.request["splits"] == drawn.request["splits"]
    with pytest.raises(UsageError, match=name):
        find_splits("other", two[0], home)
    with pytest.raises(UsageError, match="does not list subset F"):
        run_cached(["first"], ["a"], subsets=["F"], home=home, splits=name)


def test_splits_know_what_the_chosen_store_knows(two: list[ImageDataset], home: Path) -> None:
    put_store(home, two[0], "c", make_features(two[0]), bad={"i3": "truncated"})
    options: dict[str, Any] = {"home": home, "subsets": ["F"]}
    readable, _ = plan_cached(two[0], backbone="a", **options)
    without, store = plan_cached(two[0], backbone="c", **options)
    assert store is not None
    assert len(readable.used("F")) == 140
    assert len(without.used("F")) == 139
    with pytest.raises(StoreNotFoundError, match="no features of dino"):
        plan_cached(two[0], backbone="dino", **options)
