"""The page itself: sections into a template, with scripts, styles and data inline, so that one file holds all."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import embcache
from embcache.errors import EmbcacheError, check_choice, printable
from embcache.io import write_output
from embcache.paths import PathLike
from embcache.report.attention_section import Attended, attend, attending_run
from embcache.report.charts import Chart, bokeh_script, map_chart
from embcache.report.checklist import checklist
from embcache.report.choice import Choice, choose
from embcache.report.cohort import Cohort, cohort
from embcache.report.collect import Part, collect_parts
from embcache.report.embedding import LIMIT, EmbeddingMap, make_map, map_data
from embcache.report.provenance import RUN_HEADERS, commands, recipe_rows, run_rows, version_rows
from embcache.report.sections import TaskSection, summary_table, task_section
from embcache.report.thumbs import BUDGET, Sheets, make_sheets
from embcache.report.warn import (
    HIDDEN,
    notes_of,
    quarantines,
    secret_words,
    unequal_classes,
    without_names,
)
from embcache.report.words import RULE
from embcache.results.layout import Table

Say = Callable[[str], object]

NO_THUMBNAILS = "The images are not at hand, so the map has no thumbnails."
PRIVATE = "Made without images: neither thumbnails nor ids of images are in this file."


@dataclass(frozen=True, eq=False)
class Written:
    """A report that was written."""

    path: Path
    bytes: int
    datasets: tuple[str, ...]
    results: int
    thumbnails: int  # in the file
    headlines: tuple[str, ...]  # one a task
    notes: tuple[str, ...]  # what could not be put on the page, and why


def write_report(
    target: PathLike = "report.html",
    datasets: Sequence[str] = (),
    *,
    metrics: Sequence[str] = (),
    home: PathLike | None = None,
    data_root: PathLike | None = None,
    images: bool = True,
    rows: str = "test",
    say: Say = lambda line: None,
) -> Written:
    """Write one self-contained HTML page of the saved results of datasets."""
    check_choice("--rows", rows, ("test", "all"))
    parts = collect_parts(datasets, metrics=metrics, home=home, data_root=data_root)
    views = [
        _view(part, f"d{number}", images=images, rows=rows, data_root=data_root, say=say,
              budget=BUDGET // len(parts))
        for number, part in enumerate(parts)
    ]  # fmt: skip
    say("putting the page together")
    data = render_page(views, parts, metrics, images=images).encode("utf-8", "replace")
    path = Path(target)
    write_output(path, data)
    return Written(
        path, len(data), tuple(part.name for part in parts), sum(len(part.results) for part in parts),
        sum(sum(place >= 0 for place in v.sheets.place) for v in views if v.sheets),
        tuple(section.headline for v in views for section in v.tasks),
        tuple(f"{v.part.name}: {note}" for v in views for note in v.problems),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class View:
    """All that the template shows of one dataset."""

    part: Part
    id: str
    tasks: list[TaskSection]
    cohort: Cohort | None
    map: EmbeddingMap | None
    chart: Chart | None
    sheets: Sheets | None
    attended: Attended | None
    problems: list[str]
    images: bool

    @property
    def charts(self) -> list[Chart]:
        """All charts of the dataset, in the order of the page."""
        return [
            *(chart for section in self.tasks for chart in section.charts),
            *([self.chart] if self.chart is not None else []),
        ]


def _view(part: Part, id: str, *, images: bool, rows: str, data_root: PathLike | None, say: Say, budget: int) -> View:
    problems = [f"the table of images cannot be had: {part.problem}"] if part.problem else []
    if part.unreadable:
        problems.append(
            f"{part.unreadable} run{'s' * (part.unreadable > 1)} could not be read: made by another version, or damaged"
        )
    sections, of_labels = [], list[Choice]()
    for number, task in enumerate(part.tasks):
        say(f"{task.title}: {len(task.results)} results of {len(task.models)} models are compared")
        choices = choose(task, part)
        of_labels = of_labels or ([] if task.target else choices)
        sections.append(task_section(task, part, choices, f"{id}-t{number}", ids=images, data_root=data_root, say=say))
    if not part.tasks:
        problems.append("no result has a score: the test labels are not known")
    people = cohort(part, sections[0].choices, ids=images) if sections else None
    problems += people.notes if people is not None else ()
    found, chart, sheets = None, None, None
    try:
        found = make_map(part, of_labels, rows=rows, most=LIMIT, say=say)
        problems += found.notes
        chart = map_chart(
            f"{id}-map", found.ds.class_names, len(found.shown.ids),
            alt="Map of embeddings: a point an image, colored by its class. The search beneath reaches every point.",
        )  # fmt: skip
        if images:
            say(f"{part.name}: thumbnails")
            sheets = make_sheets(found.ds, found.shown.ids, budget)
    except EmbcacheError as error:
        problems.append(f"no map: {error.problem}")
    attended = None
    run = attending_run(part, of_labels)
    if run is not None and part.ds is not None:
        say(f"{part.name}: attention of {run.id}")
        try:
            attended = attend(part, run)
        except EmbcacheError as error:
            problems.append(f"no attention of {run.id}: {error.problem}")
    problems = without_names(problems, part, ids=images)
    return View(part, id, sections, people, found, chart, sheets, attended, problems, images)


def render_page(views: Sequence[View], parts: Sequence[Part], metrics: Sequence[str], *, images: bool) -> str:
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
    charts = [chart.data() for view in views for chart in view.charts]
    maps = {
        view.chart.id: map_data(view.map, view.sheets, ids=images)
        for view in views
        if view.map is not None and view.chart is not None
    }
    environment.globals["numeric"] = _numeric
    sections = [section for view in views for section in view.tasks if section.choices]
    return environment.get_template("page.html.j2").render(
        views=[_plain(view) for view in views],
        summary=summary_table(sections) if sections else None,
        rule=RULE,
        images=images,
        private=PRIVATE,
        no_thumbnails=NO_THUMBNAILS,
        version=embcache.__version__,
        versions=version_rows(parts),
        run_headers=RUN_HEADERS,
        command=_own_command(parts, metrics, images),
        css=Markup(css),
        script=Markup(script),
        library=Markup(library),
        policy=_policy(library, script),
        data=Markup(json_text({"charts": charts, "maps": maps})),
    )


def _plain(view: View) -> dict[str, Any]:
    part, ids, first = view.part, view.images, view.tasks[0] if view.tasks else None
    quarantined, broken = quarantines(part, ids=ids)

    def table(t: Table | None) -> Table | None:
        return t if t is None or ids else _scrubbed(t, part)

    subgroups = first.subgroups if first is not None else None
    asked = None
    if first is not None:
        asked = checklist(part, first.task, first.choices, view.cohort, table(subgroups), view.attended)
    ranked = {rival.result.id for section in view.tasks for c in section.choices for rival in c.rivals}
    return {
        "id": view.id,
        "name": part.name,
        "synthetic": any(result.synthetic for result in part.results),
        "source": part.source,
        "tasks": [
            {
                "section": section, "id": f"{view.id}-t{number}", "numbers": table(section.numbers),
                "paper": table(section.paper), "subgroups": table(section.subgroups),
            }
            for number, section in enumerate(view.tasks)
        ],
        "map": view.map,
        "chart": view.chart,
        "sheets": view.sheets,
        "attended": view.attended,
        "cohort": view.cohort,
        "checklist": table(asked),
        "warnings": [*(q.words for q in quarantined), *_overlap(view.cohort), *unequal_classes(part)],
        "quarantines": quarantined,
        "problems": [*view.problems, *without_names(broken, part, ids=ids)],
        "notes": notes_of(part, ranked, ids=ids),
        "recipes": recipe_rows(part),
        "runs": run_rows(part),
        "commands": commands(part),
    }  # fmt: skip


def _overlap(found: Cohort | None) -> list[str]:
    if found is None or not found.shared:
        return []
    left_out = "; embcache probe --exclude-test-overlap leaves them out"
    return [f"{found.shared:,} training images are of patients who are in the test set too{left_out}"]


def _scrubbed(table: Table, part: Part) -> Table:
    """The table without notes that name an image."""
    secret = secret_words(part, ids=False)
    notes = tuple(note for note in without_names(table.notes, part, ids=False) if note != HIDDEN)
    rows = tuple(tuple("…" if cell in secret and not _known(cell, part) else cell for cell in r) for r in table.rows)
    return Table(table.name, table.title, table.headers, rows, notes)


def _known(cell: str, part: Part) -> bool:
    """Whether a cell is what the page says anyway: a number, a class, a dataset."""
    return cell == part.name or cell in {name for r in part.results for name in r.class_names} or _is_number(cell)


def _is_number(text: str) -> bool:
    return text.replace(",", "").replace(".", "").isdigit()


def _own_command(parts: Sequence[Part], metrics: Sequence[str], images: bool) -> str:
    names = ",".join(part.name for part in parts)
    by = f" --metric {shlex.quote(','.join(metrics))}" if metrics else ""
    return f"embcache report --dataset {shlex.quote(names)}{by}" + ("" if images else " --no-images")


_NUMBER = re.compile(r"[−+<]?\s?\d[\d,.]*\s?%?(?![A-Za-z\d])")


def _numeric(rows: Sequence[Sequence[str]]) -> list[bool]:
    """Which columns hold numbers, and so are aligned to the right: those with more numbers than words."""
    told = []
    for column in zip(*rows, strict=True):
        cells = [str(cell) for cell in column if str(cell) not in ("", "–")]
        told.append(2 * sum(_NUMBER.match(cell) is not None for cell in cells) > len(cells))
    return told


def _shown(value: Any) -> Any:
    """Text with control characters escaped, none of which may stand in HTML; a percent sign stays at its number."""
    return re.sub(r"(?<=\d) (?=%)", "\u00a0", printable(value)) if type(value) is str else value


def json_text(data: Any) -> str:
    r"""JSON that may stand inside a ``<script>``: ASCII alone, ``<``, ``>`` and ``&`` as ``\u003c`` and the like."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _policy(*scripts: str) -> str:
    hashes = " ".join(
        "'sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii") + "'"
        for text in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; font-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
