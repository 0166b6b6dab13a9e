"""Candidates of a strategy that differ in one number or two, and are named by them."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from layerlr_helpers import schedules
from layerlr_helpers.param_groups import Rates, head_and_backbone, layer_decay, uniform
from layerlr_helpers.studies.compare import Strategy
from layerlr_helpers.studies.search import Grid

LEARNING_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 30.0)
HALVED = partial(layer_decay, decay=0.5)  # from the head down, each layer has half the rate of the next


def between(lowest: float, highest: float) -> list[float]:
    """Return the rates of ``LEARNING_RATES`` from the lowest to the highest, two to a decade."""
    return [lr for lr in LEARNING_RATES if lowest <= lr <= highest]


def candidate(*numbers: float, rates: Callable[..., Rates] = uniform, **options) -> Strategy:
    """Return a strategy that is named by numbers, from which ``rates`` makes its rates."""
    return Strategy(", ".join(f"{number:g}" for number in numbers), rates(*numbers), **options)


def at(numbers: Sequence[float], rates: Callable[..., Rates] = uniform, **options) -> list[Strategy]:
    """Return one candidate for each number."""
    return [candidate(number, rates=rates, **options) for number in numbers]


def line(lowest: float, highest: float, rates: Callable[..., Rates] = uniform, **options) -> Grid:
    """Return candidates for all of ``LEARNING_RATES``; the search begins with those from the lowest to the highest."""
    first = [(lr,) for lr in between(lowest, highest)]
    return on_grid(partial(candidate, rates=rates, **options), first, LEARNING_RATES)


def on_grid(make: Callable[..., Strategy], first: Sequence[tuple[float, ...]], *axes: Sequence[float]) -> Grid:
    """Return a candidate for each combination of numbers, one from each axis; the search begins with the ``first``."""
    place = {numbers: tuple(axis.index(number) for axis, number in zip(axes, numbers, strict=True))
             for numbers in product(*axes)}
    return Grid({place[numbers]: make(*numbers) for numbers in place}, [place[numbers] for numbers in first])


def warmup_and_cosine(optimizer: Optimizer, steps: int) -> LRScheduler:
    return schedules.warmup_cosine(optimizer, steps, warmup_steps=steps // 10)


def backbone_and_head(low: float, high: float) -> Rates:
    return head_and_backbone(backbone_lr=low, head_lr=high)
