"""From units to layers: which units are heads, which make a stem, a stage or a layer of their own, and what a run is called."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from layerlr_helpers.stages import find_heads, join_to_layers, run_name
from layerlr_helpers.tracing import trace_forward
from layerlr_helpers.units import cut_into_units, fold_norms
from tests.test_layers import Net
from tests.test_units import Block

IMAGE = torch.zeros(1, 3, 16, 16)


def units_of(model, example):
    trace = trace_forward(model, example)
    return fold_norms(unit for unit in cut_into_units(model, trace, "stage") if unit.runs), trace


def heads(model, example, fixed=()):
    units, trace = units_of(model, example)
    found = find_heads(units, trace, trace.set_of(fixed))
    return {name: [unit.name for unit in head] for name, head in found.items()}


def layers(model, example, one_block_each=False):
    units, _ = units_of(model, example)
    runs = join_to_layers(units, model, one_block_each=one_block_each)
    return [[unit.name for unit in run] for run in runs]


# --- heads ------------------------------------------------------------------------------------------------------------

def trunk():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())


X = torch.zeros(2, 4)


def test_the_last_layer_before_one_output_is_the_head_with_its_norm():
    assert heads(nn.Sequential(trunk(), nn.Linear(8, 3), nn.LayerNorm(3)), X) == {"head": ["1"]}


@pytest.mark.parametrize("outputs", [lambda a, b: (a, b), lambda a, b: {"a": a, "nested": [b]}, torch.add],
                         ids=["tuple", "nested", "sum"])
def test_each_last_layer_before_an_output_is_a_head(outputs):
    def forward(m, x):
        features = m.body(x)
        return outputs(m.first(features), m.second(features))

    model = Net(forward, body=trunk(), first=nn.Linear(8, 3), second=nn.Linear(8, 3))
    assert heads(model, X) == {"head.first": ["first"], "head.second": ["second"]}


def test_of_two_heads_each_is_its_whole_branch():
    model = Net(lambda m, x: [m.classes(m.body(x)), m.boxes(m.body(x))], body=trunk(), classes=nn.Linear(8, 3),
                boxes=nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)))
    assert heads(model, X) == {"head.classes": ["classes"], "head.boxes": ["boxes.0", "boxes.2"]}


def test_outputs_in_a_list_of_alike_layers_are_one_head():
    model = Net(lambda m, x: [scale(m.body(x)) for scale in m.scales], body=trunk(),
                scales=nn.ModuleList(nn.Linear(8, 3) for _ in range(3)))
    assert heads(model, X) == {"head": ["scales.0", "scales.1", "scales.2"]}


def test_features_that_are_returned_beside_the_scores_make_no_head():
    def forward(m, x):
        features = m.body(x)
        return features, m.fc(features)

    assert heads(Net(forward, body=trunk(), fc=nn.Linear(8, 3)), X) == {"head": ["fc"]}


def test_a_model_that_ends_in_one_of_its_blocks_has_no_head():
    assert heads(nn.Sequential(nn.Conv2d(3, 4, 3), Block(), Block()), IMAGE) == {}
    assert heads(nn.Sequential(nn.Conv2d(3, 4, 3), Block(), Block(), nn.BatchNorm2d(4)), IMAGE) == {}


def test_a_head_that_was_taken_away_leaves_none():
    assert heads(Net(lambda m, x: m.fc(m.body(x)), body=trunk(), fc=nn.Identity()), X) != {"head": ["fc"]}
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Identity())
    assert heads(model, IMAGE) == {}


@pytest.mark.parametrize("tie", ["module", "function"])
def test_an_output_layer_that_shares_the_embeddings_is_no_head(tie):
    def forward(m, tokens):
        x = m.blocks(m.embed(tokens))
        return m.out(x) if tie == "module" else F.linear(x, m.embed.weight)

    def encoder():
        return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    model = Net(forward, embed=nn.Embedding(9, 8), blocks=nn.Sequential(encoder(), encoder()))
    if tie == "module":
        model.out = nn.Linear(8, 9, bias=False)
        model.out.weight = model.embed.weight
    assert heads(model, torch.zeros(1, 5, dtype=torch.long)) == {}


def test_the_output_of_a_frozen_teacher_is_no_head_unless_all_is_frozen():
    model = Net(lambda m, x: (m.student(x), m.teacher(x)), student=nn.Linear(4, 3), teacher=nn.Linear(4, 3))
    teacher = list(model.teacher.parameters())
    assert heads(model, X, fixed=teacher) == {"head": ["student"]}
    assert heads(model, X, fixed=model.parameters()) == {"head.student": ["student"], "head.teacher": ["teacher"]}


def test_without_gradients_what_runs_last_is_the_head():
    forward = torch.no_grad()(lambda m, x: m.late(m.early(x)))
    assert heads(Net(forward, late=nn.Linear(4, 3), early=nn.Linear(4, 4)), X) == {"head": ["late"]}


# --- layers -----------------------------------------------------------------------------------------------------------

def down(channels_in, channels):
    return nn.Conv2d(channels_in, channels, 2, stride=2)


def test_a_stage_is_a_run_of_blocks_at_one_resolution_with_the_layer_that_opened_it():
    model = nn.Sequential(down(3, 4), nn.BatchNorm2d(4), Block(), Block(), down(4, 8), Block(8), Block(8))
    assert layers(model, IMAGE) == [["0"], ["2", "3"], ["4", "5", "6"]]
    assert layers(model, IMAGE, one_block_each=True) == [["0"], ["2"], ["3"], ["4", "5"], ["6"]]


def test_blocks_that_all_work_at_one_resolution_are_a_layer_each():
    def encoder():
        return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    model = nn.Sequential(nn.Linear(4, 8), *(encoder() for _ in range(3)))
    assert layers(model, torch.zeros(1, 5, 4)) == [["0"], ["1"], ["2"], ["3"]]


class MapBlock(nn.Module):
    """A block that has the channels last: [N, H, W, C]."""

    def __init__(self, width=6):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def test_tokens_on_a_map_are_blocks_of_one_resolution_too():
    model = nn.Sequential(nn.Linear(3, 6), MapBlock(), MapBlock())
    assert layers(model, torch.zeros(1, 4, 4, 3)) == [["0"], ["1"], ["2"]]


def test_what_comes_before_the_first_block_is_the_stem_and_each_tower_has_its_own():
    def tower():
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), Block(), Block())

    model = Net(lambda m, x, y: m.left(x) + m.right(y), left=tower(), right=tower())
    runs = layers(model, (IMAGE, IMAGE))
    assert ["left.0", "left.2"] in runs
    assert ["right.0", "right.2"] in runs


class MapDecoder(MapBlock):
    """A block that other tokens enter, too."""

    def forward(self, x, queries):
        return super().forward(x.mean(1, keepdim=True) + queries)


def test_queries_that_enter_a_later_block_belong_to_that_block():
    model = Net(lambda m, x: m.second(m.first(m.encoder2(m.encoder1(m.stem(x))), m.queries * 1), m.queries * 1),
                queries=nn.Parameter(torch.zeros(1, 2, 6)), stem=nn.Linear(3, 6), encoder1=MapBlock(), encoder2=MapBlock(),
                first=MapDecoder(), second=MapDecoder())
    assert layers(model, torch.zeros(1, 5, 3)) == [["stem"], ["encoder1"], ["encoder2"], ["first", "queries"], ["second"]]


def test_layers_abreast_in_a_list_are_one_layer_and_layers_in_a_row_are_not():
    def forward(m, columns):
        features = torch.cat([embed(columns[:, i]) for i, embed in enumerate(m.embeddings)], 1)
        return m.row[1](m.row[0](features))

    model = Net(forward, embeddings=nn.ModuleList(nn.Embedding(5, 2) for _ in range(3)),
                row=nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)]))
    assert layers(model, torch.zeros(2, 3, dtype=torch.long)) == [[f"embeddings.{i}" for i in range(3)], ["row.0"], ["row.1"]]


@pytest.mark.parametrize("one_block_each", [True, False])
def test_every_unit_is_in_one_layer(one_block_each):
    model = nn.Sequential(down(3, 4), Block(), nn.BatchNorm2d(4), Block(), down(4, 8), nn.Conv2d(8, 8, 1), Block(8), Block(8))
    units, _ = units_of(model, IMAGE)
    runs = join_to_layers(units, model, one_block_each=one_block_each)
    assert sorted(unit.name for run in runs for unit in run) == sorted(unit.name for unit in units)
    assert all(runs)


# --- names ------------------------------------------------------------------------------------------------------------

def run_names(model, *runs, example=IMAGE):
    units = {unit.name: unit for unit in units_of(model, example)[0]}
    runs = [[units[name] for name in run] for run in runs]
    return [run_name(run, runs, model) for run in runs]


def test_a_run_is_called_as_the_largest_module_that_is_wholly_in_it():
    model = nn.Sequential(down(3, 4), nn.ModuleDict({"blocks": nn.Sequential(Block(), Block())}))
    model.forward = lambda x: model[1]["blocks"](model[0](x))
    assert run_names(model, ["0"], ["1.blocks.0", "1.blocks.1"]) == ["0", "1"]
    assert run_names(model, ["1.blocks.0"], ["1.blocks.1"]) == ["1.blocks.0", "1.blocks.1"]


def test_a_run_over_several_modules_is_called_by_its_first_and_last():
    model = nn.Sequential(down(3, 4), Block(), Block(), down(4, 8), Block(8), Block(8))
    assert run_names(model, ["1", "2"], ["3", "4", "5"]) == ["1..2", "4..5"]  # blocks go before what is between them


def test_what_first_and_last_share_is_said_once_and_is_enough_if_no_other_run_has_it():
    body = nn.ModuleDict({"layers": nn.Sequential(down(3, 4), Block(), Block(), Block())})
    model = Net(lambda m, x: m.body["layers"](x), body=body)
    layer = [f"body.layers.{i}" for i in range(4)]
    assert run_names(model, layer[1:3], layer[3:]) == ["body.layers.1..2", "body.layers.3"]
    assert run_names(model, layer[:1], layer[1:]) == ["body.layers.0", "body.layers"]
