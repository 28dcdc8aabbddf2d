"""Results of probing (and finetuning), and the run folders that keep them.

``<home>/<dataset>/runs/<id>/`` holds ``result.json``, ``predictions.parquet`` (a row for each test image and fold) and
``heads.safetensors``. A run is written aside and renamed into place, so one that is there is whole. Its id hashes the
whole request; tables and figures are made from these files, never from logs.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from embcache.errors import StoreError
from embcache.paths import PathLike, home_dir, slug
from embcache.store.sealed import crc32c, seal, unseal

PROTOCOL_VERSION = 1
"""Raised when the protocol or its arithmetic changes, so that older runs are not taken for new ones."""


@dataclass(frozen=True)
class FoldResult:
    """One fold's model.

    Attributes
    ----------
    fold : int
    score : float or None
        The dataset's metric on the test set; None where the test labels are not known.
    val_score : float or None
        The same metric on the validation images, at ``best_epoch``.
    best_epoch, epochs : int
        The epoch that was kept, and how many were trained.
    n_train, n_val : int
        Images, hence labels.
    lr : float
        First learning rate.
    metrics : dict
        `embcache.probe.metrics.evaluate` on the test set; empty where the labels are not known.
    diverged : bool
        Training ended early because a loss or an output was not finite.
    """

    fold: int
    score: float | None
    val_score: float | None
    best_epoch: int
    epochs: int
    n_train: int
    n_val: int
    lr: float
    metrics: Mapping[str, Any]
    diverged: bool = False


@dataclass(frozen=True)
class ProbeResult:
    """What one head on one set of backbones reached at one subset.

    Attributes
    ----------
    id : str
        Names the run; hashes ``request``.
    kind : str
        ``"probe"``, or ``"finetune"`` for a model trained on images.
    dataset, head, subset : str
    backbones : tuple of str
    n_train, n_val : int
        Training and validation images of a fold, averaged over folds and rounded.
    n_test : int
        Test images.
    labels_used : int
        Training and validation images of a fold together, averaged over folds and rounded.
    metric : str
        The dataset's metric.
    mean, std : float or None
        Over folds on the test set, ``std`` with ddof 1; None where the test labels are not known.
    interval : (float, float) or None
        95 % bootstrap interval of ``mean`` over test groups.
    val_mean : float or None
        Mean validation score over folds: what may be used to choose between models.
    folds : tuple of FoldResult
    test_set : {"official", "local"}
    synthetic : bool
        The images are drawn, not taken.
    notes : tuple of str
        What a reader must know.
    class_names : tuple of str
    request : dict
        Everything that the result depends on.
    seconds : float
        Wall time.
    versions : dict
        Of the libraries that computed it.
    source : {"live", "snapshot"}
        Whether labels came from the dataset's own files or from the copy kept at extraction.
    """

    id: str
    kind: str
    dataset: str
    backbones: tuple[str, ...]
    head: str
    subset: str
    n_train: int
    n_val: int
    n_test: int
    labels_used: int
    metric: str
    mean: float | None
    std: float | None
    interval: tuple[float, float] | None
    val_mean: float | None
    folds: tuple[FoldResult, ...]
    test_set: str
    synthetic: bool
    notes: tuple[str, ...]
    class_names: tuple[str, ...]
    request: Mapping[str, Any]
    seconds: float
    versions: Mapping[str, str]
    source: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data, every field by its name."""
        return json.loads(json.dumps(asdict(self), allow_nan=False))  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ProbeResult:
        """The inverse of `to_json`.

        Raises
        ------
        ValueError
            A key is missing or unknown.
        """
        _same_keys(cls, data)
        for fold in data["folds"]:
            _same_keys(FoldResult, fold)
        tuples = {name: tuple(data[name]) for name in ("backbones", "notes", "class_names")}
        bounds = None if data["interval"] is None else (float(data["interval"][0]), float(data["interval"][1]))
        folds = tuple(FoldResult(**fold) for fold in data["folds"])
        return cls(**{**data, **tuples, "interval": bounds, "folds": folds})

    def __repr__(self) -> str:
        reached = "test labels not known" if self.mean is None else f"{self.mean:.4f} ± {self.std:.4f}"
        return (
            f"ProbeResult({self.dataset}, {' + '.join(self.backbones)}, {self.head}, {self.subset}: "
            f"{self.metric} {reached} over {len(self.folds)} folds, {self.labels_used} labels; id={self.id!r})"
        )


def run_id(request: Mapping[str, Any]) -> str:
    """Readable name of a run: head, subset and twelve digits of the SHA-256 of the canonical request."""
    text = json.dumps(request, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return f"{request['head']['name']}-{request['subset']}-{hashlib.sha256(text.encode('utf-8')).hexdigest()[:12]}"


def runs_dir(dataset: str, home: PathLike | None = None) -> Path:
    """Folder of a dataset's runs."""
    return home_dir(home) / slug(dataset) / "runs"


def save_run(
    result: ProbeResult,
    predictions: pd.DataFrame,
    heads: Sequence[Mapping[str, torch.Tensor]],
    home: PathLike | None = None,
) -> Path:
    """Write a run, whole or not at all, in place of one of the same id.

    Parameters
    ----------
    result : ProbeResult
        Goes into ``result.json``.
    predictions : DataFrame
        Columns ``id, label, fold, p_0 … p_C-1``.
    heads : sequence of dict of Tensor
        Parameters of each fold's head.
    home : path, optional
        Folder of stores and runs.

    Returns
    -------
    Path
        The run's folder.
    """
    folder = runs_dir(result.dataset, home)
    folder.mkdir(parents=True, exist_ok=True)
    staging = folder / f".{result.id}.{os.getpid()}.{secrets.token_hex(4)}"
    tensors = {f"fold{k}.{name}": p.contiguous().cpu() for k, head in enumerate(heads) for name, p in head.items()}
    files = {
        "predictions.parquet": predictions.to_parquet(index=False),
        "heads.safetensors": save_tensors(tensors, {"run": result.id}),
    }
    record = {name: {"size": len(data), "crc32c": crc32c(data)} for name, data in files.items()}
    files["result.json"] = seal({**result.to_json(), "files": record})
    try:
        staging.mkdir()
        for name, data in files.items():
            _write(staging / name, data)
        _sync(staging)
        _swap(staging, folder / result.id)
        _sync(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder / result.id


def find_run(id: str, dataset: str, home: PathLike | None = None) -> ProbeResult | None:
    """The saved result of this id; None where there is none, or where a file of it is not as it was written."""
    run = runs_dir(dataset, home) / id
    try:
        result = load_result(run)
        for name, record in _content(run)["files"].items():
            data = (run / name).read_bytes()
            if {"size": len(data), "crc32c": crc32c(data)} != record:
                return None
    except (OSError, StoreError):
        return None
    return result


def load_result(run: Path) -> ProbeResult:
    """Read the result of a run folder.

    Raises
    ------
    StoreError
        ``result.json`` is not a result of this version, or not that of its folder.
    """
    try:
        content = _content(run)
        content.pop("files")
        result = ProbeResult.from_json(content)
        if result.id != run.name or run_id(result.request) != run.name:
            raise ValueError(f"a request that hashes to {run_id(result.request)}")
    except (ValueError, KeyError, TypeError) as error:
        raise _bad_run(run / "result.json", error) from error
    return result


def _content(run: Path) -> dict[str, Any]:
    return unseal((run / "result.json").read_bytes(), run / "result.json", "delete the run's folder and probe again")


def load_predictions(run: Path) -> pd.DataFrame:
    """Test predictions of a run: ``id, label, fold, p_0 … p_C-1``; label −1 where it is not known."""
    try:
        return pd.read_parquet(run / "predictions.parquet")
    except (ValueError, OSError) as error:
        raise _bad_run(run / "predictions.parquet", error) from error


def load_heads(run: Path) -> list[dict[str, torch.Tensor]]:
    """Parameters of each fold's head of a run."""
    try:
        tensors = load_tensors((run / "heads.safetensors").read_bytes())
    except (SafetensorError, OSError) as error:
        raise _bad_run(run / "heads.safetensors", error) from error
    heads: list[dict[str, torch.Tensor]] = []
    for key in sorted(tensors):
        fold, _, name = key.partition(".")
        number = int(fold.removeprefix("fold"))
        while len(heads) <= number:
            heads.append({})
        heads[number][name] = tensors[key]
    return heads


def list_results(home: PathLike | None = None, dataset: str | None = None) -> list[ProbeResult]:
    """All saved results that can be read, by dataset, head, backbones and number of training images."""
    root = home_dir(home)
    everywhere = sorted(root.glob("*/runs")) if root.is_dir() else []
    folders = everywhere if dataset is None else [runs_dir(dataset, home)]
    found = [
        find_run_at(run)
        for folder in folders
        if folder.is_dir()
        for run in sorted(folder.iterdir())
        if not run.name.startswith(".") and run.is_dir()
    ]
    results = [result for result in found if result is not None]
    return sorted(results, key=lambda r: (r.dataset, r.kind, r.head, r.backbones, r.n_train, r.id))


def find_run_at(run: Path) -> ProbeResult | None:
    """The result of a run folder; None where it cannot be read."""
    try:
        return load_result(run)
    except (OSError, StoreError):
        return None


def as_asked(result: ProbeResult, source: str, notes: Sequence[str]) -> ProbeResult:
    """A reused result, told where its labels were read from this time, with the notes of this request."""
    return replace(result, source=source, notes=tuple(notes))


def _same_keys(cls: type, data: Mapping[str, Any]) -> None:
    expected = {field.name for field in fields(cls)}
    if set(data) != expected:
        raise ValueError(f"unknown keys {sorted(set(data) - expected)}, missing keys {sorted(expected - set(data))}")


def _bad_run(path: Path, error: Exception) -> StoreError:
    return StoreError(
        "a run's file cannot be read",
        expected="a file written by this version of embcache",
        found=str(error).split("\n")[0],
        where=path,
        fix="delete the run's folder and probe again",
    )


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(staging: Path, target: Path) -> None:
    """Put ``staging`` at ``target``; what was there goes to where ``staging`` was."""
    try:
        staging.rename(target)
    except OSError:
        if not target.exists():
            raise
        old = staging.with_name(staging.name + ".old")
        target.rename(old)
        staging.rename(target)
        shutil.rmtree(old, ignore_errors=True)
