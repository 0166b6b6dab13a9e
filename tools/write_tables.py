"""Write the tables of README.md, docs/evidence.md and data/README.md anew: ``python tools/write_tables.py``."""

from pathlib import Path

from layerlr_helpers.intervals import interval_text, paired_intervals
from layerlr_helpers.studies.evidence import check, markdown, markdown_table
from layerlr_helpers.studies.results import read_rows, recorded, winners

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/evidence.md", "data/README.md")  # their tables stand between two marks such as <!-- claims -->


def peers(folder: Path) -> str:
    """The fine-tunes of other libraries beside ours (``benchmarks/peers_finetune.py``)."""
    rows, baseline = recorded("peers", folder / "results").query("split == 'test'"), "ours, layer decay"
    intervals = paired_intervals(rows, baseline)
    seconds = rows.pivot(index="seed", columns="strategy", values="seconds")
    ratios = seconds.div(seconds[baseline], axis=0).median()
    lines = [(name, f"{row['mean']:.1f}", interval_text(row), f"{ratios[name]:.2f}") for name, row in intervals.iterrows()]
    table = markdown_table(("way to fine-tune", "accuracy (%)", "difference (points, 95 %)", "seconds, as a ratio"), lines)
    head_first = paired_intervals(rows, "ours, head, then all").loc["fastai fine_tune"]
    return (f"{table}\n\n*fastai fine_tune*, which trains the head first, minus *ours, head, then all*: "
            f"{interval_text(head_first)}.")


def edges(folder: Path) -> str:
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
    return markdown_table(("file", "task", "strategy", "best rate", "of those tried"), at_edges)


TABLES = {"headlines": lambda folder: markdown(check(folder).query("headline")),
          "claims": lambda folder: markdown(check(folder)),
          "peers": peers,
          "edges": edges}


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
    for name in PAGES:
        page = ROOT / name
        page.write_text(renewed(page.read_text(encoding="utf-8"), ROOT / "data"), encoding="utf-8")
        print(f"wrote the tables of {name}")


if __name__ == "__main__":
    main()
