"""The tables that stand in the pages."""

import re

import pytest

from tools.write_tables import PAGES, ROOT, TABLES, renewed


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_state_what_the_record_says(page):
    """Or run ``python tools/write_tables.py``, which writes them."""
    text = (ROOT / page).read_text(encoding="utf-8")
    marks = re.findall(r"<!-- (\w+) -->", text)
    assert marks
    assert set(marks) <= set(TABLES)
    assert renewed(text, ROOT / "data") == text
