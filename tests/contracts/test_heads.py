"""The contract of heads, run over every head that `embcache.probe.heads` finds."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from embcache.errors import UsageError
from embcache.probe.heads import Head, count_parameters, heads, hyperparameters, make_head
from embcache.probe.schedule import Schedule

NAMES = list(heads())
DIMS = {"one": 24, "two": 10}
QUICK = Schedule(lr=1e-2, max_epochs=3)
LONGER = Schedule(lr=1e-2, max_epochs=12, min_epochs=6, patience=3)


def inputs(head: Head, n: int, n_classes: int = 3, seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(seed)
    y = np.arange(n) % n_classes
    chosen = DIMS if head.fuses else {"one": DIMS["one"]}
    centres = {b: np.random.default_rng(99).normal(size=(n_classes, d)) * 2 for b, d in chosen.items()}
    return {b: (rng.normal(size=(n, d)) + centres[b][y]).astype(np.float32) for b, d in chosen.items()}, y


@pytest.fixture(params=NAMES)
def head(request: pytest.FixtureRequest) -> Head:
    return make_head(request.param)


def test_names_itself(head: Head) -> None:
    assert head.name in NAMES
    assert head.summary
    assert isinstance(head.fuses, bool)


def test_is_frozen_and_made_again_from_its_hyperparameters(head: Head) -> None:
    assert make_head(head.name, **hyperparameters(head)) == head
    for name in hyperparameters(head):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(head, name, 1)


def test_unknown_hyperparameters_are_refused(head: Head) -> None:
    with pytest.raises(UsageError, match="no such hyperparameter"):
        make_head(head.name, nonsense=1)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_learns_and_predicts_probabilities(head: Head, n_classes: int) -> None:
    x, y = inputs(head, 90, n_classes)
    held, y_held = inputs(head, 60, n_classes, seed=1)
    fitted = head.fit(x, y, x_val=held, y_val=y_held, schedule=LONGER)
    p = fitted.predict_proba(held)
    assert p.shape == (60, n_classes)
    assert p.dtype == np.float64
    np.testing.assert_allclose(p.sum(1), 1)
    assert (p >= 0).all()
    assert min(roc_auc_score(y_held == c, p[:, c]) for c in range(n_classes)) > 0.9


def test_the_same_seed_gives_the_same_head(head: Head) -> None:
    x, y = inputs(head, 40)
    a, b, other = (head.fit(x, y, seed=s, schedule=QUICK).predict_proba(x) for s in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, other)


def test_rows_are_predicted_independently(head: Head) -> None:
    x, y = inputs(head, 40)
    fitted = head.fit(x, y, schedule=QUICK)
    whole = fitted.predict_proba(x)
    some = fitted.predict_proba({b: f[[7, 3]] for b, f in x.items()})
    np.testing.assert_allclose(some, whole[[7, 3]], rtol=1e-4, atol=1e-6)
    assert fitted.predict_proba({b: f[:0] for b, f in x.items()}).shape == (0, 3)


def test_other_features_than_it_was_trained_on_are_refused(head: Head) -> None:
    x, y = inputs(head, 40)
    fitted = head.fit(x, y, schedule=QUICK)
    with pytest.raises(ValueError, match="are needed"):
        fitted.predict_proba({"one": x["one"][:, :3]})
    with pytest.raises(ValueError, match="are needed"):
        fitted.predict_proba({"other": x["one"]})


def test_inputs_that_do_not_fit_are_refused(head: Head) -> None:
    x, y = inputs(head, 40)
    with pytest.raises(ValueError, match="do not fit"):
        head.fit(x, y[:-1])


def test_inputs_are_not_changed(head: Head) -> None:
    x, y = inputs(head, 40)
    before = {b: f.copy() for b, f in x.items()}
    head.fit(x, y, schedule=QUICK).predict_proba(x)
    assert all(np.array_equal(x[b], before[b]) for b in x)


def test_init_and_apply_are_pure_and_stack(head: Head) -> None:
    x, _ = inputs(head, 6)
    dims = {b: f.shape[1] for b, f in x.items()}
    first, second = (head.init(torch.Generator().manual_seed(s), dims, 3) for s in (0, 1))
    again = head.init(torch.Generator().manual_seed(0), dims, 3)
    assert all(torch.equal(first[n], again[n]) for n in first)
    stacked = {n: torch.stack([first[n], second[n]]) for n in first}
    batches: dict[str, Any] = {b: torch.from_numpy(f)[None].expand(2, -1, -1) for b, f in x.items()}
    masks = {n: torch.ones(2, 6, width) for n, (width, _) in head.dropouts().items()}
    logits = head.apply(stacked, batches, masks)
    assert logits.shape == (2, 6, 3)
    for k, params in enumerate((first, second)):
        single = head.apply({n: p[None] for n, p in params.items()}, {b: f[:1] for b, f in batches.items()}, None)
        torch.testing.assert_close(logits[k], single[0], rtol=1e-4, atol=1e-5)


def test_sizes_come_from_the_data(head: Head) -> None:
    small, large = ({b: d * k for b, d in (DIMS if head.fuses else {"one": 24}).items()} for k in (1, 3))
    assert count_parameters(head, small, 3) < count_parameters(head, large, 3) < count_parameters(head, large, 7)


def test_fused_backbones_keep_their_features_apart(head: Head) -> None:
    if not head.fuses:
        pytest.skip("takes one backbone")
    x, y = inputs(head, 40)
    fitted = head.fit(x, y, schedule=QUICK)
    swapped = {b: x[b] for b in reversed(x)}  # the order of a mapping is not the order of the features
    np.testing.assert_array_equal(fitted.predict_proba(swapped), fitted.predict_proba(x))


def test_unknown_heads_are_refused_with_near_names() -> None:
    with pytest.raises(UsageError, match="did you mean"):
        make_head("liner")
