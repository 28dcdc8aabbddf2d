"""Any of timm's models as a backbone: ``timm:NAME`` and ``timm:hf-hub:ORG/NAME``.

Features are those that timm pools for the model's own classifier, after the model's own preprocessing. timm builds the
networks; their weights are fetched and read by embcache.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.layers.mlp import SwiGLUPacked
from torch import Tensor, nn

from embcache.backbones.catalog import Backbone, timm_filename
from embcache.backbones.checkpoints import HEADS, find_network, load_strictly, read_checkpoint
from embcache.backbones.timm_weights import fetch_weights, hub_errors, reach_hub
from embcache.backbones.weights import Published, check_digest, find_weights, locate_weights
from embcache.errors import UsageError, WeightsError
from embcache.paths import PathLike, weights_dir

# What authors tell timm.create_model on their model cards and their configuration on the hub does not say. Names are in
# lower case. A wrong argument cannot pass unseen: weights are loaded strictly.
ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    "hf-hub:mahmoodlab/uni": {"init_values": 1e-5, "dynamic_img_size": True},
    "hf-hub:bioptimus/h-optimus-0": {"init_values": 1e-5, "dynamic_img_size": False},
    "hf-hub:bioptimus/h-optimus-1": {"init_values": 1e-5, "dynamic_img_size": False},
    "hf-hub:paige-ai/virchow": {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "global_pool": "token"},
    "hf-hub:paige-ai/virchow2": {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "global_pool": "token"},
}
# Part of a name, in lower case → datasets whose images it was pretrained on.
CONTAMINATED: Mapping[str, tuple[str, ...]] = {"rad-dino": ("nih",), "rad_dino": ("nih",)}


@functools.cache
def find_timm(name: str) -> Backbone:
    """Describe a timm model by its own configuration."""
    model_name = name.removeprefix("timm:")
    lower = model_name.lower()
    if not model_name.startswith("hf-hub:") and not timm.is_model(model_name):
        near = difflib.get_close_matches(model_name, timm.list_models(pretrained=True), n=3, cutoff=0.4)
        raise UsageError(
            f"timm has no model {model_name!r}", found=name + (f" (did you mean {' or '.join(near)}?)" if near else ""),
            expected="timm:NAME with a name that timm lists, or timm:hf-hub:ORG/NAME",
            fix="python -c 'import timm; print(*timm.list_models(pretrained=True), sep=\"\\n\")'",
        )  # fmt: skip
    arguments = dict(ARGUMENTS.get(lower, {}))
    if "vit" in lower and "dinov3" in lower:
        # timm averages the patches of DINOv3 unless told otherwise; the published feature is the class token.
        arguments["global_pool"] = "token"
    try:
        return _described(name, model_name, arguments)
    except (
        ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError,
    ) as error:  # fmt: skip
        raise UsageError(
            f"timm cannot build {model_name}",
            found=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:300],
            expected="on the hub, a config.json in timm's layout that names one of its architectures",
            fix="choose another model; see `embcache backbones`",
        ) from error  # fmt: skip


def _described(name: str, model_name: str, arguments: dict[str, Any]) -> Backbone:
    """What timm, or a configuration that anybody can have written, says of a model; raises whatever comes of that."""
    model = _skeleton(model_name, arguments)
    config = model.pretrained_cfg
    data = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    height, width = data["input_size"][-2:]
    return Backbone(
        name=name,
        network=f"timm {model_name}",
        dim=_feature_length(model, (height, width), name),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        source=str(config.get("hf_hub_id") or config.get("url") or "its own weights, given with --weights"),
        licence=str(config.get("license") or "see its model card"),
        patch=_patch(model),
        pooling="timm",
        mean=_rgb(data["mean"]),
        std=_rgb(data["std"]),
        interpolation=str(data["interpolation"]),
        weights=Published(filename=timm_filename(name)),
        timm=model_name,
        timm_arguments=tuple(arguments.items()),
        input_size=(int(height), int(width)),
        crop_pct=float(data["crop_pct"]),
        crop_mode=str(data["crop_mode"]),
        contaminated=next((names for part, names in CONTAMINATED.items() if part in model_name.lower()), ()),
    )


def load_timm(
    spec: Backbone,
    weights: PathLike | None,
    home: PathLike | None,
    image_size: tuple[int, int] | None,
    allow_download: bool,
) -> tuple[nn.Module, str, str, str]:
    """Build a timm model with its weights: from ``weights``, else the weights folder, else the hub or their URL."""
    folder, origin = weights_dir(home), ""
    path: Path | None
    if weights is not None:
        path = locate_weights(spec.name, spec.weights, override=weights, home=home)
    else:
        path = find_weights(spec.weights, folder)
    if path is None:
        path = fetch_weights(spec, folder, allow_download)
        origin = f" of {spec.source}"
    checkpoint = read_checkpoint(path, given=weights is not None)
    if weights is None:
        check_digest(path, checkpoint.sha256, spec.weights)
    module, chosen = _fill(spec, checkpoint.state, path)
    if image_size is not None and image_size != spec.input_size:
        _resize(module, spec, image_size)
    return module, checkpoint.sha256, path.name + origin, chosen if weights is not None else ""


def build_timm(spec: Backbone, image_size: tuple[int, int]) -> nn.Module:
    """Build a timm model for images of this height and width, its weights still to be filled."""
    module: nn.Module = _create(spec.timm, dict(spec.timm_arguments), num_classes=0)
    if image_size != spec.input_size:
        _resize(module, spec, image_size)
    return module


def _fill(spec: Backbone, state: Mapping[str, Tensor], path: Path) -> tuple[Any, str]:
    """Build the network and fill it strictly from tensors under timm's names, or names that timm itself converts.

    Returns it, and in words what was chosen of the file.
    """
    module = _create(spec.timm, dict(spec.timm_arguments), num_classes=0)
    classifiers = module.pretrained_cfg.get("classifier") or ()
    heads = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    found = find_network(state, module.state_dict(), heads=(*HEADS, *(f"{head}." for head in heads)), where=path)
    trunk = {key: value for key, value in found.state.items() if key.rpartition(".")[0] not in heads}
    try:
        load_strictly(module, trunk, where=path)
    except WeightsError as mismatch:
        if not trunk:
            raise  # an empty overlay would send timm to fetch weights of its own
        # Overlaid on the configuration, the tensors pass through the model's own converter of published names.
        overlay = {"state_dict": trunk, "source": "", "num_classes": 0, "label_offset": 0}
        arguments = {**dict(spec.timm_arguments), "pretrained": True, "pretrained_cfg_overlay": overlay}
        try:
            module = _create(spec.timm, arguments, num_classes=0)
        except (RuntimeError, KeyError, ValueError, AttributeError, TypeError):
            raise mismatch from None
        del module.pretrained_cfg["state_dict"]
        load_strictly(module, module.state_dict(), where=path)  # timm takes values that are not finite
    return module, found.describe(path)


def _create(model_name: str, arguments: Mapping[str, Any], **more: Any) -> Any:
    # Any: what a timm model has besides nn.Module is not in its type.
    if model_name.startswith("hf-hub:"):
        reach_hub(model_name, model_name.removeprefix("hf-hub:"), "config.json")
    with torch.random.fork_rng(devices=[]), hub_errors(model_name):
        return timm.create_model(model_name, **{"pretrained": False, **arguments, **more})


def _skeleton(model_name: str, arguments: Mapping[str, Any]) -> Any:
    """Build the network without its memory, on the meta device, where that works."""
    try:
        with torch.device("meta"):
            return _create(model_name, arguments, num_classes=0)
    except (RuntimeError, NotImplementedError):
        # Some networks look at their own numbers while they are built, which meta tensors do not have.
        return _create(model_name, arguments, num_classes=0)


def _feature_length(model: nn.Module, size: tuple[int, int], name: str) -> int:
    """Length of the vector that one image of the model's own size becomes."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        shape = tuple(model.eval()(torch.zeros(1, 3, *size, device=device)).shape)
    if len(shape) != 2:
        raise UsageError(
            f"{name} does not pool its features into one vector", expected="an output of shape (1, D)",
            found=str(shape), fix="choose another model; see `embcache backbones`",
        )  # fmt: skip
    return int(shape[1])


def _patch(model: nn.Module) -> int:
    size = getattr(getattr(model, "patch_embed", None), "patch_size", 1)
    return int(max(size) if isinstance(size, tuple) else size)


def _rgb(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _resize(module: Any, spec: Backbone, image_size: tuple[int, int]) -> None:
    """Fit a fixed-size transformer to images of another size by timm's own resampling, and try one."""
    try:
        if any(side % spec.patch for side in image_size):
            raise ValueError(f"a patch of {spec.patch} pixels, which does not divide the sides")
        if hasattr(module, "set_input_size"):
            module.set_input_size(img_size=image_size)
        with torch.inference_mode():
            module.eval()(torch.zeros(1, 3, *image_size))
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        raise UsageError(
            f"{spec.name} cannot take images of {image_size[1]}×{image_size[0]}", found=str(error).partition("\n")[0],
            expected=f"{spec.input_size[1]}×{spec.input_size[0]}", fix="embcache extract --transform model …",
        ) from error  # fmt: skip
