"""Comparing strategies fairly: the same data, the same number of steps, the same seeds, one number at the end."""

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
from torch.utils.data import DataLoader, Dataset

from layerlr_helpers.features import cache_features, head_module
from layerlr_helpers.guards import preserved, seeded
from layerlr_helpers.images import ImageSet, few_shot_split
from layerlr_helpers.layers import LayerGroup, layer_groups
from layerlr_helpers.models import load_resnet18, prepared_model
from layerlr_helpers.param_groups import Rates, param_groups
from layerlr_helpers.recipes import fused_adamw
from layerlr_helpers.schedules import one_cycle
from layerlr_helpers.training import evaluate, fast_autocast, fit, progress_bar, train_step
from layerlr_helpers.unfreezing import ProgressiveUnfreezing, UnfreezePlan

SEARCH_SEEDS = (0, 1)


@dataclass(frozen=True)
class Strategy:
    """One way to fine-tune.

    Attributes:
        name: for tables and figures.
        rates: of the layer groups, e.g. ``layer_decay(3e-3, 0.6)``.
        weights: what to start from: what ``Task.load`` understands; None for random weights.
        keep: how many layer groups keep the weights that were loaded, from the input on; the others start anew, at random
            (Yosinski et al., 2014). None keeps all.
        plan: ``(groups, total_steps) -> UnfreezePlan``; None trains everything from the start.
        schedule: ``(optimizer, total_steps) -> scheduler``; None for constant rates.
        optimizer: ``(parameter groups) -> optimizer``.
        batch_norm: of frozen groups, as in ``ProgressiveUnfreezing``.
        look_first: let ``rates`` see the gradients of the first batch, as ``relative_gradient_rates`` wants.
    """

    name: str
    rates: Rates
    weights: str | None = "glyphs"
    keep: int | None = None
    plan: Callable[[Sequence[LayerGroup], int], UnfreezePlan] | None = None
    schedule: Callable[[Optimizer, int], LRScheduler] | None = one_cycle
    optimizer: Callable[[list[dict]], Optimizer] = fused_adamw
    batch_norm: str = "freeze"
    look_first: bool = False


@dataclass(frozen=True)
class Task:
    """What is learned, and with which budget: every strategy gets the same.

    Attributes:
        data: all of it; split anew for each seed.
        per_class: training images of each class.
        val_per_class: validation images of each class, kept out of the test images.
        test_per_class: at most so many test images of each class; None takes all that are left.
        epochs, batch_size: the budget. ``steps``, if given, stands in place of the epochs.
        new_head: give the network a new head for the classes of ``data``; False keeps the pretrained one.
        weight_decay: of every group.
        load: ``(weights) -> model``: the network, for each ``Strategy.weights`` and for None (random weights).
        device: where to train.
        name: for the recorded rows.
    """

    data: ImageSet
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
    name: str = ""


def compare(strategies: Sequence[Strategy] | Mapping[str, Sequence[Strategy]], task: Task, *, seeds: Iterable[int],
            split: str = "test", choose: bool = True, results: str | Path | None = None,
            progress: bool = True) -> pd.DataFrame:
    """Run every strategy on every seed; one row a run: strategy, rates, seed, accuracy, loss, steps, seconds and more.

    Runs with the same seed are paired: the same split, the same new head, the same order of batches.

    Args:
        strategies: the strategies; or, under the name of each, the tries from which its rates are to be chosen, the same
            number for all. The choice is made on the validation images of two seeds (mean accuracy; the lower loss where two
            tie), and the chosen one is then run on each seed.
        split: what the runs on ``seeds`` are scored on. Choose rates with ``"validation"`` and report once with ``"test"``.
        choose: False chooses nothing and runs every try on every seed, to see how much depends on the rates.
        results: a CSV file to record each run in as soon as it is done. The runs that it already has are not made again,
            so the same call goes on where it was stopped. A run is known by the names of task and strategy, rates and seed,
            so the task needs a name.

    Raises:
        ValueError: no strategy or no seed, a seed given twice, two strategies or tries of one name, another number of tries for
            some, an unknown split; ``results`` for a task without a name, or with other columns, or with runs of this name that
            had another budget, or if some are lacking, another precision or device than they would have here.
        FileNotFoundError: no folder for ``results``.
    """
    from layerlr_helpers.studies import results as recorded

    seeds = list(seeds)
    tries = _tries(strategies, task)
    _check(strategies, tries, seeds, split, choose)
    done = _recorded(results, task) if results is not None else recorded.no_rows()

    def make(wanted: list[tuple], title: str) -> None:
        nonlocal done
        to_do = recorded.missing(done, wanted)
        if to_do and results is not None:
            _check_same(done, task, results, {"precision": _precision(task), "device": task.device})
        bar = progress_bar(to_do, desc=title, unit="run", shown=progress)
        for part, task_name, name, rates, seed in bar:
            bar.set_postfix_str(f"{name}, {rates}, seed {seed}")
            row = {"split": part, "task": task_name, "strategy": name, "rates": rates, "seed": seed,
                   **run(tries[name][rates], task, seed, split=part)}
            if results is not None:
                recorded.append_row(results, row)
            done = pd.concat([done, pd.DataFrame([row])] if len(done) else [pd.DataFrame([row])], ignore_index=True)

    chosen = {name: list(of_it) for name, of_it in tries.items()}
    if choose and any(len(of_it) > 1 for of_it in chosen.values()):
        make([("validation", task.name, name, rates, seed) for name in tries for rates in tries[name] for seed in SEARCH_SEEDS],
             "choosing rates")
        searched = done[(done["task"] == task.name) & done["seed"].isin(SEARCH_SEEDS)]
        chosen = {name: [rates] for name, rates in recorded.winners(searched, tries).items()}
    wanted = [(split, task.name, name, rates, seed) for seed in seeds for name in tries for rates in chosen[name]]
    make(wanted, "testing" if split == "test" else split)
    return recorded.chosen_rows(done, wanted)


def run(strategy: Strategy, task: Task, seed: int, *, split: str = "test") -> dict[str, object]:
    """Train one strategy once; returns accuracy and loss on the split, steps, images seen, seconds of training, and versions.

    The same seed gives the same run, whatever torch's own generator was at; that is left as it was. If the head alone ever
    trains, it is trained on cached features (in single precision) where nothing random stands before it: the same but for
    rounding, in a fraction of the time.
    """
    train, val, test = few_shot_split(task.data, task.per_class, val_per_class=task.val_per_class, seed=seed)
    scored = val if split == "validation" else _first_of_each(test, task.test_per_class)
    classes = len(task.data.class_names) if task.new_head else None
    model = prepared_model(strategy.weights, classes, seed, keep=strategy.keep, load=task.load).to(task.device)
    groups = layer_groups(model, train[0][0][None].to(task.device))
    autocast = _autocast(task)

    def loader(data) -> DataLoader:
        return DataLoader(data, task.batch_size, shuffle=True, generator=torch.Generator().manual_seed(seed))

    if strategy.look_first:
        _gradients(model, next(iter(loader(train))), autocast)
    optimizer = strategy.optimizer(param_groups(groups, strategy.rates, weight_decay=task.weight_decay))
    steps = _steps(task, len(train))
    schedule = strategy.schedule(optimizer, steps) if strategy.schedule is not None else None
    plan = strategy.plan(groups, steps) if strategy.plan is not None else None
    unfreezing = ProgressiveUnfreezing(groups, plan, batch_norm=strategy.batch_norm) if plan is not None else None
    start = perf_counter()
    with seeded(seed, task.device):  # for dropout
        trained, data = _head_and_features(model, groups, train, unfreezing) or (model, train)
        fit(trained, optimizer, loader(data), steps=steps, schedule=schedule, unfreezing=unfreezing, autocast=autocast,
            progress=False)
    seconds = perf_counter() - start
    own = torch.Generator()  # a loader without one takes a number from the global generator
    scores = evaluate(model, DataLoader(scored, 256, generator=own), autocast=autocast)
    return {"accuracy": round(scores["accuracy"], 4), "loss": round(scores["loss"], 4), "steps": steps,
            "images": _images_seen(steps, len(train), task.batch_size), "seconds": round(seconds, 2),
            "precision": _precision(task),
            "torch": torch.__version__.partition("+")[0], "threads": torch.get_num_threads(), "device": task.device}


def _head_and_features(model: nn.Module, groups: Sequence[LayerGroup], train: ImageSet,
                       unfreezing: ProgressiveUnfreezing | None) -> tuple[nn.Module, Dataset] | None:
    """The head and what it is given, where nothing else ever trains and that stays the same; None where it is otherwise."""
    if unfreezing is None or unfreezing.batch_norm != "freeze" or set(unfreezing.plan.first_steps) != {groups[-1].name}:
        return None
    unfreezing.apply(0)
    try:
        some = torch.stack([train[i][0] for i in range(min(16, len(train)))])  # with one, luck may give the same twice
        if _answers_at_random(model, some.to(next(model.parameters()).device)):
            return None
        return head_module(groups), cache_features(model, train, groups)
    except ValueError:  # the head is no single module, or not the last to touch the output
        return None


@torch.no_grad()
def _answers_at_random(model: nn.Module, inputs: torch.Tensor) -> bool:
    """Whether the network, as it is trained, gives another output each time, as dropout in it does."""
    with preserved(model):
        model.train()
        return not torch.equal(model(inputs), model(inputs))


def _gradients(model: nn.Module, batch, autocast: torch.dtype | None) -> None:
    """The gradients of one batch, in eval mode, so that BatchNorm's statistics stay as they are."""
    model.eval()
    train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), *batch, autocast=autocast)


def _autocast(task: Task) -> torch.dtype | None:
    return fast_autocast() if task.device == "cpu" else None


def _precision(task: Task) -> str:
    return str(_autocast(task) or torch.float32).removeprefix("torch.")


def _steps(task: Task, images: int) -> int:
    return task.steps if task.steps is not None else task.epochs * -(-images // task.batch_size)


def _images_seen(steps: int, images: int, batch_size: int) -> int:
    """In an epoch the last batch may be smaller than the others."""
    epochs, batches = divmod(steps, -(-images // batch_size))
    return epochs * images + min(batches * batch_size, images)


def _first_of_each(data: ImageSet, number: int | None) -> ImageSet:
    """The first images of each class, or all with None; a split has them in random order."""
    return data.subset(torch.cat([torch.nonzero(data.labels == label).flatten()[:number]
                                  for label in range(len(data.class_names))]))


def _tries(strategies, task: Task) -> dict[str, dict[str, Strategy]]:
    """For each strategy its tries under a text that tells their rates apart."""
    if isinstance(strategies, Mapping):
        return {name: {each.name: each for each in of_it} for name, of_it in strategies.items()}
    groups = layer_groups(prepared_model(None, None, 0, load=task.load), task.data[0][0][None]) if strategies else []
    texts = {each.name: "as measured" if each.look_first else _text(each.rates(groups)) for each in strategies}
    return {each.name: {texts[each.name]: each} for each in strategies}


def _text(rates: Mapping[str, float]) -> str:
    """The rates from the stem to the head, those of equal neighbours once."""
    return ", ".join(text for text, _ in itertools.groupby(f"{lr:.3g}" for lr in rates.values()))


def _recorded(path: str | Path, task: Task) -> pd.DataFrame:
    """The rows that a file has, after checking that those of this task had its budget."""
    from layerlr_helpers.studies import results as recorded

    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"no folder {Path(path).parent} to record results in; make it first")
    if not task.name:
        raise ValueError("runs are recorded under the name of their task; give it one: Task(…, name=…)")
    rows = recorded.read_rows(path)
    images = task.per_class * len(task.data.class_names)
    _check_same(rows, task, path, {"steps": _steps(task, images),
                                   "images": _images_seen(_steps(task, images), images, task.batch_size)})
    return rows


def _check_same(rows: pd.DataFrame, task: Task, path: str | Path, same: Mapping[str, object]) -> None:
    """Runs are only compared with runs of the same kind."""
    from layerlr_helpers.studies.results import RecordError

    mine = rows[rows["task"] == task.name]
    for name, value in same.items():
        if (other := set(mine[name].dropna()) - {value} if name in mine else set()):
            raise RecordError(f"{path} has runs of a task {task.name!r} with {name} {', '.join(map(str, sorted(other)))}, and "
                              f"this one has {value}; give the task another name, or the results another file")


def _check(strategies, tries, seeds: Sequence[int], split: str, choose: bool) -> None:
    names = list(strategies) if isinstance(strategies, Mapping) else [strategy.name for strategy in strategies]
    if len(set(names)) < len(names):
        raise ValueError(f"strategies need different names, got {names}")
    if split not in ("validation", "test"):
        raise ValueError(f"split must be 'validation' or 'test', not {split!r}")
    if not names or not seeds:
        raise ValueError("there is nothing to compare: give at least one strategy and one seed")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"each seed is run once, got {seeds}")
    if isinstance(strategies, Mapping):
        if repeated := [name for name, of_it in strategies.items() if len(tries[name]) < len(of_it)]:
            raise ValueError(f"the tries of a strategy need different names; not so {', '.join(repeated)}")
        if choose and len({len(of_it) for of_it in tries.values()}) > 1:
            raise ValueError("a fair search has as many tries for one strategy as for another, got "
                             + ", ".join(f"{len(of_it)} for {name}" for name, of_it in tries.items()))
