"""Advice in errors: only flags that the command has."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from typer.main import get_command

import embcache
from embcache.cli import app
from embcache.errors import ProtocolError, UsageError, advise_only
from tests.probe.build import make_dataset, make_features, put_store
from tests.probe.test_cached import cli


def flags_of() -> dict[str, set[str]]:
    found, todo = dict[str, set[str]](), list(vars(get_command(app))["commands"].items())
    for name, command in todo:
        todo += [(f"{name} {inner}", each) for inner, each in getattr(command, "commands", {}).items()]
        found[name] = {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)}
    return found


def literal_commands() -> list[tuple[str, str]]:
    """Every ``embcache COMMAND …`` in the package's messages, with where it stands."""
    found = []
    for file in sorted(Path(embcache.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "fix":
                text = ast.unparse(node.value)
                found += [(f"{file.name}:{node.value.lineno}", part) for part in text.split("embcache ")[1:]]
    return found


def test_commands_that_are_advised_exist_with_their_flags() -> None:
    known = flags_of()
    checked = 0
    for where, text in literal_commands():
        words = re.findall(r"[a-z-]+", text)
        name = " ".join(words[:2]) if " ".join(words[:2]) in known else words[0] if words else ""
        if name not in known:  # a command that is put in by a variable
            continue
        own = re.split(r", or |; |\(|without |, with |by hand", text)[0]
        flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", own))
        assert flags <= known[name], f"{where}: embcache {text}"
        checked += 1
    assert checked > 50


def test_without_a_command_all_advice_is_given() -> None:
    assert UsageError("no", fix=("--this", "that")).fix == "--this, or that"
    assert UsageError("no").fix is None


def test_advice_to_other_flags_is_left_out() -> None:
    advise_only({"--this"})
    try:
        error = UsageError("no", fix=("--that 3", "--this", "embcache other --that", "look"))
        assert error.fix == "--this, or embcache other --that, or look"
        assert "try" not in str(UsageError("no", fix="--that"))
    finally:
        advise_only(None)


@pytest.mark.parametrize("command", ["probe", "splits export"])
def test_a_rare_class_is_told_with_what_the_command_can_do(home: Path, command: str) -> None:
    ds = make_dataset([0, 1] * 40 + [2] * 3)
    put_store(home, ds, "a", make_features(ds))
    with pytest.raises(ProtocolError) as caught:
        cli(*command.split(), "--dataset", "toy", "--home", str(home))
    fix = str(caught.value.fix)
    assert "--folds" in fix
    assert "--drop-class c" in fix
    assert "--merge-class c+OTHER=NEW" in fix
    cli(*command.split(), "--dataset", "toy", "--home", str(home), "--drop-class", "c")
    assert UsageError("no", fix="--that").fix == "--that"  # the command is over
