"""New images through a saved run: decoded, transformed and embedded by the run's own recipe, then its heads.

The model is rebuilt from what the run kept, and refused where the rebuilt recipe is not the recorded one: other
weights, another decoder or other arithmetic would give numbers that only look like the run's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from embcache.config import DatasetRef, PredictConfig
from embcache.cores import default_workers
from embcache.data.budget import Decoding, check_max_pixels
from embcache.data.classes import as_in_run, change_notes, ref_of_run
from embcache.data.dataset import ImageDataset, find_dataset
from embcache.data.files import IMAGE_SUFFIXES, TABLE_SUFFIXES, is_object, passed_note, settle_paths, walk_images
from embcache.data.groups import UNGROUPED, find_groups, known_groups, merge_groups, patient_keys
from embcache.data.images import DECODER_VERSION, ImageRef, image_refs
from embcache.data.published import named_columns
from embcache.data.tables import find_columns, open_table
from embcache.errors import (
    DatasetError,
    DatasetNotFoundError,
    RecipeError,
    StoreError,
    StoreNotFoundError,
    UsageError,
    first_few,
)
from embcache.extract.canaries import check_canaries
from embcache.extract.extract import BATCH_SIZES
from embcache.extract.recipes import make_recipe, recipe_network, require_checkpoints
from embcache.extract.scan import image_root
from embcache.extract.worker import FrozenNetwork, compute_shard, pick_device, prepare_batches, stack_batch
from embcache.finetune.model import FinetunedModel, load_fold
from embcache.io import check_target, write_output
from embcache.paths import PathLike, slug
from embcache.places import as_url
from embcache.probe.heads import find_head
from embcache.probe.predictions import Adjust, Adjustment, parse_prevalence
from embcache.probe.stack import Head, predict_logits
from embcache.probe.summary import adjust_models
from embcache.results.curves import refuse_untrusted
from embcache.results.layout import csv_text, is_formula
from embcache.runs.folders import Result, find_run_anywhere, load_heads
from embcache.store.feature_store import list_stores
from embcache.store.schema import Recipe
from embcache.targets import Target, make_target

_CHUNK = 256  # images at a time: what a progress bar counts, and what is in memory as features


@dataclass(frozen=True, eq=False)
class ImagePredictions:
    """Class probabilities of n images by a saved run."""

    run: str  # its ID
    class_names: tuple[str, ...]  # its C classes
    images: tuple[str, ...]  # as they were named: paths, or IDs of a dataset
    p: NDArray[np.float64]  # probabilities or numbers (n, C), means over ``folds``; NaN where one could not be read
    reasons: tuple[str, ...]  # why an image could not be read; empty where it could
    folds: tuple[int, ...]  # that were averaged
    labels: tuple[str, ...] | None = None  # class of each image of a dataset; empty where it is not known
    notes: tuple[str, ...] = ()  # remarks about the run and the images
    groups: tuple[str, ...] | None = None  # patient, slide … of each image; empty where it is not known
    adjusted: str = ""  # prevalence and temperatures that ``p`` was adjusted to; empty where it was not
    target: Target | None = None  # by default classes
    values: NDArray[Any] | None = None  # of the target, of each image of a dataset

    @property
    def task(self) -> Target:
        """What is predicted."""
        return self.target or make_target("classes", self.class_names)

    @property
    def failed(self) -> dict[str, str]:
        """Reason of each image that could not be read."""
        return {image: reason for image, reason in zip(self.images, self.reasons, strict=True) if reason}

    def to_json(self) -> list[dict[str, Any]]:
        """Plain JSON data, one mapping per image: ``image, [label,] prediction, p_CLASS …, [adjusted,] error``."""
        return list(self.rows())

    def rows(self) -> Iterator[dict[str, Any]]:
        """The mappings of `to_json`."""
        for k, (image, reason) in enumerate(zip(self.images, self.reasons, strict=True)):
            label = {} if self.labels is None else {"label": self.labels[k]}
            p = None if reason else self.p[k]
            yield {"image": _as_text(image), **label, **self._called(p), "error": reason}

    def group_rows(self) -> Iterator[dict[str, Any]]:
        """One plain mapping per group: ``group, images, not_read, [label,] prediction, p_CLASS …, [adjusted]``.

        Groups come in the order of their first images. ``p_CLASS`` is the mean over the ``images`` that could be read
        (of findings the maximum), ``label`` that of the images (of findings any, of numbers the mean), empty where
        classes differ. An image without a group is a group of its own.
        """
        if self.groups is None:
            raise _no_groups()
        members: dict[str, list[int]] = {}
        for k, (group, image) in enumerate(zip(self.groups, self.images, strict=True)):
            members.setdefault(group or image, []).append(k)
        for group, rows in members.items():
            read = [k for k in rows if not self.reasons[k]]
            known = None if self.values is None else self.values[rows][self.task.known(self.values[rows])]
            shared = "" if known is None or not len(known) else self.task.words(self.task.group_value(known))
            label = {} if self.labels is None else {"label": shared}
            counts = {"images": len(read), "not_read": len(rows) - len(read)}
            together = np.max if self.task.kind == "findings" else np.mean
            found = together(self.p[read], axis=0) if read else None
            yield {"group": _as_text(group), **counts, **label, **self._called(found)}

    def _called(self, p: NDArray[np.float64] | None) -> dict[str, Any]:
        if self.task.kind == "number":
            return {"prediction": None if p is None else float(p[0])}
        chances = {f"p_{name}": None if p is None else float(p[c]) for c, name in enumerate(self.class_names)}
        adjusted = {"adjusted": self.adjusted} if self.adjusted else {}
        if self.task.kind == "findings" and p is not None:
            return {"prediction": self.task.words((p > 0.5).astype(np.int64)), **chances}
        return {"prediction": "" if p is None else self.class_names[int(p.argmax())], **chances, **adjusted}

    def to_csv(self) -> str:
        """The rows as CSV text; cells that a spreadsheet would run are guarded, paths by ``./`` so that they work."""
        rows = list(self.rows())
        for row in rows:
            if self.labels is None and is_formula(row["image"]):
                row["image"] = f"./{row['image']}"
        return _csv(rows)

    def groups_to_csv(self) -> str:
        """The rows of groups as CSV text."""
        return _csv(list(self.group_rows()))


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    return csv_text(list(rows[0]), (list(row.values()) for row in rows))


def _as_text(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()  # a file name need not be text


def predict(
    run: str,
    images: Sequence[PathLike] = (),
    *,
    dataset: str | None = None,
    ref: DatasetRef = DatasetRef(),
    config: PredictConfig | None = None,
    home: PathLike | None = None,
    progress: Callable[[int, int], Any] | None = None,
    **options: Any,
) -> ImagePredictions:
    """Class probabilities of images, or of all images of a dataset, by a saved run.

    Parameters
    ----------
    run : str
        ID of the run, or a unique prefix.
    images : sequence of path
        Images, folders that are searched for images, and tables of paths.
    dataset : str, optional
        Instead of ``images``: all images of a dataset.
    ref : DatasetRef
        Where the dataset is, and how its table, or a table of paths, is read.
    config, **options
        A `embcache.config.PredictConfig`, and fields that take the place of its own.
    home : path, optional
        Folder of stores and runs. Default: ``$EMBCACHE_HOME`` or ``~/.cache/embcache``.
    progress : callable, optional
        Called with the number of images done, and of all.

    Returns
    -------
    ImagePredictions
        Probabilities ``p``, float64 (n, C), in the order of ``images``, those of a folder sorted; NaN where an image
        cannot be read, with its reason.

    Raises
    ------
    UsageError
        Neither or both of images and dataset; a fold that the run does not have; a prevalence of other classes.
    StoreError
        No such run, or it kept no recipe or no validation predictions, on which temperatures are fitted.
    RecipeError
        The rebuilt recipe is not the run's; the message lists the differences.
    DatasetError
        The dataset has other classes than the run, no image could be read, or ``by_group`` and there are no groups.
    """
    config = PredictConfig.make(config, options)
    if bool(images) == (dataset is not None):
        raise UsageError(
            "predictions are for images, folders of images, or a dataset", code="nothing-named",
            found="both" if images else "neither", fix="embcache predict --run RUN FOLDER, or --dataset NAME",
        )  # fmt: skip
    if config.by_group is not None:
        check_target(config.by_group.expanduser())
    decoding = Decoding(check_max_pixels(config.max_pixels))
    result, folder = find_run_anywhere(run, home)
    usable = [fold.fold for fold in result.folds if not fold.failed]
    if unknown := [fold for fold in config.folds if fold not in usable]:
        raise UsageError(
            f"run {result.id} has no model of fold {', '.join(map(str, unknown))}", code="unknown-fold",
            expected=", ".join(map(str, usable)), where="--folds",
        )  # fmt: skip
    folds = list(dict.fromkeys(config.folds)) or usable
    adjust = Adjust(parse_prevalence(config.prevalence), config.calibrate)
    models = dict(zip(usable, adjust_models(result, folder, adjust), strict=True)) if adjust else {}
    ds = None if dataset is None else _dataset_of_classes(result, dataset, ref, home)
    given = images_of_paths(images, ref) if ds is None else images_of_dataset(ds)
    if config.by_group is not None and not any(given.groups):
        raise _no_groups()
    names, reasons = given.names, list(given.reasons)
    todo = [k for k, reason in enumerate(reasons) if not reason]
    if not todo:
        raise _none_read(names, reasons)
    model = _load_model(result, folder, folds, config, home)
    p = np.full((len(names), result.task.outputs), np.nan)
    with ThreadPoolExecutor(config.workers or default_workers()) as pool:
        for start in range(0, len(todo), _CHUNK):
            rows = todo[start : start + _CHUNK]
            logits, why = model.logits(given.root, [given.sources[k] for k in rows], pool, decoding)
            found = [
                models[f].probabilities(z) if models else result.task.predicted(z)
                for f, z in zip(folds, logits, strict=True)
            ]
            for k, chances, reason in zip(rows, np.mean(found, axis=0), why, strict=True):
                p[k], reasons[k] = (np.nan, reason) if reason else (chances, "")
            if progress is not None:
                progress(start + len(rows), len(todo))
    if all(reasons):
        raise _none_read(names, reasons)
    predicted = ImagePredictions(
        result.id, result.class_names, names, p, tuple(reasons), tuple(folds),
        None if ds is None else tuple(map(ds.task.words, ds.labels)),
        (*_notes(result, ds), *given.notes, *decoding.notes()), given.groups if any(given.groups) else None,
        _in_words(result, adjust, [models[fold] for fold in folds if models]), result.task,
        None if ds is None else ds.labels,
    )  # fmt: skip
    if config.by_group is not None:
        write_output(config.by_group.expanduser(), predicted.groups_to_csv())
    return predicted


def _in_words(result: Result, adjust: Adjust, models: Sequence[Adjustment]) -> str:
    if not models:
        return ""
    shares = zip(result.class_names, models[0].prevalence, strict=True)
    words = "prevalence " + " ".join(f"{name}={share:.4g}" for name, share in shares)
    temperatures = " ".join(f"{model.temperature:.3g}" for model in models)
    return words + (f"; temperatures {temperatures}" if adjust.calibrate else "")


def _no_groups() -> DatasetError:
    return DatasetError(
        "the images have no groups, so nothing can be averaged by group", code="no-groups",
        expected="a table with the columns path,group, DICOM files with a PatientID, or a dataset with groups",
        where="--by-group", fix="embcache predict --run RUN TABLE.csv --by-group FILE",
    )  # fmt: skip


def _dataset_of_classes(result: Result, name: str, ref: DatasetRef, home: PathLike | None) -> ImageDataset:
    ds = as_in_run(find_dataset(name, ref_of_run(ref, result.request), home=home)[0], result.request)
    if tuple(ds.class_names) != result.class_names:
        raise DatasetError(
            f"{ds.name} has other {result.task.nouns} than run {result.id}", code="other-classes",
            expected=", ".join(result.class_names), found=", ".join(ds.class_names), where=ds.root,
            fix="name the images themselves: embcache predict --run RUN FOLDER",
        )  # fmt: skip
    return ds


def _none_read(names: Sequence[str], reasons: Sequence[str]) -> DatasetError:
    found = first_few([f"{name}: {reason}" for name, reason in zip(names, reasons, strict=True)]) or "no images"
    return DatasetError("no image could be read", code="none-readable", expected="images", found=found,
                        fix="check the paths")  # fmt: skip


def _notes(result: Result, ds: ImageDataset | None) -> Iterator[str]:
    failed = [fold.fold for fold in result.folds if fold.failed]
    if failed:
        yield f"training of fold {', '.join(map(str, failed))} diverged: the other folds predict"
    if result.target:
        yield f"the run predicts {result.target} ({result.task.kind}), not the labels of {result.dataset}"
    if ds is not None:
        yield from change_notes(ds)
        if ds.name == result.dataset:
            yield f"images that the run was trained on are among those of {ds.name}"


# The model of a run, rebuilt from what the run kept.


@dataclass(frozen=True, eq=False)
class _ProbeModel:
    """Frozen networks and the heads of some folds."""

    networks: Mapping[str, FrozenNetwork]
    head: Head
    params: Sequence[dict[str, torch.Tensor]]

    def logits(
        self, root: Path, sources: Sequence[ImageRef], pool: Executor, decoding: Decoding
    ) -> tuple[NDArray[np.floating], list[str]]:
        """Logits (folds, n, C) of images, and why a row cannot be used."""
        networks = list(self.networks.values())
        size = BATCH_SIZES.get(networks[0].device.type, 64)
        shards = compute_shard(root, sources, networks, batch_size=size, pool=pool, decoding=decoding)
        features = [torch.from_numpy(rows.features.astype(np.float32, copy=False)) for rows in shards]
        x, everyone = dict(zip(self.networks, features, strict=True)), torch.arange(len(sources))
        logits = np.stack([predict_logits(self.head, head, x, everyone) for head in self.params])
        return logits, [next(filter(None, why), "") for why in zip(*(rows.reasons for rows in shards), strict=True)]


@dataclass(frozen=True, eq=False)
class _WholeModel:
    """The finetuned networks of some folds; they share one transform."""

    models: Sequence[FinetunedModel]
    batch_size: int

    def logits(
        self, root: Path, sources: Sequence[ImageRef], pool: Executor, decoding: Decoding
    ) -> tuple[NDArray[np.floating], list[str]]:
        """As `_ProbeModel.logits`."""
        transform = self.models[0].transform
        parts, reasons = [], list[str]()
        for batch in prepare_batches(root, sources, [transform], self.batch_size, pool, decoding):
            pixels = stack_batch(batch, 0, torch.empty((len(batch), *transform.size, 3), dtype=torch.uint8)).numpy()
            parts.append(np.stack([model.logits(pixels) for model in self.models]))
            reasons += [
                prepared.reason or ("" if np.isfinite(row).all() else "the outputs are not finite")
                for prepared, row in zip(batch, parts[-1].swapaxes(0, 1), strict=True)
            ]
        return np.concatenate(parts, axis=1), reasons


def _load_model(
    result: Result, folder: Path, folds: Sequence[int], config: PredictConfig, home: PathLike | None
) -> _ProbeModel | _WholeModel:
    """The model of some folds of a run, ready to predict; refused where it would not be the same."""
    if result.kind not in ("probe", "finetune"):
        raise UsageError(
            f"a result of kind {result.kind!r} has no model to predict with", code="no-model", found=result.id,
            fix=f"--run {result.request.get('run', 'RUN')}",
        )  # fmt: skip
    options = dict(result.request["head"])
    head = str(options.pop("name"))
    if result.kind == "probe" and not (folder / "heads.safetensors").exists():
        raise StoreError(
            "the models of this run were not kept", code="models-not-kept", where=folder, found=head,
            fix="probe again with a head of embcache, and without --no-models: scikit-learn's are not kept",
        )  # fmt: skip
    refuse_untrusted(result, config.trust)
    recipes = run_recipes(result, home)
    if foreign := [backbone for backbone, recipe in recipes.items() if recipe.foreign]:
        raise UsageError(
            "features of new images cannot be made: some were imported", code="foreign-features",
            found=", ".join(foreign), where=folder, expected="a run of backbones that are networks on this machine",
            fix="probe a backbone of `embcache backbones` and predict with that run",
        )  # fmt: skip
    if result.kind == "finetune":
        if config.weights and not any(recipe.of_files for recipe in recipes.values()):
            raise UsageError("a finetuned run has its own weights", code="unused-option",
                             found=f"--weights {config.weights[0]}", fix="leave --weights out")  # fmt: skip
        for recipe in recipes.values():  # the model was saved whole, so that only the decoder can differ
            _refuse_differences(result, recipe, replace(recipe, decoder=DECODER_VERSION), folder)
        device = pick_device(config.device)
        weights = _weights_by_name(list(recipes), config.weights)
        models = [load_fold(folder, result, fold, str(device), config.trust, weights, home) for fold in folds]
        return _WholeModel(models, BATCH_SIZES.get(device.type, 64))
    weights = _weights_by_name(list(recipes), config.weights)
    require_checkpoints(recipes.values(), weights, home)
    networks = {
        backbone: _rebuild(result, recipe, weights.get(backbone), home, config) for backbone, recipe in recipes.items()
    }
    heads = load_heads(folder)
    return _ProbeModel(networks, find_head(head, options), [heads[fold] for fold in folds])


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


def _rebuild(
    result: Result, recipe: Recipe, weights: Path | None, home: PathLike | None, config: PredictConfig
) -> FrozenNetwork:
    """The network of a recipe, ready to embed; `RecipeError` where it would not embed as the recipe says."""
    trusted = (recipe.model or recipe.backbone) in config.trust
    network = recipe_network(recipe, home=home, weights=weights, device=config.device, imports=trusted)
    made = make_recipe(network)
    # Parameters that only cached views have (how many, how augmented) do not concern the plain view predicted from.
    made = replace(made, transform={**recipe.transform, **made.transform})
    _refuse_differences(result, recipe, made, network.backbone.weights_source)
    stores = [store for store in list_stores(home) if store.recipe.fingerprint == recipe.fingerprint]
    for store in sorted(stores, key=lambda store: store.dataset != slug(result.dataset)):
        if check_canaries(store.path, network):
            break  # the store that the heads were trained on, or another of the recipe
    return network


def _refuse_differences(result: Result, recipe: Recipe, made: Recipe, where: object) -> None:
    differences = recipe.differences(made)
    if differences:
        raise RecipeError(
            f"{recipe.backbone} is not what run {result.id} was made with", code="recipe-differs",
            expected="\n".join(f"{name}: {then}" for name, (then, _) in differences.items()),
            found="\n".join(f"{name}: {now}" for name, (_, now) in differences.items()),
            where=where,
            fix=f"{recipe.weights_option()} with {recipe.weights_words}"
            if "weights_sha256" in differences
            else "use the version of embcache that made the run, or make it again with this one",
        )  # fmt: skip


# What to predict: images and folders as a user names them, or the images of a dataset.


@dataclass(frozen=True)
class NewImages:
    """Images to predict."""

    root: Path  # what the paths of the sources are relative to
    names: tuple[str, ...]  # what the user calls them
    sources: tuple[ImageRef, ...]  # where they are
    reasons: tuple[str, ...]  # why an image need not be tried; ``""`` where it may be
    groups: tuple[str, ...]  # patient, slide … of each image; ``""`` where it is not known
    notes: tuple[str, ...] = ()  # what was inferred from tables


def images_of_dataset(ds: ImageDataset) -> NewImages:
    """All images of a dataset, by their IDs; `DatasetNotFoundError` where its folder is missing."""
    sources = tuple(image_refs(ds.table))
    known = ds.grouped and UNGROUPED not in ds.notes
    groups = tuple(ds.table["group"].tolist()) if known else ("",) * len(sources)
    return NewImages(image_root(ds), tuple(ds.table["id"]), sources, ("",) * len(sources), groups)


def images_of_paths(paths: Sequence[PathLike], columns: DatasetRef = DatasetRef()) -> NewImages:
    """Images anywhere in the file system, by their paths as named; links are followed to where they lead."""
    notes: list[str] = []
    found = list_images(paths, notes, columns)
    names, real = [str(path) for path in found], [os.path.realpath(path) for path in found]
    sources = tuple(ImageRef(str(k), path.removeprefix(Path(path).anchor), "") for k, path in enumerate(real))
    reasons = tuple(map(_not_readable, real))
    # A group by PatientID is named after its first image, so that no PatientID is in an answer.
    anchor, tried = Path(Path.cwd().anchor), [k for k, why in enumerate(reasons) if not why]
    patients = patient_keys(anchor, [sources[k].path for k in tried]) or []
    known = [(names[k], patient) for k, patient in zip(tried, patients, strict=False) if patient]
    of = dict(zip((n for n, _ in known), merge_groups([n for n, _ in known], [p for _, p in known]), strict=True))
    groups = tuple(group or of.get(name, "") for name, group in zip(names, found.values(), strict=True))
    return NewImages(anchor, tuple(names), sources, reasons, groups, tuple(notes))


def list_images(paths: Sequence[PathLike], notes: list[str], columns: DatasetRef = DatasetRef()) -> dict[Path, str]:
    """The named files, those in tables, and the images in and below the named folders (sorted), each once, by group.

    A named file is kept whatever its suffix, but a CSV, TSV, Parquet or Excel file is a table of paths relative to its
    folder, perhaps with groups. What was inferred, and how many other files the folders hold, is added to ``notes``.
    """
    found: dict[Path, str] = {}
    passed = list[str]()
    _refuse_objects([as_url(path) for path in paths])
    tables = any(Path(path).suffix.lower() in TABLE_SUFFIXES for path in paths)
    if unused := [role for role in named_columns(columns) if not tables or role not in ("path", "group")]:
        raise UsageError(
            "predicting images needs no such column" if tables else "there is no table that could have columns",
            code="unused-column", found=" ".join(f"--{role}-column" for role in unused),
            expected="--path-column and --group-column, with a table",
        )  # fmt: skip
    for path in map(Path, paths):
        if path.is_file() and path.suffix.lower() in TABLE_SUFFIXES:
            found |= _listed(path, notes, columns)
            continue
        if not path.is_dir():
            found.setdefault(path, "")
            continue
        inside = [path / image for image in walk_images(path, "", passed, outside=[])]
        if not inside:
            raise DatasetNotFoundError(
                "a folder holds no images", code="no-images", where=path,
                expected="files that end in " + ", ".join(sorted(IMAGE_SUFFIXES)),
                found=first_few(sorted(entry.name for entry in path.iterdir())) or "an empty folder",
                fix="name the images themselves, or the folder they are in",
            )  # fmt: skip
        found |= {image: found.get(image, "") for image in inside}
    notes += passed_note(passed)
    return found


def _listed(file: Path, notes: list[str], wanted: DatasetRef) -> Mapping[Path, str]:
    table, read = open_table(file)
    columns, named = find_columns(table, wanted, where=file, required=["path"], roles=["path"])
    column = columns["path"]
    if table.empty or not all(table[column]):
        raise DatasetError("a row of a table names no image", code="empty-path", expected="a path in every row",
                           where=file)  # fmt: skip
    _refuse_objects(table[column].tolist(), file)
    paths, settled = settle_paths(file.parent.resolve(), table[column].tolist())
    free = table if column == wanted.group_column else table.drop(columns=column)
    _, group, inferred = find_groups(free, wanted, [-1] * len(paths), paths, where=file, refuse=False)
    notes += [*read, *named, *settled, *inferred]
    groups = known_groups(table[group].tolist()) if group else [""] * len(paths)
    return {file.parent / path: name for path, name in zip(paths, groups, strict=True)}


def _refuse_objects(paths: Iterable[str], table: Path | None = None) -> None:
    if named := next(filter(is_object, paths), ""):
        raise UsageError(
            "images in an object store are predicted as a dataset", code="objects-not-predicted", found=named,
            expected="images, folders and tables on a disk", where=table,
            fix=f"--dataset folder --data-root {table or 'TABLE'}, with the columns path and label",
        )  # fmt: skip


def _not_readable(path: str) -> str:
    """Why a file need not even be opened; ``""`` where it may be tried."""
    try:
        os.stat(path)  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        return "the file does not exist"
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:  # a NUL in the path
        return str(error)
    return "" if os.access(path, os.R_OK) else "the file may not be read"
