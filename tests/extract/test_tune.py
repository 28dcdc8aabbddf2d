"""Settings tried out when a store is made: they stay with it, and change no feature beyond the last bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import embcache
from embcache.extract import run, tune
from embcache.extract.run import run_extraction
from tests.extract.tiny import load_tiny


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "load_backbone", load_tiny)


def test_the_smallest_of_the_fastest_is_chosen() -> None:
    assert tune.smallest_of_the_fastest([(8, 10.0), (16, 19.9), (32, 20.0)]) == 16
    assert tune.smallest_of_the_fastest([(8, 10.0), (16, 12.0), (32, 20.0)]) == 32


def test_what_was_tried_at_creation_stays(images: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ds = embcache.load_dataset("folder", images)
    plain = embcache.extract_features("random", ds, home=home / "plain").features[:]
    said: list[str] = []
    monkeypatch.setattr(tune, "tune_batch_size", lambda network: 5)
    monkeypatch.setattr(tune, "tune_workers", lambda root, sources, network: 3)
    (done,) = run_extraction(["random"], ds, home=home, batch_size="auto", workers="auto", say=said.append)
    assert (done.store.batch_size, done.store.provenance["workers"]) == (5, 3)
    assert any("batches of 5 and 3 decoding threads" in line for line in said)
    np.testing.assert_allclose(done.store.features[:], plain, rtol=1e-5, atol=1e-6)

    def never(*_: object) -> int:
        raise AssertionError("tried again")

    monkeypatch.setattr(tune, "tune_batch_size", never)
    monkeypatch.setattr(tune, "tune_workers", never)
    (again,) = run_extraction(["random"], ds, home=home, batch_size="auto", workers="auto")
    assert (again.computed, again.store.batch_size) == (0, 5)


def test_a_real_trial_gives_settings_from_those_tried(images: Path, home: Path) -> None:
    ds = embcache.load_dataset("folder", images)
    (done,) = run_extraction(["random"], ds, home=home, batch_size="auto", workers="auto")
    assert done.store.batch_size in tune.SIZES["cpu"]
    assert 1 <= done.store.provenance["workers"] <= 64
