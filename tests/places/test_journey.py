"""A home in an object store, by commands in processes of their own: several machines, faults, plain readers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from embcache.mirror import open_mirror
from embcache.paths import home_dir
from embcache.places import open_place
from embcache.store.feature_store import FeatureStore
from tests.extract.conftest import images
from tests.forked import Forked, ran
from tests.places.conftest import RATES
from tests.places.faults import FaultProxy
from tests.places.racing import race

__all__ = ["images"]

TINY = "tests.extract.tiny_run"


@pytest.fixture(autouse=True)
def _own_mirrors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EMBCACHE_CACHE_DIR", str(tmp_path / "machine-0"))
    open_mirror.cache_clear()


@pytest.fixture
def toy(images: Path) -> list[str]:
    """Options that name a dataset of 20 images."""
    return ["--dataset", "folder", "--data-root", str(images), "--name", "toy"]


@pytest.fixture
def by(tmp_path: Path) -> Callable[..., str]:
    """Runs a command on a machine, which has a cache folder of its own; returns what it prints."""

    def run(machine: str, *words: str, home: str | Path, status: int = 0) -> str:
        cache = str(tmp_path / machine)
        code, out, err = ran(*words, "--home", str(home), module=TINY, EMBCACHE_CACHE_DIR=cache)
        assert code == status, out + err
        assert "hunter2" not in out + err
        return out + err

    return run


def features(home: Path) -> dict[str, np.ndarray]:
    (folder,) = home.glob("toy/random-*")
    store = FeatureStore(folder)
    return dict(zip(store.ids.tolist(), np.array(store.features), strict=True))


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def seen_by(machine: str, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home as a machine sees it, in this process."""
    monkeypatch.setenv("EMBCACHE_CACHE_DIR", str(tmp_path / machine))
    open_mirror.cache_clear()
    return home_dir(url)


def files_of(place_url: str, shard: int) -> dict[str, bytes]:
    """Name and bytes of each file of the attempt that counts, as the commit names it."""
    place = open_place(place_url)
    (commit,) = [entry.key for entry in place.list("home") if entry.key.endswith(f"commits/{shard:06d}.json")]
    attempt = json.loads(place.get(commit))["attempt"]
    found = [entry.key for entry in place.list("attempts") if f"/{shard:06d}/{attempt}/" in entry.key]
    return {key.partition(f"{attempt}/")[2]: place.get(key) for key in found}


@pytest.mark.slow
def test_the_whole_journey_of_two_machines(
    bucket: str, toy: list[str], by: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = ["probe", "--dataset", "toy", "--backbone", "random", "--head", "linear", "--subset", "8", "--folds", "2"]
    by("one", "extract", "--backbone", "random", *toy, home=bucket)
    by("one", *probe, home=bucket)
    assert "linear" in by("one", "results", home=bucket)
    assert "no damage" in by("one", "verify", home=bucket)
    by("one", "gc", home=bucket)
    by("one", "report", "--dataset", "toy", "--output", str(tmp_path / "report.html"), home=bucket)
    assert b"linear" in (tmp_path / "report.html").read_bytes()

    local = tmp_path / "local"
    by("one", "extract", "--backbone", "random", *toy, home=local)
    by("one", *probe, home=local)
    here = json.loads(by("one", "results", "--json", "-", home=local))
    there = json.loads(by("two", "results", "--json", "-", home=bucket))
    assert [run["mean"] for run in there] == [run["mean"] for run in here]
    assert "no damage" in by("two", "verify", home=bucket)
    assert "complete" in by("two", "extract", "--backbone", "random", *toy, home=bucket)
    assert equal(features(seen_by("two", bucket, tmp_path, monkeypatch)), features(local))
    by("two", "probe", *probe[1:6], "knn", *probe[7:], home=bucket)
    assert "knn" in by("one", "results", home=bucket)


def test_machines_that_race_for_shards(bucket: str, proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.rates = RATES
    found = race(bucket, tmp_path, shards=4, machines=3)
    assert not found.errors
    assert (found.sole, found.whole) == (4, 4), found
    print(f"\n4 races of 3 machines, {found.attempts} attempts, {found.sole} winners; {proxy.totals()}")


def test_two_extractions_into_one_store_through_faults(
    bucket: str, proxy: FaultProxy, toy: list[str], by: Callable[..., str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    proxy.rates = RATES
    words = ("extract", "--backbone", "random", *toy, "--rows-per-shard", "2", "--home", bucket)
    both = [
        Forked(words, TINY, EMBCACHE_CACHE_DIR=str(tmp_path / name), TINY_SECONDS="0.05") for name in ("one", "two")
    ]
    for each in both:
        out, err = each.communicate()
        assert each.returncode == 0, out + err
    local = tmp_path / "local"
    code, out, err = ran(*words[:-1], str(local), module=TINY)
    assert code == 0, out + err
    proxy.rates = {}
    assert equal(features(seen_by("three", bucket, tmp_path, monkeypatch)), features(local))
    (store,) = local.glob("toy/random-*")
    for shard in range(10):  # byte for byte
        folder = store / "shards" / f"{shard:06d}"
        made = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        made.pop("commit.json")
        assert files_of(bucket, shard) == made
    assert "no damage" in by("three", "verify", home=bucket)
    print(f"\n10 shards by two machines: {proxy.totals()}")


def test_a_machine_that_dies_is_gone_on_from(
    bucket: str, toy: list[str], by: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("extract", "--backbone", "random", *toy, "--rows-per-shard", "5", "--home", bucket)
    dying = Forked(words, TINY, EMBCACHE_CACHE_DIR=str(tmp_path / "one"), TINY_DIES="1")
    dying.communicate()
    assert dying.returncode == -9
    by("one", *words[:-2], home=bucket)
    local = tmp_path / "local"
    ran(*words[:-1], str(local), module=TINY)
    assert equal(features(seen_by("two", bucket, tmp_path, monkeypatch)), features(local))


def test_a_store_without_conditional_writes_is_refused_before_anything_is_written(
    bucket: str, proxy: FaultProxy, toy: list[str], by: Callable[..., str]
) -> None:
    proxy.ignore_conditions = True
    said = by("one", "extract", "--backbone", "random", *toy, home=bucket, status=1)
    assert "conditional writes" in said
    assert [entry.key for entry in open_place(bucket).list() if not entry.key.startswith("leases/")] == []


def test_a_bucket_that_is_not_there(bucket: str, toy: list[str], by: Callable[..., str]) -> None:
    missing = bucket.replace("s3://lab", "s3://other")
    assert "bucket" in by("one", "extract", "--backbone", "random", *toy, home=missing, status=1)


READER = """
import json, sys, zarr
from obstore.fsspec import register

register("s3")
view = zarr.open_group("reference://", mode="r", storage_options={
    "fo": sys.argv[1], "target_options": {"asynchronous": False},
    "remote_protocol": "s3", "remote_options": {"asynchronous": True}})
valid = view["valid"][:]
print(json.dumps([view["ids"][:][valid].tolist(), view["features"][:][valid].tolist()]))
"""


def test_plain_zarr_reads_the_view(
    bucket: str, toy: list[str], by: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fsspec")
    by("one", "extract", "--backbone", "random", *toy, home=bucket)
    (address,) = [entry.key for entry in open_place(bucket).list() if entry.key.endswith("view.refs.json")]
    read = subprocess.run(
        [sys.executable, "-c", READER, f"{bucket}/{address}"], capture_output=True, text=True, check=True
    )
    ids, rows = json.loads(read.stdout)
    expected = features(seen_by("two", bucket, tmp_path, monkeypatch))
    assert equal(dict(zip(ids, np.array(rows, np.float32), strict=True)), expected)
