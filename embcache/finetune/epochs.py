"""Finetuning of one fold: its pixels, its epochs over augmented batches, and its checkpoints, one after every epoch.

No random state outlives an epoch: order, dropout and augmentation follow from the stream of the fold and the number of
the epoch, so a run that is resumed from the model and Adam's moments repeats an uninterrupted one. A *frame* is an
image after resizing and before the crop: what a pixel store holds, and what augmentation starts from. Checkpoints::

    <home>/<dataset>/runs/.<run id>.partial/
      state.json                      sealed: request, state of each fold, size and crc32c of each file
      fold0-best-000004.safetensors   model of the best epoch so far, or of a finished fold
      fold0-test.safetensors          a finished fold's test predictions
      fold1-train-000007.safetensors  model and Adam's moments after an epoch

Tensor files are flushed before ``state.json`` names them, and removed after it no longer does: a process killed at any
instant leaves the last whole epoch. Nothing here is a pickle.
"""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from embcache.backbones.transforms import Augmentation, Transform, center, frame
from embcache.data.dataset import ImageDataset
from embcache.data.images import image_refs
from embcache.errors import CorruptStoreError, StoreError
from embcache.extract.pixels import decode_into, open_pixels
from embcache.extract.scan import DatasetFiles, plan_store
from embcache.extract.worker import arithmetic, prepare_batches
from embcache.finetune.model import ImageModel, State
from embcache.io import discard, is_folder, make_folder, replace_file
from embcache.paths import PathLike
from embcache.probe.inputs import KnownImages
from embcache.probe.layers import Tensors
from embcache.probe.metrics import Metric, scorer
from embcache.probe.schedule import Schedule, Tracker
from embcache.probe.stack import Job, stream_generator
from embcache.sealed import file_checksum, read_sealed, seal, typed
from embcache.store.feature_store import FeatureStore, list_stores
from embcache.store.lease import Lease
from embcache.targets import Target, as_target

Pixels = NDArray[np.uint8]

_CHUNK = 256  # images decoded, or read from a store, at a time


@dataclass(frozen=True)
class Images:
    """A `KnownImages`, from decoding."""

    digests: Mapping[str, str]
    quarantined: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Frames:
    """The frames of some images."""

    pixels: Pixels = field(repr=False)  # (n, H, W, 3); in memory, or mapped from a scratch file
    ids: tuple[str, ...]


def known_images(
    dataset: ImageDataset, transform: Transform, files: DatasetFiles, home: PathLike | None, pool: Executor
) -> KnownImages:
    """What any complete and current store knows of the images, else what decoding each of them once tells."""
    cached = cached_images(dataset, transform, files, home)
    if cached is not None:
        return cached
    for store in list_stores(home, dataset.name):
        if _complete(store, dataset, files):
            return store.restrict(dataset.table["id"])
    prepared = prepare_batches(files.root, image_refs(dataset.table), [], _CHUNK, pool, files.scan.decoding)
    found = [image for batch in prepared for image in batch]
    return _images(dataset.table["id"].tolist(), [image.digest for image in found], [image.reason for image in found])


def cached_images(
    dataset: ImageDataset, transform: Transform, files: DatasetFiles, home: PathLike | None
) -> FeatureStore | None:
    """The pixel store of the images, if it is complete and current."""
    store = open_pixels(dataset, transform, home)
    return store if store is not None and _complete(store, dataset, files) else None


def decode_frames(
    dataset: ImageDataset,
    transform: Transform,
    files: DatasetFiles,
    scratch: Path,
    pool: Executor,
    ids: Sequence[str] | None = None,
) -> tuple[Frames, Images]:
    """Decode all or some images of a dataset, without a store."""
    framing = frame(transform)
    wanted = set(dataset.table["id"] if ids is None else ids)
    sources = [source for source in image_refs(dataset.table) if source.id in wanted]
    names = [source.id for source in sources]
    pixels = allocate((len(sources), *framing.size, 3), scratch)
    digests, reasons = decode_into(
        pixels, files.root, sources, framing, pool, batch_size=_CHUNK, decoding=files.scan.decoding
    )
    return Frames(pixels, tuple(names)), _images(names, digests, reasons)


def stored_frames(store: FeatureStore, ids: Sequence[str], scratch: Path) -> Frames:
    """Frames of some images from a pixel store."""
    rows = store.rows_of(ids)
    absent = [name for name, row in zip(ids, rows, strict=True) if row < 0]
    if absent:
        raise StoreError(
            f"{len(absent)} images are not in the pixel store", code="rows-missing", found=repr(absent[0]),
            where=store.path,
        )  # fmt: skip
    # In the order of the store, so that each shard is read and verified once.
    order = np.argsort(rows)
    pixels = allocate((len(ids), *store.row_shape), scratch)
    for start in range(0, len(order), _CHUNK):
        chunk = order[start : start + _CHUNK]
        pixels[chunk] = store.features[rows[chunk]]
    return Frames(pixels, tuple(ids))


def allocate(shape: tuple[int, ...], scratch: Path) -> Pixels:
    """A uint8 array in memory where it takes at most half of it, else mapped from ``scratch``."""
    if int(np.prod(shape)) <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2:
        return np.zeros(shape, dtype=np.uint8)
    return np.memmap(scratch, dtype=np.uint8, mode="w+", shape=shape)


def batches(
    frames: Frames,
    plan: Sequence[Sequence[tuple[int, str | None]]],
    augment: Augmentation,
    pool: ThreadPoolExecutor | None,
) -> Iterator[Tensor]:
    """Yield each planned batch as uint8 (B, H, W, 3), making the next two while one is used.

    A batch is planned as rows of frames with the key of their augmentation (None: the plain view), which depends on the
    key alone: any number of threads, or none (``pool=None``), gives the same bytes.
    """

    def make(draw: tuple[int, str | None]) -> Pixels:
        row, key = draw
        return center(frames.pixels[row], augment.size) if key is None else augment(frames.pixels[row], key)

    if pool is None:
        for batch in plan:
            yield torch.from_numpy(np.stack([make(draw) for draw in batch]))
        return
    waiting = iter(plan)
    pending = deque([pool.submit(make, draw) for draw in batch] for batch in islice(waiting, 2))
    try:
        while pending:
            made = [future.result() for future in pending.popleft()]
            pending.extend([pool.submit(make, draw) for draw in batch] for batch in islice(waiting, 1))
            yield torch.from_numpy(np.stack(made))
    finally:
        for future in (future for futures in pending for future in futures):
            future.cancel()


def _complete(store: FeatureStore, dataset: ImageDataset, files: DatasetFiles) -> bool:
    return not plan_store(store, dataset, files.scan, publish=False).shards


def _images(ids: Sequence[str], digests: Sequence[str], reasons: Sequence[str]) -> Images:
    return Images(
        {name: digest for name, digest, reason in zip(ids, digests, reasons, strict=True) if digest and not reason},
        {name: reason for name, reason in zip(ids, reasons, strict=True) if reason},
    )


FORMAT = 1
AGAIN = "repeat the command with --again instead of --resume: it starts over"


@dataclass(frozen=True)
class SavedFile:
    """A file that ``state.json`` names."""

    name: str
    size: int
    crc32c: str


@dataclass(frozen=True)
class FoldState:
    """The training of one fold so far."""

    losses: tuple[float, ...] = ()
    val_scores: tuple[float, ...] = ()
    lrs: tuple[float, ...] = ()
    scaler: Mapping[str, float] = field(default_factory=dict)  # of the loss scaling of fp16; empty without
    diverged: bool = False  # a loss or an output was not finite
    finished: bool = False  # tested; ``files`` then holds ``test``, and ``best`` where the model is kept
    files: Mapping[str, SavedFile] = field(default_factory=dict)

    @property
    def epoch(self) -> int:
        """Number of epochs that were trained and scored."""
        return len(self.losses)


@dataclass(frozen=True)
class Progress:
    """A run so far: one state per fold that was begun, and the seconds it took."""

    folds: tuple[FoldState, ...] = ()
    seconds: float = 0.0
    machine: Mapping[str, Any] = field(default_factory=dict)

    def fold(self, number: int) -> FoldState:
        """State of a fold, which may not have begun."""
        return self.folds[number] if number < len(self.folds) else FoldState()


class CheckpointFolder:
    """The folder with the checkpoints of one run."""

    def __init__(self, path: Path, request: Mapping[str, Any], command: str = "") -> None:
        self.path, self._request, self._command = path, dict(request), command

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Claim the folder for this process; an empty one is removed in the end."""
        for folder in (self.path.parent, self.path, self.path / "leases", self.path / "staging"):
            make_folder(folder)
            if not is_folder(folder):
                raise _damaged(folder, "a real folder", "a link")
        lease = Lease.acquire(self.path, 0)
        if lease is None:
            raise StoreError(
                "another process is finetuning this run", code="run-in-use", where=self.path,
                fix=("wait for it", "end it and --resume"),
            )  # fmt: skip
        try:
            yield
        finally:
            lease.release()
            if not (self.path / "state.json").exists():
                with suppress(StoreError):
                    discard(self.path)

    def read(self) -> Progress | None:
        """The progress that was saved; None where there is none."""
        path = self.path / "state.json"
        try:
            content = read_sealed(path, AGAIN, indent=None)
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}")
            progress: Progress = typed(Progress, {key: content[key] for key in ("folds", "seconds", "machine")})
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _damaged(path, "a file that can be read", error.strerror or str(error)) from error
        except (CorruptStoreError, ValueError, KeyError) as error:
            found = error.found if isinstance(error, CorruptStoreError) else str(error)
            raise _damaged(path, "the progress of a run of this version of embcache", str(found)) from error
        if content["request"] != self._request:
            raise _damaged(path, "the request of this run", "another request under its name")
        return progress

    def write(self, progress: Progress) -> None:
        """Make ``progress`` the valid one, and remove the files that it does not name."""
        content = {"format": FORMAT, "request": self._request, "command": self._command, **asdict(progress)}
        replace_file(self.path / "state.json", seal(content, indent=None))
        named = {"state.json", *(file.name for fold in progress.folds for file in fold.files.values())}
        for path in self.path.iterdir():
            if path.is_file() and path.name not in named:
                discard(path)

    def save(self, name: str, tensors: Tensors) -> SavedFile:
        """Write tensors to a file of this name and flush it."""
        path = self.path / name
        try:
            path.touch()
            mode = path.stat().st_mode
            save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, path)
            path.chmod(mode)  # as the umask has it: safetensors lets no other user read
            with path.open("rb") as file:
                os.fsync(file.fileno())
            return SavedFile(name, **file_checksum(path))
        except (OSError, SafetensorError) as error:
            path.unlink(missing_ok=True)
            raise StoreError(
                "the checkpoint cannot be written", code="checkpoint-not-written", found=str(error), where=path,
                fix="free space there, then run the same command again (embcache finetune … --resume): "
                "the last epoch is kept",
            ) from error  # fmt: skip

    def load(self, saved: SavedFile) -> dict[str, Tensor]:
        """Read the tensors of a file that `save` wrote."""
        path = self.file(saved)
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise _damaged(path, "named tensors", str(error)) from error

    def file(self, saved: SavedFile) -> Path:
        """Path of a file that `save` wrote, its bytes verified."""
        path = self.path / Path(saved.name).name  # never out of the folder
        try:
            found = SavedFile(saved.name, **file_checksum(path))
        except OSError as error:
            raise _damaged(path, "the file that state.json names", error.strerror or str(error)) from error
        if found != saved:
            expected, read = (f"{file.size:,} bytes, crc32c {file.crc32c}" for file in (saved, found))
            raise _damaged(path, expected, read)
        return path

    def clear(self) -> None:
        """Remove what was saved; the folder itself, and a lock on it, go when `lock` is left."""
        for path in (self.path / "state.json", *self.path.iterdir()):
            if path.is_file():
                discard(path)


def _damaged(path: Path, expected: str, found: str) -> CorruptStoreError:
    return CorruptStoreError(
        "the checkpoint of an interrupted finetuning cannot be used", code="checkpoint-corrupt",
        expected=expected, found=found, where=path, fix=AGAIN,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Trainer:
    """A model and what the training of every fold of a run shares."""

    model: ImageModel
    frames: Frames  # of all images that train, validate or test
    y: NDArray[Any]  # values of the frames (n,), or (n, L) of findings
    augment: Augmentation  # of training images; its ``size`` is that of the network
    schedule: Schedule
    metric: str | Metric  # scores the validation images
    accumulate: int = 1  # parts in which a batch passes through the network; one step follows all of them
    pool: ThreadPoolExecutor | None = None  # augments images
    on_images: Callable[[int], object] = field(default=lambda count: None)
    target: Target | None = None  # by default classes

    def epochs(self, job: Job, state: FoldState, resume: Tensors | None) -> Iterator[tuple[FoldState, State, State]]:
        """Train until the schedule ends or a loss or an output is not finite.

        Yields, after each epoch, the state, the tensors to resume from, and the model if it is the best so far.
        """
        model = self.model
        tracker = Tracker(self.schedule, job.lr)
        for value in state.val_scores:
            tracker.update(value)
        optimizer = torch.optim.Adam(model.trainable().values(), lr=tracker.lr)
        scaler = torch.amp.GradScaler(model.device.type, enabled=model.precision == "fp16")
        if resume is not None:
            _restore(model, optimizer, scaler, state, resume)
        while not tracker.done:
            for group in optimizer.param_groups:
                group["lr"] = tracker.lr
            lr = tracker.lr
            loss = self._train(job, optimizer, scaler, tracker.epoch + 1)
            logits = self.predict(job.val.tolist()) if math.isfinite(loss) else None
            if logits is None or not np.isfinite(logits).all():
                yield replace(state, diverged=True), {}, {}
                return
            value = scorer(self.metric, self.y[job.val.numpy()], self.target or logits.shape[1])(logits)
            better = tracker.update(value)
            state = replace(
                state, losses=(*state.losses, loss), val_scores=(*state.val_scores, value), lrs=(*state.lrs, lr),
                scaler=dict(scaler.state_dict()),
            )  # fmt: skip
            yield state, _tensors(model, optimizer), model.state() if better else {}

    def predict(self, rows: Sequence[int]) -> NDArray[Any]:
        """Logits, float32 (of numbers float64) of shape (len(rows), C), of the plain view of some frames."""
        plan = [[(row, None) for row in part] for part in _split(rows, self._part)]
        parts = []
        self.model.train(False)
        with torch.no_grad(), self._arithmetic():
            for pixels in batches(self.frames, plan, self.augment, self.pool):
                parts.append(self.model.finished(self.model.logits(pixels)).cpu().numpy())
                self.on_images(len(pixels))
        return np.concatenate(parts)

    def _train(self, job: Job, optimizer: torch.optim.Adam, scaler: torch.amp.GradScaler, epoch: int) -> float:
        """One epoch; its mean loss per image, or the loss that was not finite."""
        model, target = self.model, self.target or as_target(2)
        steps = epoch_batches(job, epoch, self.schedule.batch_size)
        plan, drawn = [], 0
        for rows in steps:
            # The place in the epoch is part of the key: an image that is drawn twice looks different each time.
            keys = (f"{job.stream}\0{epoch}\0{k}\0{self.frames.ids[row]}" for k, row in enumerate(rows, drawn))
            plan.append(list(zip(rows, keys, strict=True)))
            drawn += len(rows)
        model.train()
        total = 0.0
        with self._arithmetic():
            made = batches(self.frames, plan, self.augment, self.pool)
            for step, (rows, pixels) in enumerate(zip(steps, made, strict=True)):
                # Torch's own random state, which only dropout inside a backbone reads.
                seed = hashlib.sha256(f"{job.stream}\0network\0{epoch}\0{step}".encode()).digest()[:8]
                torch.manual_seed(int.from_bytes(seed, "little") >> 1)
                y = torch.from_numpy(self.y[rows]).to(model.device)
                stream = stream_generator(job.stream, f"dropout\0{epoch}\0{step}")
                masks = {n: m[0].to(model.device) for n, m in model.head.draw_masks(len(rows), [stream]).items()}
                optimizer.zero_grad(set_to_none=True)
                loss = 0.0
                for part in _join_single(_split(range(len(rows)), self._part)):
                    chosen = slice(part[0], part[-1] + 1)
                    out = model.logits(pixels[chosen], {name: mask[chosen] for name, mask in masks.items()} or None)
                    given = {name: value[None] for name, value in model.params.items()}
                    # Divided by the whole batch, so that the gradients of the parts add up to that of the batch.
                    each = target.row_losses(out[None], y[chosen][None], given).sum() / len(rows)
                    torch.autograd.backward(scaler.scale(each))
                    loss += float(each.detach())
                if not math.isfinite(loss):
                    return loss
                scaler.step(optimizer)
                scaler.update()
                total += loss * len(rows)
                self.on_images(len(rows))
        return total / drawn

    @property
    def _part(self) -> int:
        return -(-self.schedule.batch_size // self.accumulate)

    def _arithmetic(self) -> AbstractContextManager[None]:
        # Of forward and backward passes; the model itself narrows its forward pass.
        return arithmetic(self.model.device, "tf32" if self.model.precision == "tf32" else "fp32")


def epoch_batches(job: Job, epoch: int, batch_size: int) -> list[list[int]]:
    """Rows of each batch of an epoch."""
    return _join_single(_split(job.draw(stream_generator(job.stream, f"order\0{epoch}")).tolist(), batch_size))


def best_epoch(state: FoldState) -> int:
    """The epoch that is kept, counted from 1: the earliest with the best validation score; 0 for none."""
    return 1 + int(np.argmax(state.val_scores)) if state.val_scores else 0


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Leave torch's random state as it was; on a GPU, use kernels that give the same sums every time."""
    cuda = device.type == "cuda"
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng(devices=[device] if cuda else []), warnings.catch_warnings():
        if cuda:
            # A few kernels (bicubic position embeddings, attention) have no such version; documented.
            warnings.filterwarnings("ignore", message=".*determinis.*")
            torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            if cuda:
                torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _split(rows: Sequence[int], size: int) -> list[list[int]]:
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


def _join_single(parts: list[list[int]]) -> list[list[int]]:
    # A last part of one image is joined to the one before: batch normalization has no statistics over one image.
    if len(parts) > 1 and len(parts[-1]) == 1:
        return [*parts[:-2], parts[-2] + parts[-1]]
    return parts


def _tensors(model: ImageModel, optimizer: torch.optim.Adam) -> State:
    """What training is resumed from: the model, and Adam's moments and step counts."""
    tensors = {f"model.{name}": value for name, value in model.state().items()}
    for name, parameter in model.trainable().items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"adam.{key}.{name}"] = value
    return tensors


def _restore(
    model: ImageModel, optimizer: torch.optim.Adam, scaler: torch.amp.GradScaler, state: FoldState, tensors: Tensors
) -> None:
    model.load({name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")})
    for name, parameter in model.trainable().items():
        saved = {key: tensors.get(f"adam.{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
        # Laid out in memory like the parameter; the step count stays on the CPU, as Adam makes it.
        moments = {
            key: value if key == "step" else torch.empty_like(parameter).copy_(value).detach()
            for key, value in saved.items()
            if value is not None
        }
        if moments:
            optimizer.state[parameter] = moments
    if state.scaler:
        scaler.load_state_dict(dict(state.scaler))
