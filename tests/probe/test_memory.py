"""That a probe keeps to its limit: every byte of tensors and arrays that are alive is counted, at every operation."""

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

import embcache.probe.budget as budget_module
import embcache.probe.grouping as grouping_module
import embcache.probe.run as run_module
import embcache.probe.train as train_module
from embcache.data.dataset import ImageDataset
from embcache.probe.heads import make_head
from embcache.probe.inputs import load_features
from embcache.probe.rows import Resident
from embcache.probe.run import probe_features, probe_grid
from embcache.probe.standard import constants_of, standard_params
from embcache.store.feature_store import open_store
from tests.probe.build import make_dataset, make_features
from tests.probe.test_stream import need_of, put_shards


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
    monkeypatch.setattr(budget_module, "FIXED", 0)  # what torch itself takes is none of these tensors
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


@pytest.mark.parametrize("head", ["linear", "logreg", "knn"])
def test_features_in_memory_and_all_copies_of_them_keep_to_the_limit(
    ds: ImageDataset, home: Path, monkeypatch: pytest.MonkeyPatch, head: str
) -> None:
    put(home, ds, "a")
    need = need_of(ds, home, head=head, folds=2)
    peak = peak_of(monkeypatch, ds, home, ["a"], head=head, max_memory=need.in_memory)
    assert need.features < peak <= need.in_memory


def test_streamed_features_keep_to_the_limit(ds: ImageDataset, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(home, ds, "a")
    need = need_of(ds, home, folds=2)
    assert need.streamed < need.in_memory
    assert peak_of(monkeypatch, ds, home, ["a"], max_memory=need.streamed) <= need.streamed


def test_constants_need_no_copy_of_the_features(ds: ImageDataset, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(home, ds, "a", "b", dtype="float16")
    need = need_of(ds, home, "F", "a", "b", head="concat", folds=2)
    peak = peak_of(monkeypatch, ds, home, ["a", "b"], head="concat", max_memory=need.in_memory)
    assert need.features < peak <= need.in_memory


def test_constants_in_parts_are_those_of_the_whole() -> None:
    x = {"a": torch.randn(3000, 5, dtype=torch.float64).float() * 7 + 40}
    rows = torch.arange(0, 3000, 2)
    (found,) = constants_of(make_head("concat"), Resident(x), [rows])
    for name, expected in standard_params({"a": x["a"][rows]}).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=0)


def test_one_backbone_is_let_go_of_before_the_next_is_read(
    ds: ImageDataset, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(home, ds, "a", "b", "c")
    limit = need_of(ds, home, folds=2).in_memory
    with counted(monkeypatch):  # what is imported
        probe_features(ds, "a", subset="S", home=home, folds=2, reuse=False)
    with counted(monkeypatch) as mode:
        probe_grid(ds, [["a"], ["b"], ["c"]], subsets=["F"], home=home, folds=2, max_memory=limit)
    assert mode.peak <= limit + 2 * budget_module._PER_IMAGE * N  # the ids of two more stores


@pytest.mark.parametrize(("views", "dtype"), [(1, "float32"), (1, "float64"), (4, "float32")])
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


def test_a_small_limit_makes_narrow_stacks_and_changes_no_result(
    ds: ImageDataset, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(home, ds, "a")
    widths: list[int] = []
    original = train_module.train_stack

    def spy(head: Any, x: Any, y: Any, jobs: Any, *rest: Any, **options: Any) -> Any:
        widths.append(len(jobs))
        return original(head, x, y, jobs, *rest, **options)

    monkeypatch.setattr(train_module, "train_stack", spy)
    asked: dict[str, Any] = {"home": home, "subset": "M", "reuse": False, "save": False, "folds": 3}
    need = need_of(ds, home, "M", folds=3)
    plain = probe_features(ds, "a", **asked)
    narrow = probe_features(ds, "a", max_memory=need.base + need.loading + need.features + 2 * need.head, **asked)
    least = max(need.in_memory, need.base + need.loading + need.features + need.head)
    probe_features(ds, "a", max_memory=least, **asked)
    assert widths == [3, 2, 1, *([3] if need.width(least, None) > 2 else [1, 1, 1])]
    assert narrow.id == plain.id
    assert narrow.mean == pytest.approx(plain.mean, abs=1e-6)
    rows = need.buffer_rows(need.streamed)
    assert need.width(need.streamed, rows) >= 1
    assert need.width(2 * need.streamed, need.buffer_rows(2 * need.streamed)) > need.width(need.streamed, rows)


def test_a_group_that_does_not_fit_as_a_whole_trains_subset_by_subset(
    ds: ImageDataset, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(home, ds, "a")
    groups: list[list[list[str]]] = []
    original = grouping_module.groups_of

    def spy(*asked: Any) -> Any:
        groups.append(original(*asked))
        return groups[-1]

    monkeypatch.setattr(run_module, "groups_of", spy)
    asked: dict[str, Any] = {"subsets": ["S", "M"], "home": home, "reuse": False, "save": False, "folds": 3}
    both = probe_grid(ds, [["a"]], **asked)
    parted = probe_grid(ds, [["a"]], max_memory=need_of(ds, home, "M", folds=3).in_memory, **asked)
    assert groups == [[["S", "M"]], [["S"], ["M"]]]
    assert [r.id for r in parted] == [r.id for r in both]
    assert [r.mean for r in parted] == pytest.approx([r.mean for r in both], abs=1e-6)
