"""The model of a saved run, rebuilt from what the run kept and refused where it would not be the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from embcache.backbones.weights import weights_by_name
from embcache.data.budget import Decoding
from embcache.data.images import DECODER_VERSION, ImageRef
from embcache.errors import RecipeError, StoreNotFoundError, UsageError
from embcache.extract.batching import prepare_batches, stack_batch
from embcache.extract.extract import BATCH_SIZES, make_recipe, recipe_network
from embcache.extract.worker import FrozenNetwork, compute_shard, pick_device
from embcache.finetune.model import FinetunedModel, load_finetuned
from embcache.paths import PathLike
from embcache.probe.heads import make_head
from embcache.probe.stack import Head, predict_logits
from embcache.runs.folders import ProbeResult, load_heads
from embcache.store.feature_store import list_stores
from embcache.store.recipe import Recipe

FloatArray = NDArray[np.float64]
ToProbabilities = Callable[[NDArray[Any]], FloatArray]
"""From the logits (n, C) of one fold's model to probabilities: `softmax`, or those adjusted to a prevalence."""


class Model(Protocol):
    """What predicts: decoded, transformed and classified by a run's own recipe."""

    def __call__(
        self, root: Path, sources: Sequence[ImageRef], pool: Executor, decoding: Decoding
    ) -> tuple[FloatArray, list[str]]:
        """Probabilities (n, C) of images, and why a row has none."""
        ...


@dataclass(frozen=True, eq=False)
class _ProbeModel:
    """Frozen networks and the heads of some folds."""

    networks: Mapping[str, FrozenNetwork]
    head: Head
    params: Sequence[dict[str, torch.Tensor]]
    to_p: Sequence[ToProbabilities]

    def __call__(
        self, root: Path, sources: Sequence[ImageRef], pool: Executor, decoding: Decoding
    ) -> tuple[FloatArray, list[str]]:
        networks = list(self.networks.values())
        size = BATCH_SIZES.get(networks[0].device.type, 64)
        shards = compute_shard(root, sources, networks, batch_size=size, pool=pool, decoding=decoding)
        features = [rows.features.astype(np.float32, copy=False) for rows in shards]
        x = {b: torch.from_numpy(rows) for b, rows in zip(self.networks, features, strict=True)}
        everyone = torch.arange(len(sources))
        logits = [predict_logits(self.head, head, x, everyone) for head in self.params]
        p = np.mean([to_p(z) for to_p, z in zip(self.to_p, logits, strict=True)], axis=0)
        reasons = [next(filter(None, why), "") for why in zip(*(rows.reasons for rows in shards), strict=True)]
        return p, reasons


@dataclass(frozen=True, eq=False)
class _FinetunedModel:
    """The finetuned networks of some folds; they share one transform."""

    models: Sequence[FinetunedModel]
    to_p: Sequence[ToProbabilities]
    batch_size: int

    def __call__(
        self, root: Path, sources: Sequence[ImageRef], pool: Executor, decoding: Decoding
    ) -> tuple[FloatArray, list[str]]:
        transform = self.models[0].transform
        parts: list[FloatArray] = []
        reasons: list[str] = []
        for batch in prepare_batches(root, sources, [transform.geometry], self.batch_size, pool, decoding):
            pixels = stack_batch(batch, 0, torch.empty((len(batch), *transform.size, 3), dtype=torch.uint8)).numpy()
            parts.append(
                np.mean([to_p(m.logits(pixels)) for to_p, m in zip(self.to_p, self.models, strict=True)], axis=0)
            )
            reasons += [
                prepared.reason or ("" if np.isfinite(row).all() else "the outputs are not finite")
                for prepared, row in zip(batch, parts[-1], strict=True)
            ]
        return np.concatenate(parts), reasons


def load_model(
    result: ProbeResult,
    folder: Path,
    folds: Mapping[int, ToProbabilities],
    *,
    home: PathLike | None,
    weights: PathLike | Mapping[str, PathLike] | None,
    device: str,
) -> Model:
    """The model of some folds of a run, ready to predict."""
    if result.kind not in ("probe", "finetune"):
        raise UsageError(
            f"a result of kind {result.kind!r} has no model to predict with",
            found=result.id,
            fix=f"--run {result.request.get('run', 'RUN')}",
        )
    recipes = run_recipes(result, home)
    if result.kind == "finetune":
        if weights is not None:
            raise UsageError(
                "a finetuned run has weights of its own", found=f"--weights {weights}", fix="leave --weights out"
            )
        for recipe in recipes.values():  # of its features nothing else is left to chance: the model was saved whole
            _refuse_differences(result, recipe, replace(recipe, decoder=DECODER_VERSION), folder)
        target = pick_device(device)
        models = [load_finetuned(folder, result, fold, str(target)) for fold in folds]
        return _FinetunedModel(models, list(folds.values()), BATCH_SIZES.get(target.type, 64))
    overrides = weights_by_name(list(recipes), weights)
    networks = {
        backbone: _rebuild(result, recipe, overrides.get(backbone), home, device)
        for backbone, recipe in recipes.items()
    }
    asked = dict(result.request["head"])
    head = make_head(asked.pop("name"), **asked)
    heads = load_heads(folder)
    return _ProbeModel(networks, head, [heads[fold] for fold in folds], list(folds.values()))


def run_recipes(result: ProbeResult, home: PathLike | None = None) -> dict[str, Recipe]:
    """The recipe of each backbone of a run: as the run kept it, else (older runs) from the store it was probed on."""
    if result.recipes:
        return {backbone: Recipe.from_json(result.recipes[backbone]) for backbone in result.backbones}
    wanted = {str(backbone): str(fingerprint) for backbone, fingerprint in result.request.get("recipes", ())}
    cached = {store.recipe.fingerprint: store.recipe for store in list_stores(home, result.dataset)}
    gone = [f"{b} ({wanted.get(b, 'unknown')[:12]})" for b in result.backbones if wanted.get(b) not in cached]
    if gone:
        raise StoreNotFoundError(
            "the run was made by a version that kept no recipes, and its feature store is gone",
            expected=f"a store of {result.dataset} with the fingerprint of {', '.join(gone)}",
            found=", ".join(fingerprint[:12] for fingerprint in cached) or "no stores of that dataset",
            fix=f"embcache probe --dataset {result.dataset} --backbone {','.join(result.backbones)} "
            f"--head {result.head} --subset {result.subset} --again, and predict with that run",
        )
    return {backbone: cached[wanted[backbone]] for backbone in result.backbones}


def _rebuild(
    result: ProbeResult, recipe: Recipe, weights: Path | None, home: PathLike | None, device: str
) -> FrozenNetwork:
    """The network of a recipe, ready to embed; `RecipeError` where it would embed otherwise than the recipe says."""
    network = recipe_network(recipe, home=home, weights=weights, device=device)
    made = make_recipe(network)
    # Parameters that only cached views have (how many, how augmented) do not concern the plain view predicted from.
    made = replace(made, transform={**recipe.transform, **made.transform})
    _refuse_differences(result, recipe, made, network.backbone.weights_source)
    return network


def _refuse_differences(result: ProbeResult, recipe: Recipe, made: Recipe, where: object) -> None:
    differences = recipe.differences(made)
    if differences:
        raise RecipeError(
            f"{recipe.backbone} is not what run {result.id} was made with",
            expected="\n".join(f"{name}: {then}" for name, (then, _) in differences.items()),
            found="\n".join(f"{name}: {now}" for name, (_, now) in differences.items()),
            where=where,
            fix=f"--weights {recipe.backbone}=FILE with the file of that sha256"
            if "weights_sha256" in differences
            else "use the version of embcache that made the run, or make it again with this one",
        )
