"""The learning-rate range test: which rates a network can stand, for all layers or for one."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.optim import Optimizer

from layerlr_helpers.checkpoints import RunState
from layerlr_helpers.guards import training_undone
from layerlr_helpers.history import DivergedError
from layerlr_helpers.naming import matching
from layerlr_helpers.objectives import Objective
from layerlr_helpers.param_groups import named
from layerlr_helpers.schedules import peak_rate
from layerlr_helpers.training import optimizer_mode, train_step


@dataclass(frozen=True)
class RangeTest:
    """The result of :func:`lr_range_test`: a frame with ``factor``, ``loss``, ``smooth_loss``, and the suggestion."""

    frame: pd.DataFrame
    suggestion: float


def lr_range_test(model: nn.Module, optimizer: Optimizer, train_loader: Iterable, *, steps: int = 60,
                  low: float = 1e-2, high: float = 1e2, sweep: str = "*", diverged: float = 4.0,
                  loss_fn=None, autocast: torch.dtype | None = None) -> RangeTest:
    """Train with every group's rate times a factor that grows from ``low`` to ``high``, and watch the loss.

    All groups grow together, so the ratios between them stay (Smith, 2017, has one rate). With ``sweep``, the name of a
    layer group or a pattern, only those groups move and the others stand still, at a rate of 0. The test stops when the
    smoothed loss exceeds ``diverged`` times its lowest or is not finite. The suggestion is the factor at which the loss
    falls fastest, by a line through several neighbouring steps; not a number if it never falls. Model, optimizer and
    random numbers are afterwards what they were. A group's rate is the one that it was made with, wherever a schedule has
    moved it since. Batches, ``loss_fn`` and ``autocast`` are as in ``fit``. Fewer than 10 steps, a ``sweep`` that fits no
    group, an optimizer that finds its own rates and a loss that is not finite from the start are a ValueError.
    """
    if steps < 10 or not 0 < low < high:
        raise ValueError(f"need at least 10 steps and 0 < low < high, not steps={steps}, low={low}, high={high}")
    if own := [name for name, group in named(optimizer).items() if group.get("lr") is None]:
        raise ValueError(f"this optimizer finds the rates of {', '.join(own)} itself (lr is None), so there is none to test")
    layers = [group.get("layer", name) for name, group in named(optimizer).items()]
    swept = set(matching(sweep, list(dict.fromkeys(layers))))
    factors = low * (high / low) ** (np.arange(steps) / (steps - 1))
    losses: list[float] = []
    smooth: list[float] = []
    objective = Objective(loss_fn)
    with training_undone(model, optimizer, train_loader), optimizer_mode(optimizer, "train", afterwards="eval"):
        peaks = [peak_rate(group) for group in optimizer.param_groups]
        model.train()
        batches = (batch for _ in itertools.count() for batch in RunState().remaining_batches(train_loader))  # of many epochs
        for factor in factors:
            for group, layer, peak in zip(optimizer.param_groups, layers, peaks, strict=True):
                group["lr"] = peak * factor if layer in swept else 0.0
            try:
                losses.append(train_step(model, optimizer, next(batches), None, objective, autocast)["loss"])
            except DivergedError as error:
                losses.append(error.value)
            smooth.append(pd.Series(losses).ewm(alpha=0.1).mean().iloc[-1])
            if not np.isfinite(losses[-1]) or smooth[-1] > diverged * min(smooth):
                break
    frame = pd.DataFrame({"factor": factors[:len(losses)], "loss": losses, "smooth_loss": smooth})
    steady = frame[np.isfinite(frame.loss)]
    if len(steady) < 2:
        raise ValueError(f"the loss was {losses} from the start, so no factor can be suggested; try a smaller low than {low}")
    return RangeTest(frame, _steepest_fall(steady))


def _steepest_fall(frame: pd.DataFrame, window: int = 9) -> float:
    """The factor in the middle of the window in which a line through the losses falls most steeply."""
    falling = frame.iloc[:int(np.argmin(frame.smooth_loss)) + 1]  # later falls are only the way back from a spike
    window = min(window, len(falling))
    if window < 2:
        return float("nan")
    logs, losses = np.log(falling.factor.to_numpy()), falling.loss.to_numpy()
    starts = range(len(falling) - window + 1)
    slopes = [np.polyfit(logs[i:i + window], losses[i:i + window], 1)[0] for i in starts]
    best = int(np.argmin(slopes))
    return float(falling.factor.iloc[best + window // 2]) if slopes[best] < 0 else float("nan")
