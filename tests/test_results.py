"""Rows of results: whole after any interruption, and only those that are missing are made."""

import subprocess
import sys

import pandas as pd
import pytest

from layerlr_helpers import results

ROW = {"strategy": "decay", "rates": "0.003, 0.5", "seed": 0, "accuracy": 0.85}


def test_rows_come_back_as_they_were_added_and_rates_stay_text(tmp_path):
    path = tmp_path / "rows.csv"
    assert results.read_rows(path).empty
    rows = [ROW, {**ROW, "rates": "0.01", "seed": 1}, {**ROW, "accuracy": 0.1}]
    for row in rows:
        results.append_row(path, row)
    pd.testing.assert_frame_equal(results.read_rows(path), pd.DataFrame(rows).astype({"rates": "str"}), check_dtype=False)
    assert list(results.read_rows(path)["rates"]) == ["0.003, 0.5", "0.01", "0.003, 0.5"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_row_of_another_shape_is_refused_and_the_file_left_alone(tmp_path):
    path = tmp_path / "rows.csv"
    results.append_row(path, ROW)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"has the columns .*'accuracy'.* and the row has .*'loss'"):
        results.append_row(path, {**ROW, "loss": 1.0})
    assert path.read_bytes() == before


def test_only_what_is_not_there_is_missing(tmp_path):
    path = tmp_path / "rows.csv"
    wanted = [("decay", "0.003, 0.5", 0), ("decay", "0.003, 0.5", 1), ("uniform", "0.001", 0)]
    columns = ("strategy", "rates", "seed")
    assert results.missing(path, wanted, columns) == wanted
    results.append_row(path, ROW)
    assert results.missing(path, wanted, columns) == wanted[1:]


KILLED = """
import os, sys
from layerlr_helpers import results
path, moment = sys.argv[1:]
results.append_row(path, {"seed": 0, "text": "x" * 10000})
kill = lambda *args, **kwargs: os.kill(os.getpid(), 9)
if moment == "writing":
    results.pd.DataFrame.to_csv = lambda self, file, **options: (file.write("seed,te"), file.flush(), kill())
else:
    setattr(os, moment, kill)
results.append_row(path, {"seed": 1, "text": "y" * 10000})
"""


@pytest.mark.parametrize("moment", ["writing", "fsync", "replace"])
def test_a_process_that_is_killed_while_it_writes_loses_that_row_at_most(tmp_path, moment):
    path = tmp_path / "rows.csv"
    done = subprocess.run([sys.executable, "-c", KILLED, path, moment], check=False)
    assert done.returncode == -9
    rows = results.read_rows(path)
    assert list(rows["seed"]) == [0]
    assert rows["text"][0] == "x" * 10000
    results.append_row(path, {"seed": 1, "text": "y"})
    assert list(results.read_rows(path)["seed"]) == [0, 1]
