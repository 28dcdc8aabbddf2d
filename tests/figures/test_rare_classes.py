"""Classes of few images: maps and similarity need no folds, and `rank` makes do with fewer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from embcache.data.dataset import ImageDataset
from embcache.errors import ProtocolError
from embcache.figures.maps import draw_maps
from embcache.figures.rank import logme, rank, similarity
from embcache.probe.protocol import divide, plan_splits
from tests.probe.build import make_dataset, make_features, put_store


def cached(home: Path, labels: list[int]) -> ImageDataset:
    ds = make_dataset(labels)
    for seed, name in enumerate(("one", "two")):
        put_store(home, ds, name, make_features(ds, 12, seed=seed))
    return ds


def test_maps_and_similarity_of_a_class_with_three_images(home: Path) -> None:
    ds = cached(home, [0] * 40 + [1] * 40 + [2] * 3)
    shown = draw_maps(ds, method="pca", rows="all", home=home).shown
    assert sorted(shown.ids) == sorted(f"i{k}" for k in range(83))
    test, train = (set(draw_maps(ds, method="pca", rows=rows, home=home).shown.ids) for rows in ("test", "train"))
    assert not test & train
    assert test | train == set(shown.ids)
    assert similarity(ds, home=home).n == len(train)


def test_maps_of_two_images_of_each_class(home: Path) -> None:
    ds = cached(home, [0, 1, 2, 3, 4] * 2)
    maps = draw_maps(ds, method="tsne", rows="all", home=home)
    assert maps.panels[0].coordinates.shape == (10, 2)
    assert similarity(ds, home=home).n == len(draw_maps(ds, method="pca", rows="train", home=home).shown.ids)


def test_the_test_set_of_a_figure_is_that_of_a_probe(home: Path) -> None:
    ds = cached(home, [0, 1, 2] * 40)
    plan = plan_splits(ds)
    assert draw_maps(ds, method="pca", home=home).shown.ids == list(plan.test_ids)


def test_rank_takes_as_many_folds_as_the_rarest_class_has_groups_and_says_so(home: Path) -> None:
    ds = cached(home, [0] * 40 + [1] * 40 + [2] * 4)
    ranking = rank(ds, ["one"], home=home)
    (note,) = [note for note in ranking.notes if "folds in place of 5" in note]
    folds = int(note.split()[0])
    plan = plan_splits(ds, subsets=["F"], folds=folds)
    assert folds == sum(int(ds.labels[i] == 2) for i in range(84) if i not in plan.test)
    assert "of c" in note
    assert ranking.n_train + len(plan.val[0, "F"]) == pytest.approx(ranking.labels_used, abs=1)
    assert ranking.labels_used == 84 - len(plan.test)


def test_rank_by_logme_alone_where_a_class_has_one_group(home: Path) -> None:
    ds = cached(home, [0, 1, 2, 3, 4] * 2)
    ranking = rank(ds, home=home)
    pool = sorted(set(range(10)) - set(plan_test(ds)))
    assert ranking.n_train == ranking.labels_used == len(pool)
    assert any("LogME alone" in note for note in ranking.notes)
    for seed, row in enumerate(sorted(ranking.rows, key=lambda row: row.backbone)):
        assert row.logme == pytest.approx(logme(make_features(ds, 12, seed=seed)[pool], ds.labels[pool]))
        assert np.isnan(row.knn)
    assert [row.place for row in ranking.rows] == [1, 2]
    with pytest.raises(ProtocolError):
        rank(ds, home=home, subset=6)


def plan_test(ds: ImageDataset) -> list[int]:
    """Rows of the local test set, which depends on no folds."""
    return divide(ds).test.tolist()
