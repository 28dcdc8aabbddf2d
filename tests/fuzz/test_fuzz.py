"""A short fuzz of every reader, the same inputs each time: an error of embcache's own or a result, nothing else.

``make fuzz`` is the long one, with limits on time and memory.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.limits import run_each
from tests.fuzz.mutate import Change, changes
from tests.fuzz.store_seeds import IN_MEMORY
from tests.fuzz.targets import TARGETS, Case, draw, run
from tests.store.build import quick_disk

__all__ = ["quick_disk"]

FIXED = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
COUNTS = {"images": 120, "dicom": 80, "arrays": 70, "checkpoints": 60, "zarr stores": 25, "hdf5 stores": 25}


def _meet(name: str, seed: int, made: list[Change], folder: Path) -> None:
    number = len(TARGETS[name].seeds())
    assert isinstance(run(Case(name, seed % number, tuple(made)), folder), str)


@pytest.mark.usefixtures("quick_disk")
@pytest.mark.parametrize("name", list(TARGETS))
def test_no_damage_of_a_file_is_more_than_one_clear_error(name: str) -> None:
    if name == "dicom":
        pytest.importorskip("pydicom")

    folder = Path(tempfile.mkdtemp(prefix="embcache-fuzz-", dir=IN_MEMORY))

    @settings(FIXED, max_examples=COUNTS[name])
    @given(seed=st.integers(0, 1000), made=changes())
    def meet(seed: int, made: list[Change]) -> None:
        _meet(name, seed, made, folder)

    meet()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("name", list(TARGETS))
def test_every_whole_file_is_read(name: str, tmp_path: Path) -> None:
    if name == "dicom":
        pytest.importorskip("pydicom")
    endings = {TARGETS[name].meet(seed, [], tmp_path) for seed in TARGETS[name].seeds() if "nested" not in seed.name}
    assert endings <= {"decoded", "loaded", "read"}


def _misbehave(what: str, folder: Path) -> str:
    assert folder.is_dir()
    if what == "hang":
        time.sleep(60)
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "memory":
        held = b"\1" * (200 << 20)  # zeros would take no memory until they are looked at
        assert held
    if what == "raise":
        raise ZeroDivisionError("made up")
    return "fine"


def test_the_runner_tells_hangs_crashes_memory_and_errors_apart_and_goes_on() -> None:
    asked = ["fine", "hang", "fine", "crash", "memory", "raise", "fine"]
    found = list(run_each(_misbehave, asked, memory=100 << 20, seconds=5))  # 200 MiB take a busy machine a second
    assert [item for item, _ in found] == asked
    ended: list[Any] = [ended.failure.partition(":")[0] or ended.result for _, ended in found]
    assert ended == ["fine", "hang", "fine", "crash", "memory", "ZeroDivisionError", "fine"]
    assert found[3][1].failure == "crash: SIGSEGV"


def test_random_inputs_are_the_same_for_the_same_seed() -> None:
    assert [draw(name, random.Random(5)) for name in TARGETS] == [draw(name, random.Random(5)) for name in TARGETS]
