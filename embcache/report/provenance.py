"""How everything on the page came about: recipes, runs, versions, and the commands that make it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from embcache.data.classes import class_flags
from embcache.probe.schedule import Schedule, rates_of
from embcache.report.collect import Part
from embcache.results.layout import signed
from embcache.runs.folders import ProbeResult


def recipe_rows(part: Part) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Every recipe that results were computed by: backbone, fingerprint, and its fields in words."""
    found: dict[tuple[str, str], Mapping[str, Any]] = {}
    for result in part.results:
        for name, fingerprint in _recipes(result).items():
            found.setdefault((name, fingerprint), result.recipes.get(name, {}))
    return [(name, fingerprint, _fields(recipe)) for (name, fingerprint), recipe in sorted(found.items())]


def _recipes(result: ProbeResult) -> dict[str, str]:
    pairs = result.request.get("recipes", [])
    return {str(name): str(fingerprint) for name, fingerprint in pairs} if isinstance(pairs, list) else {}


def _fields(recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name, value in recipe.items():
        if isinstance(value, Mapping):
            rows += [(f"{name}: {key}", _plain(inner)) for key, inner in value.items() if inner is not None]
        else:
            rows.append((name, _plain(value)))
    return rows


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


RUN_HEADERS = (
    "run", "kind", "backbones", "head", "subset", "seed", "folds", "validation labels", "labels used", "test images",
    "validation", "test", "learning rate", "epochs kept", "seconds",
)  # fmt: skip


def run_rows(part: Part) -> list[list[str]]:
    """A row a run, scored or not, under `RUN_HEADERS`."""
    return [
        [
            r.id, r.kind, " + ".join(r.backbones), r.head, f"{r.subset} ({r.n_train:,})",
            str(r.request.get("seed", "")), str(len(r.folds)),
            f"{r.n_val:,} ({r.request.get('val', '–')})", f"{r.labels_used:,}", f"{r.n_test:,} ({r.test_set})",
            "–" if r.val_mean is None else signed(r.val_mean, 4),
            "not scored" if r.mean is None else signed(r.mean, 4) + ("" if r.std is None else f" ± {r.std:.4f}"),
            ", ".join(dict.fromkeys("–" if f.lr is None else f"{f.lr:g}" for f in r.folds)),
            ", ".join(str(f.best_epoch) for f in r.folds), f"{r.seconds:,.0f}",
        ]
        for r in part.results
    ]  # fmt: skip


def version_rows(parts: Sequence[Part]) -> list[tuple[str, str]]:
    """Every library that computed a result, with the versions that did."""
    found: dict[str, dict[str, None]] = {}
    for part in parts:
        for result in part.results:
            for name, version in result.versions.items():
                found.setdefault(name, {})[version] = None
    return [(name, ", ".join(versions)) for name, versions in found.items()]


def commands(part: Part) -> list[str]:
    """The commands that make a dataset's features and results again; ``FOLDER`` stands for where its images are."""
    kind = part.ds.layout if part.ds is not None else part.name
    dataset = f"--dataset {shlex.quote(kind)}" + (
        f" --data-root FOLDER --name {shlex.quote(part.name)}" if kind != part.name else ""
    )
    lines: dict[str, list[str]] = {}
    for result in part.results:
        for name, recipe in result.recipes.items():
            if result.kind == "probe" and isinstance(recipe, Mapping):
                names = lines.setdefault(_extract_flags(recipe), [])
                names += [name] * (name not in names)
    told = [f"embcache extract {dataset} --backbone {_joined(names)}{flags}" for flags, names in lines.items()]
    trained: dict[tuple[str, str], dict[str, None]] = {}
    for result in part.results:
        if result.kind in ("probe", "finetune"):
            at = trained.setdefault((_command(result, dataset, part), ",".join(result.backbones)), {})
            at[result.subset] = None
    merged: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (command, names_), subsets in trained.items():
        key = (command, tuple(subsets))
        if "," in names_ or "finetune" in command:
            key = (f"{command} --backbone {_joined(names_.split(','))}", tuple(subsets))
            merged[key] = []
        else:
            merged.setdefault(key, []).append(names_)
    for (command, of), single in merged.items():
        backbone = f" --backbone {_joined(single)}" if single else ""
        told.append(f"{command}{backbone} --subset {_joined(of)}")
    return list(dict.fromkeys(told))


def _joined(names: Sequence[str]) -> str:
    return shlex.quote(",".join(names))


def _extract_flags(recipe: Mapping[str, Any]) -> str:
    transform = recipe.get("transform", {})
    flags = "" if transform.get("kind", "paper") == "paper" else f" --transform {shlex.quote(str(transform['kind']))}"
    if recipe.get("precision", "fp32") != "fp32":
        flags += f" --precision {shlex.quote(str(recipe['precision']))}"
    if recipe.get("dtype", "float32") != "float32":
        flags += f" --feature-dtype {shlex.quote(str(recipe['dtype']))}"
    return flags + (f" --views {transform['views']}" if "views" in transform else "")


def _command(result: ProbeResult, dataset: str, part: Part) -> str:
    """The command of a run but for its backbones and its subset."""
    request = result.request
    words = [f"embcache {result.kind} {dataset} --head {shlex.quote(result.head)}"]
    if _ambiguous(result, part):
        fingerprint = next(iter(_recipes(result).values()), "")
        words.append(f"--recipe {fingerprint[:12]}")
    options = {key: value for key, value in request.get("head", {}).items() if key != "name"}
    words += [f"--head-option {shlex.quote(f'{key}={_option(value)}')}" for key, value in options.items()]
    for name, default in (("folds", 5), ("seed", 0), ("val", "full"), ("repeats", 1), ("views", 1), ("target", "")):
        if request.get(name, default) != default:
            words.append(f"--{name} {shlex.quote(str(request[name]))}")
    words += map(shlex.quote, class_flags(request.get("classes", {})))
    if request.get("test") == "official" and part.ds is not None and part.ds.leaderboard_alpha is not None:
        words.append("--test official")
    if request.get("exclude_test_overlap"):
        words.append("--exclude-test-overlap")
    schedule, usual = request.get("schedule") or {}, Schedule()
    if (rates := rates_of(request)) not in ([], [usual.lr]):
        words.append("--lr " + ",".join(f"{rate:g}" for rate in rates))
    if result.kind == "finetune":
        for name in ("max_epochs", "batch_size"):
            if schedule.get(name, getattr(usual, name)) != getattr(usual, name):
                words.append(f"--{name.replace('_', '-')} {schedule[name]}")
    return " ".join(words)


def _ambiguous(result: ProbeResult, part: Part) -> bool:
    """Whether a backbone of the result has results by another recipe too."""
    own = _recipes(result)
    return len(own) == 1 and any(
        _recipes(other).get(name, fingerprint) != fingerprint
        for other in part.results
        for name, fingerprint in own.items()
        if other.kind == result.kind
    )


def _option(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
