"""``embcache datasets``: what there is, and what is there of one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from embcache.commands.options import (
    DataRootOption,
    HomeOption,
    JsonOption,
    MergeClassOption,
    refuse_other_merges,
    takes_columns,
    write_json,
)
from embcache.commands.output import echo
from embcache.commands.table import print_table

if TYPE_CHECKING:
    from embcache.data.chosen import Columns
    from embcache.data.survey import Listed, Survey


@takes_columns
def datasets(
    name: Annotated[str | None, typer.Argument(help="Show this one in full: classes, groups, what is missing.")] = None,
    data_root: DataRootOption = None,
    home: HomeOption = None,
    json: JsonOption = None,
    merge_class: MergeClassOption = None,
    *,
    columns: Columns,
) -> None:
    """List the datasets and what was found of each; with a NAME, one of them in full.

    Nothing is read but label files and folder listings, and missing images are no error here.
    """
    from embcache.data.survey import list_datasets, survey_dataset
    from embcache.errors import UsageError

    if name is not None:
        survey = survey_dataset(name, data_root, home, columns)
        refuse_other_merges(merge_class, survey.dataset)
        if json:
            write_json(survey.to_dict(), json)
        if json != "-":
            _print_survey(survey)
        return
    if data_root is not None or columns.named() or columns.merge_class:
        raise UsageError(
            "--data-root and columns belong to one dataset",
            fix=f"embcache datasets NAME --data-root {data_root or 'FOLDER'}",
        )
    rows = list_datasets(home)
    if json:
        write_json([_row_data(row) for row in rows], json)
    if json != "-":
        _print_list(rows)


def _print_list(rows: list[Listed]) -> None:
    from embcache.data.published import DATASETS

    cells, notes = [], []
    for row in rows:
        cells.append((row.name, row.description, _images(row), _where(row)))
        if row.problem:
            notes.append(f"{row.name}: {row.problem}")
        if row.found is None:
            source = DATASETS.get(row.name)
            get = f"; kagglehub.{source.download}" if source and source.download else ""
            if source and not source.draw:
                notes.append(f"{row.name} expects {' '.join(source.expected.split())}{get}")
        elif row.found.dataset.synthetic:
            notes.append(f"{row.name}: synthetic images")
    print_table(["dataset", "what it is", "images", "where"], cells, notes=notes)
    echo("\nOne in full: embcache datasets NAME [--data-root FOLDER]")


def _images(row: Listed) -> str:
    if row.found is None:
        return ""
    total, here = len(row.found.dataset), int(row.found.present.sum())
    return f"{total:,}" if here == total else f"{here:,} of {total:,}"


def _where(row: Listed) -> str:
    if row.found is not None:
        return str(row.root) if row.found.present.any() else f"{row.root} (labels only)"
    if row.root is None:
        return "--data-root FOLDER"
    return f"drawn at first use, in {row.root}" if row.name == "sample" else f"not found in {row.root}"


def _row_data(row: Listed) -> dict[str, object]:
    where = None if row.root is None else str(row.root)
    if row.found is None:
        return {"name": row.name, "description": row.description, "found": False, "root": where, "problem": row.problem}
    return {"found": True, **{k: v for k, v in row.found.to_dict().items() if k != "missing"}}


def _print_survey(survey: Survey) -> None:
    ds = survey.dataset
    whole = bool(survey.present.all())
    sizes = ", ".join(f"{k} = {n:,}" for k, n in ds.subset_sizes.items())
    echo(f"{ds.name}: {survey.source.description}{' — synthetic' if ds.synthetic else ''}")
    echo(f"in {ds.root}; metric {ds.metric}; training images {sizes}, F = all\n")
    splits = survey.splits()
    headers = ["class"]
    for split in splits:
        headers += [split] if whole else [split, "with image"]

    def row(title: str, label: int | None) -> list[object]:
        counts = [survey.count(split, label) for split in splits]
        return [title, *(f"{n:,}" for pair in counts for n in (pair[:1] if whole else pair))]

    rows = [row(class_name, label) for label, class_name in enumerate(ds.class_names)]
    if (ds.labels < 0).any():
        rows.append(row("(unlabelled)", -1))
    rows.append(row("images", None))
    groups: list[object] = ["groups"]
    for split in splits:
        groups += [f"{survey.group_count(split):,}"] if whole else [f"{survey.group_count(split):,}", ""]
    print_table(headers, [*rows, groups], notes=[*ds.notes, *_missing_notes(survey)])


def _missing_notes(survey: Survey) -> list[str]:
    from embcache.data.nearby import near_misses
    from embcache.errors import first_few

    missing = survey.dataset.missing
    if not missing:
        return []
    get = f"; get them: kagglehub.{survey.source.download}" if survey.source.download else ""
    near, advice = near_misses(survey.dataset.root, missing) if survey.dataset.root else ("", "")
    return [
        f"{len(missing):,} images are not there: {first_few(missing)}{get}",
        *(f"{line}; {advice}" for line in near.splitlines()),
        "--allow-missing (in extract) goes on with those that are",
    ]
