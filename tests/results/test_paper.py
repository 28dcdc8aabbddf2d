"""The paper's numbers: complete, and consistent with each other but for the flagged slips."""

from __future__ import annotations

import pytest

from embcache.results.paper import find_value, named_subset, paper_tables

DATASETS = ("patchcam", "aptos", "pneumonia", "nih")
BACKBONES = ("random", "supervised", "swav", "simclr", "dino")


def score(table: str, dataset: str, model: str, subset: str) -> tuple[float, float]:
    value = find_value(table, dataset, model, subset)
    assert value is not None
    assert value.mean is not None
    assert value.std is not None
    return value.mean, value.std


def test_every_table_is_whole() -> None:
    sizes = {name: len(table.values) for name, table in paper_tables().items()}
    detail = {"B1": 50, "B2": 25, "B3": 25, "B4": 30, "B5": 50, "B6": 25, "B7": 25, "B8": 30}
    ablation = {"C1": 20, "C2": 10, "C3": 10, "C4": 12}
    assert sizes == {"table1": 16, "table2": 60, "table3": 60, "table4": 24, **detail, **ablation, "G1": 6}


@pytest.mark.parametrize(("summary", "first"), [("table2", 1), ("table3", 5)])
def test_tables_2_and_3_repeat_the_detailed_tables(summary: str, first: int) -> None:
    for number, dataset in enumerate(DATASETS, first):
        for model in BACKBONES:
            for subset in ("S", "M", "F"):
                assert score(summary, dataset, model, subset) == score(f"B{number}", dataset, model, subset)


def test_table_4_repeats_the_ablation_and_the_best_self_supervised_backbone() -> None:
    differing = []
    for number, dataset in enumerate(DATASETS, 1):
        for subset in ("S", "M", "F"):
            assert score("table4", dataset, "dvme", subset) == score(f"C{number}", dataset, "dvme", subset)
            best = max(score("table2", dataset, model, subset) for model in ("swav", "simclr", "dino"))
            if score("table4", dataset, "best", subset) != best:
                differing.append(find_value("table4", dataset, "best", subset))
    (slip,) = differing
    assert slip is not None
    assert (slip.dataset, slip.subset) == ("patchcam", "M")
    assert "0.0053" in slip.flag


def test_known_slips_are_flagged_where_they_stand() -> None:
    flagged = {(v.table, v.dataset, v.model, v.subset) for t in paper_tables().values() for v in t.values if v.flag}
    assert flagged == {
        ("table1", "patchcam", "", "test"), ("table1", "nih", "", "F"), ("table1", "nih", "", "test"),
        ("table4", "patchcam", "best", "M"), ("B1", "patchcam", "swav", "10000"), ("B5", "patchcam", "swav", "10000"),
        ("B6", "aptos", "random", "100"), ("G1", "", "DVME", "probe"),
    }  # fmt: skip
    of_tables = {name for name, table in paper_tables().items() if table.flags}
    assert of_tables == {"table2", "table3", "table4", "B6", "C2", "C3", "C4"}


def test_a_number_that_is_s_or_m_has_its_name() -> None:
    assert named_subset("pneumonia", "50") == "S"
    assert named_subset("nih", "50") == "50"
    assert named_subset("nih", "200") == "M"
    assert named_subset("mine", "50") == "50"
    assert named_subset("pneumonia", "F") == "F"
