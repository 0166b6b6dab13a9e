"""Write the tables of README.md and docs/evidence.md anew: ``python tools/write_tables.py``."""

from functools import partial
from pathlib import Path

import pandas as pd

from layerlr_helpers.intervals import interval_text, mean_interval, paired_intervals
from layerlr_helpers.studies.evidence import check, markdown, markdown_table
from layerlr_helpers.studies.results import differences, recorded

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/evidence.md")  # their tables stand between two marks such as <!-- claims -->


def claims(folder: Path) -> str:
    """All claims, and how many of their intervals one must expect to miss."""
    checked = check(folder)
    number = checked["verdict"].value_counts()
    holds, opposite, unknown = (number.get(word, 0) for word in ("holds", "the opposite holds", "cannot be told"))
    return (f"{markdown(checked)}\n\nOf these {len(checked)} claims, {holds} hold and {unknown} cannot be told; for the other "
            f"{opposite} the opposite holds. Of {len(checked)} intervals of 95 %, about {round(0.05 * len(checked))} miss the "
            "true difference by chance.")


def shifts(folder: Path) -> str:
    """Accuracy by what was trained under each shift, while BatchNorm's statistics follow the new images or are held."""
    held = recorded("input-shifts-held", folder / "results").assign(batch_norm="old")
    rows = pd.concat([recorded("input-shifts", folder / "results").assign(batch_norm="new"), held]).query("split == 'test'")
    means = 100 * rows.pivot_table("accuracy", "strategy", ["task", "batch_norm"], sort=False)
    means = means[[(task, which) for task in rows["task"].unique() for which in ("new", "old")]]
    return _percent_table(means.set_axis([f"{task}, {which} statistics" for task, which in means], axis=1))


def accuracies(folder: Path, study: str, columns: str) -> str:
    """Mean test accuracies of a study's strategies, a column for each of its tasks or rates."""
    tested = recorded(study, folder / "results").query("split == 'test'")
    return _percent_table(100 * tested.pivot_table("accuracy", "strategy", columns, sort=False))


def _percent_table(means: pd.DataFrame) -> str:
    lines = [(way, *(f"{value:.1f}" if value == value else "" for value in row)) for way, row in means.iterrows()]
    return markdown_table(("what trains", *means), lines)


def contest(folder: Path, study: str, baseline: str) -> str:
    """All strategies of a study beside one of them, a table for each task."""
    tables = []
    for task, rows in recorded(study, folder / "results").groupby("task", sort=False):
        table = differences(rows, baseline)
        tables.append(f"{task}:\n\n{markdown_table(('strategy', *table.columns), table.itertuples(name=None))}")
    return "\n\n".join(tables)


def heads(folder: Path) -> str:
    """The head alone on photographs, by the number and the size of the images (``benchmarks/photograph_heads.py``)."""
    rows = recorded("photographs-heads", folder / "results")
    rows[["size", "images"]] = rows["strategy"].str.extract(r"(\d+) pixels, (.*)")
    table = {key: mean_interval(100 * same["accuracy"]) for key, same in rows.groupby(["size", "images"], sort=False)}
    amounts = list(dict.fromkeys(rows["images"]))
    lines = [(f"{size} pixels", *(f"{each['mean']:.1f} ({each['low']:.1f} to {each['high']:.1f})"
                                  for each in (table[size, images] for images in amounts))) for size in rows["size"].unique()]
    small = paired_intervals(rows, f"128 pixels, {amounts[0]}")
    larger, more = small.loc[f"224 pixels, {amounts[0]}"], small.loc["128 pixels, all images"]
    return (f"{markdown_table(('accuracy (%, 95 %)', *amounts), lines)}\n\nCompared with 128 pixels and {amounts[0]}, images "
            f"of 224 pixels are worth {interval_text(larger)} points, and all training images {interval_text(more)}.")


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


TABLES = {"headlines": lambda folder: markdown(check(folder).query("headline")),
          "claims": claims,
          "shifts": shifts,
          "ablation": partial(contest, study="ablation", baseline="AdamW"),
          "photographs": partial(contest, study="photographs-ablation", baseline="AdamW"),
          "sentences": partial(contest, study="text-strategies", baseline="one rate"),
          "sentence_rates": partial(accuracies, study="text-robustness", columns="rates"),
          "sentence_numbers": partial(accuracies, study="text-labels", columns="task"),
          "sentence_shifts": partial(accuracies, study="text-surgery", columns="task"),
          "heads": heads,
          "peers": peers}


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
