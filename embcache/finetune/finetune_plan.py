"""What a finetuning will do: networks, head, schedule and splits, and the request that the run's ID hashes."""

from __future__ import annotations

import os
import shlex
import uuid
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from math import lcm
from typing import Any

import torch
from torch import nn

from embcache.backbones.catalog import Backbone, find_backbone, load_backbone
from embcache.backbones.transforms import Augmentation, Transform, augmentation, choose_transform, frame
from embcache.config import FinetuneConfig
from embcache.data.budget import Decoding, check_max_pixels
from embcache.data.classes import class_flags, target_flags, task_of
from embcache.data.dataset import ImageDataset, with_loss
from embcache.errors import UsageError, check_number
from embcache.extract.recipes import make_recipe
from embcache.extract.scan import DatasetFiles, scan_dataset
from embcache.extract.worker import FrozenNetwork, pick_device
from embcache.fields import bare_name, parse_weights
from embcache.finetune.model import check_head, has_batch_norm
from embcache.mirror import shown_home
from embcache.paths import PathLike
from embcache.probe.heads import check_fits, find_head, identify, name_of
from embcache.probe.inputs import KnownImages, digest_images, find_splits, plan_for
from embcache.probe.metrics import Metric, asymmetry, check_order, find_metric, positive_class
from embcache.probe.protocol import Splits, name_everything, subset_sizes
from embcache.probe.schedule import GENTLE, Schedule, gentle
from embcache.probe.stack import TrainedHead
from embcache.probe.summary import RunCell, request_notes
from embcache.runs.folders import PROTOCOL_VERSION
from embcache.store.schema import Recipe

ARITHMETIC = 1  # raised when the arithmetic of finetuning changes, so that older runs are not taken for new ones


@dataclass(frozen=True, eq=False)
class Networks:
    """Backbones with their weights and a head that can be trained on them, for one dataset."""

    dataset: ImageDataset
    config: FinetuneConfig
    given: tuple[str, ...]  # the backbones as they were typed
    specs: tuple[Backbone, ...]
    head: TrainedHead
    metric: Metric  # scores, and chooses epochs on validation
    schedule: Schedule
    files: DatasetFiles
    transforms: Mapping[str, Transform]  # by backbone; one geometry
    augment: Augmentation
    modules: Mapping[str, nn.Module]  # by backbone, with their weights
    recipes: Mapping[str, Recipe]  # of the features that training starts from
    device: torch.device

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the backbones."""
        return tuple(spec.name for spec in self.specs)

    @property
    def transform(self) -> Transform:
        """A transform with the geometry of all backbones."""
        return self.transforms[self.specs[0].name]

    def notes(self) -> list[str]:
        """What a reader must know of this training in addition to what is true of probing."""
        notes = [note for spec in self.specs for note in spec.contamination(self.dataset.layout)]
        if self.config.precision != "fp32":
            notes.append(f"{' + '.join(self.names)}: finetuned in {self.config.precision}")
        return notes


@dataclass(frozen=True, eq=False)
class FinetunePlan:
    """One run, nothing of it trained yet."""

    networks: Networks
    cell: RunCell

    @property
    def splits(self) -> Splits:
        """The splits of the run."""
        return self.cell.splits[0]

    def resume_command(self, home: PathLike | None) -> str:
        """The command that continues this run where it is interrupted."""
        dataset, config = self.networks.dataset, self.networks.config
        words = ["embcache", "finetune", "--backbone", ",".join(self.networks.given), "--dataset", dataset.layout]
        words += ["--data-root", str(dataset.origin)] if dataset.origin is not None else []
        words += ["--name", dataset.name] if dataset.name != dataset.layout else []
        words += ["--allow-missing"] if dataset.missing else []
        words += [*dataset.read_options(), *target_flags(dataset), *class_flags(dataset.renamed)]
        words += ["--subset", self.cell.subset, *replace(config, resume=True, again=False).words()]
        return shlex.join([*words, *(["--home", shown_home(home)] if home is not None else [])])


def load_networks(
    dataset: ImageDataset,
    backbones: Sequence[str],
    config: FinetuneConfig,
    home: PathLike | None,
    pool: Executor,
    *,
    allow_download: bool = True,
) -> Networks:
    """Check a request before anything is decoded, and load its networks."""
    weights = parse_weights(config.weights, backbones)
    specs = tuple(find_backbone(name, folder=weights.get(bare_name(name)), home=home) for name in backbones)
    head = check_head(find_head(config.head), [spec.name for spec in specs])
    if fixed := [spec.name for spec in specs if spec.fixed]:
        raise UsageError(
            f"{fixed[0]} cannot be finetuned", code="not-trainable", found="a network that is executed as it is",
            expected="a network of torch", fix="embcache probe, or finetune the model that the file was made from",
        )  # fmt: skip
    device = _pick_device(config)
    schedule = choose_schedule(specs, config)
    decoding = Decoding(check_max_pixels(config.max_pixels))
    files = scan_dataset(dataset, home, pool, decoding)
    transforms = choose_transforms(specs, config.transform, files.sizes, config.decode)
    geometry = transforms[specs[0].name]  # the same for all
    modules, recipes = {}, {}
    for name, spec in zip(backbones, specs, strict=True):
        what, file = spec if spec.module is not None or spec.library else name, weights.get(bare_name(name))
        loaded = load_backbone(what, weights=file, home=home, image_size=geometry.size, allow_download=allow_download)
        modules[spec.name] = loaded.module
        recipes[spec.name] = make_recipe(FrozenNetwork(loaded, transforms[spec.name], device, config.precision))
    if -(-schedule.batch_size // config.accumulate) < 2 and any(map(has_batch_norm, modules.values())):
        raise UsageError(
            "batch normalization cannot train on one image at a time", code="batch-of-one",
            expected="at least two images in each part of a batch",
            found=f"a batch of {schedule.batch_size} in {config.accumulate} parts",
            fix=f"--batch-size {2 * config.accumulate}, or a smaller --accumulate",
        )  # fmt: skip
    dataset = with_loss(dataset, config.loss)
    metric = find_metric(config.metric or dataset.metric, dataset.task)
    check_order(metric, dataset.task)
    check_fits(head, dataset.task)
    return Networks(
        dataset=dataset, config=config, given=tuple(backbones), specs=specs, head=head,
        metric=metric.of(positive_class(dataset.class_names, config.positive)), schedule=schedule, files=files,
        transforms=transforms, augment=augmentation(dataset.augment, frame(geometry).size, geometry.size),
        modules=modules, recipes=recipes, device=device,
    )  # fmt: skip


def plan_finetuning(networks: Networks, images: KnownImages, subset: str | int, home: PathLike | None) -> FinetunePlan:
    """Splits as probing draws them, and the request: how pixels are kept or threads share work is not in it."""
    dataset, config, metric = networks.dataset, networks.config, networks.metric
    splits = None if config.splits is None else str(find_splits(config.splits, dataset, home))
    (drawn,) = name_everything([plan_for(dataset, [images], subsets=[subset], config=replace(config, splits=splits))])
    (canonical,) = subset_sizes(dataset, [subset])  # a number above the pool is an error, S or M above it is F
    name = drawn.name_of(canonical)
    request = {
        "kind": "finetune", "protocol": PROTOCOL_VERSION, "finetune": ARITHMETIC, "dataset": dataset.name,
        "metric": metric.key, "splits": drawn.digest(name),
        "images": digest_images({"pixels": images}, drawn.ids[drawn.used(name)]),
        "recipes": [[backbone, recipe.fingerprint] for backbone, recipe in networks.recipes.items()],
        "augment": networks.augment.describe(),
        "head": identify(networks.head, config.head) or {"name": name_of(networks.head), "once": uuid.uuid4().hex},
        "schedule": networks.schedule.changed(), "subset": name, "folds": drawn.n_folds, "val": drawn.val_mode,
        "test": drawn.test_set, "seed": config.seed,
        **asymmetry(metric, dataset.class_names, config.positive),
        **({"task": task} if (task := task_of(dataset)) else {}),
        **({"target": dataset.target} if dataset.target else {}),
        **({"classes": dict(dataset.renamed)} if dataset.renamed else {}),
    }  # fmt: skip
    # Options that are settled above (splits of a file have their own number of folds) are not repeated.
    settled = replace(config, loss=None)  # that of the target, which is in the request
    more = {key: value for key, value in settled.result_options().items() if key not in request}
    cell = RunCell(
        dataset=dataset, splits=(drawn,), subset=name, backbones=networks.names, head=networks.head,
        request=request | more, recipes={name: recipe.to_json() for name, recipe in networks.recipes.items()},
        positive=config.positive, notes=tuple(request_notes(dataset, [drawn], name, networks.head)),
    )  # fmt: skip
    return FinetunePlan(networks, cell)


def choose_transforms(
    specs: Sequence[Backbone], name: str | None, sizes: Collection[tuple[int, int]], decode: str = "full"
) -> dict[str, Transform]:
    """One transform per backbone, all of the same geometry: every backbone sees the same augmented pixels."""
    # Images stay as they are only where the patches of all backbones divide them.
    patch = lcm(*(spec.patch for spec in specs))
    chosen = {spec.name: choose_transform(replace(spec, patch=patch), name, sizes, decode) for spec in specs}
    if len({(t.resize, t.crop, t.size, t.interpolation) for t in chosen.values()}) > 1:
        raise UsageError(
            "backbones that are trained together must see the same pixels", code="different-transforms",
            expected="one size and one way of resizing",
            found="; ".join(f"{n}: {t.kind}, {t.interpolation}, {t.size[1]}×{t.size[0]}" for n, t in chosen.items()),
            fix="--transform paper",
        )  # fmt: skip
    return chosen


def choose_schedule(specs: Sequence[Backbone], config: FinetuneConfig) -> Schedule:
    """The protocol's optimization, gentler where DINO is among the backbones, with the options given."""
    given: dict[str, Any] = dict(GENTLE) if gentle([spec.model or spec.name for spec in specs]) else {}
    own = {"lr": config.lr, "batch_size": config.batch_size}
    given |= {key: value for key, value in own.items() if value is not None}
    schedule = Schedule(**given, max_epochs=config.max_epochs)
    check_number("--accumulate", config.accumulate, 1, schedule.batch_size)
    return schedule


def _pick_device(config: FinetuneConfig) -> torch.device:
    device = pick_device(config.device)
    if device.type == "cuda":
        # cuBLAS repeats its sums only with a workspace of its own, which must be set before it is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    elif config.precision in ("tf32", "fp16"):
        raise UsageError(
            f"training in {config.precision} needs a CUDA device", code="precision-needs-cuda", found=str(device),
            fix="--precision bf16, or --precision fp32",
        )  # fmt: skip
    return device
