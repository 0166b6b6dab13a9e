"""Rates that arrive: from groups to any optimizer, and tables that say what the next step will use."""

import math
from itertools import pairwise

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models import resnet18

from layerlr_helpers import (
    current_rates,
    describe,
    head_and_backbone,
    layer_decay,
    layer_groups,
    param_groups,
    per_group,
    uniform,
)
from layerlr_helpers.layers import LayerGroup

RESNET = ["stem", "layer1", "layer2", "layer3", "layer4", "head"]


@pytest.fixture(scope="module")
def groups():
    return layer_groups(resnet18(weights=None), torch.zeros(1, 3, 32, 32))


def small():
    """A small model whose groups are stem, 2 and head, with a norm in each of the first two."""
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def named_groups(n):
    return [LayerGroup(f"g{i}", {f"g{i}.w": nn.Parameter(torch.ones(2))}) for i in range(n)]


rates = st.floats(1e-6, 1.0)


# --- rates ------------------------------------------------------------------------------------------------------------

@given(st.integers(1, 12), rates, rates)
def test_uniform_and_two_rates_name_every_group(n, low, high):
    groups = named_groups(n)
    assert uniform(low)(groups) == {f"g{i}": low for i in range(n)}
    assert head_and_backbone(backbone_lr=low, head_lr=high)(groups) == {f"g{i}": high if i == n - 1 else low for i in range(n)}


@given(st.integers(1, 12), rates, st.floats(0.01, 1.0))
def test_layer_decay_multiplies_by_the_decay_for_each_group_away_from_the_head(n, head_lr, decay):
    lrs = list(layer_decay(head_lr, decay)(named_groups(n)).values())
    assert lrs[-1] == head_lr
    assert all(math.isclose(before, after * decay) for before, after in pairwise(lrs))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8).filter(any), rates, rates, st.floats(0.01, 1.0))
def test_the_rate_is_a_function_of_depth_not_of_the_place_in_the_list(depths, low, head_lr, decay):
    groups = [LayerGroup(f"g{i}", {"w": nn.Parameter(torch.ones(1))}, depth=depth) for i, depth in enumerate(depths)]
    assert list(layer_decay(head_lr, decay)(groups).values()) == [head_lr * decay**depth for depth in depths]
    assert list(head_and_backbone(backbone_lr=low, head_lr=head_lr)(groups).values()) == [
        head_lr if depth == 0 else low for depth in depths]


def test_two_heads_of_a_model_are_both_heads_even_if_it_has_nothing_else():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 3)})
    heads = [LayerGroup(f"head.{name}", {f"{name}.weight": head.weight}, model=model) for name, head in model.items()]
    assert layer_decay(1e-3, 0.5)(heads) == {"head.a": 1e-3, "head.b": 1e-3}


def test_layer_decay_of_one_is_uniform(groups):
    assert layer_decay(1e-3, 1)(groups) == uniform(1e-3)(groups)


@pytest.mark.parametrize("decay", [0, -0.5, 1.01, math.nan, math.inf])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match="decay must be above 0 and at most 1"):
        layer_decay(1e-3, decay)


@pytest.mark.parametrize("bad", [-1e-3, math.nan, math.inf])
@pytest.mark.parametrize("make", [
    uniform, lambda lr: layer_decay(lr, 0.5), lambda lr: per_group({"head": lr}),
    lambda lr: head_and_backbone(backbone_lr=lr, head_lr=1.0), lambda lr: head_and_backbone(backbone_lr=1.0, head_lr=lr),
])
def test_a_rate_that_is_no_rate_is_refused_at_once(make, bad):
    with pytest.raises(ValueError, match="must be a finite number, 0 or above"):
        make(bad)


def test_patterns_give_rates_names_go_before_patterns_and_later_patterns_before_earlier_ones(groups):
    lrs = per_group({"head": 1e-2, "*": 1e-5, "layer*": 1e-4, "layer[34]": 1e-3})(groups)
    assert lrs == {"stem": 1e-5, "layer1": 1e-4, "layer2": 1e-4, "layer3": 1e-3, "layer4": 1e-3, "head": 1e-2}
    assert list(lrs) == RESNET


def test_a_pattern_without_a_match_is_named_with_what_comes_close(groups):
    with pytest.raises(ValueError, match=r"'layer9'.*did you mean.*'layer4'.*there are: stem, layer1"):
        per_group({"layer9": 1e-3, "*": 1e-3})(groups)


def test_a_group_without_a_rate_is_named(groups):
    with pytest.raises(ValueError, match="no rate was given for the groups stem, head"):
        per_group({"layer*": 1e-3})(groups)


# --- parameter groups -------------------------------------------------------------------------------------------------

def test_the_groups_are_plain_torch_groups_with_the_rate_in_them(groups):
    made = param_groups(groups, layer_decay(1e-3, 0.5), weight_decay=0.01)
    assert [group["name"] for group in made] == [group["layer"] for group in made] == RESNET
    assert [group["lr"] for group in made] == [1e-3 * 0.5**k for k in range(5, -1, -1)]
    assert {group["weight_decay"] for group in made} == {0.01}
    assert all(type(group) is dict and type(group["params"]) is list for group in made)


@settings(max_examples=30)
@given(st.booleans(), st.sampled_from(["stage", "child", "block", "tensor"]), st.booleans())
def test_every_parameter_is_in_exactly_one_parameter_group(split, granularity, exempt):
    model = small()
    made = param_groups(layer_groups(model, granularity=granularity), uniform(1e-3), weight_decay=0.1,
                        decay_norm_and_bias=not split, no_weight_decay=["0.weight"] if exempt else [])
    assert sorted(id(p) for group in made for p in group["params"]) == sorted(id(p) for p in model.parameters())
    assert len({group["name"] for group in made}) == len(made)


def test_a_model_is_as_good_as_its_groups_and_a_dictionary_as_good_as_per_group():
    model = small()
    direct = param_groups(model, {"*": 1e-4, "head": 1e-3})
    assert [(g["name"], g["lr"]) for g in direct] == [("stem", 1e-4), ("2", 1e-4), ("head", 1e-3)]


def test_norms_and_biases_can_go_without_weight_decay():
    made = param_groups(small(), layer_decay(1e-3, 0.5), weight_decay=0.1, decay_norm_and_bias=False)
    assert [(g["name"], g["layer"], g["weight_decay"]) for g in made] == [
        ("stem", "stem", 0.1), ("stem/no_decay", "stem", 0.0), ("2", "2", 0.1), ("2/no_decay", "2", 0.0),
        ("head", "head", 0.1), ("head/no_decay", "head", 0.0)]
    for group in made:
        assert all((p.ndim < 2) == (group["weight_decay"] == 0) for p in group["params"])
        assert group["lr"] == layer_decay(1e-3, 0.5)(layer_groups(small()))[group["layer"]]


def test_a_layer_of_one_kind_only_is_not_split():
    made = param_groups(nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 2)), uniform(1e-3), weight_decay=0.1,
                        decay_norm_and_bias=False)
    assert [g["name"] for g in made] == ["stem", "head", "head/no_decay"]


def test_further_parameters_can_be_named():
    for patterns in (["0.weight"], "0.w*"):
        made = param_groups(small(), uniform(1e-3), weight_decay=0.1, no_weight_decay=patterns)
        free = [g for g in made if g["weight_decay"] == 0]
        assert [(g["name"], [tuple(p.shape) for p in g["params"]]) for g in free] == [("stem/no_decay", [(8, 4)])]
    with pytest.raises(ValueError, match=r"no parameter matches 'wieght'"):
        param_groups(small(), uniform(1e-3), no_weight_decay=["wieght"])


def test_weight_decay_that_is_not_given_is_the_optimizers_own():
    made = param_groups(small(), uniform(1e-3))
    assert all("weight_decay" not in group for group in made)
    assert {group["weight_decay"] for group in torch.optim.AdamW(made, weight_decay=0.05).param_groups} == {0.05}
    spared = param_groups(small(), uniform(1e-3), decay_norm_and_bias=False)
    assert [group["weight_decay"] for group in torch.optim.AdamW(spared, weight_decay=0.05).param_groups] == [0.05, 0.0] * 3
    assert {group["weight_decay"] for group in param_groups(small(), uniform(1e-3), weight_decay=0.0)} == {0.0}


class Positions(nn.Module):
    """A model with a parameter that its author wants no weight decay for; it also names one that other sizes have."""

    def __init__(self):
        super().__init__()
        self.position, self.bias_table = nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(3, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(x + self.position.sum(0) + self.bias_table.sum(0))

    def no_weight_decay(self):
        return {"position", "distillation_token"}

    def no_weight_decay_keywords(self):
        return {"table"}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("weight_decay", [0.05, None])
def test_what_the_model_itself_keeps_free_of_weight_decay_is_kept_free_of_it(wrapped, weight_decay):
    model = nn.Sequential(nn.Linear(4, 4), Positions()) if wrapped else Positions()
    made = torch.optim.AdamW(param_groups(layer_groups(model, torch.ones(1, 4)), uniform(1e-3), weight_decay=weight_decay),
                             weight_decay=0.05).param_groups
    free = {id(p) for group in made if group["weight_decay"] == 0 for p in group["params"]}
    positions = model[1] if wrapped else model
    assert free == {id(positions.position), id(positions.bias_table)}
    assert {group["weight_decay"] for group in made} == {0.0, 0.05}


def test_without_weight_decay_there_is_nothing_to_keep_free_of_it():
    groups = layer_groups(Positions(), torch.ones(1, 4))
    assert len(param_groups(groups, uniform(1e-3), weight_decay=0.0)) == len(groups)


@given(st.sampled_from(["stage", "tensor"]), st.booleans())
def test_two_selections_that_exclude_each_other_share_the_parameters(granularity, split):
    model = small()
    groups = layer_groups(model, granularity=granularity)

    def made(select):
        return param_groups(groups, layer_decay(1e-3, 0.5), select=select, decay_norm_and_bias=not split)

    matrices, rest = made(lambda p: p.ndim == 2), made(lambda p: p.ndim != 2)
    assert all(p.ndim == 2 for group in matrices for p in group["params"])
    assert sorted(id(p) for group in matrices + rest for p in group["params"]) == sorted(map(id, model.parameters()))
    assert all(group["params"] for group in matrices + rest)
    rate_of_layer = layer_decay(1e-3, 0.5)(groups)
    assert all(group["lr"] == rate_of_layer[group["layer"]] for group in matrices + rest)


def test_a_selection_of_nothing_is_refused():
    with pytest.raises(ValueError, match="select includes none of the 10 parameters of the groups stem, 2, head"):
        param_groups(small(), uniform(1e-3), select=lambda p: p.ndim == 7)


@given(st.lists(rates, min_size=1, max_size=6))
def test_lr_scale_is_the_part_of_the_highest_rate_that_each_group_has(lrs):
    groups = named_groups(len(lrs))
    made = param_groups(groups, {group.name: lr for group, lr in zip(groups, lrs, strict=True)}, lr_scale=True)
    assert [group["lr"] for group in made] == lrs
    assert all(group["initial_lr"] == max(lrs) for group in made)
    assert all(math.isclose(group["lr_scale"] * group["initial_lr"], group["lr"]) for group in made)
    assert "lr_scale" not in param_groups(groups, uniform(1e-3))[0]


def with_fixed_weights():
    """Groups of a model whose author fixed one weight, and one that is of whole numbers and cannot be trained at all."""
    model = small()
    model[0].weight.requires_grad_(False)
    model[2].weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    names = [["0.weight", "0.bias", "1.weight", "1.bias"], ["2.weight"], ["2.bias", "3.weight", "3.bias"],
             ["4.weight", "4.bias"]]
    fixed = [{"0.weight"}, {"2.weight"}, set(), set()]
    return [LayerGroup(f"g{i}", {name: model.get_parameter(name) for name in names[i]}, depth=3 - i, fixed=fixed[i],
                       model=model) for i in range(4)]


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adafactor"])
def test_what_the_author_fixed_is_listed_and_stays_as_it_is_in_any_optimizer(name):
    groups = with_fixed_weights()
    made = param_groups(groups, uniform(0.1), weight_decay=0.1)
    assert [group.get("fixed") for group in made] == [(0,), (0,), None, None]
    optimizer = getattr(torch.optim, name)(made)
    before = [p.detach().clone() for group in made for p in group["params"]]
    for group in groups:
        for p in group.params.values():
            if p.requires_grad:
                p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    for p, old in zip((p for group in made for p in group["params"]), before, strict=True):
        assert torch.equal(p, old) != p.requires_grad


@pytest.mark.parametrize(("rates", "message"), [
    (lambda groups: {"stem": 1.0}, r"without a rate: 2, head; unknown: none"),
    (lambda groups: {"stem": 1.0, "2": 1.0, "head": 1.0, "neck": 1.0}, r"without a rate: none; unknown: neck"),
    (lambda groups: {"stem": 1.0, "2": -1.0, "head": 1.0}, "the rate of '2' must be"),
    ({"haed": 1e-3, "*": 1e-3}, "did you mean 'head'"),
])
def test_rates_from_a_function_or_dictionary_of_the_user_are_checked_too(rates, message):
    with pytest.raises(ValueError, match=message):
        param_groups(small(), rates)


def test_no_groups_two_of_one_name_and_a_bad_weight_decay_are_refused():
    with pytest.raises(ValueError, match="got none"):
        param_groups([], uniform(1e-3))
    with pytest.raises(ValueError, match="got g0, g0"):
        param_groups([*named_groups(1), *named_groups(1)], uniform(1e-3))
    with pytest.raises(ValueError, match="weight_decay must be"):
        param_groups(small(), uniform(1e-3), weight_decay=-1)


OPTIMIZERS = ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD",
              "Adafactor"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_torch_optimizer_takes_the_groups_and_honours_their_rates_from_the_first_step(name):
    torch.manual_seed(0)
    model = small()
    optimizer = getattr(torch.optim, name)(param_groups(model, {"stem": 0.0, "2": 1e-3, "head": 1e-2}))
    before = [p.detach().clone() for p in model.parameters()]
    nn.functional.cross_entropy(model(torch.randn(8, 4)), torch.arange(8) % 3).backward()
    optimizer.step()
    moved = {group["name"]: max((p - old).abs().max().item() for p, old in zip(model.parameters(), before, strict=True)
                                if any(p is q for q in group["params"])) for group in optimizer.param_groups}
    assert current_rates(optimizer) == {"stem": 0.0, "2": 1e-3, "head": 1e-2}
    # Rprop has the size of its first step from lr, but cuts it off below at a size of its own.
    assert moved["stem"] <= (2e-6 if name == "Rprop" else 0.0)
    assert 0 < moved["2"] < moved["head"]


def test_the_step_is_the_one_that_groups_written_by_hand_give():
    torch.manual_seed(0)
    ours, theirs = small(), small()
    theirs.load_state_dict(ours.state_dict())
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    by_hand = [{"params": [*theirs[0].parameters(), *theirs[1].parameters()], "lr": 2.5e-4},
               {"params": [*theirs[2].parameters(), *theirs[3].parameters()], "lr": 5e-4},
               {"params": theirs[4].parameters(), "lr": 1e-3}]
    for model, made in ((ours, param_groups(ours, layer_decay(1e-3, 0.5), weight_decay=0.1)), (theirs, by_hand)):
        optimizer = torch.optim.AdamW(made, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_weight_decay_in_the_groups_goes_before_the_optimizers():
    made = torch.optim.AdamW(param_groups(small(), uniform(1e-3), weight_decay=0.3), weight_decay=0.01).param_groups
    assert {group["weight_decay"] for group in made} == {0.3}


# --- tables -----------------------------------------------------------------------------------------------------------

def test_describe_is_the_same_for_an_optimizer_and_for_the_groups_it_is_made_of(groups):
    made = param_groups(groups, layer_decay(1e-3, 0.5), weight_decay=0.01)
    table = describe(made)
    pd.testing.assert_frame_equal(table, describe(torch.optim.AdamW(made)))
    assert list(table) == ["group", "depth", "tensors", "parameters", "lr", "weight_decay", "trainable"]
    assert list(table.group) == RESNET
    assert list(table.depth) == [5, 4, 3, 2, 1, 0]
    assert table.parameters.sum() == sum(group.size for group in groups)
    assert table.tensors.sum() == 62
    assert table.trainable.all()


def test_a_description_is_a_whole_table_in_a_terminal_and_in_a_notebook(groups):
    table = describe(param_groups(groups, layer_decay(1e-3, 0.5), weight_decay=0.01))
    with pd.option_context("display.width", 40, "display.max_columns", 3, "display.max_rows", 3):
        header, *rows = repr(table).splitlines()
        assert header.split() == list(table)
        assert [row.split()[1] for row in rows] == RESNET
        assert [float(row.split()[5]) for row in rows] == pytest.approx(list(table.lr), rel=1e-2)
    assert table._repr_html_().count("<tr") == 7
    assert repr(table[["group"]]).split()[0] == "group"  # a part of it is an ordinary frame


def test_describe_counts_what_the_author_fixed_if_there_is_any():
    groups = with_fixed_weights()
    table = describe(torch.optim.AdamW(param_groups(groups, uniform(1e-3))))
    assert list(table.fixed) == [32, 64, 0, 0]
    assert list(table.trainable) == [True, False, True, True]
    groups[0].params["0.weight"].requires_grad_(True)  # the user trains it nevertheless
    assert list(describe(param_groups(groups, uniform(1e-3))).fixed) == [0, 64, 0, 0]


def test_depth_and_weight_decay_that_are_not_known_are_missing():
    model = small()
    by_hand = describe([{"params": list(model.parameters())}])
    assert by_hand.depth.isna().all()
    assert by_hand.weight_decay.isna().all()  # the optimizer will decide
    assert list(describe(torch.optim.AdamW(model.parameters())).weight_decay) == [0.01]
    assert list(describe(torch.optim.Rprop(model.parameters())).weight_decay) == [0.0]  # has none
    table = describe(param_groups(layer_groups(model), uniform(1e-3))[1:], model)
    assert list(table.depth[:2]) == [1, 0]
    assert pd.isna(table.depth[2])


def test_a_rate_that_the_optimizer_finds_itself_is_not_a_number():
    class OwnRate(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": None})

    optimizer = OwnRate(small().parameters())
    assert math.isnan(current_rates(optimizer)["group 0"])
    assert math.isnan(describe(optimizer).lr[0])


def test_describe_shows_the_rate_of_this_moment():
    optimizer = torch.optim.SGD(param_groups(small(), uniform(0.5)))
    optimizer.param_groups[1]["lr"] = 0.25
    assert list(describe(optimizer).lr) == [0.5, 0.25, 0.5]


def test_the_two_halves_of_a_split_layer_have_one_depth():
    table = describe(param_groups(small(), uniform(1e-3), weight_decay=0.1, decay_norm_and_bias=False))
    assert list(table.depth) == [2, 2, 1, 1, 0, 0]
    assert list(table.weight_decay) == [0.1, 0.0] * 3


def test_a_frozen_group_has_rate_zero_and_one_that_trains_in_part_its_own():
    model = small()
    made = param_groups(model, uniform(1e-3))
    for p in [*model[0].parameters(), *model[1].parameters(), model[2].weight]:
        p.requires_grad_(False)
    table = describe(made)
    assert list(table.lr) == [0.0, 1e-3, 1e-3]
    assert list(table.trainable) == [False, True, True]
    assert current_rates(made) == {"stem": 0.0, "2": 1e-3, "head": 1e-3}


def test_describe_reports_parameters_that_the_optimizer_does_not_have():
    model = small()
    assert "(not in the optimizer)" not in set(describe(param_groups(model, uniform(1e-3)), model).group)
    last = describe(param_groups(model, uniform(1e-3))[1:], model).iloc[-1]
    assert (last.group, last.tensors, last.parameters, last.lr, last.trainable) == (
        "(not in the optimizer)", 4, 4 * 8 + 8 + 8 + 8, 0.0, False)


def test_describe_reads_groups_that_were_made_by_hand():
    model = small()
    optimizer = torch.optim.SGD([{"params": model[0].parameters()}, {"params": model[2].parameters(), "name": "middle"},
                                 {"params": model[4].parameters(), "name": "middle"}], lr=0.1)
    assert list(describe(optimizer).group) == ["group 0", "middle", "middle (group 2)"]  # none is lost
    raw = [{"params": list(model[0].parameters())}]  # no rate yet: the optimizer's default will be it
    assert math.isnan(describe(raw).lr[0])


def test_describe_does_not_use_up_a_generator():
    made = [{"params": small()[0].parameters(), "lr": 0.1}]
    with pytest.raises(TypeError, match="'group 0' can be read only once"):
        describe(made)
    assert len(list(made[0]["params"])) == 2


def test_a_rate_may_be_a_tensor():
    optimizer = torch.optim.Adam([{**group, "lr": torch.tensor(group["lr"])} for group in param_groups(small(), uniform(0.5))])
    assert current_rates(optimizer) == {"stem": 0.5, "2": 0.5, "head": 0.5}
    assert list(describe(optimizer).lr) == [0.5] * 3


def test_a_number_in_place_of_rates_is_refused_with_what_works():
    with pytest.raises(TypeError, match=r"uniform\(1e-3\).*not 0.001"):
        param_groups(nn.Linear(2, 2), 1e-3)
