"""Values of any depth to 8 bits, by rules that depend on the image alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_BLOCK = 1 << 20  # values converted at a time: what is made of an image at the limit must not take gigabytes


def scale_to_bytes(
    values: npt.NDArray[Any], *, absent: npt.NDArray[np.bool_] | None = None, inverted: bool = False
) -> npt.NDArray[np.uint8]:
    """Scale an image by its own range: its smallest finite value becomes 0, its largest 255, a constant 0.

    Shapes: values (H, W); absent (H, W).
    """
    flat = np.ascontiguousarray(values).reshape(-1)
    gone = None if absent is None else np.repeat(absent.reshape(-1), values.size // max(1, absent.size))
    parts = [slice(start, start + _BLOCK) for start in range(0, flat.size, _BLOCK)]
    low, high = np.inf, -np.inf
    for part in parts:
        used = np.isfinite(flat[part]) if gone is None else np.isfinite(flat[part]) & ~gone[part]
        finite = flat[part][used]
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    scaled = np.zeros(flat.shape, dtype=np.uint8)
    if high > low:
        # Differences of the largest doubles overflow, and 255 over the smallest.
        unit = 0.25 if high / 2 - low / 2 > 1e307 else 2.0**600 if high - low < 1e-300 else 1.0
        low, high = low * unit, high * unit
        for part in parts:
            x = np.nan_to_num(flat[part].astype(np.float64) * unit, nan=low, posinf=high, neginf=low)
            levels = np.rint((np.clip(x, low, high) - low) * (255.0 / (high - low)))
            scaled[part] = 255.0 - levels if inverted else levels
            if gone is not None:
                scaled[part][gone[part]] = 0
            if inverted and flat.dtype.kind == "f":
                scaled[part][np.isnan(flat[part])] = 0
    return scaled.reshape(values.shape)


def widen_to_bytes(values: npt.NDArray[Any], bits: int) -> npt.NDArray[np.uint8]:
    """Unsigned values of up to 8 bits to the whole of 0 … 255, as Pillow does: white is white at any depth."""
    if bits == 8:
        return values.astype(np.uint8, copy=False)
    levels = np.rint(np.arange(1 << bits) * (255.0 / ((1 << bits) - 1))).astype(np.uint8)
    return np.asarray(levels[values])
