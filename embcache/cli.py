"""The ``embcache`` command: mounts the families of commands and turns errors into one message.

Exit status: 0 on success, 1 on an error a user can mend, 2 on bad usage, 130 and 143 on signals.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from typing import Annotated, Any, NoReturn

import typer

import embcache
from embcache.commands import audit_command as audit
from embcache.commands import backbones_command as backbones
from embcache.commands import compare_command as compare
from embcache.commands import datasets_command as datasets
from embcache.commands import demo_command as demo
from embcache.commands import doctor_command as doctor
from embcache.commands import extract_command as extract
from embcache.commands import figures_command as figures
from embcache.commands import finetune_command as finetune
from embcache.commands import gc_command as gc
from embcache.commands import predict_command as predict
from embcache.commands import predicted_command as predicted
from embcache.commands import probe_command as probe
from embcache.commands import rank_command as rank
from embcache.commands import report_command as report
from embcache.commands import run_command as run
from embcache.commands import splits_command as splits
from embcache.commands import store_command as store
from embcache.commands import verify_command as verify
from embcache.commands.options import advise_by
from embcache.commands.output import echo, guard_streams, lost_output
from embcache.commands.table import print_note
from embcache.errors import EmbcacheError, UsageError
from embcache.log import shown
from embcache.memory import is_shortage

app = typer.Typer(
    name="embcache",
    help="Which frozen embedding serves my medical imaging task, and how far does it get with 50 labels?",
    epilog="Start with `embcache demo`. Own images: embcache extract --backbone … --dataset folder --data-root FOLDER",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _print_version(value: bool) -> None:
    if value:
        echo(f"embcache {embcache.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    del version
    context.with_resource(shown(print_note))
    advise_by(context)


app.command()(demo.demo)
app.command()(datasets.datasets)
app.command()(backbones.backbones)
app.command()(probe.heads)
app.command()(extract.extract)
app.command()(probe.probe)
app.command()(finetune.finetune)
app.command()(probe.results)
app.command()(run.run)
app.command()(run.curves)
app.command()(compare.compare)
app.command()(compare.subgroups)
app.command()(predicted.errors)
app.command()(predicted.plot)
app.command()(rank.rank)
app.command()(rank.similarity)
app.command()(figures.tsne)
app.command()(figures.attention)
app.command()(figures.neighbors)
app.command()(audit.audit)
app.command()(report.report)
app.command()(predict.predict)
app.command()(predict.submit)
app.command()(predict.kaggle_score)
app.command()(predict.export_head)
app.add_typer(splits.app, name="splits")
app.command()(store.ls)
app.command()(store.info)
app.command()(store.export)
app.command()(verify.verify)
app.command()(gc.gc)
app.command()(doctor.doctor)


def _terminate(_signum: int, _frame: object) -> NoReturn:
    # A preempted job: leave through the same finally blocks as Ctrl-C, with the status shells expect.
    raise SystemExit(143)


_SIGNALLED = (130, 143)


def _leave(status: int) -> NoReturn:
    """End the process with a status, at once; every finally block has run by now.

    Taking torch down piece by piece lasts half a second and frees nothing that the kernel would not. And after Ctrl-C,
    one run in three was once seen to end by the signal itself after it had said all it had to say; leaving here makes
    the status the same every time.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # a traceback would say nothing by now
        signal.signal(number, lambda number, _: os._exit(128 + number))
    if status not in _SIGNALLED:  # then nobody waits for threads at work
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
        echo(f"embcache: the memory does not hold what was asked for\n  found: {found}", err=True)
        return 1
    return 0
