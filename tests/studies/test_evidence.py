"""What the course says of its recorded studies is what their rows say."""

import ast
import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from IPython.display import Markdown

from layerlr_helpers.course import plots
from layerlr_helpers.studies import evidence
from layerlr_helpers.studies.catalogue import STUDIES
from layerlr_helpers.studies.evidence import check
from layerlr_helpers.studies.results import KEY, read_rows, winners

ROOT = Path(__file__).parent.parent.parent
DATA = ROOT / "data"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def record(folder, accuracies, claims):
    """Record ten runs of each strategy of a study "s", and claims about them."""
    (folder / "results").mkdir()
    rows = [{"split": "test", "task": "t", "strategy": name, "rates": rates, "seed": seed, "accuracy": accuracy(seed)}
            for seed in range(10) for (name, rates), accuracy in accuracies.items()]
    pd.DataFrame(rows).to_csv(folder / "results" / "s.csv", index=False)
    columns = ["claim", "study", "task", "better", "baseline", "rates", "headline"]
    pd.DataFrame([dict(zip(columns, ("a claim", "s", "t", *claim), strict=True)) for claim in claims]).to_csv(
        folder / "claims.csv", index=False)


@pytest.mark.parametrize(("better", "verdict"), [
    (lambda seed: 0.6, "holds"), (lambda seed: 0.4, "the opposite holds"),
    (lambda seed: 0.5 + (-1) ** seed / 10, "cannot be told")])
def test_the_verdict_is_what_the_interval_allows(tmp_path, better, verdict):
    record(tmp_path, {("new", "0.1"): better, ("old", "0.1"): lambda seed: 0.5}, [("new", "old", None, True)])
    checked = check(tmp_path)
    assert list(checked["verdict"]) == [verdict]
    assert checked["seeds"].item() == 10
    assert "| a claim |" in evidence.markdown(checked)
    assert f"| 10 | {verdict} |" in evidence.markdown(checked)


def test_a_claim_that_names_rates_is_about_the_runs_at_these_rates(tmp_path):
    record(tmp_path, {("new", "0.1"): lambda seed: 0.6, ("old", "0.1"): lambda seed: 0.5,
                      ("new", "0.01"): lambda seed: 0.3, ("old", "0.01"): lambda seed: 0.5},
           [("new", "old", "0.1", True), ("new", "old", "0.01", False)])
    assert check(tmp_path)["difference"].tolist() == pytest.approx([10, -20])


@pytest.mark.parametrize("claim", [("newer", "old"), ("new", "older")])
def test_a_claim_about_what_was_not_tested_is_refused(tmp_path, claim):
    record(tmp_path, {("new", "0.1"): lambda seed: 0.6, ("old", "0.1"): lambda seed: 0.5}, [(*claim, None, False)])
    with pytest.raises(ValueError, match=f"no strategy '{'newer' if 'newer' in claim else 'older'}' was tested"):
        check(tmp_path)


def test_every_claim_of_the_course_has_enough_seeds_and_names_strategies_of_its_study():
    checked = check(DATA)
    assert (checked["seeds"] >= checked["study"].map(lambda study: 5 if study == "photographs-robustness" else 10)).all()
    assert len(checked) == len(pd.read_csv(DATA / "claims.csv"))
    assert not checked["claim"].duplicated().any()


@pytest.mark.parametrize("path", sorted((DATA / "results").glob("*.csv")), ids=lambda path: path.stem)
def test_recorded_rows_are_of_a_known_study_and_only_winners_were_tested(path):
    rows = read_rows(path)
    assert not rows.duplicated(KEY).any()
    assert rows["accuracy"].between(0, 1).all()
    if path.stem not in STUDIES:
        return
    for _, task_rows in rows.groupby("task"):
        assert task_rows["steps"].nunique() == 1  # the same budget for all
        if STUDIES[path.stem].choose:
            tested = task_rows[task_rows["split"] == "test"].drop_duplicates(["strategy", "rates"])
            assert not tested["strategy"].duplicated().any()
            chosen = winners(task_rows)  # not of strategies with a single candidate, such as one that trains nothing
            searched = tested[tested["strategy"].isin(list(chosen))]
            assert set(zip(searched["strategy"], searched["rates"], strict=True)) <= set(chosen.items())


def markdown_of(output):
    return output.get("data", {}).get("text/markdown")


def statements_of(cell, imports):
    """The imports of a cell, or all other statements."""
    return [each for each in ast.parse(cell.source).body if isinstance(each, ast.Import | ast.ImportFrom) == imports]


def execute(statements, name, names):
    exec(compile(ast.Module(statements, []), name, "exec"), names)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_a_notebook_says_of_the_record_is_what_the_record_says(path, monkeypatch):
    """Its cells tagged ``evidence`` need the notebook's imports and the recorded rows only: they must say what is stored."""
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    cells = [cell for cell in code if "evidence" in cell.metadata.get("tags", [])]
    assert cells
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(plots, "show", lambda *figure, **settings: None)
    shown = []
    names = {"NAMES": ["stem", "layer1", "layer2", "layer3", "layer4", "head"]}
    execute([each for cell in code for each in statements_of(cell, imports=True)], path.name, names)
    names["display"] = lambda *things: shown.extend(thing.data for thing in things if isinstance(thing, Markdown))
    for cell in cells:
        execute(statements_of(cell, imports=False), path.name, names)
    plots.plt.close("all")
    assert shown == [markdown_of(output) for cell in cells for output in cell.outputs if markdown_of(output)]
    assert any(re.search(r"\d", text) for text in shown)
