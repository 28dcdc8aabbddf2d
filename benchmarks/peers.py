"""Features of one ResNet-50 over one folder of JPEGs: `embcache extract` beside a plain timm loop and its peers.

512 images of 224 × 224 pixels (drawn, or made from those in ``--images FOLDER``), untrained weights, the same for all,
no resizing. Every way runs from the shell in a process of its own, in turns: over a few images and over all of them.
The difference is what the rest takes, reading, decoding and writing included; what is left of the short run is the
start of the program.
kaiko-eva and thingsvision (which needs an old torch) get environments of their own, made here by pip unless ``--envs``
has them; one that cannot be made is left out, with the reason.

    python benchmarks/peers.py [--number 512] [--repeats 1] [--images FOLDER] [--envs FOLDER] [--ways timm,…]
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
from common import Cost, machine, shell
from extraction import draw
from PIL import Image, ImageOps

from embcache.data.dataset import load_dataset
from embcache.store.feature_store import list_stores

FEW, BATCH, SIDE = 32, 64, 224
EMBCACHE = ("embcache fp32", "embcache bf16")
PACKAGES = {"kaiko-eva": ["kaiko-eva", "timm"], "thingsvision": ["thingsvision"]}
READS = """
import sys
from pathlib import Path
import timm, torch
from PIL import Image
from torchvision import transforms

root, weights, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
batch, workers = int(sys.argv[4]), int(sys.argv[5])
files = sorted(root.rglob("*.jpg"))
normalize = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
transform = transforms.Compose([transforms.ToTensor(), normalize])
"""
SCRIPTS = {
    "timm": """
import numpy as np

class Images(torch.utils.data.Dataset):
    def __len__(self):
        return len(files)

    def __getitem__(self, row):
        return transform(Image.open(files[row]).convert("RGB"))

model = timm.create_model("resnet50", num_classes=0)
model.load_state_dict(torch.load(weights))
model.eval()
with torch.inference_mode():
    loader = torch.utils.data.DataLoader(Images(), batch_size=batch, num_workers=workers)
    np.save(out / "features.npy", torch.cat([model(images) for images in loader]).numpy())
""",
    "kaiko-eva": """
import numpy as np
from eva.core.callbacks.writers.embeddings.classification import ClassificationEmbeddingsWriter
from eva.core.data import datasets
from eva.core.data.dataloaders import DataLoader
from eva.core.data.datamodules import DataModule
from eva.core.data.datamodules.schemas import DataloadersSchema, DatasetsSchema
from eva.core.interface import Interface
from eva.core.models.modules import InferenceModule
from eva.core.trainers import Trainer

class Images(datasets.Dataset):
    def __len__(self):
        return len(files)

    def filename(self, row):
        return str(files[row].relative_to(root))

    def __getitem__(self, row):
        return transform(Image.open(files[row]).convert("RGB")), torch.tensor(0), {}

model = timm.create_model("resnet50", num_classes=0)
model.load_state_dict(torch.load(weights))
Interface().predict(
    Trainer(max_epochs=1, accelerator="cpu", default_root_dir=str(out / "logs"), enable_progress_bar=False,
            callbacks=[ClassificationEmbeddingsWriter(str(out / "pt"), dataloader_idx_map={0: "train"})]),
    InferenceModule(model.eval()),
    DataModule(
        datasets=DatasetsSchema(predict=Images()),
        dataloaders=DataloadersSchema(predict=DataLoader(batch_size=batch, num_workers=workers, pin_memory=False)),
    ),
)
written = [torch.load(out / "pt" / file.relative_to(root).with_suffix(".pt"))[0] for file in files[:64]]
np.save(out / "features.npy", torch.stack(written).numpy())
""",
    "thingsvision": """
import numpy as np
from thingsvision import get_extractor
from thingsvision.utils.data import DataLoader, ImageDataset

extractor = get_extractor("resnet50", source="timm", device="cpu", pretrained=False)
extractor.model.load_state_dict(torch.load(weights), strict=False)
dataset = ImageDataset(root=str(root), out_path=str(out), backend=extractor.get_backend(), transforms=transform)
features = extractor.extract_features(
    batches=DataLoader(dataset=dataset, batch_size=batch, backend=extractor.get_backend()),
    module_name="global_pool.flatten", flatten_acts=False, output_type="ndarray",
)
np.save(out / "features.npy", features)
""",
}  # fmt: skip


def make_images(folder: Path, number: int, given: Path | None) -> None:
    """``all`` with that many JPEGs in two folders, and ``few`` with the first of them."""
    for name in ("drawn", *(f"{part}/{label}" for part in ("all", "few") for label in "ab")):
        (folder / name).mkdir(parents=True)
    if given is None:
        paths = draw(folder / "drawn", number, SIDE)
    else:
        found = (path for path in sorted(given.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        paths = [path for path, _ in zip(found, range(number), strict=False)]
    for index, path in enumerate(paths):
        name = f"{'ab'[index % 2]}/{index:05}.jpg"
        if given is None:
            path.rename(folder / "all" / name)
        else:
            image = ImageOps.fit(Image.open(path).convert("RGB"), (SIDE, SIDE), Image.Resampling.BICUBIC)
            image.save(folder / "all" / name, quality=88)
        if index < FEW:
            shutil.copy(folder / "all" / name, folder / "few" / name)


def environment(way: str, envs: Path) -> tuple[str, str]:
    """Interpreter of a way, and why there is none."""
    if way not in PACKAGES:
        return sys.executable, ""
    python = envs / way / "bin" / "python"
    if not python.exists():
        for command in ([sys.executable, "-m", "venv", envs / way], [python, "-m", "pip", "install", *PACKAGES[way]]):
            done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
            if done.returncode:
                shutil.rmtree(envs / way, ignore_errors=True)
                return "", (done.stderr.strip() or done.stdout.strip()).splitlines()[-1]
    return str(python), ""


def run(way: str, python: str, root: Path, folder: Path, out: Path) -> Cost:
    out.mkdir(parents=True)
    if way in EMBCACHE:
        asked = ["--backbone", "timm:resnet50", "--dataset", "folder", "--transform", "paper", "--device", "cpu"]
        places = ["--data-root", str(root), "--home", str(out), "--weights", str(folder / "weights.pth")]
        return shell("-m", "embcache", "extract", *asked, *places, "--precision", way.split()[1])
    script = folder / f"run-{way}.py"
    script.write_text(READS + SCRIPTS[way])
    workers = str(len(os.sched_getaffinity(0)))
    return shell(*map(str, (script, root, folder / "weights.pth", out, BATCH, workers)), python=python)


def features(way: str, root: Path, out: Path) -> np.ndarray:
    """What a way wrote, in the order of the files' names: the first ones at least."""
    if way not in EMBCACHE:
        return np.load(out / "features.npy")
    (store,) = list_stores(out)
    ids = sorted(load_dataset("folder", root).ids.tolist())
    return store.restrict(ids).features[:]


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--envs", type=Path, help="a folder for the peers' environments; made where they are not there")
    parser.add_argument("--ways", default=",".join([*SCRIPTS, *EMBCACHE]))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_images(folder, asked.number, asked.images)
        torch.manual_seed(0)
        torch.save(timm.create_model("resnet50", num_classes=0).state_dict(), folder / "weights.pth")
        found = {way: environment(way, asked.envs or folder / "envs") for way in asked.ways.split(",")}
        costs: dict[str, list[tuple[Cost, Cost]]] = {way: [] for way, (python, _) in found.items() if python}
        for turn in range(asked.repeats):
            for way in costs:
                few, every = (
                    run(way, found[way][0], folder / part, folder, folder / f"{part}-{way}-{turn}")
                    for part in ("few", "all")
                )
                costs[way].append((few, every))
                print(f"{way}: {few.wall:.1f} s, {every.wall:.1f} s", file=sys.stderr, flush=True)
        more = asked.number - FEW
        told = {way: features(way, folder / "all", folder / f"all-{way}-0") for way in costs}
        rates = {way: statistics.median(more / (b.wall - a.wall) for a, b in pairs) for way, pairs in costs.items()}
        print("| way | img/s | by CPU time | start, s | peak MB | of the plain loop | cosine to it, at least |")
        print("|---" * 7 + "|")
        for way, pairs in costs.items():
            cpu = statistics.median(more / (b.cpu - a.cpu) for a, b in pairs)
            start = statistics.median(a.wall for a, _ in pairs) - FEW / rates[way]
            beside, cosine = "", ""
            if "timm" in rates:
                n = min(len(told[way]), len(told["timm"]))
                x, y = (told[w][:n].astype(np.float64) for w in (way, "timm"))
                cosine = f"{((x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)).min():.6f}"
                beside = f"{rates[way] / rates['timm']:.2f} ×"
            peak = max(b.peak for _, b in pairs)
            print(f"| {way} | {rates[way]:.1f} | {cpu:.1f} | {start:.1f} | {peak:.0f} | {beside} | {cosine} |")
        for way, (python, reason) in found.items():
            if not python:
                print(f"| {way} | cannot be installed: {reason} |")
    print(f"\n{asked.number} JPEGs, batch {BATCH} of the others; {machine(('torch', 'timm', 'pillow'))}")


if __name__ == "__main__":
    main()
