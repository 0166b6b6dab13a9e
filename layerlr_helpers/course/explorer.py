"""Turn the knobs: how the head's rate, the decay, the schedule and the unfreezing plan set every group's rate."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, StepLR

from layerlr_helpers.course.plots import plot_rates, show
from layerlr_helpers.layers import LayerGroup
from layerlr_helpers.naming import check_choice
from layerlr_helpers.param_groups import layer_decay, param_groups
from layerlr_helpers.schedules import one_cycle, preview, slanted_triangular, warmup_cosine
from layerlr_helpers.unfreezing import UnfreezePlan

#: Schedules by name, each ``(optimizer, total_steps) -> scheduler``.
SCHEDULES = {
    "constant": lambda optimizer, n: ConstantLR(optimizer, factor=1),
    "one-cycle": one_cycle,
    "slanted triangular": slanted_triangular,
    "warm-up and cosine": lambda optimizer, n: warmup_cosine(optimizer, n, warmup_steps=n // 10),
    "StepLR, ×0.1 at each third": lambda optimizer, n: StepLR(optimizer, step_size=max(n // 3, 1), gamma=0.1),
    "cosine to eta_min=1e-5": lambda optimizer, n: CosineAnnealingLR(optimizer, T_max=n, eta_min=1e-5),
}


def rates_over_time(groups: Sequence[LayerGroup], *, head_lr: float, decay: float, schedule: str = "one-cycle",
                    plan_every: int | None = None, total_steps: int = 200) -> pd.DataFrame:
    """The learning rate of every group (columns) at every step (rows) with ``layer_decay(head_lr, decay)``.

    ``schedule`` is a name in ``SCHEDULES``. ``plan_every`` unfreezes one more group every so many steps, from the head down;
    None or 0 trains all from the start.
    """
    check_choice("schedule", schedule, SCHEDULES)
    plan = UnfreezePlan.top_down(groups, plan_every) if plan_every else None
    return preview(param_groups(groups, layer_decay(head_lr, decay)),
                   lambda optimizer: SCHEDULES[schedule](optimizer, total_steps), total_steps, plan=plan)


def ratio_drift(rates: pd.DataFrame) -> float:
    """By which factor the ratio between two groups' rates changes in the course of a run, at most.

    Of every pair of columns, the largest ratio divided by the smallest, over the steps at which both groups have a rate
    above 0; then the largest of all pairs. 1 means that the schedule did nothing but multiply.
    """
    logs = np.log(rates.where(rates > 0))
    spans = [(logs[a] - logs[b]).max() - (logs[a] - logs[b]).min() for a, b in combinations(logs, 2)]
    return float(np.exp(np.nanmax([0.0, *spans])))


def explorer(groups: Sequence[LayerGroup]):
    """An ipywidgets box with a slider or menu for each knob of :func:`rates_over_time`, the figure and a sentence.

    It takes a running kernel to answer; without one a notebook shows a text in its place.
    """
    import ipywidgets as widgets  # here: the package does not need it, only the course

    class Explorer(widgets.VBox):
        def __repr__(self) -> str:  # what a page without a kernel shows in its place
            return "(an explorer with sliders: run this notebook to use it)"

    def draw(**settings) -> None:
        rates = rates_over_time(groups, **settings)
        show(plot_rates(rates), alt=_in_words(rates))
        print(_in_words(rates))

    shape = {"style": {"description_width": "150px"}, "layout": {"width": "440px"}}
    slider = {"continuous_update": False, **shape}  # draws when the slider is let go
    knobs = {
        "head_lr": widgets.FloatLogSlider(3e-3, min=-5, max=-1, description="head rate", readout_format=".1e", **slider),
        "decay": widgets.FloatSlider(0.6, min=0.2, max=1.0, step=0.05, description="decay per group", **slider),
        "schedule": widgets.Dropdown(options=list(SCHEDULES), value="one-cycle", description="schedule", **shape),
        # At most the interval with which the lowest group still begins within the 200 steps.
        "plan_every": widgets.IntSlider(0, min=0, max=200 // len(groups), description="unfreeze one every (steps)", **slider),
    }
    return Explorer([*knobs.values(), widgets.interactive_output(draw, knobs)])


def _in_words(rates: pd.DataFrame) -> str:
    """What the figure shows, for those who do not see it."""
    first, last = rates.columns[0], rates.columns[-1]
    drift = ratio_drift(rates)
    kept = "the ratios between groups stay as they were" if drift < 1.001 else f"a ratio changes by a factor of {drift:.3g}"
    trained = rates.gt(0).mean().mean()
    return (f"Peak: {rates[first].max():.1e} in {first}, {rates[last].max():.1e} in {last}. Over the run {kept}. "
            f"Groups train in {trained:.0%} of all (group, step) pairs.")
