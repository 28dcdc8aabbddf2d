"""What the missing parts of a table will cost: seconds, and on what the figure rests. All of it is rough."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from embcache.data.dataset import ImageDataset
from embcache.data.images import read_size
from embcache.errors import EmbcacheError, ImageError
from embcache.extract.backbones import Backbone, LoadedBackbone, find_backbone, load_backbone, weights_status
from embcache.extract.batching import Source
from embcache.extract.networks import build_network
from embcache.extract.transforms import choose_transform
from embcache.extract.worker import compute_shard, freeze
from embcache.probe.heads import make_head
from embcache.probe.results import ProbeResult, list_results
from embcache.probe.schedule import Schedule
from embcache.report.grid import Model
from embcache.study.plan import DatasetState
from embcache.study.settings import Settings

_SAMPLE = 8  # images of a calibration
_EPOCHS = 40.0  # between the 30 and 50 of the schedule
_FORWARD = 1 / 3  # of a training step: the backward pass costs about twice the forward one


@dataclass(frozen=True)
class Step:
    """One line of a plan.

    Attributes
    ----------
    dataset : str
    action : {"extract", "probe", "finetune"}
    what : str
        In words.
    count : int
        Images for an extraction, else results.
    seconds : float or None
        Rough; None where nothing tells.
    basis : str
        What the seconds rest on.
    """

    dataset: str
    action: str
    what: str
    count: int
    seconds: float | None
    basis: str


def estimate_steps(states: Sequence[DatasetState], settings: Settings) -> list[Step]:
    """The steps that a table needs, dataset by dataset, each with its cost.

    Earlier runs of the same head (for finetuning: of the same backbones) on this home give the seconds, scaled by the
    images that training and validation see; where there are none, and for extractions, a calibration of seconds does.
    """
    earlier = list_results(settings.home)
    steps = []
    measured: dict[tuple[str, str], float | None] = {}  # one calibration for all backbones of one architecture
    for state in states:
        if state.ds is None:
            continue
        cached = [model for model, _ in state.missing if model.kind != "finetune"]
        for backbone in dict.fromkeys(name for model in cached for name in model.backbones):
            if backbone in state.owed:
                key = state.asked, find_backbone(backbone).network
                if key not in measured:
                    measured[key] = _calibrate_extraction(state.ds, backbone, settings)
                absent = backbone not in settings.weights and "downloaded" in weights_status(backbone, settings.home)
                words = f"{backbone} (its weights are downloaded first)" if absent else backbone
                steps.append(_extraction(state.asked, words, state.owed[backbone], measured[key]))
        for kind in ("finetune", "probe"):
            groups: dict[tuple[str, tuple[str, ...]], list[tuple[Model, str]]] = {}
            for model, subset in state.missing:
                if model.kind == kind:
                    groups.setdefault((model.head, model.backbones), []).append((model, subset))
            for (head, backbones), keys in groups.items():
                steps.append(_training(state, kind, head, backbones, keys, earlier, settings))
    return steps


def _extraction(dataset: str, what: str, count: int, each: float | None) -> Step:
    if each is None:
        return Step(dataset, "extract", what, count, None, "no calibration: the network cannot be built here")
    basis = f"calibration: {_SAMPLE} of its images here, {each * 1000:.0f} ms each"
    return Step(dataset, "extract", what, count, each * count, basis)


def _calibrate_extraction(ds: ImageDataset, backbone: str, settings: Settings) -> float | None:
    try:
        return seconds_per_image(backbone, ds, settings)
    except (EmbcacheError, OSError, RuntimeError):
        return None


def seconds_per_image(backbone: str, ds: ImageDataset, settings: Settings) -> float | None:
    """Seconds that one image takes from its file to its features here and now; None where none can be read."""
    if ds.root is None:
        return None
    rows = np.linspace(0, len(ds) - 1, num=min(_SAMPLE, len(ds)), dtype=int)
    columns = [ds.table[name].iloc[rows].tolist() for name in ("id", "path", "member")]
    sources = [Source(*row) for row in zip(*columns, strict=True)]
    sizes = set()
    for source in sources:
        try:
            sizes.add(read_size(ds.root, source.path, source.member))
        except ImageError:
            continue
    if not sizes:
        return None
    spec = find_backbone(backbone)
    transform = choose_transform(spec, settings.transform, sizes)
    loaded = _any_weights(spec, settings, transform.size)
    network = freeze(loaded, transform, settings.device, "fp32")
    with ThreadPoolExecutor(settings.workers or 2) as pool:
        compute_shard(ds.root, sources[:2], [network], batch_size=_SAMPLE, pool=pool)  # the first batch warms up
        began = time.perf_counter()
        compute_shard(ds.root, sources, [network], batch_size=_SAMPLE, pool=pool)
        return (time.perf_counter() - began) / len(sources)


def _any_weights(spec: Backbone, settings: Settings, size: tuple[int, int]) -> LoadedBackbone:
    """The backbone with its weights where they are here, else with whatever it is initialised with: as fast."""
    try:
        return load_backbone(
            spec.name, weights=settings.weights.get(spec.name), home=settings.home, image_size=size,
            allow_download=False,
        )  # fmt: skip
    except EmbcacheError:
        module: nn.Module = build_network(spec.network).eval().requires_grad_(False)
        return LoadedBackbone(spec, module, "", "none: only its speed is measured")


def _training(
    state: DatasetState,
    kind: str,
    head: str,
    backbones: tuple[str, ...],
    keys: Sequence[tuple[Model, str]],
    earlier: Sequence[ProbeResult],
    settings: Settings,
) -> Step:
    assert state.ds is not None
    sizes = [_sizes(state.ds, subset, settings) for _, subset in keys]
    subsets = ", ".join(dict.fromkeys(subset for _, subset in keys))
    what = f"{' + '.join(backbones)}, {head}: {subsets}"
    # A finetuning costs what its networks cost; a probe about the same on any features.
    alike = [
        r
        for r in earlier
        if r.kind == kind and r.head == head and r.seconds > 0
        and (r.backbones == backbones if kind == "finetune" else len(r.backbones) == len(backbones))
    ]  # fmt: skip
    if alike:
        seconds = sum(_scaled(alike, n_train, n_val, settings) for n_train, n_val in sizes)
        runs = "1 earlier run" if len(alike) == 1 else f"{len(alike)} earlier runs"
        return Step(state.asked, kind, what, len(keys), seconds, f"{runs}, scaled by images and epochs")
    try:
        rate, basis = _calibrate(kind, head, backbones, state.ds, settings)
    except (EmbcacheError, OSError, RuntimeError, ValueError):
        return Step(state.asked, kind, what, len(keys), None, "no earlier run, and no calibration here")
    epochs = _epochs(kind, settings)
    seconds = sum(rate * _work(settings.folds * settings.repeats, epochs, *size) for size in sizes)
    return Step(state.asked, kind, what, len(keys), seconds, basis)


def _sizes(ds: ImageDataset, subset: str, settings: Settings) -> tuple[int, int]:
    """Training and validation images of a fold, about."""
    table = ds.table
    pool = int(((table["split"] == "train") & (table["label"] >= 0)).sum())
    if not ((table["split"] == "test") & (table["label"] >= 0)).any() and settings.test == "local":
        pool = pool * 4 // 5
    pool = min(pool, ds.pool_limit or pool)
    most, fold = pool - pool // settings.folds, pool // settings.folds
    n_train = min(most, int(subset) if subset.isdigit() else int(ds.subset_sizes.get(subset, most)))
    return n_train, min(fold, n_train) if settings.val == "matched" else fold


def _epochs(kind: str, settings: Settings) -> float:
    """Epochs that a training is likely to take."""
    limited = kind == "finetune" and settings.max_epochs is not None
    return min(_EPOCHS, settings.max_epochs or _EPOCHS) if limited else _EPOCHS


def _work(folds: float, epochs: float, n_train: float, n_val: float) -> float:
    """Images that training sees, validation's counted by what they cost."""
    return folds * epochs * (n_train + _FORWARD * n_val)


def _scaled(alike: Sequence[ProbeResult], n_train: int, n_val: int, settings: Settings) -> float:
    """Seconds of the earlier run that was nearest in work, scaled."""
    wanted = _work(1, 1, n_train, n_val)
    nearest = min(alike, key=lambda r: abs(math.log(max(_work(1, 1, r.n_train, r.n_val), 1.0) / max(wanted, 1.0))))
    epochs = max(float(np.mean([fold.epochs for fold in nearest.folds])), 1.0)
    done = _work(len(nearest.folds), epochs, nearest.n_train, nearest.n_val)
    return nearest.seconds * _work(settings.folds * settings.repeats, epochs, n_train, n_val) / max(done, 1.0)


def _calibrate(
    kind: str, head: str, backbones: Sequence[str], ds: ImageDataset, settings: Settings
) -> tuple[float, str]:
    """Seconds per image and epoch of training, from a few steps here."""
    if kind == "finetune":
        each = sum(seconds_to_train(find_backbone(name), settings) for name in backbones)
        words = f"calibration: {_SAMPLE} images forward and backward, {each * 1000:.0f} ms each"
        return each, f"{words}; at {_epochs(kind, settings):.0f} epochs"
    n_classes = len(ds.class_names)
    rows = max(64, n_classes)
    rng = np.random.default_rng(0)
    x = {name: rng.normal(size=(rows, find_backbone(name).dim)).astype(np.float32) for name in backbones}
    y = np.arange(rows) % n_classes
    model, schedule = make_head(head), Schedule(max_epochs=2, min_epochs=1)
    began = time.perf_counter()
    if hasattr(model, "solve"):
        model.fit(x, y)
        return (time.perf_counter() - began) / (rows * _EPOCHS), f"calibration: solved for {rows} images"
    model.fit(x, y, schedule=schedule)
    each = (time.perf_counter() - began) / (2 * rows)
    return each, f"calibration: 2 epochs of {rows} images; at {_EPOCHS:.0f} epochs"


def seconds_to_train(spec: Backbone, settings: Settings) -> float:
    """Seconds per image of one step forward and backward through a whole network, on images of its own size."""
    device = "cuda" if settings.device == "auto" and torch.cuda.is_available() else settings.device
    device = "cpu" if device == "auto" else device
    module = build_network(spec.network).to(device).train()
    images = torch.zeros(_SAMPLE, 3, *spec.input_size, device=device)
    seconds = 0.0
    for _ in range(2):  # the first step warms up
        began = time.perf_counter()
        module(images).sum().backward()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    return seconds / _SAMPLE


def duration(seconds: float) -> str:
    """Seconds in words, as rough as they are: ``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def step_words(step: Step) -> str:
    """A step in a line: what, how much, how long and how that is known."""
    cost = "cost not known" if step.seconds is None else f"about {duration(step.seconds)}"
    unit = ("image" if step.action == "extract" else "result") + ("" if step.count == 1 else "s")
    return f"{step.dataset}: {step.what}: {step.count:,} {unit}, {cost} ({step.basis})"


def total_words(steps: Sequence[Step]) -> str:
    """The cost of all steps, in a line."""
    known = [step.seconds for step in steps if step.seconds is not None]
    unknown = len(steps) - len(known)
    plural = "" if unknown == 1 else "s"
    more = f", and {unknown} step{plural} whose cost is not known" if unknown else ""
    return f"in all about {duration(sum(known))}, rough{more}"
