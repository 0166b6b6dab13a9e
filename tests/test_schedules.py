"""Schedules keep the ratios between groups, and preview shows what training then uses."""

import copy
import math
import pickle
from itertools import pairwise

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim import lr_scheduler as torch_schedules
from torch.utils.data import DataLoader, TensorDataset

from layerlr_helpers import (
    LayerAdaptiveLR,
    ProgressiveUnfreezing,
    UnfreezePlan,
    fit,
    layer_decay,
    layer_groups,
    one_cycle,
    param_groups,
    preview,
    slanted_triangular,
    warmup_cosine,
)


def model_and_groups():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    return model, layer_groups(model)


def optimizer_of(rates=(1e-4, 1e-3, 1e-2), kind=SGD, **kwargs):
    return kind([{"params": [nn.Parameter(torch.ones(2))], "lr": lr, "name": f"g{i}"} for i, lr in enumerate(rates)], **kwargs)


def rates_of(optimizer, scheduler, steps):
    """The rates that each step uses, in a bare loop."""
    seen = []
    for _ in range(steps):
        seen.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return seen


OURS = {
    "slanted_triangular": lambda o, n: slanted_triangular(o, n, cut_frac=0.5),
    "slanted_triangular with restarts": lambda o, n: slanted_triangular(o, n, cut_frac=0.4, restarts=[n // 2]),
    "warmup_cosine": lambda o, n: warmup_cosine(o, n, warmup_steps=n // 4, final_factor=0.1),
    "one_cycle": one_cycle,
}
THEIRS = {
    "StepLR": lambda o, n: torch_schedules.StepLR(o, 3, 0.5),
    "CosineAnnealingLR": lambda o, n: torch_schedules.CosineAnnealingLR(o, n, eta_min=1e-5),
    "OneCycleLR": lambda o, n: torch_schedules.OneCycleLR(o, max_lr=0.1, total_steps=n),
    "constant": None,
}


# --- shapes -----------------------------------------------------------------------------------------------------------

@given(st.sampled_from(sorted(OURS)), st.integers(10, 80), st.lists(st.floats(1e-6, 1.0), min_size=2, max_size=5))
def test_the_ratios_between_groups_stay_what_they_were(name, steps, rates):
    optimizer = optimizer_of(rates)
    for seen in rates_of(optimizer, OURS[name](optimizer, steps), steps - 1):
        for lr, start in zip(seen, rates, strict=True):
            assert lr * rates[0] == pytest.approx(seen[0] * start, rel=1e-9)
            assert 0 < lr <= start * (1 + 1e-9)


def golden_optimizer():
    """The two top layers of AllenNLP's published test: rates 1 and, with a decay of 0.5, 0.5."""
    optimizer = optimizer_of((0.5, 1.0))
    plan = UnfreezePlan({"g1": 0, "g0": 10})
    return optimizer, plan


def test_allennlps_golden_values():
    # 5 epochs of 10 steps, gradual unfreezing, a new triangle when the second layer unfreezes.
    optimizer, plan = golden_optimizer()
    frame = preview(optimizer, lambda o: slanted_triangular(o, 50, restarts=[10]), 50, plan=plan)
    expected_top = {0: 0.03125, 1: 1.0, 9: 0.138888, 10: 0.03125, 14: 1.0}
    expected_below = {0: 0.0, 1: 0.0, 9: 0.0, 10: 0.015625, 14: 0.5}
    for step, value in expected_top.items():
        assert frame.g1[step] == pytest.approx(value, abs=1e-6)
    for step, value in expected_below.items():
        assert frame.g0[step] == pytest.approx(value, abs=1e-6)
    assert (frame.g0[:10] == 0).all()
    assert frame.iloc[49].max() == pytest.approx(1 / 32 + 31 / 32 / 36)  # one step of 36 before the floor


@given(st.integers(2, 300), st.floats(0.01, 0.99), st.floats(1.5, 100))
def test_a_slanted_triangle_rises_in_a_line_and_falls_in_a_line_from_floor_to_peak_to_floor(steps, cut_frac, ratio):
    optimizer = optimizer_of((2.0,))
    try:
        scheduler = slanted_triangular(optimizer, steps, cut_frac=cut_frac, ratio=ratio)
    except ValueError:
        assert steps * cut_frac < 1 + 1e-6  # refused because no step would rise
        return
    seen = [lr for lr, in rates_of(optimizer, scheduler, steps + 3)]
    top = seen.index(max(seen))
    assert seen[top] == pytest.approx(2.0)
    assert 1 <= top <= steps * cut_frac + 1e-6
    assert seen[0] == pytest.approx(2.0 / ratio)
    assert seen[steps:] == pytest.approx([2.0 / ratio] * 3)  # and stays there
    for part in (seen[:top + 1], seen[top:steps + 1]):
        slopes = [b - a for a, b in pairwise(part)]
        assert slopes == pytest.approx([slopes[0]] * len(slopes), rel=1e-6, abs=1e-9)


def test_a_rise_of_a_whole_number_of_steps_is_not_cut_short_by_rounding():
    optimizer = optimizer_of((1.0,))  # 100 * 0.29 is 28.999999999999996 in floating point
    seen = [lr for lr, in rates_of(optimizer, slanted_triangular(optimizer, 100, cut_frac=0.29), 100)]
    assert seen.index(max(seen)) == 29


def test_warmup_cosine_rises_to_the_peak_and_falls_to_a_part_of_it():
    optimizer = optimizer_of((1e-3, 1e-1))
    seen = rates_of(optimizer, warmup_cosine(optimizer, 20, warmup_steps=4, final_factor=0.1), 23)
    assert [b for _, b in seen[:5]] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert seen[12][1] == pytest.approx(0.1 * (0.1 + 0.9 / 2))  # half way down
    assert seen[20] == seen[21] == seen[22] == pytest.approx([1e-4, 1e-2])
    assert all(a[1] > b[1] for a, b in pairwise(seen[4:21]))


def test_one_cycle_peaks_at_each_groups_own_rate():
    optimizer = optimizer_of((1e-4, 1e-2), kind=AdamW)
    seen = rates_of(optimizer, one_cycle(optimizer, 40, pct_start=0.25), 39)
    assert max(a for a, _ in seen) == pytest.approx(1e-4)
    assert max(b for _, b in seen) == pytest.approx(1e-2)
    assert seen[0] == pytest.approx([1e-4 / 25, 1e-2 / 25])


def test_one_cycle_cycles_a_momentum_only_where_there_is_one():
    plain, heavy, adam = optimizer_of(), optimizer_of(momentum=0.9), optimizer_of(kind=AdamW)
    for optimizer in (plain, heavy, adam):
        scheduler = one_cycle(optimizer, 10)
        for _ in range(2):
            optimizer.step()
            scheduler.step()
    assert all(group["momentum"] == 0 for group in plain.param_groups)
    assert all(0.85 <= group["momentum"] <= 0.95 for group in heavy.param_groups)
    assert heavy.param_groups[0]["momentum"] != 0.9
    assert adam.param_groups[0]["betas"][0] != 0.9


# --- refusals ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("make", "message"), [
    (lambda o: slanted_triangular(o, 0), "total_steps must be at least 1"),
    (lambda o: warmup_cosine(o, -3, warmup_steps=0), "total_steps must be at least 1"),
    (lambda o: one_cycle(o, 0), "total_steps must be at least 1"),
    (lambda o: slanted_triangular(o, 50, cut_frac=0), "cut_frac must be between 0 and 1"),
    (lambda o: slanted_triangular(o, 50, cut_frac=1), "cut_frac must be between 0 and 1"),
    (lambda o: slanted_triangular(o, 50, cut_frac=math.nan), "cut_frac must be between 0 and 1"),
    (lambda o: slanted_triangular(o, 50, ratio=0.5), "ratio must be at least 1"),
    (lambda o: slanted_triangular(o, 9), "it needs at least 10 steps"),
    (lambda o: slanted_triangular(o, 50, restarts=[45]), "a triangle of 5 steps"),
    (lambda o: slanted_triangular(o, 50, restarts=[10, 10]), "a triangle of 0 steps"),
    (lambda o: slanted_triangular(o, 50, restarts=[50, 0]), r"not at \[50, 0\]"),
    (lambda o: warmup_cosine(o, 10, warmup_steps=10), "below total_steps=10"),
    (lambda o: warmup_cosine(o, 10, warmup_steps=-1), "warmup_steps must be at least 0"),
    (lambda o: warmup_cosine(o, 10, warmup_steps=1, final_factor=1.5), "final_factor must be between 0 and 1"),
    (lambda o: one_cycle(o, 10, max_lr=0.1), "not with max_lr"),
])
def test_what_cannot_be_is_refused_and_the_optimizer_left_alone(make, message):
    optimizer = optimizer_of()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        make(optimizer)
    assert optimizer.state_dict() == before


@pytest.mark.parametrize("cut_frac", [0.1, 1 / 3, 0.07, 1 / 49, 0.6])
def test_the_number_of_steps_that_the_error_asks_for_is_enough_and_one_less_is_not(cut_frac):
    with pytest.raises(ValueError, match="it needs at least") as error:
        slanted_triangular(optimizer_of(), 1, cut_frac=cut_frac)
    enough = int(str(error.value).split()[-2])
    slanted_triangular(optimizer_of(), enough, cut_frac=cut_frac)
    with pytest.raises(ValueError, match="it needs at least"):
        slanted_triangular(optimizer_of(), enough - 1, cut_frac=cut_frac)


# --- native schedulers ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", OURS)
def test_a_run_resumed_from_state_dicts_goes_on_along_the_curve(name):
    whole = optimizer_of()
    expected = rates_of(whole, OURS[name](whole, 30), 29)
    first = optimizer_of()
    schedule = OURS[name](first, 30)
    assert isinstance(schedule, torch_schedules.LRScheduler)
    start = rates_of(first, schedule, 13)
    saved = copy.deepcopy((first.state_dict(), schedule.state_dict()))
    second = optimizer_of()
    resumed = OURS[name](second, 30)
    second.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert start + rates_of(second, resumed, 16) == expected


@pytest.mark.parametrize("name", OURS)
def test_a_schedule_can_be_pickled_and_its_state_read_back_safely(name, tmp_path):
    optimizer = optimizer_of()
    schedule = OURS[name](optimizer, 30)
    rates_of(optimizer, schedule, 5)
    copied = pickle.loads(pickle.dumps(schedule))
    assert rates_of(copied.optimizer, copied, 10) == rates_of(optimizer, schedule, 10)
    torch.save(schedule.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True)["last_epoch"] == 15


@pytest.mark.parametrize("name", OURS)
def test_tensor_rates_are_moved_in_place_along_the_same_curve(name):
    plain = optimizer_of((0.25, 0.5))
    tensor = optimizer_of((torch.tensor(0.25), torch.tensor(0.5)), kind=AdamW)
    held = [group["lr"] for group in tensor.param_groups]
    expected = rates_of(plain, OURS[name](plain, 20), 19)
    seen = rates_of(tensor, OURS[name](tensor, 20), 19)
    assert all(a == pytest.approx(b) for a, b in zip(seen, expected, strict=True))
    assert all(group["lr"] is lr for group, lr in zip(tensor.param_groups, held, strict=True))


@pytest.mark.parametrize("second", OURS)
@pytest.mark.parametrize("first", OURS)
def test_a_second_schedule_peaks_where_the_first_did(first, second):
    # A one-cycle schedule leaves its own low start behind as initial_lr, from which LambdaLR would go on.
    optimizer = optimizer_of((0.1, 0.5))
    rates_of(optimizer, OURS[first](optimizer, 20), 19)
    expected = preview(optimizer_of((0.1, 0.5)), lambda o: OURS[second](o, 20), 20)
    pd.testing.assert_frame_equal(preview(optimizer, lambda o: OURS[second](o, 20), 20), expected)
    seen = rates_of(optimizer, OURS[second](optimizer, 20), 19)
    assert all(row == pytest.approx(list(expected.iloc[step])) for step, row in enumerate(seen))


# --- preview ----------------------------------------------------------------------------------------------------------

def data():
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(24, 4, generator=generator), torch.arange(24) % 3), 8)


@pytest.mark.parametrize("with_plan", [False, True], ids=["all train", "with a plan"])
@pytest.mark.parametrize("kind", [SGD, AdamW, LayerAdaptiveLR])
@pytest.mark.parametrize("name", [*OURS, *THEIRS])
def test_preview_is_what_training_uses_at_every_step(name, kind, with_plan):
    model, groups = model_and_groups()
    options = {"momentum": 0.9} if kind is SGD else {}
    optimizer = kind(param_groups(groups, layer_decay(1e-2, 0.5), decay_norm_and_bias=False, weight_decay=0.1), **options)
    make = {**OURS, **THEIRS}[name]
    plan = UnfreezePlan.top_down(groups, every=4) if with_plan else None
    expected = preview(optimizer, make and (lambda o: make(o, 12)), 12, plan=plan)
    unfreezing = ProgressiveUnfreezing(groups, plan) if with_plan else None
    schedule = make(optimizer, 12) if make else None
    history = fit(model, optimizer, data(), steps=12, schedule=schedule, unfreezing=unfreezing, progress=False).to_frame()
    used = history[[f"lr/{column}" for column in expected]]
    assert used.to_numpy() == pytest.approx(expected.to_numpy(), rel=1e-12)
    assert (expected.to_numpy() == 0).any() == with_plan


def test_preview_knows_of_batch_norms_that_train_in_frozen_groups():
    model, groups = model_and_groups()
    optimizer = SGD(param_groups(groups, layer_decay(1e-2, 0.5)))
    unfreezing = ProgressiveUnfreezing(groups, UnfreezePlan({"head": 0}), batch_norm="train")
    expected = preview(optimizer, None, 3, plan=unfreezing)
    history = fit(model, optimizer, data(), steps=3, unfreezing=unfreezing, progress=False).to_frame()
    assert list(expected.iloc[0]) == list(history[["lr/stem", "lr/3", "lr/head"]].iloc[0]) == [2.5e-3, 0.0, 1e-2]


def test_without_a_plan_a_frozen_group_stays_at_zero():
    optimizer = optimizer_of()
    optimizer.param_groups[0]["params"][0].requires_grad_(False)
    assert list(preview(optimizer, None, 2).iloc[1]) == [0.0, 1e-3, 1e-2]


@pytest.mark.parametrize("kind", [SGD, AdamW])
@pytest.mark.parametrize("name", [*OURS, *THEIRS])
def test_preview_changes_nothing_of_the_optimizer(name, kind):
    made = {**OURS, **THEIRS}[name]
    optimizer = optimizer_of((torch.tensor(0.1), torch.tensor(0.5)), kind=kind)
    held = [group["lr"] for group in optimizer.param_groups]
    before = copy.deepcopy(optimizer.state_dict())
    preview(optimizer, made and (lambda o: made(o, 12)), 12)
    assert optimizer.state_dict() == before
    assert all(group["lr"] is lr for group, lr in zip(optimizer.param_groups, held, strict=True))
    assert all(torch.equal(p, torch.ones(2)) for group in optimizer.param_groups for p in group["params"])


def test_preview_reads_groups_that_are_not_yet_in_an_optimizer_and_leaves_them_alone():
    _, groups = model_and_groups()
    made = param_groups(groups, layer_decay(1e-2, 0.5))
    keys = [list(group) for group in made]
    frame = preview(made, lambda o: one_cycle(o, 8), 8)
    assert list(frame) == ["stem", "3", "head"]
    assert frame.index.name == "step"
    assert [list(group) for group in made] == keys


@pytest.mark.parametrize("name", OURS)
def test_preview_can_be_asked_again_while_the_schedule_runs(name):
    optimizer = optimizer_of()
    expected = preview(optimizer, lambda o: OURS[name](o, 10), 10)
    rates_of(optimizer, OURS[name](optimizer, 10), 4)
    pd.testing.assert_frame_equal(preview(optimizer, lambda o: OURS[name](o, 10), 10), expected)


def test_preview_refuses_what_it_cannot_know():
    optimizer = optimizer_of()
    with pytest.raises(ValueError, match="follows the loss"):
        preview(optimizer, torch_schedules.ReduceLROnPlateau, 5)
    with pytest.raises(ValueError, match="did you mean 'g2'"):
        preview(optimizer, None, 5, plan=UnfreezePlan({"g22": 0}))
    with pytest.raises(ValueError, match="total_steps"):
        preview(optimizer, None, 0)


def test_a_schedule_in_place_of_the_function_that_makes_one_is_refused():
    optimizer = SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"lambda o: one_cycle\(o, 12\), not a LambdaLR"):
        preview(optimizer, slanted_triangular(optimizer, 12), 12)
