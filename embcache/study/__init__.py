"""Whole studies: the paper's tables and figures, one's own grids, the demonstration.

What is missing is extracted, probed or finetuned; what a run of the same request holds is reused.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embcache.study.demo import run_demo as run_demo
    from embcache.study.study import run_study as run_study

_HOMES = {"run_demo": "embcache.study.demo", "run_study": "embcache.study.study"}

__all__ = ["run_demo", "run_study"]


def __getattr__(name: str) -> Any:
    # Each on first use: reading a grid's TOML file must not cost the import of torch and matplotlib.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
