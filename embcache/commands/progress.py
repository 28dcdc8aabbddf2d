"""Names of `embcache.commands.output`, until all commands import them from there."""

from embcache.commands.output import ProgressBar as ProgressBar
