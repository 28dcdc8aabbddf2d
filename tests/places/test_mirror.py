"""A home in an object store is one home for all machines, whatever lies in the folders that mirror it."""

from __future__ import annotations

import hashlib
import itertools
import json
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

import embcache.mirror as mirrors
from embcache import io as disk
from embcache.backbones import networks
from embcache.backbones.catalog import find_backbone, load_backbone
from embcache.backbones.transforms import choose_transform
from embcache.cli import app
from embcache.data.dataset import load_dataset
from embcache.errors import CorruptStoreError, StoreError, UsageError
from embcache.extract import recipes
from embcache.extract.engines.engine import Engine, OwedShards, ShardJob
from embcache.extract.pixels import PixelJob, cache_pixels
from embcache.io import replace_file
from embcache.maintain.gc import collect, collect_home
from embcache.maintain.repair import Rebuild, repair_store
from embcache.maintain.verify import verify_store
from embcache.mirror import Mirror, open_mirror
from embcache.paths import addressed, home_dir, home_text, slug
from embcache.places import bring_file, cache_bytes, open_place
from embcache.probe.probe import probe_features
from embcache.runs.folders import find_run, list_results, load_heads, replace_result, runs_dir
from embcache.sealed import seal
from embcache.store import commit, reading
from embcache.store.commit import commit_shard, is_committed, publish_plan, write_view
from embcache.store.feature_store import FeatureStore, list_stores
from embcache.store.lease import Lease
from tests.extract.conftest import images
from tests.extract.tiny import load_tiny, run_extraction
from tests.places.conftest import Machine, on, the_mirror, there
from tests.refusal import refused
from tests.store.build import add, make_rows, make_store, plan, quick_disk

__all__ = ["images", "quick_disk"]
pytest.importorskip("obstore")
pytestmark = pytest.mark.usefixtures("quick_disk")


def test_what_one_machine_commits_another_reads(machine: Machine) -> None:
    store = make_store(machine("one"))
    rows = add(store, 0, ["a", "b", "c", "d"], bad=["b"])
    add(store, 1, ["e"])
    other = on(machine("two"), store)
    assert other != store
    read = FeatureStore(other)
    assert read.ids.tolist() == ["a", "c", "d", "e"]
    np.testing.assert_array_equal(read.features[:3], rows.features[[0, 2, 3]])
    assert read.quarantined == {"b": "truncated: b"}
    assert read.sources()["e"].size == 100
    assert [s.path for s in list_stores(other.parents[1])] == [other]


def test_features_are_brought_when_they_are_read_and_not_before(machine: Machine) -> None:
    store = make_store(machine("one"))
    add(store, 0, ["a", "b"])
    add(store, 1, ["c", "d"])
    other = FeatureStore(on(machine("two"), store))
    chunk = "data.zarr/features/c/0/0"
    assert other.ids.tolist() == ["a", "b", "c", "d"]
    assert [(other.path / "shards" / name / chunk).exists() for name in ("000000", "000001")] == [False, False]
    other.features[2]
    assert [(other.path / "shards" / name / chunk).exists() for name in ("000000", "000001")] == [False, True]


def test_of_two_attempts_at_a_shard_one_counts_on_every_machine(machine: Machine) -> None:
    store = make_store(machine("one"))
    plan(store, 0, ["a", "b"])
    first, second = make_rows(["a", "b"], seed=1), make_rows(["a", "b"], seed=2)
    other = on(machine("two"), store)
    other_mirror = the_mirror(other)
    assert commit_shard(store, 0, first)
    # The second machine had begun before that: it does not look before it commits.
    files = {"data.zarr/x": b"other bytes"}
    assert not other_mirror.commit_folder(other / "shards" / "000000", files, {"rows": 2, "files": {}})
    assert not commit_shard(other, 0, second)
    np.testing.assert_array_equal(FeatureStore(other).features[:], first.features)
    assert len([key for key in there(store) if "/commits/" in key]) == 1


def test_equal_work_is_one_attempt(machine: Machine) -> None:
    store = make_store(machine("one"))
    plan(store, 0, ["a"])
    other = on(machine("two"), store)
    rows = make_rows(["a"])
    assert commit_shard(store, 0, rows)
    keys = there(store)
    commit = json.loads(disk.read_regular(store / "shards/000000/commit.json"))
    files = {name: disk.read_regular(store / "shards/000000" / name) for name in commit["files"]}
    content = {key: value for key, value in commit.items() if key not in ("attempt", "crc32c")}
    assert the_mirror(other).commit_folder(other / "shards/000000", files, content)
    assert there(store) == keys


def test_a_plan_is_published_once(machine: Machine) -> None:
    store = make_store(machine("one"))
    other = on(machine("two"), store)
    assert plan(store, 0, ["a", "b"])
    assert not publish_plan(other, 0, [reading.PlanEntry("z", 1, 1)])
    assert [entry.id for entry in reading.read_plan(other, 0)] == ["a", "b"]
    assert reading.plan_numbers(other) == [0]
    assert not is_committed(other, 0)


def test_a_store_is_created_once_with_one_set_of_canaries(machine: Machine) -> None:
    store = make_store(machine("one"), rows_per_shard=8)
    home = machine("two")
    other = make_store(home, rows_per_shard=8)
    assert reading.read_header(other) == reading.read_header(store)
    assert [key for key in there(store) if key.endswith("recipe.json")] == [f"home/ds/{store.name}/recipe.json"]


def test_hdf5_is_refused(machine: Machine) -> None:
    with refused(UsageError, "format-in-place"):
        make_store(machine("one"), "hdf5")


def test_flipped_bytes_are_found_and_repaired_and_never_returned(
    machine: Machine, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes, "load_backbone", load_tiny)
    dataset, home = load_dataset("folder", root=images, name="toy"), machine("one")
    store = run_extraction(["random"], dataset, home=home, rows_per_shard=8)[0].store
    place = the_mirror(store.path).place
    [key] = [key for key in there(store.path) if "/000001/" in key and "features/c/0" in key]
    data = bytearray(place.get(key))
    data[5] ^= 4
    place.put(key, bytes(data))
    fresh = FeatureStore(on(machine("two"), store.path))
    with pytest.raises(CorruptStoreError):
        fresh.features[:]
    check = verify_store(store.path)  # the copy of this machine is as it should be: what counts is there
    assert [(damage.kind, damage.shard) for damage in check.damage] == [("shard", 1)]
    done: list[str] = []
    assert not repair_store(check, lambda: dataset, Rebuild(home=home), done=done).damage
    np.testing.assert_array_equal(FeatureStore(on(machine("three"), store.path)).features[:], store.features[:])


def test_a_damaged_document_is_reported(machine: Machine) -> None:
    store = make_store(machine("one"))
    add(store, 0, ["a"])
    key = f"home/ds/{store.name}/plan/000000.json"
    the_mirror(store).place.put(key, the_mirror(store).place.get(key)[:-9])
    assert {damage.kind for damage in verify_store(store).damage} == {"plan"}


def test_a_shard_that_is_computed_otherwise_is_not_put_in_place_of_a_committed_one(machine: Machine) -> None:
    store = make_store(machine("one"))
    add(store, 0, ["a", "b"])
    with refused(StoreError, "shard-differs"):
        commit_shard(store, 0, make_rows(["a", "b"], seed=9), damaged=True)
    assert commit_shard(store, 0, make_rows(["a", "b"], seed=0), damaged=True)


def test_gc_removes_attempts_that_do_not_count_and_no_others(machine: Machine) -> None:
    store = make_store(machine("one"))
    add(store, 0, ["a", "b"])
    plan(store, 1, ["c"])
    top = f"attempts/ds/{store.name}"
    place = the_mirror(store).place
    place.put(f"{top}/000000/{'0' * 64}/data.zarr/x", b"lost the race")
    place.put(f"{top}/000001/{'0' * 64}/data.zarr/x", b"may still win")
    keys = there(store)
    assert collect(store, dry_run=True).leftovers == 1
    assert there(store) == keys
    assert (found := collect(store)).leftovers == 1
    assert found.freed == 13
    assert set(keys) - set(there(store)) == {f"{top}/000000/{'0' * 64}/data.zarr/x"}
    assert not verify_store(store).damage


def test_leases_hold_across_machines_and_end_with_their_holder(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(machine("one"))
    plan(store, 0, ["a"])
    other = on(machine("two"), store)
    with Lease.acquire(store, 0) or pytest.fail("not leased") as lease:
        assert lease.held
        assert Lease.acquire(other, 0) is None
    second = Lease.acquire(other, 0)
    assert second is not None
    monkeypatch.setattr(Mirror, "age", lambda mirror, path: 1e9)  # no beat for long
    third = Lease.acquire(store, 0)
    assert third is not None
    assert third.held
    assert not second.held
    third.release()
    second.release()
    assert not [key for key in there(store) if key.startswith("leases/")]


def test_a_lease_on_what_is_not_finished_is_this_machines_own(machine: Machine) -> None:
    folder = machine("one") / "ds" / "runs" / ".checkpoints"
    for name in ("leases", "staging"):
        (folder / name).mkdir(parents=True)
    with Lease.acquire(folder, 0) or pytest.fail("not leased") as lease:
        assert lease.held
        assert Lease.acquire(folder, 0) is None
        assert there(folder) == []
    with Lease.acquire(folder, 0) or pytest.fail("not released"):
        pass


def test_ages_are_told_by_the_clock_of_the_place(machine: Machine) -> None:
    store = make_store(machine("one"))
    with Lease.acquire(store, 0) or pytest.fail("not leased") as lease:
        assert 0 <= the_mirror(store).age(lease.path) < 5
    assert the_mirror(store).age(lease.path) == float("inf")


def test_manifests_stand_for_the_commits_of_many_shards(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirrors, "_FOLDED", 2)
    store = make_store(machine("one"))
    for number in range(5):
        add(store, number, [f"{number}"])
    the_mirror(store).fold(store, reading.committed_numbers(store))
    assert [key[-11:] for key in there(store) if "/manifests/" in key] == ["000000.json", "000002.json"]
    other = on(machine("two"), store)
    reads: list[str] = []
    place = the_mirror(other).place
    original = place.get
    monkeypatch.setattr(place, "get", lambda key: reads.append(key) or original(key))
    assert reading.committed_numbers(other) == [0, 1, 2, 3, 4]
    names = ("commits/000004", "manifests/000000", "manifests/000002")
    assert sorted(reads) == [f"home/ds/{store.name}/{name}.json" for name in names]
    assert FeatureStore(other).ids.tolist() == ["0", "1", "2", "3", "4"]


def test_the_oldest_copies_go_where_the_cache_is_full(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(machine("one"), row_shape=(1000,))
    rows = [add(store, number, [f"{number}"], row_shape=(1000,)) for number in range(6)]
    monkeypatch.setenv("EMBCACHE_CACHE_SIZE", "60kB")  # three shards of 16 kB and a little
    monkeypatch.setattr(mirrors, "_USED_SECONDS", -60.0)
    other = FeatureStore(on(machine("two"), store))
    for _ in range(2):
        for number in range(6):
            np.testing.assert_array_equal(other.features[number], rows[number].features[0])
    kept = sum(path.lstat().st_size for path in (other.path / "shards").rglob("*") if path.is_file())
    assert kept < 90_000
    monkeypatch.setenv("EMBCACHE_CACHE_SIZE", "plenty")
    with refused(UsageError, "cache-size"):
        cache_bytes()


def test_the_view_is_a_reference_file(machine: Machine) -> None:
    store = make_store(machine("one"))
    add(store, 0, ["a", "b"])
    add(store, 1, ["c"])
    write_view(store)
    refs = json.loads(disk.read_regular(store / "view.refs.json"))["refs"]
    place = the_mirror(store).place
    address, start, size = refs["features/c/1/0"]
    chunk = place.get(address.removeprefix(f"{place.url}/"))
    assert (start, size) == (0, len(chunk))
    np.testing.assert_array_equal(np.frombuffer(chunk, "<f4").reshape(4, 3)[0], FeatureStore(store).features[2])


def test_a_view_shows_what_was_committed_while_it_was_written(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirrors, "_FRESH_SECONDS", 1000.0)
    store, references = make_store(machine("one")), commit._references
    add(store, 0, ["a", "b"])

    def late(*given: Any) -> bytes:
        made = references(*given)
        if not (on(machine("two"), store) / "shards/000001").exists():
            add(on(machine("two"), store), 1, ["c"])
            write_view(on(machine("two"), store))
        machine("one")
        return made

    monkeypatch.setattr(commit, "_references", late)
    write_view(store)
    assert "features/c/1/0" in json.loads(disk.read_regular(store / "view.refs.json"))["refs"]


def test_a_view_does_not_wait_for_machines_that_go_on_to_commit(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, references, number = make_store(machine("one")), commit._references, itertools.count(1)
    add(store, 0, ["a", "b"])

    def late(*given: Any) -> bytes:
        add(on(machine("two"), store), n := next(number), [f"{n}"])
        machine("one")
        return references(*given)

    monkeypatch.setattr(commit, "_references", late)
    write_view(store)
    assert next(number) == 4


def test_runs_are_saved_and_replaced_whole_and_shared(
    machine: Machine, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes, "load_backbone", load_tiny)
    dataset, home = load_dataset("folder", root=images, name="toy"), machine("one")
    run_extraction(["random"], dataset, home=home)
    [result] = [probe_features(dataset, ["random"], head="linear", subset=6, folds=2, home=home)]
    other = machine("two")
    assert [found.id for found in list_results(other)] == [result.id]
    run = runs_dir("toy", other) / result.id
    assert not (run / "heads.safetensors").exists()
    assert len(load_heads(run)) == 2
    assert find_run(result.id, "toy", other) is not None
    keys = there(other)
    replace_result(run, result)
    assert there(other) == keys  # the same bytes are the same attempt
    again = machine("one")
    assert find_run(result.id, "toy", again) is not None
    local = probe_features(dataset, ["random"], head="linear", subset=6, folds=2, home=home)
    assert local.mean == result.mean


def test_documents_that_are_removed_there_go_here_too(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    home = machine("one")
    replace_file(home / "ds" / "dataset.parquet", b"table")
    monkeypatch.setattr(mirrors, "_SETTLED_SECONDS", -60.0)
    other = machine("two")
    assert (other / "ds" / "dataset.parquet").read_bytes() == b"table"
    the_mirror(other).place.delete("home/ds/dataset.parquet")
    machine("two")
    assert not (other / "ds" / "dataset.parquet").exists()


def test_checkpoints_drawings_and_states_of_files_stay_on_their_machine(machine: Machine) -> None:
    home = machine("one")
    for name in ("weights/x.pth", "ds/figures/map.png", "ds/scan.parquet", "ds/runs/.id.partial/state.json"):
        replace_file(home / name, b"x")
        assert (home / name).read_bytes() == b"x"
    assert there(home) == []


def test_the_mirror_of_another_process_is_known_by_its_folder(machine: Machine) -> None:
    home = machine("one")
    disk._MIRRORS.clear()
    open_mirror.cache_clear()
    assert home_dir(home) == home
    assert the_mirror(home).place is open_place(home_text(home))
    assert oct(home.stat().st_mode)[-3:] == "700"


def test_the_whole_journey_by_commands(machine: Machine, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "load_backbone", load_tiny)
    machine("one")
    url = home_text(machine("one"))

    def run(*words: str) -> str:
        result = CliRunner().invoke(app, [*words, "--home", url])
        assert result.exit_code == 0, result.output
        return result.output

    named = ["--dataset", "folder", "--data-root", str(images), "--name", "toy"]
    run("extract", "--backbone", "random", *named, "--rows-per-shard", "8")
    assert FeatureStore(next(machine("one").glob("toy/random-*"))).rows_per_shard == 8
    assert url in run("probe", "--backbone", "random", "--head", "linear", "--subset", "6", "--folds", "2", *named)
    machine("two")
    assert "linear" in run("results")
    assert url in run("ls")
    assert "no damage" in run("verify")
    run("gc")
    assert "complete" in run("extract", "--backbone", "random", *named)


def test_a_checkpoint_is_read_from_its_address_by_its_digest(machine: Machine) -> None:
    machine("one")
    torch.manual_seed(0)
    state = networks.resnet50(seed=5).state_dict()
    data = safetensors.torch.save({name: value.contiguous() for name, value in state.items()})
    place = open_place("memory://models")
    place.put("net.safetensors", data)
    loaded = load_backbone("supervised", weights="memory://models/net.safetensors")
    assert loaded.weights_sha256 == hashlib.sha256(data).hexdigest()
    assert loaded.given == "memory://models/net.safetensors"
    first = bring_file("memory://models/net.safetensors")
    place.put("net.safetensors", data[:-1])
    assert bring_file("memory://models/net.safetensors") != first
    with refused(UsageError, "object-not-found"):
        load_backbone("supervised", weights=Path("memory://models/none.pth"))


def test_many_threads_read_while_the_cache_is_full(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(machine("one"), row_shape=(100,))
    rows = [add(store, number, [f"{number}"], row_shape=(100,)) for number in range(16)]
    monkeypatch.setenv("EMBCACHE_CACHE_SIZE", "2kB")
    monkeypatch.setattr(mirrors, "_USED_SECONDS", -60.0)  # what was just brought may go, too
    other = FeatureStore(on(machine("two"), store))
    for _ in range(2):
        np.testing.assert_array_equal(other.features[:], np.concatenate([each.features for each in rows]))


def test_gc_keeps_the_attempt_that_a_repair_on_another_machine_made_count(machine: Machine) -> None:
    store = make_store(machine("one"))
    add(store, 0, ["a", "b"])
    other = on(machine("two"), store)
    assert reading.committed_numbers(other) == [0]
    place = the_mirror(store).place
    place.put(f"home/ds/{store.name}/commits/000000.json", b"damaged")
    (store / "shards/000000/commit.json").write_bytes(b"damaged")
    assert commit_shard(store, 0, make_rows(["a", "b"], seed=7), damaged=True)
    assert collect(other).leftovers > 0
    np.testing.assert_array_equal(
        FeatureStore(on(machine("three"), store)).features[:], make_rows(["a", "b"], seed=7).features
    )


def test_a_plan_that_is_gone_there_is_written_again_by_one_repair(
    machine: Machine, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes, "load_backbone", load_tiny)
    dataset, home = load_dataset("folder", root=images, name="toy"), machine("one")
    path = run_extraction(["random"], dataset, home=home, rows_per_shard=8)[0].store.path
    the_mirror(path).place.delete(f"home/toy/{path.name}/plan/000001.json")
    check = verify_store(path)
    assert [(damage.kind, damage.shard) for damage in check.damage] == [("plan", 1)]
    assert not repair_store(check, lambda: dataset, Rebuild(home=home)).damage
    assert not verify_store(on(machine("two"), path)).damage


def test_what_others_keep_under_the_prefix_is_passed_over(machine: Machine) -> None:
    store = make_store(machine("one"))
    add(store, 0, ["a"])
    place, top = the_mirror(store).place, f"home/ds/{store.name}"
    for key in (f"{top}/plan/README.txt", f"{top}/manifests/x.json", f"attempts/ds/{store.name}/README", "home/note"):
        place.put(key, b"x")
    other = on(machine("two"), store)
    assert FeatureStore(other).ids.tolist() == ["a"]
    assert reading.plan_numbers(other) == [0]
    collect(other)
    assert the_mirror(other).path("home//etc/passwd") is None
    assert the_mirror(other).path("home/ds/../../x") is None
    place.put(f"{top}/commits/000001.json", seal({"rows": 1}))
    with pytest.raises(CorruptStoreError):
        FeatureStore(on(machine("three"), store)).ids.tolist()


def test_datasets_may_have_the_names_of_folders(machine: Machine) -> None:
    home = machine("one")
    names = ("plan", "shards", "manifests", "partitions", "commits", slug("weights"), slug("sample-images"))
    for name in names:
        replace_file(home / name / "dataset.parquet", name.encode())
    other = machine("two")
    for name in names:
        assert (other / name / "dataset.parquet").read_bytes() == name.encode()


def test_a_run_is_changed_as_it_is_there_now(machine: Machine) -> None:
    home = machine("one")
    folder = home / "ds" / "runs" / "abc"
    disk.replace_folder(folder, {"result.json": b"{}", "predictions.parquet": b"first"})
    second = machine("two") / "ds" / "runs" / "abc"
    disk.replace_folder(folder, {"result.json": b"{}", "predictions.parquet": b"second"})
    replace_file(second / "result.json", b'{"note": 1}')
    assert disk.read_regular(machine("three") / "ds/runs/abc/predictions.parquet") == b"second"
    assert disk.read_regular(home / "ds/runs/abc/predictions.parquet") == b"second"


def test_attempts_at_runs_that_were_replaced_go_after_a_day(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = machine("one") / "ds" / "runs" / "abc"
    for number in range(3):
        disk.replace_folder(folder, {"result.json": f"{number}".encode()})
    the_mirror(folder).place.put("leases/clock-0123", b"x")
    assert collect_home(machine("one")) == {"leftovers": 0, "freed": 0}
    monkeypatch.setattr(mirrors, "_GIVEN_UP_SECONDS", -60.0)
    assert collect_home(machine("one"))["leftovers"] == 3
    assert disk.read_regular(machine("two") / "ds/runs/abc/result.json") == b"2"


def test_a_listing_passes_over_the_documents_of_many_shards(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirrors, "_PASSED", 2)
    home = machine("one")
    store = make_store(home)
    for number in range(6):
        add(store, number, [f"{number}"])
    replace_file(home / "zz" / "dataset.parquet", b"last")
    seen: list[str] = []
    mirror = the_mirror(machine("two"))
    original = mirror.place.list
    monkeypatch.setattr(mirror.place, "list", lambda *args: (seen.append(e.key) or e for e in original(*args)))
    assert [entry.key for entry in mirror._beyond_shards()][-1] == "home/zz/dataset.parquet"
    assert len([key for key in seen if "/plan/" in key]) == 3


def test_pixels_that_another_machine_decodes_are_committed_there(machine: Machine, images: Path) -> None:
    class Elsewhere(Engine):
        def run(self, owed: Iterable[OwedShards], job: ShardJob) -> Iterator[OwedShards]:
            other, (shards,) = machine("two"), owed
            assert isinstance(job, PixelJob)
            assert job.workers == 1  # thread: a worker has one core
            with pickle.loads(pickle.dumps(job)).open() as worker:
                assert worker.stores[0].path.is_relative_to(other)
                for key, stores in shards.waiting.items():
                    shard = shards.shard(key, stores)
                    shards.settle(shard, worker.run(shard))
            machine("one")
            yield shards

    home = machine("one")
    transform = choose_transform(find_backbone("random"), "paper", {(40, 40)})
    store = cache_pixels(load_dataset("folder", images), transform, home=home, engine=Elsewhere())
    assert len(store.ids) == 20
    assert [key for key in there(home) if key.startswith("home/") and "/commits/" in key]


def test_addresses_stand_for_documents_in_what_is_shown(machine: Machine) -> None:
    store = make_store(machine("one"))
    url, root = the_mirror(store).place.url, the_mirror(store).root
    assert addressed(f"in {store}, see") == f"in {url}/home/ds/{store.name}, see"
    assert addressed(f'"{store}/shards/000001/commit.json"') == f'"{url}/home/ds/{store.name}/commits/000001.json"'
    assert addressed(f"{root}/ds/figures/map.png") == f"{root}/ds/figures/map.png"


@pytest.mark.parametrize("home", ["S3://lab/x", "ftp://host/x", "file:///tmp/x", "http://host/x", "s4:/x"])
def test_addresses_that_are_not_known_are_no_folders(home: str) -> None:
    with refused(UsageError, "place-address"):
        home_dir(home)


@pytest.mark.parametrize("endpoint", ["127.0.0.1:9000", "http://127.0.0.1:9000"])
def test_an_endpoint_is_an_address_and_plain_http_is_allowed_by_name(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.delenv("AWS_ALLOW_HTTP", raising=False)
    with refused(UsageError, "place-address"):
        open_place(f"s3://lab/{len(endpoint)}")
