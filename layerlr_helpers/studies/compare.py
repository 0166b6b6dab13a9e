"""Comparing strategies fairly: all have the same data, the same number of steps and the same seeds.

A strategy is a way to fine-tune, with a name. Its candidates are ``Strategy`` objects that differ in their rates; the best of
them on validation images stands for the strategy on the test images.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import pandas as pd
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, default_collate

from layerlr_helpers.batches import to_device
from layerlr_helpers.features import cached_head
from layerlr_helpers.guards import seeded
from layerlr_helpers.history import DivergedError
from layerlr_helpers.images import ImageSet
from layerlr_helpers.layers import LayerGroup, layer_groups
from layerlr_helpers.models import load_resnet18, prepared_model
from layerlr_helpers.naming import check_choice
from layerlr_helpers.param_groups import Rates, param_groups
from layerlr_helpers.recipes import fused_adamw
from layerlr_helpers.schedules import one_cycle
from layerlr_helpers.splits import few_shot_split
from layerlr_helpers.studies.results import KEY, RecordError, append_row, chosen_rows, missing, read_rows, with_row
from layerlr_helpers.studies.search import check_fair, every_candidate, search
from layerlr_helpers.texts import TextSet
from layerlr_helpers.training import evaluate, fast_autocast, fit, progress_bar, train_step
from layerlr_helpers.unfreezing import ProgressiveUnfreezing, UnfreezePlan


@dataclass(frozen=True)
class Strategy:
    """One way to fine-tune, at given rates.

    Attributes:
        name: for tables and figures; of a candidate, the text of its rates.
        rates: of the layer groups, e.g. ``layer_decay(3e-3, 0.6)``.
        weights: what to start from, as ``Task.load`` understands it; None for random weights.
        keep: how many layer groups, counted from the input, keep the loaded weights; the others start at random
            (Yosinski et al., 2014). None keeps all.
        plan: ``(groups, total_steps) -> UnfreezePlan``; None trains everything from the start.
        schedule: ``(optimizer, total_steps) -> scheduler``; None for constant rates.
        batch_norm: what BatchNorm does under the plan, as in ``ProgressiveUnfreezing``.
        change: ``model -> model``, before layers are grouped: to add adapters.
        granularity: of the layer groups, as in ``layer_groups``.
        look_first: compute the gradients of the first batch before ``rates`` is called, for ``relative_gradient_rates``.
    """

    name: str
    rates: Rates
    weights: str | None = "glyphs"
    keep: int | None = None
    plan: Callable[[Sequence[LayerGroup], int], UnfreezePlan] | None = None
    schedule: Callable[[Optimizer, int], LRScheduler] | None = one_cycle
    optimizer: Callable[[list[dict]], Optimizer] = fused_adamw
    batch_norm: str = "freeze"
    change: Callable[[nn.Module], nn.Module] | None = None
    granularity: str = "stage"
    look_first: bool = False


Candidates = Mapping[str, Sequence[Strategy]]  # for each strategy, under its name


@dataclass(frozen=True)
class Task:
    """What is learned, and with which budget: every strategy gets the same.

    Attributes:
        data: all images or texts; they are split anew for each seed.
        per_class, val_per_class: how many of each class to train on and to choose rates on.
        test_per_class: the most to test on of each class, of those that are left; None takes all.
        epochs, batch_size: the budget. ``steps``, if given, replaces the epochs.
        autocast: compute in bfloat16 where the processor does that fast. A study that any machine shall be able to go on with
            has False.
        new_head: give the network a new head for the classes of ``data``; False keeps the pretrained one.
        load: ``(weights) -> model``: makes the network, for each ``Strategy.weights`` and for None (random weights).
        name: what runs are recorded under.
    """

    data: ImageSet | TextSet
    per_class: int = 10
    val_per_class: int = 20
    test_per_class: int | None = None
    epochs: int = 20
    batch_size: int = 20
    steps: int | None = None
    new_head: bool = True
    weight_decay: float = 0.01
    load: Callable[[str | None], nn.Module] = load_resnet18
    device: str = "cpu"
    autocast: bool = True
    name: str = ""


def compare(strategies: Sequence[Strategy] | Candidates, task: Task, *, seeds: Iterable[int], split: str = "test",
            choose: bool = True, finalists: int = 3, results: str | Path | None = None, progress: bool = True) -> pd.DataFrame:
    """Run every strategy on every seed; one row per run: strategy, rates, seed, accuracy, loss, steps, seconds and more.

    Runs with the same seed are paired: they have the same split, the same new head and the same order of batches.

    Args:
        strategies: the strategies; or a mapping from the name of each to its candidates, as many for each strategy.
            Each is tried on the validation images of two seeds, the best few on three more (successive halving,
            Jamieson and Talwalkar, 2016); the one with the best mean accuracy (the lower loss breaks a tie) is chosen, and
            then run on each seed. Candidates on a :class:`Grid` become more until all neighbours of the best were tried.
        split: what the runs on ``seeds`` are scored on. Choose rates with ``"validation"`` and report once with ``"test"``.
        choose: False runs every candidate on every seed, to see how much depends on the rates.
        finalists: how many of a strategy's candidates are tried on five seeds; 0 chooses after two.
        results: a CSV file to record each run in as soon as it is done. Runs that the file already has are not made again,
            so the same call goes on where it was stopped. A run is known by the names of task and strategy, rates and seed,
            so the task needs a name.

    A contest that would not be fair, such as one with more candidates for one strategy than for another, is a ValueError; so
    are ``results`` with runs of this task with another budget, or (if runs are missing) another precision or device.
    """
    seeds = list(seeds)
    candidates = _by_rates(strategies, task)
    if choose:
        check_fair(strategies)
    _check(candidates, seeds, split, finalists, task, results)
    rows = read_rows(results) if results is not None else pd.DataFrame(columns=KEY)
    _check_same(rows, task, results, _budget(task))

    def run_missing(wanted: Sequence[tuple], title: str) -> pd.DataFrame:
        """Make those of the wanted runs that there are no rows of, and return the rows of all wanted runs."""
        nonlocal rows
        to_do = missing(rows, wanted)
        if to_do:
            _check_same(rows, task, results, _circumstances(task))
        bar = progress_bar(to_do, desc=title, unit="run", shown=progress)
        for key in bar:
            run_split, _, name, rates, seed = key
            bar.set_postfix_str(f"{name}, {rates}, seed {seed}")
            row = dict(zip(KEY, key, strict=True)) | run(candidates[name][rates], task, seed, split=run_split)
            if results is not None:
                append_row(results, row)
            rows = with_row(rows, row)
        return chosen_rows(rows, wanted)

    chosen = {name: list(by_rates) for name, by_rates in candidates.items()}
    if choose and (several := {name: strategies[name] for name, rates in chosen.items() if len(rates) > 1}):
        def validate(wanted: Sequence[tuple]) -> pd.DataFrame:
            return run_missing([("validation", task.name, *each) for each in wanted], "choosing rates")

        chosen |= {name: [rates] for name, rates in search(several, validate, finalists).items()}
    wanted = [(split, task.name, name, rates, seed) for seed in seeds for name in chosen for rates in chosen[name]]
    return run_missing(wanted, "testing" if split == "test" else split)


def run(strategy: Strategy, task: Task, seed: int, *, split: str = "test") -> dict[str, object]:
    """Train once; return accuracy and loss on the split, steps, examples seen, seconds of training, and versions.

    The same seed gives the same run, whatever the state of torch's global generator, which is left as it was.
    """
    model, seconds = trained(strategy, task, seed)
    _, val, test = _split(task, seed)
    scored = val if split == "validation" else _first_of_each_class(test, task.test_per_class)
    # A loader without a generator takes a number from the global one.
    scores = evaluate(model, DataLoader(scored, 256, generator=torch.Generator()), autocast=_autocast(task))
    return {"accuracy": round(scores["accuracy"], 4), "loss": round(scores["loss"], 4), **_budget(task),
            "seconds": round(seconds, 2), "precision": _precision(task), "torch": torch.__version__.partition("+")[0],
            "threads": torch.get_num_threads(), **_circumstances(task)}


def trained(strategy: Strategy, task: Task, seed: int) -> tuple[nn.Module, float]:
    """Make a network, train it, and return it with the seconds that the training took.

    If only the head ever trains and nothing random comes before it, it is trained on cached features (in single precision):
    the same but for rounding, in a fraction of the time.
    """
    train, _, _ = _split(task, seed)
    classes = len(task.data.class_names) if task.new_head else None
    model = prepared_model(strategy.weights, classes, seed, keep=strategy.keep, load=task.load).to(task.device)
    if strategy.change is not None:
        with seeded(seed):
            model = strategy.change(model).to(task.device)
    groups = layer_groups(model, to_device(_example_input(train), task.device), granularity=strategy.granularity)
    autocast, steps = _autocast(task), _budget(task)["steps"]

    def shuffled(data: Dataset) -> DataLoader:
        return DataLoader(data, task.batch_size, shuffle=True, generator=torch.Generator().manual_seed(seed))

    if strategy.look_first:
        model.eval()  # BatchNorm's statistics stay as they are
        train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), *next(iter(shuffled(train))), autocast=autocast)
    optimizer = strategy.optimizer(param_groups(groups, strategy.rates, weight_decay=task.weight_decay))
    schedule = strategy.schedule(optimizer, steps) if strategy.schedule is not None else None
    plan = strategy.plan(groups, steps) if strategy.plan is not None else None
    unfreezing = ProgressiveUnfreezing(groups, plan, batch_norm=strategy.batch_norm) if plan is not None else None

    start = perf_counter()
    with seeded(seed, task.device):  # for dropout
        part, data = cached_head(model, groups, train, unfreezing) or (model, train)
        try:
            fit(part, optimizer, shuffled(data), steps=steps, schedule=schedule, unfreezing=unfreezing, autocast=autocast,
                progress=False)
        except DivergedError:  # a result like any other: with this gradient no weight that trains would have stayed a number
            for p in part.parameters():
                if p.requires_grad:
                    p.detach().fill_(float("nan"))
    return model, perf_counter() - start


def _split(task: Task, seed: int) -> tuple[ImageSet | TextSet, ImageSet | TextSet, ImageSet | TextSet]:
    return few_shot_split(task.data, task.per_class, val_per_class=task.val_per_class, seed=seed)


def _autocast(task: Task) -> torch.dtype | None:
    return fast_autocast() if task.autocast and task.device == "cpu" else None


def _precision(task: Task) -> str:
    return str(_autocast(task) or torch.float32).removeprefix("torch.")


def _budget(task: Task) -> dict[str, int]:
    """Return the optimizer steps of a run and the examples seen in them; the last batch of an epoch may be a smaller one."""
    images = task.per_class * len(task.data.class_names)
    batches = -(-images // task.batch_size)
    steps = task.steps if task.steps is not None else task.epochs * batches
    epochs, further_batches = divmod(steps, batches)
    return {"steps": steps, "images": epochs * images + min(further_batches * task.batch_size, images)}


def _circumstances(task: Task) -> dict[str, str]:
    """Return what can be another thing on another machine, where texts are read from other versions of packages."""
    texts = {"texts": task.data.fingerprint()} if isinstance(task.data, TextSet) else {}
    return {"precision": _precision(task), "device": task.device} | texts


def _example_input(data: ImageSet | TextSet):
    """Return the inputs of a batch of one."""
    return default_collate([data[0]])[0]


def _first_of_each_class(data: ImageSet | TextSet, number: int | None) -> ImageSet | TextSet:
    """Return the first of each class, or all with None; a split has them in random order."""
    return data.subset(torch.cat([torch.nonzero(data.labels == label).flatten()[:number]
                                  for label in range(len(data.class_names))]))


def _by_rates(strategies: Sequence[Strategy] | Candidates, task: Task) -> dict[str, dict[str, Strategy]]:
    """Return the candidates of each strategy by the text of their rates; a strategy without candidates is the only one."""
    for given in strategies.values() if isinstance(strategies, Mapping) else [strategies]:
        if len({each.name for each in given}) < len(given):
            raise ValueError(f"strategies and candidates need different names, got {[each.name for each in given]}")
    if isinstance(strategies, Mapping):
        return {name: {each.name: each for each in every_candidate(given)}
                for name, given in strategies.items()}
    groups = layer_groups(prepared_model(None, None, 0, load=task.load), _example_input(task.data))
    return {each.name: {"as measured" if each.look_first else _rates_text(each.rates(groups)): each} for each in strategies}


def _rates_text(rates: Mapping[str, float]) -> str:
    """Return the rates from the stem to the head, equal neighbours once."""
    return ", ".join(text for text, _ in itertools.groupby(f"{lr:.3g}" for lr in rates.values()))


def _check(candidates: Mapping[str, Mapping[str, Strategy]], seeds: Sequence[int], split: str, finalists: int, task: Task,
           path: str | Path | None) -> None:
    check_choice("split", split, ("validation", "test"))
    if not candidates or not seeds:
        raise ValueError("there is nothing to compare: give at least one strategy and one seed")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"each seed is run once, got {seeds}")
    if not 0 <= finalists != 1:
        raise ValueError(f"finalists must be 0, or 2 or more, not {finalists}")
    if path is not None and not Path(path).parent.is_dir():
        raise FileNotFoundError(f"no folder {Path(path).parent} to record results in; make it first")
    if path is not None and not task.name:
        raise ValueError("runs are recorded under the name of their task; give it one: Task(…, name=…)")


def _check_same(rows: pd.DataFrame, task: Task, path: str | Path | None, expected: Mapping[str, object]) -> None:
    """Raise an error if recorded runs of this task have other values in the columns of ``expected``."""
    rows = rows[rows["task"] == task.name]
    for column in rows.columns.intersection(list(expected)):
        if others := set(rows[column].dropna()) - {expected[column]}:
            raise RecordError(f"{path} has runs of a task {task.name!r} with {column} {', '.join(map(str, sorted(others)))}, "
                              f"and this one has {expected[column]}; give the task another name, or the results another file")
