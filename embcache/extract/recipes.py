"""From names to frozen networks and their recipes, and from recipes to networks."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from embcache.backbones.catalog import (
    BACKBONES,
    LIBRARIES,
    Backbone,
    LoadedBackbone,
    find_backbone,
    load_backbone,
    repool,
    weights_status,
)
from embcache.backbones.pooling import Pooling
from embcache.backbones.runtimes import departure
from embcache.backbones.transforms import Transform, choose_transform
from embcache.backbones.weights import weights_by_name
from embcache.config import ExtractConfig
from embcache.data.dataset import ImageDataset
from embcache.data.images import DECODER_VERSION
from embcache.errors import RecipeError, UsageError
from embcache.extract.canaries import canary_features, environment
from embcache.extract.engines.devices import split_devices
from embcache.extract.scan import DatasetFiles
from embcache.extract.worker import FrozenNetwork, freeze
from embcache.fields import bare_name
from embcache.log import log
from embcache.paths import PathLike, slug, weights_dir
from embcache.sealed import canonical_json
from embcache.store.feature_store import PIXELS, FeatureStore, list_stores
from embcache.store.schema import NUMERICS, Recipe


@dataclass(frozen=True)
class Traits:
    """What of a dataset decides the networks of an extraction and their recipes."""

    folder: Path  # of the dataset's stores
    sizes: tuple[tuple[int, int], ...]  # of the images, see `DatasetFiles`
    layout: str
    augment: str

    @classmethod
    def of(cls, dataset: ImageDataset, files: DatasetFiles) -> Traits:
        """Those of a dataset whose files were scanned."""
        return cls(files.folder, tuple(files.sizes), dataset.layout, dataset.augment)


def safe_runtime(network: FrozenNetwork, see: Callable[[], torch.Tensor], requested: str) -> str:
    """The runtime of a network where its features of real images are those of torch's own execution, else eager."""
    name, pixels = network.backbone.spec.name, see()
    try:
        problem = departure(network.forward(pixels), network.executed_by("eager").forward(pixels), network.precision)
    except UsageError as error:
        if requested != "auto":
            raise
        problem = f"{error.problem}: {error.found}"
    if problem and requested != "auto":
        raise UsageError(
            f"{network.runtime} does not compute the features of {name}", code="runtime-departs", found=problem,
            fix="--runtime eager",
        )  # fmt: skip
    if problem:
        log.info(f"{name}: {network.runtime} is not used: {problem}")
    return "eager" if problem else network.runtime


def open_networks(
    backbones: Sequence[str | Backbone], traits: Traits, config: ExtractConfig, home: PathLike | None = None
) -> list[FrozenNetwork]:
    """The networks of an extraction, in the order of ``backbones``; nothing is computed."""
    names = [bare_name(backbone) if isinstance(backbone, str) else backbone.name for backbone in backbones]
    if repeated := [b for b in backbones if isinstance(b, str) and bare_name(b) != b and names.count(bare_name(b)) > 1]:
        raise UsageError("a backbone is named twice", code="repeated-backbone", found=", ".join(repeated))
    weights = weights_by_name(names, config.weights)
    found = [_find(each, weights.get(name), traits.folder, home) for each, name in zip(backbones, names, strict=True)]
    specs = [repool(spec, config.tokens, config.layers) for spec in found]
    device, networks = split_devices(config.device)[0], list[FrozenNetwork]()
    precision = config.precision
    if precision != "fp32" and config.runtime not in ("auto", "eager"):
        precision += f"+{config.runtime}"
    for given, name, spec in zip(backbones, names, specs, strict=True):
        transform = choose_transform(spec, config.transform, traits.sizes, config.decode)
        spec = spec.at(transform.size)
        what = spec if spec.module is not None or spec.library else given  # a module is built once
        loaded = load_backbone(what, weights=weights.get(name), home=home, image_size=transform.size)
        views = (config.views, traits.augment, config.feature_dtype)
        if spec.module is not None:  # before it is rewritten, and after
            loaded.module.to("cpu")
            canary_features(FrozenNetwork(loaded, transform, torch.device("cpu"), "fp32"))
        networks.append(freeze(loaded, transform, device, precision, *views))
        _check_own_name(make_recipe(networks[-1]), traits.folder)
        for note in notes_of(loaded, traits.layout):
            log.info(note)
    return networks


def notes_of(loaded: LoadedBackbone, layout: str) -> list[str]:
    """What a user must see beside the features of a backbone over a dataset of a layout."""
    return loaded.spec.contamination(layout) + [f"{loaded.spec.name}: {loaded.inferred}"] * bool(loaded.inferred)


def _cached_as(name: str, folder: Path) -> list[FeatureStore]:
    """The stores of a dataset whose features have a name."""
    stores = [FeatureStore(path) for path in sorted(folder.glob(f"{slug(name)}-*"))]
    return [store for store in stores if store.recipe.backbone == name]


def _find(given: str | Backbone, weights: Path | None, folder: Path, home: PathLike | None) -> Backbone:
    """The backbone of a name; for one of the user's own, that only stores know, a message that says what to type."""
    try:
        return find_backbone(given, folder=weights, home=home)
    except UsageError as unknown:
        for store in _cached_as(str(given), folder) if unknown.code == "unknown-backbone" else ():
            if store.recipe.model:
                raise UsageError(
                    f"{given} is a name of your own: say what it stands for", code="own-name-alone", where=store.path,
                    expected=store.recipe.typed, found=str(given), fix=f"--backbone {shlex.quote(store.recipe.typed)}",
                ) from unknown  # fmt: skip
        raise


def _check_own_name(recipe: Recipe, folder: Path) -> None:
    """Refuse a name of the user's own that another model has in this dataset already."""
    network = (recipe.architecture, recipe.weights_sha256)
    for store in _cached_as(recipe.backbone, folder) if recipe.model else ():
        other = store.recipe
        if other.model != recipe.model and (other.architecture, other.weights_sha256) != network:
            free = f"free the name: rm -r {shlex.quote(str(store.path))}"
            raise UsageError(
                f"the name {recipe.backbone} is taken by another model of this dataset", code="own-name-taken",
                expected=other.typed, found=recipe.typed, where=store.path,
                fix=(f"--backbone {recipe.backbone}2={recipe.model}", free),
            )  # fmt: skip


def log_differences(store: FeatureStore, folder: Path) -> None:
    """Log why the features of a backbone that is cached already are computed anew: a stale cache is never used."""
    recipe, found = store.recipe, list[str]()
    for other in _cached_as(recipe.backbone, folder):
        if other.path == store.path or other.views != store.views or not other.committed():
            continue  # views are requested by number, so the two are never confused
        differences = recipe.differences(other.recipe)
        what = ", ".join(f"{name} {theirs} there, {mine} now" for name, (mine, theirs) in differences.items())
        found.append(f"{other.path.name}: {what}")
    if found:
        others = "another recipe" if len(found) == 1 else f"{len(found)} other recipes"
        log.info(
            f"{recipe.backbone} is cached under {others} ({'; '.join(found)}); all images are extracted "
            f"under this one, and `embcache probe --recipe PREFIX` chooses one"
        )


def make_recipe(network: FrozenNetwork) -> Recipe:
    """Everything that determines the values of a network's features."""
    spec, transform = network.backbone.spec, network.transform.to_dict()
    if network.augmentation is not None:
        transform |= {"views": network.views, "augment": network.augmentation.describe()}
    precision = network.precision
    if precision != "fp32" and network.runtime != "eager":
        precision += f"+{network.runtime}"
    return Recipe(
        backbone=spec.name, architecture=spec.network, weights_sha256=network.backbone.weights_sha256,
        transform=transform, decoder=DECODER_VERSION, pooling=spec.pooling, precision=precision,
        dtype=network.dtype, numerics=NUMERICS, model=spec.model,
    )  # fmt: skip


def kept_conversion(network: FrozenNetwork, home: PathLike | None) -> Path | None:
    """How names of files begin that a runtime keeps of a network's conversion, beside the weights.

    None of a module of the user's own, of which nothing says whether its code has changed.
    """
    backbone = network.backbone
    if backbone.spec.module is not None:
        return None
    versions = environment(network).values()  # of the libraries whose code is converted
    parts = (backbone.spec.network, backbone.weights_sha256, backbone.spec.pooling, NUMERICS, *versions)
    digest = hashlib.sha256(canonical_json([*map(str, parts), network.precision]).encode()).hexdigest()
    return weights_dir(home) / "converted" / digest[:16]


def require_checkpoints(recipes: Iterable[Recipe], named: Container[str], home: PathLike | None = None) -> None:
    """Refuse recipes of checkpoints of the user's own that are not ``named``: what is published is another file."""
    stores = list_stores(home)
    own = [(each, _own_checkpoint(each, stores, home)) for each in recipes if each.backbone not in named]
    lacking = {each.backbone: (each, file) for each, file in own if file is not None}
    if lacking:
        was = {file: f", {file}" if file else "" for _, file in lacking.values()}
        raise RecipeError(
            "the features were made with checkpoints of your own: say where they are", code="own-checkpoint",
            expected="\n".join(f"{name}: {each.weights_words}{was[file]}" for name, (each, file) in lacking.items()),
            found="no --weights for " + ", ".join(lacking),
            fix=" ".join(each.weights_option(file) for each, file in lacking.values()),
        )  # fmt: skip


def _own_checkpoint(recipe: Recipe, stores: Sequence[FeatureStore], home: PathLike | None) -> str | None:
    """Where the checkpoint of the user's own was that a recipe is of, empty if that is not known; of others None.

    Stores of the recipe record it. Without one, what is published is another file if it has another digest, and is not
    fetched for a name of the user's own.
    """
    model = recipe.model or recipe.backbone
    row = BACKBONES.get(model)
    published = row.weights.sha256 if row else ""
    made = [store.provenance for store in stores if store.recipe.fingerprint == recipe.fingerprint]
    if files := [str(provenance.get("checkpoint", "")) for provenance in made]:
        return files[0] if all(files) else None
    absent = recipe.model and model.partition(":")[0] in {*LIBRARIES, *BACKBONES}
    absent = absent and weights_status(model, home).startswith("not here")
    return "" if absent or not recipe.weights_sha256.startswith(published) else None


def recipe_network(
    recipe: Recipe,
    *,
    home: PathLike | None = None,
    weights: PathLike | None = None,
    device: str = "auto",
    views: int = 1,
    augment: str = "generic",
    imports: bool = False,
) -> FrozenNetwork:
    """The network that a recipe names, with the weights on this machine; the caller compares its recipe."""
    transform, spec = recipe_transform(recipe), recipe_backbone(recipe, weights, imports, home)
    what = spec.at(transform.size) if spec.library else recipe.typed
    loaded = load_backbone(what, weights=weights, home=home, image_size=transform.size, imports=imports)
    return freeze(loaded, transform, device, recipe.precision, views, augment, recipe.dtype)


def recipe_backbone(
    recipe: Recipe, weights: PathLike | None = None, imports: bool = False, home: PathLike | None = None
) -> Backbone:
    """The backbone that a recipe names, pooled as it says; ``weights`` may be the folder of its files."""
    folder = None if weights is None else Path(weights)
    spec = find_backbone(recipe.typed, imports=imports, folder=folder, home=home)
    if not spec.library or recipe.pooling == spec.pooling:
        return spec
    pooling = Pooling.parse(recipe.pooling)
    return repool(spec, pooling.tokens, ",".join(map(str, pooling.layers)) or None)


def recipe_transform(recipe: Recipe) -> Transform:
    """The transform that a recipe names; for pixels only the part that decides them."""
    data = {name: value for name, value in recipe.transform.items() if name not in ("views", "augment")}
    if recipe.backbone == PIXELS:
        data = {"kind": "paper", "mean": [0.0] * 3, "std": [1.0] * 3} | data
    try:
        return Transform.from_dict(data)
    except ValueError as error:
        raise RecipeError(
            f"the recipe of {recipe.backbone} does not describe how images are transformed", code="recipe-transform",
            expected="resize, crop, size, interpolation, mean, std", found=str(error),
            fix="extract and probe again with this version of embcache",
        ) from error  # fmt: skip
