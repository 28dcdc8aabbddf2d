"""Some of what `make torture` does to a home that others can write to; and homes that one may only read."""

from __future__ import annotations

import errno
import logging
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from embcache import paths
from embcache.cli import app
from embcache.errors import StoreError
from embcache.runs.folders import list_results
from tests.crash.faults import Call, between
from tests.crash.hostile import KINDS, Home, quick
from tests.refusal import refused

COMMANDS = ("results", "ls", "verify", "gc", "probe", "repair")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """A home to be harmed."""
    with quick():
        yield Home(tmp_path_factory.mktemp("hostile"))


def test_links_pipes_and_devices_hang_nothing_and_harm_nothing(hostile: Home) -> None:
    chance, places = random.Random(0), hostile.places()
    for kind in KINDS:
        hostile.special(chance.choice(places), kind, chance.choice(COMMANDS))


@pytest.mark.parametrize("name", ["staging", "leases"])
def test_gc_never_follows_a_folder_of_a_store_that_is_a_link(hostile: Home, name: str) -> None:
    """It once deleted what was old where the link led to; `Home.special` compares that folder before and after."""
    place = f"{hostile.store.relative_to(hostile.home)}/{name}"
    hostile.start()
    (hostile.home / place).rmdir()
    (hostile.home / place).symlink_to(hostile.outside)
    hostile.command("gc")
    assert len(list(hostile.outside.iterdir())) == 4
    hostile.command("repair")
    assert not (hostile.home / place).is_symlink()
    assert len(list(hostile.outside.iterdir())) == 4
    hostile.command("gc")


def test_values_of_other_types_show_no_traceback_and_end_no_listing(hostile: Home) -> None:
    chance = random.Random(0)
    for _, write in chance.sample(list(hostile.values()), 5):
        hostile.start()
        write()
        hostile.command(chance.choice(["results", "ls", "probe", "splits"]))
        hostile.command("results RUN")


class _Locked:
    """Stands for a folder of another user's umask: root may read everything, so the system's answer is made up."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = str(folder)
        for name in ("open", "scandir", "lstat", "stat", "listdir"):
            monkeypatch.setattr(os, name, self._refusing(getattr(os, name), name))

    def _refusing(self, original: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **keywords: Any) -> Any:
            text = "" if isinstance(path, int) else os.fspath(path)
            inner = isinstance(text, str) and text.startswith(self._folder + os.sep)
            if inner or (text == self._folder and name in ("open", "scandir", "listdir")):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), text)
            return original(path, *arguments, **keywords)

        return call


@pytest.mark.parametrize("place", ["toy", "toy/runs", "store"])
def test_what_another_user_keeps_to_himself_is_named_and_ends_nothing(
    hostile: Home, place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hostile.start()
    folder = hostile.store if place == "store" else hostile.home / place
    _Locked(folder, monkeypatch)
    for command in ("ls", "verify", "gc", "results", "doctor"):
        paths._say_skipped.cache_clear()
        caplog.clear()
        output = hostile.command(command)
        concerned = place == "toy" or (place == "toy/runs") == (command in ("results", "gc"))
        if concerned and command != "gc":
            assert "Permission denied" in output + caplog.text, command


def test_a_home_that_cannot_be_listed_is_not_one_without_results(
    hostile: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile.start()
    _Locked(hostile.home, monkeypatch)
    with refused(StoreError, "home-not-readable") as caught:
        list_results(hostile.home)
    assert "Permission denied" in str(caught.value)


def test_reading_a_home_needs_no_right_to_write_to_it(
    hostile: Home, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hostile.start()

    def read_only(call: Call, do: Callable[[], Any]) -> Any:
        changes = call.name != "open" or call.arguments[1] & (os.O_WRONLY | os.O_RDWR)
        if changes and str(call.arguments[0]).startswith(str(hostile.home)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(call.arguments[0]))
        return do()

    caplog.set_level(logging.INFO, "embcache")
    picture = tmp_path / "map.png"
    commands = [
        ["tsne", "--dataset", "toy", "--method", "pca", "--output", str(picture)],
        ["results"],
        ["ls"],
        ["verify"],
        ["results", hostile.run.name],
        ["probe", "--dataset", "toy", "--head", "logreg", "--subset", "20", "--folds", "2"],
    ]
    with between(read_only):
        for words in commands:
            told = CliRunner().invoke(app, words, env={"EMBCACHE_HOME": str(hostile.home)})
            assert told.exit_code == 0, (words, told.output, told.exception)
    assert picture.is_file()
    assert "is not kept: Read-only file system" in caplog.text
