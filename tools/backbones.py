"""Tables of backbones in README.md and docs/backbones.md, made of the rows of the catalog.

``python tools/backbones.py`` writes them between the marks on each page; a test compares them.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from embcache.backbones import catalog  # noqa: E402
from embcache.backbones.catalog import BACKBONES, Backbone  # noqa: E402

# What README shows.
FEW = (
    "rad-dino", "medsiglip", "biomedclip", "retfound-mae-meh", "dermlip", "uni", "uni2-h", "virchow2", "h-optimus-1",
    "gigapath", "midnight", "phikon-v2", "dinov2-base", "dinov3-vitb16", "clip-vit-l14", "siglip2-so400m",
)  # fmt: skip
_MARKS = re.compile(r"(<!-- backbones[^>]*-->\n).*?(<!-- end -->)", re.DOTALL)


def groups() -> dict[str, list[Backbone]]:
    """Rows by the heading of the comment above them."""
    found: dict[str, list[Backbone]] = {}
    for line in (Path(catalog.__file__).parent / "catalog.toml").read_text("utf-8").splitlines():
        if heading := re.match(r"# ([\w -]+)\. Sources", line):
            rows = found.setdefault(heading[1], [])
        elif (name := re.match(r"([\w-]+) = \{", line)) and BACKBONES[name[1]].model:
            rows.append(BACKBONES[name[1]])
    return found


def _link(row: Backbone) -> str:
    hub, name = row.repository, row.repository.partition("/")[2]
    return f"[{name}](https://huggingface.co/{hub})" if hub else f"`{row.model}`"


def few() -> str:
    """The table of README."""
    lines = ["| backbone | dimensions | what to type | license |", "|---|---|---|---|"]
    for name in FEW:
        row = BACKBONES[name]
        lines.append(f"| {_link(row)} | {row.dim} | `--backbone {name}` | {row.license}{', gated' * bool(row.gated)} |")
    return "\n".join(lines) + "\n"


def all_rows() -> str:
    """The tables of docs/backbones.md."""
    lines = []
    for heading, rows in groups().items():
        lines += [
            f"### {heading}",
            "",
            "| what to type | dimensions | parameters | license | gated | backbone | trained on |",
        ]
        lines += ["|---|---|---|---|---|---|---|"]
        for row in rows:
            size = f"{row.parameters / 1e6:,.1f} M" if row.parameters else ""
            gated = {True: "yes", False: "no", None: ""}[row.gated]
            cells = (f"`{row.name}`", row.dim, size, row.license, gated, _link(row), row.source)
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        lines.append("")
    return "\n".join(lines)


PAGES = {ROOT / "README.md": few, ROOT / "docs" / "backbones.md": all_rows}


def renewed(page: Path) -> str:
    """The text of a page with its table made again."""
    text, count = _MARKS.subn(lambda marks: marks[1] + PAGES[page]() + marks[2], page.read_text("utf-8"))
    assert count == 1, f"{page.name} has no place for its table"
    return text


if __name__ == "__main__":
    for each in PAGES:
        each.write_text(renewed(each), "utf-8")
