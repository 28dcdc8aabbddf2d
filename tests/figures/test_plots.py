"""Text of figures: nothing is cut, each class has its own mark, characters are drawn or their font is named."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axis import Tick, XTick
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.markers import MarkerStyle
from matplotlib.text import Text

from embcache.figures import plots
from embcache.figures.plots import Curve, CurvePanel, Map, Picture, class_mark

LONG = "carcinoma in situ of type {:02d}, grade unknown"
SENTENCE = "a class whose name is a whole sentence about what may be seen in an image of it, number {} of many"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Figure]:
    """The figure that was drawn last, laid out."""
    figures: list[Figure] = []

    def save(figure: Figure, target: Path) -> Path:
        plots.use_fonts(figure)
        figures.append(figure)
        return target

    monkeypatch.setattr(plots, "_save", save)

    def last() -> Figure:
        with plots.no_warnings():
            FigureCanvasAgg(figures[-1]).draw()
        return figures[-1]

    return last


def check_nothing_is_cut(figure: Figure) -> None:
    whole = figure.bbox
    ticks = [tick for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for tick in axis.get_major_ticks()]
    beyond = {tick.label1 for tick in ticks if not _in_view(tick)}  # matplotlib does not draw these
    for text in figure.findobj(Text):
        if (
            text in beyond
            or not text.get_text()
            or not text.get_visible()
            or (text.axes is not None and not text.axes.axison)
        ):
            continue
        box = text.get_window_extent()
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= whole.x1 and box.y1 <= whole.y1
        assert inside, f"{text.get_text()!r} at {box.bounds} in {whole.bounds}"


def _in_view(tick: Tick) -> bool:
    axis = tick.axes.xaxis if isinstance(tick, XTick) else tick.axes.yaxis
    low, high = sorted(axis.get_view_interval())
    return bool(low <= tick.get_loc() <= high)


def check_apart(figure: Figure) -> None:
    """The legend covers no panel."""
    (legend,) = figure.legends
    below = legend.get_window_extent()
    assert all(axis.get_window_extent().y0 >= below.y1 for axis in figure.axes if axis.axison)


def maps(panels: int, classes: int) -> list[Map]:
    rng = np.random.default_rng(0)
    labels = np.arange(4 * classes) % classes
    title = "dvme: effnet_lite0 + effnet_lite1 + effnet_lite2\ntrained with labels (S, fold 0)"
    caption = "silhouette -0.29 · k-NN 0.500 · trust 0.764"
    return [Map(title, rng.normal(size=(4 * classes, 2)).astype(np.float32), labels, caption) for _ in range(panels)]


@pytest.mark.parametrize(
    ("panels", "classes", "name"),
    [
        (1, 1, "only"),
        (5, 5, "Proliferative DR"),
        (1, 16, LONG),
        (2, 40, "class_{:03d}"),
        (1, 3, SENTENCE),
        (1, 9, "肺炎 {}"),
    ],
)
def test_a_map_shows_its_whole_legend(
    drawn: Callable[[], Figure], tmp_path: Path, panels: int, classes: int, name: str
) -> None:
    names = [name.format(c) + (f" {c}" if "{" not in name else "") for c in range(classes)]
    title = "t-SNE, a_dataset_whose_name_is_long_because_folders_have_such_names: official test set, n = 1,234"
    plots.plot_maps(maps(panels, classes), names, title, tmp_path / "map.png")
    figure = drawn()
    check_nothing_is_cut(figure)
    check_apart(figure)
    (legend,) = figure.legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert len(shown) == classes
    if name is not SENTENCE:
        assert shown == names
    elif panels == 1:
        assert "shortened" in legend.get_title().get_text()
        assert len(set(shown)) == classes


def test_a_legend_without_room_for_all_has_the_largest_classes_and_says_so(
    drawn: Callable[[], Figure], tmp_path: Path
) -> None:
    labels = np.concatenate([np.arange(200), np.full(9, 150)])
    points = np.random.default_rng(0).normal(size=(209, 2)).astype(np.float32)
    plots.plot_maps([Map("m", points, labels)], [LONG.format(c) for c in range(200)], "t", tmp_path / "map.png")
    figure = drawn()
    check_nothing_is_cut(figure)
    (legend,) = figure.legends
    said = legend.get_title().get_text()
    assert f"the {len(legend.get_texts())} classes with most images, of 200" in said
    assert "128 classes" in said
    assert LONG.format(150) in [text.get_text() for text in legend.get_texts()]


def test_classes_have_marks_of_their_own() -> None:
    marks = [class_mark(label) for label in range(128)]
    assert all(a != b for a, b in itertools.combinations(marks, 2))
    assert len({mark["color"] for mark in marks[:8]}) == len({mark["marker"] for mark in marks[:8]}) == 8
    assert all(MarkerStyle(mark["marker"]).is_filled() for mark in marks)


def test_other_figures_are_not_cut(drawn: Callable[[], Figure], tmp_path: Path) -> None:
    name = "timm:vit_small_patch14_dinov2.lvd142m"
    curves = tuple(
        Curve(f"{name}_{k} logistic regression", (20.0, 50.0), (0.7, 0.8), (0.6, 0.7), (0.8, 0.9), family=str(k))
        for k in range(9)
    )
    plots.plot_curves([CurvePanel(f"aptos, {name}", "kappa", curves)] * 2, "Learning curves", tmp_path / "c.png")
    check_nothing_is_cut(drawn())
    check_apart(drawn())
    names = [f"{LONG.format(k)}, and more" for k in range(12)]
    title = f"run of {name} with a long title, which needs more than one line\nensemble of 5 models, accuracy 0.93"
    plots.plot_confusion(np.eye(12, dtype=np.int64) * 1234, names, title, tmp_path / "m.png")
    check_nothing_is_cut(drawn())
    rates = [Curve(f"{c}: AUC 0.912 (0.880 to 0.941)", (0.0, 1.0), (0.0, 1.0), *[(0.0, 0.9)] * 2) for c in names]
    plots.plot_rates(rates, title, tmp_path / "r.png", axes=("1 − specificity", "sensitivity"), note=title)
    figure = drawn()
    check_nothing_is_cut(figure)
    check_apart(figure)
    cells = [
        Picture(np.zeros((40, 60, 3), np.uint8), f"…st/NORMAL/IM-0001.jpeg\n{LONG} · train\n0.83 · same group")
    ] * 3
    plots.plot_sheet([(name, cells), (name, cells[:1])], f"nearest in cached features: {name}", tmp_path / "s.png")
    check_nothing_is_cut(drawn())
    titles = f"a-dataset-of-{name}, 5 folds", f"attention of {name}, mean over 1,234 test images"
    plots.plot_attention(np.ones((8, 8), np.float32), np.eye(2), (name, "b"), titles, tmp_path / "a.png")
    check_nothing_is_cut(drawn())


def test_a_font_is_named_where_none_has_the_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(plots, "_family_with", lambda character: None)
    for suffix in ("pdf", "svg"):
        plots.plot_maps(maps(1, 2), ["正常", "élevé"], "t", tmp_path / f"map.{suffix}")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "正 常" in record.getMessage() or "常 正" in record.getMessage()
    assert "fonts-noto-cjk" in record.getMessage()
    caplog.clear()
    plots.plot_maps(maps(1, 1), ["\u0e01"], "t", tmp_path / "map.png")
    assert "\u0e01" in caplog.text


def test_characters_come_from_an_installed_font(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    character = "肺"
    families = plots._families(f"a {character}")
    found = [
        family
        for family in families[1:]
        if get_font(findfont(FontProperties(family=[family]))).get_char_index(ord(character))
    ]
    plots.plot_maps(maps(1, 1), [character], "t", tmp_path / "map.png")
    assert bool(found) != bool(caplog.records)
    if not found:
        pytest.skip("no installed font has Chinese characters")


def test_fonts_installed_after_matplotlib_made_its_list_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    serif = findfont(FontProperties(family=["DejaVu Serif"]))
    old = [entry for entry in fontManager.ttflist if entry.name != "DejaVu Serif"]
    monkeypatch.setattr(fontManager, "ttflist", old)
    monkeypatch.setattr(plots, "findSystemFonts", lambda: [str(serif), __file__])
    assert "DejaVu Serif" in plots._installed.__wrapped__()


def test_texts_are_wrapped_and_shortened_to_a_width() -> None:
    text = "one two three four " + "x" * 60 + " 肺炎"
    lines = plots.wrap(text, 10, 1.5).split("\n")
    assert all(plots.text_width(line, 10) <= 1.5 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    short = plots.shorten("lesion number 17 of the left hand", 10, 1.0)
    assert plots.text_width(short, 10) <= 1.0
    assert short.startswith("les")
    assert short.endswith("hand")
    assert plots.shorten("short", 10, 1.0) == "short"
