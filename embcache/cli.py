"""The ``embcache`` command: mounts the commands and turns errors into one message.

Exit status: 0 on success, 1 on an error that a user can fix, 2 on bad usage, 130 and 143 on signals.
"""

from __future__ import annotations

import atexit
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

import embcache
from embcache.commands.output import echo, guard_streams, lost_output, print_note
from embcache.cores import is_shortage
from embcache.errors import EmbcacheError, UsageError, advise_only

COMMANDS: dict[str, dict[str, tuple[Any, str]]] = {
    "Start": {
        "demo": ("start:demo", "Run the whole pipeline on a built-in synthetic dataset."),
        "datasets": ("start:datasets", "List the datasets, or show one of them in full."),
        "backbones": ("start:backbones", "List the backbones and the state of their weights."),
        "heads": ("start:heads", "List the heads and their options."),
    },
    "Features": {
        "extract": ("features:extract", "Run frozen backbones once over all images and store the features."),
        "slurm": ("slurm:slurm", "Print a batch script that extracts on a Slurm cluster."),
        "import": ("features:import_", "Take features made elsewhere as those of a backbone."),
        "rank": ("features:rank", "Rank the cached backbones in seconds, without training."),
        "similarity": ("features:similarity", "Compare the embeddings of cached backbones."),
    },
    "Heads": {
        "probe": ("training:probe", "Train heads on cached features and test them."),
        "finetune": ("training:finetune", "Train backbones and a head together on augmented images."),
        "splits": (
            {
                "export": ("training:export", "Write the splits that `embcache probe` draws."),
                "import": ("training:import_", "Check the splits of others and keep them."),
            },
            "Export or import the images of every fold and subset.",
        ),
    },
    "Results": {
        "results": ("scores:results", "List the saved results, or show one run in full."),
        "compare": ("scores:compare", "Test the differences between results on the same test images."),
        "subgroups": ("scores:subgroups", "Score results within subgroups of the test images."),
        "errors": ("predicting:errors", "List and show the test images that a run gets wrong."),
        "run": ("figures:run", "Make a table or a figure of the paper, or one of your own."),
        "predict": ("predicting:predict", "Predict images with the models of a saved run."),
        "submit": ("predicting:submit", "Write the predictions of a run as Kaggle expects them."),
        "kaggle-score": ("predicting:kaggle_score", "Save the leaderboard scores of a run as a result."),
        "export-head": ("predicting:export_head", "Write a trained head for programs without embcache."),
    },
    "Figures": {
        "curves": ("figures:curves", "Draw learning curves of the saved results."),
        "plot": ("predicting:plot", "Draw ROC, precision-recall, confusion or calibration plots of a run."),
        "tsne": ("figures:tsne", "Draw maps of cached embeddings side by side."),
        "attention": ("figures:attention", "Draw what a DVME run or a vision transformer attends to."),
        "neighbors": ("figures:neighbors", "Show the images that are nearest to one in feature space."),
        "audit": ("figures:audit", "Find near-duplicates, likely label errors and outliers."),
        "report": ("figures:report", "Write an HTML page of all saved results."),
    },
    "Cache": {
        "ls": ("cache:ls", "List the cached features and the number of runs."),
        "info": ("cache:info", "Show the recipe, shards, quarantine and files of stores."),
        "export": ("cache:export", "Write one store to a single file for other tools."),
        "verify": ("cache:verify", "Check every byte in the cache, and repair what can be repaired."),
        "gc": ("cache:gc", "Free the space of replaced rows and of interrupted processes."),
        "doctor": ("cache:doctor", "Report on this installation, for a bug report."),
    },
}
"""Module and function of each command, or the commands of a group, and its sentence in ``--help``, by heading."""


class Command(TyperCommand):
    """A command whose help lists options under their headings."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Arguments by their metavars; in brackets where they can be left out."""
        arguments: list[Any] = [each for each in self.get_params(ctx) if each.param_type_name == "argument"]
        shown = [(each.metavar + "..." * (each.nargs != 1), each.required) for each in arguments]
        return ["[OPTIONS]", *(name if required else f"[{name}]" for name, required in shown)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        parameters: list[Any] = self.get_params(ctx)  # arguments and options of typer
        for parameter in parameters:
            if record := parameter.get_help_record(ctx):
                own = parameter.param_type_name == "argument"
                usual, record = ("Arguments", (parameter.metavar, record[1])) if own else ("Options", record)
                sections.setdefault(parameter.rich_help_panel or usual, []).append(record)
        _write_sections(sections, formatter)


class Group(TyperGroup):
    """A group of commands whose errors advise only flags of the command that was typed."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that was typed."""
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None:
            flags = [flag for option in command.params for flag in (*option.opts, *option.secondary_opts)]
            advise_only(flags, _typed_home(rest) if "--home" in flags else {}, _with_home())
            ctx.call_on_close(lambda: advise_only(None))
        return name, command, rest

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands; no module of theirs is imported for that."""
        places: Any = self.commands
        _write_sections({"Commands": [(name, text) for name, (_, text) in places.places.items()]}, formatter)


def _typed_home(words: Sequence[str]) -> dict[str, str]:
    """The options of a command line that say where the home is, and its copies, by their flags."""
    typed = dict[str, str]()
    for flag in ("--cache-dir", "--home"):
        for word, value in zip(words, [*words[1:], ""], strict=False):
            if word == flag or word.startswith(f"{flag}="):
                typed[flag] = shlex.join([flag, value if word == flag else word.removeprefix(f"{flag}=")])
    return typed


def _with_home() -> list[str]:
    """All commands but those that have no home."""
    places = [item for each in COMMANDS.values() for item in each.items() if item[0] != "heads"]
    return [
        f"{name} {sub}".strip() for name, (place, _) in places for sub in (place if isinstance(place, dict) else ("",))
    ]


class _LazyCommands(Mapping[str, Any]):
    """Commands by name, each imported when it is first used."""

    def __init__(self, places: Mapping[str, tuple[Any, str]]) -> None:
        self.places = dict(places)
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            place, sentence = self.places[name]
            self._made[name] = _make_command(name, place, sentence)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def _make_command(name: str, place: Any, sentence: str) -> Any:
    if isinstance(place, dict):
        commands: Any = _LazyCommands(place)
        return Group(name=name, help=sentence, commands=commands, no_args_is_help=True, rich_markup_mode=None)
    module, _, function = place.partition(":")
    made = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    made.command(name, cls=Command)(getattr(import_module(f"embcache.commands.{module}"), function))
    return typer.main.get_command(made)


class _Root(Group):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands: Any = _LazyCommands({name: place for each in COMMANDS.values() for name, place in each.items()})

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands under their headings."""
        _write_sections({h: [(n, s) for n, (_, s) in each.items()] for h, each in COMMANDS.items()}, formatter)


def _write_sections(sections: Mapping[str, list[tuple[str, str]]], formatter: Any) -> None:
    for heading, rows in sections.items():
        if rows:
            with formatter.section(heading):
                formatter.write_dl(rows)


app = typer.Typer(
    name="embcache",
    cls=_Root,
    help="Which frozen embedding serves my medical imaging task, and how far does it get with 50 labels?",
    epilog="Start with `embcache demo`. Own images: embcache extract --backbone … --dataset folder --data-root FOLDER",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 1000},
)


def _print_version(value: bool) -> None:
    if value:
        echo(f"embcache {embcache.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show details of what happens.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show warnings and errors only.")] = False,
) -> None:
    del version
    import logging

    from embcache.log import shown

    level = logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO
    context.with_resource(shown(print_note, level))


def _terminate(_signum: int, _frame: object) -> NoReturn:
    # A preempted job: leave through the same finally blocks as Ctrl-C, with the status shells expect.
    raise SystemExit(143)


_SIGNALLED = (130, 143)


def _leave(status: int) -> NoReturn:
    """End the process with a status, at once; every finally block has run by now.

    Shutting torch down takes half a second and frees nothing that the kernel would not. And after Ctrl-C, one run in
    three was once seen to end by the signal itself after it had printed everything; leaving here makes the status the
    same every time.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # a traceback would say nothing by now
        signal.signal(number, lambda number, _: os._exit(128 + number))
    if status not in _SIGNALLED:  # otherwise threads that work are not waited for
        threading._shutdown()  # type: ignore[attr-defined]  # what the interpreter does first: executors end
    atexit._run_exitfuncs()  # temporary folders, loggers, worker processes
    if lost_output():
        status = status or 1
    os._exit(status)


def _tell_unraisable(unraisable: Any) -> None:
    # What a signal raises while an object is finalized is lost; the run ends before its next shard instead.
    if not isinstance(unraisable.exc_value, SystemExit | KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)


def main() -> NoReturn:
    """Run the command line; the entry point of the ``embcache`` script."""
    guard_streams()
    sys.unraisablehook = _tell_unraisable
    signal.signal(signal.SIGTERM, _terminate)
    status: object = 0
    try:
        status = _run()
    except KeyboardInterrupt:
        status = 130
    except SystemExit as end:
        status = end.code
    if isinstance(status, str):
        echo(status, err=True)
    _leave(status if isinstance(status, int) else 0 if status is None else 1)


def _run() -> int:
    try:
        app()
    except EmbcacheError as error:
        echo(f"embcache: {error}", err=True)
        return 2 if isinstance(error, UsageError) else 1
    except OSError as error:
        # A disk that fails or fills says nothing of embcache: one message, no traceback.
        where = f" ({error.filename})" if error.filename else ""
        echo(f"embcache: the operating system refused: {error.strerror or error}{where}", err=True)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_shortage(error):
            raise
        found = str(error).splitlines()[0] if str(error) else type(error).__name__
        echo(f"embcache: not enough memory\n  found: {found}", err=True)
        return 1
    return 0
