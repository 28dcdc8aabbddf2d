"""Where runs lie in a home; read without torch, which results need."""

from __future__ import annotations

import os
from pathlib import Path

from embcache.errors import StoreError
from embcache.io import IrregularError, home_folders, is_folder, list_replaced, not_readable, skip
from embcache.paths import PathLike, home_dir, slug

PARTIAL = ".partial"


def runs_dir(dataset: str, home: PathLike | None = None) -> Path:
    """Folder of a dataset's runs."""
    return home_dir(home) / slug(dataset) / "runs"


def real_runs_dir(dataset: str, home: PathLike | None = None) -> Path:
    """`runs_dir`, to be written to."""
    folder = runs_dir(dataset, home)
    if os.path.lexists(folder) and not is_folder(folder):
        error = IrregularError(0, "a link, or no folder")
        raise StoreError("the folder of a dataset's runs is not a real folder", found=error.strerror, where=folder)
    return folder


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
