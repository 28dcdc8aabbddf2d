"""What attention costs in a training step of DVME: by nodes, exactly, with timm's layer, and without any.

One step is what `embcache.probe.stack` does for a batch: logits and their gradients, then Adam over all parameters
(three backbones of 1280 features, 1536 tokens, 2.8 million parameters a head). The ways take turns, so that all
see the same machine. Ranges of scores are set by the first queries and keys; within a setting all ways start equal.

    python benchmarks/attention.py [--repeats 7] [--heads 1] [--threads 2]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention

from embcache.probe.adam import adam_step
from embcache.probe.attention import attend
from embcache.probe.attention_nodes import place_nodes
from embcache.probe.fusion import Fusion, Params, project
from embcache.probe.heads import make_head
from embcache.probe.stack import stream_generator

DIMS = {"a": 1280, "b": 1280, "c": 1280}
BATCH = 64
CLASSES = 2


@dataclass(frozen=True)
class TimmDVME(Fusion):
    """The same head around timm's own layer, its parameters held by the layer: one head at a time."""

    name: ClassVar[str] = "dvme-timm"
    summary: ClassVar[str] = "as users of timm would write it"

    def init_mixing(self, generator: torch.Generator) -> Params:
        return make_head("dvme").init_mixing(generator)  # type: ignore[attr-defined,no-any-return]

    def mix(self, params: Params, meta: torch.Tensor) -> torch.Tensor:
        given = {name.removeprefix("attn."): p[0] for name, p in params.items() if name.startswith("attn.")}
        return torch.func.functional_call(LAYER, given, (meta[0, :, :, None],))[None, :, :, 0]


LAYER = Attention(1, num_heads=1, qkv_bias=True)
WAYS: dict[str, Callable[[], Any]] = {
    "without attention": lambda: make_head("dvme-identity"),
    "by nodes (fast)": lambda: make_head("dvme", attention="fast"),
    "auto": lambda: make_head("dvme", attention="auto"),
    "exact": lambda: make_head("dvme", attention="exact"),
    "timm's Attention": TimmDVME,
}


def fresh(head: Any, heads: int) -> Params:
    """Parameters of so many heads, each from its own stream."""
    each = [head.init(stream_generator(str(n), "init"), DIMS, CLASSES) for n in range(heads)]
    return {name: torch.stack([p[name] for p in each]) for name in each[0]}


def stepper(head: Any, heads: int, params: Params) -> Callable[[], None]:
    """One whole training step of a stack, on features that stay."""
    generator = torch.Generator().manual_seed(0)
    x = {b: torch.rand(heads, BATCH, d, generator=generator) for b, d in DIMS.items()}
    y = torch.randint(CLASSES, (heads, BATCH), generator=generator)
    mask = {"hidden": (torch.rand(heads, BATCH, 512, generator=generator) > 0.2) / 0.8}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in params.items()}

    def step() -> None:
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        loss = F.cross_entropy(head.apply(leaves, x, mask).flatten(0, 1), y.flatten(), reduction="sum") / BATCH
        for (name, p), gradient in zip(leaves.items(), torch.autograd.grad(loss, list(leaves.values())), strict=True):
            adam_step(p.detach(), gradient, *moments[name], [1] * heads, [1e-6] * heads)

    return step


def scale_scores(params: Params, wanted: float) -> None:
    """Make queries so large that range(q) · range(k) is about ``wanted``."""
    generator = torch.Generator().manual_seed(0)
    meta = project(
        params,
        {
            b: torch.rand(len(p), 8, d, generator=generator)
            for (b, d), p in zip(DIMS.items(), [params["classifier.bias"]] * 3, strict=True)
        },
    )
    spread = (meta.amax(-1) - meta.amin(-1)).mean(1)  # (heads,)
    params["attn.qkv.weight"][:, 0, 0] = wanted / spread**2
    params["attn.qkv.weight"][:, 1, 0] = 1


def medians(ways: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each way; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(repeats + 1):
        for name, work in ways.items():
            start = time.perf_counter()
            work()
            if number:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    rows = []
    for scores in (0.5, 5.0, 30.0, 300.0, 3000.0):
        steps = {}
        for name, make in WAYS.items():
            if name.startswith("timm") and asked.heads > 1:
                continue
            head = make()
            params = fresh(head, asked.heads)
            if "attn.qkv.weight" in params:
                scale_scores(params, scores)
            steps[name] = stepper(head, asked.heads, params)
        found = medians(steps, asked.repeats)
        print(scores, {n: round(1e3 * t, 1) for n, t in found.items()})


if __name__ == "__main__":
    main()
