"""The doctor looks at everything, needs nothing, and changes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import embcache
import embcache.maintain.doctor as doctor
from embcache.cli import app
from embcache.maintain.doctor import diagnose
from embcache.store.commit import write_snapshot
from tests.maintain.conftest import flip
from tests.maintain.test_listing import dataset
from tests.store.build import add, make_store, plan, quick_disk, tree

__all__ = ["quick_disk"]

pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "why_unreachable", lambda seconds: "no network here")
    monkeypatch.setattr(doctor, "_SECONDS", 0.0)
    monkeypatch.setattr(doctor, "_SIDE", {"cpu": 64, "cuda": 64})
    monkeypatch.setattr(doctor, "_COPIED", {"cpu": 1 << 16, "cuda": 1 << 16})
    monkeypatch.setattr(doctor, "_per_second", lambda work: (work(), 10.0)[1])


measured = doctor._per_second


def test_the_speed_of_work_is_how_often_it_is_done_per_second() -> None:
    done: list[int] = []
    assert measured(lambda: done.append(0)) > 0
    assert len(done) == 2  # once to warm up


def test_an_empty_home_is_well(home: Path) -> None:
    found = diagnose()
    assert (found.stores, found.leases, found.interrupted, found.problems) == ([], [], [], [])
    assert found.versions["embcache"] == embcache.__version__
    assert found.devices[0]["fp32_tflops"] == pytest.approx(2 * 64**3 * 10 / 1e12)
    assert found.decoding["one_thread"] == 10
    assert {row["backbone"]: row["status"] for row in found.weights}["random"] == "none needed"
    assert not next(row for row in found.datasets if row["dataset"] == "nih")["there"]
    assert found.places[0] == {**found.places[0], "path": str(home), "there": False, "writable": True}
    assert not home.exists()


def test_what_is_wrong_is_named_with_what_mends_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    well = make_store(home)
    add(well, 0, ["a", "b"], bad=["b"])
    plan(well, 1, ["c"])
    (well / "leases" / "000001.json").write_text(json.dumps({"machine": "gone"}))
    write_snapshot(home / "ds", dataset(["a", "b", "c", "d"]).to_parquet_bytes())
    broken = make_store(home, precision="bf16")
    add(broken, 0, ["a"])
    flip(broken / "plan" / "000000.json", 10)
    lost = make_store(home, precision="fp16")
    (lost / "recipe.json").unlink()
    half = make_store(home, precision="tf32")
    plan(half, 0, ["a"])
    before = tree(home)
    found = diagnose()
    by_name = {row["store"]: row for row in found.stores}
    assert not by_name[well.name]["problem"]
    assert (by_name[well.name]["rows"], by_name[well.name]["quarantined"], by_name[well.name]["owed"]) == (1, 1, 2)
    assert "damaged" in by_name[broken.name]["problem"]
    assert by_name[lost.name]["problem"] == "recipe.json is missing"
    assert not by_name[half.name]["problem"]
    assert len(found.problems) == 2
    assert all("embcache verify" in problem for problem in found.problems)
    assert found.leases == [{"store": f"ds/{well.name}", "shard": 1, "stale": False}]
    assert found.owed["bytes"] >= 2 * 3 * 4
    assert tree(home) == before
    usage = shutil.disk_usage(home)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type(usage)(usage.total, usage.used, 10))
    assert any("free space" in problem for problem in diagnose().problems)


def test_a_device_that_cannot_be_used_is_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> float:
        raise RuntimeError("no kernel image is available\nlong text")

    monkeypatch.setattr(torch, "empty_like", refuse)
    assert diagnose().problems == ["cpu cannot be used: no kernel image is available"]


def test_the_command_prints_it_all(home: Path) -> None:
    run = CliRunner().invoke
    told = run(app, ["doctor"], catch_exceptions=False)
    assert told.exit_code == 0
    for word in ("versions", "TFLOPS", "GB/s", "images/s", "weights", "datasets", "leases", "problems  "):
        assert word in told.stdout
    add(make_store(home), 0, ["a"])
    flip(next((home / "ds").glob("*/plan/*.json")), 5)
    told = run(app, ["doctor", "--json", "-"], catch_exceptions=False)
    assert told.exit_code == 1
    assert json.loads(told.stdout)["problems"]


def test_gated_weights_are_asked_for_where_there_is_a_network(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError

    class RefusedError(GatedRepoError):
        def __init__(self) -> None:
            Exception.__init__(self, "403 Client Error")

    class AbsentError(EntryNotFoundError):
        def __init__(self) -> None:
            Exception.__init__(self, "404 Client Error")

    def answer(url: str, *, timeout: float) -> None:
        assert timeout
        if "UNI2-h" in url:
            raise RefusedError
        if "Virchow2" in url:
            raise AbsentError  # it has no config.json, which a refusal would not say
        if "medsiglip" in url:
            raise TimeoutError("no answer")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", answer)
    told = CliRunner().invoke(app, ["doctor"], catch_exceptions=False).stdout
    (line,) = (line for line in told.splitlines() if line.startswith("gated weights"))
    assert line.split(maxsplit=2)[2] == "not checked, no hub: no network here"
    monkeypatch.setattr(doctor, "why_unreachable", lambda seconds: "")
    monkeypatch.setattr(doctor, "HF_HUB_OFFLINE", False)
    found = {row["backbone"]: row["problem"] for row in diagnose().gated}
    assert found["uni"] == found["virchow2"] == ""
    assert found["uni2-h"] == (
        "refused: accept the terms at https://huggingface.co/MahmoodLab/UNI2-h, then type: hf auth login"
    )
    assert found["medsiglip"] == "not known: no answer"
    assert "dinov2-base" not in found
    run = CliRunner().invoke(app, ["doctor"], catch_exceptions=False)
    assert run.exit_code == 0  # no fault of the installation
    assert "uni, virchow, virchow2, h-optimus-0" in " ".join(run.stdout.split())
    assert "https://huggingface.co/MahmoodLab/UNI2-h" in run.stdout
