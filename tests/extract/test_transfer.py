"""Batches to the device and features back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from embcache.backbones.transforms import Transform, normalize
from embcache.data.images import ImageRef
from embcache.extract.worker import Prepared, Receiver, Sender, stack_batch

DEVICES = ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)]
SOURCES = [ImageRef(str(index), f"{index}.png", "") for index in range(7)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param != "cpu" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


def test_what_is_sent_arrives_and_comes_back(device: torch.device) -> None:
    sender, receiver = Sender(device), Receiver()
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8) for _ in range(6)]
    found = np.full((6, 4, 192), -1, np.float32)
    for batch, target in zip(batches, found, strict=True):
        host = sender.empty(batch.shape)
        host.numpy()[:] = batch
        sent = sender.send(host)
        assert sent.device.type == device.type
        receiver.bring(sent.flatten(1).float() + 1, target)
        receiver.settle(keep=1)
    receiver.settle()
    np.testing.assert_array_equal(found, np.stack(batches).reshape(6, 4, -1) + np.float32(1))


def test_a_stacked_batch_leaves_nothing_of_the_last_one() -> None:
    out = torch.full((4, 2, 2, 3), 9, dtype=torch.uint8)
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    stack_batch([Prepared((image,), "", ""), Prepared((), "", "broken")], 0, out)
    np.testing.assert_array_equal(out[0].numpy(), image)
    assert not out[1:].any()


def test_normalising_is_the_same_in_every_batch_and_mode(device: torch.device) -> None:
    transform = Transform("paper", None, None, (2, 2), "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    pixels = torch.arange(12, dtype=torch.uint8).view(1, 2, 2, 3)
    with torch.inference_mode():
        first = normalize(pixels, transform, device).cpu().numpy()
    # Constants that were made for inference must serve a network that is trained.
    weight = torch.ones(3, 1, 1, device=device, requires_grad=True)
    trained = normalize(pixels, transform, device) * weight
    trained.sum().backward()
    np.testing.assert_array_equal(trained.detach().cpu().numpy(), first)
    expected = (pixels.numpy() / 255 - np.float32([0.1, 0.2, 0.3])) / np.float32([0.4, 0.5, 0.6])
    np.testing.assert_allclose(first, expected.transpose(0, 3, 1, 2), rtol=1e-5)
    other = normalize(pixels, replace(transform, mean=(0.0, 0.0, 0.0)), device).cpu().numpy()
    assert not np.array_equal(other, first)
