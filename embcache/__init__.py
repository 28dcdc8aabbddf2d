"""embcache: which frozen embedding serves a medical imaging task, and how far does it get with 50 labels?

Stage 1, :func:`extract_features`, runs frozen vision backbones once over all images into feature stores.
Stage 2, :func:`probe_features`, trains heads on the cached features in seconds.
:func:`finetune_images` is the separate path: it trains backbones and head together, on images.

Importing this package imports neither torch nor timm: each name is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "EmbcacheError": "embcache.errors",
    "ImageDataset": "embcache.data.dataset",
    "load_dataset": "embcache.data.dataset",
    "Recipe": "embcache.store.recipe",
    "FeatureStore": "embcache.store.feature_store",
    "open_store": "embcache.store.feature_store",
    "extract_features": "embcache.extract.extract",
    "probe_features": "embcache.probe.probe",
    "finetune_images": "embcache.finetune.finetune",
    "ProbeResult": "embcache.runs.folders",
    "find_results": "embcache.results.curves",
    "compare": "embcache.results.compare",
    "subgroups": "embcache.results.compare",
    "predict": "embcache.results.predict",
    "rank": "embcache.figures.rank",
    "similarity": "embcache.figures.similarity",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from embcache.data.dataset import ImageDataset as ImageDataset
    from embcache.data.dataset import load_dataset as load_dataset
    from embcache.errors import EmbcacheError as EmbcacheError
    from embcache.extract.extract import extract_features as extract_features
    from embcache.figures.rank import rank as rank
    from embcache.figures.similarity import similarity as similarity
    from embcache.finetune.finetune import finetune_images as finetune_images
    from embcache.probe.probe import probe_features as probe_features
    from embcache.results.compare import compare as compare
    from embcache.results.compare import subgroups as subgroups
    from embcache.results.curves import find_results as find_results
    from embcache.results.predict import predict as predict
    from embcache.runs.folders import ProbeResult as ProbeResult
    from embcache.store.feature_store import FeatureStore as FeatureStore
    from embcache.store.feature_store import open_store as open_store
    from embcache.store.recipe import Recipe as Recipe


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'embcache' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
