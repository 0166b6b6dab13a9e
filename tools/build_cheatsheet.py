"""Make build/cheatsheet.pdf, two printed pages, from docs/cheatsheet.md: `make cheatsheet` runs this.

The Markdown may have a title with a line or two below it, sections, paragraphs, lists, tables and code; anything else is an
error. The text runs in two columns, and no paragraph, item, table or piece of code is split between two of them. A heading
stays with what follows it, and so does a paragraph that ends with a colon.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import matplotlib
import mistune
from fpdf import FPDF

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "docs" / "cheatsheet.md"
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
FILES = {("text", ""): "DejaVuSans", ("text", "B"): "DejaVuSans-Bold", ("text", "I"): "DejaVuSans-Oblique",
         ("text", "BI"): "DejaVuSans-BoldOblique", ("code", ""): "DejaVuSansMono"}
PAGES = 2
MARGIN, GUTTER, FOOT = 10.0, 6.0, 13.0  # millimetres, as all lengths below
WIDTH = (210 - 2 * MARGIN - GUTTER) / 2  # of a column on A4
SIZE, TITLE, SECTION = 8.5, 15.0, 10.5  # points
UNBROKEN = 42  # characters of code in a sentence that stay on one line
LEADING = 1.24  # from line to line, in units of the size
POINT = 25.4 / 72
BLUE, GREY, PALE = (20, 60, 120), (190, 190, 190), (241, 243, 246)

Run = tuple[str, str, str]  # text, family and style
Line = list[Run]


@dataclass
class Box:
    """What is not split: its height, how it is drawn at a place, and whether the next box must be in the same column."""

    height: float
    draw: Callable[[float, float], None]
    with_next: bool = False


def main() -> None:
    """Write the PDF, and say where it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "cheatsheet.pdf")
    path = parser.parse_args().output
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cheatsheet(SOURCE.read_text(encoding="utf-8")))
    print(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def cheatsheet(markdown: str) -> bytes:
    """The PDF of a sheet; a ValueError if it would not have exactly two pages, or if something in it cannot be set."""
    blocks = [block for block in mistune.create_markdown(renderer="ast", plugins=["table"])(markdown)
              if block["type"] != "blank_line"]
    title, introduction = blocks[:2]
    pdf = FPDF(format="A4")
    pdf.set_auto_page_break(False)
    for (family, style), name in FILES.items():
        pdf.add_font(family, style, FONTS / f"{name}.ttf")
    if missing := {sign for sign in markdown if not sign.isspace()
                   for family in ("text", "code") if ord(sign) not in pdf.fonts[family].cmap}:
        raise ValueError(f"the fonts lack {' '.join(sorted(missing))}")
    pdf.set_title(plain(title))
    pdf.set_lang("en-GB")
    sheet = Sheet(pdf)
    top = [sheet.heading(title, TITLE), *sheet.paragraph(introduction, 210 - 2 * MARGIN)]
    boxes = [box for block in blocks[2:] for box in sheet.boxes(block)]
    pages = fill(pdf, top, boxes)
    if pages != PAGES:
        raise ValueError(f"the cheat sheet takes {pages} pages and not {PAGES}; shorten or lengthen {SOURCE.name}")
    return bytes(pdf.output())


def fill(pdf: FPDF, top: Sequence[Box], boxes: Sequence[Box]) -> int:
    """Draw the top over both columns, then the other boxes column by column; returns the number of pages."""
    start, bottom = MARGIN, 297 - FOOT
    _new_page(pdf)
    for box in top:
        box.draw(MARGIN, start)
        start += box.height
    column, y = 0, start
    for together in _kept_together(boxes):
        if y + sum(box.height for box in together) > bottom:
            column += 1
            if column % 2 == 0:
                _new_page(pdf)
                start = MARGIN
            y = start
        for box in together:
            box.draw(MARGIN + column % 2 * (WIDTH + GUTTER), y)
            y += box.height
    return pdf.page


def _kept_together(boxes: Sequence[Box]) -> Iterator[list[Box]]:
    together: list[Box] = []
    for box in boxes:
        together.append(box)
        if not box.with_next:
            yield together
            together = []


def _new_page(pdf: FPDF) -> None:
    pdf.add_page()
    pdf.set_font("text", "", SIZE)
    pdf.set_text_color(90)
    text = f"page {pdf.page} of {PAGES}"
    pdf.text(210 - MARGIN - pdf.get_string_width(text), 297 - FOOT / 2, text)
    pdf.text(MARGIN, 297 - FOOT / 2, pdf.title)


class Sheet:
    """Turns blocks of Markdown into boxes of one column's width."""

    def __init__(self, pdf: FPDF):
        self.pdf = pdf
        self.widths: dict[Run, float] = {}  # of runs that have been measured

    def boxes(self, block: dict) -> list[Box]:
        """The boxes of a block of any kind."""
        kinds = {"heading": lambda block: [self.heading(block, SECTION)], "paragraph": self.paragraph,
                 "list": self.items, "table": self.table, "block_code": self.code}
        if block["type"] not in kinds:
            raise ValueError(f"a cheat sheet has no {block['type']}: {plain(block)[:60]!r}; it has {', '.join(kinds)}")
        return kinds[block["type"]](block)

    def heading(self, block: dict, size: float) -> Box:
        """A heading, with a rule below that of a section."""
        text, is_section = plain(block), size == SECTION
        self.pdf.set_font("text", "B", size)
        if is_section and self.pdf.get_string_width(text) > WIDTH:
            raise ValueError(f"this heading is wider than a column: {text!r}")

        def draw(x: float, y: float) -> None:
            baseline = y + (1.6 if is_section else 0) + size * POINT
            self.pdf.set_font("text", "B", size)
            self.pdf.set_text_color(*BLUE)
            self.pdf.text(x, baseline, text)
            if is_section:
                self._rule(x, baseline + 1.2, WIDTH, BLUE)

        return Box(size * POINT + (4.4 if is_section else 2.2), draw, with_next=True)

    def paragraph(self, block: dict, width: float = WIDTH) -> list[Box]:
        """One box."""
        lines = self._wrapped(list(runs(block)), width)
        return [Box(self._height(lines) + 1.1, lambda x, y: self._write(lines, x, y), with_next=plain(block).endswith(":"))]

    def items(self, block: dict) -> list[Box]:
        """A box for each item, with its bullet or number."""
        ordered, first = block["attrs"]["ordered"], block["attrs"].get("start", 1)
        indent = 5.0 if ordered else 3.2
        result = []
        for number, item in enumerate(block["children"], start=first):
            if [child["type"] for child in item["children"]] != ["block_text"]:
                raise ValueError(f"an item of a list is text alone, not {plain(item)[:60]!r}")
            result.append(self._item(f"{number}." if ordered else "•", self._wrapped(list(runs(item)), WIDTH - indent), indent))
        result[-1].height += 0.7
        return result

    def _item(self, mark: str, lines: list[Line], indent: float) -> Box:
        def draw(x: float, y: float) -> None:
            self._write([[(mark, "text", "")]], x, y)
            self._write(lines, x + indent, y)

        return Box(self._height(lines) + 0.5, draw)

    def table(self, block: dict) -> list[Box]:
        """A box for each row, which all stay together."""
        head, body = block["children"]
        rows = [head["children"], *(row["children"] for row in body["children"])]
        if any(len(row) != 2 for row in rows):
            raise ValueError(f"a table has two columns, unlike {plain(head)!r}")
        cells = [[list(runs(cell, "B" if i == 0 else "")) for cell in row] for i, row in enumerate(rows)]
        result = min((self._rows(cells, WIDTH * percent / 100) for percent in range(20, 70, 2)),
                     key=lambda boxes: sum(box.height for box in boxes))
        if math.isinf(result[0].height):
            raise ValueError(f"no widths of the two columns are enough for the table of {plain(head)!r}")
        for box in result[:-1]:
            box.with_next = True
        result[-1].height += 1.3
        return result

    def _rows(self, cells: list[list[list[Run]]], first: float, gap: float = 2.5) -> list[Box]:
        """The rows if the first column is so wide; of infinite height if a word does not fit."""
        if any(self._width_of(word) > width for row in cells
               for cell, width in zip(row, (first, WIDTH - first - gap), strict=True) for word in _words(cell)):
            return [Box(math.inf, lambda x, y: None)]
        return [self._row(self._wrapped(left, first), self._wrapped(right, WIDTH - first - gap), first + gap)
                for left, right in cells]

    def _row(self, left: list[Line], right: list[Line], indent: float) -> Box:
        height = max(self._height(left), self._height(right)) + 1.3

        def draw(x: float, y: float) -> None:
            self._write(left, x, y)
            self._write(right, x + indent, y)
            self._rule(x, y + height - 0.7, WIDTH, GREY)

        return Box(height, draw)

    def code(self, block: dict) -> list[Box]:
        """One box on a pale ground; a ValueError if a line is wider than the column."""
        lines: list[Line] = [[(line, "code", "")] for line in block["raw"].rstrip("\n").split("\n")]
        if wide := [line[0][0] for line in lines if self._width_of(line) > WIDTH - 2.4]:
            raise ValueError(f"this line of code is wider than a column: {wide[0]!r}")
        height = self._height(lines) + 2.2

        def draw(x: float, y: float) -> None:
            self.pdf.set_fill_color(*PALE)
            self.pdf.rect(x, y + 0.3, WIDTH, height, style="F")
            self._write(lines, x + 1.2, y + 1.2)

        return [Box(height + 1.9, draw)]

    def _rule(self, x: float, y: float, width: float, colour: tuple[int, int, int]) -> None:
        self.pdf.set_draw_color(*colour)
        self.pdf.set_line_width(0.2)
        self.pdf.line(x, y, x + width, y)

    def _height(self, lines: list[Line]) -> float:
        return len(lines) * SIZE * LEADING * POINT

    def _width_of(self, line: Sequence[Run]) -> float:
        return sum(map(self._width_of_run, line))

    def _width_of_run(self, run: Run) -> float:
        if run not in self.widths:
            text, family, style = run
            self.pdf.set_font(family, style, SIZE)
            self.widths[run] = self.pdf.get_string_width(text)
        return self.widths[run]

    def _wrapped(self, text: list[Run], width: float) -> list[Line]:
        """Lines that are at most so wide, broken at spaces; a ValueError if a word is wider."""
        lines: list[Line] = [[]]
        taken = 0.0
        for word in _words(text):
            if lines[-1] and taken + self._width_of(word) > width:
                lines.append([])
            if not lines[-1]:
                taken, word = 0.0, [(word[0][0].lstrip(" "), *word[0][1:]), *word[1:]]
            lines[-1] += word
            taken += self._width_of(word)
            if taken > width:
                raise ValueError(f"this is wider than its place: {''.join(run[0] for run in word)!r}")
        return [[("".join(run[0] for run in same), *kind) for kind, same in groupby(line, key=lambda run: run[1:])]
                for line in lines]

    def _write(self, lines: list[Line], x: float, y: float) -> None:
        self.pdf.set_text_color(0)
        for number, line in enumerate(lines):
            place = x
            for text, family, style in line:
                self.pdf.set_font(family, style, SIZE)
                self.pdf.text(place, y + (number * LEADING + 1) * SIZE * POINT, text)
                place += self.pdf.get_string_width(text)


def _words(text: list[Run]) -> Iterator[list[Run]]:
    """Pieces of text that are not broken, each with the space before it; a call is broken only if it is long."""
    word: list[Run] = []
    for content, family, style in text:
        first, *others = [content] if family == "code" and len(content) <= UNBROKEN else content.split(" ")
        if first:
            word.append((first, family, style))
        for other in others:
            if word:
                yield word
            word = [(" " + other, family, style)]
    if word:
        yield word


def runs(block: dict, style: str = "") -> Iterator[Run]:
    """The text in a block, with its fonts; of a link its text."""
    kind = block["type"]
    if kind == "codespan":
        yield block["raw"], "code", ""
    elif kind == "softbreak":
        yield " ", "text", style
    elif "raw" in block:
        yield block["raw"], "text", style
    else:
        style += {"strong": "B", "emphasis": "I"}.get(kind, "")
        for child in block.get("children", ()):
            yield from runs(child, "".join(sorted(set(style))))


def plain(block: dict) -> str:
    """The text in a block, without its fonts."""
    return "".join(text for text, _, _ in runs(block))


if __name__ == "__main__":
    main()
