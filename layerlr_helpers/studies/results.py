"""Rows of results in a CSV file that an interruption at any moment leaves whole, and what can be read from them."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd
from filelock import FileLock

KEY = ["split", "task", "strategy", "rates", "seed"]  # what tells one run from another
TEXTS = [*KEY[:4], "precision", "torch", "device", "library"]  # never read as numbers or as missing, whatever they look like


class RecordError(ValueError):
    """A file of results that does not go with what was asked of it; the message says why, and what would."""


def read_rows(path: str | Path) -> pd.DataFrame:
    """The rows of a file, or none where there is no file; names such as ``0.1, 0.5`` stay text.

    Raises:
        RecordError: the file has not the columns that tell one run from another.
    """
    path = Path(path)
    if not path.exists():
        return no_rows()
    columns = pd.read_csv(path, nrows=0).columns
    if lacking := [name for name in KEY if name not in columns]:
        raise RecordError(f"{path} holds no recorded runs: it has no column {', '.join(lacking)}; give another file")
    return pd.read_csv(path, dtype={"threads": "Int64"} | dict.fromkeys(TEXTS, str), keep_default_na=False,
                       na_values={name: [""] for name in columns.difference(TEXTS)})


def no_rows() -> pd.DataFrame:
    """What a study starts from."""
    return pd.DataFrame(columns=KEY)


def append_row(path: str | Path, row: Mapping[str, object]) -> None:
    """Add one row: the whole file is written anew beside the old one and takes its place in one stroke.

    Several processes may add to one file: each waits for its turn, by a lock that the system takes back from a dead one. A
    run that is there by then stays as it is.

    Raises:
        RecordError: the file has other columns than the row.
        FileNotFoundError: no folder for the file.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} for {path.name}; make it first")
    with FileLock(path.with_name(f".{path.name}.lock")):
        rows = read_rows(path)
        if len(rows) and list(rows.columns) != list(row):
            raise RecordError(f"{path} has the columns {list(rows.columns)}, and the row has {list(row)}; "
                              "write to another file")
        if not missing(rows, [tuple(row[name] for name in KEY)]):
            return
        temporary = path.with_name(path.name + ".tmp")
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            pd.concat([rows, pd.DataFrame([row])] if len(rows) else [pd.DataFrame([row])]).to_csv(file, index=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def missing(rows: pd.DataFrame, wanted: Iterable[tuple]) -> list[tuple]:
    """Those of the wanted runs (values of ``KEY``) that the rows do not have yet."""
    done = set(_keys(rows))
    return [run for run in wanted if tuple(map(str, run)) not in done]


def chosen_rows(rows: pd.DataFrame, wanted: Iterable[tuple]) -> pd.DataFrame:
    """The rows of the wanted runs (values of ``KEY``), in the order that they are wanted in."""
    place = {key: i for i, key in enumerate(_keys(rows))}
    return rows.iloc[[place[tuple(map(str, run))] for run in wanted]].reset_index(drop=True)


def _keys(rows: pd.DataFrame) -> list[tuple]:
    return list(rows[KEY].astype(str).itertuples(index=False, name=None)) if len(rows) else []


def winners(rows: pd.DataFrame, tries: Mapping[str, Iterable[str]] | None = None) -> dict[str, str]:
    """For each strategy the rates with the best mean accuracy on the validation images; the lower loss breaks a tie.

    ``tries`` are the rates to choose from for each strategy; None chooses from all that were tried.
    """
    searched = rows[rows["split"] == "validation"].groupby(["strategy", "rates"], sort=False)[["accuracy", "loss"]].mean()
    searched["accuracy"] = searched["accuracy"].round(9)  # (0.7 + 0.1) / 2 and 0.4 are a tie
    best_first = searched.reset_index().sort_values(["accuracy", "loss"], ascending=[False, True])
    tries = {name: list(best_first["rates"]) for name in rows["strategy"].unique()} if tries is None else tries
    chosen = {}
    for name, its in tries.items():
        its_tries = best_first[(best_first["strategy"] == name) & best_first["rates"].isin(list(its))]
        chosen[name] = its_tries["rates"].iloc[0]
    return chosen
