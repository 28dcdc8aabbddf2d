"""The runtime ``onnxruntime``: networks exported to ONNX, and executed as files of ONNX are."""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from embcache.backbones.libraries import need
from embcache.backbones.onnx_models import OnnxNetwork
from embcache.backbones.runtimes import Program, Settings


def compile_network(network: nn.Module, example: Tensor, settings: Settings) -> Program:
    """A program for batches of the shape of ``example``; nothing of the export is kept."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        need(package, package, "onnx")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "network.onnx"
        with contextlib.redirect_stdout(io.StringIO()), torch.inference_mode(False), torch.no_grad():
            torch.onnx.export(
                network, (example.clone().contiguous(),), path, dynamo=True, external_data=False, verbose=False,
                input_names=["images"], output_names=["features"],
            )  # fmt: skip
        compiled = OnnxNetwork(path, "images", "features", len(example))
        compiled.session(example.device)  # reads the file
    return compiled
