"""The probes of timm, in the order of the document's rows."""

import logging
from logging.handlers import BufferingHandler

import torch
import torch.nn.functional as F
from timm import create_model
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.scheduler import create_scheduler_v2
from timm.utils import freeze, unfreeze
from torch import nn
from torch.optim import AdamW, Optimizer

from benchmarks.pitfalls import shared
from benchmarks.pitfalls.shared import LR, Finding, noise, resnet18


def timm_resnet18() -> nn.Module:
    """timm's ResNet-18. By default the last scale of its blocks starts at 0, which stops all gradients; not so here."""
    torch.manual_seed(0)
    return create_model("resnet18", num_classes=shared.CLASSES, zero_init_last=False)


def freeze_backbone(model: nn.Module, **options) -> None:
    freeze(model, [name for name, _ in model.named_children() if name != "fc"], **options)


def adamw(model: nn.Module, **options) -> Optimizer:
    return create_optimizer_v2(model, "adamw", lr=LR, **options)


def train(model: nn.Module, optimizer: Optimizer, epochs: int = 1) -> None:
    """A plain loop, which timm leaves to its user."""
    model.train()
    for _ in range(epochs):
        for images, labels in noise():
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()


def layer_decay_scales(model: nn.Module) -> tuple[dict[str, float], int]:
    """The factor of each parameter's learning rate, and how many warnings timm logged."""
    logger, warnings_logged = logging.getLogger("timm"), BufferingHandler(capacity=100)
    warnings_logged.setLevel(logging.WARNING)
    logger.addHandler(warnings_logged)
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    logger.removeHandler(warnings_logged)
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}, len(warnings_logged.buffer)


def train_on_frozen(**options) -> tuple[float, float, float]:
    model = timm_resnet18()
    freeze_backbone(model, **options)
    optimizer = adamw(model)
    return shared.trained_on_frozen(model, model.fc, lambda: train(model, optimizer, epochs=2))


frozen_statistics, frozen_scale, frozen_output = shared.frozen_backbone_probes({
    "`timm.utils.freeze`": train_on_frozen,
    "`include_bn_running_stats=False`": lambda: train_on_frozen(include_bn_running_stats=False)})


def frozen_after_training() -> Finding:
    model = timm_resnet18()
    optimizer = adamw(model, weight_decay=0.05)
    train(model, optimizer)
    freeze_backbone(model)
    return shared.trained_then_frozen(model, shared.copied_state(model), lambda: train(model, optimizer))


def unfrozen_parameters() -> Finding:
    counts = []
    for optimizer_made_while_frozen in (True, False):
        model = timm_resnet18()
        before, optimizer = shared.copied_state(model), adamw(model)
        freeze_backbone(model)
        if optimizer_made_while_frozen:
            optimizer = adamw(model)
        unfreeze(model)
        train(model, optimizer)
        counts.append(shared.untrained(model, before))
    return Finding(sum(counts) > 0,
                   f"parameters that never train after `unfreeze`: {counts[0]} when `create_optimizer_v2` ran while they were "
                   f"frozen, {counts[1]} when it ran before (`unfreeze` makes new parameters for BatchNorm)")


schedule_after_unfreezing = shared.not_applicable("unfreezing during a run is left to its user")


def resumed_run() -> Finding:
    frozen_model = timm_resnet18()
    freeze_backbone(frozen_model)
    while_frozen, after = (adamw(model, layer_decay=0.7) for model in (frozen_model, timm_resnet18()))
    error = shared.error_name(lambda: after.load_state_dict(while_frozen.state_dict()))
    return Finding(error is not None,
                   f"`create_optimizer_v2` leaves frozen parameters out: {len(while_frozen.param_groups)} groups while frozen, "
                   f"{len(after.param_groups)} after; loading the first's state into the second: {error or 'works'}")


def rates_in_torch() -> Finding:
    optimizer = AdamW(param_groups_layer_decay(timm_resnet18(), layer_decay=0.5), lr=LR)
    return shared.rates_in_torch_finding("`param_groups_layer_decay(layer_decay=0.5)`", optimizer,
                                         lambda optimizer: create_scheduler_v2(optimizer, "cosine", num_epochs=10),
                                         "timm's own schedulers, which read `lr_scale`")


def unknown_model() -> Finding:
    scales, warnings_logged = layer_decay_scales(resnet18())
    own_scales, _ = layer_decay_scales(timm_resnet18())
    compiled_scales, _ = layer_decay_scales(torch.compile(timm_resnet18()))
    count, own, compiled = (len(set(each.values())) for each in (scales, own_scales, compiled_scales))
    model = timm_resnet18()
    model.adapter = nn.Conv2d(3, 3, 1)
    adapted_scales, adapted_warnings = layer_decay_scales(model)
    first, adapter = adapted_scales["conv1.weight"], adapted_scales["adapter.weight"]
    return Finding(count == 1,
                   f"different scales on torchvision's ResNet-18: {count} (warnings logged: {warnings_logged}); on timm's own: "
                   f"{own}, the same after `torch.compile`: {compiled}; an adapter added in front of timm's own, where "
                   f"the first layer has {first:.3g}, gets the scale {adapter:.3g} (warnings: {adapted_warnings})")


def layer_order() -> Finding:
    model = shared.DefinedInReverse()
    model.pretrained_cfg = {"classifier": "fc"}  # timm's automatic grouping looks the head up here
    scales, _ = layer_decay_scales(model)
    return shared.layer_order_finding("scales by the automatic grouping of", scales)


def unknown_name() -> Finding:
    pattern = shared.error_name(lambda: param_groups_layer_decay(timm_resnet18(), no_weight_decay_list=["lyer1.*"]))
    module = shared.error_name(lambda: freeze(timm_resnet18(), ["lyer1"]))
    return Finding(None in (pattern, module), f"a misspelt pattern in `no_weight_decay_list`: {pattern or 'accepted'}; a "
                                              f"misspelt module in `freeze`: {module or 'accepted'}")


def ratios_of_rates() -> Finding:
    optimizer = AdamW(param_groups_layer_decay(timm_resnet18(), layer_decay=0.5), lr=LR)
    scheduler, _ = create_scheduler_v2(optimizer, "cosine", num_epochs=10, warmup_epochs=2, min_lr=1e-5)
    ratios = [shared.head_over_first(optimizer)]
    for epoch in range(1, 10):
        scheduler.step(epoch)
        ratios.append(shared.head_over_first(optimizer))
    return shared.ratio_finding("cosine with warm-up and `min_lr`, head over first layer", ratios)
