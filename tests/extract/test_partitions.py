"""Extraction in partitions gives what it gives of one table, whatever happens in between."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest

import embcache.extract.extract as extracting
import embcache.extract.pixels as pixels
import embcache.extract.recipes as run
import embcache.extract.scan as scanning
import embcache.extract.worker as batching
import embcache.io as disk
from embcache.config import ExtractConfig
from embcache.data import partitioned
from embcache.data.dataset import ImageDataset, load_dataset
from embcache.data.partitioned import PartitionedDataset, load_partitioned
from embcache.errors import CorruptStoreError, DatasetError, DatasetNotFoundError, UsageError
from embcache.extract.engines.engine import OwedShard, OwedShards, ShardJob, ShardOutcome
from embcache.extract.engines.local import LocalEngine, Stop
from embcache.extract.extract import Extraction, extract
from embcache.extract.quarantine import LEFT, unusable
from embcache.extract.scan import scan_dataset
from embcache.maintain.gc import collect
from embcache.mirror import open_mirror
from embcache.paths import slug
from embcache.places import open_place
from embcache.store.commit import refresh_view
from embcache.store.feature_store import PIXELS, FeatureStore, list_stores
from embcache.store.reading import numbers_of_part, plan_numbers, plan_path, range_of
from tests.commands.shell import answer, embcache
from tests.extract.conftest import draw
from tests.extract.tiny import load_tiny
from tests.refusal import refused

ROWS, SHARD = 32, 16
LONG = [f"{k:03d}" for k in range(60)]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "load_backbone", load_tiny)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of 60 images with a table of them."""
    folder = tmp_path / "images"
    for name in LONG:
        draw(folder / f"{name}.png", int(name))
    write(folder, LONG)
    return folder


def write(root: Path, names: list[str], file: str = "t.parquet") -> None:
    labels = ["ab"[k % 2] for k in range(len(names))]
    pd.DataFrame({"path": [f"{n}.png" for n in names], "label": labels, "id": names}).to_parquet(root / file)


def load(root: Path, home: Path | None = None) -> PartitionedDataset:
    return load_partitioned(root / "t.parquet", name="d", rows=ROWS, home=home)


def go(dataset: ImageDataset | PartitionedDataset, home: Path | None = None, **more: object) -> Extraction:
    config = ExtractConfig.make(options={"rows_per_shard": SHARD, "batch_size": 4, **more})
    return extract(dataset, ["random"], config, home=home)[0]


def rows(store: FeatureStore) -> dict[str, bytes]:
    return {id_: row.tobytes() for id_, row in zip(store.ids.tolist(), store.features[:], strict=True)}


def facts(done: Extraction) -> tuple[int, ...]:
    return done.computed, done.cached, done.added, done.changed, done.left


def test_features_shards_and_counts_are_those_of_one_table(root: Path, home: Path, tmp_path: Path) -> None:
    one = go(load_dataset("folder", root / "t.parquet", name="d"), tmp_path / "one")
    several = go(load(root))
    assert facts(several) == facts(one) == (60, 0, 60, 0, 0)
    assert rows(several.store) == rows(one.store)
    assert several.store.recipe == one.store.recipe
    # A partition has whole shards: even the files are equal.
    for path in sorted((one.store.path / "shards").rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (several.store.path / path.relative_to(one.store.path)).read_bytes()
    assert several.store.sources() == one.store.sources()
    assert several.store.plans() == one.store.plans()
    assert facts(go(load(root))) == (0, 60, 0, 0, 0)
    assert not (home / "d" / "dataset.parquet").exists()


def test_plans_are_ranges_of_rows(root: Path, home: Path) -> None:
    done = go(load(root), rows_per_shard=20)
    store, path = done.store, done.store.path
    digests = list(load(root).partitions)
    found = [range_of(path, number) for number in plan_numbers(path)]
    # Runs of a few rows are listed.
    assert found == [(digests[0], 0), ("", 0), (digests[1], 0), ("", 0)]
    assert b'"rows"' not in plan_path(path, 0).read_bytes()
    assert [entry.id for entry in store.plans()[2]] == LONG[32:52]
    state = (root / "040.png").stat()
    entry = next(each for each in store.plans()[2] if each.id == "040")
    assert (entry.size, entry.mtime_ns) == (state.st_size, state.st_mtime_ns)


def test_an_interrupted_run_resumes_to_the_same_bytes(
    root: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = go(load(root, tmp_path / "whole"), tmp_path / "whole")
    original, calls = batching.compute_shard, []

    def interrupted(*arguments: object, **keywords: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(batching, "compute_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        go(load(root))
    monkeypatch.setattr(batching, "compute_shard", original)
    done = go(load(root))
    assert facts(done)[:2] == (28, 32)
    for folder in ("shards", "plan"):
        for path in sorted((whole.store.path / folder).rglob("*")):
            if path.is_file():
                assert path.read_bytes() == (done.store.path / path.relative_to(whole.store.path)).read_bytes()


def test_a_killed_process_loses_its_shard_alone(root: Path, home: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.extract.tiny_run import install; install()\n"
        "from tests.extract.test_partitions import load, go; go(load(Path(sys.argv[1])))"
    )
    dies = {**os.environ, "TINY_DIES": "1"}
    assert subprocess.run([sys.executable, "-c", code, str(root)], env=dies).returncode == -9
    done = go(load(root))
    assert facts(done)[:2] == (60, 0)
    assert rows(done.store) == rows(go(load_dataset("folder", root / "t.parquet", name="other")).store)


def test_a_run_that_is_stopped_says_what_is_left_of_all_partitions(root: Path, home: Path) -> None:
    class OneShard(Stop):
        """Requested while the first shard is computed."""

        @property
        def requested(self) -> bool:
            return bool(list(home.glob("d/*/shards/*")))

    config = ExtractConfig.make(options={"rows_per_shard": SHARD, "batch_size": 4})
    done = extract(load(root), ["random"], config, stop=OneShard())[0]
    assert (done.computed, done.left, done.undone) == (SHARD, 60 - SHARD, 60 - SHARD)
    assert facts(go(load(root))) == (60 - SHARD, SHARD, 28, 0, 0)


def test_a_stop_before_the_first_shard_leaves_everything(root: Path, home: Path) -> None:
    stop = Stop()
    stop.request()
    for dataset, begun in ((load(root), ROWS), (load_dataset("folder", root / "t.parquet"), 60)):
        (done,) = extract(dataset, ["random"], ExtractConfig(rows_per_shard=SHARD), home=home, stop=stop)
        assert (done.computed, done.left, done.undone, done.added) == (0, 60, 60, begun)


def test_changed_images_alone_are_computed_again(root: Path, home: Path) -> None:
    before = rows(go(load(root)).store)
    draw(root / "005.png", 1005)
    draw(root / "050.png", 1050)
    os.utime(root / "007.png")  # touched: hashed, and cached
    done = go(load(root))
    assert facts(done) == (2, 58, 0, 2, 0)
    after = rows(done.store)
    assert {id_ for id_ in after if after[id_] != before[id_]} == {"005", "050"}
    assert facts(go(load(root))) == (0, 60, 0, 0, 0)


def test_a_change_that_size_and_time_do_not_tell_is_found(root: Path, home: Path) -> None:
    data = {name: (root / f"{name}.png").read_bytes() for name in ("030", "031")}
    size = max(map(len, data.values()))
    for name, content in data.items():
        (root / f"{name}.png").write_bytes(content.ljust(size, b"\0"))
        os.utime(root / f"{name}.png", ns=(1, 1))
    before = rows(go(load(root)).store)
    (root / "030.png").write_bytes(data["031"].ljust(size, b"\0"))
    os.utime(root / "030.png", ns=(1, 1))
    done = go(load(root))
    assert facts(done) == (1, 59, 0, 1, 0)
    assert rows(done.store)["030"] == before["031"]


@pytest.mark.parametrize(
    "names",
    [
        [*LONG, "060", "061"],  # the last partition is another one
        ["060", *LONG],  # all are
        LONG[::-1],
        LONG[10:],
    ],
)
def test_images_that_moved_to_another_partition_are_cached(names: list[str], root: Path, home: Path) -> None:
    before = rows(go(load(root)).store)
    for name in ("060", "061"):
        draw(root / f"{name}.png", int(name))
    write(root, names)
    done = go(load(root))
    new = len(set(names) - set(LONG))
    assert facts(done) == (new, len(names) - new, new, 0, 0)
    after = rows(done.store.restrict(names))
    assert list(after) == names
    assert {id_: after[id_] for id_ in names if id_ in before} == {id_: before[id_] for id_ in names if id_ in before}
    assert facts(go(load(root))) == (0, len(names), 0, 0, 0)


def test_what_was_planned_for_other_partitions_does_no_harm(
    root: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run is stopped, then the table is cut otherwise: shards of old plans hold images of two partitions."""
    original = batching.compute_shard
    monkeypatch.setattr(batching, "compute_shard", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        go(load(root))
    with pytest.raises(KeyboardInterrupt):  # as a whole table: its shards go over partitions
        go(load_dataset("folder", root / "t.parquet", name="d"), rows_per_shard=SHARD)
    monkeypatch.setattr(batching, "compute_shard", original)
    write(root, LONG[3:])
    done = go(load(root))
    assert done.left == 0
    assert not done.quarantined
    assert list(rows(done.store.restrict(LONG[3:]))) == LONG[3:]
    assert facts(go(load(root))) == (0, 57, 0, 0, 0)


def test_gc_leaves_every_row_in_use(root: Path, home: Path) -> None:
    go(load(root))
    for name in ("001", "002", "033"):
        draw(root / f"{name}.png", 1000 + int(name))
    store = go(load(root)).store
    before = rows(store)
    assert collect(store.path).superseded == 3
    after = go(load(root))
    assert facts(after) == (0, 60, 0, 0, 0)
    assert rows(after.store) == before


def test_parts_of_a_run_together_are_the_whole(root: Path, home: Path, tmp_path: Path) -> None:
    whole = go(load(root, tmp_path / "whole"), tmp_path / "whole")
    first = go(load(root), part=(1, 2))
    assert first.left == 60 - first.computed > 0
    assert first.undone == 0
    second = go(load(root), part=(2, 2))
    assert (first.computed + second.computed, second.left) == (60, 0)
    assert rows(second.store) == rows(whole.store)


def test_missing_and_broken_images_are_quarantined_and_tried_again(root: Path, home: Path) -> None:
    (root / "002.png").write_bytes(b"no image")
    (root / "040.png").unlink()
    done = go(load(root), max_bad=2)
    assert sorted(done.quarantined) == ["002", "040"]
    assert facts(go(load(root), max_bad=2)) == (0, 60, 0, 0, 0)
    assert go(load(root), max_bad=2, retry_quarantined=True).retried == 2
    draw(root / "040.png", 40)
    done = go(load(root), max_bad=2)
    assert facts(done) == (1, 59, 0, 1, 0)
    assert sorted(done.quarantined) == ["002"]


@pytest.mark.parametrize("limit", [2, "4%"])
@pytest.mark.usefixtures("home")
def test_unusable_images_are_counted_over_all_partitions(limit: int | str, root: Path) -> None:
    for name in ("002", "003"):
        (root / f"{name}.png").write_bytes(b"no image")
    assert sorted(go(load(root), max_bad=limit).quarantined) == ["002", "003"]
    (root / "040.png").write_bytes(b"no image")
    with refused(DatasetError, "too-many-bad-images") as caught:
        go(load(root), max_bad=limit)
    assert "3 of 60" in caught.value.problem
    assert "--max-bad 3" in str(caught.value.fix)
    assert len(go(load(root), max_bad=3).quarantined) == 3


class Eager(LocalEngine):
    """Plans every partition before the first shard is computed, as workers may do that are fast."""

    def run(self, owed: Iterable[OwedShards], job: ShardJob) -> Iterator[OwedShards]:
        yield from super().run(list(owed), job)


def test_unusable_images_of_partitions_that_are_open_at_once_end_the_run(
    root: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("002", "040"):
        (root / f"{name}.png").write_bytes(b"no image")
    monkeypatch.setattr(extracting, "ray_connection", lambda config: nullcontext())
    monkeypatch.setattr("embcache.extract.engines.ray_cluster.check_room", lambda threads, gpus: 1)
    monkeypatch.setattr(extracting._Run, "_engine", lambda run, label, *_: Eager(label))
    with refused(DatasetError, "too-many-bad-images") as caught:
        go(load(root), max_bad=1, engine="ray")
    assert "2 of 60 (2 of them found by this run)" in caught.value.problem
    assert go(load(root), max_bad=1, engine="ray").computed == 0  # nothing is computed, so nothing is judged
    draw(root / "002.png", 2)
    draw(root / "003.png", 1003)
    (root / "041.png").write_bytes(b"no image")
    draw(root / "040.png", 40)
    assert facts(go(load(root), max_bad=1, engine="ray")) == (4, 56, 0, 4, 0)  # two are repaired, one is broken
    assert unusable({"a": LEFT, "b": "the file is empty"}) == {"b": "the file is empty"}


def test_only_the_last_shard_of_all_completes_a_run(
    root: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, seen, settle = Stop(), list[bool](), OwedShards.settle
    config = ExtractConfig(rows_per_shard=SHARD)

    def record(shards: OwedShards, shard: OwedShard, outcome: ShardOutcome) -> None:
        seen.append(stop.complete)
        settle(shards, shard, outcome)

    monkeypatch.setattr(OwedShards, "settle", record)
    extract(load(root), ["random"], config, home=home, stop=stop)
    assert seen == [False, False, False, True]
    draw(root / "059.png", 1059)
    seen.clear()
    scan = extracting.scan_dataset
    monkeypatch.setattr(extracting, "scan_dataset", lambda *args: seen.append(stop.complete) or scan(*args))
    extract(load(root), ["random"], config, home=home, stop=stop)  # nothing is owed of the first partition
    assert seen == [False, False, True]
    assert stop.complete
    seen.clear()
    monkeypatch.setattr(extracting, "scan_dataset", scan)
    extract(load(root, tmp_path), ["random"], replace(config, stage="pixels"), home=tmp_path, stop=stop)
    assert seen.index(True) == len(seen) - 1


def test_a_partition_is_forgotten_when_it_is_done(
    root: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive, seen, scan = list[int](), list[weakref.ref[ImageDataset]](), extracting.scan_dataset

    def look(dataset: ImageDataset, *more: Any) -> Any:
        gc.collect()
        alive.append(sum(each() is not None for each in seen))
        seen.append(weakref.ref(dataset))
        return scan(dataset, *more)

    monkeypatch.setattr(extracting, "scan_dataset", look)
    for device in ("cpu", "cpu,cpu"):
        parts = load_partitioned(root / "t.parquet", name=slug(device), rows=16, home=home)
        go(parts, device=device) if device == "cpu" else extract(
            parts, ["tests.extract.slow_net:slow"], ExtractConfig(device=device), home=home
        )
    assert max(alive) == 0


def test_other_labels_and_columns_leave_what_is_known_of_the_files(
    root: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scanning, "TICK_NS", 0)  # the images were written just now
    store = go(load(root)).store
    frame = pd.read_parquet(root / "t.parquet")
    frame.assign(label="c", age=[str(k) for k in range(60)]).to_parquet(root / "t.parquet")
    monkeypatch.setattr(scanning, "_digests", lambda *_: pytest.fail("an image is read"))
    assert facts(go(load(root))) == (0, 60, 0, 0, 0)
    parts = [part.part for part in load(root).parts()]
    assert [numbers_of_part(store.path, part)[1] for part in parts if part] == [[0, 1, 3], [2, 3]]  # 3: a list of IDs


def test_links_are_followed_inside_the_root_and_nowhere_else(root: Path, home: Path, tmp_path: Path) -> None:
    write(root, [*LONG, "060", "inner/061"])
    (root / "060.png").symlink_to("000.png")
    (root / "inner").symlink_to(root)
    draw(root / "061.png", 61)
    dataset = load(root)
    with ThreadPoolExecutor(2) as pool:
        scan = scan_dataset(list(dataset.parts())[1], home, pool).scan
    assert scan.states[28, 3] == (root / "000.png").stat().st_ino
    assert scan.states[29, 3] == (root / "061.png").stat().st_ino
    draw(tmp_path / "elsewhere" / "060.png", 60)
    (root / "060.png").unlink()
    (root / "060.png").symlink_to(tmp_path / "elsewhere" / "060.png")
    with refused(DatasetError, "outside-root"):
        go(dataset)
    (root / "060.png").unlink()
    (root / "inner").unlink()
    (root / "inner").symlink_to(tmp_path / "elsewhere")
    with refused(DatasetError, "outside-root"):
        go(dataset)


def test_sizes_of_all_partitions_settle_the_transform(root: Path, home: Path) -> None:
    assert go(load(root)).store.recipe.transform["resize"] is None
    draw(root / "059.png", 59, size=30)  # in the last partition
    one = go(load_dataset("folder", root / "t.parquet", name="one")).store.recipe
    other = go(load(root)).store.recipe
    assert other.transform == one.transform
    assert other.transform["resize"]
    for name in LONG:
        (root / f"{name}.png").write_bytes(b"")
    with refused(DatasetNotFoundError, "no-readable-image"):
        go(load(root))


def test_a_partition_that_is_lost_is_told_and_written_anew(root: Path, home: Path) -> None:
    done = go(load(root), rows_per_shard=20)
    dataset = load(root)
    (home / "d" / "partitions" / f"{next(iter(dataset.partitions))}.parquet").unlink()
    (home / "d" / "partitions.json").unlink()  # plans name them too
    assert "a partition of a dataset is missing" in " ".join(embcache("verify").output.split())
    with refused(CorruptStoreError, "partition-damaged"):
        done.store.plans()
    assert facts(go(load(root))) == (0, 60, 0, 0, 0)


def test_one_partition_is_read_without_the_others(root: Path, home: Path) -> None:
    done = go(load(root), rows_per_shard=ROWS)
    for part in load(root).parts():
        assert part.part is not None
        store = done.store.of_part(part.part)
        assert store.ids.tolist() == part.table["id"].tolist()
        x, y, _ = store.arrays(part)
        assert y.tolist() == part.labels.tolist()
        assert np.array_equal(x, done.store.restrict(part.table["id"]).features[:])


def test_images_may_be_decoded_before_they_are_computed(root: Path, home: Path, tmp_path: Path) -> None:
    plain = go(load(root, tmp_path / "plain"), tmp_path / "plain")
    staged = go(load(root), stage="pixels")
    assert facts(staged) == facts(plain)
    assert rows(staged.store) == rows(plain.store)
    assert not (home / "d" / "dataset.parquet").exists()
    draw(root / "041.png", 1041)
    assert facts(go(load(root), stage="pixels")) == (1, 59, 0, 1, 0)


def test_only_shards_of_owed_images_are_decoded_first(root: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(load(root))
    draw(root / "041.png", 1041)
    monkeypatch.setattr(pixels, "MAX_ROWS", 4)
    assert facts(go(load(root), stage="pixels")) == (1, 59, 0, 1, 0)
    (frames,) = (home / "d").glob(f"{PIXELS}-*")
    assert FeatureStore(frames).ids.tolist() == ["040", "041", "042", "043"]


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Callable[[str], None]]]:
    """A home in an object store, and what makes the next command one of another machine."""
    pytest.importorskip("obstore")
    monkeypatch.setattr(disk, "_MIRRORS", {})

    def become(machine: str) -> None:
        open_mirror.cache_clear()
        monkeypatch.setenv("EMBCACHE_CACHE_DIR", str(tmp_path / machine))

    yield f"memory://{tmp_path.name}/lab", become
    open_mirror.cache_clear()


def test_a_home_in_an_object_store_is_shared(
    root: Path, tmp_path: Path, home: Path, lab: tuple[str, Callable[[str], None]]
) -> None:
    shared, become = lab
    for machine in ("one", "two"):
        become(machine)
        done = extract(load_partitioned(root / "t.parquet", name="d", rows=ROWS, home=shared), ["random"], home=shared)
        assert facts(done[0])[:2] == ((60, 0) if machine == "one" else (0, 60))
    become("three")  # which has read no table
    (found,) = list_stores(shared, "d")
    assert [entry.id for entries in found.plans().values() for entry in entries] == LONG
    assert len(list((tmp_path / "three").rglob("partitions/*.parquet"))) == 2
    assert rows(found) == rows(go(load(root)).store)


def test_partitions_in_an_object_store_are_verified_there_and_written_anew(
    root: Path, lab: tuple[str, Callable[[str], None]]
) -> None:
    shared, become = lab

    def verify(machine: str, *words: str) -> tuple[int, str]:
        become(machine)
        done = embcache("verify", "--home", shared, *words)
        return done.exit_code, " ".join(done.output.split())

    become("one")
    dataset = load_partitioned(root / "t.parquet", name="d", rows=ROWS, home=shared)
    (done,) = extract(dataset, ["random"], home=shared)
    place = open_place(shared)
    first, second = (f"home/d/partitions/{digest}.parquet" for digest in dataset.partitions)
    for machine in ("one", "two"):
        become(machine)
        assert not refresh_view(list_stores(shared, "d")[0].path)
        code, said = verify(machine)
        assert code == 0, said
    for spoil in (lambda: place.delete(first), lambda: place.put(second, b"junk")):
        spoil()
        for machine in ("one", "three"):
            code, said = verify(machine)
            assert code == 1
            assert "a partition of a dataset is" in said
            assert "dataset.parquet" not in said
        verify("one", "--repair")
        code, said = verify("four")
        assert code == 0, said
    assert done.computed == 60


def test_the_command_reads_large_tables_in_partitions(root: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["extract", "--backbone", "random", "--dataset", "folder", "--data-root", str(root / "t.parquet")]
    monkeypatch.setattr(partitioned, "MOST_ROWS", 30)  # also of a partition
    (found,) = answer(*words, "--name", "d", "--batch-size", 4)
    assert (found["dataset"], found["computed"], found["left"]) == ("d", 60, 0)
    assert len(list((home / "d" / "partitions").glob("*.scan.parquet"))) == 2
    assert "every image was cached already" in embcache("extract", "--backbone", "random", "--dataset", "d").output
    assert "no damage" in embcache("verify", "--dataset", "d").output
    with refused(UsageError, "dry-run-partitioned"):
        embcache(*words, "--dry-run")
    (probed,) = answer("probe", "--dataset", "d", "--backbone", "random", "--head", "linear", "--subset", 10)
    assert probed["n_train"] == 10


def test_places_of_array_files_are_images(tmp_path: Path, home: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 24, 24, 3), np.uint8)
    for k in range(2):
        with h5py.File(tmp_path / f"{k}.h5", "w") as file:
            file["x"] = pixels[15 * k : 15 * k + 15]
    columns = {"path": [f"{k // 15}.h5" for k in range(30)], "id": [f"i{k}" for k in range(30)]}
    frame = pd.DataFrame({**columns, "row": [k % 15 for k in range(30)], "label": ["a", "b"] * 15})
    frame.to_parquet(tmp_path / "t.parquet")
    dataset = load_partitioned(tmp_path / "t.parquet", rows=20, places="row")
    done = go(dataset, rows_per_shard=20)
    assert facts(done)[:2] == (30, 0)
    assert facts(go(dataset, rows_per_shard=20))[:2] == (0, 30)
    with h5py.File(tmp_path / "1.h5", "r+") as file:
        file["x"][3] = 7
    assert facts(go(dataset, rows_per_shard=20)) == (1, 29, 0, 1, 0)


def test_several_devices_go_from_partition_to_partition(root: Path, home: Path, tmp_path: Path) -> None:
    stop, config = Stop(), ExtractConfig(rows_per_shard=4, device="cpu,cpu")
    (done,) = extract(load(root), ["tests.extract.slow_net:slow"], config, home=home, stop=stop)
    assert facts(done) == (60, 0, 60, 0, 0)
    assert not stop._callbacks  # the processes of a partition, and its table, are forgotten with it
    config = ExtractConfig(rows_per_shard=4)
    (alone,) = extract(load(root, tmp_path), ["tests.extract.slow_net:slow"], config, home=tmp_path)
    assert rows(alone.store) == rows(done.store)


def test_the_processes_of_other_devices_know_that_it_is_a_partition(root: Path, home: Path) -> None:
    part = next(load(root).parts())
    again = ImageDataset.from_parquet_bytes(part.to_parquet_bytes())
    assert again.part == part.part
    with ThreadPoolExecutor(2) as pool:
        scans = [scan_dataset(each, home, pool).scan for each in (part, again)]
    assert np.array_equal(scans[0].states, scans[1].states)
    object.__setattr__(part, "table", part.table.assign(path=["../x.png"] * len(part)))
    with refused(DatasetError, "outside-root"):  # anyone may write that it is one
        ImageDataset.from_parquet_bytes(part.to_parquet_bytes())
