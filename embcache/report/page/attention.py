"""Attention of a fused run for the page: a table of masses, its entropy, and the mean map as a small picture."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from embcache.analysis.run_attention import RunAttention, run_attention
from embcache.probe.results import ProbeResult
from embcache.report.page.choice import Choice
from embcache.report.page.collect import Part

ATTENDING = ("dvme", "dvme-token")
_SIDE = 384  # pixels of the picture at most
_DARK, _LIGHT = np.array([8.0, 48.0, 107.0]), np.array([247.0, 251.0, 255.0])


@dataclass(frozen=True, eq=False)
class Attended:
    """What the page shows of one run's attention.

    Attributes
    ----------
    found : RunAttention
    picture : str
        The mean map as PNG, base64; empty where a token is a backbone, for the table is the map then.
    """

    found: RunAttention
    picture: str

    def cells(self) -> list[tuple[str, list[tuple[str, float]]]]:
        """A row a backbone: its name, and of each backbone the share in words and as a number 0 … 1."""
        r = self.found
        return [
            (
                name,
                [
                    (f"{r.mass[i, j]:.3f}" + (f" ± {r.mass_std[i, j]:.3f}" if r.folds > 1 else ""), float(r.mass[i, j]))
                    for j in range(len(r.result.backbones))
                ],
            )
            for i, name in enumerate(r.result.backbones)
        ]

    def by_class(self) -> list[tuple[str, list[list[str]]]]:
        """For each class the rows of its own table, the backbone first."""
        names = self.found.result.backbones
        return [
            (label, [[name, *(f"{share:.3f}" for share in mass[i])] for i, name in enumerate(names)])
            for label, mass in self.found.by_class.items()
        ]

    def received(self) -> list[list[str]]:
        """The components that receive most: backbone, component, share."""
        even = 1 / len(self.found.weights)
        return [
            [backbone, str(component), f"{share:.5f} ({share / even:.1f} × even)"]
            for backbone, component, share in self.found.received
        ]


def attending_run(part: Part, choices: Sequence[Choice]) -> ProbeResult | None:
    """The run whose attention is shown: of dvme before dvme-token, of most training labels, best on validation."""
    runs = [r for r in part.results if r.kind == "probe" and r.head in ATTENDING and not r.target]
    ranked = {rival.result.id for choice in choices for rival in choice.rivals}
    runs = [r for r in runs if r.id in ranked] or runs
    return max(runs, key=lambda r: (r.head == "dvme", r.n_train, r.val_mean or 0.0), default=None)


def attend(part: Part, result: ProbeResult) -> Attended:
    """The attention of a run over the test images.

    Raises
    ------
    EmbcacheError
        Its features are not cached, or its heads cannot be read.
    """
    assert part.ds is not None
    found = run_attention(part.ds, result, part.run_folder(result), home=part.home)
    tokens, backbones = len(found.weights), len(result.backbones)
    return Attended(found, map_picture(found.weights, backbones) if tokens > backbones else "")


def map_picture(weights: NDArray[np.floating], backbones: int) -> str:
    """A mean map (N, N) as PNG in base64: dark is more, lines are the borders of the backbones.

    Shares span orders of magnitude between columns, so colours follow ranks (as quantiles), not values.
    """
    n = len(weights)
    step = -(-n // _SIDE)
    trimmed = np.asarray(weights, dtype=np.float64)[: n // step * step, : n // step * step]
    small = trimmed.reshape(len(trimmed) // step, step, len(trimmed) // step, step).mean((1, 3))
    edges = np.quantile(small, np.linspace(0, 1, 65)[1:-1])
    rank = np.searchsorted(edges, small, side="right") / 63.0
    pixels = _LIGHT + rank[..., None] * (_DARK - _LIGHT)
    picture = Image.fromarray(pixels.astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for border in range(1, backbones):
        at = round(border * n / backbones / step)
        draw.line([(at, 0), (at, picture.height)], fill=(213, 94, 0))
        draw.line([(0, at), (picture.width, at)], fill=(213, 94, 0))
    data = BytesIO()
    picture.quantize(64).save(data, "PNG", optimize=True)
    return base64.b64encode(data.getvalue()).decode("ascii")
