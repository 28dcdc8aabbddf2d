"""One shard of images in, its rows of features out: the unit of work of every engine.

Nothing here knows stores, leases or datasets, so any engine can call :func:`compute_shard`. A batch never crosses a
shard and always has ``batch_size`` rows: the tail and unreadable images are zero-padded and their outputs discarded. So
a shard's features depend on the shard alone, and a run that was killed and resumed equals an uninterrupted one bit for
bit.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embcache.backbones.catalog import LoadedBackbone
from embcache.backbones.networks import fold_norms, to_bfloat16
from embcache.backbones.runtimes import Compiled, check_runtime
from embcache.backbones.transforms import Augmentation, Transform, augmentation, center, frame, normalize
from embcache.cores import keep_freed_memory
from embcache.data.budget import Decoding
from embcache.data.images import ImageRef, Least, read_image
from embcache.errors import ImageError, UsageError, check_choice
from embcache.extract.quarantine import LEFT, medium_failed
from embcache.sealed import canonical_json
from embcache.store.schema import PRECISIONS, ShardRows

DTYPES = ("float32", "float16")

# Batches that a GPU may be given before the features of the first are waited for.
DEPTH = 2

# Batches that are decoded while one is used, if another device than the decoding cores uses it.
AHEAD = 2

# Frame, uint8 (H, W, 3), and digest of images, by id.
Frames = Mapping[str, tuple[NDArray[np.uint8], str]]
# Frames of those images of a batch, by id, that are cached; by frame key.
CachedFrames = Mapping[str, Callable[[Sequence[str]], Frames]]


@dataclass(frozen=True)
class Prepared:
    """One image after decoding and each transform."""

    pixels: tuple[NDArray[np.uint8], ...]  # (H, W, 3) each, one per transform; empty if the image could not be read
    digest: str
    reason: str  # why it could not


def prepare(
    root: Path, source: ImageRef, transforms: Sequence[Transform], decoding: Decoding | None = None
) -> Prepared:
    """Read, decode and transform one image; an unreadable one is a reason, not an exception."""
    if not source.path:
        return Prepared((), "", LEFT)
    images, digest = dict[Least, NDArray[np.uint8]](), ""
    try:
        for least in {transform.least: None for transform in transforms} or (None,):
            images[least], found = read_image(root, source.path, source.place, decoding, least)
            digest = digest or found  # if the file changes meanwhile, the first is not that of the file as it is
    except ImageError as error:
        return Prepared((), error.digest, error.problem)
    except OSError as error:
        raise medium_failed(root / source.path, error) from error
    try:
        return Prepared(tuple(each.geometry(images[each.least]) for each in transforms), digest, "")
    except ValueError as error:
        # The file is of another size than when the dataset was scanned, or of one that the transform enlarges too much.
        return Prepared((), digest, str(error))


def prepare_batches(
    root: Path,
    sources: Sequence[ImageRef],
    transforms: Sequence[Transform],
    batch_size: int,
    pool: Executor,
    decoding: Decoding | None = None,
) -> Iterator[list[Prepared]]:
    """Yield the prepared images of one shard batch by batch, decoding the next batches while this one is used."""

    def submit(chunk: Sequence[ImageRef]) -> list[Future[Prepared]]:
        return [pool.submit(prepare, root, source, transforms, decoding) for source in chunk]

    return batches_ahead(sources, batch_size, submit)


def batches_ahead(
    sources: Sequence[ImageRef],
    batch_size: int,
    submit: Callable[[Sequence[ImageRef]], list[Future[Prepared]]],
    ahead: int = AHEAD,
) -> Iterator[list[Prepared]]:
    """Yield the results of ``submit`` for each batch; the next ``ahead`` batches are begun while this one is used."""
    chunks = [sources[start : start + batch_size] for start in range(0, len(sources), batch_size)]
    pending: deque[list[Future[Prepared]]] = deque()
    begun = 0
    try:
        for index in range(len(chunks)):
            pending.extend(submit(chunk) for chunk in chunks[begun : index + 1 + ahead])
            begun = min(max(begun, index + 1 + ahead), len(chunks))
            yield [future.result() for future in pending.popleft()]
    finally:
        for futures in pending:
            for future in futures:
                future.cancel()


def stack_batch(batch: Sequence[Prepared], geometry: int, out: Tensor) -> Tensor:
    """Stack one geometry of a batch into ``out``, uint8 (B, H, W, 3); absent and unreadable rows become zero."""
    pixels = out.numpy()
    for row, prepared in enumerate(batch):
        pixels[row] = prepared.pixels[geometry] if prepared.pixels else 0
    pixels[len(batch) :] = 0
    return out


@dataclass(frozen=True)
class Views:
    """What becomes of a decoded image before normalization; networks that agree on it share pixels."""

    frame: Transform = field(compare=False)  # gives what can be cached: the image before the crop
    frame_key: str  # identifies the frame, whatever its normalization
    size: tuple[int, int]  # height and width of a view
    number: int = 1  # view 0 is the center of the frame, the others are augmented
    augmentation: Augmentation | None = None  # none if there is one view

    def of(self, framed: NDArray[np.uint8], id_: str) -> tuple[NDArray[np.uint8], ...]:
        """The views of one frame, each uint8 (*size, 3); view v of an image does not depend on their number."""
        plain = np.ascontiguousarray(center(framed, self.size))
        if self.augmentation is None:
            return (plain,)
        return (plain, *(self.augmentation(framed, f"view {view} of {id_}") for view in range(1, self.number)))


def make_views(transform: Transform, number: int = 1, augmentation: Augmentation | None = None) -> Views:
    """The views that a transform gives of an image, with an augmentation if there are several."""
    framing = frame(transform)
    key = canonical_json(framing.geometry_dict())
    return Views(framing, key, transform.size, number, augmentation if number > 1 else None)


def prepare_views(
    root: Path,
    source: ImageRef,
    wanted: Sequence[Views],
    cached: Mapping[str, Future[Frames]],
    decoding: Decoding | None = None,
) -> Prepared:
    """As `prepare`, with the views of each of ``wanted`` one after another.

    An image is not read if all its frames are in ``cached``, by frame key; the pixels are the same either way.
    """
    framings = {views.frame_key: views.frame for views in wanted}
    # Frames of a batch are requested before its images, so that even a single thread has read them by now.
    known = [cached[key].result().get(source.id) for key in framings if key in cached]
    there = [each for each in known if each is not None]
    if len(there) == len(framings):
        prepared = Prepared(tuple(pixels for pixels, _ in there), there[0][1], "")
    else:
        prepared = prepare(root, source, list(framings.values()), decoding)
    if not prepared.pixels:
        return prepared
    frames = dict(zip(framings, prepared.pixels, strict=True))
    views = [view for each in wanted for view in each.of(frames[each.frame_key], source.id)]
    return Prepared(tuple(views), prepared.digest, "")


def view_batches(
    root: Path,
    sources: Sequence[ImageRef],
    wanted: Sequence[Views],
    batch_size: int,
    pool: Executor,
    cached: CachedFrames,
    *,
    ahead: int = AHEAD,
    decoding: Decoding | None = None,
) -> Iterator[list[Prepared]]:
    """As `prepare_batches`; ``cached`` gives, by frame key, frames that need no decoding."""
    read = {views.frame_key: cached[views.frame_key] for views in wanted if views.frame_key in cached}

    def submit(chunk: Sequence[ImageRef]) -> list[Future[Prepared]]:
        frames = {key: pool.submit(get, [source.id for source in chunk]) for key, get in read.items()}
        return [pool.submit(prepare_views, root, source, wanted, frames, decoding) for source in chunk]

    return batches_ahead(sources, batch_size, submit, ahead)


@dataclass(frozen=True)
class FrozenNetwork:
    """A loaded backbone with its transform, device and precision: uint8 batches in, float32 features out."""

    backbone: LoadedBackbone
    transform: Transform
    device: torch.device
    precision: str
    views: int = 1  # each image is seen once as it is, and augmented in the others
    augmentation: Augmentation | None = None
    dtype: str = "float32"  # of the stored features
    compiled: Compiled | None = None  # what executes the network instead of torch

    @property
    def runtime(self) -> str:
        """What executes the network."""
        return self.compiled.name if self.compiled is not None else "eager"

    @property
    def image_views(self) -> Views:
        """What becomes of an image before it is normalized."""
        return make_views(self.transform, self.views, self.augmentation)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of an image's features: (D,), (T, D) of patches, or (V, D) with more than one view."""
        row = self.backbone.spec.row_shape
        return row if self.views == 1 else (self.views, *row)

    def features(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features, float32 (B, D), of a uint8 batch (B, H, W, 3)."""
        result: NDArray[np.float32] = self.forward(torch.from_numpy(pixels.copy())).cpu().numpy()
        return result

    def forward(self, pixels: Tensor) -> Tensor:
        """As :meth:`features`, of a tensor, best on the device already; the result may still be on its way."""
        # A network for bfloat16 has its weights in it and casts by itself: autocast would cast them in every batch.
        precision = "fp32" if self.precision == "bf16" else self.precision
        with torch.inference_mode(), arithmetic(self.device, precision):
            batch = normalize(pixels, self.transform, self.device).contiguous(memory_format=torch.channels_last)
            output: Tensor = (self.compiled or self.backbone.module)(batch)
            return output.float()

    def executed_by(self, runtime: str, kept: Path | None = None) -> FrozenNetwork:
        """The network executed by another runtime, of which conversions may be kept."""
        if runtime == self.runtime:
            return self
        check_runtime(runtime, self.device.type, self.precision)
        compiled = None if runtime == "eager" else Compiled(runtime, self.backbone.module, self.precision, kept)
        return replace(self, compiled=compiled)


def freeze(
    backbone: LoadedBackbone,
    transform: Transform,
    device: str,
    precision: str,
    views: int = 1,
    augment: str = "generic",
    dtype: str = "float32",
) -> FrozenNetwork:
    """Put a backbone on its device; ``augment`` is the modality that views beyond the first follow.

    A precision such as ``bf16+openvino`` names what executes the network too, as a recipe does.
    """
    target, (precision, _, runtime) = pick_device(device), precision.partition("+")
    check_choice("--feature-dtype", dtype, DTYPES)
    check_choice("--precision", precision, PRECISIONS)
    if backbone.spec.patches and views > 1:
        raise UsageError(
            "features of patches have one view", code="patches-views", found=f"--views {views}",
            fix="leave out --views, or --tokens mean",
        )  # fmt: skip
    if precision == "tf32" and target.type != "cuda":
        raise UsageError(
            "TF32 exists on CUDA devices only", code="precision-device", found=str(target),
            fix="embcache extract --precision fp32 …",
        )  # fmt: skip
    if backbone.spec.fixed and precision != "fp32":
        raise UsageError(
            f"{backbone.spec.name} is computed in fp32 only", code="precision-fixed", found=f"--precision {precision}",
            expected="fp32", fix="embcache extract --precision fp32 …",
        )  # fmt: skip
    if target.type == "cpu":
        keep_freed_memory()
    module = fold_norms(backbone.module.to(device="cpu"), transform.size)
    if precision == "bf16" and runtime in ("", "eager", "compile"):  # others convert weights by themselves
        module = to_bfloat16(module)
    # Channels last is about 1.5 times faster for convolutions on CPUs (docs/log.md) and what tensor cores want.
    module = module.to(device=target, memory_format=torch.channels_last)  # type: ignore[call-overload]
    augmented = augmentation(augment, frame(transform).size, transform.size) if views > 1 else None
    frozen = FrozenNetwork(replace(backbone, module=module), transform, target, precision, views, augmented, dtype)
    return frozen.executed_by(runtime or "eager")


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


def first_batch(
    root: Path, sources: Sequence[ImageRef], network: FrozenNetwork, pool: Executor, decoding: Decoding
) -> Tensor:
    """Images as a network sees them before normalization, uint8 (B, H, W, 3); zeros for those that are unreadable."""
    views, number = network.image_views, len(sources)
    (batch,) = view_batches(root, sources, [views], number, pool, {}, decoding=decoding)
    return stack_batch(batch, 0, torch.empty((number, *views.size, 3), dtype=torch.uint8))


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
    """Features of one shard under each network; an image is decoded once for all, or per `Transform.least`."""
    wanted = [network.image_views for network in networks]
    distinct = list(dict.fromkeys(wanted))
    firsts = dict(zip(distinct, accumulate((views.number for views in distinct), initial=0), strict=False))
    features = [np.zeros((len(sources), net.views, *net.backbone.spec.row_shape), np.float32) for net in networks]
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
    return [
        _rows(sources, rows.reshape(len(sources), *network.row_shape), network.dtype, digests, reasons)
        for rows, network in zip(features, networks, strict=True)
    ]


def _rows(
    sources: Sequence[ImageRef], features: NDArray[Any], dtype: str, digests: Sequence[str], reasons: Sequence[str]
) -> ShardRows:
    # What a narrow dtype cannot hold becomes infinite, and is quarantined like everything that is not finite.
    with np.errstate(over="ignore"):
        features = features.astype(dtype, copy=False)
    finite = np.isfinite(features).all(axis=tuple(range(1, features.ndim))).tolist()
    fault = "the features are not finite"
    why = tuple(reason or ("" if ok else fault) for reason, ok in zip(reasons, finite, strict=True))
    valid = np.array([not reason for reason in why], dtype=bool)
    features[~valid] = 0.0
    return ShardRows(tuple(source.id for source in sources), features, valid, tuple(digests), why)
