"""One forward pass, watched: in which order the modules run, what shapes they return, and which parameters are used.

The order of the attributes in a class says nothing about the order of execution, so we look. Afterwards modes, buffers,
``requires_grad``, gradients, hooks and random numbers are what they were before.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import count, product

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from layerlr_helpers.guards import preserved


@dataclass
class Trace:
    """What a forward pass showed. Modules are known by their name in ``model.named_modules()``, parameters by id."""

    first_calls: dict[str, int] = field(default_factory=dict)  # the moment of each module's first call
    first_uses: dict[int, int] = field(default_factory=dict)  # the moment at which each parameter first entered a computation
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # the shape of each module's first output tensor
    used: set[int] = field(default_factory=set)  # the parameters that the output depends on
    moments: Iterator[int] = field(default_factory=count)  # of calls and uses, so that the two can be ordered together


class _WatchParameters(TorchFunctionMode):
    """Notes when each parameter first enters a computation, since some belong to no module that is called."""

    def __init__(self, model: nn.Module, trace: Trace):
        super().__init__()
        self.watched, self.trace = {id(p) for p in model.parameters()}, trace

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        uses = self.trace.first_uses
        new = [id(t) for t in tensors_in((args, kwargs)) if id(t) in self.watched and id(t) not in uses]
        if new and any(t.requires_grad for t in tensors_in(result)):  # reading a shape or a device is no use
            for key in new:
                uses.setdefault(key, next(self.trace.moments))
        return result


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside ``torch.compile`` and (Distributed)DataParallel wrappers."""
    while isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)) or hasattr(model, "_orig_mod"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def trace_forward(model: nn.Module, example_input=None) -> Trace:
    """Run ``model`` once in eval mode and record a :class:`Trace`.

    ``example_input`` is a tensor, a tuple of arguments or a dictionary of keyword arguments; None guesses one from
    the first layer, and a ValueError says what was tried if none of the guesses ran.
    """
    if example_input is not None:
        return _traced_call(model, example_input)
    failures = []
    for guess in _guesses(model):
        try:
            return _traced_call(model, guess)
        except Exception as error:  # a wrong guess may fail in any way
            failures.append(f"a {str(guess.dtype).removeprefix('torch.')} tensor of shape {list(guess.shape)} "
                            f"({type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]})")
    tried = "tried " + "; ".join(failures) if failures else "it has no layer whose input shape we know"
    raise ValueError(f"cannot guess an input for {type(model).__name__}: {tried}. Pass example_input=, a tensor, a tuple "
                     "of arguments or a dictionary of keyword arguments that the model can be called with.")


def _traced_call(model: nn.Module, example_input) -> Trace:
    trace = Trace()

    def note_call(name, module, args):
        trace.first_calls.setdefault(name, next(trace.moments))

    def note_shape(name, module, args, output):
        for tensor in tensors_in(output):
            trace.shapes.setdefault(name, tuple(tensor.shape))

    # Parts that were compiled run as they are written, since compiling them for one look would take minutes.
    compiled = any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None for m in model.modules())
    uncompiled = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    with _in_eval_mode_with_gradients(model), uncompiled, ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.enter_context(module.register_forward_pre_hook(partial(note_call, name)))
            hooks.enter_context(module.register_forward_hook(partial(note_shape, name)))
        with _WatchParameters(model, trace):
            args = example_input if isinstance(example_input, (tuple, list)) else (example_input,)
            output = model(**example_input) if isinstance(example_input, Mapping) else model(*args)
        trace.used = _parameters_behind(output) | trace.first_uses.keys()
    return trace


@contextmanager
def _in_eval_mode_with_gradients(model: nn.Module) -> Iterator[None]:
    """Eval mode and a gradient for every parameter, so that autograd sees them all; everything is put back at the end."""
    requires_grad_before = {p: p.requires_grad for p in model.parameters() if p.is_floating_point() or p.is_complex()}
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.enable_grad(), preserved(model):
        try:
            model.eval()
            for p in requires_grad_before:
                p.requires_grad_(True)
            yield
        finally:
            for p, requires_grad in requires_grad_before.items():
                p.requires_grad_(requires_grad)


def _guesses(model: nn.Module) -> Iterator[Tensor]:
    """Inputs that the first layer of each kind would take, in the order in which the kinds occur in the model."""
    first_layers: dict[type, nn.Module] = {}
    for layer, kind in product(model.modules(), (nn.Embedding, nn.Conv2d, nn.Conv1d, nn.RNNBase, nn.Linear)):
        if isinstance(layer, kind):
            first_layers.setdefault(kind, layer)
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    for kind, layer in first_layers.items():
        if kind is nn.Embedding:
            yield torch.zeros(1, 8, dtype=torch.long, device=like.device)
        elif kind is nn.Conv2d:
            # Attributes may be in any order; an image has fewer channels than the features that are computed from it.
            fewest = min(conv.in_channels for conv in model.modules() if isinstance(conv, nn.Conv2d))
            for channels, size in product(dict.fromkeys((layer.in_channels, fewest)), (224, 64, 32, 299)):  # commonest first
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
    elif isinstance(output, (Mapping, tuple, list)):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from tensors_in(part)


def _parameters_behind(output) -> set[int]:
    """The ids of the tensors from which autograd's graph of ``output`` starts."""
    nodes = {tensor.grad_fn for tensor in tensors_in(output)} - {None}
    to_visit = list(nodes)
    while to_visit:
        new = {parent for parent, _ in to_visit.pop().next_functions} - nodes - {None}
        nodes |= new
        to_visit += new
    return {id(node.variable) for node in nodes if hasattr(node, "variable")}
