"""The runtime ``compile``: torch.compile with weights frozen into the program."""

from __future__ import annotations

import torch
import torch._inductor.config as inductor
from torch import Tensor, nn

from embcache.backbones.runtimes import Program, Settings


def compile_network(network: nn.Module, example: Tensor, settings: Settings) -> Program:
    """A program for batches of the shape of ``example``; it is compiled here, not at the first batch."""
    compiled = torch.compile(network, dynamic=False)

    def run(images: Tensor) -> Tensor:
        # Inference mode is entered by the caller; freezing needs a graph without gradients.
        with torch.no_grad(), inductor.patch(freezing=True):
            output: Tensor = compiled(images)
        return output.float()

    run(example)
    return run
