"""New images through a saved run: decoded, transformed and embedded by the run's own recipe, then its heads.

What a run predicts with is rebuilt from what it kept, and refused where the rebuilt recipe is not the recorded one:
other weights, another decoder or another arithmetic would give numbers that only look like the run's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embcache.config import DatasetRef
from embcache.cores import default_workers
from embcache.data.budget import Decoding, check_max_pixels
from embcache.data.classes import as_in_run, change_notes
from embcache.data.dataset import ImageDataset, find_dataset
from embcache.errors import DatasetError, UsageError
from embcache.paths import PathLike
from embcache.probe.metrics import softmax
from embcache.probe.prevalence import Adjust, Adjustment
from embcache.probe.summary import adjust_models
from embcache.results.csvfile import csv_text, is_formula
from embcache.results.new_images import images_of_dataset, images_of_paths
from embcache.results.run_model import load_model
from embcache.runs.folders import ProbeResult, find_run_anywhere

FloatArray = NDArray[np.float64]
_CHUNK = 256  # images at a time: what a progress bar counts, and what is in memory as features


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a run says of images."""

    run: str  # its id
    class_names: tuple[str, ...]
    images: tuple[str, ...]  # as they were named: paths, or ids of a dataset
    p: FloatArray  # (n, C); class probabilities, the mean over ``folds``; NaN where the image could not be read
    reasons: tuple[str, ...]  # why an image could not be read; ``""`` where it could
    folds: tuple[int, ...]  # whose models were averaged
    labels: tuple[str, ...] | None = None  # class of each image of a dataset, ``""`` where it is not known
    notes: tuple[str, ...] = ()  # what a reader must know
    groups: tuple[str, ...] | None = None  # patient, slide … of each image, ``""`` where it is not known
    adjusted: str = ""  # prevalence and temperatures that ``p`` was adjusted to; empty where it was not

    @property
    def failed(self) -> dict[str, str]:
        """Reason of each image that could not be read."""
        return {image: reason for image, reason in zip(self.images, self.reasons, strict=True) if reason}

    def rows(self) -> Iterator[dict[str, Any]]:
        """One plain mapping per image: ``image, [label,] prediction, p_CLASS …, [adjusted,] error``."""
        for k, (image, reason) in enumerate(zip(self.images, self.reasons, strict=True)):
            known = {} if self.labels is None else {"label": self.labels[k]}
            chances = [None if reason else float(p) for p in self.p[k]]
            yield {
                "image": image.encode("utf-8", "backslashreplace").decode(),  # a file name need not be text
                **known,
                "prediction": "" if reason else self.class_names[int(self.p[k].argmax())],
                **{f"p_{name}": chance for name, chance in zip(self.class_names, chances, strict=True)},
                **({"adjusted": self.adjusted} if self.adjusted else {}),
                "error": reason,
            }

    def to_csv(self) -> str:
        """The rows as CSV text; cells that a spreadsheet would run are guarded, paths by ``./`` so that they hold."""
        rows, path = list(self.rows()), self.labels is None
        return csv_text(list(rows[0]), ([_cell(k, v, path) for k, v in row.items()] for row in rows))

    def group_rows(self) -> Iterator[dict[str, Any]]:
        """One plain mapping per group: ``group, images, not_read, [label,] prediction, p_CLASS …, [adjusted]``.

        Groups come in the order of their first images. ``p_CLASS`` is the mean over the ``images`` that could be read,
        ``label`` is empty where they differ. An image without a group is a group of its own.
        """
        if self.groups is None:
            raise _no_groups()
        members: dict[str, list[int]] = {}
        for k, (group, image) in enumerate(zip(self.groups, self.images, strict=True)):
            members.setdefault(group or image, []).append(k)
        for group, rows in members.items():
            read = [k for k in rows if not self.reasons[k]]
            p = self.p[read].mean(axis=0) if read else None
            labels = set() if self.labels is None else {self.labels[k] for k in rows}
            yield {
                "group": group.encode("utf-8", "backslashreplace").decode(),
                "images": len(read),
                "not_read": len(rows) - len(read),
                **({} if self.labels is None else {"label": labels.pop() if len(labels) == 1 else ""}),
                "prediction": "" if p is None else self.class_names[int(p.argmax())],
                **{f"p_{name}": None if p is None else float(p[c]) for c, name in enumerate(self.class_names)},
                **({"adjusted": self.adjusted} if self.adjusted else {}),
            }

    def groups_to_csv(self) -> str:
        """The rows of groups as CSV text."""
        rows = list(self.group_rows())
        return csv_text(list(rows[0]), ([*row.values()] for row in rows))


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
    adjust: Adjust = Adjust(),
    by_group: bool = False,
    workers: int | None = None,
    max_pixels: int | None = None,
    progress: Callable[[int, int], Any] | None = None,
    columns: DatasetRef = DatasetRef(),
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
    adjust : Adjust
        Another prevalence, and temperatures fitted on validation images, for the probabilities of each model before
        they are averaged. Default: as the models give them.
    by_group : bool
        Refuse images without groups: `Predictions.group_rows` will be asked for.
    workers : int, optional
        Threads that decode images; default: one per core, 8 at most.
    max_pixels : int, optional
        Larger images are not decoded; default: ``$EMBCACHE_MAX_PIXELS``, else 89,478,485.
    progress : callable, optional
        Told (images done, images in all).
    columns : DatasetRef
        Of tables among the paths, the columns of path and group; of a dataset as for `load_dataset`.

    Returns
    -------
    Predictions
        In the order of ``paths``, those of a folder sorted; an image that cannot be read has its reason.

    Raises
    ------
    UsageError
        Neither or both of paths and dataset; a fold that the run has not; a prevalence that is not of its classes.
    StoreError
        The run kept no predictions of validation images, which temperatures are fitted on.
    StoreNotFoundError
        There is no such run, or it kept no recipe and its store is gone.
    RecipeError
        The rebuilt recipe is not the run's; the message lists the differences.
    DatasetError
        The dataset's classes are not the run's, not one image could be read, or ``by_group`` and none has a group.
    """
    if bool(paths) == (dataset is not None):
        raise UsageError(
            "predictions are for images, folders of images, or a dataset",
            found="both" if paths else "neither",
            fix="embcache predict --run RUN FOLDER, or --dataset NAME",
        )
    decoding = Decoding() if max_pixels is None else Decoding(check_max_pixels(max_pixels))
    result, folder = find_run_anywhere(run, home)
    chosen = _chosen_folds(result, folds)
    models = _adjusted(result, folder, adjust, chosen)
    ds = None if dataset is None else _dataset_of_classes(result, dataset, data_root, home, columns)
    asked = images_of_paths(paths, columns) if ds is None else images_of_dataset(ds)
    if by_group and not any(asked.groups):
        raise _no_groups()
    names, reasons = asked.names, list(asked.reasons)
    todo = [k for k, reason in enumerate(reasons) if not reason]
    if not todo:
        raise _none_read(names, reasons)
    to_p = {fold: models[fold].probabilities if models else softmax for fold in chosen}
    model = load_model(result, folder, to_p, home=home, weights=weights, device=device)
    p = np.full((len(names), len(result.class_names)), np.nan)
    with ThreadPoolExecutor(workers or default_workers()) as pool:
        for start in range(0, len(todo), _CHUNK):
            rows = todo[start : start + _CHUNK]
            found, why = model(asked.root, [asked.sources[k] for k in rows], pool, decoding)
            for k, chances, reason in zip(rows, found, why, strict=True):
                p[k], reasons[k] = (np.nan, reason) if reason else (chances, "")
            if progress is not None:
                progress(start + len(rows), len(todo))
    if all(reasons):
        raise _none_read(names, reasons)
    labels = None if ds is None else tuple(ds.class_names[y] if y >= 0 else "" for y in ds.labels)
    return Predictions(
        result.id,
        result.class_names,
        names,
        p,
        tuple(reasons),
        tuple(chosen),
        labels,
        (*_notes(result, ds), *asked.notes, *decoding.notes()),
        asked.groups if any(asked.groups) else None,
        _in_words(result, adjust, models),
    )


def _adjusted(result: ProbeResult, folder: Path, adjust: Adjust, folds: Sequence[int]) -> dict[int, Adjustment]:
    """How each fold's probabilities are adjusted; nothing where that was not asked for."""
    if not adjust:
        return {}
    made = [fold.fold for fold in result.folds if not fold.failed]
    each = dict(zip(made, adjust_models(result, folder, adjust), strict=True))
    return {fold: each[fold] for fold in folds}


def _in_words(result: ProbeResult, adjust: Adjust, models: Mapping[int, Adjustment]) -> str:
    if not models:
        return ""
    shares = next(iter(models.values())).prevalence
    words = "prevalence " + " ".join(f"{n}={p:.4g}" for n, p in zip(result.class_names, shares, strict=True))
    temperatures = " ".join(f"{model.temperature:.3g}" for model in models.values())
    return words + (f"; temperatures {temperatures}" if adjust.calibrate else "")


def _no_groups() -> DatasetError:
    return DatasetError(
        "the images have no groups, so nothing can be averaged by group",
        expected="a table with the columns path,group, DICOM files with a PatientID, or a dataset with groups",
        where="--by-group",
        fix="embcache predict --run RUN TABLE.csv --by-group FILE",
    )


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
    result: ProbeResult, name: str, data_root: PathLike | None, home: PathLike | None, columns: DatasetRef
) -> ImageDataset:
    ds, _ = find_dataset(name, root=data_root, home=home, columns=columns)
    ds = as_in_run(ds, result.request)
    if tuple(ds.class_names) != result.class_names:
        raise DatasetError(
            f"{ds.name} has other classes than run {result.id} tells apart",
            expected=", ".join(result.class_names),
            found=", ".join(ds.class_names),
            where=ds.root,
            fix="name the images themselves: embcache predict --run RUN FOLDER",
        )
    return ds


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
    if ds is not None:
        yield from change_notes(ds)
    if ds is not None and ds.name == result.dataset:
        yield f"images that the run was trained on are among those of {ds.name}"


def _cell(column: str, value: object, path: bool) -> object:
    if column == "image" and path and isinstance(value, str) and is_formula(value):
        return f"./{value}"
    return value
