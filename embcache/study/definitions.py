"""The paper's tables and figures, one row of data each."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from embcache.errors import UsageError
from embcache.probe.heads import find_head
from embcache.probe.inputs import PAPER_SET
from embcache.results.grid import Grid, Model
from embcache.results.paper import PAPER_NAMES

DATASETS = ("patchcam", "aptos", "pneumonia", "nih")

LINEAR = tuple(
    Model(label, "probe", "linear", (name,), paper=name)
    for name, label in PAPER_NAMES.items()
    if not name.startswith("dvme")
)
FINETUNED = tuple(replace(model, kind="finetune") for model in LINEAR)
DVME, _NO_ATTENTION = (
    Model(PAPER_NAMES[head], "probe", head, PAPER_SET, paper=head) for head in ("dvme", "dvme-noattn")
)
ABLATION = (_NO_ATTENTION, DVME)
# Section 6.2: "we select the self-supervised initialization … that leads to the best linear evaluation performance".
_SELF_SUPERVISED = LINEAR[2:]
BEST = (
    Model("Best single baseline (by test score)", "probe", "linear", (), "best", among=_SELF_SUPERVISED, by="test"),
    Model("Best single baseline (by validation)", "probe", "linear", (), among=_SELF_SUPERVISED, by="validation"),
)

_SIZES = {
    "patchcam": ("50", "100", "200", "S", "1000", "2000", "M", "10000", "20000", "F"),
    "aptos": ("S", "100", "200", "M", "F"),
    "pneumonia": ("S", "100", "200", "M", "F"),
    "nih": ("S", "50", "100", "150", "M", "F"),
}


def _summary(name: str, title: str, models: Sequence[Model]) -> Grid:
    return Grid(name, title, DATASETS, tuple(models), ("S", "M", "F"), "subsets")


def _detail(letter: str, first: int, what: str, models: Sequence[Model]) -> list[Grid]:
    return [
        Grid(f"{letter}{number}", f"{what} on {dataset}", (dataset,), tuple(models), _SIZES[dataset], "models")
        for number, dataset in enumerate(DATASETS, first)
    ]


GRIDS: Mapping[str, Grid] = {
    grid.name: grid
    for grid in (
        _summary("table2", "Linear evaluation: random, supervised and self-supervised initialisations", LINEAR),
        _summary("table3", "Finetuning: random, supervised and self-supervised initialisations", FINETUNED),
        _summary("table4", "Dynamic Visual Meta-Embedding and the best single backbone", (DVME, *BEST)),
        *_detail("B", 1, "Linear evaluation", LINEAR),
        *_detail("B", 5, "Finetuning", FINETUNED),
        *_detail("C", 1, "DVME with and without self-attention", ABLATION),
    )
}


@dataclass(frozen=True)
class Figure:
    """One of the paper's figures."""

    name: str
    title: str
    kind: str
    datasets: tuple[str, ...]
    backbones: tuple[str, ...] = ("supervised", "dino")  # shown alone
    fused: tuple[str, ...] = PAPER_SET  # shown as DVME fuses them
    subset: str = "F"  # DVME is trained on; choice where the paper does not say: F


_TSNE = "t-SNE of the test images"
FIGURES: Mapping[str, Figure] = {
    figure.name: figure
    for figure in (
        Figure("fig2", _TSNE, "maps", ("patchcam", "aptos")),
        Figure("D1", _TSNE, "maps", ("pneumonia",)),
        Figure("D2", _TSNE, "maps", ("nih",)),
        Figure("F1", "DVME's self-attention, mean over the test images", "attention", DATASETS, ()),
    )
}

COUNTS = {
    "table1": "Number of images of the subsets and the test set",
    "G1": "Number of trainable parameters, five classes",
}
"""The tables that need no training."""

NAMES = ("table1", *GRIDS, "G1", *FIGURES)
"""All that ``embcache run`` knows by name."""


def find_name(name: str) -> str:
    """The canonical spelling of a table's or figure's name."""
    known = {known.lower(): known for known in NAMES}
    if name.lower() in known:
        return known[name.lower()]
    near = [known[match] for match in difflib.get_close_matches(name.lower(), known, n=3)]
    raise UsageError(
        f"there is no table or figure {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""),
        expected=", ".join(NAMES) + ", or a TOML file",
        fix="embcache run table2, or embcache run FILE.toml",
    )


def narrow(
    grid: Grid,
    *,
    datasets: Sequence[str] = (),
    backbones: Sequence[str] = (),
    subsets: Sequence[str] = (),
    heads: Sequence[str] = (),
) -> Grid:
    """A table with other datasets, backbones, subsets or heads than its own; what is empty stays.

    Models that are the paper's keep its label and its numbers; the others are named after what they are made of.
    """
    if datasets and len(grid.datasets) == 1 and grid.name in GRIDS:
        other = next((name for name in datasets if name in DATASETS and name not in grid.datasets), None)
        if other is not None:
            sister = next(
                g.name for g in GRIDS.values() if g.datasets == (other,) and g.models == GRIDS[grid.name].models
            )
            raise UsageError(
                f"{grid.name} is of {grid.datasets[0]}", found=f"--dataset {other}", fix=f"embcache run {sister}"
            )
    models = grid.models
    if backbones or heads:
        models = tuple(_narrow_models(grid.models, tuple(backbones), tuple(heads)))
    return replace(
        grid,
        datasets=tuple(datasets) or grid.datasets,
        models=models,
        subsets=tuple(dict.fromkeys(subset.upper() for subset in subsets)) or grid.subsets,
    )


def _narrow_models(models: Sequence[Model], backbones: tuple[str, ...], asked: tuple[str, ...]) -> list[Model]:
    """The models of a table over other backbones or heads, in the table's order of kinds and heads."""
    chosen: dict[Model, None] = {}
    if asked:
        own = tuple(dict.fromkeys(name for model in models for name in (*model.backbones, *_names_among(model))))
        for kind in dict.fromkeys(model.kind for model in models):
            for head in asked:
                chosen |= dict.fromkeys(make_models(kind, head, backbones or own))
    else:
        for model in models:
            if model.among:
                among = tuple(_narrow_models(model.among, backbones, ()))
                same = set(among) == set(model.among)
                chosen[replace(model, among=among, paper=model.paper if same else "")] = None
            else:
                chosen |= dict.fromkeys(make_models(model.kind, model.head, backbones, model.seed))
    return [known_model(model, models) for model in chosen]


def _names_among(model: Model) -> tuple[str, ...]:
    return tuple(name for other in model.among for name in other.backbones)


def known_model(model: Model, models: Sequence[Model]) -> Model:
    """The one of ``models`` that is the same but for its label and the paper's name for it, else ``model`` itself."""
    if model.among:
        return model
    same = (m for m in models if (m.kind, m.head, m.backbones, m.seed) == (*_key(model),))
    return next(same, model)


def _key(model: Model) -> tuple[str, str, tuple[str, ...], int | None]:
    return model.kind, model.head, model.backbones, model.seed


def make_models(kind: str, head: str, backbones: Sequence[str], seed: int | None = None) -> list[Model]:
    """One model over all backbones for a head that fuses, else one for each; labelled by what they are made of."""
    fuses = find_head(head).fuses
    sets = [tuple(backbones)] if fuses else [(name,) for name in backbones]
    if fuses and len(backbones) < 2:
        raise UsageError(
            f"head {head!r} fuses backbones", expected="two or more", found=", ".join(backbones) or "none",
            fix="--backbone " + ",".join([*backbones, "…"]),
        )  # fmt: skip
    return [Model(_label(kind, head, names, seed), kind, head, names, seed=seed) for names in sets]


def _label(kind: str, head: str, names: Sequence[str], seed: int | None) -> str:
    words = [" + ".join(names)]
    words += [head] if head != "linear" else []
    words += ["finetuned"] if kind == "finetune" else []
    words += [f"seed {seed}"] if seed is not None else []
    return ", ".join(words)
