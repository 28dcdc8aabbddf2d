"""Signals, memory that runs out, several devices: real processes on one store."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from embcache.backbones.catalog import LoadedBackbone
from embcache.config import ExtractConfig
from embcache.data.dataset import load_dataset
from embcache.errors import EmbcacheError, UsageError
from embcache.extract import recipes as run
from embcache.extract.engines import devices as other_devices
from embcache.extract.engines.local import Stop, stop_on_signals
from embcache.extract.extract import default_rows, extract_features
from embcache.log import shown
from embcache.store.feature_store import FeatureStore
from embcache.store.reading import read_commit
from tests.extract.conftest import draw
from tests.extract.tiny import load_tiny, run_extraction
from tests.extract.tiny_run import Troubled
from tests.forked import Forked
from tests.refusal import refused

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals are sent as POSIX has them")


_started: list[Forked] = []


@pytest.fixture(autouse=True)
def _ended() -> Iterator[None]:
    yield
    while _started:
        process = _started.pop()
        process.kill()
        process.communicate()


def start(root: Path, *flags: str, **environment: str) -> Forked:
    """`embcache extract` with the tiny network, in a process of its own; shards of eight images."""
    words = ("extract", "--backbone", "random", "--dataset", "folder", "--data-root", str(root), "--json", "-", *flags)
    _started.append(Forked(words, "tests.extract.tiny_run", OMP_NUM_THREADS="1", **environment))
    return _started[-1]


def finish(process: Forked) -> tuple[dict[str, object], str]:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    (answer,) = json.loads(out)
    return answer, err


def contents(store: Path) -> dict[str, bytes]:
    """Every file of every shard."""
    return {str(p.relative_to(store)): p.read_bytes() for p in sorted((store / "shards").rglob("*")) if p.is_file()}


def wait_for(home: Path, pattern: str, process: Forked) -> None:
    deadline = time.monotonic() + 600
    while not list(home.glob(f"*/random-*/{pattern}")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def helping(home: Path) -> str:
    """What is there once a second process has a shard: the run itself has the first."""
    return str(home / "*" / "random-*" / "[ls]*" / "000001*")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an uninterrupted run over the same images leaves: three shards, of 8, 8 and 4 images."""
    folder = tmp_path_factory.mktemp("whole")
    for index in range(20):
        draw(folder / "images" / ("benign" if index % 2 else "malignant") / f"{index:02}.png", index)
    answer, _ = finish(start(folder / "images", "--home", str(folder / "home"), "--batch-size", "2"))
    return contents(Path(str(answer["store"])))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130)])
def test_the_first_signal_commits_the_current_shard_and_prints_how_to_continue(
    images: Path, home: Path, whole: dict[str, bytes], number: int, status: int
) -> None:
    process = start(images, "--batch-size", "2", TINY_SECONDS="0.5")  # 2 s a shard
    wait_for(home, "leases/000000.json", process)
    process.send_signal(number)
    out, err = process.communicate(timeout=600)
    assert process.returncode == status, err
    assert "stopping after the current shard;" in err
    assert "again stops at once" in err
    assert "Traceback" not in err
    (answer,) = json.loads(out)
    assert (answer["computed"], answer["left"]) == (8, 12)
    store = Path(answer["store"])
    assert FeatureStore(store).committed() == (0,)
    assert not list((store / "leases").iterdir())
    command = shlex.split(err.strip().splitlines()[-1])
    assert command[:2] == ["embcache", "extract"]
    assert command[-3:] == ["-", "--batch-size", "2"]
    rest, _ = finish(start(images, "--batch-size", "2"))
    assert (rest["computed"], rest["cached"], rest["left"]) == (12, 8, 0)
    assert contents(store) == whole


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143)])
def test_the_second_signal_stops_at_once(
    images: Path, home: Path, whole: dict[str, bytes], number: int, status: int
) -> None:
    process = start(images, "--batch-size", "1", TINY_WAITS="/nowhere")
    wait_for(home, "leases/000000.json", process)
    time.sleep(1)
    process.send_signal(number)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(number)
    _, err = process.communicate(timeout=600)
    assert process.returncode == status, err
    assert "stopped at once: what is committed stays" in err
    assert "Traceback" not in err
    (store,) = home.glob("*/random-*")
    assert FeatureStore(store).committed() == ()
    finish(start(images, "--batch-size", "1"))
    assert set(contents(store)) == set(whole)


def test_a_batch_that_the_memory_does_not_hold_is_halved_and_recorded(
    images: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str, **_: object) -> LoadedBackbone:
        loaded = load_tiny(name)
        return replace(loaded, module=Troubled(loaded.module))

    monkeypatch.setattr(run, "load_backbone", load)
    monkeypatch.setenv("TINY_MOST", "5")
    dataset, said = load_dataset("folder", images), list[str]()
    sizes = {"rows_per_shard": 8, "batch_size": 16}
    store = run_extraction(["random"], dataset, say=said.append, **sizes)[0].store
    assert len([line for line in said if "out of memory" in line]) == 2  # 8, then 4: kept for the rest of the run
    assert [read_commit(store.path, number).batch_size for number in (0, 1, 2)] == [4, 4, 4]
    # Byte for byte what a run at that batch size makes; there it is the store's own, and not recorded again.
    (other,) = run_extraction(["random"], dataset, home=tmp_path / "small", rows_per_shard=8, batch_size=4)
    assert read_commit(other.store.path, 0).batch_size is None
    mine, theirs = ({k: v for k, v in contents(p).items() if "commit" not in k} for p in (store.path, other.store.path))
    assert mine == theirs
    monkeypatch.setenv("TINY_MOST", "0")
    with refused(EmbcacheError, "out-of-memory"):
        run_extraction(["random"], dataset, home=tmp_path / "none", **sizes)


def test_two_devices_share_the_shards_and_leave_the_same_bytes(
    images: Path, home: Path, whole: dict[str, bytes]
) -> None:
    helpers = json.dumps({"TINY_WAITS": "", "TINY_SECONDS": "0.1"})
    answer, _ = finish(
        start(images, "--batch-size", "2", "--device", "cpu,cpu", TINY_WAITS=helping(home), TINY_HELPERS=helpers)
    )
    assert (answer["computed"], answer["left"]) == (20, 0)
    assert contents(Path(str(answer["store"]))) == whole


def test_a_device_that_dies_leaves_its_shard_to_the_others_and_is_told(
    images: Path, home: Path, whole: dict[str, bytes]
) -> None:
    helpers = json.dumps({"TINY_WAITS": "", "TINY_DIES": "1"})
    answer, err = finish(
        start(images, "--batch-size", "2", "--device", "cpu,cpu", TINY_WAITS=helping(home), TINY_HELPERS=helpers)
    )
    assert "the process on cpu ended before its work was done; the others continue without it: signal 9" in err
    assert contents(Path(str(answer["store"]))) == whole


def test_a_device_that_is_done_before_the_others_ends_well(
    images: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(other_devices, "COMMAND", (sys.executable, "-m", "tests.extract.tiny_run", "--helper"))
    dataset, said = load_dataset("folder", images), list[str]()
    crew = other_devices.Crew([ExtractConfig(device="cpu")], dataset, ["random"], home, Stop())
    with shown(said.append), crew:
        (process,) = crew._processes
        assert process.wait(600) == 0  # while its standard input is open
    assert (crew.computed, said) == ([[20]], [])


def test_a_signal_reaches_every_device_and_their_shards_are_committed(images: Path, home: Path) -> None:
    helpers = json.dumps({"TINY_WAITS": "", "TINY_SECONDS": "1"})
    process = start(
        images, "--batch-size", "2", "--device", "cpu,cpu", TINY_WAITS=str(home / "go"), TINY_HELPERS=helpers
    )
    wait_for(home, "leases/000001.json", process)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    (home / "go").touch()
    out, err = process.communicate(timeout=600)
    assert process.returncode == 130, err
    (answer,) = json.loads(out)
    assert FeatureStore(Path(answer["store"])).committed() == (0, 1)
    assert (answer["computed"], answer["left"]) == (16, 4)
    assert not list((Path(answer["store"]) / "leases").iterdir())


def test_devices_end_with_a_run_that_is_killed(images: Path, home: Path) -> None:
    helpers = json.dumps({"TINY_WAITS": "", "TINY_SECONDS": "1"})
    process = start(images, "--batch-size", "2", "--device", "cpu,cpu", TINY_WAITS="/nowhere", TINY_HELPERS=helpers)
    wait_for(home, "leases/000001.json", process)
    (store,) = home.glob("*/random-*")
    helper = json.loads((store / "leases" / "000001.json").read_text())["pid"]
    assert helper != process.pid
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 300
    while Path(f"/proc/{helper}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{helper}").exists()
    assert FeatureStore(store).committed() == (1,)


@pytest.mark.parametrize("devices", ["cpu,warp", "cpu,", "cpu,cuda:99"])
def test_a_device_that_is_not_there_is_refused_before_any_work(images: Path, home: Path, devices: str) -> None:
    with pytest.raises(UsageError, match=r"device"):
        extract_features("random", load_dataset("folder", images), device=devices)
    assert not home.exists()


def test_a_signal_where_all_is_computed_stops_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    stop = Stop()
    with stop_on_signals(stop):
        stop.complete = True
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        assert not stop.requested
        with pytest.raises(SystemExit):
            os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err == ""


def test_who_listens_no_more_gets_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(descriptor: int, data: bytes) -> int:
        raise BrokenPipeError

    stop = Stop()
    stop.busy = True
    with stop_on_signals(stop):
        monkeypatch.setattr(os, "write", gone)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested


@pytest.mark.parametrize(
    ("device", "images", "rows"),
    [("cpu", 24, 64), ("cpu", 131_073, 128), ("cpu", 10**6, 512), ("cuda", 3662, 3662), ("mps", 10**4, 4096)],
)
def test_rows_per_shard_follow_device_and_number_of_images(device: str, images: int, rows: int) -> None:
    assert default_rows(device, images) == rows


@pytest.mark.parametrize(("shape", "rows"), [((2048,), 4096), ((16, 2048), 4096), ((1370, 1024), 191), ((1 << 29,), 1)])
def test_a_shard_of_large_rows_takes_a_gigabyte_at_most(shape: tuple[int, ...], rows: int) -> None:
    assert default_rows("place", 10**6, shape) == rows


def test_rows_per_shard_are_settled_when_a_store_is_made(
    images: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "load_backbone", load_tiny)
    dataset, said = load_dataset("folder", images), list[str]()
    (done,) = run_extraction(["random"], dataset, rows_per_shard=7)
    assert [len(entries) for entries in done.store.plans().values()] == [7, 7, 6]
    run_extraction(["random"], dataset, rows_per_shard=9, say=said.append)
    assert said == ["random: the store was created with 7 rows per shard, and keeps them"]
    for wrong in (0, -1, 1 << 21):
        with refused(UsageError, "option-bounds"):
            run_extraction(["random"], dataset, rows_per_shard=wrong)
