"""Results as the tables a reader compares: a row a model, a column a subset."""

from __future__ import annotations

from collections.abc import Sequence

from embcache.probe.results import ProbeResult


def pivot_results(results: Sequence[ProbeResult]) -> tuple[list[str], list[list[str]]]:
    """Backbones and heads down, subsets across; cells are mean ± sd over folds.

    Results of one dataset only: metrics of different datasets do not belong in one column.

    Returns
    -------
    headers : list of str
        ``head``, ``backbones``, then each subset with its number of training images.
    rows : list of list of str
        In the order in which a model first occurs; an empty cell where a result was not made.
    """
    if len({(result.dataset, result.metric) for result in results}) > 1:
        raise ValueError("pivot_results takes the results of one dataset and metric")
    sizes: dict[str, int] = {}
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for result in results:
        subset = str(result.subset)
        sizes[subset] = max(sizes.get(subset, 0), result.n_train)
        model = (result.head, " + ".join(result.backbones))
        cells.setdefault(model, {})[subset] = f"{result.mean:.3f} ± {result.std:.3f}"
    subsets = sorted(sizes, key=lambda subset: sizes[subset])
    headers = ["head", "backbones", *(f"{subset} ({sizes[subset]} images)" for subset in subsets)]
    return headers, [[*model, *(row.get(subset, "") for subset in subsets)] for model, row in cells.items()]
