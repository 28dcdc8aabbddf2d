"""Text in figures: fonts that have its characters, how wide it is, and legends that are not cut."""

from __future__ import annotations

import functools
import logging
import unicodedata
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, findSystemFonts, fontManager, get_font
from matplotlib.text import Text
from matplotlib.textpath import text_to_path

from embcache.log import log

_MARGIN = 0.15  # inches at either side of a figure that text keeps free
_ROWS = 24  # of a legend of classes
_CJK = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO")


@contextmanager
def no_warnings() -> Iterator[None]:
    """Silence matplotlib: `use_fonts` says what is missing."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def use_fonts(figure: Figure) -> None:
    """Set fonts that have the characters of each text; log one line where no installed font has some of them."""
    texts = figure.findobj(Text)
    for text in texts:
        text.set_fontfamily(_families(text.get_text()))
        text.set_parse_math(False)  # a dollar sign in a name is one
    missing = {c for text in texts for c in text.get_text() if _foreign(c) and _family_with(c) is None}
    if missing:
        _warn_of_missing("".join(sorted(missing)))


def text_width(text: str, size: float) -> float:
    """Inches that the longest line of a text takes at a size in points."""
    font = FontProperties(family=_families(text), size=size)
    with no_warnings():
        widths = [text_to_path.get_text_width_height_descent(line, font, ismath=False)[0] for line in text.split("\n")]
    return float(max(widths)) / 72 * 1.02  # rounded to pixels, letters may take more


def wrap(text: str, size: float, inches: float) -> str:
    """A text with line breaks between words, or within those that are too long, so that it fits a width."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}" if line else word
            if line and text_width(longer, size) > inches:
                lines.append(line)
                longer = word
            while text_width(longer, size) > inches and len(longer) > 1:
                kept = len(longer) - 1
                while kept > 1 and text_width(longer[:kept], size) > inches:
                    kept -= 1
                lines.append(longer[:kept])
                longer = longer[kept:]
            line = longer
        lines.append(line)
    return "\n".join(lines)


def shorten(text: str, size: float, inches: float) -> str:
    """A text without its middle where it would not fit a width: names often differ at their ends."""
    short, kept = text, len(text)
    while text_width(short, size) > inches and kept > 2:
        kept -= 1
        short = f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"
    return short


def add_title(figure: Figure, title: str, size: float) -> None:
    """A title above all, with as many lines as it needs."""
    figure.suptitle(wrap(title, size, figure.get_figwidth() - 2 * _MARGIN), fontsize=size)


def add_legend(
    figure: Figure,
    handles: Mapping[str, Any],
    size: float,
    *,
    title: str = "",
    weights: Mapping[str, int] | None = None,
    handle: float = 2.0,
) -> None:
    """A legend beneath all, in as many columns as fit; the figure grows by its height."""
    em, room = size / 72, figure.get_figwidth() - 2 * _MARGIN
    texts = {label: shorten(label, size, room - (handle + 0.5) * em) for label in handles}
    entry = max(text_width(text, size) for text in texts.values()) + (handle + 0.5 + 1.5) * em
    columns = min(max(1, int((room + 1.5 * em) / entry)), len(texts))
    lines = [title] if title else []
    if weights is not None and len(texts) > columns * _ROWS:
        kept = set(sorted(texts, key=lambda label: -weights[label])[: columns * _ROWS])
        lines.append(f"Legend: the {len(kept)} classes with most images, of {len(texts)} that are shown.")
        texts = {label: text for label, text in texts.items() if label in kept}
    if any(text != label for label, text in texts.items()):
        lines.append("Long names are shortened.")
    heading = wrap("\n".join(lines), size, room) if lines else ""
    rows = -(-len(texts) // columns)
    columns = -(-len(texts) // rows)
    figure.set_figheight(figure.get_figheight() + (rows * 1.55 + (heading.count("\n") + 1.5 if lines else 0) + 1) * em)
    figure.legend(
        [handles[label] for label in texts], [text for text in texts.values()],
        loc="outside lower center", ncols=columns, frameon=False, fontsize=size,
        title=heading or None, title_fontsize=size,
        handlelength=handle, handletextpad=0.5, columnspacing=1.5, labelspacing=0.35, borderpad=0.2,
    )  # fmt: skip


def _families(text: str) -> list[str]:
    """The usual family, and those that have what it lacks."""
    others = (_family_with(c) for c in sorted(set(text)) if _foreign(c))
    return list(dict.fromkeys([*matplotlib.rcParams["font.family"], *filter(None, others)]))


@functools.cache
def _foreign(character: str) -> bool:
    """Whether the usual font lacks a character."""
    return character.isprintable() and not get_font(findfont(FontProperties())).get_char_index(ord(character))


@functools.cache
def _family_with(character: str) -> str | None:
    """An installed family that has a character."""
    with no_warnings():
        for family in _installed():
            if get_font(findfont(FontProperties(family=[family]))).get_char_index(ord(character)):
                return family
    return None


@functools.cache
def _installed() -> tuple[str, ...]:
    """Families, upright and sans serif first, also of fonts that matplotlib's own list does not know yet."""
    known = {str(entry.fname) for entry in fontManager.ttflist}
    for path in findSystemFonts():
        if str(path) not in known:
            try:
                fontManager.addfont(path)
            except (OSError, RuntimeError):
                continue  # not a font, or one that FreeType cannot read
    entries = [entry for entry in fontManager.ttflist if not entry.name.startswith("Last Resort")]
    entries.sort(key=lambda entry: ("Sans" not in entry.name, entry.style != "normal", entry.name))
    return tuple(dict.fromkeys(entry.name for entry in entries))


@functools.cache
def _warn_of_missing(characters: str) -> None:
    scripts = {unicodedata.name(c, "UNKNOWN").split()[0].split("-")[0] for c in characters}
    if scripts & set(_CJK):
        font = "Noto Sans CJK (Debian and Ubuntu: apt install fonts-noto-cjk)"
    else:
        font = f"a font that has them, such as Noto Sans ({', '.join(sorted(scripts)).lower()})"
    examples = " ".join(characters[:5]) + (" …" if len(characters) > 5 else "")
    log.warning("figure: no installed font has the characters %s, so they are boxes; install %s", examples, font)
