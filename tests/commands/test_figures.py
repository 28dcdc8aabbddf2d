"""The commands that draw, as a user types them: figures, lists, and the sentences of `results` and `curves`."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import confusion_matrix

from embcache.errors import EmbcacheError, UsageError
from embcache.probe.probe import probe_features
from embcache.runs.folders import find_run_anywhere, load_predictions
from tests.commands.shell import answer, embcache
from tests.probe.build import make_dataset, make_features, put_store
from tests.refusal import refused


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    home = tmp_path_factory.mktemp("made") / "home"
    ds = make_dataset(np.tile([0, 1], 60), split=["train"] * 80 + ["test"] * 40)
    found = []
    for seed, (name, shift) in enumerate((("good", 4.0), ("weak", 0.5))):
        put_store(home, ds, name, make_features(ds, 10, shift=shift, seed=seed))
        found += [probe_features(ds, name, folds=2, subset=n, home=home) for n in (12, 40)]
    fused = probe_features(
        ds, ["good", "weak"], head="dvme", folds=2, subset=20, home=home, head_options={"proj_dim": 6}
    )
    return home, found[2].id, fused.id


@pytest.fixture
def run(made: tuple[Path, str, str], home: Path) -> str:
    """ID of a linear run over the weaker of two backbones; a DVME run over both is beside it."""
    shutil.copytree(made[0], home)
    return made[1]


@pytest.fixture
def fused(made: tuple[Path, str, str], run: str) -> str:
    """ID of the DVME run."""
    return made[2]


def test_tsne_writes_figures_points_and_a_table(fused: str, home: Path, tmp_path: Path) -> None:
    shown = embcache(
        "tsne", "--dataset", "toy", "--backbone", "good", "--run", fused[:14], "--method", "pca",
        "--output", f"{tmp_path / 'a.png'},{tmp_path / 'a.svg'}", "--coordinates", tmp_path / "points.csv",
    )  # fmt: skip
    assert "trained with labels" in shown.stdout
    assert (tmp_path / "a.png").is_file()
    assert (tmp_path / "a.svg").is_file()
    rows = read_csv(tmp_path / "points.csv")
    assert len(rows) == 2 * 40
    assert {row["class_name"] for row in rows} == {"a", "b"}
    found = answer("tsne", "--dataset", "toy", "--method", "pca")
    assert [panel["embedding"] for panel in found["panels"]] == ["good", "weak"]
    assert np.array(found["panels"][0]["coordinates"]).shape == (40, 2)
    assert found["figures"] == [str(home / "toy" / "figures" / "pca.png")]
    assert found["panels"][0]["silhouette"] > found["panels"][1]["silhouette"]
    embcache("tsne", "--dataset", "toy", "--method", "pca", "--coordinates", tmp_path / "points.parquet")
    assert list(pd.read_parquet(tmp_path / "points.parquet").columns) == [
        "embedding", "id", "label", "class_name", "x", "y",
    ]  # fmt: skip


def test_attention_of_a_run_in_words_and_data(fused: str, tmp_path: Path) -> None:
    shown = embcache("attention", "--run", fused, "--output", tmp_path / "f1.pdf").stdout
    assert "±" in shown
    assert "entropy" in shown
    assert "a alone" in shown
    found = answer("attention", "--run", fused, "--output", tmp_path / "f1.png")
    assert np.array(found["mass"]).shape == (2, 2)
    np.testing.assert_allclose(np.sum(found["mass"], axis=1), 1, atol=1e-5)
    assert set(found["by_class"]) == {"a", "b"}
    assert found["figures"] == [str(tmp_path / "f1.png")]


def test_neighbors_say_that_the_images_are_not_here(run: str, tmp_path: Path) -> None:
    shown = embcache("neighbors", "--image", "i7", "-k", 3, "--dataset", "toy", "--output", tmp_path / "n.png").stdout
    assert "the images are missing" in shown
    shown = answer("neighbors", "--image", "i7", "-k", 3, "--dataset", "toy", "--output", tmp_path / "n.png")
    assert [(found["backbone"], len(found["nearest"])) for found in shown] == [("good", 3), ("weak", 3)]


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
    found = answer("audit", "--dataset", "toy", "--similarity", "1")
    assert [id_ for id_, _ in found["exclude"]] == ["i4"]
    assert (found["images"], found["test_images"]) == (80, 40)
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


@pytest.mark.parametrize("words", [("tsne",), ("neighbors", "--image", "x", "--dataset", "toy,other")])
def test_commands_of_many_backbones_ask_for_one_dataset_alone(words: tuple[str, ...]) -> None:
    with refused(UsageError, "one-dataset") as caught:
        embcache(*words)
    assert "backbone" not in str(caught.value)


def test_slips_are_refused_before_anything_is_computed(run: str) -> None:
    for line, code in {
        "tsne --dataset toy --output map.gif": "other-suffix",
        "tsne --dataset toy --coordinates points.txt": "other-suffix",
        "tsne --dataset toy --limit 3": "option-bounds",
        "tsne --dataset toy,other": "one-dataset",
        "tsne": "one-dataset",
        "errors RUN --most 0": "option-bounds",
        "attention": "nothing-named",
        "attention --run x --image y.png": "nothing-named",
        "attention --run x --backbone dino": "unused-option",
        "attention --image x.png --backbone dino,random": "several-backbones",
        "audit --dataset toy --backbone good,weak": "one-dataset",
        "audit --dataset toy --show -1": "option-bounds",
        "audit --dataset toy --similarity 2": "option-bounds",
        "errors RUN --output list.txt": "other-suffix",
        "errors RUN --output absent/list.csv": "file-not-written",
        "plot RUN --kind lift": "option-choice",
        "plot RUN --positive c": "unknown-class",
        "plot RUN --output a.gif": "other-suffix",
        "plot RUN --output absent/a.png": "file-not-written",
    }.items():
        with refused(UsageError, code):
            embcache(*(run if word == "RUN" else word for word in line.split()))
    for words in (("--run", "dvme-S-none"), ("--image", "nowhere.png", "--backbone", "random")):
        with pytest.raises(EmbcacheError, match=words[1]):
            embcache("attention", *words)


def test_errors_writes_the_list_and_says_that_the_images_are_not_there(run: str, home: Path, tmp_path: Path) -> None:
    done = embcache("errors", run)
    folder = home / "toy" / "figures"
    assert [path.name for path in folder.iterdir()] == [f"errors-{run}.csv"]
    assert "no contact sheet: " in done.stdout
    assert f"list: {folder / f'errors-{run}.csv'}" in done.stdout
    rows = list(csv.DictReader((folder / f"errors-{run}.csv").read_text("utf-8").splitlines()))
    table = load_predictions(find_run_anywhere(run, home)[1])
    p = table.groupby("id")[["p_0", "p_1"]].mean()
    wrong = p.to_numpy().argmax(1) != table.groupby("id")["label"].first()
    assert {row["id"] for row in rows} == set(p.index[wrong])
    assert f"{run} gets {wrong.sum()} of 40 test images wrong (mean of 2 models' probabilities)" in done.stdout
    found = answer("errors", run, "--most", 2, "--groups", "--output", tmp_path / "few.csv")
    assert len((tmp_path / "few.csv").read_text("utf-8").splitlines()) == 3
    assert (found["mistakes"], len(found["errors"])) == (wrong.sum(), 2)
    assert found["errors"][0]["group"] == found["errors"][0]["id"]


def test_plot_draws_a_run_in_every_format(run: str, tmp_path: Path) -> None:
    kinds = {"roc": "png,svg,pdf", "pr": "png", "confusion": "svg", "calibration": "pdf"}
    starts = {"png": b"\x89PNG", "svg": b"<?xm", "pdf": b"%PDF"}
    for kind, suffixes in kinds.items():
        files = [tmp_path / f"{kind}.{suffix}" for suffix in suffixes.split(",")]
        words = ["--kind", kind, "--output", ",".join(map(str, files)), "--json", tmp_path / "a.json"]
        done = embcache("plot", run, *words)
        assert [path.read_bytes()[:4] for path in files] == [starts[path.suffix[1:]] for path in files]
        found = json.loads((tmp_path / "a.json").read_text("utf-8"))
        assert (found["kind"], found["positive"]) == (kind, "" if kind == "confusion" else "b")
        assert found["figures"] == [str(path) for path in files]
        assert ("positive: b, 20 of 40 test images" in done.stdout) == (kind != "confusion")


def test_the_curve_has_the_scores_of_the_run_and_any_class_can_be_positive(run: str, home: Path) -> None:
    result, _ = find_run_anywhere(run, home)
    assert result.estimate is not None
    found = answer("plot", run)
    (value,) = found["values"]
    assert value["mean"]["mean"] == pytest.approx(result.mean)
    assert value["mean"]["new_model"] == pytest.approx(list(result.estimate.new_model or ()))
    assert value["ensemble"]["mean"] == pytest.approx(result.ensemble["estimate"]["mean"])
    other = answer("plot", run, "--positive", "a")
    assert other["positive"] == "a"
    assert other["values"][0]["mean"]["mean"] == pytest.approx(result.mean)
    assert (home / "toy" / "figures" / f"roc-{run}.png").is_file()


def test_the_confusion_matrix_counts_the_ensemble(run: str, home: Path) -> None:
    table = load_predictions(find_run_anywhere(run, home)[1])
    p = table.groupby("id")[["p_0", "p_1"]].mean().to_numpy()
    wanted = confusion_matrix(table.groupby("id")["label"].first(), p.argmax(1))
    values = answer("plot", run, "--kind", "confusion")["values"]
    assert [[row["predicted"]["a"], row["predicted"]["b"]] for row in values] == wanted.tolist()


def test_results_and_curves_say_which_backbone_and_whether_more_labels_help(
    run: str, home: Path, tmp_path: Path
) -> None:
    lines = embcache("results").stdout.splitlines()
    assert lines[-2].startswith(
        "Take good: it scored best on validation with 40 training labels and reaches a test AUC"
    )
    assert "good (linear) reaches a test AUC of" in lines[-1]
    figure = tmp_path / "c.png"
    done = embcache("curves", "--metric", "brier,auc", "--figure", figure, "--json", tmp_path / "c.json")
    assert figure.is_file()
    assert "toy (Brier score)" in done.stdout
    found = json.loads((tmp_path / "c.json").read_text("utf-8"))
    assert [advice["metric"] for advice in found["advice"]] == ["brier", "auc"]
    assert {r["metric"] for r in found["records"]} == {"brier", "auc"}
    assert any("95 % interval for new patients and a newly trained model" in note for note in found["notes"])
    assert len(answer("results")) == 5
