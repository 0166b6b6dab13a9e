"""Checks of the exercises of notebook 03, on learning-rate schedules for several groups."""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import combinations, pairwise

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, StepLR
from torch.utils.data import DataLoader, TensorDataset

from layerlr_helpers.course.exercises.exercise import Exercise, Wrong, require, require_function, require_same, same, weights_of
from layerlr_helpers.schedules import WarmupCosine, preview, slanted_triangular, warmup_cosine
from layerlr_helpers.unfreezing import UnfreezePlan


def _groups(*rates: float) -> list[dict]:
    """A parameter group for each rate, with the names a, b, c …"""
    return [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr, "name": name}
            for name, lr in zip("abcdef", rates, strict=False)]


def _check_factor(answer) -> None:
    require_function(answer)
    for total, warmup, floor in ((40, 8, 0.1), (100, 5, 0.0), (12, 0, 0.3)):
        found = [answer(step, total, warmup, floor) for step in range(total)]
        if empty := [step for step, factor in enumerate(found) if factor is None]:
            raise Wrong(f"the function returned nothing, that is None, for step {empty[0]} of {total}; does each way "
                        "through it end with return?")
        _check_curve(found, total, warmup, floor)


def _check_curve(found: list, total: int, warmup: int, floor: float) -> None:
    def cosine(part: float) -> float:
        return (1 + math.cos(math.pi * part)) / 2

    def floored(part: float) -> float:
        return floor + (1 - floor) * cosine(part)

    def part(step: int) -> float:
        return (step - warmup) / (total - warmup)

    def rise(step: int) -> float:
        return (step + 1) / (warmup + 1)

    def curve(fall: Callable[[int], float], rise: Callable[[int], float] = rise) -> list[float]:
        return [rise(step) if step < warmup else fall(step) for step in range(total)]

    def right(step: int) -> float:
        return floored(part(step))

    require_same(found, curve(right), {
        "the warm-up begins with a factor of 0, so the first step would be wasted":
            curve(right, lambda step: step / warmup),
        "the warm-up reaches 1 one step too early": curve(right, lambda step: (step + 1) / warmup),
        "there is no warm-up: the factor is the cosine from step 0 on": [floored(step / total) for step in range(total)],
        "the factor jumps where the warm-up ends; the cosine has to begin there, at 1":
            curve(lambda step: floored(step / total)),
        "the cosine begins where it should, but it does not get to its end. How many steps does the warm-up leave for it?":
            curve(lambda step: floored((step - warmup) / total)),
        "your fall ends at step total_steps - 1; let it end one step later":
            curve(lambda step: floored((step - warmup) / (total - 1 - warmup))),
        "that is a whole wave, which rises again; half a wave was asked for": curve(lambda step: floored(2 * part(step))),
        "after the warm-up the factor falls in a straight line": curve(lambda step: 1 - (1 - floor) * part(step)),
        "the floor is not used, so the factor falls to 0": curve(lambda step: cosine(part(step))),
        "the floor cuts the cosine off, so the end of the run is flat. Let the cosine itself end at the floor":
            curve(lambda step: max(floor, cosine(part(step)))),
        "the floor is added to the cosine, so the factor is greater than 1 at the peak":
            curve(lambda step: floor + cosine(part(step))),
        "the floor raises the warm-up, too; it is meant for the cosine only":
            curve(right, lambda step: floor + (1 - floor) * rise(step)),
        "a cosine lies between -1 and 1; it still has to be brought between the floor and 1":
            curve(lambda step: math.cos(math.pi * part(step))),
    }, f"with {total} steps, {warmup} of them warm-up, and a floor of {floor:g}, " + _first_difference(found, curve(right)))


def _first_difference(found: Sequence, expected: Sequence[float]) -> str:
    """Where two lists of numbers begin to differ, in words."""
    step = next((step for step, value in enumerate(expected) if not same(found[step], value)), 0)
    return f"step {step} has to give {expected[step]:.6g}, and yours gives {found[step]}"


def _check_floor(answer) -> None:
    require_function(answer)
    for rates, total, share in (((1e-4, 1e-2), 50, 0.05), ((2e-3, 5e-4, 3e-2), 30, 0.2)):
        def schedule(optimizer: Optimizer, total: int = total, share: float = share) -> LRScheduler:
            scheduler = answer(optimizer, total, share)
            require(isinstance(scheduler, LRScheduler),
                    f"the function has to return the scheduler that it has made, and it returned {scheduler!r}")
            return scheduler

        _check_falling_rates(preview(_groups(*rates), schedule, total), rates, total, share)


def _check_falling_rates(found: pd.DataFrame, rates: Sequence[float], total: int, share: float) -> None:
    def table(schedule: Callable[[Optimizer], LRScheduler]) -> list[list[float]]:
        return preview(_groups(*rates), schedule, total).to_numpy().tolist()

    def one_floor(floor: float) -> list[list[float]]:
        return table(partial(CosineAnnealingLR, T_max=total, eta_min=floor))

    def own_floors(total_steps: int = total) -> list[list[float]]:
        return table(partial(warmup_cosine, total_steps=total_steps, warmup_steps=0, final_factor=share))

    found, right = found.to_numpy().tolist(), own_floors()
    step = next((step for step in range(total) if not same(found[step], right[step])), 0)
    require_same(found, right, {
        "the floor is still 1e-5 for all groups, so at the end they have nearly the same rate": one_floor(1e-5),
        "the share itself is the floor here. But eta_min is a rate, and this one is higher than those of the groups":
            one_floor(share),
        "the ratios are kept, but the rates fall to 0: the share is missing": one_floor(0.0),
        **{f"the floor is the share of one rate, {rate:g}, for all groups; each group needs a floor of its own":
           one_floor(share * rate) for rate in rates},
        "the floor cuts the cosine off, so the end of the run is flat. Let the cosine itself end at the floor":
            table(partial(LambdaLR, lr_lambda=lambda step: max(share, WarmupCosine(total, 0)(step)))),
        "the rates never change": [list(rates)] * total,
        "the floor is reached one step too early; the cosine has to end at step total_steps, right after the last one":
            own_floors(total - 1),
    }, f"the groups begin at {_list_of(rates)}, and with a share of {share:g} at step {step} of {total} they need the rates "
       f"{_list_of(right[step])}, on half a cosine; yours are {_list_of(found[step])}")


def _list_of(rates: Iterable[float]) -> str:
    return ", ".join(f"{rate:.3g}" for rate in rates)


def _check_milestones(answer) -> None:
    require_function(answer)
    for images, batch_size, drop_last, after in ((100, 20, False, [10, 16]), (103, 20, False, [2, 3, 7]), (103, 25, True, [4])):
        loader = DataLoader(TensorDataset(torch.zeros(images, 1)), batch_size, drop_last=drop_last)
        found = answer(loader, list(after))
        if not isinstance(found, Iterable) or isinstance(found, str):
            raise Wrong(f"the function has to return a list of milestones, and it returned {found!r}")
        batches = len(loader)
        require_same(sorted(found), [epoch * batches for epoch in after], {
            "these are still epochs, so all falls come in the first few epochs. The schedule counts calls, one for each batch":
                after,
            "these are numbers of images. The schedule is stepped once for each batch": [epoch * images for epoch in after],
            "that counts batch_size calls for an epoch, but batch_size is the number of images in a batch":
                [epoch * batch_size for epoch in after],
            "with 103 images and batches of 20 the last batch of an epoch has only 3 images, but it is a batch, too":
                [epoch * (images // batch_size) for epoch in after],
            "this loader leaves the last, incomplete batch out (drop_last=True). Who knows how many batches it gives?":
                [epoch * math.ceil(images / batch_size) for epoch in after],
            "the rate falls one epoch too early: after epoch 10 means when 10 epochs are over":
                [(epoch - 1) * batches for epoch in after],
            "the rate falls one epoch too late": [(epoch + 1) * batches for epoch in after],
            "the rate falls one batch too early. After one epoch of 5 batches, how many calls has the schedule had?":
                [epoch * batches - 1 for epoch in after],
            "the rate falls one batch too late, after the first batch of the next epoch":
                [epoch * batches + 1 for epoch in after],
            "these are the distances from one fall to the next; each milestone counts from the start of the run":
                sorted((epoch - before) * batches for before, epoch in pairwise([0, *after])),
        }, f"this loader gives {batches} batches an epoch, and the rate shall fall when {' and '.join(map(str, after))} epochs "
           f"are over; your milestones are {found}")


def _check_loop(answer) -> None:
    require_function(answer)
    for n_batches, epochs, make in ((4, 3, partial(warmup_cosine, warmup_steps=3, final_factor=0.1)),
                                    (6, 2, partial(slanted_triangular, cut_frac=0.4))):
        torch.manual_seed(epochs)
        start, total = nn.Linear(5, 3), n_batches * epochs
        loader = [(torch.randn(8, 5), torch.randint(3, (8,))) for _ in range(n_batches)]
        model, used = copy.deepcopy(start), []
        optimizer = SGD([{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 0.3}])
        schedule = make(optimizer, total_steps=total)
        optimizer.register_step_pre_hook(lambda optimizer, *_, used=used: used.append(optimizer.param_groups[0]["lr"]))
        answer(model, optimizer, schedule, loader, epochs)
        factor = schedule.lr_lambdas[0]
        _check_used(used, lambda calls, factor=factor: 0.1 * factor(calls), n_batches, epochs)
        expected = _trained(start, loader * epochs, [factor(step) for step in range(total)])
        require_same(weights_of(model), expected, {},
                     "the rates are right at each step, but the weights are not: each batch needs its own gradient, so what "
                     "happens to the gradient of the batch before?", tolerance=1e-4)


def _check_used(used: list[float], rate_after: Callable[[int], float], batches: int, epochs: int) -> None:
    """Whether the optimizer's steps were made with the right rates; ``rate_after`` knows the rate after so many calls."""
    total = batches * epochs
    require(used != [], "the optimizer never made a step, so nothing has been trained: schedule.step() only sets rates")
    require(len(used) == total, f"the optimizer made {len(used)} steps; {epochs} epochs of {batches} batches need {total}")

    def rates(calls_before: Callable[[int], int]) -> list[float]:
        return [rate_after(calls_before(step)) for step in range(total)]

    require_same(used, rates(lambda step: step), {
        "the rate never changed: the schedule made no step": rates(lambda step: 0),
        "the first rate of the schedule was never used, since the schedule makes its step before the optimizer does":
            rates(lambda step: step + 1),
        "the schedule made one step an epoch, so it never gets to its end. It was made for one after each batch":
            rates(lambda step: step // batches),
        "the schedule made a step too many at the end of each epoch": rates(lambda step: step + step // batches),
        "the optimizer's first step uses the second rate of the schedule already, and after each epoch one more rate is left "
        "out": rates(lambda step: step + 1 + step // batches),
        "the schedule made two steps for each batch": rates(lambda step: 2 * step),
        "the schedule made one step at the start of each epoch. It was made for one after each batch":
            rates(lambda step: step // batches + 1),
    }, "the rates at the optimizer's steps are not those of the schedule, one after the other. Yours begin with "
       f"{_list_of(used[:batches + 2])}, and those of the schedule with {_list_of(map(rate_after, range(batches + 2)))}")


def _trained(start: nn.Module, batches: list[tuple[Tensor, Tensor]], factors: list[float]) -> dict[str, Tensor]:
    """The weights after one step of plain gradient descent for each batch, at the rates of the check times these factors."""
    model = copy.deepcopy(start)
    for (inputs, labels), factor in zip(batches, factors, strict=True):
        model.zero_grad()
        cross_entropy(model(inputs), labels).backward()
        with torch.no_grad():
            model.weight -= 0.1 * factor * model.weight.grad
            model.bias -= 0.3 * factor * model.bias.grad
    return weights_of(model)


def _check_drift(answer) -> None:
    require_function(answer)
    falling = [lambda step: 1.0, lambda step: 1 / (1 + step / 10), lambda step: 1.0]
    away_and_back = [lambda step: 1.0, lambda step: 1.0 + (step % 20) / 10]
    plan = UnfreezePlan({"c": 0, "b": 5, "a": 12})
    apart = pd.DataFrame({"stem": [1e-3, 2e-3], "layer1": [2e-3, 1e-3], "head": [4e-3, 4e-3]})
    for rates in (preview(_groups(1e-4, 1e-2), partial(CosineAnnealingLR, T_max=40, eta_min=1e-5), 40),
                  preview(_groups(1e-4, 1e-3, 1e-2), partial(LambdaLR, lr_lambda=falling), 20),
                  preview(_groups(1e-3, 1e-2), partial(LambdaLR, lr_lambda=away_and_back), 41),
                  preview(_groups(1e-2, 1e-3, 1e-4), partial(CosineAnnealingLR, T_max=30, eta_min=2e-5), 25),
                  preview(_groups(2e-4, 6e-4, 3e-3), partial(CosineAnnealingLR, T_max=20, eta_min=1e-4), 20, plan=plan),
                  preview(_groups(3e-4, 3e-3), partial(StepLR, step_size=5), 20),
                  apart, apart[["head", "stem", "layer1"]]):
        found = answer(rates.copy())
        if isinstance(found, bool | np.bool_) or np.asarray(found).size != 1:
            raise Wrong(f"the function has to return one number, and it returned {found}")
        _check_drift_of(found, rates)


def _check_drift_of(found, rates: pd.DataFrame) -> None:
    require(found not in (math.inf, -math.inf) and found == found,
            f"your number is {found}. A group that does not train yet has a rate of 0, and a ratio with it makes no sense; "
            "leave these steps out for its pairs")
    ratios = {(one, other): (rates[one] / rates[other])[(rates[one] > 0) & (rates[other] > 0)]
              for one, other in combinations(rates, 2)}

    def largest(drift: Callable[[pd.Series], float], pairs: Iterable[tuple[str, str]] = tuple(ratios)) -> float:
        return max(drift(ratios[pair]) for pair in pairs)

    def spread(ratio: pd.Series) -> float:
        return ratio.max() / ratio.min()

    def end_over_start(ratio: pd.Series) -> float:
        return ratio.iloc[-1] / ratio.iloc[0]

    first, *_, last = rates
    require_same(found, largest(spread), {
        "all groups are compared with the last one only; take all pairs":
            largest(spread, [pair for pair in ratios if last in pair]),
        "all groups are compared with the first one only; take all pairs":
            largest(spread, [pair for pair in ratios if first in pair]),
        "that compares the last step with the first. A ratio can also go away and come back":
            largest(lambda ratio: max(end_over_start(ratio), 1 / end_over_start(ratio))),
        "that divides the ratio at the last step by that at the first. A ratio can also fall, or come back":
            largest(end_over_start),
        "that divides the ratio at the first step by that at the last. A ratio can also rise, or come back":
            largest(lambda ratio: 1 / end_over_start(ratio)),
        "that is the largest ratio itself. Groups with different rates have a large ratio all the time; how much does it "
        "change?": largest(lambda ratio: ratio.max()),
        "only the first and the last group are compared; take all pairs":
            spread(ratios[first, last]),
        "only groups that are neighbours are compared; take all pairs": largest(spread, pairwise(rates)),
        "that is a difference of ratios; divide the largest by the smallest, so that 1 means no drift":
            largest(lambda ratio: ratio.max() - ratio.min()),
        "that is how far the rates themselves fall. All of them may fall, as long as they do so alike":
            max(spread(rates[name][rates[name] > 0]) for name in rates),
    }, f"for groups whose rates begin with {_list_of(rates.iloc[0])} and end with {_list_of(rates.iloc[-1])}, the answer is "
       f"{largest(spread):.4g}, and yours is {found!r}")


EXERCISES = {
    "3.1": Exercise("Warm-up and cosine, with a floor", _check_factor,
                    "write the warm-up and the fall apart. For the fall, compute first which part of it is over: 0 where the "
                    "warm-up ends, and 1 at total_steps.",
                    "With LambdaLR(optimizer, lambda step: …) it multiplies the rates of all groups; that is warmup_cosine."),
    "3.2": Exercise("A floor that keeps the ratios", _check_floor,
                    "the floor has to be a factor and not a rate. Which of the notebook's three schedules for fine-tuning has "
                    "such a floor?", "With a factor for a floor the schedule only multiplies, so it keeps all ratios."),
    "3.3": Exercise("Milestones in the right unit", _check_milestones,
                    "how many times is the schedule stepped in one epoch? The loader knows its number of batches.",
                    "Preview it with the number of calls, and you see the falls where you wanted them."),
    "3.4": Exercise("A schedule that is stepped in the wrong places", _check_loop,
                    "how many calls of schedule.step() come before the first optimizer.step(), how many before the second, and "
                    "so on? It has to be 0, 1, 2 …", "Each rate of the schedule is now used once, in its turn."),
    "3.5": Exercise("Do the ratios drift?", _check_drift,
                    "the setup imports combinations. And max and min leave missing values out, so turn each rate of 0 into "
                    "one first.", "This is the notebook's ratio_drift."),
}
