"""The built-in sample: synthetic tiles that resemble stained tissue, drawn here and the same on every machine.

Sixty "patients", each with a stain of its own and four tiles of each of four tissues; fifteen are the test set.

Every pixel follows from integers through sums, products, quotients, square roots and comparisons, which are rounded
alike on every processor; no sine, exponential or library noise, whose last bits are not.
"""

from __future__ import annotations

import math
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt

from embcache.data.dataset import ImageDataset
from embcache.data.datasets.folder import read_label_table
from embcache.data.published import DatasetLayout
from embcache.errors import DatasetError
from embcache.io import make_folder, rename_new, staged_name, sweep, write_tree

GROUPS, TEST_GROUPS, TILES_PER_CLASS = 60, 15, 4
SIZE = 96
CLASSES = ("fibres", "glands", "lymphoid", "tumour")
SEED = 20210501

# How hard the sample is. Chosen with a logistic regression on frozen networks at 40, 200 and 720 training images (macro
# AUC on the test groups): a random ResNet-50 reaches 0.64, 0.72, 0.76, the pretrained EfficientNet-Lites 0.86 to 0.88,
# 0.95 to 0.96, 0.97. With a dilution of 0.3 to 0.6, or thrice the noise, the random network stayed below 0.65 at 720.
DILUTION = (0.1, 0.5)  # share of a tile's cells that belong to another kind of tissue
NOISE = 5  # gray levels of pixel noise, to either side

Floats = npt.NDArray[np.float64]
_Y, _X = (axis.astype(np.float64) for axis in np.mgrid[0:SIZE, 0:SIZE])


def read_sample(root: Path, name: str) -> ImageDataset:
    """Read the drawn sample through its label table, as anyone's table would be read."""
    if not (root / "labels.csv").is_file():
        raise LAYOUT.layout_error(root)
    ds = read_label_table(root / "labels.csv", name)
    if ds.class_names != CLASSES or len(ds) != GROUPS * len(CLASSES) * TILES_PER_CLASS:
        raise LAYOUT.layout_error(root, "this is another sample than the one this version draws")
    note = "synthetic images, drawn by embcache: a score says nothing about real tissue"
    sizes = {"S": 40, "M": 200}
    return replace(ds, metric="macro_auc", augment="patch", subset_sizes=sizes, synthetic=True, notes=(note,))


def draw_sample(root: Path) -> None:
    """Draw all tiles into ``root``, whole or not at all, unless it exists; `DatasetError` if it cannot be written."""
    staged = root.with_name(staged_name(f".{root.name}-"))
    try:
        make_folder(root.parent)
        write_tree(staged, _draw_all())
        rename_new(staged, root)
        sweep(root.parent, root.name)
    except OSError as error:
        raise DatasetError(
            "the sample cannot be drawn", code="folder-not-writable", found=str(error.strerror), where=root,
            fix="name a writable folder with --home",
        ) from error  # fmt: skip


def _draw_all() -> dict[str, bytes]:
    from PIL import Image  # only drawing needs it: probing from a cache loads this module too

    files = {"README.txt": b"Synthetic images, drawn by embcache for its demonstration.\n"}
    lines = ["id,path,label,group,split"]
    for group in range(GROUPS):
        split = "test" if group % (GROUPS // TEST_GROUPS) == 3 else "train"
        for label, class_name in enumerate(CLASSES):
            for tile in range(TILES_PER_CLASS):
                name, drawn = f"patient{group:02d}/{class_name}-{tile}", BytesIO()
                Image.fromarray(draw_tile(group, label, tile)).save(drawn, "PNG", compress_level=1)
                files[f"{name}.png"] = drawn.getvalue()
                lines.append(f"{name},{name}.png,{class_name},patient{group:02d},{split}")
    return {**files, "labels.csv": ("\n".join(lines) + "\n").encode()}


class _Dice:
    """Random numbers from PCG64's raw stream, which numpy promises not to change (it may change ``Generator``)."""

    def __init__(self, *seed: int) -> None:
        self._bits = np.random.PCG64(seed)

    def uniform(self, *shape: int) -> Floats:
        """Values in [0, 1)."""
        raw = self._bits.random_raw(math.prod(shape))
        return np.asarray((raw >> np.uint64(11)) * 2.0**-53, dtype=np.float64).reshape(shape)

    def between(self, low: float, high: float) -> float:
        """One value in [low, high)."""
        return low + (high - low) * ((int(self._bits.random_raw()) >> 11) * 2.0**-53)

    def below(self, n: int) -> int:
        """One of 0 … n - 1."""
        return int(self.between(0.0, n))


def draw_tile(group: int, label: int, tile: int) -> npt.NDArray[np.uint8]:
    """Draw one tile."""
    dice = _Dice(SEED, group, label, tile)
    kinds = [k for k in range(len(CLASSES)) if k != label]
    second = kinds[dice.below(len(kinds))]
    share = dice.between(*DILUTION)
    stroma, nuclei = 0.35 + 0.3 * _smooth_noise(dice, 6), np.zeros((SIZE, SIZE))
    for kind, amount in ((second, share), (label, 1.0 - share)):
        stroma, nuclei = _TISSUES[kind](dice, amount, stroma, nuclei)
    return _stain(group, dice, stroma, nuclei)


def _fibres(dice: _Dice, amount: float, stroma: Floats, nuclei: Floats) -> tuple[Floats, Floats]:
    """Wavy bundles with a few thin nuclei along them."""
    dx, dy = _direction(dice)
    bend = dice.between(6.0, 16.0) * _smooth_noise(dice, 4)
    phase = (_X * dx + _Y * dy + bend) / dice.between(5.0, 9.0)
    ridge = np.abs(2.0 * (phase - np.floor(phase)) - 1.0)
    stroma = stroma + amount * 0.4 * (ridge - 0.5)
    for _ in range(int(16 * amount)):
        x, y = _place(dice)
        nuclei = _nucleus(nuclei, x, y, dice.between(4.0, 6.5), dice.between(1.1, 1.8), -dy, dx, 0.8)
    return stroma, nuclei


def _glands(dice: _Dice, amount: float, stroma: Floats, nuclei: Floats) -> tuple[Floats, Floats]:
    """Rings of nuclei around an empty lumen."""
    for _ in range(max(1, round(4 * amount))):
        x, y = _place(dice)
        radius = dice.between(9.0, 17.0)
        distance = np.sqrt((_X - x) * (_X - x) + (_Y - y) * (_Y - y))
        stroma = stroma * np.clip((distance - 0.45 * radius) / (0.35 * radius), 0.25, 1.0)
        for _ in range(int(1.5 * radius)):
            dx, dy = _direction(dice)
            r = radius * dice.between(0.9, 1.1)
            nuclei = _nucleus(
                nuclei, x + r * dx, y + r * dy, dice.between(2.4, 3.6), dice.between(1.8, 2.4), dx, dy, 0.8
            )
    return stroma, nuclei


def _lymphoid(dice: _Dice, amount: float, stroma: Floats, nuclei: Floats) -> tuple[Floats, Floats]:
    """Crowds of small round dark nuclei."""
    for _ in range(int(90 * amount)):
        x, y = _place(dice)
        dx, dy = _direction(dice)
        r = dice.between(2.0, 3.0)
        nuclei = _nucleus(nuclei, x, y, r, r * dice.between(0.85, 1.0), dx, dy, dice.between(0.8, 1.0))
    return stroma, nuclei


def _tumour(dice: _Dice, amount: float, stroma: Floats, nuclei: Floats) -> tuple[Floats, Floats]:
    """Nuclei of all sizes and shapes, pale, some with a dark nucleolus."""
    for _ in range(int(42 * amount)):
        x, y = _place(dice)
        dx, dy = _direction(dice)
        a = dice.between(2.4, 6.0)
        b = a * dice.between(0.5, 1.0)
        nuclei = _nucleus(nuclei, x, y, a, b, dx, dy, dice.between(0.45, 0.9))
        if dice.below(3) == 0:
            nuclei = _nucleus(nuclei, x + 0.3 * a * dx, y + 0.3 * a * dy, 1.2, 1.2, dx, dy, 1.0)
    return stroma, nuclei


_TISSUES = (_fibres, _glands, _lymphoid, _tumour)


def _nucleus(nuclei: Floats, x: float, y: float, a: float, b: float, dx: float, dy: float, density: float) -> Floats:
    """Put an ellipse with half-axes ``a`` (along ``dx, dy``) and ``b`` into the density of nuclei, in place."""
    reach = int(max(a, b)) + 2
    rows = slice(max(int(y) - reach, 0), max(int(y) + reach + 1, 0))
    columns = slice(max(int(x) - reach, 0), max(int(x) + reach + 1, 0))
    u, v = _X[rows, columns] - x, _Y[rows, columns] - y
    along, across = (u * dx + v * dy) / a, (v * dx - u * dy) / b
    inside = np.clip(2.5 * (1.15 - along * along - across * across), 0.0, 1.0) * density
    nuclei[rows, columns] = np.maximum(nuclei[rows, columns], inside)
    return nuclei


def _stain(group: int, dice: _Dice, stroma: Floats, nuclei: Floats) -> npt.NDArray[np.uint8]:
    """Densities to colors: each dye takes its share of the light; dyes, light and sharpness are the patient's."""
    own = _Dice(SEED, group)
    eosin = [own.between(*r) for r in ((0.05, 0.2), (0.4, 0.7), (0.2, 0.45))]
    haematoxylin = [own.between(*r) for r in ((0.55, 0.8), (0.6, 0.85), (0.25, 0.5))]
    light = [own.between(220.0, 255.0) for _ in range(3)]
    strength = own.between(0.7, 1.0)
    blurs = own.below(2)
    texture = 0.75 + 0.5 * _smooth_noise(dice, 24)  # chromatin
    dark = np.clip(nuclei * texture * strength, 0.0, 1.0)
    pale = np.clip(stroma, 0.0, 1.0)
    channels = [w * (1.0 - e * pale) * (1.0 - h * dark) for w, e, h in zip(light, eosin, haematoxylin, strict=True)]
    levels = np.stack(channels, axis=2)
    for _ in range(blurs):
        levels = _blur(levels)
    levels = levels + np.floor((2 * NOISE + 1) * dice.uniform(*levels.shape)) - NOISE
    return np.clip(np.rint(levels), 0, 255).astype(np.uint8)


def _blur(levels: Floats) -> Floats:
    padded = np.pad(levels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return np.asarray((rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9.0)


def _smooth_noise(dice: _Dice, cells: int) -> Floats:
    """Value noise in [0, 1): a lattice of ``cells`` by ``cells`` random values, interpolated."""
    lattice = dice.uniform(cells + 2, cells + 2)
    position = np.arange(SIZE) * (cells / SIZE)
    index = position.astype(np.int64)
    t = position - index
    t = t * t * (3.0 - 2.0 * t)
    rows = lattice[index] * (1.0 - t)[:, None] + lattice[index + 1] * t[:, None]
    return np.asarray(rows[:, index] * (1.0 - t) + rows[:, index + 1] * t)


def _direction(dice: _Dice) -> tuple[float, float]:
    while True:
        x, y = dice.between(-1.0, 1.0), dice.between(-1.0, 1.0)
        square = x * x + y * y
        if 0.01 < square <= 1.0:
            return x / math.sqrt(square), y / math.sqrt(square)


def _place(dice: _Dice) -> tuple[float, float]:
    return dice.between(0.0, SIZE), dice.between(0.0, SIZE)


LAYOUT = DatasetLayout(
    name="sample",
    read=read_sample,
    description="synthetic tiles that resemble stained tissue, drawn by embcache",
    expected="labels.csv and patient00/ to patient59/, as `embcache demo` draws them",
    draw=draw_sample,
)
