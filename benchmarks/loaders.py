"""Features by `extract` beside the plain loop of each library that loads backbones, on the same images and weights.

Networks are of published sizes with random weights. The plain loop is what a model card shows: open, preprocess with
the library's own processor, stack 16 images, forward in inference mode. Both run in this process, in turns, over 16
images and over all of them: the difference counts reading, decoding, preprocessing and, for ours, writing the store,
not what a run begins with (ours builds the network, reads its weights and computes the canaries).

    python benchmarks/loaders.py --images FOLDER [--number 96] [--repeats 3] [--runtime eager|openvino]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import timm
import torch
import transformers
from common import print_table
from PIL import Image

from embcache.data.dataset import load_dataset
from embcache.extract.extract import extract_features

BATCH = 16
Loop = Callable[[list[Path]], np.ndarray]


def loop(preprocess: Callable[[Image.Image], torch.Tensor], forward: Callable[[torch.Tensor], torch.Tensor]) -> Loop:
    """The plain loop of a library."""

    def run(files: list[Path]) -> np.ndarray:
        made = []
        with torch.inference_mode():
            for start in range(0, len(files), BATCH):
                images = [Image.open(file).convert("RGB") for file in files[start : start + BATCH]]
                made.append(forward(torch.stack([preprocess(image) for image in images])).numpy())
        return np.concatenate(made)

    return run


def of_transformers(folder: Path) -> tuple[str, Loop, dict[str, Any]]:
    """DINOv2 ViT-S/14."""
    config = transformers.Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
    model = transformers.Dinov2Model(config).eval()
    model.save_pretrained(folder)
    processor = transformers.BitImageProcessor(
        size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, resample=3,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    processor.save_pretrained(folder)
    own = transformers.AutoImageProcessor.from_pretrained(folder)
    return f"hf:{folder}", loop(
        lambda image: own(image, return_tensors="pt")["pixel_values"][0],
        lambda batch: model(pixel_values=batch).last_hidden_state[:, 0],
    ), {}  # fmt: skip


def of_open_clip(folder: Path) -> tuple[str, Loop, dict[str, Any]]:
    """CLIP ViT-B/32."""
    from safetensors.torch import save_file

    model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32")
    config = {"model_cfg": open_clip.get_model_config("ViT-B-32"), "preprocess_cfg": model.visual.preprocess_cfg}
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return f"open_clip:{folder}", loop(preprocess, model.eval().encode_image), {}


def of_timm(folder: Path) -> tuple[str, Loop, dict[str, Any]]:
    """ViT-S/16."""
    model = timm.create_model("vit_small_patch16_224", num_classes=0).eval()
    folder.mkdir()
    torch.save(model.state_dict(), folder / "weights.pth")
    preprocess = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    return "timm:vit_small_patch16_224", loop(preprocess, model), {"weights": folder / "weights.pth"}


LIBRARIES = {"transformers": of_transformers, "open_clip": of_open_clip, "timm": of_timm}


def timed(run: Callable[[], Any]) -> tuple[float, float, Any]:
    """Wall and processor seconds, and what was made."""
    wall, cpu = time.perf_counter(), time.process_time()
    made = run()
    return time.perf_counter() - wall, time.process_time() - cpu, made


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--number", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--runtime", default="eager")
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "images"
        for label in "ab":  # of no meaning
            (root / label).mkdir(parents=True)
        suffixes = (".jpg", ".jpeg", ".png")
        found = [path for path in sorted(asked.images.rglob("*")) if path.suffix.lower() in suffixes]
        for place, path in enumerate(found[: asked.number]):
            shutil.copy(path, root / "ab"[place % 2] / f"{place:05}{path.suffix}")
        files = sorted(root.rglob("*.*"))
        dataset = load_dataset("folder", root, name="images")
        first = {file.relative_to(root).as_posix() for file in files[:BATCH]}
        few = replace(dataset, table=dataset.table[dataset.table["id"].isin(first)], name="few")
        for library, make in LIBRARIES.items():
            torch.manual_seed(0)
            backbone, plain, options = make(Path(name) / library)
            options |= {"transform": "model", "runtime": asked.runtime, "device": "cpu"}
            costs: list[tuple[float, ...]] = []
            for turn in range(asked.repeats + 1):  # the first is for warmth
                spent = []
                for which in (few, dataset):
                    home = Path(name) / f"{turn}-{library}-{len(which)}"
                    some, store = files[: len(which)], list[Any]()
                    ours = timed(
                        lambda w=which, h=home, b=backbone, o=options, s=store: s.append(
                            extract_features(b, w, home=h, **o)
                        )
                    )
                    theirs = timed(lambda some=some, plain=plain: plain(some))
                    spent.append((*ours[:2], *theirs[:2]))
                wall, cpu, their_wall, their_cpu = (b - a for a, b in zip(*spent, strict=True))
                made = store[0].restrict([file.relative_to(root).as_posix() for file in files]).features[:]
                difference = float(np.abs(made - theirs[2]).max() / np.abs(theirs[2]).max())
                more = len(files) - len(few)
                costs.append((more / wall, more / their_wall, their_wall / wall, their_cpu / cpu, difference))
            rate, their_rate, faster, cheaper, difference = (
                statistics.median(values) for values in zip(*costs[1:], strict=True)
            )
            rows.append([
                library, f"{rate:.1f}", f"{their_rate:.1f}", f"{faster:.2f}", f"{cheaper:.2f}", f"{difference:.0e}",
            ])  # fmt: skip
    print_table(["library", "extract, images/s", "plain loop", "faster", "by CPU time", "largest difference"], rows)


if __name__ == "__main__":
    main()
