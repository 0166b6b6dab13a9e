"""Candidates of a strategy that differ in one number or two, named by them."""

from collections.abc import Callable, Sequence
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from layerlr_helpers import schedules
from layerlr_helpers.param_groups import Rates, head_and_backbone, layer_decay, uniform
from layerlr_helpers.studies.compare import Strategy
from layerlr_helpers.studies.search import Line

GRID = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 30.0)
HALVED = partial(layer_decay, decay=0.5)  # from the head down, each layer has half the rate of the next


def between(lowest: float, highest: float) -> list[float]:
    """Return the rates of ``GRID`` from the lowest to the highest, two to a decade."""
    return [lr for lr in GRID if lowest <= lr <= highest]


def at(numbers: Sequence[float | tuple[float, ...]], rates: Callable[..., Rates] = uniform, **options) -> list[Strategy]:
    """Return one candidate for each number (or tuple of numbers), from which ``rates`` makes the rates."""
    tuples = [values if isinstance(values, tuple) else (values,) for values in numbers]
    return [Strategy(", ".join(f"{value:g}" for value in values), rates(*values), **options) for values in tuples]


def line(lowest: float, highest: float, rates: Callable[..., Rates] = uniform, **options) -> Line:
    """Return candidates for all of ``GRID``, of which the search begins with those from the lowest to the highest."""
    return Line(at(GRID, rates, **options), range(GRID.index(lowest), GRID.index(highest) + 1))


def warmup_and_cosine(optimizer: Optimizer, steps: int) -> LRScheduler:
    return schedules.warmup_cosine(optimizer, steps, warmup_steps=steps // 10)


def backbone_and_head(low: float, high: float) -> Rates:
    return head_and_backbone(backbone_lr=low, head_lr=high)
