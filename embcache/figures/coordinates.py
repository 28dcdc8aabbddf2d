"""Coordinates of maps, kept: the same picture is not computed twice, and its points can be taken along."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embcache.errors import StoreError
from embcache.figures.maps import MAP_VERSION, embed_map
from embcache.io import keep_file
from embcache.sealed import read_sealed, seal

_PACKAGES = {"tsne": "openTSNE", "umap": "umap-learn", "pca": "scikit-learn"}


def cached_map(
    folder: Path,
    source: Mapping[str, Any],
    ids: Sequence[str],
    features: NDArray[np.float32],
    method: str,
    *,
    seed: int,
    perplexity: float,
) -> NDArray[np.float32]:
    """`embcache.figures.maps.embed_map`, read where the same map was made before.

    Shapes: features (n, D).
    """
    asked = {
        "source": dict(source),
        "images": hashlib.sha256("\0".join(ids).encode("utf-8")).hexdigest(),
        "features": hashlib.sha256(np.ascontiguousarray(features).tobytes()).hexdigest(),
        "method": method,
        "seed": seed,
        "perplexity": perplexity,
        "map": MAP_VERSION,
        "version": _version(_PACKAGES.get(method, "")),
    }
    name = hashlib.sha256(json.dumps(asked, sort_keys=True).encode("utf-8")).hexdigest()[:16]
    path = folder / f"{method}-{name}.json"
    try:
        kept = read_sealed(path, "")
        if kept["asked"] == asked:
            coordinates = np.asarray(kept["coordinates"], dtype=np.float32)
            if coordinates.shape == (len(ids), 2) and np.isfinite(coordinates).all():
                return coordinates
    except (OSError, StoreError, KeyError, ValueError, TypeError):
        pass  # none there, or not as it was written: it only saves work
    coordinates = embed_map(features, method, seed=seed, perplexity=perplexity)
    keep_file(path, seal({"asked": asked, "coordinates": coordinates.tolist()}))
    return coordinates


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
