"""The page of findings and of a number: its numbers, and that every section holds."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, mean_absolute_error, r2_score, roc_auc_score

from embcache.data.dataset import ImageDataset
from embcache.probe.probe import probe_features
from embcache.report.cohort import unequal_classes
from embcache.report.collect import choose, collect_parts
from embcache.report.page import write_report
from embcache.report.sections import finding_table, task_section
from tests.figures.kinds import findings_of, grades_of, make_study, number_of
from tests.probe.build import put_store


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ImageDataset]:
    """Runs of classes, of findings and of a number of one dataset, two heads each."""
    home = tmp_path_factory.mktemp("kinds")
    ds, _ = make_study(home)
    for of in (ds, findings_of(ds), number_of(ds)):
        for head in ("ridge", "knn"):
            for subset in ("M", "F"):
                probe_features(of, ["net"], head=head, subset=subset, home=home, folds=3)
    return home, ds


def test_a_page_has_every_kind_of_target(study: tuple[Path, ImageDataset], tmp_path: Path) -> None:
    home, ds = study
    done = write_report(tmp_path / "page.html", [ds.name], home=home)
    assert len(done.headlines) == 3
    assert not done.notes
    text = re.sub(r"<(script|style)\b.*?</\1>", "", done.path.read_text("utf-8"), flags=re.S)
    for words in ("age: predicted by the ensemble", "limits of agreement", "patients with it", "Spearman", "micro AUC"):
        assert words in text
    assert "the metric" not in text
    by_r2 = write_report(tmp_path / "r2.html", [ds.name], metrics=["mae"], home=home)
    assert "test MAE of" in by_r2.headlines[2]
    assert "test macro AUC of" in by_r2.headlines[1]


def test_findings_and_numbers_have_the_scores_of_scikit_learn(study: tuple[Path, ImageDataset]) -> None:
    home, _ = study
    (part,) = collect_parts([], home=home)
    _, findings, number = part.tasks
    choices = choose(findings, part, resamples=50)
    tested = choices[-1].chosen.tested
    table = finding_table(tested, "m")
    for c, row in enumerate(table.rows):
        known = tested.labels[:, c] >= 0
        y = tested.labels[known, c]
        assert row[1:4] == (f"{known.sum():,}", f"{y.sum():,}", f"{len(set(tested.groups[known][y == 1])):,}")
        for cell, metric in ((row[4], roc_auc_score), (row[5], average_precision_score)):
            assert cell.startswith(f"{np.mean([metric(y, z[known, c]) for z in tested.predictions.logits]):.3f} ± ")
    assert "too few patients: 2 of rare, 5 needed" in table.rows[2][4]
    choices = choose(number, part, resamples=50)
    section = task_section(number, part, choices, "t")
    tested = choices[-1].chosen.tested
    y, numbers = tested.labels, tested.predictions.logits[..., 0]
    size = section["sizes"][0]
    scores = {row[0]: row for row in size["others"].rows}
    assert scores["MAE"][1].startswith(f"{np.mean([mean_absolute_error(y, z) for z in numbers]):.3f} ± ")
    assert scores["R²"][2].startswith(f"{r2_score(y, numbers.mean(0)):.3f} (")
    assert scores["MAE"][-1] == f"{tested.result.baseline['mae']:.3f}"
    assert [chart.id for chart in section["charts"][1:3]] == ["t-1-scatter", "t-1-residual"]


def test_grades_have_kappa_an_error_in_grades_and_a_confusion_in_their_order(tmp_path: Path) -> None:
    ds, _ = make_study(tmp_path)
    probe_features(grades_of(ds), ["net"], head="linear", subset="F", home=tmp_path, folds=3)
    (part,) = collect_parts([], home=tmp_path)
    choices = choose(part.tasks[0], part, resamples=50)
    tested = choices[-1].chosen.tested
    size = task_section(part.tasks[0], part, choices, "t")["sizes"][0]
    scores = {row[0]: row for row in size["others"].rows}
    y, called = tested.labels, tested.predictions.logits.argmax(2)
    assert tested.predictions.task.kind == "ordinal"
    assert part.tasks[0].metric == "kappa"
    assert scores["MAE"][1].startswith(f"{np.mean([mean_absolute_error(y, of) for of in called]):.3f} ± ")
    assert [name for name, _ in size["confusion"]] == ["0", "1", "2", "3"]
    assert "MAE: of the most probable grade, in grades" in size["others"].notes


def test_a_dataset_of_findings_or_of_a_number_has_a_map_of_its_own(tmp_path: Path) -> None:
    for kind in (findings_of, number_of):
        home = tmp_path / kind.__name__
        ds, x = make_study(home)
        of = kind(ds)
        put_store(home, of, "net", x)  # its table is the snapshot
        probe_features(of, ["net"], head="ridge", subset="F", home=home, folds=3)
        done = write_report(home / "page.html", [ds.name], home=home)
        text = done.path.read_text("utf-8")
        assert ("age up to" in text) == (kind is number_of)
        (part,) = collect_parts([], home=home)
        words = "fifths of its values" if kind is number_of else "stratified by findings"
        assert words in text
        lines = unequal_classes(part)
        assert lines == (["fewer than 5 test patients have rare (2)"] if kind is findings_of else [])
