"""A hook of mkdocs: the command reference is made from the commands themselves at each build, so it cannot go stale."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from embcache.cli import app

MARKER = "<!-- commands -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the reference in the marker's place."""
    return markdown.replace(MARKER, reference()) if MARKER in markdown else markdown


def commands() -> Iterator[tuple[str, Any]]:
    """Every command that can be typed, as (``embcache splits export``, click command), in the order of --help."""

    def walk(path: str, command: Any) -> Iterator[tuple[str, Any]]:
        children = getattr(command, "commands", {})
        if not children:
            yield path, command
        for name, child in children.items():
            yield from walk(f"{path} {name}", child)

    yield from walk("embcache", typer.main.get_command(app))


def reference() -> str:
    """Markdown of all commands with their arguments, options, defaults and help."""
    return "\n\n".join(section(path, command) for path, command in commands())


def section(path: str, command: Any) -> str:
    """Markdown of one command."""
    lines = [f"## `{path}`", "", *(_prose(command.help or "")), ""]
    rows = [_row(parameter) for parameter in command.params if not getattr(parameter, "hidden", False)]
    if rows:
        lines += ["| | default | |", "|---|---|---|", *rows]
    return "\n".join(lines)


def _prose(text: str) -> list[str]:
    """Help as paragraphs; what begins with "Example:" becomes code."""
    paragraphs = [" ".join(part.split()) for part in text.replace("\b", "").split("\n\n")]
    out = []
    for paragraph in paragraphs:
        words, found, example = paragraph.partition("Example: ")
        out += [_plain(words.strip()), ""] if words.strip() else []
        if found:
            out += ["```text", *(part.strip() for part in example.split("·")), "```", ""]
    return out


def _row(parameter: Any) -> str:
    """One line of a command's table: spelling, default, help."""
    text = " ".join((getattr(parameter, "help", None) or "").split())
    text, _, default = text.partition("[default: ")
    if parameter.param_type_name == "argument":
        spelling = parameter.metavar or parameter.name.upper()
    else:
        names = [*parameter.opts, *parameter.secondary_opts]
        value = "" if parameter.is_flag else f" {parameter.metavar or parameter.type.name.upper()}"
        spelling = ", ".join(names) + value
    default = default.rstrip().removesuffix("]") or _default(parameter)
    # A bar within backticks divides no cells, and a backslash before it would be shown.
    cells = (f"`{spelling}`", f"`{default}`" if default else "", _plain(text.strip()).replace("|", "\\|"))
    return "| " + " | ".join(cells) + " |"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    if parameter.param_type_name == "argument" or value is None or value == () or callable(value):
        return ""
    if isinstance(value, bool):
        return (
            (parameter.opts[0] if value else "off")
            if not parameter.secondary_opts
            else (parameter.opts[0] if value else parameter.secondary_opts[0])
        )
    return str(value)


def _plain(text: str) -> str:
    """Text in which nothing is taken for HTML or emphasis."""
    return text.replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
