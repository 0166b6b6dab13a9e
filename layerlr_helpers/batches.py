"""Batches of every common form: taking them apart, moving them to the model, calling the model on them.

What ``fit`` and ``evaluate`` take as a batch is, in one place, what :func:`split_batch` takes.
"""

import inspect
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from layerlr_helpers.naming import listed
from layerlr_helpers.tracing import tensors_in, unwrap

FORMS = ("a batch is (inputs, labels), a dictionary of keyword arguments with the labels under 'labels', or inputs alone for "
         "a model that returns its own loss; inputs are a tensor, several of them in a tuple or list, or a dictionary")


class Accumulated(list):
    """Batches that make one optimizer step together, with the gradient of all their examples at once."""


def split_batch(batch) -> tuple:
    """Return a batch's ``(inputs, labels)``; labels are None if it has none, and another form is a ValueError."""
    if isinstance(batch, Mapping):
        return {name: value for name, value in batch.items() if name != "labels"}, batch.get("labels")
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, (tuple, list)) and len(batch) in (1, 2):
        return batch[0], batch[1] if len(batch) == 2 else None
    parts = f" of {len(batch)}: {listed([_what(part) for part in batch])}" if isinstance(batch, (tuple, list)) else ""
    raise ValueError(f"{FORMS}. This one is a {type(batch).__name__}{parts}; give the loader a collate_fn that leaves out "
                     "what the model does not need")


def batch_size(inputs, labels) -> int:
    """The number of examples in a batch: the length of the first tensor in the labels or, without any, in the inputs."""
    return next((len(tensor) for tensor in tensors_in([labels, inputs]) if tensor.ndim > 0), 1)


def to_device(value, device: torch.device):
    """The same nest of dictionaries, tuples and lists with its tensors on ``device``; what is no tensor stays as it is."""
    if isinstance(value, Mapping):
        return {name: to_device(part, device) for name, part in value.items()}
    if hasattr(value, "to"):  # also what knows best how to move itself, such as a PackedSequence
        return value.to(device)
    return _of_same_type(value, lambda part: to_device(part, device))


def call_model(model: nn.Module, inputs):
    """Call ``model`` on a batch's inputs, on the model's device.

    A dictionary goes in as keyword arguments, a tuple as positional arguments, and a list (which a DataLoader makes of a
    tuple) too, if ``forward`` takes as many; else the list is one argument. Keywords that ``forward`` does not take are a
    ValueError.
    """
    inputs = to_device(inputs, device_of(model))
    if isinstance(inputs, Mapping):
        if unknown := [name for name in inputs if not takes_keyword(model, name)]:
            raise ValueError(f"the batch has {listed(unknown)}, which {type(unwrap(model)).__name__}.forward does not take (it "
                             f"takes {listed(list(_parameters(model))) or 'nothing'}); give the loader a collate_fn that "
                             "leaves it out, or names it as forward does")
        return model(**inputs)
    if type(inputs) is tuple or (type(inputs) is list and len(inputs) > 1 and _takes_arguments(model, inputs)):
        return model(*inputs)
    return model(inputs)


def logits_of(output):
    """The logits in a model's output: its ``logits``, the only entry of a tuple, or else the output itself."""
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if type(output) in (tuple, list) and len(output) == 1:
        return output[0]
    return getattr(output, "logits", output)


def loss_of(output) -> Tensor | None:
    """The loss that the model computed itself, if its output has one: its ``loss``, or the only number in a tuple."""
    if type(output) is tuple:
        return next((part for part in output if isinstance(part, Tensor) and part.ndim == 0), None)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) else None


def map_output(function: Callable[[Tensor], Tensor], output):
    """A model's output with ``function`` of its tensor, or of each in a tuple or list; anything else stays as it is."""
    if isinstance(output, Tensor):
        return function(output)
    return _of_same_type(output, lambda part: map_output(function, part))


def takes_keyword(model: nn.Module, name: str) -> bool:
    """Whether the model's ``forward`` takes this keyword argument."""
    parameters = _parameters(model)
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter."""
    return next(model.parameters()).device


def _takes_arguments(model: nn.Module, arguments: list) -> bool:
    try:
        inspect.Signature(list(_parameters(model).values())).bind(*arguments)
    except TypeError:
        return False
    return True


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(unwrap(model).forward).parameters


def _of_same_type(value, function: Callable):
    """A tuple, named tuple or list with ``function`` of each entry; anything else as it is."""
    if not isinstance(value, (tuple, list)):
        return value
    parts = map(function, value)
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


def _what(value) -> str:
    return f"tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
