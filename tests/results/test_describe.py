"""Mistakes of a run's ensemble: which, in which order, and how they are written."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.special import expit, softmax

from embcache.figures.neighbors import draw_mistakes
from embcache.probe.predictions import Predictions
from embcache.results.compare import Tested
from embcache.results.mistakes import Miss, find_mistakes, mistakes_csv
from embcache.targets import make_target
from tests.probe.build import make_dataset
from tests.results.build import make_result

NAMES = ("normal", "mild", "severe")


def make_tested(logits: np.ndarray, labels: list[int], ids: list[str] | None = None) -> Tested:
    """A result of models with these logits (K, n, C); groups are the patients ``g0, g1, …``."""
    names = np.array(ids or [f"i{k}" for k in range(len(labels))], dtype=object)
    groups = np.array([f"g{k}" for k in range(len(labels))], dtype=object)
    found = Predictions(names, groups, np.array(labels), logits.astype(float), NAMES[: logits.shape[2]])
    return Tested(make_result(class_names=found.class_names), found)


def make_kind(kind: str, names: tuple[str, ...], y: np.ndarray, logits: np.ndarray) -> Tested:
    """As `make_tested`, of findings or a number."""
    ids, task = np.array([f"i{k}" for k in range(len(y))], dtype=object), make_target(kind, names)
    found = Predictions(ids, ids, y, logits.astype(float), names, target=task)
    return Tested(make_result(class_names=names), found)


def test_mistakes_are_those_of_the_mean_of_probabilities() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(0, 2, (4, 50, 3)), rng.integers(0, 3, 50)
    found = find_mistakes(make_tested(logits, labels.tolist()))
    p = softmax(logits, axis=2)
    mean = p.mean(0)
    wrong = [k for k in range(50) if mean[k].argmax() != labels[k]]
    assert 5 < len(wrong) < 50
    assert [m.id for m in found] == [f"i{k}" for k in sorted(wrong, key=lambda k: -mean[k].max())]
    for m in found:
        k = int(m.id[1:])
        called = int(mean[k].argmax())
        assert (m.label, m.predicted, m.group) == (NAMES[labels[k]], NAMES[called], f"g{k}")
        assert (m.p_label, m.p_predicted) == pytest.approx((mean[k][labels[k]], mean[k][called]), abs=1e-12)
        assert (m.models_agree, m.models) == ((p[:, k].argmax(1) == called).sum(), 4)


def test_mistakes_whose_probability_is_1_to_the_last_digit_are_still_ordered() -> None:
    logits = np.array([[[0.0, 60.0], [0.0, 900.0], [0.0, 50.0], [5.0, 0.0]]])
    assert [m.id for m in find_mistakes(make_tested(logits, [0, 0, 0, 0]))] == ["i1", "i0", "i2"]


def test_the_list_has_no_groups_unless_asked_and_no_formulas(tmp_path: Path) -> None:
    logits = np.array([[[0.0, 3.0], [0.0, 2.0]]])
    tested = make_tested(logits, [0, 0], ['=HYPERLINK("x")', "a,b\r"])
    tested = replace(tested, predictions=replace(tested.predictions, class_names=("+normal", "mild")))
    found = find_mistakes(tested)
    path = tmp_path / "list.csv"
    path.write_text(mistakes_csv(found), "utf-8", newline="")
    with path.open(newline="", encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert list(first) == ["id", "label", "predicted", "p_label", "p_predicted", "models_agree", "models"]
    assert (first["id"], first["label"], second["id"]) == ('\'=HYPERLINK("x")', "'+normal", "a,b\r")
    assert float(first["p_predicted"]) == found[0].p_predicted
    assert "group" in mistakes_csv(found, groups=True).splitlines()[0]
    assert "g0" not in mistakes_csv(found)


def test_of_findings_each_wrong_one_that_is_known_is_a_mistake() -> None:
    rng = np.random.default_rng(0)
    y, logits = rng.integers(-1, 2, (40, 3)), rng.normal(0, 2, (4, 40, 3))
    p = expit(logits).mean(0)
    found = find_mistakes(make_kind("findings", NAMES, y, logits))
    wrong = [(p[k, c] if y[k, c] == 0 else 1 - p[k, c], k, c)
             for k in range(40) for c in range(3) if y[k, c] >= 0 and (p[k, c] > 0.5) != y[k, c]]  # fmt: skip
    assert [m.id for m in found] == [f"i{k}" for _, k, _ in sorted(wrong, reverse=True)]
    for m, (p_called, k, c) in zip(found, sorted(wrong, reverse=True), strict=True):
        words = (f"no {NAMES[c]}", NAMES[c])
        assert (m.label, m.predicted) == (words[y[k, c]], words[1 - y[k, c]])
        assert (m.p_predicted, m.p_label) == pytest.approx((p_called, 1 - p_called), abs=1e-12)
        assert m.models_agree == ((logits[:, k, c] > 0) != y[k, c]).sum()


def test_of_numbers_the_largest_errors_come_first() -> None:
    rng = np.random.default_rng(0)
    y, numbers = rng.normal(50, 9, 30), rng.normal(50, 5, (4, 30, 1))
    found = find_mistakes(make_kind("number", ("age",), y, numbers))
    error = numbers.mean(0)[:, 0] - y
    assert [m.id for m in found] == [f"i{k}" for k in np.argsort(-np.abs(error))]
    sd = pd.DataFrame(numbers[..., 0].T).std(axis=1)
    for m in found:
        assert isinstance(m, Miss)
        k = int(m.id[1:])
        assert (m.value, m.error, m.models_sd) == pytest.approx((y[k], error[k], sd[k]))
    text = mistakes_csv(found)
    assert text.splitlines()[0] == "id,value,predicted,error,models_sd,models"
    one = find_mistakes(make_kind("number", ("age",), y, numbers[:1]))
    assert one[0].models_sd is None
    assert draw_mistakes(make_dataset([0]), one, "t", Path("none.png")) == 0


def test_a_sheet_of_images_that_are_there_and_none_of_others(tmp_path: Path) -> None:
    dataset = make_dataset([0] * 8)
    tested = make_tested(np.tile([0.0, 3.0], (1, 8, 1)), [0] * 8)
    found = find_mistakes(tested)
    target = tmp_path / "sheet.png"
    assert draw_mistakes(dataset, found, "t", target) == 0  # no folder
    assert not target.exists()
    for k in range(7):
        Image.new("RGB", (30 + k, 40), (20 * k, 0, 0)).save(tmp_path / f"i{k}.png")
    there = replace(dataset, root=tmp_path)
    assert draw_mistakes(there, [*found, replace(found[0], id="unknown")], "t", target) == 7
    with Image.open(target) as drawn:
        assert drawn.width > 1000
