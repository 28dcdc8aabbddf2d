"""Attention of a fused run for the page: a table of masses, its entropy, and the mean map as a small picture."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from embcache.data.classes import target_words
from embcache.errors import StoreError
from embcache.figures.attention import RunAttention, run_attention
from embcache.io import keep_file
from embcache.paths import slug
from embcache.probe.metrics import merit
from embcache.report.choice import Choice
from embcache.report.collect import Part
from embcache.runs.folders import ProbeResult, run_file
from embcache.sealed import file_checksum, read_sealed, seal
from embcache.typed import typed

ATTENDING = ("dvme", "dvme-token")
_VERSION = 1  # of what is kept: raised when the picture or the numbers change
_SIDE = 384  # pixels of the picture at most
_DARK, _LIGHT = np.array([8.0, 48.0, 107.0]), np.array([247.0, 251.0, 255.0])

Rows = list[list[float]]


@dataclass(frozen=True)
class Attended:
    """What the page shows of one run's attention; small enough to be kept beside the maps' coordinates."""

    run: str
    head: str
    subset: str
    backbones: list[str]
    images: int
    folds: int
    tokens: int
    mass: Rows  # share of attention from the tokens of a row's backbone to those of a column's; rows sum to 1
    mass_std: Rows | None  # deviation over folds
    classes: list[tuple[str, Rows]]  # of the test images of each class alone
    entropy: float  # of a token's weights as a share of log N
    entropy_std: float | None
    most: list[tuple[str, int, float]]  # backbone, component and share of all attention of those that receive most
    picture: str  # the mean map as PNG, base64; empty where a token is a backbone, for the table is the map then

    def cells(self) -> list[tuple[str, list[tuple[str, float]]]]:
        """A row a backbone: its name, and of each backbone the share in words and as a number 0 … 1."""
        spread = self.mass_std
        return [
            (name, [(f"{v:.3f}" + (f" ± {spread[i][j]:.3f}" if spread else ""), v) for j, v in enumerate(self.mass[i])])
            for i, name in enumerate(self.backbones)
        ]

    def by_class(self) -> list[tuple[str, list[list[str]]]]:
        """For each class the rows of its own table, the backbone first."""
        return [
            (label, [[name, *(f"{share:.3f}" for share in mass[i])] for i, name in enumerate(self.backbones)])
            for label, mass in self.classes
        ]

    def received(self) -> list[list[str]]:
        """The components that receive most: backbone, component, share."""
        return [
            [backbone, str(component), f"{share:.5f} ({share * self.tokens:.1f} × even)"]
            for backbone, component, share in self.most
        ]


def attending_run(part: Part, choices: Sequence[Choice]) -> ProbeResult | None:
    """The run whose attention is shown: of dvme before dvme-token, of most training labels, best on validation."""
    runs = [r for r in part.results if r.kind == "probe" and r.head in ATTENDING and not target_words(r.request)]
    ranked = {rival.result.id for choice in choices for rival in choice.rivals}
    runs = [r for r in runs if r.id in ranked] or runs
    return max(runs, key=lambda r: (r.head == "dvme", r.n_train, merit(r.metric, r.val_mean)), default=None)


def attend(part: Part, result: ProbeResult) -> Attended:
    """The attention of a run over the test images, read where it was computed before."""
    assert part.ds is not None
    folder = part.run_folder(result)
    asked = {"run": result.id, "heads": file_checksum(run_file(folder, "heads.safetensors")), "version": _VERSION}
    name = hashlib.sha256(json.dumps(asked, sort_keys=True).encode("utf-8")).hexdigest()[:16]
    path = part.home / slug(part.name) / "figures" / "attention" / f"{name}.json"
    try:
        kept = read_sealed(path, "")
        if kept["asked"] == asked:
            attended: Attended = typed(Attended, kept["attended"])
            return attended
    except (OSError, StoreError, KeyError, ValueError):
        pass  # none there, or not as it was written: it only saves work
    recipes = ",".join(str(fingerprint) for _, fingerprint in result.request.get("recipes", [])) or None
    found = _attended(run_attention(part.ds, result, folder, home=part.home, recipe=recipes))
    keep_file(path, seal({"asked": asked, "attended": asdict(found)}))
    return found


def _attended(found: RunAttention) -> Attended:
    r, tokens, several = found.result, len(found.weights), found.folds > 1
    return Attended(
        run=r.id,
        head=r.head,
        subset=r.subset,
        backbones=list(r.backbones),
        images=len(found.shown.ids),
        folds=found.folds,
        tokens=tokens,
        mass=found.mass.tolist(),
        mass_std=found.mass_std.tolist() if several else None,
        classes=[(label, np.asarray(mass).tolist()) for label, mass in found.by_class.items()],
        entropy=found.entropy,
        entropy_std=found.entropy_std if several else None,
        most=list(found.received),
        picture=map_picture(found.weights, len(r.backbones)) if tokens > len(r.backbones) else "",
    )


def map_picture(weights: NDArray[np.floating], backbones: int) -> str:
    """A mean map (N, N) as PNG in base64: dark is more, lines are the borders of the backbones.

    Shares span orders of magnitude between columns, so colors follow ranks (as quantiles), not values.
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
