"""Rows of results in a CSV file that an interruption at any moment leaves whole."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd


def read_rows(path: str | Path) -> pd.DataFrame:
    """The rows of a file, or none where there is no file; names such as ``0.1, 0.5`` stay text."""
    path = Path(path)
    return pd.read_csv(path, dtype={"rates": str}) if path.exists() else pd.DataFrame()


def append_row(path: str | Path, row: Mapping[str, object]) -> None:
    """Add one row: the whole file is written anew beside the old one and takes its place in one stroke.

    Raises:
        ValueError: the file has other columns than the row.
        FileNotFoundError: no folder for the file.
    """
    path = Path(path)
    rows = read_rows(path)
    if len(rows) and list(rows.columns) != list(row):
        raise ValueError(f"{path} has the columns {list(rows.columns)}, and the row has {list(row)}; write to another file")
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8", newline="") as file:
        pd.concat([rows, pd.DataFrame([row])] if len(rows) else [pd.DataFrame([row])]).to_csv(file, index=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def missing(path: str | Path, wanted: Iterable[tuple], columns: Sequence[str]) -> list[tuple]:
    """Those of the wanted combinations of values in ``columns`` that the file does not have yet."""
    rows = read_rows(path)
    done = set(rows[list(columns)].astype(str).itertuples(index=False, name=None)) if len(rows) else set()
    return [values for values in wanted if tuple(map(str, values)) not in done]
