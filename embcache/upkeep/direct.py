"""A random sample of cached rows against the images they were made from (``embcache verify --direct N``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embcache.data.budget import Decoding, check_max_pixels
from embcache.data.dataset import ImageDataset
from embcache.errors import EmbcacheError, StoreError
from embcache.extract.request import default_workers, image_root
from embcache.paths import PathLike
from embcache.store.feature_store import FeatureStore
from embcache.store.reading import read_header
from embcache.upkeep.networks import Features, Maker, make_again, recipe_network, sources_of, torch_threads

# Largest allowed |cached - direct| / max |direct| of an image, by precision: the same arithmetic in other batches.
TOLERANCES = {"fp32": 1e-4, "tf32": 5e-3, "fp16": 5e-3, "bf16": 2e-2}
FLOAT16_TOLERANCE = 1e-3  # added where features are kept as float16: half a unit in the last place is 2**-11
MIN_COSINE = 0.999  # to fp32 of the same image, whatever the precision
MAX_CHANGE = 0.02  # of a probe's metric, cached against fp32; two images of the sample where these weigh more
_SEED = 0
_PROBED = 2000  # rows that the probe is fitted on, at most
_FEWEST = 20


@dataclass(frozen=True)
class AgainstFull:
    """Cached features against fp32 features of the same images.

    Attributes
    ----------
    difference, cosine : float
        Largest relative difference and smallest cosine over the sample.
    metric : str
        What the probe was scored by; ``""`` where none could be fitted.
    cached, full : float or None
        The metric of the sample, by a probe fitted on cached features without it.
    limit : float
        Largest allowed change of the metric.
    reason : str
        Why there is no probe.
    """

    difference: float
    cosine: float
    metric: str
    cached: float | None
    full: float | None
    limit: float
    reason: str

    @property
    def well(self) -> bool:
        """Whether both are within what is allowed."""
        change = 0.0 if self.cached is None or self.full is None else abs(self.cached - self.full)
        return self.cosine >= MIN_COSINE and change <= self.limit


@dataclass(frozen=True)
class DirectCheck:
    """What the comparison found.

    Attributes
    ----------
    compared : int
        Images of the sample that were computed again.
    changed, unreadable : tuple of str
        Images of the sample whose bytes are others by now, or that cannot be read any more: left out.
    difference, cosine : float
        Largest |cached - direct| / max |direct| of an image, and smallest cosine.
    worst : str
        The image with the largest difference.
    tolerance : float
        Largest allowed difference.
    full : AgainstFull or None
        For features of less than fp32 or kept as float16.
    """

    compared: int
    changed: tuple[str, ...]
    unreadable: tuple[str, ...]
    difference: float
    cosine: float
    worst: str
    tolerance: float
    full: AgainstFull | None

    @property
    def well(self) -> bool:
        """Whether every compared row is what the images give."""
        close = self.compared > 0 and self.difference <= self.tolerance
        return close and not self.unreadable and (self.full is None or self.full.well)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON data."""
        full = None if self.full is None else {**asdict(self.full), "well": self.full.well}
        return {**asdict(self), "well": self.well, "full": full}

    def in_words(self) -> list[str]:
        """Lines for a terminal."""
        verdict = "well" if self.well else "NOT what the images give"
        lines = [
            f"direct: {self.compared} images computed again: {verdict}; largest difference {self.difference:.1e} "
            f"(allowed {self.tolerance:.1e}), smallest cosine {self.cosine:.7f}"
        ]
        if not self.well and self.worst:
            lines.append(f"  furthest off: {self.worst!r}")
        for label, ids in (("changed since, left out", self.changed), ("cannot be read any more", self.unreadable)):
            if ids:
                lines.append(f"  {label}: {len(ids)} (first: {ids[0]!r})")
        if self.full is not None:
            full = self.full
            lines.append(
                f"  against fp32: largest difference {full.difference:.1e}, smallest cosine {full.cosine:.7f} "
                f"(allowed {MIN_COSINE})"
            )
            if full.cached is not None and full.full is not None:
                change = f"change {full.cached - full.full:+.4f} (allowed {full.limit:.4f})"
                both = f"{full.cached:.4f} cached, {full.full:.4f} fp32"
                lines.append(f"  probe on cached features, {full.metric} of the sample: {both}, {change}")
            else:
                lines.append(f"  no probe: {full.reason}")
        return lines


def check_direct(
    path: Path,
    dataset: ImageDataset,
    number: int,
    *,
    home: PathLike | None = None,
    weights: Mapping[str, PathLike] | None = None,
    device: str = "auto",
    max_pixels: int | None = None,
) -> DirectCheck:
    """Compute a random sample of a store's rows again, straight from the images, and compare.

    Parameters
    ----------
    path : Path
        The store's folder.
    dataset : ImageDataset
        With its images.
    number : int
        Size of the sample, the same in every run; of a smaller store all rows.
    home, weights, device, max_pixels
        As for an extraction.

    Raises
    ------
    RecipeError, WeightsError, DatasetNotFoundError
        What is needed is not here, or another than then.
    CorruptStoreError
        The store is damaged.
    StoreError
        It holds no row of this dataset.
    """
    header = read_header(path)
    decoding = Decoding() if max_pixels is None else Decoding(check_max_pixels(max_pixels))
    maker = make_again(header, dataset, home=home, weights=weights, device=device)
    store = FeatureStore(path).restrict(dataset.table["id"])
    if not len(store):
        raise StoreError("the store holds no readable image of this dataset", where=path, fix="embcache ls")
    random = np.random.default_rng(_SEED)
    chosen = np.sort(random.choice(len(store), min(number, len(store)), replace=False))
    ids = store.ids[chosen].tolist()
    with torch_threads(header.threads):
        direct, readable, digests = _compute(maker, dataset, ids, header.batch_size, header.rows_per_shard, decoding)
        unreadable = [id_ for id_, there in zip(ids, readable, strict=True) if not there]
        other = [id_ for id_, digest in zip(ids, digests, strict=True) if _other(digest, store.digests.get(id_))]
        changed = [id_ for id_ in other if id_ not in unreadable]
        kept = np.array([id_ not in {*changed, *unreadable} for id_ in ids], dtype=bool)
        if not kept.any():
            return DirectCheck(0, tuple(changed), tuple(unreadable), float("inf"), 0.0, "", 0.0, None)
        rows, names = chosen[kept], [id_ for id_, keep in zip(ids, kept, strict=True) if keep]
        cached = store.features[rows]
        differences, cosines = _compare(cached, direct[kept])
        tolerance = 0.0 if store.holds_pixels else TOLERANCES[header.recipe.precision]
        reduced = header.recipe.dtype == "float16"
        full = None
        if not store.holds_pixels and (header.recipe.precision != "fp32" or reduced):
            network = recipe_network(
                replace(header.recipe, precision="fp32", dtype="float32"),
                dataset, home=home, weights=weights, device=device,
            )  # fmt: skip
            plain = Features(image_root(dataset), network)
            exact, _, _ = _compute(plain, dataset, names, header.batch_size, header.rows_per_shard, decoding)
            full = _against_full(store, dataset, rows, cached, exact)
    return DirectCheck(
        compared=len(names),
        changed=tuple(changed),
        unreadable=tuple(unreadable),
        difference=float(differences.max()),
        cosine=float(cosines.min()),
        worst=names[int(differences.argmax())],
        tolerance=tolerance + (FLOAT16_TOLERANCE if reduced else 0.0),
        full=full,
    )


def _compute(
    maker: Maker, dataset: ImageDataset, ids: Sequence[str], batch_size: int, at_once: int, decoding: Decoding
) -> tuple[NDArray[Any], NDArray[np.bool_], list[str]]:
    parts, digests = [], list[str]()
    with ThreadPoolExecutor(default_workers()) as pool:
        for start in range(0, len(ids), at_once):
            sources = sources_of(dataset, ids[start : start + at_once])
            rows = maker.make(sources, pool, batch_size, lambda rows: None, decoding)
            parts.append((rows.features, rows.valid))
            digests += rows.digests
    return np.concatenate([f for f, _ in parts]), np.concatenate([v for _, v in parts]), digests


def _other(digest: str, before: str | None) -> bool:
    return bool(digest and before and digest != before)


def _compare(cached: NDArray[Any], direct: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of each image: the largest difference relative to its largest value, and the cosine; (n, …) → (n,), (n,)."""
    one = cached.reshape(len(cached), -1).astype(np.float64)
    other = direct.reshape(len(direct), -1).astype(np.float64)
    scale = np.maximum(np.abs(other).max(axis=1), np.finfo(np.float32).tiny)
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    same = np.einsum("nd,nd->n", one, other) / np.maximum(norms, np.finfo(np.float64).tiny)
    # Two images of zeros are the same.
    return np.abs(one - other).max(axis=1) / scale, np.where(norms > 0, same, np.float64((one == other).all()))


def _against_full(
    store: FeatureStore, dataset: ImageDataset, rows: NDArray[np.int64], cached: NDArray[Any], exact: NDArray[Any]
) -> AgainstFull:
    differences, cosines = _compare(cached, exact)
    found: tuple[str, float | None, float | None] = ("", None, None)
    reason, labels = "", dict(zip(dataset.table["id"].tolist(), dataset.labels.tolist(), strict=True))
    y = np.array([labels[id_] for id_ in store.ids.tolist()], dtype=np.int64)
    scored = y[rows] >= 0
    try:
        found = _probe(store, dataset, y, rows, cached[scored], exact[scored], y[rows][scored])
    except (EmbcacheError, ValueError) as error:
        reason = str(error).split("\n")[0]
    limit = max(MAX_CHANGE, 2 / max(1, int(scored.sum())))
    return AgainstFull(float(differences.max()), float(cosines.min()), *found, limit, reason)


def _probe(
    store: FeatureStore,
    dataset: ImageDataset,
    y: NDArray[np.int64],
    rows: NDArray[np.int64],
    cached: NDArray[Any],
    exact: NDArray[Any],
    truth: NDArray[np.int64],
) -> tuple[str, float, float]:
    """Metric of the sample under a logistic regression fitted without it; of several views the plain one counts."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from embcache.probe.metrics import score

    rest = np.setdiff1d(np.flatnonzero(y >= 0), rows)
    if len(rest) > _PROBED:
        rest = np.sort(np.random.default_rng(_SEED).choice(rest, _PROBED, replace=False))
    if len(rest) < _FEWEST or len(np.unique(y[rest])) < 2 or not len(truth):
        raise ValueError(f"{len(rest)} labelled images besides the sample, of {len(np.unique(y[rest]))} classes")

    def plain(features: NDArray[Any]) -> NDArray[np.float32]:
        return (features if features.ndim == 2 else features[:, 0]).astype(np.float32)

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(plain(store.features[rest]), y[rest])
    classes = model.classes_

    def measured(features: NDArray[Any]) -> tuple[str, float]:
        found = np.zeros((len(features), len(dataset.class_names)))
        found[:, classes] = model.predict_proba(plain(features))
        try:
            return dataset.metric, float(score(dataset.metric, truth, np.log(found + 1e-300)))
        except EmbcacheError:  # the sample has not got the classes that the metric needs
            return "accuracy", float((found.argmax(axis=1) == truth).mean())

    name, one = measured(cached)
    _, other = measured(exact)
    return name, one, other
