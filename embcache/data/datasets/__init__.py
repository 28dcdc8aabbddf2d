"""One module per published layout; and the table of Kaggle's competitions, which two of them share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from embcache.data.files import check_file_ids, image_index
from embcache.data.tables import check_unique, read_table


def competition_table(
    root: Path,
    ids: pd.Series[str],
    labels: Sequence[int],
    group: Callable[[str], str],
    tested: Mapping[str, int] | None = None,
    *,
    files: tuple[str, str],
    folders: tuple[str, str],
    suffix: str,
) -> tuple[pd.DataFrame, list[str]]:
    """The table of labeled training images and of test images, and notes.

    ``tested`` has the labels of test images where they are known.

    ``files`` are the names of the label file and of the list that gives the order of a submission; ``folders`` those of
    the training and test images; ``ids.name`` is the column of ids.
    """
    train, test = (image_index(root / folder) for folder in folders)
    notes, known = [], ids.tolist()
    if unnamed := len(train.keys() - set(known)):
        notes.append(f"{unnamed:,} images in {folders[0]}/ have no row in {files[0]} and are left out")
    test_ids = list(test)
    if tested:
        test_ids = list(tested)
    elif test and (root / files[1]).is_file():
        test_ids = read_table(root / files[1], [str(ids.name)])[str(ids.name)].tolist()
    if not test_ids:
        notes.append("the official test images are not there: only --test local is possible")
    every = known + test_ids
    check_file_ids(every, where=root)
    check_unique(every, where=root)
    paths = [f"{folders[0]}/{train.get(i, i + suffix)}" for i in known]
    paths += [f"{folders[1]}/{test.get(i, i + suffix)}" for i in test_ids]
    cells = {
        "id": every, "path": paths, "place": "", "label": [*labels, *((tested or {}).get(i, -1) for i in test_ids)],
        "group": [group(i) for i in every], "split": ["train"] * len(known) + ["test"] * len(test_ids),
    }  # fmt: skip
    return pd.DataFrame(cells).astype({"label": "int64"}), notes
