"""Mean attention against timm's layer with its weights laid open."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import Attention

from embcache.errors import UsageError
from embcache.figures import attention as attention
from embcache.figures.attention import mass_table, mean_attention, mean_mass
from embcache.probe.heads import make_head
from tests.refusal import refused

DIMS = {"a": 6, "b": 9}


def setting(name: str, proj_dim: int = 8, n: int = 7) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    head: Any = make_head(name, proj_dim=proj_dim)
    params = head.init(torch.Generator().manual_seed(0), DIMS, 3)
    params["attn.qkv.weight"] = params["attn.qkv.weight"] * 3  # attention that is far from even
    return params, {b: torch.randn(n, d, generator=torch.Generator().manual_seed(d)) for b, d in DIMS.items()}


def timm_weights(params: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Attention weights (B, N, N) of timm's unfused path: what its dropout sees."""
    layer = Attention(tokens.shape[-1], num_heads=1, qkv_bias=True).eval()
    layer.load_state_dict({n.removeprefix("attn."): p for n, p in params.items() if n.startswith("attn.")})
    layer.fused_attn = False
    seen: list[torch.Tensor] = []
    layer.attn_drop.register_forward_hook(lambda module, given, out: seen.append(out))
    layer(tokens)
    return seen[0][:, 0].detach()


@pytest.mark.parametrize(("name", "width"), [("dvme", 1), ("dvme-token", 8)])
def test_is_the_mean_of_timms_weights(name: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    params, x = setting(name)
    meta = torch.cat([x[b] @ params[f"project.{b}.weight"].T + params[f"project.{b}.bias"] for b in DIMS], dim=1)
    expected = timm_weights(params, meta.view(7, -1, width)).mean(0)
    found = mean_attention(params, x)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
    monkeypatch.setattr(attention, "_TOGETHER", 1)  # an image at a time
    np.testing.assert_allclose(mean_attention(params, x), found, rtol=1e-5)


@pytest.mark.parametrize("spread", [0.3, 3.0, 1e4])
def test_nodes_give_the_map_and_the_mass_of_all_scores(spread: float) -> None:
    params, x = setting("dvme", proj_dim=60, n=9)
    params["attn.qkv.weight"] = params["attn.qkv.weight"] * spread
    maps = {kind: mean_attention(params, x, kind) for kind in ("exact", "fast", "auto")}
    for kind, found in maps.items():
        np.testing.assert_allclose(found, maps["exact"], atol=2e-5 * maps["exact"].max())
        np.testing.assert_allclose(mean_mass(params, x, kind), mass_table(maps["exact"], 2), atol=1e-5)


@pytest.mark.parametrize("name", ["dvme", "dvme-token"])
def test_mass_of_either_head_is_that_of_its_map(name: str) -> None:
    params, x = setting(name)
    np.testing.assert_allclose(mean_mass(params, x), mass_table(mean_attention(params, x), 2), atol=1e-5)


def test_mass_is_what_a_backbones_tokens_give_to_each_backbone() -> None:
    params, x = setting("dvme", proj_dim=4)
    weights = mean_attention(params, x)  # (8, 8)
    table = mass_table(weights, 2)
    for a in range(2):
        for b in range(2):
            block = weights[4 * a : 4 * a + 4, 4 * b : 4 * b + 4]
            assert table[a, b] == pytest.approx(block.sum(1).mean())
    np.testing.assert_allclose(table.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(mass_table(np.full((6, 6), 1 / 6), 3), 1 / 3)


def test_a_head_without_attention_or_without_images_is_refused() -> None:
    params, x = setting("dvme")
    identity: Any = make_head("dvme-identity", proj_dim=8)
    with refused(UsageError, "no-attention"):
        mean_attention(identity.init(torch.Generator().manual_seed(0), DIMS, 3), x)
    with refused(UsageError, "no-images"):
        mean_attention(params, {b: f[:0] for b, f in x.items()})
    with pytest.raises(ValueError):
        mass_table(mean_attention(params, x), 3)
