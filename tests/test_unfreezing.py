"""Unfreezing: plans are data, frozen is frozen to the bit, and the step number alone decides."""

import copy
import io
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from layerlr_helpers import (
    LayerAdaptiveLR,
    LayerGroup,
    PlateauUnfreezing,
    ProgressiveUnfreezing,
    UnfreezePlan,
    fit,
    freeze,
    layer_decay,
    layer_groups,
    one_cycle,
    param_groups,
    unfreeze,
    uniform,
)
from layerlr_helpers.layers import FROZEN_BY_PLAN

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 3
MODES = ("freeze", "statistics", "train", "hold")  # what BatchNorm can do


def net(norm=nn.BatchNorm2d):
    """Two blocks of convolution, norm and dropout under a head: groups 0 (stem), 3 and head."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), norm(6), nn.ReLU(),
                         nn.Conv2d(6, 6, 3, stride=2), norm(6), nn.Dropout(0.1), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)).train()


def groups_of(model, granularity="stage"):
    return layer_groups(model, IMAGES[:1], granularity=granularity)


def train(model, optimizer, steps, *, before=lambda step: None, set_to_none=True):
    for step in range(steps):
        before(step)
        optimizer.zero_grad(set_to_none=set_to_none)
        cross_entropy(model(IMAGES), LABELS).backward()
        optimizer.step()


def frozen_state(model, *prefixes):
    return {name: value.clone() for name, value in model.state_dict().items() if name.startswith(prefixes)}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- plans ------------------------------------------------------------------------------------------------------------

plans = st.builds(UnfreezePlan, st.dictionaries(st.text(max_size=5), st.integers(0, 50), max_size=6))


@given(plans, st.integers(0, 60), st.integers(0, 60))
def test_once_a_group_trains_it_trains_for_good(plan, a, b):
    early, late = sorted((a, b))
    assert plan.trainable_at(early) <= plan.trainable_at(late) <= set(plan.first_steps)


@given(plans)
def test_a_plan_survives_json(plan):
    assert UnfreezePlan.from_json(plan.to_json()) == plan


@given(plans, st.integers(0, 60))
def test_a_group_trains_from_its_first_step_on(plan, step):
    assert all((name in plan.trainable_at(step)) == (step >= first) for name, first in plan.first_steps.items())


def test_top_down_starts_with_the_head_and_goes_back_one_group_at_a_time():
    plan = UnfreezePlan.top_down(groups_of(net()), every=10, first=5)
    assert plan.first_steps == {"head": 5, "3": 15, "stem": 25}
    assert [plan.trainable_at(step) for step in (4, 5, 24, 25)] == [set(), {"head"}, {"head", "3"}, {"head", "3", "stem"}]


def made_by_hand(**depths):
    """Groups of one parameter each, at given depths; of a model, so that a depth of 0 is one that was found."""
    model = nn.ParameterDict({name: nn.Parameter(torch.ones(2)) for name in depths})
    return [LayerGroup(name, {name: model[name]}, {}, depth, model=model) for name, depth in depths.items()]


def test_groups_of_one_depth_unfreeze_together():
    groups = made_by_hand(stem=2, image=1, text=1, head_a=0, head_b=0)
    plan = UnfreezePlan.top_down(groups, every=10, first=5)
    assert plan.first_steps == {"head_a": 5, "head_b": 5, "image": 15, "text": 15, "stem": 25}


def test_a_model_without_a_head_begins_with_what_is_nearest_to_its_output():
    assert UnfreezePlan.top_down(made_by_hand(stem=4, block=1), every=3).first_steps == {"block": 0, "stem": 3}


def test_groups_without_a_depth_unfreeze_from_the_last_to_the_first():
    groups = [LayerGroup(name, {name: nn.Parameter(torch.ones(1))}) for name in "abc"]
    assert UnfreezePlan.top_down(groups, every=1).first_steps == {"c": 0, "b": 1, "a": 2}
    assert PlateauUnfreezing(groups).plan.first_steps == {"c": 0}


def test_a_plan_is_a_copy_of_what_it_was_made_from():
    steps = {"head": np.int64(3)}
    plan = UnfreezePlan(steps)
    steps["head"] = 99
    assert plan.to_json() == '{"head": 3}'


def test_a_plan_may_have_patterns_and_a_name_goes_before_them():
    unfreezing = ProgressiveUnfreezing(groups_of(net()), UnfreezePlan({"head": 0, "*": 4, "[0-9]*": 2}))
    assert unfreezing.plan.first_steps == {"stem": 4, "3": 2, "head": 0}
    assert [sorted(unfreezing.apply(step)) for step in (0, 2, 4)] == [["head"], ["3", "head"], ["3", "head", "stem"]]
    assert UnfreezePlan.from_json(UnfreezePlan({"layer*": 3}).to_json()) == UnfreezePlan({"layer*": 3})


def test_a_plan_in_epochs_becomes_one_in_steps():
    plan = UnfreezePlan.top_down(groups_of(net()), every=2, first=1).in_epochs(5)
    assert plan.first_steps == {"head": 5, "3": 15, "stem": 25}
    for bad in (0, -5, 2.5):
        with pytest.raises(ValueError, match=f"steps_per_epoch must be a whole number, 1 or above, not {bad}"):
            plan.in_epochs(bad)


@pytest.mark.parametrize("first", [-1, 1.5, "3", None, True])
def test_a_first_step_that_is_no_step_is_refused(first):
    with pytest.raises(ValueError, match="first step of 'head' must be a whole number, 0 or above"):
        UnfreezePlan({"head": first})


@pytest.mark.parametrize("text", ["[1, 2]", "3", "{", '{"head": -1}', '{"head": "soon"}'])
def test_text_that_is_no_plan_is_refused(text):
    with pytest.raises(ValueError, match=r"expected|Expecting|first step"):
        UnfreezePlan.from_json(text)


def test_errors_name_the_group_and_those_that_come_close():
    groups = groups_of(net())
    with pytest.raises(ValueError, match=r"no group matches 'haed' \(did you mean 'head'\?\); there are: stem, 3, head"):
        ProgressiveUnfreezing(groups, UnfreezePlan({"haed": 0}))
    with pytest.raises(ValueError, match=r"no group matches 'layer\*'; there are: stem, 3, head"):
        ProgressiveUnfreezing(groups, UnfreezePlan({"layer*": 0}))
    with pytest.raises(ValueError, match="'frieze'; known are 'freeze', 'statistics', 'train'"):
        ProgressiveUnfreezing(groups, UnfreezePlan({"head": 0}), batch_norm="frieze")


# --- frozen means frozen ----------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "AdamW": torch.optim.AdamW,
    "SGD with momentum": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "LayerAdaptiveLR": LayerAdaptiveLR,
}


@pytest.mark.parametrize("set_to_none", [True, False], ids=["grad None", "grad zero"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_parameters_and_buffers_do_not_move_by_one_bit(name, set_to_none):
    model = net()
    groups = groups_of(model)
    optimizer = OPTIMIZERS[name](param_groups(groups, uniform(0.1), weight_decay=0.5))
    # A momentum and gradients from a time when all was trained: they must not go on working on what is frozen.
    train(model, optimizer, 2)
    unfreezing = ProgressiveUnfreezing(groups, UnfreezePlan({"head": 0, "3": 3}))
    unfreezing.apply(0)
    stem, middle, head = (frozen_state(model, *prefix) for prefix in (("0.", "1."), ("3.", "4."), ("9.",)))

    def each_step(step):
        model.train()
        unfreezing.apply(step)
        model.train()

    train(model, optimizer, 3, before=each_step, set_to_none=set_to_none)
    assert equal(stem, frozen_state(model, "0.", "1."))
    assert equal(middle, frozen_state(model, "3.", "4."))
    train(model, optimizer, 5, before=lambda step: unfreezing.apply(step + 3), set_to_none=set_to_none)
    assert equal(stem, frozen_state(model, "0.", "1."))
    for before, prefixes in ((middle, ("3.", "4.")), (head, ("9.",))):  # and what trains does move, buffers too
        after = frozen_state(model, *prefixes)
        assert not any(torch.equal(before[key], after[key]) for key in before)
    assert all(p.grad is None for p in groups[0].params.values())


def test_a_whole_resnet_stays_as_it_is_under_a_head_that_trains():
    model = resnet18(weights=None).train()
    groups = layer_groups(model, torch.zeros(1, 3, 32, 32))
    optimizer = torch.optim.AdamW(param_groups(groups, uniform(0.1), weight_decay=0.5))
    ProgressiveUnfreezing(groups, UnfreezePlan({"head": 0})).apply(0)
    before = copy.deepcopy(model.state_dict())
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
        optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"fc.weight", "fc.bias"}


def test_a_group_has_no_optimizer_state_before_it_trains():
    model = net()
    groups = groups_of(model)
    optimizer = torch.optim.AdamW(param_groups(groups, uniform(0.1)))
    unfreezing = ProgressiveUnfreezing(groups, UnfreezePlan({"head": 0, "3": 2}))
    train(model, optimizer, 4, before=unfreezing.apply)
    steps = {group["name"]: [optimizer.state[p]["step"].item() for p in group["params"] if p in optimizer.state]
             for group in optimizer.param_groups}
    assert steps == {"stem": [], "3": [2.0] * 4, "head": [4.0] * 2}


# --- BatchNorm --------------------------------------------------------------------------------------------------------

def after_some_training(batch_norm):
    """The model, its state before, and its frozen stem's norm with the output that it gave in the last step."""
    model = net()
    groups = groups_of(model)
    optimizer = torch.optim.SGD(param_groups(groups, uniform(0.1)))
    unfreezing = ProgressiveUnfreezing(groups, UnfreezePlan({"head": 0}), batch_norm=batch_norm)
    before = copy.deepcopy(model.state_dict())
    outputs = []
    model[1].register_forward_hook(lambda module, args, output: outputs.append(output.detach()))
    train(model, optimizer, 3, before=lambda step: (unfreezing.apply(step), model.train()))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    return model, changed, outputs[-1]


HEAD = {"9.weight", "9.bias"}
STATISTICS = {f"{i}.{name}" for i in (1, 4) for name in ("running_mean", "running_var", "num_batches_tracked")}


def test_freeze_uses_the_stored_statistics_and_moves_nothing():
    model, changed, output = after_some_training("freeze")
    assert changed == HEAD
    torch.testing.assert_close(output, model[0](IMAGES) / (1 + model[1].eps) ** 0.5)  # stored are mean 0 and variance 1


def test_statistics_normalises_by_the_batch_and_moves_only_the_statistics():
    _, changed, output = after_some_training("statistics")
    assert changed == HEAD | STATISTICS
    torch.testing.assert_close(output.mean((0, 2, 3)), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(output.std((0, 2, 3), unbiased=False), torch.ones(6), atol=1e-3, rtol=0)


def test_train_moves_scale_and_shift_as_well():
    _, changed, output = after_some_training("train")
    assert changed == HEAD | STATISTICS | {f"{i}.{name}" for i in (1, 4) for name in ("weight", "bias")}
    assert output.mean((0, 2, 3)).abs().max() > 1e-4  # a shift has been learned


@pytest.mark.parametrize("plan", [{"head": 0}, {"3": 0}, {"*": 0}, {"head": 0, "*": 2}])
def test_hold_moves_no_statistics_whatever_trains(plan):
    model = net()
    groups = groups_of(model)
    optimizer = torch.optim.SGD(param_groups(groups, uniform(0.1)))
    unfreezing = ProgressiveUnfreezing(groups, UnfreezePlan(plan), batch_norm="hold")
    before, train_at = copy.deepcopy(model.state_dict()), unfreezing.training_at(3)
    train(model, optimizer, 4, before=lambda step: (unfreezing.apply(step), model.train()))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name, p in model.named_parameters() if id(p) in train_at}
    unfreezing.release()
    model(IMAGES)
    assert model[1].num_batches_tracked == 1


def test_without_a_frozen_group_all_modes_but_hold_are_plain_training():
    ends = []
    for batch_norm in (None, "freeze", "statistics", "train"):
        model = net()
        groups = groups_of(model)
        optimizer = torch.optim.SGD(param_groups(groups, uniform(0.1)))
        if batch_norm is not None:
            ProgressiveUnfreezing(groups, UnfreezePlan.top_down(groups, every=0), batch_norm=batch_norm).apply(0)
        torch.manual_seed(1)
        train(model, optimizer, 3)
        ends.append(model.state_dict())
    assert all(equal(ends[0], end) for end in ends[1:])


@pytest.mark.parametrize("norm", [nn.SyncBatchNorm, lambda n: nn.InstanceNorm2d(n, affine=True, track_running_stats=True),
                                  lambda n: nn.BatchNorm2d(n, affine=False)], ids=["sync", "instance", "no scale"])
@pytest.mark.parametrize("granularity", ["stage", "child", "tensor"])
def test_all_norms_that_keep_statistics_are_held(norm, granularity):
    model = net(norm)
    groups = groups_of(model.eval(), granularity)  # SyncBatchNorm trains on a GPU only
    head = {group.name: 0 for group in groups if any(p is q for p in group.params.values() for q in model[9].parameters())}
    optimizer = torch.optim.SGD(param_groups(groups, uniform(0.1)), momentum=0.9)
    unfreezing = ProgressiveUnfreezing(groups, UnfreezePlan(head))
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, 2, before=lambda step: (model.train(), unfreezing.apply(step)))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == HEAD


def test_a_model_without_batch_norm_is_no_special_case():
    for batch_norm in MODES:
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        groups = layer_groups(model)
        ProgressiveUnfreezing(groups, UnfreezePlan({"head": 0}), batch_norm=batch_norm).apply(0)
        assert [p.requires_grad for p in model.parameters()] == [False] * 4 + [True] * 2


@pytest.mark.parametrize(("trains", "moves"), [({"1.weight"}, False), ({"1.bias"}, False), ({"1.weight", "1.bias"}, True)])
def test_a_norm_whose_scale_and_shift_are_in_two_groups_is_held_until_both_train(trains, moves):
    model = net()
    groups = groups_of(model, "tensor")
    unfreezing = ProgressiveUnfreezing(groups, UnfreezePlan(dict.fromkeys(trains | HEAD, 0)))
    unfreezing.apply(0)
    model(IMAGES)
    assert (model[1].num_batches_tracked.item() == 1) == moves
    assert model[4].num_batches_tracked.item() == 0


# --- modes, copies, repetition ----------------------------------------------------------------------------------------

def test_train_and_eval_mean_what_they_always_do():
    model = net()
    groups = groups_of(model)
    reference = copy.deepcopy(model).eval()
    unfreezing = ProgressiveUnfreezing(groups, UnfreezePlan({"head": 0}))
    unfreezing.apply(0)
    model.train()
    assert all(module.training for module in model.modules())
    model(IMAGES)
    assert all(module.training for module in model.modules())
    model.eval()
    assert torch.equal(model(IMAGES), reference(IMAGES))
    assert not any(module.training for module in model.modules())


def test_a_forward_pass_that_fails_leaves_the_mode_as_it_was():
    model = net()
    ProgressiveUnfreezing(groups_of(model), UnfreezePlan({"head": 0})).apply(0)
    with pytest.raises(ValueError, match="expected 4D"):
        model[1](torch.ones(2, 6))
    assert model[1].training


def grads_held_and_wanted(model):
    """All that apply decides, with hooks only so far as they work."""
    model.train()
    model(IMAGES)
    tracked = [m.num_batches_tracked.item() for m in (model[1], model[4])]
    model[1].num_batches_tracked.zero_()
    model[4].num_batches_tracked.zero_()
    return [p.requires_grad for p in model.parameters()], [p.grad is None for p in model.parameters()], tracked


@settings(max_examples=25)
@given(st.lists(st.integers(0, 10), max_size=6), st.integers(0, 10), st.sampled_from(MODES),
       st.dictionaries(st.sampled_from(["stem", "3", "head"]), st.integers(0, 9)))
def test_apply_is_a_function_of_the_step_whatever_was_applied_before(earlier, step, batch_norm, plan):
    ends = []
    for steps in ([step], [*earlier, step], [*earlier, step, step]):
        model = net()
        unfreezing = ProgressiveUnfreezing(groups_of(model), UnfreezePlan(plan), batch_norm=batch_norm)
        returned = [unfreezing.apply(s) for s in steps]
        assert returned[-1] == unfreezing.plan.trainable_at(step)
        ends.append(grads_held_and_wanted(model))
    assert ends[0] == ends[1] == ends[2]
    wanted = {id(p) for p, train in zip(model.parameters(), ends[0][0], strict=True) if train}
    assert wanted == unfreezing.training_at(step)


def test_applying_twice_hooks_once():
    model = net()
    unfreezing = ProgressiveUnfreezing(groups_of(model), UnfreezePlan({"head": 0}))
    for step in range(3):
        unfreezing.apply(step)
    assert [len(m._forward_pre_hooks) for m in model] == [0, 1, 0, 0, 1, 0, 0, 0, 0, 0]


def test_release_unfreezes_everything_and_takes_every_trace_away():
    model = net()
    keys = [set(module.__dict__) for module in model.modules()]
    unfreezing = ProgressiveUnfreezing(groups_of(model), UnfreezePlan({"head": 0}))
    unfreezing.apply(0)
    unfreezing.release()
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert [set(module.__dict__) for module in model.modules()] == keys
    model(IMAGES)
    assert model[1].num_batches_tracked.item() == 1


def test_a_second_unfreezing_of_the_same_model_takes_over_from_the_first():
    # As when a notebook's cell is run again: the first one's hooks must not hold for ever what the second one unfreezes.
    model = net()
    groups = groups_of(model)
    ProgressiveUnfreezing(groups, UnfreezePlan({"head": 0})).apply(0)
    ProgressiveUnfreezing(groups, UnfreezePlan({"head": 0, "3": 0})).apply(0)
    model(IMAGES)
    assert [model[1].num_batches_tracked.item(), model[4].num_batches_tracked.item()] == [0, 1]


def by_pickle(model):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle])
def test_a_copy_of_the_model_is_frozen_as_the_model_is_and_can_be_unfrozen_separately(copied):
    model = net()
    ProgressiveUnfreezing(groups_of(model), UnfreezePlan({"head": 0})).apply(0)
    twin = copied(model).train()
    twin(IMAGES)
    assert twin[1].num_batches_tracked.item() == 0
    ProgressiveUnfreezing(groups_of(twin), UnfreezePlan({"head": 0, "stem": 0})).apply(0)
    twin(IMAGES)
    model(IMAGES)
    assert [twin[1].num_batches_tracked.item(), model[1].num_batches_tracked.item()] == [1, 0]
    assert [twin[4].num_batches_tracked.item(), model[4].num_batches_tracked.item()] == [0, 0]


# --- resuming ---------------------------------------------------------------------------------------------------------

class Stopped(Exception):
    """What ends a run before its time."""


class StopsAt:
    """An unfreezing that is interrupted before a step."""

    def __init__(self, unfreezing, step):
        self.unfreezing, self.step, self.groups = unfreezing, step, unfreezing.groups

    def apply(self, step):
        if step == self.step:
            raise Stopped
        self.unfreezing.apply(step)


def run(kind, checkpoint=None, stop=None):
    model = net()
    groups = groups_of(model)
    optimizer = kind(param_groups(groups, layer_decay(1e-2, 0.5), weight_decay=0.1))
    unfreezing = ProgressiveUnfreezing(groups, UnfreezePlan.top_down(groups, every=3))
    if stop is not None:
        unfreezing = StopsAt(unfreezing, stop)
    loader = DataLoader(TensorDataset(IMAGES, LABELS), 4, shuffle=True, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(7)  # for dropout
    history = fit(model, optimizer, loader, steps=9, schedule=one_cycle(optimizer, 9), unfreezing=unfreezing,
                  checkpoint=checkpoint, checkpoint_every=1 if checkpoint else None, progress=False)
    return model.state_dict(), optimizer.state_dict(), history.to_frame()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, LayerAdaptiveLR])
def test_a_run_resumed_around_an_unfreezing_step_equals_one_that_never_stopped(kind, tmp_path):
    weights, state, history = run(kind)
    for stop in (2, 3, 4, 6, 7):  # unfreezing happens before steps 3 and 6
        checkpoint = tmp_path / f"{stop}.pt"
        with pytest.raises(Stopped):
            run(kind, checkpoint, stop)
        torch.rand(5)  # whatever happens in between
        resumed_weights, resumed_state, resumed_history = run(kind, checkpoint)
        assert equal(weights, resumed_weights)
        assert resumed_history.equals(history)
        torch.testing.assert_close(resumed_state["state"], state["state"], rtol=0, atol=0)
        assert resumed_state["param_groups"] == state["param_groups"]


def test_a_run_can_be_stopped_anywhere_because_all_groups_are_there_from_the_start():
    model = net()
    groups = groups_of(model)
    shapes = []
    for step in (0, 3, 6):
        ProgressiveUnfreezing(groups, UnfreezePlan.top_down(groups, every=3)).apply(step)
        shapes.append([len(group["params"]) for group in param_groups(groups, uniform(1e-3))])
    assert all(a == b for a, b in itertools.pairwise(shapes))


# --- freezing for good ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("batch_norm", MODES)
def test_freezing_by_hand_is_what_a_plan_that_never_unfreezes_does(batch_norm):
    ends = []
    for by_hand in (True, False):
        model = net()
        groups = groups_of(model)
        optimizer = torch.optim.AdamW(param_groups(groups, uniform(0.1)), weight_decay=0.1)
        if by_hand:
            assert freeze(groups, "stem", "[0-9]", batch_norm=batch_norm) == {"stem", "3"}
        else:
            ProgressiveUnfreezing(groups, UnfreezePlan({"head": 0}), batch_norm=batch_norm).apply(0)
        torch.manual_seed(1)
        train(model, optimizer, 3)
        ends.append((model.state_dict(), grads_held_and_wanted(model)))
    assert equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


def test_freezing_leaves_the_other_groups_as_they_are():
    model = net()
    groups = groups_of(model)
    model[9].bias.requires_grad_(False)
    freeze(groups, "stem")
    freeze(groups, "3")
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["9.weight"]
    unfreeze(groups, "3")
    wanted = [name for name, p in model.named_parameters() if p.requires_grad]
    assert wanted == ["3.weight", "3.bias", "4.weight", "4.bias", "9.weight"]
    assert [len(m._forward_pre_hooks) for m in (model[1], model[4])] == [1, 0]


def test_unfreezing_by_hand_takes_every_trace_away():
    model = net()
    keys = [set(module.__dict__) for module in model.modules()]
    before = grads_held_and_wanted(model)
    freeze(groups_of(model), "*")
    unfreeze(groups_of(model), "*")
    assert [set(module.__dict__) for module in model.modules()] == keys
    assert grads_held_and_wanted(model) == before


@pytest.mark.parametrize("call", [freeze, unfreeze])
def test_a_bad_name_or_none_at_all_is_refused_before_anything_is_changed(call):
    model = net()
    groups = groups_of(model)
    before = grads_held_and_wanted(model)
    with pytest.raises(ValueError, match=r"no group matches 'stemm' \(did you mean 'stem'\?\)"):
        call(groups, "head", "stemm")
    with pytest.raises(ValueError, match=r"name the groups, or give patterns such as 'layer\*'; there are: stem, 3, head"):
        call(groups)
    with pytest.raises(ValueError, match="'frieze'; known are 'freeze', 'statistics', 'train'"):
        freeze(groups, "stem", batch_norm="frieze")
    assert grads_held_and_wanted(model) == before


# --- what the model's author fixed ------------------------------------------------------------------------------------

class Adapted(nn.Module):
    """Three layers, in each a base that its author fixed beside what trains, and a fixed table of positions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.position = nn.Parameter(torch.linspace(-1, 1, 6), requires_grad=False)
        self.layers = nn.ModuleList(nn.ModuleDict({"base": nn.Linear(6, 6).requires_grad_(False), "low": nn.Linear(6, 2),
                                                   "norm": nn.BatchNorm1d(2), "up": nn.Linear(2, 6)}) for _ in range(2))
        self.codes = nn.Parameter(torch.randint(-8, 8, (6, 6), dtype=torch.int8), requires_grad=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = x + self.position
        for layer in self.layers:
            x = (layer["base"](x) + layer["up"](layer["norm"](layer["low"](x)))).relu()
        return self.head(x @ (self.codes.float() / 8))


def adapted_groups(model):
    """Groups by hand, of which is fixed what requires no gradient although no plan froze it."""
    frozen_by_plan = getattr(model, FROZEN_BY_PLAN, set())
    fixed = {name for name, p in model.named_parameters() if not p.requires_grad} - frozen_by_plan
    parts = {"stem": ("position",), "first": ("layers.0",), "second": ("layers.1", "codes"), "head": ("head",)}
    modules = dict(model.named_modules())
    groups = []
    for depth, (name, prefixes) in zip((3, 2, 1, 0), parts.items(), strict=True):
        params = {param: p for param, p in model.named_parameters() if param.startswith(prefixes)}
        groups.append(LayerGroup(name, params, {prefix: modules[prefix] for prefix in prefixes if prefix in modules}, depth,
                                 fixed & params.keys(), model))
    return groups


def requiring(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def carry_out(plan, step, batch_norm):
    return lambda groups: ProgressiveUnfreezing(groups, UnfreezePlan(plan), batch_norm=batch_norm).apply(step)


names = st.sampled_from(["*", "head", "first"])
actions = st.one_of(
    st.builds(carry_out, st.dictionaries(st.sampled_from(["stem", "first", "second", "head"]), st.integers(0, 3)),
              st.integers(0, 4), st.sampled_from(MODES)),
    names.map(lambda name: lambda groups: freeze(groups, name)),
    names.map(lambda name: lambda groups: unfreeze(groups, name)),
    st.just(lambda groups: ProgressiveUnfreezing(groups, UnfreezePlan.top_down(groups, every=1)).apply(9)),
    st.just(lambda groups: PlateauUnfreezing(groups).apply(0)),
    st.just(lambda groups: ProgressiveUnfreezing(groups, UnfreezePlan({})).release()))


@settings(max_examples=40)
@given(st.lists(st.tuples(actions, st.booleans()), max_size=6))
def test_nothing_that_was_fixed_trains_whatever_is_frozen_unfrozen_copied_and_grouped_again(history):
    model = Adapted()
    groups, free = adapted_groups(model), requiring(model)
    fixed = {name for name, _ in model.named_parameters()} - free
    for act, is_copied in history:
        act(groups)
        assert requiring(model) <= free
        if is_copied:
            model = copy.deepcopy(model)
            groups = adapted_groups(model)
        assert set().union(*(group.fixed for group in groups)) == fixed
    unfreeze(groups, "*")
    assert requiring(model) == free
    assert not hasattr(model, FROZEN_BY_PLAN)


@pytest.mark.parametrize("batch_norm", MODES)
def test_what_was_fixed_does_not_move_while_the_rest_trains(batch_norm):
    model = Adapted().train()
    groups = adapted_groups(model)
    optimizer = torch.optim.AdamW([p for group in groups for p in group.params.values() if p.is_floating_point()], 0.1)
    unfreezing = ProgressiveUnfreezing(groups, UnfreezePlan.top_down(groups, every=2), batch_norm=batch_norm)
    before = copy.deepcopy(model.state_dict())
    fixed = set().union(*(group.fixed for group in groups))
    for step in range(10):
        unfreezing.apply(step)
        by_id = {id(p): name for name, p in model.named_parameters()}
        assert {by_id[i] for i in unfreezing.training_at(step)} == requiring(model)
        optimizer.zero_grad()
        cross_entropy(model(IMAGES.flatten(1)[:, :6]), LABELS).backward()
        optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    statistics = {name for name, _ in model.named_buffers() if "running" in name or "tracked" in name}
    assert moved == model.state_dict().keys() - fixed - (statistics if batch_norm == "hold" else set())


def test_a_norm_that_was_fixed_is_held_as_long_as_a_plan_is_carried_out():
    model = Adapted().train()
    model.layers[0]["norm"].requires_grad_(False)
    groups = adapted_groups(model)
    unfreezing = ProgressiveUnfreezing(groups, UnfreezePlan({"*": 0}))
    unfreezing.apply(0)
    model(torch.randn(4, 6))
    assert [layer["norm"].num_batches_tracked.item() for layer in model.layers] == [0, 1]
    unfreezing.release()
    model(torch.randn(4, 6))
    assert [layer["norm"].num_batches_tracked.item() for layer in model.layers] == [1, 2]


def test_fixed_parameters_train_if_the_user_says_so_and_whole_numbers_never():
    model = Adapted()
    groups = adapted_groups(model)
    unfreeze(groups, "first", "second", fixed=True)
    assert requiring(model) == {name for name, _ in model.named_parameters()} - {"position", "codes"}
    assert [group.fixed for group in groups] == [{"position"}, set(), {"codes"}, set()]
    unfreezing = ProgressiveUnfreezing(groups, UnfreezePlan({"head": 0, "first": 1}))  # and so they do in later plans
    for step, some in ((0, False), (1, True)):
        unfreezing.apply(step)
        assert model.layers[0]["base"].weight.requires_grad is some
        assert not model.layers[1]["base"].weight.requires_grad


def test_a_parameter_that_the_user_lets_train_by_hand_is_fixed_no_longer():
    model = Adapted()
    groups = adapted_groups(model)
    model.layers[0].requires_grad_(True)
    unfreezing = ProgressiveUnfreezing(groups, UnfreezePlan({"head": 0, "first": 1}))
    unfreezing.apply(0)
    assert not model.layers[0]["base"].weight.requires_grad
    unfreezing.apply(1)
    assert model.layers[0]["base"].weight.requires_grad


def test_groups_made_by_hand_need_no_model():
    weight, codes = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.bool), requires_grad=False)
    groups = [LayerGroup("all", {"weight": weight, "codes": codes})]
    freeze(groups, "*")
    assert not weight.requires_grad
    ProgressiveUnfreezing(groups, UnfreezePlan({"*": 0})).apply(0)
    unfreeze(groups, "*", fixed=True)
    assert [weight.requires_grad, codes.requires_grad] == [True, False]


@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy, by_pickle, lambda model: AveragedModel(model).module])
def test_a_model_that_is_grouped_again_while_a_plan_has_it_frozen_is_not_taken_for_fixed(copied):
    model = net()
    model[3].bias.requires_grad_(False)  # this one is
    unfreezing = ProgressiveUnfreezing(groups_of(model), UnfreezePlan({"head": 0, "*": 5}))
    unfreezing.apply(0)
    twin = copied(model)
    groups = groups_of(twin)
    assert [group.fixed for group in groups] == [set(), {"3.bias"}, set()]
    ProgressiveUnfreezing(groups, UnfreezePlan({"*": 0})).apply(0)
    assert requiring(twin) == {name for name, _ in twin.named_parameters()} - {"3.bias"}
    assert not hasattr(twin, FROZEN_BY_PLAN)


def frozen_by_hand():
    """Groups of a model of which all but the head was frozen before it was grouped."""
    model = net()
    for module in model[:9]:
        module.requires_grad_(False)
    return groups_of(model)


@pytest.mark.parametrize(("make", "named"), [
    (lambda groups: ProgressiveUnfreezing(groups, UnfreezePlan.top_down(groups, every=2)), "3, stem"),
    (lambda groups: ProgressiveUnfreezing(groups, UnfreezePlan({"head": 0, "s*": 2})), r"s\*"),
    (PlateauUnfreezing, "stem, 3"),
    (lambda groups: unfreeze(groups, "head", "stem"), "stem")], ids=["top down", "pattern", "plateau", "unfreeze"])
def test_who_freezes_by_hand_before_grouping_is_told_that_nothing_will_unfreeze_it(make, named):
    groups = frozen_by_hand()
    with pytest.warns(UserWarning, match=rf"nothing will ever train in {named}: .*unfreeze\(groups, '.*', fixed=True\)"):
        made = make(groups)
    if isinstance(made, ProgressiveUnfreezing):
        made.apply(9)
    assert [p.requires_grad for group in groups for p in group.params.values()] == [False] * 8 + [True] * 2


@pytest.mark.parametrize("plan", [{"head": 0}, {"*": 3}, {"head": 0, "*": 2}])
def test_a_name_or_pattern_that_stands_for_something_that_trains_is_no_reason_to_warn(plan):
    groups = frozen_by_hand()
    with warnings.catch_warnings(action="error"):
        ProgressiveUnfreezing(groups, UnfreezePlan({"head": 0}))
        ProgressiveUnfreezing(groups[1:], UnfreezePlan({"*": 3}))
        unfreeze(groups, "*")
        adapted = adapted_groups(Adapted())  # some groups have fixed parameters and others: so it was meant
        ProgressiveUnfreezing(adapted, UnfreezePlan.top_down(adapted, every=2))
        ProgressiveUnfreezing(adapted, UnfreezePlan(plan))


def test_a_plateau_passes_over_what_is_fixed():
    groups = made_by_hand(stem=3, lower=2, upper=1, head=0)
    for group in (groups[1], groups[3]):
        group.params[group.name].requires_grad_(False)
        group.fixed.add(group.name)
    with pytest.warns(UserWarning, match="nothing will ever train in lower, head"):
        unfreezing = PlateauUnfreezing(groups)
    assert first_steps(unfreezing) == [("upper", 0)]
    for step in range(3):
        unfreezing.report(step, {"val_accuracy": 0.5})
    assert first_steps(unfreezing) == [("upper", 0), ("stem", 1)]
    for group in groups:
        group.params[group.name].requires_grad_(False)
        group.fixed.add(group.name)
    with pytest.raises(ValueError, match=r"no group that may train.*unfreeze\(groups, '\*', fixed=True\)"):
        PlateauUnfreezing(groups)


# --- unfreezing on a plateau ------------------------------------------------------------------------------------------

def plateau_unfreezing(**options):
    """Of a model with the groups stem, 2 and head."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    return PlateauUnfreezing(layer_groups(model), **options)


def first_steps(unfreezing):
    return list(unfreezing.plan.first_steps.items())


def test_only_the_head_trains_while_the_metric_improves():
    unfreezing = plateau_unfreezing()
    for step in range(5):
        unfreezing.report(step, {"val_accuracy": 0.1 * step})
    assert first_steps(unfreezing) == [("head", 0)]


def test_each_plateau_unfreezes_the_next_group_from_that_step_on():
    unfreezing = plateau_unfreezing(patience=2)
    for step in (10, 20, 30, 40, 50, 60, 70):
        unfreezing.report(step, {"val_accuracy": 0.5})
    assert first_steps(unfreezing) == [("head", 0), ("2", 30), ("stem", 50)]
    assert unfreezing.apply(29) == {"head"}
    assert unfreezing.apply(30) == {"head", "2"}
    assert unfreezing.groups[0].params["0.weight"].requires_grad is False


def test_a_falling_loss_is_an_improvement_in_mode_min_and_a_plateau_in_mode_max():
    down, up = (plateau_unfreezing(metric="val_loss", mode=mode) for mode in ("min", "max"))
    for step in range(3):
        for unfreezing in (down, up):
            unfreezing.report(step, {"val_loss": 1.0 - 0.1 * step})
    assert first_steps(down) == [("head", 0)]
    assert first_steps(up) == [("head", 0), ("2", 1), ("stem", 2)]


def test_a_change_within_min_delta_is_no_improvement():
    unfreezing = plateau_unfreezing(min_delta=0.05)
    unfreezing.report(1, {"val_accuracy": 0.50})
    unfreezing.report(2, {"val_accuracy": 0.54})
    assert first_steps(unfreezing) == [("head", 0), ("2", 2)]


def test_a_plateau_unfreezes_all_groups_of_a_depth_at_once():
    unfreezing = PlateauUnfreezing(made_by_hand(stem=2, image=1, text=1, head_a=0, head_b=0))
    assert first_steps(unfreezing) == [("head_a", 0), ("head_b", 0)]
    for step in (10, 20, 30, 40):
        unfreezing.report(step, {"val_accuracy": 0.5})
    assert first_steps(unfreezing)[2:] == [("image", 20), ("text", 20), ("stem", 30)]


@pytest.mark.parametrize("mode", ["min", "max"])
@given(st.lists(st.sampled_from([math.nan, math.inf, -math.inf]), max_size=2))
def test_values_that_are_not_finite_before_the_first_that_is_change_nothing(mode, bad):
    unfreezing = plateau_unfreezing(metric="val_loss", mode=mode, patience=3)
    sign = 1 if mode == "max" else -1
    for step, value in enumerate([*bad, *(sign * value for value in (1.0, 2.0, 3.0, 4.0, 5.0))]):
        unfreezing.report(step, {"val_loss": torch.tensor(value)})
    assert first_steps(unfreezing) == [("head", 0)]
    assert unfreezing.state_dict() == {"plan": '{"head": 0}', "best": sign * 5.0, "waited": 0}


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_no_improvement_and_no_best_one(mode, bad):
    sign = 1 if mode == "max" else -1
    unfreezing = plateau_unfreezing(metric="val_loss", mode=mode, patience=2)
    for step, value in enumerate([sign * 1.0, bad, sign * 2.0, bad, bad, sign * 3.0]):
        unfreezing.report(step, {"val_loss": value})
    assert first_steps(unfreezing) == [("head", 0), ("2", 4)]
    assert unfreezing.best == sign * 3.0


@given(st.lists(st.floats(0, 1) | st.sampled_from([math.nan, math.inf, -math.inf]), min_size=1, max_size=12),
       st.integers(0, 12), st.integers(1, 3))
def test_resuming_after_any_report_unfreezes_the_same_at_the_same_steps(values, cut, patience):
    whole = plateau_unfreezing(patience=patience)
    first = plateau_unfreezing(patience=patience)
    for step, value in enumerate(values):
        whole.report(step, {"val_accuracy": value})
        if step == cut:
            second = plateau_unfreezing(patience=patience)
            second.load_state_dict(first.state_dict())
            first = second
        first.report(step, {"val_accuracy": value})
    assert dict(first_steps(first)) == dict(first_steps(whole))


def test_the_state_of_a_plateau_unfreezing_can_be_saved_with_plain_types(tmp_path):
    unfreezing = plateau_unfreezing()
    unfreezing.report(3, {"val_accuracy": 0.5})
    torch.save(unfreezing.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == unfreezing.state_dict()


@pytest.mark.parametrize(("options", "word"), [({"mode": "up"}, "mode"), ({"patience": 0}, "patience")])
def test_bad_options_of_a_plateau_unfreezing_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        plateau_unfreezing(**options)


def test_a_metric_that_is_not_reported_is_an_error_that_names_what_was():
    with pytest.raises(ValueError, match=r"val_accuracy.*loss"):
        plateau_unfreezing().report(1, {"loss": 1.0})


def test_a_plateau_state_of_another_model_is_refused_and_changes_nothing():
    unfreezing = plateau_unfreezing()
    with pytest.raises(ValueError, match="layer9"):
        unfreezing.load_state_dict({"plan": '{"layer9": 3}', "best": 0.1, "waited": 0})
    assert first_steps(unfreezing) == [("head", 0)]
    assert unfreezing.best is None


# --- compiled models --------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler
@pytest.mark.parametrize("batch_norm", MODES)
def test_a_compiled_model_trains_and_holds_what_an_uncompiled_one_does(batch_norm):
    ends = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = net()
        model[5].p = 0.0  # a compiled dropout draws other numbers
        called = torch.compile(model, backend="aot_eager") if compiled else model
        groups = layer_groups(called, IMAGES[:1])
        optimizer = torch.optim.SGD(param_groups(groups, uniform(0.1)), momentum=0.9)
        unfreezing = ProgressiveUnfreezing(groups, UnfreezePlan({"head": 0, "3": 2, "stem": 4}), batch_norm=batch_norm)
        states = []
        for step in range(6):
            unfreezing.apply(step)
            train(called, optimizer, 1)
            states.append(copy.deepcopy(model.state_dict()))
        ends.append(states)
    moved = [sum(not torch.equal(a[name], b[name]) for name in ("0.weight", "3.weight", "9.weight"))
             for a, b in itertools.pairwise(ends[1])]
    assert moved == [1, 2, 2, 3, 3]  # from steps 1 to 5: the head, then layer 3 from step 2 on, then layer 0 from step 4 on
    for plain, compiled in zip(*ends, strict=True):
        torch.testing.assert_close(plain, compiled)


@pytest.mark.parametrize("replace", [
    lambda model: setattr(model, "2", nn.Linear(8, 5)),
    lambda model: model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True),
    lambda model: nn.utils.parametrizations.weight_norm(model[0])])
def test_groups_whose_parameters_were_replaced_are_refused_by_all_that_use_them(replace):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    groups = layer_groups(model)
    replace(model)
    for use in (lambda: freeze(groups, "*"), lambda: unfreeze(groups, "*"), lambda: param_groups(groups, uniform(0.1)),
                lambda: ProgressiveUnfreezing(groups, UnfreezePlan({"head": 0}))):
        with pytest.raises(ValueError, match="replaced after the model was grouped"):
            use()
    assert all(p.requires_grad for p in model.parameters())
    freeze(layer_groups(model), "*")
    assert not any(p.requires_grad for p in model.parameters())


def test_groups_of_a_model_that_moved_or_was_compiled_are_still_its_own():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    groups = layer_groups(model)
    model.half().float()
    torch.compile(model)
    assert freeze(groups, "stem") == {"stem"}
