"""New images through a saved run: decoded, transformed and embedded by the run's own recipe, then its heads.

What a run predicts with is rebuilt from what it kept, and refused where the rebuilt recipe is not the recorded one:
other weights, another decoder or another arithmetic would give numbers that only look like the run's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from embcache.data.columns import retarget
from embcache.data.dataset import ImageDataset, find_dataset
from embcache.data.files import IMAGE_SUFFIXES, is_image_name, is_litter
from embcache.errors import DatasetError, DatasetNotFoundError, RecipeError, StoreNotFoundError, UsageError
from embcache.extract.backbones import load_backbone
from embcache.extract.batching import Source, prepare_batches, stack_batch
from embcache.extract.request import image_root, weights_by_name
from embcache.extract.run import BATCH_SIZES, make_recipe
from embcache.extract.transforms import Transform
from embcache.extract.worker import FrozenNetwork, compute_shard, freeze, pick_device
from embcache.paths import PathLike
from embcache.probe.heads import Head, make_head
from embcache.probe.metrics import softmax
from embcache.probe.results import ProbeResult, find_run_anywhere, load_heads
from embcache.probe.stack import predict_logits
from embcache.report.csvfile import csv_text
from embcache.store.feature_store import list_stores
from embcache.store.recipe import Recipe

FloatArray = NDArray[np.float64]
_CHUNK = 256  # images at a time: what a progress bar counts, and what is in memory as features


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a run says of images.

    Attributes
    ----------
    run : str
        Its id.
    class_names : tuple of str
    images : tuple of str
        As they were named: paths, or ids of a dataset.
    p : float64 array of shape (n, C)
        Class probabilities, the mean over ``folds``; NaN where the image could not be read.
    reasons : tuple of str
        Why an image could not be read; ``""`` where it could.
    folds : tuple of int
        Whose models were averaged.
    labels : tuple of str or None
        Class of each image of a dataset, ``""`` where it is not known; None for paths.
    notes : tuple of str
        What a reader must know.
    """

    run: str
    class_names: tuple[str, ...]
    images: tuple[str, ...]
    p: FloatArray
    reasons: tuple[str, ...]
    folds: tuple[int, ...]
    labels: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    @property
    def failed(self) -> dict[str, str]:
        """Reason of each image that could not be read."""
        return {image: reason for image, reason in zip(self.images, self.reasons, strict=True) if reason}

    def rows(self) -> Iterator[dict[str, Any]]:
        """One plain mapping an image: ``image, [label,] prediction, p_CLASS …, error``."""
        for k, (image, reason) in enumerate(zip(self.images, self.reasons, strict=True)):
            known = {} if self.labels is None else {"label": self.labels[k]}
            chances = [None if reason else float(p) for p in self.p[k]]
            yield {
                "image": image,
                **known,
                "prediction": "" if reason else self.class_names[int(self.p[k].argmax())],
                **{f"p_{name}": chance for name, chance in zip(self.class_names, chances, strict=True)},
                "error": reason,
            }

    def to_csv(self) -> str:
        """The rows as CSV text; cells that a spreadsheet would run are guarded, paths by ``./`` so that they hold."""
        header = ["image", *([] if self.labels is None else ["label"]), "prediction"]
        header += [*(f"p_{name}" for name in self.class_names), "error"]
        path = self.labels is None
        return csv_text(header, ([_cell(k, v, path) for k, v in row.items()] for row in self.rows()))


def predict_images(
    run: str,
    paths: Sequence[PathLike] = (),
    *,
    dataset: str | None = None,
    data_root: PathLike | None = None,
    home: PathLike | None = None,
    weights: PathLike | Mapping[str, PathLike] | None = None,
    device: str = "auto",
    folds: Sequence[int] | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], Any] | None = None,
) -> Predictions:
    """Class probabilities of images, or of all images of a dataset, by a saved run.

    Parameters
    ----------
    run : str
        A run's id, or the beginning of it.
    paths : sequence of path
        Images, and folders that are looked through for images.
    dataset : str, optional
        Predict the images of this dataset instead.
    data_root : path, optional
        The dataset's own folder.
    home : path, optional
        Folder of stores and runs.
    weights : path or mapping of name to path, optional
        Checkpoints to use instead of those found; they must be those that the run was made with.
    device : str
        ``auto``, ``cpu``, ``cuda:0``, …
    folds : sequence of int, optional
        Whose models to average; default all.
    workers : int, optional
        Threads that decode images; default: one per core, 8 at most.
    progress : callable, optional
        Told (images done, images in all).

    Returns
    -------
    Predictions
        In the order of ``paths``, those of a folder sorted; an image that cannot be read has its reason.

    Raises
    ------
    UsageError
        Neither or both of paths and dataset; a fold that the run has not.
    StoreNotFoundError
        There is no such run, or it kept no recipe and its store is gone.
    RecipeError
        The rebuilt recipe is not the run's; the message lists the differences.
    DatasetError
        The dataset's classes are not the run's, or not one image could be read.
    """
    if bool(paths) == (dataset is not None):
        raise UsageError(
            "predictions are for images, folders of images, or a dataset",
            found="both" if paths else "neither",
            fix="embcache predict --run RUN FOLDER, or --dataset NAME",
        )
    result, folder = find_run_anywhere(run, home)
    chosen = _chosen_folds(result, folds)
    ds = None if dataset is None else _dataset_of_classes(result, dataset, data_root, home)
    root, sources, reasons = _of_paths(paths) if ds is None else _of_dataset(ds)
    names = [source.id for source in sources]
    todo = [k for k, reason in enumerate(reasons) if not reason]
    if todo:
        model = _load_model(result, folder, chosen, home=home, weights=weights, device=device)
    p = np.full((len(names), len(result.class_names)), np.nan)
    with ThreadPoolExecutor(workers or min(os.cpu_count() or 1, 8)) as pool:
        for start in range(0, len(todo), _CHUNK):
            rows = todo[start : start + _CHUNK]
            found, why = model(root, [sources[k] for k in rows], pool)
            for k, chances, reason in zip(rows, found, why, strict=True):
                p[k], reasons[k] = (np.nan, reason) if reason else (chances, "")
            if progress is not None:
                progress(start + len(rows), len(todo))
    if all(reasons):
        raise _none_read(names, reasons)
    notes = [*_notes(result, ds)]
    labels = None if ds is None else tuple(ds.class_names[y] if y >= 0 else "" for y in ds.labels)
    return Predictions(
        result.id, result.class_names, tuple(names), p, tuple(reasons), tuple(chosen), labels, tuple(notes)
    )


def list_images(paths: Sequence[PathLike]) -> list[Path]:
    """The named files, and the images in and below the named folders (sorted), each once.

    A file that was named is kept whatever its name; linked folders inside folders are not followed.

    Raises
    ------
    DatasetNotFoundError
        A folder holds no image.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            found[path] = None
            continue
        inside = [image for image in _walk(path) if is_image_name(image.name)]
        if not inside:
            raise DatasetNotFoundError(
                "a folder holds no images",
                expected="files that end in " + ", ".join(sorted(IMAGE_SUFFIXES)),
                found=", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "an empty folder",
                where=path,
                fix="name the images themselves, or the folder they are in",
            )
        found |= dict.fromkeys(inside)
    return list(found)


def run_recipes(result: ProbeResult, home: PathLike | None = None) -> dict[str, Recipe]:
    """The recipe of each backbone of a run: as the run kept it, else (older runs) from the store it was probed on.

    Raises
    ------
    StoreNotFoundError
        The run kept none, and no store has its fingerprint.
    """
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


class _Model(Protocol):
    def __call__(self, root: Path, sources: Sequence[Source], pool: Executor) -> tuple[FloatArray, list[str]]:
        """Probabilities (n, C) of images, and why a row has none."""
        ...


@dataclass(frozen=True, eq=False)
class _ProbeModel:
    """Frozen networks and the heads of some folds."""

    networks: Mapping[str, FrozenNetwork]
    head: Head
    params: Sequence[dict[str, torch.Tensor]]

    def __call__(self, root: Path, sources: Sequence[Source], pool: Executor) -> tuple[FloatArray, list[str]]:
        networks = list(self.networks.values())
        size = BATCH_SIZES.get(networks[0].device.type, 64)
        shards = compute_shard(root, sources, networks, batch_size=size, pool=pool)
        x = {b: torch.from_numpy(rows.features) for b, rows in zip(self.networks, shards, strict=True)}
        everyone = torch.arange(len(sources))
        p = np.mean([softmax(predict_logits(self.head, head, x, everyone)) for head in self.params], axis=0)
        reasons = [next(filter(None, why), "") for why in zip(*(rows.reasons for rows in shards), strict=True)]
        return p, reasons


@dataclass(frozen=True, eq=False)
class _FinetunedModel:
    """The finetuned networks of some folds; they share one transform."""

    models: Sequence[Any]
    batch_size: int

    def __call__(self, root: Path, sources: Sequence[Source], pool: Executor) -> tuple[FloatArray, list[str]]:
        transform: Transform = self.models[0].transform
        parts, reasons = [], []
        for batch in prepare_batches(root, sources, [transform.geometry], self.batch_size, pool):
            pixels = stack_batch(batch, 0, len(batch), transform.size)
            parts.append(np.mean([np.asarray(m.predict(pixels), dtype=np.float64) for m in self.models], axis=0))
            reasons += [
                prepared.reason or ("" if np.isfinite(row).all() else "the outputs are not finite")
                for prepared, row in zip(batch, parts[-1], strict=True)
            ]
        return np.concatenate(parts), reasons


def _load_model(
    result: ProbeResult,
    folder: Path,
    folds: Sequence[int],
    *,
    home: PathLike | None,
    weights: PathLike | Mapping[str, PathLike] | None,
    device: str,
) -> _Model:
    if result.kind == "finetune":
        from embcache.finetune.model import load_finetuned

        target = pick_device(device)
        models = [load_finetuned(folder, result, fold, str(target)) for fold in folds]
        return _FinetunedModel(models, BATCH_SIZES.get(target.type, 64))
    if result.kind != "probe":
        raise UsageError(
            f"a result of kind {result.kind!r} has no model to predict with",
            found=result.id,
            fix=f"--run {result.request.get('run', 'RUN')}",
        )
    recipes = run_recipes(result, home)
    overrides = weights_by_name(list(recipes), weights)
    networks = {
        backbone: _rebuild(result, recipe, overrides.get(backbone), home, device)
        for backbone, recipe in recipes.items()
    }
    asked = dict(result.request["head"])
    heads = load_heads(folder)
    return _ProbeModel(networks, make_head(asked.pop("name"), **asked), [heads[fold] for fold in folds])


def _rebuild(
    result: ProbeResult, recipe: Recipe, weights: Path | None, home: PathLike | None, device: str
) -> FrozenNetwork:
    """The network of a recipe, ready to embed; `RecipeError` where it would embed otherwise than the recipe says."""
    transform = _transform(recipe)
    loaded = load_backbone(recipe.backbone, weights=weights, home=home, image_size=transform.size)
    network = freeze(loaded, transform, device, recipe.precision)
    made = make_recipe(network)
    # Parameters that only cached views have (how many, how augmented) do not concern the plain view predicted from.
    made = replace(made, transform={**recipe.transform, **made.transform})
    differences = recipe.differences(made)
    if differences:
        raise RecipeError(
            f"{recipe.backbone} is not what run {result.id} was made with",
            expected="\n".join(f"{name}: {then}" for name, (then, _) in differences.items()),
            found="\n".join(f"{name}: {now}" for name, (_, now) in differences.items()),
            where=loaded.weights_source,
            fix=f"--weights {recipe.backbone}=FILE with the file of that sha256"
            if "weights_sha256" in differences
            else "use the version of embcache that made the run, or extract and probe again with this one",
        )
    return network


def _transform(recipe: Recipe) -> Transform:
    values: dict[str, Any] = {
        f.name: tuple(value) if isinstance(value := recipe.transform.get(f.name), list) else value
        for f in fields(Transform)
    }
    absent = [name for name in values if name not in recipe.transform]
    if absent or not isinstance(values["size"], tuple):
        raise RecipeError(
            f"the recipe of {recipe.backbone} does not say how images are transformed",
            expected=", ".join(values),
            found=f"no {', '.join(absent)}",
            fix="extract and probe again with this version of embcache",
        )
    return Transform(**values)


def _chosen_folds(result: ProbeResult, folds: Sequence[int] | None) -> list[int]:
    usable = [fold.fold for fold in result.folds if not fold.failed]
    if folds is None:
        return usable
    unknown = [fold for fold in folds if fold not in usable]
    if unknown or not folds:
        raise UsageError(
            f"run {result.id} has no model of fold {', '.join(map(str, unknown))}" if unknown else "no fold was named",
            expected=", ".join(map(str, usable)),
            where="--folds",
        )
    return list(dict.fromkeys(folds))


def _dataset_of_classes(
    result: ProbeResult, name: str, data_root: PathLike | None, home: PathLike | None
) -> ImageDataset:
    ds, _ = find_dataset(name, root=data_root, home=home)
    if result.target:
        ds = retarget(ds, result.target)
    if tuple(ds.class_names) != result.class_names:
        raise DatasetError(
            f"{ds.name} has other classes than run {result.id} tells apart",
            expected=", ".join(result.class_names),
            found=", ".join(ds.class_names),
            where=ds.root,
            fix="name the images themselves: embcache predict --run RUN FOLDER",
        )
    return ds


def _of_dataset(ds: ImageDataset) -> tuple[Path, list[Source], list[str]]:
    columns = [ds.table[name].tolist() for name in ("id", "path", "member")]
    sources = [Source(image, path, member) for image, path, member in zip(*columns, strict=True)]
    return image_root(ds), sources, [""] * len(sources)


def _of_paths(paths: Sequence[PathLike]) -> tuple[Path, list[Source], list[str]]:
    """Sources below the root of the file system: images may lie anywhere, links are followed to where they lead."""
    sources, reasons = [], []
    for path in list_images(paths):
        real = os.path.realpath(path)
        drive = Path(real).anchor
        sources.append(Source(str(path), real.removeprefix(drive), -1))
        reasons.append(_not_readable(real))
    return Path(Path.cwd().anchor), sources, reasons


def _not_readable(path: str) -> str:
    """Why a file need not even be opened; ``""`` where it may be tried."""
    try:
        os.stat(path)  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        return "the file is not there"
    except (OSError, ValueError) as error:
        return str(getattr(error, "strerror", None) or error)
    return "" if os.access(path, os.R_OK) else "the file may not be read"


def _walk(folder: Path) -> Iterator[Path]:
    for top, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_litter(name))
        yield from (Path(top) / name for name in sorted(files))


def _none_read(names: Sequence[str], reasons: Sequence[str]) -> DatasetError:
    first = [f"{name}: {reason}" for name, reason in zip(names[:5], reasons[:5], strict=True)]
    return DatasetError(
        "not one image could be read" if len(names) > 1 else "the image could not be read",
        expected="images",
        found="\n".join(first) + (f"\n… and {len(names) - 5:,} more" if len(names) > 5 else "") or "no images",
        fix="check the paths",
    )


def _notes(result: ProbeResult, ds: ImageDataset | None) -> Iterator[str]:
    failed = [fold.fold for fold in result.folds if fold.failed]
    if failed:
        yield f"training of fold {', '.join(map(str, failed))} diverged: the other folds predict"
    if result.target:
        yield f"the run tells the column {result.target!r} apart, not the classes of {result.dataset}"
    if ds is not None and ds.name == result.dataset:
        yield f"images that the run was trained on are among those of {ds.name}"


def _cell(column: str, value: object, path: bool) -> object:
    if column == "image" and path and isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r", "\n"):
        return f"./{value}"
    return value
