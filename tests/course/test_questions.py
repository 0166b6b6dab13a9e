"""A guess is recorded and compared with what came out; a quiz answers each click; the texts fit the notebooks."""

import json
import re

import ipywidgets as widgets
import nbformat
import pytest
from IPython.display import Markdown

from layerlr_helpers.course import questions
from layerlr_helpers.course.questions import NOTEBOOKS, guess, predictions, quiz, reveal, score

CHAPTERS = [f"{chapter:02}" for chapter in range(1, 9)]
ASKED = [{"cell": "q", "seen": "s", "answer": "b", "reasons": {"a": "Many think so.", "b": "It is.", "c": "No."}},
         {"cell": "q", "seen": "s", "variable": "letter", "part": "(2)", "reasons": {"a": "One.", "b": "Two."}}]
QUIZ = [{"question": "Which?", "options": [{"text": "this", "right": True, "reason": "Indeed."},
                                           {"text": "that", "right": False, "reason": "Not that."}]}]


@pytest.fixture
def shown(monkeypatch, tmp_path):
    for folder, texts in (("predictions", ASKED), ("quizzes", QUIZ)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "03.json").write_text(json.dumps(texts))
    things = []
    monkeypatch.setattr(questions, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(questions, "display", lambda *shown: things.extend(shown))
    monkeypatch.chdir(tmp_path)
    return things


def said(shown):
    return [thing.data for thing in shown if isinstance(thing, Markdown)]


def test_a_right_guess_a_wrong_one_and_none_at_all_are_told(shown):
    guess("03", 1)
    row = shown[-1].children[1]
    assert row.options == ("a", "b", "c")
    assert row.value is None
    row.value = "b"
    reveal("03", 1, "(b), by a little")
    row.value = "a"
    reveal("03", 1, "b")
    reveal("03", 2, "(a)")
    assert said(shown) == ["You predicted (b), and that is **right**.",
                           "You predicted (a), and the answer is (b). Many think so.",
                           "(2): You made no prediction; the answer is (a)."]


def test_an_answer_that_was_not_offered_is_told(shown):
    guess("03", 2)
    shown[-1].children[1].value = "b"
    reveal("03", 2, "neither of the two")
    assert said(shown) == ["(2): You predicted (b), and it was none of the options. Two."]


def test_the_score_counts_what_was_right_and_a_new_kernel_knows_the_guesses(shown):
    guess("03", 1)
    shown[-1].children[1].value = "b"
    reveal("03", 1, "(b)")
    score("03")
    assert said(shown)[-1] == "You predicted **1 of 2** results of this notebook, and made no prediction for 1."
    guess("03", 1)
    assert shown[-1].children[1].value == "b"
    guess("03", 2)
    assert shown[-1].children[0].value == "Your prediction (2):"


def test_each_click_on_an_option_of_a_quiz_is_answered(shown):
    quiz("03")
    row, answer = shown[-2:]
    assert [button.description for button in row.children] == ["a", "b"]
    assert isinstance(answer, widgets.Output)
    texts = []
    questions.display = lambda thing: texts.append(thing.data)  # the fixture puts it back
    for button in row.children:
        button.click()
    assert texts == ["(a) is **right**. Indeed.", "(b) is **wrong**. Not that."]


def cells_of(chapter):
    (path,) = NOTEBOOKS.glob(f"{chapter}_*.ipynb")
    return nbformat.read(path, as_version=4).cells


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_predictions_fit_the_notebook(chapter):
    cells = cells_of(chapter)
    ids = [cell.id for cell in cells]
    asking = {cell.id for cell in cells if cell.cell_type == "markdown"
              and "(a)" in cell.source.partition("**Predict first")[2]}
    if not predictions(chapter):
        return
    assert {question["cell"] for question in predictions(chapter)} == asking
    for question in predictions(chapter):
        assert ids.index(question["seen"]) > ids.index(question["cell"])
        text = cells[ids.index(question["cell"])].source
        assert set(question["reasons"]) <= set(re.findall(r"\(([a-e])\)", text))
        assert len(question["reasons"]) >= 2
        assert all(reason.strip().endswith((".", ")")) for reason in question["reasons"].values())
        assert ("answer" in question) != ("variable" in question)
        seen = cells[ids.index(question["seen"])].source
        if "answer" in question:
            assert question["answer"] in question["reasons"]
            assert f"({question['answer']})" in seen
        else:
            assert re.search(rf"\b{re.escape(question['variable'])}\b", seen)


ALL_QUIZZES = {chapter: questions.questions(chapter) for chapter in CHAPTERS}


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_each_question_of_a_quiz_has_one_right_answer_and_a_reason_for_every_option(chapter):
    for question in ALL_QUIZZES[chapter]:
        assert sum(option["right"] for option in question["options"]) == 1, question["question"]
        assert all(option["text"].strip() and option["reason"].strip() for option in question["options"])
        assert len({option["text"] for option in question["options"]}) == len(question["options"]) >= 3
    assert len(ALL_QUIZZES[chapter]) in (0, 5, 6, 7, 8)


def test_no_question_repeats_another():
    asked = [question["question"] for each in ALL_QUIZZES.values() for question in each]
    assert len(set(asked)) == len(asked)
