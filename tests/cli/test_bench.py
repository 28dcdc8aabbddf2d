"""``embcache bench`` on sizes that take no time: what it says, not how fast it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from embcache.cli import app
from embcache.errors import UsageError
from embcache.upkeep import bench


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_ROWS": 640, "_DIM": 8, "_REPEATS": 1, "_STARTS": 1, "_IMAGES": 3}.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "_BACKBONES", {"a": 8, "b": 8})


def test_it_says_what_each_stage_reaches(home: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["bench", "--json", str(tmp_path / "bench.json")])
    assert done.exit_code == 0, done.output
    assert "no images are at hand" in done.output
    found = json.loads((tmp_path / "bench.json").read_text())
    stages = [row["stage"] for row in found["measured"]]
    assert all(any(word in stage for stage in stages) for word in ("zarr", "hdf5", "linear", "dvme", "np.load", "end"))
    assert all(row["rate"] > 0 and (row["share"] is None) == (row["ceiling"] == "") for row in found["measured"])
    assert found["machine"]["cores"] >= 1
    assert not home.exists()  # nothing is left behind


def test_images_of_a_dataset_are_decoded(home: Path) -> None:
    done = CliRunner().invoke(app, ["bench", "--dataset", "sample", "--json", "-"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["measured"][-1]["stage"].startswith("decoding sample")


def test_images_that_are_not_there_are_told_before_anything_is_measured(home: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["bench", "--dataset", "aptos", "--data-root", str(tmp_path / "none")])
    assert done.exit_code != 0
    assert "reading features" not in done.output


def test_a_device_that_is_not_there_is_told(home: Path) -> None:
    with pytest.raises(UsageError, match="device cannot be used"):
        bench.run_bench(device="nowhere")
