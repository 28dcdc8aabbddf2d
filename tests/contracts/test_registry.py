"""Packages that announce backbones, heads, datasets and metrics: a broken one is named and skipped, none is silent."""

from __future__ import annotations

import json
import logging
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from embcache.backbones.catalog import backbones
from embcache.cli import app
from embcache.errors import UsageError
from embcache.probe.heads import heads
from embcache.probe.metrics import metric_title, metrics
from embcache.registry import Registry
from tests.refusal import refused


@pytest.fixture
def announced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Entry points that are read anew by each registry."""
    (tmp_path / "breaks_at_import.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def announce(**places: str) -> None:
        monkeypatch.setattr(
            "embcache.registry.entry_points",
            lambda group: [EntryPoint(name, place, group) for name, place in places.items()],
        )
        for registry in (heads, backbones, metrics):
            monkeypatch.setattr(registry, "_places", dict(registry._places))
            monkeypatch.setattr(registry, "_objects", dict(registry._objects))
            monkeypatch.setattr(registry, "_installed", False)

    return announce


def test_a_broken_package_is_skipped_and_named(announced: Any, home: Path) -> None:
    announced(gone="no_such_module:Head", broken="breaks_at_import:Head", other="json:dumps", builtin="json:nothing")
    for command in ("heads", "backbones"):
        done = CliRunner().invoke(app, [command, "--json", "-"])
        assert done.exit_code == 0, done.output
        names = {row[command[:-1]] for row in json.loads(done.stdout)}
        assert names & {"linear", "dino"}
        assert not names & {"gone", "broken", "builtin"}
        for name, module in (("gone", "no_such_module"), ("broken", "breaks_at_import"), ("builtin", "json:nothing")):
            assert f"{command[:-1]} {name} cannot be used" in done.stderr
            assert module in done.stderr
    with refused(UsageError, "import-failed") as caught:
        heads.get("broken")
    assert "ZeroDivisionError" in str(caught.value)
    assert (metric_title("broken"), metric_title("other")) == ("broken", "other")


def test_a_name_that_is_taken_is_told(announced: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "embcache")
    announced(linear="json:dumps", fresh="json:loads")
    registry: Registry[Any] = Registry("head", {"linear": "json:load"})
    assert registry.names() == ["fresh", "linear"]
    assert registry.get("linear") is json.load
    assert [record.getMessage() for record in caplog.records] == [
        "head linear: the name is taken, so json:dumps is not used"
    ]
