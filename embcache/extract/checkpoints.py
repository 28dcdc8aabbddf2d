"""Published checkpoint formats: reading them without running anything they hold, and filling networks strictly.

Read are safetensors and PyTorch's zip and legacy formats, recognised by content. A pickle may hold tensors, plain
containers and the few harmless types that the published files hold; anything else is refused, never run.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
import warnings
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch
from torch import Tensor, nn

from embcache.errors import WeightsError
from embcache.extract.pickles import HostilePickleError, check_pickle

# Where published files keep the network, tried in this order; the first that is there counts.
NESTS = (
    ("classy_state_dict", "base_model", "model", "trunk"),  # VISSL
    ("teacher",),  # DINO's full checkpoints
    ("model_state_dict",),  # VISSL, converted
    ("state_dict",),
    ("model",),
)
# Wrappers whose names stand before a parameter's own: DistributedDataParallel, VISSL's trunk, DINO's MultiCropWrapper.
PREFIXES = ("module.", "_feature_blocks.", "backbone.")
# What networks carry besides the trunk; left out of a frozen network.
HEADS = ("fc.", "_fc.", "classifier.", "projection_head.", "prototypes.", "head.", "heads.")

_CONVERT = (
    "if you trust the file, keep its tensors alone in a safetensors file "
    "(https://huggingface.co/docs/safetensors), and pass that with --weights"
)


class _Ignored:
    """Takes the place of a harmless object while a pickle is read: holds nothing, does nothing."""

    def __new__(cls, *args: object) -> _Ignored:
        return object.__new__(cls)

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _BrokenError(Exception):
    """What a file that is no checkpoint is instead, or how it is damaged."""


def _stand_in(path: str) -> type[_Ignored]:
    # torch finds an allowed class by its module and name, so the stand-in bears those of what it replaces.
    module, _, name = path.rpartition(".")
    return type(name, (_Ignored,), {"__module__": module})


# Not tensors, and in published files: numpy scalars among losses and learning rates (VISSL, DINO) and the training's
# arguments (DINO's full checkpoints). None is rebuilt: what is read in its place is inert.
_HARMLESS = [
    _stand_in(path)
    for path in (
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray._reconstruct",
        "numpy.ndarray",
        "numpy.dtype",
        "argparse.Namespace",
    )
]


_STAND_INS = frozenset(f"{stand_in.__module__}.{stand_in.__name__}" for stand_in in _HARMLESS)
_LEGACY_PICKLES = 5  # magic number, protocol, machine, the object, names of the storages that follow
_MOST_HEADER = 16 << 20  # published files have some hundred kilobytes; a gigabyte of objects fits into 100 MB


@dataclass(frozen=True)
class Checkpoint:
    """The network's tensors under the names they have in the file, and the sha256 of the file."""

    state: Mapping[str, Tensor]
    sha256: str


def read_checkpoint(path: Path, *, given: bool = False) -> Checkpoint:
    """Read a published checkpoint: safetensors, PyTorch zip or PyTorch legacy, flat or nested (:data:`NESTS`).

    Parameters
    ----------
    path : Path
        The file.
    given : bool
        Whether it is the user's own file rather than one in the weights folder, which may be fetched again.

    Raises
    ------
    WeightsError
        The file is missing, empty, truncated, not a checkpoint, would unpack to more than its size, or holds objects
        that are neither tensors nor known to be harmless.
    """
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            loaded = _read(path, file)
        return Checkpoint(_unwrap(loaded, path), sha256)
    except _BrokenError as error:
        raise WeightsError(
            f"{path.name} is not a checkpoint that can be read", expected="safetensors, or a PyTorch file of tensors",
            found=str(error), where=path,
            fix="pass another file with --weights, or none to use the published one" if given
            else (f"rm '{path}' and fetch it again", "pass another with --weights"),
        ) from error  # fmt: skip
    except OSError as error:
        raise WeightsError(
            f"the checkpoint cannot be read: {error.strerror or error}", where=path, fix=f"ls -l '{path}'"
        ) from error


def _read(path: Path, file: IO[bytes]) -> object:
    head = file.read(512)
    file.seek(0)
    if head[:4] == b"PK\x03\x04":
        _check_zip(path, file)
        # Mapped, so that a tensor which claims more than the file holds is an error instead of a read past its end.
        if path.suffix != ".safetensors":
            return _read_pickle(path, path, mmap=True)
        # Only a file with a name can be, and torch believes this one: give it another.
        with tempfile.TemporaryDirectory() as folder:
            link = Path(folder) / "checkpoint"
            link.symlink_to(path.resolve())
            return _read_pickle(path, link, mmap=True)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        if int.from_bytes(head[:8], "little") > _MOST_HEADER:
            raise _BrokenError(f"a safetensors file whose header has more than {_MOST_HEADER:,} bytes")
        try:
            return safetensors.torch.load_file(path)
        except Exception as error:
            raise _BrokenError(f"a damaged safetensors file: {error}") from error
    if head[:2] == b"\x80\x02":
        for _ in range(_LEGACY_PICKLES):
            _check_pickle(path, file)
        file.seek(0)
        return _read_pickle(path, file, mmap=False)
    raise _BrokenError(_describe(head))


def _check_pickle(path: Path, file: IO[bytes]) -> None:
    """Refuse a pickle, before torch reads it, that calls what no checkpoint needs or is made to keep one busy."""
    try:
        check_pickle(file, _STAND_INS)
    except HostilePickleError as error:
        if str(error).startswith("GLOBAL "):
            raise _unsafe(path, str(error).removeprefix("GLOBAL ")) from error
        raise _BrokenError(str(error)) from error
    except Exception as error:  # pickletools raises whatever comes
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise _BrokenError(f"a damaged or foreign PyTorch file: {reason}") from error


def _unsafe(path: Path, name: str) -> WeightsError:
    return WeightsError(
        "the checkpoint is refused: reading it could run code", expected="tensors and plain containers",
        found=f"the object {name}", where=path, fix=_CONVERT,
    )  # fmt: skip


def _read_pickle(path: Path, source: Path | IO[bytes], *, mmap: bool) -> object:
    with torch.serialization.safe_globals(list(_HARMLESS)), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about storages of its own older formats
        try:
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
        except Exception as error:  # a malformed pickle can raise anything
            unsafe = re.search(r"GLOBAL (\w\S*)", str(error))
            if unsafe:
                raise _unsafe(path, unsafe[1]) from error
            # torch wraps the reason in advice to load the file unsafely, which is not ours to give.
            said = re.search(r"WeightsUnpickler error: (.+)", str(error)) or re.search(r"(.+)", str(error))
            reason = said[1].strip() if said else f"it ends too early ({type(error).__name__})"
            raise _BrokenError(f"a damaged or foreign PyTorch file: {reason}") from error


def _check_zip(path: Path, file: IO[bytes]) -> None:
    """PyTorch stores its records uncompressed; anything else may unpack to any size."""
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            if any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise _BrokenError("a compressed zip archive")
            if sum(record.file_size for record in records) > path.stat().st_size:
                raise _BrokenError("a zip archive whose records claim more bytes than the file has")
            damaged = archive.testzip()
            names = [record.filename for record in records]
            if len(set(names)) < len(names):
                raise _BrokenError("a zip archive with several records of one name")
            for record in records if damaged is None else []:
                if record.filename.endswith(".pkl"):
                    with archive.open(record) as pickle:
                        _check_pickle(path, pickle)
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise _BrokenError(f"a damaged zip archive, or a download cut short: {error}") from error
    if damaged is not None:
        raise _BrokenError(f"a damaged zip archive: the checksum of {damaged} does not match")


def _describe(head: bytes) -> str:
    text = head.lstrip().lower()
    if not head:
        return "an empty file"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page: the download went to a login or error page"
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself: git lfs pull"
    if head.startswith(b"\x1f\x8b"):
        return "a gzip archive: unpack it first"
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it first"
    return f"a file that begins with {head[:8]!r}"


def _unwrap(loaded: object, path: Path) -> dict[str, Tensor]:
    """Find the network's tensors in what a file holds."""
    for nest in NESTS:
        inner: Any = loaded
        for key in nest:
            inner = inner.get(key) if isinstance(inner, Mapping) else None
        if isinstance(inner, Mapping):
            loaded = inner
            break
    if not isinstance(loaded, Mapping) or not loaded:
        raise _BrokenError(f"a {type(loaded).__name__} instead of named tensors")
    other = [str(key) for key, value in loaded.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if other:
        raise WeightsError(
            f"{path.name} is not in a layout that embcache knows", where=path,
            expected="named tensors, flat or under " + ", ".join("/".join(nest) for nest in NESTS),
            found="entries that are not tensors: " + _some(other), fix=_CONVERT,
        )  # fmt: skip
    size = path.stat().st_size
    for key, value in loaded.items():
        # A tensor may be of another kind, without values, or repeat one value over any shape.
        plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
        if not plain or value.numel() * value.element_size() > size:
            raise _BrokenError(f"{key} is no plain tensor whose values the file holds")
    return {key: value.detach() for key, value in loaded.items()}


def strip_prefixes(state: Mapping[str, Tensor], *, where: object = None) -> dict[str, Tensor]:
    """Take the known wrappers' prefixes (:data:`PREFIXES`) off every name, as often as they stand there.

    Raises
    ------
    WeightsError
        Two names become one.
    """
    stripped: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key
        while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), None):
            name = name.removeprefix(prefix)
        if name in stripped:
            raise WeightsError(
                f"the checkpoint names {name} twice, with and without a prefix", found=key, where=where, fix=_CONVERT
            )
        stripped[name] = value
    return stripped


def clean_state_dict(state: Mapping[str, Tensor], *, where: object = None) -> dict[str, Tensor]:
    """Strip the known prefixes and leave out the known heads (:data:`PREFIXES`, :data:`HEADS`).

    Raises
    ------
    WeightsError
        Two names become one.
    """
    return {key: value for key, value in strip_prefixes(state, where=where).items() if not key.startswith(HEADS)}


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], *, where: object = None) -> None:
    """Fill every parameter and buffer of ``module`` from ``state``, and nothing else.

    The one exception is ``num_batches_tracked``, which older checkpoints lack and no frozen network reads.

    Raises
    ------
    WeightsError
        A name is missing or unknown, a shape differs, or a value is not finite; the message lists them.
    """
    wanted = module.state_dict()
    missing = [key for key in wanted if key not in state and not key.endswith(".num_batches_tracked")]
    unknown = [key for key in state if key not in wanted]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in wanted.items()
        if key in state and state[key].shape != tensor.shape
    ]
    if missing or unknown or shapes:
        parts = (("missing", missing), ("unknown", unknown), ("shaped otherwise", shapes))
        raise WeightsError(
            "the checkpoint does not fit the network", expected=f"{len(wanted)} tensors: {_some(list(wanted), 3)}",
            found="; ".join(f"{len(keys)} {what}: {_some(keys)}" for what, keys in parts if keys), where=where,
            fix="pass the checkpoint of this backbone with --weights NAME=FILE; see `embcache backbones`",
        )  # fmt: skip
    spoilt = [key for key in wanted if key in state and not bool(torch.isfinite(state[key]).all())]
    if spoilt:
        raise WeightsError(
            "the checkpoint holds values that are not finite", found=_some(spoilt), where=where,
            fix="fetch the checkpoint again",
        )  # fmt: skip
    module.load_state_dict(dict(state), strict=False)


def hash_state(module: nn.Module) -> str:
    """Sha256 of a network's tensors: names in order, dtypes, shapes and bytes; the same on every device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {data.dtype} {tuple(data.shape)}\n".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _some(names: Collection[str], most: int = 8) -> str:
    shown = ", ".join(list(names)[:most])
    return shown + (f", … ({len(names)} in all)" if len(names) > most else "")
