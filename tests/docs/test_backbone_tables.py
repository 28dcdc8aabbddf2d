"""The tables of backbones in README and docs are those that the rows of the catalog make."""

from __future__ import annotations

from pathlib import Path

import pytest

from embcache.backbones.catalog import BACKBONES
from tools.backbones import PAGES, groups, renewed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_has_the_tables_of_the_catalog(page: Path) -> None:
    assert page.read_text("utf-8") == renewed(page), "python tools/backbones.py"


def test_every_row_is_in_one_group() -> None:
    names = [row.name for rows in groups().values() for row in rows]
    assert sorted(names) == sorted(name for name, row in BACKBONES.items() if row.model)
    assert len(groups()) == 6
