"""The recorded studies: the question of each, its tasks, and the candidates of each strategy."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import pandas as pd
import torch
import torchvision
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from layerlr_helpers import recipes, schedules
from layerlr_helpers.course.data import handwritten_digits, ornate_letters, printed_glyphs, shifted
from layerlr_helpers.diagnostics import relative_gradient_rates
from layerlr_helpers.images import image_folder
from layerlr_helpers.naming import check_choice
from layerlr_helpers.optim import LayerAdaptiveLR
from layerlr_helpers.param_groups import Rates, layer_decay, uniform
from layerlr_helpers.studies import text_catalogue
from layerlr_helpers.studies.candidates import (
    HALVED,
    LEARNING_RATES,
    at,
    backbone_and_head,
    between,
    candidate,
    line,
    on_grid,
    warmup_and_cosine,
)
from layerlr_helpers.studies.compare import Candidates, Strategy, Task, compare, run
from layerlr_helpers.studies.results import recorded, winners
from layerlr_helpers.studies.search import Grid, every_candidate

STAGES = ("stem", "layer1", "layer2", "layer3", "layer4", "head")
SEED_OF_RATIOS = 100  # none that a study is searched or tested on


@dataclass(frozen=True)
class Study:
    """A contest of strategies that answers a question."""

    question: str
    tasks: Callable[..., Sequence[Task]]  # for photographs it takes the arguments of photo_tasks
    candidates: Callable[[Task], Candidates]  # those of a strategy differ in their rates, and are named by them
    choose: bool = True  # False tests every candidate on every seed, because the study is about the rates


def run_again(study: str, strategies: Sequence[str], *, task: str | None = None, rates: str | None = None,
              seeds: Sequence[int] = (0, 1), folder: str | Path = "../data/results", progress: bool = True) -> pd.DataFrame:
    """Run the recorded winners of some strategies once more: ``run_again("depth", ["keep 3, frozen", "keep 3, fine-tuned"])``.

    Returns the rows of :func:`compare`, and as ``recorded`` the accuracy that the record in ``folder`` has for the same seed.
    ``task`` is the name of a task; None takes the only one. ``rates`` names other candidates to run than the winners. Studies
    of photographs cannot be run again like this, since their images are not built in. A warning says if the record is of other
    sentences than those that the installed libraries have.
    """
    tasks = {each.name: each for each in STUDIES[study].tasks()}
    task = next(iter(tasks)) if task is None and len(tasks) == 1 else task
    check_choice(f"task of {study}", task, tasks)
    candidates = STUDIES[study].candidates(tasks[task])
    for name in strategies:
        check_choice(f"strategy of {study}", name, candidates)
    rows = recorded(study, folder)
    rows = rows[rows["task"] == task]
    chosen = winners(rows) if rates is None else dict.fromkeys(strategies, rates)
    again = {name: [each for each in every_candidate(candidates[name]) if each.name == chosen[name]] for name in strategies}
    runs = compare(again, tasks[task], seeds=seeds, progress=progress)
    if "texts" in runs and (others := set(rows["texts"]) - set(runs["texts"])):
        warnings.warn(f"the record of {study} is of other sentences ({', '.join(sorted(others))}) than these runs "
                      f"({runs['texts'].iloc[0]}), so their accuracies are no pairs; install the versions in requirements.txt",
                      stacklevel=2)
    key = ["split", "strategy", "rates", "seed"]
    return runs.merge(rows[[*key, "accuracy"]].rename(columns={"accuracy": "recorded"}), how="left", on=key)


_digit_images = cache(handwritten_digits)  # for studies of several tasks


def digits(**options) -> Task:
    """Ten scans of each digit to train on, in 40 steps of 20; half of the others are enough to test on."""
    return Task(_digit_images(), **{"steps": 40, "name": "digits, 40 steps", "test_per_class": 75} | options)


def pulled(lr: float, strength: float, **options) -> Strategy:
    """Return L2-SP at one rate for all layers and with this strength of the pull towards the pretrained weights."""
    return candidate(lr, strength, rates=lambda lr, _: uniform(lr), **options | {"optimizer": recipes.l2_sp(strength)})


def strategies(task: Task) -> Candidates:
    """Ten strategies, with six candidates each to begin with.

    Two numbers are the rates of backbone and head, the highest rate and the decay, or the rate and the strength of the pull
    towards the pretrained weights.
    """
    adamw = {"optimizer": torch.optim.AdamW}  # as it was recorded, before fused steps were the default

    def two(rates: Callable[..., Rates], first: Sequence[tuple[float, float]], axis: Sequence[float], **options) -> Grid:
        return on_grid(partial(candidate, rates=rates, **adamw, **options), first, LEARNING_RATES, axis)

    pairs = [(1e-4, 1e-3), (1e-4, 3e-3), (3e-4, 1e-3), (3e-4, 3e-3), (3e-4, 1e-2), (1e-3, 3e-3)], LEARNING_RATES
    factors = 0.2, 0.3, 0.5, 0.7, 0.9, 1.0  # 1 is one rate for all
    decays = [(1e-3, 0.5), (1e-3, 0.7), (3e-3, 0.3), (3e-3, 0.5), (3e-3, 0.7), (1e-2, 0.3)], factors
    reversals = [(lr, factor) for lr in (1e-3, 3e-3) for factor in (0.7, 0.9, 1.0)], factors
    finer = sorted({*LEARNING_RATES, 6e-4, 2e-3})
    return {
        "from scratch": line(1e-4, 3e-2, weights=None, **adamw),
        "head only": line(3e-4, 1e-1, plan=recipes.head_only, **adamw),
        "uniform": on_grid(partial(candidate, **adamw), [(lr,) for lr in finer if 1e-4 <= lr <= 3e-3], finer),
        "two rates": two(backbone_and_head, *pairs),
        "layer decay": two(layer_decay, *decays),
        "reversed decay": two(recipes.reversed_decay, *reversals),
        "gradual": two(backbone_and_head, *pairs, plan=recipes.gradual),
        "gradual, layer decay": two(layer_decay, *decays, plan=recipes.gradual),
        "head, then all": two(backbone_and_head, *pairs, plan=recipes.head_then_all),
        "L2-SP": on_grid(pulled, [(lr, strength) for lr in (1e-3, 2e-3) for strength in (1, 3, 10)],
                         finer, (0.01, 0.03, 0.1, 0.3, 1, 3, 10)),
    }


def robustness(task: Task, grid: Sequence[float] = tuple(between(3e-4, 3e-2)), **options) -> Candidates:
    """One rate for all and three decays, over a grid of the head's rate."""
    return {"uniform": at(grid, **options)} | {
        f"decay {factor:g}": at(grid, partial(layer_decay, decay=factor), **options) for factor in (0.9, 0.7, 0.5)}


def labels(task: Task) -> Candidates:
    """The head alone, one rate, and layer decay."""
    options = {"schedule": warmup_and_cosine}
    return {"head only": line(1e-3, 1e-1, plan=recipes.head_only, **options),
            "uniform": line(1e-4, 1e-2, **options),
            "layer decay": line(3e-4, 3e-2, HALVED, **options)}


def label_tasks() -> list[Task]:
    """From 2 to 50 labels a class, in as many steps or in as many epochs as with 10, where both are the same."""
    steps, epochs = 40, 8
    return [digits(per_class=n, name=f"{n} a class, {name}", steps=number, epochs=epochs, autocast=False)
            for n in (2, 5, 10, 20, 50) for name, number in ((f"{steps} steps", steps), (f"{epochs} epochs", None))
            if (n, number) != (10, None)]


def surgery(task: Task) -> Candidates:
    """One stage alone, all at one rate, or all at graded rates; if the task has a new head, that trains in any case."""
    always = ("head",) if task.new_head else ()
    ends = 3e-4, 3e-2
    return {stage: line(*ends, plan=recipes.only(stage, *always)) for stage in STAGES[:-1]} | {
        "head": line(1e-3, 1e-1, plan=recipes.head_only),
        "all": line(1e-4, 1e-2),
        "layer decay": line(*ends, HALVED),
        "reversed decay": line(*ends, partial(recipes.reversed_decay, decay=0.5))}


_letters = cache(partial(printed_glyphs, 64 * 36, seed=4242))
_LETTERS = {"per_class": 5, "val_per_class": 5, "test_per_class": 10, "batch_size": 32, "steps": 40, "new_head": False}


@cache
def surgery_tasks() -> tuple[Task, ...]:
    """New names for the same images, and new images with new names. Frozen stages keep BatchNorm's statistics."""
    return (Task(shifted(_letters(), "permuted", seed=4242), name="permuted", **_LETTERS),
            digits(name="handwriting", per_class=5, test_per_class=64))


def input_shifts(task: Task, batch_norm: str) -> Candidates:
    """One stage alone, or all. ``batch_norm`` is what BatchNorm does in every stage, whichever of them trains.

    "statistics" lets its statistics follow the new images, as they do when a whole network is fine-tuned; "hold" keeps those
    that it came with. With the former there are three rows more: no weight trained at all, and graded rates.
    """
    options = {"batch_norm": batch_norm, "schedule": warmup_and_cosine}
    rows = {stage: line(1e-4, 3e-3, plan=recipes.only(stage), **options) for stage in STAGES[:-1]} | {
        "head": line(1e-3, 3e-2, plan=recipes.head_only, **options),
        "all": line(3e-5, 1e-3, plan=recipes.everything, **options)}
    if batch_norm == "hold":
        return rows
    return rows | {"statistics alone": on_grid(partial(candidate, **options), [(0.0,)], [0.0]),  # nothing to choose
                   "layer decay": line(3e-4, 1e-2, HALVED, **options),
                   "reversed decay": line(3e-4, 1e-2, partial(recipes.reversed_decay, decay=0.5), **options)}


@cache
def input_shift_tasks() -> tuple[Task, ...]:
    """The same letters in worse images, and in other forms; the head keeps its classes."""
    ornate = Task(ornate_letters(26 * 80, seed=4242), name="ornate", autocast=False,
                  **_LETTERS | {"per_class": 12, "val_per_class": 12, "test_per_class": 25})
    return (*(Task(shifted(_letters(), shift, seed=4242), name=shift, autocast=False, **_LETTERS)
              for shift in ("blurred", "noisy")), ornate)


def schedule_shapes(task: Task) -> Candidates:
    """Four shapes with one rate and with layer decay; the rate is the highest of the run (and the head's)."""
    shapes = {"constant": None,
              "slanted triangular": schedules.slanted_triangular,
              "warm-up and cosine": warmup_and_cosine,
              "one cycle": schedules.one_cycle}
    both = (("uniform", uniform, (1e-4, 3e-3)), ("layer decay", HALVED, (3e-4, 1e-2)))
    return {f"{shape}, {name}": line(*ends, rates, schedule=schedule) for shape, schedule in shapes.items()
            for name, rates, ends in both}


def optimizers(task: Task) -> Candidates:
    """Optimizers at one rate for all layers: six rates, half a decade apart, from a start that fits the optimizer."""
    ways = {  # the optimizer, and the lowest and the highest of its rates
        "momentum": (partial(LayerAdaptiveLR, direction="momentum"), 1e-2, 3.0),
        "adam": (partial(LayerAdaptiveLR, direction="adam"), 1e-4, 3e-2),
        "adam_mini": (partial(LayerAdaptiveLR, direction="adam_mini"), 1e-4, 3e-2),
        "Adam": (torch.optim.Adam, 3e-5, 1e-2),
        "AdamW": (torch.optim.AdamW, 3e-5, 1e-2),
        "SGD": (partial(torch.optim.SGD, momentum=0.9), 3e-4, 1e-1),
        # Adam-mini's block rule with each tensor as a block: the same direction without the ratio
        "Adam-mini": (partial(LayerAdaptiveLR, direction="adam_mini", ratio_range=(1.0, 1.0)), 3e-5, 1e-2),
        "LARS": (partial(_timm_optimizer, "Lars", momentum=0.9), 1e-1, 30.0),
        "LAMB": (partial(_timm_optimizer, "Lamb"), 3e-4, 1e-1),
    }
    return {name: line(lowest, highest, optimizer=optimizer) for name, (optimizer, lowest, highest) in ways.items()}


def ablation(task: Task, **options) -> Candidates:
    """LayerAdaptiveLR with a ratio for each tensor, for each stage or for the whole network, and with a schedule in its place.

    The *fixed schedule* takes the same direction without a ratio, and multiplies its rate at each step by the ratio that the
    whole network had at that step of another run, at the same rate.
    """
    options = {"schedule": warmup_and_cosine, **options}
    ways = {"AdamW": line(1e-4, 3e-3, **options), "AdamW, constant rate": line(3e-5, 1e-3, **options | {"schedule": None})}
    for direction, name, start in (("adam", "Adam direction", (3e-4, 1e-2)), ("momentum", "momentum", (3e-2, 1.0))):
        adaptive = partial(LayerAdaptiveLR, direction=direction)
        without_ratio = partial(adaptive, ratio_range=(1.0, 1.0))
        for pool, optimizer in (("a ratio a tensor", adaptive),
                                ("a ratio a stage", partial(adaptive, pool="group")),
                                ("one ratio", recipes.in_one_group(partial(adaptive, pool="group")))):
            ways[f"{name}, {pool}"] = line(*start, optimizer=optimizer, **options)
        ratios = ways[f"{name}, one ratio"]
        ways[f"{name}, fixed schedule"] = replace(ratios, candidates={
            place: replace(each, optimizer=without_ratio, schedule=_with_ratios_of(each, task))
            for place, each in ratios.candidates.items()})
    no_ratio = partial(LayerAdaptiveLR, direction="momentum", ratio_range=(1.0, 1.0))
    return ways | {"momentum, no ratio": line(3e-2, 1.0, optimizer=no_ratio, **options)}


def _with_ratios_of(strategy: Strategy, task: Task) -> Callable[[Optimizer, int], LRScheduler]:
    """Return a schedule: warm-up and cosine, times the ratios that a strategy's optimizer has in a run on a seed of its own."""
    @cache
    def ratios() -> list[float]:
        seen: list[float] = []

        def watched(groups: list[dict]) -> Optimizer:
            optimizer = strategy.optimizer(groups)
            optimizer.register_step_post_hook(
                lambda optimizer, *_: seen.append(optimizer.layer_rates()["all"] / optimizer.param_groups[0]["lr"]))
            return optimizer

        run(replace(strategy, optimizer=watched), task, seed=SEED_OF_RATIOS, split="validation")
        return seen

    def schedule(optimizer: Optimizer, steps: int) -> LRScheduler:
        shape = schedules.WarmupCosine(steps, steps // 10)  # that of the strategy
        return LambdaLR(optimizer, lambda step: shape(step) * ratios()[min(step, steps - 1)])

    return schedule


def _timm_optimizer(name: str, groups: list[dict], **options) -> torch.optim.Optimizer:
    import timm.optim  # from the extra ``compare``

    return getattr(timm.optim, name)(groups, **options)


def depth(task: Task) -> Candidates:
    """The first stages keep their pretrained weights, the others start anew; the kept ones are frozen or trained on."""
    ends = 3e-4, 3e-2
    kept = range(1, len(STAGES))
    return {"keep 0": line(*ends, weights=None)} | {
        f"keep {n}, fine-tuned": line(*ends, keep=n) for n in kept} | {
        f"keep {n}, frozen": line(*ends, keep=n, plan=recipes.all_but_first(n)) for n in kept}


def automatic(task: Task) -> Candidates:
    """Rates from the gradients, of the first batch or of every one, beside rates set by hand."""
    low, high = (3e-4, 1e-2), (1e-3, 3e-2)
    return {"uniform": line(*low),
            "layer decay": line(*low, HALVED),
            "relative gradients, first batch": line(*high, relative_gradient_rates, look_first=True),
            "Auto-RGN, every batch": line(*high, optimizer=recipes.auto_rgn)}


def photo_strategies(task: Task) -> Candidates:
    """Five ways, from a network that torchvision trained on ImageNet; the highest rate names a candidate."""
    options = {"weights": "DEFAULT", "schedule": warmup_and_cosine}
    milder = partial(layer_decay, decay=0.7)
    return {"head only": line(1e-3, 3e-2, plan=recipes.head_only, **options),
            "uniform": line(3e-5, 1e-3, **options),
            "two rates": line(3e-4, 1e-2, lambda lr: backbone_and_head(lr / 10, lr), **options),
            "layer decay": line(1e-4, 3e-3, milder, **options),
            "gradual, layer decay": line(1e-4, 3e-3, milder, plan=recipes.gradual, **options)}


def photo_tasks(folders: Mapping[str, str], architecture: str = "resnet18") -> list[Task]:
    """Return a task for each folder of images under its name, 20 a class to train on, with a network of torchvision.

    Another architecture than ResNet-18 becomes a part of the name, so that its rows are not taken for those of the other.
    """
    return [Task(image_folder(path, image_size=128), per_class=20, val_per_class=40, test_per_class=50, steps=40,
                 autocast=False, name=name if architecture == "resnet18" else f"{name}, {architecture}",
                 load=lambda weights: torchvision.models.get_model(architecture, weights=weights))
            for name, path in folders.items()]


STUDIES = {
    "strategies": Study("Which way to fine-tune 100 digits is best?",
                        lambda: [digits(name="digits", steps=None, test_per_class=None)], strategies),
    "robustness": Study("How wide is the range of good rates, with and without layer decay?", lambda: [digits()], robustness,
                        choose=False),
    "labels": Study("With how many labels does the strategy matter?",
                    label_tasks, labels),
    "surgery": Study("Which stage should be tuned when the names are new?", surgery_tasks, surgery),
    "input-shifts": Study("Which stage should be tuned when the images change, while BatchNorm's statistics follow them?",
                          input_shift_tasks, partial(input_shifts, batch_norm="statistics")),
    "input-shifts-held": Study("The same while BatchNorm keeps the statistics that it came with?", input_shift_tasks,
                               partial(input_shifts, batch_norm="hold")),
    "schedules": Study("Which schedule, and does it matter for layer-wise rates?", lambda: [digits()], schedule_shapes),
    "optimizers": Study("Does a rate for each layer from its gradients beat Adam? (needs timm for LARS and LAMB)",
                        lambda: [digits(test_per_class=None)], optimizers),
    "ablation": Study("Is what LayerAdaptiveLR gains over AdamW due to a ratio for each layer?",
                      lambda: [digits(test_per_class=None, autocast=False)], ablation),
    "depth": Study("How many stages are worth keeping, frozen or fine-tuned?", lambda: [digits()], depth),
    "automatic": Study("Do rates from relative gradient norms beat rates that are set by hand?",
                       lambda: [digits(test_per_class=None)], automatic),
    "photographs": Study("Which way to fine-tune is best on photographs, such as yours?", photo_tasks, photo_strategies),
    "photographs-ablation": Study("Is what LayerAdaptiveLR gains on photographs due to a ratio for each layer?", photo_tasks,
                                  partial(ablation, weights="DEFAULT")),
    "photographs-robustness": Study("How wide is the range of good rates on photographs, such as yours?", photo_tasks,
                                    partial(robustness, grid=between(3e-5, 1e-2), weights="DEFAULT"), choose=False),
    "text-strategies": Study("Which way to fine-tune a transformer on 80 sentences is best?",
                             lambda: [text_catalogue.sentence_task()], text_catalogue.strategies),
    "text-robustness": Study("How wide is the range of good rates of a transformer, with and without layer decay?",
                             lambda: [text_catalogue.sentence_task()], text_catalogue.robustness, choose=False),
    "text-labels": Study("With how many labelled sentences does the strategy matter?", text_catalogue.label_tasks,
                         text_catalogue.labels),
    "text-surgery": Study("Which layer of a transformer should be tuned when the sentences or the names change?",
                          text_catalogue.surgery_tasks, text_catalogue.surgery),
}
PHOTOGRAPHS = [name for name, study in STUDIES.items() if study.tasks is photo_tasks]
