"""Notes on stderr: what files and ids bring along does not reach the terminal as control characters."""

from __future__ import annotations

import pytest

from embcache.commands.table import print_note


def test_control_characters_are_escaped_and_lines_kept(capsys: pytest.CaptureFixture[str]) -> None:
    print_note("left out: a\x1b[2Jb\r\nsecond\u202e line")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "note: left out: a\\x1b[2Jb\\r\nsecond\\u202e line\n"
