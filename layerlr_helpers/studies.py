"""The recorded studies: ``python -m layerlr_helpers.experiments NAME [--seeds N]``, ``--list`` names them.

In a study every strategy has the same number of tries of its rates, each on the validation images of two seeds. The best
try (by mean accuracy, the lower loss where two tie) is then tested once on every seed. All have the same steps, batches,
schedule and seeds. Each run is a row of ``data/results/NAME.csv``; a study that was interrupted goes on where it stopped.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from layerlr_helpers import experiments, results
from layerlr_helpers.datasets import handwritten_digits
from layerlr_helpers.experiments import Strategy, Task
from layerlr_helpers.layers import LayerGroup
from layerlr_helpers.optim import LayerAdaptiveLR
from layerlr_helpers.param_groups import Rates, head_and_backbone, layer_decay, uniform
from layerlr_helpers.unfreezing import UnfreezePlan

SEARCH_SEEDS = (0, 1)
Tries = Mapping[str, Sequence[Strategy]]


@dataclass(frozen=True)
class Study:
    """A question, the task that answers it, and for each strategy the rates to try; a try is named by its rates."""

    question: str
    task: Callable[[], Task]
    tries: Callable[[], Tries]


def conduct(study: Study, path: str | Path, seeds: Sequence[int], *, progress: bool = True) -> pd.DataFrame:
    """Make the runs of a study that its file does not have yet; returns all of its rows."""
    task, tries = study.task(), study.tries()
    try_of = {(name, strategy.name): strategy for name, strategies in tries.items() for strategy in strategies}
    searched = [("validation", *named, seed) for named in try_of for seed in SEARCH_SEEDS]
    _make(searched, task, try_of, path, "choosing rates", progress)
    chosen = winners(results.read_rows(path))
    tested = [("test", name, chosen[name], seed) for seed in seeds for name in tries]
    _make(tested, task, try_of, path, "testing", progress)
    return results.read_rows(path)


def winners(rows: pd.DataFrame) -> dict[str, str]:
    """For each strategy the rates with the best mean accuracy on the validation images; the lower loss breaks a tie."""
    searched = rows[rows["split"] == "validation"].groupby(["strategy", "rates"], sort=False)[["accuracy", "loss"]].mean()
    best_first = searched.reset_index().sort_values(["accuracy", "loss"], ascending=[False, True])
    chosen = best_first.drop_duplicates("strategy").set_index("strategy")["rates"]
    return {name: chosen[name] for name in rows["strategy"].unique()}


def paired_intervals(rows: pd.DataFrame, baseline: str, *, seed: int = 0, draws: int = 10_000) -> pd.DataFrame:
    """Each strategy's test accuracy and its difference to ``baseline`` on the same seeds, with a bootstrap interval.

    One row a strategy, in percent and points: ``mean``, ``difference``, ``low`` and ``high`` (the 2.5 and 97.5 percentiles of
    the mean difference when the seeds are drawn anew with replacement; Efron, 1979), ``seeds``.

    Raises:
        ValueError: the baseline was not tested.
    """
    tested = 100 * rows[rows["split"] == "test"].pivot(index="seed", columns="strategy", values="accuracy")
    if baseline not in tested:
        raise ValueError(f"no strategy {baseline!r} was tested, only {', '.join(tested)}")
    found = {}
    for name in [name for name in rows["strategy"].unique() if name in tested]:
        pairs = tested[[name, baseline]].dropna()
        gaps = (pairs[name] - pairs[baseline]).to_numpy() if name != baseline else np.zeros(len(pairs))
        means = gaps[np.random.default_rng(seed).integers(len(gaps), size=(draws, len(gaps)))].mean(1)
        low, high = np.percentile(means, [2.5, 97.5])
        found[name] = {"mean": tested[name].mean(), "difference": gaps.mean(), "low": low, "high": high, "seeds": len(gaps)}
    return pd.DataFrame(found).T.astype({"seeds": int}).rename_axis("strategy")


def _make(wanted: list[tuple], task: Task, try_of: Mapping, path: str | Path, title: str, progress: bool) -> None:
    todo = results.missing(path, wanted, ("split", "strategy", "rates", "seed"))
    bar = experiments.progress_bar(todo, desc=title, unit="run", shown=progress)
    for split, name, rates, seed in bar:
        bar.set_postfix_str(f"{name}, {rates}, seed {seed}")
        scores = experiments.run(try_of[name, rates], task, seed, split=split)
        results.append_row(path, {
            "split": split, "strategy": name, "rates": rates, "seed": seed, "accuracy": round(scores["accuracy"], 4),
            "loss": round(scores["loss"], 4), "steps": scores["steps"], "images": scores["steps"] * task.batch_size,
            "seconds": round(scores["seconds"], 2), "torch": torch.__version__.partition("+")[0], "device": "cpu"})


# --- plans ------------------------------------------------------------------------------------------------------------

def head_only(groups: Sequence[LayerGroup], steps: int) -> UnfreezePlan:
    """The head trains, nothing else ever does."""
    return UnfreezePlan({groups[-1].name: 0})


def gradual(groups: Sequence[LayerGroup], steps: int) -> UnfreezePlan:
    """One group more after each eighth of the run (Howard and Ruder, 2018)."""
    return UnfreezePlan.top_down(groups, every=steps // 8)


def head_then_all(groups: Sequence[LayerGroup], steps: int) -> UnfreezePlan:
    """The head alone for half of the run, then everything (LP-FT, Kumar et al., 2022)."""
    return UnfreezePlan({"*": steps // 2, groups[-1].name: 0})


def reversed_decay(stem_lr: float, decay: float) -> Rates:
    """``layer_decay`` upside down: the stem has the highest rate."""
    def of(groups):
        rates = layer_decay(stem_lr, decay)(groups)
        return dict(zip(rates, reversed(rates.values()), strict=True))

    return of


# --- the studies ------------------------------------------------------------------------------------------------------

def _one(lrs: Sequence[float], **options) -> list[Strategy]:
    return [Strategy(f"{lr:g}", uniform(lr), **options) for lr in lrs]


def _two(pairs: Sequence[tuple[float, float]], rates: Callable[[float, float], Rates], **options) -> list[Strategy]:
    return [Strategy(f"{a:g}, {b:g}", rates(a, b), **options) for a, b in pairs]


def _backbone_and_head(low: float, high: float) -> Rates:
    return head_and_backbone(backbone_lr=low, head_lr=high)


def strategies() -> Tries:
    """Nine ways to fine-tune; two numbers are the rates of backbone and head, or the highest rate and the decay."""
    pairs = [(1e-4, 1e-3), (1e-4, 3e-3), (3e-4, 1e-3), (3e-4, 3e-3), (3e-4, 1e-2), (1e-3, 3e-3)]
    decays = [(lr, decay) for lr in (1e-3, 3e-3) for decay in (0.3, 0.5, 0.7)]
    return {
        "from scratch": _one((1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2), weights=None),
        "head only": _one((3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), plan=head_only),
        "uniform": _one((1e-4, 3e-4, 6e-4, 1e-3, 2e-3, 3e-3)),
        "two rates": _two(pairs, _backbone_and_head),
        "layer decay": _two(decays, layer_decay),
        "reversed decay": _two(decays, reversed_decay),
        "gradual": _two(pairs, _backbone_and_head, plan=gradual),
        "gradual, layer decay": _two(decays, layer_decay, plan=gradual),
        "head, then all": _two(pairs, _backbone_and_head, plan=head_then_all),
    }


def optimizers() -> Tries:
    """Optimizers at one rate for all layers: six rates each, half a decade apart, from a start of its own."""
    make: dict[str, Callable] = {
        name: lambda groups, name=name: LayerAdaptiveLR(groups, direction=name) for name in ("momentum", "adam", "layernorm")}
    make |= {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW, "SGD": lambda groups: torch.optim.SGD(groups, momentum=0.9),
             # Its block rule, with each tensor as a block: the same direction without the ratio.
             "Adam-mini": lambda groups: LayerAdaptiveLR(groups, direction="layernorm", ratio_range=(1.0, 1.0)),
             "LARS": _timm("Lars", momentum=0.9), "LAMB": _timm("Lamb")}
    starts = {"momentum": -2, "adam": -4, "layernorm": -4, "SGD": -3.5, "LARS": -2.5, "LAMB": -3.5}  # powers of ten
    return {name: _one([float(f"{10 ** (starts.get(name, -4.5) + i / 2):.0e}") for i in range(6)], optimizer=made)
            for name, made in make.items()}


def _timm(name: str, **options) -> Callable:
    """An optimizer of timm, which the extra ``compare`` installs."""
    def make(groups):
        import timm.optim

        return getattr(timm.optim, name)(groups, **options)

    return make


STUDIES = {
    "strategies": Study("Which way to fine-tune 100 digits is best?", lambda: Task(handwritten_digits()), strategies),
    "optimizers": Study("Does a rate for each layer from its gradients beat Adam? (needs timm for LARS and LAMB)",
                        lambda: Task(handwritten_digits(), epochs=8), optimizers),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m layerlr_helpers.experiments", description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", choices=STUDIES, help="the study to run, or to go on with")
    parser.add_argument("--seeds", type=int, default=10, help="test on seeds 0 to N - 1 (default %(default)s)")
    parser.add_argument("--results", default="data/results", help="folder of the results (default %(default)s)")
    parser.add_argument("--list", action="store_true", help="list the studies")
    options = parser.parse_args(arguments)
    if options.list or options.name is None:
        for name, study in STUDIES.items():
            print(f"{name}: {study.question}")
        return
    path = Path(options.results) / f"{options.name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = conduct(STUDIES[options.name], path, range(options.seeds))
    tested = rows[rows["split"] == "test"].groupby(["strategy", "rates"], sort=False)["accuracy"]
    print((100 * tested.agg(["mean", "std"])).round(1).assign(seeds=tested.count()).to_string())
    print(f"every run is a row of {path}")
