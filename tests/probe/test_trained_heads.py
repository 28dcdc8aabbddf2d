"""mlp, concat and dvme-token against torch, timm and scikit-learn; the fused embedding of the dvme heads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.preprocessing import StandardScaler
from timm.models.vision_transformer import Attention
from torch import nn

from embcache.probe.heads import make_head
from embcache.probe.layers import standard_params

DIMS = {"a": 12, "b": 7, "c": 9}


def one(head: Any, dims: dict[str, int], n_classes: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    params = head.init(torch.Generator().manual_seed(0), dims, n_classes)
    return params, {b: torch.randn(5, d, generator=torch.Generator().manual_seed(d)) for b, d in dims.items()}


def stack(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t[None] for name, t in tensors.items()}


def test_mlp_is_torchs() -> None:
    head: Any = make_head("mlp", hidden=16)
    params, x = one(head, {"a": 12}, 3)
    theirs = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3)).eval()
    theirs[0].load_state_dict({k: params[f"hidden.{k}"] for k in ("weight", "bias")})
    theirs[3].load_state_dict({k: params[f"classifier.{k}"] for k in ("weight", "bias")})
    torch.testing.assert_close(head.apply(stack(params), stack(x))[0], theirs(x["a"]).detach())
    assert head.dropouts() == {"hidden": (16, 0.2)}
    dropped = head.apply(stack(params), stack(x), {"hidden": torch.zeros(1, 5, 16)})
    torch.testing.assert_close(dropped[0], params["classifier.bias"].expand(5, 3))
    assert make_head("mlp").count_parameters({"a": 2048}, 5) == 2048 * 512 + 512 + 512 * 5 + 5


def test_concat_is_a_linear_layer_on_scikit_learns_standardized_features() -> None:
    head: Any = make_head("concat")
    rng = np.random.default_rng(0)
    train = {b: (rng.normal(size=(40, d)) * 10 + 4).astype(np.float32) for b, d in DIMS.items()}
    params, x = one(head, DIMS, 3)
    constants = standard_params({b: torch.from_numpy(f) for b, f in train.items()})
    logits = head.apply(stack(params | constants), stack(x))[0]
    wide = np.hstack([StandardScaler().fit(train[b]).transform(x[b].numpy()) for b in DIMS])
    expected = wide @ params["classifier.weight"].numpy().T + params["classifier.bias"].numpy()
    np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert head.count_parameters(DIMS, 3) == sum(DIMS.values()) * 3 + 3


class TokenListing(nn.Module):
    """Listing 1 with one token per backbone: only the reshape before attention differs."""

    def __init__(self, proj_dim: int, num_cls: int) -> None:
        super().__init__()
        self.project = nn.ModuleDict({b: nn.Linear(d, proj_dim) for b, d in DIMS.items()})
        self.attn = Attention(proj_dim, num_heads=1, qkv_bias=True)
        self.normlayer = nn.LayerNorm(proj_dim * 3)
        self.proj_head = nn.Linear(proj_dim * 3, proj_dim)
        self.classifier = nn.Linear(proj_dim, num_cls)

    def embed(self, x: dict[str, torch.Tensor]) -> torch.Tensor:
        tokens = torch.stack([self.project[b](x[b]) for b in DIMS], dim=1)  # (B, 3, proj_dim)
        out = self.attn(tokens)
        return self.proj_head(self.normlayer(out.reshape(out.size(0), -1))).relu()


def test_dvme_token_is_timms_attention_over_backbones() -> None:
    head: Any = make_head("dvme-token", proj_dim=16)
    params, x = one(head, DIMS, 3)
    theirs = TokenListing(16, 3).eval()
    theirs.load_state_dict(params, strict=True)
    with torch.no_grad():
        fused = theirs.embed(x)
        torch.testing.assert_close(head.embed(stack(params), stack(x))[0], fused, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            head.apply(stack(params), stack(x))[0], theirs.classifier(fused), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("name", ["dvme", "dvme-token"])
def test_the_fused_embedding_is_what_the_classifier_sees(name: str) -> None:
    head: Any = make_head(name, proj_dim=16)
    params, x = one(head, DIMS, 3)
    fused = head.embed(stack(params), stack(x))
    assert fused.shape == (1, 5, 16)
    assert (fused >= 0).all()
    logits = fused[0] @ params["classifier.weight"].T + params["classifier.bias"]
    torch.testing.assert_close(head.apply(stack(params), stack(x))[0], logits)
    assert make_head(name).proj_dim == 512  # type: ignore[attr-defined]
