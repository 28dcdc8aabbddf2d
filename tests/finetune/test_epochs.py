"""One fold's training against what torch does, and the order in which images are drawn."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from embcache.backbones.catalog import find_backbone, load_backbone
from embcache.backbones.transforms import Transform, augmentation, choose_transform, normalize
from embcache.data.dataset import ImageDataset
from embcache.finetune.epochs import FoldState, Frames, Trainer, batches, best_epoch, epoch_batches, repeatable
from embcache.finetune.model import ImageModel, assemble, check_head
from embcache.probe.heads import make_head
from embcache.probe.schedule import Schedule
from embcache.probe.stack import Job, make_job, stream_generator
from tests.finetune.conftest import RESNET, VIT

CPU = torch.device("cpu")
SIZE = (32, 32)


def frames(n: int = 24) -> tuple[Frames, np.ndarray]:
    y = np.arange(n) % 2
    pixels = np.random.default_rng(0).integers(0, 200, (n, *SIZE, 3)) + 30 * y[:, None, None, None]
    return Frames(pixels.astype(np.uint8), tuple(f"i{k}" for k in range(n))), y.astype(np.int64)


def model_of(name: str, precision: str = "fp32", head: str = "linear") -> ImageModel:
    loaded = load_backbone(name, image_size=SIZE)
    transform = choose_transform(loaded.spec, "paper", {SIZE})
    trainable = check_head(make_head(head), [name])
    params = trainable.init(stream_generator("0", "init"), {name: loaded.spec.dim}, 2)
    return assemble({name: loaded.module}, {name: transform}, trainable, params, CPU, precision)


def trainer_of(model: ImageModel, **changes: Any) -> Trainer:
    cut, y = frames()
    schedule = Schedule(batch_size=8, max_epochs=2)
    return replace(Trainer(model, cut, y, augmentation("chest", SIZE, SIZE), schedule, "auc"), **changes)


def job_of(trainer: Trainer, n: int = 16) -> Job:
    rows = np.arange(len(trainer.y))
    return make_job(trainer.y, rows[:n], rows[n:], 2, "0\x000", trainer.schedule.lr)


def trained(model: ImageModel, **changes: Any) -> tuple[FoldState, dict[str, torch.Tensor]]:
    trainer = trainer_of(model, **changes)
    with repeatable(CPU):
        *_, (state, _, _) = trainer.epochs(job_of(trainer), FoldState(), None)
    return state, {name: value.detach().clone() for name, value in model.state().items()}


def rows_of(job: Job, epoch: int) -> list[int]:
    return [row for batch in epoch_batches(job, epoch, 16) for row in batch]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(value, other[name]) for name, value in one.items())


def test_training_is_plain_adam_on_cross_entropy(ds: ImageDataset) -> None:
    """The same two epochs, written out with torch alone."""
    augment = replace(augmentation("generic", SIZE, SIZE), left_right=False)
    trainer = trainer_of(model_of(RESNET), augment=augment)
    job = job_of(trainer)
    loaded = load_backbone(RESNET, image_size=SIZE)
    transform = choose_transform(loaded.spec, "paper", {SIZE})
    network = copy.deepcopy(loaded.module).requires_grad_(True).train()
    network.to(memory_format=torch.channels_last)
    linear = torch.nn.Linear(loaded.spec.dim, 2)
    params = make_head("linear").init(stream_generator("0", "init"), {RESNET: loaded.spec.dim}, 2)  # type: ignore[attr-defined]
    with torch.no_grad():
        linear.weight.copy_(params["classifier.weight"])
        linear.bias.copy_(params["classifier.bias"])
    optimizer = torch.optim.Adam([*network.parameters(), *linear.parameters()], lr=1e-3)
    expected = []
    for epoch in (1, 2):
        losses = []
        for rows in epoch_batches(job, epoch, 8):
            x = normalize(torch.from_numpy(trainer.frames.pixels[rows]), transform, CPU)
            logits = linear(network(x.contiguous(memory_format=torch.channels_last)))
            loss = F.cross_entropy(logits, torch.from_numpy(trainer.y[rows]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        expected.append(np.mean(losses))
    state, tensors = trained(model_of(RESNET), augment=augment)
    assert np.allclose(state.losses, expected, rtol=1e-4)
    assert torch.allclose(tensors["head.classifier.weight"], linear.weight, atol=2e-4)


def test_accumulated_parts_are_one_batch_where_nothing_is_normalized_over_it(ds: ImageDataset) -> None:
    # Of the parameters themselves Adam would only show how it divides rounding by rounding (a key's bias has no
    # gradient but rounding), so outputs are compared.
    whole, _ = trained(model_of(VIT, head="mlp"))
    for parts in (3, 8):
        split, _ = trained(model_of(VIT, head="mlp"), accumulate=parts)
        assert np.allclose(split.losses, whole.losses, rtol=1e-4)
        assert split.val_scores == whole.val_scores
    other, _ = trained(model_of(VIT, head="mlp"), schedule=Schedule(batch_size=4, max_epochs=2))
    assert not np.allclose(other.losses, whole.losses, rtol=1e-4)


def test_threads_change_nothing(ds: ImageDataset) -> None:
    _, alone = trained(model_of(RESNET))
    with ThreadPoolExecutor(2) as pool:
        _, shared = trained(model_of(RESNET), pool=pool)
    assert same(alone, shared)


def test_bfloat16_runs_and_stays_near(ds: ImageDataset) -> None:
    fp32, _ = trained(model_of(RESNET))
    bf16, tensors = trained(model_of(RESNET, "bf16"))
    assert not bf16.diverged
    assert all(value.dtype != torch.bfloat16 for value in tensors.values())
    assert bf16.losses != fp32.losses
    assert np.allclose(bf16.losses, fp32.losses, rtol=0.2)


def test_the_global_random_state_is_left_alone(ds: ImageDataset) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    trained(model_of(RESNET, head="mlp"))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loss_that_is_not_finite_ends_training_with_the_best_epoch_so_far(
    ds: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(RESNET)
    original = ImageModel.logits
    calls: list[int] = []

    def spoil(self: ImageModel, pixels: torch.Tensor, masks: Any = None) -> torch.Tensor:
        calls.append(len(pixels))
        return original(self, pixels, masks) * (float("nan") if len(calls) == 5 else 1.0)

    monkeypatch.setattr(ImageModel, "logits", spoil)
    state, tensors = trained(model, schedule=Schedule(batch_size=8, max_epochs=9))
    assert state.diverged
    assert (state.epoch, best_epoch(state)) == (1, 1)  # the fifth batch: two train and one validates in an epoch
    assert all(torch.isfinite(value.float()).all() for value in tensors.values())  # no step was made with it


def test_every_image_is_drawn_once_an_epoch_in_an_order_of_its_own() -> None:
    y = np.array([0, 1] * 20)
    job = make_job(y, np.arange(40), np.arange(0), 2, "0\x000", 1e-3)
    orders = [rows_of(job, epoch) for epoch in (1, 2)]
    assert [len(batch) for batch in epoch_batches(job, 1, 16)] == [16, 16, 8]
    assert all(sorted(order) == list(range(40)) for order in orders)
    assert orders[0] != orders[1]
    assert orders[0] == rows_of(job, 1)
    other = replace(job, stream="0\x001")
    assert orders[0] != rows_of(other, 1)


def test_a_last_batch_of_one_image_is_joined_to_the_one_before() -> None:
    y = np.array([0, 1] * 20)
    job = make_job(y, np.arange(33), np.arange(0), 2, "0\x000", 1e-3)
    assert [len(batch) for batch in epoch_batches(job, 1, 16)] == [16, 17]
    assert [len(batch) for batch in epoch_batches(job, 1, 64)] == [33]


def test_the_plain_view_is_the_centre_and_the_augmented_one_is_not() -> None:
    cut, _ = frames()
    augment = augmentation("chest", SIZE, (24, 24))
    (batch,) = batches(cut, [[(2, None), (2, "key")]], augment, None)
    assert torch.equal(batch[0], torch.from_numpy(cut.pixels[2, 4:28, 4:28]))
    assert not torch.equal(batch[0], batch[1])
    assert isinstance(choose_transform(find_backbone("random"), "paper", {(24, 24)}), Transform)
