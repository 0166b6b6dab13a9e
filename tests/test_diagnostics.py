"""Measurements: numbers that a hand can check, and a model that is afterwards what it was."""

import copy
import math

import numpy as np
import pytest
import torch
from tests.test_tracing import assert_same, state
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from layerlr_helpers import (
    LayerAdaptiveLR,
    LayerGroup,
    layer_decay,
    layer_features,
    layer_groups,
    layer_statistics,
    lr_range_test,
    one_cycle,
    param_groups,
    probe_layers,
    snapshot,
    uniform,
    warmup_cosine,
)
from layerlr_helpers.diagnostics import relative_gradient_rates


def pair():
    """A group of the tensors (3, 4) and (0,), and one of (2, 0)."""
    a, b, c = (nn.Parameter(torch.tensor(values)) for values in ([3.0, 4.0], [0.0], [2.0, 0.0]))
    return [LayerGroup("first", {"a": a, "b": b}), LayerGroup("second", {"c": c})]


# --- statistics -------------------------------------------------------------------------------------------------------

def test_statistics_are_norms_over_all_tensors_of_a_group():
    groups = pair()
    groups[0].params["a"].grad = torch.tensor([0.0, 2.0])
    groups[0].params["b"].grad = torch.tensor([1.5])
    table = layer_statistics(groups)
    assert list(table) == ["group", "depth", "parameters", "weight_norm", "grad_norm", "relative_gradient"]
    assert list(table.iloc[0]) == ["first", 0, 3, 5.0, 2.5, 0.5]
    assert list(table.iloc[1][:4]) == ["second", 1, 2, 2.0]
    assert table.iloc[1][["grad_norm", "relative_gradient"]].isna().all()  # no gradient is not a gradient of zero


def test_moved_is_the_distance_from_the_snapshot_over_its_norm():
    groups = pair()
    before = snapshot(groups)
    with torch.no_grad():
        groups[0].params["a"] += torch.tensor([0.0, 1.0])
        groups[0].params["b"] += 2.0
    moved = layer_statistics(groups, before).moved
    assert list(moved) == pytest.approx([math.sqrt(5) / 5, 0.0])


def test_a_snapshot_is_a_copy_that_training_does_not_touch():
    groups = pair()
    before = snapshot(groups)
    with torch.no_grad():
        groups[0].params["a"].zero_()
    assert before["a"].tolist() == [3.0, 4.0]
    assert list(before) == ["a", "b", "c"]
    assert not any(value.requires_grad for value in before.values())


def test_a_group_that_starts_at_zero_has_no_relative_numbers():
    groups = [LayerGroup("zero", {"z": nn.Parameter(torch.zeros(2))})]
    groups[0].params["z"].grad = torch.ones(2)
    row = layer_statistics(groups, snapshot(groups)).iloc[0]
    assert row.grad_norm == pytest.approx(math.sqrt(2))
    assert math.isnan(row.relative_gradient)
    assert math.isnan(row.moved)


def test_norms_of_small_numbers_in_low_precision_do_not_vanish():
    group = LayerGroup("half", {"h": nn.Parameter(torch.full((4,), 1e-4, dtype=torch.float16))})
    assert layer_statistics([group]).weight_norm[0] == pytest.approx(2e-4, rel=1e-3)


def test_rates_by_relative_gradient_are_in_proportion_to_it():
    groups = pair()
    for p in (p for group in groups for p in group.params.values()):
        p.grad = torch.ones_like(p)
    rates = relative_gradient_rates(0.1)(groups)
    assert rates == pytest.approx({"first": 0.1 * (3 ** 0.5 / 5) / (2 ** 0.5 / 2), "second": 0.1})


def test_rates_by_relative_gradient_say_whether_a_gradient_is_missing_or_the_weights_are_zero():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    groups = layer_groups(model, torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"no gradient in stem, head; call backward\(\)"):
        relative_gradient_rates(0.1)(groups)
    nn.functional.cross_entropy(model(torch.ones(2, 4)), torch.tensor([0, 1])).backward()
    with pytest.raises(ValueError, match=r"the weights of head are all 0, .*start them at random"):
        relative_gradient_rates(0.1)(groups)


# --- features ---------------------------------------------------------------------------------------------------------

def images(n=5, size=32):
    return TensorDataset(torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0)), torch.arange(n) % 2)


def test_features_of_a_resnet_are_one_row_an_image_and_one_column_a_channel_in_the_order_of_the_layers():
    model, data = resnet18(weights=None).eval(), images()
    groups = layer_groups(model, data[0][0][None])
    features = layer_features(model, data, groups, batch_size=2)
    assert {name: values.shape for name, values in features.items()} == {
        "stem": (5, 64), "layer1": (5, 64), "layer2": (5, 128), "layer3": (5, 256), "layer4": (5, 512), "head": (5, 1000)}
    assert list(features) == [group.name for group in groups]
    assert all(values.dtype == np.float32 for values in features.values())
    with torch.no_grad():
        x = model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(data.tensors[0])))))
        np.testing.assert_allclose(features["layer1"], x.mean((2, 3)).numpy(), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(features["head"], model(data.tensors[0]).numpy(), rtol=1e-3, atol=1e-5)


def test_the_model_and_the_random_numbers_are_left_alone():
    model, data = resnet18(weights=None).train(), images(2)
    model.layer3.eval()
    groups = layer_groups(model, data[0][0][None])
    before = state(model)
    layer_features(model, data, groups)
    assert_same(before, state(model))
    with pytest.raises(RuntimeError):
        layer_features(model, TensorDataset(torch.ones(2, 4), torch.ones(2)), groups)
    assert_same(before, state(model))


def test_tokens_are_averaged_and_channels_kept():
    model = nn.Sequential(nn.Linear(4, 6), nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True), nn.Linear(6, 3))
    tokens = torch.randn(5, 7, 4)
    groups = layer_groups(model, tokens)
    features = layer_features(model, TensorDataset(tokens, torch.zeros(5)), groups)
    assert [values.shape for values in features.values()] == [(5, 6), (5, 6), (5, 3)]
    np.testing.assert_allclose(features["stem"], model[0](tokens).mean(1).detach().numpy(), rtol=1e-4, atol=1e-6)


def test_modules_that_return_several_tensors_give_the_first():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.fc = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 2)

        def forward(self, x):
            return self.fc(self.rnn(x)[0][:, -1])

    model, data = Recurrent(), TensorDataset(torch.randn(5, 7, 4), torch.zeros(5))
    features = layer_features(model, data, layer_groups(model, granularity="child"))
    assert {name: values.shape for name, values in features.items()} == {"rnn": (5, 6), "fc": (5, 2)}


def test_a_group_of_which_no_module_runs_is_left_out():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift, self.idle, self.fc = nn.Parameter(torch.ones(4)), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(x + self.shift)

    model = Shifted()
    with pytest.warns(UserWarning, match="idle"):
        groups = layer_groups(model, torch.zeros(1, 4), granularity="child")
    assert [group.name for group in groups] == ["shift", "idle (unused)", "fc"]
    assert list(layer_features(model, TensorDataset(torch.ones(3, 4), torch.ones(3)), groups)) == ["fc"]


# --- probes -----------------------------------------------------------------------------------------------------------

def test_a_probe_reads_what_is_there_and_is_at_chance_where_nothing_is():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 100)
    other = rng.permutation(labels)
    features = {"clear": np.eye(4, dtype=np.float32)[labels] + 0.01 * rng.normal(size=(400, 4)).astype(np.float32),
                "noise": rng.normal(size=(400, 4)).astype(np.float32)}
    table = probe_layers(features, {"own": torch.tensor(labels), "other": other})
    assert list(table) == ["layer", "target", "accuracy", "standard_error", "chance"]
    assert list(zip(table.layer, table.target, strict=True)) == [
        ("clear", "own"), ("noise", "own"), ("clear", "other"), ("noise", "other")]
    assert (table.chance == 0.25).all()
    by = table.set_index(["layer", "target"])
    assert by.accuracy["clear", "own"] == 1.0
    assert by.standard_error["clear", "own"] == 0.0
    for key in (("noise", "own"), ("clear", "other"), ("noise", "other")):
        accuracy, error = by.accuracy[key], by.standard_error[key]
        assert abs(accuracy - 0.25) < 4 * error
        assert error == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / 200))


def test_the_split_depends_on_the_seed_alone_and_chance_is_the_commonest_class():
    rng = np.random.default_rng(0)
    features, labels = {"x": rng.normal(size=(60, 3))}, np.repeat([0, 1], [45, 15])
    first, again, other = (probe_layers(features, {"y": labels}, seed=seed) for seed in (0, 0, 1))
    assert first.equals(again)
    assert not first.equals(other)
    assert first.chance[0] == pytest.approx(0.75, abs=0.02)


# --- range test -------------------------------------------------------------------------------------------------------

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
    before, held = state(model), [p.grad for p in model.parameters()]
    optimizer_before, generator = copy.deepcopy(optimizer.state_dict()), loader.generator.get_state()
    lr_range_test(model, optimizer, loader, steps=12, high=1e6 if diverges else 1.0)
    assert_same(before, state(model))
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
    before = state(model)
    calls = []

    def fails_later(logits, labels):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("no more")
        return nn.functional.cross_entropy(logits, labels)

    with pytest.raises(RuntimeError, match="no more"):
        lr_range_test(model, optimizer, loader, loss_fn=fails_later)
    assert_same(before, state(model))
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
