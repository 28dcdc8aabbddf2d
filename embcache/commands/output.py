"""What a command prints. All of it passes here, so that no name from a file reaches the terminal as a control sequence.

Work never ends because nobody reads what is printed: where a stream is closed, full or has lost its reader, the rest of
the output is dropped, and of the standard output that is said in the end (`lost_output`).
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import sys
from collections.abc import Callable
from typing import Any, TextIO

from embcache.errors import printable


def echo(text: str = "", *, err: bool = False, nl: bool = True) -> None:
    """Print text to stdout, or stderr, with control characters shown escaped."""
    stream = sys.stderr if err else sys.stdout
    if stream is not None:
        stream.write(printable(text) + "\n" * nl)
        stream.flush()


def echo_data(text: str, keep: str) -> None:
    """Print a file's text to stdout; where that cannot show it as it is, a note names the option that ``keep`` it."""
    shown = printable(text)
    if shown != text or _fitting(text) != text:
        echo(f"note: characters that cannot be shown are escaped; {keep} keeps them as they are", err=True)
    echo(shown, nl=False)


def json_text(data: Any, *, indent: int = 2, shown: bool = False) -> str:
    """Indented JSON, with escapes for what is not printable or, if ``shown``, what stdout's encoding lacks."""
    text = json.dumps(data, indent=indent, ensure_ascii=False, allow_nan=False)

    def escaped(match: re.Match[str]) -> str:
        character = match[0]
        if character.isprintable() and (not shown or _fitting(character) == character):
            return character
        units = character.encode("utf-16-be", "surrogatepass").hex()
        return "".join(f"\\u{units[start : start + 4]}" for start in range(0, len(units), 4))

    return re.sub(r"[^\x20-\x7e\n]", escaped, text) + "\n"


def _fitting(text: str) -> str:
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


class Screen(io.TextIOBase):
    """Stands for stdout or stderr: characters that its encoding lacks, and control characters, are shown escaped.

    What libraries write (warnings, logs, progress bars) passes here, too. A line's end, and a return to its beginning
    at the start of what is written, as progress bars make, are kept.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.lost: Exception | None = None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """That of the stream."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        """How characters are written that the encoding lacks."""
        return "backslashreplace"

    def write(self, text: str) -> int:
        """Write text, as far as anybody takes it."""
        start = "\r" if text.startswith("\r") else ""
        shown = (start + printable(text[len(start) :])).encode(self.encoding, "backslashreplace").decode(self.encoding)
        self._try(lambda stream: stream.write(shown))
        return len(text)

    def flush(self) -> None:
        """Flush what was written, as far as anybody takes it."""
        self._try(lambda stream: stream.flush())

    def _try(self, call: Callable[[TextIO], object]) -> None:
        if self._stream is not None and self.lost is None:
            try:
                call(self._stream)
            except (OSError, ValueError) as error:  # the disk is full, the reader has gone, it is closed
                self.lost = error

    def isatty(self) -> bool:
        """Whether somebody looks at it."""
        return self._stream is not None and not self._stream.closed and self._stream.isatty()

    def fileno(self) -> int:
        """Descriptor of the stream."""
        if self._stream is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self._stream.fileno()

    def writable(self) -> bool:
        """It is."""
        return True


def guard_streams() -> None:
    """Put a `Screen` before stdout and stderr, and something behind descriptors that the process was started without.

    The next file that is opened would else get the number of a closed stderr, and what a library in C says to it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    sys.stdout, sys.stderr = Screen(sys.stdout), Screen(sys.stderr)


def lost_output() -> bool:
    """Flush both streams; True, with a message on stderr, where some of the standard output could not be written."""
    sys.stdout.flush()
    error = sys.stdout.lost if isinstance(sys.stdout, Screen) else None
    if error is not None and not isinstance(error, BrokenPipeError):
        echo(f"embcache: not all of the output could be written: {getattr(error, 'strerror', None) or error}", err=True)
    sys.stderr.flush()
    return error is not None
