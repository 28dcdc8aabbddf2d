"""Contract suites for authors of plugins: each raises an `AssertionError` that names the promise that does not hold.

::

    from embcache.testing import check_backbone, check_dataset, check_head, check_metric

    def test_my_backbone():
        check_backbone("my_package.networks:small")
"""

from __future__ import annotations

import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from embcache.backbones.catalog import Backbone, LoadedBackbone, find_backbone, load_backbone
from embcache.backbones.checkpoints import hash_state
from embcache.backbones.transforms import choose_transform
from embcache.data.dataset import ImageDataset
from embcache.data.images import ImageRef, read_image, read_size
from embcache.data.tables import COLUMNS
from embcache.extract.worker import FrozenNetwork, compute_shard, freeze
from embcache.paths import PathLike
from embcache.probe.metrics import find_metric

__all__ = ["check_backbone", "check_dataset", "check_head", "check_metric"]


def check_backbone(
    backbone: str | Backbone | LoadedBackbone, *, weights: PathLike | None = None, size: tuple[int, int] = (96, 96)
) -> None:
    """Check everything that embcache assumes about a backbone, on a CPU.

    Parameters
    ----------
    backbone : str, Backbone or LoadedBackbone
        A name as for ``--backbone``, or a backbone.
    weights : path-like, optional
        Checkpoint to use instead of the published one.
    size : (int, int)
        Height and width of the images, multiples of the patch and at most 224.
    """
    loaded = backbone if isinstance(backbone, LoadedBackbone) else load_backbone(backbone, weights=weights)
    spec, module = loaded.spec, loaded.module
    _check_row(loaded, backbone)
    transform = choose_transform(spec, "paper", {(size[1], size[0])})
    plain = freeze(loaded, transform, "cpu", "fp32")
    pixels = _draw(4, transform.size)
    before = hash_state(module)
    features = plain.features(pixels)
    assert features.shape == (4, spec.dim), f"features have shape {features.shape}, not {(4, spec.dim)}"
    assert features.dtype == np.float32, f"features are {features.dtype}, not float32"
    assert np.isfinite(features).all(), "features are not finite"
    scale = np.abs(features).max()
    assert np.abs(features[0] - features[1]).max() > 1e-3 * scale, "two images have the same features"
    assert np.array_equal(plain.features(pixels), features), "the same batch has other features the second time"
    assert hash_state(module) == before, "computing features changes the network"
    for rows in ([0], [3, 1, 2]):
        alone = plain.features(np.ascontiguousarray(pixels[rows]))
        difference = np.abs(alone - features[rows]).max()
        assert difference <= 1e-5 * scale, "an image's features depend on the other images of its batch"
    reduced = freeze(loaded, transform, "cpu", "bf16").features(pixels)
    cosines = (features * reduced).sum(1) / np.linalg.norm(features, axis=1) / np.linalg.norm(reduced, axis=1)
    assert reduced.dtype == np.float32, f"features in bf16 are {reduced.dtype}, not float32"
    assert cosines.min() >= 0.999, f"features in bf16 have a cosine of {cosines.min():.4f} to those in fp32"
    viewed = freeze(loaded, transform, "cpu", "fp32", views=2, augment="patch")
    _check_views(plain, viewed, pixels[:3])


def _check_row(loaded: LoadedBackbone, backbone: str | Backbone | LoadedBackbone) -> None:
    spec = loaded.spec
    if isinstance(backbone, str):
        assert spec == find_backbone(backbone), f"the loaded backbone is not the one named {backbone}"
    count = sum(parameter.numel() for parameter in loaded.module.parameters())
    assert count == spec.parameters, f"the network has {count:,} parameters, not {spec.parameters:,}"
    for name, text in (("network", spec.network), ("license", spec.license), ("source", spec.source)):
        assert text, f"the {name} is empty"
    assert len(loaded.weights_sha256) == 64, "the digest of the weights is not a sha256"
    assert loaded.weights_source, "the source of the weights is empty"
    assert not any(module.training for module in loaded.module.modules()), "the network is not in eval mode"
    assert not any(p.requires_grad for p in loaded.module.parameters()), "the network is not frozen"


def _check_views(plain: FrozenNetwork, viewed: FrozenNetwork, pixels: np.ndarray) -> None:
    """The first of several views is the plain row, bit for bit."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as pool:
        for index, image in enumerate(pixels):
            Image.fromarray(image).save(Path(folder) / f"{index}.png")
        sources = [ImageRef(str(index), f"{index}.png", "") for index in range(len(pixels))]
        ((one,), (several,)) = (
            compute_shard(Path(folder), sources, [network], batch_size=2, pool=pool) for network in (plain, viewed)
        )
    dim = plain.backbone.spec.dim
    assert one.features.shape == (len(pixels), dim), f"a shard has shape {one.features.shape}"
    assert several.features.shape == (len(pixels), 2, dim), f"a shard of views has shape {several.features.shape}"
    assert np.array_equal(several.features[:, 0], one.features), "the first view differs from the plain features"
    assert one.digests == several.digests, "digests depend on the number of views"


def _draw(count: int, size: tuple[int, int]) -> np.ndarray:
    """Different images of large squares, uint8 (count, *size, 3)."""
    coarse = np.random.default_rng(0).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    rows, columns = (np.arange(side) * 4 // side for side in size)
    return np.ascontiguousarray(coarse[:, rows][:, :, columns])


def check_dataset(dataset: ImageDataset, *, images: int = 20) -> None:
    """Check that a loaded dataset keeps its contract.

    Its table is complete and typed, images decode to the size that their header states, and the snapshot that
    extraction keeps returns the same dataset.

    Parameters
    ----------
    dataset : ImageDataset
        As `embcache.load_dataset` returns it.
    images : int
        Number of images that are decoded; the first ones.
    """
    table = dataset.table
    assert list(table.columns[:6]) == list(COLUMNS), f"the first columns are {list(table.columns[:6])}, not {COLUMNS}"
    assert table.index.tolist() == list(range(len(dataset))), "rows are numbered from 0"
    assert table["id"].is_unique, "ids are unique"
    for column in ("id", "path", "group", "split"):
        assert all(isinstance(value, str) for value in table[column]), f"column {column!r} is text"
    task = dataset.task
    absent = [name for name, n in zip(task.names, task.counts(dataset.labels), strict=True) if not n]
    assert not absent, f"{task.nouns} without an image: {absent}"
    assert find_metric(dataset.metric, task), "the metric is registered"
    assert ((dataset.table["label"] >= 0) == task.known(dataset.labels)).all(), "label is -1 where nothing is known"
    assert dataset.augment in {"patch", "fundus", "chest", "generic"}, f"unknown augmentation {dataset.augment!r}"
    sizes = dict(dataset.subset_sizes)
    assert set(sizes) == {"S", "M"}, "subsets S and M have a size, and no others"
    assert 0 < sizes["S"] < sizes["M"], "subset S is smaller than M"
    assert dataset.root is not None, "the dataset has a root"
    assert dataset.root.is_absolute(), "the root is an absolute path"
    assert f"{len(dataset):,} images" in repr(dataset)
    for path, place in table[["path", "place"]].head(images).itertuples(index=False):
        pixels, digest = read_image(dataset.root, path, place)
        assert pixels.dtype == np.uint8, f"{path} decodes to {pixels.dtype}"
        assert pixels.shape == (*read_size(dataset.root, path, place)[::-1], 3), f"{path} has shape {pixels.shape}"
        assert len(digest) == 64, "sha256, in hex"
    again = ImageDataset.from_parquet_bytes(dataset.to_parquet_bytes())
    assert again.table.equals(table), "the snapshot has the same table"
    assert {**vars(again), "table": None} == {**vars(dataset), "table": None}, "the snapshot has the same fields"


def check_head(head: Any) -> None:
    """Check a head against `embcache.probe.stack.Head`: trained and applied on small arrays.

    Parameters
    ----------
    head : Head or scikit-learn classifier
        Hyperparameters should be small: it is fitted a few times on 90 rows of 24 features.
    """
    import torch

    from embcache.probe.heads import find_head
    from embcache.probe.schedule import Schedule
    from embcache.probe.stack import ClosedFormHead, TrainedHead

    model = find_head(head)
    assert isinstance(model, TrainedHead | ClosedFormHead), "a head is a TrainedHead or a ClosedFormHead"
    for name in model.parameters() if model.keeps_models else ():
        try:
            setattr(model, name, getattr(model, name))
        except AttributeError:
            continue
        raise AssertionError(f"a head is a frozen dataclass, and {name} can be set")
    json.dumps(model.parameters(), allow_nan=False)
    dims = {"one": 24, "two": 10} if model.fuses else {"one": 24}
    x, y = _clusters(dims, 90, seed=0)
    held, y_held = _clusters(dims, 60, seed=1)
    before = {name: features.copy() for name, features in x.items()}
    options: dict[str, Any] = {"x_val": held, "y_val": y_held, "schedule": Schedule(lr=1e-2, max_epochs=12)}
    fitted = model.fit(x, y, **options)
    p = fitted.predict_proba(held)
    assert p.shape == (60, 3), f"probabilities have the shape {p.shape}, not (60, 3)"
    assert p.dtype == np.float64
    assert (p >= 0).all(), "a probability is negative"
    np.testing.assert_allclose(p.sum(1), 1, err_msg="probabilities do not add up to 1")
    assert (p.argmax(1) == y_held).mean() > 0.8, "the head does not learn clusters that are far apart"
    assert all(np.array_equal(x[name], before[name]) for name in x), "the head changes its input"
    np.testing.assert_array_equal(
        model.fit(x, y, **options).predict_proba(held), p, err_msg="the same seed gives another head"
    )
    some = fitted.predict_proba({name: features[[7, 3]] for name, features in held.items()})
    np.testing.assert_allclose(some, p[[7, 3]], rtol=1e-4, atol=1e-6, err_msg="a row depends on the others")
    swapped = fitted.predict_proba({name: held[name] for name in reversed(held)})
    np.testing.assert_array_equal(swapped, p, err_msg="the order of a mapping is not the order of the features")
    params = {name: torch.stack([value, value]) for name, value in fitted.trained.params.items()}
    rows = {name: torch.from_numpy(held[name][:6]).expand(2, -1, -1) for name in held}
    masks = {}
    if isinstance(model, TrainedHead):
        masks = {name: torch.ones(2, 6, width) for name, (width, _) in model.dropouts().items()}
        fresh = [model.init(torch.Generator().manual_seed(5), dims, 3) for _ in range(2)]
        assert all(torch.equal(fresh[0][name], fresh[1][name]) for name in fresh[0]), "init is not pure"
        assert model.count_parameters(dims, 3) > 0, "nothing is trained"
    logits = model.apply(params, rows, masks)
    assert logits.shape == (2, 6, 3), f"stacked logits have the shape {tuple(logits.shape)}, not (2, 6, 3)"
    assert torch.isfinite(logits).all(), "a logit is not finite"
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)


def _clusters(dims: dict[str, int], n: int, seed: int) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.int64]]:
    """Three clusters that are far apart, float32 (n, D) of each backbone, and their labels."""
    y = np.arange(n) % 3
    noise, centers = np.random.default_rng(seed), np.random.default_rng(99)
    return {
        name: (noise.normal(size=(n, dim)) + 2 * centers.normal(size=(3, dim))[y]).astype(np.float32)
        for name, dim in dims.items()
    }, y


def check_metric(metric: Any) -> None:
    """Check a metric against `embcache.probe.metrics.Metric`: its range, its direction and its weighted form.

    Parameters
    ----------
    metric : Metric or str
        The metric, or the name under which it is registered.
    """
    from embcache.probe.metrics import Metric, log_probabilities, scorer

    binary = isinstance(metric, Metric) and metric.binary
    for n_classes in (2,) if binary else (2, 3):
        found = find_metric(metric, n_classes)
        assert found.key, "a metric has a key"
        assert found.title, "a metric has a title"
        rng = np.random.default_rng(n_classes)
        y = rng.permutation(np.arange(60) % n_classes)
        z = rng.normal(size=(60, n_classes)) + 2 * np.eye(n_classes)[y]
        form = found.form(y, z, 1)
        weights = rng.integers(0, 4, size=(5, 60)).astype(np.float64)
        values = form(weights)
        assert values.shape == (5,), f"five rows of weights give the shape {values.shape}, not (5,)"
        for value, row in zip(values, weights, strict=True):
            drawn = np.repeat(np.arange(60), row.astype(np.int64))
            plain = found.form(y[drawn], z[drawn], 1)(np.ones((1, len(drawn))))[0]
            np.testing.assert_allclose(value, plain, rtol=1e-9, err_msg="weights are not repetitions of rows")
            assert found.low - 1e-12 <= value <= found.high + 1e-12, f"{value} is out of the metric's range"
        perfect, random = 20 * np.eye(n_classes)[y], rng.normal(size=z.shape)
        value = scorer(found, y, n_classes)  # higher is better, so losses are negated
        assert value(perfect) > value(random), "perfect predictions score lower: is `loss` set?"
        np.testing.assert_allclose(value(log_probabilities(z)), value(z), rtol=1e-9, err_msg="logits are not shifted")
