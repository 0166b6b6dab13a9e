"""Comparing strategies fairly: the same data, the same number of steps, the same seeds, one number at the end."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from layerlr_helpers.datasets import ImageSet, few_shot_split
from layerlr_helpers.layers import LayerGroup, layer_groups
from layerlr_helpers.models import load_resnet18
from layerlr_helpers.param_groups import Rates, param_groups
from layerlr_helpers.schedules import one_cycle
from layerlr_helpers.training import evaluate, fast_autocast, fit, progress_bar
from layerlr_helpers.unfreezing import ProgressiveUnfreezing, UnfreezePlan

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Strategy:
    """One way to fine-tune.

    Attributes:
        name: for tables and figures.
        rates: of the layer groups, e.g. ``layer_decay(3e-3, 0.6)``.
        weights: what to start from, as in ``load_resnet18``.
        plan: ``(groups, total_steps) -> UnfreezePlan``; None trains everything from the start.
        schedule: ``(optimizer, total_steps) -> scheduler``; None for constant rates.
        optimizer: ``(parameter groups) -> optimizer``.
        batch_norm: of frozen groups, as in ``ProgressiveUnfreezing``.
    """

    name: str
    rates: Rates
    weights: str | None = "glyphs"
    plan: Callable[[Sequence[LayerGroup], int], UnfreezePlan] | None = None
    schedule: Callable[[Optimizer, int], LRScheduler] | None = one_cycle
    optimizer: Callable[[list[dict]], Optimizer] = torch.optim.AdamW
    batch_norm: str = "freeze"


@dataclass(frozen=True)
class Task:
    """What is learned, and with which budget: every strategy gets the same.

    Attributes:
        data: all of it; split anew for each seed.
        per_class: training images of each class.
        val_per_class: validation images of each class, kept out of the test images.
        epochs, batch_size: the budget.
        new_head: give the network a new head for the classes of ``data``; False keeps the pretrained one.
        weight_decay: of every group.
    """

    data: ImageSet
    per_class: int = 10
    val_per_class: int = 20
    epochs: int = 20
    batch_size: int = 20
    new_head: bool = True
    weight_decay: float = 0.01


def compare(strategies: Sequence[Strategy], task: Task, *, seeds: Iterable[int], split: str = "test",
            progress: bool = True) -> "pd.DataFrame":
    """Run every strategy on every seed; one row a run: strategy, seed, accuracy, loss, steps, seconds.

    Runs with the same seed are paired: the same split, the same new head, the same order of batches. Choose rates
    with ``split="validation"`` and report once with ``split="test"``.

    Raises:
        ValueError: no strategy or no seed, two strategies of one name, or an unknown split.
    """
    import pandas as pd  # here: slow to import

    names = [strategy.name for strategy in strategies]
    if len(set(names)) < len(names):
        raise ValueError(f"strategies need different names, got {names}")
    if split not in ("validation", "test"):
        raise ValueError(f"split must be 'validation' or 'test', not {split!r}")
    runs = [(strategy, seed) for seed in seeds for strategy in strategies]
    if not runs:
        raise ValueError("there is nothing to compare: give at least one strategy and one seed")
    bar = progress_bar(runs, unit="run", shown=progress)
    rows = []
    for strategy, seed in bar:
        bar.set_postfix_str(f"{strategy.name}, seed {seed}")
        rows.append({"strategy": strategy.name, "seed": seed, **run(strategy, task, seed, split=split)})
    return pd.DataFrame(rows)


def run(strategy: Strategy, task: Task, seed: int, *, split: str = "test") -> dict[str, float]:
    """Train one strategy once; returns accuracy and loss on the split, the steps and the seconds of training."""
    train, val, test = few_shot_split(task.data, task.per_class, val_per_class=task.val_per_class, seed=seed)
    model = prepared_model(strategy.weights, len(task.data.class_names) if task.new_head else None, seed)
    groups = layer_groups(model, train[0][0][None])
    optimizer = strategy.optimizer(param_groups(groups, strategy.rates, weight_decay=task.weight_decay))
    loader = DataLoader(train, task.batch_size, shuffle=True, generator=torch.Generator().manual_seed(seed))
    steps = task.epochs * len(loader)
    schedule = strategy.schedule(optimizer, steps) if strategy.schedule is not None else None
    plan = strategy.plan(groups, steps) if strategy.plan is not None else None
    unfreezing = ProgressiveUnfreezing(groups, plan, batch_norm=strategy.batch_norm) if plan is not None else None
    autocast = fast_autocast()
    start = perf_counter()
    fit(model, optimizer, loader, steps=steps, schedule=schedule, unfreezing=unfreezing, autocast=autocast, progress=False)
    seconds = perf_counter() - start
    scored = DataLoader(val if split == "validation" else test, 256, generator=torch.Generator())  # not the global one
    scores = evaluate(model, scored, autocast=autocast)
    return {"accuracy": scores["accuracy"], "loss": scores["loss"], "steps": steps, "seconds": seconds}


def prepared_model(weights: str | None, num_classes: int | None, seed: int) -> nn.Module:
    """A ResNet-18 whose random parts depend on ``seed`` alone; torch's own generator is left as it was.

    With ``num_classes`` it has a new head, the same one for all ``weights``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs' generators, too
        model = load_resnet18(weights)
        if num_classes is not None:
            torch.default_generator.manual_seed(seed)  # again: random weights took more numbers than pretrained ones
            model.fc = nn.Linear(model.fc.in_features, num_classes)
    return model
