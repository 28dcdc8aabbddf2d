"""``embcache finetune``: backbones and a head are trained together, on images."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from embcache.commands.options import (
    BackboneOption,
    DatasetOption,
    HomeOption,
    JsonOption,
    MetricOption,
    Skip,
    SubsetOption,
    load_named,
    next_command,
    split_list,
    takes_configs,
    write_json,
)
from embcache.commands.output import ProgressBar, echo
from embcache.commands.probe_command import in_metrics, print_results
from embcache.config import DatasetRef, FinetuneConfig
from embcache.errors import UsageError
from embcache.fields import parse_weights


@takes_configs
def finetune(
    backbone: BackboneOption = None,
    dataset: DatasetOption = None,
    subset: SubsetOption = None,
    metric: MetricOption = None,
    home: HomeOption = None,
    json: JsonOption = None,
    *,
    config: Annotated[FinetuneConfig, Skip("metric")],
    ref: Annotated[DatasetRef, Skip("target")],
) -> None:
    """Train backbones and a head together on augmented images, by the protocol of probing, and test them.

    Heads that take one backbone give one result per backbone; dvme trains its backbones together (default:
    simclr,swav,dino). A checkpoint is kept after every epoch: --resume continues an interrupted run.

    Example: embcache finetune --backbone random --dataset pneumonia --subset S --val matched
    """
    from embcache.finetune.finetune import finetune as finetune_dataset
    from embcache.probe.heads import make_head
    from embcache.probe.inputs import PAPER_SET

    names, backbones, metrics = split_list(dataset), split_list(backbone), split_list(metric)
    heads = split_list(config.head)
    fuses = {name: make_head(name).fuses for name in heads}
    if not names:
        raise UsageError(
            "no dataset was named", code="no-dataset",
            fix="embcache finetune --dataset NAME …   (embcache datasets lists them)",
        )  # fmt: skip
    if not backbones and not all(fuses.values()):
        raise UsageError(
            "no backbone was named", code="no-backbone",
            fix="embcache finetune --backbone NAME …   (embcache backbones lists them)",
        )  # fmt: skip
    if len(names) > 1 and (ref.data_root or ref.name or config.splits):
        raise UsageError(
            "--data-root, --name and --splits are for one dataset", code="one-dataset", found=", ".join(names),
            fix="--dataset NAME",
        )  # fmt: skip
    config = replace(config, metric=metrics[0] if metrics else None)
    weights = parse_weights(config.weights, backbones or PAPER_SET)
    loaded = [load_named(name, ref, home) for name in names]
    results = []
    with ProgressBar("img") as bar:
        try:
            for found, source in loaded:
                for name in heads:
                    for used in [backbones or PAPER_SET] if fuses[name] else [[each] for each in backbones]:
                        own = tuple(f"{each}={file}" for each, file in weights.items() if each in used)
                        options = replace(config, head=name, weights=own)
                        for size in split_list(subset) or ["S"]:
                            results.append(
                                finetune_dataset(
                                    found, used, size, options, home=home, source=source, progress=bar.update
                                )
                            )
        except (KeyboardInterrupt, SystemExit):
            echo("\nstopped: the last whole epoch is kept; the same command with --resume continues", err=True)
            raise
    results = in_metrics(results, metrics, home)
    if json:
        write_json([result.to_json() for result in results], json)
    if json != "-":
        print_results(results)
        next_command("results", results[0].id, home=home)
