"""What a study holds: the paper's tables and figures as rows of data, and your own grids as TOML files.

The keys of a file are the fields of `StudyConfig` and `DatasetRef`; ``docs/tables.md`` has an example.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from embcache.config import DatasetRef, StudyConfig
from embcache.errors import UsageError
from embcache.fields import check_keys
from embcache.io import read_regular
from embcache.probe.heads import heads as known_heads
from embcache.probe.inputs import PAPER_SET
from embcache.results.paper import PAPER_NAMES, Grid, Model
from embcache.sealed import check_depth

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


_INITIALIZATIONS = "random, supervised and self-supervised initializations"
_SUMMARIES = {
    "table2": (f"Linear evaluation: {_INITIALIZATIONS}", LINEAR),
    "table3": (f"Finetuning: {_INITIALIZATIONS}", FINETUNED),
    "table4": ("Dynamic Visual Meta-Embedding and the best single backbone", (DVME, *BEST)),
}
_DETAILS = (
    ("B", 1, "Linear evaluation", LINEAR),
    ("B", 5, "Finetuning", FINETUNED),
    ("C", 1, "DVME with and without self-attention", ABLATION),
)
GRIDS: Mapping[str, Grid] = {
    name: Grid(name, title, DATASETS, models, ("S", "M", "F"), "subsets")
    for name, (title, models) in _SUMMARIES.items()
} | {
    f"{letter}{n}": Grid(f"{letter}{n}", f"{what} on {dataset}", (dataset,), models, _SIZES[dataset], "models")
    for letter, first, what, models in _DETAILS
    for n, dataset in enumerate(DATASETS, first)
}


_TSNE = "t-SNE of the test images"
_ALONE = ("supervised", "dino")  # backbones that maps show alone


def _figure(
    name: str, title: str, datasets: Sequence[str], alone: Sequence[str], fused: Sequence[str], subset: str = "F"
) -> Grid:
    """What a figure needs, as a grid: features of single backbones, and DVME, by choice trained on F."""
    models = [Model(PAPER_NAMES.get(backbone, backbone), "features", "", (backbone,)) for backbone in alone]
    if fused:
        models.append(Model(PAPER_NAMES["dvme"], "probe", "dvme", tuple(fused)))
    return Grid(name, title, tuple(datasets), tuple(models), (subset,), "models", leaderboard=False)


FIGURES: Mapping[str, Grid] = {
    figure.name: figure
    for figure in (
        _figure("fig2", _TSNE, ("patchcam", "aptos"), _ALONE, PAPER_SET),
        _figure("D1", _TSNE, ("pneumonia",), _ALONE, PAPER_SET),
        _figure("D2", _TSNE, ("nih",), _ALONE, PAPER_SET),
        _figure("F1", "DVME's self-attention, mean over the test images", DATASETS, (), PAPER_SET),
    )
}
"""Figures of maps show backbones alone and fused; F1 shows attention: it has no backbone alone."""

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
        f"unknown table or figure {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""),
        code="unknown-table", expected=", ".join(NAMES) + ", or a TOML file",
        fix="embcache run table2, or embcache run FILE.toml",
    )  # fmt: skip


def narrow(grid: Grid, config: StudyConfig) -> Grid:
    """A table with the datasets, backbones, subsets and heads of a config; what the config leaves empty stays.

    Models that are the paper's keep its label and its numbers; the others are named after what they are made of.
    """
    if config.datasets and len(grid.datasets) == 1 and grid.name in GRIDS:
        other = next((name for name in config.datasets if name in DATASETS and name not in grid.datasets), None)
        if other is not None:
            sister = next(
                g.name for g in GRIDS.values() if g.datasets == (other,) and g.models == GRIDS[grid.name].models
            )
            raise UsageError(
                f"{grid.name} is the table of {grid.datasets[0]}", code="table-of-another-dataset",
                found=f"--dataset {other}", fix=f"embcache run {sister}",
            )  # fmt: skip
    backbones, models = tuple(dict.fromkeys(name for names in config.backbones for name in names)), grid.models
    if backbones or config.heads:
        models = tuple(_narrow_models(grid.models, backbones, config.heads))
    datasets, subsets = config.datasets or grid.datasets, _subsets(config) or grid.subsets
    return replace(grid, datasets=datasets, models=models, subsets=subsets)


def narrow_figure(figure: Grid, config: StudyConfig) -> Grid:
    """A figure of other datasets, backbones (each alone, and all fused) or of DVME trained on another subset."""
    if len(config.subsets) > 1:
        raise UsageError(
            "a figure shows one subset", code="several-subsets", found=", ".join(map(str, config.subsets)),
            fix=f"--subset {config.subsets[0]}",
        )  # fmt: skip
    alone = [model.backbones[0] for model in figure.models if model.kind == "features"]
    fused = [name for model in figure.models if model.kind == "probe" for name in model.backbones]
    if config.backbones:
        names = [name for entry in config.backbones for name in entry]
        if len(names) == 1 and not alone:
            raise UsageError(
                f"{figure.name} shows how DVME fuses backbones", code="too-few-backbones", expected="two or more",
                found=names[0], fix=f"--backbone {names[0]},…",
            )  # fmt: skip
        alone, fused = (names if alone else []), (names if len(names) > 1 else [])
    subset = (*_subsets(config), *figure.subsets)[0]
    return _figure(figure.name, figure.title, config.datasets or figure.datasets, alone, fused, subset)


def _subsets(config: StudyConfig) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(subset).upper() for subset in config.subsets))


def _narrow_models(models: Sequence[Model], backbones: tuple[str, ...], heads: tuple[str, ...]) -> list[Model]:
    """The models of a table over other backbones or heads, in the table's order."""
    chosen: dict[Model, None] = {}
    if heads:
        own = dict.fromkeys(name for model in models for one in (model, *model.among) for name in one.backbones)
        for kind in dict.fromkeys(model.kind for model in models):
            for head in heads:
                chosen |= dict.fromkeys(make_models(kind, head, backbones or tuple(own)))
    else:
        for model in models:
            if model.among:
                among = tuple(_narrow_models(model.among, backbones, ()))
                same = set(among) == set(model.among)
                chosen[replace(model, among=among, paper=model.paper if same else "")] = None
            else:
                chosen |= dict.fromkeys(make_models(model.kind, model.head, backbones, model.seed))
    return [known_model(model, models) for model in chosen]


def known_model(model: Model, models: Sequence[Model]) -> Model:
    """The one of ``models`` that is the same but for its label and the paper's name for it, else ``model`` itself."""
    same = (m for m in models if replace(m, label="", paper="") == replace(model, label="", paper=""))
    return model if model.among else next(same, model)


def make_models(kind: str, head: str, backbones: Sequence[str], seed: int | None = None) -> list[Model]:
    """One model over all backbones for a head that fuses, else one for each; labeled by what they are made of."""
    fuses = known_heads.get(head).fuses
    if fuses and len(backbones) < 2:
        raise UsageError(
            f"head {head!r} fuses backbones", code="too-few-backbones", expected="two or more",
            found=", ".join(backbones) or "none", fix="--backbone " + ",".join([*backbones, "…"]),
        )  # fmt: skip
    sets = [tuple(backbones)] if fuses else [(name,) for name in backbones]
    extra = [head] * (head != "linear") + ["finetuned"] * (kind == "finetune")
    extra += [] if seed is None else [f"seed {seed}"]
    return [Model(", ".join([" + ".join(names), *extra]), kind, head, names, seed=seed) for names in sets]


_MOST_COLUMNS = 5  # models beside each other, as in the paper
_MOST_BYTES = 1 << 20
_REF_KEYS = [f.name for f in fields(DatasetRef)]
_KEYS = [*(f.name for f in fields(StudyConfig)), *_REF_KEYS]


def read_study(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of a `StudyConfig` and of a `DatasetRef` that a TOML file sets; else a `UsageError` says why not."""

    def wrong(problem: str, code: str, **fields: Any) -> UsageError:
        return UsageError(problem, code=code, where=path, **fields)

    try:
        content = tomllib.loads(read_regular(path, most=_MOST_BYTES, follow=True).decode("utf-8"))
        check_depth(content)
    except OSError as error:
        raise wrong(f"the study's file cannot be read: {error.strerror}", "study-not-readable") from error
    except (ValueError, RecursionError) as error:  # of TOML, of UTF-8, of a number with thousands of digits
        raise wrong("the study's file is not TOML", "study-not-toml", found=str(error)[:300]) from error
    check_keys(content, _KEYS, str(path))
    for key, value in content.items():
        if value == [] or "\\u0000" in json.dumps(value, default=str):
            raise wrong(f"{key!r} is empty, or holds a null character", "study-value", found=repr(value))
    if absent := [key for key in ("datasets", "backbones") if not content.get(key)]:
        expected = f'{absent[0]} = ["NAME", …]'
        raise wrong(f"the study names no {absent[0]}", "study-incomplete", expected=expected)
    ref = {key: content.pop(key) for key in _REF_KEYS if key in content}
    try:
        StudyConfig.make(None, content)
        DatasetRef.make(None, ref)
    except UsageError as error:
        raise wrong(error.problem, error.code, expected=error.expected, found=error.found) from error
    return content, ref


def own_grid(path: Path, config: StudyConfig) -> Grid:
    """The grid that a TOML file's config makes: datasets × backbones × heads × subsets × seeds."""
    fused = [names for names in config.backbones if len(names) > 1]
    singles = list(dict.fromkeys(name for names in config.backbones for name in names))
    models: dict[Model, None] = {}
    for kind in config.kind or ("probe",):
        for head in config.heads or ("linear",):
            for names in fused if known_heads.get(head).fuses and fused else [singles]:
                for seed in config.seeds or (None,):
                    made = make_models(kind, head, names, seed)
                    models |= dict.fromkeys(known_model(model, LINEAR) for model in made)
    return Grid(
        path.stem, config.title or f"Study of {path.name}", config.datasets, tuple(models),
        _subsets(config) or ("S", "M", "F"),
        "models" if len(config.datasets) == 1 and len(models) <= _MOST_COLUMNS else "subsets",
    )  # fmt: skip
