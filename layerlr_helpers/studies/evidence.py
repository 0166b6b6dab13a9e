"""The course's claims, each beside what the recorded studies say of it.

A claim names two strategies of a study, and says that the first does better. Whether it does is read from the rows of
``data/results``: the mean difference in test accuracy on the same seeds, with a 95 % interval.

In the course folder, ``python -m layerlr_helpers.studies.evidence`` writes the tables of README.md and docs/evidence.md anew.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from layerlr_helpers.intervals import interval_text, paired_intervals
from layerlr_helpers.studies.results import read_rows, winners

DIGITS = "digits, 40 steps"
SHIFTS = {"Blurred images": "blurred", "Noisy images": "noisy", "Renumbered classes": "permuted",
          "Handwriting, 5 labels a class": "handwriting"}
PHOTO_TASKS = {"Photographs of waste": "trashnet, quantised ImageNet",
               "Photographs of ants and bees": "ants and bees, quantised ImageNet"}


@dataclass(frozen=True)
class Claim:
    """That ``better`` beats ``baseline`` in a task of a study; with ``rates``, only runs at these rates count."""

    text: str
    study: str
    task: str
    better: str
    baseline: str
    rates: str | None = None
    headline: bool = False


def _of_photographs(name: str, task: str) -> list[Claim]:
    pairs = {"pretrained weights beat random ones": ("uniform", "from scratch"),
             "training every layer beats the head alone": ("uniform", "head only"),
             "two rates beat one rate": ("two rates", "uniform"),
             "layer decay beats one rate": ("layer decay", "uniform"),
             "early small, late large beats the reverse": ("layer decay", "reversed decay"),
             "layer decay beats two rates": ("layer decay", "two rates"),
             "gradual unfreezing adds to layer decay": ("gradual, layer decay", "layer decay"),
             "the head first, then everything adds to two rates": ("head, then all", "two rates"),
             "a pull towards the pretrained weights beats one rate": ("L2-SP", "uniform")}
    headlines = ("layer decay beats one rate", "training every layer beats the head alone")
    chosen = [Claim(f"{name}: {text}", "photographs", task, *pair, headline=text in headlines) for text, pair in pairs.items()]
    return chosen + [Claim(f"{name}: at a head rate of {rate}, layer decay 0.5 beats one rate",
                           "photographs-robustness", task, "decay 0.5", "uniform", rates)
                     for rate, rates in (("1e-3", "0.001"), ("3e-3", "0.003"))]


CLAIMS = (
    Claim("Pretrained weights beat random ones", "strategies", "digits", "uniform", "from scratch",
          headline=True),
    Claim("With 10 labels a class and 100 steps, training every layer beats the head alone", "strategies", "digits", "uniform",
          "head only"),
    Claim("With 10 labels a class and 40 steps, training every layer beats the head alone", "labels", "10 a class", "uniform",
          "head only"),
    Claim("A small rate for the backbone and a large one for the head beat one rate", "strategies", "digits", "two rates",
          "uniform"),
    Claim("Layer decay beats one rate", "strategies", "digits", "layer decay", "uniform",
          headline=True),
    Claim("Early small, late large beats the reverse", "strategies", "digits", "layer decay", "reversed decay",
          headline=True),
    Claim("Layer decay beats two rates", "strategies", "digits", "layer decay", "two rates"),
    Claim("Gradual unfreezing adds to two rates", "strategies", "digits", "gradual", "two rates"),
    Claim("Gradual unfreezing adds to layer decay", "strategies", "digits", "gradual, layer decay", "layer decay",
          headline=True),
    Claim("The head first, then everything (LP-FT) adds to two rates", "strategies", "digits", "head, then all", "two rates"),
    Claim("A pull towards the pretrained weights (L2-SP) beats one rate", "strategies", "digits", "L2-SP", "uniform"),
    Claim("At a head rate of 3e-3, layer decay 0.5 beats one rate", "robustness", DIGITS, "decay 0.5", "uniform",
          "0.003"),
    Claim("At a head rate of 1e-2, layer decay 0.5 beats one rate", "robustness", DIGITS, "decay 0.5", "uniform",
          "0.01", headline=True),
    Claim("With 2 labels a class, layer decay beats one rate", "labels", "2 a class", "layer decay", "uniform"),
    Claim("With 50 labels a class, layer decay beats one rate", "labels", "50 a class", "layer decay", "uniform"),
    Claim("Blurred images: an early stage alone beats the head alone", "surgery", "blurred", "layer1", "head"),
    Claim("Blurred images: one early stage beats tuning everything", "surgery", "blurred", "layer1", "all",
          headline=True),
    Claim("Noisy images: an early stage alone beats the head alone", "surgery", "noisy", "layer1", "head"),
    Claim("Renumbered classes: the head alone beats an early stage", "surgery", "permuted", "head", "layer1"),
    Claim("Renumbered classes: the head alone beats tuning everything", "surgery", "permuted", "head", "all",
          headline=True),
    Claim("Handwriting, 5 labels a class: the head alone beats tuning everything", "surgery", "handwriting", "head", "all"),
    *(Claim(f"{name}: layer decay beats one rate", "surgery", task, "layer decay", "all") for name, task in SHIFTS.items()),
    *(Claim(f"{name}: early small, late large beats the reverse", "surgery", task, "layer decay", "reversed decay",
            headline=task in ("blurred", "handwriting")) for name, task in SHIFTS.items()),
    Claim("A one-cycle schedule beats a constant rate, with one rate for all", "schedules", DIGITS, "one cycle, uniform",
          "constant, uniform"),
    Claim("A one-cycle schedule beats a constant rate, with layer decay", "schedules", DIGITS, "one cycle, layer decay",
          "constant, layer decay"),
    Claim("Three kept stages are better fine-tuned than frozen", "depth", DIGITS, "keep 3, fine-tuned", "keep 3, frozen"),
    Claim("Keeping five stages beats keeping one", "depth", DIGITS, "keep 5, fine-tuned", "keep 1, fine-tuned"),
    Claim("Rates in proportion to the first batch's relative gradients beat layer decay by hand", "automatic", DIGITS,
          "relative gradients, first batch", "layer decay"),
    Claim("Auto-RGN beats layer decay by hand", "automatic", DIGITS, "Auto-RGN, every batch", "layer decay"),
    *(claim for name, task in PHOTO_TASKS.items() for claim in _of_photographs(name, task)),
    Claim("LayerAdaptiveLR in Adam's direction beats AdamW, both under one-cycle", "optimizers", DIGITS, "adam", "AdamW",
          headline=True),
)


def check(claims: Iterable[Claim], folder: str | Path) -> pd.DataFrame:
    """One row a claim: ``claim``, ``study``, ``difference``, ``low``, ``high`` (points), ``seeds`` and ``verdict``.

    The verdict is "holds" where the interval is above 0, "the opposite holds" where it is below, else "cannot be told".

    Raises:
        ValueError: a strategy of a claim was not tested.
    """
    rows = []
    for claim in claims:
        study = read_rows(Path(folder) / f"{claim.study}.csv")
        study = study[(study["task"] == claim.task) & study["strategy"].isin([claim.better, claim.baseline])]
        if claim.rates is not None:
            study = study[study["rates"] == claim.rates]
        found = paired_intervals(study, claim.baseline)
        if claim.better not in found.index:
            raise ValueError(f"no strategy {claim.better!r} was tested in {claim.study}, task {claim.task}")
        found = found.loc[claim.better]
        verdict = "holds" if found["low"] > 0 else "the opposite holds" if found["high"] < 0 else "cannot be told"
        rows.append({"claim": claim.text, "study": claim.study, "difference": found["difference"], "low": found["low"],
                     "high": found["high"], "seeds": int(found["seeds"]), "verdict": verdict})
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame) -> str:
    """The rows of :func:`check` as a table in Markdown."""
    lines = ["| claim | difference in accuracy (points, 95 %) | seeds | verdict |", "|---|---|---|---|"]
    lines += [f"| {row['claim']} | {interval_text(row)} | {row['seeds']} | {row['verdict']} |"
              for row in table.to_dict("records")]
    return "\n".join(lines)


def peers(folder: str | Path) -> str:
    """The fine-tunes of other libraries beside ours (``benchmarks/peers_finetune.py``) as a table in Markdown."""
    rows = read_rows(Path(folder) / "peers.csv")
    tested, baseline = rows[rows["split"] == "test"], "ours, layer decay"
    table = paired_intervals(tested, baseline)
    seconds = tested.pivot(index="seed", columns="strategy", values="seconds")
    ratios = seconds.div(seconds[baseline], axis=0).median()
    lines = ["| way to fine-tune | accuracy (%) | difference (points, 95 %) | seconds, as a ratio |", "|---|---|---|---|"]
    lines += [f"| {name} | {row['mean']:.1f} | {interval_text(row)} | {ratios[name]:.2f} |" for name, row in table.iterrows()]
    head_first = paired_intervals(tested, "ours, head, then all").loc["fastai fine_tune"]
    also = f"*fastai fine_tune*, which trains the head first, minus *ours, head, then all*: {interval_text(head_first)}."
    return "\n".join([*lines, "", also])


def edges(folder: str | Path) -> str:
    """Where the best rate is the lowest or the highest of those tried, so that a better one may lie beyond: a Markdown table.

    Of the searches whose tries are one number each.
    """
    found = []
    for path in sorted(Path(folder).glob("*.csv")):
        rows = read_rows(path).query("split == 'validation'")
        rows = rows[~rows["rates"].str.contains(",")]
        for task, of_task in rows.groupby("task", sort=False):
            ends = of_task["rates"].astype(float).groupby(of_task["strategy"], sort=False).agg(["min", "max"])
            found += [(path.name, task, name, rate, "lowest" if float(rate) == ends.loc[name, "min"] else "highest")
                      for name, rate in winners(of_task).items() if float(rate) in tuple(ends.loc[name])]
    lines = ["| file | task | strategy | best rate | of those tried |", "|---|---|---|---|---|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in found])


TABLES = {"headlines": lambda folder: markdown(check([claim for claim in CLAIMS if claim.headline], folder)),
          "claims": lambda folder: markdown(check(CLAIMS, folder)),
          "peers": peers,
          "edges": edges}
PAGES = ("README.md", "docs/evidence.md", "data/README.md")  # in which tables stand between two marks such as <!-- claims -->


def renewed(text: str, folder: str | Path) -> str:
    """A page with the tables between its marks made anew from the results in ``folder``."""
    for name, table in TABLES.items():
        mark = f"<!-- {name} -->"
        if mark in text:
            before, _, after = text.split(mark)
            text = f"{before}{mark}\n{table(folder)}\n{mark}{after}"
    return text


def main() -> None:
    """Write the tables of all pages anew."""
    for page in map(Path, PAGES):
        page.write_text(renewed(page.read_text(encoding="utf-8"), "data/results"), encoding="utf-8")
        print(f"wrote the tables of {page}")


if __name__ == "__main__":
    main()
