"""The learning-rate range test: what it finds, and that nothing remembers it."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from layerlr_helpers import (
    LayerAdaptiveLR,
    layer_decay,
    layer_groups,
    lr_range_test,
    one_cycle,
    param_groups,
    uniform,
    warmup_cosine,
)
from tests.runs import model_state, same


def learner(kind=torch.optim.AdamW, **options):
    """A small net with a norm, dropout and a frozen layer, its optimizer, which has taken a step, and a shuffling loader."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 8), nn.ReLU(),
                          nn.Linear(8, 3))
    model[4].weight.requires_grad_(False)
    optimizer = kind(param_groups(layer_groups(model), layer_decay(1e-2, 0.5)), **options)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=generator)
    loader = DataLoader(TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()), 16, shuffle=True, generator=generator)
    nn.functional.cross_entropy(model(x), torch.zeros(64, dtype=torch.long)).backward()
    optimizer.step()
    model.train()
    model[1].eval()
    return model, optimizer, loader


@pytest.mark.parametrize("kind", [torch.optim.AdamW, lambda groups: torch.optim.SGD(groups, momentum=0.9), LayerAdaptiveLR],
                         ids=["AdamW", "SGD", "LayerAdaptiveLR"])
@pytest.mark.parametrize("diverges", [False, True])
def test_model_optimizer_random_numbers_and_loader_are_afterwards_what_they_were(kind, diverges):
    model, optimizer, loader = learner(kind)
    stray = nn.Parameter(torch.ones(()))  # in the model, not in the optimizer, with a gradient of its own
    model.register_parameter("stray", stray)
    stray.grad = torch.full((), 7.0)
    model.forward = lambda x, forward=model.forward: forward(x) * stray
    before, held = model_state(model), [p.grad for p in model.parameters()]
    optimizer_before, generator = copy.deepcopy(optimizer.state_dict()), loader.generator.get_state()
    lr_range_test(model, optimizer, loader, steps=12, high=1e6 if diverges else 1.0)
    assert same(before, model_state(model))
    assert all(a is b for a, b in zip(held, (p.grad for p in model.parameters()), strict=True))
    after = optimizer.state_dict()
    assert after["param_groups"] == optimizer_before["param_groups"]
    torch.testing.assert_close(after["state"], optimizer_before["state"], rtol=0, atol=0)
    assert torch.equal(loader.generator.get_state(), generator)


def test_an_optimizer_that_has_never_stepped_has_no_state_afterwards():
    model, _, loader = learner()
    optimizer = torch.optim.AdamW(model.parameters())
    lr_range_test(model, optimizer, loader, steps=10)
    assert not optimizer.state


def test_all_is_put_back_when_training_fails():
    model, optimizer, loader = learner()
    before = model_state(model)
    calls = []

    def fails_later(logits, labels):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("no more")
        return nn.functional.cross_entropy(logits, labels)

    with pytest.raises(RuntimeError, match="no more"):
        lr_range_test(model, optimizer, loader, loss_fn=fails_later)
    assert same(before, model_state(model))
    assert [group["lr"] for group in optimizer.param_groups] == [2.5e-3, 5e-3, 1e-2]


def test_the_rates_of_all_groups_grow_together():
    model, optimizer, loader = learner()
    seen = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append([group["lr"] for group in o.param_groups]))
    result = lr_range_test(model, optimizer, loader, steps=20, low=0.1, high=10)
    assert [row[2] / 1e-2 for row in seen] == pytest.approx(list(result.frame.factor))
    assert all(row == pytest.approx([row[2] / 4, row[2] / 2, row[2]]) for row in seen)
    ratios = result.frame.factor[1:].to_numpy() / result.frame.factor[:-1].to_numpy()
    assert ratios == pytest.approx(np.full(len(ratios), 100 ** (1 / 19)))  # evenly spaced on a logarithmic scale
    assert result.frame.factor[0] == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", [one_cycle, lambda optimizer, steps: warmup_cosine(optimizer, steps, warmup_steps=50)],
                         ids=["one_cycle", "warmup_cosine"])
def test_the_factors_are_of_the_rates_that_the_groups_were_made_with_and_not_of_a_warm_ups_start(schedule):
    model, optimizer, loader = learner()
    schedule(optimizer, 100)
    start = [group["lr"] for group in optimizer.param_groups]
    seen = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append([group["lr"] for group in o.param_groups]))
    lr_range_test(model, optimizer, loader, steps=10, low=0.1, high=10)
    assert start[-1] < 1e-3
    assert seen[0] == pytest.approx([2.5e-4, 5e-4, 1e-3])
    assert [group["lr"] for group in optimizer.param_groups] == start


def test_one_group_can_be_swept_while_the_others_stand_still():
    model, optimizer, loader = learner()
    names = [group["name"] for group in optimizer.param_groups]
    seen = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append([group["lr"] for group in o.param_groups]))
    result = lr_range_test(model, optimizer, loader, steps=20, low=0.1, high=10, sweep=names[-1])
    assert all(row[:2] == [0.0, 0.0] for row in seen)
    assert [row[2] / 1e-2 for row in seen] == pytest.approx(list(result.frame.factor))
    with pytest.raises(ValueError, match="no group matches 'haed'"):
        lr_range_test(model, optimizer, loader, sweep="haed")


def test_a_sweep_takes_both_halves_of_a_layer_that_weight_decay_has_split():
    model, _, loader = learner()
    groups = layer_groups(model, next(iter(loader))[0])
    optimizer = torch.optim.SGD(param_groups(groups, uniform(0.01), weight_decay=0.1, decay_norm_and_bias=False))
    seen = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append({g["name"]: g["lr"] for g in o.param_groups}))
    lr_range_test(model, optimizer, loader, steps=10, low=2.0, high=4.0, sweep="head")
    swept = {name for name, lr in seen[0].items() if lr != 0}
    assert swept == {"head", "head/no_decay"}


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, lr=1.0), lambda p: torch.optim.AdamW(p, lr=torch.tensor(1.0))])
def test_the_test_stops_where_the_loss_explodes_and_suggests_a_rate_below(make):
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    x = torch.randn(64, 4)
    loader = DataLoader(TensorDataset(x, x @ torch.tensor([[1.0], [2.0], [-1.0], [0.5]])), 64)
    result = lr_range_test(model, make(model.parameters()), loader, steps=80, low=1e-4, high=1e4,
                           loss_fn=nn.functional.mse_loss)
    assert len(result.frame) < 80
    assert result.frame.smooth_loss.iloc[-1] > 4 * result.frame.smooth_loss.min()
    assert 1e-4 <= result.suggestion < result.frame.factor.iloc[-1]
    assert list(result.frame) == ["factor", "loss", "smooth_loss"]
    assert np.isfinite(result.frame.loss[:-1]).all()


def losses_of(values):
    """A loss function that gives these numbers one after the other, whatever the model says."""
    remaining = iter(values)
    return lambda logits, labels: logits.sum() * 0 + next(remaining)


def test_the_suggestion_is_where_the_loss_falls_fastest_and_not_where_it_jumps_once_or_comes_back_from_a_spike():
    model, optimizer, loader = learner()
    places = np.arange(40)
    values = 3 - 2 / (1 + np.exp(-(places - 18) / 2.0))  # falls around step 18
    values[0] += 0.5                                     # a bad first batch
    values[33], values[34:] = 3.6, 1.2                   # a spike, not yet a divergence
    result = lr_range_test(model, optimizer, loader, steps=40, loss_fn=losses_of(values))
    assert len(result.frame) == 40
    assert abs(int(np.argmin(np.abs(result.frame.factor - result.suggestion))) - 18) <= 2


def test_where_the_loss_never_falls_nothing_is_suggested():
    model, optimizer, loader = learner()
    result = lr_range_test(model, optimizer, loader, steps=20, loss_fn=losses_of(np.linspace(1, 2, 20)))
    assert math.isnan(result.suggestion)


def test_the_whole_range_is_run_where_nothing_diverges():
    model, optimizer, loader = learner()
    result = lr_range_test(model, optimizer, loader, steps=15, low=1e-4, high=1e-3)
    assert len(result.frame) == 15
    assert result.frame.factor.iloc[-1] == pytest.approx(1e-3)
    assert math.isnan(result.suggestion) or 1e-4 <= result.suggestion <= 1e-3  # with rates so low there may be none


def test_a_loss_that_is_never_finite_is_an_error_and_not_a_suggestion():
    model, optimizer, loader = learner()
    with pytest.raises(ValueError, match=r"the loss was .* from the start"):
        lr_range_test(model, optimizer, loader, loss_fn=lambda logits, labels: logits.sum() * math.nan)


@pytest.mark.parametrize("options", [{"steps": 9}, {"low": 0.0}, {"low": 2.0, "high": 1.0}, {"low": 1.0, "high": 1.0}])
def test_ranges_that_are_none_are_refused(options):
    with pytest.raises(ValueError, match="need at least 10 steps and 0 < low < high"):
        lr_range_test(*learner(), **options)


def test_a_loader_without_a_batch_is_refused():
    model, optimizer, _ = learner()
    with pytest.raises(ValueError, match="gave no batch"):
        lr_range_test(model, optimizer, [])


def test_the_optimizer_goes_on_as_if_there_had_been_no_test():
    ends = []
    for tested in (False, True):
        model, optimizer, loader = learner(torch.optim.NAdam)
        if tested:
            lr_range_test(model, optimizer, loader, steps=12)
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_batches_may_be_dictionaries_and_the_loss_the_models_own():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x, labels):
            return {"loss": nn.functional.cross_entropy(self.fc(x), labels)}

    torch.manual_seed(0)
    model, x = Own(), torch.randn(32, 4)
    loader = DataLoader([{"x": row, "labels": int(row[0] > 0)} for row in x], 16)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    assert lr_range_test(model, optimizer, loader, steps=20).frame["loss"].iloc[0] == pytest.approx(
        float(model(x[:16], (x[:16, 0] > 0).long())["loss"].detach()))


def test_an_optimizer_with_modes_trains_in_train_mode():
    class WithModes(torch.optim.SGD):
        training, modes = False, ()

        def train(self):
            self.training, self.modes = True, (*self.modes, "train")

        def eval(self):
            self.training, self.modes = False, (*self.modes, "eval")

        def step(self, closure=None):
            assert self.training
            super().step(closure)

    model, _, loader = learner()
    optimizer = WithModes(model.parameters(), 0.1)
    lr_range_test(model, optimizer, loader, steps=10)
    assert optimizer.modes == ("train", "eval")


def test_an_optimizer_that_finds_its_own_rates_has_none_to_test():
    model, optimizer, loader = learner()
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(ValueError, match=r"finds the rates of stem itself \(lr is None\)"):
        lr_range_test(model, optimizer, loader)
