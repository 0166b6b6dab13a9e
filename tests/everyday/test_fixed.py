"""What an author fixed stays fixed in everyday models, and what is frozen stands still whatever others do to the model."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from layerlr_helpers import (
    ProgressiveUnfreezing,
    UnfreezePlan,
    fit,
    freeze,
    layer_decay,
    layer_groups,
    param_groups,
    unfreeze,
    uniform,
)
from tests.everyday.helpers import SEQUENCES, Encoder, Model, batches, depths, examples, holder, mlp, numbered


def sgd(groups, lr=0.1, **options):
    return torch.optim.SGD(param_groups(groups, uniform(lr), **options), momentum=0.9)


def moved(model, before):
    """The names of what differs from an earlier ``state_dict``."""
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


# --- fixed parameters -------------------------------------------------------------------------------------------------

class LowRank(nn.Module):
    """A linear layer that its author froze, and what trains in its place, as LoRA does it."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, inputs) / 9), nn.Parameter(torch.randn(outputs, 2) / 9)

    def forward(self, x):
        return self.base(x) + x @ self.down.t() @ self.up.t()


def test_the_base_of_low_rank_adapters_is_the_same_bit_for_bit_after_a_whole_run():
    model = nn.Sequential(LowRank(6, 8), nn.ReLU(), LowRank(8, 8), nn.ReLU(), nn.Linear(8, 3))
    before, groups = copy.deepcopy(model.state_dict()), layer_groups(model)
    optimizer = torch.optim.SGD(param_groups(groups, layer_decay(0.1, 0.9), weight_decay=0.1), momentum=0.9)
    unfreezing = ProgressiveUnfreezing(groups, UnfreezePlan.top_down(groups, every=2))
    fit(model, optimizer, batches(*examples(32)), epochs=3, unfreezing=unfreezing, progress=False)
    base = {name for name in before if "base" in name}
    assert moved(model, before) == before.keys() - base
    assert {name for name, p in model.named_parameters() if p.requires_grad} == before.keys() - base


def test_word_vectors_that_were_loaded_frozen_stay_so_in_a_plan_for_everything():
    model = Model(lambda m, tokens: m.head(m.hidden(m.words(tokens).mean(1)).relu()), hidden=nn.Linear(8, 8),
                  words=nn.Embedding.from_pretrained(torch.randn(20, 8)), head=nn.Linear(8, 3))
    before, tokens = copy.deepcopy(model.state_dict()), torch.randint(20, (32, 5))
    groups = layer_groups(model, tokens[:2])
    assert depths(groups, "hidden", "head") == [1, 0]
    with pytest.warns(UserWarning, match="nothing will ever train in stem"):
        unfreezing = ProgressiveUnfreezing(groups, UnfreezePlan({"head": 0, "hidden": 1, "stem": 1}))
    fit(model, sgd(groups, weight_decay=0.1), batches(tokens, torch.arange(32) % 3), epochs=2, unfreezing=unfreezing,
        progress=False)
    assert moved(model, before) == before.keys() - {"words.weight"}


def test_a_weight_norm_whose_magnitude_is_fixed_trains_in_its_direction_only():
    head = nn.utils.parametrizations.weight_norm(nn.Linear(8, 3, bias=False))
    magnitude, direction = head.parametrizations.weight.original0, head.parametrizations.weight.original1
    magnitude.requires_grad_(False).fill_(1)
    groups = layer_groups(model := nn.Sequential(nn.Linear(6, 8), nn.ReLU(), head))
    before = direction.detach().clone()
    fit(model, sgd(groups), batches(*examples(32)), epochs=2, unfreezing=ProgressiveUnfreezing(groups, UnfreezePlan({"*": 0})),
        progress=False)
    assert torch.equal(magnitude, torch.ones(3, 1))
    assert not torch.equal(direction, before)
    assert depths(groups, "0", "2") == [1, 0]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32])
def test_masks_and_codes_that_cannot_have_a_gradient_are_no_layer_and_do_no_harm(dtype):
    pruned = Model(lambda m, x: x @ (m.weight * m.mask), weight=nn.Parameter(torch.randn(8, 8)),
                   mask=nn.Parameter(torch.ones(8, 8, dtype=dtype), requires_grad=False))
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), pruned, nn.ReLU(), nn.Linear(8, 3))
    groups = layer_groups(model)
    assert [group.depth for group in groups] == [2, 1, 0]
    assert holder(groups, "2.mask") is holder(groups, "2.weight")
    freeze(groups, "*")
    unfreeze(groups, "*")
    fit(model, torch.optim.AdamW(param_groups(groups, layer_decay(0.1, 0.5))), batches(*examples(32)), epochs=1,
        unfreezing=ProgressiveUnfreezing(groups, UnfreezePlan.top_down(groups, every=1)), progress=False)
    assert torch.equal(pruned.mask, torch.ones(8, 8, dtype=dtype))


def test_a_target_network_inside_the_model_takes_no_depth_and_is_moved_by_nothing():
    def views(m, x):
        with torch.no_grad():
            target = m.target(x)
        return m.predictor(m.online(x)), target

    online = Encoder(2)
    model = Model(views, online=online, predictor=nn.Linear(8, 8), target=copy.deepcopy(online).requires_grad_(False))
    groups = layer_groups(model, SEQUENCES)
    assert depths(groups, "online.patch", *numbered("online.blocks", 2), "predictor") == [3, 2, 1, 0]
    before = copy.deepcopy(model.state_dict())
    fit(model, sgd(groups), batches(torch.randn(16, 5, 6), torch.zeros(16)), epochs=2, progress=False,
        loss_fn=lambda outputs, _: (outputs[0] - outputs[1]).square().mean(),
        unfreezing=ProgressiveUnfreezing(groups, UnfreezePlan({"*": 1, "head*": 0})))
    assert {name.split(".")[0] for name in moved(model, before)} == {"online", "predictor"}


def test_what_the_user_freezes_by_hand_after_grouping_is_left_alone_by_fit():
    groups = layer_groups(model := mlp())
    model[0].bias.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    fit(model, sgd(groups, weight_decay=0.1), batches(*examples(32)), epochs=1, progress=False)
    assert moved(model, before) == before.keys() - {"0.bias"}


# --- frozen, and then … -----------------------------------------------------------------------------------------------

class Codebook(nn.Module):
    """A layer with a layer inside, whose codes follow the data in train mode."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.register_buffer("codes", torch.randn(4, 8))

    def forward(self, x):
        x = self.proj(x)
        if self.training:
            self.codes.lerp_(x.detach().mean(0).expand(4, -1), 0.1)
        return x + self.codes.mean(0)


class Counter(nn.Module):
    """A layer with a layer inside, which counts its examples in every mode."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += len(x)
        return self.proj(x) * (1 + self.seen / 1000)


@pytest.mark.parametrize("layer", [Codebook, Counter])
def test_a_layer_with_a_state_beside_its_parts_stands_still_in_a_frozen_group(layer):
    model = nn.Sequential(nn.Linear(6, 8), layer(), nn.ReLU(), nn.Linear(8, 3))
    before, groups = copy.deepcopy(model.state_dict()), layer_groups(model)
    fit(model, sgd(groups), batches(*examples(32)), epochs=2, progress=False,
        unfreezing=ProgressiveUnfreezing(groups, UnfreezePlan({"head": 0})))
    assert moved(model, before) == {"3.weight", "3.bias"}


IMAGES = torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(0)) * 2 + 1


def pretrained():
    """A small convolutional network with norms that have seen data, and its groups: stem, 3 and head."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.BatchNorm2d(8),
                          nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    with torch.no_grad():
        for _ in range(60):
            model(IMAGES)
    return model, layer_groups(model, IMAGES[:2])


def labelled(images):
    return batches(images, torch.arange(len(images)) % 4, batch_size=16)


def test_a_moving_average_with_buffers_has_all_its_statistics_after_update_bn_in_the_middle_of_a_plan():
    model, groups = pretrained()
    ProgressiveUnfreezing(groups, UnfreezePlan({"head": 0, "3": 5, "stem": 9})).apply(5)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    update_bn(labelled(IMAGES), average)
    for place in (1, 4):  # the first norm is frozen, the second is measured anew
        torch.testing.assert_close(average.module[place].running_mean, model[place].running_mean, rtol=0, atol=0.2)
        assert (average.module[place].running_var != 1).all()


def test_frozen_norms_stand_still_in_the_training_that_follows_update_bn():
    model, groups = pretrained()
    freeze(groups, "stem", "3")
    update_bn(labelled(IMAGES), model)
    before = copy.deepcopy(model.state_dict())
    fit(model, sgd(groups), labelled(5 * IMAGES), epochs=1, progress=False)
    assert moved(model, before) == {"8.weight", "8.bias"}


@pytest.mark.slow
def test_what_is_frozen_after_the_model_was_compiled_and_run_stands_still_until_it_is_let_go():
    torch._dynamo.reset()
    model, groups = pretrained()
    compiled = torch.compile(model, backend="eager")
    compiled(IMAGES)
    freeze(groups, "stem", "3")
    before = copy.deepcopy(model.state_dict())
    fit(compiled, sgd(groups), labelled(5 * IMAGES), steps=2, progress=False)
    assert moved(model, before) == {"8.weight", "8.bias"}
    unfreeze(groups, "*")
    compiled.train()(5 * IMAGES)
    assert {"1.running_mean", "4.running_mean"} <= moved(model, before)
