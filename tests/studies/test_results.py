"""Rows of results: whole after any interruption, only those that are missing are made, and what is read from them."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import layerlr_helpers
from layerlr_helpers.studies import results

ROW = {"split": "test", "task": "digits", "strategy": "decay", "rates": "0.003, 0.5", "seed": 0, "accuracy": 0.85}


def test_rows_come_back_as_they_were_added_and_rates_stay_text(tmp_path):
    path = tmp_path / "rows.csv"
    assert results.read_rows(path).empty
    rows = [ROW, {**ROW, "rates": "0.01", "seed": 1}, {**ROW, "accuracy": 0.3, "task": ""},
            {**ROW, "strategy": "1e-3", "task": "NA"}, {**ROW, "strategy": "None", "rates": "null"}]
    for row in rows:
        results.append_row(path, row)
    assert results.read_rows(path).to_dict("records") == rows
    assert [file.name for file in tmp_path.iterdir() if not file.name.endswith(".lock")] == ["rows.csv"]


def test_a_run_that_is_there_stays_as_it_is(tmp_path):
    path = tmp_path / "rows.csv"
    for row in (ROW, {**ROW, "seed": 1, "accuracy": None}, {**ROW, "accuracy": 0.1}):
        results.append_row(path, row)
    rows = results.read_rows(path)
    assert list(rows["seed"]) == [0, 1]
    assert list(rows["accuracy"].fillna(-1)) == [0.85, -1]


def test_a_row_of_another_shape_is_refused_and_the_file_left_alone(tmp_path):
    path = tmp_path / "rows.csv"
    results.append_row(path, ROW)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"has the columns .*'accuracy'.* and the row has .*'loss'"):
        results.append_row(path, {**ROW, "loss": 1.0})
    assert path.read_bytes() == before


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "prices.csv"
    path.write_text("article,seed\nchair,3\n")
    with pytest.raises(ValueError, match=r"prices.csv holds no recorded runs: it has no column split, task, strategy, rates"):
        results.append_row(path, ROW)
    assert path.read_text() == "article,seed\nchair,3\n"


def test_only_what_is_not_there_is_missing_and_the_wanted_come_in_order(tmp_path):
    path = tmp_path / "rows.csv"
    wanted = [("test", "digits", "decay", "0.003, 0.5", 0), ("test", "digits", "decay", "0.003, 0.5", 1),
              ("test", "other", "decay", "0.003, 0.5", 0), ("validation", "digits", "decay", "0.003, 0.5", 0)]
    assert results.missing(results.read_rows(path), wanted) == wanted
    results.append_row(path, ROW)
    assert results.missing(results.read_rows(path), wanted) == wanted[1:]
    for run in reversed(wanted[1:]):
        results.append_row(path, {**dict(zip(results.KEY, run, strict=True)), "accuracy": 0.5})
    found = results.chosen_rows(results.read_rows(path), wanted)
    assert list(found[results.KEY].itertuples(index=False, name=None)) == wanted


ALONE = """
import os, sys, types
package = types.ModuleType("layerlr_helpers")  # without what its __init__ imports, such as torch, which takes seconds
package.__path__ = [sys.argv[1]]
sys.modules["layerlr_helpers"] = package
from layerlr_helpers.studies import results
"""
KILLED = ALONE + """
path, moment = sys.argv[2:]
row = {"split": "test", "task": "", "strategy": "a", "rates": "x" * 10000, "seed": 0}
results.append_row(path, row)
kill = lambda *args, **kwargs: os.kill(os.getpid(), 9)
if moment == "writing":
    results.pd.DataFrame.to_csv = lambda self, path, **options: (path.write_text("split,te"), kill())
else:
    setattr(os, moment, kill)
results.append_row(path, {**row, "seed": 1})
"""
WRITER = ALONE + """
for seed in range(15):
    results.append_row(sys.argv[2], {"split": "test", "task": "", "strategy": sys.argv[3], "rates": "", "seed": seed})
"""


def start(script, *arguments):
    return subprocess.Popen([sys.executable, "-c", script, Path(layerlr_helpers.__file__).parent, *arguments])


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_writes_loses_that_row_at_most(tmp_path):
    paths = {moment: tmp_path / f"{moment}.csv" for moment in ("writing", "fsync", "replace")}
    processes = [start(KILLED, path, moment) for moment, path in paths.items()]
    assert [process.wait() for process in processes] == [-9] * 3
    for path in paths.values():
        rows = results.read_rows(path)
        assert list(rows["seed"]) == [0]
        assert rows["rates"][0] == "x" * 10000
        results.append_row(path, {"split": "test", "task": "", "strategy": "a", "rates": "y", "seed": 1})  # its lock is gone
        assert list(results.read_rows(path)["seed"]) == [0, 1]


@pytest.mark.slow
def test_two_processes_that_write_to_one_file_lose_no_row(tmp_path):
    path = tmp_path / "rows.csv"
    writers = [start(WRITER, path, name) for name in ("a", "b")]
    assert [writer.wait() for writer in writers] == [0, 0]
    rows = results.read_rows(path)
    assert sorted(zip(rows["strategy"], rows["seed"], strict=True)) == [(name, seed) for name in "ab" for seed in range(15)]


def validated(strategy, rates, accuracies, loss=1.0):
    return [{**ROW, "split": "validation", "strategy": strategy, "rates": rates, "seed": seed, "accuracy": accuracy,
             "loss": loss} for seed, accuracy in enumerate(accuracies)]


def test_winners_have_the_best_mean_on_validation_images_and_the_lower_loss_where_two_tie():
    rows = pd.DataFrame(validated("a", "low", (0.5, 0.7)) + validated("a", "high", (0.9, 0.1))
                        + validated("b", "low", (0.4, 0.4)) + validated("b", "high", (0.4, 0.4), loss=0.5)
                        + [{**ROW, "strategy": "a", "rates": "high", "loss": 0}])
    assert results.winners(rows) == {"a": "low", "b": "high"}
    by_rounding = validated("c", "low", (0.7, 0.1)) + validated("c", "high", (0.4, 0.4), loss=2.0)
    assert results.winners(pd.DataFrame(by_rounding)) == {"c": "low"}


def test_a_recorded_study_is_read_by_its_name_and_an_unknown_one_is_told_those_that_there_are(tmp_path):
    results.append_row(tmp_path / "depth.csv", ROW)
    assert results.recorded("depth", tmp_path).to_dict("records") == [ROW]
    with pytest.raises(FileNotFoundError, match=r"no study 'width' is recorded in .*; recorded are: depth"):
        results.recorded("width", tmp_path)
    with pytest.raises(FileNotFoundError, match="recorded are: none"):
        results.recorded("depth", tmp_path / "nowhere")


def test_differences_to_a_baseline_are_a_table_to_read():
    accuracies = {"high": lambda seed: 0.6, "base": lambda seed: 0.5, "low": lambda seed: 0.4,
                  "mixed": lambda seed: 0.5 + (-1) ** seed / 10}
    rows = pd.DataFrame([{**ROW, "strategy": name, "rates": f"of {name}", "seed": seed, "accuracy": accuracy(seed)}
                         for seed in range(10) for name, accuracy in accuracies.items()]
                        + validated("high", "another", (0.1, 0.1)))
    table = results.differences(rows, "base")
    assert list(table.index) == ["high", "base", "low", "mixed"]
    assert list(table["verdict"]) == ["better", "baseline", "worse", "cannot be told"]
    assert list(table["rates"]) == ["of high", "of base", "of low", "of mixed"]
    assert list(table["seeds"]) == [10] * 4
    assert table["accuracy (%)"].tolist() == pytest.approx([60, 50, 40, 50])
    texts = table["difference (points, 95 %)"]
    assert texts["high"] == "+10.0 (+10.0 to +10.0)"
    assert texts["base"] == "baseline"
    with pytest.raises(ValueError, match="no strategy 'top' was tested"):
        results.differences(rows, "top")
