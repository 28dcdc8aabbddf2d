"""Checkpoints of a finetuning in progress: one folder, whose ``state.json`` says what is valid.

::

    <home>/<dataset>/runs/.<run id>.partial/
      state.json                      sealed: request, state of each fold, size and crc32c of each file
      fold0-best-000004.safetensors   model of the best epoch so far, or of a finished fold
      fold0-test.safetensors          a finished fold's test predictions
      fold1-train-000007.safetensors  model and Adam's moments after an epoch

Tensor files are written under new names and flushed before ``state.json`` names them, and removed after it no longer
does: a process killed at any instant leaves the last whole epoch. Nothing here is a pickle.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from embcache.errors import CorruptStoreError, StoreError
from embcache.io import discard, is_folder, make_folder, replace_file
from embcache.sealed import file_checksum, read_sealed, seal, typed
from embcache.store.lease import Lease

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

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> SavedFile:
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
                fix="free space there, then run the same command again (embcache finetune with --resume): "
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
