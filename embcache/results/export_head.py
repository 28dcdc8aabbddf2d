"""One fold's head as two plain files: tensors (safetensors) and what to do with them (JSON).

With features of the recipe, plain torch can predict; ``docs/results.md`` has the twenty lines.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from inspect import cleandoc
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_tensors

from embcache.errors import UsageError
from embcache.io import write_outputs
from embcache.paths import PathLike
from embcache.probe.heads import make_head
from embcache.probe.metrics import merit
from embcache.results.curves import refuse_untrusted
from embcache.runs.folders import find_run_anywhere, load_heads
from embcache.runs.result import Result

_STANDARD = "z = (x - standard.B.mean) / standard.B.scale"
_LISTING = "logits = classifier(relu(proj_head(layernorm(normlayer, {}))))"
_PROJECT = "m = [project.B(x) of each backbone B, side by side]"

FORMULAS: Mapping[str, str] = {
    "linear": "logits = classifier(x)",
    "mlp": "logits = classifier(relu(hidden(x)))",
    "logreg": f"{_STANDARD}; logits = classifier(z)",
    "ridge": f"{_STANDARD}; logits = classifier(z)",
    "concat": f"{_STANDARD} of each backbone B; logits = classifier([z of each backbone, side by side])",
    "knn": f"{_STANDARD}, scaled to length 1; votes = softmax of the k largest (z · bank.features row) / temperature; "
    "logits = log(max(votes · bank.labels rows, 1e-12))",
    "dvme-noattn": f"{_PROJECT}; logits = classifier(m)",
    "dvme-identity": f"{_PROJECT}; {_LISTING.format('m')}",
    "dvme": f"{_PROJECT}; q, k, v = m * attn.qkv.weight[i] + attn.qkv.bias[i] for i = 0, 1, 2; "
    "a[i] = sum over j of softmax over j (q[i] k[j]) v[j]; a = a * attn.proj.weight + attn.proj.bias; "
    + _LISTING.format("a"),
    "dvme-token": f"{_PROJECT}, a token each; q, k, v = attn.qkv(token); "
    "a = attn.proj(softmax(q kᵀ / sqrt(proj_dim)) v), side by side; " + _LISTING.format("a"),
}
"""How logits come from features, layers written as functions; for other heads their docstring."""


@dataclass(frozen=True, eq=False)
class ExportedHead:
    """Where the files are, and what ``head.json`` says."""

    folder: Path
    about: Mapping[str, Any]


def export_head(run: str, output: PathLike, *, fold: int | None = None, home: PathLike | None = None) -> ExportedHead:
    """Write ``head.safetensors`` and ``head.json`` of one head, by default of the fold that is best on validation."""
    result, path = find_run_anywhere(run, home)
    if result.kind == "finetune":
        raise UsageError("the head of a finetuned model is of no use without its network", code="no-head",
                         found=result.id, where=path, fix=f"embcache predict --run {result.id}")  # fmt: skip
    if result.kind != "probe":
        raise UsageError(f"a result of kind {result.kind!r} has no head", code="no-head", found=result.id, where=path,
                         fix=f"--run {result.request.get('run', 'RUN')}")  # fmt: skip
    refuse_untrusted(result)
    usable = {f.fold: f for f in result.folds if not f.failed}
    if fold is None:
        fold = max(usable.values(), key=lambda f: merit(result.metric, f.val_score)).fold
    if fold not in usable:
        raise UsageError(f"run {result.id} has no model of fold {fold}", code="unknown-fold",
                         expected=", ".join(map(str, usable)), where="--fold")  # fmt: skip
    tensors = load_heads(path)[fold]
    about = _describe(result, fold, tensors)
    data = save_tensors({name: t.contiguous() for name, t in tensors.items()}, {"run": result.id, "fold": str(fold)})
    folder = Path(output).expanduser()
    text = json.dumps(about, indent=2, ensure_ascii=False)
    write_outputs({folder / "head.safetensors": data, folder / "head.json": text.encode()})
    return ExportedHead(folder, about)


def _formula(name: str, tensors: Mapping[str, torch.Tensor]) -> str:
    found = FORMULAS.get(name, "")
    votes = found.partition("logits = log(max")[0]
    if "bank.numbers" in tensors:
        found = f"{votes}logits = votes · bank.numbers rows"
    elif "bank.known" in tensors:
        found = f"{votes}s = votes · bank.labels rows; t = votes · bank.known rows - s; "
        found += "logits = log(max(s, 1e-12)) - log(max(t, 1e-12))"
    return found and found + _finish(tensors)


def _finish(tensors: Mapping[str, torch.Tensor]) -> str:
    """What follows the head, where its target adds parameters."""
    if "target.scale" in tensors:
        return "; number = logits * target.scale + target.mean"
    if "target.first" in tensors:
        gaps = ", then target.first + cumsum(exp(target.gaps))" if "target.gaps" in tensors else ""
        return f"; cuts = target.first{gaps}; P(class <= c) = sigmoid(cuts[c] - logits)"
    return ""


def _describe(result: Result, fold: int, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    options = dict(result.request["head"])
    name = str(options.pop("name"))
    head = make_head(name, **options)
    fingerprints = {str(backbone): str(digest) for backbone, digest in result.request["recipes"]}
    return {
        "format": "embcache head, version 1",
        "run": result.id,
        "dataset": result.dataset,
        "target": result.target,
        "fold": fold,
        "subset": result.subset,
        "metric": result.metric,
        "val_score": result.folds[fold].val_score,
        "test_score": result.folds[fold].score,
        "class_names": list(result.class_names),
        "task": result.task.kind,
        "loss": result.task.loss,
        "head": {"name": name, **asdict(head)},  # type: ignore[call-overload]
        "formula": _formula(name, tensors) or cleandoc(type(head).__doc__ or "") + _finish(tensors),
        "layers": "NAME(x) = x @ NAME.weight.T + NAME.bias; layernorm: over the last axis, eps 1e-5; x is float32",
        "probabilities": {"findings": "sigmoid(logits)", "number": "none: logits are the numbers"}.get(
            result.task.kind,
            "of the classes, by the cuts" if "target.first" in tensors else "softmax(logits) over the last axis",
        ),
        # the order matters to heads that fuse
        "backbones": [
            {"name": b, "fingerprint": fingerprints.get(b), "recipe": result.recipes.get(b)} for b in result.backbones
        ],
        "tensors": {
            n: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")} for n, t in tensors.items()
        },
        "versions": dict(result.versions),
    }
