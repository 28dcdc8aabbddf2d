"""One shard of images in, its rows of features out: the unit of work of every engine.

Nothing here knows stores, leases or datasets, so any engine can call :func:`compute_shard`.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embcache.backbones.catalog import LoadedBackbone
from embcache.backbones.inference import fold_norms, to_bfloat16
from embcache.backbones.transforms import Transform, frame, normalize
from embcache.cores import keep_freed_memory
from embcache.data.budget import Decoding
from embcache.data.images import ImageRef
from embcache.errors import UsageError, check_choice
from embcache.extract.augment import Augmentation, CachedFrames, Views, augmentation, make_views, view_batches
from embcache.extract.batching import AHEAD, stack_batch
from embcache.store.commit import ShardRows

DTYPES = ("float32", "float16")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")

# Raised whenever the arithmetic between decoded pixels and stored features changes: it is part of every recipe.
# 2: batch norms folded into convolutions; bfloat16 throughout.
NUMERICS = 2

# Batches that a GPU may be given before the features of the first are waited for.
DEPTH = 2


@dataclass(frozen=True)
class FrozenNetwork:
    """A loaded backbone with its transform, device and precision: uint8 batches in, float32 features out.

    With several views, each image is seen once as it is, and augmented in the others. ``dtype`` is that of the stored
    features.
    """

    backbone: LoadedBackbone
    transform: Transform
    device: torch.device
    precision: str
    views: int = 1
    augmentation: Augmentation | None = None
    dtype: str = "float32"

    @property
    def image_views(self) -> Views:
        """What becomes of an image before it is normalized."""
        return make_views(self.transform, self.views, self.augmentation)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of an image's features: (D,), or (V, D) with more than one view."""
        dim = self.backbone.spec.dim
        return (dim,) if self.views == 1 else (self.views, dim)

    def features(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features, float32 (B, D), of a uint8 batch (B, H, W, 3)."""
        result: NDArray[np.float32] = self.forward(torch.from_numpy(pixels.copy())).cpu().numpy()
        return result

    def forward(self, pixels: Tensor) -> Tensor:
        """As :meth:`features`, of a tensor, best on the device already; the result may still be on its way."""
        # A network for bfloat16 has its weights in it and casts by itself: autocast would cast them in every batch.
        precision = "fp32" if self.precision == "bf16" else self.precision
        with torch.inference_mode(), arithmetic(self.device, precision):
            batch = normalize(pixels, self.transform, self.device)
            output: Tensor = self.backbone.module(batch.contiguous(memory_format=torch.channels_last))
            return output.float()


def freeze(
    backbone: LoadedBackbone,
    transform: Transform,
    device: str,
    precision: str,
    views: int = 1,
    augment: str = "generic",
    dtype: str = "float32",
) -> FrozenNetwork:
    """Put a backbone on its device; ``augment`` is the modality that views beyond the first follow."""
    target = pick_device(device)
    check_choice("--feature-dtype", dtype, DTYPES)
    check_choice("--precision", precision, PRECISIONS)
    if precision == "tf32" and target.type != "cuda":
        raise UsageError(
            "TF32 exists on CUDA devices only", code="precision-device", found=str(target),
            fix="embcache extract --precision fp32 …",
        )  # fmt: skip
    if target.type == "cpu":
        keep_freed_memory()
    module = fold_norms(backbone.module.to(device="cpu"), transform.size)
    if precision == "bf16":
        module = to_bfloat16(module)
    # Channels last is about 1.5 times faster for convolutions on CPUs (docs/log.md) and what tensor cores want.
    module = module.to(device=target, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return FrozenNetwork(
        replace(backbone, module=module),
        transform,
        target,
        precision,
        views,
        augmentation(augment, frame(transform).size, transform.size) if views > 1 else None,
        dtype,
    )


def pick_device(device: str) -> torch.device:
    """``auto`` is the first CUDA device, else the CPU."""
    if device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(1, device=target)
    except (RuntimeError, AssertionError, ValueError) as error:
        # torch lists all types of devices that it knows, which is no help
        reason = str(error).splitlines()[0] if "device type" not in str(error) else "no such type of device"
        raise UsageError(
            f"the device {device!r} cannot be used", code="device", found=reason, expected="auto, cpu, cuda:0, …",
            fix="--device auto",
        ) from error  # fmt: skip
    return target


@contextlib.contextmanager
def arithmetic(device: torch.device, precision: str) -> Iterator[None]:
    """The arithmetic of a precision, in a ``with`` block; fp32 means fp32: cuDNN's default for convolutions is TF32."""
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            tf32 = precision == "tf32"
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("high" if tf32 else "highest")
            stack.callback(torch.set_float32_matmul_precision, before)
            # Deterministic kernels without benchmarking, so that a resumed run repeats its features bit for bit.
            flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=tf32)
            stack.enter_context(flags)
        if precision in ("bf16", "fp16"):
            dtype = torch.bfloat16 if precision == "bf16" else torch.float16
            stack.enter_context(torch.autocast(device.type, dtype=dtype))
        yield


class Sender:
    """Takes uint8 batches to a device; to a GPU from pinned memory, on a stream of its own."""

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
    """Copies features from a device into arrays; from a GPU when they are done, in order."""

    def __init__(self) -> None:
        self._pending: deque[tuple[torch.cuda.Event, Tensor, NDArray[Any]]] = deque()

    def bring(self, features: Tensor, target: NDArray[Any]) -> None:
        """Write the first rows of ``features``, float32 (B, D), to ``target``, (n, D), now or when settled."""
        if features.device.type != "cuda":
            target[:] = features.numpy()[: len(target)]
            return
        host = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
        host.copy_(features, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(features.device))  # which need not be the current device
        self._pending.append((event, host, target))

    def settle(self, keep: int = 0) -> None:
        """Wait until at most ``keep`` copies are pending."""
        while len(self._pending) > keep:
            event, host, target = self._pending.popleft()
            event.synchronize()
            target[:] = host.numpy()[: len(target)]


def compute_shard(
    root: Path,
    sources: Sequence[ImageRef],
    networks: Sequence[FrozenNetwork],
    *,
    batch_size: int,
    pool: Executor,
    cached: CachedFrames | None = None,
    on_rows: Callable[[int], object] = lambda rows: None,
    decoding: Decoding | None = None,
) -> list[ShardRows]:
    """Features of one shard under each network; every image is read and decoded once for all of them."""
    wanted = [network.image_views for network in networks]
    distinct = list(dict.fromkeys(wanted))
    firsts = dict(zip(distinct, accumulate((views.number for views in distinct), initial=0), strict=False))
    features = [np.zeros((len(sources), net.views, net.backbone.spec.dim), np.float32) for net in networks]
    digests: list[str] = []
    reasons: list[str] = []
    sender, receiver = Sender(networks[0].device), Receiver()
    # On a CPU the cores that would decode the next batch are those that compute this one: neither gets faster, and
    # torch's threads wait for the one that was interrupted (docs/log.md).
    ahead = 0 if networks[0].device.type == "cpu" else AHEAD
    for batch in view_batches(root, sources, distinct, batch_size, pool, cached or {}, ahead=ahead, decoding=decoding):
        start = len(digests)
        digests += [prepared.digest for prepared in batch]
        reasons += [prepared.reason for prepared in batch]
        sent: dict[int, Tensor] = {}
        for network, views, target in zip(networks, wanted, features, strict=True):
            for view in range(views.number):
                # A batch holds one view of its images, so that view 0 is computed just as without others.
                which = firsts[views] + view
                if which not in sent:
                    pixels = sender.empty((batch_size, *views.size, 3))
                    sent[which] = sender.send(stack_batch(batch, which, pixels))
                receiver.bring(network.forward(sent[which]), target[start : start + len(batch), view])
            on_rows(len(batch))
        receiver.settle(keep=(DEPTH - 1) * sum(views.number for views in wanted))
    receiver.settle()
    # What a narrow dtype cannot hold becomes infinite, and is quarantined like everything that is not finite.
    with np.errstate(over="ignore"):
        shaped = [
            rows.reshape(len(sources), *net.row_shape).astype(net.dtype, copy=False)
            for rows, net in zip(features, networks, strict=True)
        ]
    return [_rows(sources, rows, digests, reasons) for rows in shaped]


def _rows(
    sources: Sequence[ImageRef], features: NDArray[Any], digests: Sequence[str], reasons: Sequence[str]
) -> ShardRows:
    finite = np.isfinite(features).all(axis=tuple(range(1, features.ndim)))
    why = tuple(
        reason or ("" if ok else "the features are not finite")
        for reason, ok in zip(reasons, finite.tolist(), strict=True)
    )
    valid = np.array([not reason for reason in why], dtype=bool)
    features[~valid] = 0.0
    return ShardRows(tuple(source.id for source in sources), features, valid, tuple(digests), why)
