"""The model of a saved run, rebuilt from what the run kept and refused where it would not be the same."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from embcache.config import PredictConfig
from embcache.data.budget import Decoding
from embcache.data.images import DECODER_VERSION, ImageRef
from embcache.errors import RecipeError, StoreNotFoundError, UsageError
from embcache.extract.extract import BATCH_SIZES, make_recipe, recipe_network
from embcache.extract.worker import FrozenNetwork, compute_shard, pick_device, prepare_batches, stack_batch
from embcache.finetune.model import FinetunedModel, load_finetuned
from embcache.paths import PathLike
from embcache.probe.heads import make_head
from embcache.probe.stack import Head, predict_logits
from embcache.results.curves import refuse_untrusted
from embcache.runs.folders import Result, load_heads
from embcache.store.feature_store import list_stores
from embcache.store.schema import Recipe


class RunModel(ABC):
    """What predicts images by a run's own recipe."""

    @abstractmethod
    def logits(
        self, root: Path, sources: Sequence[ImageRef], pool: Executor, decoding: Decoding
    ) -> tuple[NDArray[np.floating], list[str]]:
        """Logits (folds, n, C) of images, and why a row cannot be used."""


@dataclass(frozen=True, eq=False)
class _ProbeModel(RunModel):
    """Frozen networks and the heads of some folds."""

    networks: Mapping[str, FrozenNetwork]
    head: Head
    params: Sequence[dict[str, torch.Tensor]]

    def logits(
        self, root: Path, sources: Sequence[ImageRef], pool: Executor, decoding: Decoding
    ) -> tuple[NDArray[np.floating], list[str]]:
        networks = list(self.networks.values())
        size = BATCH_SIZES.get(networks[0].device.type, 64)
        shards = compute_shard(root, sources, networks, batch_size=size, pool=pool, decoding=decoding)
        features = [torch.from_numpy(rows.features.astype(np.float32, copy=False)) for rows in shards]
        x, everyone = dict(zip(self.networks, features, strict=True)), torch.arange(len(sources))
        logits = np.stack([predict_logits(self.head, head, x, everyone) for head in self.params])
        return logits, [next(filter(None, why), "") for why in zip(*(rows.reasons for rows in shards), strict=True)]


@dataclass(frozen=True, eq=False)
class _WholeModel(RunModel):
    """The finetuned networks of some folds; they share one transform."""

    models: Sequence[FinetunedModel]
    batch_size: int

    def logits(
        self, root: Path, sources: Sequence[ImageRef], pool: Executor, decoding: Decoding
    ) -> tuple[NDArray[np.floating], list[str]]:
        transform = self.models[0].transform
        parts, reasons = [], list[str]()
        for batch in prepare_batches(root, sources, [transform.geometry], self.batch_size, pool, decoding):
            pixels = stack_batch(batch, 0, torch.empty((len(batch), *transform.size, 3), dtype=torch.uint8)).numpy()
            parts.append(np.stack([model.logits(pixels) for model in self.models]))
            reasons += [
                prepared.reason or ("" if np.isfinite(row).all() else "the outputs are not finite")
                for prepared, row in zip(batch, parts[-1].swapaxes(0, 1), strict=True)
            ]
        return np.concatenate(parts, axis=1), reasons


def load_model(
    result: Result, folder: Path, folds: Sequence[int], config: PredictConfig, home: PathLike | None
) -> RunModel:
    """The model of some folds of a run, ready to predict."""
    if result.kind not in ("probe", "finetune"):
        raise UsageError(
            f"a result of kind {result.kind!r} has no model to predict with", code="no-model", found=result.id,
            fix=f"--run {result.request.get('run', 'RUN')}",
        )  # fmt: skip
    options = dict(result.request["head"])
    head = str(options.pop("name"))
    refuse_untrusted(result, config.trust)
    recipes = run_recipes(result, home)
    if result.kind == "finetune":
        if config.weights:
            raise UsageError("a finetuned run has its own weights", code="unused-option",
                             found=f"--weights {config.weights[0]}", fix="leave --weights out")  # fmt: skip
        for recipe in recipes.values():  # the model was saved whole, so that only the decoder can differ
            _refuse_differences(result, recipe, replace(recipe, decoder=DECODER_VERSION), folder)
        device = pick_device(config.device)
        models = [load_finetuned(folder, result, fold, str(device)) for fold in folds]
        return _WholeModel(models, BATCH_SIZES.get(device.type, 64))
    weights = _weights_by_name(list(recipes), config.weights)
    networks = {
        backbone: _rebuild(result, recipe, weights.get(backbone), home, config.device)
        for backbone, recipe in recipes.items()
    }
    heads = load_heads(folder)
    return _ProbeModel(networks, make_head(head, **options), [heads[fold] for fold in folds])


def _weights_by_name(names: Sequence[str], values: Sequence[str]) -> dict[str, Path]:
    """Checkpoints by backbone, from ``[NAME=]FILE``; only a known name before the first ``=`` is one."""
    weights = {}
    for value in values:
        name, equals, file = value.partition("=")
        if not equals or name not in names:
            if len(names) > 1 or (equals and not Path(value).exists()):
                raise UsageError(
                    "--weights does not name its backbone", code="weights-backbone",
                    expected="NAME=FILE with NAME one of " + ", ".join(names), found=value,
                    fix=f"--weights {names[0]}={file or value}",
                )  # fmt: skip
            name, file = names[0], value
        weights[name] = Path(file)
    return weights


def run_recipes(result: Result, home: PathLike | None = None) -> dict[str, Recipe]:
    """The recipe of each backbone of a run: as the run kept it, else (older runs) from the store it was probed on."""
    if result.recipes:
        return {backbone: Recipe.from_json(result.recipes[backbone]) for backbone in result.backbones}
    wanted = {str(backbone): str(fingerprint) for backbone, fingerprint in result.request.get("recipes", ())}
    cached = {store.recipe.fingerprint: store.recipe for store in list_stores(home, result.dataset)}
    gone = [f"{b} ({wanted.get(b, 'unknown')[:12]})" for b in result.backbones if wanted.get(b) not in cached]
    if gone:
        raise StoreNotFoundError(
            "the run was made by a version that kept no recipes, and its feature store is gone", code="store-not-found",
            expected=f"a store of {result.dataset} with the fingerprint of {', '.join(gone)}",
            found=", ".join(fingerprint[:12] for fingerprint in cached) or "no stores of that dataset",
            fix=f"embcache probe --dataset {result.dataset} --backbone {','.join(result.backbones)} "
            f"--head {result.head} --subset {result.subset} --again, and predict with that run",
        )  # fmt: skip
    return {backbone: cached[wanted[backbone]] for backbone in result.backbones}


def _rebuild(result: Result, recipe: Recipe, weights: Path | None, home: PathLike | None, device: str) -> FrozenNetwork:
    """The network of a recipe, ready to embed; `RecipeError` where it would not embed as the recipe says."""
    network = recipe_network(recipe, home=home, weights=weights, device=device)
    made = make_recipe(network)
    # Parameters that only cached views have (how many, how augmented) do not concern the plain view predicted from.
    made = replace(made, transform={**recipe.transform, **made.transform})
    _refuse_differences(result, recipe, made, network.backbone.weights_source)
    return network


def _refuse_differences(result: Result, recipe: Recipe, made: Recipe, where: object) -> None:
    differences = recipe.differences(made)
    if differences:
        raise RecipeError(
            f"{recipe.backbone} is not what run {result.id} was made with", code="recipe-differs",
            expected="\n".join(f"{name}: {then}" for name, (then, _) in differences.items()),
            found="\n".join(f"{name}: {now}" for name, (_, now) in differences.items()),
            where=where,
            fix=f"--weights {recipe.backbone}=FILE with the file of that sha256"
            if "weights_sha256" in differences
            else "use the version of embcache that made the run, or make it again with this one",
        )  # fmt: skip
