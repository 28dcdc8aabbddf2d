"""What attention costs a training step of DVME: by nodes, exactly, with timm's layer, and without any.

One step is what `embcache.probe.stack` does for a batch: logits and their gradients, then Adam over all parameters
(three backbones of 1280 features, 1536 tokens, 2.8 million parameters a head). The ways take turns, so that all see the
same machine. "Scores" is range(q) · range(k) of an image: heads trained on pretrained features have 0.05 to 30.

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

from embcache.cores import keep_freed_memory
from embcache.probe.heads import make_head
from embcache.probe.heads.scalar_attention import place_nodes
from embcache.probe.heads.trained import Fusion, project
from embcache.probe.layers import Params
from embcache.probe.stack import adam_step, stream_generator

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
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        parts = [(params[name], g, *moments[name]) for name, g in zip(leaves, gradients, strict=True)]
        adam_step(parts, [1] * heads, [1e-6] * heads)

    return step


def scale_scores(params: Params, wanted: float) -> None:
    """Make queries and keys such that range(q) · range(k) is about ``wanted``."""
    generator = torch.Generator().manual_seed(0)
    heads = len(params["classifier.bias"])
    meta = project(params, {b: torch.rand(heads, 8, d, generator=generator) for b, d in DIMS.items()})
    spread = (meta.amax(-1) - meta.amin(-1)).mean(1)  # (heads,)
    params["attn.qkv.weight"][:, 0, 0] = wanted / spread**2
    params["attn.qkv.weight"][:, 1, 0] = 1


def take_turns(ways: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, tuple[float, float]]:
    """Median seconds of each way, by the wall clock and of processors."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(repeats + 2):
        for name, work in ways.items():
            start = time.perf_counter(), time.process_time()
            work()
            if number >= 2:  # the first rounds warm up
                found[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return {
        name: (statistics.median(wall for wall, _ in times), statistics.median(cpu for _, cpu in times))
        for name, times in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--heads", type=int, default=1, help="trained as one stack; timm's layer takes one")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    keep_freed_memory()  # as training does
    print(f"{asked.heads} head(s), batch {BATCH}, {asked.threads} threads, medians of {asked.repeats}, ", end="")
    print(
        f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}"
    )
    print()
    print("| scores | nodes | attention | ms/step | × the step without | × faster than timm | ms of processors, × |")
    print("|---|---|---|---|---|---|---|")
    for scores in (0.5, 5.0, 30.0, 300.0, 3000.0):
        steps, nodes = {}, ""
        for name, make in WAYS.items():
            if name.startswith("timm") and asked.heads > 1:
                continue
            head = make()
            params = fresh(head, asked.heads)
            if "attn.qkv.weight" in params:
                scale_scores(params, scores)
                nodes = nodes_of(params)
            steps[name] = stepper(head, asked.heads, params)
        found = take_turns(steps, asked.repeats)
        bare, peer = found["without attention"], found.get("timm's Attention")
        for name, (wall, cpu) in found.items():
            against = f"{peer[0] / wall:.1f}" if peer else ""
            print(f"| {scores:g} | {nodes} | {name} | {1e3 * wall:.1f} | {wall / bare[0]:.2f} | {against} ", end="")
            print(f"| {1e3 * cpu:.1f}, {cpu / bare[1]:.2f} |")


def nodes_of(params: Params) -> str:
    """How many nodes the images of a batch get."""
    generator = torch.Generator().manual_seed(0)
    heads = len(params["classifier.bias"])
    meta = project(params, {b: torch.rand(heads, BATCH, d, generator=generator) for b, d in DIMS.items()})
    weight, bias = params["attn.qkv.weight"][:, :, :, None], params["attn.qkv.bias"][:, :, None, None]
    tokens = meta.flatten(0, 1)
    groups, left = place_nodes(((meta * weight[:, 0] + bias[:, 0]) * weight[:, 1]).flatten(0, 1), tokens, tokens)
    counts = sorted({group.t.shape[1] for group in groups})
    return "–".join(map(str, dict.fromkeys([counts[0], counts[-1]]))) + (f", {len(left)} exact" if len(left) else "")


if __name__ == "__main__":
    main()
