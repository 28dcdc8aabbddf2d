"""The images that figures and scores look at, with cached features or what a fused head makes of them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from embcache.config import DatasetRef
from embcache.data.dataset import ImageDataset, find_dataset
from embcache.data.groups import IntArray, hash_order
from embcache.errors import ProtocolError, StoreNotFoundError, UsageError
from embcache.log import log
from embcache.paths import PathLike, home_dir, slug
from embcache.probe.heads import make_head
from embcache.probe.heads.trained import Fusion
from embcache.probe.inputs import cached_backbones, cached_datasets, divide_for, load_features, open_stores
from embcache.probe.protocol import Sides
from embcache.results.curves import refuse_untrusted
from embcache.runs.folders import Result, load_heads
from embcache.store.feature_store import FeatureStore, extract_command
from embcache.targets import Target

LIMIT = 2000
"""Images of a map in a figure of the paper: beyond it points hide each other."""

MOST = 5_000
"""Most training images that `rank` and `similarity` look at: beyond it values hardly change and time grows."""

MOST_FINDINGS = 6
"""Findings that have a color of their own in a map: those of most images."""

_CHUNK = 128  # images embedded at a time


@dataclass(frozen=True, eq=False)
class Shown:
    """Labeled images of a figure."""

    ids: list[str]
    labels: NDArray[Any]  # values of the target, (n,), or (n, L) of findings
    groups: list[str]  # of each image; identical images are of one group
    remark: str  # which rows these are, in words


@dataclass(frozen=True, eq=False)
class Pool:
    """The images of a dataset outside its test set, and the stores of several backbones over it."""

    ds: ImageDataset
    stores: dict[str, FeatureStore]
    sides: Sides
    rows: IntArray  # rows of the dataset that may train or validate, ascending; no test row is among them

    def features(self, backbone: str, rows: IntArray) -> torch.Tensor:
        """Raw features of some rows, float32 (n, D)."""
        return load_features(self.stores[backbone], self.ds, self.sides.ids[rows])

    def drawn(self, seed: int) -> IntArray:
        """At most `MOST` rows, ascending, drawn by hash with the seed."""
        if len(self.rows) <= MOST:
            return self.rows
        order = hash_order(seed, "analysis", self.sides.ids[self.rows].tolist())
        return np.sort(self.rows[order[:MOST]])


def open_datasets(
    names: Sequence[str], ref: DatasetRef, home: PathLike | None, *, several: bool = False
) -> list[ImageDataset]:
    """Datasets by name; default: every one with cached features, with ``several`` those of at least two backbones."""
    wanted = list(names or cached_datasets(home))
    if not names and several and len(wanted) > 1:
        lacking = [name for name in wanted if len(cached_backbones(name, home)) < 2]
        for name in lacking:
            log.info(f"{name} left out: fewer than two backbones cached")
        wanted = [name for name in wanted if name not in lacking] or wanted
    if not wanted:
        raise StoreNotFoundError("nothing is cached", code="store-not-found", where=home_dir(home),
                                 fix="embcache extract --backbone NAME --dataset NAME, or embcache demo")  # fmt: skip
    one_root(wanted, ref)
    return [find_dataset(name, ref, home)[0] for name in wanted]


def one_root(datasets: Sequence[str], ref: DatasetRef) -> None:
    """Refuse one root or name for several datasets."""
    if len(datasets) > 1 and (ref.data_root is not None or ref.name is not None):
        raise UsageError("--data-root and --name are for one dataset", code="several-datasets",
                         found=", ".join(datasets), fix="--dataset NAME")  # fmt: skip


def backbones_or_cached(ds: ImageDataset, backbones: Sequence[str], home: PathLike | None) -> list[str]:
    """The named backbones, each once, or all whose features are cached; an error where there are none."""
    names = list(dict.fromkeys(backbones)) or cached_backbones(ds.name, home)
    if not names:
        raise StoreNotFoundError(
            f"no features are cached for {ds.name}", code="store-not-found", where=home_dir(home) / slug(ds.name),
            fix=extract_command("NAME", ds, home),
        )  # fmt: skip
    return names


def open_pool(ds: ImageDataset, backbones: Sequence[str], home: PathLike | None, recipe: str | None, seed: int) -> Pool:
    """Cached features of a dataset, of all backbones by default, without the test set that a probe would hold out."""
    stores = open_stores(ds, [backbones_or_cached(ds, backbones, home)], home, recipe)
    sides = divide_for(ds, list(stores.values()), seed=seed)
    return Pool(ds, stores, sides, np.union1d(sides.pool, sides.own_val))


def shown_images(
    ds: ImageDataset, stores: Sequence[FeatureStore], *, rows: str = "test", most: int | None = None, **protocol: Any
) -> Shown:
    """The labeled images that the protocol tests on, or trains and validates on, or both; readable in every store.

    No folds are drawn, so any number of images of a class can be shown. ``protocol`` is passed to `divide_for`.
    """
    sides = divide_for(ds, stores, **protocol)
    pool = np.union1d(sides.pool, sides.own_val)
    chosen, remark = {
        "test": (sides.test, f"{sides.test_set} test set"),
        "train": (pool, "training and validation images"),
        "all": (np.union1d(sides.test, pool), "all images"),
    }[rows]
    chosen = chosen[ds.task.known(sides.labels[chosen])]
    if not len(chosen):
        raise ProtocolError(
            f"the labels of the {rows} images of {ds.name} are not known: there is nothing to color by",
            code="no-test-labels", fix=("--test local", "--rows all"),
        )  # fmt: skip
    if most is not None and len(chosen) > most:
        remark += f", {most:,} drawn of {len(chosen):,} images"
        chosen = np.sort(chosen[hash_order(0, "figure", sides.ids[chosen].tolist())[:most]])
    return Shown(sides.ids[chosen].tolist(), sides.labels[chosen], sides.groups[chosen].tolist(), remark)


@dataclass(frozen=True, eq=False)
class Colors:
    """What the images of a map are colored by."""

    values: NDArray[Any]  # classes int64 (n,), or numbers float64 (n,)
    names: tuple[str, ...]  # of the classes, or of the number
    classes: bool  # whether each image is of one class, so that classes can be scored


def colors_of(task: Target, y: NDArray[Any], positive: str | None = None) -> Colors:
    """Classes and numbers as they are; of findings one of them, or which of the most frequent ones an image has."""
    if positive is not None and (task.kind != "findings" or positive not in task.names):
        raise UsageError(
            "there is no such finding to color by", code="unknown-finding", found=positive, where="--positive",
            expected=", ".join(task.names) if task.kind == "findings" else f"findings; the target is {task.kind}",
            fix="leave it out" if task.kind != "findings" else f"--positive {shlex.quote(task.names[0])}",
        )  # fmt: skip
    if task.kind == "number":
        return Colors(y, task.names, classes=False)
    if task.kind != "findings":
        return Colors(y, task.names, classes=True)
    if positive is not None:
        of = y[:, task.names.index(positive)]
        there = bool((of < 0).any())
        return Colors(np.where(of < 0, 2, of), (f"no {positive}", positive, *["not known"] * there), classes=not there)
    most = np.argsort(-(y == 1).sum(0), kind="stable")[:MOST_FINDINGS]
    names = [*(task.names[c] for c in most), "several findings", "none of them known to be present"]
    names += ["another finding"] * (len(most) < len(task.names))
    own, has, several = y[:, most] == 1, (y == 1).sum(1), len(most)
    alone = np.where(own.any(1), own.argmax(1), several + 2)
    return Colors(np.select([has > 1, has == 0], [several, several + 1], alone), tuple(names), classes=False)


def check_dataset(result: Result, ds: ImageDataset) -> None:
    """Refuse a run of another dataset."""
    if result.dataset != ds.name:
        raise UsageError("a run of another dataset", code="other-dataset", expected=ds.name,
                         found=f"{result.id} of {result.dataset}")  # fmt: skip


def own_protocol(result: Result) -> dict[str, Any]:
    """What `shown_images` needs to show the test images of a run."""
    return {key: result.request[key] for key in ("seed", "test") if key in result.request}


def fold_heads(result: Result, run: Path) -> dict[int, dict[str, torch.Tensor]]:
    """Parameters of each fold's head, by the fold's number; those that failed are left out."""
    heads = {fold.fold: params for fold, params in zip(result.folds, load_heads(run), strict=True) if params}
    if not heads:
        raise ProtocolError("no fold of this run has a model", code="no-model", found=result.id, where=run,
                            fix="embcache probe --again")  # fmt: skip
    return heads


@torch.no_grad()
def fused_features(
    result: Result, run: Path, features: Mapping[str, NDArray[np.float32]]
) -> tuple[int, NDArray[np.float32]]:
    """What a run of ``dvme`` makes of cached features (n, D) by its first fold with a model: the fold, and (n, P)."""
    refuse_untrusted(result)
    head = make_head(**result.request["head"])
    if not isinstance(head, Fusion):
        raise UsageError(f"a run of {result.head} has no fused embedding", code="other-head", expected="a run of dvme",
                         found=result.id, fix="embcache results")  # fmt: skip
    fold, params = next(iter(fold_heads(result, run).items()))
    stacked = {name: p[None] for name, p in params.items()}
    split = {name: torch.split(torch.from_numpy(features[name])[None], _CHUNK, 1) for name in result.backbones}
    chunks = [dict(zip(split, parts, strict=True)) for parts in zip(*split.values(), strict=True)]
    embedded = torch.cat([head.embed(stacked, chunk)[0] for chunk in chunks])
    return fold, np.asarray(embedded.float().numpy())
