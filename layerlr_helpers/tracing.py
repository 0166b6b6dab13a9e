"""One forward pass, watched: in which order the modules run, at which resolution, and which parameters are used.

The order of attributes in a class says nothing of the order of execution, so we look. The model comes back as it
was: modes, buffers, ``requires_grad``, gradients, hooks and random numbers.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from layerlr_helpers.guards import preserved

GUESSED_SIZES = (224, 64, 32, 299)  # squares of pixels to try, the commonest first


@dataclass
class Trace:
    """What a forward pass showed. Modules are known by their name in ``model.named_modules()``, parameters by id."""

    order: dict[str, int] = field(default_factory=dict)  # moment of each module's first call
    uses: dict[int, int] = field(default_factory=dict)  # moment at which each parameter first entered a computation
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # shape of a module's first tensor output
    used: set[int] = field(default_factory=set)  # the parameters that the output depends on

    def moment(self) -> int:
        """The next tick of the clock that orders calls and uses."""
        return len(self.order) + len(self.uses)


class _WatchParameters(TorchFunctionMode):
    """Notes when each parameter first enters a computation: some belong to no module that is called."""

    def __init__(self, model: nn.Module, found: Trace):
        super().__init__()
        self.watched, self.found = {id(p) for p in model.parameters()}, found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        new = [id(t) for t in tensors_in((args, kwargs)) if id(t) in self.watched and id(t) not in self.found.uses]
        if new and any(t.requires_grad for t in tensors_in(result)):  # reading a shape or a device is no use
            for key in new:
                self.found.uses.setdefault(key, self.found.moment())
        return result


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
                            f"({type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]})")
    tried = "tried " + "; ".join(failures) if failures else "none of its layers tells what it takes"
    raise ValueError(f"cannot guess an input for {type(model).__name__}: {tried}. Pass example_input=, a tensor, a tuple "
                     "of arguments or a dictionary of keyword arguments that the model can be called with.")


def _run(model: nn.Module, example_input) -> Trace:
    found = Trace()

    def on_start(name):
        def hook(module, args):
            found.order.setdefault(name, found.moment())
        return hook

    def on_end(name):
        def hook(module, args, output):
            tensor = next(tensors_in(output), None)
            if tensor is not None:
                found.shapes.setdefault(name, tuple(tensor.shape))
        return hook

    with _as_it_was(model), _not_compiled(model):
        handles = []
        try:
            for name, module in model.named_modules():
                handles.append(module.register_forward_pre_hook(on_start(name)))
                handles.append(module.register_forward_hook(on_end(name)))
            with _WatchParameters(model, found):
                output = _call(model, example_input)
            found.used = _leaves(output) | found.uses.keys()
        finally:
            for handle in handles:
                handle.remove()
    return found


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Eval mode, every parameter asking for a gradient, forked random numbers; all put back at the end."""
    wanted = {p: p.requires_grad for p in model.parameters()}
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.enable_grad(), preserved(model):
        try:
            model.eval()
            for p in wanted:
                if p.is_floating_point() or p.is_complex():
                    p.requires_grad_(True)
            yield
        finally:
            for p, requires_grad in wanted.items():
                p.requires_grad_(requires_grad)


def _not_compiled(model: nn.Module) -> AbstractContextManager:
    """Let parts that were compiled run as they are written: compiling them for one look would take minutes."""
    compiled = any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None for m in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def _call(model: nn.Module, example_input):
    if isinstance(example_input, Mapping):
        return model(**example_input)
    return model(*example_input) if isinstance(example_input, (tuple, list)) else model(example_input)


def _guesses(model: nn.Module) -> Iterator[Tensor]:
    """Inputs that the first layer of each kind would take, in the order in which the kinds are found."""
    kinds = (nn.Embedding, nn.Conv2d, nn.Conv1d, nn.RNNBase, nn.Linear)
    found: dict[type, list[nn.Module]] = {}
    for layer in model.modules():
        for kind in kinds:
            if isinstance(layer, kind):
                found.setdefault(kind, []).append(layer)
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    for kind, (layer, *others) in found.items():
        if kind is nn.Embedding:
            yield torch.zeros(1, 8, dtype=torch.long, device=like.device)
        elif kind is nn.Conv2d:  # attributes may be in any order; an image has fewer channels than what comes of it
            for channels in dict.fromkeys((layer.in_channels, min(c.in_channels for c in (layer, *others)))):
                for size in GUESSED_SIZES:
                    yield like.new_zeros(1, channels, size, size)
        elif kind is nn.Conv1d:
            yield like.new_zeros(1, layer.in_channels, 1024)
        elif kind is nn.RNNBase:
            yield like.new_zeros(1, 8, layer.input_size)
        else:
            yield like.new_zeros(1, layer.in_features)
            yield like.new_zeros(1, 8, layer.in_features)


def tensors_in(output) -> Iterator[Tensor]:
    """The tensors in what a module returned: in tuples, lists and dictionaries of any depth."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for part in output.values():
            yield from tensors_in(part)
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from tensors_in(part)


def _leaves(output) -> set[int]:
    """The ids of the tensors that the graph behind ``output`` starts from."""
    todo = [tensor.grad_fn for tensor in tensors_in(output) if tensor.grad_fn is not None]
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
