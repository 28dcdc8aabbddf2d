"""Tables whose cells are finetunings, end to end on small images and tiny networks."""

from __future__ import annotations

from pathlib import Path

import pytest

from embcache.config import DatasetRef, StudyConfig
from embcache.data.dataset import ImageDataset
from embcache.log import shown
from embcache.runs.folders import list_results
from embcache.study.study import run_study
from tests.finetune.conftest import RESNET, ds, networks, pictures

__all__ = ["ds", "networks", "pictures"]  # fixtures


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """A grid of one probe and one finetuning of the same backbone at the same subset."""
    path = tmp_path / "own.toml"
    path.write_text(
        f'datasets = ["folder"]\nbackbones = ["{RESNET}"]\nsubsets = [16]\nkind = ["probe", "finetune"]\n'
        'val = "matched"\nfolds = 2\nmax_epochs = 2\n'
    )
    return path


def test_probes_and_finetunings_stand_in_one_table_and_are_reused(
    grid: Path, ds: ImageDataset, pictures: Path, home: Path
) -> None:
    options = (StudyConfig(transform="paper", workers=1), DatasetRef(data_root=pictures))
    said: list[str] = []
    with shown(said.append):
        done = run_study(grid, *options)
    kinds = {record["kind"]: record for record in done.table.records}
    assert set(kinds) == {"probe", "finetune"}
    saved = {result.kind: result for result in list_results(home)}
    assert kinds["finetune"]["run"] == saved["finetune"].id
    assert kinds["finetune"]["mean"] == saved["finetune"].mean is not None
    assert max(fold.epochs for fold in saved["finetune"].folds) == 2
    assert not any("no checkpoint" in line for line in said)
    assert not list((home / ds.name / "runs" / saved["finetune"].id).glob("model-*")), "tables keep no models"
    again: list[str] = []
    with shown(again.append):
        repeated = run_study(grid, *options)
    assert [record["run"] for record in repeated.table.records] == [record["run"] for record in done.table.records]
    assert any("there 2, to make 0" in line for line in again)
