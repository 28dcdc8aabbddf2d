"""Contract suites for plugins: functions that raise an `AssertionError` where an object breaks its contract.

::

    from embcache.testing import check_head

    def test_my_head():
        check_head(MyHead())
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

# --- heads and metrics


def check_head(head: Any) -> None:
    """Check a head against `embcache.probe.stack.Head`: trained and applied on small arrays.

    Parameters
    ----------
    head : Head or scikit-learn classifier
        Hyperparameters should be small: it is fitted a few times on 90 rows of 24 features.

    Raises
    ------
    AssertionError
        It breaks the contract.
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

    Raises
    ------
    AssertionError
        It breaks the contract.
    """
    from embcache.probe.metrics import Metric, find_metric, log_probabilities, scorer

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
