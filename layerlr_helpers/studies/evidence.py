"""The course's claims, each beside what the recorded studies say of it.

A claim is a row of ``data/claims.csv``: in a task of a study, the strategy ``better`` beats the strategy ``baseline``; where it
names ``rates``, only runs at these rates count. Whether that is so is read from the rows of ``data/results``.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from layerlr_helpers.intervals import interval_text, paired_intervals
from layerlr_helpers.studies.results import recorded, verdict


def check(folder: str | Path = "../data") -> pd.DataFrame:
    """Check every claim of ``claims.csv`` in a folder against the rows in ``results`` beside it.

    One row per claim: the columns of ``claims.csv``, and ``difference``, ``low`` and ``high`` (points of test accuracy, with a
    95 % interval), ``seeds`` and ``verdict``: "holds", "the opposite holds" or "cannot be told".
    """
    claims = pd.read_csv(Path(folder) / "claims.csv", dtype={"rates": str})
    studies = {study: recorded(study, Path(folder) / "results") for study in claims["study"].unique()}
    intervals = []
    for claim in claims.itertuples():
        rows = studies[claim.study]
        rows = rows[(rows["task"] == claim.task) & rows["strategy"].isin([claim.better, claim.baseline])]
        if pd.notna(claim.rates):
            rows = rows[rows["rates"] == claim.rates]
        table = paired_intervals(rows, claim.baseline)
        if claim.better not in table.index:
            raise ValueError(f"no strategy {claim.better!r} was tested in {claim.study}, task {claim.task}")
        intervals.append(table.loc[claim.better])
    checked = claims.join(pd.DataFrame(intervals).reset_index(drop=True)).astype({"seeds": int})
    return checked.assign(verdict=checked.apply(verdict, axis=1).replace({"better": "holds", "worse": "the opposite holds"}))


def markdown(checked: pd.DataFrame) -> str:
    """Return the rows of :func:`check` as a table in Markdown."""
    return markdown_table(("claim", "difference in accuracy (points, 95 %)", "seeds", "verdict"),
                          ((row["claim"], interval_text(row), row["seeds"], row["verdict"]) for _, row in checked.iterrows()))


def markdown_table(header: Sequence[str], rows: Iterable[Sequence]) -> str:
    """Return a table in Markdown."""
    first, *others = [f"| {' | '.join(map(str, row))} |" for row in (header, *rows)]
    return "\n".join([first, "|---" * len(header) + "|", *others])
