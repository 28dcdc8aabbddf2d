"""What each stage of embcache reaches on this machine, and what share that is of the machine's own ceiling."""

from __future__ import annotations

import contextlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import PIL.Image
import torch

from embcache.cores import usable_cores
from embcache.data.dataset import ImageDataset, find_dataset
from embcache.data.images import image_sources, read_image
from embcache.errors import EmbcacheError, ImageError
from embcache.paths import PathLike
from embcache.probe.cached import cached_datasets
from embcache.probe.heads import make_head
from embcache.probe.request import check_device
from embcache.probe.schedule import Schedule
from embcache.probe.train import make_job, train_jobs
from embcache.store.commit import commit_shard, create_store, publish_plan, write_snapshot
from embcache.store.feature_store import FeatureStore
from embcache.store.formats import FORMATS
from embcache.store.recipe import Recipe
from embcache.store.rows import PlanEntry, ShardRows

_ROWS, _DIM, _FOLDS, _BATCH = 8192, 1536, 5, 64
_BACKBONES = {"simclr": 2048, "swav": 2048, "dino": 1536}  # what dvme fuses by default
_IMAGES = 64
_REPEATS = 5
_STARTS = 3  # of whole processes


@dataclass(frozen=True)
class Measured:
    """One stage.

    Attributes
    ----------
    stage : str
        What was done.
    rate : float
        ``unit`` in a second.
    unit : str
    ceiling : str
        What the stage cannot be faster than; empty where nothing says.
    share : float or None
        Of the ceiling, measured by turns with the stage.
    """

    stage: str
    rate: float
    unit: str
    ceiling: str = ""
    share: float | None = None


@dataclass(frozen=True)
class Bench:
    """All stages, and the machine that they ran on."""

    machine: Mapping[str, Any]
    measured: tuple[Measured, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON data."""
        return asdict(self) | {"machine": dict(self.machine)}


def run_bench(
    dataset: str | None = None,
    *,
    data_root: PathLike | None = None,
    home: PathLike | None = None,
    device: str = "cpu",
    say: Callable[[str], Any] = lambda stage: None,
) -> Bench:
    """Measure reading, training and decoding on made-up features and real images; some half a minute.

    Parameters
    ----------
    dataset : str, optional
        Whose images are decoded; default: the first cached dataset whose images are there. None there is no error.
    data_root, home : path, optional
        As of `embcache.data.dataset.find_dataset`.
    device : str
        Where heads are trained.
    say : callable
        Told each stage before it begins.

    Raises
    ------
    UsageError
        The device cannot be used.
    EmbcacheError
        The dataset that was named cannot be read.
    """
    check_device(device)
    ds = _dataset_at_hand(dataset, data_root, home)
    measured, notes = [], []
    say("reading features")
    measured += _reading()
    say("training linear heads")
    measured.append(_linear(device))
    say("training dvme")
    measured.append(_dvme(device))
    say("a whole probe")
    measured.append(_whole_probe())
    if ds is None:
        notes.append("no images are at hand: --dataset NAME measures decoding")
    else:
        say("decoding images")
        measured.append(_decoding(ds))
    return Bench(_machine(device), tuple(measured), tuple(notes))


def _turns(ways: Sequence[Callable[[], object]], repeats: int = _REPEATS) -> list[float]:
    """Median seconds of each way; they take turns, so that all see the same machine. The first turn does not count."""
    taken: list[list[float]] = [[] for _ in ways]
    for turn in range(repeats + 1):
        for way, seconds in zip(ways, taken, strict=True):
            began = time.perf_counter()
            way()
            if turn:
                seconds.append(time.perf_counter() - began)
    return [statistics.median(seconds) for seconds in taken]


def _reading() -> list[Measured]:
    features = np.random.default_rng(0).standard_normal((_ROWS, _DIM), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "features.npy", features)
        stores = [_write_store(Path(folder) / name, name, features).features for name in FORMATS]
        copy, load, *reads = _turns(
            [features.copy, lambda: np.load(Path(folder) / "features.npy"), *(lambda s=s: s[:] for s in stores)]
        )
    size = features.nbytes / 1e9
    rows = [Measured("memory: copying an array", size / copy, "GB")]
    rows.append(Measured("np.load, nothing verified", size / load, "GB", "memory", copy / load))
    return rows + [
        Measured(f"reading features from {name}, verified", size / seconds, "GB", "np.load", load / seconds)
        for name, seconds in zip(FORMATS, reads, strict=True)
    ]


def _write_store(home: Path, name: str, features: np.ndarray, names: Sequence[str] | None = None) -> FeatureStore:
    recipe = Recipe(
        backbone="bench",
        architecture="none",
        weights_sha256="0" * 64,
        transform={},
        decoder="none",
        pooling="none",
        precision="fp32",
        dtype=str(features.dtype),
        numerics=1,
    )
    names = names or [str(i) for i in range(len(features))]
    path = create_store(
        home,
        recipe,
        format=name,
        row_shape=features.shape[1:],
        rows_per_shard=512,
        batch_size=_BATCH,
        threads=1,
        provenance={},
    )
    for number, start in enumerate(range(0, len(features), 512)):
        part = features[start : start + 512]
        ids, none = tuple(names[start : start + 512]), ("",) * len(part)
        publish_plan(path, number, [PlanEntry(id_, -1, -1) for id_ in ids])
        commit_shard(path, number, ShardRows(ids, part, np.ones(len(part), bool), none, none))
    return FeatureStore(path)


def _linear(device: str) -> Measured:
    x = torch.randn(_ROWS, _DIM, generator=torch.Generator().manual_seed(0)).to(device)
    labels = np.arange(_ROWS) % 2
    y = torch.from_numpy(labels).to(device)
    every = np.arange(_ROWS)
    jobs = [make_job(labels, every, every[:0], 2, f"bench\0{fold}", 1e-3) for fold in range(_FOLDS)]
    groups = x[: _ROWS // (_FOLDS * _BATCH) * _FOLDS * _BATCH].view(-1, _FOLDS, _BATCH, _DIM)
    weight = torch.randn(_FOLDS, 2, _DIM, device=device)
    error = torch.randn(_FOLDS, _BATCH, 2, device=device)

    def train() -> None:
        train_jobs(make_head("linear"), {"bench": x}, y, jobs, 2, "auc", Schedule(max_epochs=1, min_epochs=1))

    def multiply() -> None:
        # What training cannot do without: logits of each batch, and the gradient of the weights from their error.
        # On rows in their order, and on one thread, as so small a model trains: more only wait for each other.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for _ in range(_FOLDS):
                for batch in groups:
                    torch.bmm(batch, weight.transpose(1, 2))
                    torch.bmm(error.transpose(1, 2), batch)
            _wait(device)
        finally:
            torch.set_num_threads(threads)

    training, products = _turns([train, multiply], 3)
    products *= _ROWS / (len(groups) * _FOLDS * _BATCH)  # the rows that fill no group of batches
    rows = _FOLDS * _ROWS / training
    return Measured(f"training {_FOLDS} linear heads", rows, "rows", "its matrix products alone", products / training)


def _dvme(device: str) -> Measured:
    generator = torch.Generator().manual_seed(0)
    n = 8 * _BATCH  # enough steps that initial weights are a small part
    x = {name: torch.randn(n, dim, generator=generator).to(device) for name, dim in _BACKBONES.items()}
    labels = np.arange(n) % 2
    y = torch.from_numpy(labels).to(device)
    job = make_job(labels, np.arange(n), np.arange(0), 2, "bench", 1e-3)
    plan = Schedule(max_epochs=1, min_epochs=1, batch_size=_BATCH)
    ways = [
        lambda head=make_head(name): train_jobs(head, x, y, [job], 2, "auc", plan) for name in ("dvme", "dvme-identity")
    ]
    whole, without = _turns(ways, 3)
    return Measured("training dvme", n / whole, "rows", "dvme without its attention", without / whole)


def _whole_probe() -> Measured:
    """``embcache probe`` as a process of its own, on made-up features of 1,000 images."""
    n = 1000
    labels, ids = np.arange(n) % 2, [f"i{k:04d}" for k in range(n)]
    split = np.where(np.arange(n) % 10 < 8, "train", "test")
    table = pd.DataFrame({"id": ids, "path": ids, "member": -1, "label": labels, "group": ids, "split": split})
    ds = ImageDataset("bench", None, ("no", "yes"), "auc", "generic", table)
    features = np.random.default_rng(0).standard_normal((n, _DIM), dtype=np.float32) + labels[:, None] / 16
    with tempfile.TemporaryDirectory() as folder:
        _write_store(Path(folder) / "bench", "zarr", features.astype(np.float32), ids)
        write_snapshot(Path(folder) / "bench", ds.to_parquet_bytes())
        asked = ["probe", "--home", folder, "--dataset", "bench", "--subset", "S", "--again"]

        def run(*arguments: str) -> None:
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)

        whole, floor = _turns([lambda: run("-m", "embcache", *asked), lambda: run("-c", "import torch")], _STARTS)
    return Measured("probing 50 of 1,000 images, from start to end", 1 / whole, "probes", "import torch", floor / whole)


def _dataset_at_hand(name: str | None, data_root: PathLike | None, home: PathLike | None) -> ImageDataset | None:
    if name is not None:
        ds = find_dataset(name, root=data_root, home=home, allow_missing=True)[0]
        if ds.root is None or not ds.root.exists():
            raise EmbcacheError("the images are not there", where=ds.name, fix="--data-root FOLDER")
        return ds
    for cached in cached_datasets(home):
        try:
            ds, source = find_dataset(cached, home=home, allow_missing=True)
        except EmbcacheError:
            continue
        if source == "live":
            return ds
    return None


def _decoding(ds: ImageDataset) -> Measured:
    """Images spread over the dataset, one after the other as one worker decodes them; unreadable ones are left out."""
    chosen = np.unique(np.linspace(0, len(ds) - 1, _IMAGES).astype(int))
    every = image_sources(ds.table.iloc[chosen])
    root, images = ds.root, []
    assert root is not None
    for source in every:
        with contextlib.suppress(ImageError):  # extraction would quarantine it
            read_image(root, source.path, source.member)
            images.append(source)
    if not images:
        raise EmbcacheError("no image could be read", found=f"{len(every)} of {ds.name} tried", where=root)

    def decode() -> None:
        for source in images:
            read_image(root, source.path, source.member)

    def pillow() -> None:
        for source in images:
            with PIL.Image.open(root / source.path) as image:
                image.convert("RGB").load()

    cores = usable_cores()
    try:
        seconds, floor = _turns([decode, pillow], 1)
        against = {"ceiling": "Pillow's decoder alone", "share": floor / seconds}
    except (OSError, ValueError):  # DICOM, or images inside a file: no picture for Pillow
        (seconds,), against = _turns([decode], 1), {}
    rate = len(images) / seconds
    stage = f"decoding {ds.name} on one of {cores} cores ({len(ds) / rate / cores:,.0f} s for all)"
    return Measured(stage, rate, "images", **against)  # type: ignore[arg-type]


def _machine(device: str) -> dict[str, Any]:
    packages = ("torch", "numpy", "zarr", "h5py")
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    return {
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "device": name,
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
