"""What the recorded studies compare: for each of their questions the tasks, and for each strategy the rates to try."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torchvision

from layerlr_helpers import recipes, schedules
from layerlr_helpers.course.data import handwritten_digits, printed_glyphs
from layerlr_helpers.diagnostics import relative_gradient_rates
from layerlr_helpers.images import image_folder
from layerlr_helpers.optim import LayerAdaptiveLR
from layerlr_helpers.param_groups import Rates, head_and_backbone, layer_decay, uniform
from layerlr_helpers.studies.compare import Strategy, Task

Tries = Mapping[str, Sequence[Strategy]]
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4", "head")
GRID = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


@dataclass(frozen=True)
class Study:
    """A question, the tasks that answer it, and for each strategy of a task the rates to try.

    A try is named by its rates. With ``choose=False`` every try is tested on every seed: the study is about the rates.
    """

    question: str
    tasks: Callable[[], Sequence[Task]]
    tries: Callable[[Task], Tries]
    choose: bool = True


# --- tries ------------------------------------------------------------------------------------------------------------

def _between(lowest: float, highest: float) -> list[float]:
    """Rates two to a decade."""
    return [lr for lr in GRID if lowest <= lr <= highest]


def _one(lrs: Sequence[float], rates: Callable[[float], Rates] = uniform, **options) -> list[Strategy]:
    return [Strategy(f"{lr:g}", rates(lr), **options) for lr in lrs]


def _two(pairs: Sequence[tuple[float, float]], rates: Callable[[float, float], Rates], **options) -> list[Strategy]:
    return [Strategy(f"{a:g}, {b:g}", rates(a, b), **options) for a, b in pairs]


def _backbone_and_head(low: float, high: float) -> Rates:
    return head_and_backbone(backbone_lr=low, head_lr=high)


def _decayed(decay: float) -> Callable[[float], Rates]:
    return partial(layer_decay, decay=decay)


# --- the studies ------------------------------------------------------------------------------------------------------

def digits(**options) -> Task:
    """Ten scans of each digit to train on, in 40 steps of 20; half of the others are enough to test on."""
    return Task(handwritten_digits(), **{"steps": 40, "name": "digits, 40 steps", "test_per_class": 75} | options)


def all_digits() -> Task:
    """The same, tested on all others."""
    return digits(test_per_class=None)


def _ways(scratch, head, one, pairs, decays, pulls, **options) -> Tries:
    """Ten ways to fine-tune; two numbers are the rates of backbone and head, the highest rate and the decay, or the rate and
    the strength of the pull."""
    return {
        "from scratch": _one(scratch, **options | {"weights": None}),
        "head only": _one(head, plan=recipes.head_only, **options),
        "uniform": _one(one, **options),
        "two rates": _two(pairs, _backbone_and_head, **options),
        "layer decay": _two(decays, layer_decay, **options),
        "reversed decay": _two(decays, recipes.reversed_decay, **options),
        "gradual": _two(pairs, _backbone_and_head, plan=recipes.gradual, **options),
        "gradual, layer decay": _two(decays, layer_decay, plan=recipes.gradual, **options),
        "head, then all": _two(pairs, _backbone_and_head, plan=recipes.head_then_all, **options),
        "L2-SP": [Strategy(f"{lr:g}, {strength:g}", uniform(lr), **options | {"optimizer": recipes.l2_sp(strength)})
                  for lr, strength in pulls],
    }


def strategies(task: Task) -> Tries:
    """Six tries for each of ten ways."""
    return _ways(
        scratch=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2), head=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        one=(1e-4, 3e-4, 6e-4, 1e-3, 2e-3, 3e-3),
        pairs=[(1e-4, 1e-3), (1e-4, 3e-3), (3e-4, 1e-3), (3e-4, 3e-3), (3e-4, 1e-2), (1e-3, 3e-3)],
        decays=[(lr, decay) for lr in (1e-3, 3e-3) for decay in (0.3, 0.5, 0.7)],
        pulls=[(lr, strength) for lr in (1e-3, 2e-3) for strength in (3, 10, 30)],
        optimizer=torch.optim.AdamW)  # as it was recorded, before fused steps were the default


def robustness(task: Task, grid: Sequence[float] = tuple(_between(3e-4, 3e-2)), **options) -> Tries:
    """One rate for all and three decays, over a grid of the head's rate."""
    return {"uniform": _one(grid, **options)} | {
        f"decay {decay:g}": _one(grid, _decayed(decay), **options) for decay in (0.9, 0.7, 0.5)}


def labels(task: Task) -> Tries:
    """The head alone, one rate, and layer decay."""
    return {"head only": _one(_between(3e-3, 3e-2), plan=recipes.head_only),
            "uniform": _one(_between(3e-4, 3e-3)),
            "layer decay": _one(_between(1e-3, 1e-2), _decayed(0.5))}


def surgery(task: Task) -> Tries:
    """One stage alone, all at one rate, or all at graded rates; where the task has a new head, that trains in any case."""
    always = ("head",) if task.new_head else ()
    return {stage: _one(_between(3e-4, 3e-2), plan=recipes.only(*dict.fromkeys((stage, *always)))) for stage in STAGES[:-1]} | {
        "head": _one(_between(1e-3, 1e-1), plan=recipes.head_only),
        "all": _one(_between(1e-4, 1e-2)),
        "layer decay": _one(_between(3e-4, 3e-2), _decayed(0.5)),
        "reversed decay": _one(_between(3e-4, 3e-2), partial(recipes.reversed_decay, decay=0.5))}


def surgery_tasks() -> list[Task]:
    """Shifts at the input, of the features (print to handwriting), and at the output."""
    common = {"per_class": 5, "val_per_class": 5, "steps": 40}
    return [Task(printed_glyphs(64 * 36, seed=4242, shift=shift), name=shift, test_per_class=10, batch_size=32,
                 new_head=False, **common) for shift in ("blurred", "noisy", "permuted")] + [
        Task(handwritten_digits(), name="handwriting", test_per_class=64, **common)]


def schedule_tries(task: Task) -> Tries:
    """Four shapes with one rate and with layer decay; the rate is the highest of the run (and the head's)."""
    shapes = {"constant": None,
              "slanted triangular": schedules.slanted_triangular,
              "warm-up and cosine": lambda optimizer, steps: schedules.warmup_cosine(
                  optimizer, steps, warmup_steps=steps // 10),
              "one cycle": schedules.one_cycle}
    return {f"{shape}, {name}": _one(lrs, rates, schedule=schedule) for shape, schedule in shapes.items()
            for name, rates, lrs in (
                ("uniform", uniform, _between(1e-4, 3e-3)), ("layer decay", _decayed(0.5), _between(3e-4, 1e-2)))}


def optimizers(task: Task) -> Tries:
    """Optimizers at one rate for all layers: six rates each, half a decade apart, from a start of its own."""
    make: dict[str, Callable] = {
        name: lambda groups, name=name: LayerAdaptiveLR(groups, direction=name) for name in ("momentum", "adam", "adam_mini")}
    make |= {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW, "SGD": lambda groups: torch.optim.SGD(groups, momentum=0.9),
             # Its block rule, with each tensor as a block: the same direction without the ratio.
             "Adam-mini": lambda groups: LayerAdaptiveLR(groups, direction="adam_mini", ratio_range=(1.0, 1.0)),
             "LARS": _timm("Lars", momentum=0.9), "LAMB": _timm("Lamb")}
    starts = {"momentum": -2, "adam": -4, "adam_mini": -4, "SGD": -3.5, "LARS": -1, "LAMB": -3.5}  # powers of ten
    return {name: _one([float(f"{10 ** (starts.get(name, -4.5) + i / 2):.0e}") for i in range(6)], optimizer=made)
            for name, made in make.items()}


def _timm(name: str, **options) -> Callable:
    """An optimizer of timm, which the extra ``compare`` installs."""
    def make(groups):
        import timm.optim

        return getattr(timm.optim, name)(groups, **options)

    return make


def depth(task: Task) -> Tries:
    """The first stages keep their pretrained weights, the others start anew; the kept ones are frozen or trained on."""
    lrs = _between(3e-4, 3e-2)
    kept = range(1, len(STAGES))
    return {"keep 0": _one(lrs, weights=None)} | {
        f"keep {n}, fine-tuned": _one(lrs, keep=n) for n in kept} | {
        f"keep {n}, frozen": _one(lrs, keep=n, plan=recipes.all_but_first(n)) for n in kept}


def automatic(task: Task) -> Tries:
    """Rates from the gradients, of the first batch or of every one, beside rates set by hand."""
    low, high = _between(3e-4, 1e-2), _between(1e-3, 3e-2)
    return {"uniform": _one(low),
            "layer decay": _one(low, _decayed(0.5)),
            "relative gradients, first batch": _one(high, relative_gradient_rates, look_first=True),
            "Auto-RGN, every batch": _one(high, optimizer=recipes.auto_rgn)}


STUDIES = {
    "strategies": Study("Which way to fine-tune 100 digits is best?", lambda: [Task(handwritten_digits(), name="digits")],
                        strategies),
    "robustness": Study("How wide is the range of good rates, with and without layer decay?", lambda: [digits()], robustness,
                        choose=False),
    "labels": Study("With how many labels does the strategy matter?",
                    lambda: [digits(per_class=n, name=f"{n} a class") for n in (2, 5, 10, 20, 50)], labels),
    "surgery": Study("Which stage should be tuned under which shift?", surgery_tasks, surgery),
    "schedules": Study("Which schedule, and does it matter for layer-wise rates?", lambda: [digits()], schedule_tries),
    "optimizers": Study("Does a rate for each layer from its gradients beat Adam? (needs timm for LARS and LAMB)",
                        lambda: [all_digits()], optimizers),
    "depth": Study("How many stages are worth keeping, frozen or fine-tuned?", lambda: [digits()], depth),
    "automatic": Study("Do rates from relative gradient norms beat rates that are set by hand?", lambda: [all_digits()],
                       automatic),
}


# --- photographs ------------------------------------------------------------------------------------------------------

def photo_strategies(task: Task) -> Tries:
    """Four tries for each of ten ways, from a network that torchvision trained on ImageNet."""
    return _ways(
        scratch=_between(3e-4, 1e-2), head=_between(1e-3, 3e-2), one=_between(3e-5, 1e-3),
        pairs=[(3e-5, 1e-3), (1e-4, 1e-3), (1e-4, 3e-3), (3e-4, 3e-3)],
        decays=[(1e-4, 0.7), (3e-4, 0.7), (1e-3, 0.7), (1e-3, 0.5)],
        pulls=[(1e-4, 10), (3e-4, 10), (1e-3, 3), (1e-3, 10)], weights="DEFAULT")


def photo_tasks(folders: Mapping[str, str], architecture: str) -> list[Task]:
    """Tasks by name from folders of images, 20 a class to train on; torchvision's architecture and its default weights.

    Another architecture than ResNet-18 becomes a part of the name, so that its rows are not taken for those of the other.
    """
    def load(weights: str | None) -> torch.nn.Module:
        return torchvision.models.get_model(architecture, weights=weights)

    return [Task(image_folder(path, image_size=128), per_class=20, val_per_class=15, test_per_class=50, steps=40,
                 name=name if architecture == "resnet18" else f"{name}, {architecture}", load=load)
            for name, path in folders.items()]


PHOTOGRAPHS = {
    "photographs": ("Which way to fine-tune is best on photographs, such as yours?", photo_strategies, True),
    "photographs-robustness": ("How wide is the range of good rates on photographs, such as yours?",
                               partial(robustness, grid=_between(3e-5, 1e-2), weights="DEFAULT"), False),
}


def photograph_study(name: str, folders: Mapping[str, str], architecture: str = "resnet18") -> Study:
    """The study of photographs with that name, on these folders (see :func:`photo_tasks`)."""
    question, tries, choose = PHOTOGRAPHS[name]
    return Study(question, lambda: photo_tasks(folders, architecture), tries, choose)
