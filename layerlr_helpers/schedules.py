"""Learning-rate schedules for several groups. Each multiplies, so the ratios between the groups stay as they were.

Every function returns one of torch's own schedulers, to be stepped after each optimizer step. The peak of each
group is the rate that the group was made with, even if another schedule has moved it since.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pandas as pd
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from layerlr_helpers.param_groups import named, trainable
from layerlr_helpers.unfreezing import ProgressiveUnfreezing, UnfreezePlan


@dataclass
class SlantedTriangle:
    """The factor of :func:`slanted_triangular` as a function of the step; an object, so that it can be pickled."""

    total_steps: int
    cut_frac: float = 0.1
    ratio: float = 32
    restarts: tuple[int, ...] = ()

    def __call__(self, step: int) -> float:
        start = max((restart for restart in self.restarts if restart <= step), default=0)
        end = min((restart for restart in self.restarts if restart > step), default=self.total_steps)
        length = end - start
        step, cut = min(step - start, length), _rising_steps(length, self.cut_frac)
        part = step / cut if step < cut else 1 - (step - cut) / (length - cut)
        return (1 + part * (self.ratio - 1)) / self.ratio


@dataclass
class WarmupCosine:
    """The factor of :func:`warmup_cosine` as a function of the step."""

    total_steps: int
    warmup_steps: int
    final_factor: float = 0.0

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        part = min((step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1), 1.0)
        return self.final_factor + (1 - self.final_factor) * (1 + math.cos(math.pi * part)) / 2


def slanted_triangular(optimizer: Optimizer, total_steps: int, *, cut_frac: float = 0.1, ratio: float = 32,
                       restarts: Sequence[int] = ()) -> LambdaLR:
    """A short linear rise to each group's rate over the first ``cut_frac`` of the steps, then a long linear fall.

    It starts and ends at 1/``ratio`` of the peak. With ``restarts`` a new triangle begins at each of these steps,
    which with gradual unfreezing are the steps at which a group unfreezes. From ULMFiT (Howard and Ruder, 2018).
    A triangle too short to have a step that rises is a ValueError.
    """
    _check_steps(total_steps)
    if not 0 < cut_frac < 1:
        raise ValueError(f"cut_frac must be between 0 and 1, not {cut_frac}; it is the part of the steps that rise")
    if ratio < 1:
        raise ValueError(f"ratio must be at least 1, not {ratio}; it is the peak divided by the lowest rate")
    if outside := [restart for restart in restarts if not 0 < restart < total_steps]:
        raise ValueError(f"restarts must be between step 0 and step {total_steps}, not at {outside}")
    shortest = min(end - start for start, end in pairwise([0, *sorted(restarts), total_steps]))
    if _rising_steps(shortest, cut_frac) < 1:
        raise ValueError(f"a triangle of {shortest} steps has no step to rise in with cut_frac={cut_frac}; it needs "
                         f"at least {max(math.ceil(1 / cut_frac - 1e-9), 2)} steps")
    return _scheduler(optimizer, SlantedTriangle(total_steps, cut_frac, ratio, tuple(sorted(restarts))))


def warmup_cosine(optimizer: Optimizer, total_steps: int, *, warmup_steps: int, final_factor: float = 0.0) -> LambdaLR:
    """A linear rise to each group's rate over ``warmup_steps``, then half a cosine down to ``final_factor`` of it.

    The cosine is that of SGDR (Loshchilov and Hutter, 2017). The floor is a part of each group's own rate, where
    torch's ``CosineAnnealingLR(eta_min=…)`` drives all groups to one number and so loses their ratios. A warm-up that
    leaves no step for the cosine and a ``final_factor`` outside [0, 1] are a ValueError.
    """
    _check_steps(total_steps)
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(f"warmup_steps must be at least 0 and below total_steps={total_steps}, not {warmup_steps}")
    if not 0 <= final_factor <= 1:
        raise ValueError(f"final_factor must be between 0 and 1, not {final_factor}; it is a part of the group's rate")
    return _scheduler(optimizer, WarmupCosine(total_steps, warmup_steps, final_factor))


def one_cycle(optimizer: Optimizer, total_steps: int, **torch_kwargs) -> OneCycleLR:
    """torch's ``OneCycleLR`` with each group's own rate as its peak; a scalar ``max_lr`` would wipe the ratios out.

    From Smith and Topin (2019), whose three phases are ``three_phase=True``; without it there are two, as in torch and fastai.
    ``torch_kwargs`` are those of ``OneCycleLR``, except ``max_lr``. Momentum is cycled, as in torch, but only if the optimizer
    has one: torch would switch it on in an SGD that was made without.
    """
    _check_steps(total_steps)
    if "max_lr" in torch_kwargs:
        raise ValueError("one_cycle takes each group's peak from the group's lr; set the rates there, not with max_lr")
    _check_no_scale(optimizer)
    groups = optimizer.param_groups  # torch cycles the one name or the other, and not both in one optimizer
    has_momentum = all(group.get("momentum") for group in groups) or all("betas" in group for group in groups)
    return OneCycleLR(optimizer, max_lr=[peak_rate(group) for group in optimizer.param_groups], total_steps=total_steps,
                      **{"cycle_momentum": has_momentum, **torch_kwargs})


def peak_rate(group: dict) -> float:
    """The rate that a group was made with: its ``lr``, or what a schedule that already moves it remembers."""
    return float(group.get("max_lr", group.get("initial_lr", group["lr"])))


def preview(groups: Optimizer | Sequence[dict], schedule: Callable[[Optimizer], LRScheduler] | None, total_steps: int, *,
            plan: UnfreezePlan | ProgressiveUnfreezing | None = None) -> pd.DataFrame:
    """The learning rate of every group (columns) at every step (rows), found by rehearsing the schedule on a stand-in.

    Args:
        groups: an optimizer or its parameter groups; they are not changed.
        schedule: a function that makes the schedule of an optimizer, e.g. ``lambda o: one_cycle(o, 500)``; None means
            constant rates. One that follows the loss is a ValueError, since its rates cannot be known.
        plan: a group's rate is 0 until the plan unfreezes it. Pass the ``ProgressiveUnfreezing`` itself where BatchNorm
            layers train also in frozen groups. Without a plan, a group that is frozen now stays so.
    """
    _check_steps(total_steps)
    group_of_name = named(groups)
    if schedule is not None and not callable(schedule):
        raise TypeError(f"schedule must be a function that makes one, such as lambda o: one_cycle(o, {total_steps}), not a "
                        f"{type(schedule).__name__}")
    trains_at = _training_groups(group_of_name, plan)
    optimizer = _Rehearsal(group_of_name.values(), getattr(groups, "defaults", {}))
    scheduler = schedule(optimizer) if schedule is not None else None
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError("ReduceLROnPlateau follows the loss, so its rates cannot be known before training")
    rows = []
    for step in range(total_steps):
        training = trains_at(step)
        rows.append({name: float(group["lr"]) if name in training else 0.0
                     for name, group in zip(group_of_name, optimizer.param_groups, strict=True)})
        if scheduler is not None and step + 1 < total_steps:
            optimizer.step()
            scheduler.step()
    return pd.DataFrame(rows, index=pd.RangeIndex(total_steps, name="step"))


class _Rehearsal(Optimizer):
    """Stands in for an optimizer: the same groups and options, but other parameters, and steps that do nothing."""

    def __init__(self, groups: Iterable[dict], defaults: dict):
        options = [{key: copy.deepcopy(value) for key, value in group.items() if key not in ("params", "param_names")}
                   for group in groups]
        super().__init__([{**option, "params": [torch.nn.Parameter(torch.zeros(1))]} for option in options],
                         {"lr": 0.0, **{key: value for option in options for key, value in option.items()}, **defaults})

    def step(self, closure=None):
        """Do nothing: a schedule only checks that a step was made."""


def _training_groups(group_of_name: dict[str, dict], plan) -> Callable[[int], set[str]]:
    """A function from the step to the names of the groups that train at it."""
    if plan is None:
        return lambda step: {name for name, group in group_of_name.items() if trainable(group)}
    if isinstance(plan, ProgressiveUnfreezing):
        return lambda step: {name for name, group in group_of_name.items()
                             if plan.training_at(step) & {id(p) for p in group["params"]}}
    layers = {name: group.get("layer", name) for name, group in group_of_name.items()}
    plan = plan.resolved(list(dict.fromkeys(layers.values())))
    never = {name for name, group in group_of_name.items() if len(group.get("fixed", ())) == len(group["params"])}
    return lambda step: {name for name, layer in layers.items() if layer in plan.trainable_at(step)} - never


def _rising_steps(length: int, cut_frac: float) -> int:
    """How many of a triangle's steps rise; the last is left to fall. 0.29 of 100 is 29, though the product is 28.999…"""
    return min(int(length * cut_frac + 1e-9), length - 1)


def _scheduler(optimizer: Optimizer, factor: Callable[[int], float]) -> LambdaLR:
    """A scheduler that multiplies each group's peak rate by ``factor(step)``."""
    _check_no_scale(optimizer)
    for group in optimizer.param_groups:
        if "max_lr" in group:  # a one-cycle schedule left its low start as initial_lr, which LambdaLR would take for the peak
            group["initial_lr"] = group.pop("max_lr")
    scheduler = LambdaLR(optimizer, factor)
    scheduler.total_steps = factor.total_steps  # as torch's OneCycleLR has it, so that fit can compare it with the run
    return scheduler


def _check_no_scale(optimizer: Optimizer) -> None:
    """Groups with ``lr_scale`` remember the highest rate of all, and a schedule would start each of them from it."""
    if any("lr_scale" in group for group in optimizer.param_groups):
        raise ValueError("these groups were made with lr_scale=True, for schedulers that multiply by it; make them without it")


def _check_steps(total_steps: int) -> None:
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, not {total_steps}")
