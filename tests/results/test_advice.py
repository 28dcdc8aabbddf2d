"""Which backbone to take and whether more labels help: chosen on validation, told with what the test set shows."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import brentq
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from embcache.probe.metrics import METRICS, log_odds, metrics
from embcache.probe.predictions import Predictions
from embcache.probe.probe import probe_features
from embcache.probe.summary import in_metric
from embcache.results.advice import LabelsAdvice, advise, advise_backbone, advise_labels, doubling, sentences
from embcache.results.compare import Tested, compare_tested
from embcache.runs.folders import Result
from tests.probe.build import make_dataset, make_features, put_store
from tests.results.build import make_result

NAMES = ("healthy", "ill")


def at_size(n: int, aucs: list[float], *, seed: int = 0, each: int = 60, overlap: float | None = 0.0) -> Tested:
    """A result of one model for each AUC, on `each` patients a class: scores with the quantiles of that AUC's normals.

    Sizes share most of what makes a patient hard.
    """
    noise = np.random.default_rng(seed).normal(size=2 * each) * np.sqrt(0.8)
    noise += np.random.default_rng(n).normal(size=2 * each) * np.sqrt(0.2)
    y = np.repeat([0, 1], each)
    z = np.stack([noise + y * np.sqrt(2) * stats.norm.ppf(auc) for auc in aucs])
    ids = np.array([f"p{k:03}" for k in range(2 * each)], dtype=object)
    logits = np.stack([np.zeros_like(z), z], axis=-1)
    found = Predictions(ids, ids, y.astype(np.int64), logits, NAMES, overlap=overlap, folds=len(aucs))
    estimate = found.estimate("auc")
    result = make_result(
        tuple(found.scores("auc").values), n_train=n, subset=str(n), class_names=NAMES, mean=estimate.mean,
        id=f"linear-{n}", estimate=estimate,
    )  # fmt: skip
    return Tested(result, found)


def judged(curve: dict[int, list[float]], **changes: int) -> LabelsAdvice:
    return advise_labels("dino, linear", [at_size(n, aucs, **changes) for n, aucs in curve.items()])


def test_a_rise_that_chance_explains_is_no_rise() -> None:
    # 0.757, 0.790 and 0.784 with 20, 50 and 257 labels: folds as far apart as real ones are with so few.
    spread = np.array([-0.06, -0.03, 0.0, 0.03, 0.06])
    found = judged({n: list(mean + spread) for n, mean in ((20, 0.757), (50, 0.790), (257, 0.784))}, each=40)
    assert found.trend == "flat"
    assert found.doubling is not None
    assert found.doubling.interval is not None
    assert found.doubling.interval[0] < 0 < found.doubling.interval[1]
    assert found.text.startswith("No gain from more labels was shown: dino (linear) reaches a test AUC of ")
    assert "with 20, 50 and 257 training labels; a doubling changes it by" in found.text


def test_rising_to_the_end_and_rising_to_a_plateau() -> None:
    found = judged({20: [0.65] * 3, 100: [0.78] * 3, 500: [0.9] * 3})
    assert (found.trend, found.plateau_from) == ("rising", None)
    assert found.text.startswith("More labels still help: ")
    found = judged({20: [0.6] * 3, 50: [0.85] * 3, 200: [0.851] * 3, 800: [0.85] * 3})
    assert (found.trend, found.plateau_from) == ("plateau", 50)
    assert found.text.startswith("More labels help up to 50, beyond which no further gain was shown: ")
    assert found.last_doubling is not None
    assert found.last_doubling.interval is not None
    assert found.last_doubling.interval[0] < 0


def test_one_size_and_too_few_patients_tell_no_trend() -> None:
    found = judged({50: [0.7, 0.8]})
    assert (found.trend, found.doubling) == ("one size", None)
    assert "50 training labels" in found.text
    found = judged({50: [0.7, 0.8], 100: [0.9, 0.95]}, each=4)
    assert found.trend == "unknown"
    assert "too few patients: 4 of healthy, 4 of ill, 5 needed" in found.text


def test_a_doubling_is_the_slope_over_log2_of_labels() -> None:
    tested = [at_size(n, [a, a + 0.02]) for n, a in ((20, 0.6), (90, 0.8), (400, 0.7), (500, 0.75))]
    scores = [t.predictions.scores("auc") for t in tested]
    found = doubling(scores, tested)
    means = [np.mean([roc_auc_score(t.labels, log_odds(z)[:, 1]) for z in t.predictions.logits]) for t in tested]
    assert found.difference == pytest.approx(np.polyfit(np.log2([20, 90, 400, 500]), means, 1)[0], abs=1e-12)
    assert found.trained


def test_the_variance_of_a_doubling_is_that_of_patients_and_of_each_sizes_training() -> None:
    tested = [at_size(20, [0.6, 0.7, 0.8], overlap=0.1), at_size(80, [0.8, 0.82, 0.86], overlap=0.5)]
    scores = [t.predictions.scores("auc") for t in tested]
    found = doubling(scores, tested)

    def placements(t: Tested, z: np.ndarray) -> np.ndarray:  # of DeLong, Clarke-Pearson (1988), by comparing all pairs
        odds = z[:, 1] - z[:, 0]
        wins = (odds[t.labels == 1][:, None] > odds[t.labels == 0]) * 1.0
        return np.concatenate([(wins.mean(0) - wins.mean()) / 60, (wins.mean(1) - wins.mean()) / 60])

    each = [np.stack([placements(t, z) for z in t.predictions.logits]) for t in tested]
    factor = 60 / 59
    v_test = ((each[1].mean(0) - each[0].mean(0)) ** 2).sum() * factor / 4  # both weights are 1/2 = 1/log2(80/20)
    v_training = 0.0
    for t, moves, overlap in zip(tested, each, (0.1, 0.5), strict=True):
        covariance = moves @ moves.T * factor
        noise = np.diag(covariance).mean() - covariance[~np.eye(3, dtype=bool)].mean()
        values = [roc_auc_score(t.labels, z[:, 1] - z[:, 0]) for z in t.predictions.logits]
        sigma2 = max(0.0, np.var(values, ddof=1) - noise) / (1 - overlap)
        v_training += sigma2 * (1 / 3 + 2 / 3 * overlap) / 4
    assert v_training > 0
    assert found.interval is not None
    error = (found.interval[1] - found.interval[0]) / 2
    assert found.p is not None
    df = brentq(lambda d: stats.t.ppf(0.975, d) * np.sqrt(v_test + v_training) - error, 2, 200)
    assert 2 < df < 118
    assert found.p == pytest.approx(2 * stats.t.sf(abs(found.difference) / np.sqrt(v_test + v_training), df), rel=0.02)


@pytest.fixture(scope="module")
def made_saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Result]]:
    home = tmp_path_factory.mktemp("made") / "home"
    labels = np.tile([0, 1], 160)
    groups = [f"g{k // 4}-{k % 2}" for k in range(320)]
    ds = make_dataset(labels, groups, ["train"] * 160 + ["test"] * 160)
    results = []
    for name, shift in (("bad", 0.0), ("good", 4.0), ("same", 4.0)):
        put_store(home, ds, name, make_features(ds, shift=shift, seed=11 if name == "same" else len(name)))
        sizes = (60,) if name == "bad" else (12, 60)
        results += [probe_features(ds, name, folds=5, subset=n, home=home) for n in sizes]
    return home, results


@pytest.fixture
def saved(made_saved: tuple[Path, list[Result]], home: Path) -> list[Result]:
    """Results of three backbones, at two sizes, on patients with two images each."""
    shutil.copytree(made_saved[0], home)
    return made_saved[1]


def test_the_backbone_is_the_best_on_validation_whatever_the_test_set_says(home: Path, saved: list[Result]) -> None:
    (advice,) = advise(saved, home=home)
    assert advice.backbone is not None
    at = [result for result in saved if result.n_train == 60]
    best = max(at, key=lambda r: r.val_mean or 0.0)
    assert (advice.backbone.run, advice.backbone.n_train) == (best.id, 60)
    (other,) = {"good", "same"} - {best.backbones[0]}
    assert {rival.name: rival.verdict for rival in advice.backbone.rivals} == {
        f"{other}, linear": "undecided", "bad, linear": "worse",
    }  # fmt: skip
    low, high = best.interval or (0.0, 0.0)
    assert advice.backbone.text == (
        f"Take {best.backbones[0]}: it scored best on validation with 60 training labels and reaches a test AUC of "
        f"{best.mean:.3f} (95 % interval {low:.3f} to {high:.3f}); it is better than bad, Holm-corrected p < 0.05; it "
        f"cannot be distinguished from {other}."
    )
    assert advice.labels is not None
    assert advice.labels.name == advice.backbone.name
    assert sentences([advice]) == [advice.backbone.text, advice.labels.text]


def test_losses_are_better_when_lower(home: Path, saved: list[Result], monkeypatch: pytest.MonkeyPatch) -> None:
    own = replace(METRICS["log_loss"], key="own_loss")  # of a package
    monkeypatch.setattr(metrics, "_objects", {**metrics._objects, "own_loss": own})
    by_loss = [in_metric(result, "log_loss", home) for result in saved]
    (advice,) = advise(by_loss, home=home)
    assert advice.backbone is not None
    at = [result for result in by_loss if result.n_train == 60]
    assert advice.backbone.run == min(at, key=lambda r: r.val_mean or 0.0).id
    good, bad = at_size(50, [0.99] * 3), at_size(50, [0.55] * 3)
    for order, verdict in (((good, bad), "worse"), ((bad, good), "better")):
        for metric in ("log_loss", "own_loss"):
            found = advise_backbone(["first, linear", "second, linear"], compare_tested(order, metrics=[metric]), 50)
            assert [rival.verdict for rival in found.rivals] == [verdict]
    assert "second scored better on the test images, which play no part in the choice" in found.text
    losses = [replace(t, result=replace(t.result, metric="log_loss")) for t in (at_size(20, [0.6] * 3), good)]
    assert advise_labels("dino, linear", losses).trend == "rising"


def test_one_backbone_is_no_choice_and_a_run_that_cannot_be_read_is_named(home: Path, saved: list[Result]) -> None:
    good = [result for result in saved if result.backbones == ("good",)]
    (advice,) = advise(good, home=home)
    assert advice.backbone is None
    assert len(advice.sentences) == 1
    (home / good[0].dataset / "runs" / good[0].id / "predictions.parquet").write_bytes(b"")
    (advice,) = advise(good, home=home)
    assert advice.labels is not None
    assert advice.labels.trend == "one size"
    assert advice.sentences == []
    (line,) = sentences([advice])
    assert line.startswith(f"not read: {good[0].id}: ")


def test_a_doubling_of_a_bootstrapped_score_has_the_variance_of_the_same_resamples() -> None:
    tested = [at_size(n, [a, a], overlap=None) for n, a in ((20, 0.6), (50, 0.8), (400, 0.85))]
    found = doubling([t.predictions.scores("kappa") for t in tested], tested)
    assert not found.trained
    y = tested[0].labels
    x = np.log2([20, 50, 400])
    weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    rng, slopes = np.random.default_rng(1), []
    called = np.stack([t.predictions.logits[0].argmax(1) for t in tested])

    def kappas(rows: np.ndarray) -> np.ndarray:  # of two classes: agreement beyond what the shares of calls explain
        own, share = y[rows].mean(), called[:, rows].mean(1)
        chance = own * share + (1 - own) * (1 - share)
        return ((called[:, rows] == y[rows]).mean(1) - chance) / (1 - chance)

    assert kappas(np.arange(len(y))) == pytest.approx([cohen_kappa_score(y, c, weights="quadratic") for c in called])
    for _ in range(800):
        slopes.append(weights @ kappas(rng.integers(0, len(y), len(y))))
    assert found.interval is not None
    assert (found.interval[1] - found.interval[0]) / 2 == pytest.approx(1.98 * np.std(slopes), rel=0.08)
