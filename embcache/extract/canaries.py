"""Features of two drawn images, kept with each store: whether a network still makes what the store was begun with.

A recipe names a network, the digest of its weights and the arithmetic, but not the code that runs it. Another version
of a library, an own module that was edited, or a device that computes otherwise would add rows that only look like
those that are there. Stores that were made without canaries are used as they are.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import embcache
from embcache.cores import is_shortage, out_of_memory
from embcache.errors import RecipeError, UsageError
from embcache.extract.worker import FrozenNetwork
from embcache.store.reading import read_canaries, read_header

# Largest allowed |kept - computed| / max |computed| of an image, by precision: the same arithmetic in other batches.
TOLERANCES = {"fp32": 1e-4, "tf32": 5e-3, "fp16": 5e-3, "bf16": 2e-2}
FLOAT16_TOLERANCE = 1e-3  # added where features are kept as float16: half a unit in the last place is 2**-11

# Libraries that the networks of a prefix are made of, by module and distribution.
_LIBRARIES = {
    "hf": ("transformers", "transformers"), "open_clip": ("open_clip", "open_clip_torch"),
    "onnx": ("onnxruntime", "onnxruntime"),
}  # fmt: skip


def draw_canaries(size: tuple[int, int]) -> NDArray[np.uint8]:
    """Two images of a height and width, uint8 (2, H, W, 3): ramps of color, and stripes from coarse to fine."""
    y, x = np.mgrid[: size[0], : size[1]].astype(np.int64)
    ramps = (255 * x // max(size[1] - 1, 1), 255 * y // max(size[0] - 1, 1), 255 * (x + y) // max(sum(size) - 2, 1))
    stripes = [(x * x + step * y * y + (3 - step) * x * y) // 32 % 256 for step in (1, 2, 3)]
    return np.stack([np.stack(ramps, axis=-1), np.stack(stripes, axis=-1)]).astype(np.uint8)


def canary_features(network: FrozenNetwork) -> NDArray[np.float32]:
    """What a network makes of the drawn images, float32 (2, \\*row_shape) of one view; refused unless all finite."""
    spec, size = network.backbone.spec, network.transform.size
    expected, made = (2, *spec.row_shape), np.zeros(0, np.float32)
    fix = "state its output as dim=…, and return one vector per image"
    try:
        made = network.features(draw_canaries(size))
        found = str(made.shape)
    except Exception as error:
        if is_shortage(error):
            raise out_of_memory(error) from error
        if spec.module is None:
            raise
        # Whatever code of the user raises.
        found = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:300]
        fix = f"let it take float32 images, (B, 3, {size[0]}, {size[1]}), and return one tensor; module.float() helps"
    if made.shape != expected:
        raise UsageError(
            f"{spec.name} does not make the features that it states", code="backbone-output",
            expected=f"{expected} of two images", found=found, fix=fix,
        )  # fmt: skip
    if bad := int((~np.isfinite(made)).sum()):
        lower = network.precision != "fp32"
        raise UsageError(
            f"{spec.name} makes features that are not finite", code="backbone-not-finite",
            expected="finite numbers for two drawn images", where=network.backbone.weights_source,
            found=f"{bad:,} of {made.size:,} values are not, in {network.precision} on {network.device}",
            fix="--precision fp32" if lower else "check the weights and the normalization of the network",
        )  # fmt: skip
    return made


def environment(network: FrozenNetwork) -> dict[str, str]:
    """Device and versions of the libraries that a network may be made of, as the provenance of a store records them."""
    spec, found = network.backbone.spec, {"device": str(network.device), "torch": torch.__version__}
    of_users = [name for module, name in _LIBRARIES.values() if spec.module is not None and module in sys.modules]
    of_prefix = [_LIBRARIES[spec.library][1]] if spec.library in _LIBRARIES else []
    for name in ("torchvision", "timm", *of_prefix, *of_users):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return {**found, "embcache": embcache.__version__}


def check_canaries(store: Path, network: FrozenNetwork, made: Callable[[], NDArray[np.float32]] | None = None) -> bool:
    """Whether a store has canaries; `RecipeError` where a network of its recipe departs from them.

    ``made`` gives the network's `canary_features`, if the caller needs them too.
    """
    kept = read_canaries(store)
    if kept is None:
        return False
    now, tolerance = made() if made else canary_features(network), TOLERANCES[network.precision]
    off = np.inf
    if kept.shape == now.shape:
        then, today = (rows.reshape(2, -1).astype(np.float64) for rows in (kept, now))
        scale = np.maximum(np.abs(today).max(axis=1), np.finfo(np.float32).tiny)
        off = float((np.abs(then - today).max(axis=1) / scale).max())
    if not off <= tolerance:
        raise _departs(store, network, kept, now, f"off by {off:.1e} of the largest")
    return True


def _departs(store: Path, network: FrozenNetwork, kept: Any, now: Any, off: str) -> RecipeError:
    spec, provenance, here = network.backbone.spec, read_header(store).provenance, environment(network)
    then = {name: str(provenance[name]) for name in here if name in provenance}
    others = {name: value for name, value in then.items() if value != here[name]}
    pins = [f"{name}=={value.partition('+')[0]}" for name, value in others.items() if name != "device"]
    own = spec.module is not None
    fixes = (
        *(["pip install " + shlex.join(pins)] if pins else []),
        *([f"--device {shlex.quote(then['device'])}"] if "device" in others else []),
        *(["state another version= of the module if its code has changed: it gets a store of its own"] if own else []),
        f"move the store away and extract again: mv {shlex.quote(str(store))} FOLDER",
    )
    return RecipeError(
        f"{spec.name} no longer makes the features that its store was begun with", code="canaries-depart",
        expected=f"within {TOLERANCES[network.precision]:g} of {_numbers(kept)} for a drawn image{_words(then)}",
        found=f"{_numbers(now)}, {off}{_words(here)}", where=store, fix=fixes,
    )  # fmt: skip


def _numbers(features: NDArray[np.float32]) -> str:
    return ", ".join(f"{value:.5g}" for value in features[0].reshape(-1)[:3].tolist()) + ", …"


def _words(versions: Mapping[str, str]) -> str:
    return " (" + ", ".join(f"{name} {value}" for name, value in versions.items()) + ")" if versions else ""
