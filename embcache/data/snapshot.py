"""The name and the ids of a dataset's snapshot, read without pandas: listing what is cached needs no more."""

from __future__ import annotations

import json

from embcache.errors import DatasetError
from embcache.paths import PathLike, home_dir, slug

FILE = "dataset.parquet"


def snapshot_ids(name: str, home: PathLike | None = None) -> tuple[str, list[str]] | None:
    """The dataset's own name and the ids of its images, as extraction kept them; None where there is no snapshot.

    Parameters
    ----------
    name : str
        The dataset, or the folder of its stores.
    home : path, optional
        Folder of stores and runs.

    Raises
    ------
    DatasetError
        The snapshot is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = home_dir(home) / slug(name) / FILE
    if not path.is_file():
        return None
    try:
        file = pq.ParquetFile(path)
        meta = json.loads(file.schema_arrow.metadata[b"embcache"])
        return str(meta["name"]), [str(id_) for id_ in file.read(columns=["id"])["id"].to_pylist()]
    except (pa.ArrowException, KeyError, TypeError, ValueError, OSError) as error:
        raise DatasetError(
            "the snapshot of a dataset is damaged", found=str(error).split("\n")[0], where=path
        ) from error
