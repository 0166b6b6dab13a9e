"""Units: what is opened and what is kept whole, where each stands in the flow, and where norms go."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from layerlr_helpers.tracing import trace_forward
from layerlr_helpers.units import Unit, cut_into_units, fold_norms, fold_parameterless


class Block(nn.Module):
    """Two convolutions with their norms and a way round them."""

    def __init__(self, width=4):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x):
        return x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))


class Experts(nn.Module):
    """A mixture: every expert works on the same input."""

    def __init__(self, width=4, experts=3):
        super().__init__()
        self.gate = nn.Linear(width, experts)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Linear(width, width)) for _ in range(experts))

    def forward(self, x):
        return x + sum(weight[..., None] * expert(x)
                       for weight, expert in zip(self.gate(x).softmax(-1).unbind(-1), self.experts, strict=True))


class Numbered(nn.Module):
    """Its blocks in attributes that count."""

    def __init__(self):
        super().__init__()
        self.b2, self.b1, self.stem = Block(), Block(), nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.b2(self.b1(self.stem(x)))


def cut(model, granularity="block", example=None, whole=()):
    return cut_into_units(model, trace_forward(model, example), granularity, whole)


def names(*args, **kwargs):
    return [unit.name for unit in cut(*args, **kwargs)]


def in_numbers(numbers):
    return sum(1 << number for number in numbers)


def unit(name, *, run, kernels=1, members=(), behind=(), params=True):
    """A unit by hand; members and behind are numbers of parameters."""
    return Unit(name, {f"{name}.weight": nn.Parameter(torch.ones(1))} if params else {}, {}, run, run, (), kernels,
                in_numbers(members), in_numbers(behind))


# --- what is opened ---------------------------------------------------------------------------------------------------

def test_blocks_are_kept_whole_and_what_holds_them_is_opened():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(Block(), Block()), nn.Conv2d(4, 2, 1))
    assert names(model) == names(model, "stage") == ["0", "1.0", "1.1", "2"]
    assert names(model, "child") == ["0", "1", "2"]
    assert "1.0.conv1" in names(model, "tensor")


def test_a_convolution_with_its_norm_in_a_sequential_is_one_unit_and_two_convolutions_are_two():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
                          nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 3)))
    assert names(model) == ["0", "1.0", "1.1"]


@pytest.mark.parametrize("parametrized", [parametrizations.weight_norm, parametrizations.spectral_norm])
@pytest.mark.parametrize("layer", [lambda: nn.Linear(4, 4), lambda: nn.Conv2d(4, 4, 1)])
def test_a_layer_whose_weight_is_computed_from_others_is_one_unit(parametrized, layer):
    assert names(nn.Sequential(*(parametrized(layer()) for _ in range(3)))) == ["0", "1", "2"]


def test_blocks_in_attributes_that_count_are_found_too():
    model = nn.Sequential(Numbered(), nn.Conv2d(4, 2, 1))
    assert names(model) == ["0.b2", "0.b1", "0.stem", "1"]  # in the order of the tree; the moments tell when they run


def test_experts_side_by_side_are_not_opened():
    model = nn.Sequential(nn.Linear(4, 4), Experts(), Experts(), nn.Linear(4, 2))
    assert names(model, example=torch.ones(1, 5, 4)) == ["0", "1", "2", "3"]


def test_whole_keeps_a_stage_whole_and_opens_a_block_around_a_part():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(Block(), Block()), nn.Conv2d(4, 2, 1))
    assert names(model, whole=["1"]) == ["0", "1", "2"]
    assert "1.1.conv2" in names(model, whole=["1.1.conv2"])


def test_a_parameter_that_a_container_holds_is_a_unit_of_its_own():
    class Scaled(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(3, 4), nn.Linear(4, 2))
            self.shift, self.mix = nn.Parameter(torch.ones(1, 2)), nn.Parameter(torch.ones(2, 2))

        def forward(self, x):
            return (super().forward(x) + self.shift) @ self.mix

    units = {unit.name: unit for unit in cut(Scaled())}
    assert list(units) == ["shift", "mix", "0", "1"]
    assert [units[name].kernels for name in ("shift", "mix")] == [0, 1]  # one is added to the data, one multiplies them
    assert units["1"].feeds(units["shift"])
    assert units["shift"].feeds(units["mix"])


class Tower(nn.Module):
    """A network of its own: two layers in a list, and an output layer."""

    def __init__(self):
        super().__init__()
        self.net, self.out = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4)

    def forward(self, x):
        return self.out(self.net(x))


class Beside(nn.Module):
    """Parts that work on one input, perhaps after a stem, and a last layer for the sum of what they give."""

    def __init__(self, make, stem=False):
        super().__init__()
        self.stem = nn.Linear(4, 4) if stem else nn.Identity()
        self.parts, self.last = nn.ModuleList(make() for _ in range(3)), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(sum(part(self.stem(x)) for part in self.parts))


def row_of_layers():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


X = torch.ones(2, 4)


@pytest.mark.parametrize(("make", "layers"), [(Tower, ["net.0", "net.2", "out"]), (row_of_layers, ["0", "2", "4"])])
def test_networks_of_one_class_that_begin_at_the_input_are_opened_and_branches_are_not(make, layers):
    assert names(Beside(make), example=X) == [*(f"parts.{i}.{layer}" for i in range(3) for layer in layers), "last"]
    assert names(Beside(make, stem=True), example=X) == ["stem", "parts.0", "parts.1", "parts.2", "last"]


def test_blocks_in_a_row_are_kept_whole_though_they_are_all_of_the_model():
    assert names(nn.Sequential(*(nn.TransformerEncoderLayer(4, 2, 8) for _ in range(3))), example=torch.ones(1, 3, 4)) == [
        "0", "1", "2"]


def test_a_network_is_opened_though_the_pass_does_not_use_its_copy():
    class WithTarget(nn.Module):
        def __init__(self):
            super().__init__()
            self.online, self.target = Tower(), Tower()

        def forward(self, x):
            return self.online(x)

    assert names(WithTarget(), example=X) == ["online.net.0", "online.net.2", "online.out", "target"]


class Bare(nn.Module):
    """Three layers whose parameters it holds itself, in lists or (``listed=False``) one by one."""

    def __init__(self, *, listed, added=False):
        super().__init__()
        self.added = added
        self.b = [nn.Parameter(torch.zeros(4)) for _ in range(3)]  # the biases come before the weights in the tree
        self.w = [nn.Parameter(torch.randn(4, 4)) for _ in range(3)]
        for kind in "bw":
            if listed:
                setattr(self, kind, nn.ParameterList(getattr(self, kind)))
            else:
                for i, p in enumerate(getattr(self, kind)):
                    self.register_parameter(f"{kind}{i}", p)

    def forward(self, x):
        for w, b in zip(self.w, self.b, strict=True):
            x = torch.relu(x @ w + b if self.added else nn.functional.linear(x, w, b))
        return x


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("added", [True, False])
def test_parameters_that_work_on_what_others_gave_are_units_and_each_bias_goes_to_its_weight(listed, added):
    model, dot = Bare(listed=listed, added=added), "." * listed
    units = fold_norms(cut(model, "stage", torch.ones(2, 4)))
    assert [set(unit.params) for unit in units] == [{f"w{dot}{i}", f"b{dot}{i}"} for i in range(3)]
    assert names(model, "child", torch.ones(2, 4)) == (["b", "w"] if listed else ["root"])


def test_parameters_of_one_layer_are_not_parted():
    assert names(nn.LSTM(4, 4), example=torch.ones(1, 3, 4)) == names(nn.Linear(4, 4)) == ["root"]


@st.composite
def trees(draw, depth=2):
    shared = nn.Conv2d(4, 4, 1)
    leaves = [Block, lambda: nn.Conv2d(4, 4, 1), lambda: nn.BatchNorm2d(4), lambda: nn.BatchNorm2d(4, affine=False), nn.ReLU,
              lambda: shared]

    def tree(level):
        if level == 0 or draw(st.booleans()):
            return draw(st.sampled_from(leaves))()
        return nn.Sequential(*(tree(level - 1) for _ in range(draw(st.integers(1, 3)))))

    return nn.Sequential(nn.Conv2d(3, 4, 1), tree(depth), nn.Conv2d(4, 2, 1))


@given(trees(), st.sampled_from(["stage", "child", "block", "tensor"]))
def test_every_parameter_is_in_one_unit_whose_set_has_it_and_folding_loses_none(model, granularity):
    trace = trace_forward(model, torch.zeros(1, 3, 4, 4))
    units = cut_into_units(model, trace, granularity)
    for some in (units, fold_norms(units), fold_parameterless(units)):
        held = [id(p) for unit in some for p in unit.params.values()]
        assert sorted(held) == sorted(map(id, model.parameters()))
        assert all(unit.members == trace.set_of(unit.params.values()) for unit in some)
        modules = [module for unit in some for whole in unit.modules.values() for module in whole.modules()]
        assert {module for module in model.modules() if [*module.buffers(recurse=False)]} <= set(modules)
    for folded in (fold_norms(units), fold_parameterless(units)):
        assert all(unit.params for unit in folded)
        assert [unit.first_run for unit in folded] == sorted(unit.first_run for unit in folded)
        assert len({id(atom) for unit in folded for atom in unit.atoms}) == sum(len(unit.atoms) for unit in folded)


# --- the flow between units -------------------------------------------------------------------------------------------

def test_data_flow_from_what_runs_earlier_to_what_has_it_behind():
    first, second, beside = (unit("first", run=0, members=[0]), unit("second", run=2, members=[1], behind=[0]),
                             unit("beside", run=1, members=[2]))
    assert first.feeds(second)
    assert not second.feeds(first)
    assert not beside.feeds(second)
    assert second.fed
    assert not first.fed


def test_what_it_is_given_by_itself_does_not_feed_a_unit():
    assert not unit("recurrent", run=0, members=[0, 1], behind=[1]).fed


def test_two_units_joined_go_by_the_first_and_remember_their_parts():
    a, b, c = unit("a", run=0, members=[0]), unit("b", run=1, members=[1], behind=[0]), unit("c", run=2, members=[2])
    joined = a.joined_with(b).joined_with(c).renamed("all")
    assert (joined.name, joined.first_run, joined.members, joined.behind) == ("all", 0, 0b111, 0b1)
    assert joined.atoms == (a, b, c)
    assert list(joined.params) == ["a.weight", "b.weight", "c.weight"]


# --- norms ------------------------------------------------------------------------------------------------------------

def folded_names(*units, fold=fold_norms):
    return [[atom.name for atom in unit.atoms] for unit in fold(units)]


def test_a_norm_goes_to_what_feeds_it_though_another_branch_ran_in_between():
    left, right = unit("left", run=0, members=[0]), unit("right", run=1, members=[1])
    norm = unit("norm", run=2, kernels=0, members=[2], behind=[0])
    assert folded_names(right, norm, left) == [["left", "norm"], ["right"]]


def test_a_norm_before_everything_goes_to_what_comes_next_and_one_that_nothing_feeds_stays():
    bare, conv = unit("bare", run=0, kernels=0, params=False), unit("conv", run=1, members=[0])
    assert folded_names(bare, conv) == [["conv", "bare"]]
    assert folded_names(unit("norm", run=0, kernels=0, members=[1]), conv) == [["norm"], ["conv"]]


def test_a_part_without_parameters_is_folded_where_norms_are_not():
    conv, norm, bare = (unit("conv", run=0, members=[0]), unit("norm", run=1, kernels=0, members=[1], behind=[0]),
                        unit("bare", run=2, kernels=0, params=False))
    assert folded_names(conv, norm, bare) == [["conv", "norm", "bare"]]
    assert folded_names(conv, norm, bare, fold=fold_parameterless) == [["conv"], ["norm", "bare"]]


@pytest.mark.parametrize("fold", [fold_norms, fold_parameterless])
def test_no_units_and_units_without_parameters_give_none(fold):
    assert fold([]) == []
    assert fold([unit("bare", run=0, kernels=0, params=False)]) == []
