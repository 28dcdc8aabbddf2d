"""Which subsets train as one stack, and which rows are in memory for them."""

from __future__ import annotations

from collections.abc import Sequence

from embcache.data.splits import IntArray
from embcache.probe.heads import count_parameters
from embcache.probe.request import Asked
from embcache.probe.solve import is_solved

_SMALL = 5_000_000
"""Parameters of one subset's heads up to which several subsets train as one stack."""


def groups_of(asked: Asked, names: Sequence[str], subsets: Sequence[str]) -> list[list[str]]:
    """Subsets that train as one stack: all that share a source of features, of small heads.

    Large heads have nothing to gain from one another, and much to lose where hours of training are interrupted.
    """
    dims = {backbone: asked.stores[backbone].row_shape[-1] for backbone in names}
    size = count_parameters(asked.options.model, dims, len(asked.ds.class_names)) * asked.n_models
    if is_solved(asked.options.model) or size > _SMALL:
        return [[subset] for subset in subsets]
    by_source: dict[bool, list[str]] = {}
    for subset in subsets:
        by_source.setdefault(asked.buffer_rows(names, subset) is None, []).append(subset)
    return [part for group in by_source.values() for part in _parts_within(asked, names, group)]


def _parts_within(asked: Asked, names: Sequence[str], group: list[str]) -> list[list[str]]:
    """A group as it is where the limit of memory holds all its heads as one stack; else each subset by itself."""
    limit = asked.options.memory
    if limit is None or len(group) == 1:
        return [group]
    need, rows = asked.need(names, *group), asked.buffer_rows(names, group[0])
    together = (need.in_memory if rows is None else need.streamed) <= limit
    if together and need.width(limit, rows) >= asked.n_models * len(group):
        return [group]
    return [[subset] for subset in group]


def rows_together(asked: Asked, names: Sequence[str], group: Sequence[str], lacking: Sequence[str]) -> IntArray:
    """Rows to have in memory: those of all lacking subsets that are kept there, read once; else of the group alone."""
    limit = asked.options.memory
    kept = [subset for subset in lacking if asked.buffer_rows(names, subset) is None]
    if limit is None or asked.need(names, *kept).in_memory <= limit:
        return asked.used(*kept)
    return asked.used(*group)
