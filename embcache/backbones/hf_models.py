"""Models of transformers as backbones: ``hf:ORG/NAME[@REVISION]`` and ``hf:FOLDER``.

Only safetensors are read, no code of a repository is run, and a model is refused unless all its tensors come from its
files. The image tower alone is used, pooled as its publisher does (`FAMILIES`) unless ``--pooling`` says otherwise. A
recipe holds digests of tensors and of the configuration, not where they came from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import numpy as np
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor, nn

from embcache.backbones.checkpoints import hash_state
from embcache.backbones.hub import canonical_name, is_repository, not_fetched, reaching_hub
from embcache.backbones.pooling import Pooling, choose_pooling, pool_tokens, try_size
from embcache.backbones.transforms import MOST_SIDE, Transform
from embcache.backbones.weights import Files, find_model, need, refusing
from embcache.errors import UsageError, WeightsError
from embcache.sealed import canonical_json

if TYPE_CHECKING:
    from embcache.backbones.catalog import Backbone


@dataclass(frozen=True)
class Family:
    """How the image towers of one architecture are used."""

    pooling: str  # its publisher's
    norm: str  # the final norm, which layers before the last pass too
    class_token: bool = True
    pooler: bool = True  # whether ``pooler_output`` is a trained feature
    normed: bool = True  # whether the last hidden state has passed the final norm
    masked: bool = False  # whether patches are left out at random, also in eval mode
    interpolates: bool = False  # whether images of any size are taken without a keyword
    arguments: tuple[tuple[str, Any], ...] = ()  # of from_pretrained


# Read in transformers 5.24 (models/*/modeling_*.py) and on the publishers' cards.
FAMILIES: Mapping[str, Family] = {
    "dinov2": Family("cls", "layernorm", interpolates=True),
    "dinov2_with_registers": Family("cls", "layernorm", interpolates=True),
    "dinov3_vit": Family("cls", "norm", interpolates=True),
    # Its last hidden state is not normed: the class token is that of the pooler.
    "clip_vision_model": Family("pooler", "post_layernorm", normed=False),
    "siglip_vision_model": Family("pooler", "post_layernorm", class_token=False),  # pools by attention
    # Its pooler, a layer with tanh, is often not in the file.
    "vit": Family("cls", "layernorm", pooler=False, arguments=(("add_pooling_layer", False),)),
    "vit_mae": Family("cls", "layernorm", pooler=False, masked=True),
}
_TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}  # models of images and texts
# What decides the features of these families and shows neither in the names nor in the shapes of their tensors.
_COUNTED = (
    "hidden_act", "image_size", "layer_norm_eps", "num_attention_heads", "num_register_tokens", "patch_size",
    "rope_theta",
)  # fmt: skip
_OURS = {"local_files_only": True, "trust_remote_code": False}
_FILES = ("config.json", "preprocessor_config.json", "processor_config.json")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # of Pillow


class ImageTower(nn.Module):
    """An image tower and its pooling: normalized images (B, 3, H, W) to features (B, D), or (B, T, D) of patches."""

    def __init__(self, model: nn.Module, family: Family, pooling: Pooling, prefix: int) -> None:
        super().__init__()
        self.model, self.family, self.pooling, self.prefix = model, family, pooling, prefix
        self.arguments: dict[str, Any] = {}

    def forward(self, images: Tensor) -> Tensor:
        """Features of images."""
        layers = self.pooling.layers
        output = self.model(pixel_values=images, output_hidden_states=bool(layers), **self._noise(images))
        if self.pooling.tokens == "pooler":
            pooled: Tensor = output.pooler_output
            return pooled
        norm = self.model.get_submodule(self.family.norm)
        if layers:
            states = [norm(output.hidden_states[1 + layer]) for layer in layers]
        else:
            last = output.last_hidden_state
            states = [last if self.family.normed else norm(last)]
        return pool_tokens(states, self.pooling.tokens, self.prefix)

    def _noise(self, images: Tensor) -> dict[str, Any]:
        """ViTMAE masks patches by random numbers, also in eval mode: rising ones leave all of them in order."""
        if not self.family.masked:
            return self.arguments
        side: int = self.model.config.patch_size  # type: ignore[union-attr, assignment]
        number = (images.shape[2] // side) * (images.shape[3] // side)
        return {"noise": torch.arange(number, device=images.device).expand(len(images), -1), **self.arguments}


def describe(name: str, folder: Path | None = None) -> Mapping[str, Any]:
    """The fields of the `Backbone` of a model of transformers, by its own configuration; ``folder`` has its files."""
    files = folder if folder is not None and folder.is_dir() else _folder(name, _FILES)
    transformers, config = _transformers(), _config(name, files)
    if getattr(config, "auto_map", None):  # of the file
        raise UsageError(
            f"{name} needs code of its repository, which is not run", code="remote-code", where=files / "config.json",
            found="auto_map", expected="an architecture of transformers",
            fix="load it in a function of your own: --backbone module:function",
        )  # fmt: skip
    tower = _tower(config)
    sort = _TOWERS.get(config.model_type, config.model_type)
    if sort not in FAMILIES:
        raise UsageError(
            f"{name} is of an architecture that embcache does not know", code="unknown-architecture",
            found=config.model_type, expected=", ".join([*FAMILIES, *_TOWERS]),
            fix="load it in a function of your own: --backbone module:function",
        )  # fmt: skip
    family, prepared = FAMILIES[sort], _prepared(name, transformers, files)
    with _refused(name, files), torch.device("meta"):
        counted = {key: value for key, value in tower.to_dict().items() if key in _COUNTED}
        digest = hashlib.sha256(canonical_json(counted).encode()).hexdigest()
        network = transformers.AutoModel.from_config(tower, **dict(family.arguments))
        parameters = sum(parameter.numel() for parameter in network.parameters())
        dim, patch = Pooling(family.pooling).width(tower.hidden_size), range(1, MOST_SIDE)[int(tower.patch_size) - 1]
        size = prepared["transform"].size if prepared["transform"] else (int(tower.image_size),) * 2
    return {
        "name": canonical_name(name),
        "network": f"transformers {sort} {digest[:16]}",
        "dim": dim,
        "parameters": parameters,
        "source": canonical_name(name).removeprefix("hf:"),
        "patch": patch,
        "pooling": family.pooling,
        **prepared,
        "input_size": size,
        "origin": str(folder) if folder is not None else name.removeprefix("hf:"),
    }


def repool(spec: Backbone, tokens: str | None, layers: str | None) -> Mapping[str, Any]:
    """The fields that change where a user names tokens or layers."""
    config, family = _tower(_config(spec.name, _folder(f"hf:{spec.origin}", _FILES))), _family(spec)
    offered = [family.pooling, "mean", "patches", *(("cls", "cls+mean") if family.class_token else ())]
    offered = list(dict.fromkeys([*offered, *["pooler"] * family.pooler]))
    return choose_pooling(spec, tokens or family.pooling, layers, offered, config.num_hidden_layers, config.hidden_size)


def load(spec: Backbone, files: Files, size: tuple[int, int]) -> tuple[nn.Module, str, str, str]:
    """The image tower with its weights, the digest of its tensors, and where it came from."""
    folder = _folder(f"hf:{files.given or spec.origin}", (*_FILES, *_WEIGHTS), files.allow_download)
    if not any(folder.glob("*.safetensors")):
        raise WeightsError(
            f"{spec.name} has no safetensors", code="weights-not-safetensors", where=folder,
            found=", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "an empty folder",
            expected="model.safetensors", fix="convert it: model.save_pretrained(FOLDER) writes safetensors",
        )  # fmt: skip
    transformers, family = _transformers(), _family(spec)
    with _refused(spec.name, folder):
        model, found = transformers.AutoModel.from_pretrained(
            folder, config=_config(spec.name, folder), use_safetensors=True, dtype=torch.float32,
            output_loading_info=True, **_OURS, **dict(family.arguments),
        )  # fmt: skip
    tower = getattr(model, "vision_model", model)  # of a model of images and texts
    prefix = "vision_model." if tower is not model else ""
    absent = sorted(key for key in (*found["missing_keys"], *found["mismatched_keys"]) if str(key).startswith(prefix))
    if absent:
        raise WeightsError(
            f"the weights of {spec.name} do not fit its network", code="weights-mismatch", where=folder,
            found=f"{len(absent)} tensors are not in the file: {', '.join(map(str, absent[:3]))}",
            expected="every tensor of the image tower",
        )  # fmt: skip
    module = _pooled(spec, tower, size)
    origin = folder.name if files.given or not is_repository(spec.origin) else f"{spec.origin} ({folder.name})"
    return module, hash_state(tower), origin, ""


def build(spec: Backbone, size: tuple[int, int]) -> nn.Module:
    """The image tower for images of this height and width, by its configuration, its weights still to be filled."""
    config = _tower(_config(spec.name, _folder(f"hf:{spec.origin}", _FILES)))
    with _refused(spec.name), torch.random.fork_rng(devices=[]):
        tower = _transformers().AutoModel.from_config(config, dtype=torch.float32, **dict(_family(spec).arguments))
    return _pooled(spec, tower, size)


def _pooled(spec: Backbone, tower: Any, size: tuple[int, int]) -> ImageTower:
    """An image tower with the pooling of a backbone, for images of a height and width."""
    family = _family(spec)
    if family.masked:
        tower.config.mask_ratio = 0.0  # every patch, in the order that `ImageTower` sees to
    registers = getattr(tower.config, "num_register_tokens", 0)
    module = ImageTower(tower, family, Pooling.parse(spec.pooling), registers + family.class_token)
    if not family.interpolates and size != (tower.config.image_size,) * 2:
        module.arguments = {"interpolate_pos_encoding": True}
    try_size(spec, module, size)
    return module


def _prepared(name: str, transformers: Any, folder: Path) -> Mapping[str, Any]:
    """Normalization and filter of a model, and the transform of its processor's file if it is one of embcache's."""
    if not any((folder / file).is_file() for file in _FILES[1:]):
        return {"transform": None}
    with _refused(name, folder):
        processor = transformers.AutoImageProcessor.from_pretrained(folder, **_OURS)
        size, crop = dict(processor.size or {}), dict(getattr(processor, "crop_size", None) or {})
        pair = (size.get("height"), size.get("width"))
        resize = pair if None not in pair else size.get("shortest_edge")
        cropped = (crop.get("height"), crop.get("width")) if getattr(processor, "do_center_crop", None) else None
        final = cropped or (resize if isinstance(resize, tuple) else None)
        # ((x · f) − mean) / std of pixels x is ((x / 255) − mean / s) / (std / s) with s = 255 · f.
        scale = 255 * (processor.rescale_factor if processor.do_rescale else 1)
        means, stds = (processor.image_mean, processor.image_std) if processor.do_normalize else ((0,) * 3, (1,) * 3)
        mean, std = (tuple(float(value) / scale for value in values) for values in (means, stds))
        if len(mean) != 3 or not (np.isfinite([*mean, *std]).all() and min(std) > 0):
            raise ValueError(f"image_mean {means}, image_std {stds}")
        shown = {"mean": mean, "std": std, "interpolation": _FILTERS[int(processor.resample)]}
        if not processor.do_resize or resize is None or final is None or getattr(processor, "do_pad", None):
            return {**shown, "transform": None}
        settled = {"kind": "model", "resize": resize, "crop": cropped, "size": final, **shown}
        return {**shown, "transform": Transform.from_dict(settled)}


def _folder(name: str, patterns: tuple[str, ...], allow_download: bool = True) -> Path:
    """The folder of a model's files: the one named, that in the weights folder, or the hub's, fetched if need be."""
    text = name.removeprefix("hf:")
    if (found := find_model(text)) is not None and found.is_dir():
        return found
    if not is_repository(text) or found is not None:
        raise WeightsError(
            f"the model {name} is not here", code="weights-not-found",
            found="a file" if found is not None else "no folder with a config.json",
            where=Path(text), expected="hf:ORG/NAME, hf:FOLDER, or a folder in the weights folder",
            fix=f"--weights {name}=FOLDER",
        )  # fmt: skip
    repository, _, revision = text.partition("@")
    unavailable = not_fetched(name, text, "name its folder: hf:FOLDER")
    with reaching_hub(name, text, "config.json", unavailable):
        try:
            fetched = huggingface_hub.snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=list(patterns),
                local_files_only=not allow_download,
            )
        except LocalEntryNotFoundError as error:
            raise unavailable(str(error).partition("\n")[0]) from error
    return Path(fetched)


def _config(name: str, folder: Path) -> Any:
    with _refused(name, folder):
        config = _transformers().AutoConfig.from_pretrained(folder, **_OURS)
        # A file can name an attention that transformers would fetch as code from the hub.
        config._attn_implementation = "sdpa"
        config.return_dict = _tower(config).return_dict = True
        return config


def _tower(config: Any) -> Any:
    """The configuration of the image tower, of a model of images and texts too."""
    return getattr(config, "vision_config", config)


def _family(spec: Backbone) -> Family:
    return FAMILIES[spec.network.split()[1]]


def _transformers() -> Any:
    transformers = need("transformers", "hf", "hf")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


def _refused(name: str, folder: Path | None = None) -> AbstractContextManager[None]:
    """What transformers refuses as one message."""
    files = "config.json, preprocessor_config.json and model.safetensors of one of its architectures"
    return refusing("transformers", name, "transformers-refuses", files, folder)
