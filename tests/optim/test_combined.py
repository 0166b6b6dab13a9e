"""Several optimizers that look like one: the same steps, one schedule, one checkpoint."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from layerlr_helpers import (
    ProgressiveUnfreezing,
    UnfreezePlan,
    current_rates,
    fit,
    layer_decay,
    layer_groups,
    one_cycle,
    param_groups,
    slanted_triangular,
)
from layerlr_helpers.optim import CombinedOptimizer


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def batches():
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(16, 8), torch.arange(16) % 2), 4)


def muon_and_adamw(groups):
    rates = layer_decay(1e-2, 0.5)
    return (torch.optim.Muon(param_groups(groups, rates, select=lambda p: p.ndim == 2)),
            torch.optim.AdamW(param_groups(groups, rates, select=lambda p: p.ndim != 2)))


def weights_after(model, optimizers, steps=4):
    for _ in range(steps):
        for inputs, labels in batches():
            for optimizer in optimizers:
                optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            for optimizer in optimizers:
                optimizer.step()
    return [p.detach() for p in model.parameters()]


def test_together_they_make_the_steps_that_they_make_one_by_one():
    model = small()
    apart = weights_after(model, muon_and_adamw(layer_groups(model)))
    model = small()
    together = weights_after(model, [CombinedOptimizer(*muon_and_adamw(layer_groups(model)))])
    assert all(map(torch.equal, apart, together))


def test_one_schedule_moves_the_rates_of_all():
    optimizer = CombinedOptimizer(*muon_and_adamw(layer_groups(small())))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    before = current_rates(optimizer)
    optimizer.step()
    schedule.step()
    assert current_rates(optimizer) == {name: rate / 2 for name, rate in before.items()}
    in_members = [group["lr"] for member in optimizer.optimizers for group in member.param_groups]
    assert in_members == list(current_rates(optimizer).values())


def test_one_cycle_cycles_the_momentum_if_all_members_have_it_in_the_same_way():
    model = small()
    optimizer = CombinedOptimizer(*(torch.optim.AdamW(model[i].parameters(), lr=0.1) for i in (0, 3)))
    one_cycle(optimizer, 10)
    assert [group["betas"][0] for group in optimizer.param_groups] == [0.95, 0.95]


@given(st.integers(1, 7))
def test_fit_trains_unfreezes_and_resumes_with_it_as_if_it_had_never_stopped(tmp_path_factory, stop):
    def run(steps, checkpoint=None):
        model = small()
        groups = layer_groups(model)
        optimizer = CombinedOptimizer(*muon_and_adamw(groups))
        fit(model, optimizer, batches(), steps=steps, checkpoint=checkpoint, progress=False,
            schedule=slanted_triangular(optimizer, 8, cut_frac=0.5),
            unfreezing=ProgressiveUnfreezing(groups, UnfreezePlan.top_down(groups, every=2)))
        return list(model.parameters())

    checkpoint = tmp_path_factory.mktemp("combined") / "run.pt"
    run(stop, checkpoint)
    assert all(map(torch.equal, run(8), run(8, checkpoint)))


def test_its_state_is_that_of_its_members_before_and_after_loading():
    def trained(model):
        optimizer = CombinedOptimizer(*muon_and_adamw(layer_groups(model)))
        weights_after(model, [optimizer], steps=1)
        return optimizer

    first, second = trained(small()), trained(small())
    for optimizer in (first, second):
        assert set(optimizer.state) == {p for group in optimizer.param_groups for p in group["params"]}
    first.param_groups[0]["lr"] = 0.125
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["lr"] == second.optimizers[0].param_groups[0]["lr"] == 0.125
    second.param_groups[-1]["lr"] = 0.25  # a schedule goes on to reach the member
    assert second.optimizers[1].param_groups[-1]["lr"] == 0.25


def test_a_copy_has_members_of_its_own():
    model = small()
    model_copy, optimizer = copy.deepcopy((model, CombinedOptimizer(*muon_and_adamw(layer_groups(model)))))
    before = [p.detach().clone() for p in model.parameters()]
    after = weights_after(model_copy, [optimizer])
    assert all(map(torch.equal, model.parameters(), before))
    assert not any(map(torch.equal, after, before))


def test_modes_reach_the_members_that_have_them():
    class Modes(torch.optim.SGD):
        def train(self):
            self.mode = "train"

        def eval(self):
            self.mode = "eval"

    model = small()
    with_modes = Modes(model[0].parameters(), lr=0.1)
    optimizer = CombinedOptimizer(with_modes, torch.optim.SGD(model[3].parameters(), lr=0.1))
    optimizer.train()
    assert with_modes.mode == "train"
    optimizer.eval()
    assert with_modes.mode == "eval"


def test_a_closure_is_called_once_and_its_loss_returned():
    model = small()
    optimizer = CombinedOptimizer(*muon_and_adamw(layer_groups(model)))
    calls = []

    def closure():
        calls.append(model(torch.ones(1, 8)).sum())
        calls[-1].backward()
        return calls[-1]

    before = [p.detach().clone() for p in model.parameters()]
    assert optimizer.step(closure) is calls[0]
    assert len(calls) == 1
    assert not all(map(torch.equal, model.parameters(), before))


def test_what_could_not_work_is_refused():
    model = small()
    sgd = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(ValueError, match="empty parameter list"):
        CombinedOptimizer()
    with pytest.raises(ValueError, match="more than one parameter group"):
        CombinedOptimizer(sgd, torch.optim.AdamW(model[0].parameters()))
    optimizer = CombinedOptimizer(sgd)
    with pytest.raises(ValueError, match="no member would step this group"):
        optimizer.add_param_group({"params": model[3].parameters()})
    with pytest.raises(ValueError, match="the state of 1 optimizers together, and got that of one"):
        optimizer.load_state_dict(sgd.state_dict())
