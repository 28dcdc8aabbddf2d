"""Any of timm's models as a backbone: ``timm:NAME`` and ``timm:hf-hub:ORG/NAME``.

Features are those that timm pools for the model's own classifier, after the model's own preprocessing. timm only builds
the networks: its older versions run whatever a pickled checkpoint contains. The file is fetched here, from the Hugging
Face hub or a URL, and read like every other checkpoint.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants as hub_constants
from timm.data.config import resolve_model_data_config
from timm.layers.mlp import SwiGLUPacked
from timm.models import load_model_config_from_hf
from torch import Tensor, nn

from embcache.backbones.catalog import Backbone, row_of
from embcache.backbones.checkpoints import HEADS, find_network, load_strictly, read_checkpoint
from embcache.backbones.hub import fetch_file, not_fetched, page_of, reaching_hub
from embcache.backbones.pooling import Pooling, choose_pooling, pool_tokens, try_size, vector_length
from embcache.backbones.weights import (
    Files,
    Published,
    check_digest,
    download,
    find_weights,
    locate_weights,
    timm_filename,
)
from embcache.errors import UsageError, WeightsError
from embcache.paths import weights_dir

# What rows of catalog.toml may name as the value of an argument that ends in _layer.
LAYERS: Mapping[str, Callable[..., nn.Module]] = {"SwiGLUPacked": SwiGLUPacked, "SiLU": nn.SiLU}
_CHOOSE = "choose another model; see `embcache backbones`"
# What timm raises for a configuration of the hub that is not in its layout, and for networks that it cannot build.
_UNUSABLE = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@functools.cache
def describe(name: str, folder: Path | None = None) -> Mapping[str, Any]:
    """The fields of the `Backbone` of a timm model, by its own configuration."""
    model_name = name.removeprefix("timm:")
    lower = model_name.lower()
    if not model_name.startswith("hf-hub:") and not timm.is_model(model_name):
        near = difflib.get_close_matches(model_name, timm.list_models(pretrained=True), n=3, cutoff=0.4)
        raise UsageError(
            f"timm has no model {model_name!r}", code="unknown-backbone",
            found=name + (f" (did you mean {' or '.join(near)}?)" if near else ""),
            expected="timm:NAME with a name that timm lists, or timm:hf-hub:ORG/NAME",
            fix="python -c 'import timm; print(*timm.list_models(pretrained=True), sep=\"\\n\")'",
        )  # fmt: skip
    # What the authors state on their card. A wrong argument cannot go unnoticed: weights are loaded strictly.
    row = row_of(name)
    arguments = dict(row.timm_arguments) if row else {}
    if "vit" in lower and "dinov3" in lower:
        # timm averages the patches of DINOv3 by default; the published feature is the class token.
        arguments["global_pool"] = "token"
    try:
        model = _skeleton(model_name, arguments)
        config, data = model.pretrained_cfg, resolve_model_data_config(model)  # type: ignore[no-untyped-call]
        height, width = (int(side) for side in data["input_size"][-2:])
        return {
            "name": name,
            "network": f"timm {model_name}",
            "dim": vector_length(name, model, (height, width), _CHOOSE, "timm-pooling"),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "source": str(config.get("hf_hub_id") or config.get("url") or "its own weights, given with --weights"),
            "license": str(config.get("license") or "see its model card"),
            "patch": patch_of(model),
            "pooling": "timm",
            "mean": tuple(map(float, data["mean"])),
            "std": tuple(map(float, data["std"])),
            "interpolation": str(data["interpolation"]),
            "weights": Published(filename=timm_filename(name)),
            "timm": model_name,
            "timm_arguments": tuple(arguments.items()),
            "input_size": (height, width),
            "crop_pct": float(data["crop_pct"]),
            "crop_mode": str(data["crop_mode"]),
        }
    except _UNUSABLE as error:
        raise _unusable(model_name, error) from error


def patch_of(model: Any) -> int:
    """What the sides of images must be multiples of."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", 1)
    return int(max(patch) if isinstance(patch, tuple) else patch)


def _unusable(model_name: str, error: Exception) -> UsageError:
    return UsageError(
        f"timm cannot build {model_name}", code="timm-config",
        found=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:300],
        expected="on the hub, a config.json in timm's layout that names one of its architectures", fix=_CHOOSE,
    )  # fmt: skip


def load(spec: Backbone, files: Files, size: tuple[int, int]) -> tuple[nn.Module, str, str, str]:
    """Build a timm model with its weights: those given, else in the weights folder, else of the hub or their URL."""
    folder, origin = weights_dir(files.home), ""
    given = locate_weights(spec.name, spec.weights, override=files.given) if files.given else None
    path = given or find_weights(spec.weights, folder)
    if path is None:
        path = _fetch(spec, folder, files.allow_download)
        origin = f" of {describe('timm:' + spec.timm)['source']}"  # that of a spec may be a row's
    checkpoint = read_checkpoint(path, given=given is not None)
    if not given:
        check_digest(path, checkpoint.sha256, spec.weights)
    module, chosen = _fill(spec, checkpoint.state, path)
    return _pooled(spec, module, size), checkpoint.sha256, path.name + origin, chosen if given else ""


class TokenPooling(nn.Module):
    """A transformer of timm whose tokens are pooled here: (B, 3, H, W) to (B, D), or (B, T, D) of patches."""

    def __init__(self, model: nn.Module, pooling: Pooling) -> None:
        super().__init__()
        self.model: Any = model
        self.pooling = pooling

    def forward(self, images: Tensor) -> Tensor:
        """Features of images; every layer passes the final norm."""
        layers = list(self.pooling.layers) or 1
        found = self.model.forward_intermediates(
            images, indices=layers, norm=True, output_fmt="NLC", intermediates_only=True,
            return_prefix_tokens=self.model.num_prefix_tokens > 0,
        )  # fmt: skip
        # Without prefix tokens timm gives the patches alone.
        states = [torch.cat([each[1], each[0]], dim=1) if isinstance(each, tuple) else each for each in found]
        # Models that average patches may norm what is pooled instead of the tokens.
        parts = dict(self.model.named_children())
        late = isinstance(parts.get("norm"), nn.Identity) and "fc_norm" in parts
        more = {"norm": parts["fc_norm"]} if late else {}
        return pool_tokens(states, self.pooling.tokens, self.model.num_prefix_tokens, **more)


def repool(spec: Backbone, tokens: str | None, layers: str | None) -> Mapping[str, Any]:
    """The fields that change where a user names tokens or layers."""
    return choose_tokens(spec, _skeleton(spec.timm, dict(spec.timm_arguments)), tokens, layers)


def choose_tokens(spec: Backbone, model: Any, tokens: str | None, layers: str | None) -> Mapping[str, Any]:
    """As `repool`, of a vision transformer of timm."""
    blocks, prefix = getattr(model, "blocks", None), getattr(model, "num_prefix_tokens", None)  # of some of its models
    if blocks is None or prefix is None or not callable(getattr(model, "forward_intermediates", None)):
        raise UsageError(
            f"the tokens of {spec.name} cannot be chosen", code="no-tokens", found=type(model).__name__,
            expected="a vision transformer", fix="leave out --tokens and --layers",
        )  # fmt: skip
    own, offered = ("cls", ("mean", "patches", "cls", "cls+mean")) if prefix else ("mean", ("mean", "patches"))
    return choose_pooling(spec, tokens or own, layers, offered, len(blocks), int(model.embed_dim))


def build(spec: Backbone, size: tuple[int, int]) -> nn.Module:
    """Build a timm model for images of this height and width, its weights still to be filled."""
    return _pooled(spec, _create(spec.timm, dict(spec.timm_arguments)), size)


def _pooled(spec: Backbone, module: nn.Module, size: tuple[int, int]) -> nn.Module:
    """A timm model with the pooling of a backbone, for images of a height and width."""
    if size != spec.input_size:
        try_size(spec, module, size, lambda: fit_size(module, size))
    return module if spec.pooling == "timm" else TokenPooling(module, Pooling.parse(spec.pooling))


def _fill(spec: Backbone, state: Mapping[str, Tensor], path: Path) -> tuple[Any, str]:
    """The network, filled strictly from tensors under timm's names or names that timm converts; and what was chosen."""
    module = _create(spec.timm, dict(spec.timm_arguments))
    classifiers = module.pretrained_cfg.get("classifier") or ()
    heads = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    found = find_network(state, module.state_dict(), heads=(*HEADS, *(f"{head}." for head in heads)), where=path)
    trunk = {key: value for key, value in found.state.items() if key.rpartition(".")[0] not in heads}
    try:
        load_strictly(module, trunk, where=path)
    except WeightsError as mismatch:
        if not trunk:
            raise  # an empty overlay would make timm fetch weights of its own
        # As part of the configuration, the tensors pass through the model's own converter of published names.
        overlay = {"state_dict": trunk, "source": "", "num_classes": 0, "label_offset": 0}
        arguments = {**dict(spec.timm_arguments), "pretrained": True, "pretrained_cfg_overlay": overlay}
        try:
            module = _create(spec.timm, arguments)
        except (RuntimeError, KeyError, ValueError, AttributeError, TypeError):
            raise mismatch from None
        del module.pretrained_cfg["state_dict"]
        load_strictly(module, module.state_dict(), where=path)  # timm accepts values that are not finite
    return module, found.describe(path)


def _create(model_name: str, arguments: Mapping[str, Any]) -> Any:
    # Any: what a timm model has in addition to nn.Module is not in its type.
    reached = _hub(model_name) if model_name.startswith("hf-hub:") else contextlib.nullcontext()
    made: dict[str, Any] = {key: LAYERS[value] if key.endswith("_layer") else value for key, value in arguments.items()}
    with torch.random.fork_rng(devices=[]), reached:
        return timm.create_model(model_name, **{"pretrained": False, "num_classes": 0, **made})


def _skeleton(model_name: str, arguments: Mapping[str, Any]) -> Any:
    """Build the network without its memory, on the meta device, if that works."""
    try:
        with torch.device("meta"):
            return _create(model_name, arguments)
    except (RuntimeError, NotImplementedError):
        # Some networks look at their own numbers while they are built, which meta tensors do not have.
        return _create(model_name, arguments)


def fit_size(model: Any, image_size: tuple[int, int]) -> None:
    """Fit a fixed-size transformer to images of another size by timm's own resampling; other models take any."""
    if hasattr(model, "set_input_size"):  # some of timm's models have it
        model.set_input_size(img_size=image_size)


def _fetch(spec: Backbone, folder: Path, allow_download: bool) -> Path:
    """The weights that a model's configuration points to: from the hub and its cache, else from a URL."""
    filename = spec.weights.filename
    unavailable = _unavailable(spec.timm, filename, folder)
    if not allow_download:
        raise unavailable("downloads are not allowed here")
    config: Mapping[str, Any]
    if spec.timm.startswith("hf-hub:"):
        try:
            with _hub(spec.timm):
                config = dict(load_model_config_from_hf(_repository(spec.timm))[0])
        except _UNUSABLE as error:
            raise _unusable(spec.timm, error) from error
    else:
        known = timm.get_pretrained_cfg(spec.timm)
        config = {} if known is None else {"url": known.url, "hf_hub_filename": known.hf_hub_filename}
    if repository := _repository(spec.timm):
        return fetch_file(spec.name, repository, _candidates(config.get("hf_hub_filename")), unavailable)
    url = config.get("url")
    if isinstance(url, str) and url:
        # As in torch.hub, a name may end in the first digits of the file's digest.
        stated = re.search(r"-([0-9a-f]{8,})\.\w+$", url)
        return download(Published(url=url, filename=filename, sha256=stated[1] if stated else ""), folder)
    raise WeightsError(
        f"timm knows no weights for {spec.timm}", code="weights-not-found",
        found="neither a repository on the hub nor a URL", expected="a model that timm.list_models(pretrained=True) "
        "lists", fix=f"embcache extract --weights {spec.name}=FILE …",
    )  # fmt: skip


def _candidates(filename: str | None) -> Sequence[str]:
    """Names of the weights in a repository, best first: the safetensors beside the named file, then that file.

    As timm looks for them (``_get_safe_alternatives``), whose names are these.
    """
    named = filename or "pytorch_model.bin"
    if not named.endswith(".bin"):
        return (named,)
    known = {"pytorch_model.bin": "model.safetensors", "open_clip_pytorch_model.bin": "open_clip_model.safetensors"}
    return (known.get(named, named.removesuffix(".bin") + ".safetensors"), named)


def _hub(model_name: str) -> AbstractContextManager[None]:
    """The hub's failures to give the configuration of a model as one message."""
    return reaching_hub(model_name, _repository(model_name), "config.json", _unavailable(model_name))


def _repository(model_name: str) -> str:
    """ORG/NAME on the hub of timm's weights of a model; empty if they are elsewhere."""
    if model_name.startswith("hf-hub:"):
        return model_name.removeprefix("hf-hub:")
    known = timm.get_pretrained_cfg(model_name)
    return str((known and known.hf_hub_id) or "")


def _unavailable(model_name: str, filename: str = "", folder: Path | None = None) -> Callable[[str], WeightsError]:
    """Makes the error for a model that cannot be fetched; ``folder`` is for its weights, if only they are wanted."""
    repository = _repository(model_name)
    if model_name.startswith("hf-hub:") or folder is None:
        return not_fetched(model_name, repository, f"copy its folder to {hub_constants.HF_HUB_CACHE}")
    known = timm.get_pretrained_cfg(model_name)
    url = f"{page_of(repository)}/resolve/main/model.safetensors" if repository else str((known and known.url) or "")
    fix = f"on a machine with a network: curl -L -o {filename} {url}\nthen put it at {folder / filename}"
    return lambda reason: WeightsError(
        f"{model_name} cannot be fetched", code="download-failed", expected=url, found=reason, where=folder, fix=fix
    )
