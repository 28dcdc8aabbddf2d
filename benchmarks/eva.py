"""The linear probe against kaiko-eva's offline ``fit``: five models on embeddings that are already written.

kaiko-eva gets an environment of its own, made here (``python -m venv``, ``pip install kaiko-eva``) unless ``--env`` has
one. It reads one .pt file an image, as its offline mode does, and trains ``n_runs=5`` times: batch size 64, Adam at
1e-3, as many epochs as the probe trained, no early stopping, its usual metrics. The probe is ``embcache probe`` from
the shell; both include the start of the program.

    python benchmarks/eva.py [--repeats 5] [--env FOLDER] [--workers N]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import Cost, faster, print_table, shell, told
from probing import DIM, probe, write_plain
from synthetic import pneumonia_like, put_store

FIT = """
import sys
import torch
from eva.core.data.dataloaders import DataLoader
from eva.core.data.datamodules import DataModule
from eva.core.data.datamodules.schemas import DataloadersSchema, DatasetsSchema
from eva.core.data.datasets.classification import EmbeddingsClassificationDataset
from eva.core.interface import Interface
from eva.core.metrics import BinaryClassificationMetrics
from eva.core.metrics.structs import MetricsSchema
from eva.core.models.modules import HeadModule
from eva.core.trainers import Trainer

root, epochs, workers, runs, logs = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]


def data(split):
    return EmbeddingsClassificationDataset(root=root, manifest_file="manifest.csv", split=split)


def loader(shuffle):
    more = {} if workers else {"persistent_workers": False, "prefetch_factor": None}
    return DataLoader(batch_size=64, shuffle=shuffle, num_workers=workers, pin_memory=False, **more)


class Loss(torch.nn.BCEWithLogitsLoss):
    def forward(self, logits, target):
        return super().forward(logits, target.float())


Interface().fit(
    Trainer(n_runs=runs, max_epochs=epochs, accelerator="cpu", default_root_dir=logs, enable_progress_bar=False),
    HeadModule(
        head=torch.nn.Linear(int(sys.argv[6]), 1),
        criterion=Loss(),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
        metrics=MetricsSchema(common=BinaryClassificationMetrics()),
    ),
    DataModule(
        datasets=DatasetsSchema(train=data("train"), val=data("val"), test=data("test")),
        dataloaders=DataloadersSchema(train=loader(True), val=loader(False), test=loader(False)),
    ),
)
"""


def make_environment(folder: Path) -> Path:
    """A virtual environment with kaiko-eva; its interpreter."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "kaiko-eva"], check=True)
    return python


def write_embeddings(plain: Path, root: Path, python: Path) -> None:
    """One .pt file an image and the manifest of the first fold, written as kaiko-eva's own torch writes them."""
    splits = json.loads((plain / "splits.json").read_text())
    labels = np.load(plain / "y.npy")
    parts = {"train": splits["folds"][0][0], "val": splits["folds"][0][1], "test": splits["test"]}
    lines = [f"{row}.pt,{labels[row]},{split}" for split, rows in parts.items() for row in rows]
    root.mkdir()
    (root / "manifest.csv").write_text("embeddings,target,split\n" + "\n".join(lines) + "\n")
    write = "import sys, numpy, torch; [torch.save(r.clone(), f'{sys.argv[2]}/{i}.pt') for i, r in "
    write += "enumerate(torch.from_numpy(numpy.load(sys.argv[1])))]"
    subprocess.run([str(python), "-c", write, str(plain / "x.npy"), str(root)], check=True)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--env", type=Path, help="a folder for kaiko-eva's environment; made where it is not there")
    parser.add_argument("--workers", type=int, default=0, help="of kaiko-eva's loaders; its default is one per core")
    parser.add_argument("--epochs", type=int, help="of kaiko-eva; default: as many as the probe trains on average")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        python = make_environment(asked.env or folder / "env")
        home = folder / "home"
        put_store(home, pneumonia_like(), "dino-like", DIM)
        write_plain(home, folder)
        write_embeddings(folder, folder / "embeddings", python)
        script = folder / "fit.py"
        script.write_text(FIT)
        ours: list[Cost] = []
        theirs: list[Cost] = []
        epochs = asked.epochs
        for number in range(asked.repeats):
            answer = folder / "ours.json"
            ours.append(probe(home, "pneumonia-like", answer, "--backbone", "dino-like", "--subset", "F"))
            (result,) = json.loads(answer.read_text())
            epochs = epochs or round(statistics.mean(fold["epochs"] for fold in result["folds"]))
            command = [str(script), str(folder / "embeddings"), str(epochs), str(asked.workers), "5"]
            theirs.append(shell(*command, str(folder / f"logs{number}"), str(DIM), python=str(python)))
            print(f"{told(ours[-1:])} beside {told(theirs[-1:])}", file=sys.stderr, flush=True)
        asking = [str(python), "-c", "from importlib.metadata import version as v; print(v('kaiko-eva'), v('torch'))"]
        version, torch_version = subprocess.check_output(asking, text=True).split()
    print_table(
        ["work", "embcache", "beside it", "ratio"],
        [
            [
                f"linear, 5 models, {result['n_train']:,} training images × {DIM}",
                f"{told(ours)}, {statistics.mean(f['epochs'] for f in result['folds']):.0f} epochs",
                f"kaiko-eva {version} offline fit {told(theirs)}, {epochs} epochs, "
                f"{asked.workers} workers (torch {torch_version})",
                faster(ours, theirs),
            ]
        ],
    )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
