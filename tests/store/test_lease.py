"""Leases: one holder at a time, a dead one's shard is free at once, a silent one's after a while."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from embcache.errors import StoreError
from embcache.store.lease import Lease
from tests.crash.faults import Call, between
from tests.refusal import refused
from tests.store.build import make_store


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return make_store(tmp_path)


def lease_files(store: Path) -> list[str]:
    return sorted(path.name for path in (store / "leases").iterdir())


def test_a_held_lease_is_refused_to_others_until_released(store: Path) -> None:
    lease = Lease.acquire(store, 3)
    assert lease is not None
    assert lease.held
    assert Lease.acquire(store, 3) is None
    with Lease.acquire(store, 4) or pytest.fail("another shard is free"):
        assert lease_files(store) == ["000003.json", "000004.json"]
    lease.release()
    lease.release()
    assert not lease.held
    assert lease_files(store) == []
    with Lease.acquire(store, 3) or pytest.fail("a released shard is free"):
        pass


def test_of_many_that_ask_at_once_one_gets_it(store: Path) -> None:
    barrier = threading.Barrier(4)

    def ask(_: int) -> Lease | None:
        barrier.wait()
        return Lease.acquire(store, 0)

    with ThreadPoolExecutor(4) as pool:
        leases = [lease for lease in pool.map(ask, range(4)) if lease]
    assert len(leases) == 1
    leases[0].release()
    assert list((store / "staging").iterdir()) == []


def test_the_lease_of_a_dead_process_is_free_at_once(store: Path) -> None:
    script = (
        "import os, sys, pathlib\nfrom embcache.store.lease import Lease\n"
        "assert Lease.acquire(pathlib.Path(sys.argv[1]), 0)\nos._exit(9)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(store)], check=False)
    assert lease_files(store) == ["000000.json"]
    lease = Lease.acquire(store, 0)
    assert lease is not None
    lease.release()
    assert lease_files(store) == []


def test_a_lease_from_another_machine_is_free_when_its_heartbeat_stopped(store: Path) -> None:
    path = store / "leases" / "000000.json"
    path.write_text(json.dumps({"machine": "elsewhere", "pid": 1, "token": "x"}))
    assert Lease.acquire(store, 0, ttl=1000) is None
    os.utime(path, (1, 1))
    lease = Lease.acquire(store, 0, ttl=1000)
    assert lease is not None
    assert lease.held
    lease.release()


def test_the_heartbeat_keeps_a_lease_alive(store: Path) -> None:
    lease = Lease.acquire(store, 0, ttl=0.04)
    assert lease is not None
    path = store / "leases" / "000000.json"
    os.utime(path, (1, 1))
    beaten = threading.Event()
    for _ in range(500):
        if path.stat().st_mtime > 1:
            beaten.set()
            break
        threading.Event().wait(0.01)
    assert beaten.is_set()
    lease.release()


def test_one_that_was_taken_over_knows_it_and_leaves_the_new_holder_alone(store: Path) -> None:
    old = Lease.acquire(store, 0)
    assert old is not None
    path = store / "leases" / "000000.json"
    path.unlink()
    new = Lease.acquire(store, 0)
    assert new is not None
    assert not old.held
    old.release()
    assert new.held
    new.release()


@pytest.mark.parametrize("hours", [-24, 24])
def test_a_machine_whose_clock_is_wrong_takes_no_lease_from_a_living_holder(
    hours: int, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store / "leases" / "000000.json"
    path.write_text(json.dumps({"machine": "elsewhere", "pid": 1, "token": "x"}))
    now = time.time() + 3600 * hours
    for name, value in (("time", now), ("time_ns", int(now * 1e9))):
        monkeypatch.setattr(time, name, lambda value=value: value)
    assert Lease.acquire(store, 0) is None
    assert lease_files(store) == ["000000.json"]


def test_a_lease_stamped_before_the_clock_was_set_back_ages_like_any_other(store: Path) -> None:
    path = store / "leases" / "000000.json"
    path.write_text(json.dumps({"machine": "elsewhere", "pid": 1, "token": "x"}))
    os.utime(path, (time.time() + 86400,) * 2)
    assert Lease.acquire(store, 0) is None
    assert abs(path.stat().st_mtime - time.time()) < 3600  # it was a day ahead
    os.utime(path, (1, 1))
    with Lease.acquire(store, 0) or pytest.fail("its holder is silent"):
        pass


def test_a_disk_that_refuses_a_lease_is_told_and_one_that_refuses_its_end_does_no_harm(store: Path) -> None:
    def refuse(call: Call, do: Callable[[], Any]) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with between(refuse), refused(StoreError, "store-not-written"):
        Lease.acquire(store, 0)
    lease = Lease.acquire(store, 0)
    assert lease is not None
    with between(refuse):
        lease.release()
    with Lease.acquire(store, 1) or pytest.fail("another shard is free"):
        pass


def test_leases_need_no_hard_links(store: Path) -> None:
    def refuse(call: Call, do: Callable[[], Any]) -> Any:
        if call.name == "link":
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        return do() if call.name != "renameat" else False

    with between(refuse):
        lease = Lease.acquire(store, 0)
        assert lease is not None
        assert Lease.acquire(store, 0) is None
        lease.release()
        assert lease_files(store) == []
        assert list((store / "staging").iterdir()) == []
