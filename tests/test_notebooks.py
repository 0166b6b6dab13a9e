"""What must be true of the stored notebooks without running them (nbmake runs them)."""

import ast
import re
from pathlib import Path

import nbformat
import pytest

from tests.pages import broken
from tests.plumbing import is_hidden, plumbing_characters, plumbing_share

FOLDER = Path(__file__).parent.parent / "notebooks"
COURSE = ["01_layer_lr_theory", "02_resnet_param_groups", "03_lr_scheduling", "04_progressive_unfreezing",
          "05_layer_adaptive_optimizer", "06_transformers", "07_which_way", "08_your_own_data"]
PATHS = sorted(FOLDER.glob("*.ipynb"))
ABSOLUTE = re.compile(r"(?<![\w./:-])(/home/|/work/|/tmp/|/root/|/Users/)|\b[A-Z]:\\+\w")


@pytest.mark.parametrize(("code", "characters"), [
    ("fit(model, optimizer, loader, epochs=3)", 0),
    ("plots.show(plots.plot_rates(frame))", 0),
    ("print(f'the loss after {steps} steps is {loss:.3f}, which is less than before')", 0),
    ("axes.legend(fontsize=8)", 23),
    ("for group in groups:\n    step(group)\n    axes.text(0, 1, 'a')", 18),
    ("display(Markdown(f'{loss:.3f}'))", 32),
    ("plots.show(axes, alt='Bars')", 27),
    ("table = rows.groupby('strategy').mean()", 37),
    ("text = f'The network reads {right:.0%} of the digits, and always guessing would give {chance:.0%}'", 84),
])
def test_plumbing_is_told_from_code_that_teaches(code, characters):
    assert plumbing_characters(code) == characters


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def test_the_course_is_whole():
    assert set(COURSE) <= {path.stem for path in PATHS}


def test_it_is_a_valid_notebook_of_any_python3(notebook):
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"


def test_it_was_run_from_top_to_bottom_in_a_clean_kernel(notebook):
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))


def test_no_cell_ended_in_an_error_or_wrote_warnings(notebook):
    assert [output.ename for output in outputs(notebook) if output.output_type == "error"] == []
    assert [output.text for output in outputs(notebook) if output.get("name") == "stderr"] == []


def test_every_figure_has_a_text_for_those_who_do_not_see_it(notebook):
    pictures = [(output, kind) for output in outputs(notebook) for kind in output.get("data", {}) if kind.startswith("image/")]
    assert pictures
    assert all(output.metadata.get(kind, {}).get("alt", "").strip() for output, kind in pictures)


def test_no_path_of_somebodys_machine_is_in_it(notebook):
    texts = [cell.source for cell in notebook.cells]
    texts += [output.get("text", "") + str({kind: text for kind, text in output.get("data", {}).items() if "image" not in kind})
              for output in outputs(notebook)]
    assert [match.group() for text in texts for match in ABSOLUTE.finditer(text)] == []


def parsed(cell):
    return ast.parse(re.sub(r"(?m)^[%!].*$", "", cell.source))


def names_in(node):
    """What a piece of code takes from somewhere else: attributes and imported names."""
    if isinstance(node, ast.Attribute):
        yield node.attr
    if isinstance(node, ast.ImportFrom):
        yield from (node.module or "").split(".")
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield from (part for alias in node.names for part in alias.name.split("."))


def shown_cells(notebook):
    return [cell for cell in code_cells(notebook) if not is_hidden(cell)]


def test_shown_code_fits_the_screen(notebook):
    for cell in shown_cells(notebook):
        lines = [line for line in cell.source.splitlines() if line.strip()]
        assert len(lines) <= 15, cell.source
        assert max(map(len, lines), default=0) <= 100, cell.source


def test_a_folded_cell_is_folded_in_jupyterlab_and_on_the_pages(notebook):
    tagged = {cell.id for cell in code_cells(notebook) if "hide-input" in cell.metadata.get("tags", [])}
    assert tagged == {cell.id for cell in code_cells(notebook) if cell.metadata.get("jupyter", {}).get("source_hidden")}


def test_little_of_the_shown_code_is_plumbing(notebook):
    assert plumbing_share(notebook.cells) < 0.15


def test_shown_imports_are_in_the_first_code_cell_and_all_are_used(notebook):
    trees = {cell.id: parsed(cell) for cell in code_cells(notebook)}
    imports = {cell_id: [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
               for cell_id, tree in trees.items()}
    assert [cell.source for cell in shown_cells(notebook)[1:] if imports[cell.id]] == []
    names = {(alias.asname or alias.name).split(".")[0] for nodes in imports.values() for node in nodes for alias in node.names}
    used = {node.id for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert names - used == set()


def test_nothing_private_of_the_package_is_used(notebook):
    for cell in code_cells(notebook):
        names = {name for node in ast.walk(parsed(cell)) for name in names_in(node)}
        assert {name for name in names if name.startswith("_") and not name.startswith("__") and name != "_"} == set()


def test_the_file_is_small(path):
    assert path.stat().st_size < 700_000


def test_it_begins_with_what_one_will_learn(notebook):
    first = notebook.cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")
    for promise in ("You will learn", "You need", "It takes"):
        assert promise in first.source


def test_it_ends_in_one_printed_line_with_its_result(notebook):
    (cell,) = (cell for cell in notebook.cells if "result" in cell.metadata.get("tags", []))
    (output,) = cell.outputs
    assert output.name == "stdout"
    assert re.fullmatch(r"[^:\n]+: .+\n?", output.text)
    assert cell is code_cells(notebook)[-1]


def test_it_links_only_to_files_and_headings_that_exist(path, notebook):
    assert broken("\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown"), path) == []
