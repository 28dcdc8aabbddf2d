"""Trained heads against the plain PyTorch loop; a grid of backbones and sizes; rows from ten thousand to a million.

Everything is measured from the shell, program start, reading of features and test scores included, and the ways take
turns. The plain loop is what anyone would write: a DataLoader over features in memory, nn.Linear, torch.optim.Adam,
ReduceLROnPlateau, scikit-learn's AUC after each epoch, one fold after the other; the same protocol, the same folds, and
the features in one .npy file.

    python benchmarks/probing.py [--repeats 5] [--rows 10000,100000,1000000] [--buffer 80000] [--only linear,grid]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import numpy as np
from common import Cost, faster, print_table, shell, told
from synthetic import make_dataset, pneumonia_like, put_store

DIM = 1536
GRID = {"simclr-like": 2048, "swav-like": 2048, "supervised-like": 2048, "random-like": 2048, "dino-like": 1536}
SIZES = "50,100,200,M,F"
IMPORTS = "import torch, zarr, sklearn.metrics, pandas, embcache.probe.probe, embcache.probe.inputs"


def probe(home: Path, dataset: str, answer: Path, *options: str) -> Cost:
    """``embcache probe`` of the linear head."""
    asked = ["--home", str(home), "--dataset", dataset, "--again", "--json", str(answer), *options]
    return shell("-m", "embcache", "probe", *asked)


def plain_loop(folder: Path, threads: int = 0) -> None:
    """Train and test five folds as a plain script would."""
    import torch
    from sklearn.metrics import roc_auc_score
    from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

    if threads:
        torch.set_num_threads(threads)
    x, y = torch.from_numpy(np.load(folder / "x.npy")), torch.from_numpy(np.load(folder / "y.npy"))
    splits = json.loads((folder / "splits.json").read_text())
    test = torch.tensor(splits["test"])
    scores = []
    for number, (train, val) in enumerate(splits["folds"]):
        torch.manual_seed(number)
        rows, held = torch.tensor(train), torch.tensor(val)
        labels = y[rows]
        sampler = WeightedRandomSampler((1.0 / labels.bincount().double())[labels].tolist(), len(rows))
        loader = DataLoader(TensorDataset(x[rows], labels), batch_size=64, sampler=sampler)
        model = torch.nn.Linear(x.shape[1], 2)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", factor=0.1, patience=5, threshold=0)
        best, best_epoch, state = -1.0, 0, {}
        for epoch in range(1, 51):
            for batch, target in loader:
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(batch), target).backward()
                optimizer.step()
            with torch.no_grad():
                score = roc_auc_score(y[held], model(x[held]).softmax(-1)[:, 1])
            plateau.step(score)
            if score > best:
                best, best_epoch, state = score, epoch, {n: p.clone() for n, p in model.state_dict().items()}
            if epoch >= 30 and epoch - best_epoch >= 10:
                break
        model.load_state_dict(state)
        with torch.no_grad():
            scores.append(float(roc_auc_score(y[test], model(x[test]).softmax(-1)[:, 1])))
    (folder / "plain.json").write_text(json.dumps({"mean": float(np.mean(scores))}))


def write_plain(home: Path, folder: Path) -> None:
    """What the plain loop reads: features, labels and the splits that a probe draws."""
    from embcache.probe.inputs import open_stores, plan_for

    ds = pneumonia_like()
    store = open_stores(ds, [["dino-like"]], home)["dino-like"]
    plan = plan_for(ds, [store], subsets=["F"])
    place = {name: row for row, name in enumerate(store.ids.tolist())}
    np.save(folder / "x.npy", store.features[np.array([place[i] for i in plan.ids])])
    np.save(folder / "y.npy", plan.labels)
    folds = [[plan.train[f, "F"].tolist(), plan.val[f, "F"].tolist()] for f in range(plan.n_folds)]
    (folder / "splits.json").write_text(json.dumps({"test": plan.test.tolist(), "folds": folds}))


def linear_row(home: Path, folder: Path, repeats: int) -> list[str]:
    """Five folds of the linear head against the plain loop."""
    write_plain(home, folder)
    ours: list[Cost] = []
    plain: list[Cost] = []
    single: list[Cost] = []
    options = ("--backbone", "dino-like", "--subset", "F")
    for _ in range(repeats):
        ours.append(probe(home, "pneumonia-like", folder / "ours.json", *options))
        plain.append(shell(__file__, "--plain", str(folder)))
        single.append(shell(__file__, "--plain", str(folder), "--threads", "1"))
    (result,) = json.loads((folder / "ours.json").read_text())
    theirs = json.loads((folder / "plain.json").read_text())["mean"]
    return [
        f"linear, 5 folds, {result['n_train']:,} training images × {DIM}",
        f"{told(ours)} (test AUC {result['mean']:.4f})",
        f"plain PyTorch loop {told(plain)} (test AUC {theirs:.4f}); with one thread {told(single)}",
        f"{faster(ours, plain)}; {faster(ours, single)}",
    ]


def grid_row(home: Path, folder: Path, repeats: int) -> list[str]:
    """Five backbones at five sizes, five folds each."""
    options = ("--backbone", ",".join(GRID), "--subset", SIZES)
    costs = [probe(home, "pneumonia-like", folder / "grid.json", *options) for _ in range(repeats)]
    cells = len(json.loads((folder / "grid.json").read_text()))
    return [f"linear, {cells} cells of {SIZES}, 5 folds each", f"{told(costs)} in all", "", ""]


def rows_rows(home: Path, folder: Path, sizes: list[int], buffer: int) -> list[list[str]]:
    """Cost of a row of float16 features, streamed where there are more than the buffer holds."""
    baseline = shell("-c", IMPORTS).peak
    rows: list[list[str]] = []
    least = 0.0
    for n in sizes:
        ds = make_dataset(f"rows-{n}", n - n // 10, n // 10, 0.5)
        if not (home / ds.name).exists():
            put_store(home, ds, "synthetic", DIM, "float16")
        del ds
        streams = ("--buffer", str(buffer)) if n > buffer else ()
        cost = probe(home, f"rows-{n}", folder / "rows.json", "--subset", "F", *streams)
        (result,) = json.loads((folder / "rows.json").read_text())
        epochs = statistics.mean(fold["epochs"] for fold in result["folds"])
        each = result["seconds"] / (n * epochs) * 1e6
        least = least or each
        how = " ".join(streams) or "in memory"
        rows.append(
            [
                f"linear, 5 folds, {n:,} × {DIM} float16, {how}",
                f"{told([cost])}, {epochs:.0f} epochs (test AUC {result['mean']:.4f})",
                f"peak {cost.peak:,.0f} MB, {cost.peak - baseline:,.0f} MB above imports ({baseline:,.0f} MB)",
                f"{each:.1f} µs a row and epoch of all folds, {each / least:.2f} × that of {sizes[0]:,}",
            ]
        )
    return rows


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", default="10000,100000,1000000")
    parser.add_argument("--buffer", type=int, default=80_000)
    parser.add_argument("--only", default="linear,grid,rows")
    parser.add_argument("--keep", type=Path, help="keep the synthetic features here, and use those that are there")
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=0, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.plain:
        plain_loop(asked.plain, asked.threads)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder, home = Path(temporary), asked.keep or Path(temporary) / "home"
        rows: list[list[str]] = []
        wanted = asked.only.split(",")
        if {"linear", "grid"} & set(wanted) and not (home / "pneumonia-like").exists():
            for backbone, dim in GRID.items():
                put_store(home, pneumonia_like(), backbone, dim)
        if "linear" in wanted:
            rows.append(linear_row(home, folder, asked.repeats))
        if "grid" in wanted:
            rows.append(grid_row(home, folder, asked.repeats))
        if "rows" in wanted:
            rows += rows_rows(home, folder, [int(n) for n in asked.rows.split(",")], asked.buffer)
    print_table(["work", "embcache", "beside it", "ratio"], rows)


if __name__ == "__main__":
    main()
