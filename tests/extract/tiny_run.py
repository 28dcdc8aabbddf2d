"""``python -m tests.extract.tiny_run ARGUMENTS``: the ``embcache`` command with the tiny network for every backbone.

Environment: ``TINY_SECONDS`` each batch takes so long; ``TINY_WAITS`` it waits for a file of that pattern;
``TINY_MOST`` a larger batch is out of memory; ``TINY_DIES`` the process is killed in the midst of its first shard;
``TINY_ROWS`` of a shard; ``TINY_HELPERS`` a JSON object of variables for the processes of further devices.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import embcache.extract.engines.devices as devices
import embcache.extract.extract as extracting
import embcache.extract.recipes as run
from embcache.backbones.catalog import LoadedBackbone
from embcache.extract.extract import help_another
from tests.extract.tiny import load_tiny


class Troubled(nn.Module):
    """A network with the troubles that the environment asks for."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.drawn = False  # whether the images of the canaries are through

    def forward(self, images: Tensor) -> Tensor:
        if not self.drawn:
            self.drawn = True
            drawn: Tensor = self.module(images)
            return drawn
        time.sleep(float(os.environ.get("TINY_SECONDS", "0")))
        pattern = os.environ.get("TINY_WAITS", "").removeprefix("/")
        while pattern and not list(Path("/").glob(pattern)):
            time.sleep(0.02)
        if os.environ.get("TINY_DIES"):
            os.kill(os.getpid(), signal.SIGKILL)
        if len(images) > int(os.environ.get("TINY_MOST", "1000000")):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        features: Tensor = self.module(images)
        return features


def install() -> None:
    """Put the tiny network in the place of every other."""

    def load(name: str, **keywords: object) -> LoadedBackbone:
        loaded = load_tiny(name, **keywords)
        return LoadedBackbone(loaded.spec, Troubled(loaded.module), loaded.weights_sha256, loaded.weights_source)

    run.load_backbone = load  # type: ignore[assignment]
    extracting.ROWS_PER_SHARD["cpu"] = int(os.environ.get("TINY_ROWS", "8"))
    devices.COMMAND = (sys.executable, "-m", "tests.extract.tiny_run", "--helper")


def main() -> None:
    """The command, or the process of a further device."""
    install()
    if sys.argv[1:] == ["--helper"]:
        os.environ.update(json.loads(os.environ.get("TINY_HELPERS", "{}")))
        help_another()
    else:
        from embcache.cli import main

        main()


if __name__ == "__main__":
    main()
