"""Depth by data flow: the longest way to an output, whatever the order of the attributes and whatever stands beside it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from layerlr_helpers import layer_groups
from layerlr_helpers.layers import FROZEN_BY_PLAN, GRANULARITIES
from tests.runs import model_state, same
from tests.test_layers import Net, assert_partition, module_trees

X = torch.zeros(2, 4)


def depths(*args, **kwargs):
    return {group.name: group.depth for group in layer_groups(*args, **kwargs)}


class Block(nn.Module):
    """Two layers with a way round them."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return x + self.two(torch.relu(self.one(x)))


# --- chains and graphs ------------------------------------------------------------------------------------------------

@given(st.lists(st.sampled_from(["linear", "norm", "activation", "statistics"]), max_size=8))
def test_in_a_chain_depth_is_the_place_counted_from_the_end(kinds):
    make = {"linear": lambda: nn.Linear(4, 4), "norm": lambda: nn.LayerNorm(4), "activation": nn.ReLU,
            "statistics": lambda: nn.BatchNorm1d(4, affine=False)}
    model = nn.Sequential(nn.Linear(4, 4), *(make[kind]() for kind in kinds), nn.Linear(4, 3))
    groups = layer_groups(model)
    assert [group.depth for group in groups] == [*reversed(range(kinds.count("linear") + 2))]
    assert_partition(model, groups)


class Graph(nn.Module):
    """Alike layers that work on the sum of some earlier ones, and a last layer for what no other layer uses."""

    def __init__(self, wires, make, spares=()):
        super().__init__()
        self.wires = wires
        for i in reversed(range(len(wires))):  # the order of the attributes is not that of execution
            for spare in (k for k, place in enumerate(spares) if place == i):
                self.add_module(f"spare{spare}", nn.Linear(4, 4))
            self.add_module(f"node{i}", make())
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        outputs = []
        for i, wire in enumerate(self.wires):
            outputs.append(torch.tanh(self.get_submodule(f"node{i}")(sum((outputs[k] for k in wire), start=x))))
        return self.last(sum(outputs[i] for i in self.ends()))

    def ends(self):
        return [i for i in range(len(self.wires)) if not any(i in wire for wire in self.wires)]

    def longest_way(self, i):
        """The number of layers from layer i to the output, by following every wire."""
        return 1 + max((self.longest_way(k) for k, wire in enumerate(self.wires) if i in wire), default=0)


@st.composite
def wires_of_graphs(draw, most=7):
    return [draw(st.sets(st.integers(0, i - 1))) if i else set() for i in range(draw(st.integers(1, most)))]


@given(wires_of_graphs(), st.sampled_from([lambda: nn.Linear(4, 4), Block]), st.sampled_from(["stage", "block"]))
def test_in_any_graph_depth_is_the_longest_way_to_the_output(wires, make, granularity):
    model = Graph(wires, make)
    groups = layer_groups(model, X, granularity=granularity)
    assert_partition(model, groups)
    held = {name: group.depth for group in groups for name in group.params}
    for i in range(len(wires)):
        assert held[next(name for name in held if name.startswith(f"node{i}."))] == model.longest_way(i)
    assert [group.name for group in groups if group.depth == 0] == ["head"]


@settings(max_examples=12)
@given(wires_of_graphs(5), st.lists(st.integers(0, 4), min_size=1, max_size=3))
def test_parts_that_are_not_used_change_no_depth_and_get_that_of_a_neighbour(wires, spares):
    spares = [place % len(wires) for place in spares]
    without = depths(Graph(wires, Block), X)
    with pytest.warns(UserWarning, match="did not use spare"):
        with_spares = depths(Graph(wires, Block, spares), X)
    unused = {name for name in with_spares if name.endswith(" (unused)")}
    assert unused == {f"spare{k} (unused)" for k in range(len(spares))}
    assert {name: depth for name, depth in with_spares.items() if name not in unused} == without
    assert {with_spares[name] for name in unused} <= set(without.values()) - {0}


@pytest.mark.parametrize("granularity", ["stage", "block"])
@given(lengths=st.tuples(st.integers(2, 5), st.integers(2, 5)), joined=st.booleans())
def test_each_of_two_towers_counts_from_its_own_end(granularity, lengths, joined):
    def tower(length):
        return nn.Sequential(nn.Linear(4, 4), *(Block() for _ in range(length)))

    def forward(m, x, y):
        a, b = m.left_out(m.left(x)), m.right_out(m.right(y))
        return a @ b.T if joined else (a, b)

    model = Net(forward, left=tower(lengths[0]), right=tower(lengths[1]), left_out=nn.Linear(4, 3), right_out=nn.Linear(4, 3))
    groups = layer_groups(model, (X, X), granularity=granularity)
    for side, length in zip(("left", "right"), lengths, strict=True):
        assert [group.depth for group in groups if next(iter(group.params)).startswith(f"{side}.")] == [
            *range(length + 1, 0, -1)]
    assert {group.name for group in groups if group.depth == 0} == {"head.left_out", "head.right_out"}


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.out = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.net(x))


@pytest.mark.parametrize("outputs", [lambda a, b: (a, b), lambda a, b: (a * b).sum(-1)], ids=["two", "joined"])
def test_each_of_two_towers_of_one_class_counts_from_its_own_end(outputs):
    model = Net(lambda m, x: outputs(m.actor(x), m.critic(x)), actor=Tower(), critic=Tower())
    held = {name: group.depth for group in layer_groups(model, X) for name in group.params}
    assert held == {f"{tower}.{layer}.{kind}": depth for tower in ("actor", "critic") for kind in ("weight", "bias")
                    for layer, depth in (("net.0", 2), ("net.2", 1), ("out", 0))}


def test_where_every_group_is_a_head_a_warning_says_so():
    class OtherTower(Tower):
        pass

    model = Net(lambda m, x: (m.actor(x), m.critic(x)), actor=Tower(), critic=OtherTower())
    with pytest.warns(UserWarning, match=r"all layers of Net are at depth 0 and would get the head's rate"):
        assert depths(model, X) == {"head.actor": 0, "head.critic": 0}
    assert 2 in depths(model, X, head="*.out").values()  # as it advises


def test_output_layers_alone_are_all_heads_without_a_warning():
    assert depths(Net(lambda m, x: (m.a(x), m.b(x)), a=nn.Linear(4, 3), b=nn.Linear(4, 3)), X) == {"head.a": 0, "head.b": 0}


def test_a_lone_layer_between_the_last_block_and_the_head_is_no_level_of_its_own():
    model = nn.Sequential(nn.Linear(4, 4), Block(), Block(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    assert depths(model) == {"stem": 3, "1": 2, "2": 1, "3": 1, "head": 0}


# --- heads ------------------------------------------------------------------------------------------------------------

@given(module_trees(), st.sampled_from(["stage", "block"]))
def test_what_head_and_a_star_match_is_exactly_what_has_depth_0(model, granularity):
    groups = layer_groups(model, granularity=granularity)
    assert [group.depth == 0 for group in groups] == [group.name.startswith("head") for group in groups]
    assert_partition(model, groups)


@given(st.permutations(["head", "heads", "header", "head_2", "tail"]), st.integers(1, 3))
def test_whatever_parts_are_called_only_heads_have_a_heads_name(names, ends):
    def forward(m, x):
        for name in names[:-ends]:
            x = torch.relu(m.get_submodule(name)(x))
        return [m.get_submodule(name)(x) for name in names[-ends:]]

    model = Net(forward, **{name: nn.Linear(4, 4) for name in sorted(names)})
    groups = layer_groups(model, X)
    heads = {group.name for group in groups if group.name.startswith("head")}
    assert heads == {group.name for group in groups if group.depth == 0}
    assert heads == ({"head"} if ends == 1 else {f"head.{name}" for name in names[-ends:]})
    assert_partition(model, groups)


def two_heads():
    return Net(lambda m, x: (m.classes(m.body(x)), m.boxes(m.body(x))), body=nn.Sequential(nn.Linear(4, 4), Block(), Block()),
               classes=nn.Linear(4, 3), boxes=nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_granularity_has_the_same_heads_at_depth_0_and_last(granularity):
    groups = layer_groups(two_heads(), X, granularity=granularity)
    at_0 = {name for group in groups if group.depth == 0 for name in group.params}
    assert at_0 == {name for name, _ in two_heads().named_parameters() if name.startswith(("classes", "boxes"))}
    places = [group.depth == 0 for group in groups]
    assert places == sorted(places)


# --- head= ------------------------------------------------------------------------------------------------------------

def test_a_chosen_head_is_the_only_one():
    groups = layer_groups(two_heads(), X, head="classes")
    assert [list(group.params) for group in groups if group.depth == 0] == [["classes.weight", "classes.bias"]]
    assert groups[-1].name == "head"
    assert_partition(groups[0].model, groups)


def test_a_pattern_chooses_several_heads_and_a_list_chooses_all_below_it():
    wanted = {"head.classes", "head.boxes"}
    assert {name for name, depth in depths(two_heads(), X, head="[cb]o*[xs]e?").items() if depth == 0} == {"head"}
    assert {name for name, depth in depths(two_heads(), X, head="*es").items() if depth == 0} == wanted


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_part_of_a_block_can_be_the_head(granularity):
    groups = layer_groups(two_heads(), X, granularity=granularity, head="body.2.two")
    at_0 = {name for group in groups if group.depth == 0 for name in group.params}
    assert at_0 == {"body.2.two.weight", "body.2.two.bias"}


def test_a_head_that_is_not_there_is_named_with_the_modules_that_are_before_any_forward_pass():
    model = Net(lambda m, x: pytest.fail("it should not have been called"), body=nn.Linear(4, 4), fc=nn.Linear(4, 3))
    with pytest.raises(ValueError, match="no module matches 'classifier'; there are: body, fc"):
        layer_groups(model, X, head="classifier")


def test_a_chosen_head_makes_a_head_for_a_model_that_has_none_and_there_is_no_warning():
    model = nn.Sequential(nn.Linear(4, 4), Block(), Block())
    assert depths(model, head="2") == {"stem": 2, "1": 1, "head": 0}


# --- no head ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_backbone_has_nothing_at_depth_0_and_a_warning_says_so(granularity):
    model = nn.Sequential(nn.Linear(4, 4), Block(), Block(), nn.LayerNorm(4))
    with pytest.warns(UserWarning, match=r"Sequential has no head of its own.* layer_groups\(…, head=…\)"):
        groups = layer_groups(model, granularity=granularity)
    assert min(group.depth for group in groups) == 1
    assert not any(group.name.startswith("head") for group in groups)
    assert_partition(model, groups)


class Language(nn.Module):
    """A small language model, whose output layer has weights of its own or the embeddings'."""

    def __init__(self, tie):
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.out = None if tie == "function" else nn.Linear(8, 9, bias=False)
        if tie == "module":
            self.out.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return F.linear(x, self.embed.weight) if self.out is None else self.out(x)


@pytest.mark.parametrize("tie", ["module", "function"])
def test_an_output_layer_that_is_tied_to_the_embeddings_is_in_the_stem_and_the_blocks_keep_their_depths(tie):
    tokens = torch.zeros(1, 5, dtype=torch.long)
    untied = depths(Language(None), tokens)
    assert untied == {"stem": 3, "blocks.0": 2, "blocks.1": 1, "head": 0}
    with pytest.warns(UserWarning, match="no head of its own, since it ends in blocks.1, or its output layer is tied"):
        tied = depths(Language(tie), tokens)
    assert tied == {name: depth for name, depth in untied.items() if name != "head"}


# --- frozen and beside the flow ---------------------------------------------------------------------------------------

@given(st.sets(st.integers(0, 4)))
def test_a_layer_that_its_author_froze_is_no_step_for_those_before_it(frozen):
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)), nn.Linear(4, 3))
    for i in frozen:
        model[i].requires_grad_(False)
    groups = layer_groups(model)
    for i, group in enumerate(groups[:-1]):
        assert group.depth == 1 + len([k for k in range(i + 1, 5) if k not in frozen])
        assert group.fixed == (group.params.keys() if i in frozen else set())


def test_what_a_plan_of_ours_froze_is_a_step_still():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)), nn.Linear(4, 3))
    expected = depths(model)
    model[1].requires_grad_(False)
    setattr(model, FROZEN_BY_PLAN, {"1.weight", "1.bias"})
    assert depths(model) == expected
    assert not any(group.fixed for group in layer_groups(model))


def test_a_frozen_branch_leaves_the_depths_of_the_other_one_as_they_are():
    def model():
        return Net(lambda m, x: (m.out(m.student(x)), m.teacher(x)), out=nn.Linear(4, 3),
                   student=nn.Sequential(nn.Linear(4, 4), Block(), Block()),
                   teacher=nn.Sequential(nn.Linear(4, 4), *(Block() for _ in range(4)), nn.Linear(4, 3)))

    frozen = model()
    frozen.teacher.requires_grad_(False)
    groups = layer_groups(frozen, X)
    assert [group.depth for group in groups if next(iter(group.params)).startswith("student")] == [3, 2, 1]
    assert {group.depth for group in groups if group.fixed} == {1}
    assert [list(group.params) for group in groups if group.depth == 0] == [["out.weight", "out.bias"]]


def test_layers_that_no_gradient_reaches_are_named_and_stand_where_they_run():
    def forward(m, x):
        with torch.no_grad():
            x = m.second(m.first(x))
        return m.fc(x)

    model = Net(forward, first=nn.Linear(4, 4), second=Block(), fc=nn.Linear(4, 3))
    with pytest.warns(UserWarning, match="no gradient of the output reaches stem, second"):
        assert depths(model, X) == {"stem": 2, "second": 1, "head": 0}


def test_a_part_for_training_only_is_at_the_depth_of_its_layer():
    def forward(m, x):
        x = m.block1(m.embed(x))
        return m.fc(m.block2(x + m.mask if m.training else x))

    model = Net(forward, embed=nn.Linear(4, 4), mask=nn.Parameter(torch.zeros(4)), block1=Block(), block2=Block(),
                fc=nn.Linear(4, 3))
    assert depths(model, X) == {"stem": 3, "block1": 2, "block2": 1, "head": 0}


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_looking_for_heads_changes_nothing_of_the_model(granularity):
    model = two_heads().train()
    model.body[1].eval()
    model.classes.weight.requires_grad_(False)
    before = model_state(model)
    layer_groups(model, X, granularity=granularity, head="classes")
    assert same(before, model_state(model))
