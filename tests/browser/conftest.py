"""A headless Chromium and a report for it to open; skipped with a reason where there is none."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from embcache.report.page import write_report
from tests.report.build import make_study


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def browser_files() -> tuple[str, str]:
    """Paths of Chromium and its driver, as Debian installs them."""
    pytest.importorskip("selenium", reason="selenium is not installed: pip install selenium")
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("no Chromium with its driver here: apt-get install chromium chromium-driver")
    return browser, driver


@pytest.fixture(scope="module")
def browser(browser_files: tuple[str, str]) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = browser_files[0]
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                     "--window-size=1280,1000", "--force-device-scale-factor=1"):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(browser_files[1]))
    driver.execute_cdp_cmd("Network.enable", {})
    # A page that were to ask for anything would be refused, and the request is in the log all the same.
    driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["http://*", "https://*", "ws://*"]})
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def report_file(tmp_path_factory: pytest.TempPathFactory, browser_files: tuple[str, str]) -> Path:
    """A report of a study whose classes and ids are hostile."""
    folder = tmp_path_factory.mktemp("browser")
    study = make_study(folder, heads=("linear", "dvme-token"))
    return write_report(folder / "report.html", home=study.home).path


@pytest.fixture(scope="session")
def private_file(report_file: Path) -> Path:
    """The same without images."""
    return write_report(report_file.with_name("private.html"), home=report_file.parent / "home", images=False).path


def open_page(browser: Any, path: Path) -> None:
    """Open a file and wait until its charts are drawn."""
    browser.get(path.as_uri())
    for _ in range(600):
        drawn, failed = browser.execute_script("const d = document.documentElement.dataset; return [d.drawn, d.failed]")
        assert not failed, failed
        if drawn:
            return
        time.sleep(0.05)
    pytest.fail("the charts were not drawn within 30 seconds")
