"""Features that are streamed from shards: the same draws as from memory, in an order bound to the shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embcache.data.dataset import ImageDataset
from embcache.errors import StoreError, UsageError
from embcache.probe import probe_plan
from embcache.probe.feature_rows import Resident, Streamed
from embcache.probe.heads import make_head
from embcache.probe.metrics import softmax
from embcache.probe.probe import probe_features
from embcache.probe.schedule import Schedule
from embcache.probe.stack import Job, predict_logits, train_heads
from embcache.store.commit import PlanEntry, ShardRows, commit_shard, create_store, publish_plan, write_snapshot
from tests.probe.build import Brief, find_saved, make_dataset, make_features, make_recipe, probe_grid
from tests.refusal import refused


def put_shards(home: Path, ds: ImageDataset, backbone: str, features: np.ndarray, per_shard: int = 64) -> None:
    """Commit ``features`` (rows as the dataset's), so many a shard."""
    folder = home / ds.name
    folder.mkdir(parents=True, exist_ok=True)
    write_snapshot(folder, ds.to_parquet_bytes())
    recipe = make_recipe(backbone, dtype=str(features.dtype))
    store = create_store(
        folder, recipe, row_shape=features.shape[1:], rows_per_shard=per_shard, batch_size=64, threads=1
    )
    ids = ds.table["id"].tolist()
    for number, start in enumerate(range(0, len(ids), per_shard)):
        part = tuple(ids[start : start + per_shard])
        publish_plan(store, number, [PlanEntry(i, 1, 1, None) for i in part])
        block, digests = features[start : start + per_shard], ("",) * len(part)
        commit_shard(store, number, ShardRows(part, block, np.ones(len(part), bool), digests, ("",) * len(part)))


def shards_of(n: int, per_shard: int, rng: np.random.Generator) -> np.ndarray:
    return rng.permutation(np.arange(n) // per_shard)


def streamed(x: torch.Tensor, shards: np.ndarray, buffer_rows: int, **options: Any) -> Streamed:
    numbers, counts = np.unique(shards, return_counts=True)
    places = np.random.default_rng(1).permutation(len(x))
    stored = np.empty_like(x.numpy())
    stored[places] = x.numpy()
    rows = dict(zip(numbers.tolist(), counts.tolist(), strict=True))
    return Streamed({"a": stored}, {"a": places}, shards, rows, buffer_rows, **options)


@settings(max_examples=20)
@given(
    n=st.integers(1, 200),
    per_shard=st.integers(1, 40),
    buffer_rows=st.integers(1, 120),
    size=st.integers(1, 16),
    sizes=st.lists(st.integers(1, 150), min_size=1, max_size=4),
    views=st.sampled_from([1, 3]),
    seed=st.integers(0, 50),
)
def test_a_streamed_epoch_trains_on_the_draws_of_one_from_memory(
    n: int, per_shard: int, buffer_rows: int, size: int, sizes: list[int], views: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x = torch.arange(n * views, dtype=torch.float32).view(n, views, 1)
    x = x if views > 1 else x[:, 0]
    rows = streamed(x, shards_of(n, per_shard, rng), buffer_rows, n_views=views)
    orders = [torch.from_numpy(rng.integers(0, n, size=k)) for k in sorted(sizes, reverse=True)]
    drawn = [torch.from_numpy(rng.integers(0, views, size=len(order))) for order in orders]
    seen: list[list[float]] = [[] for _ in orders]
    lengths: list[list[int]] = [[] for _ in orders]
    for step in rows.steps(orders, drawn, size, epoch=seed):
        assert step.rows.shape == step.x["a"].shape[:2]
        for k, head in enumerate(range(step.heads.start, step.heads.stop)):
            np.testing.assert_array_equal(step.x["a"][k, :, 0] // views, step.rows[k])
            seen[head] += step.x["a"][k, :, 0].tolist()
            lengths[head].append(step.rows.shape[1])
    for order, view, shown, of in zip(orders, drawn, seen, lengths, strict=True):
        assert sorted(shown) == sorted((order * views + view).float().tolist())
        full, rest = divmod(len(order), size)
        assert of == [size] * full + [rest] * (rest > 0)


def test_rows_of_one_epoch_come_by_shards_and_of_another_in_another_order() -> None:
    n, x = 400, torch.zeros(400, 1)
    shards = np.arange(n) // 50
    rows = streamed(x, shards, buffer_rows=100)
    order, view = torch.randperm(n, generator=torch.Generator().manual_seed(0)), torch.zeros(n, dtype=torch.int64)
    first, second = (
        shards[torch.cat([step.rows[0] for step in rows.steps([order], [view], 64, epoch)]).numpy()] for epoch in (0, 1)
    )
    for start in range(0, n, 100):  # two shards at a time, mixed
        assert len(set(first[start : start + 100])) == 2
        assert len(np.flatnonzero(np.diff(first[start : start + 100]))) > 10
    assert first.tolist() != second.tolist()


def test_chunks_have_every_row_of_every_set_once() -> None:
    x = torch.randn(300, 4)
    rows = streamed(x, shards_of(300, 32, np.random.default_rng(0)), buffer_rows=64)
    sets = [torch.randperm(300)[:90], torch.zeros(0, dtype=torch.int64), torch.arange(300), torch.tensor([7, 7, 3])]
    for source in (rows, Resident({"a": x})):
        found = [torch.full((len(s), 4), torch.nan) for s in sets]
        for chunk in source.chunks(sets):
            found[chunk.number][chunk.places] = chunk.x["a"]
        for s, f in zip(sets, found, strict=True):
            torch.testing.assert_close(f, x[s], rtol=0, atol=0)
        torch.testing.assert_close(source.gather(sets[0])["a"], x[sets[0]], rtol=0, atol=0)


def test_backbones_whose_stores_differ_in_order_and_in_shards_are_streamed_row_by_row() -> None:
    rng, n = np.random.default_rng(0), 300
    x = {b: torch.from_numpy(rng.normal(size=(n, dim)).astype(np.float32)) for b, dim in (("a", 3), ("b", 5))}
    places = {b: rng.permutation(n) for b in x}
    stored = {b: np.empty_like(f.numpy()) for b, f in x.items()}
    reads: list[tuple[int, int]] = []  # rows asked for, shards of the second store that they lie in

    class Counted:
        shape, dtype = (n, 5), np.dtype(np.float32)

        def __getitem__(self, rows: np.ndarray) -> np.ndarray:
            reads.append((len(rows), len(np.unique(rows // 17))))
            return stored["b"][rows]

    for b, features in x.items():
        stored[b][places[b]] = features.numpy()
    shards = places["a"] // 40
    numbers, counts = np.unique(shards, return_counts=True)
    rows_of = dict(zip(numbers.tolist(), counts.tolist(), strict=True))
    rows = Streamed({"a": stored["a"], "b": Counted()}, places, shards, rows_of, buffer_rows=90)
    orders = [torch.randperm(n)[:250], torch.randint(n, (200,))]
    drawn = 0
    for step in rows.steps(orders, [torch.zeros(len(o), dtype=torch.int64) for o in orders], 16, 0):
        for b in x:
            torch.testing.assert_close(step.x[b], x[b][step.rows], rtol=0, atol=0)
        drawn += step.rows.numel()
    assert drawn == 450
    assert sum(n_rows for n_rows, _ in reads) <= n, "each row is read once"
    assert max(n_shards for _, n_shards in reads) > 2, "and with it other shards, as the module says"
    for b, features in rows.gather(orders[1]).items():
        torch.testing.assert_close(features, x[b][orders[1]], rtol=0, atol=0)


@settings(max_examples=5, deadline=None)
@given(
    name=st.sampled_from(["linear", "dvme", "dvme-identity"]),
    views=st.sampled_from([1, 3]),
    per_shard=st.integers(1, 60),
    buffer_rows=st.integers(1, 120),
    lengths=st.lists(st.integers(5, 90), min_size=1, max_size=3),
    seed=st.integers(0, 50),
)
def test_a_streamed_head_is_the_same_alone_and_in_a_stack(
    name: str, views: int, per_shard: int, buffer_rows: int, lengths: list[int], seed: int
) -> None:
    rng, n = np.random.default_rng(seed), 120
    y = torch.from_numpy(np.arange(n) % 2)
    x = torch.from_numpy(rng.normal(size=(n, views, 6)).astype(np.float32))
    rows = streamed(x if views > 1 else x[:, 0], shards_of(n, per_shard, rng), buffer_rows, n_views=views)
    jobs = [
        Job(torch.from_numpy(np.sort(rng.permutation(90)[:m])), torch.arange(90, n), str(k), 1e-2 / (k + 1))
        for k, m in enumerate(lengths)
    ]
    head = make_head(name, **({} if name == "linear" else {"proj_dim": 8}))
    schedule = Schedule(max_epochs=2, min_epochs=2, batch_size=16)
    together = train_heads(head, rows, y, jobs, 2, "auc", schedule)
    for job, stacked in zip(jobs, together, strict=True):
        (alone,) = train_heads(head, rows, y, [job], 2, "auc", schedule)
        np.testing.assert_allclose(stacked.losses, alone.losses, rtol=1e-4)
        assert stacked.params.keys() == alone.params.keys()
        a, b = (softmax(predict_logits(head, t.params, rows, job.val)) for t in (stacked, alone))
        if stacked.best_epoch == alone.best_epoch:  # rounding may tell equal validation scores apart
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["mlp", "concat"])
def test_a_streamed_head_is_as_good_as_one_from_memory(name: str) -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, size=600)
    x = torch.from_numpy((rng.normal(size=(600, 10)) + 0.5 * y[:, None] * rng.normal(size=10)).astype(np.float32))
    jobs = [Job(torch.arange(30 * k, 200 + 40 * k), torch.arange(400, 600), str(k), 1e-2) for k in range(3)]
    head, schedule = make_head(name, **({"hidden": 8} if name == "mlp" else {})), Schedule(max_epochs=8, min_epochs=8)
    rows = streamed(x, shards_of(600, 64, rng), buffer_rows=150)
    labels = torch.from_numpy(y)
    together = train_heads(head, rows, labels, jobs, 2, "auc", schedule)
    memory = train_heads(head, {"a": x}, labels, jobs, 2, "auc", schedule)
    for stacked, resident in zip(together, memory, strict=True):
        assert stacked.val_score == pytest.approx(resident.val_score, abs=0.03)
        for constant in (n for n in resident.params if n.startswith("standard.")):
            torch.testing.assert_close(stacked.params[constant], resident.params[constant], rtol=1e-5, atol=1e-6)


# --- as asked for


@pytest.fixture
def ds() -> ImageDataset:
    labels = np.random.default_rng(0).integers(0, 2, size=450).tolist()
    return make_dataset(labels, split=["train"] * 300 + ["test"] * 150)


@pytest.fixture
def cached(home: Path, ds: ImageDataset, monkeypatch: pytest.MonkeyPatch) -> ImageDataset:
    put_shards(home, ds, "a", make_features(ds, 30).astype(np.float16))
    monkeypatch.setattr(probe_plan, "Schedule", Brief)
    return ds


def test_streaming_reaches_the_same_within_fold_noise_as_another_run(cached: ImageDataset, home: Path) -> None:
    asked: dict[str, Any] = {"val": "matched", "home": home, "folds": 2}
    plain, other = (probe_features(cached, "a", subset="F", **asked, seed=seed) for seed in (0, 1))
    streamed = probe_features(cached, "a", subset="F", **asked, buffer=100)
    assert plain.mean == pytest.approx(streamed.mean, abs=abs(plain.mean - other.mean) + 2 * plain.std + 0.005)
    assert streamed.id != plain.id
    assert streamed.request["buffer"] == 100
    assert any("streamed" in note for note in streamed.notes)
    assert not any("streamed" in note for note in plain.notes)
    assert probe_features(cached, "a", subset="F", **asked, buffer=100) == streamed
    small = probe_features(cached, "a", subset="S", **asked, buffer=100)
    grid = probe_grid(cached, [["a"]], subsets=["F", "S"], **asked, buffer=100, again=True)
    for alone, among in zip((streamed, small), grid, strict=True):
        assert alone.id == among.id
        assert alone.mean == pytest.approx(among.mean, abs=1e-6)


def test_a_streamed_result_depends_on_how_its_rows_lie_in_shards(
    cached: ImageDataset, home: Path, tmp_path: Path
) -> None:
    features = make_features(cached, 30).astype(np.float16)
    put_shards(tmp_path, cached, "a", features, per_shard=60)
    ids = [
        find_saved(cached, [["a"]], subsets=["F"], home=folder, buffer=size)
        for size in (100, None)
        for folder in (home, tmp_path)
    ]
    assert ids[0] != ids[1], "other shards, another order"
    assert ids[2] == ids[3], "but none in memory"


def test_a_solved_head_cannot_be_streamed(cached: ImageDataset, home: Path) -> None:
    with refused(UsageError, "head-not-trained"):
        probe_features(cached, "a", head="knn", home=home, buffer=150)


def test_features_that_memory_does_not_hold_are_advised_to_be_streamed(
    cached: ImageDataset, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **options: object) -> None:
        raise MemoryError("Unable to allocate 9 TiB")

    monkeypatch.setattr(probe_plan, "load_features", full)
    with pytest.raises(StoreError, match=r"do not fit into memory(.|\n)*--buffer"):
        probe_features(cached, "a", home=home)
