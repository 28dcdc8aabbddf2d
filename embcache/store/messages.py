"""What to say where no store answers a question, or more than one does; and the commands to type then."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from embcache.errors import RecipeError, StoreNotFoundError
from embcache.paths import PathLike, data_dir, home_dir, slug
from embcache.store.recipe import Recipe

if TYPE_CHECKING:
    import pandas as pd

    from embcache.store.feature_store import FeatureStore


class NamedTable(Protocol):
    """What a store asks of a dataset; an ImageDataset has it."""

    @property
    def name(self) -> str:
        """Name of the dataset."""

    @property
    def table(self) -> pd.DataFrame:
        """One row per image: at least ``id``, ``label``, ``group``, ``split``."""


@runtime_checkable
class LoadedDataset(NamedTable, Protocol):
    """A dataset that says how it was loaded, as an ImageDataset does."""

    layout: str
    root: Path | None
    origin: Path | None
    missing: Sequence[str]

    def read_options(self) -> list[str]:
        """Options of the command line that say how its table was read."""


def nothing_matches(
    backbone: str,
    dataset: str | NamedTable,
    home: PathLike | None,
    recipe: str | None,
    views: int | None,
    folders: Sequence[Path],
    stores: Sequence[FeatureStore],
) -> StoreNotFoundError:
    """The error for a question that no store answers: what is cached instead, and the command that mends it."""
    name = dataset if isinstance(dataset, str) else dataset.name
    asked = f" with {views} view{'s' if views > 1 else ''}" if views is not None else ""
    asked += f" under a recipe that begins with {recipe}" if recipe else ""
    cached = [f"{s.recipe.fingerprint[:12]}" + (f" ({s.views} views)" if s.views > 1 else "") for s in stores]
    found = "recipes " + ", ".join(cached) if cached else ", ".join(path.name for path in folders)
    if stores and views is None:
        fix = f"--recipe {stores[0].recipe.fingerprint[:12]}"
    else:
        fix = extract_command(backbone, dataset, home) + (f" --views {views}" if views and views > 1 else "")
    return StoreNotFoundError(
        f"no features of {backbone}{asked} are cached for {name}",
        found=found or "nothing cached for this dataset",
        where=home_dir(home) / slug(name),
        fix=fix,
    )


def several_match(backbone: str, dataset: str | NamedTable, matching: Sequence[FeatureStore]) -> RecipeError:
    """The error for a question that several stores answer: in what they differ."""
    name = dataset if isinstance(dataset, str) else dataset.name
    lines = describe_differences([store.recipe for store in matching])
    numbers = sorted({store.views for store in matching})
    return RecipeError(
        f"features of {backbone} are cached for {name} under {len(matching)} recipes",
        expected="one",
        found="\n".join(f"{line}; {_rows_of(s, dataset)}" for s, line in zip(matching, lines, strict=True)),
        where=matching[0].path.parent,
        fix=(
            *([f"--views {' | '.join(map(str, numbers))}"] if len(numbers) > 1 else []),
            "--recipe " + " | ".join(s.recipe.fingerprint[:12] for s in matching),
            f"drop one for good: rm -r {shlex.quote(str(matching[0].path))}",
        ),
    )


def _rows_of(store: FeatureStore, dataset: str | NamedTable) -> str:
    """How many of a dataset's images a store holds, in words."""
    held = set(store.sources())
    if isinstance(dataset, str):
        return f"{len(held)} images"
    return f"{len(held & set(dataset.table['id']))} of the dataset's {len(dataset.table)} images"


def describe_differences(recipes: list[Recipe]) -> list[str]:
    """One line a recipe, with the fields in which they are not all the same."""
    names = dict.fromkeys(name for other in recipes[1:] for name in recipes[0].differences(other))
    lines = []
    for recipe in recipes:
        flat = {**recipe.to_json(), **{f"transform.{key}": value for key, value in recipe.transform.items()}}
        values = ", ".join(f"{name} = {_short(flat.get(name))}" for name in names)
        lines.append(f"{recipe.fingerprint[:12]}: {values}")
    return lines


def extract_command(backbone: str, dataset: str | NamedTable, home: PathLike | None = None) -> str:
    """Command that extracts a backbone over a dataset, to be typed."""
    words = ["embcache", "extract", "--backbone", backbone]
    if not isinstance(dataset, LoadedDataset):
        words += ["--dataset", dataset if isinstance(dataset, str) else dataset.name]
    else:
        kind = dataset.layout or dataset.name
        # What it was loaded from may be a table, where the root is the folder of its images.
        origin = dataset.origin or dataset.root
        words += ["--dataset", kind]
        if kind == "folder" or (origin is not None and kind != "sample" and origin != (data_dir() / kind).resolve()):
            words += ["--data-root", str(origin or "FOLDER")]
        words += ["--name", dataset.name] if dataset.name != kind else []
        words += ["--allow-missing"] if dataset.missing else []
        words += dataset.read_options()
    return shlex.join([*words, "--home", str(home)] if home is not None else words)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:16] + "…"
