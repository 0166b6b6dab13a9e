"""One forward pass, watched: in which order the modules run, at which resolution, and which parameters are used.

The order of attributes in a class says nothing of the order of execution, so we look. The model comes back as it
was: modes, buffers, ``requires_grad``, gradients, hooks and random numbers.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

GUESSED_SIZES = (224, 64, 32, 299)  # squares of pixels to try, the commonest first


@dataclass
class Trace:
    """What a forward pass showed. Modules are known by their name in ``model.named_modules()``."""

    order: dict[str, int] = field(default_factory=dict)  # place of a module's first call among all first calls
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # shape of a module's first tensor output
    used: set[int] = field(default_factory=set)  # id of each parameter that the output depends on


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside ``torch.compile`` and (Distributed)DataParallel wrappers."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def trace(model: nn.Module, example_input=None) -> Trace:
    """Run ``model`` once in eval mode and record a :class:`Trace`.

    ``example_input`` is a tensor, a tuple of arguments or a dictionary of keyword arguments; None guesses one from
    the first layer.

    Raises:
        ValueError: no input was given and none of the guesses ran (says what was tried).
    """
    if example_input is not None:
        return _run(model, example_input)
    failures = []
    for guess in _guesses(model):
        try:
            return _run(model, guess)
        except Exception as error:  # a wrong guess may fail in any way
            failures.append(f"a {str(guess.dtype).removeprefix('torch.')} tensor of shape {list(guess.shape)} "
                            f"({type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''})")
    tried = "tried " + "; ".join(failures) if failures else "its first layer does not tell what it takes"
    raise ValueError(f"cannot guess an input for {type(model).__name__}: {tried}. Pass example_input=, a tensor, a tuple "
                     "of arguments or a dictionary of keyword arguments that the model can be called with.")


def _run(model: nn.Module, example_input) -> Trace:
    found = Trace()

    def on_start(name):
        def hook(module, args):
            found.order.setdefault(name, len(found.order))
        return hook

    def on_end(name):
        def hook(module, args, output):
            tensor = next(_tensors(output), None)
            if tensor is not None:
                found.shapes.setdefault(name, tuple(tensor.shape))
        return hook

    with _as_it_was(model):
        handles = []
        try:
            for name, module in model.named_modules():
                handles.append(module.register_forward_pre_hook(on_start(name)))
                handles.append(module.register_forward_hook(on_end(name)))
            found.used = _leaves(_call(model, example_input))
        finally:
            for handle in handles:
                handle.remove()
    return found


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Eval mode, every parameter asking for a gradient, forked random numbers; all put back at the end."""
    modes = {module: module.training for module in model.modules()}
    wanted = {p: p.requires_grad for p in model.parameters()}
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        try:
            model.eval()
            for p in wanted:
                if p.is_floating_point() or p.is_complex():
                    p.requires_grad_(True)
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    if not torch.equal(buffer, before):
                        buffer.copy_(before)
            for p, requires_grad in wanted.items():
                p.requires_grad_(requires_grad)
            for module, training in modes.items():
                module.training = training


def _call(model: nn.Module, example_input):
    if isinstance(example_input, Mapping):
        return model(**example_input)
    return model(*example_input) if isinstance(example_input, (tuple, list)) else model(example_input)


def _guesses(model: nn.Module) -> Iterator[Tensor]:
    for layer in model.modules():
        weight = next(iter(layer.parameters(recurse=False)), None)
        if isinstance(layer, nn.Embedding):
            yield torch.zeros(1, 8, dtype=torch.long, device=weight.device)
        elif isinstance(layer, nn.Linear):
            yield weight.new_zeros(1, layer.in_features)
        elif isinstance(layer, nn.Conv2d):
            for size in GUESSED_SIZES:
                yield weight.new_zeros(1, layer.in_channels, size, size)
        elif isinstance(layer, nn.Conv1d):
            yield weight.new_zeros(1, layer.in_channels, 1024)
        else:
            continue
        return


def _tensors(output) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for part in output.values():
            yield from _tensors(part)
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from _tensors(part)


def _leaves(output) -> set[int]:
    """The ids of the tensors that the graph behind ``output`` starts from."""
    todo = [tensor.grad_fn for tensor in _tensors(output) if tensor.grad_fn is not None]
    seen, leaves = set(todo), set()
    while todo:
        node = todo.pop()
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                todo.append(parent)
    return leaves
