"""Plans, rates and optimizers that the studies compare."""

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from layerlr_helpers import LayerGroup, layer_groups, one_cycle, param_groups, recipes, relative_gradient_rates, uniform


@pytest.fixture(scope="module")
def resnet_groups():
    with torch.device("meta"):
        return layer_groups(resnet18(weights=None))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


def step(model, optimizer, seed=0):
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


def test_plans_say_what_trains_when(resnet_groups):
    names = [group.name for group in resnet_groups]

    def trains(plan, step, steps=80):
        return [name for name in names if name in plan(resnet_groups, steps).resolved(names).trainable_at(step)]

    assert trains(recipes.head_only, 79) == ["head"]
    assert [len(trains(recipes.gradual, step)) for step in (0, 9, 10, 50, 79)] == [1, 1, 2, 6, 6]
    assert trains(recipes.everything, 0) == names
    assert trains(recipes.head_then_all, 39) == ["head"]
    assert trains(recipes.head_then_all, 40) == names
    assert trains(recipes.only("layer2", "head"), 0) == ["layer2", "head"]
    assert trains(recipes.all_but_first(2), 0) == names[2:]


def two_heads():
    """A stem, two towers and two heads, each one tensor."""
    depths = {"stem": 2, "image": 1, "text": 1, "head_a": 0, "head_b": 0}
    model = nn.ParameterDict({name: nn.Parameter(torch.ones(2)) for name in depths})
    return [LayerGroup(name, {name: model[name]}, {}, depth, model=model) for name, depth in depths.items()]


def test_plans_go_by_depth_where_groups_share_one():
    groups = two_heads()
    names = [group.name for group in groups]
    assert recipes.head_only(groups, 80).first_steps == {"head_a": 0, "head_b": 0}
    assert recipes.gradual(groups, 50).first_steps == {"head_a": 0, "head_b": 0, "image": 10, "text": 10, "stem": 20}
    assert recipes.head_then_all(groups, 80).resolved(names).first_steps == {
        "stem": 40, "image": 40, "text": 40, "head_a": 0, "head_b": 0}
    assert recipes.head_only(groups[:3], 80).first_steps == {"image": 0, "text": 0}  # without a head
    assert recipes.reversed_decay(8.0, 0.5)(groups) == {"stem": 8.0, "image": 4.0, "text": 4.0, "head_a": 2.0, "head_b": 2.0}


def test_l2_sp_pulls_what_is_below_the_heads_also_after_the_optimizer_was_loaded():
    groups = two_heads()
    optimizer = recipes.l2_sp(100.0)(param_groups(groups, uniform(0.01)))
    optimizer.load_state_dict(optimizer.state_dict())
    for group in groups:
        for p in group.params.values():
            p.grad = torch.ones(2)
    optimizer.step()
    moved = [group.name for group in groups for p in group.params.values() if not torch.equal(p, torch.ones(2))]
    assert moved == ["head_a", "head_b"]


def test_reversed_decay_is_layer_decay_upside_down(resnet_groups):
    rates = recipes.reversed_decay(1e-2, 0.5)(resnet_groups)
    assert list(rates) == ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
    assert list(rates.values()) == pytest.approx([1e-2 * 0.5**i for i in range(6)])


def test_l2_sp_without_a_pull_is_adamw_and_a_full_pull_holds_the_backbone_where_it_was():
    def trained(make):
        model = net()
        groups = layer_groups(model)
        optimizer = make(param_groups(groups, uniform(0.01)))
        for seed in range(5):
            step(model, optimizer, seed)
        return [p.detach() for group in groups for p in group.params.values()]

    start = [p.detach() for p in net().parameters()]
    free, adamw = trained(recipes.l2_sp(0.0)), trained(lambda groups: torch.optim.AdamW(groups, fused=True))
    held, some = trained(recipes.l2_sp(100.0)), trained(recipes.l2_sp(20.0))  # lr · strength is 1: all the way back
    assert all(map(torch.equal, free, adamw))
    assert all(map(torch.allclose, held[:-2], start[:-2]))
    assert not any(map(torch.allclose, held[-2:], start[-2:]))  # the head is new: nothing to be pulled to
    for now, pulled, before in zip(free[:-2], some[:-2], start[:-2], strict=True):
        assert (pulled - before).norm() < (now - before).norm()


def test_relative_gradient_rates_are_in_proportion_to_the_norms():
    model = net()
    groups = layer_groups(model)
    with pytest.raises(ValueError, match=r"no relative gradient for stem, 2, head: call backward\(\)"):
        relative_gradient_rates(0.1)(groups)
    model(torch.randn(16, 4)).square().sum().backward()
    rates = relative_gradient_rates(0.1)(groups)
    assert max(rates.values()) == pytest.approx(0.1)
    norms = {group.name: (sum(p.grad.square().sum() for p in group.params.values())
                          / sum(p.detach().square().sum() for p in group.params.values())) ** 0.5 for group in groups}
    for name in rates:
        assert rates[name] / rates["head"] == pytest.approx(float(norms[name] / norms["head"]), rel=1e-4)


def test_auto_rgn_scales_each_step_by_its_own_gradients_and_leaves_the_schedule_its_rates():
    model = net()
    groups = layer_groups(model)
    optimizer = recipes.auto_rgn(param_groups(groups, uniform(0.01)))
    schedule = one_cycle(optimizer, 10)
    for seed in range(3):
        planned = [group["lr"] for group in optimizer.param_groups]
        before = [[p.detach().clone() for p in group["params"]] for group in optimizer.param_groups]
        used = []
        handle = optimizer.register_step_pre_hook(lambda o, *_, used=used: used.extend(g["lr"] for g in o.param_groups))
        step(model, optimizer, seed)
        handle.remove()
        factors = [lr / plan for lr, plan in zip(used, planned, strict=True)]
        expected = relative_gradient_rates(1.0)  # of the same gradients, but of the weights before the step
        with torch.no_grad():
            for group, old in zip(optimizer.param_groups, before, strict=True):
                for p, value in zip(group["params"], old, strict=True):
                    p.copy_(value)
        assert factors == pytest.approx(list(expected(groups).values()), rel=1e-4)
        assert [group["lr"] for group in optimizer.param_groups] == planned
        schedule.step()


def test_in_one_group_an_optimizer_sees_one_layer_that_trains_as_before():
    model, apart = net(), net()
    groups = param_groups(layer_groups(apart, torch.zeros(1, 4)), uniform(0.01))
    together = recipes.in_one_group(torch.optim.AdamW)(param_groups(layer_groups(model, torch.zeros(1, 4)), uniform(0.01)))
    (group,) = together.param_groups
    assert group["name"] == "all"
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters()}
    step(model, together)
    step(apart, torch.optim.AdamW(groups))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), apart.parameters(), strict=True))
