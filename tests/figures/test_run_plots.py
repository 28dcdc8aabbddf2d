"""Figures of one run by the kind of its target: their numbers are those of other libraries, misfits are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score, confusion_matrix, mean_absolute_error, r2_score, roc_auc_score

from embcache.errors import ProtocolError, UsageError
from embcache.figures.run_plots import KINDS, OF_CLASSES, default_kind, draw_run
from embcache.probe.probe import probe_features
from embcache.results.compare import Tested, load_tested
from embcache.runs.folders import runs_dir
from tests.figures.kinds import findings_of, make_study, number_of
from tests.refusal import refused


@pytest.fixture(scope="module")
def tested(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tested]:
    """A run of classes, one of findings and one of a number."""
    home = tmp_path_factory.mktemp("kinds")
    ds, _ = make_study(home)
    found = {}
    for kind, of in {"classes": ds, "findings": findings_of(ds), "number": number_of(ds)}.items():
        result = probe_features(of, ["net"], head="ridge", subset="F", home=home, folds=3)
        found[kind] = load_tested(result, runs_dir(ds.name, home) / result.id)
    return found


@pytest.mark.parametrize(("kind", "metric"), [("roc", roc_auc_score), ("pr", average_precision_score)])
def test_each_finding_has_a_curve_on_the_images_of_which_it_is_known(tested, kind, metric, tmp_path: Path) -> None:
    t = tested["findings"]
    drawn = draw_run(t, kind, [tmp_path / "f.png"])
    assert [record["finding"] for record in drawn.records] == ["a", "b", "rare"]
    for c, record in enumerate(drawn.records):
        y = t.labels[:, c]
        known = y >= 0
        each = [metric(y[known], z[known, c]) for z in t.predictions.logits]
        assert record["mean"]["mean"] == pytest.approx(np.mean(each))
        assert record["images"] == (y == 1).sum()
        assert record["groups"] == len(set(t.groups[y == 1]))
    assert "too few patients: 2 of rare, 5 needed" in drawn.rows[2][4]
    assert len(draw_run(t, kind, [tmp_path / "g.png"], positive="b").records) == 1
    with Image.open(tmp_path / "f.png") as picture:
        assert picture.width > 1000


def test_confusion_of_findings_counts_each_by_itself(tested, tmp_path: Path) -> None:
    t = tested["findings"]
    drawn = draw_run(t, "confusion", [tmp_path / "f.png"])
    p = t.predictions.ensemble().p[0]
    for c, record in enumerate(drawn.records):
        known = t.labels[:, c] >= 0
        (tn, fp), (fn, tp) = confusion_matrix(t.labels[known, c], p[known, c] > 0.5)
        assert list(record.values())[1:] == [tp, fn, fp, tn]
    assert len(draw_run(t, "calibration", [tmp_path / "c.png"]).records) == 6  # mean of models and ensemble


def test_a_number_is_drawn_with_its_scores_and_limits_of_agreement(tested, tmp_path: Path) -> None:
    t = tested["number"]
    y, numbers = t.labels, t.predictions.logits[..., 0]
    for kind in ("scatter", "residual"):
        drawn = draw_run(t, kind, [tmp_path / f"{kind}.png"])
        records = {record.get("metric", ""): record for record in drawn.records}
        assert records["r2"]["mean"]["mean"] == pytest.approx(np.mean([r2_score(y, z) for z in numbers]))
        assert records["mae"]["ensemble"]["mean"] == pytest.approx(mean_absolute_error(y, numbers.mean(0)))
        assert records["r2"]["baseline"] == t.result.baseline["r2"]
        assert records["r2"]["baseline"] <= 0
        error = numbers.mean(0) - y
        assert records[""]["mean_error"] == pytest.approx(error.mean())
        assert records[""]["high"] - records[""]["low"] == pytest.approx(2 * 1.96 * error.std(ddof=1))
        with Image.open(tmp_path / f"{kind}.png") as picture:
            assert picture.width > 1000


def test_what_does_not_fit_is_refused_and_says_what_does(tested, tmp_path: Path) -> None:
    targets = [tmp_path / "none.png"]
    for name, t in tested.items():
        assert default_kind(t.result) == ("scatter" if name == "number" else "roc")
        for kind in KINDS:
            if (kind in OF_CLASSES) == (name == "number"):
                with refused(ProtocolError, "figure-does-not-fit") as caught:
                    draw_run(t, kind, targets)
                assert str(caught.value.fix) == f"--kind {default_kind(t.result)}"
    with refused(UsageError, "unknown-finding"):
        draw_run(tested["findings"], "roc", targets, positive="c")
    with refused(UsageError, "unused-option"):
        draw_run(tested["number"], "scatter", targets, positive="age")
    assert not targets[0].exists()
