"""Make the exercises and their solutions from one source: `make exercises` runs this.

In notebooks/exercises/source/ an exercise is four cells, with the tags exercise, starter, solution and check. The notebook for
a learner has no solutions and no outputs; the other one has no starters, and has been run.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
SOURCE = NOTEBOOKS / "exercises" / "source"


def main(sources: list[str]) -> None:
    """Build the notebooks of these sources, or of all."""
    for source in [Path(name) for name in sources] or sorted(SOURCE.glob("*.ipynb")):
        (chapter,) = NOTEBOOKS.glob(f"{source.stem}_*.ipynb")
        for folder, build in (("exercises", starters), ("solutions", solutions)):
            path = NOTEBOOKS / folder / chapter.name
            path.parent.mkdir(exist_ok=True)
            nbformat.write(build(nbformat.read(source, as_version=4)), path)
            print(path.relative_to(ROOT))


def starters(source: NotebookNode) -> NotebookNode:
    """What a learner gets: no solutions, and nothing has been run."""
    return without("solution", source)


def solutions(source: NotebookNode, run: Callable[[NotebookNode], object] | None = None) -> NotebookNode:
    """The same with solutions in place of starters, executed from a clean kernel (or by ``run``)."""
    notebook = without("starter", source)
    (run or execute)(notebook)
    return notebook


def execute(notebook: NotebookNode) -> None:
    """Run all cells, and keep nothing of when and by whom."""
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOKS / "solutions")}},
                   store_widget_state=False, record_timing=False).execute()
    notebook.metadata["language_info"] = {"name": "python"}


def without(tag: str, source: NotebookNode) -> NotebookNode:
    """A copy without the cells that have a tag, and without outputs."""
    notebook = nbformat.from_dict({**source, "cells": [dict(cell) for cell in source.cells
                                                       if tag not in cell.metadata.get("tags", [])]})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


if __name__ == "__main__":
    main(sys.argv[1:])
