"""Looking after what is cached: what there is, what one store is made of, taking it along."""

from embcache.maintain.export import export_features
from embcache.maintain.listing import (
    CachedStore,
    InterruptedRun,
    StoreInfo,
    count_runs,
    list_cached,
    list_interrupted,
    store_info,
    transform_words,
)

__all__ = [
    "CachedStore",
    "InterruptedRun",
    "StoreInfo",
    "count_runs",
    "export_features",
    "list_cached",
    "list_interrupted",
    "store_info",
    "transform_words",
]
