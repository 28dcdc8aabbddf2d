"""Finetuning: images through backbones and a head that are trained together."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embcache.finetune.finetune import find_finetuned as find_finetuned
    from embcache.finetune.finetune import finetune_images as finetune_images
    from embcache.finetune.model import load_finetuned as load_finetuned

_HOMES = {
    "find_finetuned": "embcache.finetune.finetune",
    "finetune_images": "embcache.finetune.finetune",
    "load_finetuned": "embcache.finetune.model",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'embcache.finetune' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
