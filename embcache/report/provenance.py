"""How everything on the page was made: recipes, runs, versions, and the commands that make it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from embcache.data.classes import class_flags
from embcache.probe.schedule import Schedule, rates_of
from embcache.report.collect import Part
from embcache.results.layout import Table, signed
from embcache.runs.folders import Result


def recipe_rows(part: Part) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Every recipe of the results' features: backbone, fingerprint, and its fields in words."""
    found: dict[tuple[str, str], Mapping[str, Any]] = {}
    for result in part.results:
        for name, fingerprint in _recipes(result).items():
            found.setdefault((name, fingerprint), result.recipes.get(name, {}))
    return [(name, fingerprint, _fields(recipe)) for (name, fingerprint), recipe in sorted(found.items())]


def _recipes(result: Result) -> dict[str, str]:
    pairs = result.request.get("recipes", [])
    return {str(name): str(fingerprint) for name, fingerprint in pairs} if isinstance(pairs, list) else {}


def _fields(recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name, value in recipe.items():
        several = value.items() if isinstance(value, Mapping) else [("", value)]
        rows += [(f"{name}: {key}" if key else name, _plain(inner)) for key, inner in several if inner is not None]
    return rows


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def run_table(part: Part) -> Table:
    """One row per run, scored or not."""
    headers = (
        "run", "trained", "backbones", "head", "subset", "seed", "folds", "validation labels", "labels used",
        "test images", "validation", "test", "learning rate", "epochs kept", "seconds",
    )  # fmt: skip
    rows = tuple(
        (
            r.id, r.kind, " + ".join(r.backbones), r.head, f"{r.subset} ({r.n_train:,})",
            str(r.request.get("seed", "")), str(len(r.folds)),
            f"{r.n_val:,} ({r.request.get('val', '–')})", f"{r.labels_used:,}", f"{r.n_test:,} ({r.test_set})",
            "–" if r.val_mean is None else signed(r.val_mean, 4),
            "not scored" if r.mean is None else signed(r.mean, 4) + ("" if r.std is None else f" ± {r.std:.4f}"),
            ", ".join(dict.fromkeys("–" if f.lr is None else f"{f.lr:g}" for f in r.folds)),
            ", ".join(str(f.best_epoch) for f in r.folds), f"{r.seconds:,.0f}",
        )
        for r in part.results
    )  # fmt: skip
    return Table("runs", "Runs", headers, rows)


def version_table(parts: Sequence[Part]) -> Table:
    """Every library that computed a result, with its versions."""
    found: dict[str, dict[str, None]] = {}
    for part in parts:
        for result in part.results:
            for name, version in result.versions.items():
                found.setdefault(name, {})[version] = None
    rows = tuple((name, ", ".join(versions)) for name, versions in found.items())
    return Table("versions", "Versions", ("library", "version that computed the results"), rows)


def commands(part: Part) -> list[str]:
    """The commands that make a dataset's features and results again; ``FOLDER`` stands for where its images are."""
    layout = part.dataset.layout if part.dataset is not None else part.name
    words = f"--dataset {shlex.quote(layout)}"
    if layout != part.name:
        words += f" --data-root FOLDER --name {shlex.quote(part.name)}"
    extracted: dict[str, list[str]] = {}
    for result in part.results:
        for name, recipe in result.recipes.items():
            if result.kind == "probe" and isinstance(recipe, Mapping):
                names = extracted.setdefault(_extract_flags(recipe), [])
                names += [name] * (name not in names)
    lines = [f"embcache extract {words} --backbone {_joined(names)}{flags}" for flags, names in extracted.items()]
    trained: dict[tuple[str, tuple[str, ...]], dict[str, None]] = {}
    for result in part.results:
        if result.kind in ("probe", "finetune"):
            trained.setdefault((_command(result, words, part), result.backbones), {})[result.subset] = None
    merged: dict[tuple[str, str], list[str]] = {}  # backbones that are probed alone by the same command are one command
    for (command, backbones), subsets in trained.items():
        alone = len(backbones) == 1 and command.startswith("embcache probe")
        key = command if alone else f"{command} --backbone {_joined(backbones)}"
        merged.setdefault((key, _joined(list(subsets))), []).extend(backbones if alone else ())
    for (command, subset), alone_ in merged.items():
        backbone = f" --backbone {_joined(alone_)}" if alone_ else ""
        lines.append(f"{command}{backbone} --subset {subset}")
    return list(dict.fromkeys(lines))


def _joined(names: Sequence[str]) -> str:
    return shlex.quote(",".join(names))


def _extract_flags(recipe: Mapping[str, Any]) -> str:
    transform = recipe.get("transform", {})
    values = {
        "--transform": (transform.get("kind", "paper"), "paper"),
        "--precision": (recipe.get("precision", "fp32"), "fp32"),
        "--feature-dtype": (recipe.get("dtype", "float32"), "float32"),
        "--views": (transform.get("views", 1), 1),
    }
    return "".join(f" {flag} {shlex.quote(str(value))}" for flag, (value, usual) in values.items() if value != usual)


def _command(result: Result, dataset: str, part: Part) -> str:
    """The command of a run, without its backbones and its subset."""
    request = result.request
    words = [f"embcache {result.kind} {dataset} --head {shlex.quote(result.head)}"]
    own = _recipes(result)
    others = [_recipes(other) for other in part.results if other.kind == result.kind]
    if len(own) == 1 and any(recipes.get(name, own[name]) != own[name] for recipes in others for name in own):
        words.append(f"--recipe {next(iter(own.values()))[:12]}")
    for name, value in request.get("head", {}).items():
        if name == "name":
            continue
        text = ",".join(map(str, value)) if isinstance(value, list | tuple) else value
        words.append(f"--head-option {shlex.quote(f'{name}={text}')}")
    for name, default in (("folds", 5), ("seed", 0), ("val", "full"), ("repeats", 1), ("views", 1), ("target", "")):
        if request.get(name, default) != default:
            words.append(f"--{name} {shlex.quote(str(request[name]))}")
    words += map(shlex.quote, class_flags(request.get("classes", {})))
    if request.get("test") == "official" and part.dataset is not None and part.dataset.leaderboard_alpha is not None:
        words.append("--test official")
    if request.get("exclude_test_overlap"):
        words.append("--exclude-test-overlap")
    schedule, usual = request.get("schedule") or {}, asdict(Schedule())
    rates = rates_of(request)
    if rates not in ([], [usual["lr"]]):
        words.append("--lr " + ",".join(f"{lr:g}" for lr in rates))
    for name in ("max_epochs", "batch_size") if result.kind == "finetune" else ():
        if schedule.get(name, usual[name]) != usual[name]:
            words.append(f"--{name.replace('_', '-')} {schedule[name]}")
    return " ".join(words)
