"""``embcache run``, ``curves``, ``report``, ``tsne``, ``attention``, ``neighbors``, ``audit``: tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from embcache.commands.options import Answer, OneBackbone, OneDataset, Only, Skip, check_one, check_suffix, command
from embcache.commands.output import (
    ProgressBar,
    echo,
    echo_data,
    echo_notes,
    print_note,
    print_objects,
    print_table,
    spread,
)
from embcache.config import AttentionConfig, AuditConfig, DatasetRef, MapConfig, NeighborsConfig, StudyConfig
from embcache.errors import UsageError, check_number
from embcache.fields import Config, option
from embcache.io import check_target, write_output
from embcache.paths import home_dir, slug

if TYPE_CHECKING:
    from embcache.data.dataset import ImageDataset
    from embcache.figures.attention import RunAttention
    from embcache.figures.audit import Audit, LabelError
    from embcache.figures.maps import Maps
    from embcache.results.layout import Table

SUFFIXES = (".png", ".svg", ".pdf")

Figures = Annotated[
    list[str], "FILE[,FILE…]", "PNG, SVG or PDF by its suffix; repeatable. [default: <home>/<dataset>/figures/…png]"
]


def figure_targets(output: Sequence[str], *suffixes: str) -> list[Path]:
    """The files that figures are written to, checked before anything is computed; ``suffixes`` are allowed, too."""
    targets = [Path(target).expanduser() for target in output]
    for target in targets:
        if target.suffix.lower() not in (*suffixes, *SUFFIXES):
            raise UsageError(
                "the suffix of a file sets its format", code="other-suffix", expected=", ".join((*suffixes, *SUFFIXES)),
                found=str(target), fix=f"--output {target.with_suffix((*suffixes, *SUFFIXES)[0])}",
            )  # fmt: skip
    return targets


def default_figure(dataset: str, home: Path | None, name: str) -> Path:
    """Where a figure of a dataset lies if no file is named."""
    return home_dir(home) / slug(dataset) / "figures" / name


def echo_figures(paths: Sequence[Path], more: str = "") -> None:
    """Print where figures were written."""
    for path in paths:
        echo(f"figure: {path}{more}")


@dataclass(frozen=True)
class TableOutput(Config):
    """Where a table and its figure go, and how the table is written."""

    heading: ClassVar[str] = "Output options"

    format: str = option(
        "markdown", "Format of the table; CSV holds every number, one line per cell.",
        metavar="markdown|latex|csv", choices=("markdown", "latex", "csv"),
    )  # fmt: skip
    output: Path | None = option(None, "Write the table to FILE instead of stdout.", metavar="FILE")
    figure: Path | None = option(None, "Write the figure to FILE: .png, .svg or .pdf.", metavar="FILE")

    def checked(self) -> TableOutput:
        """With the home folder spelled out; an error before the work where a file could not be written after it."""
        from embcache.results.layout import SUFFIXES as TABLE_SUFFIXES

        if self.figure is not None and self.figure.suffix.lower() not in SUFFIXES:
            raise UsageError(
                "unknown format of the figure", code="figure-format", expected=".png, .svg or .pdf",
                found=str(self.figure), fix=f"--figure {self.figure.with_suffix('.png')}",
            )  # fmt: skip
        if self.output is None:
            return self
        output = check_suffix(self.output.expanduser(), "--output", *TABLE_SUFFIXES[self.format])
        check_target(output)
        return replace(self, output=output)

    def answer(self, table: Table, figures: Sequence[Path], json: str | None, **more: Any) -> Answer:
        """Write the table to stdout or its file, and name the figures on stderr; the rest of ``more`` is JSON data."""
        from embcache.results.layout import render

        text = render(table, self.format)
        if self.output is not None:
            write_output(self.output, text)
            echo(f"table   {self.output}", err=True)
        elif json != "-":
            echo_data(text, "--output FILE")
        for path in figures:
            echo(f"figure  {path}", err=True)
        data = {
            "name": table.name, "title": table.title, "records": [dict(record) for record in table.records],
            "notes": list(table.notes), "figures": [str(path) for path in figures], **more,
        }  # fmt: skip
        return Answer(data, lambda: None)


@command()
def run(
    *,
    context: typer.Context,
    what: Annotated[
        str, typer.Argument(metavar="NAME|FILE.toml", help="table1–table4, B1–B8, C1–C4, G1, fig2, D1, D2, F1.")
    ],
    home: Path | None,
    dry_run: Annotated[bool, "", "Show the plan and do nothing."] = False,
    json: str | None,
    ref: DatasetRef,
    config: Annotated[StudyConfig, Skip("splits", "metric", "positive")],
    out: TableOutput,
) -> Answer:
    """Make a table or a figure of the paper, or your own grid: plan, do what is missing, print.

    Missing extractions, probes and finetunings are planned, then done; saved runs of the same request are reused, so an
    interrupted command continues where it stopped. The paper's value and the difference (ours − paper) / √(s₁² + s₂²)
    are printed beside ours; on a local test set the difference is withheld.

    Example: embcache run B3 --backbone random,effnet_lite0 --subset 50,100,F
    """
    from embcache.study.study import run_study

    out = out.checked()
    # Options that were typed take precedence over a file even where they equal their defaults.
    origins = {name: context.get_parameter_source(name) for name in context.params}
    typed = {name for name, origin in origins.items() if origin is not None and origin.name == "COMMANDLINE"}
    with ProgressBar("step", "what is finished is kept, and the same command continues from there") as bar:
        done = run_study(
            what, config, ref, home=home, figure=out.figure, dry_run=dry_run, given=typed, progress=bar.update
        )
    answer = out.answer(done.table, done.figures, json)
    return replace(answer, failed=done.empty, next=() if dry_run or done.empty else ("report",))


@command()
def curves(
    *,
    dataset: list[str],
    backbone: list[str],
    head: Annotated[list[str], "NAME[,NAME…]", "Only results of these heads."],
    kind: Annotated[list[str], "probe|finetune|kaggle", "Only results of this kind."],
    metric: list[str],
    home: Path | None,
    json: str | None,
    out: TableOutput,
) -> Answer:
    """Draw learning curves of the saved results: mean and interval over the number of training labels.

    Notes below the table say which backbone to take, chosen on validation, and whether more labels help.

    Example: embcache curves --dataset pneumonia --head linear --figure curves.png
    """
    from embcache.figures.run_plots import draw_curves
    from embcache.results.advice import advise, sentences
    from embcache.results.curves import find_results

    out = out.checked()
    results = find_results(
        home=home, datasets=dataset, backbones=backbone, heads=head, kinds=kind, metrics=metric
    )  # fmt: skip
    table, path = draw_curves(results, home=home, target=out.figure)
    advice = advise(results, home=home)
    table = replace(table, notes=(*table.notes, *sentences(advice)))
    return out.answer(table, (path,), json, advice=[each.to_json() for each in advice])


@command()
def report(
    *,
    dataset: list[str],
    output: Annotated[Path, "FILE", "File of the page."] = Path("report.html"),
    no_images: Annotated[bool, "", "Leave thumbnails, IDs and file names of images out of the file."] = False,
    rows: Annotated[str, "test|all", "Labeled images on the embedding map, 6,000 at most."] = "test",
    metric: list[str],
    ref: Annotated[DatasetRef, Only("data_root")],
    home: Path | None,
) -> Answer:
    """Write one self-contained HTML page of all saved results; it needs no network.

    The page has the best model at each number of labels, learning curves, all models, the ensemble that predict uses,
    scores by patient, ROC, operating points, calibration, subgroups, the flow of patients and images, an embedding map,
    attention, the items of CLAIM and TRIPOD+AI, and the commands that make it again. Nothing is trained or extracted.

    Without --dataset, the page covers every dataset that has results. The first --metric scores all results again and
    chooses between models; the others are shown beside it.

    Thumbnails and IDs in the file may be patient data; --no-images leaves them out. Names of patients are never in it.

    Example: embcache report --dataset pneumonia --output study.html
    """
    check_suffix(output, "--output", ".html", ".htm")
    from embcache.report.page import write_report

    done = write_report(output, dataset, metrics=metric, home=home, ref=ref, images=not no_images, rows=rows)

    def show() -> None:
        echo_notes([*done.headlines, *done.notes])
        echo(f"report: {done.path} ({done.bytes / 1e6:.1f} MB, {done.results} results)")

    if not no_images:
        holds = f"{done.thumbnails:,} thumbnails and IDs" if done.thumbnails else "IDs"
        echo(f"the file contains {holds} of images, which may be patient data; --no-images leaves them out", err=True)
    data = {
        "report": str(done.path), "bytes": done.bytes, "datasets": list(done.datasets), "results": done.results,
        "thumbnails": done.thumbnails, "headlines": list(done.headlines), "notes": list(done.notes),
    }  # fmt: skip
    return Answer(data, show)


@command()
def tsne(
    *,
    dataset: OneDataset,
    backbone: list[str],
    output: Figures,
    coordinates: Annotated[Path | None, "FILE", "Write the points: CSV, or Parquet by its suffix."] = None,
    home: Path | None,
    config: MapConfig,
    ref: DatasetRef,
) -> Answer:
    """Map cached embeddings side by side: each backbone, and what a run of dvme fuses.

    Images are not needed. Below each map: silhouette of the classes and balanced accuracy of the ten nearest neighbors,
    both in the embedding itself and among images of other groups (patients), and how well the map preserves neighbors
    (trustworthiness). A number (--target age) is colored on a scale; of findings, the most frequent have colors, or
    --positive colors by one. Silhouette and balanced accuracy are of classes, and of one finding, alone.

    Example: embcache tsne --dataset pneumonia --backbone random,effnet_lite0 --run dvme-S --output maps.pdf
    """
    targets = figure_targets(output)
    if coordinates is not None and coordinates.suffix.lower() not in (".csv", ".parquet"):
        raise UsageError("points are written as CSV or Parquet", code="other-suffix", found=str(coordinates),
                         fix="--coordinates points.csv")  # fmt: skip
    ds = _one_dataset(dataset, ref, home)
    from embcache.figures.maps import draw_maps

    maps = draw_maps(ds, backbone, config, home=home, targets=targets)
    if coordinates is not None:
        _write_points(maps, coordinates)

    def show() -> None:
        _print_maps(maps)
        if coordinates is not None:
            echo(f"points: {coordinates}")

    return Answer(maps.to_json, show)


def _one_dataset(dataset: list[str], ref: DatasetRef, home: Path | None) -> ImageDataset:
    check_one(dataset, None, "--dataset NAME")
    from embcache.data.classes import change_notes
    from embcache.data.dataset import find_dataset

    ds, _ = find_dataset(dataset[0], ref, home)
    for note in change_notes(ds):
        print_note(note)
    return ds


def _write_points(maps: Maps, target: Path) -> None:
    from embcache.results.layout import csv_text

    table = maps.table()
    if target.suffix.lower() == ".csv":
        write_output(target, csv_text(list(table.columns), table.astype(object).itertuples(index=False, name=None)))
    else:
        write_output(target, table.to_parquet(None, index=False))


def _print_maps(maps: Maps) -> None:
    from embcache.figures.maps import decimals

    echo(f"{maps.dataset}: {maps.shown.remark}, {len(maps.shown.ids):,} images")
    print_objects(maps.panels, {
        "embedding": "{0.label}",
        "dimensions": "{0.dim}",
        "silhouette": lambda panel: decimals(panel.scores.silhouette, 3),
        "k-NN accuracy": lambda panel: decimals(panel.scores.knn_accuracy, 3),
        "trustworthiness": "{0.scores.trustworthiness:.3f}",
        "": "{0.remark}",
    }, notes=[
        "silhouette and k-NN accuracy (balanced, 10 neighbors), among images of other groups, of the embedding; "
        "trustworthiness of its map"
    ])  # fmt: skip
    echo_figures(maps.paths)


@command()
def attention(
    *,
    run: Annotated[str | None, "ID", "Run of dvme or dvme-token: ID or a unique prefix."] = None,
    image: Annotated[Path | None, "FILE", "Instead of a run: one image file."] = None,
    backbone: OneBackbone,
    output: Figures,
    home: Path | None,
    config: AttentionConfig,
    ref: Annotated[DatasetRef, Only("data_root", "allow_missing")],
) -> Answer:
    """Show what is attended to: by a DVME run, or by a vision transformer in one image.

    With --run: the mean map over the test images with the backbones' borders (Figure F1), attention between backbones
    with its spread over folds and by class, its entropy, and the components that receive most; from the cache alone.
    With --image: the class token of the last block, per head, over the image; dino or a timm: vision transformer.

    Example: embcache attention --run dvme-F-1a2b   ·   embcache attention --image xray.png --backbone dino
    """
    if (run is None) == (image is None):
        raise UsageError("name a run or an image", code="nothing-named",
                         expected="--run ID or --image FILE", fix="embcache results")  # fmt: skip
    if image is None and (config.weights is not None or config.transform is not None or backbone):
        raise UsageError("--backbone, --weights and --transform go with --image", code="unused-option",
                         fix="leave them out")  # fmt: skip
    if len(backbone) > 1:
        raise UsageError("attention in an image is of one backbone", code="several-backbones",
                         found=", ".join(backbone), fix="--backbone dino")  # fmt: skip
    targets = figure_targets(output)
    if image is not None:
        return _image_attention(image, (backbone or ["dino"])[0], config, home, targets)
    from embcache.data.classes import as_in_run, ref_of_run
    from embcache.data.dataset import find_dataset
    from embcache.figures.attention import draw_attention, run_attention
    from embcache.runs.folders import find_run_anywhere

    result, folder = find_run_anywhere(str(run), home)
    ds = as_in_run(find_dataset(result.dataset, ref_of_run(ref, result.request), home=home)[0], result.request)
    found = run_attention(ds, result, folder, home=home, recipe=config.recipe)
    default = default_figure(ds.name, home, f"attention-{result.id}.png")
    paths = [draw_attention(found, ds.synthetic, target) for target in targets or [default]]

    def show() -> None:
        _print_attention(found)
        echo_figures(paths)

    return Answer(found.to_json() | {"figures": [str(path) for path in paths]}, show)


def _image_attention(image: Path, name: str, config: AttentionConfig, home: Path | None, targets: list[Path]) -> Answer:
    from embcache.figures.attention import image_attention
    from embcache.figures.plots import plot_heads

    found = image_attention(image, name, weights=config.weights, transform=config.transform, home=home)
    paths = targets or [Path(f"{image.stem}-attention.png")]
    for path in paths:
        plot_heads(found.pixels, found.heads, f"{name}: class token of the last block", path)
    answer = {"backbone": name, "image": str(image), "patch": found.patch, "heads": found.heads.tolist()}
    return Answer(answer | {"figures": [str(path) for path in paths]}, lambda: echo_figures(paths))


def _print_attention(found: RunAttention) -> None:
    r, names = found.result, list(found.result.backbones)
    echo(f"{r.dataset}: {r.id}, {found.folds} folds, {found.shown.remark}, {len(found.shown.ids):,} images")

    def print_mass(mass: Any, std: Any = None) -> None:
        cells = [[f"{value:.3f}" for value in row] for row in mass.tolist()]
        if std is not None and found.folds > 1:
            lines = zip(cells, std.tolist(), strict=True)
            cells = [[f"{c} ± {s:.3f}" for c, s in zip(*line, strict=True)] for line in lines]
        rows = [[name, *row] for name, row in zip(names, cells, strict=True)]
        print_table(["from", *(f"to {b}" for b in names)], rows)

    echo("\nshare of attention, from a row's tokens to a column's: mean ± sd over folds")
    print_mass(found.mass, found.mass_std)
    for label, mass in found.by_class.items():
        echo(f"\nimages with {label}" if r.task.kind == "findings" else f"\n{label} alone")
        print_mass(mass)
    spread = f" ± {found.entropy_std:.4f}" if found.folds > 1 else ""
    echo(f"\nentropy: {found.entropy:.4f}{spread} of log N; 1 is attention that makes no difference")
    even = 1 / len(found.weights)
    echo(f"components that receive most, with their share of all attention (even: {even:.5f}):")
    print_table(["backbone", "component", "share"], [[b, c, f"{share:.5f}"] for b, c, share in found.received])


@command()
def neighbors(
    *,
    image: Annotated[str, "ID", "ID of a cached image, or a unique end of it."],
    dataset: OneDataset,
    backbone: list[str],
    output: Figures,
    home: Path | None,
    config: NeighborsConfig,
    ref: DatasetRef,
) -> Answer:
    """Show the images nearest to one in cached features, as a table and a contact sheet.

    Nearest by the cosine of standardized features, under each backbone (default: all that are cached). The sheet needs
    the images; where they are missing, the table names them.

    Example: embcache neighbors --image test/NORMAL/IM-0001-0001.jpeg -k 8 --dataset pneumonia
    """
    targets = figure_targets(output)
    ds = _one_dataset(dataset, ref, home)
    from embcache.figures.neighbors import draw_neighbors, find_neighbors

    found = find_neighbors(ds, image, backbone, config, home=home)
    default = default_figure(ds.name, home, f"neighbors-{slug(found[0].image.id)}.png")
    paths = [draw_neighbors(ds, found, target) for target in targets or [default]]

    def show() -> None:
        for each in found:
            query = each.image
            echo(f"{each.backbone}: nearest to {query.id} ({query.words or 'no label'}, {query.split})")
            rows = [
                [
                    k,
                    n.id,
                    n.words or "no label",
                    n.split,
                    f"{n.similarity:.4f}",
                    "same group" * (n.group == query.group),
                ]
                for k, n in enumerate(each.nearest, start=1)
            ]
            print_table(["", "id", ds.task.noun, "split", "similarity", ""], rows)
            echo()
        echo_figures(paths, "" if ds.root else "   (without pictures: the images are missing)")

    return Answer([each.to_json() for each in found], show)


@command()
def audit(
    *,
    dataset: OneDataset,
    backbone: OneBackbone,
    output: Annotated[Path | None, "FILE.csv", "Write the IDs of training images to leave out, and why."] = None,
    show: Annotated[int, "N", "Number of lines to print of each list."] = 10,
    home: Path | None,
    config: AuditConfig,
    ref: DatasetRef,
) -> Answer:
    """Look for near-duplicates, likely label errors and outliers, and measure the effect of leaving them out.

    Audit needs cached features only, not the images. A label is a likely error where models that did not see the image
    confidently disagree with it; each finding is judged by itself. Of a number (--target age), images with a value far
    from what such models predict are listed. Review the images before you trust either the label or the model.

    Example: embcache audit --dataset pneumonia --backbone effnet_lite0 --output exclude.csv
    """
    check_one(dataset, backbone, "embcache audit --dataset NAME --backbone NAME")
    check_number("--show", show, 0, 1_000_000)
    from embcache.data.dataset import find_dataset
    from embcache.figures.audit import audit_dataset
    from embcache.figures.shown import backbones_or_cached
    from embcache.results.layout import csv_text

    if output is not None:
        check_target(check_suffix(output, "--output", ".csv"))
    ds, _ = find_dataset(dataset[0], ref, home)
    cached = backbones_or_cached(ds, backbone, home)
    # A network without training sees little of what matters: it is not chosen only because it was cached first.
    chosen = backbone or [name for name in cached if name.partition(":")[0] != "random"] or cached
    found = audit_dataset(ds, chosen[0], config, home=home)
    if output is not None:
        write_output(output, csv_text(["id", "reason"], found.exclude))

    def print_all() -> None:
        _print_audit(found, ds, show)
        if output is not None:
            echo(f"wrote {output}: {len(found.exclude):,} training images to leave out")

    return Answer(found.to_json, print_all)


def _print_audit(found: Audit, ds: ImageDataset, show: int) -> None:
    def table(headers: list[str], rows: list[list[str]]) -> None:
        if rows and show:
            print_table(headers, rows[:show])
        if len(rows) > show:
            echo(f"… and {len(rows) - show:,} more (--show {len(rows)}, or --json -)")

    echo(
        f"{found.dataset}: {found.images:,} labeled images for training and {found.test_images:,} for testing, "
        f"features of {found.backbone}"
    )
    kinds = ("across splits", "across groups", "within a group")
    counts = ", ".join(f"{sum(p.kind == kind for p in found.pairs):,} {kind}" for kind in kinds)
    differing = sum(not p.same_label for p in found.pairs)
    labels = "values" if found.residuals is not None else "labels"
    echo(f"\nnear-duplicates: {len(found.pairs):,} pairs ({counts}), {differing:,} of them with different {labels}")
    rows = [[p.one, p.other, f"{p.similarity:.4f}", p.kind, "" if p.same_label else "other label"] for p in found.pairs]
    table(["image", "image", "similarity", "", ""], rows)
    judge, errors, number = found.judge, found.label_errors, ds.kind == "number"
    looked = f"numbers far from what is predicted of {ds.class_names[0]}" if number else "likely label errors"
    if judge is None:
        echo(
            f"\n{looked}: not looked for" + ("" if number else f", since fewer than two {ds.task.nouns} can be judged")
        )
    else:
        echo(
            f"\n{looked}: {judge.found:,} of {judge.labels:,} training labels, "
            f"{judge.test_found:,} of {judge.test_labels:,} test labels"
        )
        if judge.too_weak:
            how = f"balanced accuracy on images that it did not see is {judge.balanced_accuracy or 0.0:.2f}"
            how = f"R² on images that it did not see is {judge.r2:.2f}" if number else how
            echo(
                f"· this model is too weak to judge labels: its {how},\n  and it doubts {judge.share:.0%} of the labels"
                f"{'' if number else ' of a class on average'}. Nothing is left out because of its doubts"
            )
        classes = ds.class_names

        def words(e: LabelError, c: int) -> str:
            return f"no {e.finding}" if e.finding and not c else e.finding or classes[c]

        lines = [
            [e.id, e.split, words(e, e.label), f"{e.p_label:.3f}", words(e, e.proposed), f"{e.p_proposed:.3f}"]
            for e in errors
        ]
        table(["image", "split", "label", "p", "proposed", "p"], lines)
        lines = [
            [r.id, r.split, f"{r.value:.6g}", f"{r.predicted:.6g}", f"{r.deviations:+.1f}"] for r in found.residuals
        ]
        table(["image", "split", "value", "predicted", "deviations"], lines)
        if len(errors) + len(found.residuals) < judge.found + judge.test_found:
            echo("· only the most confident are listed: --most N lists more")
    echo(f"\noutliers: {len(found.outliers):,}")
    table(["image", "split", "deviations"], [[o.id, o.split, f"{o.deviations:.1f}"] for o in found.outliers])
    _print_effect(found, "ridge" if number else "logistic")
    echo_notes(found.notes)


def _print_effect(found: Audit, regression: str) -> None:
    if not found.exclude:
        echo("\nnothing to leave out")
        return
    echo(f"\nto leave out: {len(found.exclude):,} of {found.images:,} training images")
    e = found.effect
    if e is None:
        echo(f"effect: cannot be measured: {found.no_effect}")
    else:
        echo(f"effect on the {e.metric} of all test images ({regression} regression on F, mean ± sd over folds)")
        rows = [["all training images", spread(*e.before)], ["without those to leave out", spread(*e.after)]]
        print_table(["trained on", e.metric], rows)
    echo("· test images are never left out: removing those that a model gets wrong only makes it look better")
