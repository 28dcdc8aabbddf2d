"""The report in a real browser: it loads without an error or a request, and its controls do what they say."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import open_page
from tests.report.build import CLASSES, HOSTILE

pytest.importorskip("selenium", reason="selenium is not installed: pip install selenium")

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select


@pytest.fixture
def page(browser: Any, report_file: Path) -> Any:
    browser.get_log("browser")
    browser.get_log("performance")
    open_page(browser, report_file)
    return browser


@pytest.fixture
def seen(browser: Any, report_file: Path) -> Any:
    """The page as the test before has left it, for those that change nothing."""
    if not browser.current_url.startswith(report_file.as_uri()):
        open_page(browser, report_file)
    return browser


def _until(ready: Callable[[], Any], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while not (found := ready()) and time.monotonic() < end:
        time.sleep(0.05)
    assert found
    return found


def _one(page: Any, selector: str) -> Any:
    return page.find_element(By.CSS_SELECTOR, selector)


def _points(page: Any, series: int) -> list[list[float]]:
    """Where the points of a class are in the window, in CSS pixels."""
    return page.execute_script(
        """
        const id = document.querySelector('section.embedding').dataset.map;
        const item = JSON.parse(document.getElementById('data').textContent).charts.find((c) => c.id === id).item;
        const view = Bokeh.index.get_by_id ? Bokeh.index.get_by_id(item.root_id) : Bokeh.index[item.root_id];
        const {frame, canvas_view} = view;
        const renderer = view.model.renderers.find((r) => r.name === `s${arguments[0]}`);
        const get = (n) => renderer.data_source.data instanceof Map
            ? renderer.data_source.data.get(n) : renderer.data_source.data[n];
        const box = canvas_view.el.getBoundingClientRect();
        const xs = [...get('x')].map((v) => frame.x_scale.compute(v) + box.left);
        const ys = [...get('y')].map((v) => frame.y_scale.compute(v) + box.top);
        return xs.map((x, i) => [x, ys[i], get('k')[i]]);
        """,
        series,
    )


def _to_map(page: Any) -> None:
    page.execute_script("document.querySelector('.mapwrap').scrollIntoView({block: 'start', behavior: 'instant'})")
    page.execute_script("window.scrollBy({top: -80, behavior: 'instant'})")
    time.sleep(0.3)


def _hover(page: Any, x: float, y: float) -> None:
    body = ActionChains(page, duration=20)
    body.w3c_actions.pointer_action.move_to_location(round(x) - 30, round(y) - 30)
    body.w3c_actions.pointer_action.move_to_location(round(x), round(y))
    body.perform()


def _shown(page: Any) -> int:
    return int(_one(page, "section.embedding").get_attribute("data-shown"))


def test_it_loads_without_an_error_or_a_request(page: Any, report_file: Path) -> None:
    for button in page.find_elements(By.CSS_SELECTOR, "#open-all, #theme, .key"):
        page.execute_script("arguments[0].click()", button)
    time.sleep(0.2)
    errors = [entry for entry in page.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert not errors
    asked = [
        message["params"]["request"]["url"]
        for entry in page.get_log("performance")
        if (message := json.loads(entry["message"])["message"])["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in asked if not url.startswith(("data:", "blob:"))] == [report_file.as_uri()]


def test_every_chart_is_drawn(seen: Any) -> None:
    plots = seen.find_elements(By.CSS_SELECTOR, ".plot")
    assert len(plots) == 1 + 2 * 2 + 1  # curves, ROC and reliability at two sizes, the map
    assert all(plot.find_elements(By.CSS_SELECTOR, "div") for plot in plots)
    assert seen.execute_script("return document.querySelectorAll('.plot > *').length") == len(plots)


def test_a_hostile_class_stays_text(seen: Any) -> None:
    names = [element.get_attribute("textContent") for element in seen.find_elements(By.CSS_SELECTOR, ".key .name")]
    assert HOSTILE in names
    assert set(CLASSES) <= set(names)
    assert seen.execute_script("return [...document.scripts].length") == 3
    assert seen.execute_script("return document.querySelectorAll('mjx-container, .MathJax').length") == 0
    with pytest.raises(Exception, match="no such alert"):
        seen.switch_to.alert.accept()


def test_hovering_shows_image_id_label_and_prediction(page: Any) -> None:
    _to_map(page)
    x, y, k = _points(page, 0)[3]
    _hover(page, x, y)
    tip = _one(page, "#tip")
    _until(tip.is_displayed)
    ids = page.execute_script("return Object.values(JSON.parse(document.getElementById('data').textContent).maps)[0]")
    text = tip.get_attribute("textContent")
    # Points may lie on each other: the tip is of one that is there.
    assert any(id_ in text for id_ in ids["ids"])
    assert "class: " in text
    assert "predicted: " in text
    thumb = tip.find_element(By.CSS_SELECTOR, ".thumb")
    assert "data:image/webp" in thumb.value_of_css_property("background-image")
    assert thumb.size["width"] > 20
    assert k == int(k)
    ActionChains(page).send_keys(Keys.ESCAPE).perform()
    assert not tip.is_displayed()


def test_hovering_over_a_curve_names_its_model(seen: Any) -> None:
    page = seen
    plot = _one(page, "figure.chart .plot")
    page.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", plot)
    time.sleep(0.3)
    x, y = page.execute_script(
        """
        const item = JSON.parse(document.getElementById('data').textContent).charts[0].item;
        const view = Bokeh.index.get_by_id ? Bokeh.index.get_by_id(item.root_id) : Bokeh.index[item.root_id];
        const points = view.model.renderers.filter((r) => r.name === 's0').at(-1).data_source.data;
        const get = (n) => (points instanceof Map ? points.get(n) : points[n])[0];
        const box = view.canvas_view.el.getBoundingClientRect();
        return [view.frame.x_scale.compute(get('x')) + box.left, view.frame.y_scale.compute(get('y')) + box.top];
        """
    )
    _hover(page, x, y)
    tip = _one(page, "#tip")
    _until(tip.is_displayed)
    assert "training labels of a fold 12" in tip.text
    assert tip.find_element(By.CSS_SELECTOR, "strong").text in (
        "weak, linear",
        "strong, linear",
        "weak + strong, dvme-token",
    )


def test_a_click_keeps_an_image_and_filters_by_it(page: Any) -> None:
    _to_map(page)
    x, y, _ = _points(page, 1)[2]
    _hover(page, x, y)
    ActionChains(page).click().perform()
    card = _one(page, ".card")
    _until(lambda: "ID" in card.text and card.find_elements(By.CSS_SELECTOR, ".acts button"))
    label = card.find_elements(By.CSS_SELECTOR, "dd")[1].text
    assert label in CLASSES
    everything = _shown(page)
    card.find_element(By.XPATH, ".//button[text()='Only this class']").click()
    assert 0 < _shown(page) < everything
    assert label in _one(page, ".embedding .status").text
    assert sum(bool(_points(page, c)) for c in range(3)) == 1
    _one(page, ".embedding .clear").click()
    assert _shown(page) == everything == 75


def test_the_legend_toggles_a_class(seen: Any) -> None:
    page = seen
    _to_map(page)
    key = _one(page, ".embedding .key")
    assert key.get_attribute("aria-pressed") == "true"
    key.send_keys(Keys.ENTER)  # by keyboard
    assert key.get_attribute("aria-pressed") == "false"
    assert _shown(page) == 50
    key.click()
    assert _shown(page) == 75


def test_a_cell_of_the_confusion_matrix_shows_its_images(page: Any) -> None:
    cell = _one(page, "details[open] .cell[data-true='0'][data-predicted='0']")
    page.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", cell)
    cell.click()
    assert cell.get_attribute("aria-pressed") == "true"
    assert 0 < _shown(page) < 75
    assert "predicted as" in _one(page, ".embedding .status").text


def test_wrong_predictions_and_other_embeddings_can_be_chosen(page: Any) -> None:
    right = Select(_one(page, ".embedding .right"))
    right.select_by_value("wrong")
    wrong = _shown(page)
    right.select_by_value("right")
    assert wrong + _shown(page) == 75
    right.select_by_value("all")
    before = _points(page, 0)
    which = Select(_one(page, ".embedding .which"))
    assert "trained with labels" in which.options[-1].text
    which.select_by_index(1)
    assert _points(page, 0) != before


def test_an_id_is_found_and_reached_by_keyboard(page: Any) -> None:
    find = _one(page, ".embedding .find")
    find.send_keys("</b>")
    assert "75 images match, the first 20 are listed" in _one(page, ".embedding .status").text
    find.clear()
    find.send_keys("SCAN<B>100")
    (found,) = page.find_elements(By.CSS_SELECTOR, ".embedding .matches button")
    assert found.get_attribute("textContent").startswith("scan<b>100</b>")
    find.send_keys(Keys.TAB, Keys.NULL)
    ActionChains(page).send_keys(Keys.TAB).perform()
    assert "scan<b>100</b>" in _one(page, ".card dd").get_attribute("textContent")
    assert _one(page, ".card .thumb").size["width"] > 20
    page.execute_script("document.querySelector('.card .acts button:last-child').focus()")
    ActionChains(page).send_keys(Keys.ENTER).perform()  # the next image
    assert "scan<b>100</b>" not in _one(page, ".card dd").get_attribute("textContent")
    find.clear()
    find.send_keys("nothing of the kind")
    assert "0 images match" in _one(page, ".embedding .status").text


def test_the_first_key_leads_past_the_menu_and_focus_is_seen(page: Any) -> None:
    ActionChains(page).send_keys(Keys.TAB).perform()
    focused = page.switch_to.active_element
    assert focused.text == "Skip to the summary"
    assert focused.value_of_css_property("outline-style") != "none"
    assert focused.rect["x"] >= 0
    focused.send_keys(Keys.ENTER)
    assert page.switch_to.active_element.tag_name == "main"


def test_light_and_dark_by_the_system_and_by_the_button(page: Any) -> None:
    def ground() -> str:
        return str(_one(page, "body").value_of_css_property("background-color"))

    light = ground()
    _one(page, "#theme").click()
    assert _one(page, "#theme").get_attribute("aria-pressed") == "true"
    dark = ground()
    assert dark != light
    _one(page, "#theme").click()
    assert ground() == light
    try:
        features = [{"name": "prefers-color-scheme", "value": "dark"}]
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        open_page(page, Path(page.current_url.removeprefix("file://").split("#")[0]))
        assert ground() == dark
    finally:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_no_width_makes_the_page_scroll_sideways(seen: Any) -> None:
    try:
        seen.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
        for width in (1280, 390, 320):
            size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
            seen.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            time.sleep(0.5)
            assert seen.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        seen.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_it_prints_charts_as_light_stills_and_takes_them_away_again(page: Any) -> None:
    _one(page, "#theme").click()
    page.execute_script(
        """
        window.stills = [];
        addEventListener('beforeprint', () => {
            for (const c of document.querySelectorAll('.still')) {
                const pixels = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
                let drawn = 0, dark = 0;
                for (let i = 0; i < pixels.length; i += 4) if (pixels[i + 3] > 200) {
                    drawn += 1;
                    if (pixels[i] + pixels[i + 1] + pixels[i + 2] < 200) dark += 1;
                }
                window.stills.push([drawn, dark]);
            }
        });
        """
    )
    printed = page.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    assert len(printed["data"]) > 20_000
    stills = page.execute_script("return window.stills")
    assert len(stills) == 4  # what is open: curves, ROC and reliability of the largest size, the map
    assert all(drawn > 100 for drawn, _ in stills)
    assert all(dark > 20 for _, dark in stills[:3])  # the words at the axes, dark on white paper
    _until(lambda: not page.find_elements(By.CSS_SELECTOR, ".still"))


def test_without_images_points_are_reached_by_number(browser: Any, private_file: Path) -> None:
    open_page(browser, private_file)
    find = _one(browser, ".embedding .find")
    find.send_keys("17")
    (found,) = browser.find_elements(By.CSS_SELECTOR, ".embedding .matches button")
    assert found.text == "point 17"
    assert [e.text for e in browser.find_elements(By.CSS_SELECTOR, ".card dt")] == ["number", "class", "predicted"]
    assert not browser.find_elements(By.CSS_SELECTOR, ".card .thumb")
    assert "mrs-jones" not in browser.page_source
    assert "u003cb\\u003e0" not in browser.page_source
