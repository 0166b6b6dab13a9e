"""One learning rate for each layer: from layer groups to the parameter groups of any torch optimizer."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import pandas as pd
from torch import nn
from torch.optim import Optimizer

from layerlr_helpers.layers import LayerGroup, check_current, layer_groups
from layerlr_helpers.naming import assigned, listed, matching

Rates = Callable[[Sequence[LayerGroup]], dict[str, float]]


def uniform(lr: float) -> Rates:
    """The same learning rate for every group."""
    _check_rate("lr", lr)
    return lambda groups: {group.name: lr for group in groups}


def head_and_backbone(*, backbone_lr: float, head_lr: float) -> Rates:
    """Two rates: one for every head, the groups of depth 0, and one for all others.

    A model without a head of its own, such as a backbone, has only groups of the second kind.
    """
    _check_rate("backbone_lr", backbone_lr)
    _check_rate("head_lr", head_lr)
    return lambda groups: {name: head_lr if depth == 0 else backbone_lr for name, depth in depth_by_name(groups).items()}


def layer_decay(head_lr: float, decay: float) -> Rates:
    """``head_lr`` for the heads, the groups of depth 0, and ``decay`` times as much for each layer further from the output.

    Groups of one depth have one rate: two heads, or the same layer of two towers. This is discriminative fine-tuning
    (Howard and Ruder, ULMFiT, 2018, with decay 1/2.6) and the layer-wise learning-rate decay of ELECTRA (Clark et al.,
    2020) and BEiT (Bao et al., 2022). A ``decay`` outside (0, 1] is a ValueError.

    >>> layer_decay(1.0, 0.5)(layer_groups(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))))
    {'stem': 0.25, '1': 0.5, 'head': 1.0}
    """
    _check_rate("head_lr", head_lr)
    if not 0 < decay <= 1:
        raise ValueError(f"decay must be above 0 and at most 1, not {decay}; with 1 every group has the head's rate")
    return lambda groups: {name: head_lr * decay**depth for name, depth in depth_by_name(groups).items()}


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
                 weight_decay: float | None = None, decay_norm_and_bias: bool = True, no_weight_decay: Iterable[str] = (),
                 select: Callable[[nn.Parameter], bool] | None = None, lr_scale: bool = False) -> list[dict]:
    """Plain torch parameter groups with ``params``, ``lr``, ``name``, ``layer`` and its ``depth``.

    They go into any torch optimizer: ``torch.optim.AdamW(param_groups(model, layer_decay(1e-3, 0.7)))``. All groups
    are in it from the start, also those that a plan freezes at first, and with them the parameters that never train:
    ``fixed`` has the places in ``params`` of those that the model's author fixed, in groups that have any.

    Args:
        rates: one of the functions of this module, or a dictionary from group name to rate.
        weight_decay: of every group; it goes before the optimizer's argument of that name. None leaves the optimizer's own
            value, which by default is 0.01 in ``AdamW`` and 0 in ``SGD`` and ``Adam``.
        decay_norm_and_bias: False keeps parameters of fewer than two dimensions (norms, biases) free of weight decay.
            A group with both kinds then becomes two, ``NAME`` and ``NAME/no_decay``; ``layer`` is NAME in both.
        no_weight_decay: names or patterns of further parameters to keep free of it, e.g. ``["*pos_embed*"]``. What a
            model's own method ``no_weight_decay()`` names is kept free of it in any case.
        select: takes a parameter and says whether to include it, where other parameters get another optimizer, e.g.
            ``lambda p: p.ndim == 2``. Groups of which nothing is left are left out.
        lr_scale: True adds what the schedulers of timm read: ``lr_scale``, each group's part of the highest rate, and that
            rate as ``initial_lr``. Only for these: a scheduler of torch would start all groups from the highest rate.

    Rates for other groups than there are, one below 0 or not finite, a pattern that matches nothing, and a ``select`` that
    includes nothing are a ValueError.
    """
    groups = layer_groups(model_or_groups) if isinstance(model_or_groups, nn.Module) else list(model_or_groups)
    check_current(groups)
    if weight_decay is not None:
        _check_rate("weight_decay", weight_decay)
    lrs, depths = _resolved_rates(rates, groups), depth_by_name(groups)
    highest = max(lrs.values())
    spared = _spared(groups, decay_norm_and_bias, no_weight_decay)
    if weight_decay != 0:
        spared |= _spared_by_the_model(groups)
    result = []
    for group in groups:
        selected = [name for name, p in group.params.items() if select is None or select(p)]
        decayed, free = ([name for name in selected if (name in spared) == is_free] for is_free in (False, True))
        options = {"lr": lrs[group.name], "layer": group.name, "depth": depths[group.name]}
        if lr_scale:
            options |= {"lr_scale": lrs[group.name] / (highest or 1.0), "initial_lr": highest}
        if decayed:
            decay = {} if weight_decay is None else {"weight_decay": weight_decay}
            result.append(_param_group(group, decayed) | options | decay | {"name": group.name})
        if free:
            name = f"{group.name}/no_decay" if decayed else group.name
            result.append(_param_group(group, free) | options | {"weight_decay": 0.0, "name": name})
    if not result:
        raise ValueError(f"select includes none of the {sum(len(group.params) for group in groups)} parameters of the groups "
                         f"{listed(lrs)}; it takes a parameter and says whether to include it, e.g. lambda p: p.ndim == 2")
    return result


def _param_group(group: LayerGroup, names: Sequence[str]) -> dict:
    """The parameters of these names, and the places of those among them that the model's author fixed."""
    fixed = tuple(i for i, name in enumerate(names) if name in group.fixed)
    return {"params": [group.params[name] for name in names]} | ({"fixed": fixed} if fixed else {})


def depth_by_name(groups: Sequence[LayerGroup]) -> dict[str, int]:
    """The depth of each group by its name. Groups that were made by hand without one count from the end of the list."""
    if all(group.model is None and group.depth == 0 for group in groups):
        return {group.name: len(groups) - 1 - i for i, group in enumerate(groups)}
    return {group.name: group.depth for group in groups}


def _spared(groups: Sequence[LayerGroup], decay_norm_and_bias: bool, patterns: Iterable[str]) -> set[str]:
    """The names of the parameters that the user keeps free of weight decay."""
    params = {name: p for group in groups for name, p in group.params.items()}
    patterns = [patterns] if isinstance(patterns, str) else patterns
    spared = {name for pattern in patterns for name in matching(pattern, list(params), what="parameter")}
    return spared if decay_norm_and_bias else spared | {name for name, p in params.items() if p.ndim < 2}


def _spared_by_the_model(groups: Sequence[LayerGroup]) -> set[str]:
    """The names of the parameters that a model, or a model in it, keeps free of weight decay.

    The convention is that of BEiT, Swin and timm: a method ``no_weight_decay`` returns names or patterns, and a method
    ``no_weight_decay_keywords`` parts of names. They may list what is in other sizes of the model only.
    """
    spared: set[str] = set()
    for model in {id(group.model): group.model for group in groups if group.model is not None}.values():
        for prefix, module in model.named_modules():
            patterns = {pattern for method, form in (("no_weight_decay", "{}"), ("no_weight_decay_keywords", "*{}*"))
                        if callable(list_names := getattr(module, method, None)) for pattern in map(form.format, list_names())}
            if patterns:
                spared |= {f"{prefix}.{name}" if prefix else name for name, _ in module.named_parameters()
                           if any(name == pattern or fnmatchcase(name, pattern) for pattern in patterns)}
    return spared


def _resolved_rates(rates: Rates | Mapping[str, float], groups: Sequence[LayerGroup]) -> dict[str, float]:
    names = [group.name for group in groups]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"expected layer groups of different names, got {listed(names) or 'none'}")
    if not isinstance(rates, Mapping) and not callable(rates):
        raise TypeError(f"rates must be a function such as uniform(1e-3) or layer_decay(1e-3, 0.7), or a dictionary from group "
                        f"names to rates, not {rates!r}")
    lrs = per_group(rates)(groups) if isinstance(rates, Mapping) else rates(groups)
    if set(lrs) != set(names):
        missing, unknown = [n for n in names if n not in lrs], [n for n in lrs if n not in names]
        raise ValueError(f"the rates are for other groups than there are: {listed(names)} (without a rate: "
                         f"{listed(missing) or 'none'}; unknown: {listed(unknown) or 'none'})")
    for name, lr in lrs.items():
        _check_rate(f"the rate of {name!r}", lr)
    return lrs


def current_rates(optimizer_or_param_groups: Optimizer | Sequence[dict]) -> dict[str, float]:
    """The rate that each group will use at the next step: 0 if none of its parameters requires a gradient.

    It is not a number where a group has none yet, or an optimizer finds its own.
    """
    return {name: _number(group.get("lr")) if trainable(group) else 0.0
            for name, group in named(optimizer_or_param_groups).items()}


class Description(pd.DataFrame):
    """A data frame that is printed whole: pandas would leave out columns in a narrow terminal."""

    def __repr__(self) -> str:
        return self.to_string(formatters={name: "{:.3g}".format for name in ("lr", "weight_decay") if name in self})


def describe(optimizer_or_param_groups: Optimizer | Sequence[dict], model: nn.Module | None = None) -> Description:
    """A table of what the next step will use: group, depth, tensors, parameters, lr, weight_decay, trainable.

    ``depth`` counts the layers to the output, 0 for a head; groups that were not made by ``param_groups`` have none. ``lr``
    is 0 for a frozen group. Of groups that are in no optimizer yet, what that will decide is not a number. If the model's
    author fixed parameters, a column ``fixed`` counts them. With ``model``, its parameters that the optimizer does not have
    are the last row.
    """
    groups = named(optimizer_or_param_groups)
    if model is not None:
        in_optimizer = {id(p) for group in groups.values() for p in group["params"]}
        if missing := [p.detach() for p in model.parameters() if id(p) not in in_optimizer]:  # detached: nothing trains them
            groups["(not in the optimizer)"] = {"params": missing, "name": "(not in the optimizer)", "weight_decay": 0.0}
    no_decay = 0.0 if hasattr(optimizer_or_param_groups, "param_groups") else None  # an optimizer that knows no weight decay
    rates = current_rates(groups.values())
    table = Description({"group": name, "depth": group.get("depth"), "tensors": len(group["params"]),
                         "parameters": sum(p.numel() for p in group["params"]), "lr": rates[name],
                         "weight_decay": _number(group.get("weight_decay", no_decay)), "trainable": trainable(group)}
                        for name, group in groups.items())
    table["depth"] = table["depth"].astype("Int64")  # whole numbers, also where one is missing
    if any("fixed" in group for group in groups.values()):
        table["fixed"] = [_size_of_fixed(group) for group in groups.values()]
    return table


def _size_of_fixed(group: dict) -> int:
    """Number of scalar parameters that the model's author fixed, without those that the user trains nevertheless."""
    return sum(group["params"][i].numel() for i in group.get("fixed", ()) if not group["params"][i].requires_grad)


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


def _number(value) -> float:
    return math.nan if value is None else float(value)


def _check_rate(what: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{what} must be a finite number, 0 or above, not {value}")
