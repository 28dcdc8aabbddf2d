"""What may be asked of an extraction, and the messages for what may not."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from embcache.cores import usable_cores
from embcache.data.budget import Decoding
from embcache.data.dataset import ImageDataset
from embcache.data.images import image_refs
from embcache.errors import DatasetNotFoundError, UsageError, check_number
from embcache.extract.batching import prepare
from embcache.paths import PathLike, slug
from embcache.store.feature_store import FeatureStore, extract_command
from embcache.store.schema import MOST_SHARD_ROWS


def none_readable(dataset: ImageDataset, root: Path, decoding: Decoding | None = None) -> DatasetNotFoundError:
    """The error for a dataset of which no image can be read, with the first reasons."""
    prepared = [prepare(root, source, (), decoding=decoding) for source in image_refs(dataset.table.head(3))]
    reasons = dict.fromkeys(image.reason for image in prepared if image.reason)
    return DatasetNotFoundError(
        "none of the dataset's images can be read",
        where=root,
        found=f"{len(dataset)} names; the first: {'; '.join(reasons) or 'headers that say no size'}",
        fix=f"embcache datasets {dataset.layout} --data-root {root}",
    )


def image_root(dataset: ImageDataset) -> Path:
    """Folder of the images; `DatasetNotFoundError` where it is not here."""
    if dataset.root is None or not dataset.root.is_dir():
        raise DatasetNotFoundError(
            f"the images of {dataset.name} are not here; extraction needs them",
            expected=str(dataset.root) if dataset.root else None,
            fix=extract_command("NAME", replace(dataset, root=None, origin=None)),
        )
    return dataset.root


def weights_by_name(names: Sequence[str], weights: PathLike | Mapping[str, PathLike] | None) -> dict[str, Path]:
    """Checkpoint of each backbone that was given one; `UsageError` where they do not fit the names."""
    if not names:
        raise UsageError("no backbone was named", fix="embcache backbones")
    if weights is None:
        return {}
    if isinstance(weights, str | os.PathLike):
        if len(names) > 1:
            raise UsageError(
                "one checkpoint for several backbones", found=str(weights), fix="--weights NAME=FILE for each"
            )
        return {names[0]: Path(weights)}
    unknown = sorted(set(weights) - set(names))
    if unknown:
        raise UsageError(
            "weights for a backbone that was not asked for",
            found=", ".join(unknown),
            expected=", ".join(names),
            fix="--weights NAME=FILE with a NAME given to --backbone",
        )
    return {name: Path(file) for name, file in weights.items()}


def default_workers() -> int:
    """Threads that decode images where nobody says how many: one a core, 8 at most."""
    return min(usable_cores(), 8)


def check_numbers(
    batch_size: int | None = None,
    workers: int | None = None,
    part: tuple[int, int] | None = None,
    views: int = 1,
    rows_per_shard: int | None = None,
) -> None:
    """`UsageError` for numbers that no extraction can have."""
    check_number("--views", views, 1, 1_000)
    for flag, value, most in (
        ("--rows-per-shard", rows_per_shard, MOST_SHARD_ROWS), ("--batch-size", batch_size, 1 << 16),
        ("--workers", workers, 1 << 10),
    ):  # fmt: skip
        if value is not None:
            check_number(flag, value, 1, most)
    if part is not None and not 1 <= part[0] <= part[1]:
        raise UsageError(
            "no such part", expected="I/N with 1 <= I <= N", found=f"{part[0]}/{part[1]}", fix="--part 1/4"
        )


def say_what_differs(store: FeatureStore, folder: Path, say: Callable[[str], object]) -> None:
    """Tell why the features of a backbone that is cached already are computed anew: a stale cache is never served."""
    for path in sorted(folder.glob(f"{slug(store.recipe.backbone)}-*")):
        other = FeatureStore(path)
        if path == store.path or other.recipe.backbone != store.recipe.backbone or not other.committed():
            continue
        if other.views != store.views:
            continue  # asked for as such: nobody takes one for the other
        differences = store.recipe.differences(other.recipe)
        what = ", ".join(f"{name} {theirs} there, {mine} now" for name, (mine, theirs) in differences.items())
        say(
            f"{store.recipe.backbone} is cached under another recipe ({path.name}: {what}); "
            "all images are extracted under this one, and `embcache probe --recipe PREFIX` tells the two apart"
        )
