"""What a view over all shards is made of, for readers without embcache. Nothing here changes the disk."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import numpy as np

from embcache.errors import StoreError
from embcache.io import is_folder, read_regular
from embcache.sealed import crc32c
from embcache.store.formats import FORMATS
from embcache.store.header import StoreHeader
from embcache.store.reading import LiveRows

# The library that a format's view is written with: another version of it may write other bytes for the same view.
_LIBRARIES = {"zarr": "zarr", "hdf5": "h5py"}


MOST_ROWS = 1 << 26  # each takes memory while the view is made; shard numbers come from folder names


def view_files(header: StoreHeader, live: LiveRows) -> tuple[dict[str, bytes], dict[str, str]]:
    """Files and links of a store's view.

    Row ``N * rows_per_shard + i`` is row ``i`` of shard ``N``. Rows that are padding, superseded or not readable have
    ``valid`` False; those that are not live have no id either.
    """
    size = header.rows_per_shard * (max(live.shard_rows, default=-1) + 1)
    if size > MOST_ROWS:
        raise StoreError(
            "a store has too many rows for a view",
            expected=f"at most {MOST_ROWS:,}",
            found=f"{size:,}: {header.rows_per_shard:,} rows a shard, the last of them number {max(live.shard_rows):,}",
        )
    library = _LIBRARIES[header.format]
    rows = live.shards * header.rows_per_shard + live.positions
    ids, valid = [""] * size, np.zeros(size, bool)
    for row, id_ in zip(rows.tolist(), live.ids, strict=True):
        ids[row] = id_
    valid[rows] = live.valid
    attributes = {
        "backbone": header.recipe.backbone,
        "fingerprint": header.recipe.fingerprint,
        "written_by": f"embcache view 1, {library} {version(library)}",
        "shards": _mark(live.shard_rows),
        "rows": "use only rows whose valid is true; the others are padding, superseded or unreadable",
    }
    return FORMATS[header.format].encode_view(
        ids=ids,
        valid=valid,
        row_shape=header.row_shape,
        dtype=np.dtype(header.recipe.dtype),
        rows_per_shard=header.rows_per_shard,
        shard_rows=live.shard_rows,
        attributes=attributes,
    )


def view_is_current(store: Path, header: StoreHeader, committed: Iterable[int]) -> bool:
    """Whether the view that is there was made of just these shards; searched, not parsed: no checksum covers it."""
    view = store / FORMATS[header.format].view
    try:
        data = read_regular(view / "zarr.json" if is_folder(view) else view)
    except OSError:
        return False
    return _mark(committed).encode() in data


def _mark(committed: Iterable[int]) -> str:
    """What tells in a view which shards it was made of: its attribute ``shards``."""
    return f"view of the shards {crc32c(' '.join(map(str, sorted(committed))).encode())}"
