"""`tsne`, `attention`, `neighbors` and `audit` as a user types them."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from embcache.errors import EmbcacheError, UsageError
from embcache.probe.probe import probe_features
from tests.commands.shell import embcache
from tests.probe.build import make_dataset, make_features, put_store
from tests.refusal import refused


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


@pytest.fixture(scope="module")
def made_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    home = tmp_path_factory.mktemp("made") / "home"
    ds = make_dataset(np.tile([0, 1], 60), split=["train"] * 80 + ["test"] * 40)
    for seed, (name, shift) in enumerate((("good", 4.0), ("weak", 0.5))):
        put_store(home, ds, name, make_features(ds, 10, shift=shift, seed=seed))
    result = probe_features(
        ds, ["good", "weak"], head="dvme", folds=2, subset=20, home=home, head_options={"proj_dim": 6}
    )
    return home, result.id


@pytest.fixture
def run(made_run: tuple[Path, str], home: Path) -> str:
    """Id of a DVME run over two backbones of the dataset ``toy``."""
    shutil.copytree(made_run[0], home)
    return made_run[1]


def test_tsne_writes_figures_points_and_a_table(run: str, home: Path, tmp_path: Path) -> None:
    shown = embcache(
        "tsne", "--dataset", "toy", "--backbone", "good", "--run", run[:14], "--method", "pca",
        "--output", f"{tmp_path / 'a.png'},{tmp_path / 'a.svg'}", "--coordinates", tmp_path / "points.csv",
    )  # fmt: skip
    assert "trained with labels" in shown.stdout
    assert (tmp_path / "a.png").is_file()
    assert (tmp_path / "a.svg").is_file()
    rows = read_csv(tmp_path / "points.csv")
    assert len(rows) == 2 * 40
    assert {row["class_name"] for row in rows} == {"a", "b"}
    answer = json.loads(embcache("tsne", "--dataset", "toy", "--method", "pca", "--json", "-").stdout)
    assert [panel["embedding"] for panel in answer["panels"]] == ["good", "weak"]
    assert np.array(answer["panels"][0]["coordinates"]).shape == (40, 2)
    assert answer["figures"] == [str(home / "toy" / "figures" / "pca.png")]
    assert answer["panels"][0]["silhouette"] > answer["panels"][1]["silhouette"]
    embcache("tsne", "--dataset", "toy", "--method", "pca", "--coordinates", tmp_path / "points.parquet")
    assert list(pd.read_parquet(tmp_path / "points.parquet").columns) == [
        "embedding", "id", "label", "class_name", "x", "y",
    ]  # fmt: skip


def test_attention_of_a_run_in_words_and_data(run: str, tmp_path: Path) -> None:
    shown = embcache("attention", "--run", run, "--output", tmp_path / "f1.pdf").stdout
    assert "±" in shown
    assert "entropy" in shown
    assert "a alone" in shown
    answer = json.loads(embcache("attention", "--run", run, "--output", tmp_path / "f1.png", "--json", "-").stdout)
    assert np.array(answer["mass"]).shape == (2, 2)
    np.testing.assert_allclose(np.sum(answer["mass"], axis=1), 1, atol=1e-5)
    assert set(answer["by_class"]) == {"a", "b"}
    assert answer["figures"] == [str(tmp_path / "f1.png")]


def test_neighbors_say_that_the_images_are_not_here(run: str, tmp_path: Path) -> None:
    shown = embcache("neighbors", "--image", "i7", "-k", 3, "--dataset", "toy", "--output", tmp_path / "n.png").stdout
    assert "the images are missing" in shown
    answer = json.loads(
        embcache("neighbors", "--image", "i7", "-k", 3, "--dataset", "toy", "--output", tmp_path / "n.png",
                 "--json", "-").stdout
    )  # fmt: skip
    assert [(found["backbone"], len(found["nearest"])) for found in answer] == [("good", 3), ("weak", 3)]


def test_audit_prints_and_writes_what_to_leave_out(home: Path, tmp_path: Path) -> None:
    labels = np.tile([0, 1], 60)
    ds = make_dataset(labels, split=["train"] * 80 + ["test"] * 40)
    x = make_features(ds, 10, shift=12.0)
    labels[[4, 100]] = 1 - labels[[4, 100]]
    put_store(home, make_dataset(labels, split=["train"] * 80 + ["test"] * 40), "good", x)
    target = tmp_path / "exclude.csv"
    shown = embcache("audit", "--dataset", "toy", "--similarity", "1", "--output", target).stdout
    assert "likely label errors: 1 of 80 training labels, 1 of 40 test labels" in shown
    assert "to leave out: 1 of 80 training images" in shown
    assert "without those to leave out" in shown
    (row,) = read_csv(target)
    assert row["id"] == "i4"
    answer = json.loads(embcache("audit", "--dataset", "toy", "--similarity", "1", "--json", "-").stdout)
    assert [id_ for id_, _ in answer["exclude"]] == ["i4"]
    assert (answer["images"], answer["test_images"]) == (80, 40)
    few = embcache("audit", "--dataset", "toy", "--most", "0").stdout
    assert "only the most confident are listed" in few


def test_audit_says_where_the_model_is_too_weak(run: str, tmp_path: Path) -> None:
    target = tmp_path / "exclude.csv"
    shown = embcache("audit", "--dataset", "toy", "--backbone", "weak", "--output", target).stdout
    assert "this model is too weak to judge labels" in shown
    assert not any("label error" in row["reason"] for row in read_csv(target))


def test_audit_writes_its_list_where_the_effect_cannot_be_told(home: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frames = rng.normal(size=10) * 5 + rng.normal(size=(30, 10)) * 1e-3
    ds = make_dataset([0] * 30 + [1] * 60, [f"video{k // 3}" for k in range(30)] + [f"p{k}" for k in range(60)])
    put_store(home, ds, "good", np.concatenate([frames, rng.normal(size=(60, 10))]).astype(np.float32))
    target = tmp_path / "exclude.csv"
    done = embcache("audit", "--dataset", "toy", "--output", target)
    assert done.exit_code == 0
    assert "effect: cannot be measured: a would be gone" in done.stdout
    assert sum("near-duplicate" in row["reason"] for row in read_csv(target)) == 24


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("tsne", "--dataset", "toy", "--output", "map.gif"), "other-suffix"),
        (("tsne", "--dataset", "toy", "--coordinates", "points.txt"), "other-suffix"),
        (("tsne", "--dataset", "toy", "--limit", "3"), "option-bounds"),
        (("tsne", "--dataset", "toy", "--perplexity", "0"), "option-bounds"),
        (("tsne", "--dataset", "toy,other"), "one-dataset"),
        (("tsne",), "one-dataset"),
        (("attention",), "nothing-named"),
        (("attention", "--run", "x", "--image", "y.png"), "nothing-named"),
        (("attention", "--run", "x", "--backbone", "dino"), "unused-option"),
        (("attention", "--image", "x.png", "--backbone", "dino,random"), "several-backbones"),
        (("audit", "--dataset", "toy", "--backbone", "good,weak"), "one-dataset"),
        (("audit", "--dataset", "toy", "--show", "-1"), "option-bounds"),
        (("audit", "--dataset", "toy", "--similarity", "2"), "option-bounds"),
        (("audit", "--dataset", "toy", "--most", "-1"), "option-bounds"),
    ],
)
def test_slips_are_told(run: str, words: tuple[str, ...], code: str) -> None:
    with refused(UsageError, code):
        embcache(*words)


def test_a_run_or_image_that_is_not_there_is_told(run: str) -> None:
    with pytest.raises(EmbcacheError, match="no such run"):
        embcache("attention", "--run", "dvme-S-none")
    with pytest.raises(EmbcacheError, match=r"nowhere\.png"):
        embcache("attention", "--image", "nowhere.png", "--backbone", "random")
