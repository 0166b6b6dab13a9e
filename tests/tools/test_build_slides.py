"""Slides show what the notebooks have stored, and every one fits its page."""

import html
import json
import re
import shutil
import subprocess

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from layerlr_helpers.course.questions import predictions
from tools import build_slides
from tools.build_slides import LESSONS, deck

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# In place of reveal.js: all slides below one another, and how high and wide each of them is.
MEASURE = """<script>addEventListener("load", () => {
const sizes = [...document.querySelectorAll("section")].map(slide => {
  slide.style.cssText = "width: 1280px; height: auto; display: block";
  return [slide.scrollHeight, slide.scrollWidth];
});
document.body.textContent = JSON.stringify(sizes);
});</script>"""


def sizes(page, folder):
    """The height and the width of each slide, in pixels, as a browser lays them out."""
    measured = folder / "measured.html"
    without_reveal = re.sub(r"<script.*?</script>|<link[^>]*>", "", page, flags=re.DOTALL)
    page = without_reveal.replace("</body>", f"<style>* {{ margin: 0 }} aside {{ display: none }}</style>{MEASURE}</body>")
    measured.write_text(page, encoding="utf-8")
    done = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}", "--dump-dom",
                           "--virtual-time-budget=5000", measured.as_uri()], capture_output=True, text=True, timeout=120)
    return json.loads(html.unescape(re.search(r"<body>(.*?)</body>", done.stdout, re.DOTALL)[1]))


@pytest.fixture
def stored(monkeypatch):
    table = new_output("execute_result", {"text/html": "<style>x</style><table><tr><td>1</td></tr></table>", "text/plain": "1"})
    picture = new_output("display_data", {"image/png": "QUJD\n"}, metadata={"image/png": {"alt": 'Two "lines"'}})
    answer, line = new_output("display_data", {"text/markdown": "Answer (b): 3 %"}), new_output("stream", text="a < b\n")
    cells = [new_markdown_cell("A **text**", id="text"),
             new_code_cell("run()", id="code", outputs=[picture, answer, line, table]),
             new_code_cell("x = 1", id="silent")]
    monkeypatch.setattr(build_slides, "notebook", lambda chapter: new_notebook(cells=cells))


def test_a_mark_stands_for_what_its_cell_has_stored(stored):
    page = deck("# Title\n\n---\n\n## Two\n\n{{01 text}}\n\n{{01 code}}\n\n{{01 code source}}\n\nNotes: say it slowly")
    assert page.count("<section>") == 2
    assert "<title>Title</title>" in page
    assert "<strong>text</strong>" in page
    assert '<img alt="Two &quot;lines&quot;" src="data:image/png;base64,QUJD">' in page
    assert "Answer (b): 3 %" in page
    assert "a &lt; b" in page
    assert "<table>" in page
    assert "<style>x" not in page
    assert "run" in page
    assert re.search(r'<aside class="notes">.*say it slowly', page, re.DOTALL)


@pytest.mark.parametrize(("kind", "its_part"), [("figure", "<img"), ("text", "Answer (b): 3 %"), ("table", "<table>")])
def test_a_mark_can_stand_for_one_kind_of_output_also_in_the_notes(stored, kind, its_part):
    parts = {"<img", "Answer (b): 3 %", "a &lt; b", "<table>"}
    for page in (deck(f"{{{{01 code {kind}}}}}"), deck(f"## One\n\nNotes:\n\n{{{{01 code {kind}}}}}")):
        slide = page.partition("<section>")[2]
        assert {part for part in parts if part in slide} == {its_part} | ({"a &lt; b"} if kind == "text" else set())


@pytest.mark.parametrize(("mark", "message"), [("{{01 nothing}}", "no cell 'nothing'"), ("{{01 silent}}", "has stored nothing"),
                                               ("{{01 code sound}}", "has stored no sound")])
def test_a_mark_that_stands_for_nothing_is_refused(stored, mark, message):
    with pytest.raises(LookupError, match=message):
        deck(mark)


def test_a_formula_needs_no_network():
    page = deck("The rate is $\\eta \\cdot d^k$.")
    assert "<math" in page
    assert "http" not in re.sub(r'xmlns="[^"]*"', "", page)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome, to lay the slides out")
@pytest.mark.parametrize("lesson", sorted(LESSONS.glob("*.md")), ids=lambda path: path.stem)
def test_every_slide_fits_its_page(lesson, tmp_path):
    text = lesson.read_text(encoding="utf-8")
    laid_out = sizes(deck(text), tmp_path)
    assert len(laid_out) == len(re.split(r"^---$", text, flags=re.MULTILINE))
    too_large = {number: size for number, size in enumerate(laid_out, start=1) if size[0] > 720 or size[1] > 1280}
    assert too_large == {}


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome, to lay the slides out")
def test_a_slide_that_does_not_fit_is_found(tmp_path):
    lines = "\n".join(f"- line {i}" for i in range(30))
    assert [height > 720 for height, _ in sizes(deck(f"## One\n\n---\n\n{lines}"), tmp_path)] == [False, True]


def test_the_lessons_name_cells_that_are_there():
    assert list(LESSONS.glob("*.md"))
    for lesson in LESSONS.glob("*.md"):
        deck(lesson.read_text(encoding="utf-8"))


# The predictions that each lesson asks, in order: chapter, number and, of a question with several parts, what the line of the
# result begins with.
ASKED = {"lesson-1": [("01", 1), ("01", 3), ("01", 4), ("01", 5), ("01", 6), ("01", 8),
                      ("01", 9, "Blurred"), ("01", 10, "Ornate"), ("01", 11, "Renumbered"), ("02", 2), ("02", 3), ("02", 7)],
         "lesson-2": [("03", 1), ("03", 2), ("03", 3), ("03", 4), ("03", 7), ("03", 8),
                      ("03", 11, "Answer"), ("03", 12, "best peak"), ("04", 1), ("04", 2), ("04", 3), ("04", 5), ("04", 12)]}


def stored_answer(chapter, number, part=""):
    """The letter that a notebook has stored as the answer to one of its predictions."""
    question = predictions(chapter)[number - 1]
    (cell,) = (cell for cell in build_slides.notebook(chapter).cells if cell.id == question["seen"])
    texts = [cell.source] if cell.cell_type == "markdown" else [text for _, text in map(build_slides.shown, cell.outputs)]
    return question.get("answer") or re.search(rf"{part}[^\n]*?\(([a-d])\)", "\n".join(texts))[1]


@pytest.mark.parametrize("lesson", ASKED)
def test_slides_and_lesson_give_the_letters_that_the_notebooks_have_stored(lesson):
    letters = [stored_answer(*asked) for asked in ASKED[lesson]]
    titles = re.findall(r"^## (\([a-d]\).*)$", (LESSONS / f"{lesson}.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert re.findall(r"\(([a-d])\)", " ".join(titles)) == letters
    results = re.findall(r"^\*\*The result:\*\*(.*?)(?=^$)", (LESSONS.parent / f"{lesson}.md").read_text(encoding="utf-8"),
                         re.MULTILINE | re.DOTALL)
    assert re.findall(r"\(([a-d])\)", " ".join(results)) == letters


@pytest.mark.parametrize("lesson", ASKED)
def test_the_plan_of_a_lesson_adds_up_and_its_sections_and_slides_have_the_same_times(lesson):
    page = (LESSONS.parent / f"{lesson}.md").read_text(encoding="utf-8")
    plan = re.findall(r"^\| (\d):(\d\d) \| (\d+) \|", page, re.MULTILINE)
    starts = [60 * int(hours) + int(minutes) for hours, minutes, _ in plan]
    assert [start + int(length) for start, (*_, length) in zip(starts, plan, strict=True)] == [*starts[1:], 90]
    sections = re.findall(r"^## (\d):(\d\d) .*\((\d+) minutes\)$", page, re.MULTILINE)
    assert set(sections) <= set(plan)
    slides = re.findall(r"\*\*(\d):(\d\d), (\d+) minutes", (LESSONS / f"{lesson}.md").read_text(encoding="utf-8"))
    assert set(slides) <= set(plan)
    assert len(slides) > 10
