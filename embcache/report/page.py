"""The page itself: sections into a template, with scripts, styles and data inline, so that one file holds all."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import embcache
from embcache.config import DatasetRef
from embcache.errors import EmbcacheError, check_choice, printable
from embcache.io import write_output
from embcache.log import log
from embcache.paths import PathLike
from embcache.probe.metrics import metric_title
from embcache.report.charts import bokeh_script, map_chart
from embcache.report.cohort import checklist, cohort, quarantines, unequal_classes
from embcache.report.collect import (
    HIDDEN,
    Choice,
    Part,
    choose,
    collect_parts,
    notes_of,
    secret_words,
    without_names,
)
from embcache.report.embedding import BUDGET, LIMIT, attend, fused_run, make_map, make_sheets
from embcache.report.sections import NEW_MODEL, THESE_MODELS, summary_table, task_section
from embcache.results.advice import load_readable, rankable
from embcache.results.curves import request_flags
from embcache.results.layout import Table, bounds, score, signed
from embcache.runs.folders import Result


@dataclass(frozen=True, eq=False)
class Written:
    """A report that was written."""

    path: Path
    bytes: int
    datasets: tuple[str, ...]
    results: int
    thumbnails: int  # in the file
    headlines: tuple[str, ...]  # one per task
    notes: tuple[str, ...]  # what could not be put on the page, and why


def write_report(
    target: PathLike = "report.html",
    datasets: Sequence[str] = (),
    *,
    metrics: Sequence[str] = (),
    home: PathLike | None = None,
    ref: DatasetRef | None = None,
    images: bool = True,
    rows: str = "test",
) -> Written:
    """Write one self-contained HTML page of saved results.

    Parameters
    ----------
    target : path
        File of the page.
    datasets : sequence of str
        Default: all that have results.
    metrics : sequence of str
        The first one scores all results again and chooses between models; the others are shown beside it.
    home : path, optional
        Folder of stores and runs. Default: ``$EMBCACHE_HOME`` or ``~/.cache/embcache``.
    ref : DatasetRef, optional
        Where the images are; without them there are no thumbnails.
    images : bool
        Whether thumbnails, IDs and file names of images may be in the file.
    rows : {"test", "all"}
        Labeled images on the embedding map.

    Returns
    -------
    Written
        The path, what is in the file, and notes on what is not.

    Raises
    ------
    UsageError, StoreError
        An option is malformed, or the file cannot be written; there are no results.
    """
    check_choice("--rows", rows, ("test", "all"))
    ref = ref or DatasetRef()
    parts = collect_parts(datasets, metrics, home=home, ref=ref)
    budget = BUDGET // len(parts) if images else 0
    shown = [_dataset(part, f"d{number}", ref, rows, budget) for number, part in enumerate(parts)]
    log.info("putting the page together")
    data = _render(shown, parts, metrics, images=images).encode("utf-8", "replace")
    path = Path(target)
    write_output(path, data)
    return Written(
        path, len(data), tuple(part.name for part in parts), sum(len(part.results) for part in parts),
        sum(sum(place >= 0 for place in one["sheets"]["place"]) for one in shown if one["sheets"]),
        tuple(task["headline"] for one in shown for task in one["tasks"]),
        tuple(f"{one['name']}: {note}" for one in shown for note in one["problems"]),
    )  # fmt: skip


def _dataset(part: Part, id: str, ref: DatasetRef, rows: str, budget: int) -> dict[str, Any]:
    """All that the template shows of one dataset; without images where the ``budget`` for thumbnails is 0."""
    ids = budget > 0
    problems = [f"the table of images is not available: {part.problem}"] if part.problem else []
    if part.unreadable:
        runs = f"{part.unreadable} run{'s' * (part.unreadable > 1)}"
        problems.append(f"{runs} could not be read: made by another version, or damaged")
    if not part.tasks:
        problems.append("no result has a score: the test labels are not known")
    tasks, of_labels = [], list[Choice]()
    for number, task in enumerate(part.tasks):
        log.info(f"{task.title}: comparing {len(task.results)} results of {len(task.models)} models")
        choices = choose(task, part)
        if not choices:
            _, unread = load_readable({r.id: r for r in task.results if rankable(r)}, part.home)
            problems += [f"{run}: {problem}" for run, problem in unread.items()]
        of_labels = of_labels or (choices if task.is_of(part.dataset) else [])
        tasks.append(task_section(task, part, choices, f"{id}-t{number}", ids=ids, ref=ref))
    people = cohort(part, tasks[0]["choices"], ids=ids) if tasks else None
    problems += people.notes if people is not None else ()
    found, chart, sheets, attended = None, None, None, None
    try:
        found = make_map(part, of_labels, rows=rows, most=LIMIT)
        problems += found["notes"]
        chart = map_chart(f"{id}-map", found["data"]["classes"], len(found["shown"].ids))
        if ids:
            log.info(f"{part.name}: thumbnails")
            sheets = make_sheets(part.dataset, found["shown"].ids, budget) if part.dataset else None
    except EmbcacheError as error:
        problems.append(f"no map: {error.problem}")
    run = fused_run(part.results, of_labels)
    if run is not None and part.dataset is not None:
        log.info(f"{part.name}: attention of {run.id}")
        try:
            attended = attend(part, run)
        except EmbcacheError as error:
            problems.append(f"no attention of {run.id}: {error.problem}")
    if not ids:
        for section in tasks:
            section.update({key: _scrubbed(section[key], part) for key in ("numbers", "paper", "subgroups")})
    require, seen = None, attended is not None
    for first in tasks[:1]:
        require = checklist(part, first["task"], first["choices"], people, first["subgroups"], attended=seen)
    bad, broken = quarantines(part, ids=ids)
    warnings = [line for line, _, _ in bad]
    if people is not None and people.shared:
        shared = f"{people.shared:,} training images are of patients who are in the test set too"
        warnings.append(f"{shared}; embcache probe --exclude-test-overlap leaves them out")
    ranked = {rival.result.id for section in tasks for choice in section["choices"] for rival in choice.rivals}
    return {
        "id": id,
        "name": part.name,
        "dataset": part.dataset,
        "synthetic": any(result.synthetic for result in part.results),
        "read_from": part.read_from,
        "tasks": tasks,
        "map": found,
        "chart": chart,
        "sheets": sheets,
        "attended": attended,
        "cohort": people,
        "checklist": require if ids else _scrubbed(require, part),
        "warnings": warnings + unequal_classes(part),
        "quarantines": bad,
        "problems": without_names([*problems, *broken], part, ids=ids),
        "notes": notes_of(part, ranked, ids=ids),
        "recipes": recipe_rows(part),
        "runs": run_table(part),
        "commands": commands(part),
    }


def make_environment() -> jinja2.Environment:
    """Where the templates are found, and what they may use."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_file), autoescape=True, undefined=jinja2.StrictUndefined, finalize=_shown,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"signed": signed, "score": score, "bounds": bounds, "repr": repr}
    environment.globals |= {"new_model": NEW_MODEL, "these_models": THESE_MODELS}
    environment.globals |= {"numeric": _numeric, "metric_title": metric_title}
    return environment


def _file(name: str) -> str:
    return files("embcache.report").joinpath("templates", name).read_text("utf-8")


def _render(shown: Sequence[dict[str, Any]], parts: Sequence[Part], metrics: Sequence[str], *, images: bool) -> str:
    """The page as text.

    Nothing in it is fetched from anywhere: a content security policy forbids it, and lets no script run but the two of
    the page, known by their hashes.
    """
    environment, library = make_environment(), bokeh_script().replace("</script", "<\\/script")
    script, charts, maps = _file("page.js"), [], {}
    for one in shown:
        charts += [chart.data() for section in one["tasks"] for chart in section["charts"]]
        if one["chart"] is not None:
            charts.append(one["chart"].data())
            own = {"ids": one["map"]["shown"].ids if images else None, "thumbs": one["sheets"]}
            maps[one["chart"].id] = one["map"]["data"] | own
    sections = [section for one in shown for section in one["tasks"] if section["choices"]]
    names = ",".join(part.name for part in parts)
    by = f" --metric {shlex.quote(','.join(metrics))}" if metrics else ""
    return environment.get_template("page.html.j2").render(
        datasets=shown,
        summary=summary_table(sections) if sections else None,
        images=images,
        version=embcache.__version__,
        versions=version_table(parts),
        command=f"embcache report --dataset {shlex.quote(names)}{by}" + ("" if images else " --no-images"),
        css=Markup(_file("page.css")),
        script=Markup(script),
        library=Markup(library),
        policy=_policy(library, script),
        data=Markup(json_text({"charts": charts, "maps": maps})),
    )


def _scrubbed(table: Table | None, part: Part) -> Table | None:
    """The table without notes that name an image, and with such cells replaced; numbers, classes and datasets stay."""
    if table is None:
        return None
    secret = secret_words(part, ids=False) - {part.name} - {name for r in part.results for name in r.class_names}
    notes = tuple(note for note in without_names(table.notes, part, ids=False) if note != HIDDEN)
    rows = tuple(
        tuple("…" if cell in secret and not re.fullmatch(r"[\d.,]+", cell) else cell for cell in row)
        for row in table.rows
    )
    return replace(table, rows=rows, notes=notes)


_NUMBER = re.compile(r"[−+<]?\s?\d[\d,.]*\s?%?(?![A-Za-z\d])")


def _numeric(rows: Sequence[Sequence[str]]) -> list[bool]:
    """Which columns hold numbers, and so are aligned to the right: those with more numbers than words."""
    columns = [[str(cell) for cell in column if str(cell) not in ("", "–")] for column in zip(*rows, strict=True)]
    return [2 * sum(_NUMBER.match(cell) is not None for cell in cells) > len(cells) for cells in columns]


def _shown(value: Any) -> Any:
    """Text with control characters escaped, none of which may stand in HTML; a percent sign stays at its number."""
    return re.sub(r"(?<=\d) (?=%)", "\u00a0", printable(value)) if type(value) is str else value


def json_text(data: Any) -> str:
    r"""JSON that may stand inside a ``<script>``: ASCII alone, ``<``, ``>`` and ``&`` as ``\u003c`` and the like."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _policy(*scripts: str) -> str:
    hashes = [hashlib.sha256(text.encode("utf-8")).digest() for text in scripts]
    digests = [f"'sha256-{base64.b64encode(digest).decode('ascii')}'" for digest in hashes]
    return (
        f"default-src 'none'; script-src {' '.join(digests)}; "
        "style-src 'unsafe-inline'; img-src data: blob:; font-src data:; base-uri 'none'; form-action 'none'"
    )


# How everything on the page was made.


def recipe_rows(part: Part) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Every recipe of the results' features: backbone, fingerprint, and its fields in words."""
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for result in part.results:
        for backbone, fingerprint in _recipes(result).items():
            rows = []
            for name, value in result.recipes.get(backbone, {}).items():
                several = value.items() if isinstance(value, Mapping) else [("", value)]
                rows += [(f"{name}: {key}" if key else name, _plain(v)) for key, v in several if v is not None]
            found.setdefault((backbone, fingerprint), rows)
    return [(*key, rows) for key, rows in sorted(found.items())]


def _recipes(result: Result) -> dict[str, str]:
    pairs = result.request.get("recipes", [])
    return {str(name): str(fingerprint) for name, fingerprint in pairs} if isinstance(pairs, list) else {}


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
            "not scored" if r.mean is None else score(r.mean, r.std, 4),
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
    words += "" if layout == part.name else f" --data-root FOLDER --name {shlex.quote(part.name)}"
    extracted: dict[str, dict[str, None]] = {}
    trained: dict[tuple[str, tuple[str, ...]], dict[str, None]] = {}
    for result in part.results:
        for name, recipe in result.recipes.items() if result.kind == "probe" else ():
            if isinstance(recipe, Mapping):
                extracted.setdefault(_extract_flags(recipe), {})[name] = None
        if result.kind in ("probe", "finetune"):
            trained.setdefault((_command(result, words, part), result.backbones), {})[result.subset] = None
    merged: dict[tuple[str, str], list[str]] = {}  # backbones that are probed alone by the same command are one command
    for (command, backbones), subsets in trained.items():
        alone = len(backbones) == 1 and command.startswith("embcache probe")
        key = command if alone else f"{command} --backbone {_joined(backbones)}"
        merged.setdefault((key, _joined(subsets)), []).extend(backbones if alone else ())
    lines = [f"embcache extract {words} --backbone {_joined(names)}{flags}" for flags, names in extracted.items()]
    for (command, subset), names in merged.items():
        lines.append(command + (f" --backbone {_joined(names)}" if names else "") + f" --subset {subset}")
    return list(dict.fromkeys(lines))


def _joined(names: Iterable[str]) -> str:
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
    words, own = [f"embcache {result.kind} {dataset} --head {shlex.quote(result.head)}"], _recipes(result)
    others = [_recipes(other) for other in part.results if other.kind == result.kind]
    if len(own) == 1 and any(recipes.get(name, own[name]) != own[name] for recipes in others for name in own):
        words.append(f"--recipe {next(iter(own.values()))[:12]}")
    words.append(shlex.join(request_flags(result)))
    if result.request.get("test") == "official" and part.dataset and part.dataset.leaderboard_alpha is not None:
        words.append("--test official")
    return " ".join(filter(None, words))
