"""The course's claims, each beside what the recorded studies say of it.

A claim is a row of ``data/claims.csv``: in a task of a study, the strategy ``better`` beats the strategy ``baseline``; where it
names ``rates``, only runs at these rates count. Whether that is so is read from the rows of ``data/results``.

In the course folder, ``python -m layerlr_helpers.studies.evidence`` writes the tables of the pages anew.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from layerlr_helpers.intervals import interval_text, paired_intervals
from layerlr_helpers.studies.results import read_rows, recorded, verdict, winners

PAGES = ("README.md", "docs/evidence.md", "data/README.md")  # their tables stand between two marks such as <!-- claims -->


def check(folder: str | Path = "../data") -> pd.DataFrame:
    """Check every claim of ``claims.csv`` in a folder against the rows in ``results`` beside it.

    One row a claim: the columns of ``claims.csv``, and ``difference``, ``low`` and ``high`` (points of test accuracy, with a
    95 % interval), ``seeds`` and ``verdict``: "holds", "the opposite holds" or "cannot be told".

    Raises:
        ValueError: a strategy of a claim was not tested.
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
    words = {"better": "holds", "worse": "the opposite holds"}
    return checked.assign(verdict=checked.apply(verdict, axis=1).replace(words))


def markdown(checked: pd.DataFrame) -> str:
    """Return the rows of :func:`check` as a table in Markdown."""
    return _table(("claim", "difference in accuracy (points, 95 %)", "seeds", "verdict"),
                  ((row["claim"], interval_text(row), row["seeds"], row["verdict"]) for _, row in checked.iterrows()))


def _table(header: Sequence[str], rows: Iterable[Sequence]) -> str:
    first, *others = [f"| {' | '.join(map(str, row))} |" for row in (header, *rows)]
    return "\n".join([first, "|---" * len(header) + "|", *others])


def _peers(folder: Path) -> str:
    """The fine-tunes of other libraries beside ours (``benchmarks/peers_finetune.py``)."""
    rows, baseline = recorded("peers", folder / "results").query("split == 'test'"), "ours, layer decay"
    intervals = paired_intervals(rows, baseline)
    seconds = rows.pivot(index="seed", columns="strategy", values="seconds")
    ratios = seconds.div(seconds[baseline], axis=0).median()
    lines = [(name, f"{row['mean']:.1f}", interval_text(row), f"{ratios[name]:.2f}") for name, row in intervals.iterrows()]
    table = _table(("way to fine-tune", "accuracy (%)", "difference (points, 95 %)", "seconds, as a ratio"), lines)
    head_first = paired_intervals(rows, "ours, head, then all").loc["fastai fine_tune"]
    return (f"{table}\n\n*fastai fine_tune*, which trains the head first, minus *ours, head, then all*: "
            f"{interval_text(head_first)}.")


def _edges(folder: Path) -> str:
    """Where the best rate is the lowest or the highest candidate, so that a better one may lie beyond it.

    Only strategies whose candidates are one number each are looked at.
    """
    at_edges = []
    for path in sorted((folder / "results").glob("*.csv")):
        rows = read_rows(path).query("split == 'validation' and not rates.str.contains(',')")
        for task, task_rows in rows.groupby("task", sort=False):
            for name, best in winners(task_rows).items():
                candidates = task_rows.loc[task_rows["strategy"] == name, "rates"].astype(float)
                if float(best) in (candidates.min(), candidates.max()):
                    edge = "lowest" if float(best) == candidates.min() else "highest"
                    at_edges.append((path.name, task, name, best, edge))
    return _table(("file", "task", "strategy", "best rate", "of those tried"), at_edges)


TABLES = {"headlines": lambda folder: markdown(check(folder).query("headline")),
          "claims": lambda folder: markdown(check(folder)),
          "peers": _peers,
          "edges": _edges}


def renewed(page: str, folder: Path) -> str:
    """Return the text of a page with the tables between its marks made anew from the data in ``folder``."""
    for name, make_table in TABLES.items():
        mark = f"<!-- {name} -->"
        if mark in page:
            before, _, after = page.split(mark)
            page = f"{before}{mark}\n{make_table(folder)}\n{mark}{after}"
    return page


def main() -> None:
    """Write the tables of all pages anew."""
    for page in map(Path, PAGES):
        page.write_text(renewed(page.read_text(encoding="utf-8"), Path("data")), encoding="utf-8")
        print(f"wrote the tables of {page}")


if __name__ == "__main__":
    main()
