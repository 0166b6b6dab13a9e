"""One learning rate for each layer: from layer groups to the parameter groups of any torch optimizer."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import pandas as pd
from torch import nn
from torch.optim import Optimizer

from layerlr_helpers.layers import LayerGroup, layer_groups
from layerlr_helpers.naming import assigned, listed, matching

Rates = Callable[[Sequence[LayerGroup]], dict[str, float]]


def uniform(lr: float) -> Rates:
    """The same learning rate for every group."""
    _check_rate("lr", lr)
    return lambda groups: {group.name: lr for group in groups}


def head_and_backbone(*, backbone_lr: float, head_lr: float) -> Rates:
    """Two rates: one for the last group, the head, and one for all groups before it."""
    _check_rate("backbone_lr", backbone_lr)
    _check_rate("head_lr", head_lr)
    return lambda groups: {group.name: backbone_lr for group in groups[:-1]} | {groups[-1].name: head_lr}


def layer_decay(head_lr: float, decay: float) -> Rates:
    """``head_lr`` for the last group, and for each group before it ``decay`` times the rate of the group after it.

    Discriminative fine-tuning (Howard and Ruder, ULMFiT, 2018, with decay 1/2.6); layer-wise learning-rate decay in
    ELECTRA (Clark et al., 2020) and BEiT (Bao et al., 2022). A ``decay`` outside (0, 1] is a ValueError.

    >>> layer_decay(1.0, 0.5)(layer_groups(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))))
    {'stem': 0.25, '1': 0.5, 'head': 1.0}
    """
    _check_rate("head_lr", head_lr)
    if not 0 < decay <= 1:
        raise ValueError(f"decay must be above 0 and at most 1, not {decay}; with 1 every group has the head's rate")
    return lambda groups: {group.name: head_lr * decay ** (len(groups) - 1 - i) for i, group in enumerate(groups)}


def per_group(rates: Mapping[str, float]) -> Rates:
    """A rate for each group name or pattern: ``per_group({"stem": 0.0, "layer*": 1e-4, "head": 1e-3})``.

    A group's name goes before any pattern; of several patterns that match, the last one wins. When it is used, a pattern
    that matches no group and a group that no pattern matches are a ValueError.
    """
    for pattern, lr in rates.items():
        _check_rate(f"the rate of {pattern!r}", lr)

    def rates_of(groups: Sequence[LayerGroup]) -> dict[str, float]:
        names = [group.name for group in groups]
        rate_of_each = assigned(rates, names)
        if missing := [name for name in names if name not in rate_of_each]:
            raise ValueError(f"no rate was given for the groups {listed(missing)}; name them, or add a pattern '*'")
        return rate_of_each

    return rates_of


def param_groups(model_or_groups: nn.Module | Sequence[LayerGroup], rates: Rates | Mapping[str, float], *,
                 weight_decay: float = 0.0, decay_norm_and_bias: bool = True,
                 no_weight_decay: Iterable[str] = ()) -> list[dict]:
    """Plain torch parameter groups with ``params``, ``lr``, ``name``, ``layer`` and ``weight_decay``.

    They go into any torch optimizer: ``torch.optim.AdamW(param_groups(model, layer_decay(1e-3, 0.7)))``. All groups
    are in it from the start, also those that a plan freezes at first.

    Args:
        rates: one of the functions of this module, or a dictionary from group name to rate.
        weight_decay: of every group. It overrides the optimizer's ``weight_decay``, whose default in ``AdamW`` is not 0.
        decay_norm_and_bias: False keeps parameters of fewer than two dimensions (norms, biases) free of weight decay.
            A group with both kinds then becomes two, ``NAME`` and ``NAME/no_decay``; ``layer`` is NAME in both.
        no_weight_decay: names or patterns of further parameters to keep free of it, e.g. ``["*pos_embed*"]``.

    Rates for other groups than there are, one below 0 or not finite, and a pattern that matches nothing are a ValueError.
    """
    groups = layer_groups(model_or_groups) if isinstance(model_or_groups, nn.Module) else list(model_or_groups)
    _check_rate("weight_decay", weight_decay)
    lrs = _resolved_rates(rates, groups)
    params = {name: p for group in groups for name, p in group.params.items()}
    patterns = [no_weight_decay] if isinstance(no_weight_decay, str) else no_weight_decay
    exempt = {name for pattern in patterns for name in matching(pattern, list(params), what="parameter")}
    if not decay_norm_and_bias:
        exempt |= {name for name, p in params.items() if p.ndim < 2}
    result = []
    for group in groups:
        decayed = [p for name, p in group.params.items() if name not in exempt]
        free = [p for name, p in group.params.items() if name in exempt]
        name_of_free = f"{group.name}/no_decay" if decayed else group.name
        for name, part, decay in ((group.name, decayed, weight_decay), (name_of_free, free, 0.0)):
            if part:
                result.append({"params": part, "lr": lrs[group.name], "name": name, "layer": group.name, "weight_decay": decay})
    return result


def _resolved_rates(rates: Rates | Mapping[str, float], groups: Sequence[LayerGroup]) -> dict[str, float]:
    names = [group.name for group in groups]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"expected layer groups of different names, got {listed(names) or 'none'}")
    lrs = per_group(rates)(groups) if isinstance(rates, Mapping) else rates(groups)
    if set(lrs) != set(names):
        missing, unknown = [n for n in names if n not in lrs], [n for n in lrs if n not in names]
        raise ValueError(f"the rates are for other groups than there are: {listed(names)} (without a rate: "
                         f"{listed(missing) or 'none'}; unknown: {listed(unknown) or 'none'})")
    for name, lr in lrs.items():
        _check_rate(f"the rate of {name!r}", lr)
    return lrs


def current_rates(optimizer_or_param_groups: Optimizer | Sequence[dict]) -> dict[str, float]:
    """The rate that each group will use at the next step: 0 if none of its parameters requires a gradient."""
    return {name: float(group.get("lr", math.nan)) if trainable(group) else 0.0
            for name, group in named(optimizer_or_param_groups).items()}


class Description(pd.DataFrame):
    """A data frame that is printed whole: pandas would leave out columns in a narrow terminal."""

    def __repr__(self) -> str:
        return self.to_string(formatters={name: "{:.3g}".format for name in ("lr", "weight_decay") if name in self})


def describe(optimizer_or_param_groups: Optimizer | Sequence[dict], model: nn.Module | None = None) -> Description:
    """A table of what the next step will use: group, depth, tensors, parameters, lr, weight_decay, trainable.

    ``lr`` is 0 for a frozen group. With ``model``, its parameters that the optimizer does not have are the last row.
    """
    groups = named(optimizer_or_param_groups)
    if model is not None:
        in_optimizer = {id(p) for group in groups.values() for p in group["params"]}
        if missing := [p.detach() for p in model.parameters() if id(p) not in in_optimizer]:  # detached: nothing trains them
            groups["(not in the optimizer)"] = {"params": missing, "name": "(not in the optimizer)"}
    rates = current_rates(groups.values())
    layers = list(dict.fromkeys(group.get("layer", name) for name, group in groups.items()))
    return Description({"group": name, "depth": layers.index(group.get("layer", name)), "tensors": len(group["params"]),
                        "parameters": sum(p.numel() for p in group["params"]), "lr": rates[name],
                        "weight_decay": group.get("weight_decay", 0.0), "trainable": trainable(group)}
                       for name, group in groups.items())


def named(optimizer_or_param_groups: Optimizer | Sequence[dict]) -> dict[str, dict]:
    """Parameter groups under their ``name``, or ``group 0``, ``group 1``, … where they have none or one that is taken."""
    groups: dict[str, dict] = {}
    for i, group in enumerate(getattr(optimizer_or_param_groups, "param_groups", optimizer_or_param_groups)):
        name = group.get("name", f"group {i}")
        if isinstance(group["params"], Iterator):
            raise TypeError(f"the params of {name!r} can be read only once, and the optimizer has to; pass the optimizer, "
                            "or make them a list")
        groups[name if name not in groups else f"{name} (group {i})"] = group
    return groups


def trainable(group: dict) -> bool:
    """Whether any parameter of a parameter group requires a gradient."""
    return any(p.requires_grad for p in group["params"])


def _check_rate(what: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{what} must be a finite number, 0 or above, not {value}")
