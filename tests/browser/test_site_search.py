"""The site's search, from a file: no server, no network."""

from __future__ import annotations

import os
import shutil
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
    for module in ("mkdocs", "material"):
        pytest.importorskip(module, reason="needs the extra `docs`")
    shutil.copytree(ROOT / "docs" / "assets", tmp_path / "docs" / "assets")
    for name in ("index.md", "demo.png", "extraction.md"):  # with the site's own settings, and no reference of the code
        shutil.copy(ROOT / "docs" / name, tmp_path / "docs" / name)
    (tmp_path / "mkdocs.yml").write_text(
        f"INHERIT: {ROOT / 'mkdocs.yml'}\nstrict: false\nhooks: []\nplugins: [search, offline]\n"
        "nav: [{Home: index.md}, {Extraction: extraction.md}]\n"
    )
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "-q", "--site-dir", str(tmp_path / "site")],
        cwd=tmp_path, check=True, capture_output=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    browser.get((tmp_path / "site" / "index.html").as_uri())
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
