"""Each command and flag is documented: help in the program, a line in the reference, a mention in what people write."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

_spec = importlib.util.spec_from_file_location("command_reference", ROOT / "docs" / "command_reference.py")
assert _spec is not None
assert _spec.loader is not None
command_reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(command_reference)

COMMANDS: dict[str, Any] = dict(command_reference.commands())
WRITTEN = "\n".join(page.read_text("utf-8") for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def test_all_commands_are_found() -> None:
    assert {"embcache extract", "embcache splits export", "embcache tsne", "embcache audit"} <= set(COMMANDS)


@pytest.mark.parametrize("path", COMMANDS)
def test_a_command_and_each_of_its_flags_have_help(path: str) -> None:
    command = COMMANDS[path]
    assert command.help
    assert len(command.help.split()) > 3
    for parameter in command.params:
        assert getattr(parameter, "help", None), f"{path}: {parameter.name} has no help"


@pytest.mark.parametrize("path", COMMANDS)
def test_the_reference_has_each_flag_with_help_and_default(path: str) -> None:
    text = command_reference.section(path, COMMANDS[path])
    assert text.startswith(f"## `{path}`\n")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == len(COMMANDS[path].params)
    for parameter, row in zip(COMMANDS[path].params, rows, strict=True):
        cells = [cell.strip() for cell in re.split(r" \| ", row.strip("| "))]
        for name in parameter.opts if parameter.param_type_name == "option" else ():
            assert name in cells[0]
        assert len(cells) > 1, f"{path}: neither help nor default in {row}"


@pytest.mark.parametrize("path", COMMANDS)
def test_each_command_is_mentioned_in_readme_or_docs(path: str) -> None:
    assert re.search(rf"{path}\b(?!-)", WRITTEN), f"neither README nor docs mention `{path}`"


def test_the_reference_is_put_in_place_when_the_site_is_built() -> None:
    page = (ROOT / "docs" / "reference" / "commands.md").read_text("utf-8")
    assert "## `embcache extract`" in command_reference.on_page_markdown(page)
    assert command_reference.on_page_markdown("another page") == "another page"
