"""The page itself: sections into a template, with scripts, styles and data inline, so that one file holds all."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
from collections.abc import Sequence
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
from embcache.report.charts import bokeh_script, map_chart
from embcache.report.checklist import checklist
from embcache.report.cohort import cohort, quarantines, unequal_classes
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
from embcache.report.provenance import commands, recipe_rows, run_table, version_table
from embcache.report.sections import RULE, summary_table, task_section
from embcache.results.layout import Table

PRIVATE = "Made without images: neither thumbnails nor IDs of images are in this file."


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
    """Write one self-contained HTML page of the saved results of datasets.

    Parameters
    ----------
    target : path-like
        The file.
    datasets : sequence of str
        By default all that have results.
    metrics : sequence of str
        The first scores all results again and chooses between models; the others are shown beside it.
    home : path-like, optional
        Folder of stores and runs.
    ref : DatasetRef, optional
        Where the images are.
    images : bool
        Whether thumbnails, IDs and file names of images may be in the file.
    rows : {"test", "all"}
        Labeled images on the embedding map.
    """
    check_choice("--rows", rows, ("test", "all"))
    parts = collect_parts(datasets, metrics=metrics, home=home, ref=ref)
    ref, budget = ref or DatasetRef(), BUDGET // len(parts) if images else 0
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
        of_labels = of_labels or ([] if task.target else choices)
        tasks.append(task_section(task, part, choices, f"{id}-t{number}", ids=ids, ref=ref))
    people = cohort(part, tasks[0]["choices"], ids=ids) if tasks else None
    problems += people.notes if people is not None else ()
    found, chart, sheets, attended = None, None, None, None
    try:
        found = make_map(part, of_labels, rows=rows, most=LIMIT)
        problems += found.notes
        chart = map_chart(
            f"{id}-map", found.dataset.class_names, len(found.shown.ids),
            alt="Map of embeddings: one point per image, colored by its class. The search below reaches every point.",
        )  # fmt: skip
        if ids:
            log.info(f"{part.name}: thumbnails")
            sheets = make_sheets(found.dataset, found.shown.ids, budget)
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
    require = None
    if tasks:
        first = tasks[0]
        require = checklist(
            part, first["task"], first["choices"], people, first["subgroups"], attended=attended is not None
        )
    bad, broken = quarantines(part, ids=ids)
    warnings = [line for line, _, _ in bad]
    if people is not None and people.shared:
        warnings.append(
            f"{people.shared:,} training images are of patients who are in the test set too; "
            "embcache probe --exclude-test-overlap leaves them out"
        )
    ranked = {rival.result.id for section in tasks for choice in section["choices"] for rival in choice.rivals}
    return {
        "id": id,
        "name": part.name,
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


def _render(shown: Sequence[dict[str, Any]], parts: Sequence[Part], metrics: Sequence[str], *, images: bool) -> str:
    """The page as text.

    Nothing in it is fetched from anywhere: a content security policy forbids it, and lets no script run but the two of
    the page, known by their hashes.
    """
    folder = files("embcache.report").joinpath("templates")
    css, script = (folder.joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    library = bokeh_script().replace("</script", "<\\/script")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text("utf-8")),
        autoescape=True, undefined=jinja2.StrictUndefined, finalize=_shown, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.globals["numeric"] = _numeric
    charts, maps = [], {}
    for one in shown:
        charts += [chart.data() for section in one["tasks"] for chart in section["charts"]]
        if one["chart"] is not None:
            charts.append(one["chart"].data())
            found = one["map"]
            own = {"ids": found.shown.ids if images else None, "thumbs": one["sheets"]}
            maps[one["chart"].id] = found.data | own
    sections = [section for one in shown for section in one["tasks"] if section["choices"]]
    names = ",".join(part.name for part in parts)
    by = f" --metric {shlex.quote(','.join(metrics))}" if metrics else ""
    return environment.get_template("page.html.j2").render(
        datasets=shown,
        summary=summary_table(sections) if sections else None,
        rule=RULE,
        images=images,
        private=PRIVATE,
        version=embcache.__version__,
        versions=version_table(parts),
        command=f"embcache report --dataset {shlex.quote(names)}{by}" + ("" if images else " --no-images"),
        css=Markup(css),
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
