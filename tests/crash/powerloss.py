"""What a disk holds after the power is cut: a journal of calls, played up to an instant without what was not fsynced.

The model is stricter than filesystems are. A file's bytes last from the fsync of that file on, a name (made, renamed,
linked or removed) from the fsync of the folder that it is in, and nothing else does. Of what was not fsynced, anything
may be there all the same: see `Disk.remains`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.crash.faults import Call

ACK = "ack"  # an entry that stands for no call: a shard is said to be committed
Entry = tuple[str, tuple[Any, ...], Any]
# What remains: folders are dicts, files bytes, links texts.
Tree = dict[str, Any]
MODES = ("synced only", "names without data", "by chance")


class _File:
    def __init__(self, data: bytes = b"", durable: bytes | None = None) -> None:
        self.data, self.durable = bytearray(data), durable


class _Link:
    def __init__(self, text: str) -> None:
        self.text = text


class _Folder:
    def __init__(self) -> None:
        self.now: dict[str, Any] = {}
        self.durable: dict[str, Any] = {}
        self.pending: list[tuple[int, str, Any]] = []  # (call, name, node or None) since the last fsync

    def put(self, call: int, name: str, node: Any) -> None:
        if node is None:
            self.now.pop(name, None)
        else:
            self.now[name] = node
        self.pending.append((call, name, node))


class Journal:
    """Writes down the calls of one process, as a `Hook`."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def hook(self, call: Call, do: Callable[[], Any]) -> Any:
        """Make the call and write it down; one that fails changes nothing and is left out."""
        result = do()
        arguments = tuple(str(a) if isinstance(a, Path) else a for a in call.arguments)
        if call.name == "write":
            arguments = (arguments[0], bytes(arguments[1][:result]))
        if not (call.name == "renameat" and not result):
            self.entries.append((call.name, arguments, result))
        return result

    def acknowledge(self, shard: str) -> None:
        """The caller was told that a shard is committed."""
        self.entries.append((ACK, (shard,), None))


class Disk:
    """The filesystem below a folder that is there, all of it on disk at first."""

    def __init__(self, folder: Path, *, home: str) -> None:
        """``folder/home`` is the home; what lies in it is read, and not changed."""
        self._root, self._base, self._calls = _Folder(), os.fspath(folder), 0
        self._open: dict[int, Any] = {}
        if (folder / home).is_dir():
            node = _load(folder / home)
            self._root.now[home] = self._root.durable[home] = node

    def play(self, entry: Entry) -> None:
        """Make one call of the journal."""
        name, arguments, result = entry
        self._calls += 1
        if name == "open":
            if arguments[1] & os.O_CREAT:
                node = _File()
                self._put(arguments[0], node)
            else:
                node = self._node(arguments[0])
            self._open[result] = node
        elif name == "write":
            self._open[arguments[0]].data += arguments[1]
        elif name == "fsync":
            node = self._open[arguments[0]]
            if isinstance(node, _Folder):
                node.durable, node.pending = dict(node.now), []
            else:
                node.durable = bytes(node.data)
        elif name == "close":
            del self._open[arguments[0]]
        elif name == "mkdir":
            self._put(arguments[0], _Folder())
        elif name == "symlink":
            self._put(arguments[1], _Link(arguments[0]))
        elif name == "link":
            self._put(arguments[1], self._node(arguments[0]))
        elif name in ("rename", "replace") or (name == "renameat" and arguments[2] == 1):
            node = self._node(arguments[0])
            self._put(arguments[0], None)
            self._put(arguments[1], node)
        elif name == "renameat":
            one, other = self._node(arguments[0]), self._node(arguments[1])
            self._put(arguments[0], other)
            self._put(arguments[1], one)
        elif name in ("unlink", "rmdir"):
            self._put(arguments[0], None)
        else:
            assert name in ("utime", ACK), name

    def remains(self, mode: str, chance: random.Random) -> Tree:
        """What is there when the machine is on again.

        Parameters
        ----------
        mode : str
            ``synced only``; ``names without data``: every change of a name reached the disk, but no byte that was not
            fsynced, as where metadata are journalled and data are late; ``by chance``: of each call's changes of
            names all or nothing, and of a file that was not fsynced nothing, a part, zeros, or all.
        chance : random.Random
            Throws the dice.
        """
        coins: dict[int, bool] = {}

        def reached(call: int) -> bool:
            if mode == "by chance":
                return coins.setdefault(call, chance.random() < 0.5)
            return mode == "names without data"

        def build(node: Any) -> Any:
            if isinstance(node, _Link):
                return node.text
            if isinstance(node, _File):
                if node.durable is not None:
                    return node.durable
                data = bytes(node.data)
                options = [b"", data, bytes(len(data)), data[: chance.randrange(len(data) + 1)]]
                return chance.choice(options) if mode == "by chance" else b""
            names = dict(node.durable)
            for call, name, inner in node.pending:
                if reached(call):
                    names[name] = inner
            return {name: build(inner) for name, inner in names.items() if inner is not None}

        tree: Tree = build(self._root)
        return tree

    def _split(self, path: str) -> tuple[_Folder, str]:
        parts = Path(os.path.relpath(path, self._base)).parts
        node = self._root
        for part in parts[:-1]:
            node = node.now[part]
        return node, parts[-1]

    def _node(self, path: str) -> Any:
        if os.path.relpath(path, self._base) == ".":
            return self._root
        folder, name = self._split(path)
        return folder.now[name]

    def _put(self, path: str, node: Any) -> None:
        folder, name = self._split(path)
        folder.put(self._calls, name, node)


def _load(path: Path) -> Any:
    if path.is_symlink():
        return _Link(str(path.readlink()))
    if path.is_file():
        return _File(path.read_bytes(), path.read_bytes())
    folder = _Folder()
    folder.now = {inner.name: _load(inner) for inner in path.iterdir()}
    folder.durable = dict(folder.now)
    return folder


def write_tree(folder: Path, tree: Tree) -> None:
    """Put what remains into an empty folder."""
    for name, node in tree.items():
        if isinstance(node, dict):
            (folder / name).mkdir()
            write_tree(folder / name, node)
        elif isinstance(node, str):
            (folder / name).symlink_to(node)
        else:
            (folder / name).write_bytes(node)
