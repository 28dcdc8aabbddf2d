"""Published checkpoint formats: reading them without running anything they hold, and filling networks strictly.

Formats are safetensors and PyTorch's zip and legacy formats, recognized by content. A pickle may hold tensors, plain
containers and the few harmless types in published files; anything else is refused, never run.
"""

from __future__ import annotations

import hashlib
import pickletools
import re
import tempfile
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch
from torch import Tensor, nn

from embcache.errors import WeightsError, first_few

# Prefixes of a network's own names, in nested mappings or before dots: of published files and training tools, and the
# wrappers of DistributedDataParallel, torch.compile, VISSL, DINO and MoCo.
WRAPPERS = frozenset(
    {"backbone", "base_encoder", "base_model", "classy_state_dict", "encoder", "encoder_q", "model", "model_ema"}
    | {"model_state_dict", "module", "state_dict", "state_dict_ema", "student", "teacher", "trunk"}
    | {"_feature_blocks", "_orig_mod"}
)
# Of two complete networks in one file the first is taken: as timm takes the average of the weights over training, and
# as the evaluations of DINO, DINOv2, iBOT (teacher), MoCo (encoder_q, base_encoder) and lightly (backbone) do.
PREFERRED = (
    ("state_dict_ema", "state_dict"),
    ("model_ema", "model"),
    ("teacher", "student"),
    ("encoder_q", "encoder_k"),
    ("base_encoder", "momentum_encoder"),
    ("backbone", "backbone_momentum"),
)
_NEUTRAL = ("module", "_orig_mod")  # say nothing of which network it is
# What networks have in addition to the trunk; left out of a frozen network.
HEADS = (
    "_fc.", "classifier.", "decoder_", "dino_head.", "fc.", "head.", "heads.", "ibot_head.", "mask_token", "predictor.",
    "projection_head.", "projector.", "prototypes.",
)  # fmt: skip
_DEEPEST = 8  # mappings in mappings; published files have four

_CONVERT = (
    "if you trust the file, keep its tensors alone in a safetensors file "
    "(https://huggingface.co/docs/safetensors), and pass that with --weights"
)


class _BrokenError(Exception):
    """What a file that is no checkpoint is instead, or how it is damaged."""


class _UnsafeError(Exception):
    """Name of an object in a pickle that no checkpoint needs."""


class _Ignored:
    """Replaces a harmless object while a pickle is read: holds nothing, does nothing."""

    def __new__(cls, *args: object) -> _Ignored:
        return object.__new__(cls)

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


# Not tensors, and in published files: numpy scalars among losses and learning rates (VISSL, DINO) and the training's
# arguments (DINO's full checkpoints). None is rebuilt: an inert object replaces each. torch finds an allowed class by
# its module and name, so the replacement has those of the original.
_STAND_INS = frozenset(
    {
        "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype", "argparse.Namespace",
    }
)  # fmt: skip
_HARMLESS = [
    type(path.rpartition(".")[2], (_Ignored,), {"__module__": path.rpartition(".")[0]}) for path in sorted(_STAND_INS)
]
_LEGACY_PICKLES = 5  # magic number, protocol, machine, the object, names of the storages that follow
_MOST_HEADER = 16 << 20  # published files have some hundred kilobytes; a gigabyte of objects fits into 100 MB


@dataclass(frozen=True)
class Checkpoint:
    """All tensors under the names they have in the file, dots between nested ones, and the sha256 of the file."""

    state: Mapping[str, Tensor]
    sha256: str


def read_checkpoint(path: Path, *, given: bool = False) -> Checkpoint:
    """Read a checkpoint, flat or nested; ``given``: the user named the file."""
    with _refusals(path, given), path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        return Checkpoint(_unwrap(_read(path, file), path), sha256)


def read_tensors(path: Path) -> list[Tensor]:
    """The tensors of a file that holds one, or a list of them; raises as `read_checkpoint`."""
    with _refusals(path, True), path.open("rb") as file:
        loaded = _read(path, file)
        tensors = loaded if isinstance(loaded, list) else [loaded]
        if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
            raise _BrokenError(f"a {type(loaded).__name__} instead of a tensor")
        return list(_check_plain({str(k): tensor for k, tensor in enumerate(tensors)}, path).values())


@contextmanager
def _refusals(path: Path, given: bool) -> Iterator[None]:
    try:
        yield
    except _UnsafeError as error:
        raise WeightsError(
            "the checkpoint is refused: reading it could run code", code="checkpoint-unsafe",
            expected="tensors and plain containers", found=f"the object {error}", where=path, fix=_CONVERT,
        ) from error  # fmt: skip
    except _BrokenError as error:
        raise WeightsError(
            f"{path.name} is not a checkpoint that can be read", code="not-a-checkpoint",
            expected="safetensors, or a PyTorch file of tensors", found=str(error), where=path,
            fix="pass another file with --weights, or none to use the published one" if given
            else (f"rm '{path}' and fetch it again", "pass another with --weights"),
        ) from error  # fmt: skip
    except OSError as error:
        raise WeightsError(
            f"the checkpoint cannot be read: {error.strerror or error}", code="file-not-readable", where=path,
            fix=f"ls -l '{path}'",
        ) from error  # fmt: skip


def _read(path: Path, file: IO[bytes]) -> object:
    head = file.read(512)
    file.seek(0)
    if head[:4] == b"PK\x03\x04":
        _check_zip(path, file)
        # Mapped, so that a tensor that claims more than the file holds is an error instead of a read past its end.
        if path.suffix != ".safetensors":
            return _read_pickle(path, mmap=True)
        # Only a named file can be mapped, and torch takes this name for the format: give it another.
        with tempfile.TemporaryDirectory() as folder:
            link = Path(folder) / "checkpoint"
            link.symlink_to(path.resolve())
            return _read_pickle(link, mmap=True)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        if int.from_bytes(head[:8], "little") > _MOST_HEADER:
            raise _BrokenError(f"a safetensors file with a header of more than {_MOST_HEADER:,} bytes")
        try:
            return safetensors.torch.load_file(path)
        except Exception as error:
            raise _BrokenError(f"a damaged safetensors file: {error}") from error
    if head[:2] == b"\x80\x02":
        for _ in range(_LEGACY_PICKLES):
            _check_pickle(file)
        file.seek(0)
        return _read_pickle(file, mmap=False)
    raise _BrokenError(_describe(head))


def _read_pickle(source: Path | IO[bytes], *, mmap: bool) -> object:
    with torch.serialization.safe_globals(list(_HARMLESS)), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about storages of its own older formats
        try:
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
        except Exception as error:  # a malformed pickle can raise anything
            if unsafe := re.search(r"GLOBAL (\w\S*)", str(error)):
                raise _UnsafeError(unsafe[1]) from error
            # torch wraps the reason in advice to load the file unsafely, which is not ours to give.
            found = re.search(r"WeightsUnpickler error: (.+)", str(error)) or re.search(r"(.+)", str(error))
            reason = found[1].strip() if found else f"it ends too early ({type(error).__name__})"
            raise _BrokenError(f"a damaged or foreign PyTorch file: {reason}") from error


def _check_zip(path: Path, file: IO[bytes]) -> None:
    """PyTorch stores its records uncompressed; anything else may unpack to any size."""
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            if any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise _BrokenError("a compressed zip archive")
            if sum(record.file_size for record in records) > path.stat().st_size:
                raise _BrokenError("a zip archive with records that claim more bytes than the file has")
            damaged = archive.testzip()
            names = [record.filename for record in records]
            if len(set(names)) < len(names):
                raise _BrokenError("a zip archive with several records of one name")
            for record in records if damaged is None else []:
                if record.filename.endswith(".pkl"):
                    with archive.open(record) as pickle:
                        _check_pickle(pickle)
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise _BrokenError(f"a damaged zip archive, or a download cut short: {error}") from error
    if damaged is not None:
        raise _BrokenError(f"a damaged zip archive: the checksum of {damaged} does not match")


def _describe(head: bytes) -> str:
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page: the download went to a login or error page"
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself: git lfs pull"
    return f"a file that begins with {head[:8]!r}" if head else "an empty file"


def _unwrap(loaded: object, path: Path) -> dict[str, Tensor]:
    """Every named tensor in what a file holds; names of nested mappings are joined by dots."""
    if not isinstance(loaded, Mapping) or not loaded:
        raise _BrokenError(f"a {type(loaded).__name__} instead of named tensors")
    state: dict[str, Tensor] = {}
    _gather(loaded, "", state)
    if not state:
        raise WeightsError(
            f"{path.name} is not in a layout that embcache knows", code="not-a-checkpoint", where=path,
            expected="named tensors, flat or in named mappings",
            found="entries that are not tensors: " + first_few([str(key) for key in loaded], 8), fix=_CONVERT,
        )  # fmt: skip
    return _check_plain(state, path)


def _check_plain(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    for key, value in state.items():
        # A tensor may be of another kind, without values, or repeat one value over any shape.
        plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
        if not plain or value.numel() * value.element_size() > size:
            raise _BrokenError(f"{key} is no plain tensor with its values in the file")
    return {key: value.detach() for key, value in state.items()}


def _gather(mapping: Mapping[object, object], prefix: str, state: dict[str, Tensor]) -> None:
    for key, value in mapping.items():
        if not isinstance(key, str):
            continue  # an optimizer's
        if isinstance(value, Tensor):
            if prefix + key in state:
                raise _BrokenError(f"{prefix + key} is in it twice, nested and with dots in its name")
            state[prefix + key] = value
        elif isinstance(value, Mapping) and prefix.count(".") < _DEEPEST:
            _gather(value, f"{prefix}{key}.", state)


@dataclass(frozen=True)
class Network:
    """The tensors of one network of a checkpoint, under its own names."""

    state: dict[str, Tensor]
    prefix: str  # stood before each name in the file
    passed: tuple[str, ...] = ()  # prefixes of other complete networks

    def describe(self, path: Path) -> str:
        """What was chosen of a file; empty where there was nothing to choose."""
        others = f", not those under {' or '.join(map(repr, self.passed))}" if self.passed else ""
        return f"the weights are those under {self.prefix!r} of {path.name}{others}" if self.prefix else ""


def find_network(
    state: Mapping[str, Tensor], wanted: Collection[str], *, heads: tuple[str, ...] = HEADS, where: object = None
) -> Network:
    """Find a network's tensors in a checkpoint: under the one prefix under which every wanted name is.

    Of several such prefixes the one that :data:`PREFERRED` says. Where there is none, for the file may spell the
    network's names otherwise, those under the wrappers (:data:`WRAPPERS`) that hold most.
    """
    required = [name for name in wanted if not name.endswith(".num_batches_tracked")]
    ends = [key.removesuffix(required[0]) for key in state if key.endswith(required[0])] if required else []
    whole = [start for start in ends if start[-1:] in ("", ".") and all(start + name in state for name in required)]
    if whole:
        prefix = _prefer(whole, where)
        inner = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        kept = {key: value for key, value in inner.items() if key in wanted or not key.startswith(heads)}
        return Network(kept, prefix, tuple(other for other in whole if other != prefix))
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        prefix = _wrappers(key)
        groups.setdefault(prefix, {})[key.removeprefix(prefix)] = value
    most = max(map(len, groups.values()), default=0)
    prefix = _prefer([prefix for prefix, inner in groups.items() if len(inner) == most], where)
    return Network(groups[prefix], prefix)


def _wrappers(key: str) -> str:
    parts = key.split(".")
    count = next((place for place, part in enumerate(parts[:-1]) if part not in WRAPPERS), len(parts) - 1)
    return "".join(f"{part}." for part in parts[:count])


def _prefer(prefixes: list[str], where: object) -> str:
    best = [one for one in prefixes if not any(_beats(other, one) for other in prefixes)]
    if len(best) == 1:
        return best[0]
    first = best[0] if best else ""
    raise WeightsError(
        "the checkpoint holds several networks that fit", code="several-networks", where=where,
        expected="one network", found=" and ".join(f"tensors under {prefix!r}" if prefix else "tensors under no prefix"
        for prefix in best),
        fix="keep one in a file of its own, and pass that with --weights: "
        f"safetensors.torch.save_file({{NAME without {first!r}: TENSOR, …}}, 'one.safetensors')",
    )  # fmt: skip


def _beats(one: str, other: str) -> bool:
    mine, theirs = ([part for part in prefix.split(".") if part not in _NEUTRAL] for prefix in (one, other))
    differing = [pair for pair in zip(mine, theirs, strict=False) if pair[0] != pair[1]]
    return len(mine) == len(theirs) and len(differing) == 1 and differing[0] in PREFERRED


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], *, where: object = None) -> None:
    """Fill every parameter and buffer of ``module`` from ``state``, and nothing else.

    The one exception is ``num_batches_tracked``, which older checkpoints lack and no frozen network reads.
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
        parts = (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
        raise WeightsError(
            "the checkpoint does not fit the network", code="checkpoint-mismatch",
            expected=f"{len(wanted)} tensors: {first_few(list(wanted), 3)}",
            found="; ".join(f"{len(keys)} {what}: {first_few(keys, 8)}" for what, keys in parts if keys), where=where,
            fix="pass the checkpoint of this backbone with --weights NAME=FILE; see `embcache backbones`",
        )  # fmt: skip
    spoiled = [key for key in wanted if key in state and not bool(torch.isfinite(state[key]).all())]
    if spoiled:
        raise WeightsError(
            "the checkpoint holds values that are not finite", code="checkpoint-not-finite",
            found=first_few(spoiled, 8), where=where, fix="fetch the checkpoint again",
        )  # fmt: skip
    module.load_state_dict(dict(state), strict=False)


def hash_state(module: nn.Module) -> str:
    """Sha256 of a network's tensors: names in order, dtypes, shapes and bytes; the same on every device."""
    return hash_tensors(module.state_dict())


def hash_tensors(state: Mapping[str, Tensor]) -> str:
    """The same, of tensors by their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {data.dtype} {tuple(data.shape)}\n".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# Hostile pickles. torch.load(weights_only=True) runs no code, but it believes numbers: bytearray(10**10), a tuple of
# tuples of tuples whose hash takes for ever, a hundred million empty dictionaries. Small files that would keep it busy
# or fill memory are refused before torch reads them.

MOST_OPERATIONS = 500_000  # files of whole training states have some ten thousand

_MOST_PARTS = 10_000  # of a tuple, those of the tuples in it included as often as they stand there
_DEEPEST_TUPLE = 64
_MARK = object()

# Callables that torch lets a pickle call, as checkpoints of networks need them. Types of storages and of numbers
# (`torch.FloatStorage`, `torch.float32`) are allowed too, and what embcache itself replaces by inert objects.
CALLS = frozenset(
    {
        "collections.OrderedDict", "collections.Counter", "torch.Size", "torch.device", "_codecs.encode",
        "torch.nn.parameter.Parameter", "torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state",
        "torch.serialization._get_layout", "__builtin__.set", "builtins.set",
    }
)  # fmt: skip


@dataclass(frozen=True)
class _Slot:
    """What is known of a value on the unpickler's stack: its size as a tuple, and the text or name that it is."""

    parts: int = 1
    depth: int = 0
    text: str | None = None
    items: tuple[Any, ...] = ()


def _check_pickle(file: IO[bytes]) -> None:
    """Go through one pickle without making anything of it, and leave the file behind its end."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for count, (code, argument, _) in enumerate(pickletools.genops(file)):
            if count > MOST_OPERATIONS:
                raise _BrokenError(f"a pickle of more than {MOST_OPERATIONS:,} operations")
            _step(code, argument, stack, memo)
    except (_BrokenError, _UnsafeError):
        raise
    except Exception as error:  # pickletools raises whatever comes
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise _BrokenError(f"a damaged or foreign PyTorch file: {reason}") from error


def _step(code: Any, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    name = code.name
    if name in ("BINPUT", "LONG_BINPUT", "PUT"):
        memo[argument] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET", "GET"):
        stack.append(memo[argument])
    elif name == "MARK":
        stack.append(_MARK)
    elif name == "GLOBAL":
        full = argument.replace(" ", ".", 1)
        kind = full.removeprefix("torch.")
        plain = full.startswith("torch.") and (kind.endswith("Storage") or (kind.isalnum() and kind.islower()))
        if full not in CALLS and full not in _STAND_INS and not plain:
            raise _UnsafeError(full)
        stack.append(_Slot(text=full))
    elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
        items = _to_mark(stack) if name == "TUPLE" else _take(stack, int(name[-1]))
        stack.append(_tuple(items))
    elif name in ("REDUCE", "NEWOBJ"):
        arguments, called = stack.pop(), stack.pop()
        if called.text == "_codecs.encode" and (len(arguments.items) != 2 or arguments.items[1].text != "latin1"):
            raise _BrokenError("an encoding that no checkpoint uses")  # some take for ever
        stack.append(_Slot(arguments.parts, arguments.depth))
    else:
        # A list or dictionary stays below what is put into it; what else there is has no size that matters.
        before = len(code.stack_before)
        if code.stack_before and any(kind.name == "mark" for kind in code.stack_before):
            _to_mark(stack)
            before = [kind.name for kind in code.stack_before].index("mark")
        taken = _take(stack, before)
        for k, kind in enumerate(code.stack_after):
            text = argument if isinstance(argument, str) and kind.name == "str" else None
            stack.append(taken[k] if code.stack_before and k < len(taken) else _Slot(text=text))


def _tuple(items: list[Any]) -> _Slot:
    parts = 1 + sum(item.parts for item in items)
    depth = 1 + max((item.depth for item in items), default=0)
    if parts > _MOST_PARTS or depth > _DEEPEST_TUPLE:
        raise _BrokenError("tuples within tuples without end")
    return _Slot(parts, depth, None, tuple(items) if len(items) <= 2 else ())


def _take(stack: list[Any], number: int) -> list[Any]:
    if number > len(stack):
        raise ValueError("an empty stack")
    taken = stack[len(stack) - number :]
    del stack[len(stack) - number :]
    if _MARK in taken:
        raise ValueError("a mark where a value should be")
    return taken


def _to_mark(stack: list[Any]) -> list[Any]:
    items: list[Any] = []
    while (item := stack.pop()) is not _MARK:
        items.append(item)
    return items[::-1]
