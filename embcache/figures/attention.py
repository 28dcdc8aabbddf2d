"""What attention looks at: a DVME run over its test images (the paper's Figure F1), or a vision transformer in one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from embcache.backbones.catalog import LoadedBackbone, find_backbone, load_backbone
from embcache.backbones.transforms import Transform, choose_transform, normalize
from embcache.data.dataset import ImageDataset
from embcache.data.files import is_object, state_now
from embcache.data.images import read_image
from embcache.errors import UsageError
from embcache.figures.shown import Shown, check_dataset, fold_heads, own_protocol, shown_images
from embcache.paths import PathLike
from embcache.places import as_url
from embcache.probe.heads.scalar_attention import sum_attention
from embcache.probe.heads.trained import project
from embcache.probe.inputs import load_features, open_stores
from embcache.runs.folders import Result

_TOGETHER = 256  # images whose attention is summed together
_ENTROPIES = 16  # images whose entropies are computed together
_GRID = 129  # least queries at which an entropy is computed
_PER_SCORE = 4  # and so many more for each unit that scores range over
_MOST = 10  # components that are named

Params = Mapping[str, Tensor]
Features = Mapping[str, Tensor]


# Of a head, averaged over images.


@torch.no_grad()
def mean_attention(params: Params, x: Features) -> NDArray[np.float32]:
    """Mean over images of the attention weights (N, N) of a ``dvme`` or ``dvme-token`` head; x holds (n, D).

    No map is kept per image.
    """
    n, tokens = _count(params, x)
    return np.asarray((_sum_attention(params, x, tokens) / n).float().cpu().numpy())


@torch.no_grad()
def mean_mass(params: Params, x: Features) -> NDArray[np.float64]:
    """`mass_table` of `mean_attention`, in time linear in the number of tokens: the map is never formed."""
    n, tokens = _count(params, x)
    return np.asarray((_sum_attention(params, x, len(x)) / (n * tokens / len(x))).cpu().numpy())


def mass_table(mean_map: NDArray[np.floating], n_backbones: int) -> NDArray[np.float64]:
    """How much attention the tokens of each backbone give to those of each other: (N, N) → (B, B)."""
    blocks = np.asarray(mean_map, dtype=np.float64).reshape(n_backbones, -1, n_backbones, len(mean_map) // n_backbones)
    return np.asarray(blocks.sum(3).mean(1))


@torch.no_grad()
def mean_entropy(params: Params, x: Features) -> float:
    """Mean over images and tokens of the entropy of a token's attention, as a share of log N; x holds (n, D).

    Where a token is one number its entropy is a smooth function of its query: it is computed at some queries of each
    image, the more the further scores range, and interpolated linearly (to 1e-4; a test compares it with all N).
    """
    n, tokens = _count(params, x)
    total = sum(float(_entropies(q, k).sum()) for q, k in _queries_and_keys(params, x, _ENTROPIES))
    return total / (n * tokens * math.log(tokens)) if tokens > 1 else 1.0


def _count(params: Params, x: Features) -> tuple[int, int]:
    """Images, and tokens of each."""
    if "attn.qkv.weight" not in params:
        raise UsageError("this head has no attention", code="no-attention", fix="embcache probe --head dvme",
                         expected="a head trained with dvme or dvme-token", found=", ".join(params))  # fmt: skip
    n = len(next(iter(x.values()))) if x else 0
    if n == 0:
        raise UsageError("attention is averaged over images", code="no-images", expected="at least one", found="none")
    return n, sum(params[f"project.{backbone}.weight"].shape[0] for backbone in x) // params["attn.qkv.weight"].shape[1]


def _queries_and_keys(params: Params, x: Features, together: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Queries and keys (images, N, d) of some images at a time."""
    n, tokens = _count(params, x)
    stacked = {name: p[None].float() for name, p in params.items()}
    weight, bias = stacked["attn.qkv.weight"][0], stacked["attn.qkv.bias"][0]  # (3d, d), (3d,)
    width = weight.shape[1]  # numbers that a token holds
    for rows in torch.split(torch.arange(n), together):
        part = {backbone: features[rows].to(weight)[None] for backbone, features in x.items()}
        meta = project(stacked, part)[0].view(len(rows), tokens, width)
        q, k = (meta @ weight[i : i + width].T + bias[i : i + width] for i in (0, width))
        yield q, k


def _sum_attention(params: Params, x: Features, parts: int) -> Tensor:
    """Attention from each part of the tokens to each other, summed over images and a part's tokens; (parts, parts)."""
    total = torch.zeros(parts, parts, dtype=torch.float64, device=params["attn.qkv.weight"].device)
    for q, k in _queries_and_keys(params, x, _TOGETHER):
        if q.shape[2] == 1:
            total += sum_attention(q[..., 0], k[..., 0], parts)
        else:
            weights = (torch.bmm(q, k.transpose(1, 2)) / math.sqrt(q.shape[2])).softmax(-1)  # (images, N, N)
            total += weights.sum(0, dtype=torch.float64)  # a token is a backbone: N parts either way
    return total


def _entropies(q: Tensor, k: Tensor) -> Tensor:
    """Entropy of each token's weights: queries and keys (images, N, d) → (images, N)."""
    tokens, width = q.shape[1:]
    low, high = q.amin(1, keepdim=True), q.amax(1, keepdim=True)
    reach = float(((high - low) * (k.amax(1, keepdim=True) - k.amin(1, keepdim=True))).max()) if width == 1 else 0.0
    grid = _GRID + math.ceil(_PER_SCORE * min(reach, tokens))
    few = width == 1 and tokens > 2 * grid
    queries = low + (high - low) * torch.linspace(0, 1, grid).to(q)[None, :, None] if few else q
    log_p = (torch.bmm(queries, k.transpose(1, 2)) / math.sqrt(width)).log_softmax(-1)  # (images, queries, N)
    found = -(log_p.exp() * log_p).sum(-1)
    if not few:
        return found
    place = ((q - low) / (high - low).clamp_min(1e-30)).squeeze(-1) * (grid - 1)
    below = place.long().clamp(0, grid - 2)
    share = place - below
    return found.gather(1, below) * (1 - share) + found.gather(1, below + 1) * share


# Of a run.


@dataclass(frozen=True, eq=False)
class RunAttention:
    """Attention of a run, averaged over its test images and folds."""

    result: Result
    shown: Shown  # the test images
    weights: NDArray[np.float32]  # (N, N); row *i*: how much token *i* takes from each token; rows sum to 1
    mass: NDArray[np.float64]
    mass_std: NDArray[np.float64]
    by_class: Mapping[str, NDArray[np.float64]]  # (B, B); of the test images of each class, or with each finding
    entropy: float
    entropy_std: float
    received: tuple[tuple[str, int, float], ...]
    folds: int  # that have a model

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data; the map itself, which is large, is left out."""

        def finite(values: NDArray[np.float64]) -> list[list[float | None]]:
            return [[value if math.isfinite(value) else None for value in row] for row in values.tolist()]

        return {
            "run": self.result.id, "dataset": self.result.dataset, "backbones": list(self.result.backbones),
            "n_test": len(self.shown.ids), "folds": self.folds, "mass": finite(self.mass),
            "mass_std": finite(self.mass_std), "by_class": {k: finite(v) for k, v in self.by_class.items()},
            "entropy": self.entropy, "entropy_std": None if self.folds < 2 else self.entropy_std,
            "received": [{"backbone": b, "component": c, "share": s} for b, c, s in self.received],
        }  # fmt: skip


def run_attention(
    ds: ImageDataset, result: Result, run: Path, *, home: PathLike | None = None, recipe: str | None = None
) -> RunAttention:
    """Attention of a run of ``dvme`` or ``dvme-token`` over the labeled test images of its protocol."""
    check_dataset(result, ds)
    stores = open_stores(ds, [list(result.backbones)], home, recipe)
    shown = shown_images(ds, list(stores.values()), **own_protocol(result))
    x = {name: load_features(stores[name], ds, shown.ids) for name in result.backbones}
    heads = list(fold_heads(result, run).values())
    weights: NDArray[np.float64] = np.zeros(())
    for params in heads:  # one map at a time, however many folds there are
        weights = weights + mean_attention(params, x).astype(np.float64) / len(heads)

    def masses(rows: NDArray[Any]) -> NDArray[np.float64]:
        part = {name: features[torch.from_numpy(rows)] for name, features in x.items()}
        return np.array([mean_mass(params, part) for params in heads])  # (folds, B, B)

    task, y = ds.task, shown.labels
    if task.kind == "number":
        parts = {}
    else:
        sides = (y == 1).T if y.ndim == 2 else y == np.arange(len(task.names))[:, None]
        parts = {name: masses(np.flatnonzero(of)) for name, of in zip(task.names, sides, strict=True) if of.any()}
    if parts and y.ndim == 1:  # of all images, each counted once
        mass = np.einsum("c,cfij->fij", np.unique(y, return_counts=True)[1] / len(y), np.array([*parts.values()]))
    else:
        mass = masses(np.arange(len(y)))
    entropies = np.array([mean_entropy(params, x) for params in heads])
    several = len(heads) > 1
    shares = weights.mean(0)  # a token's share of what all tokens give; sums to 1
    width, order = len(shares) // len(result.backbones), np.argsort(-shares, kind="stable")[:_MOST].tolist()
    return RunAttention(
        result=result,
        shown=shown,
        weights=weights.astype(np.float32),
        mass=mass.mean(0),
        mass_std=mass.std(0, ddof=1) if several else np.full_like(mass[0], np.nan),
        by_class={name: own.mean(0) for name, own in parts.items()},
        entropy=float(entropies.mean()),
        entropy_std=float(entropies.std(ddof=1)) if several else math.nan,
        received=tuple((result.backbones[i // width], i % width, float(shares[i])) for i in order),
        folds=len(heads),
    )


def draw_attention(found: RunAttention, synthetic: bool, target: Path) -> Path:
    """Draw the mean map and the table of masses, PNG, SVG or PDF by the target's suffix."""
    from embcache.figures.plots import plot_attention  # what only reads numbers needs no matplotlib

    r = found.result
    own = f"{r.dataset}{' (synthetic)' * synthetic}, {found.folds} folds trained on {r.subset}"
    title = f"attention of {r.head}, mean over {len(found.shown.ids):,} test images"
    mass = mass_table(found.weights, len(r.backbones))
    return plot_attention(found.weights, mass, r.backbones, (own, title), target)


# Of a vision transformer.


@dataclass(frozen=True, eq=False)
class ClassAttention:
    """Attention of the class token of one image."""

    backbone: str
    pixels: NDArray[np.uint8]  # (H, W, 3); what the network was given, before normalization
    heads: NDArray[np.float32]  # (heads, rows, columns)
    patch: int  # pixels of a patch's side


def image_attention(
    image: PathLike, backbone: str, *, weights: PathLike | None = None, transform: str | None = None,
    home: PathLike | None = None,
) -> ClassAttention:  # fmt: skip
    """Attention of the last block's class token to the patches of one image file, or object."""
    path, url = Path(image).expanduser(), as_url(image)
    if not (state_now(path, url) if is_object(url) else path.is_file()):
        raise UsageError("the image does not exist", code="image-not-found", expected="an image file",
                         found=url, fix="--image FILE")  # fmt: skip
    pixels, _ = read_image("", url) if is_object(url) else read_image(path.resolve().parent, path.name)
    chosen = choose_transform(find_backbone(backbone, home=home), transform, {(pixels.shape[1], pixels.shape[0])})
    loaded = load_backbone(backbone, weights=weights, home=home, image_size=chosen.size)
    return class_attention(loaded, chosen, chosen.geometry(pixels))


@torch.no_grad()
def class_attention(loaded: LoadedBackbone, transform: Transform, pixels: NDArray[np.uint8]) -> ClassAttention:
    """As `image_attention`, of pixels (H, W, 3) at the transform's size."""
    module: Any = loaded.module
    # The attention of the last block of any vision transformer of timm, whose classes differ.
    blocks = getattr(module, "blocks", None)
    last = blocks[-1] if isinstance(blocks, nn.Sequential | nn.ModuleList) and len(blocks) else None
    attention: Any = getattr(last, "attn", None)
    if getattr(module, "cls_token", None) is None or not isinstance(getattr(attention, "attn_drop", None), nn.Module):
        raise _no_class_token(loaded.spec.name)
    seen: list[Tensor] = []
    was_fused = getattr(attention, "fused_attn", False)
    # The fused path never forms the weights; the plain one gives them to the dropout after the softmax.
    attention.fused_attn = False
    hook = attention.attn_drop.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        module(normalize(torch.from_numpy(pixels[None]), transform, "cpu"))
    finally:
        hook.remove()
        attention.fused_attn = was_fused
    weights = seen[-1][0].float()  # (heads, tokens, tokens)
    patch = loaded.spec.patch
    grid = (pixels.shape[0] // patch, pixels.shape[1] // patch)
    before = weights.shape[-1] - math.prod(grid)  # class token and registers
    if before < 1:
        raise _no_class_token(loaded.spec.name)
    heads = weights[:, 0, before:].reshape(-1, *grid)
    return ClassAttention(loaded.spec.name, pixels, np.asarray(heads.numpy(), dtype=np.float32), patch)


def _no_class_token(name: str) -> UsageError:
    return UsageError(
        f"{name} has no class token, so no attention can be shown", code="no-class-token",
        expected="dino, or a vision transformer of timm with a class token",
        fix="embcache attention --image FILE --backbone dino",
    )  # fmt: skip
