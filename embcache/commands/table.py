"""Names of `embcache.commands.output`, until all commands import them from there."""

from embcache.commands.output import bounds as bounds
from embcache.commands.output import format_table as format_table
from embcache.commands.output import one_line as one_line
from embcache.commands.output import print_note as print_note
from embcache.commands.output import print_table as print_table
from embcache.commands.output import spread as spread
