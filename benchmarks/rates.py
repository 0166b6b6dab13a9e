"""Choose the rates of the notebooks' live comparisons on validation images: writes data/results/rates.csv.

Run with ``python benchmarks/rates.py [notebook …]``. Every strategy has the same number of tries.
"""

import sys
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from layerlr_helpers import (
    LayerAdaptiveLR,
    Strategy,
    Task,
    UnfreezePlan,
    handwritten_digits,
    head_and_backbone,
    layer_decay,
    uniform,
)
from layerlr_helpers.experiments import run

RESULTS = Path(__file__).parent.parent / "data" / "results" / "rates.csv"
SEEDS = (0, 1)


def head_only(groups, steps):
    return UnfreezePlan({groups[-1].name: 0})


def tries_of_notebook_02() -> dict[str, list[Strategy]]:
    """Six rates for each of five ways to fine-tune."""
    return {
        "from scratch": [Strategy(f"{lr:g}", uniform(lr), weights=None) for lr in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)],
        "head only": [Strategy(f"{lr:g}", uniform(lr), plan=head_only) for lr in (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)],
        "uniform": [Strategy(f"{lr:g}", uniform(lr)) for lr in (1e-4, 3e-4, 6e-4, 1e-3, 2e-3, 3e-3)],
        "two rates": [Strategy(f"{low:g}, {high:g}", head_and_backbone(backbone_lr=low, head_lr=high))
                      for low, high in ((1e-4, 1e-3), (1e-4, 3e-3), (3e-4, 1e-3), (3e-4, 3e-3), (3e-4, 1e-2), (1e-3, 3e-3))],
        "layer decay": [Strategy(f"{lr:g}, {decay:g}", layer_decay(lr, decay))
                        for lr in (1e-3, 3e-3) for decay in (0.3, 0.5, 0.7)],
    }


def tries_of_notebook_05() -> dict[str, list[Strategy]]:
    """Six rates, half a decade apart, for each of six optimizers."""
    grids = {"momentum": -2, "adam": -4, "layernorm": -4, "Adam": -4.5, "AdamW": -4.5, "SGD": -3.5}  # powers of ten to start at
    make = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW, "SGD": lambda groups: torch.optim.SGD(groups, momentum=0.9)}
    make |= {name: lambda groups, name=name: LayerAdaptiveLR(groups, direction=name) for name in grids if name not in make}
    rates = {name: [float(f"{10 ** (start + i / 2):.0e}") for i in range(6)] for name, start in grids.items()}
    return {name: [Strategy(f"{lr:g}", uniform(lr), optimizer=make[name]) for lr in rates[name]] for name in grids}


SEARCHES = {"02": (tries_of_notebook_02, {}), "05": (tries_of_notebook_05, {"epochs": 8})}


def main(notebooks: list[str]) -> None:
    """Run the searches of these notebooks, or of all, and put their rows in place of the earlier ones in the file."""
    for notebook in notebooks or SEARCHES:
        tries, budget = SEARCHES[notebook]
        task = Task(handwritten_digits(), **budget)
        runs = [(family, strategy, seed) for family, strategies in tries().items() for strategy in strategies for seed in SEEDS]
        rows = []
        for family, strategy, seed in tqdm(runs, desc=f"notebook {notebook}"):
            scores = run(strategy, task, seed, split="validation")
            rows.append({"notebook": notebook, "strategy": family, "rates": strategy.name, "seed": seed,
                         "accuracy": round(scores["accuracy"], 4), "loss": round(scores["loss"], 4), "steps": scores["steps"]})
        _store(notebook, pd.DataFrame(rows))


def _store(notebook: str, rows: pd.DataFrame) -> None:
    if RESULTS.exists():
        before = pd.read_csv(RESULTS, dtype={"notebook": str, "rates": str})
        rows = pd.concat([before[before["notebook"] != notebook], rows]).sort_values("notebook", kind="stable")
    RESULTS.parent.mkdir(exist_ok=True)
    rows.to_csv(RESULTS, index=False)


if __name__ == "__main__":
    main(sys.argv[1:])
