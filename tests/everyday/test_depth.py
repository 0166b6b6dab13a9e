"""The depths that an expert would give, on models as people build them: several heads, towers, what is beside the flow."""

import copy
import itertools
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from layerlr_helpers import ProgressiveUnfreezing, UnfreezePlan, head_and_backbone, layer_decay, layer_groups, per_group
from tests.everyday.helpers import SEQUENCES, Block, Encoder, Model, blocks, depths, holder, numbered, through

ENCODER = ["encoder.patch", *numbered("encoder.blocks", 3)]
TWO_RATES = head_and_backbone(backbone_lr=1e-5, head_lr=1e-2)


def rate(groups, rates, parameter):
    return rates(groups)[holder(groups, parameter).name]


def training_parts(model):
    return {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}


def parts_of(group):
    """The model's own children that a group has something of."""
    return {name.split(".")[0] for name in group.params}


# --- heads ------------------------------------------------------------------------------------------------------------

def three_tasks():
    return Model(lambda m, x: [head(m.encoder(x)) for head in (m.distance, m.normals, m.classes)],
                 encoder=Encoder(), distance=nn.Linear(8, 1), normals=nn.Linear(8, 3), classes=nn.Linear(8, 7))


def test_every_task_of_a_multi_task_network_has_a_head_and_one_pattern_finds_all_of_them():
    groups = layer_groups(model := three_tasks(), SEQUENCES)
    assert depths(groups, *ENCODER, "distance", "normals", "classes") == [4, 3, 2, 1, 0, 0, 0]
    assert [group.name for group in groups if group.depth == 0] == ["head.distance", "head.normals", "head.classes"]
    assert rate(groups, TWO_RATES, "normals.weight") == rate(groups, TWO_RATES, "classes.weight") == 1e-2
    assert rate(groups, layer_decay(1.0, 0.5), "encoder.blocks.2.mlp.0.weight") == 0.5
    assert rate(groups, per_group({"*": 1e-4, "head*": 0.1}), "distance.weight") == 0.1
    ProgressiveUnfreezing(groups, UnfreezePlan({"head*": 0})).apply(0)
    assert training_parts(model) == {"distance", "normals", "classes"}


def test_a_plan_from_the_top_trains_all_new_heads_first():
    groups = layer_groups(model := three_tasks(), SEQUENCES)
    unfreezing = ProgressiveUnfreezing(groups, UnfreezePlan.top_down(groups, every=10))
    unfreezing.apply(0)
    assert training_parts(model) == {"distance", "normals", "classes"}
    unfreezing.apply(10)
    assert [block.norm1.weight.requires_grad for block in model.encoder.blocks] == [False, False, True]


def test_two_heads_of_several_layers_are_alike_wherever_they_are_defined():
    def mlp(classes):
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, classes))

    model = Model(lambda m, x: {"topic": m.topic(m.encoder(x)), "mood": m.mood(m.encoder(x))},
                  mood=mlp(2), topic=mlp(9), encoder=Encoder())
    assert depths(layer_groups(model, SEQUENCES), *ENCODER, "mood", "topic") == [4, 3, 2, 1, 0, 0]


def test_a_policys_free_parameter_is_at_the_depth_of_the_output_that_it_is():
    def act(m, observation):
        features = m.trunk(observation)
        mean = m.actor(features)
        return mean, m.log_std.expand_as(mean).exp(), m.critic(features)

    model = Model(act, log_std=nn.Parameter(torch.zeros(2)), actor=nn.Linear(16, 2), critic=nn.Linear(16, 1),
                  trunk=nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh()))
    groups = layer_groups(model, torch.ones(3, 6))
    assert depths(groups, "trunk.0", "trunk.2", "actor", "critic", "log_std") == [2, 1, 0, 0, 0]


def test_early_exits_do_not_make_the_trunk_shallow():
    def classify(m, x):
        x, answers = m.patch(x), []
        for block, leave in zip(m.blocks, m.exits, strict=True):
            x = block(x)
            answers.append(leave(x.mean(1)))
        return answers

    model = Model(classify, patch=nn.Linear(6, 8), blocks=blocks(3), exits=nn.ModuleList(nn.Linear(8, 4) for _ in range(3)))
    groups = layer_groups(model, SEQUENCES)
    assert depths(groups, "patch", *numbered("blocks", 3), *numbered("exits", 3)) == [4, 3, 2, 1, 0, 0, 0]


def test_the_way_down_and_up_of_a_unet_is_one_path_in_spite_of_skips_and_side_outputs():
    def stage(inputs, outputs):
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(),
                             nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())

    def segment(m, x):
        large = m.encoder[0](x)
        middle = m.encoder[1](F.max_pool2d(large, 2))
        small = m.encoder[2](F.max_pool2d(middle, 2))
        middle = m.decoder[0](torch.cat([F.interpolate(small, scale_factor=2), middle], 1))
        large = m.decoder[1](torch.cat([F.interpolate(middle, scale_factor=2), large], 1))
        return [m.side[1](large), m.side[0](middle)]

    model = Model(segment, encoder=nn.ModuleList([stage(1, 4), stage(4, 8), stage(8, 16)]),
                  decoder=nn.ModuleList([stage(24, 8), stage(12, 4)]),
                  side=nn.ModuleList([nn.Conv2d(8, 2, 1), nn.Conv2d(4, 2, 1)]))
    groups = layer_groups(model, torch.ones(2, 1, 32, 32))
    path = [*numbered("encoder", 3), *numbered("decoder", 2)]
    assert depths(groups, *path, *numbered("side", 2)) == [5, 4, 3, 2, 1, 0, 0]
    assert all(len(parts_of(group)) == 1 for group in groups)


def test_the_user_may_say_that_the_whole_nested_classifier_is_the_head():
    model = Model(lambda m, x: m.classifier["out"](m.classifier["dense"](m.encoder(x)).tanh()), encoder=Encoder(),
                  classifier=nn.ModuleDict({"dense": nn.Linear(8, 8), "out": nn.Linear(8, 3)}))
    groups = layer_groups(model, SEQUENCES, head="classifier*")
    assert depths(groups, *ENCODER, "classifier") == [4, 3, 2, 1, 0]
    assert rate(groups, TWO_RATES, "classifier.dense.weight") == 1e-2


def test_a_backbone_has_the_depths_that_it_has_with_a_head_and_one_is_told():
    backbone, whole = torchvision.models.resnet18(), torchvision.models.resnet18()
    backbone.fc = nn.Identity()
    with pytest.warns(UserWarning, match="ResNet has no head of its own, since it ends in layer4"):
        groups = layer_groups(backbone, torch.ones(1, 3, 32, 32))
    with_head = layer_groups(whole, torch.ones(1, 3, 32, 32))
    assert [(g.name, g.depth) for g in groups] == [(g.name, g.depth) for g in with_head[:-1]]
    assert rate(groups, TWO_RATES, "layer4.1.conv2.weight") == 1e-5


def test_where_the_output_is_tied_to_the_input_by_a_function_no_other_layer_is_called_head():
    model = Model(lambda m, x: F.linear(through(m.blocks, m.embed(x)), m.embed.weight.t()),
                  embed=nn.Linear(6, 8), blocks=blocks(2))
    with pytest.warns(UserWarning, match="no head of its own"):
        groups = layer_groups(model, SEQUENCES)
    assert depths(groups, "embed", *numbered("blocks", 2)) == [3, 2, 1]


def test_a_tied_language_model_with_a_bias_of_its_own_has_its_embeddings_at_the_input():
    model = Model(lambda m, tokens: m.decoder(m.norm(F.gelu(m.transform(through(m.layers, m.embed(tokens)))))),
                  embed=nn.Embedding(20, 8), layers=blocks(3), transform=nn.Linear(8, 8), norm=nn.LayerNorm(8),
                  decoder=nn.Linear(8, 20))
    model.decoder.weight = model.embed.weight
    with pytest.warns(UserWarning, match="no head of its own"):  # a bias alone makes none
        groups = layer_groups(model, torch.ones(1, 7, dtype=torch.long))
    path = depths(groups, "embed", *numbered("layers", 3))
    assert path == [*range(path[0], path[0] - 4, -1)]
    assert rate(groups, TWO_RATES, "layers.2.mlp.0.weight") == 1e-5


class Reverse(torch.autograd.Function):
    """The gradient reversal of domain adaptation."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


def test_a_head_behind_a_function_of_ones_own_is_found():
    def adapt(m, x):
        features = m.encoder(x)
        return m.label(features), m.domain(Reverse.apply(features))

    model = Model(adapt, domain=nn.Linear(8, 2), label=nn.Linear(8, 10), encoder=Encoder())
    assert depths(layer_groups(model, SEQUENCES), *ENCODER, "domain", "label") == [4, 3, 2, 1, 0, 0]


def test_a_learned_temperature_is_no_layer():
    model = Model(lambda m, x: m.fc(m.encoder(x)) / m.temperature, encoder=Encoder(), fc=nn.Linear(8, 3),
                  temperature=nn.Parameter(torch.ones(1)))
    assert depths(layer_groups(model, SEQUENCES), *ENCODER, "fc", "temperature") == [4, 3, 2, 1, 0, 0]


def test_a_cosine_classifier_is_a_head_though_it_is_no_linear_layer():
    cosine = Model(lambda m, x: 30 * F.linear(F.normalize(x), F.normalize(m.weight)), weight=nn.Parameter(torch.ones(5, 8)))
    groups = layer_groups(Model(lambda m, x: m.cosine(m.encoder(x)), cosine=cosine, encoder=Encoder()), SEQUENCES)
    assert depths(groups, *ENCODER, "cosine") == [4, 3, 2, 1, 0]
    assert holder(groups, "cosine.weight").name == "head"


def test_labels_in_the_example_and_a_loss_among_the_outputs_change_nothing():
    def classify(m, x, labels=None):
        logits = m.classifier(m.encoder(x))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}

    model = Model(classify, encoder=Encoder(), classifier=nn.Linear(8, 3))
    without, with_labels = ([(g.name, g.depth, list(g.params)) for g in layer_groups(model, {"x": SEQUENCES} | more)]
                            for more in ({}, {"labels": torch.tensor([0, 2])}))
    assert without == with_labels
    assert without[-1] == ("head", 0, ["classifier.weight", "classifier.bias"])


@dataclass
class Detections:
    logits: torch.Tensor
    boxes: torch.Tensor
    predicted: torch.Tensor


class NamedDetections(NamedTuple):
    logits: torch.Tensor
    boxes: torch.Tensor
    predicted: torch.Tensor


@pytest.mark.parametrize("kind", [Detections, NamedDetections])
def test_heads_are_found_in_objects_with_outputs_of_whole_numbers_beside_them(kind):
    def detect(m, x):
        logits = m.classes(features := m.encoder(x))
        return kind(logits, m.boxes(features), logits.argmax(-1))

    model = Model(detect, encoder=Encoder(), classes=nn.Linear(8, 3), boxes=nn.Linear(8, 4))
    assert depths(layer_groups(model, SEQUENCES), *ENCODER, "classes", "boxes") == [4, 3, 2, 1, 0, 0]


class Decoder(nn.Module):
    """A decoder layer that looks at the encoder's tokens with learned queries."""

    def __init__(self):
        super().__init__()
        self.cross, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x, memory, query):
        x = x + self.cross(x + query, memory, memory, need_weights=False)[0]
        return self.norm(x + self.mlp(x))


def test_set_prediction_counts_through_decoder_and_encoder_and_has_two_heads():
    def detect(m, image):
        memory = through(m.encoder, m.backbone(image).flatten(2).transpose(1, 2))
        query = m.queries.weight[None].expand(len(image), -1, -1)
        x = torch.zeros_like(query)
        for layer in m.decoder:
            x = layer(x, memory, query)
        return {"logits": m.classes(x), "boxes": m.boxes(x).sigmoid()}

    model = Model(detect, classes=nn.Linear(8, 4), boxes=nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)),
                  queries=nn.Embedding(3, 8), backbone=nn.Conv2d(3, 8, 8, 8), encoder=blocks(2),
                  decoder=nn.ModuleList(Decoder() for _ in range(2)))
    groups = layer_groups(model, torch.ones(2, 3, 32, 32))
    path = ["backbone", *numbered("encoder", 2), *numbered("decoder", 2)]
    assert depths(groups, *path, "classes", "boxes") == [5, 4, 3, 2, 1, 0, 0]
    assert depths(groups, "queries")[0] in (2, 3)  # the queries belong to the decoder's start


# --- towers -----------------------------------------------------------------------------------------------------------

def test_each_tower_of_a_dual_encoder_has_the_depths_that_it_has_alone():
    def similarity(m, image, text):
        pair = F.normalize(m.image_proj(m.image(image))), F.normalize(m.text_proj(m.text(text)))
        return m.logit_scale.exp() * pair[0] @ pair[1].t()

    model = Model(similarity, image=Encoder(4), text=Encoder(2), image_proj=nn.Linear(8, 8), text_proj=nn.Linear(8, 8),
                  logit_scale=nn.Parameter(torch.tensor(2.0)))
    groups = layer_groups(model, (SEQUENCES, torch.ones(2, 3, 6)))
    assert depths(groups, "image.patch", *numbered("image.blocks", 4), "image_proj") == [5, 4, 3, 2, 1, 0]
    assert depths(groups, "text.patch", *numbered("text.blocks", 2), "text_proj") == [3, 2, 1, 0]


def test_towers_that_are_joined_before_the_head_both_end_one_layer_before_it():
    model = Model(lambda m, image, table: m.head(torch.cat([m.encoder(image), m.table(table)], 1)), encoder=Encoder(),
                  table=nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8)), head=nn.Linear(16, 3))
    groups = layer_groups(model, (SEQUENCES, torch.ones(2, 4)))
    assert depths(groups, *ENCODER, "table.0", "table.2", "head") == [4, 3, 2, 1, 2, 1, 0]


def test_a_siamese_network_with_shared_weights_is_one_tower():
    model = Model(lambda m, a, b: m.head((m.encoder(a) - m.encoder(b)).abs()), encoder=Encoder(), head=nn.Linear(8, 1))
    assert depths(layer_groups(model, (SEQUENCES, SEQUENCES)), *ENCODER, "head") == [4, 3, 2, 1, 0]


def test_a_frozen_teacher_takes_no_depth_from_its_student_and_no_plan_trains_it():
    model = Model(lambda m, x: (m.student_fc(m.student(x)), m.teacher(x)), student=Encoder(2), student_fc=nn.Linear(8, 3),
                  teacher=nn.Sequential(Encoder(5), nn.Linear(8, 3)).requires_grad_(False))
    groups = layer_groups(model, SEQUENCES)
    assert depths(groups, "student.patch", *numbered("student.blocks", 2), "student_fc") == [3, 2, 1, 0]
    ProgressiveUnfreezing(groups, UnfreezePlan({"*": 0})).apply(0)
    assert training_parts(model) == {"student", "student_fc"}


# --- beside the flow --------------------------------------------------------------------------------------------------

def test_a_mask_token_that_only_training_uses_belongs_to_the_embedding():
    def reconstruct(m, x):
        x = m.patch(x)
        if m.training:
            x = torch.cat([m.mask_token.expand(len(x), 1, -1), x[:, 1:]], 1)
        return m.head(through(m.blocks, x))

    model = Model(reconstruct, patch=nn.Linear(6, 8), mask_token=nn.Parameter(torch.zeros(8)), blocks=blocks(3),
                  head=nn.Linear(8, 6)).eval()
    groups = layer_groups(model, SEQUENCES)
    assert depths(groups, "patch", "mask_token", *numbered("blocks", 3), "head") == [4, 4, 3, 2, 1, 0]
    assert not model.training


@pytest.mark.parametrize("mode", [True, False])
def test_an_auxiliary_classifier_that_only_training_uses_is_a_head(mode):
    def classify(m, x):
        halfway = through(m.blocks[:2], m.patch(x))
        answer = m.fc(through(m.blocks[2:], halfway).mean(1))
        return (answer, m.auxiliary(halfway.mean(1))) if m.training else answer

    model = Model(classify, patch=nn.Linear(6, 8), blocks=blocks(4), auxiliary=nn.Linear(8, 3), fc=nn.Linear(8, 3))
    groups = layer_groups(model.train(mode), SEQUENCES)
    assert depths(groups, *numbered("blocks", 4), "fc", "auxiliary") == [4, 3, 2, 1, 0, 0]
    assert holder(groups, "auxiliary.weight").name == "head.auxiliary"


def test_layers_that_training_drops_by_chance_are_always_there():
    def classify(m, x):
        kept = [block for block in m.blocks if not (m.training and torch.rand(()) < 0.5)]
        return m.head(through(kept, m.patch(x)).mean(1))

    model = Model(classify, patch=nn.Linear(6, 8), blocks=blocks(4), head=nn.Linear(8, 3))
    for seed in range(5):
        torch.manual_seed(seed)
        assert depths(layer_groups(model, SEQUENCES), "patch", *numbered("blocks", 4), "head") == [5, 4, 3, 2, 1, 0]


def test_a_pooler_that_is_computed_and_thrown_away_is_named_once_and_takes_no_depth():
    def tag(m, x):
        x = through(m.layers, m.embed(x))
        m.pooler(x[:, 0]).tanh()
        return m.classifier(x)

    model = Model(tag, embed=nn.Linear(6, 8), layers=blocks(3), pooler=nn.Linear(8, 8), classifier=nn.Linear(8, 4))
    with pytest.warns(UserWarning, match="no gradient of the output reaches pooler") as told:
        groups = layer_groups(model, SEQUENCES)
    assert len(told) == 1
    assert depths(groups, "embed", *numbered("layers", 3), "classifier") == [4, 3, 2, 1, 0]


def test_the_adapters_of_all_languages_stay_in_their_layer_though_one_is_in_use():
    def layer():
        return Model(lambda m, x, language: x + m.adapters[language](m.block(x)), block=Block(),
                     adapters=nn.ModuleDict({language: nn.Linear(8, 8) for language in ("de", "en", "fr")}))

    def classify(m, x, language="en"):
        x = m.embed(x)
        for each in m.layers:
            x = each(x, language)
        return m.head(x.mean(1))

    model = Model(classify, embed=nn.Linear(6, 8), layers=nn.ModuleList(layer() for _ in range(3)), head=nn.Linear(8, 2))
    groups = layer_groups(model, SEQUENCES)
    assert depths(groups, "embed", *numbered("layers", 3), "head") == [4, 3, 2, 1, 0]
    assert len(groups) == 5


def test_a_relative_bias_that_all_blocks_share_takes_no_depth():
    def attend(m, x, bias):
        queries, keys, values = m.qkv(x).chunk(3, -1)
        x = x + (queries @ keys.transpose(1, 2) + bias).softmax(-1) @ values
        return x + m.mlp(x)

    def classify(m, x):
        x, places = m.patch(x), torch.arange(5)
        bias = m.relative(places[:, None] - places[None] + 4)[..., 0]
        for block in m.blocks:
            x = block(x, bias)
        return m.head(x.mean(1))

    model = Model(classify, patch=nn.Linear(6, 8), relative=nn.Embedding(9, 1), head=nn.Linear(8, 2),
                  blocks=nn.ModuleList(Model(attend, qkv=nn.Linear(8, 24), mlp=nn.Linear(8, 8)) for _ in range(3)))
    groups = layer_groups(model, SEQUENCES)
    assert depths(groups, "patch", *numbered("blocks", 3), "head") == [4, 3, 2, 1, 0]
    assert depths(groups, "relative")[0] in (3, 4)  # it enters the first block


def test_a_time_embedding_that_enters_every_block_takes_no_depth():
    def denoise(m, x, time):
        x, time = m.patch(x), m.time(time)
        for block in m.blocks:
            x = block(x, time)
        return m.out(x)

    def film():
        return Model(lambda m, x, time: m.block(x * (1 + m.scale(time)[:, None])), block=Block(), scale=nn.Linear(8, 8))

    model = Model(denoise, time=nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 8)), patch=nn.Linear(6, 8),
                  blocks=nn.ModuleList(film() for _ in range(3)), out=nn.Linear(8, 6))
    groups = layer_groups(model, (SEQUENCES, torch.ones(2, 1)))
    assert depths(groups, "patch", *numbered("blocks", 3), "out") == [4, 3, 2, 1, 0]
    assert depths(groups, "time.2")[0] >= 3


def test_a_learned_mixture_of_all_layers_does_not_bring_the_first_one_near_the_output():
    def classify(m, x):
        x, seen = m.patch(x), []
        for block in m.blocks:
            seen.append(x := block(x))
        return m.head((torch.stack(seen, -1) * m.mix.softmax(0)).sum(-1).mean(1))

    model = Model(classify, patch=nn.Linear(6, 8), blocks=blocks(4), mix=nn.Parameter(torch.zeros(4)), head=nn.Linear(8, 3))
    groups = layer_groups(model, SEQUENCES)
    assert depths(groups, "patch", *numbered("blocks", 4), "head") == [5, 4, 3, 2, 1, 0]
    assert depths(groups, "mix")[0] <= 1


def test_heads_of_other_tasks_that_the_example_does_not_use_are_named_and_shift_nothing():
    heads = nn.ModuleDict({name: nn.Linear(8, 10) for name in ("animals", "digits", "letters")})
    model = Model(lambda m, x, task="digits": m.heads[task](m.encoder(x)), encoder=Encoder(), heads=heads)
    with pytest.warns(UserWarning, match=r"did not use heads\.animals, heads\.letters"):
        groups = layer_groups(model, SEQUENCES)
    assert depths(groups, *ENCODER, "heads.digits") == [4, 3, 2, 1, 0]


# --- stages and blocks ------------------------------------------------------------------------------------------------

def tokens_first():
    """Torch's own encoder layers, on tokens [T, N, C]."""
    return Model(lambda m, x: m.head(through(m.layers, m.patch(x).transpose(0, 1)).mean(0)), patch=nn.Linear(6, 8),
                 layers=nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(4)), head=nn.Linear(8, 3)), SEQUENCES


def a_map_of_tokens():
    """A video transformer, on tokens [N, T, H, W, C]."""
    def layer():
        return Model(lambda m, x: m.block(x.flatten(1, -2)).view_as(x), block=Block())

    return Model(lambda m, x: m.head(through(m.layers, m.patch(x).permute(0, 2, 3, 4, 1)).flatten(1, -2).mean(1)),
                 patch=nn.Conv3d(3, 8, (1, 4, 4), (1, 4, 4)), layers=nn.ModuleList(layer() for _ in range(4)),
                 head=nn.Linear(8, 3)), torch.ones(1, 3, 2, 16, 16)


@pytest.mark.parametrize("make", [tokens_first, a_map_of_tokens])
def test_encoder_layers_are_found_whatever_the_shape_of_the_tokens(make):
    model, example = make()
    groups = layer_groups(model, example)
    assert depths(groups, "patch", *numbered("layers", 4), "head") == [5, 4, 3, 2, 1, 0]
    assert len(groups) == 6


def test_a_layer_with_repeated_parts_of_its_own_is_never_opened():
    def layer():
        return Model(lambda m, x: m.chain(sum(branch(x) for branch in m.branches) + m.block(x)), block=Block(),
                     branches=nn.ModuleList(nn.Linear(8, 8) for _ in range(4)),
                     chain=nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3))))

    model = Model(lambda m, x: m.head(through(m.layers, m.embed(x)).mean(1)), embed=nn.Linear(6, 8), head=nn.Linear(8, 2),
                  layers=nn.ModuleList(layer() for _ in range(3)))
    groups = layer_groups(model, SEQUENCES)
    assert depths(groups, "embed", *numbered("layers", 3), "head") == [4, 3, 2, 1, 0]
    assert len(groups) == 5


class ConvNextBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(channels, channels, 7, padding=3, groups=channels), nn.LayerNorm(channels)
        self.up, self.down = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        inside = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.down(F.gelu(self.up(inside)))).permute(0, 3, 1, 2)


def test_a_downsampling_belongs_to_the_stage_that_it_opens_though_it_is_in_another_list():
    def classify(m, x):
        for downsample, stage in zip(m.downsample, m.stages, strict=True):
            x = stage(downsample(x))
        return m.head(m.norm(x.mean((2, 3))))

    widths = (8, 12, 16, 24)
    patches = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.GroupNorm(1, 8))
    smaller = [nn.Sequential(nn.GroupNorm(1, a), nn.Conv2d(a, b, 2, 2)) for a, b in itertools.pairwise(widths)]
    model = Model(classify, downsample=nn.ModuleList([patches, *smaller]), norm=nn.LayerNorm(24), head=nn.Linear(24, 5),
                  stages=nn.ModuleList(nn.Sequential(ConvNextBlock(width), ConvNextBlock(width)) for width in widths))
    image = torch.ones(1, 3, 64, 64)
    stages = layer_groups(model, image)
    assert depths(stages, *numbered("stages", 4), "head") == [4, 3, 2, 1, 0]
    assert depths(stages, *numbered("downsample", 4)) == [5, 3, 2, 1]
    each_block = layer_groups(model, image, granularity="block")
    assert depths(each_block, *(f"stages.{i}.{j}" for i in range(4) for j in range(2))) == [8, 7, 6, 5, 4, 3, 2, 1]


def small_convnext():
    sizes = [CNBlockConfig(8, 12, 2), CNBlockConfig(12, 16, 2), CNBlockConfig(16, 24, 3), CNBlockConfig(24, None, 2)]
    return ConvNeXt(sizes, num_classes=5)


def small_swin():
    return torchvision.models.SwinTransformer([4, 4], 8, [2, 2, 2, 2], [1, 2, 2, 2], [4, 4], num_classes=5)


@pytest.mark.parametrize(("make", "head"), [(small_convnext, "classifier.2"), (small_swin, "head")])
def test_convnext_and_swin_have_the_six_stages_of_their_recipes(make, head):
    groups = layer_groups(make(), torch.ones(1, 3, 64, 64))
    assert depths(groups, *numbered("features", 8), head) == [5, 4, 3, 3, 2, 2, 1, 1, 0]


def test_plain_convolutions_are_layers_of_their_own_and_not_one_stem():
    dqn = nn.Sequential(nn.Conv2d(4, 8, 8, 4), nn.ReLU(), nn.Conv2d(8, 16, 4, 2), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
                        nn.Flatten(), nn.Linear(16 * 7 * 7, 32), nn.ReLU(), nn.Linear(32, 6))
    assert depths(layer_groups(dqn, torch.ones(1, 4, 84, 84)), "0", "2", "4", "7", "9") == [4, 3, 2, 1, 0]


def test_a_network_for_signals_is_cut_at_each_of_its_convolutions_and_at_its_recurrent_layer():
    def convolution(inputs, outputs):
        return nn.Conv1d(inputs, outputs, 7, padding=3), nn.BatchNorm1d(outputs), nn.ReLU(), nn.MaxPool1d(2)

    model = Model(lambda m, x: m.head(m.gru(m.convs(x).transpose(1, 2))[0][:, -1]), gru=nn.GRU(32, 16, batch_first=True),
                  convs=nn.Sequential(*convolution(1, 8), *convolution(8, 16), *convolution(16, 32)), head=nn.Linear(16, 3))
    groups = layer_groups(model, torch.ones(2, 1, 64))
    assert depths(groups, "convs.0", "convs.4", "convs.8", "gru", "head") == [4, 3, 2, 1, 0]


def test_backbone_and_classifier_of_a_segmentation_network_are_not_merged():
    with torch.device("meta"):
        model = torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
        groups = layer_groups(model, torch.ones(1, 3, 64, 64))
    assert all(len(parts_of(group)) == 1 for group in groups)
    assert depths(groups, "classifier.low_classifier", "classifier.high_classifier") == [0, 0]
    assert all(group.depth > 0 for group in groups if parts_of(group) == {"backbone"})


def test_the_predictors_of_a_detector_are_its_heads_and_its_backbone_is_near():
    model = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=4, min_size=64, max_size=64)
    with pytest.warns(UserWarning, match="no gradient of the output reaches rpn"):  # without targets it only proposes
        groups = layer_groups(model, ([torch.ones(3, 64, 64)],))
    assert depths(groups, "roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred", "rpn") == [0, 0, 1]
    assert min(group.depth for group in groups if parts_of(group) == {"backbone"}) == 1
    assert all(len(parts_of(group)) == 1 for group in groups)


class ResidualBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def stage_of_attributes(names, channels):
    return Model(lambda m, x: through((getattr(m, name) for name in names), x),
                 **{name: ResidualBlock(channels) for name in names})


def stage_of_named_parts(names, channels):
    return nn.Sequential(OrderedDict((name, ResidualBlock(channels)) for name in names))


@pytest.mark.parametrize("stage", [stage_of_attributes, stage_of_named_parts])
@pytest.mark.parametrize("names", [("block1", "block2", "block3"), ("res2a", "res2b", "res2c")])
def test_blocks_that_are_attributes_as_in_networks_from_other_frameworks_are_found(stage, names):
    model = Model(lambda m, x: m.fc(m.stage2(m.down(m.stage1(m.conv(x)))).mean((2, 3))), conv=nn.Conv2d(3, 8, 3, padding=1),
                  stage1=stage(names, 8), down=nn.Conv2d(8, 16, 2, 2), stage2=stage(names, 16), fc=nn.Linear(16, 3))
    groups = layer_groups(model, torch.ones(1, 3, 16, 16), granularity="block")
    found = depths(groups, *(f"{part}.{name}" for part in ("stage1", "stage2") for name in names))
    assert found == sorted(set(found), reverse=True)  # six blocks at six depths
    assert len(layer_groups(model, torch.ones(1, 3, 16, 16))) < len(groups)


@pytest.mark.parametrize("granularity", ["stage", "block"])
@pytest.mark.parametrize("name", ["squeezenet1_1", "shufflenet_v2_x0_5", "mnasnet0_5"])
def test_the_names_of_groups_read_like_names(name, granularity):
    with torch.device("meta"):
        groups = layer_groups(torchvision.models.get_model(name), torch.ones(1, 3, 64, 64), granularity=granularity)
    for group in groups:
        first, _, last = group.name.partition("..")  # "features.2..3", and never "features.2..features.3"
        assert first
        assert "." not in last
        assert group.name == group.name.strip("._ ")
    assert [group.depth for group in groups] == sorted((group.depth for group in groups), reverse=True)
    assert groups[-1].name == "head"


def test_dense_blocks_are_stages_in_spite_of_all_their_skips():
    model = torchvision.models.DenseNet(growth_rate=4, block_config=(2, 2, 2), num_init_features=8, num_classes=3)
    groups = layer_groups(model, torch.ones(1, 3, 64, 64))
    dense = [f"features.denseblock{i}" for i in (1, 2, 3)]
    assert depths(groups, "features.conv0", *dense, "classifier") == [4, 3, 2, 1, 0]
    assert depths(groups, "features.transition1")[0] in (2, 3)


# --- inputs, and what a look leaves behind ----------------------------------------------------------------------------

@pytest.mark.parametrize("example", [(torch.zeros(1, 3), torch.zeros(1, 5)),
                                     {"left": torch.zeros(1, 3), "right": torch.zeros(1, 5)}], ids=["tuple", "dictionary"])
def test_an_example_that_the_model_carries_is_used(example):
    model = Model(lambda m, left, right: m.head(m.a(left) + m.b(right)), a=nn.Linear(3, 4), b=nn.Linear(5, 4),
                  head=nn.Linear(4, 2))
    model.example_input_array = example
    assert depths(layer_groups(model), "a", "b", "head") == [1, 1, 0]


def test_the_dummy_inputs_of_a_model_are_used():
    model = Model(lambda m, ids, speaker: m.out(m.embed(ids).mean(1) + m.proj(speaker)), proj=nn.Linear(3, 4),
                  embed=nn.Embedding(10, 4), out=nn.Linear(4, 2))
    model.dummy_inputs = {"ids": torch.tensor([[1, 2, 3]]), "speaker": torch.zeros(1, 3)}
    assert depths(layer_groups(model), "proj", "embed", "out") == [1, 1, 0]


def test_the_input_size_that_a_model_declares_is_used():
    model = Model(lambda m, x: m.fc(m.conv(x).relu().flatten(1)), conv=nn.Conv2d(1, 4, 3, stride=2, padding=1),
                  fc=nn.Linear(4 * 24 * 24, 3))
    model.default_cfg = {"input_size": (1, 48, 48), "num_classes": 3}
    assert depths(layer_groups(model), "conv", "fc") == [1, 0]


def test_a_list_is_one_argument():
    model = Model(lambda m, images: torch.stack([m.head(m.body(image).relu().mean(0)) for image in images]),
                  body=nn.Linear(3, 4), head=nn.Linear(4, 2))
    assert depths(layer_groups(model, [torch.zeros(5, 3), torch.zeros(2, 3)]), "body", "head") == [1, 0]


def test_the_error_for_an_input_that_nobody_can_guess_begins_with_what_to_pass():
    model = Model(lambda m, x, mask: m.head(m.body(x[:, mask.bool()].mean(1))), body=nn.Linear(7, 4), head=nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"^pass example_input"):
        layer_groups(model)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_a_model_can_be_copied_pickled_and_scripted_after_a_look():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 30 * 30, 3))
    groups = layer_groups(model)
    assert all(p.grad is None and not p._backward_hooks for p in model.parameters())
    assert copy.deepcopy(groups[0].params).keys() == groups[0].params.keys()
    assert len(pickle.loads(pickle.dumps(model)).state_dict()) == len(copy.deepcopy(model).state_dict())
    torch.jit.script(model)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_look_in_a_cell_without_gradients_sees_the_same(mode):
    model = three_tasks()
    plain = [(group.name, group.depth) for group in layer_groups(model, SEQUENCES)]
    with mode():
        assert [(group.name, group.depth) for group in layer_groups(model, SEQUENCES.clone())] == plain
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    def classify(m, x):
        x = m.patch(x)
        for block in m.blocks:
            x = checkpoint(block, x, use_reentrant=reentrant)
        return m.head(x.mean(1))

    model = Model(classify, patch=nn.Linear(6, 8), blocks=blocks(3), head=nn.Linear(8, 2))
    assert depths(layer_groups(model, SEQUENCES), "patch", *numbered("blocks", 3), "head") == [4, 3, 2, 1, 0]


def test_a_backbone_that_forward_runs_without_gradients_keeps_its_order_and_is_named():
    def classify(m, x):
        with torch.no_grad():
            features = m.encoder(x)
        return m.head(features)

    with pytest.warns(UserWarning, match=r"no gradient of the output reaches stem, encoder\.blocks\.0"):
        groups = layer_groups(Model(classify, encoder=Encoder(), head=nn.Linear(8, 2)), SEQUENCES)
    assert depths(groups, *ENCODER, "head") == [4, 3, 2, 1, 0]


def test_a_backbone_that_was_frozen_by_hand_before_grouping_keeps_names_and_order():
    model = torchvision.models.resnet18().requires_grad_(False)
    model.fc = nn.Linear(512, 3)
    groups = layer_groups(model, torch.ones(1, 3, 32, 32))
    assert [group.name for group in groups] == ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
    assert groups[-1].depth == 0
    assert training_parts(model) == {"fc"}


def test_a_head_on_detached_features_is_a_head_and_the_trunk_counts_by_the_other():
    def act(m, x):
        features = m.encoder(x)
        return m.policy(features), m.value(features.detach())

    model = Model(act, encoder=Encoder(), policy=nn.Linear(8, 4), value=nn.Linear(8, 1))
    assert depths(layer_groups(model, SEQUENCES), *ENCODER, "policy", "value") == [4, 3, 2, 1, 0, 0]
