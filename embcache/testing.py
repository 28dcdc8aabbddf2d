"""Contract suites for authors of plugins: each raises an `AssertionError` that names the promise that does not hold.

::

    from embcache.testing import check_backbone, check_dataset, check_head, check_metric, check_target

    def test_my_backbone():
        check_backbone("my_package.networks:small")
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from embcache.backbones.catalog import Backbone, LoadedBackbone, find_backbone, load_backbone
from embcache.backbones.checkpoints import hash_state
from embcache.backbones.transforms import choose_transform
from embcache.data.dataset import ImageDataset
from embcache.data.images import ImageRef, read_image, read_size
from embcache.data.tables import COLUMNS
from embcache.errors import ProtocolError, UsageError
from embcache.extract.worker import FrozenNetwork, compute_shard, freeze
from embcache.paths import PathLike
from embcache.probe.metrics import Metric, find_metric, log_probabilities, metrics, score, scorer
from embcache.targets import Target, as_target, make_target, targets
from embcache.targets.target import CONSTANTS, finish

if TYPE_CHECKING:
    from embcache.probe.stack import Head

_Rows = tuple[dict[str, NDArray[np.float32]], NDArray[Any]]

__all__ = ["check_backbone", "check_dataset", "check_head", "check_metric", "check_target"]


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


def check_target(target: Target, y: NDArray[Any]) -> None:
    """Check a kind of targets against `embcache.targets.target.Target`.

    Parameters
    ----------
    target : Target
        One target of the kind, with one of its losses.
    y : array (n,) or (n, L)
        Values of some 60 rows, in which all that it names occurs; some may be unknown.
    """
    n = len(y)
    assert target.kind in targets, f"kind {target.kind!r} is not registered"
    assert type(target) is targets.get(target.kind), f"kind {target.kind!r} is another class"
    again = make_target(target.kind, target.names, target.columns, target.loss)
    assert again == target, "its kind, names, columns and loss do not make the same target"
    assert make_target(target.kind, target.names).loss == target.losses[0], "without a loss it has the first"
    try:
        make_target(target.kind, target.names, (), "no such loss")
    except UsageError:
        pass
    else:
        raise AssertionError("a loss that does not exist is accepted")
    assert target.noun, "one of its names is called something"
    assert target.nouns, "several of its names are called something"
    assert target.group_words, "how a group is scored is said"
    assert find_metric(target.metric, target), "its metric is registered and fits"

    known, blank = target.known(y), target.blank(n)
    assert known.shape == (n,), f"known has the shape {known.shape}, not {(n,)}"
    assert known.dtype == np.bool_
    assert (blank.dtype, blank.shape) == (y.dtype, y.shape), "blank values are unlike others"
    assert not target.known(blank).any(), "blank values are known"
    assert [target.words(value) for value in blank[:1]] == [""], "blank values have words"
    assert all(target.words(value) for value in y[known]), "a known value has no words"
    json.dumps(target.plain(y), allow_nan=False)
    assert len(target.plain(y)) == n
    columns = dict(zip(target.columns, y.reshape(n, -1).T, strict=True)) if target.columns else {"label": y}
    np.testing.assert_array_equal(target.values(pd.DataFrame(columns)), y, err_msg="values are not those of its table")
    assert len(target.counts(y)) == len(target.names), "a count for each name"
    assert target.counts(blank) == (0,) * len(target.names), "unknown values are counted"

    seen = np.flatnonzero(known)
    strata, shuffled = target.strata(y, seen), np.random.default_rng(0).permutation(n)
    assert strata.dtype == np.int64
    assert (strata[~known] <= 0).all(), "unknown rows are in a stratum"
    there = np.flatnonzero(strata.reshape(n, -1).sum(0) > 0) if strata.ndim == 2 else np.unique(strata[known])
    assert there.min() >= 0, "a known row is in no stratum"
    assert all(target.stratum(int(c)) for c in there), "a stratum has no name"
    moved = target.strata(y[shuffled], np.flatnonzero(known[shuffled]))
    np.testing.assert_array_equal(moved, strata[shuffled], err_msg="strata depend on the order of rows")
    target.check_part(y[known], "all rows", ())
    for part in (y[known][:1], y[:0]):
        try:
            target.check_part(part, "one row", ())
        except ProtocolError:
            continue
        raise AssertionError("rows of which nothing can be learned are not refused")
    assert target.absent(y[known]) == [], "a name that occurs is called absent"
    assert target.absent(y[:0]) == list(range(len(target.names))), "without rows all are absent"
    weights, shares = target.draw_weights(y[known]), target.seen(y[known], weighs=True)
    assert weights is None or (weights.shape == (len(seen),) and (weights > 0).all()), "draws have positive weights"
    assert not shares or (len(shares) == len(target.names) and abs(sum(shares) - 1) < 1e-9), "shares add up to 1"

    params = _parameters(target, y[known], 2)
    out = torch.randn(2, len(seen), target.width, generator=torch.Generator().manual_seed(0)).requires_grad_()
    values = torch.from_numpy(y[known]).expand(2, *y[known].shape)
    losses = target.row_losses(out, values, params)
    assert losses.shape == (2, len(seen)), f"losses have the shape {tuple(losses.shape)}, not {(2, len(seen))}"
    (gradient,) = torch.autograd.grad(losses.sum(), out)
    assert torch.isfinite(gradient).all(), "a gradient is not finite"
    out, losses = out.detach(), losses.detach()
    alone = target.row_losses(out[1:, 3:5], values[1:, 3:5], {name: p[1:] for name, p in params.items()})
    torch.testing.assert_close(alone, losses[1:, 3:5], msg="the loss of a row depends on others")
    lower = target.row_losses(out - 1e-2 * gradient, values, params)
    assert float(lower.sum()) < float(losses.sum()), "a step against the gradient does not lower the loss"
    logits = finish(params, out).double().numpy()
    assert logits.shape == (2, len(seen), target.outputs), f"logits have the shape {logits.shape}"

    p = target.predicted(logits)
    assert p.shape == logits.shape, f"predictions have the shape {p.shape}, not {logits.shape}"
    assert p.dtype == np.float64, f"predictions are {p.dtype}"
    np.testing.assert_allclose(target.predicted(target.average(logits)), p.mean(0), rtol=1e-6, err_msg="not a mean")
    one = target.of_group(logits[:, :1])
    np.testing.assert_allclose(target.predicted(one), p[:, 0], rtol=1e-6, err_msg="a group of one row is another")
    assert target.of_group(logits[:, :3]).shape == (2, target.outputs)
    np.testing.assert_array_equal(target.group_value(y[known][:1]), y[known][0])
    guess = target.baseline(y[known], y)
    assert guess.shape == (n, target.outputs), "the baseline has logits for each row"
    assert (guess == guess[:1]).all(), "the baseline depends on the row"
    assert np.isfinite(guess).all(), "the baseline is not finite"


def _parameters(target: Target, y: NDArray[Any], n: int) -> dict[str, Tensor]:
    """What a target adds to the parameters of n heads, stacked."""
    constants = target.constants(y)
    assert set(constants) <= set(CONSTANTS), f"constants are called {', '.join(CONSTANTS)}, not {set(constants)}"
    every = {**constants, **target.init()}
    assert all(p.is_floating_point() and p.isfinite().all() for p in every.values()), "parameters are finite floats"
    return {name: p.expand(n, *p.shape) for name, p in every.items()}


def _examples(fits: tuple[str, ...], y: NDArray[np.int64]) -> Iterator[tuple[Target, NDArray[Any]]]:
    """Targets of each kind that a head or a metric fits, with each loss, and their values for three clusters."""
    findings = np.stack([y == 0, y >= 1, y == 2], axis=1).astype(np.int64)
    findings[::7, 1] = findings[3::11, 2] = -1
    of: dict[str, tuple[tuple[str, ...], NDArray[Any]]] = {
        "classes": (("a", "b", "c"), y), "ordinal": (("0", "1", "2"), y), "findings": (("a", "b", "c"), findings),
        "number": (("n",), 40 + 8.0 * y),
    }  # fmt: skip
    for kind in fits:
        names, values = of.get(kind, ((), y))
        for loss in targets.get(kind).losses if names else ():
            yield make_target(kind, names, (), loss), values


def check_head(head: Any) -> None:
    """Check a head against `embcache.probe.stack.Head`: trained and applied on small arrays, for each kind it fits.

    Parameters
    ----------
    head : Head or scikit-learn classifier
        Hyperparameters should be small: it is fitted a few times on 90 rows of 24 features.
    """
    from embcache.probe.heads import find_head
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
    assert set(model.fits) & set(targets), "a head fits a kind of targets"
    clusters, held = np.arange(90) % 3, np.arange(60) % 3
    for (target, y), (_, y_held) in zip(_examples(model.fits, clusters), _examples(model.fits, held), strict=True):
        _check_fit(model, target, (_features(dims, clusters, 0), y), (_features(dims, held, 1), y_held))


def _check_fit(model: Head, target: Target, train: _Rows, val: _Rows) -> None:
    from embcache.probe.schedule import Schedule
    from embcache.probe.stack import TrainedHead, make_job, predict_logits, train_heads

    (x, y), (held, y_held), what = train, val, f"{target.kind} by {target.loss}"
    before = {name: features.copy() for name, features in x.items()}
    plan = Schedule(lr=1e-2, max_epochs=12)
    options: dict[str, Any] = {"x_val": held, "y_val": y_held, "schedule": plan, "target": target}
    fitted = model.fit(x, y, **options)
    p = fitted.predict_proba(held)
    assert p.shape == (60, target.outputs), f"{what}: predictions have the shape {p.shape}, not {(60, target.outputs)}"
    assert p.dtype == np.float64
    assert np.isfinite(p).all(), f"{what}: a prediction is not finite"
    if target.kind != "number":
        assert (p >= 0).all(), f"{what}: a probability is negative"
        assert (p <= 1 + 1e-9).all(), f"{what}: a probability is above 1"
    if target.kind in ("classes", "ordinal"):
        np.testing.assert_allclose(p.sum(1), 1, err_msg="probabilities do not add up to 1")
    z = predict_logits(model, fitted.trained.params, _tensors(held), torch.arange(60))
    least = 0.6 if target.metric in ("kappa", "r2") else 0.9
    assert score(target.metric, y_held, z, of=target) > least, f"{what}: clusters that are far apart are not learned"
    assert all(np.array_equal(x[name], before[name]) for name in x), "the head changes its input"
    same = model.fit(x, y, **options).predict_proba(held)
    np.testing.assert_array_equal(same, p, err_msg="the same seed gives another head")
    some = fitted.predict_proba({name: features[[7, 3]] for name, features in held.items()})
    np.testing.assert_allclose(some, p[[7, 3]], rtol=1e-4, atol=1e-6, err_msg="a row depends on the others")
    swapped = fitted.predict_proba({name: held[name] for name in reversed(held)})
    np.testing.assert_array_equal(swapped, p, err_msg="the order of a mapping is not the order of the features")
    params = {name: torch.stack([value, value]) for name, value in fitted.trained.params.items()}
    rows = {name: features[:6].expand(2, -1, -1) for name, features in _tensors(held).items()}
    dims, masks = {name: features.shape[1] for name, features in x.items()}, {}
    if isinstance(model, TrainedHead):
        masks = {name: torch.ones(2, 6, width) for name, (width, _) in model.dropouts().items()}
        fresh = [model.init(torch.Generator().manual_seed(5), dims, target.width) for _ in range(2)]
        assert all(torch.equal(fresh[0][name], fresh[1][name]) for name in fresh[0]), "init is not pure"
        assert model.count_parameters(dims, target.width) > 0, "nothing is trained"
        both = {
            name: torch.cat([f, g]) for (name, f), g in zip(_tensors(x).items(), _tensors(held).values(), strict=True)
        }
        values = np.concatenate([y, y_held])
        jobs = [make_job(values, np.arange(90), np.arange(90, 150), target, name, plan.lr) for name in "ab"]
        stack, (alone,) = (
            train_heads(model, both, torch.from_numpy(values), part, target, target.metric, plan)
            for part in (jobs, jobs[1:])
        )
        equal = all(torch.equal(stack[1].params[name], value) for name, value in alone.params.items())
        assert equal, f"{what}: a head is another in a stack than alone"
    logits = model.apply(params, rows, masks)
    width = target.width if isinstance(model, TrainedHead) else target.outputs
    assert logits.shape == (2, 6, width), f"{what}: stacked logits have the shape {tuple(logits.shape)}"
    assert torch.isfinite(logits).all(), f"{what}: a logit is not finite"
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)


def _features(dims: dict[str, int], y: NDArray[np.int64], seed: int) -> dict[str, NDArray[np.float32]]:
    """Three clusters that are far apart, float32 (n, D) of each backbone."""
    noise, centers = np.random.default_rng(seed), np.random.default_rng(99)
    return {
        name: (noise.normal(size=(len(y), dim)) + 2 * centers.normal(size=(3, dim))[y]).astype(np.float32)
        for name, dim in dims.items()
    }


def _tensors(x: dict[str, NDArray[np.float32]]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(features) for name, features in x.items()}


def check_metric(metric: Metric | str) -> None:
    """Check a metric against `embcache.probe.metrics.Metric`: range, direction, weighted form, for each kind it fits.

    Parameters
    ----------
    metric : Metric or str
        The metric, or the name under which it is registered.
    """
    stated = metric if isinstance(metric, Metric) else metrics.get(metric)
    y = np.random.default_rng(0).permutation(np.arange(60) % 3)
    cases = [case for case in _examples(stated.fits, y) if case[0].loss == case[0].losses[0]]
    if "classes" in stated.fits:
        cases += [(as_target(2), (y > 0).astype(np.int64))]
    if stated.binary:
        cases = [case for case in cases if case[0].outputs == 2 or case[0].kind == "findings"]
    assert cases, f"a metric fits a kind of targets: {', '.join(targets)}"
    for target, values in cases:
        _check_scores(find_metric(metric, target), target, values)


def _check_scores(found: Metric, target: Target, y: NDArray[Any]) -> None:
    assert found.key, "a metric has a key"
    assert found.title, "a metric has a title"
    rng = np.random.default_rng(target.outputs)
    perfect = np.asarray(y[:, None], dtype=np.float64)
    if target.kind != "number":
        perfect = 40.0 * y - 20 if target.kind == "findings" else 20 * np.eye(target.outputs)[y]
    noise, number = rng.normal(size=(2, *perfect.shape)), target.kind == "number"
    random = perfect.mean() + y.std() * noise[0] if number else noise[0]
    z = perfect + noise[1] if number else perfect / 10 + noise[1]
    form = found.form(y, z, 1)
    weights = rng.integers(0, 4, size=(5, 60)).astype(np.float64)
    values = form(weights)
    assert values.shape == (5,), f"five rows of weights give the shape {values.shape}, not (5,)"
    for value, row in zip(values, weights, strict=True):
        drawn = np.repeat(np.arange(60), row.astype(np.int64))
        plain = found.form(y[drawn], z[drawn], 1)(np.ones((1, len(drawn))))[0]
        what = f"{target.kind}: weights are not repetitions of rows"
        np.testing.assert_allclose(value, plain, rtol=1e-9, err_msg=what)
        assert found.low - 1e-12 <= value <= found.high + 1e-12, f"{value} is out of the metric's range"
    of = scorer(found, y, target)  # higher is better, so losses are negated
    assert of(perfect) > of(random), f"{target.kind}: perfect predictions score lower: is `loss` set?"
    if target.kind in ("classes", "ordinal"):
        np.testing.assert_allclose(of(log_probabilities(z)), of(z), rtol=1e-9, err_msg="logits are not shifted")
