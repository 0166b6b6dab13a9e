"""Make the slides of the lessons in build/slides/: `make slides` runs this, after it has fetched reveal.js.

A lesson is a Markdown file in docs/teaching/slides/ whose slides are separated by lines of three dashes. A line such as
`{{01 cell-13}}` stands for all that this cell of notebook 01 has stored. With one word more it stands for one part of that:
`{{01 cell-13 figure}}`, `text` or `table`; or for the cell's code: `source`. So no number on a slide can differ from the
notebook. What follows a line `Notes:` is for the speaker, who presses S to see it. Marks work there too.
"""

import argparse
import html
import re
import shutil
from functools import cache, partial
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from nbconvert.filters import strip_ansi
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
LESSONS = ROOT / "docs" / "teaching" / "slides"
STORED = re.compile(r"^\{\{(\d\d) ([\w-]+)(?: (\w+))?\}\}$", re.MULTILINE)
NEEDED = ("reset.css", "reveal.css", "reveal.js", "plugin/notes.js")  # of reveal.js
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>TITLE</title>
<link rel="stylesheet" href="reveal/reset.css">
<link rel="stylesheet" href="reveal/reveal.css">
<style>
.reveal { font: 32px/1.4 system-ui, sans-serif; color: #222; background: white; }
.reveal .slides section { text-align: left; padding: 28px 48px; box-sizing: border-box; height: 720px; }
.reveal strong { font-weight: bold; } .reveal em { font-style: italic; }
.reveal h1, .reveal h2 { font-weight: normal; }
.reveal h1 { font-size: 48px; margin: 180px 0 20px; } .reveal h2 { font-size: 38px; margin-bottom: 20px; }
.reveal p, .reveal ul, .reveal ol, .reveal table { margin-bottom: 16px; } .reveal li { margin-left: 32px; }
.reveal img { width: 100%; max-height: 490px; object-fit: contain; display: block; margin: 0 auto 12px; }
.reveal img:not(:only-of-type) { max-height: 160px; }
.reveal pre { font: 20px/1.35 ui-monospace, monospace; background: #f4f4f4; padding: 12px; margin-bottom: 16px;
              white-space: pre-wrap; }
.reveal code { font-family: ui-monospace, monospace; background: #f4f4f4; }
.reveal table { font-size: 25px; border-collapse: collapse; }
.reveal td, .reveal th { padding: 4px 12px; border-bottom: 1px solid #ccc; }
.reveal .slide-number { font-size: 18px; color: #555; background: none; }
</style>
</head>
<body>
<div class="reveal"><div class="slides">
SLIDES
</div></div>
<script src="reveal/reveal.js"></script>
<script src="reveal/plugin/notes.js"></script>
<script>
Reveal.initialize({ width: 1280, height: 720, margin: 0, center: false, hash: true, transition: "none", slideNumber: "c/t",
                    controls: false, plugins: [RevealNotes] });
</script>
</body>
</html>
"""


def main() -> None:
    """Write a page for each lesson, and reveal.js beside them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reveal", type=Path, required=True, help="the folder dist/ of reveal.js")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "slides")
    options = parser.parse_args()
    for name in NEEDED:
        copy = options.output / "reveal" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(options.reveal / name, copy)
    for lesson in sorted(LESSONS.glob("*.md")):
        page = options.output / f"{lesson.stem}.html"
        page.write_text(deck(lesson.read_text(encoding="utf-8")), encoding="utf-8")
        print(page.relative_to(Path.cwd()) if page.is_relative_to(Path.cwd()) else page)


def deck(lesson: str) -> str:
    """The page of a lesson."""
    slides = re.split(r"^---$", lesson, flags=re.MULTILINE)
    title = re.search(r"^# (.+)$", lesson, re.MULTILINE)
    return (PAGE.replace("TITLE", html.escape(title[1] if title else "Slides"))
            .replace("SLIDES", "\n".join(map(section, slides))))


def section(slide: str) -> str:
    """One slide, with its notes."""
    text, _, notes = slide.partition("\nNotes:")
    aside = f'<aside class="notes">{to_html(STORED.sub(stored, notes))}</aside>' if notes.strip() else ""
    return f"<section>\n{to_html(STORED.sub(stored, text))}{aside}\n</section>"


def stored(mark: re.Match) -> str:
    """What a mark stands for: the source of a cell, all of its outputs, or those of one kind."""
    chapter, cell_id, wanted = mark.groups()
    cells = {cell.id: cell for cell in notebook(chapter).cells}
    if cell_id not in cells:
        raise LookupError(f"{mark[0]}: notebook {chapter} has no cell {cell_id!r}")
    cell = cells[cell_id]
    if wanted == "source":
        return f"```python\n{cell.source}\n```"
    if cell.cell_type == "markdown":
        return cell.source
    outputs = [output for kind, output in map(shown, cell.outputs) if wanted in (None, kind)]
    if not outputs:
        raise LookupError(f"{mark[0]}: this cell has stored {'no ' + wanted if wanted else 'nothing'}")
    return "\n\n".join(outputs)


def shown(output: NotebookNode) -> tuple[str, str]:
    """Which kind of output it is, and the output as Markdown or HTML."""
    data = output.get("data", {})
    if "image/png" in data:
        alt = html.escape(output.metadata.get("image/png", {}).get("alt", ""))
        return "figure", f'<img alt="{alt}" src="data:image/png;base64,{"".join(data["image/png"].split())}">'
    if "text/markdown" in data:
        return "text", data["text/markdown"]
    if "text/html" in data:
        return "table", re.sub(r"<style.*?</style>|\n\s*(?=\n)", "", data["text/html"], flags=re.DOTALL)
    return "text", f"<pre>{html.escape(strip_ansi(data.get('text/plain') or output.text))}</pre>"


@cache
def notebook(chapter: str) -> NotebookNode:
    """The stored notebook of a chapter."""
    (path,) = (ROOT / "notebooks").glob(f"{chapter}_*.ipynb")
    return nbformat.read(path, as_version=4)


def to_html(markdown: str) -> str:
    """Markdown as HTML; formulas become MathML, which a browser draws by itself."""
    renderer = IPythonRenderer(escape=False, exclude_anchor_links=True)
    renderer.inline_math, renderer.block_math = convert, partial(convert, display="block")
    return MarkdownWithMath(renderer).render(markdown)


if __name__ == "__main__":
    main()
