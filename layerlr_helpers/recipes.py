"""Ways to fine-tune that the studies compare: plans of unfreezing, orders of rates, and two optimizers with a twist."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch.optim import Optimizer

from layerlr_helpers.diagnostics import relative_gradient_norm
from layerlr_helpers.layers import LayerGroup
from layerlr_helpers.param_groups import Rates, depth_by_name, layer_decay
from layerlr_helpers.unfreezing import UnfreezePlan

fused_adamw = partial(torch.optim.AdamW, fused=True)  # on a CPU its step takes a third of the default's time

Plan = Callable[[Sequence[LayerGroup], int], UnfreezePlan]  # from the groups and the number of steps of the run


def head_only(groups: Sequence[LayerGroup], steps: int) -> UnfreezePlan:
    """The heads train, nothing else ever does; in a model without a head, it is what is nearest to the output."""
    return UnfreezePlan(dict.fromkeys(_heads(groups), 0))


def everything(groups: Sequence[LayerGroup], steps: int) -> UnfreezePlan:
    """All layers train from the start."""
    return UnfreezePlan({"*": 0})


def gradual(groups: Sequence[LayerGroup], steps: int) -> UnfreezePlan:
    """One depth more at a time, from the head down (Howard and Ruder, 2018); all train in the last 3 of n + 2 equal parts."""
    return UnfreezePlan.top_down(groups, every=steps // (len(set(depth_by_name(groups).values())) + 2))


def head_then_all(groups: Sequence[LayerGroup], steps: int) -> UnfreezePlan:
    """The heads alone for half of the run, then everything (LP-FT, Kumar et al., 2022)."""
    return UnfreezePlan({"*": steps // 2, **dict.fromkeys(_heads(groups), 0)})


def only(*names: str) -> Plan:
    """These groups train, the others never do (surgical fine-tuning, Lee et al., 2023)."""
    return lambda groups, steps: UnfreezePlan(dict.fromkeys(names, 0))


def all_but_first(number: int) -> Plan:
    """The first ``number`` groups never train, the others always do."""
    return lambda groups, steps: UnfreezePlan({group.name: 0 for group in groups[number:]})


def reversed_decay(stem_lr: float, decay: float) -> Rates:
    """``layer_decay`` upside down: the stem has the highest rate."""
    def rates(groups: Sequence[LayerGroup]) -> dict[str, float]:
        depths = depth_by_name(groups)
        deepest = max(depths.values())
        return layer_decay(stem_lr, decay)([replace(group, depth=deepest - depths[group.name]) for group in groups])

    return rates


def l2_sp(strength: float) -> Callable[[list[dict]], Optimizer]:
    """AdamW that pulls every group but the heads towards where it started (L2-SP, Li et al., 2018).

    After each step a weight is moved by ``lr · strength`` of the way back to its start: the penalty's gradient step, kept
    apart from the loss's as AdamW keeps weight decay apart.
    """
    def make(groups: list[dict]) -> Optimizer:
        optimizer = fused_adamw(groups)
        starts = {p: p.detach().clone() for group in _below_the_heads(optimizer) for p in group["params"]}

        @torch.no_grad()
        def pull(optimizer, *_):
            for group in _below_the_heads(optimizer):
                for p in group["params"]:
                    if p.grad is not None:
                        p.lerp_(starts[p], min(1.0, group["lr"] * strength))

        optimizer.register_step_post_hook(pull)
        return optimizer

    return make


def in_one_group(make: Callable[[list[dict]], Optimizer]) -> Callable[[list[dict]], Optimizer]:
    """An optimizer of one group that holds the parameters of all groups, with the options of the first."""
    return lambda groups: make([{**groups[0], "params": [p for group in groups for p in group["params"]], "name": "all"}])


def auto_rgn(groups: list[dict]) -> Optimizer:
    """AdamW with each group's rate times its relative gradient norm, over the largest of them (Auto-RGN, Lee et al., 2023).

    The paper measures the norms once an epoch, a tensor at a time; here they are those of every batch and layer group.
    """
    optimizer = fused_adamw(groups)
    planned_rates: list[float] = []

    def scale_rates(optimizer, *_):
        planned_rates[:] = [group["lr"] for group in optimizer.param_groups]
        norms = [relative_gradient_norm(group["params"]) for group in optimizer.param_groups]
        norms = [norm if norm > 0 else 0.0 for norm in norms]  # not a number without a gradient or if all weights are 0
        for group, norm in zip(optimizer.param_groups, norms, strict=True):
            group["lr"] = group["lr"] * norm / (max(norms) or 1.0)

    def restore_rates(optimizer, *_):  # a schedule goes on from the rate that it gave
        for group, lr in zip(optimizer.param_groups, planned_rates, strict=True):
            group["lr"] = lr

    optimizer.register_step_pre_hook(scale_rates)
    optimizer.register_step_post_hook(restore_rates)
    return optimizer


def _heads(groups: Sequence[LayerGroup]) -> list[str]:
    depths = depth_by_name(groups)
    return [name for name, depth in depths.items() if depth == min(depths.values())]


def _below_the_heads(optimizer: Optimizer) -> list[dict]:
    """The parameter groups that have a depth above 0; of groups that know no depth, all but the last."""
    last = len(optimizer.param_groups) - 1
    return [group for i, group in enumerate(optimizer.param_groups) if group.get("depth", last - i) > 0]
