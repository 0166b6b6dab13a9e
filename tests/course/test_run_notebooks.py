"""Running the notebooks: the tests marked slow start kernels, the others read pages that no kernel made."""

import re
from io import StringIO

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from layerlr_helpers.course import run_notebooks as course

needs_kernels = pytest.mark.slow
DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="  # a PNG of one pixel


def notebook(*cells):
    return new_notebook(cells=list(cells), metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})


def tagged(tag, source, **cell):
    return new_code_cell(source, metadata={"tags": [tag]}, **cell)


GOOD = notebook(
    new_code_cell("from IPython.display import display\nfrom tqdm import tqdm"),
    new_code_cell("for _ in tqdm(range(3)): pass\nprint('not the result')"),
    tagged("picture", f"display({{'image/png': '{DOT}'}}, raw=True, metadata={{'image/png': {{'alt': 'one dot'}}}})"),
    tagged("raises-exception", "1 / 0"),
    tagged("result", "print('answer:', 6 * 7)"))

# It was run before, when it still worked.
BROKEN = notebook(
    *(new_code_cell(f"print({i})", execution_count=i, outputs=[new_output("stream", text=f"old {i}\n")]) for i in (1, 2)),
    new_code_cell("\n"),
    new_code_cell("raise RuntimeError('the kettle is empty')", execution_count=3),
    tagged("result", "print('old result: 1')", execution_count=4, outputs=[new_output("stream", text="old result: 1\n")]))


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The course of one good notebook, one that breaks and one that cannot be read, in that order of names."""
    folder = tmp_path_factory.mktemp("course")
    (folder / "notebooks").mkdir()
    nbformat.write(BROKEN, folder / "notebooks" / "01_broken.ipynb")
    (folder / "notebooks" / "02_no_json.ipynb").write_text("<<<<<<< HEAD")
    nbformat.write(GOOD, folder / "notebooks" / "03_good.ipynb")
    before = {path.stem: path.read_bytes() for path in (folder / "notebooks").iterdir()}
    with pytest.MonkeyPatch.context() as patch:
        out, err = StringIO(), StringIO()
        patch.setattr("sys.stdout", out)
        patch.setattr("sys.stderr", err)
        code = course.main(["--notebooks", str(folder / "notebooks"), "--output", str(folder / "build" / "pages"),
                            "--in-place"])
    return {"folder": folder, "code": code, "before": before, "out": out.getvalue(), "err": err.getvalue()}


@needs_kernels
def test_the_exit_status_is_the_number_of_broken_notebooks(ran):
    assert ran["code"] == 2


@needs_kernels
def test_the_table_has_every_notebook_and_what_its_result_cell_printed(ran):
    table = ran["out"]
    for name, result in (("01_broken", "BROKEN"), ("02_no_json", "BROKEN"), ("03_good", "answer: 42")):
        assert any(line.split()[0] == name and result in line for line in table.splitlines() if line.strip())
    assert "not the result" not in table
    assert "old result" not in table
    assert "seconds in all" in table


@needs_kernels
def test_what_broke_is_named_with_its_cell_and_error(ran):
    assert "01_broken broke at code cell 3 of 4, which begins \"raise RuntimeError('the kettle is empty')\"" in ran["err"]
    assert re.search(r"RuntimeError.*: the kettle is empty", ran["err"])
    assert "\x1b" not in ran["err"]  # no colour codes: this may go into a file
    assert "02_no_json broke at reading the file" in ran["err"]
    assert "03_good broke" not in ran["err"]


@needs_kernels
def test_progress_is_shown_by_notebook_and_cell(ran):
    assert "1/3 01_broken" in ran["err"]
    assert "3/3 03_good: 100%" in ran["err"]
    assert "5/5" in ran["err"]


@needs_kernels
def test_pages_are_written_of_all_that_ran(ran):
    pages = ran["folder"] / "build" / "pages"
    assert sorted(path.name for path in pages.iterdir()) == [
        "01_broken.html", "01_broken.ipynb", "03_good.html", "03_good.ipynb"]
    good = (pages / "03_good.html").read_text(encoding="utf-8")
    assert "answer: 42" in good
    assert 'alt="one dot"' in good
    assert "the kettle is empty" in (pages / "01_broken.html").read_text(encoding="utf-8")


@needs_kernels
def test_a_page_shows_nothing_of_an_earlier_run(ran):
    executed = nbformat.read(ran["folder"] / "build" / "pages" / "01_broken.ipynb", as_version=4)
    assert [cell.execution_count for cell in executed.cells if cell.source.strip()] == [1, 2, 3, None]
    assert executed.cells[0].outputs[0].text == "1\n"
    assert executed.cells[-1].outputs == []


@needs_kernels
def test_only_what_ran_through_is_stored_in_place(ran):
    notebooks = ran["folder"] / "notebooks"
    for name in ("01_broken", "02_no_json"):
        assert (notebooks / f"{name}.ipynb").read_bytes() == ran["before"][name]
    stored = nbformat.read(notebooks / "03_good.ipynb", as_version=4)
    nbformat.validate(stored)
    assert [cell.execution_count for cell in stored.cells] == [1, 2, 3, 4, 5]
    assert not list(notebooks.glob("*.tmp"))


@needs_kernels
def test_figures_keep_their_alt_text_and_bars_leave_nothing_behind(ran):
    stored = nbformat.read(ran["folder"] / "notebooks" / "03_good.ipynb", as_version=4)
    looped, drawn = stored.cells[1].outputs, stored.cells[2].outputs
    assert [output.output_type for output in looped] == ["stream"]
    assert looped[0].text == "not the result\n"
    assert drawn[0].metadata["image/png"]["alt"] == "one dot"


@needs_kernels
def test_the_figure_of_the_cell_tagged_picture_is_a_file_of_its_own(ran):
    pictures = list((ran["folder"] / "notebooks" / "images").iterdir())
    assert [picture.name for picture in pictures] == ["03_good.png"]
    assert pictures[0].read_bytes().startswith(b"\x89PNG")


@needs_kernels
def test_a_cell_that_takes_too_long_is_reported(tmp_path):
    nbformat.write(notebook(new_code_cell("1"), new_code_cell("import time\ntime.sleep(60)")), tmp_path / "slow.ipynb")
    outcome = course.run_notebook(tmp_path / "slow.ipynb", tmp_path / "pages", timeout=1)
    assert "code cell 2 of 2" in outcome["error"]
    assert "timed out" in outcome["error"]


def test_formulas_on_a_page_need_no_network():
    page = course.page(notebook(
        new_markdown_cell("A ratio $k_1$ is no `$PATH` and no `a$b`.\n\n$$\\frac{a}{b}$$"),
        new_code_cell("", outputs=[new_output("display_data", {"text/markdown": "It is $k_2$."})])))
    assert page.count("<math") == 3
    assert "<mfrac><mrow><mi>a</mi></mrow><mrow><mi>b</mi></mrow></mfrac>" in page
    assert "<code>$PATH</code>" in page
    assert "k_1" not in page
    assert "k_2" not in page


def test_a_picture_on_a_page_has_its_text():
    picture = new_output("display_data", {"image/png": DOT}, metadata={"image/png": {"alt": 'a "line" that rises & falls'}})
    without = new_output("display_data", {"image/png": DOT})
    page = course.page(notebook(new_code_cell("", outputs=[picture, without])))
    first, second = re.findall(r"<img [^>]*>", page)
    assert 'alt="a &quot;line&quot; that rises &amp; falls"' in first or "alt='a \"line\" that rises &amp; falls'" in first
    assert "No description" in second  # nbconvert's own words


def test_a_page_folds_the_code_but_not_the_outputs_of_a_cell_tagged_hide_input():
    shown = {"outputs": [new_output("stream", text="shown_output\n")]}
    page = course.page(notebook(tagged("hide-input", "hidden_code", **shown), tagged("result", "plain_code", **shown)))
    (folded,) = re.findall(r"<details><summary>Show the code</summary>(.*?)</details>", page, re.DOTALL)
    assert "hidden_code" in folded
    assert "shown_output" not in folded
    assert page.count("shown_output") == 2
    assert page.count("plain_code") == 1


def test_a_folder_without_notebooks_says_what_to_do(tmp_path):
    with pytest.raises(SystemExit, match=r"no notebooks in .*; run this from the course's folder, or pass --notebooks"):
        course.main(["--notebooks", str(tmp_path)])
