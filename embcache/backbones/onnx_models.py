"""Networks in ONNX files as backbones: ``onnx:FILE``, and ``onnx:FILE#OUTPUT`` where a file has several outputs.

ONNX Runtime executes them, in float32 and as they are: they are never trained. Libraries of custom operators are never
loaded, and tensors in other files only from the folder of the file. The preprocessing is that of the file's metadata
(`KEY`) or of a JSON file beside it; without one ``--transform`` says it. A recipe holds the digest of the file and of
the files that it refers to.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from embcache.backbones.pooling import try_size, vector_length
from embcache.backbones.transforms import MOST_SIDE, Transform, statement
from embcache.backbones.weights import Files, find_model, need, refusing
from embcache.errors import UsageError, WeightsError, first_few
from embcache.log import log
from embcache.paths import weights_dir

if TYPE_CHECKING:
    from embcache.backbones.catalog import Backbone

KEY = "embcache.transform"
"""Of a file's ``metadata_props``: its preprocessing as JSON with resize, crop, interpolation, mean and std."""


class OnnxNetwork(nn.Module):
    """A graph that ONNX Runtime executes: normalized images, float32 (B, 3, H, W), to features, float32 (B, D)."""

    def __init__(self, path: Path, source: str, target: str, batch: int | None) -> None:
        super().__init__()
        self.path = path
        self.source, self.target = source, target  # names of input and output
        self.batch = batch  # that the file is for; None for any
        self.sessions: dict[tuple[str, int], Any] = {}

    def forward(self, images: Tensor) -> Tensor:
        """Features of images, on their device; in batches of the file's size, the last one padded with zeros."""
        session, pixels = self.session(images.device), images.contiguous().cpu().numpy()
        size, parts = self.batch or len(pixels), []
        for part in (pixels[start : start + size] for start in range(0, len(pixels), size)):
            padded = np.pad(part, [(0, size - len(part)), (0, 0), (0, 0), (0, 0)]) if len(part) < size else part
            try:
                (made,) = session.run([self.target], {self.source: padded})
            except Exception as error:  # ONNX Runtime has classes of its own
                raise RuntimeError(str(error).partition("\n")[0]) from error
            parts.append(made[: len(part)] if made.shape[:1] == (size,) else made)
        return torch.from_numpy(np.concatenate(parts)).to(images.device)

    def session(self, device: torch.device) -> Any:
        """The session for a device and torch's present number of threads."""
        key = (str(device), torch.get_num_threads())
        if key not in self.sessions:
            self.sessions[key] = open_session(self.path, device, key[1])
        return self.sessions[key]


def open_session(path: Path, device: torch.device, threads: int) -> Any:
    """A session of ONNX Runtime on a device, or on the CPU if it has no code for that one; repeatable bit for bit."""
    runtime = need("onnxruntime", "onnx", "onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.use_deterministic_compute = True
    options.log_severity_level = 4  # what is an error is raised
    options.add_session_config_entry("session.load_model_format", "ONNX")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the same cores decode images
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda" and "CUDAExecutionProvider" in runtime.get_available_providers():
        own = {"device_id": device.index or 0, "use_tf32": 0, "cudnn_conv_algo_search": "DEFAULT"}
        providers.insert(0, ("CUDAExecutionProvider", own))
    elif device.type != "cpu":
        log.warning(f"{path.name} is computed on the CPU: onnxruntime has no code for {device.type} here")
    return runtime.InferenceSession(str(path), options, providers=providers)


@dataclass(frozen=True)
class _Graph:
    network: OnnxNetwork
    digest: str
    outputs: tuple[str, ...]  # their names
    parameters: int
    size: tuple[int, int] | None  # height and width of images, if the file takes no others
    transform: Transform | None


def describe(name: str, folder: Path | None = None) -> Mapping[str, Any]:
    """The fields of the `Backbone` of a network in an ONNX file; ``folder`` is that file, if the user named it."""
    file, output = _split(name.removeprefix("onnx:"))
    path = find_model(file) if folder is None else folder.expanduser()
    if path is None or not path.is_file():
        raise WeightsError(
            f"the model {name} is not here", code="weights-not-found", expected="an ONNX file, as onnx:FILE",
            found="a folder" if path is not None else "no such file", where=path or weights_dir() / file,
            fix=f"--weights {name}=FILE",
        )  # fmt: skip
    graph = _read(name, path, output)
    size = graph.size or (graph.transform.size if graph.transform else (224, 224))
    with _refused(name):
        others = [f"--backbone onnx:{path}#{each}" for each in graph.outputs if each != graph.network.target]
        pool = "pool the output to one vector per image in the network, and export it again"
        dim = vector_length(name, graph.network, size, ", or ".join([*others, pool]))
    output = output if len(graph.outputs) > 1 else ""  # the only one is the same store with its name and without
    named = Path(file).name if Path(file).expanduser().is_file() else file
    return {
        "name": f"onnx:{named}" + (f"#{output}" if output else ""),
        "network": f"onnx {graph.digest[:16]}",
        "dim": dim,
        "parameters": graph.parameters,
        "source": path.name,
        "license": "not stated",
        "pooling": f"output {output}" if output else "own",
        "input_size": size,
        "transform": graph.transform,
        "origin": f"{path}#{output}" if output else str(path),
        "fixed": True,
        **(graph.transform.shown() if graph.transform else {}),
    }


def load(spec: Backbone, files: Files, size: tuple[int, int]) -> tuple[nn.Module, str, str, str]:
    """The network, the digest of its files, and the name of the file."""
    file, output = _split(spec.origin)
    path = files.given or Path(file).expanduser()
    graph = _read(spec.name, path, output)
    if graph.size not in (None, size):
        height, width = graph.size or size
        raise UsageError(
            f"{spec.name} cannot take images of {size[1]}×{size[0]}", code="image-size", found=f"{size[1]}×{size[0]}",
            expected=f"{width}×{height}, the only size that the file takes", where=path,
            fix=statement(spec, (height, width)),
        )  # fmt: skip
    try_size(spec, graph.network, size)
    return graph.network, graph.digest, path.name, ""


def _split(text: str) -> tuple[str, str]:
    """File and output, if one is named."""
    file, mark, output = text.rpartition("#")
    found = find_model(text)
    return (file, output) if mark and (found is None or found.name != Path(text).name) else (text, "")


def _read(name: str, path: Path, output: str) -> _Graph:
    """What a file says, once it is seen that it can be executed."""
    with _refused(name):
        data = path.read_bytes()
        model = need("onnx", "onnx", "onnx").load_model_from_string(data)
    digest = hashlib.sha256(data)
    for location, file in sorted(_others(name, path, model).items()):
        with file.open("rb") as opened:
            digest.update(f"\n{location} {hashlib.file_digest(opened, 'sha256').hexdigest()}".encode())
    with _refused(name):
        session = open_session(path, torch.device("cpu"), threads := torch.get_num_threads())
    inputs, outputs = session.get_inputs(), session.get_outputs()
    shape = inputs[0].shape if len(inputs) == 1 else []
    floats = all(each.type == "tensor(float)" for each in inputs)
    if not floats or len(shape) != 4 or (isinstance(shape[1], int) and shape[1] != 3):
        raise UsageError(
            f"{name} does not take images as embcache makes them", code="onnx-input", where=path,
            expected="one input, tensor(float) of shape (B, 3, H, W)",
            found=first_few([f"{each.name} {each.type} {each.shape}" for each in inputs]),
            fix="export the network again with such an input",
        )  # fmt: skip
    names = [each.name for each in outputs]
    if output not in (names if output or len(names) > 1 else [""]):
        raise UsageError(
            f"{name} has several outputs" if not output else f"{name} has no such output", code="onnx-output",
            expected="one of its outputs", found=f"{output + ', not ' if output else ''}{first_few(names, 10)}",
            where=path, fix=f"--backbone onnx:{path.name}#{names[-1]}",
        )  # fmt: skip
    batch, height, width = (side if isinstance(side, int) else None for side in (shape[0], *shape[2:]))
    network = OnnxNetwork(path, inputs[0].name, output or names[0], batch)
    network.sessions["cpu", threads] = session
    return _Graph(
        network=network,
        digest=digest.hexdigest(),
        outputs=tuple(names),
        parameters=sum(math.prod(tensor.dims) for tensor in model.graph.initializer),
        size=(height, width) if height and width else None,
        transform=_transform(name, path, session.get_modelmeta().custom_metadata_map.get(KEY)),
    )


def _others(name: str, path: Path, model: Any) -> dict[str, Path]:
    """The files that hold tensors of a model, by their names in it; all have to be in the folder of its file."""
    found = {}
    for tensor in _tensors(model):
        for location in [entry.value for entry in tensor.external_data if entry.key == "location"]:
            file = (path.parent / location).resolve()
            # Both, for a hub's cache links every file to one that is elsewhere.
            inside = any(file.is_relative_to(folder) for folder in (path.parent.resolve(), path.resolve().parent))
            if Path(location).is_absolute() or ".." in Path(location).parts or not inside or not file.is_file():
                raise WeightsError(
                    f"{name} refers to a file that is not in its folder", code="onnx-external", where=path,
                    expected=f"a file in {path.parent}", found=location,
                    fix="put the files that were exported together into one folder",
                )  # fmt: skip
            found[location] = file
    return found


def _tensors(message: Any) -> Iterator[Any]:
    """Every tensor in a message, in graphs, nodes and functions at any depth."""
    tensor, single = need("onnx", "onnx", "onnx").TensorProto, need("google.protobuf.message", "onnx", "onnx").Message
    for field, value in message.ListFields():
        for each in () if field.message_type is None else (value,) if isinstance(value, single) else value:
            yield from (each,) if isinstance(each, tensor) else _tensors(each)


def _transform(name: str, path: Path, embedded: str | None) -> Transform | None:
    """The preprocessing in the JSON file beside a model, else that in its metadata, else none."""
    beside = path.with_name(path.name + ".json")
    where = beside if beside.is_file() else path
    if where == path and embedded is None:
        return None
    text = ""
    try:
        text = beside.read_text("utf-8") if where == beside else str(embedded)
        given = {"crop": None, **json.loads(text)}
        transform = Transform.from_dict({"size": given["crop"] or given["resize"], **given, "kind": "model"})
        sides = np.array([*transform.size, np.max(transform.resize or 1)])
        if not (sides >= 1).all() or not (sides <= MOST_SIDE).all() or min(transform.std) <= 0:
            raise ValueError(f"sides of 1 to {MOST_SIDE} and a positive std")
        transform.geometry(np.zeros((96, 128, 3), np.uint8))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(
            f"the preprocessing of {name} is not one that embcache can make", code="unknown-preprocessing",
            expected='{"resize": 256, "crop": [224, 224], "interpolation": "bicubic", "mean": [3 numbers], "std": …}',
            found=f"{error}: {text[:200]}", where=where, fix=f"write {beside}",
        ) from error  # fmt: skip
    return transform


def _refused(name: str) -> AbstractContextManager[None]:
    """What ONNX Runtime refuses as one message."""
    return refusing("onnxruntime", name, "onnx-refuses", "an ONNX model of operators that it knows")
