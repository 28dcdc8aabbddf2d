"""The site is built from a checkout without a single warning, and needs nothing from the network to be read."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for module in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(module, reason="needs the extra `docs`")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return folder


def test_commands_and_docstrings_are_in_it(site: Path) -> None:
    commands = (site / "reference" / "commands.html").read_text("utf-8")
    assert "--retry-quarantined" in commands
    assert "<!-- commands -->" not in commands
    assert "load_dataset" in (site / "reference" / "python.html").read_text("utf-8")
    assert "CorruptStoreError" in (site / "reference" / "errors.html").read_text("utf-8")


def test_nothing_is_fetched_from_the_network(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text("utf-8")
        loaded = re.findall(
            r'<(?:script|img|iframe)[^>]*\ssrc="(https?:[^"]+)|<link[^>]*stylesheet[^>]*href="(https?:[^"]+)', text
        )
        assert not loaded, page


def test_search_needs_no_network(site: Path) -> None:
    assert (site / "search" / "search_index.js").is_file()
    for page in site.rglob("*.html"):
        assert "unpkg.com" not in page.read_text("utf-8"), page
    assert "IFrameWorker" in (site / "assets" / "iframe-worker.js").read_text("utf-8")
