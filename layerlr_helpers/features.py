"""What layers pass on: features of a frozen backbone, to train a head on, and features of every layer, to look at."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from layerlr_helpers.batches import call_model, logits_of
from layerlr_helpers.guards import preserved
from layerlr_helpers.layers import LayerGroup, layer_groups
from layerlr_helpers.naming import listed
from layerlr_helpers.param_groups import depth_by_name
from layerlr_helpers.tracing import tensors_in, unwrap

_SAMPLE = 16  # examples that are looked at twice, to see whether anything is random; from one alone, dropout may take nothing


def head_module(groups: Sequence[LayerGroup]) -> nn.Module:
    """The only module of the only head, the model's own and no copy: what is trained on cached features.

    No head or several of them, a head of several modules, and one that is only a part of its module are a ValueError.
    """
    return next(iter(_only_head(groups).modules.values()))


def _only_head(groups: Sequence[LayerGroup]) -> LayerGroup:
    depths = depth_by_name(groups)
    heads = [group for group in groups if depths[group.name] == 0]
    for head in heads:
        if parts := [name for name, module in head.modules.items()
                     if not _ids(module.parameters()) <= _ids(head.params.values())]:
            raise ValueError(f"the head {head.name!r} is only a part of its module {parts[0]!r}; make the groups with "
                             "granularity='stage'")
    if len(heads) != 1:
        raise ValueError(f"the model has {len(heads)} heads ({listed(head.name for head in heads) or 'none'}), and features "
                         f"can be cached only before a single one; the groups are {listed(depths)}")
    (head,) = heads
    beside = _ids(head.params.values()) - _ids(p for module in head.modules.values() for p in module.parameters())
    if len(head.modules) != 1 or beside:
        raise ValueError(f"the head {head.name!r} has {len(head.modules)} modules ({listed(head.modules) or 'none'}) and "
                         f"{len(beside)} parameters besides, and features can be cached only before a head of one module")
    return head


def _ids(params: Iterable[nn.Parameter]) -> set[int]:
    return {id(p) for p in params}


@torch.no_grad()
def cache_features(model: nn.Module, data: Dataset, groups: Sequence[LayerGroup] | None = None, *,
                   batch_size: int = 256) -> TensorDataset:
    """Compute once what a frozen backbone gives the head; training the head for an epoch then costs next to nothing.

    Returns a dataset of (features, label) in the order of ``data``, on the CPU and in memory: 4 bytes a number, for
    ResNet-18 2 kB an image. The backbone runs in eval mode, as under ``ProgressiveUnfreezing(…, batch_norm="freeze")``: in
    train mode BatchNorm's output would depend on the batch. The features are right only as long as the backbone stays as
    it is. The model is afterwards what it was, and torch's random numbers are not touched by the loader.

    >>> import layerlr_helpers as ll
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> groups = ll.layer_groups(model)
    >>> frozen = ll.freeze(groups, "stem")
    >>> features = cache_features(model, TensorDataset(torch.ones(6, 4), torch.zeros(6)), groups)
    >>> features.tensors[0].shape, head_module(groups)  # train the head on them, for example with fit
    (torch.Size([6, 3]), Linear(in_features=3, out_features=2, bias=True))

    ``data`` gives (input, label); an input is a tensor or a dictionary of keyword arguments. A backbone that is not frozen or
    shares a parameter with the head, a head that is no single module on one tensor, something after the head that changes
    its output, and data that give another input each time (random augmentation) are a ValueError.
    """
    groups = layer_groups(model) if groups is None else groups
    head = head_module(groups)
    _check_frozen(unwrap(model), head, _only_head(groups).name)
    with torch.random.fork_rng(devices=[]):
        for i in range(min(_SAMPLE, len(data))):
            if _is_random(lambda i=i: data[i][0]):
                raise ValueError(f"the data give another input each time (example {i} differs from itself), as random "
                                 "augmentation does; cached, each would stay for ever what it was the first time")
    features, labels = [], []
    calls: list[tuple] = []  # the head's inputs and output, each time that it runs
    with preserved(model), head.register_forward_hook(lambda module, args, output: calls.append((args, output))):
        model.eval()
        for inputs, batch_labels in DataLoader(data, batch_size, generator=torch.Generator()):
            calls.clear()
            output = call_model(model, inputs)
            features.append(_only_input(calls, output).cpu())
            labels.append(batch_labels)
    if not features:
        raise ValueError("the data have no example, so there are no features to cache")
    return TensorDataset(torch.cat(features), torch.cat(labels))


def cached_head(model: nn.Module, groups: Sequence[LayerGroup], data: Dataset,
                unfreezing=None) -> tuple[nn.Module, TensorDataset] | None:
    """Return (head, cached features of ``data``) if only the head trains and the backbone is deterministic, else None.

    With the same optimizer and the same ``unfreezing``, training this head on them is then training the whole model.
    """
    if unfreezing is None or unfreezing.batch_norm not in ("freeze", "hold") or hasattr(unfreezing, "report"):
        return None  # one that waits for reports will unfreeze more
    try:
        if set(unfreezing.plan.first_steps) != {_only_head(groups).name}:
            return None
        unfreezing.apply(0)
        inputs, _ = default_collate([data[i] for i in range(min(_SAMPLE, len(data)))])
        with torch.no_grad(), preserved(model):
            model.train()
            if _is_random(lambda: logits_of(call_model(model, inputs))):
                return None
        return head_module(groups), cache_features(model, data, groups)
    except ValueError:  # there is no single head of a single module, or something runs after it, or the data are random
        return None


def _is_random(compute: Callable[[], object]) -> bool:
    """Whether a tensor, or a dictionary of tensors, is another one when it is computed again."""
    first, second = compute(), compute()
    return not all(map(torch.equal, tensors_in(first), tensors_in(second)))


def _check_frozen(model: nn.Module, head: nn.Module, head_name: str) -> None:
    head_modules = {id(module) for module in head.modules()}
    head_params = _ids(head.parameters())
    backbone = [(f"{prefix}.{name}" if prefix else name, p) for prefix, module in model.named_modules(remove_duplicate=False)
                if id(module) not in head_modules for name, p in module.named_parameters(recurse=False)]
    if shared := [name for name, p in backbone if id(p) in head_params]:
        raise ValueError(f"the head shares {listed(shared)} with the backbone, so training it changes the features")
    if trainable := list(dict.fromkeys(name for name, p in backbone if p.requires_grad)):
        raise ValueError(f"{len(trainable)} parameters of the backbone are still trainable, so its features would not stay "
                         f"as they are: {listed(trainable, 6)}; freeze them first, e.g. with "
                         f"ProgressiveUnfreezing(groups, UnfreezePlan({{{head_name!r}: 0}})).apply(0)")


def _only_input(calls: list[tuple], output) -> Tensor:
    """The one tensor that the head was given in this pass, after checking that the head has the last word."""
    if len(calls) != 1 or len(calls[0][0]) != 1 or not isinstance(calls[0][0][0], Tensor):
        raise ValueError(f"the head ran {len(calls)} times on {[len(inputs) for inputs, _ in calls]} positional inputs; "
                         "features can be cached only before a head that runs once on one tensor")
    (features,), head_output = calls[0]
    logits = logits_of(output)
    if not (isinstance(logits, Tensor) and logits.shape == head_output.shape and torch.equal(logits, head_output)):
        raise ValueError("the model's output is not the head's output: something runs after the head or around it, which "
                         "training the head alone would leave out")
    return features.detach()


@torch.no_grad()
def layer_features(model: nn.Module, data: Dataset, groups: Sequence[LayerGroup], *,
                   batch_size: int = 256) -> dict[str, np.ndarray]:
    """What each group passes on, in eval mode: float32 arrays [N, channels], averaged over positions or tokens.

    A group's output is that of the last of its modules to run; a group of which no module runs is left out. Three
    dimensions are read as [N, tokens, channels], more as [N, channels, height, width]. If the inputs have an
    ``attention_mask`` [N, tokens], only tokens where it is 1 are averaged, and no padding.
    """
    features: dict[str, list[Tensor]] = {group.name: [] for group in groups}
    outputs: dict[str, Tensor] = {}

    def keep_output(name, module, args, output):
        if (tensor := next(tensors_in(output), None)) is not None:
            outputs[name] = tensor

    with preserved(model), ExitStack() as hooks:
        for group in groups:
            for module in group.modules.values():
                hooks.enter_context(module.register_forward_hook(partial(keep_output, group.name)))
        model.eval()
        # A generator of its own: a loader without one takes a number from torch's global generator.
        for inputs, _ in DataLoader(data, batch_size, generator=torch.Generator()):
            outputs.clear()
            call_model(model, inputs)
            mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
            for name, output in outputs.items():
                features[name].append(_channels(output, mask).float().cpu())
    return {name: torch.cat(parts).numpy() for name, parts in features.items() if parts}


def _channels(output: Tensor, mask: Tensor | None) -> Tensor:
    if output.ndim == 3 and mask is not None and mask.shape == output.shape[:2]:
        weights = mask[:, :, None].to(output)
        return (output * weights).sum(1) / weights.sum(1).clamp(min=1)  # a text without a token has features of 0
    if output.ndim == 3:
        return output.mean(1)
    return output.flatten(2).mean(2) if output.ndim > 3 else output
