"""Questions to whatever is cached: which datasets and backbones there are, and probes, splits over them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embcache.config import DatasetRef
from embcache.data.classes import ClassOptions, retarget
from embcache.data.dataset import ImageDataset, find_dataset, read_snapshot
from embcache.errors import DatasetError, StoreNotFoundError, UsageError
from embcache.io import skip
from embcache.paths import PathLike, home_dir, slug
from embcache.probe.heads import Head, make_head
from embcache.probe.inputs import plan_for
from embcache.probe.probe import Progress, probe_grid
from embcache.probe.splits import Splits, write_splits
from embcache.runs.folders import ProbeResult
from embcache.store.feature_store import FeatureStore, extract_command, list_stores

PAPER_SET = ("simclr", "swav", "dino")
"""What a fusing head fuses where nobody says otherwise (Section 5.6)."""


def probe_cached(
    datasets: Sequence[str] | None = None,
    backbones: Sequence[str] | None = None,
    *,
    head: str = "linear",
    data_root: PathLike | None = None,
    home: PathLike | None = None,
    allow_missing: bool = False,
    dataset_name: str | None = None,
    splits: str | None = None,
    target: str | None = None,
    classes: ClassOptions = ClassOptions(),
    columns: DatasetRef = DatasetRef(),
    say: Callable[[str], Any] = lambda line: None,
    progress: Progress | None = None,
    **options: Any,
) -> list[ProbeResult]:
    """Probe datasets by name, by default every one whose features are cached.

    Parameters
    ----------
    datasets : sequence of str, optional
        Default: all that have the asked backbones cached.
    backbones : sequence of str, optional
        A head that takes one gives a result for each (default: all that are cached); one that fuses takes them together
        (default: simclr, swav, dino).
    head : str
        A name that ``embcache heads`` lists.
    data_root : path, optional
        The folder of the one dataset named.
    home : path, optional
        Folder of stores and runs.
    allow_missing : bool
        Go on without images that the labels name but are not there.
    dataset_name : str, optional
        Name that a ``folder`` dataset was extracted under, where ``data_root`` says which.
    splits : str, optional
        A splits file, or the name of an imported one.
    target : str, optional
        A column of each dataset's table to tell apart instead of the labels.
    classes : ClassOptions
        Classes to drop or merge, of the labels or the target.
    columns : DatasetRef
        The columns of a table to read; default: those that extraction read.
    say : callable
        Told what was left out or chosen, a line at a time.
    progress : callable, optional
        See `embcache.probe.probe.Progress`.
    **options
        See `embcache.probe.options.ProbeOptions`, and ``subsets``.

    Returns
    -------
    list of ProbeResult
        For each dataset each set of backbones each subset; those of the same images once.

    Raises
    ------
    StoreNotFoundError
        Nothing is cached that fits.
    UsageError
        ``data_root`` or ``splits`` with several datasets; or as `probe_grid`.
    """
    model, views = make_head(head), options.get("views")
    names = list(datasets) if datasets else _datasets_with(model, backbones, home, views, say)
    if len(names) > 1 and any(given is not None for given in (data_root, splits, dataset_name)):
        raise UsageError(
            "--data-root, --name and --splits are for one dataset", found=", ".join(names), fix="--dataset NAME"
        )
    found = []
    for name in names:
        ds, source = find_dataset(
            name, root=data_root, home=home, allow_missing=allow_missing, dataset_name=dataset_name, columns=columns
        )
        found.append((classes.of(ds if target is None else retarget(ds, target)), source))
    results = []
    for ds, source in found:
        results += probe_grid(
            ds,
            _sets(model, backbones, ds, home, views),
            head=head,
            home=home,
            splits=None if splits is None else find_splits(splits, ds, home),
            source=source,
            progress=progress,
            **options,
        )
    return list({result.id: result for result in results}.values())


def cached_datasets(home: PathLike | None = None) -> list[str]:
    """Names of the datasets that have a feature store, sorted."""
    names = set()
    for folder in {store.path.parent for store in list_stores(home)}:
        try:
            snapshot = read_snapshot(folder.name, home)
        except DatasetError as error:
            skip(folder, error)
            continue
        names.add(folder.name if snapshot is None else snapshot.name)
    return sorted(names)


def cached_backbones(dataset: str, home: PathLike | None = None, views: int | None = None) -> list[str]:
    """Backbones whose vectors are cached for a dataset, sorted; of several ``views`` only those with so many."""
    fits = {
        store.recipe.backbone: None
        for store in list_stores(home, dataset)
        if (store.row_shape[:-1] == (views,) if views and views > 1 else len(store.row_shape) in (1, 2))
    }
    return sorted(fits)


def plan_cached(
    ds: ImageDataset, *, home: PathLike | None = None, backbone: str | None = None, **options: Any
) -> tuple[Splits, FeatureStore | None]:
    """The splits that a probe of ``ds`` would draw."""
    stores = [s for s in list_stores(home, ds.name) if backbone in (None, s.recipe.backbone)]
    if backbone is not None and not stores:
        raise StoreNotFoundError(
            f"no features of {backbone} are cached for {ds.name}",
            found=", ".join(cached_backbones(ds.name, home)) or "nothing cached for this dataset",
            where=home_dir(home) / slug(ds.name),
            fix="leave --backbone out",
        )
    store = stores[0].restrict(ds.table["id"]) if stores else None
    return plan_for(ds, [store] if store is not None else [], **options), store


@dataclass(frozen=True)
class ImportedSplits:
    """A splits file that was checked and kept."""

    name: str  # what ``--splits`` takes
    path: Path
    splits: Splits


def import_splits(file: Path, ds: ImageDataset, home: PathLike | None = None) -> ImportedSplits:
    """Check a splits file against a dataset and keep it under ``<home>/<dataset>/splits``."""
    splits, _ = plan_cached(ds, home=home, splits=file, subsets=())
    name = f"{file.stem}-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}"
    path = _splits_dir(ds, home) / f"{slug(name)}.json"
    write_splits(splits, path)
    return ImportedSplits(path.stem, path, splits)


def find_splits(name: str, ds: ImageDataset, home: PathLike | None = None) -> Path:
    """The splits file at path ``name``, or the imported one of that name."""
    imported = _splits_dir(ds, home) / f"{name}.json"
    if Path(name).expanduser().is_file():
        return Path(name).expanduser()
    if "/" not in name and imported.is_file():
        return imported
    known = sorted(path.stem for path in _splits_dir(ds, home).glob("*.json"))
    raise UsageError(
        "there is no such splits file",
        expected="a file" + (f", or one of {', '.join(known)}" if known else ""),
        found=name,
        where="--splits",
        fix=f"embcache splits export --dataset {ds.name} --output FILE",
    )


def _splits_dir(ds: ImageDataset, home: PathLike | None) -> Path:
    return home_dir(home) / slug(ds.name) / "splits"


def _sets(
    head: Head, backbones: Sequence[str] | None, ds: ImageDataset, home: PathLike | None, views: int | None
) -> list[list[str]]:
    """The sets of backbones that one result each is made of."""
    if head.fuses:
        cached = [] if backbones else cached_backbones(ds.name, home, views)
        if len(cached) > 1 and not set(PAPER_SET) <= set(cached):
            raise StoreNotFoundError(
                f"the set that {head.name} fuses by default is not cached for {ds.name}",
                expected=", ".join(PAPER_SET),
                found=", ".join(cached),
                fix=f"--backbone {','.join(cached)}, or {extract_command(','.join(PAPER_SET), ds, home)}",
            )
        return [list(backbones or PAPER_SET)]
    names = list(backbones) if backbones else cached_backbones(ds.name, home, views)
    if not names:
        several = views is not None and views > 1
        raise StoreNotFoundError(
            f"no features are cached for {ds.name}" + (f" with {views} views of each image" if several else ""),
            where=home_dir(home) / slug(ds.name),
            fix=extract_command("NAME", ds, home) + (f" --views {views}" if several else ""),
        )
    return [[name] for name in names]


def _datasets_with(
    head: Head,
    backbones: Sequence[str] | None,
    home: PathLike | None,
    views: int | None,
    say: Callable[[str], Any],
) -> list[str]:
    """Cached datasets that have every backbone the question needs; the others are told."""
    names = cached_datasets(home)
    if not names:
        raise StoreNotFoundError(
            "nothing is cached",
            where=home_dir(home),
            fix="embcache extract --backbone NAME --dataset NAME, or embcache demo",
        )
    wanted = set(backbones or (PAPER_SET if head.fuses else ()))
    cached = {name: cached_backbones(name, home, views) for name in names}
    lacking = {name: sorted(wanted - set(cached[name])) for name in names}
    chosen = [name for name in names if not lacking[name] and cached[name]]
    if not chosen:
        several = f" --views {views}" if views is not None and views > 1 else ""
        raise StoreNotFoundError(
            "no dataset has all of the asked backbones cached" + (f" with {views} views" if several else ""),
            expected=", ".join(sorted(wanted)) or "any backbone",
            found="; ".join(f"{name}: {', '.join(cached[name]) or 'none'}" for name in names),
            where=home_dir(home),
            fix=f"embcache extract --backbone {','.join(sorted(wanted)) or 'NAME'} --dataset NAME{several},"
            " or other --backbone names",
        )
    for name in names:
        if name not in chosen:
            say(f"{name} left out: {', '.join(lacking[name]) or 'no features'} not cached")
    return chosen
