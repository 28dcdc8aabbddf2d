"""``embcache probe``, ``finetune`` and ``splits``: heads and backbones that are trained."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embcache.commands.options import (
    METRICS,
    Answer,
    OneBackbone,
    Skip,
    check_named,
    check_suffix,
    command,
    print_next,
)
from embcache.commands.output import ProgressBar, echo, json_text, print_table
from embcache.commands.scores import in_metrics, print_results
from embcache.config import DatasetRef, FinetuneConfig, ProbeConfig, ProtocolConfig
from embcache.errors import ProtocolError, UsageError
from embcache.fields import bare_name, check_subsets, parse_weights, split_list
from embcache.log import log
from embcache.probe.metrics import find_metric

if TYPE_CHECKING:
    from embcache.probe.protocol import Splits
    from embcache.runs.folders import Result

Metrics = Annotated[
    list[str], "NAME[,NAME…]", f"{METRICS}; the first one chooses epochs. [default: that of the dataset]"
]


@command(table=True)
def probe(
    *,
    subset: list[str],
    dataset: list[str],
    backbone: list[str],
    home: Path | None,
    metric: Metrics,
    config: Annotated[ProbeConfig, Skip("metric")],
    ref: DatasetRef,
) -> Answer:
    """Train heads on cached features and test them: five folds, early stopping, means and intervals.

    Without --dataset every dataset with cached features is probed. Heads that take one backbone give one result for
    each (default: all that are cached); dvme fuses the set (default: simclr,swav,dino where they are cached, else all
    that are). Images are not needed.

    Example: embcache probe --head linear --subset S,M,F --dataset pneumonia
    """
    from embcache.probe.heads import heads

    subsets = subset or ["S"]
    check_subsets(subsets)
    names = split_list(config.head)
    for name in names:
        if name not in heads and ":" not in name:
            raise heads.unknown(name)
    _check_metrics(metric)
    config = replace(config, metric=metric[0] if metric else None)
    configs = [replace(config, head=name, attention=config.attention if name == "dvme" else None) for name in names]

    from embcache.probe.probe import probe_cached  # imports torch, which a slip in a flag need not wait for

    found = []
    with ProgressBar("epoch", "finished results are saved; the same command computes only the others") as bar:
        for each in configs:
            found += probe_cached(dataset, backbone, subsets, each, ref, home=home, progress=bar.update)
    return _answer(in_metrics(found, metric, home))


def _answer(results: Sequence[Result]) -> Answer:
    ids = list(dict.fromkeys(result.id for result in results))
    following = ["results", *(ids if len(ids) == 1 else [])]
    return Answer([result.to_json() for result in results], lambda: print_results(results), following)


def _check_metrics(names: Sequence[str]) -> None:
    """Refuse an unknown metric before the training, not after it."""
    for name in names:
        if ":" not in name:
            with suppress(ProtocolError):  # of another target than two classes
                find_metric(name, 2)


@command(table=True)
def finetune(
    *,
    backbone: list[str],
    dataset: list[str],
    subset: list[str],
    metric: Metrics,
    home: Path | None,
    config: Annotated[FinetuneConfig, Skip("metric")],
    ref: DatasetRef,
) -> Answer:
    """Train backbones and a head together on augmented images, by the protocol of probing, and test them.

    Heads that take one backbone give one result per backbone; dvme trains its backbones together (default:
    simclr,swav,dino). A checkpoint is kept after every epoch: --resume continues an interrupted run.

    Example: embcache finetune --backbone random --dataset pneumonia --subset S --val matched
    """
    _check_metrics(metric)
    from embcache.data.classes import refuse_unclear
    from embcache.data.dataset import find_dataset
    from embcache.finetune.finetune import finetune as finetune_dataset
    from embcache.probe.heads import find_head
    from embcache.probe.inputs import PAPER_SET

    fuses = {name: find_head(name).fuses for name in split_list(config.head)}
    check_named("finetune", dataset=dataset, backbone=backbone or PAPER_SET * all(fuses.values()))
    if len(dataset) > 1 and (ref.data_root or ref.name or config.splits):
        raise UsageError(
            "--data-root, --name and --splits are for one dataset", code="one-dataset", found=", ".join(dataset),
            fix="--dataset NAME",
        )  # fmt: skip
    config = replace(config, metric=metric[0] if metric else None)
    weights = parse_weights(config.weights, backbone or PAPER_SET)
    loaded = [find_dataset(name, ref, home) for name in dataset]
    for found, _ in loaded if ref.task is None else ():
        refuse_unclear(found)
    sets = [
        (name, used)
        for name, fusing in fuses.items()
        for used in ([backbone or PAPER_SET] if fusing else [[each] for each in backbone])
    ]
    results = []
    with ProgressBar("img", "the last whole epoch is kept; the same command with --resume continues") as bar:
        for found, source in loaded:
            for name, used in sets:
                own = tuple(f"{each}={file}" for each, file in weights.items() if each in map(bare_name, used))
                options = replace(config, head=name, weights=own)
                results += [
                    finetune_dataset(found, used, size, options, home=home, source=source, progress=bar.update)
                    for size in subset or ["S"]
                ]
    return _answer(in_metrics(results, metric, home))


DatasetName = Annotated[str, "NAME", "Name; see `embcache datasets`."]


@command()
def export(
    *,
    dataset: DatasetName,
    output: Annotated[str, "-o FILE|-", "File to write, or -."] = "-",
    subset: Annotated[list[str], "S,M,F,N", "Subsets, as in `embcache probe`. [default: S,M,F]"],
    backbone: OneBackbone,
    home: Path | None,
    config: Annotated[ProtocolConfig, Skip("splits", "metric", "positive")],
    ref: DatasetRef,
) -> None:
    """Write the splits that `embcache probe` draws, as JSON: IDs of the test set and of every fold and subset.

    Example: embcache splits export --dataset pneumonia --subset S,M,F --output pneumonia-splits.json
    """
    from embcache.data.classes import target_flags
    from embcache.data.dataset import find_dataset
    from embcache.probe.inputs import plan_cached
    from embcache.probe.protocol import write_splits

    if output != "-":
        check_suffix(Path(output), "--output", ".json")
    if len(backbone) > 1:
        raise UsageError(
            "--backbone selects the one store by which identical images are found", code="one-backbone",
            found=", ".join(backbone), fix=f"--backbone {backbone[0]}",
        )  # fmt: skip
    found, source = find_dataset(dataset, ref, home)
    splits, store = plan_cached(
        found, home=home, backbone=backbone[0] if backbone else None, subsets=subset or ["S", "M", "F"],
        folds=config.folds, seed=config.seed, val=config.val, test=config.test,
        exclude_test_overlap=config.exclude_test_overlap,
    )  # fmt: skip
    knows = f"identical and unreadable images as in {store.path.name}" if store else "no features cached yet"
    log.info(f"labels and groups from the {source} dataset; {knows}")
    if output == "-":
        echo(json_text(splits.to_json(), indent=1, shown=True), nl=False)
        return
    write_splits(splits, Path(output))
    _print(splits)
    echo(f"written to {output}")
    print_next("probe", "--dataset", found.name, *target_flags(found), "--splits", output, home=home)


@command()
def import_(
    *,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File written by `embcache splits export`.")],
    dataset: DatasetName,
    home: Path | None,
    ref: Annotated[DatasetRef, Skip("name")],
) -> None:
    """Check the splits of others against a dataset and keep them for `embcache probe --splits NAME`.

    IDs that the dataset does not have, a group on both sides of a fold, and images that are both trained and tested on
    are refused.

    Example: embcache splits import pneumonia-splits.json --dataset pneumonia
    """
    from embcache.data.classes import target_flags
    from embcache.data.dataset import find_dataset
    from embcache.probe.inputs import import_splits

    found, _ = find_dataset(dataset, ref, home)
    imported = import_splits(file, found, home)
    _print(imported.splits)
    echo(f"kept as {imported.path}")
    words = ["--dataset", found.name, *target_flags(found), "--splits", imported.name]
    print_next("probe", *words, "--subset", str(imported.splits.subsets[0]), home=home)


def _print(splits: Splits) -> None:
    rows = []
    for subset in splits.subsets:
        for fold in range(splits.n_folds):
            train, val = splits.train[fold, subset], splits.val[fold, subset]
            counts = splits.task.counts(splits.labels[train])
            rows.append([subset, fold, len(train), " ".join(map(str, counts)), len(val)])
    print_table(["subset", "fold", "train", f"by {splits.task.noun}", "val"], rows, notes=[
        f"{splits.task.nouns}: {', '.join(splits.class_names)}",
        f"test: {len(splits.test):,} images ({splits.test_set})", *splits.notes,
    ])  # fmt: skip
