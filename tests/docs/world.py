"""What pages talk of, small: datasets in their published layouts, a folder of your own, single images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from tests.data.test_nih import HEADER, row

SIZE = 40


def draw(path: Path, seed: int, kind: int) -> None:
    """An image whose brightness hints at its class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).normal(90 + 15 * kind, 40, (8, 8, 3)).clip(0, 255).astype(np.uint8)
    Image.fromarray(noise).resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(path)


def make_world(folder: Path) -> None:
    """Fill ``folder/data`` with datasets and ``folder`` with what users have lying about."""
    _pneumonia(folder / "data" / "pneumonia")
    _nih(folder / "data" / "nih")
    _aptos(folder / "data" / "aptos")
    for split, number in (("train", 80), ("test", 16)):
        for k in range(number):
            draw(folder / "my_images" / split / ("lesion" if k % 2 else "healthy") / f"{split}-{k}.png", 500 + k, k % 2)
    for k in range(4):
        draw(folder / "new-scans" / f"{k}.png", 600 + k, k % 2)
        draw(folder / "elsewhere" / ("NORMAL", "PNEUMONIA")[k % 2] / f"{k}.png", 620 + k, k % 2)
    draw(folder / "more" / "one.png", 610, 0)
    (folder / "my-grid.toml").write_text('datasets = ["pneumonia"]\nbackbones = ["random"]\nsubsets = ["S"]\n', "utf-8")


def _pneumonia(root: Path) -> None:
    for split, number, first in (("train", 70, 100), ("test", 12, 1)):
        for k in range(number):
            pathogen = "virus" if k % 4 == 1 else "bacteria"
            name = (
                f"PNEUMONIA/person{first + k}_{pathogen}_{k}.jpeg" if k % 2 else f"NORMAL/IM-{first + k:04}-0001.jpeg"
            )
            draw(root / "chest_xray" / split / name, first + k, k % 2)


def _nih(root: Path) -> None:
    root.mkdir(parents=True)
    for part, first, number in (("validation", 0, 50), ("test", 100, 30)):
        rows = []
        for k in range(number):
            findings = ["", "A", "N", "F", "P"][k % 5]
            name = f"{first + k:08}_000.png"
            line = row(name, first + k, findings).split(",")
            line[4], line[5], line[6] = str(20 + 7 * (k % 9)), "MF"[k // 5 % 2], ("PA", "AP")[k // 10 % 2]
            rows.append(",".join(line))
            draw(root / "images" / name, 2000 + first + k, k % 5)
        text = "\r\n".join([HEADER, *rows, ""])
        (root / f"four_findings_expert_labels_{part}_labels.csv").write_bytes(text.encode())


def _aptos(root: Path) -> None:
    root.mkdir(parents=True)
    train = {f"{k:012x}": k % 5 for k in range(60)}
    test = [f"{k:012x}" for k in range(100, 104)]
    for k, (name, grade) in enumerate(train.items()):
        draw(root / "train_images" / f"{name}.png", 3000 + k, grade)
    for k, name in enumerate(test):
        draw(root / "test_images" / f"{name}.png", 3100 + k, k)
    (root / "train.csv").write_text("id_code,diagnosis\n" + "".join(f"{i},{y}\n" for i, y in train.items()))
    (root / "test.csv").write_text("id_code\n" + "".join(f"{i}\n" for i in test))
    (root / "sample_submission.csv").write_text("id_code,diagnosis\n" + "".join(f"{i},0\n" for i in test))
