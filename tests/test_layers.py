"""layer_groups: every parameter once, in the order of execution, under names one can say."""

import itertools
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision import models

from layerlr_helpers import layer_groups, layers
from layerlr_helpers.layers import GRANULARITIES
from layerlr_helpers.tracing import trace_forward
from tests.runs import model_state, same


def names(model, *args, **kwargs):
    return [group.name for group in layer_groups(model, *args, **kwargs)]


def assert_partition(model, groups):
    """Every parameter in exactly one group, under a name of its own, no group empty, no name twice."""
    grouped = [(name, p) for group in groups for name, p in group.params.items()]
    assert sorted(id(p) for _, p in grouped) == sorted(id(p) for p in model.parameters())
    parameters = dict(model.named_parameters())
    assert all(parameters[name] is p for name, p in grouped)
    assert len({group.name for group in groups}) == len(groups)
    assert all(group.params for group in groups)


class Net(nn.Module):
    """A model from named parts and a forward function, to write odd models in a line."""

    def __init__(self, forward, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self._forward = forward

    def forward(self, *inputs):
        return self._forward(self, *inputs)


# --- ResNet-18: the names that notebooks and plans rely on ------------------------------------------------------------

@pytest.fixture(scope="module")
def resnet():
    with torch.device("meta"):
        return models.resnet18(weights=None)


def test_the_stages_of_a_resnet18_have_the_names_of_the_course(resnet):
    assert names(resnet) == ["stem", "layer1", "layer2", "layer3", "layer4", "head"]


def test_the_children_of_a_resnet18_keep_their_names(resnet):
    assert names(resnet, granularity="child") == ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"]


def test_the_blocks_of_a_resnet18_are_named_one_by_one(resnet):
    blocks = [f"layer{i}.{j}" for i in range(1, 5) for j in range(2)]
    assert names(resnet, granularity="block") == ["stem", *blocks, "head"]


def test_the_tensors_of_a_resnet18_are_named_as_in_the_model_and_in_the_order_of_execution(resnet):
    tensors = names(resnet, granularity="tensor")
    assert set(tensors) == {name for name, _ in resnet.named_parameters()}
    assert tensors[:3] == ["conv1.weight", "bn1.weight", "bn1.bias"]
    assert tensors[-2:] == ["fc.weight", "fc.bias"]
    # In a block that changes the resolution the shortcut runs after the two convolutions.
    assert tensors.index("layer2.0.conv2.weight") < tensors.index("layer2.0.downsample.0.weight")


def test_the_size_of_the_image_changes_nothing(resnet):
    small, large = torch.zeros(1, 3, 32, 32, device="meta"), torch.zeros(2, 3, 96, 64, device="meta")
    assert names(resnet, small) == names(resnet, large) == names(resnet)


def test_the_groups_of_a_resnet_have_all_its_modules(resnet):
    inside = {id(m) for group in layer_groups(resnet) for module in group.modules.values() for m in module.modules()}
    assert {id(m) for m in resnet.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d, nn.Linear))} <= inside


# --- every architecture of torchvision ----------------------------------------------------------------------------------

@contextmanager
def without_values():
    """Parameters are made on the meta device: looking at the largest model needs no values, and takes no memory."""
    register = nn.Module.register_parameter

    def on_meta(module, name, p):
        register(module, name, p if p is None else nn.Parameter(p.to("meta"), p.requires_grad))

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


QUICK = {  # a small one of most families
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "mnasnet0_5", "mobilenet_v2", "regnet_y_400mf",
    "resnet18", "shufflenet_v2_x1_0", "squeezenet1_0", "swin_t", "vgg11", "vit_b_32",
}
NO_INIT = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}  # theirs takes a minute
HEADS = {"googlenet": ["head.fc", "head.aux1", "head.aux2"], "inception_v3": ["head.fc", "head.AuxLogits"]}
CONVOLUTIONAL = {  # the stages of one of each family
    "alexnet": 6, "convnext_tiny": 6, "densenet121": 6, "efficientnet_b0": 7, "googlenet": 7, "inception_v3": 6, "maxvit_t": 7,
    "mnasnet0_5": 6, "mobilenet_v2": 7, "regnet_y_400mf": 6, "resnext50_32x4d": 6, "shufflenet_v2_x1_0": 6,
    "squeezenet1_0": 5, "swin_t": 6, "vgg11": 8, "wide_resnet50_2": 6,
}


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
                                  for name in models.list_models(module=models)])
def test_all_architectures_fall_into_whole_groups_with_the_classifier_last(name, monkeypatch):
    with without_values():
        model = models.get_model(name, weights=None, **NO_INIT.get(name, {}))
    model.to("meta")
    trace = trace_forward(model)  # the forward pass takes most of the time, and all granularities read the same one
    monkeypatch.setattr(layers, "trace_forward", lambda model, example_input: trace)
    counts = {}
    for granularity in GRANULARITIES:
        groups = layer_groups(model, granularity=granularity)
        assert_partition(model, groups)
        counts[granularity] = len(groups)
        last = next(group for group in reversed(groups) if "aux" not in group.name.lower())
        assert next(reversed(last.params.values())).shape[0] == 1000  # the scores of ImageNet's classes
        assert last.depth == 0
        if granularity in ("stage", "block"):
            assert groups[0].name == "stem"
            heads = [group for group in groups if group.depth == 0]
            assert {group.name for group in heads} == set(HEADS.get(name, ["head"]))
            assert len(groups[-1].params) <= 4  # a weight and a bias, and those of the norm before it
    assert counts["stage"] <= counts["block"] < counts["tensor"] == len(list(model.parameters()))
    assert counts["stage"] == CONVOLUTIONAL.get(name, counts["stage"])


def test_a_transformer_has_one_stage_for_each_encoder_layer_after_its_patch_embedding():
    with torch.device("meta"):
        model = models.vit_b_32(weights=None)
    groups = layer_groups(model)
    assert [group.name for group in groups[1:-1]] == [f"encoder.layers.encoder_layer_{i}" for i in range(12)]
    assert set(groups[0].params) == {"conv_proj.weight", "conv_proj.bias", "class_token", "encoder.pos_embedding"}
    assert "encoder.ln.weight" in groups[-2].params  # the norm after the last layer belongs to it
    assert_partition(model, groups)


def test_the_auxiliary_classifiers_of_a_googlenet_are_heads_though_only_training_uses_them():
    with torch.device("meta"):
        model = models.googlenet(weights=None, init_weights=False)
    depths = {group.name: group.depth for group in layer_groups(model)}
    assert {name for name, depth in depths.items() if depth == 0} == {"head.fc", "head.aux1", "head.aux2"}
    assert depths["inception5a..inception5b"] == 1
    assert [group.name for group in layer_groups(model, granularity="child") if group.depth == 0] == ["aux1", "aux2", "fc"]


# --- random models ----------------------------------------------------------------------------------------------------

@st.composite
def module_trees(draw, depth=2):
    """Nested containers of linear layers of width 4, of norms with and without parameters, and of shared modules."""
    shared = nn.Linear(4, 4)
    leaves = [lambda: nn.Linear(4, 4), lambda: nn.Linear(4, 4, bias=False), lambda: nn.LayerNorm(4), nn.ReLU, nn.Identity,
              lambda: nn.BatchNorm1d(4), lambda: nn.BatchNorm1d(4, affine=False), lambda: shared, lambda: Tied(shared)]

    def tree(level):
        if level == 0 or draw(st.integers(0, 3)) == 0:
            return draw(st.sampled_from(leaves))()
        children = [tree(level - 1) for _ in range(draw(st.integers(1, 3)))]
        return draw(st.sampled_from([nn.Sequential, Residual, Listed, Scaled]))(*children)

    return nn.Sequential(nn.Linear(4, 4), tree(depth), nn.Linear(4, 3))


class Tied(nn.Module):
    def __init__(self, other):
        super().__init__()
        self.weight, self.bias = other.weight, nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Listed(nn.Module):
    """Its parts in a ModuleList, which is never called itself, with the attributes in reverse order."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(reversed(parts))

    def forward(self, x):
        for part in reversed(self.parts):
            x = part(x)
        return x


class Scaled(nn.Sequential):
    """A parameter beside its parts, used after them."""

    def __init__(self, *parts):
        super().__init__(*parts)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        for name, part in self.named_children():
            x = part(x) if name.isdigit() else x
        return x * self.scale


@settings(max_examples=30)
@given(module_trees())
def test_random_models_fall_into_whole_groups_in_the_order_of_execution(model):
    owners = Counter(id(p) for m in set(model.modules()) for p in m.parameters(recurse=False))
    uses = {key: use for key, use in first_uses(model).items() if owners[key] == 1}  # a tied one stands at its first name
    for granularity in GRANULARITIES:
        groups = layer_groups(model, granularity=granularity)
        assert_partition(model, groups)
        assert groups[-1].name == {"stage": "head", "block": "head", "child": "2", "tensor": "2.bias"}[granularity]
        starts = [min((uses[id(p)] for p in group.params.values() if id(p) in uses), default=None) for group in groups]
        known = [start for start in starts if start is not None]
        assert known == sorted(known)


def first_uses(model):
    """When each parameter was first given to a function, found without the code under test: by poisoning.

    A parameter with a NaN makes every module output after its use NaN; so the number of finite outputs that forward
    hooks see on the way tells when it was used.
    """
    outputs = []
    handles = [module.register_forward_hook(lambda m, args, output: outputs.append(bool(output.isfinite().all())))
               for module in model.modules()]
    model.eval()
    uses = {}
    for p in model.parameters():
        before = p.detach().clone()
        with torch.no_grad():
            p.fill_(float("nan"))
            outputs.clear()
            model(torch.ones(2, 4))
            p.copy_(before)
        uses[id(p)] = sum(outputs)
    for handle in handles:
        handle.remove()
    return uses


# --- odd models -------------------------------------------------------------------------------------------------------

def test_order_is_that_of_execution_whatever_the_order_of_the_attributes():
    model = Net(lambda m, x: m.a_last(m.b_middle(m.c_first(x))),
                a_last=nn.Linear(4, 2), b_middle=nn.Linear(4, 4), c_first=nn.Linear(3, 4))
    assert names(model, torch.zeros(1, 3), granularity="child") == ["c_first", "b_middle", "a_last"]
    groups = layer_groups(model, torch.zeros(1, 3))
    assert list(groups[0].params) == ["c_first.weight", "c_first.bias"]
    assert groups[-1].modules == {"a_last": model.a_last}


def test_a_list_of_modules_stands_where_its_first_module_runs():
    # A ModuleList is not called itself, so a look at calls alone would not know its place.
    model = Net(lambda m, x: m.head(m.blocks[1](m.blocks[0](m.stem(x)))),
                blocks=nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), stem=nn.Linear(3, 4), head=nn.Linear(4, 2))
    assert names(model, torch.zeros(1, 3), granularity="child") == ["stem", "blocks", "head"]


@pytest.mark.filterwarnings("ignore:.*has no head of its own")  # its output layer has only a bias of its own
def test_a_tied_parameter_is_in_one_group_under_its_first_name():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10))
    model[2].weight = model[0].weight
    for granularity in GRANULARITIES:
        groups = layer_groups(model, granularity=granularity)
        assert_partition(model, groups)
        holders = [group for group in groups if any(p is model[0].weight for p in group.params.values())]
        assert [next(iter(group.params)) for group in holders] == ["0.weight"]


def test_equal_values_are_not_taken_for_the_same_parameter():
    # Two fresh BatchNorm layers have equal values; comparing values in place of identity loses one.
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))
    assert_partition(model, layer_groups(model))


def test_a_parameter_on_the_root_stands_where_it_is_used():
    model = Net(lambda m, x: m.body(x + m.position) @ m.projection,
                projection=nn.Parameter(torch.ones(4, 2)), body=nn.Linear(3, 4), position=nn.Parameter(torch.ones(1, 3)))
    assert names(model, torch.zeros(1, 3), granularity="child") == ["position", "body", "projection"]
    groups = layer_groups(model, torch.zeros(1, 3))
    assert list(groups[-1].params) == ["projection"]
    assert_partition(model, groups)


def test_a_module_that_runs_twice_is_in_one_group_at_its_first_place():
    twice = nn.Linear(4, 4)
    model = nn.Sequential(nn.Linear(4, 4), twice, nn.Linear(4, 4), twice, nn.Linear(4, 2))
    assert names(model, granularity="child") == ["0", "1", "2", "4"]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_module_that_never_runs_is_a_group_of_its_own_before_the_head_with_a_warning(granularity):
    model = Net(lambda m, x: m.fc(m.body(x)), body=nn.Linear(3, 4), fc=nn.Linear(4, 2), spare=nn.Linear(4, 2, bias=False))
    with pytest.warns(UserWarning, match="the forward pass did not use spare"):
        groups = layer_groups(model, torch.zeros(1, 3), granularity=granularity)
    unused = next(group for group in groups if "unused" in group.name)
    assert unused.params == {"spare.weight": model.spare.weight}
    place = groups.index(unused)
    assert all(name.startswith("fc") for group in groups[place + 1:] for name in group.params)
    assert place < len(groups) - 1
    assert_partition(model, groups)


def test_a_parameter_that_is_never_used_is_named_too():
    model = Net(lambda m, x: m.fc(x), idle=nn.Parameter(torch.ones(2, 2)), fc=nn.Linear(3, 2))
    with pytest.warns(UserWarning, match="did not use idle"):
        assert names(model, torch.zeros(1, 3)) == ["idle (unused)", "head"]


def test_an_unused_part_that_is_called_head_does_not_take_the_heads_name():
    model = Net(lambda m, x: m.fc(x), head=nn.Linear(3, 2), fc=nn.Linear(3, 2))
    with pytest.warns(UserWarning, match="did not use head"):
        groups = layer_groups(model, torch.zeros(1, 3))
    assert groups[-1].name == "head"
    assert groups[-1].modules == {"fc": model.fc}
    assert_partition(model, groups)


def test_a_part_that_is_called_head_but_does_not_come_last_gets_another_name():
    model = Net(lambda m, x: m.fc(m.head(m.body(x))), body=nn.Linear(3, 3), head=nn.Linear(3, 3), fc=nn.Linear(3, 2))
    assert names(model, torch.zeros(1, 3)) == ["stem", "body.head", "head"]


def test_two_branches_come_in_the_order_in_which_they_run():
    model = Net(lambda m, x: m.fc(torch.cat([m.right(x), m.left(x)], 1)),
                left=nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten()),
                right=nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten()),
                fc=nn.Linear(2 * 4 * 28 * 28, 2))
    assert names(model, granularity="child") == ["right", "left", "fc"]
    for granularity in GRANULARITIES:
        groups = layer_groups(model, granularity=granularity)
        assert_partition(model, groups)
        order = [name.partition(".")[0] for group in groups for name in group.params]
        assert [key for key, _ in itertools.groupby(order)] == ["right", "left", "fc"]


def test_a_plain_sequential():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    assert names(model) == names(model, granularity="block") == ["stem", "2", "head"]
    assert names(model, granularity="child") == ["0", "2", "4"]


@pytest.mark.parametrize("granularity", ["stage", "block", "child"])
def test_layers_under_weight_norm_end_in_a_head_as_without_it(granularity):
    def groups_of(change):
        model = nn.Sequential(change(nn.Linear(8, 8)), nn.ReLU(), change(nn.Linear(8, 8)), nn.ReLU(), change(nn.Linear(8, 8)))
        return [(group.name, group.depth) for group in layer_groups(model, granularity=granularity)]

    assert groups_of(nn.utils.parametrizations.weight_norm) == groups_of(lambda layer: layer)


def test_matrices_in_a_list_have_a_depth_each():
    model = Net(lambda m, x: torch.relu(torch.relu(x @ m.list[0]) @ m.list[1]) @ m.list[2],
                list=nn.ParameterList(nn.Parameter(torch.randn(4, 4)) for _ in range(3)))
    groups = layer_groups(model, torch.zeros(2, 4))
    assert [(group.name, group.depth) for group in groups] == [("stem", 2), ("list.1", 1), ("head", 0)]
    assert [group.depth for group in layer_groups(model, torch.zeros(2, 4), granularity="tensor")] == [2, 1, 0]


@pytest.mark.parametrize("layer", [nn.Linear(3, 2), nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))])
def test_a_layer_that_is_the_model_is_a_head(layer):
    assert names(layer) == ["head"]


@pytest.mark.parametrize(("granularity", "expected"), [("stage", ["head"]), ("block", ["head"]), ("child", ["root"]),
                                                       ("tensor", ["weight", "bias"])])
def test_a_single_layer(granularity, expected):
    assert names(nn.Linear(3, 2), granularity=granularity) == expected


def test_a_norm_without_parameters_belongs_to_what_ran_before_it():
    # It has statistics, so a frozen layer's norm must be found by whoever freezes the layer.
    for norm_at, holder in ((1, "0"), (0, "1")):
        layers = [nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 1)]
        layers.insert(norm_at, nn.BatchNorm2d(3, affine=False))
        model = nn.Sequential(*layers)
        for granularity, name in zip(GRANULARITIES, ("stem", holder, "stem", f"{holder}.weight"), strict=True):
            group = layer_groups(model, granularity=granularity)[0]
            assert group.name == name
            assert model[norm_at] in group.modules.values()


def test_a_forward_pass_without_gradients_is_still_in_order():
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))
            self.late, self.early = nn.ModuleList([nn.Linear(3, 2)]), nn.ModuleList([nn.Linear(3, 3)])

        @torch.no_grad()
        def forward(self, x):
            return self.late[0](self.early[0](x)) * self.scale

    model = Detached()
    groups = layer_groups(model, torch.zeros(1, 3), granularity="child")
    assert [group.name for group in groups if group.name != "scale"] == ["early", "late"]
    assert_partition(model, groups)


def test_dictionary_inputs():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mask, self.out = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, *, ids, weights):
            return {"logits": self.out(self.mask(self.embed(ids)) * weights[..., None])}

    example = {"ids": torch.zeros(1, 5, dtype=torch.long), "weights": torch.ones(1, 5)}
    assert names(Pair(), example, granularity="child") == ["embed", "mask", "out"]


class Encoder(nn.Module):
    """Built as BERT is: named embeddings, a list of layers, a pooler, a head; called by keywords, returns a dictionary."""

    def __init__(self, layers=3, width=8):
        super().__init__()
        self.classifier = nn.Linear(width, 2)  # defined first, runs last
        self.embeddings = nn.ModuleDict({"word": nn.Embedding(30, width), "position": nn.Embedding(16, width),
                                         "norm": nn.LayerNorm(width)})
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(nn.TransformerEncoderLayer(width, 2, 16, batch_first=True) for _ in range(layers))
        self.pooler = nn.Sequential(nn.Linear(width, width), nn.Tanh())

    def forward(self, input_ids, attention_mask=None):
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.embeddings["norm"](self.embeddings["word"](input_ids) + self.embeddings["position"](places))
        for layer in self.encoder.layer:
            x = layer(x, src_key_padding_mask=None if attention_mask is None else attention_mask == 0)
        return {"logits": self.classifier(self.pooler(x[:, 0])), "hidden": x}


BERT_INPUT = {"input_ids": torch.randint(30, (2, 7)), "attention_mask": torch.ones(2, 7)}


def test_a_language_model_has_its_embeddings_first_then_each_encoder_layer_then_its_head():
    model = Encoder()
    groups = layer_groups(model, BERT_INPUT)
    layers = [f"encoder.layer.{i}" for i in range(3)]
    assert [group.name for group in groups] == ["stem", *layers, "pooler", "head"]
    assert [group.depth for group in groups] == [4, 3, 2, 1, 1, 0]  # the pooler is no level of its own
    assert set(groups[0].params) == {"embeddings.word.weight", "embeddings.position.weight", "embeddings.norm.weight",
                                     "embeddings.norm.bias"}
    assert set(groups[-1].params) == {"classifier.weight", "classifier.bias"}
    assert names(model) == [group.name for group in groups]  # tokens can be guessed
    for granularity in GRANULARITIES:
        assert_partition(model, layer_groups(model, BERT_INPUT, granularity=granularity))


class VisionTransformer(nn.Module):
    """Built as timm's is: tokens and positions on the root, a plain Sequential of blocks, a norm before the head."""

    def __init__(self, depth=4, width=8):
        super().__init__()
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(1, 17, width))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(width, 2, 16, batch_first=True) for _ in range(depth)))
        self.norm, self.fc_norm, self.head = nn.LayerNorm(width), nn.Identity(), nn.Linear(width, 5)

    def forward(self, x):
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.fc_norm(self.norm(self.blocks(x))[:, 0]))


def test_a_vision_transformer_with_its_tokens_on_the_root_has_them_in_the_stem():
    model = VisionTransformer()
    groups = layer_groups(model, torch.zeros(1, 3, 16, 16))
    assert [group.name for group in groups] == ["stem", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "head"]
    assert set(groups[0].params) == {"patch_embed.proj.weight", "patch_embed.proj.bias", "cls_token", "pos_embed"}
    assert set(groups[-1].params) == {"head.weight", "head.bias"}
    for granularity in GRANULARITIES:
        assert_partition(model, layer_groups(model, torch.zeros(1, 3, 16, 16), granularity=granularity))


@pytest.mark.parametrize("wrap", [nn.DataParallel, pytest.param(torch.compile, marks=pytest.mark.slow)])
def test_wrapped_models_have_the_names_of_what_is_inside(wrap):
    model = models.resnet18(weights=None)
    groups = layer_groups(wrap(model), torch.zeros(1, 3, 32, 32))
    assert [group.name for group in groups] == ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
    assert_partition(model, groups)


# --- what is refused, and what is left alone --------------------------------------------------------------------------

def test_an_unknown_granularity_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'layer'; known are 'stage', 'child', 'block', 'tensor'"):
        layer_groups(nn.Linear(2, 2), granularity="layer")


def test_a_model_without_parameters_is_refused():
    with pytest.raises(ValueError, match="Sequential has no parameters"):
        layer_groups(nn.Sequential(nn.ReLU()))


def test_a_lazy_model_is_refused_and_not_made_by_the_way():
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"0\.weight, 0\.bias of Sequential have no shape yet"):
        layer_groups(model, torch.zeros(1, 2))
    assert isinstance(model[0], nn.LazyLinear)


def test_an_input_that_cannot_be_guessed_is_asked_for():
    model = nn.Sequential(nn.Linear(3, 4), nn.Unflatten(0, (2, 2)), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"\[1, 3\].*example_input"):
        layer_groups(model)
    assert len(layer_groups(model, torch.zeros(4, 3))) == 2


def test_the_model_comes_back_as_it_was():
    model = models.resnet18(weights=None).train()
    model.layer1.eval()
    model.conv1.weight.requires_grad_(False)
    model.fc.bias.grad = torch.ones(1000)
    image = torch.randn(2, 3, 32, 32)
    before = model_state(model)
    for granularity in GRANULARITIES:
        layer_groups(model, image, granularity=granularity)
    assert same(before, model_state(model))


def test_a_group_shows_its_name_and_size(resnet):
    head = layer_groups(resnet)[-1]
    assert repr(head) == "LayerGroup('head', 2 tensors, 513,000 parameters)"
    assert head.size == 513_000
