"""Types commands in this process, as a user does in a shell."""

from __future__ import annotations

import json
from typing import Any

from click.testing import Result
from typer.testing import CliRunner

from embcache.cli import app


def embcache(*arguments: object) -> Result:
    """Run a command; an error is raised as it is."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def answer(*arguments: object) -> Any:
    """The JSON that a command writes."""
    return json.loads(embcache(*arguments, "--json", "-").stdout)
