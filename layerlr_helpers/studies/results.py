"""The recorded runs: a CSV file with a row for each run, which no interruption can damage, and what can be read from it."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd
from filelock import FileLock

from layerlr_helpers.files import write_whole
from layerlr_helpers.intervals import interval_text, paired_intervals

KEY = ["split", "task", "strategy", "rates", "seed"]  # what tells one run from another
TEXT_COLUMNS = [*KEY[:4], "precision", "torch", "device", "library", "texts"]  # never read as numbers or as missing values


class RecordError(ValueError):
    """A file of results does not fit what was asked of it; the message says why, and what would fit."""


def read_rows(path: str | Path) -> pd.DataFrame:
    """Return the rows of a file of recorded runs, or no rows if there is no file; rates such as ``0.1, 0.5`` stay text."""
    if not Path(path).exists():
        return pd.DataFrame(columns=KEY)
    columns = pd.read_csv(path, nrows=0).columns
    if lacking := [name for name in KEY if name not in columns]:
        raise RecordError(f"{path} holds no recorded runs: it has no column {', '.join(lacking)}; give another file")
    return pd.read_csv(path, dtype={"threads": "Int64"} | dict.fromkeys(TEXT_COLUMNS, str), keep_default_na=False,
                       na_values={name: [""] for name in columns.difference(TEXT_COLUMNS)})


def recorded(study: str, folder: str | Path = "../data/results") -> pd.DataFrame:
    """Return the rows of a recorded study, e.g. ``recorded("depth")`` in a notebook of the course."""
    path = Path(folder) / f"{study}.csv"
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in Path(folder).glob("*.csv")))
        raise FileNotFoundError(f"no study {study!r} is recorded in {folder}; recorded are: {known or 'none'}")
    return read_rows(path)


def append_row(path: str | Path, row: Mapping[str, object]) -> None:
    """Add one row to a file, unless the file already has this run; a row of other columns is a RecordError.

    Several processes may add to one file: each waits for its turn, by a lock that the system takes back if a process dies.
    """
    path = Path(path)
    with FileLock(path.with_name(f".{path.name}.lock")):
        rows = read_rows(path)
        if len(rows) and list(rows.columns) != list(row):
            raise RecordError(f"{path} has the columns {list(rows.columns)}, and the row has {list(row)}; "
                              "write to another file")
        if missing(rows, [tuple(row[name] for name in KEY)]):
            write_whole(path, lambda temporary: with_row(rows, row).to_csv(temporary, index=False))


def with_row(rows: pd.DataFrame, row: Mapping[str, object]) -> pd.DataFrame:
    """Return the rows and one more, as a new table."""
    last = pd.DataFrame([row])
    return pd.concat([rows, last], ignore_index=True) if len(rows) else last  # no rows have no types to keep


def missing(rows: pd.DataFrame, wanted: Iterable[tuple]) -> list[tuple]:
    """Return those of the wanted runs (tuples of the values of ``KEY``) that the rows do not have."""
    done = set(_keys(rows))
    return [run for run in wanted if tuple(map(str, run)) not in done]


def chosen_rows(rows: pd.DataFrame, wanted: Iterable[tuple]) -> pd.DataFrame:
    """Return the rows of the wanted runs (tuples of the values of ``KEY``), in the order of ``wanted``."""
    position = {key: i for i, key in enumerate(_keys(rows))}
    return rows.iloc[[position[tuple(map(str, run))] for run in wanted]].reset_index(drop=True)


def _keys(rows: pd.DataFrame) -> Iterable[tuple]:
    return rows[KEY].astype(str).itertuples(index=False, name=None)


def winners(rows: pd.DataFrame) -> dict[str, str]:
    """Return, for each strategy, the rates with the best mean accuracy on the validation images, as :func:`ranked` says.

    The rows are those of one task.
    """
    best_rates = ranked(rows).drop_duplicates("strategy").set_index("strategy")["rates"]
    return {name: best_rates[name] for name in rows[rows["split"] == "validation"]["strategy"].unique()}


def ranked(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rates that were tried on validation images, best first: strategy, rates, seeds, mean accuracy and loss.

    Those that were tried on the most seeds come before the others of their strategy, then the highest accuracy counts, and the
    lower loss breaks a tie.
    """
    tried = rows[rows["split"] == "validation"].groupby(["strategy", "rates"], sort=False)
    table = tried.agg(seeds=("seed", "size"), accuracy=("accuracy", "mean"), loss=("loss", "mean")).reset_index()
    table["accuracy"] = table["accuracy"].round(9)  # (0.7 + 0.1) / 2 and 0.4 are a tie
    return table.sort_values(["seeds", "accuracy", "loss"], ascending=[False, False, True], kind="stable")


def differences(rows: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Return a table to read of :func:`paired_intervals`: what each strategy reaches, and how that compares to ``baseline``.

    One row per strategy, with the ``rates`` that were tested. The ``verdict`` is "better" or "worse" than the baseline if the
    whole interval is, else "cannot be told". The rows are those of one task; errors are those of ``paired_intervals``.
    """
    intervals = paired_intervals(rows, baseline)
    table = pd.DataFrame({
        "rates": rows[rows["split"] == "test"].groupby("strategy")["rates"].first(),
        "accuracy (%)": intervals["mean"].round(1),
        "difference (points, 95 %)": intervals.apply(interval_text, axis=1),
        "seeds": intervals["seeds"],
        "verdict": intervals.apply(verdict, axis=1)}).loc[intervals.index]
    table.loc[baseline, ["difference (points, 95 %)", "verdict"]] = "baseline"
    return table


def verdict(interval: Mapping[str, float]) -> str:
    """Say what an interval of a difference tells: "better", "worse" or "cannot be told"."""
    return "better" if interval["low"] > 0 else "worse" if interval["high"] < 0 else "cannot be told"
