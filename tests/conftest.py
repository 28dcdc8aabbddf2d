"""Fixtures that every test may use."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

QUICK = {"max_examples": 50, "deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", derandomize=True, **QUICK)
settings.register_profile("dev", **QUICK)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real images that lie beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("the real images are not beside this checkout (../shared/data)")
    return SHARED


@pytest.fixture(autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the folders of the user who runs it."""
    monkeypatch.setenv("EMBCACHE_HOME", str(tmp_path_factory.getbasetemp() / "no-home"))
    for name in ("EMBCACHE_DATA", "EMBCACHE_WEIGHTS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """What a test draws from torch's own generator is the same in every run; torch is not imported for it."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty ``EMBCACHE_HOME`` of the test's own; the other folders are moved there too."""
    folder = tmp_path / "home"
    monkeypatch.setenv("EMBCACHE_HOME", str(folder))
    monkeypatch.setenv("EMBCACHE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("EMBCACHE_WEIGHTS", str(tmp_path / "weights"))
    return folder
