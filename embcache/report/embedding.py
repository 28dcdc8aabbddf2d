"""What the page draws from cached features: the embedding map with its thumbnails, and the attention of a fused run."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from io import BytesIO
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from embcache.cores import usable_cores
from embcache.data.dataset import ImageDataset
from embcache.data.images import ImageRef, image_refs_of, read_image
from embcache.errors import EmbcacheError, ImageError, StoreError, StoreNotFoundError
from embcache.figures.attention import run_attention
from embcache.figures.maps import PERPLEXITY, cached_map, decimals, score_map
from embcache.figures.shown import Colors, Shown, colors_of, fused_features, shown_images
from embcache.io import keep_file
from embcache.log import log
from embcache.paths import slug
from embcache.probe.inputs import cached_backbones, load_features, open_stores
from embcache.probe.metrics import merit
from embcache.report.collect import Choice, Part
from embcache.results.layout import Table, signed
from embcache.runs.folders import Result, run_file
from embcache.sealed import file_checksum, read_sealed, seal, typed
from embcache.store.feature_store import FeatureStore

LIMIT = 6000
"""Images of a map: more make the page heavy and hide each other."""

BUDGET = 4_800_000
"""Bytes of all thumbnails of a page, as base64."""

ACROSS = 16  # thumbnails in a row of a sheet; a sheet is as high as wide
_FUSED, _ATTENDING = ("dvme", "dvme-token", "dvme-noattn", "dvme-identity"), ("dvme", "dvme-token")
_SEED = 0
_GRAY = (128, 128, 128)
_TRIES = ((72, 60), (64, 55), (56, 50), (48, 45), (40, 40), (32, 35), (24, 30))  # side in pixels, WebP quality
_VERSION = 1  # of the kept attention: raised when the picture or the numbers change
_SIDE = 384  # pixels of the picture at most
_DARK, _LIGHT = np.array([8.0, 48.0, 107.0]), np.array([247.0, 251.0, 255.0])

Rows = list[list[float]]


def fused_run(results: Sequence[Result], choices: Sequence[Choice], heads: Sequence[str] = _ATTENDING) -> Result | None:
    """The fused run that is shown: dvme before others, of most training labels, best on validation."""
    runs = [
        r for r in results if r.kind == "probe" and r.head in heads and not r.target and not r.request.get("classes")
    ]
    ranked = {rival.result.id for choice in choices for rival in choice.rivals}
    runs = [r for r in runs if r.id in ranked] or runs
    return max(runs, key=lambda r: (r.head == "dvme", r.n_train, merit(r.metric, r.val_mean)), default=None)


def make_map(part: Part, choices: Sequence[Choice], *, rows: str = "test", most: int = LIMIT) -> dict[str, Any]:
    """Map every cached backbone of a dataset, and the embedding of its best fused run.

    ``shown``: the images, in an order of their own that says nothing; ``panels``: label and remark of each embedding;
    ``by``: names of the models whose predictions can be shown; ``data`` is for the page's script.
    """
    dataset = part.dataset
    if dataset is None:
        missing = f"neither images nor a table of {part.name} are here"
        raise StoreNotFoundError(missing, code="dataset-not-here", fix="embcache extract …")
    stores, notes = _stores(dataset, part)
    request = choices[-1].chosen.result.request if choices else {}
    protocol: dict[str, Any] = {key: request[key] for key in ("seed", "test") if key in request}
    protocol["exclude_test_overlap"] = bool(request.get("exclude_test_overlap", False))
    shown = shown_images(dataset, list(stores.values()), rows=rows, most=most, **protocol)
    # In a seeded order, so that a point's number does not give away its place in the dataset.
    order = np.random.Generator(np.random.PCG64(_SEED)).permutation(len(shown.ids))
    shown = Shown([shown.ids[i] for i in order], shown.labels[order], [shown.groups[i] for i in order], shown.remark)
    colors = colors_of(dataset.task, shown.labels)
    classes, names = _in_classes(colors)
    features = {name: load_features(store, dataset, shown.ids).numpy() for name, store in stores.items()}
    inputs = [(name, "", x, {"recipe": stores[name].recipe.fingerprint}) for name, x in sorted(features.items())]
    fused = fused_run([r for r in part.results if set(r.backbones) <= set(features)], choices, _FUSED)
    if fused is not None:
        try:
            fold, x = fused_features(fused, part.run_folder(fused), {b: features[b] for b in fused.backbones})
            remark = f"trained with labels ({fused.subset}, {fused.n_train:,} of them; fold {fold})"
            label = f"{fused.head}: {' + '.join(fused.backbones)}"
            inputs.append((label, remark, x, {"run": fused.id, "fold": str(fold)}))
        except EmbcacheError as error:
            notes.append(f"the embedding of run {fused.id} is not shown: {error.problem}")
    folder = part.home / slug(dataset.name) / "figures" / "coordinates"
    maps, scores = [], []
    for label, remark, x, origin in inputs:
        log.info(f"{dataset.name}: t-SNE of {label}, {len(x):,} images")
        points = cached_map(folder, origin, shown.ids, x, "tsne", seed=_SEED, perplexity=PERPLEXITY)
        found = score_map(x, points, colors.values if colors.classes else None, shown.groups)
        maps.append({"xy": [[round(float(v), 2) for v in axis] for axis in points.T], "remark": remark})
        silhouette = "–" if found.silhouette is None else signed(found.silhouette, 3)
        numbers = (silhouette, decimals(found.knn_accuracy, 3), decimals(found.trustworthiness, 3))
        scores.append((label, f"{x.shape[1]:,}", *numbers, remark))
    predicted = [_predictions(choice, shown.ids) for choice in reversed(choices) if colors.classes]
    headers = ("embedding", "dimensions", "silhouette", "k-NN accuracy", "trustworthiness of the map", "")
    data = {
        "labels": classes.tolist(),
        "classes": names,
        "noun": dataset.task.noun,
        "maps": maps,
        "predicted": predicted,
    }
    return {
        "shown": shown, "panels": [(label, remark) for label, remark, _, _ in inputs], "data": data, "notes": notes,
        "scores": Table("embeddings", "Scores of the embeddings", headers, tuple(scores)),
        "by": [entry["by"] for entry in predicted], "scored": colors.classes,
    }  # fmt: skip


def _in_classes(colors: Colors) -> tuple[NDArray[np.int64], list[str]]:
    """The classes that the points of a map have; of a number its fifths."""
    if colors.values.dtype.kind != "f":
        return colors.values, [*colors.names]
    cuts = np.unique(np.quantile(colors.values, (0.2, 0.4, 0.6, 0.8), method="lower"))
    ends = [f"{cut:.4g}" for cut in cuts]
    names = [f"{colors.names[0]} up to {ends[0]}", *(f"{a} to {b}" for a, b in pairwise(ends)), f"above {ends[-1]}"]
    return np.searchsorted(cuts, colors.values, side="left"), names


def _stores(dataset: ImageDataset, part: Part) -> tuple[dict[str, FeatureStore], list[str]]:
    """A store of every cached backbone, where several recipes are cached that of the results; and what is not shown."""
    stores, notes = dict[str, FeatureStore](), list[str]()
    for name in cached_backbones(dataset.name, part.home):
        used = [dict(map(tuple, r.request.get("recipes", []))).get(name) for r in part.results]
        for recipe in (None, *dict.fromkeys(fingerprint for fingerprint in used if fingerprint)):
            try:
                stores |= open_stores(dataset, [[name]], part.home, recipe)
                break
            except EmbcacheError as error:
                problem = error.problem
        else:
            notes.append(f"{name} is not shown: {problem}")
    if not stores:
        missing = f"no features are cached for {dataset.name}"
        raise StoreNotFoundError(missing, code="store-not-found", fix="embcache extract --backbone NAME")
    return stores, notes


def _predictions(choice: Choice, ids: Sequence[str]) -> dict[str, Any]:
    """The class and its probability that the ensemble of the best model gives to each image; −1 where none."""
    tested = choice.chosen.tested
    mean = tested.predictions.ensemble().p[0]  # (n, C)
    place = {name: row for row, name in enumerate(tested.ids.tolist())}
    rows = np.array([place.get(name, -1) for name in ids], dtype=np.int64)
    return {
        "by": f"{choice.subset}: {choice.chosen.name}",
        "label": np.where(rows >= 0, mean.argmax(1)[rows], -1).tolist(),
        "p": [round(float(v), 3) for v in np.where(rows >= 0, mean.max(1)[rows], 0.0)],
    }


def make_sheets(dataset: ImageDataset, ids: Sequence[str], budget: int = BUDGET) -> dict[str, Any] | None:
    """Thumbnails of some images as sprite sheets, as large and as good as the budget allows; None without images.

    ``sheets`` are WebP pictures in base64 of 16 × 16 thumbnails, ``side`` their pixels, ``place`` each image's running
    number over all sheets, −1 where it cannot be read.
    """
    root = dataset.root
    if root is None or not root.is_dir() or not ids:
        return None
    largest = _TRIES[0][0]

    def small(ref: ImageRef) -> Image.Image | None:
        try:
            picture = Image.fromarray(read_image(root, ref.path, ref.place)[0])
        except (ImageError, OSError):
            return None
        picture.thumbnail((largest, largest))
        return picture

    try:
        with ThreadPoolExecutor(usable_cores()) as pool:
            pictures = list(pool.map(small, image_refs_of(dataset.table, ids)))
    except StoreError as error:
        log.warning("no thumbnails: %s (%s)", error.problem, error.where)
        return None
    kept = [picture for picture in pictures if picture is not None]
    if not kept:
        return None
    numbers, sheets, side = iter(range(len(kept))), list[str](), largest
    place = [-1 if picture is None else next(numbers) for picture in pictures]
    for side, quality in _TRIES:
        # One sheet tells roughly what all will take; the last try is taken whatever it weighs.
        first = _sheet(kept[: ACROSS**2], side, quality)
        if len(first) * len(kept) / min(len(kept), ACROSS**2) > 1.1 * budget and (side, quality) != _TRIES[-1]:
            continue
        rest = [_sheet(kept[at : at + ACROSS**2], side, quality) for at in range(ACROSS**2, len(kept), ACROSS**2)]
        sheets = [first, *rest]
        if sum(map(len, sheets)) <= budget:
            break
    return {"side": side, "across": ACROSS, "sheets": sheets, "place": place}


def _sheet(pictures: Sequence[Image.Image], side: int, quality: int) -> str:
    sheet = Image.new("RGB", (ACROSS * side, -(-len(pictures) // ACROSS) * side), _GRAY)
    for number, picture in enumerate(pictures):
        row, column = divmod(number, ACROSS)
        fitted = picture.copy()
        fitted.thumbnail((side, side))
        sheet.paste(fitted, (column * side + (side - fitted.width) // 2, row * side + (side - fitted.height) // 2))
    return _base64(sheet, "WEBP", quality=quality, method=4)  # no metadata is written


def _base64(picture: Image.Image, format: str, **options: Any) -> str:
    data = BytesIO()
    picture.save(data, format, **options)
    return base64.b64encode(data.getvalue()).decode("ascii")


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


def attend(part: Part, result: Result) -> Attended:
    """The attention of a run over the test images, read where it was computed before."""
    assert part.dataset is not None
    folder = part.run_folder(result)
    key = {"run": result.id, "heads": file_checksum(run_file(folder, "heads.safetensors")), "version": _VERSION}
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode("utf-8")).hexdigest()[:16]
    path = part.home / slug(part.name) / "figures" / "attention" / f"{name}.json"
    try:
        kept = read_sealed(path, "")
        if kept["asked"] == key:
            attended: Attended = typed(Attended, kept["attended"])
            return attended
    except (OSError, StoreError, KeyError, ValueError):
        pass  # none there, or not as it was written: it only saves work
    recipes = ",".join(str(fingerprint) for _, fingerprint in result.request.get("recipes", [])) or None
    found = run_attention(part.dataset, result, folder, home=part.home, recipe=recipes)
    r, tokens, several = found.result, len(found.weights), found.folds > 1
    attended = Attended(
        run=r.id, head=r.head, subset=r.subset, backbones=list(r.backbones), images=len(found.shown.ids),
        folds=found.folds, tokens=tokens, mass=found.mass.tolist(),
        mass_std=found.mass_std.tolist() if several else None,
        classes=[(label, np.asarray(mass).tolist()) for label, mass in found.by_class.items()],
        entropy=found.entropy, entropy_std=found.entropy_std if several else None, most=list(found.received),
        picture=map_picture(found.weights, len(r.backbones)) if tokens > len(r.backbones) else "",
    )  # fmt: skip
    keep_file(path, seal({"asked": key, "attended": asdict(attended)}))
    return attended


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
    picture = Image.fromarray((_LIGHT + rank[..., None] * (_DARK - _LIGHT)).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for border in range(1, backbones):
        at = round(border * n / backbones / step)
        draw.line([(at, 0), (at, picture.height)], fill=(213, 94, 0))
        draw.line([(0, at), (picture.width, at)], fill=(213, 94, 0))
    return _base64(picture.quantize(64), "PNG", optimize=True)
