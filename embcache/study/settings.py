"""How a study is carried out: the protocol's numbers and where things lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from embcache.config import ProbeConfig
from embcache.data.chosen import Columns
from embcache.data.classes import ClassOptions
from embcache.errors import EmbcacheError
from embcache.paths import PathLike
from embcache.results.grid import Model


@dataclass(frozen=True)
class Settings:
    """What holds for all cells of a table."""

    folds: int = 5
    seed: int = 0
    val: str = "full"
    test: str = "local"
    repeats: int = 1
    lr: float | Sequence[float] | None = None
    recipe: str | None = None
    exclude_test_overlap: bool = False
    max_epochs: int | None = None  # of finetunings, instead of the protocol's 50
    device: str = "auto"  # ``auto``: extraction and finetuning take a GPU where there is one, probes the CPU
    classes: ClassOptions = field(default_factory=ClassOptions)  # classes to drop or merge in every dataset
    home: PathLike | None = None
    data_root: PathLike | None = None
    dataset_name: str | None = None
    columns: Columns = field(default_factory=Columns)
    allow_missing: bool = False
    weights: Mapping[str, PathLike] = field(default_factory=dict)
    transform: str | None = None
    workers: int | None = None

    def for_probe(self, model: Model) -> ProbeConfig:
        """How a model is probed."""
        options: dict[str, Any] = {
            "head": model.head,
            "folds": self.folds,
            "seed": self.seed if model.seed is None else model.seed,
            "val": self.val,
            "test": self.test,
            "recipe": self.recipe,
            "lr": () if self.lr is None else self.lr,
            "exclude_test_overlap": self.exclude_test_overlap,
            "device": "cpu" if self.device == "auto" else self.device,
        }
        return ProbeConfig.make(options=options | {"repeats": self.repeats})

    def for_finetune(self, model: Model) -> dict[str, Any]:
        """Keywords of `finetune_images` and `find_finetuned` for a model; models themselves are not kept."""
        options: dict[str, Any] = {} if self.max_epochs is None else {"max_epochs": self.max_epochs}
        return options | {
            "head": model.head,
            "folds": self.folds,
            "seed": self.seed if model.seed is None else model.seed,
            "home": self.home,
            "val": self.val,
            "test": self.test,
            "lr": self.lr,
            "exclude_test_overlap": self.exclude_test_overlap,
            "device": self.device,
            "weights": {name: path for name, path in self.weights.items() if name in model.backbones} or None,
            "transform": self.transform,
            "workers": self.workers,
        }


def in_a_line(error: EmbcacheError) -> str:
    """An error's problem and its remedy, for a note beneath a table."""
    fix = (error.fix or "").split("\n")[0]
    found = f" ({error.found.splitlines()[0]})" if error.found else ""
    return f"{error.problem}{found}" + (f"; try: {fix}" if fix else "")
