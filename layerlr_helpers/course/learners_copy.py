"""A learner's copy of a notebook: no outputs, buttons for its predictions, and its quiz at the end."""

from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell

from layerlr_helpers.course.questions import predictions, questions
from layerlr_helpers.files import write_whole

IMPORT = "from layerlr_helpers.course.questions import guess, quiz, reveal, score"


def make_copies(notebooks: Path, learn: Path) -> list[Path]:
    """Make a learner's copies of notebooks and exercises, but for those that exist; returns the new ones."""
    new = []
    for source in sorted([*notebooks.glob("*.ipynb"), *notebooks.glob("exercises/*.ipynb")]):
        copy = learn / source.relative_to(notebooks)
        if copy.exists():
            continue
        chapter = source.stem[:2] if source.parent == notebooks else ""
        notebook = learners_copy(nbformat.read(source, as_version=4), chapter, predictions(chapter),
                                 with_quiz=bool(questions(chapter)))
        copy.parent.mkdir(parents=True, exist_ok=True)
        write_whole(copy, lambda temporary, notebook=notebook: nbformat.write(notebook, temporary))
        new.append(copy)
    return new


def learners_copy(stored: NotebookNode, chapter: str, asked: list[dict], *, with_quiz: bool) -> NotebookNode:
    """Return a copy of a stored notebook for somebody who is to predict its results.

    After the cell of each question come buttons, and after the cell of its result a line that says whether the guess was
    right; what that cell showed when the notebook was stored is folded below, to be read without running anything.
    """
    guesses, reveals = {}, {}
    for number, question in enumerate(asked, start=1):
        answer = f"str({question['variable']})" if "variable" in question else repr(question["answer"])
        guesses.setdefault(question["cell"], []).append(f'guess("{chapter}", {number})')
        reveals.setdefault(question["seen"], []).append(f'reveal("{chapter}", {number}, {answer})')
    cells = []
    for cell in stored.cells:
        cells.append(without_outputs(cell))
        if cell.id in reveals:  # before the buttons, since a text may answer one question and then ask the next
            cells.append(folded(f"reveal-{cell.id}", reveals[cell.id]))
            cells += stored_result(cell)
        if cell.id in guesses:
            cells.append(folded(f"guess-{cell.id}", guesses[cell.id]))
    if asked:
        cells.append(folded("score", [f'score("{chapter}")']))
    if with_quiz:
        cells += [new_markdown_cell("## Quiz", id="quiz-title"), folded("quiz", [f'quiz("{chapter}")'])]
    return NotebookNode({**stored, "cells": cells})


def without_outputs(cell: NotebookNode) -> NotebookNode:
    """A copy of a cell as it is before it has run."""
    return NotebookNode({**cell, "outputs": [], "execution_count": None} if cell.cell_type == "code" else cell)


def folded(name: str, lines: list[str]) -> NotebookNode:
    """A code cell whose source is folded, and which works whatever cells ran before. An id has at most 64 characters."""
    return new_code_cell("\n".join([IMPORT, *lines]), id=name[:64],
                         metadata={"tags": ["hide-input"], "jupyter": {"source_hidden": True}})


def stored_result(cell: NotebookNode) -> list[NotebookNode]:
    """What a cell said when the notebook was stored, folded; nothing where it is a text, which stands there anyway."""
    texts = [output.data["text/markdown"] for output in cell.get("outputs", []) if "text/markdown" in output.get("data", {})]
    return [new_markdown_cell("<details><summary>What came out when this notebook was stored</summary>\n\n" + "\n\n".join(texts)
                              + "\n\n</details>", id=f"stored-{cell.id}"[:64])] if texts else []
