"""Image towers of open_clip: ``open_clip:MODEL/PRETRAINED``, ``open_clip:hf-hub:ORG/NAME`` and ``open_clip:FOLDER``.

open_clip only builds the towers, next to a text tower of one layer that is dropped: no tokenizer and no text model is
needed. Weights are fetched here and read like every other checkpoint. A feature is what ``encode_image`` gives: the
pooled image after its projection to the space that images share with texts. A recipe holds digests of the tower's
tensors and of its configuration, not where they came from.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from embcache.backbones.checkpoints import find_network, hash_tensors, load_strictly, read_checkpoint
from embcache.backbones.hub import canonical_name, fetch_file, not_fetched
from embcache.backbones.pooling import Pooling, choose_pooling, features_of, pool_tokens, try_size, vector_length
from embcache.backbones.timm_models import TokenPooling, choose_tokens, fit_size, patch_of
from embcache.backbones.transforms import Transform
from embcache.backbones.weights import Files, Published, find_model, find_weights, need, refusing, timm_filename
from embcache.errors import UsageError, WeightsError, first_few
from embcache.paths import weights_dir
from embcache.sealed import canonical_json

if TYPE_CHECKING:
    from embcache.backbones.catalog import Backbone

_CONFIG = "open_clip_config.json"
_PICKLED = "open_clip_pytorch_model.bin"  # of a repository that names no other file
_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", _PICKLED)  # of a folder, best first
_TEXT = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}
# Of a configuration: what changes the training of a tower and not its features, or would make timm fetch weights.
_TRAINING = {
    "patch_dropout": 0.0, "timm_drop": 0.0, "timm_drop_path": None, "timm_model_pretrained": False,
    "output_tokens": False,
}  # fmt: skip


@dataclass(frozen=True)
class Design:
    """What a model's configuration says of its image tower."""

    embed_dim: int
    vision: Mapping[str, Any]  # as open_clip's CLIPVisionCfg, only what differs from its defaults
    quick_gelu: bool
    preprocess: Mapping[str, Any]
    fetch: Callable[[], Path]  # the file of its weights

    @property
    def trunk(self) -> str:
        """Timm's name of the tower, if it is one of timm."""
        return str(self.vision.get("timm_model_name") or "")

    @property
    def kind(self) -> str:
        """Timm's name of the tower, or that of its class."""
        if self.trunk:
            return self.trunk
        return "ModifiedResNet" if isinstance(self.vision.get("layers"), list | tuple) else "VisionTransformer"

    @property
    def network(self) -> str:
        """Name of the architecture: what decides a feature, given the tensors."""
        used = self.quick_gelu and self.kind == "VisionTransformer"  # the other towers have their own activation
        known = {"embed_dim": self.embed_dim, "quick_gelu": used, **self.vision}
        return f"open_clip {self.kind} {hashlib.sha256(canonical_json(known).encode()).hexdigest()[:16]}"

    def tower(self, size: tuple[int, int] | None = None) -> Any:
        """The image tower, for images of its own or, if it is a vision transformer, of another height and width."""
        vision = {**self.vision, **_TRAINING}
        if size is not None and self.kind == "VisionTransformer":
            vision["image_size"] = size
        with torch.random.fork_rng(devices=[]):
            return _open_clip().CLIP(self.embed_dim, vision, dict(_TEXT), quick_gelu=self.quick_gelu).visual

    def skeleton(self) -> Any:
        """The tower without its memory, on the meta device, if that works."""
        with contextlib.suppress(RuntimeError, NotImplementedError), torch.device("meta"):
            return self.tower()
        return self.tower()


class BlockTokens(nn.Module):
    """open_clip's own vision transformer with tokens that are pooled here: (B, 3, H, W) to (B, D), or (B, T, D)."""

    def __init__(self, visual: nn.Module, pooling: Pooling) -> None:
        super().__init__()
        self.visual: Any = visual
        self.pooling = pooling

    def forward(self, images: Tensor) -> Tensor:
        """Features of images; every layer passes the final norm."""
        found = self.visual.forward_intermediates(
            images, indices=list(self.pooling.layers) or 1, normalize_intermediates=True, intermediates_only=True,
            output_fmt="NLC", output_extra_tokens=True,
        )  # fmt: skip
        parts = zip(found["image_intermediates_prefix"], found["image_intermediates"], strict=True)
        return pool_tokens([torch.cat(pair, dim=1) for pair in parts], self.pooling.tokens, 1)


class TrunkPooler(nn.Module):
    """A tower of timm without its projection: (B, 3, H, W) to (B, D)."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk: Any = trunk

    def forward(self, images: Tensor) -> Tensor:
        """Features of images, as timm pools them."""
        pooled: Tensor = self.trunk.forward_head(self.trunk.forward_features(images), pre_logits=True)
        return pooled


def describe(name: str, folder: Path | None = None) -> Mapping[str, Any]:
    """The fields of the `Backbone` of an image tower, by its configuration; ``folder`` has its files."""
    named = folder is not None and folder.expanduser().is_dir()
    text = str(folder) if named else name.removeprefix("open_clip:")
    design = _design(name, text)
    with _refused(name):
        tower = design.skeleton()
        side = tower.image_size
        size = (side, side) if isinstance(side, int) else (int(side[0]), int(side[1]))
        dim = vector_length(name, tower, size, "load it in a function of your own: --backbone module:function")
    patch = patch_of(tower.trunk) if design.trunk else 1
    canonical = canonical_name(name)
    model, _, tag = canonical.removeprefix("open_clip:").rpartition("/")
    if _known(model):
        canonical = f"open_clip:{_model_name(model)}/{tag.lower().replace('-', '_')}"  # as open_clip reads it
    elsewhere = find_model(text) is None  # not in a folder with weights
    return {
        "name": canonical,
        "network": design.network,
        "dim": dim,
        "parameters": sum(parameter.numel() for parameter in tower.parameters()),
        "source": canonical.removeprefix("open_clip:"),
        "patch": max(tower.patch_size) if design.kind == "VisionTransformer" else patch,
        "pooling": "projected",
        "input_size": size,
        **_prepared(name, design, size),
        "weights": Published(filename=timm_filename(canonical.removeprefix("open_clip:")) if elsewhere else ""),
        "origin": text,
    }


def repool(spec: Backbone, tokens: str | None, layers: str | None) -> Mapping[str, Any]:
    """The fields that change where a user names tokens or layers."""
    design = _design(spec.name, spec.origin)
    with _refused(spec.name):
        tower = design.skeleton()
    if design.trunk and (layers is not None or tokens not in ("projected", "pooler")):
        return choose_tokens(spec, tower.trunk, tokens, layers)
    depth, offered = 0, ["projected"]
    if design.trunk:
        offered += ["pooler"] if design.vision.get("timm_pool") not in ("abs_attn", "rot_attn") else []
    elif design.kind == "VisionTransformer":
        depth = len(tower.transformer.resblocks)
        # The final norm of a tower that pools by attention is for what attention gives.
        offered += ["pooler", *(("cls", "mean", "cls+mean", "patches") if tower.attn_pool is None else ())]
    chosen = choose_pooling(spec, tokens or "cls", layers, offered, depth, 1)
    with _refused(spec.name):
        module = _pooled(design, tower, Pooling.parse(chosen["pooling"]))
        return {**chosen, "dim": features_of(module, spec.input_size).shape[-1]}


def load(spec: Backbone, files: Files, size: tuple[int, int]) -> tuple[nn.Module, str, str, str]:
    """The image tower with its weights, the digest of its tensors, and where it came from."""
    folder = files.given if files.given and files.given.is_dir() else None
    design = _design(spec.name, str(folder or spec.origin))
    path = files.given if folder is None else None
    path = path or find_weights(spec.weights, weights_dir(files.home))
    if path is None:
        if not files.allow_download and find_model(spec.origin, files.home) is None:
            unavailable = not_fetched(spec.name, spec.origin, "name its folder: open_clip:FOLDER")
            raise unavailable("downloads are not allowed here")
        path = design.fetch()
    checkpoint = read_checkpoint(path, given=files.given is not None)
    with _refused(spec.name):
        tower = design.tower(size)
    found = find_network(_of_images(checkpoint.state), tower.state_dict(), where=path)
    positions = {key: value.float() for key, value in found.state.items() if key == "positional_embedding"}
    with _refused(spec.name):  # as open_clip's resize_pos_embed
        fitted = {
            key: resample_abs_pos_embed(value[None], list(tower.grid_size))[0] for key, value in positions.items()
        }
    load_strictly(tower, {**found.state, **fitted}, where=path)
    digest = hash_tensors({**tower.state_dict(), **positions})  # the same for images of every size
    return _fitted(spec, design, tower, size), digest, path.name, found.describe(path) if files.given else ""


def build(spec: Backbone, size: tuple[int, int]) -> nn.Module:
    """The image tower for images of this height and width, its weights still to be filled."""
    design = _design(spec.name, spec.origin)
    return _fitted(spec, design, design.tower(size), size)


def _of_images(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors of the image tower, without ``visual.`` in their names; all tensors of a file that has none."""
    parts = {key: f".{key}".partition(".visual.") for key in state}
    return {(a + "." * bool(a) + c).removeprefix("."): state[key] for key, (a, dot, c) in parts.items() if dot} or state


def _fitted(spec: Backbone, design: Design, tower: Any, size: tuple[int, int]) -> nn.Module:
    """A tower with the pooling of a backbone, for images of a height and width."""
    module = _pooled(design, tower, Pooling.parse(spec.pooling))
    resized = bool(design.trunk) and size != spec.input_size
    try_size(spec, module, size, lambda: fit_size(tower.trunk, size) if resized else None)
    return module


def _pooled(design: Design, tower: Any, pooling: Pooling) -> nn.Module:
    trunk = tower.trunk if design.trunk else None
    if pooling.tokens not in ("projected", "pooler"):
        return BlockTokens(tower, pooling) if trunk is None else TokenPooling(trunk, pooling)
    if pooling.tokens == "pooler" and trunk is not None:
        return TrunkPooler(trunk)
    if pooling.tokens == "pooler":
        tower.proj = None
    module: nn.Module = tower
    return module


def _prepared(name: str, design: Design, size: tuple[int, int]) -> Mapping[str, Any]:
    """Normalization and filter of a model, and open_clip's transform for evaluation if it is one of embcache's."""
    transforms = need("open_clip.transform", "open_clip", "clip")
    with _refused(name):
        own = asdict(transforms.PreprocessCfg(**transforms.merge_preprocess_dict({}, dict(design.preprocess))))
        shorter, squash = (own["resize_mode"] == mode for mode in ("shortest", "squash"))
        transform = Transform.from_dict({
            "kind": "model", "resize": size[0] if shorter else size, "crop": size if shorter else None, "size": size,
            "interpolation": "bilinear" if own["interpolation"] == "bilinear" else "bicubic",  # as open_clip reads it
            "mean": _of_channels(own["mean"]), "std": _of_channels(own["std"]),
        })  # fmt: skip
    # Images are not padded here, and not cropped to another shape than that of a square.
    return {**transform.shown(), "transform": transform if squash or (shorter and size[0] == size[1]) else None}


def _of_channels(value: Any) -> list[float]:
    return [float(each) for each in (value if isinstance(value, list | tuple) else [value] * 3)]


def _design(name: str, text: str) -> Design:
    """What is known of a model: of the folder of this path, of a repository of the hub, or in open_clip's tables."""
    if (folder := find_model(text)) is not None and folder.is_dir():
        return _read(name, folder / _CONFIG, lambda: _in_folder(name, folder))
    if text.startswith("hf-hub:"):
        repository = text.removeprefix("hf-hub:")
        unavailable = not_fetched(name, repository, "name its folder: open_clip:FOLDER")
        config = fetch_file(name, repository, [_CONFIG], unavailable)
        return _read(name, config, lambda: fetch_file(name, repository, _candidates(_PICKLED), unavailable))
    model, _, tag = text.rpartition("/")
    open_clip, known = _open_clip(), _known(model)
    row = open_clip.get_pretrained_cfg(_model_name(model), tag)
    if not known or not row:
        tags = open_clip.list_pretrained_tags_by_model(_model_name(model if known else text))
        near = difflib.get_close_matches(model or text, open_clip.list_models(), n=3, cutoff=0.4)
        meant = f" (did you mean {' or '.join(near)}?)" if near and not tags else ""
        raise UsageError(
            f"open_clip has no pretrained model {text!r}, and there is no such folder", code="unknown-backbone",
            found=name + meant, where=weights_dir() / text,
            expected=f"one of {first_few(tags, 8)}" if tags else f"MODEL/PRETRAINED, or a folder with {_CONFIG}",
            fix=(f"--weights {name}=FOLDER", 'python -c "import open_clip; print(open_clip.list_pretrained())"'),
        )  # fmt: skip
    # open_clip only warns where a name without -quickgelu goes with weights that were trained with it.
    quick_gelu = known.get("quick_gelu", False) or row.get("quick_gelu", False)
    repository, _, file = row["hf_hub"].rpartition("/")
    unavailable = not_fetched(name, repository, f"name its file: --weights {name}=FILE")
    fetch = functools.partial(fetch_file, name, repository, _candidates(file or _PICKLED), unavailable)
    return _make(name, {**known, "quick_gelu": quick_gelu}, row, fetch)


def _read(name: str, path: Path, fetch: Callable[[], Path]) -> Design:
    """What a file of open_clip's ``push_to_hf_hub`` says."""
    with _refused(name):
        config = json.loads(path.read_text("utf-8"))
        return _make(name, config["model_cfg"], config.get("preprocess_cfg") or {}, fetch)


def _make(name: str, config: Mapping[str, Any], preprocess: Mapping[str, Any], fetch: Callable[[], Path]) -> Design:
    with _refused(name):
        kind = _open_clip().CLIPVisionCfg
        given, defaults = asdict(kind(**config["vision_cfg"])), asdict(kind())
        vision = {key: v for key, v in given.items() if v != defaults[key] and key not in _TRAINING}
        if (trunk := vision.get("timm_model_name")) and not timm.is_model(trunk):
            raise ValueError(f"timm has no model {trunk!r}")
        return Design(int(config["embed_dim"]), vision, bool(config.get("quick_gelu", False)), preprocess, fetch)


def _candidates(file: str) -> Sequence[str]:
    """Names of the weights in a repository, best first, as open_clip looks for them (``_get_safe_alternatives``)."""
    stem, _, suffix = file.rpartition(".")
    return (_FILES[0] if file == _PICKLED else f"{stem}.safetensors", file) if suffix in ("bin", "pth") else (file,)


def _in_folder(name: str, folder: Path) -> Path:
    for file in _FILES:
        if (folder / file).is_file():
            return folder / file
    raise WeightsError(
        f"{name} has no weights", code="weights-not-found", where=folder, expected=" or ".join(_FILES),
        found=", ".join(sorted(path.name for path in folder.iterdir())[:5]), fix=f"--weights {name}=FILE",
    )  # fmt: skip


def _known(model: str) -> dict[str, Any]:
    """The configuration of open_clip's own table, or nothing."""
    return _open_clip().get_model_config(_model_name(model)) or {} if model and ":" not in model else {}


def _model_name(text: str) -> str:
    return text.replace("/", "-")  # as open_clip reads ViT-B/32


def _open_clip() -> Any:
    return need("open_clip", "open_clip", "clip")


def _refused(name: str) -> AbstractContextManager[None]:
    """What open_clip refuses as one message."""
    expected = f"{_CONFIG} with model_cfg and preprocess_cfg, as open_clip.push_to_hf_hub writes it"
    return refusing("open_clip", name, "open-clip-refuses", expected)
