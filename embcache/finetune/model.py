"""Backbones and a head as one trainable model: uint8 images in, logits out."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from embcache.backbones.catalog import Backbone, library_of
from embcache.backbones.networks import build_network
from embcache.backbones.transforms import Transform, normalize
from embcache.errors import RecipeError, StoreError, UsageError, WeightsError
from embcache.extract.recipes import recipe_backbone
from embcache.extract.worker import arithmetic, pick_device
from embcache.paths import PathLike
from embcache.probe.heads import check_backbones, find_head, heads, make_head
from embcache.probe.layers import Tensors
from embcache.probe.stack import Head, TrainedHead
from embcache.runs.folders import Result, find_run_anywhere, run_file
from embcache.store.schema import Recipe
from embcache.targets import Target
from embcache.targets.target import CONSTANTS, finish

State = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class ImageModel:
    """Backbones and the head on their features, trained together."""

    backbones: Mapping[str, nn.Module]  # networks: normalized images, float32 (B, 3, H, W), to features (B, D)
    transforms: Mapping[str, Transform]  # one per backbone
    head: TrainedHead  # a head of `embcache.probe.heads`, as probing trains it
    params: State  # the head's parameters, named and initialized as in probing
    device: torch.device  # where all of them lie
    precision: str  # arithmetic of the backbones; the head and the loss are always computed in fp32

    def logits(self, pixels: Tensor, masks: Tensors | None = None) -> Tensor:
        """What the head puts out, float32 (B, width), for a uint8 batch (B, H, W, 3): logits, once they are `finished`.

        ``masks`` (B, width of each) are the head's dropout.
        """
        seen: dict[tuple[object, ...], Tensor] = {}
        features: State = {}
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            for name, module in self.backbones.items():
                transform = self.transforms[name]
                key = (transform.mean, transform.std)
                if key not in seen:
                    batch = normalize(pixels, transform, self.device)
                    seen[key] = batch.contiguous(memory_format=torch.channels_last)
                features[name] = module(seen[key])
        # The heads are written for a stack of K of them; here K is 1.
        output = self.head.apply(
            {name: value[None] for name, value in self.params.items()},
            {name: value.float()[None] for name, value in features.items()},
            None if masks is None else {name: value[None] for name, value in masks.items()},
        )
        return output[0]

    def finished(self, out: Tensor) -> Tensor:
        """Logits (B, C) from what the head put out."""
        return finish({name: value[None] for name, value in self.params.items()}, out[None])[0]

    def train(self, mode: bool = True) -> None:
        """Let batch normalization and dropout behave as in training, or not."""
        for module in self.backbones.values():
            module.train(mode)

    def trainable(self) -> State:
        """Every trained tensor by its name, in a fixed order; all parameters of backbones and head."""
        modules = self.backbones.items()
        named = {f"backbone.{name}.{k}": value for name, module in modules for k, value in module.named_parameters()}
        return named | {f"head.{key}": value for key, value in self.params.items() if value.requires_grad}

    def state(self) -> State:
        """All that a prediction depends on, by name: `trainable` and the buffers (running means …). Not copies."""
        modules = self.backbones.items()
        named = {f"backbone.{n}.{k}": v.detach() for n, module in modules for k, v in module.state_dict().items()}
        return named | {f"head.{key}": value.detach() for key, value in self.params.items()}

    def load(self, state: Tensors, *, where: object = None, fix: str | None = None) -> None:
        """Copy a state into the model, in place."""
        mine = self.state()
        wrong = sorted(set(mine) ^ set(state)) or [n for n, value in mine.items() if state[n].shape != value.shape]
        if wrong:
            raise WeightsError(
                "the saved model does not fit the network", code="weights-do-not-fit",
                expected=f"{len(mine)} tensors, named and shaped alike",
                found=f"{len(state)} tensors; {len(wrong)} differ: {', '.join(wrong[:5])}", where=where, fix=fix,
            )  # fmt: skip
        with torch.no_grad():
            for name, value in mine.items():
                value.copy_(state[name])


def assemble(
    backbones: Mapping[str, nn.Module],
    transforms: Mapping[str, Transform],
    head: TrainedHead,
    params: Tensors,
    device: torch.device,
    precision: str,
) -> ImageModel:
    """Put networks and a head's parameters on their device as one model, every parameter trainable."""
    placed = {}
    for name, module in backbones.items():
        # Channels last is faster for convolutions on CPUs and what tensor cores want, as in extraction.
        module.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        placed[name] = module.requires_grad_(True)
    leaves = {
        name: value.detach().clone().to(device).requires_grad_(name not in CONSTANTS) for name, value in params.items()
    }
    return ImageModel(placed, transforms, head, leaves, device, precision)


def empty_backbone(spec: Backbone, image_size: tuple[int, int]) -> nn.Module:
    """A backbone's network for images of this height and width, its weights still to be filled."""
    if spec.module is not None:
        return copy.deepcopy(spec.module)
    return library_of(spec).build(spec, image_size) if spec.library else build_network(spec.network)


@dataclass(frozen=True, eq=False)
class FinetunedModel:
    """The model of one fold of a finetuned run, ready to predict."""

    model: ImageModel
    transform: Transform  # what images must have passed through; ``predict`` normalizes them itself
    task: Target

    @property
    def class_names(self) -> tuple[str, ...]:
        """Its classes, findings or number."""
        return self.task.names

    def predict(self, pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Probabilities, or numbers, float64 (B, C), of a uint8 batch (B, *transform.size, 3)."""
        return self.task.predicted(self.logits(pixels))

    def logits(self, pixels: NDArray[np.uint8]) -> NDArray[Any]:
        """Logits, float32 (of numbers float64) of shape (B, C), of a uint8 batch (B, *transform.size, 3)."""
        precision = "tf32" if self.model.precision == "tf32" else "fp32"
        with torch.no_grad(), arithmetic(self.model.device, precision):
            out = self.model.finished(self.model.logits(torch.from_numpy(pixels)))
            return np.asarray(out.cpu().numpy())


def load_finetuned(
    run: str,
    fold: int = 0,
    *,
    device: str = "cpu",
    home: PathLike | None = None,
    trust: Sequence[str] = (),
    weights: Mapping[str, PathLike] | None = None,
) -> FinetunedModel:
    """The saved model of a fold of a finetuned run; neither images nor the weights that training began with are read.

    Parameters
    ----------
    run : str
        ID of the run, or a unique prefix.
    fold : int
        From 0.
    device : str
        ``auto``, ``cpu`` or ``cuda:0``.
    home : path, optional
        Folder of stores and runs. Default: ``$EMBCACHE_HOME`` or ``~/.cache/embcache``.
    trust : sequence of str
        Each ``module:name`` of the run, a head or a backbone, that may be imported.
    weights : mapping of str to path, optional
        Folders of models by the names of backbones, such as ``hf:net``: only their configurations are read.

    Returns
    -------
    FinetunedModel
        Its ``predict`` takes uint8 images (B, H, W, 3) to float64 probabilities (B, C).

    Raises
    ------
    UsageError
        The result is not of a finetuning, has no such fold, or the device is not there.
    StoreError, WeightsError
        There is no such run; the fold has no model, or its file is damaged; it does not fit the network.
    """
    result, folder = find_run_anywhere(run, home)
    return load_fold(folder, result, fold, device, trust, weights, home)


def load_fold(
    run: Path, result: Result, fold: int, device: str = "cpu", trust: Sequence[str] = (),
    weights: Mapping[str, PathLike] | None = None, home: PathLike | None = None,
) -> FinetunedModel:  # fmt: skip
    """The same, where the result and its folder are known."""
    if result.kind != "finetune" or not 0 <= fold < len(result.folds):
        raise UsageError(
            "there is no such finetuned model", code="unknown-model",
            expected=f"a finetuned run, a fold of 0 … {len(result.folds) - 1}",
            found=f"kind {result.kind!r}, fold {fold}", where=run, fix="embcache results",
        )  # fmt: skip
    if result.folds[fold].failed:
        raise StoreError(
            f"training of fold {fold} diverged in its first epoch: it has no model", code="model-diverged", where=run
        )
    if not (run / model_file(fold)).is_file():
        raise StoreError(
            "the models of this run were not kept", code="models-not-kept", where=run,
            fix="repeat its `embcache finetune …` with --again and without --no-models",
        )  # fmt: skip
    tensors = load_file(run_file(run, model_file(fold)))
    recipes = {name: Recipe.from_json(result.recipes[name]) for name in result.backbones}
    chosen = {name: Transform.from_dict(recipe.transform) for name, recipe in recipes.items()}
    transform = next(iter(chosen.values()))
    networks = {}
    for name, recipe in recipes.items():
        trusted = (recipe.model or name) in trust
        spec = recipe_backbone(recipe, (weights or {}).get(name), trusted, home)
        if spec.network != recipe.architecture:
            raise RecipeError(
                f"{name} is not the network that was finetuned", code="recipe-differs",
                expected=recipe.architecture, found=spec.network, where=spec.origin,
                fix=f"--weights {name}=FOLDER with the model that training began with",
            )  # fmt: skip
        networks[name] = empty_backbone(spec, transform.size)
    options = dict(result.request["head"])
    name = options.pop("name")
    head = check_head(find_head(name, options) if name in trust else make_head(name, **options), result.backbones)
    params = {name.removeprefix("head."): value for name, value in tensors.items() if name.startswith("head.")}
    precision = recipes[result.backbones[0]].precision
    model = assemble(networks, chosen, head, params, pick_device(device), precision)
    fix = "pip install the versions that `embcache results --json` says"
    model.load(tensors, where=run / model_file(fold), fix=fix)
    model.train(False)
    return FinetunedModel(model, transform, result.task)


def model_file(fold: int) -> str:
    """Name of the model of a fold in the folder of its run."""
    return f"model-fold{fold}.safetensors"


def has_batch_norm(network: nn.Module) -> bool:
    """Whether any layer takes statistics over the images of a batch."""
    layers = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return any(isinstance(layer, layers) for layer in network.modules())


def check_head(head: Head, backbones: Sequence[str]) -> TrainedHead:
    """The head, where it can be trained together with its backbones."""
    if not isinstance(head, TrainedHead) or head.standardized:
        raise UsageError(
            f"head {head.name!r} needs features that stay fixed: it cannot be trained together with its backbones",
            code="head-needs-features", found=head.name, fix="embcache finetune --head linear …",
            expected=", ".join(
                name for name, h in heads.each(find_head) if isinstance(h, TrainedHead) and not h.standardized
            ),
        )  # fmt: skip
    check_backbones(head, backbones)
    return head
