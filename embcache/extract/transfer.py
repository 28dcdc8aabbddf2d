"""Batches to a device and features back, without waiting: a GPU computes while the next batch is decoded and copied."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Batches that a GPU may be given before the features of the first are waited for.
DEPTH = 2


class Sender:
    """Takes uint8 batches to a device; to a GPU from pinned memory, on a stream of its own.

    Parameters
    ----------
    device : torch.device
        Where the batches go.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """A batch to fill, uint8 in host memory; its contents are arbitrary."""
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self._stream is not None)

    def send(self, batch: Tensor) -> Tensor:
        """The batch on the device; what is queued there afterwards sees it whole."""
        if self._stream is None:
            return batch.to(self.device)
        with torch.cuda.stream(self._stream):
            there = batch.to(self.device, non_blocking=True)
        here = torch.cuda.current_stream(self.device)
        here.wait_stream(self._stream)
        there.record_stream(here)
        return there


class Receiver:
    """Brings features from a device into arrays; from a GPU when they are done, in the order they were asked for."""

    def __init__(self) -> None:
        self._pending: deque[tuple[torch.cuda.Event, Tensor, NDArray[Any]]] = deque()

    def bring(self, features: Tensor, target: NDArray[Any]) -> None:
        """Have the first rows of ``features``, float32 (B, D), written to ``target``, (n, D), now or when settled."""
        if features.device.type != "cuda":
            target[:] = features.numpy()[: len(target)]
            return
        host = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
        host.copy_(features, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(features.device))  # which need not be the current device
        self._pending.append((event, host, target))

    def settle(self, keep: int = 0) -> None:
        """Wait until at most ``keep`` of what was asked for is still on its way."""
        while len(self._pending) > keep:
            event, host, target = self._pending.popleft()
            event.synchronize()
            target[:] = host.numpy()[: len(target)]


def as_tensor(pixels: NDArray[np.uint8]) -> Tensor:
    """A uint8 array as a tensor that shares its memory; a copy of one that may not be written to."""
    return torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())
