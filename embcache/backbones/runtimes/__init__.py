"""What executes a frozen network: torch as it is (``eager``), or what a compiler makes of the network."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from embcache.errors import UsageError, check_choice

Program = Callable[[Tensor], Tensor]
"""Normalized images, float32 (B, 3, H, W) of one fixed shape on the runtime's device, to features (B, D)."""


@dataclass(frozen=True)
class Settings:
    """What a network is compiled for."""

    precision: str  # fp32 or bf16
    threads: int
    kept: Path | None = None  # a file, or its beginning, for what may be kept of the conversion; none keeps nothing


class Compiler(Protocol):
    """What the module of a runtime offers."""

    def compile_network(self, network: nn.Module, example: Tensor, settings: Settings) -> Program:
        """A program for batches of the shape of ``example``."""


@dataclass(frozen=True)
class Runtime:
    """A row of `RUNTIMES`."""

    module: str  # a `Compiler`; empty for torch as it is
    package: str  # that it needs
    extra: str  # of embcache that installs it
    devices: tuple[str, ...]
    precisions: tuple[str, ...]


RUNTIMES = {
    "eager": Runtime("", "torch", "", (), ()),  # any
    "compile": Runtime("embcache.backbones.runtimes.compiled", "torch", "", ("cpu", "cuda"), ("fp32", "tf32", "bf16")),
    "openvino": Runtime("embcache.backbones.runtimes.openvino_cpu", "openvino", "cpu", ("cpu",), ("fp32", "bf16")),
    "onnxruntime": Runtime("embcache.backbones.runtimes.onnx_cpu", "onnxruntime", "onnx", ("cpu",), ("fp32",)),
}
# What `auto` takes where it is installed, by the type of the device, and from how many images a conversion pays: some
# 5 s of it, against some 10 ms that each image saves (docs/benchmarks.md).
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
        compiler = cast(Compiler, importlib.import_module(RUNTIMES[self.name].module))
        try:
            settings = Settings(self.precision, torch.get_num_threads(), self.kept)
            return compiler.compile_network(self.network, images, settings)
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
