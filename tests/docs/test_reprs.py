"""What datasets, stores and results say of themselves in a terminal and in a notebook."""

from __future__ import annotations

import dataclasses
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import embcache.store.reading as reading
from embcache.data.dataset import ImageDataset
from embcache.probe.probe import probe_features
from embcache.store.feature_store import FeatureStore
from tests.probe.build import make_dataset, make_features, make_recipe, put_store
from tests.results.build import make_result
from tests.store.build import add, make_store

HOSTILE = "<script>alert(1)</script>"
OURS = {"div", "strong", "table", "thead", "tbody", "tr", "th", "td", "br"}


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def html_text(shown: Any) -> str:
    """Text of an object's HTML; nothing but a table's own tags may be in it."""
    parser = _Tags()
    parser.feed(shown._repr_html_())
    assert parser.tags <= OURS
    return parser.text


def hostile(ds: ImageDataset) -> ImageDataset:
    return dataclasses.replace(ds, name=f"{HOSTILE} & co", class_names=(HOSTILE, "b"), notes=(f"see {HOSTILE}",))


def test_a_dataset_counts_its_classes_split_by_split() -> None:
    ds = make_dataset([0, 1] * 10 + [0] * 5, split=["train"] * 20 + ["test"] * 5)
    text = repr(ds)
    assert text.startswith(f"ImageDataset({ds.name!r}: 25 images, 2 classes")
    first, second = ds.class_names
    assert f"train: 20 (10 {first}, 10 {second})" in text
    assert f"test: 5 (5 {first}, 0 {second})" in text
    assert f"metric: {ds.metric}" in text
    assert f"20 (10 {first}, 10 {second})" in html_text(ds)


def test_a_dataset_without_labels_says_so() -> None:
    ds = make_dataset([0, 1])
    ds = dataclasses.replace(ds, table=ds.table.assign(label=-1))
    assert "train: 2 (2 unlabeled)" in repr(ds)
    assert "2 (2 unlabeled)" in html_text(ds)
    none = dataclasses.replace(ds, table=ds.table.iloc[:0])
    assert "0 images" in repr(none)
    assert "0 images" in html_text(none)


def test_many_classes_are_counted_not_listed() -> None:
    ds = dataclasses.replace(make_dataset([0, 1]), class_names=tuple(f"class {k}" for k in range(30)))
    assert "and 18 more" in repr(ds)
    assert len(repr(ds)) < 2000


def test_names_from_files_stay_text(home: Path) -> None:
    ds = hostile(make_dataset([0, 1] * 60, split=["train"] * 60 + ["test"] * 60))
    assert HOSTILE in html_text(ds)
    path = put_store(home, make_dataset([0, 1] * 4), HOSTILE, make_features(make_dataset([0, 1] * 4)))
    assert HOSTILE in html_text(FeatureStore(path))
    put_store(home, dataclasses.replace(ds, name="ds"), "net", make_features(ds))
    result = probe_features(dataclasses.replace(ds, name="ds"), "net", folds=2, subset=20, home=home)
    assert HOSTILE in html_text(dataclasses.replace(result, dataset=HOSTILE))
    assert "\x1b" not in repr(dataclasses.replace(result, dataset="\x1b[31mred"))
    assert "\x1b" not in html_text(dataclasses.replace(result, dataset="\x1b[31mred"))


@pytest.mark.parametrize("format", ["zarr", "hdf5"])
def test_a_store_shows_counts_and_recipe(tmp_path: Path, format: str) -> None:
    path = make_store(tmp_path, format=format)
    add(path, 0, ["a", "b"], bad=["b"])
    store = FeatureStore(path)
    if format == "hdf5":
        assert "images: 2 rows committed, quarantined ones among them" in repr(store)
        assert len(store) == 1  # from here on the rows are known
    for text in (
        repr(store),
        html_text(store).replace("images1", "images: 1").replace("quarantined1", "quarantined: 1"),
    ):
        assert "images: 1" in text
        assert "quarantined: 1" in text
        assert "3 float32" in text
        assert store.recipe.fingerprint[:12] in text
        assert format in text
    assert "restricted to 1 ids" in repr(store.restrict(["a"]))


@pytest.mark.parametrize("format", ["zarr", "hdf5"])
def test_a_store_shows_itself_without_reading_features(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_store(tmp_path, format=format)
    add(path, 0, ["a", "b"])
    read: list[str] = []
    plain = reading.read_file
    monkeypatch.setattr(reading, "read_file", lambda path, *rest: read.append(str(path)) or plain(path, *rest))
    repr(FeatureStore(path))
    FeatureStore(path)._repr_html_()
    assert not [name for name in read if "/features/c/" in name or name.endswith("data.h5")]


def test_a_damaged_store_still_shows_itself(tmp_path: Path) -> None:
    path = make_store(tmp_path)
    add(path, 0, ["a"])
    (path / "shards" / "000000" / "commit.json").write_text("{}")
    assert "unreadable: " in repr(FeatureStore(path))
    assert "unreadable" in html_text(FeatureStore(path))


def test_a_result_shows_its_score_labels_and_folds(home: Path) -> None:
    ds = make_dataset([0, 1] * 60, split=["train"] * 60 + ["test"] * 60)
    put_store(home, ds, "net", make_features(ds))
    result = probe_features(ds, "net", folds=2, subset=20, home=home)
    assert result.std is not None
    text = repr(result)
    assert f"{result.metric}: {result.mean:.4f} ± {result.std:.4f}, 95 % " in text
    assert f"20 training + {result.n_val} validation = {result.labels_used} labels per fold" in text
    assert f"net {make_recipe('net').fingerprint[:12]}" in text
    assert result.id in text
    assert f"{result.folds[1].score:.4f}" in html_text(result)


def test_a_result_without_test_labels_says_so() -> None:
    result = dataclasses.replace(make_result(), mean=None, std=None, interval=None)
    assert "test labels not known" in repr(result)
    assert "test labels not known" in html_text(result)
