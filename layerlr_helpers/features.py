"""Features of a frozen backbone, computed once: each epoch of head training then costs next to nothing.

    groups = layer_groups(model)
    ProgressiveUnfreezing(groups, UnfreezePlan({"head": 0})).apply(0)        # freezes all but the head
    features = cache_features(model, train_data, groups)
    head = head_module(groups)                                               # the model's own module, not a copy
    fit(head, torch.optim.AdamW(head.parameters(), 3e-3), DataLoader(features, 20, shuffle=True), epochs=20)
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from layerlr_helpers.guards import preserved
from layerlr_helpers.layers import LayerGroup, layer_groups
from layerlr_helpers.naming import listed
from layerlr_helpers.tracing import tensors_in, unwrap

_LOOKED_AT_TWICE = 8  # examples of the data that are drawn twice, to see whether they are the same each time


def head_module(groups: Sequence[LayerGroup]) -> nn.Module:
    """The only module of the last group: what is trained on cached features, e.g. with ``fit``.

    Raises:
        ValueError: no groups, a last group of several modules, or one that is only a part of its module.
    """
    if not groups:
        raise ValueError("there are no groups, so there is no head")
    last = groups[-1]
    if len(last.modules) != 1:
        raise ValueError(f"the last group {last.name!r} has {len(last.modules)} modules ({listed(last.modules) or 'none'}), "
                         "and features can be cached only before a head that is a single module")
    module = next(iter(last.modules.values()))
    if {id(p) for p in module.parameters()} != {id(p) for p in last.params.values()}:
        raise ValueError(f"the last group {last.name!r} is only a part of its module {next(iter(last.modules))!r}; make the "
                         "groups with granularity='stage'")
    return module


@torch.no_grad()
def cache_features(model: nn.Module, data: Dataset, groups: Sequence[LayerGroup] | None = None, *,
                   batch_size: int = 256) -> TensorDataset:
    """What the head of ``model`` is given for every example of ``data``, in order: a dataset of (features, label).

    The backbone runs in eval mode, so BatchNorm normalises by its stored statistics and dropout does nothing. That is
    what a frozen backbone does under ``ProgressiveUnfreezing(…, batch_norm="freeze")``; with frozen weights alone and
    ``model.train()`` the features would depend on the batch, and there would be nothing to cache. The features stay
    right only as long as the backbone stays as it is: unfreeze a layer, and they are out of date without a word.

    Features are on the CPU and in memory: 4 bytes a number, for ResNet-18 2 kB an image. The model is afterwards
    what it was, each submodule's mode too, and torch's random numbers are not touched by the loader.

    Args:
        data: gives (input, label); an input is a tensor or a dictionary of keyword arguments.
        groups: of the model, from ``layer_groups``, which is called if this is None.

    Raises:
        ValueError: a parameter outside the head still asks for a gradient (named), the head shares a parameter with
            the backbone, the head is no single module, something after the head changes its output, the head is
            given something else than one tensor, or the data give another input each time (random augmentation).
    """
    groups = layer_groups(model) if groups is None else groups
    head = head_module(groups)
    _check_frozen(unwrap(model), head, groups[-1])
    _check_repeatable(data)
    given: list[tuple] = []
    seen: list[Tensor] = []
    handles = [head.register_forward_pre_hook(lambda module, args: given.append(args)),
               head.register_forward_hook(lambda module, args, output: seen.append(output))]
    modes = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    features, labels = [], []
    try:
        model.eval()
        for inputs, batch_labels in DataLoader(data, batch_size, generator=torch.Generator()):
            given.clear()
            seen.clear()
            output = _call(model, inputs, device)
            features.append(_only_input(given, seen, output).cpu())
            labels.append(batch_labels)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    if not features:
        raise ValueError("the data have no example, so there are no features to cache")
    return TensorDataset(torch.cat(features), torch.cat(labels))


def _check_frozen(model: nn.Module, head: nn.Module, group: LayerGroup) -> None:
    inside = {id(module) for module in head.modules()}
    mine = {id(p) for p in group.params.values()}
    outside = [(f"{prefix}.{name}" if prefix else name, p) for prefix, module in model.named_modules(remove_duplicate=False)
               if id(module) not in inside for name, p in module.named_parameters(recurse=False)]
    if shared := [name for name, p in outside if id(p) in mine]:
        raise ValueError(f"the head shares {listed(shared)} with the backbone, so training it changes the features")
    if trainable := list(dict.fromkeys(name for name, p in outside if p.requires_grad)):
        raise ValueError(f"{len(trainable)} parameters of the backbone are still trainable, so its features would not stay "
                         f"as they are: {listed(trainable, 6)}; freeze them first, e.g. with "
                         f"ProgressiveUnfreezing(groups, UnfreezePlan({{{group.name!r}: 0}})).apply(0)")


def _check_repeatable(data: Dataset) -> None:
    """Draw a few examples twice; the random numbers that this takes are given back."""
    with torch.random.fork_rng(devices=[]):
        for i in range(min(_LOOKED_AT_TWICE, len(data))):
            if any(not torch.equal(a, b) for a, b in zip(_tensors(data[i][0]), _tensors(data[i][0]), strict=True)):
                raise ValueError(f"the data give another input each time (example {i} differs from itself), as random "
                                 "augmentation does; cached, each would stay for ever what it was the first time")


def _tensors(inputs) -> Iterable[Tensor]:
    return inputs.values() if isinstance(inputs, Mapping) else (inputs,)


def _call(model: nn.Module, inputs, device: torch.device):
    if isinstance(inputs, Mapping):
        return model(**{name: value.to(device) for name, value in inputs.items()})
    return model(inputs.to(device))


def _only_input(given: list[tuple], seen: list, output) -> Tensor:
    """The one tensor that the head was given in this pass, after checking that the head has the last word."""
    if len(given) != 1 or len(given[0]) != 1 or not isinstance(given[0][0], Tensor):
        raise ValueError(f"the head ran {len(given)} times on {[len(args) for args in given]} positional inputs; features can "
                         "be cached only before a head that runs once on one tensor")
    output = getattr(output, "logits", output)
    if not (isinstance(output, Tensor) and output.shape == seen[0].shape and torch.equal(output, seen[0])):
        raise ValueError("the model's output is not the head's output: something runs after the head or around it, which "
                         "training the head alone would leave out")
    return given[0][0].detach()


@torch.no_grad()
def layer_features(model: nn.Module, data: Dataset, groups: Sequence[LayerGroup], *,
                   batch_size: int = 256) -> dict[str, np.ndarray]:
    """What each group passes on, in eval mode: float32 arrays [N, channels], averaged over all places or tokens.

    A group's output is that of the last of its modules to run; a group of which no module runs is left out. Three
    dimensions are read as [N, tokens, channels], more as [N, channels, height, width].
    """
    device = next(model.parameters()).device
    kept: dict[str, list[Tensor]] = {group.name: [] for group in groups}
    last: dict[str, Tensor] = {}

    def keep(name):
        def hook(module, args, output):
            if (tensor := next(tensors_in(output), None)) is not None:
                last[name] = tensor
        return hook

    handles = [module.register_forward_hook(keep(group.name)) for group in groups for module in group.modules.values()]
    try:
        with preserved(model):
            model.eval()
            # A generator of its own: a loader without one takes a number from torch's global generator.
            for inputs, _ in DataLoader(data, batch_size, generator=torch.Generator()):
                last.clear()
                model(inputs.to(device))
                for name, output in last.items():
                    kept[name].append(_channels(output).float().cpu())
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts).numpy() for name, parts in kept.items() if parts}


def _channels(output: Tensor) -> Tensor:
    if output.ndim == 3:
        return output.mean(1)
    return output.flatten(2).mean(2) if output.ndim > 3 else output
