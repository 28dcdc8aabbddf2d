"""``embcache ls``, ``info``, ``export``, ``gc``, ``verify`` and ``doctor``: the stores of a home."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embcache.commands.options import ORIGINS, Answer, OneBackbone, OneDataset, Skip, check_one, command, echo_nothing
from embcache.commands.output import (
    ProgressBar,
    counted,
    echo,
    echo_each,
    echo_pairs,
    print_note,
    print_objects,
    print_table,
    size_words,
)  # fmt: skip
from embcache.config import DatasetRef, ExportConfig, VerifyConfig
from embcache.errors import EmbcacheError, StoreError, StoreNotFoundError, UsageError, first_few, one_line, with_home
from embcache.fields import parse_weights
from embcache.paths import home_dir, home_text, skip, slug
from embcache.sealed import plain

if TYPE_CHECKING:
    from embcache.data.dataset import ImageDataset
    from embcache.maintain.doctor import Diagnosis
    from embcache.maintain.listing import CachedStore, InterruptedRun, StoreInfo
    from embcache.maintain.verify import Damage, StoreCheck


@command(table=True)
def ls(*, dataset: list[str], home: Path | None) -> Answer:
    """List the cached stores, one per line, and count the runs.

    `to go` counts images of the dataset that have no features yet: `embcache extract` computes just those.

    Example: embcache ls --dataset pneumonia
    """
    from embcache.maintain.listing import count_runs, list_cached, list_interrupted

    names = dataset or (None,)
    stores = [row for name in names for row in list_cached(home, name)]
    begun = [run for name in names for run in list_interrupted(home, name)]
    runs = count_runs(home)

    def show() -> None:
        unfinished = list(map(_go_on, begun))
        if not stores:
            echo_nothing("nothing is cached", dataset, home)
            echo("\n".join([*unfinished, with_home("try: embcache demo")]))
            return
        notes = [f"in {home_text(home)}: {size_words(sum(s.bytes for s in stores))} in {counted(len(stores), 'store')}"]
        if runs:
            counts = ", ".join(f"{name} {number}" for name, number in runs.items())
            notes.append(f"runs: {counts} (embcache results)")
        fix = with_home("try: embcache info")
        notes += [f"{s.dataset}/{s.path.name} is damaged: {s.problem}; {fix}" for s in stores if s.problem]
        print_objects(stores, _LISTED, notes=[*notes, *unfinished])

    answer = {"stores": plain(stores), "runs": runs, "interrupted": plain(begun)}
    return Answer(answer, show, () if stores else ("extract", "--backbone", "NAME", "--dataset", "NAME"))


def _unless_damaged(how: str) -> Callable[[CachedStore], str]:
    return lambda store: "" if store.problem else how.format(store)


_LISTED = {
    "dataset": "{0.dataset}",
    "backbone": "{0.backbone}",
    "recipe": "{0.fingerprint}",
    "rows": _unless_damaged("{0.rows:,}"),
    "quarantined": _unless_damaged("{0.quarantined}"),
    "precision": _unless_damaged("{0.precision}"),
    "transform": _unless_damaged("{0.transform}"),
    "format": _unless_damaged("{0.format}"),
    "size": lambda s: "" if s.problem else size_words(s.bytes),
    "state": lambda s: "damaged" if s.problem else f"{s.owed:,} to go" if s.owed else "complete",
}


def _go_on(run: InterruptedRun) -> str:
    how = run.command or "repeat its command with --resume"
    return (
        f"unfinished: {run.dataset} {run.id}, {size_words(run.bytes)} of checkpoints; unless it is running, continue: "
        f"{how}; or rm -r '{run.path}'"
    )


@command()
def info(*, backbone: list[str], dataset: list[str], recipe: str | None, home: Path | None) -> Answer:
    """Describe stores in full: recipe, shards, quarantine, location of the files.

    Without options, every store is described.

    Example: embcache info --backbone dino --dataset nih
    """
    from embcache.maintain.listing import store_info
    from embcache.store.feature_store import list_stores

    found = [
        store_info(store, home)
        for name in (dataset or (None,))
        for store in list_stores(home, name, pixels=True)
        if (not backbone or store.recipe.backbone in backbone) and store.recipe.fingerprint.startswith(recipe or "")
    ]
    if not found:
        raise _nothing_cached(backbone, dataset, recipe, home)
    return Answer(
        [each.to_json() for each in found], lambda: echo_each(found, lambda each: echo_pairs(_described(each)))
    )


def _nothing_cached(
    backbones: list[str], datasets: list[str], recipe: str | None, home: Path | None
) -> StoreNotFoundError:
    flags = {"--backbone": ",".join(backbones), "--dataset": ",".join(datasets), "--recipe": recipe}
    given = " ".join(f"{flag} {value}" for flag, value in flags.items() if value)
    return StoreNotFoundError(
        "nothing is cached" + (f" for {given}" if given else ""), code="store-not-found", where=home_dir(home),
        fix="embcache ls",
    )  # fmt: skip


def _described(answer: StoreInfo) -> list[tuple[str, object]]:
    store, summary, recipe = answer.store, answer.summary, answer.store.recipe
    bad, pixels = list(store.quarantined.items()), store.holds_pixels
    state = f"{summary.owed:,} images to go" if summary.owed else "complete"
    alike = dict[str, list[int]]()  # shards that were not computed with the store's settings
    for number, made in answer.otherwise.items():
        words = f"batch {made.batch_size or store.batch_size}, {counted(made.threads or store.threads, 'thread')}"
        alike.setdefault(words + (f", {made.runtime}" if made.runtime else ""), []).append(number)
    shards = f"{answer.shards} of up to {store.rows_per_shard} rows"
    superseded = f"{answer.superseded:,}" if answer.superseded else "none"
    return [
        ("dataset", summary.dataset),
        ("backbone", recipe.backbone + (f" ({recipe.model})" if recipe.model else "")),
        ("network", "" if pixels else recipe.architecture),
        ("content" if recipe.foreign else "weights", "" if pixels else f"sha256 {recipe.weights_sha256}"),
        ("transform", summary.transform),
        *((f"  {name}", value) for name, value in _flat(recipe.transform)),
        ("decoder", recipe.decoder),
        ("pooling", "" if pixels else recipe.pooling),
        ("precision", "" if pixels else recipe.precision),
        ("numerics", recipe.numerics),
        ("fingerprint", recipe.fingerprint),
        ("pixels" if pixels else "features", f"{summary.rows:,} × {store.row_shape} {store.dtype}, {state}"),
        ("rows", f"{superseded} superseded, {summary.quarantined:,} quarantined"),
        *((f"  {id_}", reason) for id_, reason in bad[:20]),
        ("  …", f"and {len(bad) - 20:,} more (--json - lists all)" if len(bad) > 20 else ""),
        ("shards", f"{shards}, {len(answer.uncommitted)} planned but not computed"),
        ("created with", f"batch size {store.batch_size}, {counted(store.threads, 'thread')}, runtime {store.runtime}"),
        *((f"  {name}", value) for name, value in store.provenance.items()),
        *(
            ("computed with", f"{words}: {len(numbers)} of {answer.shards} shards, the first {numbers[0]:06d}")
            for words, numbers in alike.items()
        ),
        ("format", f"{store.format}, {size_words(summary.bytes)}"),
        ("path", store.path),
        ("plain readers", answer.view or "no view: embcache extract writes it; none for datasets in partitions"),
    ]  # fmt: skip


def _flat(transform: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Parameters of a transform; those of its augmentation as ``augment.NAME``."""
    lines: list[tuple[str, Any]] = []
    for name, value in transform.items():
        lines += [(f"{name}.{inner}", v) for inner, v in value.items()] if isinstance(value, dict) else [(name, value)]
    return lines


@command()
def export(
    *,
    target: Annotated[
        Path, typer.Argument(metavar="TARGET", help="File to write: .npz, .parquet, .csv, .zarr or .h5.")
    ],
    backbone: OneBackbone,
    dataset: OneDataset,
    home: Path | None,
    config: ExportConfig,
    ref: Annotated[DatasetRef, Skip("drop_class", "merge_class", "target", "task", "uncertain", "unmentioned")],
) -> None:
    """Write features, labels, groups and splits of one store as one file for other tools.

    Rows are in the dataset's order; images that could not be read are left out. npz, Zarr and HDF5 hold the arrays
    features, ids, labels, groups, split and class_names; Parquet and CSV the columns id, label, class_name, group,
    split, f0, f1, … (of several views v0_f0, …, v1_f0, …).

    Example: embcache export features.npz --backbone dino --dataset nih
    """
    from embcache.data.dataset import find_dataset
    from embcache.maintain.export import export_features
    from embcache.store.feature_store import open_store

    check_one(dataset, backbone, "embcache export TARGET --backbone NAME --dataset NAME", cached=True)
    found, origin = find_dataset(dataset[0], ref, home=home)
    store = open_store(backbone[0], found, home=home, recipe=config.recipe, views=config.views)
    written = export_features(store, found, target, format=config.format, overwrite=config.force)
    echo(f"{target}: {written:,} rows of {store.row_shape} {store.dtype}")
    print_note(f"labels and splits of {found.name} are those of {ORIGINS[origin]}")
    if store.quarantined:
        print_note(f"{len(store.quarantined):,} images that could not be read are left out")


@command()
def gc(
    *,
    backbone: list[str],
    dataset: list[str],
    recipe: str | None,
    dry_run: Annotated[bool, "", "Print what would be freed, and change nothing."] = False,
    home: Path | None,
) -> Answer:
    """Free disk space: rows that newer ones of the same image have replaced, and files that killed processes left.

    Rows in use are copied, not computed, into new shards before the old ones are removed; rows of images that left the
    dataset are kept. Nothing is lost if the command is killed, and other commands may run at the same time: rows that
    one of them is to compute stay where they are. A damaged store is refused.

    Example: embcache gc --dry-run --dataset nih
    """
    from embcache.maintain.gc import collect, collect_home
    from embcache.maintain.listing import walk_stores

    done = list[Any]()
    stores, refused = walk_stores(home, dataset, backbone, recipe)
    for path in stores:
        try:
            done.append(collect(path, dry_run=dry_run))
        except (StoreError, OSError) as error:
            echo(f"embcache: {path.parent.name}/{path.name}: {error}", err=True)
            refused.append({"path": str(path), "error": str(error)})
    beside = collect_home(home, dataset, dry_run=dry_run)
    freed = sum(each.freed for each in done) + beside["freed"]

    def show() -> None:
        if not stores and not refused:
            echo_nothing("nothing is cached", dataset, home)
        if stores:
            notes = [f"{beside['leftovers']} leftovers beside the stores"] if beside["leftovers"] else []
            verb = "would be freed" if dry_run else "freed"
            print_objects(done, _COLLECTED, notes=[*notes, f"{size_words(freed)} {verb} in {home_text(home)}"])

    answer = {"dry_run": dry_run, "freed": freed, "stores": plain(done), "refused": refused}
    return Answer(answer, show, failed=bool(refused))


_COLLECTED = {
    "dataset": "{0.dataset}",
    "store": "{0.path.name}",
    "superseded": "{0.superseded}",
    "copied": "{0.moved}",
    "shards removed": "{0.shards}",
    "leftovers": "{0.leftovers}",
    "freed": lambda c: size_words(c.freed),
}

_DAMAGE = {"recipe": "damaged recipe", "plan": "damaged plan", "extra": "too much"}  # of other kinds: damaged
_SHOWN = 20  # lines of damage of one store


@command()
def verify(
    *,
    backbone: list[str],
    dataset: list[str],
    recipe: str | None,
    home: Path | None,
    json: str | None,
    ref: Annotated[DatasetRef, Skip("drop_class", "merge_class", "target", "task", "uncertain", "unmentioned")],
    config: VerifyConfig,
) -> Answer:
    """Read every byte of what is cached and compare it with what was committed.

    Each damaged file is named with its shard and rows. The recipe, the plans, the shards and the dataset's snapshot are
    checked; without options, those of every store. Exit status 1 if something is damaged, or still is after --repair.

    --repair first checks that the images and weights are on this machine and that the recipe made now is the store's,
    then computes just the damaged shards. --source and --sample need the images too, --sample the weights. A backbone
    of the form module:function is imported only if --backbone names it.

    Example: embcache verify --repair --dataset nih --backbone dino
    """
    if len(dataset) != 1 and (ref.data_root or ref.name):
        raise UsageError(
            "--data-root and --name belong to one dataset", code="one-dataset",
            found=", ".join(dataset) or "no --dataset", fix="embcache verify --dataset NAME --data-root …",
        )  # fmt: skip
    from embcache.maintain.listing import require_weights, walk_stores
    from embcache.maintain.verify import verify_store

    loaders = {name: _Loader(name, ref, home) for name in dataset}
    stores, unread = walk_stores(home, [loader.folder() for loader in loaders.values()], backbone, recipe)
    if not stores and not unread:
        raise _nothing_cached(backbone, dataset, recipe, home)
    weights = parse_weights(list(config.weights), backbone or None)
    if config.sample:
        require_weights(stores, weights, home)
    check = _Verification(config, weights, home, tuple(backbone), partial(echo, err=json == "-"))
    by_folder = {slug(loader.folder()): loader for loader in loaders.values()}
    answers, failed = list[dict[str, Any]](), False
    with ProgressBar("shard") as bar:
        # Pixels first: repairing features may read them.
        for path in sorted(stores, key=lambda path: (path.parent.name, not path.name.startswith("pixels-"), path.name)):
            folder = path.parent.name
            try:
                found = verify_store(path, partial(bar.update, label=f"{folder}/{path.name}"))
            except StoreError as error:
                skip(path, error)
                unread.append({"path": str(path), "error": str(error)})
                continue
            own = _Loader(folder, DatasetRef(allow_missing=ref.allow_missing), home)
            ok, answer = check.one_store(found, by_folder.setdefault(folder, own))
            failed |= not ok
            answers.append(answer)
    reported = "\n".join(a["repaired"]["error"] or "" for a in answers if a["repaired"])
    folders = sorted({path.parent for path in stores})
    snapshots = [_check_snapshot(folder, by_folder, home, config.repair, reported) for folder in folders]
    failed |= bool(unread) or any(row["problem"] for row in snapshots)

    def show() -> None:
        for row in snapshots:
            if row["repaired"]:
                echo(f"snapshot: {row['path']}: it was damaged; written again")
            elif row["problem"]:
                fix = with_home("try: embcache verify --repair --dataset NAME --data-root FOLDER")
                echo(f"snapshot: {row['path']}: {row['problem']}; {fix}")
        left = [(a["repaired"] or {"left": a["damage"]})["left"] for a in answers]
        keys = ("dataset", "backbone", "fingerprint", "shards", "rows")
        rows = [[*(a[key] for key in keys), len(each) or "none"] for a, each in zip(answers, left, strict=True)]
        print_table(["dataset", "backbone", "recipe", "shards", "rows", "damage"], rows)

    return Answer({"ok": not failed, "stores": answers, "snapshots": snapshots, "unread": unread}, show, failed=failed)


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
class _Verification:
    """What is done with each store."""

    config: VerifyConfig
    weights: dict[str, Path]
    home: Path | None
    backbones: tuple[str, ...]
    show: Callable[[str], object]

    def one_store(self, check: StoreCheck, loader: _Loader) -> tuple[bool, dict[str, Any]]:
        """Report on a store, and repair it where that was asked for: whether it is as it should be, and its JSON."""
        from embcache.store.reading import read_header, recipe_fix, repair_command

        state = f"{len(check.damage)} damaged" if check.damage else "no damage"
        left = f", {check.planned:,} rows planned but not computed" if check.planned else ""
        self.show(
            f"{check.dataset}/{check.path.name}: {state}; {check.shards:,} shards, {check.rows:,} rows, "
            f"{check.files:,} files, {size_words(check.bytes)} read{left}"
        )
        self._show_damage(check)
        ok, answer = not check.damage, {**plain(check), "repaired": None}
        if check.damage and self.config.repair:
            ok, answer = self._repair(check, loader, answer)
        else:
            if check.damage:
                recipe = any(each.kind == "recipe" for each in check.damage)
                self.show(f"  try: {recipe_fix(check.path) if recipe else repair_command(check.path)}")
            self._show_notes(check)
        if not ok:
            if (self.config.source or self.config.sample) and not (answer["repaired"] or {}).get("error"):
                self.show("  --source and --sample are skipped: the store is damaged")
            return ok, answer
        if read_header(check.path).recipe.foreign:
            if self.config.source or self.config.sample:
                self.show("  --source and --sample are skipped: the features were imported")
            return ok, answer
        if self.config.source:
            ok &= self._check_source(check, loader.load(), answer)
        if self.config.sample:
            ok &= self._check_sample(check, loader, answer)
        return ok, answer

    def _repair(self, check: StoreCheck, loader: _Loader, answer: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
        from embcache.maintain.repair import repair_store

        done = list[str]()
        try:
            with ProgressBar("img") as bar:
                progress = partial(bar.update, label=f"repair {check.path.name}")
                after = repair_store(check, loader.load, self._how(loader), done=done, on_rows=progress)
        except EmbcacheError as error:
            echo(f"embcache: {check.dataset}/{check.path.name}: {error}", err=True)
            return False, answer | {"repaired": {"done": done, "left": answer["damage"], "error": str(error)}}
        for line in done:
            self.show(f"  {one_line(line)}")
        self.show("  damage is left:" if after.damage else "  repaired: every file is as it should be")
        self._show_notes(after)
        self._show_damage(after)
        repaired = {"done": done, "left": plain(after.damage), "error": None}
        return not after.damage, {**plain(after), "damage": answer["damage"], "repaired": repaired}

    def _how(self, loader: _Loader) -> Any:
        from embcache.maintain.repair import Rebuild

        device, pixels, missing = self.config.device, self.config.max_pixels, loader.ref.allow_missing
        return Rebuild(self.home, self.weights, device, pixels, missing, self.backbones)

    def _show_notes(self, check: StoreCheck) -> None:
        for note in check.notes:
            self.show(f"  note: {one_line(note)}")

    def _show_damage(self, check: StoreCheck) -> None:
        for each in check.damage[:_SHOWN]:
            place = each.path.relative_to(check.path) if each.path.is_relative_to(check.path) else each.path
            self.show(f"  {_DAMAGE.get(each.kind, 'damaged')}: {one_line(str(place))}: {one_line(each.problem)}")
            if each.shard is not None:
                self.show(f"    shard {each.shard}{_rows_of(each)}")
        if len(check.damage) > _SHOWN:
            self.show(f"  … and {len(check.damage) - _SHOWN} more (--json - lists all)")

    def _check_source(self, check: StoreCheck, dataset: ImageDataset, answer: dict[str, Any]) -> bool:
        from embcache.maintain.verify import check_source
        from embcache.store.feature_store import FeatureStore, extract_command

        store = FeatureStore(check.path)
        with ProgressBar("img") as bar:
            found = check_source(store, dataset, partial(bar.update, label="source"))
        answer["source"] = plain(found)
        self.show(
            f"  source: {found.checked:,} images hashed, {len(found.changed)} changed, {len(found.missing)} missing"
        )
        for label, ids in (("changed", found.changed), ("missing", found.missing)):
            if ids:
                self.show(f"    {label}: {one_line(first_few(ids))}")
        if found.removed:
            self.show(f"    {found.removed:,} rows of images that left the dataset: hidden")
        if found.changed and not store.holds_pixels:
            fix = with_home(extract_command(store.recipe.typed, dataset))
            self.show(f"    their features are outdated; try: {fix}")
        return bool(found.ok)

    def _check_sample(self, check: StoreCheck, loader: _Loader, answer: dict[str, Any]) -> bool:
        from embcache.maintain.repair import check_sample

        found = check_sample(check.path, loader.load(), self.config.sample, self._how(loader))
        answer["sample"] = {**plain(found), "ok": found.ok}
        verdict = "within" if found.difference <= found.tolerance else "BEYOND"
        worst = f" ({one_line(found.worst)})" if found.worst else ""
        self.show(
            f"  sample: {found.compared:,} images computed again; largest difference {found.difference:.1e}{worst}, "
            f"{verdict} the tolerance of {found.tolerance:.1e}"
        )
        for label, ids in (("changed since, left out", found.changed), ("no longer readable", found.unreadable)):
            if ids:
                self.show(f"    {label}: {len(ids):,} (first: {one_line(ids[0])})")
        return bool(found.ok)


def _rows_of(damage: Damage) -> str:
    rows = damage.rows
    if rows is None:
        return ""
    return f", rows {rows.first}-{rows.last}: {rows.count:,} images, {rows.first_id!r} … {rows.last_id!r}"


def _check_snapshot(
    folder: Path, loaders: dict[str, _Loader], home: Path | None, repair: bool, reported: str
) -> dict[str, Any]:
    """The snapshot of a dataset, which is read where the images are not here; written again with ``repair``."""
    from embcache.data.dataset import read_snapshot
    from embcache.maintain.verify import check_partitions
    from embcache.store.commit import write_snapshot

    repaired = False
    if row := check_partitions(folder, home, repair):
        return row
    try:
        problem = "it is missing" if read_snapshot(folder.name, home) is None else ""
    except EmbcacheError as error:
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
    return {"path": str(folder / "dataset.parquet"), "problem": problem, "repaired": repaired}


@command()
def doctor(*, home: Path | None) -> Answer:
    """Describe this installation for a bug report, and list what is wrong with it.

    Versions, processor features, devices and the speed they reach, room on the disk against what the stores still
    owe, weights and datasets found, gated weights that can be fetched, stale leases, interrupted runs, and stores that
    fail a quick check (headers, plans and sizes; `embcache verify` reads every byte). Nothing needs to be cached. Exit
    status 1 if there is a problem.

    Example: embcache doctor --json report.json
    """
    from embcache.maintain.doctor import diagnose

    found = diagnose(home)
    return Answer(asdict(found), lambda: echo_pairs(_diagnosis(found)), failed=bool(found.problems))


def _diagnosis(found: Diagnosis) -> list[tuple[str, object]]:
    box, speed, owed = found.machine, found.decoding, found.owed
    memory = "" if box["memory_bytes"] is None else f", {size_words(box['memory_bytes'])} of memory"
    free = "" if box["memory_free_bytes"] is None else f" ({size_words(box['memory_free_bytes'])} free)"
    stale = [lease for lease in found.leases if lease["stale"]]
    absent = {row["backbone"]: row["status"] for row in found.weights if row["status"].startswith("not ")}
    here = [row["backbone"] for row in found.weights if row["backbone"] not in absent]
    usual = [name for name, status in absent.items() if "downloaded" in status]
    closed = {row["backbone"]: row["problem"] for row in found.gated if row["problem"]}
    unasked = next((reason for reason in closed.values() if reason.startswith("not checked")), "")
    open_ = ", ".join(row["backbone"] for row in found.gated if not row["problem"])
    room = "" if owed["enough"] else ", MORE THAN IS FREE"
    return [
        ("versions", ", ".join(f"{name} {number}" for name, number in found.versions.items())),
        ("machine", f"{box['system']}, {box['processor']}"),
        ("  cores", f"{box['cores']} of {box['cores_of_machine']}{memory}{free}"),
        ("  features", ", ".join(box["features"]) or "not known"),
        ("  torch", f"{box['kernels']} kernels on {counted(box['torch_threads'], 'thread')}"),
        *(("device", _device(device)) for device in found.devices),
        ("decoding", f"{speed['one_thread']:.0f} images/s of {speed['image']} by one thread, "
         f"{speed['all_threads']:.0f} by {speed['threads']} ({box['decoder']})"),
        *((place["name"], _place(place)) for place in found.places),
        ("to extract", f"{owed['images']:,} images of cached stores: {size_words(owed['bytes'])}{room}"),
        ("weights", f"here: {', '.join(here) or 'none'}"),
        *((f"  {name}", status) for name, status in absent.items() if name not in usual),
        ("  not here", f"{len(usual)} more, downloaded when first used (embcache backbones)"),
        ("gated weights", unasked or f"can be fetched: {open_ or 'none'}"),
        *((f"  {name}", reason) for name, reason in closed.items() if not unasked),
        ("datasets", ", ".join(row["dataset"] for row in found.datasets if row["there"]) or "none found"),
        *((f"  {row['dataset']}", row["path"] + " (not there)" * (not row["there"])) for row in found.datasets),
        ("stores", f"{len(found.stores)}, quick check"),
        *((f"  {row['dataset']}/{row['store']}", _store_state(row)) for row in found.stores),
        ("leases", f"{len(found.leases) - len(stale)} at work, {len(stale)} of processes that are gone"),
        *((f"  {lease['store']}", f"shard {lease['shard']} (embcache gc removes it)") for lease in stale),
        ("interrupted runs", len(found.interrupted) or "none"),
        *((f"  {run['dataset']} {run['run']}", run["command"]) for run in found.interrupted),
        ("problems", len(found.problems) or "none"),
        *(("  -", problem) for problem in found.problems),
    ]  # fmt: skip


def _device(device: Mapping[str, Any]) -> str:
    if device["problem"]:
        return f"{device['device']} {device['name']}: cannot be used: {device['problem']}"
    room = "" if device["memory_bytes"] is None else f", {size_words(device['memory_bytes'])}"
    return (
        f"{device['device']} ({device['name']}{room}): matrices {device['fp32_tflops']:.2f} TFLOPS fp32, "
        f"{device['bf16_tflops']:.2f} bf16; memory {device['memory_gb_s']:.0f} GB/s"
    )


def _place(place: Mapping[str, Any]) -> str:
    there = "there" if place["there"] else "not there yet"
    writable = "" if place["writable"] else ", CANNOT BE WRITTEN"
    copies = "its copies are " if "://" in place["path"] else ""
    return f"{place['path']} ({copies}{there}{writable}, {size_words(place['free_bytes'])} free)"


def _store_state(row: Mapping[str, Any]) -> str:
    counts = {"to go": row["owed"], "quarantined": row["quarantined"], "leftovers": row["leftovers"]}
    more = "".join(f", {number:,} {name}" for name, number in counts.items() if number)
    state = f"FAILS: {row['problem']}" if row["problem"] else "ok"
    return f"{state}; {row['rows']:,} rows{more}, {size_words(row['bytes'])}"
