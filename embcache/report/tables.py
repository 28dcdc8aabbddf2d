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
        ``head``, ``backbones``, then each subset with its labels of one fold, training + validation.
    rows : list of list of str
        In the order in which a model first occurs; an empty cell where a result was not made, "not scored" where the
        test labels are not public.
    """
    if len({(result.dataset, result.metric) for result in results}) > 1:
        raise ValueError("pivot_results takes the results of one dataset and metric")
    columns: dict[str, tuple[int, int]] = {}
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for result in results:
        column = (result.n_train, result.labels_used - result.n_train)
        columns[result.subset] = max(columns.get(result.subset, column), column)
        model = (result.head, " + ".join(result.backbones))
        scored = result.mean is not None and result.std is not None
        cell = f"{result.mean:.3f} ± {result.std:.3f}" if scored else "not scored"
        cells.setdefault(model, {})[result.subset] = cell
    subsets = sorted(columns, key=lambda subset: columns[subset])
    headers = ["head", "backbones", *(f"{s}: {columns[s][0]:,} + {columns[s][1]:,} labels" for s in subsets)]
    return headers, [[*model, *(row.get(subset, "") for subset in subsets)] for model, row in cells.items()]
