"""Code blocks of a Markdown page, and what becomes of each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

RUN = {"python", "bash"}
FILES = {"toml"}
SHOWN = {"text"}  # diagrams and output: never commands

# The line before a block that is not run. It is in the text, so that readers see it.
NEEDS = re.compile(r"^\*Needs (a GPU|a cluster|a module|an account|a download)\b.*:\*$")

_FENCE = re.compile(r"^( *)```(.*?)\n(.*?)^\1```[ ]*$", flags=re.MULTILINE | re.DOTALL)
_NAMED = re.compile(r"^# ([\w.-]+\.(?:toml|py))\b")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes
    ----------
    language : str
        What stands after the opening fence.
    code : str
        Its lines, without their common indentation.
    line : int
        Of the opening fence, from 1.
    needs : str
        What the line before it says it needs; ``""`` for a block that is run.
    """

    language: str
    code: str
    line: int
    needs: str = ""

    @property
    def file(self) -> str | None:
        """Name of the file that its first line says it is: written there, not run."""
        found = _NAMED.match(self.code)
        return found.group(1) if found else None


def read_blocks(page: Path) -> list[Block]:
    """Every fenced block of a page, in order."""
    text = page.read_text("utf-8")
    blocks = []
    for found in _FENCE.finditer(text):
        before = text[: found.start()].rstrip("\n").rpartition("\n")[2].strip()
        needs = NEEDS.match(before)
        indent = found.group(1)
        code = "".join(line.removeprefix(indent) for line in found.group(3).splitlines(keepends=True))
        line = text.count("\n", 0, found.start()) + 1
        blocks.append(Block(found.group(2).strip(), code, line, needs.group(1) if needs else ""))
    return blocks
