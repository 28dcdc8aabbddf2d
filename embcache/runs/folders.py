"""The run folders that keep the results of probing and finetuning.

``<home>/<dataset>/runs/<id>/`` holds ``result.json`` with size and checksum of every file, ``predictions.parquet`` (one
row per test image and fold), ``heads.safetensors`` and what else belongs to the run. A run is written aside and renamed
into place. pandas, pyarrow and torch are imported by the functions that need them: listings do without.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from embcache.errors import StoreError, StoreNotFoundError
from embcache.io import discard, is_folder, list_replaced, read_regular, replace_file, replace_folder
from embcache.paths import PathLike, home_dir, home_folders, not_readable, skip, slug
from embcache.runs.result import PROTOCOL_VERSION as PROTOCOL_VERSION
from embcache.runs.result import FoldResult as FoldResult
from embcache.runs.result import Result as Result
from embcache.runs.result import run_id as run_id
from embcache.sealed import crc32c, file_checksum, open_parquet, read_sealed, seal, typed

if TYPE_CHECKING:
    import pandas as pd

PARTIAL = ".partial"  # suffix of the folders of checkpoints of finetunings

_FIX = "delete the run's folder and make the run again"


class _File(TypedDict):
    size: int
    crc32c: str


def runs_dir(dataset: str, home: PathLike | None = None) -> Path:
    """Folder of a dataset's runs."""
    return home_dir(home) / slug(dataset) / "runs"


def run_folders(home: PathLike | None = None, dataset: str | None = None, *, partial: bool = False) -> list[Path]:
    """Folders of runs that are in place, sorted; with ``partial`` those of checkpoints of finetunings."""
    found = []
    for folder in home_folders(home_dir(home)) if dataset is None else [home_dir(home) / slug(dataset)]:
        try:
            entries = list_replaced(folder / "runs")
        except OSError as error:
            if dataset is not None:
                raise not_readable(folder / "runs", error) from error
            skip(folder / "runs", error)
            continue
        for entry in entries:
            hidden = entry.name.startswith(".")
            wanted = hidden and entry.name.endswith(PARTIAL) if partial else not hidden
            found += [Path(entry.path)] if wanted and entry.is_dir(follow_symlinks=False) else []
    return found


def save_run(
    result: Result,
    predictions: pd.DataFrame,
    heads: Sequence[Mapping[str, Any]],
    home: PathLike | None = None,
    *,
    validation: pd.DataFrame | None = None,
    files: Mapping[str, bytes | Path] | None = None,
) -> Path:
    """Write a run, whole or not at all, in place of one of the same id. ``heads``: tensors by name, of each fold."""
    runs = runs_dir(result.dataset, home)
    if os.path.lexists(runs) and not is_folder(runs):
        raise StoreError(
            "the folder of a dataset's runs is not a real folder", code="folder-irregular",
            found="a link, or no folder", where=runs,
        )  # fmt: skip
    content: dict[str, bytes | Path] = {"predictions.parquet": predictions.to_parquet(index=False)}
    if validation is not None:
        content["validation.parquet"] = validation.to_parquet(index=False)
    if tensors := {f"fold{k}.{name}": p.contiguous().cpu() for k, head in enumerate(heads) for name, p in head.items()}:
        from safetensors.torch import save

        content["heads.safetensors"] = save(tensors, {"run": result.id})
    content |= files or {}
    record = {
        name: file_checksum(data) if isinstance(data, Path) else {"size": len(data), "crc32c": crc32c(data)}
        for name, data in content.items()
    }
    replace_folder(runs / result.id, {**content, "result.json": seal({**result.to_json(), "files": record})})
    for data in content.values():
        if isinstance(data, Path):
            discard(data)
    return runs / result.id


def replace_result(run: Path, result: Result) -> None:
    """Write ``result.json`` of a run anew; its other files stay as they are."""
    replace_file(run / "result.json", seal({**result.to_json(), "files": _content(run)["files"]}))


def find_run(id: str, dataset: str, home: PathLike | None = None) -> Result | None:
    """The saved result of this id; None where there is none, or where a file of it is not as it was written."""
    run = runs_dir(dataset, home) / id
    try:
        result = load_result(run)
        intact = all(file_checksum(run / name) == record for name, record in _content(run)["files"].items())
    except (OSError, StoreError):
        return None
    return result if intact else None


def find_run_anywhere(id: str, home: PathLike | None = None) -> tuple[Result, Path]:
    """A saved result of any dataset and its folder, by its id, its digits, or a prefix of either."""
    runs = {run.name: run for run in run_folders(home)}
    fits = [id] if id in runs else [n for n in runs if id and (n.startswith(id) or n.rpartition("-")[2].startswith(id))]
    if len(fits) > 1:  # those that cannot be read are not meant, unless there are no others
        fits = [name for name in fits if _readable(runs[name]) is not None] or fits[:1]
    if len(fits) != 1:
        readable = [name for name, run in runs.items() if _readable(run) is not None] if not fits else []
        near = fits or difflib.get_close_matches(id, readable, n=5, cutoff=0.4) or readable
        raise StoreNotFoundError(
            f"{len(fits)} runs match this id" if fits else "there is no such run",
            code="several-runs" if fits else "run-not-found",
            expected=", ".join(near[:8]) + (" …" if len(near) > 8 else "") if near else "a run; none is saved yet",
            found=repr(id), where=home_dir(home), fix="embcache results",
        )  # fmt: skip
    return load_result(runs[fits[0]]), runs[fits[0]]


def load_result(run: Path) -> Result:
    """Read the result of a run folder."""
    try:
        content = _content(run)
        content.pop("files")
        if "estimate" not in content:
            raise KeyError("estimate")
        result = Result.from_json(content)
        if result.kind != "kaggle" and result.request.get("protocol") != PROTOCOL_VERSION:
            raise ValueError(f"protocol {result.request.get('protocol')}, not {PROTOCOL_VERSION}")
        if result.id != run.name or run_id(result.request) != run.name:
            raise ValueError(f"a request that hashes to {run_id(result.request)}")
    except (OSError, ValueError, KeyError) as error:
        raise _other_run(run, error) from error
    return result


def list_results(home: PathLike | None = None, dataset: str | None = None) -> list[Result]:
    """All saved results that can be read.

    Parameters
    ----------
    home : path, optional
        Folder of stores and runs. Default: ``$EMBCACHE_HOME`` or ``~/.cache/embcache``.
    dataset : str, optional
        Only results of this dataset.

    Returns
    -------
    list of Result
        By dataset, kind, head, backbones and number of training images; empty where there are none.
    """
    results = [result for run in run_folders(home, dataset) if (result := _readable(run)) is not None]
    return sorted(results, key=lambda r: (r.dataset, r.kind, r.head, r.backbones, r.n_train, r.id))


def list_unreadable(home: PathLike | None = None, dataset: str | None = None) -> list[Path]:
    """Run folders that `list_results` leaves out: made by another version of embcache, or damaged."""
    return [run for run in run_folders(home, dataset) if _readable(run) is None]


def _readable(run: Path) -> Result | None:
    try:
        return load_result(run)
    except (OSError, StoreError):
        return None


def load_predictions(run: Path, name: str = "predictions") -> pd.DataFrame:
    """Test predictions of a run: ``id, label, group, fold, p_0 …, logit_0 …``; label −1 where it is not known.

    Of findings there are ``label_0 …``; of a number ``label`` is NaN where it is not known, and ``prediction`` stands
    for probabilities.

    A fold whose training failed has no rows. ``name="validation"``: those of the rows that chose each model.
    """
    import pyarrow as pa

    path = run / f"{name}.parquet"
    try:
        table: pd.DataFrame = open_parquet(read_regular(run_file(run, path.name)))[1].to_pandas()
        result = Result.from_json({key: value for key, value in _content(run).items() if key != "files"})
        _check_predictions(table, len(result.class_names), len(result.folds), result.task.kind)
        return table
    except (pa.ArrowException, ValueError, OSError) as error:
        raise _bad_file(path, error) from error


def _check_predictions(table: pd.DataFrame, classes: int, folds: int, kind: str) -> None:
    """Raise a ValueError where predictions are not of their types: in a shared home any user may have written them."""
    logits = [f"logit_{c}" for c in range(classes)]
    labels = [f"label_{c}" for c in range(classes)] if kind == "findings" else ["label"]
    numbers = [name for name in table.columns if str(name).startswith(("p_", "logit_"))]
    if lacking := [name for name in ("id", "group", *labels, "fold", *logits) if name not in table]:
        raise ValueError(f"no column {lacking[0]!r}")
    for name in ("id", "group"):
        if not all(isinstance(value, str) for value in table[name].tolist()):
            raise ValueError(f"{name} is no text")
    most = 2 if kind == "findings" else classes
    whole = [(name, -1, most) for name in labels if kind != "number"]
    for name, low, high in (*whole, ("fold", 0, folds)):
        values = table[name].to_numpy()
        if values.dtype.kind not in "iu" or not ((values >= low) & (values < high)).all():
            raise ValueError(f"{name} is not a number from {low} to {high - 1}")
    if kind == "number" and (table["label"].dtype.kind != "f" or np.isinf(table["label"]).any()):
        raise ValueError("label is not a number")
    for name in numbers:
        values = table[name].to_numpy()
        if values.dtype.kind != "f" or not np.isfinite(values).all():
            raise ValueError(f"{name} is not a finite number")


def load_heads(run: Path) -> list[dict[str, Any]]:
    """Parameters of each fold's head of a run, as torch tensors; empty for a fold whose training failed."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = run / "heads.safetensors"
    try:
        tensors = load(read_regular(run_file(run, path.name)))
    except (SafetensorError, OSError, ValueError) as error:
        raise _bad_file(path, error) from error
    heads: list[dict[str, Any]] = [{} for _ in _content(run)["folds"]]
    for key in sorted(tensors):
        named = re.fullmatch(r"fold(\d{1,6})\.(.+)", key)
        if named is None or int(named[1]) >= len(heads):
            raise _bad_file(path, ValueError(f"a tensor called {key!r}"[:200]))
        heads[int(named[1])][named[2]] = tensors[key]
    return heads


def run_file(run: Path, name: str) -> Path:
    """The path of a file of a run, its bytes verified."""
    try:
        record = _content(run)["files"].get(name)
        if record is None or file_checksum(run / name) != record:
            raise ValueError("no such file was kept" if record is None else "bytes with another checksum")
    except (ValueError, OSError) as error:
        raise _bad_file(run / name, error) from error
    return run / name


def _content(run: Path) -> dict[str, Any]:
    """``result.json`` of a run that lies in real folders, with a checked ``files``."""
    try:
        if not (is_folder(run) and is_folder(run.parent)):
            raise FileNotFoundError
        content = read_sealed(run / "result.json", _FIX)
        files: Mapping[str, _File] = typed(Mapping[str, _File], content["files"], "files")
        if outside := [name for name in files if Path(name).name != name]:
            raise ValueError(f"a file called {outside[0]!r}"[:200])
        typed(list[Any], content["folds"], "folds")
        typed(list[str], content["class_names"], "class_names")
    except (OSError, ValueError, StoreError, KeyError) as error:
        raise _other_run(run, error) from error
    return content


def _other_run(run: Path, error: Exception) -> StoreError:
    cause = error.__cause__ if isinstance(error, StoreError) else error
    found = (error.found if isinstance(error, StoreError) else None) or str(error).split("\n")[0]
    if isinstance(cause, KeyError | FileNotFoundError):
        found = f"no entry {cause}" if isinstance(cause, KeyError) else "no such file"
    return StoreError(
        "a run was made by another version of embcache, or is damaged", code="run-not-readable",
        expected="a result.json that this version wrote", found=found, where=run / "result.json",
        fix="make the run again, which replaces one of the same id",
    )  # fmt: skip


def _bad_file(path: Path, error: Exception) -> StoreError:
    return StoreError(
        "a file of a run cannot be read", code="run-file-damaged",
        expected="a file written by this version of embcache", found=str(error).split("\n")[0], where=path, fix=_FIX,
    )  # fmt: skip
