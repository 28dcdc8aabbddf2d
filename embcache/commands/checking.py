"""``embcache verify`` and ``doctor``: what is damaged, and what this installation has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embcache.commands.cache import nothing_cached, size_words
from embcache.commands.options import (
    BackboneOption,
    DatasetOption,
    HomeOption,
    JsonOption,
    RecipeOption,
    Skip,
    split_list,
    takes_configs,
    write_json,
)
from embcache.commands.output import ProgressBar, echo, one_line, print_table
from embcache.config import DatasetRef, VerifyConfig
from embcache.errors import EmbcacheError, StoreError, UsageError, printable
from embcache.fields import parse_weights
from embcache.io import skip
from embcache.paths import home_dir, slug
from embcache.typed import plain

if TYPE_CHECKING:
    from embcache.data.dataset import ImageDataset
    from embcache.maintain.doctor import Diagnosis
    from embcache.maintain.verify import Damage, StoreCheck


_KINDS = {"recipe": "damaged recipe", "plan": "damaged plan", "shard": "damaged", "extra": "too much"}


_SHOWN = 20  # lines of damage of one store


Show = Callable[[str], object]


@takes_configs
def verify(
    backbone: BackboneOption = None,
    dataset: DatasetOption = None,
    recipe: RecipeOption = None,
    home: HomeOption = None,
    json: JsonOption = None,
    *,
    ref: Annotated[DatasetRef, Skip("drop_class", "merge_class", "target")],
    config: VerifyConfig,
) -> None:
    """Read every byte of what is cached and compare it with what was committed.

    Names each damaged file with its shard and rows; without options, of every store. The recipe, the plans, the shards
    and the dataset's snapshot are checked. Exit status 1 if something is damaged, or still is after --repair.

    --repair first checks that the images and weights are on this machine and that the recipe made now is the store's,
    then computes just the damaged shards. --source and --sample need the images too, --sample the weights.

    Example: embcache verify --repair --dataset nih --backbone dino
    """
    backbones, datasets = split_list(backbone), split_list(dataset)
    if len(datasets) != 1 and (ref.data_root or ref.name):
        raise UsageError(
            "--data-root and --name belong to one dataset", code="one-dataset",
            found=", ".join(datasets) or "no --dataset", fix="embcache verify --dataset NAME --data-root …",
        )  # fmt: skip
    from embcache.maintain.listing import walk_stores
    from embcache.maintain.verify import verify_store

    loaders = {name: _Loader(name, ref, home) for name in datasets}
    stores, unread = walk_stores(home, [loaders[name].folder() for name in datasets], backbones, recipe)
    if not stores and not unread:
        raise nothing_cached(backbones, datasets, recipe, home)
    quiet = json == "-"
    show: Show = (lambda line: echo(line, err=True)) if quiet else echo
    weights = parse_weights(list(config.weights), backbones or None) or {}
    report = _StoreReport(config.repair, config.source, config.sample, config, weights, home, show)
    by_folder = {slug(loader.folder()): loader for loader in loaders.values()}
    answers = list[dict[str, Any]]()
    with ProgressBar("shard") as bar:
        # Pixels first: repairing features may read them.
        for path in sorted(stores, key=lambda path: (path.parent.name, not path.name.startswith("pixels-"), path.name)):
            label = f"{path.parent.name}/{path.name}"
            try:
                check = verify_store(path, lambda done, total, label=label: bar.update(done, total, label))  # type: ignore[misc]
            except StoreError as error:
                skip(path, error)
                unread.append({"path": str(path), "error": str(error)})
                continue
            loader = by_folder.setdefault(
                path.parent.name, _Loader(path.parent.name, DatasetRef(allow_missing=ref.allow_missing), home)
            )
            answers.append(report.one_store(check, loader))
    reported = "\n".join(a["repaired"]["error"] or "" for a in answers if a["repaired"])
    folders = sorted({path.parent for path in stores})
    snapshots = [_check_snapshot(folder, by_folder, home, config.repair, reported) for folder in folders]
    for row in () if quiet else snapshots:
        if row["problem"] or row["repaired"]:
            fix = (
                "written again"
                if row["repaired"]
                else "try: embcache verify --repair --dataset NAME --data-root FOLDER"
            )
            echo(f"snapshot: {row['path']}: {row['problem'] or 'it was damaged'}; {fix}")
    well = [answer.pop("well") for answer in answers]
    failed = bool(unread) or not all(well) or any(row["problem"] for row in snapshots)
    if json:
        write_json({"well": not failed, "stores": answers, "snapshots": snapshots, "unread": unread}, json)
    if not quiet:
        left = [(a["repaired"] or {"left": a["damage"]})["left"] for a in answers]
        keys = ("dataset", "backbone", "fingerprint", "shards", "rows")
        rows = [[*(a[key] for key in keys), len(each) or "none"] for a, each in zip(answers, left, strict=True)]
        print_table(["dataset", "backbone", "recipe", "shards", "rows", "damage"], rows)
    if failed:
        raise typer.Exit(1)


class _Loader:
    """A dataset, loaded when it is first needed."""

    def __init__(self, dataset: str, ref: DatasetRef, home: Path | None) -> None:
        self.dataset, self.ref, self.home = dataset, ref, home
        self._loaded: ImageDataset | None = None

    def folder(self) -> str:
        """Name of the folder of its stores, before it is made a slug."""
        if self.ref.name is not None:
            return self.ref.name
        if self.ref.data_root is None or (home_dir(self.home) / slug(self.dataset)).is_dir():
            return self.dataset
        return self.load().name

    def load(self) -> ImageDataset:
        """The dataset, with its images where they are here."""
        from embcache.data.dataset import find_dataset

        if self._loaded is None:
            self._loaded, _ = find_dataset(self.dataset, self.ref, home=self.home)
        return self._loaded


@dataclass(frozen=True)
class _StoreReport:
    """What is done with each store."""

    repair: bool
    source: bool
    sample: int
    config: VerifyConfig
    weights: dict[str, Path]
    home: Path | None
    show: Show

    def one_store(self, check: StoreCheck, loader: _Loader) -> dict[str, Any]:
        """Report on a store, and repair it where asked; its JSON, with ``well``."""
        from embcache.store.reading import recipe_fix, repair_command

        state = f"{len(check.damage)} damaged" if check.damage else "no damage"
        left = f", {check.planned:,} rows planned and not computed yet" if check.planned else ""
        self.show(
            f"{check.dataset}/{check.path.name}: {state}; {check.shards:,} shards, {check.rows:,} rows, "
            f"{check.files:,} files, {size_words(check.bytes)} read{left}"
        )
        self._show_damage(check.path, check.damage)
        answer = {**plain(check), "repaired": None, "well": not check.damage}
        if check.damage and self.repair:
            answer = self._repair(check, loader, answer)
        else:
            if check.damage:
                recipe = any(each.kind == "recipe" for each in check.damage)
                self.show(f"  try: {recipe_fix(check.path) if recipe else repair_command(check.path)}")
            for note in check.notes:
                self.show(f"  note: {one_line(note)}")
        if (self.source or self.sample) and not answer["well"]:
            if not (answer["repaired"] and answer["repaired"]["error"]):
                self.show("  --source and --sample are skipped: the store is damaged")
            return answer
        if self.source:
            self._check_source(check, loader.load(), answer)
        if self.sample:
            self._check_sample(check, loader, answer)
        return answer

    def _repair(self, check: StoreCheck, loader: _Loader, answer: dict[str, Any]) -> dict[str, Any]:
        from embcache.maintain.repair import repair_store

        done = list[str]()
        try:
            with ProgressBar("img") as bar:
                after = repair_store(
                    check, loader.load, self._how(loader), done=done,
                    on_rows=lambda n, total: bar.update(n, total, f"repair {check.path.name}"),
                )  # fmt: skip
        except EmbcacheError as error:
            echo(f"embcache: {check.dataset}/{check.path.name}: {error}", err=True)
            return answer | {"repaired": {"done": done, "left": answer["damage"], "error": str(error)}}
        for line in done:
            self.show(f"  {one_line(line)}")
        self.show("  damage is left:" if after.damage else "  repaired: every file is as it should be")
        for note in after.notes:
            self.show(f"  note: {one_line(note)}")
        self._show_damage(check.path, after.damage)
        repaired = {"done": done, "left": plain(after.damage), "error": None}
        return {**plain(after), "damage": answer["damage"], "repaired": repaired, "well": not after.damage}

    def _how(self, loader: _Loader) -> Any:
        from embcache.maintain.repair import Rebuild

        return Rebuild(self.home, self.weights, self.config.device, self.config.max_pixels, loader.ref.allow_missing)

    def _show_damage(self, store: Path, damage: Sequence[Damage]) -> None:
        for each in damage[:_SHOWN]:
            place = each.path.relative_to(store) if each.path.is_relative_to(store) else each.path
            self.show(f"  {_KINDS[each.kind]}: {one_line(str(place))}: {one_line(each.problem)}")
            rows = "" if each.rows is None else (
                f", rows {each.rows.first}-{each.rows.last}: {each.rows.count:,} images, {each.rows.first_id!r} … "
                f"{each.rows.last_id!r}"
            )  # fmt: skip
            if each.shard is not None:
                self.show(f"    shard {each.shard}{rows}")
        if len(damage) > _SHOWN:
            self.show(f"  … and {len(damage) - _SHOWN} more (--json - lists all)")

    def _check_source(self, check: StoreCheck, dataset: ImageDataset, answer: dict[str, Any]) -> None:
        from embcache.maintain.verify import check_source
        from embcache.store.feature_store import FeatureStore, extract_command

        store = FeatureStore(check.path)
        with ProgressBar("img") as bar:
            found = check_source(store, dataset, lambda n, total: bar.update(n, total, "source"))
        answer["source"] = plain(found)
        self.show(
            f"  source: {found.checked:,} images hashed, {len(found.changed)} changed, {len(found.missing)} missing"
        )
        for label, ids in (("changed", found.changed), ("missing", found.missing)):
            for id_ in ids[:5]:
                self.show(f"    {label}: {one_line(id_)}")
            if len(ids) > 5:
                self.show(f"    … and {len(ids) - 5} more {label}")
        if found.removed:
            self.show(f"    {found.removed:,} rows of images that left the dataset: hidden")
        if found.changed and not store.holds_pixels:
            self.show(f"    their features are outdated; try: {extract_command(store.recipe.backbone, dataset)}")
        answer["well"] &= found.well

    def _check_sample(self, check: StoreCheck, loader: _Loader, answer: dict[str, Any]) -> None:
        from embcache.maintain.repair import check_sample

        found = check_sample(check.path, loader.load(), self.sample, self._how(loader))
        answer["sample"] = {**plain(found), "well": found.well}
        verdict = "within" if found.difference <= found.tolerance else "BEYOND"
        worst = f" ({printable(found.worst)})" if found.worst else ""
        self.show(
            f"  sample: {found.compared:,} images computed again; largest difference {found.difference:.1e}{worst}, "
            f"{verdict} the tolerance of {found.tolerance:.1e}"
        )
        for label, ids in (("changed since, left out", found.changed), ("no longer readable", found.unreadable)):
            if ids:
                self.show(f"    {label}: {len(ids):,} (first: {printable(ids[0])})")
        answer["well"] &= found.well


def _check_snapshot(
    folder: Path, loaders: dict[str, _Loader], home: Path | None, repair: bool, reported: str
) -> dict[str, Any]:
    """The snapshot of a dataset, which is read where the images are not here; written again with ``repair``."""
    from embcache.data.dataset import read_snapshot
    from embcache.errors import DatasetError
    from embcache.store.commit import write_snapshot

    path, problem, repaired = folder / "dataset.parquet", "", False
    try:
        if read_snapshot(folder.name, home) is None:
            problem = "it is missing"
    except DatasetError as error:
        problem = f"{error.problem}: {error.found}"
    if problem and repair and folder.name in loaders:
        try:
            dataset = loaders[folder.name].load()
            if slug(dataset.name) == folder.name and dataset.root is not None:
                write_snapshot(folder, dataset.to_parquet_bytes())
                problem, repaired = "", True
        except EmbcacheError as error:
            if str(error) not in reported:
                echo(f"embcache: {error}", err=True)
    return {"path": str(path), "problem": problem, "repaired": repaired}


def doctor(home: HomeOption = None, json: JsonOption = None) -> None:
    """Describe this installation for a bug report, and list what is wrong with it.

    Versions, processor features, devices and the speed they reach, room on the disk against what the stores still
    owe, weights and datasets found, stale leases, interrupted runs, and stores that fail a quick check (headers, plans
    and sizes; `embcache verify` reads every byte). Nothing needs to be cached. Exit status 1 if there is a problem.

    Example: embcache doctor --json report.json
    """
    from embcache.maintain.doctor import diagnose

    found = diagnose(home)
    if json:
        write_json(asdict(found), json)
    if json != "-":
        echo("\n".join(_in_words(found)))
    if found.problems:
        raise typer.Exit(1)


def _in_words(found: Diagnosis) -> list[str]:
    box = found.machine
    memory = "" if box["memory_bytes"] is None else f", {size_words(box['memory_bytes'])} of memory"
    free = "" if box["memory_free_bytes"] is None else f" ({size_words(box['memory_free_bytes'])} free)"
    lines = [
        "versions",
        *_wrapped([f"{name} {number}" for name, number in found.versions.items()]),
        "machine",
        f"  {box['system']}, {box['processor']}, {box['cores']} of {box['cores_of_machine']} cores{memory}{free}",
        f"  processor features: {', '.join(box['features']) or 'not known'}; torch uses {box['kernels']} kernels on "
        f"{box['torch_threads']} threads",
        "devices",
    ]
    for device in found.devices:
        if device["problem"]:
            lines.append(f"  {device['device']} {device['name']}: cannot be used: {device['problem']}")
            continue
        room = "" if device["memory_bytes"] is None else f", {size_words(device['memory_bytes'])}"
        lines.append(
            f"  {device['device']} ({device['name']}{room}): matrices {device['fp32_tflops']:.2f} TFLOPS fp32, "
            f"{device['bf16_tflops']:.2f} bf16; memory {device['memory_gb_s']:.0f} GB/s"
        )
    speed = found.decoding
    lines += [
        f"  decoding ({box['decoder']}): {speed['one_thread']:.0f} images/s of {speed['image']} by one thread, "
        f"{speed['all_threads']:.0f} by {speed['threads']}",
        "folders",
    ]
    for place in found.places:
        there = "there" if place["there"] else "not there yet"
        writable = "" if place["writable"] else ", CANNOT BE WRITTEN"
        lines.append(f"  {place['name']}: {place['path']} ({there}{writable}, {size_words(place['free_bytes'])} free)")
    owed = found.owed
    lines.append(
        f"  {owed['images']:,} images of cached stores are still to extract: {size_words(owed['bytes'])}"
        + ("" if owed["enough"] else ", MORE THAN IS FREE")
    )
    here = [row for row in found.weights if not row["status"].startswith("not ")]
    absent = [row for row in found.weights if row["status"].startswith("not ")]
    lines += ["weights", f"  here: {', '.join(row['backbone'] for row in here) or 'none'}"]
    lines += [f"  {row['backbone']}: {row['status']}" for row in absent]
    lines += ["datasets"]
    lines += [f"  {row['dataset']}: {row['path']}" + ("" if row["there"] else " (not there)") for row in found.datasets]
    lines += [f"stores ({len(found.stores)}, quick check)"]
    for row in found.stores:
        state = f"FAILS: {row['problem']}" if row["problem"] else "well"
        to_go = f", {row['owed']:,} to go" if row["owed"] else ""
        bad = f", {row['quarantined']:,} quarantined" if row["quarantined"] else ""
        left = f", {row['leftovers']} leftovers" if row["leftovers"] else ""
        lines.append(
            f"  {row['dataset']}/{row['store']}: {one_line(state)}; {row['rows']:,} rows{to_go}{bad}{left}, "
            f"{size_words(row['bytes'])}"
        )
    stale = [lease for lease in found.leases if lease["stale"]]
    lines.append(f"leases: {len(found.leases) - len(stale)} at work, {len(stale)} of processes that are gone")
    lines += [f"  {lease['store']}: shard {lease['shard']} (embcache gc removes it)" for lease in stale]
    lines.append(f"interrupted runs: {len(found.interrupted) or 'none'}")
    lines += [f"  {run['dataset']} {run['run']}: {one_line(run['command'])}" for run in found.interrupted]
    lines.append(f"problems: {len(found.problems) or 'none'}")
    return [*lines, *(f"  {one_line(problem)}" for problem in found.problems)]


def _wrapped(words: list[str]) -> list[str]:
    """Words as lines of at most 100 characters."""
    lines = [""]
    for word in words:
        if len(lines[-1]) + len(word) > 98:
            lines.append("")
        lines[-1] += f", {word}" if lines[-1] else word
    return [f"  {line}" for line in lines]
