"""The tables that stand in the pages."""

import re

import pandas as pd
import pytest

from tools.write_tables import PAGES, ROOT, TABLES, renewed


def test_a_search_that_ends_at_an_edge_is_listed_and_no_other(tmp_path):
    (tmp_path / "results").mkdir()
    tried = ("0.003", "0.01", "0.1")
    accuracies = {"low": (0.9, 0.8, 0.7), "inside": (0.7, 0.9, 0.8), "high": (0.7, 0.8, 0.9), "pairs": (0.9, 0.8, 0.7)}
    pd.DataFrame([{"split": "validation", "task": "t", "strategy": name, "rates": rate + ", 0.5" * (name == "pairs"), "seed": 0,
                   "accuracy": accuracy, "loss": 1.0}
                  for name, reached in accuracies.items() for rate, accuracy in zip(tried, reached, strict=True)]
                 ).to_csv(tmp_path / "results" / "s.csv", index=False)
    listed = TABLES["edges"](tmp_path).splitlines()[2:]
    assert listed == ["| s.csv | t | low | 0.003 | lowest |", "| s.csv | t | high | 0.1 | highest |"]


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_state_what_the_record_says(page):
    """Or run ``python tools/write_tables.py``, which writes them."""
    text = (ROOT / page).read_text(encoding="utf-8")
    marks = re.findall(r"<!-- (\w+) -->", text)
    assert marks
    assert set(marks) <= set(TABLES)
    assert renewed(text, ROOT / "data") == text
