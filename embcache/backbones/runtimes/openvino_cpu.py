"""The runtime ``openvino``: networks converted for Intel's and ARM's processors."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embcache.backbones.runtimes import Program, Settings
from embcache.io import replacing

_PRECISIONS = {"fp32": "f32", "bf16": "bf16"}


def compile_network(network: nn.Module, example: Tensor, settings: Settings) -> Program:
    """A program of one stream with stated precision and threads, for batches of the shape of ``example``."""
    ov = _openvino()
    core, shape = ov.Core(), list(example.shape)
    kept = None
    if settings.kept is not None:
        name = f"{settings.kept.name}-{'x'.join(map(str, shape))}-openvino-{ov.__version__.partition('-')[0]}"
        kept = settings.kept.with_name(name)
    if kept is not None and (kept / "model.xml").is_file():
        model = core.read_model(kept / "model.xml")
    else:
        with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
            warnings.simplefilter("ignore")  # of tracing: sides of images become constants, as they are
            model = ov.convert_model(
                network, example_input=example.clone().contiguous(), input=[ov.PartialShape(shape)]
            )
        if kept is not None:
            with replacing(kept) as staged:
                ov.save_model(model, staged / "model.xml", compress_to_fp16=False)
    compiled = core.compile_model(model, "CPU", {
        "INFERENCE_PRECISION_HINT": _PRECISIONS[settings.precision], "EXECUTION_MODE_HINT": "ACCURACY",
        "INFERENCE_NUM_THREADS": settings.threads, "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False,
    })  # fmt: skip
    request = compiled.create_infer_request()

    def run(images: Tensor) -> Tensor:
        output = request.infer([images.contiguous().numpy()], share_inputs=True)[compiled.output(0)]
        return torch.from_numpy(np.array(output, dtype=np.float32))

    return run


def _openvino() -> Any:
    # Without this package, OpenVINO neither sends usage data nor asks for consent to do so.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return import_module("openvino")
