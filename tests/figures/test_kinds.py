"""Audit, ranking, maps, neighbors and attention of findings and numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import median_abs_deviation
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score, roc_auc_score
from sklearn.preprocessing import StandardScaler, normalize
from typer.testing import CliRunner

from embcache.cli import app
from embcache.data.classes import retarget
from embcache.data.dataset import ImageDataset
from embcache.errors import UsageError
from embcache.figures.attention import run_attention
from embcache.figures.audit import FAR, audit_dataset
from embcache.figures.maps import draw_maps
from embcache.figures.neighbors import draw_neighbors, find_neighbors
from embcache.figures.rank import rank
from embcache.figures.shown import colors_of
from embcache.probe.probe import probe_features
from embcache.probe.protocol import plan_splits
from embcache.runs.folders import runs_dir
from embcache.targets import make_target
from tests.figures.kinds import TEST, N, findings_of, make_study, number_of
from tests.probe.build import put_store
from tests.refusal import refused


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ImageDataset, np.ndarray]:
    home = tmp_path_factory.mktemp("kinds")
    return home, *make_study(home, i100=119.0, i150=1.0, i10=118.0)


def test_numbers_far_from_what_is_predicted_are_found(study) -> None:
    home, ds, x = study
    found = audit_dataset(number_of(ds), "net", home=home)
    assert {r.id for r in found.residuals} == {"i100", "i150", "i10"}
    assert [abs(r.deviations) for r in found.residuals] == sorted(abs(r.deviations) for r in found.residuals)[::-1]
    assert {r.id: r.split for r in found.residuals}["i10"] == "test"
    excluded = dict(found.exclude)
    assert {"i100", "i150"} <= set(excluded)
    assert "i10" not in excluded
    assert excluded["i100"].startswith("age 119, predicted ")
    assert found.judge is not None
    assert found.judge.r2 is not None
    assert not found.judge.too_weak
    # About what scikit-learn's ridge regression leaves, and in units of its errors.
    y = ds.table["age"].astype(float).to_numpy()
    train = np.arange(TEST, N)
    error = RidgeCV(np.logspace(-2, 6, 9)).fit(x[train], y[train]).predict(x[train]) - y[train]
    own = {r.id: r.deviations for r in found.residuals}["i100"]
    deviation = (error[100 - TEST] - np.median(error)) / (1.4826 * median_abs_deviation(error))
    assert own == pytest.approx(deviation, rel=0.3)
    assert abs(own) > FAR
    assert found.effect is not None
    assert found.effect.metric == "r2"
    assert found.effect.after[0] > found.effect.before[0]
    assert r2_score(y[:TEST], x[:TEST, 2] * 10 + 50) > 0.0  # the test set can be predicted at all


def test_features_that_know_nothing_judge_no_number(study, tmp_path: Path) -> None:
    _, ds, x = study
    put_store(tmp_path, ds, "net", np.random.default_rng(5).normal(size=x.shape).astype(np.float32))
    found = audit_dataset(number_of(ds), "net", home=tmp_path)
    assert found.judge is not None
    assert found.judge.too_weak
    assert not found.exclude


def test_each_finding_is_judged_by_itself(study, tmp_path: Path) -> None:
    _, ds, x = study
    own = findings_of(ds, "a,b")
    own.table.loc[own.table["id"] == "i120", "a"] = 1 - own.table.loc[own.table["id"] == "i120", "a"]
    x = x.copy()
    x[:, 0] += 12 * ds.table["a"].astype(int).to_numpy()
    put_store(tmp_path, ds, "net", x)
    found = audit_dataset(own, "net", home=tmp_path)
    error = found.label_errors[0]
    assert (error.id, error.finding) == ("i120", "a")
    assert error.label == 1 - error.proposed == int(own.table.set_index("id").loc["i120", "a"])
    assert found.judge is not None
    known = own.labels[TEST:] >= 0
    assert found.judge.labels == known.sum()
    assert any(name == "i120" and "likely label error" in why for name, why in found.exclude)
    assert found.effect is not None
    assert found.effect.metric == "macro_auc"


def test_near_duplicates_are_compared_by_kind(study, tmp_path: Path) -> None:
    _, ds, x = study
    x = x.copy()
    x[201], x[203] = x[121] + 1e-4, x[122] + 1e-4
    put_store(tmp_path, ds, "net", x)
    ds.table.loc[201, ["age", "b"]] = ["51.0", ""]
    ds.table.loc[121, ["age", "a", "b"]] = ["51.9", ds.table.loc[201, "a"], "1"]
    ds.table.loc[203, ["age", "a"]] = ["20.0", "0"]
    ds.table.loc[122, ["age", "a"]] = ["51.0", "1"]
    for of in (number_of(ds), findings_of(ds, "a,b")):
        pairs = audit_dataset(of, "net", home=tmp_path, similarity=0.9999).pairs
        assert {(p.one, p.other): p.same_label for p in pairs} == {("i121", "i201"): True, ("i122", "i203"): False}


def test_backbones_are_ranked_for_a_number_and_findings(study, tmp_path: Path) -> None:
    home, ds, x = study
    for name, of in {"age": number_of(ds), "a,b": findings_of(ds, "a,b")}.items():
        for k, noise in enumerate((0.0, 1.0, 4.0)):
            more = np.random.default_rng(k).normal(size=x.shape).astype(np.float32)
            put_store(tmp_path / name, ds, f"net{k}", x + noise * more)
        for k in range(3):
            probe_features(of, [f"net{k}"], subset=50, home=tmp_path / name)
        found = rank(of, home=tmp_path / name, subset="F")
        assert [row.backbone for row in found.rows] == ["net0", "net1", "net2"]
        assert all(np.isnan([row.h_score, row.centroid]).all() for row in found.rows)
        assert {c.score for c in found.correlations} == {"logme", "knn", "place"}
        assert all(set(row.probes) == {"50"} for row in found.rows)
        plan, reached = plan_splits(of, subsets=["F"]), list[float]()
        for fold in range(5):
            train, val = plan.train[fold, "F"], plan.val[fold, "F"]
            scaler = StandardScaler().fit(x[train].astype(np.float64))
            z, h = (normalize(scaler.transform(rows.astype(np.float64))) for rows in (x[train], x[val]))
            cosine = h @ z.T
            near = np.argsort(-cosine, axis=1)[:, :20]
            votes = softmax(np.take_along_axis(cosine, near, 1) / 0.07, axis=1)
            y, held = plan.labels[train][near], plan.labels[val]
            if name == "age":
                reached.append(r2_score(held, (votes * y).sum(1)))
                continue
            share = [(votes * (of == 1)).sum(1) / (votes * (of >= 0)).sum(1) for of in np.moveaxis(y, 2, 0)]
            known = held >= 0
            reached.append(np.mean([roc_auc_score(held[known[:, c], c], share[c][known[:, c]]) for c in range(2)]))
        row = {row.backbone: row for row in found.rows}["net0"]
        assert row.knn == pytest.approx(np.mean(reached), abs=0.01)
    assert home.is_dir()


def test_maps_are_colored_by_kind_and_scored_where_images_are_of_classes(study, tmp_path: Path) -> None:
    home, ds, _ = study
    how = {"home": home, "method": "pca", "targets": [tmp_path / "map.png"]}
    number, findings = number_of(ds), findings_of(ds)
    maps = draw_maps(number, ["net"], **how)
    assert maps.panels[0].scores.silhouette is None
    assert maps.table()["label"].tolist() == number.labels[:TEST].tolist()
    assert draw_maps(findings, ["net"], **how).panels[0].scores.knn_accuracy is None
    one = draw_maps(findings, ["net"], positive="a", **how)
    assert one.panels[0].scores.silhouette is not None
    assert one.table()["class_name"].tolist() == [("no a", "a")[v] for v in findings.labels[:TEST, 0]]
    for other in (number, ds, findings):
        with refused(UsageError, "unknown-finding"):
            draw_maps(other, ["net"], positive="c", **how)


def test_colors_of_findings_name_the_one_that_is_present() -> None:
    task = make_target("findings", [f"f{k}" for k in range(8)])
    y = np.full((20, 8), -1)
    for k in range(7):
        y[: 10 - k, k] = 0
        y[k, k] = 1
    y[10:17] = 0
    y[10:17, :2] = 1
    y[17, 7], y[18, 7] = 1, 0
    colors = colors_of(task, y)
    named = [colors.names[value] for value in colors.values]
    assert named[:6] == [f"f{k}" for k in range(6)]
    assert named[6] == named[17] == "another finding"
    assert named[10] == "several findings"
    assert named[18] == named[19] == "none of them known to be present"
    assert not colors.classes
    assert colors_of(task, y, "f7").names == ("no f7", "f7", "not known")


def test_neighbors_have_findings_and_numbers_in_words(study, tmp_path: Path) -> None:
    home, ds, _ = study
    for of in (number_of(ds), findings_of(ds)):
        (found,) = find_neighbors(of, "i3", home=home, k=2)
        assert found.image.words == of.task.words(of.labels[3])
        assert found.to_json()["nearest"][0]["words"] == found.nearest[0].words
        assert draw_neighbors(of, [found], tmp_path / "sheet.png").is_file()


def test_attention_is_of_the_images_with_each_finding(study) -> None:
    home, ds, x = study
    put_store(home, ds, "other", x[:, ::-1].copy())
    for of, parts in ((findings_of(ds, "a,b"), {"a", "b"}), (number_of(ds), set())):
        options = {"head": "dvme", "head_options": {"proj_dim": 4}, "subset": 40, "folds": 2, "home": home}
        result = probe_features(of, ["net", "other"], **options)
        found = run_attention(of, result, runs_dir(of.name, home) / result.id, home=home)
        assert set(found.by_class) == parts
        assert found.mass.sum(1) == pytest.approx([1.0, 1.0], abs=1e-5)


@pytest.mark.parametrize(("target", "task"), [("age", "number"), ("a,b", "findings")])
def test_every_command_takes_a_number_and_findings(study, target: str, task: str, tmp_path: Path) -> None:
    _, ds, x = study
    own, number = tmp_path / "home", task == "number"
    how = ["--dataset", ds.name, "--target", target, "--task", task, "--home", str(own)]
    put_store(own, ds, "net", x)
    result = probe_features(retarget(ds, target, task), ["net"], head="ridge", subset="F", home=own, folds=3)
    at = ["--home", str(own), "--output"]
    words = {
        "audit": (["audit", *how], "numbers far from what is predicted of age" if number else "likely label"),
        "rank": (["rank", *how], "LogME, k-NN"),
        "tsne": (["tsne", *how, "--method", "pca", "--output", str(tmp_path / "m.png")], "trustworthiness"),
        "neighbors": (["neighbors", *how, "--image", "i3", "--output", str(tmp_path / "n.png")], "nearest to i3"),
        "errors": (
            ["errors", result.id, *at, str(tmp_path / "e.csv")],
            "largest" if number else "findings wrong",
        ),
        "plot": (["plot", result.id, *at, str(tmp_path / "p.png")], "R²" if number else "AUC"),
    }
    for name, (argv, said) in words.items():
        done = CliRunner().invoke(app, argv)
        assert done.exit_code == 0, f"{name}: {done.output}"
        assert said in done.output, f"{name}: {done.output}"
        data = CliRunner().invoke(app, [*argv, "--json", str(tmp_path / f"{name}.json")])
        assert data.exit_code == 0, f"{name}: {data.output}"
        assert json.loads((tmp_path / f"{name}.json").read_text())
