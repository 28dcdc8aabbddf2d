"""What executes a frozen network: torch as it is (``eager``), or what a compiler makes of the network."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embcache.backbones.weights import need
from embcache.cores import cpu_flags
from embcache.errors import UsageError, check_choice
from embcache.io import replacing

Program = Callable[[Tensor], Tensor]
"""Normalized images, float32 (B, 3, H, W) of one fixed shape on the runtime's device, to features (B, D)."""
Compiler = Callable[[nn.Module, Tensor, str, Path | None], Program]
"""A network, a batch of the shape of those to come, precision and `Compiled.kept`, to a program with torch's number of
threads."""


@contextlib.contextmanager
def _exporting() -> Iterator[None]:
    """Tensors of inference mode cannot be traced; tracing warns that sides of images become constants, as they are."""
    with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


def _compile(network: nn.Module, example: Tensor, precision: str, kept: Path | None) -> Program:
    """Torch's own compiler, with weights frozen into the program; it works here, not at the first batch."""
    import torch._inductor.config as inductor

    compiled = torch.compile(network, dynamic=False)

    def run(images: Tensor) -> Tensor:
        # Inference mode is entered by the caller; freezing needs a graph without gradients.
        with torch.no_grad(), inductor.patch(freezing=True):
            output: Tensor = compiled(images)
        return output.float()

    run(example)
    return run


def _openvino(network: nn.Module, example: Tensor, precision: str, kept: Path | None) -> Program:
    """A conversion for Intel's and ARM's processors, of one stream with stated precision and threads."""
    # Without this package, OpenVINO neither sends usage data nor asks for consent to do so.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    ov: Any = import_module("openvino")
    core, shape = ov.Core(), list(example.shape)
    if kept is not None:
        kept = Path(f"{kept}-{'x'.join(map(str, shape))}-openvino-{ov.__version__.partition('-')[0]}")
    if kept is not None and (kept / "model.xml").is_file():
        model = core.read_model(kept / "model.xml")
    else:
        with _exporting():
            model = ov.convert_model(
                network, example_input=example.clone().contiguous(), input=[ov.PartialShape(shape)]
            )
        if kept is not None:
            with replacing(kept) as staged:
                ov.save_model(model, staged / "model.xml", compress_to_fp16=False)
    compiled = core.compile_model(model, "CPU", {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32"}.get(precision, precision), "EXECUTION_MODE_HINT": "ACCURACY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False,
    })  # fmt: skip
    request = compiled.create_infer_request()

    def run(images: Tensor) -> Tensor:
        output = request.infer([images.contiguous().numpy()], share_inputs=True)[compiled.output(0)]
        return torch.from_numpy(np.array(output, dtype=np.float32))

    return run


def _onnxruntime(network: nn.Module, example: Tensor, precision: str, kept: Path | None) -> Program:
    """An export to ONNX, executed as files of ONNX are; nothing of it is kept."""
    from embcache.backbones.onnx_models import OnnxNetwork

    for package in ("onnx", "onnxscript", "onnxruntime"):
        need(package, package, "onnx")
    with tempfile.TemporaryDirectory() as folder, _exporting(), contextlib.redirect_stdout(io.StringIO()):
        path = Path(folder) / "network.onnx"
        torch.onnx.export(
            network, (example.clone().contiguous(),), path, dynamo=True, external_data=False, verbose=False,
            input_names=["images"], output_names=["features"],
        )  # fmt: skip
        compiled = OnnxNetwork(path, "images", "features", len(example))
        compiled.session(example.device)  # reads the file
    return compiled


@dataclass(frozen=True)
class Runtime:
    """A row of `RUNTIMES`."""

    compiler: Compiler | None  # none for torch as it is
    package: str  # that it needs
    extra: str  # of embcache that installs it
    devices: tuple[str, ...]
    precisions: tuple[str, ...]


RUNTIMES = {
    "eager": Runtime(None, "torch", "", (), ()),  # any
    "compile": Runtime(_compile, "torch", "", ("cpu", "cuda"), ("fp32", "tf32", "bf16")),
    "openvino": Runtime(_openvino, "openvino", "cpu", ("cpu",), ("fp32", "bf16")),
    "onnxruntime": Runtime(_onnxruntime, "onnxruntime", "onnx", ("cpu",), ("fp32",)),
}
# What `auto` takes where it is installed, by the type of the device, and from how many images a conversion pays: some
# 5 s of it, against some 10 ms that each image saves (docs/log.md).
_AUTO = {"cpu": "openvino"}
_PAYS = 1000

GATE = 1e-5  # largest difference to eager in fp32, relative to the largest feature
GATE_COSINE = 0.9995  # least cosine to eager's fp32 in other precisions


def choose_runtime(requested: str, device: str, precision: str, images: int) -> str:
    """The runtime of a new store over this many images; ``device`` is a type of torch.

    Raises
    ------
    UsageError
        The runtime named is not installed, or does not fit the device or the precision.
    """
    check_choice("--runtime", requested, ("auto", *RUNTIMES))
    if requested != "auto":
        check_runtime(requested, device, precision)
        return requested
    found = _AUTO.get(device, "eager")
    # Outside fp32 features depend on the runtime, so it is named or torch's.
    return found if precision == "fp32" and images >= _PAYS and is_installed(found) else "eager"


def is_installed(runtime: str) -> bool:
    """Whether the package of a runtime is there; nothing is imported."""
    return importlib.util.find_spec(RUNTIMES[runtime].package) is not None


def check_runtime(name: str, device: str, precision: str) -> None:
    """Raise a UsageError unless a runtime is installed and fits."""
    runtime = RUNTIMES[name]
    if not is_installed(name):
        raise UsageError(
            f"the runtime {name} is not installed", code="runtime-missing", found=f"no package {runtime.package}",
            fix=(f"pip install 'embcache[{runtime.extra}]'", "--runtime eager"),
        )  # fmt: skip
    for what, found, expected in (("device", device, runtime.devices), ("precision", precision, runtime.precisions)):
        if expected and found not in expected:
            raise UsageError(
                f"the runtime {name} does not fit", code="runtime-unfit", expected=f"{what} {' or '.join(expected)}",
                found=found, fix="--runtime eager",
            )  # fmt: skip
    if name == "openvino" and precision == "bf16" and not {"avx512_bf16", "amx_bf16", "bf16"} & cpu_flags():
        # It computes in bfloat16 all the same, slower than in fp32; a signal then killed the process.
        raise UsageError(
            "this processor has no bfloat16", code="runtime-unfit", expected="avx512_bf16, amx_bf16 or bf16",
            found="none of them in /proc/cpuinfo", fix="--precision fp32, or --runtime eager",
        )  # fmt: skip


def runtime_version(name: str) -> dict[str, str]:
    """Package and version of a runtime that is not torch's, for provenance."""
    package = RUNTIMES[name].package
    return {} if package == "torch" else {package: version(package)}


class Compiled:
    """A network executed by a runtime with torch's number of threads; compiled once for each shape of batches."""

    def __init__(self, name: str, network: nn.Module, precision: str, kept: Path | None = None) -> None:
        self.name, self.network, self.precision, self.kept = name, network, precision, kept
        self._programs: dict[tuple[int, ...], Program] = {}

    def __call__(self, images: Tensor) -> Tensor:
        """Features of a batch."""
        key = (torch.get_num_threads(), *images.shape)
        if key not in self._programs:
            self._programs[key] = self._compile(images)
        return self._programs[key](images)

    def _compile(self, images: Tensor) -> Program:
        compiler = RUNTIMES[self.name].compiler
        assert compiler is not None
        try:
            return compiler(self.network, images, self.precision, self.kept)
        except Exception as error:  # whatever a compiler raises about a network that it does not know
            raise UsageError(
                f"{self.name} cannot compile this network", code="runtime-refuses",
                found=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300],
                fix="--runtime eager",
            ) from error  # fmt: skip


def departure(features: Tensor, eager: Tensor, precision: str) -> str:
    """In what features (B, D) of a runtime differ too much from those of eager fp32; empty if they do not."""
    ours, theirs = (each.detach().float().flatten(1).cpu().double() for each in (features, eager))
    if precision == "fp32":
        largest = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(float(np.finfo(np.float32).tiny)))
        return "" if largest <= GATE else f"a difference of {largest:.1e} of the largest feature; at most {GATE:.0e}"
    cosine = float(torch.nn.functional.cosine_similarity(ours, theirs).min())
    return "" if cosine >= GATE_COSINE else f"a cosine of {cosine:.5f} to fp32; at least {GATE_COSINE}"
