"""How the tokens of a vision transformer become features: which tokens, of which layers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from embcache.errors import UsageError, check_choice

if TYPE_CHECKING:
    from embcache.backbones.catalog import Backbone

TOKENS = ("cls", "mean", "cls+mean", "pooler", "projected", "patches")


@dataclass(frozen=True)
class Pooling:
    """Tokens of layers, as a recipe writes it: ``cls``, ``cls+mean@8,9,10,11``."""

    # Class token, mean of the patches, both, what the model's own pooler makes, its projection to the space that images
    # share with texts, or all patches.
    tokens: str
    layers: tuple[int, ...] = ()  # numbers of blocks from 0, ascending; none for the output of the last

    def __str__(self) -> str:
        return self.tokens + ("@" + ",".join(map(str, self.layers)) if self.layers else "")

    @classmethod
    def parse(cls, text: str) -> Pooling:
        """The inverse of `str`."""
        tokens, _, layers = text.partition("@")
        return cls(tokens, tuple(int(layer) for layer in layers.split(",") if layer))

    def width(self, dim: int) -> int:
        """Length of a feature vector, or of a patch's, of tokens of length ``dim``."""
        return dim * (2 if self.tokens == "cls+mean" else 1) * max(1, len(self.layers))


def choose_pooling(
    spec: Backbone, tokens: str, layers: str | None, offered: Sequence[str], depth: int, width: int
) -> Mapping[str, Any]:
    """The fields of a backbone that change with the tokens and layers that a user names.

    ``layers`` is ``last4`` or ``2,5,8,11``; the model has ``depth`` blocks of tokens of a ``width``, and those
    ``offered``.
    """
    check_choice("--tokens", tokens, TOKENS)
    numbers: tuple[int, ...] = ()
    if layers is not None:
        last = re.fullmatch(r"last([1-9][0-9]?)", layers)
        if last:
            numbers = tuple(range(depth - int(last[1]), depth))
        elif re.fullmatch(r"[0-9]{1,3}(,[0-9]{1,3})*", layers):
            numbers = tuple(sorted({int(number) for number in layers.split(",")}))
        if not numbers or numbers[0] < 0 or numbers[-1] >= depth:
            raise UsageError(
                f"{spec.name} does not have these layers", code="unknown-layers", found=layers, where="--layers",
                expected=f"last1 to last{depth}, or numbers of blocks from 0 to {depth - 1}" if depth else "no layers",
                fix=f"--layers last{min(4, depth)}" if depth else "leave out --layers",
            )  # fmt: skip
        if tokens in ("pooler", "projected"):
            raise UsageError(
                "the pooler takes the last layer only", code="pooler-layers",
                found=f"--tokens {tokens} --layers {layers}", fix="--tokens cls, mean or cls+mean",
            )  # fmt: skip
    if tokens not in offered:
        raise UsageError(
            f"{spec.name} has no such token", code="no-such-token", found=f"--tokens {tokens}",
            expected=", ".join(offered), fix=f"--tokens {offered[0]}",
        )  # fmt: skip
    pooling = Pooling(tokens, numbers if numbers != (depth - 1,) else ())
    patches = math.prod(side // spec.patch for side in spec.input_size) if tokens == "patches" else 0
    return {"pooling": str(pooling), "dim": pooling.width(width), "patches": patches}


def features_of(module: nn.Module, size: tuple[int, int], images: int = 1) -> Any:
    """What a network makes of black images of a height and width, where its parameters are."""
    device = next((parameter.device for parameter in module.parameters()), None)
    with torch.inference_mode():
        return module.eval()(torch.zeros(images, 3, *size, device=device))


def vector_length(name: str, module: nn.Module, size: tuple[int, int], fix: str, code: str = "no-vector") -> int:
    """Length of the vector that a network makes of each of two images of its own size."""
    shape = tuple(features_of(module, size, 2).shape)
    if len(shape) != 2 or shape[0] != 2:
        raise UsageError(
            f"{name} does not pool its features into one vector per image", code=code, found=f"{shape} of two images",
            expected="an output of shape (B, D)", fix=fix,
        )  # fmt: skip
    return int(shape[1])


def try_size(
    spec: Backbone, module: nn.Module, size: tuple[int, int], fit: Callable[[], object] = lambda: None
) -> None:
    """Refuse images of a height and width that a network does not take, by trying one after ``fit``."""
    try:
        if any(side % spec.patch for side in size):
            raise ValueError(f"a patch of {spec.patch} pixels, which does not divide the sides")
        fit()
        features_of(module, size)
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        raise UsageError(
            f"{spec.name} cannot take images of {size[1]}×{size[0]}", code="image-size",
            found=str(error).partition("\n")[0], expected=f"{spec.input_size[1]}×{spec.input_size[0]}",
            fix="embcache extract --transform model …",
        ) from error  # fmt: skip


def pool_tokens(
    states: Sequence[Tensor], tokens: str, prefix: int, norm: Callable[[Tensor], Tensor] = lambda pooled: pooled
) -> Tensor:
    """Features (B, D), or (B, T, D) of patches, of the layers' tokens, (B, ``prefix`` + T, d) each.

    ``norm`` is that of a model which norms what is pooled.
    """
    pooled = []
    for state in states:
        parts = {"cls": state[:, 0], "mean": state[:, prefix:].mean(1)} if tokens != "patches" else {}
        pooled += [norm(parts[part]) for part in tokens.split("+")] if parts else [norm(state[:, prefix:])]
    return torch.cat(pooled, dim=-1)
