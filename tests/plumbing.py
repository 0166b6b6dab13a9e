"""How much of a notebook's visible code is plumbing: code that joins records, styles axes or puts sentences together."""

import ast

# Calls by which a statement is known as plumbing: the last name of what is called.
SENTENCES = {"Markdown"}
JOINS = {"concat", "groupby", "interval_text", "melt", "merge", "paired_intervals", "pivot", "pivot_table", "read_rows",
         "reset_index", "set_index", "stack", "to_html", "unstack", "winners"}
STYLE = {"annotate", "axhline", "axvline", "bar", "barh", "errorbar", "fill_between", "grid", "invert_yaxis", "label_outer",
         "legend", "minorticks_off", "plot", "scatter", "set", "set_axis_off", "set_dpi", "set_title", "set_xlabel",
         "set_xscale", "set_xticklabels", "set_xticks", "set_ylabel", "set_ylim", "set_yscale", "set_yticks", "subplots",
         "suptitle", "text", "tick_params", "twinx"}


def is_hidden(cell) -> bool:
    """Whether a code cell is folded, in JupyterLab and on the built pages."""
    return "hide-input" in cell.metadata.get("tags", []) and bool(cell.metadata.get("jupyter", {}).get("source_hidden"))


def plumbing_share(cells) -> float:
    """The part of the characters of the visible code cells that is plumbing; 0 where no code is visible."""
    sources = ["".join(cell.source) for cell in cells if cell.cell_type == "code" and not is_hidden(cell)]
    visible = sum(map(_characters, sources))
    return sum(map(plumbing_characters, sources)) / visible if visible else 0.0


def plumbing_characters(source: str) -> int:
    """Number of characters, but for blanks, of the innermost statements that are plumbing."""
    lines = [line if not line.lstrip().startswith(("%", "!")) else "" for line in source.splitlines()]
    plain = "\n".join(lines)
    return sum(_characters(ast.get_source_segment(plain, statement) or "") for statement in _innermost(ast.parse(plain))
               if _is_plumbing(statement))


def _characters(text: str) -> int:
    return len("".join(text.split()))


def _innermost(node: ast.AST):
    """The statements that hold no other statement, in order."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            inside = list(_innermost(child))
            if inside:
                yield from inside
            else:
                yield child
        elif isinstance(child, ast.ExceptHandler):
            yield from _innermost(child)


def _is_plumbing(statement: ast.stmt) -> bool:
    nodes = list(ast.walk(statement))
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    methods = {call.func.attr for call in calls if isinstance(call.func, ast.Attribute)}
    names = methods | {call.func.id for call in calls if isinstance(call.func, ast.Name)}
    if names & (SENTENCES | JOINS) or any(keyword.arg == "alt" for call in calls for keyword in call.keywords):
        return True
    if "show" in methods:  # the one call that a figure needs
        return False
    return bool(methods & STYLE) or (not _is_message(statement, names) and _is_mostly_text(statement, nodes))


def _is_message(statement: ast.stmt, names: set[str]) -> bool:
    return isinstance(statement, ast.Raise) or (isinstance(statement, ast.Expr) and "print" in names)


def _is_mostly_text(statement: ast.stmt, nodes: list[ast.AST]) -> bool:
    """Whether more than half of a statement is text that is put together from numbers."""
    formatted = sum(_characters(ast.unparse(node)) for node in nodes if isinstance(node, ast.JoinedStr))
    return formatted > 40 and formatted > 0.5 * _characters(ast.unparse(statement))
