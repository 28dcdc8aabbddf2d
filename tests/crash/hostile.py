"""A home that others can write to: its files replaced by links, pipes and devices, and every value in them by others.

`places` × `KINDS` × `COMMANDS` are special files, `values` × `COMMANDS` are values. After each no command has hung,
shown a traceback, or touched what lies outside the home; and a listing still has what is intact.
"""

from __future__ import annotations

import copy
import io
import json
import os
import shutil
import signal
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from typer.testing import CliRunner

import embcache.maintain.doctor as doctor
from embcache.cli import app
from embcache.data.published import decode_snapshot, encode_snapshot
from embcache.errors import EmbcacheError
from embcache.io import is_folder
from embcache.probe.inputs import plan_cached
from embcache.probe.probe import probe_features
from embcache.probe.protocol import write_splits
from embcache.runs.result import run_id
from embcache.sealed import crc32c, seal
from embcache.store.commit import write_view
from tests.probe.build import make_dataset, make_features, put_store

SECONDS = 60  # after which a command hangs
VALUES: tuple[Any, ...] = (
    None, True, -1, 10**400, 2**70, 1.5, "", "x", "\0", "\x1b]0;t\x07", "../../x", "a" * 5000, [], {}, [[]], ["x"],
    [None], {"a": 1}, {"name": 5}, KeyError,
)  # fmt: skip
COMMANDS: dict[str, tuple[str, ...]] = {
    "results": ("results",),
    "results RUN": ("results", "{run}"),
    "compare": ("compare", "{run}", "{well}"),
    "ls": ("ls",),
    "verify": ("verify",),
    "gc": ("gc",),
    "doctor": ("doctor",),
    "probe": ("probe", "--dataset", "toy", "--head", "knn", "--subset", "20", "--folds", "2"),
    "splits": ("probe", "--dataset", "toy", "--head", "knn", "--splits", "mine"),
    "report": ("report", "--dataset", "toy", "--output", "{home}/../page.html", "--force"),
    "repair": ("verify", "--repair", "--dataset", "toy"),
}
LISTING = ("results", "ls", "verify", "gc")  # go on with what is intact, whatever the rest


class WrongError(AssertionError):
    """A command hung, showed a traceback, or did harm."""


class Home:
    """A home with two datasets, ``toy`` to be harmed and ``well``, each with a store, runs and a splits file.

    Attributes
    ----------
    totals : Counter
        Commands run, and how they ended.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.home, self.outside = folder, folder / "home", folder / "outside"
        self.totals: Counter[str] = Counter()
        self._base = folder / "base"
        for name in ("toy", "well"):
            ds = make_dataset([0, 1] * 40, [f"g{k // 2}" for k in range(80)], ["train"] * 60 + ["test"] * 20, name=name)
            write_view(put_store(self._base, ds, "a", make_features(ds)))
            (self._base / name / "scan.parquet").write_bytes(b"PAR1")
            probe_features(ds, ["a"], head="logreg", subset=20, folds=2, home=self._base)
            splits, _ = plan_cached(ds, home=self._base, subsets=["S"], folds=2)
            write_splits(splits, self._base / name / "splits" / "mine.json")
        self.start()

    def start(self) -> None:
        """The home as it was, and a folder outside that must not be touched."""
        for folder in (self.home, self.outside):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self._base, self.home, symlinks=True)
        shutil.copytree(self._base / "toy", self.outside / "toy", symlinks=True)
        old = (1.0, 1.0)
        for name in ("000007.json", "shard-000000-0123456789abcdef", ".x-0123456789abcdef"):
            (self.outside / name).write_bytes(b"mine")
            os.utime(self.outside / name, old)
        self.run = next((self.home / "toy" / "runs").iterdir())
        self.store = next((self.home / "toy").glob("a-*"))

    def command(self, name: str) -> str:
        """Run a command; gives what it prints."""
        well = next((self.home / "well" / "runs").iterdir()).name
        words = [word.format(run=self.run.name, well=well, home=self.home) for word in COMMANDS[name]]
        with _limited(f"{name} hangs"):
            told = CliRunner().invoke(app, words, env={"EMBCACHE_HOME": str(self.home)})
        if not isinstance(told.exception, SystemExit | EmbcacheError | None):
            raise WrongError(f"{name}: {type(told.exception).__name__}: {told.exception}") from told.exception
        if name in LISTING and "well" not in told.stdout:
            raise WrongError(f"{name} does not list what is intact: {told.output[-300:]} {told.exception}")
        self.totals["commands run"] += 1
        self.totals["told as an error"] += told.exit_code != 0
        return told.output

    def special(self, place: str, kind: str, command: str) -> None:
        """Put a special file in a place and run a command."""
        self.start()
        path = self.home / place
        shutil.rmtree(path) if is_folder(path) else path.unlink()
        KINDS[kind](path, self.outside / place if (self.outside / place).exists() else self.outside)
        before = _state(self.outside)
        self.command(command)
        if _state(self.outside) != before:
            raise WrongError(f"{command} touched what lies outside")
        self.totals["special files"] += 1

    def places(self) -> list[str]:
        """What can be replaced: every folder and one file of each name."""
        found: dict[str, str] = {}
        for path in sorted((self.home / "toy").rglob("*")):
            name = path.relative_to(self.home).as_posix()
            if "view." not in name and "000001" not in name:
                found.setdefault(path.name if path.is_file() and "data." not in name else name, name)
        view = [path.relative_to(self.home).as_posix() for path in self.store.glob("view.*")]
        return [*found.values(), *view, *(f"{name}/zarr.json" for name in view)]

    def values(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """Every value of the files of JSON, with how to write it."""
        data = _unsealed(self.run / "result.json")
        for path in leaves(data):
            for value in VALUES:
                yield f"result.json {path}: {value!r:.30}", lambda p=path, v=value: self._write_run(data, p, v)
        meta = decode_snapshot((self.home / "toy" / "dataset.parquet").read_bytes())[1]
        for path in leaves(meta):
            for value in VALUES:
                yield f"snapshot {path}: {value!r:.30}", lambda p=path, v=value: self._write_snapshot(p, v)
        splits = json.loads((self.home / "toy" / "splits" / "mine.json").read_bytes())
        for path in leaves(splits):
            for value in VALUES:
                file = Path("toy/splits/mine.json")
                yield (
                    f"splits {path}: {value!r:.30}",
                    lambda p=path, v=value, f=file: self._write(f, _bytes(changed(splits, p, v))),
                )
        for name in ("plan/000000.json", "shards/000000/commit.json", "recipe.json"):
            content, file = _unsealed(self.store / name), self.store.relative_to(self.home) / name
            for path in leaves(content):
                for value in VALUES:
                    yield (
                        f"{name} {path}: {value!r:.30}",
                        lambda c=content, p=path, v=value, f=file: self._write(f, _sealed(changed(c, p, v), f)),
                    )
        for name, file in (("lease", self.store.relative_to(self.home) / "leases" / "000000.json"),):
            for value in ({"machine": [], "pid": 1}, {"machine": "m", "pid": -1}, {"pid": 2**70}, [], 7):
                yield f"{name}: {value!r:.30}", lambda v=value, f=file: self._write(f, _bytes(v))
        for name in (
            "toy/dataset.parquet",
            "toy/scan.parquet",
            f"{self.run.relative_to(self.home)}/predictions.parquet",
        ):
            for what, table in hostile_tables().items():
                yield f"{name}: {what}", lambda n=name, t=table: self._write_parquet(n, t)
        deep = b"[" * 100_000
        for name in ("splits/mine.json", f"runs/{self.run.name}/result.json", f"{self.store.name}/recipe.json"):
            yield f"{name}: nested", lambda n=name: self._write(Path("toy") / n, deep)

    def _write(self, file: Path, data: bytes | None) -> None:
        if data is not None:
            (self.home / file).write_bytes(data)

    def _write_run(self, data: Any, path: tuple[Any, ...], value: Any) -> None:
        content = changed(data, path, value)
        if path[0] == "request":  # its hash agrees, as it does in an attack
            with suppress(Exception):
                content["id"] = run_id(content["request"])
        name = str(content.get("id"))
        if path[0] == "request" and name not in ("", ".", "..") and len(name) < 200 and not {"/", "\0"} & set(name):
            self.run = self.run.rename(self.run.with_name(name))
        self._write(self.run.relative_to(self.home) / "result.json", _sealed(content, Path("result.json")))

    def _write_snapshot(self, path: tuple[Any, ...], value: Any) -> None:
        file = self.home / "toy" / "dataset.parquet"
        table, meta = decode_snapshot(file.read_bytes())
        with suppress(ValueError, TypeError):
            file.write_bytes(encode_snapshot(table, changed(meta, path, value)))

    def _write_parquet(self, name: str, table: pa.Table | bytes) -> None:
        data = table
        if isinstance(table, pa.Table):
            sink = io.BytesIO()
            pq.write_table(table, sink)
            data = sink.getvalue()
        assert isinstance(data, bytes)
        self._write(Path(name), data)
        if name.endswith("predictions.parquet"):
            content = _unsealed(self.run / "result.json")
            content["files"]["predictions.parquet"] = {"size": len(data), "crc32c": crc32c(data)}
            self._write(self.run.relative_to(self.home) / "result.json", seal(content))


def hostile_tables() -> dict[str, pa.Table | bytes]:
    """Parquet files of wrong columns, types and sizes."""
    ids = ["a", "b"]
    right: dict[str, Any] = {
        "id": ids, "label": [0, 1], "group": ids, "fold": [0, 1], "p_0": [0.5, 0.5], "p_1": [0.5, 0.5],
        "logit_0": [0.0, 1.0], "logit_1": [0.0, 1.0], "path": ids, "place": ["", ""], "split": ["train", "test"],
        "size": [1, 1], "mtime_ns": [1, 1], "width": [1, 1], "height": [1, 1], "decoder": ["x", "x"],
    }  # fmt: skip
    tables: dict[str, pa.Table | bytes] = {"right types": pa.table(right), "no rows": pa.table(right).slice(0, 0)}
    for name in right:
        for value in ([[1], [2]], [None, None], ["x", "\x1b[31m"], [7, 2**40], [float("nan"), 1.0], [b"\xff", b""]):
            tables[f"{name} {value}"] = pa.table({**right, name: value})
        tables[f"no {name}"] = pa.table({key: value for key, value in right.items() if key != name})
    tables["a column twice"] = pa.table([pa.array(ids), pa.array(ids)], names=["id", "id"])
    tables["many rows"] = pa.table({"id": pa.nulls(4_000_000, pa.int8())})
    return tables | {"no Parquet": b"PAR1" + bytes(100) + b"PAR1", "empty": b""}


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values of a tree of JSON, inner ones too; of long lists the first and the last."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys if len(keys) < 5 or isinstance(tree, dict) else (keys[0], keys[-1]):
        yield (*path, key)
        yield from leaves(tree[key], (*path, key))


def changed(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of the tree with another value at a path; without the key where ``value`` is `KeyError`."""
    tree = copy.deepcopy(tree)
    node = tree
    for key in path[:-1]:
        node = node[key]
    if value is KeyError:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return tree


def _unsealed(path: Path) -> Any:
    content = json.loads(path.read_bytes())
    content.pop("crc32c")
    return content


def _bytes(content: Any) -> bytes | None:
    return json.dumps(content).encode("utf-8", "surrogatepass")


def _sealed(content: Any, file: Path) -> bytes | None:
    """Sealed bytes of what has a checksum at all."""
    with suppress(ValueError, TypeError):
        return seal(content, indent=None if file.parent.name == "plan" else 1)
    return None


def _state(folder: Path) -> list[tuple[str, int, int]]:
    paths = [folder, *sorted(folder.rglob("*"))]
    return [(str(path), path.lstat().st_mtime_ns, path.lstat().st_size) for path in paths]


@contextmanager
def _limited(problem: str) -> Iterator[None]:
    """Raise where it takes too long: opening a pipe waits for ever."""

    def ring(*_: object) -> None:
        raise WrongError(problem)

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _link(path: Path, outside: Path) -> None:
    path.symlink_to(outside)


def _dangling(path: Path, outside: Path) -> None:
    path.symlink_to(outside / "nothing")


def _endless(path: Path, outside: Path) -> None:
    path.symlink_to("/dev/zero")


def _pipe(path: Path, outside: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path, outside: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        here = Path.cwd()
        os.chdir(path.parent)  # names of sockets are short
        try:
            one.bind(path.name)
        finally:
            os.chdir(here)


def _folder(path: Path, outside: Path) -> None:
    path.mkdir()


def _sparse(path: Path, outside: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


KINDS: dict[str, Callable[[Path, Path], None]] = {
    "link": _link, "dangling link": _dangling, "endless": _endless, "pipe": _pipe, "socket": _socket,
    "folder": _folder, "sparse": _sparse,
}  # fmt: skip


@contextmanager
def quick() -> Iterator[None]:
    """`embcache doctor` without measuring the machine; no waiting for the disk."""
    before = doctor.devices, doctor.decoding, os.fsync
    doctor.devices, doctor.decoding = list, lambda: {"one_thread": 1, "all_threads": 1, "threads": 1, "image": "none"}
    os.fsync = lambda descriptor: None
    try:
        yield
    finally:
        doctor.devices, doctor.decoding, os.fsync = before


__all__ = ["COMMANDS", "KINDS", "LISTING", "Home", "WrongError", "quick"]
