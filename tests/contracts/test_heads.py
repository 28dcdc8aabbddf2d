"""The contract of heads, run over every head that `embcache.probe.heads` finds."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from sklearn.metrics import roc_auc_score

from embcache.errors import UsageError
from embcache.probe.heads import Head, count_parameters, heads, hyperparameters, make_head, trainable
from embcache.probe.schedule import Schedule
from embcache.probe.solve import SolvedHead, is_solved
from embcache.probe.stack import TrainableHead
from embcache.probe.standard import StandardizedHead

NAMES = list(heads())
SOLVED = [name for name in NAMES if is_solved(make_head(name))]
TRAINED = [name for name in NAMES if name not in SOLVED]
DIMS = {"one": 24, "two": 10}
QUICK = Schedule(lr=1e-2, max_epochs=3)
LONGER = Schedule(lr=1e-2, max_epochs=12, min_epochs=6, patience=3)


def inputs(head: Head, n: int, n_classes: int = 3, seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(seed)
    y = np.arange(n) % n_classes
    chosen = DIMS if head.fuses else {"one": DIMS["one"]}
    centres = {b: np.random.default_rng(99).normal(size=(n_classes, d)) * 2 for b, d in chosen.items()}
    return {b: (rng.normal(size=(n, d)) + centres[b][y]).astype(np.float32) for b, d in chosen.items()}, y


def tensors(x: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {backbone: torch.from_numpy(f) for backbone, f in x.items()}


def make_params(head: Head, x: dict[str, np.ndarray], y: np.ndarray, n_classes: int, seed: int = 0) -> Any:
    """Parameters of one head, with all that ``apply`` needs: fresh ones of a head that trains, else the solution."""
    if is_solved(head):
        rows = np.random.default_rng(seed).choice(len(y), len(y) - 5, replace=False)  # other rows, another solution
        some, labels = {b: torch.from_numpy(f[rows]) for b, f in x.items()}, torch.from_numpy(y[rows])
        return cast(SolvedHead, head).solve(some, labels, None, None, n_classes, "macro_auc").params
    dims = {b: f.shape[1] for b, f in x.items()}
    params = trainable(head).init(torch.Generator().manual_seed(seed), dims, n_classes)
    return params | (head.constants(tensors(x)) if isinstance(head, StandardizedHead) else {})


@pytest.fixture(params=NAMES)
def head(request: pytest.FixtureRequest) -> Head:
    return make_head(request.param)


@pytest.fixture(params=TRAINED)
def trained_head(request: pytest.FixtureRequest) -> Head:
    return make_head(request.param)


@pytest.fixture(params=SOLVED)
def solved_head(request: pytest.FixtureRequest) -> Head:
    return make_head(request.param)


def test_names_itself(head: Head) -> None:
    assert head.name in NAMES
    assert head.summary
    assert isinstance(head.fuses, bool)


def test_is_frozen_and_made_again_from_its_hyperparameters(head: Head) -> None:
    assert make_head(head.name, **hyperparameters(head)) == head
    assert make_head(head.name, **json.loads(json.dumps(hyperparameters(head)))) == head  # as a run's request has them
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


@pytest.mark.parametrize("bad", [0, -1, "many", float("nan"), True, None, []])
def test_hyperparameters_without_sense_are_refused(head: Head, bad: object) -> None:
    for name in hyperparameters(head):
        if name == "dropout" and bad == 0 and bad is not False:
            continue
        with pytest.raises(UsageError, match=r"out of bounds|unknown --attention"):
            make_head(head.name, **{name: bad})


def test_the_same_seed_gives_the_same_head(trained_head: Head) -> None:
    x, y = inputs(trained_head, 40)
    a, b, other = (trained_head.fit(x, y, seed=s, schedule=QUICK).predict_proba(x) for s in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, other)


def test_what_is_solved_has_no_seed(solved_head: Head) -> None:
    x, y = inputs(solved_head, 40)
    a, b = (solved_head.fit(x, y, seed=s).predict_proba(x) for s in (1, 2))
    np.testing.assert_array_equal(a, b)


def test_what_is_solved_does_not_depend_on_the_order_of_rows(solved_head: Head) -> None:
    x, y = inputs(solved_head, 40)
    order = np.random.default_rng(5).permutation(40)
    a = solved_head.fit(x, y).predict_proba(x)
    b = solved_head.fit({name: f[order] for name, f in x.items()}, y[order]).predict_proba(x)
    np.testing.assert_allclose(a, b, atol=2e-3)


def test_a_solution_is_tensors_and_json(solved_head: Head) -> None:
    x, y = inputs(solved_head, 40)
    held, y_held = inputs(solved_head, 30, seed=1)
    solver = cast(SolvedHead, solved_head)
    labels, held_labels = torch.from_numpy(y), torch.from_numpy(y_held)
    solved = solver.solve(tensors(x), labels, tensors(held), held_labels, 3, "macro_auc")
    assert json.loads(json.dumps(solved.chosen)) == solved.chosen
    kept = load(save({name: p.contiguous() for name, p in solved.params.items()}))  # as a run keeps them
    again, whole = (
        solved_head.apply({n: p[None] for n, p in params.items()}, {b: f[None] for b, f in tensors(held).items()})
        for params in (kept, solved.params)
    )
    assert torch.equal(again, whole)
    assert torch.isfinite(whole).all()


def test_a_class_that_no_image_trains_is_given_to_none(solved_head: Head) -> None:
    x, y = inputs(solved_head, 60)
    some = y != 1
    fitted = solved_head.fit({b: f[some] for b, f in x.items()}, y[some])
    p = fitted.predict_proba(x)
    assert np.isfinite(p).all()
    assert (p[:, 1] < 1e-6).all()
    assert set(p[some].argmax(1)) == {0, 2}


def test_only_what_trains_can_be_trained(head: Head) -> None:
    if is_solved(head):
        with pytest.raises(UsageError, match="solved, not trained"):
            trainable(head)
    else:
        model: TrainableHead = trainable(head)
        assert model is head


def test_constants_are_of_the_training_rows_and_stay(trained_head: Head) -> None:
    if not isinstance(trained_head, StandardizedHead):
        pytest.skip("has none")
    x, y = inputs(trained_head, 40)
    held, y_held = inputs(trained_head, 30, seed=1)
    fitted = trained_head.fit(x, y, x_val=held, y_val=y_held, schedule=QUICK)
    for name, value in trained_head.constants(tensors(x)).items():
        torch.testing.assert_close(fitted.trained.params[name], value)


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


def test_parameters_are_pure_and_stack(head: Head) -> None:
    x, y = inputs(head, 30)
    first, second = (make_params(head, x, y, 3, seed) for seed in (0, 1))
    again = make_params(head, x, y, 3, 0)
    assert all(torch.equal(first[n], again[n]) for n in first)
    stacked = {n: torch.stack([first[n], second[n]]) for n in first}
    batches = {b: f[None, :6].expand(2, -1, -1) for b, f in tensors(x).items()}
    masks = {} if is_solved(head) else {n: torch.ones(2, 6, w) for n, (w, _) in trainable(head).dropouts().items()}
    logits = head.apply(stacked, batches, masks)
    assert logits.shape == (2, 6, 3)
    for k, params in enumerate((first, second)):
        single = head.apply({n: p[None] for n, p in params.items()}, {b: f[:1] for b, f in batches.items()}, None)
        torch.testing.assert_close(logits[k], single[0], rtol=1e-4, atol=1e-5)


def test_sizes_come_from_the_data(head: Head) -> None:
    small, large = ({b: d * k for b, d in (DIMS if head.fuses else {"one": 24}).items()} for k in (1, 3))
    if is_solved(head):
        assert count_parameters(head, small, 3) == 0  # nothing is trained
    else:
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
