"""What the course says of its recorded studies is what their rows say."""

import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from IPython.display import Markdown

from layerlr_helpers.course import plots
from layerlr_helpers.studies import evidence
from layerlr_helpers.studies.catalogue import PHOTOGRAPHS, STUDIES
from layerlr_helpers.studies.evidence import CLAIMS, Claim, check
from layerlr_helpers.studies.results import KEY, read_rows, winners

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "data" / "results"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def rows_of(better, baseline, seeds=10):
    ways = {"new": better, "old": baseline}
    return pd.DataFrame([{"split": "test", "task": "t", "strategy": name, "rates": "0.1", "seed": seed, "accuracy": of(seed)}
                         for seed in range(seeds) for name, of in ways.items()])


@pytest.mark.parametrize(("better", "verdict"), [
    (lambda seed: 0.6, "holds"), (lambda seed: 0.4, "the opposite holds"),
    (lambda seed: 0.5 + (-1) ** seed / 10, "cannot be told")])
def test_the_verdict_is_what_the_interval_allows(tmp_path, better, verdict):
    rows_of(better, lambda seed: 0.5).to_csv(tmp_path / "s.csv", index=False)
    found = check([Claim("new beats old", "s", "t", "new", "old")], tmp_path)
    assert list(found["verdict"]) == [verdict]
    assert found["seeds"].item() == 10
    assert "new beats old" in evidence.markdown(found)
    assert f"| {verdict} |" in evidence.markdown(found)


def test_a_claim_about_what_was_not_tested_is_refused(tmp_path):
    rows_of(lambda seed: 0.6, lambda seed: 0.5).to_csv(tmp_path / "s.csv", index=False)
    with pytest.raises(ValueError, match="no strategy 'newer' was tested in s, task t"):
        check([Claim("newer", "s", "t", "newer", "old")], tmp_path)
    with pytest.raises(ValueError, match="no strategy 'older' was tested"):
        check([Claim("older", "s", "t", "new", "older")], tmp_path)


def test_a_search_that_ends_at_an_edge_is_listed_and_no_other(tmp_path):
    accuracies = {"low": (0.9, 0.8, 0.7), "inside": (0.7, 0.9, 0.8), "high": (0.7, 0.8, 0.9), "pairs": (0.9, 0.8, 0.7)}
    pd.DataFrame([{"split": "validation", "task": "t", "strategy": name, "rates": rate + ", 0.5" * (name == "pairs"), "seed": 0,
                   "accuracy": accuracy, "loss": 1.0}
                  for name, of_it in accuracies.items() for rate, accuracy in zip(("0.003", "0.01", "0.1"), of_it, strict=True)]
                 ).to_csv(tmp_path / "s.csv", index=False)
    listed = evidence.edges(tmp_path).splitlines()[2:]
    assert listed == ["| s.csv | t | low | 0.003 | lowest |", "| s.csv | t | high | 0.1 | highest |"]


def test_every_claim_of_the_course_has_enough_seeds_and_names_strategies_of_its_study():
    found = check(CLAIMS, RESULTS)
    assert (found["seeds"] >= found["study"].map(lambda study: 5 if study in PHOTOGRAPHS else 10)).all()
    assert len(found) == len(CLAIMS)
    assert not found["claim"].duplicated().any()


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.csv")), ids=lambda path: path.stem)
def test_recorded_rows_are_of_a_known_study_and_only_winners_were_tested(path):
    rows = read_rows(path)
    assert not rows.duplicated(KEY).any()
    assert rows["accuracy"].between(0, 1).all()
    if path.stem not in {**STUDIES, **PHOTOGRAPHS}:
        return
    study_chooses = PHOTOGRAPHS[path.stem][2] if path.stem in PHOTOGRAPHS else STUDIES[path.stem].choose
    for _, of_task in rows.groupby("task"):
        assert of_task["steps"].nunique() == 1  # the same budget for all
        if study_chooses:
            tested = of_task[of_task["split"] == "test"]
            won = winners(of_task)
            assert {(row.strategy, row.rates) for row in tested.itertuples()} <= set(won.items())


def said(output):
    return output.get("data", {}).get("text/markdown")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_a_notebook_says_of_the_record_is_what_the_record_says(path, monkeypatch):
    """Its cells tagged ``evidence`` need the recorded rows only: run anew, they must say what they are stored with."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if "evidence" in cell.metadata.get("tags", [])]
    assert cells
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(plots, "show", lambda figure, alt: None)
    shown = []
    names = ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
    everything = {"plots": plots, "pd": pd, "plt": plots.plt, "Markdown": Markdown, "NAMES": names,
                  "display": lambda *things: shown.extend(thing.data for thing in things if isinstance(thing, Markdown))}
    for cell in cells:
        exec(compile(cell.source, path.name, "exec"), everything)
    plots.plt.close("all")
    assert shown == [said(output) for cell in cells for output in cell.outputs if said(output)]
    assert any(re.search(r"\d", text) for text in shown)


@pytest.mark.parametrize("page", evidence.PAGES)
def test_the_pages_state_what_the_record_says(page):
    """Or run ``python -m layerlr_helpers.studies.evidence``, which writes them."""
    text = (ROOT / page).read_text(encoding="utf-8")
    marks = re.findall(r"<!-- (\w+) -->", text)
    assert marks
    assert set(marks) <= set(evidence.TABLES)
    assert evidence.renewed(text, RESULTS) == text
