"""bfloat16: weights cast once, and kept from the layers that lose too much by it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def to_bfloat16(module: nn.Module) -> nn.Module:
    """A copy of a network that computes in bfloat16; its input and output stay float32.

    Most networks run in bfloat16 from end to end. Those with depthwise convolutions do not: their narrow layers cancel,
    and what eight bits lose there is not averaged away (docs/log.md: EfficientNet-Lite1 keeps a cosine of 0.985 to its
    features in float32, against 0.9998). In these only linear layers and the convolutions that widen run in bfloat16.
    """
    module = copy.deepcopy(module)
    convs = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    if not any(conv.groups == conv.in_channels > 1 for conv in convs):
        _within(module.to(torch.bfloat16))
        return module
    for layer in module.modules():
        widens = isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.out_channels > layer.in_channels > 3
        if widens or type(layer) is nn.Linear:
            _within(layer.to(torch.bfloat16))
    return module


def _within(layer: nn.Module) -> None:
    layer.register_forward_pre_hook(_narrow)
    layer.register_forward_hook(_widen)


def _narrow(layer: nn.Module, inputs: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(each.to(torch.bfloat16) if isinstance(each, Tensor) else each for each in inputs)


def _widen(layer: nn.Module, inputs: Sequence[Any], output: Tensor) -> Tensor:
    return output.float()
