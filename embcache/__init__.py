"""embcache: which frozen embedding serves a medical imaging task, and how far does it get with 50 labels?

Stage 1, :func:`extract_features`, runs frozen vision backbones once over all images into feature stores.
Stage 2, :func:`probe_features`, trains heads on the cached features in seconds.
:func:`finetune_images` is the separate path: it trains backbones and a head together, on images.

Each function is the twin of a command. Importing this package imports neither torch nor timm: each name is loaded when
it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from embcache.cores import settle_openmp

__version__ = "0.1.0"

settle_openmp()

_NAMES = {
    "embcache.backbones.catalog": "Backbone",
    "embcache.config": "DatasetRef ExtractConfig FinetuneConfig ProbeConfig",
    "embcache.data.dataset": "ImageDataset load_dataset",
    "embcache.errors": "EmbcacheError UsageError",
    "embcache.extract.extract": "extract_features",
    "embcache.extract.foreign": "import_features",
    "embcache.figures.audit": "audit_dataset",
    "embcache.figures.rank": "rank similarity",
    "embcache.finetune.finetune": "finetune_images",
    "embcache.finetune.model": "load_finetuned",
    "embcache.probe.probe": "probe_features",
    "embcache.report.page": "write_report",
    "embcache.results.compare": "compare subgroups",
    "embcache.results.curves": "find_results",
    "embcache.results.predict": "predict",
    "embcache.runs.folders": "Result list_results",
    "embcache.store.feature_store": "FeatureStore list_stores open_store",
    "embcache.store.schema": "Recipe",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = ["__version__", *_MODULES]

if TYPE_CHECKING:
    from embcache.backbones.catalog import Backbone as Backbone
    from embcache.config import DatasetRef as DatasetRef
    from embcache.config import ExtractConfig as ExtractConfig
    from embcache.config import FinetuneConfig as FinetuneConfig
    from embcache.config import ProbeConfig as ProbeConfig
    from embcache.data.dataset import ImageDataset as ImageDataset
    from embcache.data.dataset import load_dataset as load_dataset
    from embcache.errors import EmbcacheError as EmbcacheError
    from embcache.errors import UsageError as UsageError
    from embcache.extract.extract import extract_features as extract_features
    from embcache.extract.foreign import import_features as import_features
    from embcache.figures.audit import audit_dataset as audit_dataset
    from embcache.figures.rank import rank as rank
    from embcache.figures.rank import similarity as similarity
    from embcache.finetune.finetune import finetune_images as finetune_images
    from embcache.finetune.model import load_finetuned as load_finetuned
    from embcache.probe.probe import probe_features as probe_features
    from embcache.report.page import write_report as write_report
    from embcache.results.compare import compare as compare
    from embcache.results.compare import subgroups as subgroups
    from embcache.results.curves import find_results as find_results
    from embcache.results.predict import predict as predict
    from embcache.runs.folders import Result as Result
    from embcache.runs.folders import list_results as list_results
    from embcache.store.feature_store import FeatureStore as FeatureStore
    from embcache.store.feature_store import list_stores as list_stores
    from embcache.store.feature_store import open_store as open_store
    from embcache.store.schema import Recipe as Recipe


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'embcache' has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
