"""Draw docs/pneumonia.svg from the table below, which docs/index.md shows too: ``python docs/pneumonia_figure.py``."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

LABELS = (50, 500, 4173)
ROWS = {  # test AUC, mean and standard deviation over five folds
    "effnet_lite0, embcache": ((0.920, 0.017), (0.952, 0.006), (0.962, 0.003)),
    "supervised ResNet-50, Table B3 of the paper": ((0.879, 0.023), (0.895, 0.015), (0.940, 0.003)),
    "random ResNet-50, embcache": ((0.718, 0.046), (0.869, 0.013), (0.926, 0.006)),
    "random ResNet-50, Table B3 of the paper": ((0.690, 0.034), (0.826, 0.024), (0.891, 0.014)),
}
STYLES = (("#0072B2", "o", "-"), ("#0072B2", "o", "--"), ("#D55E00", "s", "-"), ("#D55E00", "s", "--"))


def main() -> None:
    """Write the figure."""
    plt.rcParams |= {"font.size": 10, "svg.hashsalt": "embcache", "axes.spines.top": False, "axes.spines.right": False}
    figure, axes = plt.subplots(figsize=(7.6, 3.9), layout="constrained")
    for place, ((name, values), (color, marker, line)) in enumerate(zip(ROWS.items(), STYLES, strict=True)):
        x = [n * (1 + 0.03 * (place - 1.5)) for n in LABELS]  # beside each other, not on top
        means, deviations = zip(*values, strict=True)
        filled = color if line == "-" else "white"
        axes.errorbar(
            x, means, deviations, color=color, marker=marker, linestyle=line, markerfacecolor=filled, capsize=3,
            markersize=6, label=name,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks(LABELS, [f"{n:,}" for n in LABELS])
    axes.minorticks_off()
    axes.set_xlabel("training images of a fold")
    axes.set_ylabel("test AUC, mean ± sd over 5 folds")
    axes.set_title("Pneumonia on chest X-rays: a linear head on frozen features", loc="left", fontsize=11)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(Path(__file__).with_name("pneumonia.svg"), metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
