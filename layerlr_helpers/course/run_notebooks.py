"""Run the whole course without a person: ``python -m layerlr_helpers.course``.

Executes the notebooks in order, each in a clean kernel, shows how far it is, writes the executed notebooks and HTML
pages and ends with a table. A notebook that breaks is reported with its cell and error, and the others still run.
"""

import argparse
import base64
import os
import sys
from functools import partial
from pathlib import Path
from time import perf_counter

import nbformat
import pandas as pd
from latex2mathml.converter import convert
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from nbconvert.filters import strip_ansi
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from tqdm import tqdm

from layerlr_helpers.files import write_whole

BROKEN = "BROKEN, see below"

# nbconvert's own page with two additions: each picture has the text that plots.show stored beside it, and the code of a
# cell with the tag hide-input is folded, as JupyterLab folds it.
PAGE = """
{%- extends "index.html.j2" -%}
{%- block data_png scoped -%}
{%- set alt = output | get_metadata("alt", "image/png") -%}
{{- super() | replace("<img ", '<img alt="' ~ (alt | escape_html) ~ '" ', 1) if alt else super() -}}
{%- endblock data_png -%}
{%- block input_group -%}
{%- set folded = "hide-input" in cell.metadata.get("tags", []) -%}
{{- "<details><summary>Show the code</summary>" if folded }}{{ super() }}{{ "</details>" if folded -}}
{%- endblock input_group -%}
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the number of notebooks that broke."""
    parser = argparse.ArgumentParser(prog="python -m layerlr_helpers.course", description=__doc__.splitlines()[0])
    parser.add_argument("--notebooks", default="notebooks", help="folder of the notebooks (default %(default)s)")
    parser.add_argument("--output", default="build/course", help="folder to write to (default %(default)s)")
    parser.add_argument("--in-place", action="store_true", help="also store the executed notebooks where they came from")
    options = parser.parse_args(arguments)

    paths = sorted(Path(options.notebooks).glob("*.ipynb"))
    if not paths:
        raise SystemExit(f"no notebooks in {options.notebooks}; run this from the course's folder, or pass --notebooks")
    table = pd.DataFrame([run_notebook(path, Path(options.output), in_place=options.in_place, number=f"{i}/{len(paths)}")
                          for i, path in enumerate(paths, start=1)])
    print(table.drop(columns="error").to_string(index=False, justify="left", float_format="%.0f"))
    print(f"{table['seconds'].sum():.0f} seconds in all; pages are in {options.output}")
    errors = table.set_index("notebook")["error"].dropna()
    for notebook, error in errors.items():
        print(f"\n{notebook} broke at {error}", file=sys.stderr)
    return len(errors)


def run_notebook(path: Path, output: Path, *, in_place: bool = False, number: str = "1/1", timeout: int = 3600) -> dict:
    """Execute one notebook in a clean kernel and write it, executed, and its page to ``output``.

    Returns its name, its seconds, its result in one line and the error that broke it, if one did.
    ``in_place`` also stores the executed notebook over ``path`` and the figure of its cell tagged ``picture`` in
    ``images/`` beside it, unless it broke. A cell may take ``timeout`` seconds; only one that hangs reaches an hour.
    """
    try:
        notebook = nbformat.read(path, as_version=4)
    except Exception as failure:  # no JSON, or JSON that is no notebook
        return {"notebook": path.stem, "seconds": 0.0, "result": BROKEN, "error": f"reading the file:\n{failure}"}
    start = perf_counter()
    error = _execute(notebook, path.parent, f"{number} {path.stem}", timeout)
    notebook.metadata.pop("widgets", None)  # nbclient needs the widgets' state while it runs, the stored notebook does not
    seconds = perf_counter() - start

    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / path.name, partial(nbformat.write, notebook))
    write_whole(output / f"{path.stem}.html", partial(Path.write_text, data=page(notebook), encoding="utf-8"))
    if in_place and error is None:
        write_whole(path, partial(nbformat.write, notebook))
        if outputs := _outputs(notebook, "picture"):
            (figure,) = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
            picture = path.parent / "images" / f"{path.stem}.png"
            picture.parent.mkdir(exist_ok=True)
            write_whole(picture, partial(Path.write_bytes, data=base64.b64decode(figure)))
    result = "".join(output.get("text", "") for output in _outputs(notebook, "result")).strip()
    return {"notebook": path.stem, "seconds": seconds, "result": BROKEN if error else result, "error": error}


def page(notebook) -> str:
    """An executed notebook as an HTML page, whose formulas need no network."""
    renderer = IPythonRenderer(escape=False)
    # As MathML, which a browser draws by itself; nbconvert's own pages fetch a library for their formulas.
    renderer.inline_math = convert
    renderer.block_math = partial(convert, display="block")
    markdown2html = MarkdownWithMath(renderer).render
    return HTMLExporter(raw_template=PAGE, filters={"markdown2html": markdown2html}).from_notebook_node(notebook)[0]


def _execute(notebook, folder: Path, title: str, timeout: int) -> str | None:
    """Execute a notebook from clean, with a bar of its code cells; returns which cell broke and how, if one did."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    for cell in code:
        cell.outputs, cell.execution_count = [], None  # what an earlier run left must not pass for this one's
    started = []
    with tqdm(total=len(code), desc=title, unit="cell", disable=False) as bar:
        client = NotebookClient(notebook, timeout=timeout, iopub_timeout=60, kernel_name="python3", record_timing=False,
                                coalesce_streams=True,  # or one line of output may be stored as two
                                extra_arguments=["--log-level=ERROR"],  # no advice amid the bars
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


def _outputs(notebook, tag: str) -> list:
    """The outputs of the cells that have a tag."""
    return [output for cell in notebook.cells if tag in cell.metadata.get("tags", []) for output in cell.outputs]
