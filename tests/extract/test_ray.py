"""Ray: two nodes, each a set of processes of its own, on this machine. The first one has the head's bookkeeping too."""

from __future__ import annotations

import os
import pickle
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from embcache.config import EngineConfig, ExtractConfig
from embcache.data.dataset import ImageDataset, load_dataset
from embcache.data.partitioned import PartitionedDataset, load_partitioned
from embcache.errors import EmbcacheError, RecipeError
from embcache.extract.engines.dispatch import Lost
from embcache.extract.engines.engine import OwedShards, ShardOutcome
from embcache.extract.extract import Extraction, extract
from embcache.log import shown
from embcache.runs.folders import list_results
from tests.extract.conftest import draw
from tests.extract.test_signals import contents
from tests.places.server import environment
from tests.refusal import refused
from tests.study.test_study import made, toy

ray = pytest.importorskip("ray", reason="Ray is not installed")
pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(os.name == "nt", reason="nodes are killed as POSIX has it"),
    pytest.mark.filterwarnings("default"),  # those of Ray are not ours
]

__all__ = ["toy"]

SLOW = "tests.extract.slow_net:slow"
SHARDS = 10
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head and a second node with a core each."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_worker_niceness", "0")  # else other tests take nearly all of the cores
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])  # of the nodes
    made = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    made.add_node(**NODE)
    try:
        yield made
    finally:
        made.shutdown()
        os.environ.update({} if before is None else {"PYTHONPATH": before})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    """Forty images in shards of four."""
    root = tmp_path_factory.mktemp("images")
    for index in range(4 * SHARDS):
        draw(root / ("benign" if index % 2 else "malignant") / f"{index:02}.png", index)
    return load_dataset("folder", root)


def run(dataset: ImageDataset | PartitionedDataset, home: Path, **options: object) -> tuple[Extraction, list[str]]:
    said = list[str]()
    config = ExtractConfig.make(options={"rows_per_shard": 4, "batch_size": 2, **options})
    with shown(said.append):
        (done,) = extract(dataset, [SLOW], config, home=home)
    return done, said


@pytest.fixture(scope="module")
def whole(dataset: ImageDataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every file of the shards that this process makes."""
    done, _ = run(dataset, tmp_path_factory.mktemp("local"))
    return contents(done.store.path)


def test_a_node_that_is_killed_costs_nothing_but_its_shard(
    cluster: Any,
    dataset: ImageDataset,
    whole: dict[str, bytes],
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("EMBCACHE_SLOW_SECONDS", "0.3")
    computed, settle = list[int](), OwedShards.settle

    def record(self: OwedShards, shard: Any, outcome: ShardOutcome) -> None:
        computed.extend([shard.number] * bool(outcome.computed))
        if len(computed) == 4:  # the other node is in the midst of a shard, or about to begin one
            threading.Thread(target=kill).start()
        settle(self, shard, outcome)

    def kill() -> None:
        time.sleep(0.2)
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)  # SIGKILL to its processes

    monkeypatch.setattr(OwedShards, "settle", record)
    done, said = run(dataset, home, engine="ray", address=cluster.address)
    assert sorted(computed) == list(range(SHARDS))  # each once
    assert (done.computed, done.left) == (4 * SHARDS, 0)
    assert contents(done.store.path) == whole
    lost = [line for line in said if "was lost" in line]
    assert len(lost) == 1, said
    assert lost[0].endswith("workers left: 1")
    assert "Ray: room for 2 workers; cores of each 1, GPUs 0" in said
    assert not list((done.store.path / "leases").iterdir())
    cluster.wait_for_nodes(120)  # until the head, too, knows that the other one is gone
    cluster.add_node(**NODE)
    assert capfd.readouterr().out == ""


def test_pixels_that_workers_decode_first_give_the_same_features(
    cluster: Any, dataset: ImageDataset, whole: dict[str, bytes], home: Path
) -> None:
    done, said = run(dataset, home, engine="ray", address=cluster.address, stage="pixels", num_workers=1)
    assert contents(done.store.path) == whole
    assert any(line.startswith("pixels of 40 images are cached") for line in said)


def test_workers_stay_from_one_partition_to_the_next(
    cluster: Any, dataset: ImageDataset, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embcache.extract.engines.ray_cluster import RayPool

    table = dataset.table.assign(label=[dataset.class_names[label] for label in dataset.table["label"]])
    assert dataset.root is not None
    table[["id", "path", "label"]].to_parquet(dataset.root / "t.parquet")

    def extracted(home: Path, **options: object) -> Extraction:
        parts = load_partitioned(dataset.root / "t.parquet", name="d", rows=16, home=home)
        return run(parts, home, **options)[0]

    started, start = list[RayPool](), RayPool.start
    monkeypatch.setattr(RayPool, "start", lambda pool: started.append(pool) or start(pool))
    done = extracted(home, engine="ray", address=cluster.address, num_workers=2)
    assert (done.computed, done.left, len(done.store)) == (40, 0, 40)
    assert (len(started), len({*started})) == (2, 1)
    assert contents(done.store.path) == contents(extracted(tmp_path / "local").store.path)
    again = extracted(home, engine="ray", address=cluster.address)
    assert (again.computed, again.cached) == (0, 40)


def test_a_worker_with_another_network_is_refused(
    cluster: Any, dataset: ImageDataset, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embcache.extract.engines.ray_cluster import Surroundings

    def others(self: Surroundings) -> None:
        self._folder, self._variables = str(home), {"EMBCACHE_SLOW_SEED": "4"}

    monkeypatch.setattr(Surroundings, "__init__", others)
    with refused(RecipeError, "worker-recipe") as caught:
        run(dataset, home, engine="ray", address=cluster.address, num_workers=1)
    assert "weights_sha256" in str(caught.value)


def test_the_cells_of_a_study_are_spread_and_fail_one_by_one(
    cluster: Any, toy: ImageDataset, home: Path, tmp_path: Path
) -> None:
    subsets = ["S", "M", "70"]  # of the last there are not enough images
    local = made(subsets=subsets)
    runs = {result.id: replace(result, seconds=0) for result in list_results(home)}
    shutil.rmtree(home / "toy" / "runs")
    spread = made(subsets=subsets, engine="ray", address=cluster.address)
    assert {result.id: replace(result, seconds=0) for result in list_results(home)} == runs
    assert len(runs) == 4
    assert (spread.table.rows, spread.table.notes) == (local.table.rows, local.table.notes)
    assert "70" in str(spread.table.notes)


def test_a_worker_that_no_node_has_room_for(cluster: Any, dataset: ImageDataset, home: Path) -> None:
    with refused(EmbcacheError, "ray-no-room"):
        run(dataset, home, engine="ray", address=cluster.address, cpus_per_worker=3)
    assert not list(home.glob("*/*/recipe.json"))  # which would say that there are three threads


def test_an_answer_that_is_lost_with_its_node_is_asked_of_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.exceptions import ObjectLostError, ObjectReconstructionFailedError

    from embcache.extract.engines.ray_cluster import RayPool

    def lost(reference: object) -> None:
        raise ObjectLostError("00", None, "stack")

    assert issubclass(ObjectReconstructionFailedError, ObjectLostError)
    pool, reference = RayPool.__new__(RayPool), object()
    pool._pending = {reference: 3}
    monkeypatch.setattr(ray, "wait", lambda pending, timeout: (pending, []))
    monkeypatch.setattr(ray, "get", lost)
    ((worker, answer),) = pool.wait(0)
    assert (worker, type(answer)) == (3, Lost)


def test_a_task_that_no_node_has_room_for(cluster: Any, toy: ImageDataset) -> None:
    config = EngineConfig(engine="ray", address=cluster.address, gpus_per_worker=1.0)
    from embcache.extract.engines.ray_cluster import connected, spread

    with connected(config), refused(EmbcacheError, "ray-no-room") as caught:
        list(spread([len], "abc", config))
    assert caught.value.fix == "--gpus-per-worker 0, or other nodes"


def test_a_node_learns_how_the_object_store_is_reached_and_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    from embcache.extract.engines.ray_cluster import Surroundings

    before = torch.get_num_threads()
    for name, value in environment(1234).items():
        monkeypatch.setenv(name, value)
    surroundings = pickle.dumps(Surroundings())
    for name in environment(1234):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_REGION", "eu-west-1")  # of the node
    pickle.loads(surroundings).enter(before)
    assert os.environ["AWS_ENDPOINT_URL"] == "http://127.0.0.1:1234"
    assert (os.environ["AWS_ALLOW_HTTP"], os.environ["AWS_REGION"]) == ("true", "eu-west-1")
    assert b"hunter2" not in surroundings
    assert "AWS_ACCESS_KEY_ID" not in os.environ


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere", "ray://127.0.0.1:1"])
def test_an_address_where_no_cluster_is(dataset: ImageDataset, home: Path, address: str) -> None:
    with refused(EmbcacheError, "ray-address") as caught:
        run(dataset, home, engine="ray", address=address)
    assert "RAY_AUTH_TOKEN" in str(caught.value)
