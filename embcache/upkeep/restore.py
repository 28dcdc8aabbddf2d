"""A damaged ``recipe.json``, made again: only a recipe that hashes to the name of the store's folder will do."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from embcache.data.dataset import ImageDataset
from embcache.errors import CorruptStoreError, EmbcacheError, StoreError, UsageError
from embcache.extract.backbones import BACKBONES, find_backbone, load_backbone
from embcache.extract.pixels import pixel_recipe
from embcache.extract.request import default_workers
from embcache.extract.run import BATCH_SIZES, make_recipe
from embcache.extract.scan import scan_dataset
from embcache.extract.transforms import KINDS, Transform, choose_transform
from embcache.extract.worker import DTYPES, PRECISIONS, freeze
from embcache.io import read_regular
from embcache.paths import PathLike, slug
from embcache.store.commit import replace_file
from embcache.store.feature_store import PIXELS
from embcache.store.formats import FORMATS
from embcache.store.header import StoreHeader
from embcache.store.reading import committed_numbers, plan_numbers, read_commit, read_plan, shard_name
from embcache.store.recipe import Recipe
from embcache.store.sealed import seal
from embcache.store.verified import read_file
from embcache.store.zarr_plain import parse_array

_FILTERS = ("bilinear", "bicubic", "lanczos", "nearest", "box", "hamming")


@dataclass(frozen=True)
class _Seen:
    """What intact shards and plans say of their store."""

    format: str
    row_shape: tuple[int, ...]
    dtype: str
    rows_per_shard: int | None


def restore_recipe(
    path: Path,
    dataset: ImageDataset,
    *,
    home: PathLike | None = None,
    weights: Mapping[str, PathLike] | None = None,
    device: str = "auto",
    say: Callable[[str], object] = lambda line: None,
) -> None:
    """Write a store's ``recipe.json`` anew, if a recipe that can be made here has the fingerprint of its folder.

    Raises
    ------
    CorruptStoreError
        None has, or no shard is intact to tell the shape of its rows.
    """
    digits, seen = path.name[-12:], _look(path)
    if seen is None:
        raise _lost(path, "no shard is intact")
    text = _text(path)
    for recipe, source in _candidates(path, text, seen, dataset, home, weights, device):
        if recipe.fingerprint[:12] != digits:
            continue
        pixels = recipe.backbone == PIXELS
        header = StoreHeader(
            recipe=recipe,
            format=seen.format,
            row_shape=seen.row_shape,
            rows_per_shard=seen.rows_per_shard or max(len(read_plan(path, number)) for number in plan_numbers(path)),
            batch_size=_number(text, "batch_size") or BATCH_SIZES["cpu"],
            threads=_number(text, "threads") or (1 if pixels else torch.get_num_threads()),
            provenance={"weights": source, "note": "recipe.json was damaged and was made again"},
        )
        replace_file(path / "recipe.json", seal(header.to_json()))
        say(f"recipe.json: made again; it hashes to {recipe.fingerprint}")
        return
    raise _lost(path, f"no recipe made here has a fingerprint that begins with {digits}")


def _lost(path: Path, why: str) -> CorruptStoreError:
    return CorruptStoreError(
        "a damaged recipe.json cannot be made again",
        found=why,
        where=path / "recipe.json",
        fix="restore it from a copy; or give the weights that the store was made with (--weights NAME=FILE); or "
        f"remove the store for good and extract again: rm -r '{path}'",
    )


def _look(path: Path) -> _Seen | None:
    for number in committed_numbers(path):
        folder = path / "shards" / shard_name(number)
        try:
            record = read_commit(path, number)
            name = "hdf5" if "data.h5" in record.files else "zarr"
            form = FORMATS[name]
            files = {
                file: read_file(folder / file, "", record.files[file]) for file in form.feature_files(record.files)
            }
            features = form.decode_features(files)
        except Exception:  # this shard is damaged: another one may tell
            continue
        full = None
        if name == "zarr":
            array = parse_array(files["data.zarr/features/zarr.json"])
            full = array.chunk_rows if array else None
        elif len(plan_numbers(path)) > 1:
            full = max(_planned_rows(path), default=None)
        return _Seen(name, tuple(features.shape[1:]), str(features.dtype), full)
    return None


def _planned_rows(path: Path) -> Iterator[int]:
    for number in plan_numbers(path):
        try:
            yield len(read_plan(path, number))
        except StoreError:
            continue


def _candidates(
    path: Path,
    text: str,
    seen: _Seen,
    dataset: ImageDataset,
    home: PathLike | None,
    weights: Mapping[str, PathLike] | None,
    device: str,
) -> Iterator[tuple[Recipe, str]]:
    """Recipes that the folder's name allows, each with where its weights come from."""
    stem = path.name[:-13]
    if stem == PIXELS:
        yield from ((pixel_recipe(framing), "") for framing in _framings(seen))
        return
    hints = re.findall(r'"backbone": "([^"\\]+)"', text)
    names = [name for name in dict.fromkeys([*hints, *(weights or {}), *BACKBONES]) if slug(name) == stem]
    views = seen.row_shape[0] if len(seen.row_shape) == 2 else 1
    with ThreadPoolExecutor(default_workers()) as pool:
        sizes = scan_dataset(dataset, home, pool).sizes
    for name in names:
        for kind in KINDS:
            try:
                transform = choose_transform(find_backbone(name), kind, sizes)
            except UsageError:
                continue  # no such preprocessing of this backbone
            loaded = load_backbone(name, weights=(weights or {}).get(name), home=home, image_size=transform.size)
            try:
                made = make_recipe(freeze(loaded, transform, device, "fp32", views, dataset.augment))
            except EmbcacheError:
                continue
            for precision in PRECISIONS:
                for dtype in DTYPES:
                    yield replace(made, precision=precision, dtype=dtype), loaded.weights_source


def _framings(seen: _Seen) -> Iterator[Transform]:
    height, width = seen.row_shape[:2]
    size = (height, width)
    for interpolation in _FILTERS:
        for resize, crop in ((size, None), (None, None), (256, size), (height, size), (size, size)):
            yield Transform("paper", resize, crop, size, interpolation, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def _text(path: Path) -> str:
    try:
        return read_regular(path / "recipe.json", most=1 << 20).decode("utf-8", "replace")
    except OSError:
        return ""


def _number(text: str, name: str) -> int | None:
    """A number that the damaged file still shows; it decides bits at most, never which features these are."""
    found = re.search(rf'"{name}": (\d{{1,6}})\b', text)
    return int(found[1]) or None if found else None
