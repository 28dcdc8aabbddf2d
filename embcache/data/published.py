"""Where datasets come from: one row a dataset, and what a user is told when its files are not there."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.abc
import importlib.util
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from embcache.data.chosen import Columns
from embcache.data.files import TABLE_SUFFIXES
from embcache.data.snapshot import cached_names, near_names
from embcache.errors import DatasetError, DatasetNotFoundError, UsageError, first_few
from embcache.paths import PathLike, data_dir, home_dir

if TYPE_CHECKING:
    from embcache.data.dataset import ImageDataset


@dataclass(frozen=True)
class DatasetSource:
    """One dataset that can be loaded by name: the row that its module contributes to `DATASETS`.

    Attributes
    ----------
    name, description : str
    expected : str
        The layout, one path a line, shown when it is not there.
    download : str or None
        The kagglehub call that gets it.
    read : callable (root, name) -> ImageDataset
        Every row that the labels name, whether or not its image is there; raises `DatasetNotFoundError` (see
        `layout_error`) where the layout is not recognised.
    merge_identical : bool
        Whether byte-identical files are grouped together at loading.
    draw : callable (root) -> None, optional
        Makes the data where there is none.
    own_columns : bool
        Whether the table is the user's own: ``read`` then takes `Columns` as a third argument.
    """

    name: str
    description: str
    expected: str
    download: str | None
    read: Callable[..., ImageDataset]
    merge_identical: bool = True
    draw: Callable[[Path], None] | None = None
    own_columns: bool = False

    def load(self, root: Path, name: str, columns: Columns) -> ImageDataset:
        """Every row that the labels name, and where they are from; `UsageError` for columns of a published layout."""
        if self.own_columns:
            return replace(self.read(root, name, columns), origin=root)
        if columns.named():
            raise UsageError(
                f"{self.name} is published with columns of its own",
                found=" ".join(f"--{role}-column" for role in columns.named()),
                fix="leave these options out, or load its table as a dataset of your own: --dataset folder",
            )
        return replace(self.read(root, name), origin=root)

    def layout_error(self, root: Path, problem: str | None = None) -> DatasetNotFoundError:
        """The error for a root that is missing or laid out otherwise."""
        entries = sorted(p.name for p in root.iterdir()) if root.is_dir() else []
        found = first_few(entries) or "an empty folder" if root.is_dir() else "a file" if root.exists() else "nothing"
        if self.draw is not None:
            fix = "leave --data-root out, or name a folder that is not there yet: the images are drawn at first use"
        else:
            fix = f"put it in {data_dir() / self.name}, or name its folder with --data-root"
            fix = "name the folder, or a table, with --data-root" if self.own_columns else fix
        if self.download:
            fix = f'python -c "import kagglehub; print(kagglehub.{self.download})"\n{fix}'
        return DatasetNotFoundError(
            problem or f"the images of {self.name!r} are not there, or laid out otherwise",
            expected=self.expected,
            found=found,
            where=root,
            fix=fix,
        )


@contextmanager
def refusals_told() -> Iterator[None]:
    """Turn the system's refusal to let a file or folder be read into a message."""
    try:
        yield
    except PermissionError as error:
        raise DatasetError(
            "a dataset may not be read",
            found=str(error.strerror),
            where=error.filename,
            fix=f"chmod -R u+rX '{error.filename}'",
        ) from error


class _Sources(Mapping[str, DatasetSource]):
    """Every module of this package that defines ``SOURCE``, found at first use.

    The others are not even imported: whoever probes from a cache needs no decoder of images.
    """

    @functools.cached_property
    def _rows(self) -> dict[str, DatasetSource]:
        package = importlib.import_module("embcache.data.datasets")
        names = (f"{package.__name__}.{m.name}" for m in pkgutil.iter_modules(package.__path__))
        modules = (importlib.import_module(name) for name in names if _may_define_source(name))
        sources = (getattr(module, "SOURCE", None) for module in modules)
        return {s.name: s for s in sources if isinstance(s, DatasetSource)}

    def __getitem__(self, name: str) -> DatasetSource:
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def _may_define_source(module: str) -> bool:
    """Whether a module's text assigns ``SOURCE``; True where there is no text to look at."""
    spec = importlib.util.find_spec(module)
    loader = spec.loader if spec else None
    text = loader.get_source(module) if isinstance(loader, importlib.abc.InspectLoader) else None
    return text is None or re.search(r"^SOURCE\b[^=\n]*=", text, flags=re.MULTILINE) is not None


DATASETS: Mapping[str, DatasetSource] = _Sources()


def find_source(name: str, home: PathLike | None = None) -> DatasetSource:
    """The row of `DATASETS` called ``name``; `DatasetNotFoundError` lists them all, and those cached that come near."""
    if name not in DATASETS:
        cached = cached_names(home)
        near = near_names(name, [*DATASETS, *cached])
        known = f", or one of {len(cached):,} that are cached" if cached else ""
        raise DatasetNotFoundError(
            f"there is no dataset {name!r}",
            expected="one of " + ", ".join(DATASETS) + known,
            found=f"near to it: {', '.join(near)}" if near else None,
            fix="embcache datasets",
        )
    return DATASETS[name]


def default_root(name: str, home: PathLike | None = None) -> Path:
    """Where a dataset lies when nobody says otherwise."""
    return home_dir(home) / "sample-images" if name == "sample" else data_dir() / name


def resolve_root(source: DatasetSource, root: PathLike | None, home: PathLike | None, *, draw: bool = True) -> Path:
    """The absolute folder to load from; where there is none and ``draw`` allows it, drawn first."""
    if root is None and source.name == "folder":
        raise UsageError("a folder dataset needs its folder", fix="add --data-root FOLDER (or a CSV or Parquet file)")
    folder = (Path(root).expanduser() if root is not None else default_root(source.name, home)).resolve()
    if draw and source.draw is not None and not folder.exists():
        source.draw(folder)
    if not folder.exists():
        raise source.layout_error(folder)
    return folder


def choose_name(source: DatasetSource, root: Path, wanted: str | None) -> str:
    """The dataset's name: ``wanted``; else the source's; for a folder its own name and a hash of its path."""
    if wanted is None:
        if source.name != "folder":
            return source.name
        own = root.stem if root.suffix.lower() in TABLE_SUFFIXES else root.name
        return f"{own or 'root'}-{hashlib.sha256(bytes(root)).hexdigest()[:8]}"
    if wanted != source.name and wanted in DATASETS:
        raise UsageError("the name belongs to another dataset", found=wanted, where="--name", fix="choose another name")
    if not wanted.strip() or not wanted.isprintable() or "," in wanted or len(wanted) > 200:
        raise UsageError(
            "not a dataset's name",
            expected="1 to 200 printable characters, no comma",
            found=ascii(wanted),
            where="--name",
        )
    return wanted
