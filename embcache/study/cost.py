"""What the missing parts of a table will cost: seconds, and on what the figure rests. All of it is rough."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from embcache.data.dataset import ImageDataset
from embcache.data.images import Source, image_sources, read_size
from embcache.errors import EmbcacheError, ImageError
from embcache.extract.backbones import Backbone, LoadedBackbone, find_backbone, load_backbone, weights_status
from embcache.extract.batching import prepare
from embcache.extract.networks import build_network
from embcache.extract.transforms import Transform, choose_transform
from embcache.extract.worker import freeze, pick_device
from embcache.probe.heads import make_head
from embcache.probe.results import ProbeResult, list_results
from embcache.probe.schedule import Schedule
from embcache.probe.solve import is_solved
from embcache.report.grid import Model
from embcache.study.plan import DatasetState
from embcache.study.settings import Settings

_SAMPLE = 4  # images of a calibration, at most
_LONG = 1.0  # seconds: a first step that took so long on a CPU is not repeated
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


class Calibrations:
    """Measurements here and now, each made once and said before it is made.

    What a network takes is shared by all backbones of one architecture at one image size, whatever the dataset.

    Parameters
    ----------
    settings : Settings
    say : callable
        Told a line before each measurement.
    """

    def __init__(self, settings: Settings, say: Callable[[str], object]) -> None:
        self.settings = settings
        self._say = say
        self._known: dict[Hashable, float | None] = {}

    def extraction(self, backbone: str, ds: ImageDataset, name: str) -> float | None:
        """Seconds that one image of a dataset takes from its file to its features; None where nothing tells."""
        spec = find_backbone(backbone)
        try:
            sources, sizes = _sample(ds)
            transform = choose_transform(spec, self.settings.transform, sizes) if sizes else None
        except (EmbcacheError, OSError):
            return None
        if transform is None:
            return None
        reading = self._once(
            ("read", name, str(transform.geometry_dict())),
            f"the reading of {name}",
            lambda: seconds_to_read(ds, sources, transform, self.settings),
        )
        forward = self._once(
            ("forward", spec.network, transform.size),
            f"{backbone} on {name}",
            lambda: seconds_to_extract(spec, transform, self.settings),
        )
        return None if reading is None or forward is None else reading + forward

    def finetuning(self, backbone: str) -> float | None:
        """Seconds per image of one step forward and backward through a network; None where it cannot be built."""
        spec = find_backbone(backbone)
        return self._once(
            ("train", spec.network, spec.input_size),
            f"the finetuning of {backbone}",
            lambda: seconds_to_train(spec, self.settings),
        )

    def probing(self, head: str, backbones: Sequence[str], n_classes: int) -> float | None:
        """Seconds per image and epoch of a head's training; None where it cannot be trained on so many classes."""
        dims = {name: find_backbone(name).dim for name in backbones}
        return self._once(
            ("probe", head, tuple(dims.values()), n_classes),
            f"{head} on {' + '.join(backbones)}",
            lambda: seconds_to_probe(head, dims, n_classes),
        )

    def _once(self, key: Hashable, what: str, measure: Callable[[], float]) -> float | None:
        if key not in self._known:
            self._say(f"calibrating {what} …")
            try:
                self._known[key] = measure()
            except (EmbcacheError, OSError, RuntimeError, ValueError):
                self._known[key] = None
        return self._known[key]


def _silent(line: str) -> None:
    del line


def estimate_steps(
    states: Sequence[DatasetState], settings: Settings, say: Callable[[str], object] = _silent
) -> list[Step]:
    """The steps that a table needs, dataset by dataset, each with its cost.

    Earlier runs of the same head (for finetuning: of the same backbones) on this home give the seconds, scaled by the
    images that training and validation see; where there are none, and for extractions, a calibration of seconds does,
    which ``say`` is told of before it begins.
    """
    earlier = list_results(settings.home)
    steps = []
    measured = Calibrations(settings, say)
    for state in states:
        if state.ds is None:
            continue
        cached = [model for model, _ in state.missing if model.kind != "finetune"]
        for backbone in dict.fromkeys(name for model in cached for name in model.backbones):
            if backbone in state.owed:
                each = measured.extraction(backbone, state.ds, state.asked)
                absent = backbone not in settings.weights and "downloaded" in weights_status(backbone, settings.home)
                words = f"{backbone} (its weights are downloaded first)" if absent else backbone
                steps.append(_extraction(state.asked, words, state.owed[backbone], each))
        for kind in ("finetune", "probe"):
            groups: dict[tuple[str, tuple[str, ...]], list[tuple[Model, str]]] = {}
            for model, subset in state.missing:
                if model.kind == kind:
                    groups.setdefault((model.head, model.backbones), []).append((model, subset))
            for (head, backbones), keys in groups.items():
                steps.append(_training(state, kind, head, backbones, keys, earlier, measured))
    return steps


def _extraction(dataset: str, what: str, count: int, each: float | None) -> Step:
    if each is None:
        return Step(dataset, "extract", what, count, None, "no calibration: the network cannot be built here")
    basis = f"calibration: up to {_SAMPLE} images here, {each * 1000:.0f} ms each"
    return Step(dataset, "extract", what, count, each * count, basis)


def _sample(ds: ImageDataset) -> tuple[list[Source], set[tuple[int, int]]]:
    """A few images of a dataset, and the sizes of those that can be read."""
    if ds.root is None:
        return [], set()
    rows = np.linspace(0, len(ds) - 1, num=min(_SAMPLE, len(ds)), dtype=int)
    sources = image_sources(ds.table.iloc[rows])
    sizes = set()
    for source in sources:
        try:
            sizes.add(read_size(ds.root, source.path, source.member))
        except ImageError:
            continue
    return sources, sizes


def seconds_to_read(ds: ImageDataset, sources: Sequence[Source], transform: Transform, settings: Settings) -> float:
    """Seconds per image of decoding and resizing."""
    root = ds.root
    assert root is not None
    with ThreadPoolExecutor(settings.workers or 2) as pool:
        began = time.perf_counter()
        list(pool.map(lambda source: prepare(root, source, [transform.geometry]), sources))
        return (time.perf_counter() - began) / len(sources)


def seconds_to_extract(spec: Backbone, transform: Transform, settings: Settings) -> float:
    """Seconds per image of one step forward, on images as the transform leaves them."""
    network = freeze(_any_weights(spec, settings, transform.size), transform, settings.device, "fp32")

    def forward(count: int) -> None:
        network.features(np.zeros((count, *transform.size, 3), np.uint8))

    return _per_image(forward, network.device)


def _per_image(step: Callable[[int], object], device: torch.device) -> float:
    """Seconds per image of a step: of the second, as the first warms up, unless that was long."""
    count = 2
    for _ in range(2):
        began = time.perf_counter()
        step(count)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = (time.perf_counter() - began) / count
        if seconds * count > _LONG and device.type == "cpu":
            break
        count = _SAMPLE
    return seconds


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
    measured: Calibrations,
) -> Step:
    assert state.ds is not None
    settings = measured.settings
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
    rate, basis = _calibrated(kind, head, backbones, len(state.ds.class_names), measured)
    if rate is None:
        return Step(state.asked, kind, what, len(keys), None, basis)
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


def _calibrated(
    kind: str, head: str, backbones: Sequence[str], n_classes: int, measured: Calibrations
) -> tuple[float | None, str]:
    """Seconds per image and epoch of training, and what they rest on."""
    nothing = None, "no earlier run, and no calibration here"
    if kind == "finetune":
        rates = [measured.finetuning(name) for name in backbones]
        known = [rate for rate in rates if rate is not None]
        if len(known) < len(rates):
            return nothing
        words = f"calibration: up to {_SAMPLE} images forward and backward, {sum(known) * 1000:.0f} ms each"
        return sum(known), f"{words}; at {_epochs(kind, measured.settings):.0f} epochs"
    each = measured.probing(head, backbones, n_classes)
    if each is None:
        return nothing
    rows = _rows(n_classes)
    if is_solved(make_head(head)):
        return each, f"calibration: solved for {rows} images"
    return each, f"calibration: 2 epochs of {rows} images; at {_EPOCHS:.0f} epochs"


def _rows(n_classes: int) -> int:
    """Images that a head is calibrated on."""
    return max(64, n_classes)


def seconds_to_probe(head: str, dims: Mapping[str, int], n_classes: int) -> float:
    """Seconds per image and epoch of training a head on features of these dimensions."""
    rows = _rows(n_classes)
    rng = np.random.default_rng(0)
    x = {name: rng.normal(size=(rows, dim)).astype(np.float32) for name, dim in dims.items()}
    y = np.arange(rows) % n_classes
    model, schedule = make_head(head), Schedule(max_epochs=2, min_epochs=1)
    solved = is_solved(model)
    began = time.perf_counter()
    if solved:
        model.fit(x, y)
        return (time.perf_counter() - began) / (rows * _EPOCHS)
    model.fit(x, y, schedule=schedule)
    return (time.perf_counter() - began) / (2 * rows)


def seconds_to_train(spec: Backbone, settings: Settings) -> float:
    """Seconds per image of one step forward and backward through a whole network, on images of its own size."""
    device = pick_device(settings.device)
    module = build_network(spec.network).to(device).train()

    def step(count: int) -> None:
        module(torch.zeros(count, 3, *spec.input_size, device=device)).sum().backward()

    return _per_image(step, device)


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
