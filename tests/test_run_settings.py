"""What a run was made with: every setting of every schedule counts, and how far it has come does not."""

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler as torch_schedules

from layerlr_helpers import one_cycle, slanted_triangular, warmup_cosine
from layerlr_helpers.checkpoints import run_description
from layerlr_helpers.run_settings import first_difference, schedule_settings, unmoved


def optimizer_of(rates=(0.1, 0.4)):
    return torch.optim.SGD([{"params": [nn.Parameter(torch.ones(2))], "lr": lr} for lr in rates], momentum=0.9)


def description(optimizer, schedule):
    parts = {"model": nn.Linear(2, 2), "optimizer": optimizer, "schedule": schedule, "unfreezing": None}
    return run_description(parts, [0])


def difference(make, before, now):
    """Between a run with the settings ``before`` and one with the settings ``now``, or None."""
    descriptions = []
    for settings in (before, now):
        optimizer = optimizer_of()
        descriptions.append(description(optimizer, make(optimizer, **settings)))
    return first_difference(*descriptions)


class Decay:
    """A factor that keeps its settings as attributes."""

    def __init__(self, rate, drops):
        self.rate, self.drops = rate, drops

    def __call__(self, step):
        return self.rate ** step * math.prod(factor for first, factor in self.drops.items() if step >= first)


class HasItsOwnCounter(torch_schedules.LRScheduler):
    """A schedule of the user's own, with progress under a name of its own and a function that it does not save."""

    def __init__(self, optimizer, factor, curve):
        self.factor, self.curve, self.calls = factor, curve, 0
        super().__init__(optimizer)

    def state_dict(self):
        return {"calls": self.calls}

    def get_lr(self):
        self.calls += 1
        return [lr * self.factor * self.curve(self.calls) for lr in self.base_lrs]


def power(rate, step):
    return rate ** step


def nested(optimizer, *, start=0.1, length=8, power=1.0, first=2):
    within = torch_schedules.ChainedScheduler([torch_schedules.PolynomialLR(optimizer, length, power),
                                               torch_schedules.ConstantLR(optimizer, 0.5, 3)])
    return torch_schedules.SequentialLR(optimizer, [torch_schedules.LinearLR(optimizer, start, 1.0, 2), within], [first])


# How each schedule is made, its settings, and another value of each.
SCHEDULES = {
    "StepLR": (torch_schedules.StepLR, {"step_size": 3, "gamma": 0.5}, {"step_size": 4, "gamma": 0.1}),
    "MultiStepLR": (torch_schedules.MultiStepLR, {"milestones": [3, 6], "gamma": 0.5}, {"milestones": [3, 6, 9], "gamma": 0.1}),
    "MultiStepLR, later": (torch_schedules.MultiStepLR, {"milestones": [3, 6]}, {"milestones": [3, 7]}),
    "ConstantLR": (torch_schedules.ConstantLR, {"factor": 0.5, "total_iters": 4}, {"factor": 0.25, "total_iters": 5}),
    "LinearLR": (torch_schedules.LinearLR, {"start_factor": 0.5, "end_factor": 1.0, "total_iters": 4},
                 {"start_factor": 0.25, "end_factor": 0.9, "total_iters": 6}),
    "ExponentialLR": (torch_schedules.ExponentialLR, {"gamma": 0.9}, {"gamma": 0.8}),
    "PolynomialLR": (torch_schedules.PolynomialLR, {"total_iters": 12, "power": 1.0}, {"total_iters": 13, "power": 5.0}),
    "CosineAnnealingLR": (torch_schedules.CosineAnnealingLR, {"T_max": 12, "eta_min": 0.0}, {"T_max": 8, "eta_min": 0.04}),
    "CosineAnnealingWarmRestarts": (torch_schedules.CosineAnnealingWarmRestarts, {"T_0": 4, "T_mult": 1, "eta_min": 0.0},
                                    {"T_0": 5, "T_mult": 2, "eta_min": 0.01}),
    "CyclicLR": (torch_schedules.CyclicLR, {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 4, "step_size_down": 4,
                                            "mode": "triangular", "gamma": 1.0, "base_momentum": 0.8, "cycle_momentum": True},
                 {"base_lr": 0.02, "max_lr": 0.2, "step_size_up": 5, "step_size_down": 6, "mode": "triangular2", "gamma": 0.9,
                  "base_momentum": 0.7, "cycle_momentum": False}),
    "CyclicLR with a function": (lambda optimizer, rate: torch_schedules.CyclicLR(
        optimizer, 0.01, 0.1, 4, scale_fn=lambda x: rate ** x), {"rate": 0.9}, {"rate": 0.8}),
    "OneCycleLR": (lambda optimizer, **settings: one_cycle(optimizer, **settings),
                   {"total_steps": 40, "pct_start": 0.3, "anneal_strategy": "cos", "div_factor": 25.0,
                    "final_div_factor": 1e4, "three_phase": False, "base_momentum": 0.85, "max_momentum": 0.95},
                   {"total_steps": 41, "pct_start": 0.6, "anneal_strategy": "linear", "div_factor": 20.0,
                    "final_div_factor": 1e3, "three_phase": True, "base_momentum": 0.8, "max_momentum": 0.9}),
    "LambdaLR": (lambda optimizer, rate: torch_schedules.LambdaLR(optimizer, lambda step: rate ** step),
                 {"rate": 0.9}, {"rate": 0.8}),
    "LambdaLR, of one group": (lambda optimizer, rate: torch_schedules.LambdaLR(
        optimizer, [lambda step: 0.9 ** step, lambda step: rate ** step]), {"rate": 0.9}, {"rate": 0.8}),
    "LambdaLR, late": (lambda optimizer, drop: torch_schedules.LambdaLR(optimizer, lambda step: 0.1 ** (step >= drop)),
                       {"drop": 90}, {"drop": 91}),
    "LambdaLR, a table": (lambda optimizer, table: torch_schedules.LambdaLR(optimizer, lambda step: table[step]),
                          {"table": [1.0] * 40}, {"table": [1.0] * 39 + [0.5]}),
    "LambdaLR, partial": (lambda optimizer, rate: torch_schedules.LambdaLR(optimizer, functools.partial(power, rate)),
                          {"rate": 0.9}, {"rate": 0.8}),
    "LambdaLR, an object": (lambda optimizer, rate, drops: torch_schedules.LambdaLR(optimizer, Decay(rate, drops)),
                            {"rate": 0.9, "drops": {3: 0.5}}, {"rate": 0.8, "drops": {3: 0.5, 6: 0.5}}),
    "MultiplicativeLR": (lambda optimizer, rate: torch_schedules.MultiplicativeLR(optimizer, lambda step: rate),
                         {"rate": 0.9}, {"rate": 0.8}),
    "ReduceLROnPlateau": (torch_schedules.ReduceLROnPlateau,
                          {"mode": "min", "factor": 0.5, "patience": 2, "threshold": 1e-4, "threshold_mode": "rel",
                           "cooldown": 1, "min_lr": 0.0, "eps": 1e-8},
                          {"mode": "max", "factor": 0.1, "patience": 3, "threshold": 1e-3, "threshold_mode": "abs",
                           "cooldown": 2, "min_lr": 0.01, "eps": 1e-7}),
    "nested": (nested, {"start": 0.1, "length": 8, "power": 1.0, "first": 2},
               {"start": 0.2, "length": 12, "power": 2.0, "first": 3}),
    "slanted_triangular": (slanted_triangular, {"total_steps": 40, "cut_frac": 0.2, "ratio": 32, "restarts": ()},
                           {"total_steps": 41, "cut_frac": 0.3, "ratio": 16, "restarts": (20,)}),
    "warmup_cosine": (warmup_cosine, {"total_steps": 40, "warmup_steps": 4, "final_factor": 0.0},
                      {"total_steps": 41, "warmup_steps": 5, "final_factor": 0.1}),
    "of the user's own": (HasItsOwnCounter, {"factor": 1.0, "curve": lambda step: 1 / step},
                          {"factor": 0.5, "curve": lambda step: 1 / step ** 2}),
}
CHANGES = [(name, setting) for name, (_, _, others) in SCHEDULES.items() for setting in others]


@pytest.mark.parametrize(("name", "setting"), CHANGES)
def test_a_change_of_any_setting_of_any_schedule_is_told(name, setting):
    make, settings, others = SCHEDULES[name]
    assert difference(make, settings, settings) is None
    problem = difference(make, settings, settings | {setting: others[setting]})
    assert problem.startswith(("it is of another run, where schedule / ", "it is of another run, where options / "))
    assert "; in this run it is " in problem


@pytest.mark.parametrize(("make", "before", "now", "problem"), [
    (torch_schedules.CosineAnnealingLR, {"T_max": 8}, {"T_max": 12}, "schedule / T_max was 8; in this run it is 12"),
    (nested, {}, {"length": 12}, "schedule / _schedulers / 1 / _schedulers / 0 / total_iters was 8; in this run it is 12"),
    (nested, {}, {"first": 4}, "schedule / _milestones / 0 was 2; in this run it is 4"),
    (SCHEDULES["LambdaLR"][0], {"rate": 0.5}, {"rate": 0.25},
     "schedule / lr_lambdas / 0 was 0.5 at step 1; in this run it is 0.25 at step 1"),
])
def test_the_setting_is_named_with_its_value_before_and_now(make, before, now, problem):
    assert difference(make, before, now) == f"it is of another run, where {problem}"


def test_another_schedule_within_a_schedule_is_told():
    def warmup_and(make):
        return lambda optimizer: torch_schedules.SequentialLR(optimizer, [
            torch_schedules.ConstantLR(optimizer), make(optimizer)], [2])

    optimizers = optimizer_of(), optimizer_of()
    before = schedule_settings(warmup_and(lambda o: torch_schedules.ExponentialLR(o, 0.5))(optimizers[0]))
    now = schedule_settings(warmup_and(lambda o: torch_schedules.StepLR(o, 1, 0.5))(optimizers[1]))
    assert "_schedulers / 1 / type was ExponentialLR; in this run it is StepLR" in first_difference(before, now)


@pytest.mark.filterwarnings("ignore:The epoch parameter")  # torch's own SequentialLR uses what torch deprecates
@given(name=st.sampled_from([name for name in SCHEDULES if name != "of the user's own"]), steps=st.integers(0, 30),
       losses=st.lists(st.floats(0, 10) | st.just(math.nan), min_size=30, max_size=30))
def test_how_far_a_schedule_has_come_is_none_of_its_settings(name, steps, losses):
    make, settings, _ = SCHEDULES[name]
    optimizer = optimizer_of()
    schedule = make(optimizer, **settings)
    before = schedule_settings(schedule)
    for loss in losses[:steps]:
        optimizer.step()
        schedule.step(*([loss] if name == "ReduceLROnPlateau" else []))
    assert first_difference(before, schedule_settings(schedule)) is None


def test_what_a_schedule_of_the_users_own_moves_is_none_of_its_settings_either():
    optimizer = optimizer_of()
    schedule = HasItsOwnCounter(optimizer, 1.0, lambda step: 1 / step)
    before = schedule_settings(schedule)
    optimizer.step()
    schedule.step()
    settings = unmoved(before, schedule_settings(schedule))
    assert before.keys() - settings.keys() == {"calls"}
    assert settings["factor"] == 1.0


def test_a_function_that_knows_only_some_steps_is_looked_at_where_it_can_be():
    asked = []

    def factor(step):
        asked.append(step)
        if step == 0:
            raise ZeroDivisionError
        if step > 50:
            raise IndexError
        return 1 / step

    optimizer = optimizer_of((0.1,))
    schedule = torch_schedules.LambdaLR(optimizer, lambda step: factor(step + 1))
    values = schedule_settings(schedule)["lr_lambdas / 0"]
    assert values[:2] == ["1.0 at step 0", "0.5 at step 1"]
    assert len(values) == 50
    assert max(asked) > 100_000


def test_what_refers_to_itself_has_settings_too():
    decay = Decay(0.5, {})
    decay.itself = [decay]
    optimizer = optimizer_of((0.1,))
    decay.schedule = torch_schedules.LambdaLR(optimizer, decay)
    assert schedule_settings(decay.schedule)["lr_lambdas / 0 / rate"] == 0.5


def test_no_schedule_has_no_settings():
    assert schedule_settings(None) == {}


def test_numbers_are_compared_by_value_and_what_is_not_a_number_equals_itself():
    assert first_difference({"a": 1, "b": [math.nan]}, {"a": 1.0, "b": [math.nan]}) is None
    assert first_difference({"a": 1, "b": 2}, {"b": 2, "c": 3}) is None
    assert first_difference({"a": [1]}, {"a": [1, 2]}) == "it is of another run, where a was nothing; in this run it is 2"
    assert unmoved({"a": math.nan, "b": 1, "c": 2}, {"a": math.nan, "b": 3}).keys() == {"a"}
