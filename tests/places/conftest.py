"""Places of every kind to run one contract against."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest

import embcache.mirror as mirrors
from embcache import io as disk
from embcache import places
from embcache.mirror import Mirror, open_mirror
from embcache.paths import home_dir
from embcache.places import DiskPlace, Place, open_place
from tests.places.faults import FaultProxy
from tests.places.server import BUCKET, environment, serving

_numbers = itertools.count()

# Of ten requests some two meet a fault; the client tries ten times.
RATES = {
    "500": 0.04, "503": 0.03, "409": 0.05, "reset": 0.03, "lost": 0.05, "late 500": 0.03, "hang": 0.004,
    "late hang": 0.004, "truncated": 0.03, "flipped": 0.05,
}  # fmt: skip


@pytest.fixture(scope="session")
def moto() -> Iterator[int]:
    """Port of an S3 server."""
    pytest.importorskip("obstore")
    pytest.importorskip("moto")
    with serving() as port:
        yield port


@pytest.fixture
def bucket(moto: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of an empty prefix on the server, which the environment names."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in environment(moto).items():
        monkeypatch.setenv(name, value)
    open_place.cache_clear()
    return f"s3://{BUCKET}/{next(_numbers)}"


@pytest.fixture
def proxy(moto: int, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy before the server that does nothing yet; places that are opened now go through it."""
    with FaultProxy(moto, seed=20).running() as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{running.port}")
        open_place.cache_clear()
        yield running


@pytest.fixture
def impatient(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients of places that are opened now give up within a second or two."""
    pauses = {"init_backoff": timedelta(milliseconds=5), "max_backoff": timedelta(milliseconds=20), "base": 2}
    monkeypatch.setattr(places, "_PAUSES", (0.01, 0.02))
    monkeypatch.setattr(
        places, "_retries", lambda: {"max_retries": 2, "backoff": pauses, "retry_timeout": timedelta(seconds=5)}
    )
    monkeypatch.setenv("AWS_TIMEOUT", "200ms")
    open_place.cache_clear()


@dataclass(frozen=True)
class Opened:
    """A place, how another process opens it, and what faults befall it."""

    place: Place
    again: Callable[[], Place] | None  # picklable; None where no other process can
    proxy: FaultProxy | None = None

    def say(self, what: str) -> None:
        """Print totals, for ``pytest -s``."""
        print(f"\n{type(self.place).__name__}: {what}" + (f"; {self.proxy.totals()}" if self.proxy else ""))


@pytest.fixture(params=["disk", "memory", "moto", "faulty"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Opened:
    """A place of each kind, empty."""
    kind = request.param
    if kind == "disk":
        folder = tmp_path / "place"
        folder.mkdir()
        return Opened(DiskPlace(folder), functools.partial(DiskPlace, folder))
    if kind == "memory":
        pytest.importorskip("obstore")
        return Opened(open_place(f"memory:///{next(_numbers)}"), None)
    url: str = request.getfixturevalue("bucket")
    proxy: FaultProxy | None = request.getfixturevalue("proxy") if kind == "faulty" else None
    if proxy:
        proxy.rates = RATES
    return Opened(open_place(url), functools.partial(open_place, url), proxy)


@pytest.fixture
def place(opened: Opened) -> Place:
    return opened.place


Machine = Callable[[str], Path]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """The folder of one home in memory, as a machine of this name sees it; what it had copied is kept."""
    url, before = f"memory://{tmp_path.name}/lab", dict(disk._MIRRORS)
    monkeypatch.setattr(mirrors, "_FRESH_SECONDS", 0.0)

    def become(name: str) -> Path:
        monkeypatch.setenv("EMBCACHE_CACHE_DIR", str(tmp_path / name))
        open_mirror.cache_clear()
        return home_dir(url)

    yield become
    open_mirror.cache_clear()
    disk._MIRRORS.clear()
    disk._MIRRORS.update(before)


def the_mirror(path: Path) -> Mirror:
    found = disk.mirror_of(path)
    assert found is not None
    return found


def there(path: Path) -> list[str]:
    """Keys of all objects of the place behind a path."""
    return [entry.key for entry in the_mirror(path).place.list()]


def on(home: Path, store: Path) -> Path:
    """The same store as another machine sees it."""
    return home / store.relative_to(store.parents[1])
