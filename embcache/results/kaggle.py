"""Competitions: files to submit, one per fold, and the leaderboard's scores as a result (Section A).

The official test labels of aptos and Kaggle's patchcam are not public. A run made with ``--test official`` keeps
predictions of those images; `make_submission` writes them as the competition wants them, and `save_kaggle_scores`
takes the private and public scores that came back.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from embcache.config import DatasetRef
from embcache.data.classes import class_words
from embcache.data.dataset import ImageDataset, find_dataset
from embcache.data.tables import read_table
from embcache.errors import ProtocolError, UsageError
from embcache.io import write_output
from embcache.paths import PathLike
from embcache.results.curves import request_flags
from embcache.results.layout import csv_text
from embcache.runs.folders import Result, find_run_anywhere, load_predictions, run_id, save_run
from embcache.store.feature_store import list_stores


@dataclass(frozen=True)
class Competition:
    """The format of one competition's submissions."""

    slug: str  # its name at Kaggle
    id_column: str
    value_column: str
    hard: bool  # it takes the most probable class as a number, not the probability of class 1


COMPETITIONS: Mapping[str, Competition] = {
    "aptos": Competition("aptos2019-blindness-detection", "id_code", "diagnosis", hard=True),
    "patchcam": Competition("histopathologic-cancer-detection", "id", "label", hard=False),
}
SAMPLE = "sample_submission.csv"


@dataclass(frozen=True)
class Submission:
    """Files to submit."""

    run: str
    competition: str
    files: tuple[Path, ...]  # one per fold
    folds: tuple[int, ...]  # the fold of each file
    rows: int  # of each file, without its header
    filled: Mapping[str, str]  # IDs without a prediction, with the reason
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data, every field by its name."""
        return {**asdict(self), "files": [str(file) for file in self.files]}


def make_submission(
    run: str, output: PathLike | None = None, *, ref: DatasetRef = DatasetRef(), home: PathLike | None = None
) -> Submission:
    """Write the files that a competition takes, one per fold, with all IDs of its sample submission in their order."""
    result, folder = find_run_anywhere(run, home)
    ds, _ = find_dataset(result.dataset, ref, home=home)
    competition = _competition(result, ds)
    ids, notes = _ids_in_order(ds, competition)
    table = load_predictions(folder)
    tested = set(table["id"].tolist())
    known, labels = set(ds.table["id"]), ds.labels[ds.labels >= 0]
    filled = {
        i: "no prediction of it was kept" if i in known else "the image is missing" for i in ids if i not in tested
    }
    for store in list_stores(home, ds.name) if filled else ():
        filled |= {i: why for i, why in store.quarantined.items() if i in filled}
    # An image without a prediction gets the value of all labeled images, however the subset was balanced.
    prior = str(int(np.bincount(labels).argmax())) if competition.hard else repr(float((labels == 1).mean()))
    texts: dict[int, str] = {}
    for fold, rows in table.groupby("fold", sort=True):
        chances = rows[[c for c in rows.columns if c.startswith("p_")]].to_numpy(dtype=np.float64)
        own = [str(int(p.argmax())) if competition.hard else repr(float(p[1])) for p in chances]
        values = dict(zip(rows["id"].tolist(), own, strict=True))
        lines = [[image, values.get(image, prior)] for image in ids]
        texts[int(str(fold))] = csv_text([competition.id_column, competition.value_column], lines, guard=False)
    surplus = tested - set(ids)
    if surplus:
        notes.append(f"{len(surplus):,} test images are not in {SAMPLE} and are left out: {min(surplus)} …")
    notes += [f"fold {f.fold} diverged and has no file" for f in result.folds if f.fold not in texts]
    target = Path(output if output is not None else f"submission-{result.id}").expanduser()
    files = [write_output(target / f"{result.id}-fold{fold}.csv", text, parents=True) for fold, text in texts.items()]
    return Submission(result.id, competition.slug, tuple(files), tuple(texts), len(ids), filled, tuple(notes))


def save_kaggle_scores(
    run: str, scores: Sequence[tuple[float, float]], *, ref: DatasetRef = DatasetRef(), home: PathLike | None = None
) -> Result:
    """A result of kind ``kaggle`` from the scores that a leaderboard gave each fold's file.

    Its request contains that of the run, so that a table knows which cell it fits.

    The score of a fold is α · private + (1 − α) · public, α being the share of the test images behind the private
    score (0.85 for aptos, 0.51 for patchcam). Scores replace those given before.
    """
    result, folder = find_run_anywhere(run, home)
    ds, _ = find_dataset(result.dataset, ref, home=home)
    competition = _competition(result, ds)
    alpha = float(ds.leaderboard_alpha or math.nan)
    submitted = [fold for fold in result.folds if not fold.failed]
    if len(scores) != len(submitted):
        raise UsageError(
            f"run {result.id} has {len(submitted)} folds, so as many files were submitted", code="score-count",
            expected=f"{len(submitted)} × --score PRIVATE/PUBLIC, in the order of the folds",
            found=str(len(scores)),
            fix=f"embcache kaggle-score --run {result.id} " + " ".join(["--score 0.90/0.89"] * len(submitted)),
        )  # fmt: skip
    lowest = -1.0 if competition.hard else 0.0  # kappa may be negative
    wrong = [pair for pair in scores if not all(math.isfinite(s) and lowest <= s <= 1 for s in pair)]
    if wrong:
        raise UsageError("not a score", code="option-bounds", expected=f"numbers from {lowest:g} to 1",
                         found=f"{wrong[0][0]}/{wrong[0][1]}", where="--score")  # fmt: skip
    averages = [alpha * private + (1 - alpha) * public for private, public in scores]
    folds = tuple(
        replace(fold, score=average, metrics={"score": average, "private": float(private), "public": float(public)})
        for fold, (private, public), average in zip(submitted, scores, averages, strict=True)
    )
    request = {
        "kind": "kaggle", "run": result.id, "of": dict(result.request), "competition": competition.slug, "alpha": alpha,
        "head": dict(result.request["head"]), "subset": result.subset,
    }  # fmt: skip
    note = f"leaderboard of {competition.slug}: {alpha:g} · private + {1 - alpha:g} · public of each fold"
    kept = [n for n in result.notes if "predictions are kept, not scored" not in n]
    std = float(np.std(averages, ddof=1)) if len(averages) > 1 else None
    scored = replace(
        result, id=run_id(request), kind="kaggle", mean=float(np.mean(averages)), std=std, interval=None, folds=folds,
        notes=(*kept, note), request=request,
    )  # fmt: skip
    save_run(scored, load_predictions(folder), [], home)
    return scored


def read_score(text: str) -> tuple[float, float]:
    """Private and public score from ``PRIVATE/PUBLIC``."""
    try:
        private, public = text.split("/")
        return float(private), float(public)
    except ValueError as error:
        raise UsageError("not a pair of scores", code="not-a-number", expected="PRIVATE/PUBLIC, such as 0.913/0.902",
                         found=repr(text), where="--score") from error  # fmt: skip


def _competition(result: Result, ds: ImageDataset) -> Competition:
    if ds.layout not in COMPETITIONS or ds.leaderboard_alpha is None:
        what = "the original PatchCamelyon release" if ds.layout == "patchcam" else ds.name
        raise UsageError(
            f"there is no competition for {what}", code="no-competition",
            expected="a run on " + " or ".join(f"{name} ({c.slug})" for name, c in COMPETITIONS.items()),
            found=f"{result.id} on {ds.name}",
        )  # fmt: skip
    classes = class_words(result.request.get("classes", {}))
    classes = classes or (f"a target of kind {result.task.kind}" if result.task.kind in ("findings", "number") else "")
    if result.target or classes or result.kind == "kaggle":
        other = f"probe of the column {result.target!r}" if result.target else classes or result.kind
        raise UsageError(
            "only a run that predicts the competition's own labels can be submitted", code="other-classes",
            found=f"{result.id}: {other}", fix=f"--run {result.request.get('run', 'RUN')}",
        )  # fmt: skip
    if result.test_set != "official":
        raise UsageError(
            "the run was not made for the leaderboard: its test images are a fifth of the labeled ones",
            code="local-test", expected="a run with --test official", found=f"{result.id}, test set {result.test_set}",
            fix=official_command(result),
        )  # fmt: skip
    return COMPETITIONS[ds.layout]


def official_command(result: Result) -> str:
    """The command that makes the same run for the leaderboard, as far as its request says."""
    words = ["embcache", result.kind, "--dataset", result.dataset, "--head", result.head, "--subset", result.subset]
    words += ["--backbone", ",".join(result.backbones), "--test", "official"]
    return shlex.join([*words, *request_flags(result)])


def _ids_in_order(ds: ImageDataset, competition: Competition) -> tuple[list[str], list[str]]:
    """IDs of the sample submission in its order; the dataset's own order, and a note, where the file is missing."""
    path = ds.root / SAMPLE if ds.root is not None else None
    if path is not None and path.is_file():
        ids: list[str] = read_table(path, [competition.id_column])[competition.id_column].tolist()
        if len(set(ids)) < len(ids):
            raise ProtocolError("the sample submission repeats an ID", code="repeated-id", where=path,
                                fix="download it again")  # fmt: skip
        return ids, []
    ids = ds.table.loc[ds.table["split"] == "test", "id"].tolist()
    return ids, [f"{SAMPLE} is missing ({path}): the order is that of the dataset's test images"]
