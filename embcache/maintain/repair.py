"""Mending what a verification found: only what is damaged is computed again (``embcache verify --repair``).

A damaged shard stays where it is until its rows are computed, and goes in the same step in which they come: were it
away for a moment, older rows of its images would be in use. Where the system cannot exchange two names, a repair that
is killed between two renames leaves a shard that is planned and not there; the next extraction computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from embcache.cores import default_workers
from embcache.data.budget import Decoding, check_max_pixels, default_max_pixels, pixels_of
from embcache.data.dataset import ImageDataset
from embcache.data.images import sources_of
from embcache.errors import CorruptStoreError, DatasetError, StoreError
from embcache.extract.scan import image_root
from embcache.io import make_folder
from embcache.maintain.rebuild import Maker, make_again, torch_threads, usable_threads
from embcache.maintain.verify import StoreCheck, digest_now, readable_now, verify_store
from embcache.paths import PathLike
from embcache.store.commit import (
    PlanEntry,
    ShardRows,
    commit_shard,
    discard,
    replace_plan,
    take_out,
    write_view,
)
from embcache.store.header import StoreHeader
from embcache.store.lease import Lease
from embcache.store.reading import (
    check_folders,
    committed_numbers,
    misplaced,
    plan_numbers,
    read_commit,
    read_header,
    read_index,
    read_plan,
    shard_name,
)

Say = Callable[[str], object]
_FEW = 5


@dataclass(frozen=True)
class _Job:
    """A store under repair."""

    path: Path
    header: StoreHeader
    dataset: ImageDataset
    maker: Maker | None  # None where nothing has to be computed
    say: Say
    max_pixels: int | None = None  # as it was given
    allow_missing: bool = False


def repair_store(
    check: StoreCheck,
    load: Callable[[], ImageDataset],
    *,
    home: PathLike | None = None,
    weights: Mapping[str, PathLike] | None = None,
    device: str = "auto",
    allow_missing: bool = False,
    max_pixels: int | None = None,
    say: Say = lambda line: None,
    on_rows: Callable[[int, int], object] = lambda done, total: None,
) -> StoreCheck:
    """Mend one store, and verify it again."""
    path = check.path
    max_pixels = None if max_pixels is None else check_max_pixels(max_pixels)
    if wrong := [each for each in misplaced(path) if each.name in ("leases", "staging")]:
        for folder in wrong:  # nothing that counts is in them; what a link leads to is not this store's
            discard(folder)
            make_folder(folder)
            say(f"{folder.name}: no real folder, made anew")
        check = verify_store(path)
    check_folders(path)
    header = read_header(path)  # nothing is repaired without the recipe
    there = {*plan_numbers(path), *committed_numbers(path)}  # gc may have removed some since
    shards = [number for number in _of_kind(check, "shard") if number in there]
    plans = [number for number in _of_kind(check, "plan") if number in there]
    if shards or plans:
        dataset = load()
        image_root(dataset)
        maker = make_again(header, dataset, home=home, weights=weights, device=device) if shards else None
        job = _Job(path, header, dataset, maker, say, max_pixels, allow_missing)
        _refuse_missing(job, shards, allow_missing)
        _mend_plans(job, plans, set(shards))
        _mend_shards(job, [number for number in shards if number in plan_numbers(path)], on_rows)
    for each in check.damage:
        if each.kind == "extra" and (each.path.exists() or each.path.is_symlink()):
            discard(each.path)
            say(f"{each.path.relative_to(path)}: removed")
    if committed_numbers(path) and {each.kind for each in check.damage} != {"extra"}:
        write_view(path)
        say("the view for plain readers: written anew")
    return verify_store(path)


def _of_kind(check: StoreCheck, *kinds: str) -> list[int]:
    return sorted({each.shard for each in check.damage if each.kind in kinds and each.shard is not None})


def _planned(path: Path, number: int) -> list[str]:
    """Ids of a shard as its plan says, or its index where the plan is damaged; none where neither does."""
    with suppress(CorruptStoreError):
        return [entry.id for entry in read_plan(path, number)]
    with suppress(CorruptStoreError):
        return list(read_index(path, read_header(path), number).ids)
    return []


def _refuse_missing(job: _Job, shards: Sequence[int], allow_missing: bool) -> None:
    """Images that are not here would become unreadable rows where there were features."""
    gone = []
    for number in shards:
        unreadable = _unreadable(job.path, job.header, number)
        for source in sources_of(job.dataset.table, _planned(job.path, number)):
            there = source.path and (image_root(job.dataset) / source.path).is_file()
            if not there and source.id not in unreadable:
                gone.append(source.id)
    if gone and not allow_missing:
        raise DatasetError(
            f"{len(gone):,} images of damaged shards are not here; the store was not touched",
            found="no " + ", ".join(map(repr, gone[:_FEW])) + (", …" if len(gone) > _FEW else ""),
            where=job.dataset.root,
            fix="put them back, or go on without them: --allow-missing (their rows will say that they are missing)",
        )


def _unreadable(path: Path, header: StoreHeader, number: int) -> set[str]:
    """Images that could not be read when the shard was made, where its index can still be."""
    try:
        index = read_index(path, header, number)
    except CorruptStoreError:
        return set()
    return {id_ for id_, valid in zip(index.ids, index.valid.tolist(), strict=True) if not valid}


def _mend_plans(job: _Job, plans: Sequence[int], shards: set[int]) -> None:
    """Write damaged plans anew: from their shards where these are intact, else from the images that no plan names."""
    lost = [number for number in plans if number in shards]
    for number in plans:
        file = job.path / "plan" / f"{shard_name(number)}.json"
        if number in lost:
            continue
        committed = number in committed_numbers(job.path)
        entries = _entries_of_shard(job, number) if committed else []
        if entries:
            replace_plan(job.path, number, entries)
            job.say(f"plan {number}: written anew from its shard ({len(entries):,} images)")
        else:
            take_out(job.path, file, "plan-damaged")
            job.say(f"plan {number}: removed, nothing was computed for it; the next extraction plans its images anew")
    if lost:
        _plan_anew(job, lost)


def _entries_of_shard(job: _Job, number: int) -> list[PlanEntry]:
    """The plan that an intact shard was made by; files that are others by now count as changed."""
    index = read_index(job.path, job.header, number)
    root, entries = image_root(job.dataset), []
    for source, digest in zip(sources_of(job.dataset.table, index.ids), index.digests, strict=True):
        entry = PlanEntry(source.id, -1, -1, None)
        file = root / source.path
        if source.path and file.is_file():
            state = file.stat()
            # Of what could not be read then there is no digest: as long as it still cannot, it counts as the same.
            if digest_now(root, source) == digest if digest else not readable_now(root, source):
                entry = PlanEntry(source.id, state.st_size, state.st_mtime_ns, None)
        entries.append(entry)
    return entries


def _plan_anew(job: _Job, lost: Sequence[int]) -> None:
    """Plans whose shards are damaged too: their images are those of the dataset that no other plan names."""
    others = [number for number in plan_numbers(job.path) if number not in lost]
    known = {entry.id for number in others for entry in read_plan(job.path, number)}
    rest = [id_ for id_ in job.dataset.table["id"].tolist() if id_ not in known]
    for number in lost:
        ids, rest = _take(job, number, rest)
        if not ids:
            take_out(job.path, job.path / "plan" / f"{shard_name(number)}.json", "plan-damaged")
            take_out(job.path, job.path / "shards" / shard_name(number), "shard-unplanned")
            job.say(f"plan and shard {number}: removed, no image of the dataset is theirs")
            continue
        states = []
        for source in sources_of(job.dataset.table, ids):
            state = (image_root(job.dataset) / source.path).stat()
            states.append(PlanEntry(source.id, state.st_size, state.st_mtime_ns, None))
        replace_plan(job.path, number, states)
        job.say(f"plan {number}: written anew for {len(ids):,} images that no other plan names")


def _take(job: _Job, number: int, rest: list[str]) -> tuple[list[str], list[str]]:
    """The images of a lost plan, of those that are left: by its shard's index or, failing that, their number."""
    held = [id_ for id_ in _planned(job.path, number) if id_ in set(rest)]
    if held:
        return held, [id_ for id_ in rest if id_ not in set(held)]
    try:
        rows = read_commit(job.path, number).rows
    except CorruptStoreError:
        rows = job.header.rows_per_shard
    return rest[:rows], rest[rows:]


def _mend_shards(job: _Job, shards: Sequence[int], on_rows: Callable[[int, int], object]) -> None:
    if not shards or job.maker is None:
        return
    planned = {number: [entry.id for entry in read_plan(job.path, number)] for number in shards}
    total, done, refused = sum(map(len, planned.values())), 0, list[DatasetError]()

    def more(rows: int) -> None:
        nonlocal done
        done += rows
        on_rows(done, total)

    with ThreadPoolExecutor(default_workers()) as pool:
        for number, ids in planned.items():
            batch, threads = _made_with(job, number)
            threads = usable_threads(threads)
            with _claim(job.path, number), torch_threads(threads):
                rows = _make_rows(job, job.maker, number, ids, pool, batch, more)
                if isinstance(rows, DatasetError):
                    refused.append(rows)
                    continue
                commit_shard(job.path, number, rows, batch_size=batch, threads=threads, damaged=True)
            job.say(f"shard {number}: {len(ids):,} images computed again")
    if refused:
        raise refused[0]


def _make_rows(
    job: _Job,
    maker: Maker,
    number: int,
    ids: Sequence[str],
    pool: Executor,
    batch: int,
    on_rows: Callable[[int], object],
) -> ShardRows | DatasetError:
    """Rows of a damaged shard; an error instead where one that was valid, or may have been, would not be any more."""
    sources, limit = sources_of(job.dataset.table, ids), job.max_pixels or default_max_pixels()
    rows = maker(sources, pool, batch, on_rows, Decoding(limit))
    lost = _lost_rows(job, number, rows)
    known = any(certain for _, _, certain in lost)
    if known and (needed := max(pixels_of(reason) for _, reason, certain in lost if certain)):
        job.say(f"shard {number}: was made with a higher --max-pixels, at least {needed:,}: computed with that")
        rows = maker(sources, pool, batch, lambda rows: None, Decoding(max(limit, needed)))
        lost = _lost_rows(job, number, rows)
    if not lost:
        return rows
    return DatasetError(
        f"{len(lost):,} images of shard {number} cannot be read now, and "
        + ("had features" if known else "may have had features, for its index is damaged too")
        + "; the shard was not touched",
        found="\n".join(f"{id_!r}: {reason}" for id_, reason, _ in lost[:_FEW]) + ("\n…" if len(lost) > _FEW else ""),
        where=job.dataset.root,
        fix=f"--max-pixels {max(pixels, limit)} computes them"
        + ("" if known else f"; --max-pixels {limit} leaves them out, with the reason")
        if (pixels := max(pixels_of(reason) for _, reason, _ in lost))
        else "put the images back as they were; or a higher --max-pixels, if it was made with one",
    )


def _lost_rows(job: _Job, number: int, rows: ShardRows) -> list[tuple[str, str, bool]]:
    """Ids and reasons of rows that are not valid and were, or, where the index is damaged, may have been."""
    bad = [(id_, reason) for id_, reason in zip(rows.ids, rows.reasons, strict=True) if reason]
    root = image_root(job.dataset)
    if job.allow_missing:
        paths = {source.id: source.path for source in sources_of(job.dataset.table, rows.ids)}
        bad = [(id_, reason) for id_, reason in bad if paths[id_] and (root / paths[id_]).is_file()]
    try:
        index = read_index(job.path, job.header, number)
    except CorruptStoreError:  # a limit that was given is to be meant
        return [] if job.max_pixels else [(id_, reason, False) for id_, reason in bad if pixels_of(reason)]
    valid = {id_ for id_, was in zip(index.ids, index.valid.tolist(), strict=True) if was}
    return [(id_, reason, True) for id_, reason in bad if id_ in valid]


def _made_with(job: _Job, number: int) -> tuple[int, int]:
    """Batch size and threads of a shard: the bits of its features depend on them."""
    try:
        record = read_commit(job.path, number)
    except CorruptStoreError:
        return job.header.batch_size, job.header.threads
    return record.batch_size or job.header.batch_size, record.threads or job.header.threads


def _claim(path: Path, number: int) -> Lease:
    lease = Lease.acquire(path, number)
    if lease is None:
        raise StoreError(
            "another process is computing the same shard",
            found=f"a lease on shard {number}",
            where=path,
            fix="wait until it is done, then run the same command again",
        )
    return lease
