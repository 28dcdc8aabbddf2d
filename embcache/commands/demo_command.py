"""``embcache demo``: the built-in sample from images to a table and a figure, offline."""

from __future__ import annotations

from embcache.commands.options import HomeOption
from embcache.commands.output import echo, print_table


def demo(home: HomeOption = None) -> None:
    """Extract, probe, fuse and draw a built-in synthetic sample, offline and in some minutes.

    Runs four frozen backbones (a random ResNet-50 and three pretrained EfficientNet-Lites from PyPI), linear probes at
    40, 200 and all training images, a DVME fusion and a t-SNE figure. Results are kept, so a second run takes seconds.
    """
    from embcache.study.demo import pivot_results, run_demo

    outcome = run_demo(home=home)
    first = outcome.results[0]
    headers, rows = pivot_results(outcome.results)
    test = int((outcome.dataset.table["split"] == "test").sum())
    echo(f"\nsynthetic sample: {first.metric} on {test} test images, mean ± sd over {len(first.folds)} folds\n")
    print_table(
        headers, rows,
        notes=[
            "the images are synthetic, drawn by embcache: the scores say nothing about medicine",
            "labels of each fold: training + validation",
        ],
    )  # fmt: skip
    echo(
        f"""
features, splits and runs  {outcome.home}
t-SNE figure               {outcome.figure}

Your own images (a folder per class, or a CSV of path,label[,group]):
  embcache extract --backbone random,effnet_lite0,effnet_lite1,effnet_lite2 --dataset folder --data-root FOLDER
  embcache probe --head linear --subset S,M,F --dataset folder --data-root FOLDER
The backbones of the paper: embcache backbones        The datasets of the paper: embcache datasets"""
    )
