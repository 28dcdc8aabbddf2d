"""Computing rows of a store again: all of a damaged shard (``embcache verify --repair``), or a sample (``--sample``).

A damaged shard stays where it is until its rows are computed, and goes in the same step in which they come: were it
away for a moment, older rows of its images would be in use. Where the system cannot exchange two names, a repair that
is killed between two renames leaves a shard that is planned and not there; the next extraction computes it.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from embcache.cores import default_workers
from embcache.data.budget import Decoding, check_max_pixels, pixels_of
from embcache.data.dataset import ImageDataset
from embcache.data.files import state_now
from embcache.data.images import ImageRef, image_refs_of, read_image
from embcache.errors import CorruptStoreError, DatasetError, ImageError, RecipeError, StoreError, UsageError, first_few
from embcache.extract.canaries import FLOAT16_TOLERANCE, TOLERANCES, check_canaries
from embcache.extract.pixels import pixel_recipe, pixel_rows
from embcache.extract.recipes import make_recipe, recipe_network, recipe_transform, require_checkpoints
from embcache.extract.scan import GONE
from embcache.extract.worker import compute_shard
from embcache.io import discard, make_folder, mirror_of
from embcache.log import log
from embcache.maintain.verify import StoreCheck, digest_now, image_folder, verify_store
from embcache.paths import PathLike
from embcache.store.commit import PlanEntry, ShardRows, commit_shard, replace_plan, take_out, write_view
from embcache.store.feature_store import PIXELS, FeatureStore, extract_command, import_command
from embcache.store.lease import Lease
from embcache.store.reading import (
    CANARIES,
    CommitRecord,
    check_folders,
    committed_numbers,
    misplaced,
    plan_numbers,
    plan_path,
    read_commit,
    read_header,
    read_index,
    read_plan,
    shard_path,
)
from embcache.store.schema import Recipe, RowIndex, StoreHeader

# Makes rows of images, in their order: sources, pool, batch size, progress, limits of decoding.
Maker = Callable[[Sequence[ImageRef], Executor, int, Callable[[int], object], Decoding], ShardRows]


@dataclass(frozen=True)
class Rebuild:
    """With what rows are computed again."""

    home: PathLike | None = None
    weights: Mapping[str, PathLike] = field(default_factory=dict)  # checkpoints by backbone
    device: str = "auto"
    max_pixels: int | None = None  # as it was given
    allow_missing: bool = False  # images that are not here become unreadable rows
    trust: Sequence[str] = ()  # `module:function` backbones that may be imported: those that were typed


def make_again(path: Path, dataset: ImageDataset, how: Rebuild, runtime: str | None = None) -> Maker:
    """What makes the rows of a store again: the images and, for features, the network with its weights."""
    recipe = read_header(path).recipe
    if recipe.foreign:
        raise UsageError(
            "imported features cannot be computed again: no network is known that makes them", code="foreign-features",
            where=path, fix="embcache verify without --sample",
        )  # fmt: skip
    root = image_folder(dataset)
    if recipe.backbone == PIXELS:
        framing = recipe_transform(recipe)
        _refuse_another(recipe, pixel_recipe(framing), dataset)
        return lambda sources, *more: pixel_rows(root, sources, framing, *more)
    require_checkpoints([recipe], how.weights, how.home)
    network = recipe_network(
        recipe, home=how.home, weights=how.weights.get(recipe.backbone), device=how.device,
        views=int(recipe.transform.get("views", 1)), augment=dataset.augment,
        imports=(recipe.model or recipe.backbone) in how.trust,
    )  # fmt: skip
    _refuse_another(recipe, make_recipe(network), dataset)
    check_canaries(path, network)
    network = network if runtime is None else network.executed_by(runtime)
    return lambda sources, pool, batch_size, on_rows, decoding: compute_shard(
        root, sources, [network], batch_size=batch_size, pool=pool, on_rows=on_rows, decoding=decoding
    )[0]


def _refuse_another(recipe: Recipe, now: Recipe, dataset: ImageDataset) -> None:
    """Raise a RecipeError unless what is made now is what the store holds."""
    if now == recipe:
        return
    differs = recipe.differences(now)
    what, fix = f"features of {recipe.backbone}", f"a new extraction: {extract_command(recipe.typed, dataset)}"
    if recipe.backbone == PIXELS:
        what, fix = "pixels", "the command that needs the pixels keeps new ones"
    elif "weights_sha256" in differs:
        fix = f"{recipe.weights_option()} with {recipe.weights_words}; or {fix}"
    raise RecipeError(
        f"the {what} cannot be made again as they were; the store was not changed", code="recipe-differs",
        expected="\n".join(f"{name} = {there}" for name, (there, _) in differs.items()),
        found="\n".join(f"{name} = {here}" for name, (_, here) in differs.items()), fix=fix,
    )  # fmt: skip


@contextmanager
def torch_threads(number: int) -> Iterator[int]:
    """Threads for torch inside, as far as this machine can start them: another number sums in another order."""
    before, number = torch.get_num_threads(), max(1, min(number, 4 * (os.cpu_count() or 1)))
    torch.set_num_threads(number)
    try:
        yield number
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class SampleCheck:
    """Random cached rows against rows computed now."""

    compared: int
    changed: tuple[str, ...]  # images with other bytes than then: left out
    unreadable: tuple[str, ...]
    difference: float  # largest |cached - computed| / max |computed| of an image
    tolerance: float
    worst: str  # the image with that difference

    @property
    def ok(self) -> bool:
        """Whether every row is what its image gives, within the tolerance."""
        return self.compared > 0 and not self.unreadable and self.difference <= self.tolerance


def check_sample(path: Path, dataset: ImageDataset, number: int, how: Rebuild = Rebuild()) -> SampleCheck:
    """Compute ``number`` random rows of a store again from their images; raises as `make_again`."""
    header = read_header(path)
    decoding = Decoding(check_max_pixels(how.max_pixels))
    maker = make_again(path, dataset, how)
    store = FeatureStore(path).restrict(dataset.table["id"])
    if not len(store):
        raise StoreError(
            "the store holds no readable image of this dataset", code="store-empty", where=path, fix="embcache ls"
        )
    chosen = np.sort(np.random.default_rng(0).choice(len(store), min(number, len(store)), replace=False))
    ids = store.ids[chosen].tolist()
    with ThreadPoolExecutor(default_workers()) as pool, torch_threads(header.threads):
        rows = maker(image_refs_of(dataset.table, ids), pool, header.batch_size, lambda rows: None, decoding)
    known = [store.digests.get(id_) or digest for id_, digest in zip(ids, rows.digests, strict=True)]
    changed = rows.valid & (np.array(known) != np.array(rows.digests))
    cached, computed = (a.reshape(len(ids), -1).astype(np.float64) for a in (store.features[chosen], rows.features))
    scale = np.maximum(np.abs(computed).max(axis=1), np.finfo(np.float32).tiny)
    compared = rows.valid & ~changed
    off = np.where(compared, np.abs(cached - computed).max(axis=1) / scale, -1.0)
    tolerance = 0.0 if store.holds_pixels else TOLERANCES[header.recipe.precision.partition("+")[0]]
    tolerance += FLOAT16_TOLERANCE if header.recipe.dtype == "float16" else 0.0
    other, bad = (tuple(np.array(ids)[flags].tolist()) for flags in (changed, ~rows.valid))
    worst = ids[int(off.argmax())] if off.max() > 0 else ""
    return SampleCheck(int(compared.sum()), other, bad, max(float(off.max()), 0.0), tolerance, worst)


def repair_store(
    check: StoreCheck,
    load: Callable[[], ImageDataset],
    how: Rebuild = Rebuild(),
    *,
    done: list[str] | None = None,
    on_rows: Callable[[int, int], object] = lambda done, total: None,
) -> StoreCheck:
    """Repair one store, and verify it again; ``done`` receives what was done in words."""
    return _Repair(check.path, how, [] if done is None else done, on_rows).run(check, load)


class _Repair:
    """A store under repair."""

    header: StoreHeader
    dataset: ImageDataset
    root: Path

    def __init__(self, path: Path, how: Rebuild, done: list[str], on_rows: Callable[[int, int], object]) -> None:
        self.path, self.how, self.done, self.on_rows = path, how, done, on_rows
        self.max_pixels = None if how.max_pixels is None else check_max_pixels(how.max_pixels)

    def did(self, what: str) -> None:
        self.done.append(what)
        log.info(what)

    def run(self, check: StoreCheck, load: Callable[[], ImageDataset]) -> StoreCheck:
        path = self.path
        if wrong := [each for each in misplaced(path) if each.name in ("leases", "staging")]:
            for folder in wrong:  # nothing that counts is in them; what a link leads to is not this store's
                discard(folder)
                make_folder(folder)
                self.did(f"{folder.name}: no real folder, made anew")
            check = verify_store(path)
        check_folders(path)
        self.header = read_header(path)  # nothing is repaired without the recipe
        if any(each.kind == "canaries" for each in check.damage):
            take_out(path, path / CANARIES, "canaries-damaged")
            self.did(f"{CANARIES}: removed; networks are no longer compared with those of the first extraction")
        there = {*plan_numbers(path), *committed_numbers(path)}  # gc may have removed some since
        shards, plans = (
            sorted({each.shard for each in check.damage if each.kind == kind and each.shard in there})
            for kind in ("shard", "plan")
        )
        if (shards or plans) and self.header.recipe.foreign:
            store = FeatureStore(path)
            raise StoreError(
                "imported features cannot be computed again; the store was not changed", code="foreign-features",
                found=f"damage in {first_few([f'shard {number}' for number in sorted({*shards, *plans})])}", where=path,
                fix=f"mv {shlex.quote(str(path))} FOLDER, then {import_command(store, path.parent.name)}",
            )  # fmt: skip
        if shards or plans:
            self.dataset = load()
            self.root = image_folder(self.dataset)
            runtimes = {self.made_with(number).runtime or self.header.runtime for number in shards}
            makers = {runtime: make_again(path, self.dataset, self.how, runtime) for runtime in runtimes}
            self.refuse_missing(shards)
            self.repair_plans(plans, shards)
            if shards:
                self.repair_shards(makers, [number for number in shards if number in plan_numbers(path)])
        for each in check.damage:
            if each.kind == "extra" and os.path.lexists(each.path):
                discard(each.path)
                self.did(f"{each.path.relative_to(path)}: removed")
        if committed_numbers(path) and not {each.kind for each in check.damage} <= {"extra", "canaries"}:
            write_view(path)
            self.did("the view for plain readers: written anew")
        return verify_store(path)

    def sources(self, ids: Sequence[str]) -> list[ImageRef]:
        return image_refs_of(self.dataset.table, ids)

    def is_here(self, source: ImageRef) -> bool:
        return bool(source.path) and state_now(self.root, source.path) is not None

    def index(self, number: int) -> tuple[RowIndex | None, set[str]]:
        """Rows of a shard without their features, where they are intact; and the ids of those that are valid."""
        with suppress(CorruptStoreError):
            index = read_index(self.path, self.header, number)
            return index, set(np.array(index.ids)[index.valid].tolist())
        return None, set()

    def planned(self, number: int) -> list[str]:
        """Ids of a shard as its plan says, or its index where the plan is damaged; none where neither does."""
        with suppress(CorruptStoreError):
            return [entry.id for entry in read_plan(self.path, number)]
        index, _ = self.index(number)
        return list(index.ids) if index else []

    def refuse_missing(self, shards: Sequence[int]) -> None:
        """Images that are not here would become unreadable rows where there were features."""
        gone = []
        for number in shards:
            (index, valid), ids = self.index(number), self.planned(number)
            bad = set(index.ids) - valid if index else set()
            gone += [s.id for s in self.sources(ids) if s.id not in bad and not self.is_here(s)]
        if gone and not self.how.allow_missing:
            raise DatasetError(
                f"{len(gone):,} images of damaged shards are not here; the store was not changed",
                code="images-not-here", found=f"no {first_few([repr(id_) for id_ in gone])}", where=self.dataset.root,
                fix="put them back, or continue without them: --allow-missing (their rows will say that they are "
                "missing)",
            )  # fmt: skip

    def repair_plans(self, plans: Sequence[int], shards: Sequence[int]) -> None:
        """Write damaged plans: from their shards where these are intact, else from the images that no plan names."""
        lost = [number for number in plans if number in shards]
        for number in (each for each in plans if each not in lost):
            entries = self.entries_of_shard(number) if number in committed_numbers(self.path) else []
            if entries:
                replace_plan(self.path, number, entries)
                self.did(f"plan {number}: written anew from its shard ({len(entries):,} images)")
            else:
                take_out(self.path, plan_path(self.path, number), "plan-damaged")
                self.did(f"plan {number}: removed, nothing was computed for it; the next extraction plans its images")
        others = [number for number in plan_numbers(self.path) if number not in lost] if lost else []
        known = {entry.id for number in others for entry in read_plan(self.path, number)}
        rest = [id_ for id_ in self.dataset.table["id"].tolist() if id_ not in known] if lost else []
        for number in lost:
            # Those that the shard's index names or, failing that, as many as it had.
            left = set(rest)
            ids = [id_ for id_ in self.planned(number) if id_ in left] or rest[: self.made_with(number).rows]
            left -= set(ids)
            rest = [id_ for id_ in rest if id_ in left]
            if ids:
                replace_plan(self.path, number, [self.entry(source) for source in self.sources(ids)])
                self.did(f"plan {number}: written anew for {len(ids):,} images that no other plan names")
            else:
                if mirror_of(self.path):  # where a commit stays, and so does its plan
                    self.did(f"plan and shard {number}: left as they are, no image of the dataset is theirs")
                    continue
                take_out(self.path, plan_path(self.path, number), "plan-damaged")
                take_out(self.path, shard_path(self.path, number), "shard-unplanned")
                self.did(f"plan and shard {number}: removed, no image of the dataset is theirs")

    def entry(self, source: ImageRef) -> PlanEntry:
        state = state_now(self.root, source.path) or GONE
        return PlanEntry(source.id, state.size, state.mtime_ns, None, source.place)

    def entries_of_shard(self, number: int) -> list[PlanEntry]:
        """The plan that an intact shard was made by; files that are others by now count as changed."""
        index = read_index(self.path, self.header, number)
        entries = []
        for source, digest in zip(self.sources(index.ids), index.digests, strict=True):
            # Of what could not be read then there is no digest: as long as it still cannot, it counts as the same.
            same = self.is_here(source) and (
                digest_now(self.root, source) == digest if digest else not _is_readable(self.root, source)
            )
            entries.append(self.entry(source) if same else PlanEntry(source.id, -1, -1))
        return entries

    def repair_shards(self, makers: Mapping[str, Maker], shards: Sequence[int]) -> None:
        planned = {number: [entry.id for entry in read_plan(self.path, number)] for number in shards}
        total, computed, refused = sum(map(len, planned.values())), 0, list[DatasetError]()

        def more(rows: int) -> None:
            nonlocal computed
            computed += rows
            self.on_rows(computed, total)

        with ThreadPoolExecutor(default_workers()) as pool:
            for number, ids in planned.items():
                made, usual = self.made_with(number), self.header
                batch, threads = made.batch_size or usual.batch_size, made.threads or usual.threads
                runtime = made.runtime or usual.runtime
                lease = Lease.acquire(self.path, number)
                if lease is None:
                    raise StoreError(
                        "another process is computing the same shard", code="shard-claimed",
                        found=f"a lease on shard {number}", where=self.path,
                        fix="wait until it is done, then run the same command again",
                    )  # fmt: skip
                with lease, torch_threads(threads) as threads:
                    try:
                        rows = self.make_rows(number, makers[runtime], ids, pool, batch, more)
                    except DatasetError as error:  # the others are repaired first
                        refused.append(error)
                        continue
                    commit_shard(
                        self.path, number, rows, batch_size=batch, threads=threads, runtime=runtime, damaged=True
                    )
                self.did(f"shard {number}: {len(ids):,} images computed again")
        if refused:
            raise refused[0]

    def make_rows(
        self, number: int, maker: Maker, ids: Sequence[str], pool: Executor, batch: int,
        on_rows: Callable[[int], object],
    ) -> ShardRows:  # fmt: skip
        """Rows of a damaged shard; an error where one that was valid, or may have been, would not be any more."""
        sources, limit = self.sources(ids), self.max_pixels or check_max_pixels()
        rows = maker(sources, pool, batch, on_rows, Decoding(limit))
        known, lost = self.lost_rows(number, rows)
        if known and (needed := max(map(pixels_of, lost.values()), default=0)):
            self.did(f"shard {number}: was made with a higher --max-pixels, at least {needed:,}: computed with that")
            rows = maker(sources, pool, batch, lambda rows: None, Decoding(max(limit, needed)))
            known, lost = self.lost_rows(number, rows)
        if not lost:
            return rows
        fix = "put the images back as they were; or a higher --max-pixels, if it was made with one"
        if pixels := max(map(pixels_of, lost.values())):
            leave = "" if known else f"; --max-pixels {limit} leaves them out, with the reason"
            fix = f"--max-pixels {max(pixels, limit)} computes them{leave}"
        features = "had features" if known else "may have had features, for its index is damaged too"
        raise DatasetError(
            f"{len(lost):,} images of shard {number} cannot be read now, and {features}; the shard was not changed",
            code="images-unreadable", found=first_few([f"{id_!r}: {reason}" for id_, reason in lost.items()]),
            where=self.dataset.root, fix=fix,
        )  # fmt: skip

    def lost_rows(self, number: int, rows: ShardRows) -> tuple[bool, dict[str, str]]:
        """Reasons by id of rows that are not valid and were, or, where the index is damaged (False), may have been."""
        bad = {id_: reason for id_, reason in zip(rows.ids, rows.reasons, strict=True) if reason}
        if self.how.allow_missing:
            bad = {source.id: bad[source.id] for source in self.sources(list(bad)) if self.is_here(source)}
        index, valid = self.index(number)
        if index is None:  # a limit that was given is meant
            return False, {} if self.max_pixels else {id_: reason for id_, reason in bad.items() if pixels_of(reason)}
        return True, {id_: reason for id_, reason in bad.items() if id_ in valid}

    def made_with(self, number: int) -> CommitRecord:
        """Rows of a shard, and what the bits of its features depend on where it is not the store's."""
        with suppress(CorruptStoreError):
            return read_commit(self.path, number)
        return CommitRecord(self.header.rows_per_shard, {})


def _is_readable(root: Path, source: ImageRef) -> bool:
    try:
        read_image(root, source.path, source.place)
    except ImageError:
        return False
    return True
