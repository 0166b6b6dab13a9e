"""A learner's copy asks, hides what came out, and is never overwritten."""

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from layerlr_helpers.course.learners_copy import learners_copy, make_copies
from layerlr_helpers.course.questions import NOTEBOOKS

FIRST = "01_layer_lr_theory.ipynb"


def stored():
    said = new_output("display_data", {"text/markdown": "**What we saw.** (b)"})
    return new_notebook(cells=[new_markdown_cell("**Predict first.** (a) or (b)?", id="q"), new_code_cell("run()", id="r"),
                               new_code_cell("letter = 'b'", id="s", outputs=[said], execution_count=2)])


def test_buttons_follow_the_question_and_the_answer_follows_the_result():
    asked = [{"cell": "q", "seen": "s", "answer": "b", "reasons": {"a": "", "b": ""}},
             {"cell": "q", "seen": "s", "variable": "letter", "reasons": {"a": "", "b": ""}}]
    copy = learners_copy(stored(), "02", asked, with_quiz=True)
    nbformat.validate(copy)
    assert [cell.id for cell in copy.cells] == ["q", "guess-q", "r", "s", "reveal-s", "stored-s", "score", "quiz-title", "quiz"]
    sources = {cell.id: cell.source for cell in copy.cells}
    assert sources["guess-q"].splitlines()[1:] == ['guess("02", 1)', 'guess("02", 2)']
    assert sources["reveal-s"].splitlines()[1:] == ["reveal(\"02\", 1, 'b')", 'reveal("02", 2, str(letter))']
    assert "<details>" in sources["stored-s"]
    assert "**What we saw.** (b)" in sources["stored-s"]
    assert not [cell for cell in copy.cells if cell.get("outputs") or cell.get("execution_count")]


def test_without_predictions_and_quiz_it_is_the_notebook_without_outputs():
    copy = learners_copy(stored(), "02", [], with_quiz=False)
    assert [cell.source for cell in copy.cells] == [cell.source for cell in stored().cells]


def test_copies_are_made_once_and_keep_what_was_written(tmp_path):
    learn = tmp_path / "learn"
    names = {path.relative_to(learn).as_posix() for path in make_copies(NOTEBOOKS, learn)}
    assert {FIRST, "exercises/02_resnet_param_groups.ipynb"} <= names
    assert not [name for name in names if "source" in name or "solutions" in name]
    for name in names:
        nbformat.validate(nbformat.read(learn / name, as_version=4))

    (learn / FIRST).write_text("mine")
    (learn / "exercises" / "02_resnet_param_groups.ipynb").unlink()
    assert make_copies(NOTEBOOKS, learn) == [learn / "exercises" / "02_resnet_param_groups.ipynb"]
    assert (learn / FIRST).read_text() == "mine"
