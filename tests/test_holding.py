"""Layers that keep a state stand still in a frozen group, whatever they are called, and let go of nothing else."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import dropout, mse_loss
from torch.nn.utils import spectral_norm as hooked_spectral_norm
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.swa_utils import AveragedModel, update_bn

from layerlr_helpers import ProgressiveUnfreezing, UnfreezePlan, freeze, layer_groups, unfreeze
from layerlr_helpers.holding import hold_still, layers_with_state

INPUTS = torch.randn(64, 6, generator=torch.Generator().manual_seed(0)) * 3 + 2


class RunningNorm(nn.Module):
    """A norm of one's own, with an activation inside as some libraries' have."""

    def __init__(self, channels, affine=True):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels)) if affine else None
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("unused", None)
        self.activation = nn.ReLU()

    def forward(self, x):
        if self.training:
            self.running_var.lerp_(x.detach().var(0), 0.1)
        x = x / (self.running_var + 1e-5).sqrt()
        return self.activation(x if self.scale is None else x * self.scale)


class Codebook(nn.Module):
    """A layer without parameters whose buffer is replaced, not written to."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


LAYERS = {
    "batch norm": lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)),
    "norm of one's own": lambda: nn.Sequential(nn.Linear(6, 5), RunningNorm(5)),
    "norm of one's own without scale": lambda: nn.Sequential(nn.Linear(6, 5), RunningNorm(5, affine=False)),
    "codebook": lambda: nn.Sequential(nn.Linear(6, 5), Codebook(5)),
    "spectral norm": lambda: nn.Sequential(spectral_norm(nn.Linear(6, 5))),
    "hooked spectral norm": lambda: nn.Sequential(hooked_spectral_norm(nn.Linear(6, 5))),
    "spectral norm of a convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 3)), spectral_norm(nn.Conv1d(2, 2, 3, padding=1)), nn.Flatten(), nn.Linear(6, 5)),
}


def net(name):
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[name](), nn.ReLU(), nn.Linear(5, 2)).train()
    for _ in range(3):  # a state that is not the one to begin with
        model(INPUTS)
    return model


def groups_of(model, granularity="stage"):
    groups = layer_groups(model, INPUTS[:2], granularity=granularity)
    return groups, [group.name for group in groups if group.depth]


def train(model, steps=3):
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        mse_loss(model(INPUTS), INPUTS[:, :2]).backward()
        optimizer.step()


def buffers(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("granularity", ["stage", "child", "tensor"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_frozen_layer_with_a_state_gives_what_it_gave_before_and_moves_again_when_it_is_let_go(name, granularity):
    model = net(name)
    groups, body = groups_of(model, granularity)
    freeze(groups, *body)
    before, output = buffers(model), model.eval()[0](INPUTS)
    train(model)
    assert same(buffers(model), before)
    assert torch.equal(model.eval()[0](INPUTS), output)
    assert torch.equal(model.train()[0](INPUTS), output)  # frozen, it runs as in eval mode
    assert all(module.training for module in model.modules())
    unfreeze(groups, "*")
    train(model)
    assert not same(buffers(model), before)


@pytest.mark.parametrize("name", LAYERS)
def test_a_plan_holds_a_layer_with_a_state_until_its_group_trains(name):
    model = net(name)
    groups, body = groups_of(model)
    unfreezing = ProgressiveUnfreezing(groups, UnfreezePlan({"head": 0} | dict.fromkeys(body, 2)))
    moved = []
    for step in range(4):
        unfreezing.apply(step)
        before = buffers(model)
        train(model, steps=1)
        moved.append(not same(buffers(model), before))
    assert moved == [False, False, True, True]


@pytest.mark.parametrize("name", LAYERS)
def test_under_statistics_every_state_moves_as_requires_grad_alone_lets_it(name):
    ends = []
    for by_hand in (True, False):
        model = net(name)
        groups, body = groups_of(model)
        if by_hand:
            model[0].requires_grad_(False)
        else:
            freeze(groups, *body, batch_norm="statistics")
        train(model)
        ends.append(model.state_dict())
    assert same(*ends)


@pytest.mark.parametrize("name", LAYERS)
def test_holding_a_layer_and_letting_it_go_leaves_no_trace(name):
    model = net(name)
    traces = [(set(module.__dict__), len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    for layer in layers_with_state(groups_of(model)[0]):
        for still in (True, True, False, False):
            hold_still(layer, still)
    assert [(set(module.__dict__), len(module._forward_hooks), len(module._forward_pre_hooks))
            for module in model.modules()] == traces


# --- what is no state -------------------------------------------------------------------------------------------------

class MaskedMixing(nn.Module):
    """Mixes tokens under a mask, with dropout that looks at the mode of this module."""

    def __init__(self, persistent):
        super().__init__()
        self.mix = nn.Linear(6, 6)
        self.register_buffer("mask", torch.ones(6, 6).tril(), persistent=persistent)

    def forward(self, x):
        return dropout(self.mix(x) @ self.mask, 0.5, self.training)


class Rotation(nn.Module):
    """A table that is not saved with the model, in a layer that adds noise in train mode."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))
        self.register_buffer("angles", torch.arange(6.0), persistent=False)
        self.register_buffer("places", torch.arange(6))

    def forward(self, x):
        return dropout(x[:, self.places] * self.angles.cos() * self.weight, 0.5, self.training)


@pytest.mark.parametrize("layer", [MaskedMixing(True), MaskedMixing(False), Rotation()], ids=["saved mask", "mask", "table"])
def test_masks_and_tables_do_not_silence_the_dropout_of_a_frozen_layer(layer):
    model = nn.Sequential(layer, nn.Linear(6, 2))
    freeze(layer_groups(model, INPUTS[:2]), "*")
    model.train()
    assert not torch.equal(model(INPUTS), model(INPUTS))


def test_a_saved_table_in_a_layer_with_dropout_below_does_no_harm():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.linspace(-1, 1, 6))
            self.dropout = nn.Dropout(0.5)

        def forward(self, x):
            return self.dropout(x + self.table)

    model = nn.Sequential(nn.Linear(6, 6), Positions(), nn.Linear(6, 2))
    freeze(layer_groups(model, INPUTS[:2]), "*")
    model.train()
    assert not torch.equal(model(INPUTS), model(INPUTS))


# --- what others do to a model that is frozen -------------------------------------------------------------------------

def two_norms():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 5), nn.BatchNorm1d(5), nn.ReLU(),
                          nn.Linear(5, 2))
    for _ in range(50):
        model(INPUTS)
    return model


@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy, AveragedModel], ids=["itself", "a copy", "an average"])
def test_update_bn_measures_only_what_is_not_held(copied):
    model = two_norms()
    groups = layer_groups(model, INPUTS[:2])
    freeze(groups, "stem")
    other = copied(model)
    network = other.module if isinstance(other, AveragedModel) else other
    before = buffers(network)
    with torch.no_grad():
        network[3].bias.add_(100.0)
    update_bn(INPUTS.split(16), other)
    after = buffers(network)
    assert all(torch.equal(before[f"1.{name}"], after[f"1.{name}"]) for name in ("running_mean", "running_var"))
    torch.testing.assert_close(after["4.running_mean"], before["4.running_mean"] + 100, rtol=1e-3, atol=0.5)
    unfreeze(layer_groups(network, INPUTS[:2]), "*")
    update_bn(INPUTS.split(16) * 2, other)
    assert network[1].num_batches_tracked.item() == 8
    assert [module.momentum for module in (network[1], network[4])] == [0.1, 0.1]
