"""The site's search, from a file: no server, no network."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("selenium", reason="selenium is not installed: pip install selenium")

from selenium.webdriver.common.by import By

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_search_finds_a_page_from_disk(browser: Any, tmp_path: Path) -> None:
    for module in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(module, reason="needs the extra `docs`")
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "-q", "--site-dir", str(tmp_path)],
        cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    browser.get((tmp_path / "index.html").as_uri())
    field = browser.find_element(By.CSS_SELECTOR, "input.md-search__input")
    field.click()
    field.send_keys("quarantined")
    found: list[Any] = []
    for _ in range(200):
        found = browser.find_elements(By.CSS_SELECTOR, ".md-search-result__item")
        if found:
            break
        time.sleep(0.05)
    assert any("Extraction" in item.text for item in found)
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
