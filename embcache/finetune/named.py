"""Finetuning by the names of datasets and backbones: what the command does."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from embcache.data.chosen import Columns
from embcache.data.classes import ClassOptions
from embcache.data.dataset import find_dataset
from embcache.errors import UsageError
from embcache.finetune.finetune import finetune_images
from embcache.finetune.folds import Tell
from embcache.paths import PathLike
from embcache.probe.heads import make_head
from embcache.probe.inputs import PAPER_SET, find_splits
from embcache.runs.folders import ProbeResult


def finetune_named(
    datasets: Sequence[str],
    backbones: Sequence[str] = (),
    *,
    head: str = "linear",
    subsets: Sequence[str | int] = ("S",),
    data_root: PathLike | None = None,
    home: PathLike | None = None,
    allow_missing: bool = False,
    dataset_name: str | None = None,
    splits: str | None = None,
    classes: ClassOptions = ClassOptions(),
    columns: Columns = Columns(),
    weights: PathLike | Mapping[str, PathLike] | None = None,
    say: Callable[[str], object] = lambda line: None,
    progress: Tell | None = None,
    **options: Any,
) -> list[ProbeResult]:
    """Finetune on datasets by name.

    Parameters
    ----------
    datasets : sequence of str
        At least one.
    backbones : sequence of str
        A head that takes one gives a result for each; one that fuses trains them together (default: simclr, swav,
        dino).
    head, home, weights, say, progress, **options
        As for `embcache.finetune.finetune.finetune_images`.
    subsets : sequence of str or int
        Names or numbers of training images.
    data_root : path, optional
        The folder of the one dataset named.
    allow_missing : bool
        Go on without images that the labels name but are not there.
    dataset_name : str, optional
        Name of a ``folder`` dataset.
    splits : str, optional
        A splits file, or the name of an imported one.
    classes : ClassOptions
        Classes to drop or merge.
    columns : Columns
        As for `embcache.data.dataset.find_dataset`.

    Returns
    -------
    list of ProbeResult
        For each dataset each set of backbones each subset.

    Raises
    ------
    UsageError
        No dataset or no backbone is named; or ``data_root``, ``dataset_name`` or ``splits`` with several datasets.
    """
    if not datasets:
        raise UsageError(
            "no dataset was named", fix="embcache finetune --dataset NAME …   (embcache datasets lists them)"
        )
    if len(datasets) > 1 and any(given is not None for given in (data_root, splits, dataset_name)):
        raise UsageError(
            "--data-root, --name and --splits are for one dataset", found=", ".join(datasets), fix="--dataset NAME"
        )
    fuses = make_head(head).fuses
    if not backbones and not fuses:
        raise UsageError(
            "no backbone was named", fix="embcache finetune --backbone NAME …   (embcache backbones lists them)"
        )
    sets = [list(backbones or PAPER_SET)] if fuses else [[name] for name in backbones]
    found = []
    for name in datasets:
        ds, source = find_dataset(
            name, root=data_root, home=home, allow_missing=allow_missing, dataset_name=dataset_name, columns=columns
        )
        found.append((classes.of(ds), source))
    results = []
    for ds, source in found:
        for asked in sets:
            for subset in subsets:
                results.append(
                    finetune_images(
                        ds,
                        asked,
                        head=head,
                        subset=subset,
                        home=home,
                        splits=None if splits is None else find_splits(splits, ds, home),
                        weights=_weights_of(asked, weights),
                        source=source,
                        say=say,
                        progress=progress,
                        **options,
                    )
                )
    return results


def _weights_of(
    names: Sequence[str], weights: PathLike | Mapping[str, PathLike] | None
) -> PathLike | Mapping[str, PathLike] | None:
    """The checkpoints that are of these backbones."""
    if weights is None or isinstance(weights, str | os.PathLike):
        return weights
    return {name: file for name, file in weights.items() if name in names}
