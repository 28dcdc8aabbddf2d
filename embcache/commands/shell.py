"""How commands appear in the shell: found when they are typed, help under headings, advice only to flags they have."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, MutableMapping
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from embcache.errors import advise_only


class Command(TyperCommand):
    """A command whose help lists options under their headings."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        parameters: list[Any] = self.get_params(ctx)  # arguments and options of typer
        for parameter in parameters:
            if record := parameter.get_help_record(ctx):
                usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
                sections.setdefault(parameter.rich_help_panel or usual, []).append(record)
        _write_sections(sections, formatter)


class Group(TyperGroup):
    """A group of commands whose errors advise only flags of the command that was typed."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that was typed."""
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None:
            advise_only(flag for option in command.params for flag in (*option.opts, *option.secondary_opts))
            ctx.call_on_close(lambda: advise_only(None))
        return name, command, rest


class LazyCommands(MutableMapping[str, Any]):
    """Commands by name, each imported when it is first used.

    ``places`` are ``module:function``; the answer of each of ``tables`` is a table.
    """

    def __init__(self, places: Mapping[str, str], tables: Collection[str] = ()) -> None:
        self._places, self._tables = dict(places), tables
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            module, _, function = self._places[name].partition(":")
            made = getattr(import_module(module), function)
            self._made[name] = make_command(name, made, table=name in self._tables)
        return self._made[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._places[name], self._made[name] = "", command

    def __delitem__(self, name: str) -> None:
        del self._places[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def make_command(name: str, function: Any, *, table: bool = False) -> Any:
    """The command of a function, or the group of a `typer.Typer`."""
    if table:
        from embcache.commands.options import prints_table

        function = prints_table(function)
    if isinstance(function, typer.Typer):
        function.info.name = name
        return typer.main.get_command(function)
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(name, cls=Command)(function)
    return typer.main.get_command(app)


def write_commands(headings: Mapping[str, Mapping[str, str]], formatter: Any) -> None:
    """Write the sentences of commands under headings, as part of the help of a group."""
    _write_sections({heading: list(commands.items()) for heading, commands in headings.items()}, formatter)


def _write_sections(sections: Mapping[str, list[tuple[str, str]]], formatter: Any) -> None:
    for heading, rows in sections.items():
        if rows:
            with formatter.section(heading):
                formatter.write_dl(rows)
