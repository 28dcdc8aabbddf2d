"""The table of models by subsets."""

from __future__ import annotations

from dataclasses import replace

import pytest

from embcache.probe.results import ProbeResult
from embcache.report.tables import pivot_results


def result(head: str, backbone: str, subset: str, n_train: int, mean: float | None) -> ProbeResult:
    return ProbeResult(
        id="x",
        kind="probe",
        dataset="toy",
        backbones=(backbone,),
        head=head,
        subset=subset,
        n_train=n_train,
        n_val=9,
        n_test=10,
        labels_used=n_train + 9,
        metric="auc",
        mean=mean,
        std=None if mean is None else 0.01,
        interval=None,
        val_mean=None,
        folds=(),
        test_set="local",
        synthetic=False,
        notes=(),
        class_names=("a", "b"),
        request={},
        seconds=0.0,
        versions={},
        source="live",
    )


def test_models_down_and_subsets_across_by_size() -> None:
    results = [
        result("linear", "a", "F", 900, 0.9),
        result("linear", "a", "S", 50, 0.8),
        result("dvme", "b", "S", 50, 0.7),
    ]
    headers, rows = pivot_results(results)
    assert headers == ["head", "backbones", "S: 50 + 9 labels", "F: 900 + 9 labels"]
    assert rows == [["linear", "a", "0.800 ± 0.010", "0.900 ± 0.010"], ["dvme", "b", "0.700 ± 0.010", ""]]


def test_a_result_without_test_labels_is_not_a_number() -> None:
    assert pivot_results([result("linear", "a", "S", 50, None)])[1] == [["linear", "a", "not scored"]]


def test_results_of_two_datasets_are_refused() -> None:
    one = result("linear", "a", "S", 50, 0.5)
    with pytest.raises(ValueError, match="one dataset"):
        pivot_results([one, replace(one, dataset="other")])
