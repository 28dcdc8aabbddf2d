"""What every place promises, on disk, in memory, and on an object store with and without faults."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from embcache.errors import StoreError, UsageError
from embcache.places import Place, is_url, open_place, probe
from tests.places.conftest import Opened
from tests.places.faults import FaultProxy
from tests.places.server import PAGE
from tests.refusal import refused

RACERS = 4
ODD = [
    "plain", "a/b/c.json", "with blank/and  two", "é/文/🫀.png", "e\u0301", "A", "a+b&c=d", "100%", "%41", "a#b?c",
    "~x", "..a/b..", "semi;colon", "quote'\"", "x" * 200, "a@b:c", "[0]", "{1}",
]  # fmt: skip


def _payload(racer: int, key: str, size: int = 1000) -> bytes:
    return f"{key} by {racer} ".encode() * (size // len(f"{key} by {racer} "))


def _race(place: Place, keys: Sequence[str]) -> list[list[bool]]:
    """Whether each of several threads won each key, all at once."""
    start = threading.Barrier(RACERS)

    def run(racer: int) -> list[bool]:
        won = []
        for key in keys:
            start.wait(120)
            won.append(place.put_new(key, _payload(racer, key)))
        return won

    with ThreadPoolExecutor(RACERS) as pool:
        return [list(won) for won in zip(*pool.map(run, range(RACERS)), strict=True)]


def test_of_racing_threads_one_wins(opened: Opened) -> None:
    keys = [f"shards/{n:06d}/commit.json" for n in range(15)]
    for key, won in zip(keys, _race(opened.place, keys), strict=True):
        assert sum(won) == 1, key
        assert opened.place.get(key) == _payload(won.index(True), key)
    assert [entry.key for entry in opened.place.list("shards/")] == keys
    opened.say(f"{len(keys)} races of {RACERS} threads, {len(keys)} winners")


def _child(again: Callable[[], Place], racer: int, keys: Sequence[str], start, won) -> None:  # type: ignore[no-untyped-def]
    place = again()
    start.wait(120)
    won.put((racer, [place.put_new(key, _payload(racer, key)) for key in keys]))


def test_of_racing_processes_one_wins(opened: Opened) -> None:
    if opened.again is None:
        pytest.skip("a place in memory has one process")
    context = multiprocessing.get_context("spawn")
    keys, racers = [f"commits/{n}" for n in range(10)], 3
    start, answers = context.Barrier(racers), context.Queue()
    children = [
        context.Process(target=_child, args=(opened.again, racer, keys, start, answers)) for racer in range(racers)
    ]
    for child in children:
        child.start()
    won = dict(answers.get(timeout=600) for _ in children)
    for child in children:
        child.join(60)
    for n, key in enumerate(keys):
        winners = [racer for racer in range(racers) if won[racer][n]]
        assert len(winners) == 1, key
        assert opened.place.get(key) == _payload(winners[0], key)
    opened.say(f"{len(keys)} races of {racers} processes, {len(keys)} winners")


def test_a_key_is_created_once(place: Place) -> None:
    assert place.put_new("a/b", b"first")
    assert not place.put_new("a/b", b"second")
    assert place.get("a/b") == b"first"


def test_put_replaces(place: Place) -> None:
    place.put("a", b"one")
    (before,) = place.list()
    place.put("a", b"another")
    (after,) = place.list()
    assert place.get("a") == b"another"
    assert (before.size, after.size) == (3, 7)
    assert before.etag != after.etag


def test_what_is_absent_is_not_found(place: Place) -> None:
    place.put("folder/there", b"x")
    for key in ("folder/absent", "absent/there", "folder/there/below"):
        with pytest.raises(FileNotFoundError):
            place.get(key)
    assert [entry.key for entry in place.list("none/")] == []


def test_deleted_is_absent(place: Place) -> None:
    for key in ("a/one", "a/two"):
        place.put(key, key.encode())
    place.delete("a/one")
    place.delete("a/one")
    place.delete("never/there")
    with pytest.raises(FileNotFoundError):
        place.get("a/one")
    assert place.get("a/two") == b"a/two"
    assert place.put_new("a/one", b"again")
    assert place.get("a/one") == b"again"


@pytest.mark.parametrize("size", [0, 1, 6 << 20])
def test_values_of_any_size(place: Place, size: int) -> None:
    data = (bytes(range(256)) * (size // 256 + 1))[:size]
    place.put("put", data)
    assert place.put_new("new", data)
    assert place.get("put") == place.get("new") == data
    assert {entry.size for entry in place.list()} == {size}


def test_odd_keys_are_kept_apart(place: Place) -> None:
    for key in ODD:
        assert place.put_new(key, key.encode()), key
    for key in ODD:
        assert place.get(key) == key.encode(), key
    assert [entry.key for entry in place.list()] == sorted(ODD, key=str.encode)


def test_lists_are_whole_and_in_order(place: Place) -> None:
    keys = sorted([*(f"a/{n:02d}" for n in range(2 * PAGE)), *(f"a-b/{n}" for n in range(PAGE)), "a/x/y/z", "b", "a0"])
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda key: place.put(key, key.encode()), reversed(keys)))
    found = list(place.list())
    assert [entry.key for entry in found] == keys
    assert [entry.size for entry in found] == [len(key) for key in keys]
    assert [entry.key for entry in place.list("a/")] == [key for key in keys if key.startswith("a/")]
    assert [entry.key for entry in place.list("a/x/")] == ["a/x/y/z"]
    for after in (keys[0], keys[PAGE], "a/05x", keys[-1]):
        assert [entry.key for entry in place.list(after=after)] == [key for key in keys if key > after]
    assert [e.key for e in place.list("a/", after="a/09")] == [k for k in keys if k.startswith("a/") and k > "a/09"]


def test_a_listing_of_thousands_is_whole() -> None:
    pytest.importorskip("obstore")
    place, keys = open_place("memory://thousands"), [f"{n // 7}/{n:05d}" for n in range(2500)]
    for key in keys:
        place.put(key, b"")
    assert [entry.key for entry in place.list()] == sorted(keys)
    assert [entry.key for entry in place.list(after="3")] == sorted(key for key in keys if key > "3")


def test_readers_see_one_value_or_the_other(place: Place) -> None:
    values = [bytes([n]) * 300_000 for n in range(4)]
    place.put("key", values[0])
    done = threading.Event()

    def read() -> int:
        reads = 0
        while not done.is_set() or reads == 0:
            assert place.get("key") in values
            reads += 1
        return reads

    with ThreadPoolExecutor(2) as pool:
        reading = [pool.submit(read) for _ in range(2)]
        try:
            for n in range(12):
                place.put("key", values[n % 4])
        finally:
            done.set()
        assert all(each.result() for each in reading)


def test_a_good_place_is_fit(place: Place) -> None:
    probe(place)
    assert [entry.key for entry in place.list("stores/")] == []


# One fault at a time, on every request


def test_a_lost_answer_to_ones_own_object_is_a_win(bucket: str, proxy: FaultProxy) -> None:
    place = open_place(bucket)
    for n, kind in enumerate(["lost", "late 500", "late hang"]):
        proxy.force("PUT", kind)
        assert place.put_new(f"{n}", b"mine"), kind
        assert not place.put_new(f"{n}", b"another's"), kind
        assert place.get(f"{n}") == b"mine"
    assert proxy.faults.total() == 3


def test_a_conflict_with_nothing_is_tried_again(bucket: str, proxy: FaultProxy) -> None:
    place = open_place(bucket)
    proxy.force("PUT", "409", "409")
    assert place.put_new("key", b"mine")
    assert place.get("key") == b"mine"
    assert proxy.faults["409"] == 2


@pytest.mark.usefixtures("impatient")
def test_a_flipped_bit_is_never_returned(bucket: str, proxy: FaultProxy) -> None:
    place = open_place(bucket)
    place.put("key", b"value" * 100)
    proxy.force("GET", "flipped")
    assert place.get("key") == b"value" * 100
    proxy.rates = {"flipped": 1.0}
    with refused(StoreError, "place-damaged") as caught:
        place.get("key")
    assert "key" in str(caught.value)


@pytest.mark.parametrize("kind", ["500", "503", "reset", "truncated", "hang"])
@pytest.mark.usefixtures("impatient")
def test_a_place_that_fails_is_an_error_and_no_value(kind: str, bucket: str, proxy: FaultProxy) -> None:
    place = open_place(bucket)
    place.put("key", b"value" * 100)
    proxy.rates = {kind: 1.0}
    with refused(StoreError, "place-unavailable") as caught:
        place.get("key")
    assert "hunter2" not in str(caught.value)
    if kind != "truncated":
        with refused(StoreError, "place-unavailable"):
            place.put_new("other", b"mine")
        with refused(StoreError, "place-unavailable"):
            list(place.list())
    proxy.rates = {}
    assert place.get("key") == b"value" * 100
    assert [entry.key for entry in place.list()] == ["key"]


def test_a_store_that_ignores_conditions_is_unfit(bucket: str, proxy: FaultProxy) -> None:
    proxy.ignore_conditions = True
    with refused(StoreError, "place-unfit") as caught:
        probe(open_place(bucket))
    assert bucket in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["s3://", "s3:", "s3://AKIA:hunter2@bucket/x", "s3://bucket:80/x", "s3://bucket/a//b", "gs://bucket/../x",
     "az://bucket/a?b", "s3://bucket/a%41", "memory://a#b/c"],
)  # fmt: skip
def test_addresses_that_mean_other_places_are_refused(url: str) -> None:
    assert is_url(url)
    with refused(UsageError, "place-address") as caught:
        open_place(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.usefixtures("impatient")
def test_without_credentials(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")  # of a machine that has a role
    with refused(StoreError, "place-refused") as caught:
        open_place(bucket).get("key")
    assert "AWS_PROFILE" in str(caught.value)


@pytest.mark.usefixtures("impatient")
def test_nothing_listens(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with refused(StoreError, "place-unavailable"):
        open_place(bucket).get("key")
