"""A small study with hostile names: a table of images, their files, stores and runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from embcache.data.dataset import ImageDataset, load_dataset
from embcache.probe.predictions import Predictions
from embcache.probe.probe import probe_features
from embcache.report.collect import Choice, Rival
from embcache.results import compare
from embcache.results.advice import advise_backbone
from embcache.results.compare import Difference
from embcache.runs.result import Estimate
from tests.probe.build import make_features, put_store
from tests.results.build import make_result

HOSTILE = "<script>alert(1)</script>"
CLASSES = (HOSTILE, "$$\\frac{a}{b}$$", "b\"'&amp;")
NAME = "hostile"


@dataclass(frozen=True)
class Study:
    """Where a small study lies, and what it is of."""

    home: Path
    ds: ImageDataset
    table: Path


def make_study(folder: Path, *, n: int = 150, images: bool = True, heads: tuple[str, ...] = ("linear",)) -> Study:
    """Three classes with hostile names, hostile ids, two backbones, two sizes; with small PNGs."""
    rng = np.random.default_rng(0)
    root, home = folder / "pictures", folder / "home"
    root.mkdir(parents=True)
    labels = np.arange(n) % 3
    rows = []
    for k in range(n):
        path = f"patient{k:03d}.png"
        tone = 60 + 60 * labels[k] + rng.integers(0, 20, size=(20, 24), dtype=np.uint8)
        Image.fromarray(tone.astype(np.uint8)).save(root / path)
        rows.append(
            {
                "path": path, "label": CLASSES[labels[k]], "group": f"mrs-jones-{k // 2}",
                "split": "test" if k >= n // 2 else "train", "id": f"scan<b>{k:03d}</b>\u2028$$x$$",
                "sex": "F" if k % 2 else "<i>M</i>",
            }
        )  # fmt: skip
    table = root / "labels.csv"
    pd.DataFrame(rows).to_csv(table, index=False)
    ds = load_dataset("folder", table, name=NAME)
    for backbone, shift in (("weak", 0.8), ("strong", 3.0)):
        put_store(home, ds, backbone, make_features(ds, shift=shift))
    for head in heads:
        for subset in (12, 30):
            options = {"folds": 2, "subset": subset, "head": head, "home": home}
            if head == "linear":
                for backbone in ("weak", "strong"):
                    probe_features(ds, [backbone], **options)
            else:
                probe_features(ds, ["weak", "strong"], head_options={"proj_dim": 8}, **options)
    if not images:
        for path in root.glob("*"):
            path.unlink()
        root.rmdir()
    return Study(home, ds, table)


def make_rival(
    name: str,
    val: float,
    mean: float,
    difference: tuple[float, float, float] | None = None,
    p: float | None = None,
    backbones: tuple[str, ...] = ("a",),
) -> Rival:
    """A rival with these numbers: ``difference`` is (value, low, high), ``p`` corrected."""
    result = make_result((mean - 0.01, mean, mean + 0.01), id=name, val_mean=val, backbones=backbones)
    bounds = (mean - 0.02, mean + 0.02)
    estimate = Estimate("auc", "", mean, 0.01, bounds, bounds, "", 300, 1e-4, 1e-5, 0.5, 0.0)
    row = compare.Comparison(
        name, "pneumonia", backbones, "linear", "S", "auc", estimate,
        None if difference is None else Difference(difference[0], difference[1:], p, 0.03, None, True), p,
    )  # fmt: skip
    empty = np.zeros(0, dtype=object)
    none = Predictions(empty, empty, np.zeros(0, dtype=np.int64), np.zeros((3, 0, 2)), result.class_names)
    tested = compare.Tested(result, none)
    return Rival(name, tested, row)


def make_choice(*rivals: Rival, subset: str = "S", n_train: int = 50) -> Choice:
    advice = advise_backbone([rival.name for rival in rivals], [rival.row for rival in rivals], n_train)
    return Choice(subset, n_train, n_train + 100, rivals, advice)
