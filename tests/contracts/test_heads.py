"""The contract of heads and metrics, run over every one of this package and over some of others."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from embcache.errors import UsageError
from embcache.probe.heads import find_head, heads, identify, make_head
from embcache.probe.layers import Params, affine, init_linear
from embcache.probe.metrics import METRICS, OTHERS, Metric
from embcache.probe.schedule import Schedule
from embcache.probe.stack import ClosedFormHead, Head, TrainedHead
from embcache.testing import check_head, check_metric
from tests.refusal import refused

NAMES = heads.names()
SOLVED = [name for name in NAMES if isinstance(make_head(name), ClosedFormHead)]
DIMS = {"one": 24, "two": 10}
QUICK = Schedule(lr=1e-2, max_epochs=3)


@dataclasses.dataclass(frozen=True)
class Bottleneck(TrainedHead):
    """A head of another package."""

    width: int = 4

    def init(self, generator: torch.Generator, dims: Mapping[str, int], n_classes: int) -> Params:
        (dim,) = dims.values()
        return init_linear(generator, "narrow", dim, self.width) | init_linear(generator, "out", self.width, n_classes)

    def apply(
        self, params: Params, x: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        (features,) = x.values()
        return affine(params, "out", affine(params, "narrow", features))


class Shuffled(Bottleneck):
    """Breaks the contract: not pure."""

    def init(self, generator: torch.Generator, dims: Mapping[str, int], n_classes: int) -> Params:
        return super().init(torch.Generator().manual_seed(torch.seed() % 2**31), dims, n_classes)


def inputs(head: Head, n: int, n_classes: int = 3) -> tuple[dict[str, np.ndarray], np.ndarray]:
    rng, y = np.random.default_rng(0), np.arange(n) % n_classes
    chosen = DIMS if head.fuses else {"one": DIMS["one"]}
    return {b: (rng.normal(size=(n, d)) + y[:, None]).astype(np.float32) for b, d in chosen.items()}, y


def tensors(x: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {backbone: torch.from_numpy(f) for backbone, f in x.items()}


@pytest.fixture(params=NAMES)
def head(request: pytest.FixtureRequest) -> Head:
    return make_head(request.param)


@pytest.fixture(params=SOLVED)
def solved_head(request: pytest.FixtureRequest) -> ClosedFormHead:
    made = make_head(request.param)
    assert isinstance(made, ClosedFormHead)
    return made


@pytest.mark.parametrize("name", NAMES)
def test_heads_of_this_package(name: str) -> None:
    check_head(make_head(name, **({"proj_dim": 32} if name.startswith("dvme") else {})))


@pytest.mark.parametrize(
    "head",
    [Bottleneck(), LogisticRegression(), RandomForestClassifier(10, random_state=0),
     make_pipeline(StandardScaler(), LogisticRegression())],
    ids=lambda head: type(head).__name__,
)  # fmt: skip
def test_heads_of_others(head: object) -> None:
    check_head(head)


def test_what_breaks_the_contract_is_named() -> None:
    with pytest.raises(AssertionError):
        check_head(Shuffled())
    with refused(UsageError, "not-a-head"):
        check_head(LinearSVC())  # no probabilities
    with refused(UsageError, "not-a-head"):
        find_head(7)


@pytest.mark.parametrize("name", [*METRICS, *OTHERS])
def test_metrics_of_this_package(name: str) -> None:
    check_metric(name)


def test_a_metric_whose_direction_is_wrong_is_refused() -> None:
    wrong = dataclasses.replace(METRICS["brier"], loss=False)
    with pytest.raises(AssertionError, match="is `loss` set"):
        check_metric(wrong)
    assert isinstance(wrong, Metric)


def test_objects_are_identified_by_module_and_parameters() -> None:
    assert identify(Bottleneck(width=8)) == {"name": "tests.contracts.test_heads:Bottleneck", "width": 8}
    forest = identify(find_head(RandomForestClassifier(10, random_state=0)))
    assert forest == {"name": "sklearn.ensemble._forest:RandomForestClassifier", "n_estimators": 10, "random_state": 0}
    assert identify(find_head(RandomForestClassifier(random_state=np.random.RandomState(0)))) is None

    class Local(Bottleneck):
        """Another function may define another one."""

    assert identify(Local()) is None
    pipeline = identify(find_head(make_pipeline(StandardScaler(), LogisticRegression(C=0.1))))
    assert pipeline is not None
    assert pipeline["steps"][1][1] == {
        "estimator": "sklearn.linear_model._logistic:LogisticRegression", "parameters": {"C": 0.1},
    }  # fmt: skip


def test_module_and_name_are_imported_for_the_user_alone() -> None:
    assert find_head("tests.contracts.test_heads:Bottleneck", {"width": 3}) == Bottleneck(3)
    assert find_head("tests.contracts.test_heads:Bottleneck") == Bottleneck()
    with refused(UsageError, "head-not-registered"):
        make_head("tests.contracts.test_heads:Bottleneck")  # as a run's file may name anything
    with refused(UsageError, "import-failed"):
        find_head("tests.contracts.test_heads:Nothing")


def test_is_made_again_from_what_identifies_it(head: Head) -> None:
    fields = [f for f in dataclasses.fields(head) if isinstance(f.default, int | float)]  # type: ignore[arg-type]
    changed = {f.name: f.default * 0.5 if isinstance(f.default, float) else f.default + 1 for f in fields}
    other = make_head(head.name, **changed)
    found = identify(other)
    assert found == {"name": head.name, **changed}
    assert make_head(**json.loads(json.dumps(found))) == other


def test_unknown_names_and_hyperparameters_are_refused() -> None:
    with refused(UsageError, "unknown-hyperparameter"):
        make_head("linear", nonsense=1)
    with refused(UsageError, "unknown-head"):
        make_head("linearx")


@pytest.mark.parametrize("bad", [0, "many", float("nan")])
def test_hyperparameters_without_sense_are_refused(head: Head, bad: object) -> None:
    for field in dataclasses.fields(head):  # type: ignore[arg-type]
        if field.name == "dropout" and bad == 0 and bad is not False:
            continue
        with pytest.raises(UsageError) as caught:
            make_head(head.name, **{field.name: bad})
        assert caught.value.code in ("option-bounds", "option-choice")


def test_what_is_solved_does_not_depend_on_the_order_of_rows(solved_head: ClosedFormHead) -> None:
    x, y = inputs(solved_head, 40)
    order = np.random.default_rng(5).permutation(40)
    a = solved_head.fit(x, y).predict_proba(x)
    b = solved_head.fit({name: f[order] for name, f in x.items()}, y[order]).predict_proba(x)
    np.testing.assert_allclose(a, b, atol=2e-3)


def test_a_solution_is_tensors_and_json(solved_head: ClosedFormHead) -> None:
    x, y = inputs(solved_head, 40)
    labels = torch.from_numpy(y)
    solved = solved_head.solve(tensors(x), labels, tensors(x), labels, 3, "macro_auc")
    assert json.loads(json.dumps(solved.chosen)) == solved.chosen
    kept = load(save({name: p.contiguous() for name, p in solved.params.items()}))  # as a run keeps them
    again, whole = (
        solved_head.apply({n: p[None] for n, p in params.items()}, {b: f[None] for b, f in tensors(x).items()})
        for params in (kept, solved.params)
    )
    assert torch.equal(again, whole)


@pytest.mark.parametrize("name", [*SOLVED, "sklearn"])
def test_a_class_that_no_image_trains_is_given_to_none(name: str) -> None:
    model = find_head(LogisticRegression()) if name == "sklearn" else make_head(name)
    x, y = inputs(model, 60)
    some = y != 1
    p = model.fit({b: f[some] for b, f in x.items()}, y[some]).predict_proba(x)
    assert np.isfinite(p).all()
    assert (p[:, 1] < 1e-6).all()
    assert set(p[some].argmax(1)) == {0, 2}


def test_other_features_than_it_was_trained_on_are_refused() -> None:
    head = make_head("linear")
    x, y = inputs(head, 40)
    fitted = head.fit(x, y, schedule=QUICK)
    for other in ({"one": x["one"][:, :3]}, {"other": x["one"]}):
        with pytest.raises(ValueError, match="are needed"):
            fitted.predict_proba(other)
    with pytest.raises(ValueError, match="do not fit"):
        head.fit(x, y[:-1])
    assert fitted.predict_proba({b: f[:0] for b, f in x.items()}).shape == (0, 3)
