"""timm: its schedulers keep the ratios of groups with lr_scale, its factory takes them, and its models' exceptions are kept."""

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.scheduler import create_scheduler_v2

from layerlr_helpers import layer_decay, layer_groups, param_groups


@pytest.fixture(scope="module")
def model():
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=5)


@pytest.fixture(scope="module")
def groups(model):
    return layer_groups(model, torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("sched", ["cosine", "step", "poly", "tanh"])
def test_the_ratios_hold_through_warm_up_and_floor_and_the_rates_are_those_of_timms_own_groups(model, groups, sched):
    ours = create_optimizer_v2(param_groups(groups, layer_decay(1e-3, 0.75), lr_scale=True), "adamw", weight_decay=0.05)
    theirs = create_optimizer_v2(model, "adamw", lr=1e-3, layer_decay=0.75)
    schedules = [create_scheduler_v2(optimizer, sched=sched, num_epochs=10, min_lr=1e-5, warmup_lr=1e-6, warmup_epochs=3)[0]
                 for optimizer in (ours, theirs)]
    for epoch in range(10):
        rates, expected = ([group["lr"] for group in optimizer.param_groups] for optimizer in (ours, theirs))
        assert max(rates) == pytest.approx(max(expected))
        assert max(rates) / min(rates) == pytest.approx(max(expected) / min(expected))
        for schedule in schedules:
            schedule.step(epoch + 1)


def test_the_same_parameters_are_free_of_weight_decay_as_in_timm(model, groups):
    def free(made):
        return {id(p) for group in made if group["weight_decay"] == 0 for p in group["params"]}

    ours = param_groups(groups, layer_decay(1e-3, 0.75), weight_decay=0.05, decay_norm_and_bias=False)
    theirs = param_groups_layer_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.75)
    vectors_of_more_dimensions = {id(model.cls_token), id(model.pos_embed)}
    assert free(ours) == free(theirs)
    assert free(param_groups(groups, layer_decay(1e-3, 0.75), weight_decay=0.05)) == vectors_of_more_dimensions


VISION_TRANSFORMERS = [("vit_tiny_patch16_224", 32, {"img_size": 32}),
                       ("deit_tiny_distilled_patch16_224", 32, {"img_size": 32})]
WITH_STAGES = [("swin_tiny_patch4_window7_224", 224, {}), ("convnext_atto", 64, {}), ("resnet18", 64, {})]


@pytest.mark.parametrize(("name", "size", "options", "granularity"), [
    (*model, granularity) for models, granularities in ((VISION_TRANSFORMERS, ("stage", "block")), (WITH_STAGES, ("block",)))
    for model in models for granularity in granularities])
def test_where_both_mean_the_same_layers_every_parameter_has_timms_own_ratio(name, size, options, granularity):
    model = timm.create_model(name, num_classes=5, **options)
    theirs = {id(p): group["lr_scale"] for group in param_groups_layer_decay(model, layer_decay=0.75) for p in group["params"]}
    groups = layer_groups(model, torch.zeros(1, 3, size, size), granularity=granularity)
    rates = layer_decay(1.0, 0.75)(groups)
    for group in groups:
        for parameter, p in group.params.items():
            assert rates[group.name] == pytest.approx(theirs[id(p)]), (group.name, parameter)


@pytest.mark.parametrize(("name", "size", "options"), WITH_STAGES)
def test_a_whole_stage_is_a_layer_by_default(name, size, options):
    groups = layer_groups(timm.create_model(name, num_classes=5, **options), torch.zeros(1, 3, size, size))
    assert [group.depth for group in groups] == [5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("granularity", ["stage", "block"])
def test_a_norm_of_the_pooled_features_belongs_to_the_last_block_here_and_to_the_head_in_timm(granularity):
    model = timm.create_model("beit_base_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2, num_classes=5)
    theirs = {id(p): group["lr_scale"] for group in param_groups_layer_decay(model, layer_decay=0.5) for p in group["params"]}
    groups = layer_groups(model, torch.zeros(1, 3, 32, 32), granularity=granularity)
    different = {name: (rate, theirs[id(p)]) for group in groups for name, p in group.params.items()
                 if (rate := layer_decay(1.0, 0.5)(groups)[group.name]) != theirs[id(p)]}
    assert different == {"fc_norm.weight": (0.5, 1.0), "fc_norm.bias": (0.5, 1.0)}
