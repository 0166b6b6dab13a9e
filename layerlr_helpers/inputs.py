"""What to call a model with, to look at one forward pass: what the model itself declares, else a guess from its layers."""

from collections.abc import Callable, Iterator, Mapping
from itertools import product

import torch
from torch import Tensor, nn

_LAYERS = (nn.Embedding, nn.Conv2d, nn.Conv1d, nn.Conv3d, nn.RNNBase, nn.Linear)  # whose input's shape we know
_IMAGE_SIZES = (224, 64, 32, 299)  # the commonest first


def candidate_inputs(model: nn.Module) -> Iterator:
    """Inputs that the model may take, the likeliest first: tensors, tuples of arguments, dictionaries of keyword arguments."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    for declared in _declared(model):
        yield mapped(declared, lambda tensor: tensor.to(like) if tensor.is_floating_point() else tensor.to(like.device))
    yield from _guessed(model, like)


def mapped(inputs, change: Callable[[Tensor], Tensor]):
    """The same inputs with every tensor in them changed."""
    if isinstance(inputs, Tensor):
        return change(inputs)
    if isinstance(inputs, Mapping):
        return {name: mapped(value, change) for name, value in inputs.items()}
    return type(inputs)(mapped(value, change) for value in inputs) if type(inputs) in (tuple, list) else inputs


def described(inputs) -> str:
    """An input in words, for an error."""
    if isinstance(inputs, Tensor):
        return f"a {str(inputs.dtype).removeprefix('torch.')} tensor of shape {list(inputs.shape)}"
    if isinstance(inputs, Mapping):
        return "a dictionary of " + ", ".join(map(str, inputs))
    return f"{len(inputs)} arguments" if isinstance(inputs, (tuple, list)) else type(inputs).__name__


def _declared(model: nn.Module) -> Iterator:
    """Inputs that models carry with them under the attribute names that several libraries agree on."""
    for name in ("example_input_array", "dummy_inputs"):
        value = getattr(model, name, None)
        if isinstance(value, (Tensor, tuple, Mapping)):
            yield value
    for name in ("default_cfg", "pretrained_cfg"):
        settings = getattr(model, name, None)
        size = settings.get("input_size") if isinstance(settings, Mapping) else getattr(settings, "input_size", None)
        if size:
            yield torch.zeros(1, *size)


def _guessed(model: nn.Module, like: Tensor) -> Iterator[Tensor]:
    """Inputs that the first layer of each kind would take, in the order in which the kinds occur in the model."""
    first_layers: dict[type, nn.Module] = {}
    for layer, kind in product(model.modules(), _LAYERS):
        if isinstance(layer, kind):
            first_layers.setdefault(kind, layer)
    for kind, layer in first_layers.items():
        if kind is nn.Embedding:
            yield torch.zeros(1, 8, dtype=torch.long, device=like.device)
        elif kind is nn.Conv2d:
            # Attributes may be in any order; an image has fewer channels than the features that are computed from it.
            fewest = min(conv.in_channels for conv in model.modules() if isinstance(conv, nn.Conv2d))
            sizes = dict.fromkeys([*_image_sizes(model), *_IMAGE_SIZES])
            for channels, size in product(dict.fromkeys((layer.in_channels, fewest)), sizes):
                yield like.new_zeros(1, channels, size, size)
        elif kind is nn.Conv1d:
            yield like.new_zeros(1, layer.in_channels, 1024)
            if layer.in_channels == 1:  # a sound, to which the model itself adds the channel
                yield like.new_zeros(1, 4096)
        elif kind is nn.Conv3d:
            yield like.new_zeros(1, layer.in_channels, 16, 64, 64)
        elif kind is nn.RNNBase:
            yield like.new_zeros(1, 8, layer.input_size)
        else:
            yield like.new_zeros(1, layer.in_features)
            yield like.new_zeros(1, 8, layer.in_features)


def _image_sizes(model: nn.Module) -> list[int]:
    """Sizes of images that parts of the model say they were made for."""
    sizes = [getattr(module, name, None) for module in model.modules() for name in ("image_size", "img_size")]
    sizes = [size[0] if isinstance(size, (tuple, list)) and size else size for size in sizes]
    return list(dict.fromkeys(size for size in sizes if isinstance(size, int) and size > 0))
