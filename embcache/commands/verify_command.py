"""``embcache verify``: every byte of what is cached against what was committed, and mending what is damaged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embcache.commands.options import (
    AllowMissingOption,
    BackboneOption,
    DataRootOption,
    DatasetOption,
    HomeOption,
    JsonOption,
    MaxPixelsOption,
    NameOption,
    RecipeOption,
    split_list,
    write_json,
)
from embcache.commands.output import echo
from embcache.commands.progress import ProgressBar
from embcache.commands.store_command import size_words
from embcache.commands.table import one_line, print_table
from embcache.config import parse_weights
from embcache.errors import EmbcacheError, StoreError, StoreNotFoundError, UsageError, printable
from embcache.io import skip
from embcache.paths import PathLike, home_dir, slug

if TYPE_CHECKING:
    from embcache.data.dataset import ImageDataset
    from embcache.maintain.verify import Damage, StoreCheck

WeightsOption = Annotated[
    list[str] | None,
    typer.Option("--weights", metavar="[NAME=]FILE", help="Checkpoint; NAME= may be left out for one backbone."),
]

_KINDS = {"recipe": "damaged recipe", "plan": "damaged plan", "shard": "damaged", "extra": "too much"}
_SHOWN = 20  # lines of damage of one store


def verify(
    backbone: BackboneOption = None,
    dataset: DatasetOption = None,
    recipe: RecipeOption = None,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Mend what is damaged: only damaged shards are computed again, from the images."),
    ] = False,
    source: Annotated[
        bool, typer.Option("--source", help="Hash the images again: which changed or went since they were extracted?")
    ] = False,
    sample: Annotated[
        int, typer.Option("--sample", metavar="N", min=0, help="Compute N random rows again and compare them.")
    ] = 0,
    data_root: DataRootOption = None,
    weights: WeightsOption = None,
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="For --repair and --sample: auto, cpu, cuda:0, …")
    ] = "auto",
    home: HomeOption = None,
    allow_missing: AllowMissingOption = False,
    name: NameOption = None,
    max_pixels: MaxPixelsOption = None,
    json: JsonOption = None,
) -> None:
    """Read every byte of what is cached and compare it with what was committed.

    Names each damaged file with its shard and rows; without options, of every store. Checked are the recipe, the
    plans, the shards and the dataset's snapshot. Exit status 0: all is well; 1: something
    is damaged, or still is after --repair.

    --repair first sees that the images and weights are here and that the recipe made now is the store's, then computes
    just the damaged shards. --source and --sample need the images too, --sample the weights.

    Example: embcache verify --repair --dataset nih --backbone dino
    """
    backbones, datasets = split_list(backbone), split_list(dataset)
    if len(datasets) > 1 and (data_root or name):
        raise UsageError(
            "--data-root and --name belong to one dataset", found=", ".join(datasets), fix="one command a dataset"
        )
    if (data_root or name) and not datasets:
        raise UsageError("--data-root and --name need a dataset", fix="embcache verify --dataset NAME --data-root …")
    from embcache.maintain.verify import find_stores, verify_store

    loaders = {each: _Loader(each, data_root, home, allow_missing, name) for each in datasets}
    unread: list[dict[str, str]] = []

    def not_read(path: PathLike, error: OSError | StoreError) -> None:
        skip(path, error)
        unread.append({"path": str(path), "error": str(error)})

    stores = [
        path
        for each in (datasets or (None,))
        for path in find_stores(home, each and loaders[each].folder(), backbones, recipe, not_read)
    ]
    if not stores and not unread:
        asked = [*(f"--dataset {each}" for each in datasets), *(f"--backbone {each}" for each in backbones)]
        asked += [f"--recipe {recipe}"] if recipe else []
        raise StoreNotFoundError(
            "nothing is cached" + (f" for {' '.join(asked)}" if asked else ""), where=home_dir(home), fix="embcache ls"
        )
    given = parse_weights(weights or (), backbones or None)
    by_folder = {slug(loader.folder()): loader for loader in loaders.values()}
    answers: list[dict[str, Any]] = []
    failed = False
    quiet = json == "-"
    with ProgressBar("shard") as bar:
        # Pixels first: mending features may read them.
        for path in sorted(stores, key=lambda path: (path.parent.name, not path.name.startswith("pixels-"), path.name)):
            label = f"{path.parent.name}/{path.name}"
            try:
                check = verify_store(path, lambda done, total, label=label: bar.update(done, total, label))  # type: ignore[misc]
            except StoreError as error:
                not_read(path, error)
                continue
            load = by_folder.setdefault(path.parent.name, _Loader(path.parent.name, None, home, allow_missing, None))
            answer, well = _one_store(
                check,
                load,
                repair=repair,
                source=source,
                sample=sample,
                options={"home": home, "weights": given, "device": device, "max_pixels": max_pixels},
                tell=(lambda line: echo(line, err=True)) if quiet else echo,
            )
            answers.append(answer)
            failed |= not well
    told = "\n".join(a["repaired"]["error"] or "" for a in answers if a["repaired"])
    snapshots = _check_snapshots({path.parent for path in stores}, by_folder, home, repair, quiet, told)
    failed |= bool(unread) or any(row["problem"] for row in snapshots)
    if json:
        write_json({"well": not failed, "stores": answers, "snapshots": snapshots, "unread": unread}, json)
    if not quiet:
        _conclude(answers)
    if failed:
        raise typer.Exit(1)


class _Loader:
    """A dataset, loaded when it is first needed."""

    def __init__(
        self, dataset: str, root: Path | None, home: Path | None, allow_missing: bool, name: str | None
    ) -> None:
        self._dataset, self._root, self._home = dataset, root, home
        self.allow_missing, self._name = allow_missing, name
        self._loaded: ImageDataset | None = None

    def folder(self) -> str:
        """What names the folder of its stores."""
        if self._name is not None:
            return self._name
        if self._root is None or (home_dir(self._home) / slug(self._dataset)).is_dir():
            return self._dataset
        return self.load().name

    def load(self) -> ImageDataset:
        """The dataset with its images where they are here."""
        from embcache.data.dataset import find_dataset

        if self._loaded is None:
            self._loaded, _ = find_dataset(
                self._dataset,
                root=self._root,
                home=self._home,
                allow_missing=self.allow_missing,
                dataset_name=self._name,
            )
        return self._loaded


def _one_store(
    check: StoreCheck,
    loader: _Loader,
    *,
    repair: bool,
    source: bool,
    sample: int,
    options: dict[str, Any],
    tell: Callable[[str], object],
) -> tuple[dict[str, Any], bool]:
    """Report on a store, and mend it where asked; its JSON, and whether all is well."""
    _tell_check(check, repair, tell)
    answer, well = check.to_json(), not check.damage
    answer["repaired"] = None
    if repair:
        from embcache.maintain.repair import repair_store

        if check.damage:
            done: list[str] = []

            def say(line: str) -> None:
                done.append(line)
                tell(f"  {one_line(line)}")

            try:
                with ProgressBar("img") as bar:
                    after = repair_store(
                        check,
                        loader.load,
                        allow_missing=loader.allow_missing,
                        say=say,
                        on_rows=lambda n, total: bar.update(n, total, f"repair {check.path.name}"),
                        **options,
                    )
            except EmbcacheError as error:
                echo(f"embcache: {check.dataset}/{check.path.name}: {error}", err=True)
                answer["repaired"] = {"done": done, "left": answer["damage"], "error": str(error)}
                return answer, False
            well = not after.damage
            answer = after.to_json() | {"damage": answer["damage"]}
            answer["repaired"] = {"done": done, "left": [each.to_json() for each in after.damage], "error": None}
            tell("  mended: every file is as it should be" if well else "  damage is left:")
            for note in after.notes:
                tell(f"  note: {one_line(note)}")
            _tell_damage(check.path, after.damage, tell)
    if (source or sample) and not well:
        tell("  --source and --sample wait until the store is mended")
        return answer, False
    if source:
        well &= _tell_source(answer, check, loader, tell)
    if sample:
        well &= _tell_sample(answer, check, loader, sample, options, tell)
    return answer, well


def _tell_check(check: StoreCheck, repair: bool, tell: Callable[[str], object]) -> None:
    from embcache.store.reading import recipe_fix, repair_command

    state = f"{len(check.damage)} damaged" if check.damage else "well"
    left = f", {check.planned:,} rows planned and not computed yet" if check.planned else ""
    tell(
        f"{check.dataset}/{check.path.name}: {state}; {check.shards:,} shards, {check.rows:,} rows, "
        f"{check.files:,} files, {size_words(check.bytes)} read{left}"
    )
    _tell_damage(check.path, check.damage, tell)
    if check.damage and not repair:
        recipe = any(each.kind == "recipe" for each in check.damage)
        tell(f"  try: {recipe_fix(check.path) if recipe else repair_command(check.path)}")
    for note in () if repair and check.damage else check.notes:
        tell(f"  note: {one_line(note)}")


def _tell_damage(store: Path, damage: Sequence[Damage], tell: Callable[[str], object]) -> None:
    for each in damage[:_SHOWN]:
        place = each.path.relative_to(store) if each.path.is_relative_to(store) else each.path
        tell(f"  {_KINDS[each.kind]}: {one_line(str(place))}: {one_line(each.problem)}")
        if each.rows is not None:
            run = each.rows
            tell(
                f"    shard {each.shard}, rows {run.first}-{run.last}: {run.count:,} images, {run.first_id!r} "
                f"… {run.last_id!r}"
            )
        elif each.shard is not None:
            tell(f"    shard {each.shard}")
    if len(damage) > _SHOWN:
        tell(f"  … and {len(damage) - _SHOWN} more (--json - lists all)")


def _tell_source(answer: dict[str, Any], check: StoreCheck, loader: _Loader, tell: Callable[[str], object]) -> bool:
    from embcache.maintain.verify import check_source
    from embcache.store.feature_store import FeatureStore, extract_command

    dataset = loader.load()
    store = FeatureStore(check.path)
    with ProgressBar("img") as bar:
        found = check_source(store, dataset, lambda n, total: bar.update(n, total, "source"))
    answer["source"] = found.to_json()
    tell(f"  source: {found.checked:,} images hashed, {len(found.changed)} changed, {len(found.missing)} missing")
    for kind in ("changed", "missing"):
        ids = answer["source"][kind]
        for id_ in ids[:5]:
            tell(f"    {kind}: {one_line(id_)}")
        if len(ids) > 5:
            tell(f"    … and {len(ids) - 5} more {kind}")
    if found.removed:
        tell(f"    {found.removed:,} rows of images that the dataset has no more: hidden")
    if found.changed and not store.holds_pixels:
        tell(f"    their features are of other bytes: {extract_command(store.recipe.backbone, dataset)}")
    return found.well


def _tell_sample(
    answer: dict[str, Any],
    check: StoreCheck,
    loader: _Loader,
    number: int,
    options: dict[str, Any],
    tell: Callable[[str], object],
) -> bool:
    from embcache.maintain.rebuild import check_sample

    found = check_sample(check.path, loader.load(), number, **options)
    answer["sample"] = found.to_json()
    verdict = "within" if found.difference <= found.tolerance else "BEYOND"
    worst = f" ({printable(found.worst)})" if found.worst else ""
    tell(
        f"  sample: {found.compared:,} images computed again; largest difference {found.difference:.1e}{worst}, "
        f"{verdict} the tolerance of {found.tolerance:.1e}"
    )
    for label, ids in (("changed since, left out", found.changed), ("cannot be read any more", found.unreadable)):
        if ids:
            tell(f"    {label}: {len(ids):,} (first: {printable(ids[0])})")
    return found.well


def _check_snapshots(
    folders: set[Path], loaders: dict[str, _Loader], home: Path | None, repair: bool, quiet: bool, told: str
) -> list[dict[str, Any]]:
    """The datasets' snapshots: probing reads them where the images are not here."""
    from embcache.data.dataset import read_snapshot
    from embcache.errors import DatasetError
    from embcache.store.commit import write_snapshot

    rows = []
    for folder in sorted(folders):
        path, problem, mended = folder / "dataset.parquet", "", False
        try:
            if read_snapshot(folder.name, home) is None:
                problem = "it is missing"
        except DatasetError as error:
            problem = f"{error.problem}: {error.found}"
        if problem and repair:
            try:
                dataset = loaders[folder.name].load()
                if slug(dataset.name) == folder.name and dataset.root is not None:
                    write_snapshot(folder, dataset.to_parquet_bytes())
                    mended = True
            except EmbcacheError as error:
                if str(error) not in told:
                    echo(f"embcache: {error}", err=True)
        if problem and not quiet:
            fix = "written anew" if mended else "embcache verify --repair --dataset NAME --data-root FOLDER mends it"
            echo(f"snapshot: {path}: {problem}; {fix}")
        rows.append({"path": str(path), "problem": "" if mended else problem, "repaired": mended})
    return rows


def _conclude(answers: Sequence[dict[str, Any]]) -> None:
    rows = [
        [a["dataset"], a["backbone"], a["fingerprint"], a["shards"], a["rows"], len(_left(a)) or "well"]
        for a in answers
    ]
    print_table(["dataset", "backbone", "recipe", "shards", "rows", "damage"], rows)


def _left(answer: dict[str, Any]) -> list[Any]:
    return list(answer["repaired"]["left"] if answer["repaired"] else answer["damage"])
