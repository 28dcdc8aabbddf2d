"""Ids, classes, folders and names made to harm: they come back as they were, and nothing leaves its folder."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from embcache.commands.output import format_table
from embcache.config import DatasetRef
from embcache.data.dataset import load_dataset
from embcache.errors import DatasetError, EmbcacheError
from embcache.extract.extract import extract_features
from embcache.maintain.export import export_features
from embcache.probe.probe import probe_features
from embcache.results.layout import is_formula
from embcache.results.predict import predict
from embcache.store.feature_store import open_store
from tests.extract.conftest import draw
from tests.extract.tiny import load_tiny
from tests.store.build import quick_disk

__all__ = ["quick_disk"]

IDS = (
    "=cmd|' /C calc'!A0", "+1", "-rf", "--home", "@SUM(A1)", "a\nb", "a\r\nb", "tab\tin", "🫁🩻", "e\u0301", "x" * 300,
    "a/b", "$(touch x)", "`id`", "a;b", 'a"b', "a'b", "a,b", "\x1b[31mred",
    "%s%n", "..hidden", "CON", "{0}", "\u202etxt",
)  # fmt: skip
CLASSES = ("=1+1", "\x1b]0;title\x07")


@pytest.mark.usefixtures("quick_disk")
def test_hostile_ids_and_classes_go_all_the_way_and_come_back_as_they_were(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embcache.extract.recipes.load_backbone", load_tiny)
    home = tmp_path / "a home"
    table = tmp_path / "images" / "table.csv"
    for k in range(len(IDS)):
        draw(tmp_path / "images" / f"{k}.png", k)
    with table.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "path", "label", "split"])
        rows.writerows([i, f"{k}.png", CLASSES[k % 2], "train" if k < 16 else "test"] for k, i in enumerate(IDS))
    before = {path for path in tmp_path.rglob("*") if home not in path.parents}
    ds = load_dataset("folder", table, name="-rf ../x =1")
    extract_features(["random"], ds, home=home)
    store = open_store("random", ds, home=home)
    kept = set(ds.table["id"])
    assert kept == {i.strip() for i in IDS}
    assert set(store.ids.tolist()) == kept
    result = probe_features(ds, ["random"], head="linear", folds=2, subset=8, home=home)
    assert set(result.class_names) <= {c.strip() for c in CLASSES}
    for suffix in ("csv", "npz", "parquet"):
        target = home / f"out.{suffix}"
        assert export_features(store, ds, target) == len(IDS)
        if suffix == "csv":
            with target.open(newline="") as file:
                found = [row["id"] for row in csv.DictReader(file)]
        elif suffix == "npz":
            found = np.load(target, allow_pickle=False)["ids"].tolist()
        else:
            found = pq.read_table(target)["id"].to_pylist()
        assert set(found) == kept
    images = [tmp_path / "images" / f"{k}.png" for k in range(3)]
    said = predict(result.id, images, home=home)
    assert said.class_names == result.class_names
    of_ids = predict(result.id, dataset=ds.name, ref=DatasetRef(data_root=table), home=home)
    assert set(of_ids.images) == kept
    cells = [row[0] for row in csv.reader(io.StringIO(of_ids.to_csv(), newline=""))][1:]
    assert {cell.removeprefix("'") for cell in cells} == kept
    assert all(cell.startswith("'") for cell in cells if is_formula(cell))
    after = {path for path in tmp_path.rglob("*") if home not in path.parents and path != home}
    assert after == before
    shown = format_table(["id", "class"], [[i, CLASSES[1]] for i in IDS])
    assert len(shown.splitlines()) == len(IDS) + 2
    assert "\x1b" not in shown
    assert "\u202e" not in shown


@pytest.mark.parametrize("bad", ["../x", "/etc/passwd", "a/../../x", "C:\\x", "..", "\\\\host\\x"])
def test_ids_that_lead_elsewhere_are_refused(tmp_path: Path, bad: str) -> None:
    draw(tmp_path / "a.png", 1)
    (tmp_path / "t.csv").write_text(f"id,path,label\n{bad},a.png,x\nok,a.png,y\n")
    with pytest.raises(DatasetError, match="leaves the dataset's root"):
        load_dataset("folder", tmp_path / "t.csv")


@pytest.mark.parametrize(
    "name", ["../x", "/abs/x", "-rf", "x" * 5000, "a\nb", "\x1b[2J", "..", "", "a/b", "CON:", "é" * 150]
)
def test_names_of_datasets_and_backbones_stay_inside_home(tmp_path: Path, home: Path, name: str) -> None:
    draw(tmp_path / "in" / "a" / "1.png", 1)
    draw(tmp_path / "in" / "b" / "2.png", 2)
    before = sorted(tmp_path.rglob("*"))
    for ask in (
        lambda: extract_features([name], load_dataset("folder", tmp_path / "in"), home=home),
        lambda: load_dataset(name, home=home),
        lambda: open_store("random", load_dataset("folder", tmp_path / "in", name=name or None), home=home),
    ):
        with pytest.raises(EmbcacheError) as told:
            ask()
        assert "\x1b" not in str(told.value)
    assert [path for path in sorted(tmp_path.rglob("*")) if home not in [path, *path.parents]] == before


@pytest.mark.parametrize("text", ["a\x1b[31mb", "a\x07", "\u202e", "\udce9", "\x9b2J", "a\rb"])
def test_messages_show_control_characters_escaped(text: str) -> None:
    message = str(EmbcacheError(text, found=text, where=text))
    assert message.replace("\n", "").isprintable()
    message.encode(sys.stdout.encoding or "utf-8")
