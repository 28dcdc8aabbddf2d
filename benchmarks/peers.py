"""Features of one network over one folder of JPEGs: `embcache extract` beside a plain timm loop and its peers.

512 images of 224 × 224 pixels (drawn, or made from those in ``--images FOLDER``), untrained weights, the same for all,
no resizing. Every way runs from the shell in a process of its own, in turns: over a few images and over all of them.
The difference is what the rest takes, reading, decoding and writing included; what is left of the short run is the
start of the program.
kaiko-eva, LazySlide and thingsvision (which needs an old torch) get environments of their own, made here by pip unless
``--envs`` has them; one that cannot be made, or that fails, is left out, with the reason. LazySlide reads the same
pixels as tiles of one TIFF file. transformers runs timm's network through its own wrapper and pipeline.

    python benchmarks/peers.py [--network resnet50|vit_small_patch16_224|tf_efficientnet_lite0] [--number 512]
    [--repeats 1] [--images FOLDER] [--envs FOLDER] [--ways timm,…]
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import struct
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

FEW, BATCH, SIDE, ACROSS = 32, 64, 224, 8
EMBCACHE = {
    "embcache": [],  # as it comes: another runtime from 1,000 images
    "embcache eager": ["--runtime", "eager"],
    "embcache openvino": ["--runtime", "openvino"],
    "embcache bf16": ["--precision", "bf16"],
    "embcache bf16 openvino": ["--precision", "bf16", "--runtime", "openvino"],
}
PACKAGES = {
    "kaiko-eva": ["kaiko-eva", "timm"], "lazyslide": ["lazyslide", "timm"], "thingsvision": ["thingsvision"],
}  # fmt: skip
READS = """
import sys
from pathlib import Path
import timm, torch
from PIL import Image
from torchvision import transforms

root, weights, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
batch, workers, network = int(sys.argv[4]), int(sys.argv[5]), sys.argv[6]
mean, std = ([float(v) for v in values.split(",")] for values in sys.argv[7:9])
files = sorted(root.rglob("*.jpg"))
normalize = transforms.Normalize(mean, std)
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

model = timm.create_model(network, num_classes=0)
model.load_state_dict(torch.load(weights))
model.eval()
with torch.inference_mode():
    loader = torch.utils.data.DataLoader(Images(), batch_size=batch, num_workers=workers)
    np.save(out / "features.npy", torch.cat([model(images) for images in loader]).numpy())
""",
    "transformers": """
import numpy as np
from transformers import TimmWrapperConfig, TimmWrapperImageProcessor, TimmWrapperModel, pipeline

stated = {"input_size": (3, 224, 224), "mean": mean, "std": std, "crop_pct": 1.0, "num_classes": 0}
model = TimmWrapperModel(TimmWrapperConfig(architecture=network, pretrained_cfg=stated, num_labels=0))
model.timm_model.load_state_dict(torch.load(weights))
extract = pipeline(
    "image-feature-extraction", model=model.eval(), device="cpu",
    image_processor=TimmWrapperImageProcessor(pretrained_cfg=stated, architecture=network),
)
rows = extract([str(file) for file in files], batch_size=batch, num_workers=workers, pool=True, return_tensors=True)
np.save(out / "features.npy", torch.cat(list(rows)).numpy())
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

model = timm.create_model(network, num_classes=0)
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
    "lazyslide": """
import lazyslide as zs
import numpy as np

slide = zs.open_wsi(str(root.with_suffix(".tif")), store=None)
zs.pp.tile_tissues(slide, 224, background_filter=False)
model = timm.create_model(network, num_classes=0)
model.load_state_dict(torch.load(weights))
rows = zs.tl.feature_extraction(
    slide, model.eval(), model_name=network, transform=transform, device="cpu", batch_size=batch, num_workers=workers,
    return_features=True, pbar=False,
)
tiles = slide["tiles"].bounds  # in the order of the files' names
np.save(out / "features.npy", rows[np.lexsort([tiles["minx"], tiles["miny"]])])
""",
    "thingsvision": """
import numpy as np
from thingsvision import get_extractor
from thingsvision.utils.data import DataLoader, ImageDataset

extractor = get_extractor(network, source="timm", device="cpu", pretrained=False)
extractor.model.load_state_dict(torch.load(weights), strict=False)
dataset = ImageDataset(root=str(root), out_path=str(out), backend=extractor.get_backend(), transforms=transform)
features = extractor.extract_features(
    batches=DataLoader(dataset=dataset, batch_size=batch, backend=extractor.get_backend()),
    module_name="fc_norm" if network.startswith("vit") else "global_pool.flatten",
    flatten_acts=False, output_type="ndarray",
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
    for part in ("all", "few"):
        write_slide(folder / f"{part}.tif", [path.read_bytes() for path in sorted((folder / part).rglob("*.jpg"))])


def write_slide(path: Path, jpegs: list[bytes]) -> None:
    """The same JPEG files as the tiles of a TIFF file, `ACROSS` in each row."""
    jpegs = jpegs[: len(jpegs) // ACROSS * ACROSS]
    starts = np.cumsum([8] + [len(data) + len(data) % 2 for data in jpegs])
    tables = struct.pack(f"<3H{2 * len(jpegs)}I", 8, 8, 8, *map(int, starts[:-1]), *map(len, jpegs))
    at = int(starts[-1])
    tags = [  # number, type (3: 2 bytes, 4: 4 bytes), count, value or where it is
        (256, 4, 1, ACROSS * SIDE), (257, 4, 1, len(jpegs) // ACROSS * SIDE), (258, 3, 3, at), (259, 3, 1, 7),
        (262, 3, 1, 6), (277, 3, 1, 3), (284, 3, 1, 1), (322, 4, 1, SIDE), (323, 4, 1, SIDE),
        (324, 4, len(jpegs), at + 6), (325, 4, len(jpegs), at + 6 + 4 * len(jpegs)), (530, 3, 2, 2 << 16 | 2),
    ]  # fmt: skip
    head = b"II*\0" + struct.pack("<I", at + len(tables))
    body = b"".join(data + b"\0" * (len(data) % 2) for data in jpegs)
    entries = b"".join(struct.pack("<2H2I", *tag) for tag in tags)
    path.write_bytes(head + body + tables + struct.pack("<H", len(tags)) + entries + b"\0" * 4)


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


def run(way: str, network: str, python: str, root: Path, out: Path) -> Cost:
    out.mkdir(parents=True)
    weights = root.parent / "weights.pth"
    if way in EMBCACHE:
        asked = ["--backbone", f"timm:{network}", "--dataset", "folder", "--transform", "paper", "--device", "cpu"]
        places = ["--data-root", str(root), "--home", str(out), "--weights", str(weights)]
        return shell("-m", "embcache", "extract", *asked, *places, *EMBCACHE[way])
    script = root.parent / f"run-{way}.py"
    script.write_text(READS + SCRIPTS[way])
    stated = timm.get_pretrained_cfg(network)
    numbers = [",".join(map(str, values)) for values in (stated.mean, stated.std)]
    workers = str(len(os.sched_getaffinity(0)))
    return shell(*map(str, (script, root, weights, out, BATCH, workers, network, *numbers)), python=python)


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
    parser.add_argument("--network", default="resnet50", help="a name of timm's")
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
        torch.save(timm.create_model(asked.network, num_classes=0).state_dict(), folder / "weights.pth")
        found = {way: environment(way, asked.envs or folder / "envs") for way in asked.ways.split(",")}
        failed = {way: f"cannot be installed: {reason}" for way, (python, reason) in found.items() if not python}
        costs: dict[str, list[tuple[Cost, Cost]]] = {}
        for turn in range(asked.repeats):
            for way in (way for way in found if way not in failed):
                try:
                    few, every = (
                        run(way, asked.network, found[way][0], folder / part, folder / f"{part}-{way}-{turn}")
                        for part in ("few", "all")
                    )
                except SystemExit as error:
                    failed[way] = f"fails: {str(error).strip().splitlines()[-1]}"
                    continue
                costs.setdefault(way, []).append((few, every))
                print(f"{way}: {few.wall:.1f} s, {every.wall:.1f} s", file=sys.stderr, flush=True)
        told = {way: features(way, folder / "all", folder / f"all-{way}-0") for way in costs}
        tabulate(asked.number - FEW, costs, told)
        for way, reason in failed.items():
            print(f"| {way} | {reason[:200]} |")
    machines = machine(("torch", "timm", "pillow", "transformers", "openvino"))
    print(f"\n{asked.network}, {asked.number} JPEGs, batch {BATCH} of the others; {machines}")


def tabulate(more: int, costs: dict[str, list[tuple[Cost, Cost]]], told: dict[str, np.ndarray]) -> None:
    """Print the rates, and by processor time how many times as fast each way is as each that is not embcache."""
    walls = {way: statistics.median(more / (b.wall - a.wall) for a, b in pairs) for way, pairs in costs.items()}
    rates = {way: statistics.median(more / (b.cpu - a.cpu) for a, b in pairs) for way, pairs in costs.items()}
    peers = [way for way in costs if way not in EMBCACHE]
    beside = " | ".join(f"to {way}" for way in peers)
    print(f"| way | img/s | per CPU second | start, s | peak MB | cosine to timm, at least | {beside} |")
    print("|---" * (6 + len(peers)) + "|")
    for way, pairs in costs.items():
        start = statistics.median(a.wall for a, _ in pairs) - FEW / walls[way]
        cosine = ""
        if "timm" in told:
            n = min(len(told[way]), len(told["timm"]))
            x, y = (told[w][:n].astype(np.float64) for w in (way, "timm"))
            cosine = f"{((x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)).min():.6f}"
        peak = max(b.peak for _, b in pairs)
        ratios = " | ".join(f"{rates[way] / rates[peer]:.2f} ×" for peer in peers)
        print(f"| {way} | {walls[way]:.1f} | {rates[way]:.1f} | {start:.1f} | {peak:.0f} | {cosine} | {ratios} |")


if __name__ == "__main__":
    main()
