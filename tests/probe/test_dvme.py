"""DVME against a literal transcription of the paper's Listing 1, and the parameter counts of its Table G1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import Attention as TimmAttention
from torch import nn

from embcache.probe.heads import make_head
from embcache.probe.schedule import Schedule
from embcache.probe.stack import Job, stream_generator, train_heads

DIMS = {"simclr": 2048, "swav": 2048, "dino": 1536}


class Attention(nn.Module):
    """timm's ``vision_transformer.Attention``, its unfused path written out."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attn = (q * self.scale) @ k.transpose(-2, -1)
        attn = attn.softmax(dim=-1)
        x = (attn @ v).transpose(1, 2).reshape(B, N, C)
        return self.proj(x)


class GivenDropout(nn.Module):
    """``nn.Dropout`` whose mask is given from outside, so that two implementations drop the same units."""

    mask: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.mask is None else x * self.mask


class Listing1(nn.Module):
    """The listing, line by line; only the input widths are arguments."""

    def __init__(self, dims: Mapping[str, int], proj_dim: int, num_cls: int, attn: nn.Module) -> None:
        super().__init__()
        self.simclr_head = nn.Linear(dims["simclr"], proj_dim)
        self.swav_head = nn.Linear(dims["swav"], proj_dim)
        self.dino_head = nn.Linear(dims["dino"], proj_dim)
        self.attn = attn
        self.normlayer = nn.LayerNorm(proj_dim * 3)
        self.proj_head = nn.Linear(proj_dim * 3, proj_dim)
        self.classifier = nn.Linear(proj_dim, num_cls)
        self.dropout = GivenDropout()

    def forward(self, x: Mapping[str, torch.Tensor]) -> torch.Tensor:
        simclr_out = self.simclr_head(x["simclr"])
        swav_out = self.swav_head(x["swav"])
        dino_out = self.dino_head(x["dino"])
        meta_x = torch.cat([simclr_out, swav_out, dino_out], dim=1)
        # reshape the meta-emb into (batch, tokens, dim)
        meta_x = meta_x.view(meta_x.size(0), -1, 1)
        out = self.attn(meta_x)
        out = self.normlayer(out.view(out.size(0), -1))
        out = self.proj_head(out).relu()
        out = self.dropout(out)
        out = self.classifier(out)
        return out


def load(model: nn.Module, params: Mapping[str, torch.Tensor]) -> None:
    """Strictly: every parameter of the listing is one of ours, and the other way round."""
    renamed = {}
    for name, value in params.items():
        if name.startswith("project."):
            _, backbone, kind = name.split(".")
            renamed[f"{backbone}_head.{kind}"] = value
        else:
            renamed[name] = value
    model.load_state_dict(renamed, strict=True)


@pytest.mark.parametrize(("proj_dim", "n", "epochs"), [(16, 150, 5), (512, 20, 3)])
def test_training_has_the_losses_of_the_listing(proj_dim: int, n: int, epochs: int) -> None:
    dims = {"simclr": 24, "swav": 20, "dino": 12}
    rng = np.random.default_rng(0)
    y = torch.from_numpy(rng.integers(0, 3, size=n))
    x = {
        b: torch.from_numpy((rng.normal(size=(n, d)) + rng.normal(size=(3, d))[y]).astype(np.float32))
        for b, d in dims.items()
    }
    head = make_head("dvme", proj_dim=proj_dim)
    job = Job(torch.arange(n), torch.arange(0), "7\0fold", 1e-3)
    (mine,) = train_heads(head, x, y, [job], 3, "macro_auc", Schedule(max_epochs=epochs))

    model = Listing1(dims, proj_dim, 3, Attention(dim=1, num_heads=1, qkv_bias=True))
    load(model, head.init(stream_generator(job.stream, "init"), dims, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    order, dropout = (stream_generator(job.stream, purpose) for purpose in ("order", "dropout"))
    losses = []
    for _ in range(epochs):
        total = 0.0
        for batch in torch.randperm(n, generator=order).split(64):
            model.dropout.mask = (torch.rand(len(batch), proj_dim, generator=dropout) >= 0.2) / 0.8
            loss = nn.functional.cross_entropy(model({b: f[batch] for b, f in x.items()}), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        losses.append(total / n)
    np.testing.assert_allclose(mine.losses, losses, rtol=2e-4)
    assert losses[-1] < losses[0]


# The LayerNorm after the attention magnifies what the nodes leave out of it: 1e-5 of its outputs.
@pytest.mark.parametrize(("attention", "atol"), [("exact", 1e-5), ("fast", 1e-4)])
def test_outputs_are_those_of_the_listing_with_timms_attention(attention: str, atol: float) -> None:
    dims = {"simclr": 24, "swav": 20, "dino": 12}
    head = make_head("dvme", attention=attention)
    params = head.init(torch.Generator().manual_seed(3), dims, 5)
    model = Listing1(dims, 512, 5, TimmAttention(1, num_heads=1, qkv_bias=True)).eval()
    load(model, params)
    rng = torch.Generator().manual_seed(4)
    x = {b: torch.randn(4, d, generator=rng) for b, d in dims.items()}
    with torch.no_grad():
        expected = model(x)
    mine = head.apply({n: p[None] for n, p in params.items()}, {b: f[None] for b, f in x.items()}, None)[0]
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=atol)


def test_parameter_counts_are_the_papers() -> None:
    assert make_head("dvme").count_parameters(DIMS, 5) == 3_677_709
    assert make_head("linear").count_parameters({"simclr": 2048}, 5) == 10_245
    assert make_head("linear").count_parameters({"dino": 1536}, 5) == 7_685


def test_identity_is_dvme_with_an_attention_that_passes_its_input() -> None:
    dims = {"a": 6, "b": 4}
    identity = make_head("dvme-identity", proj_dim=8)
    params = identity.init(torch.Generator().manual_seed(0), dims, 3)
    x = {b: torch.randn(1, 5, d) for b, d in dims.items()}
    stacked = {n: p[None] for n, p in params.items()}
    tokens = torch.cat([x[b][0] @ params[f"project.{b}.weight"].T + params[f"project.{b}.bias"] for b in dims], dim=1)
    out = nn.functional.layer_norm(tokens, (16,))
    out = (out @ params["proj_head.weight"].T + params["proj_head.bias"]).relu()
    expected = out @ params["classifier.weight"].T + params["classifier.bias"]
    torch.testing.assert_close(identity.apply(stacked, x, None)[0], expected)


def test_noattn_connects_the_meta_embedding_directly_to_the_classifier() -> None:
    dims = {"a": 6, "b": 4}
    head = make_head("dvme-noattn", proj_dim=8)
    params = head.init(torch.Generator().manual_seed(0), dims, 3)
    x = {b: torch.randn(1, 5, d) for b, d in dims.items()}
    meta = torch.cat([x[b][0] @ params[f"project.{b}.weight"].T + params[f"project.{b}.bias"] for b in dims], dim=1)
    expected = meta @ params["classifier.weight"].T + params["classifier.bias"]
    torch.testing.assert_close(head.apply({n: p[None] for n, p in params.items()}, x, None)[0], expected)


@pytest.mark.parametrize("fan", [(2048, 5), (1, 3)])
def test_linear_layers_start_as_torchs(fan: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    from embcache.probe.layers import init_linear

    torch.manual_seed(11)
    theirs: Any = nn.Linear(*fan)
    mine = init_linear(torch.Generator().manual_seed(11), "x", *fan)
    torch.testing.assert_close(mine["x.weight"], theirs.weight.detach())
    torch.testing.assert_close(mine["x.bias"], theirs.bias.detach())
