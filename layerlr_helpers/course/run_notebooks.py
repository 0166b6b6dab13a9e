"""Run the whole course without a person: ``python -m layerlr_helpers.course``.

Executes the notebooks in order, each in a clean kernel, shows how far it is, writes the executed notebooks and HTML
pages and ends with a table. A notebook that breaks is reported with its cell and error, and the others still run.
"""

import argparse
import base64
import copy
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import nbformat
import pandas as pd
from latex2mathml.converter import convert
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from nbconvert.filters import strip_ansi
from tqdm import tqdm

BROKEN = "BROKEN, see below"

# nbconvert's own page, and each picture with the text that plots.show stored beside it, which nbconvert leaves out.
PAGE = """
{%- extends "index.html.j2" -%}
{%- block data_png scoped -%}
{%- set alt = output | get_metadata("alt", "image/png") -%}
{{- super() | replace("<img ", '<img alt="' ~ (alt | escape_html) ~ '" ', 1) if alt else super() -}}
{%- endblock data_png -%}
"""


CODE = re.compile(r"(```.*?```|`[^`]*`)", re.DOTALL)  # in which a dollar is a dollar
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+?)\$", re.DOTALL)


@dataclass(frozen=True)
class Outcome:
    """How one notebook went: its seconds, its result in one line, or what broke."""

    notebook: str
    seconds: float
    result: str
    error: str | None = None


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the number of notebooks that broke."""
    options = _parser().parse_args(arguments)
    paths = sorted(Path(options.notebooks).glob("*.ipynb"))
    if not paths:
        raise SystemExit(f"no notebooks in {options.notebooks}; run this from the course's folder, or pass --notebooks")
    outcomes = [run_notebook(path, Path(options.output), in_place=options.in_place, number=f"{i}/{len(paths)}")
                for i, path in enumerate(paths, start=1)]
    table = pd.DataFrame([{"notebook": o.notebook, "seconds": round(o.seconds), "result": o.result} for o in outcomes])
    print(table.to_string(index=False, justify="left"))
    print(f"{sum(o.seconds for o in outcomes):.0f} seconds in all; pages are in {options.output}")
    broken = [o for o in outcomes if o.error]
    for outcome in broken:
        print(f"\n{outcome.notebook} broke at {outcome.error}", file=sys.stderr)
    return len(broken)


def run_notebook(path: Path, output: Path, *, in_place: bool = False, number: str = "1/1", timeout: int = 900) -> Outcome:
    """Execute one notebook in a clean kernel and write it, executed, and its page to ``output``.

    ``in_place`` also stores the executed notebook over ``path`` and the figure of its cell tagged ``picture`` in
    ``images/`` beside it, unless it broke. A cell may take ``timeout`` seconds.
    """
    start = perf_counter()
    try:
        notebook = nbformat.read(path, as_version=4)
    except Exception as failure:  # no JSON, or JSON that is no notebook
        return Outcome(path.stem, perf_counter() - start, BROKEN, f"reading the file:\n{failure}")
    error = _execute(notebook, path.parent, f"{number} {path.stem}", timeout)
    seconds = perf_counter() - start
    output.mkdir(parents=True, exist_ok=True)
    _write(output / path.name, nbformat.writes(notebook) + "\n")
    _write(output / f"{path.stem}.html", HTMLExporter(raw_template=PAGE).from_notebook_node(_with_formulas(notebook))[0])
    if in_place and error is None:
        _write(path, nbformat.writes(notebook) + "\n")
        _write_picture(notebook, path.parent / "images" / f"{path.stem}.png")
    return Outcome(path.stem, seconds, BROKEN if error else _result(notebook), error)


def _execute(notebook, folder: Path, title: str, timeout: int) -> str | None:
    """Execute a notebook from clean, with a bar of its code cells; returns which cell broke and how, if one did."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    for cell in code:
        cell.outputs, cell.execution_count = [], None  # what an earlier run left must not pass for this one's
    started = []
    with tqdm(total=len(code), desc=title, unit="cell", disable=False) as bar:
        client = NotebookClient(notebook, timeout=timeout, iopub_timeout=60, kernel_name="python3", record_timing=False,
                                store_widget_state=False, extra_arguments=["--log-level=ERROR"],  # no advice amid the bars
                                resources={"metadata": {"path": str(folder)}},
                                on_cell_execute=lambda cell, cell_index: started.append(cell),
                                on_cell_executed=lambda cell, cell_index, execute_reply: bar.update())
        try:
            client.execute(env=os.environ | {"TQDM_DISABLE": "1"})
        except Exception as failure:  # an error in a cell, a cell that takes too long, a kernel that dies or never starts
            if not started:
                return f"the start of its kernel:\n{failure}"
            place = f"code cell {len(started)} of {len(code)}, which begins {started[-1].source[:60]!r}"
            return f"{place}:\n{strip_ansi(str(failure))}"
    return None


def _with_formulas(notebook):
    """A copy with its formulas as MathML, which a browser draws without a network; nbconvert's pages fetch a library for it."""
    notebook = copy.deepcopy(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = _mathml(cell.source)
        for output in cell.get("outputs", []):
            if "text/markdown" in output.get("data", {}):
                output.data["text/markdown"] = _mathml(output.data["text/markdown"])
    return notebook


def _mathml(text: str) -> str:
    parts = CODE.split(text)
    parts[::2] = [FORMULA.sub(lambda found: convert(found[1] or found[2], display="block" if found[1] else "inline"), part)
                  for part in parts[::2]]
    return "".join(parts)


def _result(notebook) -> str:
    """What the cell tagged ``result`` printed."""
    for cell in notebook.cells:
        if "result" in cell.metadata.get("tags", []):
            return "".join(output.get("text", "") for output in cell.outputs).strip()
    return ""


def _write_picture(notebook, path: Path) -> None:
    """Write the figure of the cell tagged ``picture``, if there is one: the README shows it."""
    for cell in notebook.cells:
        if "picture" in cell.metadata.get("tags", []):
            (figure,) = (output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {}))
            path.parent.mkdir(exist_ok=True)
            _write(path, base64.b64decode(figure))


def _write(path: Path, content: str | bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m layerlr_helpers.course", description=__doc__.splitlines()[0])
    parser.add_argument("--notebooks", default="notebooks", help="folder of the notebooks (default %(default)s)")
    parser.add_argument("--output", default="build/course", help="folder to write to (default %(default)s)")
    parser.add_argument("--in-place", action="store_true", help="also store the executed notebooks where they came from")
    return parser
