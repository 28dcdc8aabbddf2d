"""What may be asked of a finetuning, and the request that names its run."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn

from embcache.backbones.catalog import Backbone, find_backbone, load_backbone
from embcache.backbones.transforms import Transform, frame
from embcache.config import MOST_SEED
from embcache.data.classes import class_flags
from embcache.data.dataset import ImageDataset
from embcache.errors import UsageError, check_choice, check_number
from embcache.extract.augment import Augmentation, augmentation
from embcache.extract.extract import make_recipe
from embcache.extract.extract_request import weights_by_name
from embcache.extract.scan import DatasetFiles, scan_dataset
from embcache.extract.worker import PRECISIONS, FrozenNetwork, pick_device
from embcache.finetune.batches import Images, choose_transforms
from embcache.finetune.model import check_head, has_batch_norm
from embcache.paths import PathLike
from embcache.probe.heads import identify, make_head
from embcache.probe.inputs import digest_images, plan_for
from embcache.probe.metrics import Metric, asymmetry, find_metric, positive_class
from embcache.probe.protocol import subset_sizes
from embcache.probe.schedule import Schedule
from embcache.probe.splits import Splits, name_everything
from embcache.probe.stack import TrainedHead
from embcache.runs.folders import PROTOCOL_VERSION

ARITHMETIC = 1
"""Raised when the arithmetic of finetuning changes, so that older runs are not taken for new ones."""

GENTLE = {"lr": 1e-4, "batch_size": 16}
"""How DINO's ViT-S/8 is finetuned (Section B.2), also where it is fused (choice)."""

_VIT_S8_DINO = re.compile(r"vit_small_patch8_224[._](.+_)?dino(_.+)?")
"""timm's names of DINO-trained ViT-S/8: ``vit_small_patch8_224.dino``, ``vit_small_patch8_224.lunit_dino`` …"""

_DINO = ("dino", "timm:vit_small_patch8_224")
"""The paper's, and timm's under no tag, which means the weights of its default: DINO's."""


@dataclass(frozen=True)
class Settings:
    """What was asked, as given; see `embcache.finetune.finetune.finetune_images`."""

    head: str = "linear"
    subset: str | int = "S"
    folds: int = 5
    seed: int = 0
    val: str = "full"
    test: str = "local"
    splits: PathLike | None = None
    exclude_test_overlap: bool = False
    weights: PathLike | Mapping[str, PathLike] | None = None
    transform: str | None = None
    device: str = "auto"
    precision: str = "fp32"
    lr: float | None = None
    batch_size: int | None = None
    accumulate: int = 1
    max_epochs: int = 50
    metric: str | None = None
    positive: str | None = None


@dataclass(frozen=True, eq=False)
class Asked:
    """A question with its networks loaded."""

    settings: Settings
    subset: str  # its canonical name
    specs: tuple[Backbone, ...]
    head: TrainedHead
    head_name: str
    head_request: Mapping[str, Any]  # name and hyperparameters of the head
    schedule: Schedule
    files: DatasetFiles
    transforms: Mapping[str, Transform]  # by backbone; one geometry
    augment: Augmentation
    networks: Mapping[str, nn.Module]  # by backbone, with their weights
    recipes: Mapping[str, Any]  # whole recipes of the features that training starts from
    fingerprints: Mapping[str, str]
    device: torch.device

    def metric(self, ds: ImageDataset) -> Metric:
        """What scores, and chooses epochs on validation."""
        metric = find_metric(self.settings.metric or ds.metric, len(ds.class_names))
        return metric.of(positive_class(ds.class_names, self.settings.positive))

    @property
    def names(self) -> tuple[str, ...]:
        """The backbones."""
        return tuple(spec.name for spec in self.specs)

    @property
    def dims(self) -> dict[str, int]:
        """Length of each backbone's features."""
        return {spec.name: spec.dim for spec in self.specs}

    @property
    def transform(self) -> Transform:
        """The geometry of all backbones."""
        return next(iter(self.transforms.values()))

    def plan(self, ds: ImageDataset, images: Images) -> Splits:
        """Splits of the dataset, as `embcache.probe.inputs.plan_for` draws them for probing; of one subset."""
        s = self.settings
        drawn = plan_for(
            ds,
            [images],
            subsets=[s.subset],
            folds=s.folds,
            seed=s.seed,
            val=s.val,
            test=s.test,
            splits=s.splits,
            exclude_test_overlap=s.exclude_test_overlap,
        )
        (plan,) = name_everything([drawn])
        return plan

    def request(self, ds: ImageDataset, plan: Splits, images: Images) -> dict[str, Any]:
        """Everything that the result depends on, as JSON data; how pixels are kept or workers share is not in it."""
        return {
            "kind": "finetune",
            "protocol": PROTOCOL_VERSION,
            "finetune": ARITHMETIC,
            "dataset": ds.name,
            "metric": self.metric(ds).key,
            "splits": plan.digest(self.subset),
            "images": digest_images({"pixels": images}, plan.ids[plan.used(self.subset)]),
            "recipes": [[name, self.fingerprints[name]] for name in self.names],
            "augment": self.augment.describe(),
            "head": dict(self.head_request),
            "schedule": asdict(self.schedule),
            "subset": self.subset,
            "folds": plan.n_folds,
            "val": plan.val_mode,
            "test": plan.test_set,
            "seed": self.settings.seed,
            # Batch normalisation takes its statistics over what goes through the network at once.
            **({"accumulate": self.settings.accumulate} if self.settings.accumulate > 1 else {}),
            **({"exclude_test_overlap": True} if self.settings.exclude_test_overlap else {}),
            **asymmetry(self.metric(ds), ds.class_names, self.settings.positive),
            **({"classes": dict(ds.renamed)} if ds.renamed else {}),
        }

    def notes(self, ds: ImageDataset) -> list[str]:
        """What a reader must know of this training besides what is true of probing."""
        told = [
            f"{spec.name} was pretrained on images of {ds.kind}: its scores there are contaminated"
            for spec in self.specs
            if ds.kind in spec.contaminated
        ]
        if self.settings.precision != "fp32":
            told.append(f"{' + '.join(self.names)}: finetuned in {self.settings.precision}")
        return told


def ask(
    ds: ImageDataset,
    backbones: str | Sequence[str],
    settings: Settings,
    home: PathLike | None,
    pool: Executor,
    *,
    allow_download: bool = True,
) -> Asked:
    """Check a question and load its networks."""
    given = [backbones] if isinstance(backbones, str) else list(backbones)
    head = make_head(settings.head)
    specs = tuple(find_backbone(name) for name in given)
    trainable = check_head(head, [spec.name for spec in specs])
    (subset,) = subset_sizes(ds, [settings.subset])
    device = _check_arithmetic(settings)
    schedule = choose_schedule(specs, settings)
    overrides = weights_by_name(given, settings.weights)
    files = scan_dataset(ds, home, pool)
    transforms = choose_transforms(specs, settings.transform, files.sizes)
    geometry = next(iter(transforms.values()))  # the same for all
    networks, recipes, fingerprints = {}, {}, {}
    for name, spec in zip(given, specs, strict=True):
        loaded = load_backbone(
            name, weights=overrides.get(name), home=home, image_size=geometry.size, allow_download=allow_download
        )
        recipe = make_recipe(FrozenNetwork(loaded, transforms[spec.name], device, settings.precision))
        networks[spec.name], recipes[spec.name] = loaded.module, recipe.to_json()
        fingerprints[spec.name] = recipe.fingerprint
    if -(-schedule.batch_size // settings.accumulate) < 2 and any(has_batch_norm(m) for m in networks.values()):
        raise UsageError(
            "batch normalisation cannot train on one image at a time",
            expected="two images at least in each part of a batch",
            found=f"a batch of {schedule.batch_size} in {settings.accumulate} parts",
            fix=f"--batch-size {2 * settings.accumulate}, or a smaller --accumulate",
        )
    augment = augmentation(ds.augment, frame(geometry).size, geometry.size)
    request = identify(head) or {"name": head.name}
    return Asked(
        settings, subset, specs, trainable, head.name, request, schedule, files, transforms, augment, networks,
        recipes, fingerprints, device,
    )  # fmt: skip


def resume_command(ds: ImageDataset, backbones: Sequence[str], settings: Settings, home: PathLike | None = None) -> str:
    """The command that goes on with an interrupted run."""
    words = ["embcache", "finetune", "--backbone", ",".join(backbones), "--dataset", ds.kind]
    words += ["--data-root", str(ds.origin)] if ds.origin is not None else []
    words += ["--name", ds.name] if ds.name != ds.kind else []
    words += ["--allow-missing"] if ds.missing else []
    words += [*ds.columns.words(), *class_flags(ds.renamed)]
    for option in fields(Settings):
        value, flag = getattr(settings, option.name), "--" + option.name.replace("_", "-")
        if option.name not in ("head", "subset") and value == option.default:
            continue
        if value is True:
            words.append(flag)
        elif isinstance(value, Mapping):
            for name, file in value.items():
                words += [flag, f"{name}={file}"]
        else:
            words += [flag, str(value)]
    words += ["--home", str(home)] if home is not None else []
    return shlex.join([*words, "--resume"])


def gentle(backbones: Sequence[str]) -> bool:
    """Whether backbones are finetuned with `GENTLE` unless told otherwise.

    Names alone decide: nothing is looked up or fetched.
    """
    return any(name in _DINO or _VIT_S8_DINO.fullmatch(_timm_name(name)) is not None for name in backbones)


def _timm_name(name: str) -> str:
    """Architecture and tag of a ``timm:`` backbone, without the organisation that published it; else empty."""
    return name.rpartition("/")[2].removeprefix("timm:") if name.startswith("timm:") else ""


def choose_schedule(specs: Sequence[Backbone], settings: Settings) -> Schedule:
    """The protocol's optimisation, gentler where DINO is among the backbones, with what was asked instead."""
    check_number("--seed", settings.seed, 0, MOST_SEED)
    default = GENTLE if gentle([spec.name for spec in specs]) else {}
    given = {
        key: value for key, value in (("lr", settings.lr), ("batch_size", settings.batch_size)) if value is not None
    }
    schedule = Schedule(**{**default, **given, "max_epochs": settings.max_epochs})  # type: ignore[arg-type]
    check_number("--accumulate", settings.accumulate, 1, schedule.batch_size)
    return schedule


def _check_arithmetic(settings: Settings) -> torch.device:
    device = pick_device(settings.device)
    if device.type == "cuda":
        # cuBLAS repeats its sums only with a workspace of its own, asked for before it is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    check_choice("--precision", settings.precision, PRECISIONS)
    if settings.precision in ("tf32", "fp16") and device.type != "cuda":
        raise UsageError(
            f"training in {settings.precision} needs a CUDA device", found=str(device),
            fix="--precision bf16, or --precision fp32",
        )  # fmt: skip
    return device
