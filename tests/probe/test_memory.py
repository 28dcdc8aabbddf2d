"""What a probe holds in memory: every byte of tensors and arrays that are alive is counted, at every operation."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from embcache.data.dataset import ImageDataset
from embcache.probe import probe_plan
from embcache.probe.inputs import load_features
from embcache.probe.probe import probe_features
from embcache.store.feature_store import open_store
from tests.probe.build import Brief, make_dataset, make_features, probe_grid
from tests.probe.test_stream import put_shards


class Counted(TorchDispatchMode):
    """Bytes of all tensors that operations made and that are alive, and with them those of Python and numpy."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.foreign: dict[int, StorageWeakRef] = {}  # memory of numpy, which is counted there
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.foreign and storage._cdata not in self._alive:
                    self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                    self._bytes += storage.nbytes()
        self.count()
        return made

    def count(self) -> None:
        """Take in what is alive now, and the most that numpy had since the last time."""
        self._bytes -= sum(self._alive.pop(k)[1] for k in [k for k, (ref, _) in self._alive.items() if ref.expired()])
        self.peak = max(self.peak, self._bytes + tracemalloc.get_traced_memory()[1])
        tracemalloc.reset_peak()


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    original = torch.from_numpy

    def from_numpy(array: np.ndarray) -> torch.Tensor:
        with _disable_current_modes():
            tensor = original(array)
        storage = tensor.untyped_storage()
        mode.foreign[storage._cdata] = StorageWeakRef(storage)
        return tensor

    mode = Counted()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "from_numpy", from_numpy)
        tracemalloc.start()
        try:
            with mode:
                yield mode
            mode.count()
        finally:
            tracemalloc.stop()


N, DIM = 1200, 512


@pytest.fixture
def ds(monkeypatch: pytest.MonkeyPatch) -> ImageDataset:
    monkeypatch.setattr(probe_plan, "Schedule", Brief)
    labels = np.random.default_rng(0).integers(0, 2, size=N).tolist()
    return make_dataset(labels, split=["train"] * 1000 + ["test"] * 200)


def put(home: Path, ds: ImageDataset, *names: str, dtype: str = "float32") -> None:
    for seed, name in enumerate(names):
        put_shards(home, ds, name, make_features(ds, DIM, seed=seed).astype(dtype), per_shard=100)


def peak_of(monkeypatch: pytest.MonkeyPatch, ds: ImageDataset, home: Path, names: list[str], **options: Any) -> int:
    with counted(monkeypatch):  # what is imported
        probe_features(ds, names, subset="S", home=home, folds=2, head=options.get("head", "linear"))
    with counted(monkeypatch) as mode:
        probe_features(ds, names, subset="F", home=home, folds=2, **options)
    return mode.peak


def test_streaming_holds_the_buffer_and_not_the_features(
    ds: ImageDataset, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(home, ds, "a")
    resident, streamed = (peak_of(monkeypatch, ds, home, ["a"], buffer=rows) for rows in (None, 100))
    assert streamed < resident - N * DIM * 4 / 2, (streamed, resident)


def test_constants_need_no_copy_of_the_features(ds: ImageDataset, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(home, ds, "a", "b", dtype="float16")
    assert peak_of(monkeypatch, ds, home, ["a", "b"], head="concat") < 4 * N * DIM * 4


def test_one_backbone_is_let_go_of_before_the_next_is_read(
    ds: ImageDataset, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(home, ds, "a", "b")
    one = peak_of(monkeypatch, ds, home, ["a"])
    with counted(monkeypatch) as mode:
        probe_grid(ds, [["a"], ["b"]], subsets=["F"], home=home, folds=2, again=True)
    assert mode.peak < one + N * DIM * 4 / 2


@pytest.mark.parametrize(("views", "dtype"), [(1, "float64"), (4, "float32")])
def test_views_that_are_not_asked_for_are_not_held(
    home: Path, ds: ImageDataset, monkeypatch: pytest.MonkeyPatch, views: int, dtype: str
) -> None:
    x = np.random.default_rng(0).normal(size=(N, 4, 64)).astype(dtype)
    put_shards(home, ds, "a", x, per_shard=50)
    store, chosen = open_store("a", ds, home), np.random.default_rng(1).permutation(ds.table["id"].to_numpy(object))
    order = [int(name[1:]) for name in chosen]
    load_features(store, ds, chosen[:1], views)
    with counted(monkeypatch) as mode:
        found = load_features(store, ds, chosen, views)
    expected = x[order].astype(np.float32)
    np.testing.assert_array_equal(found, expected if views > 1 else expected[:, 0])
    assert mode.peak < found.nbytes + 16 * x.nbytes * 50 // N + 200 * N
