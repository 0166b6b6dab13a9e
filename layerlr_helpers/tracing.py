"""One forward pass, watched: in which order the modules run, and which parameters stand behind what each one is given.

The order of the attributes in a class says nothing about the order of execution, and the order of execution nothing about
what is beside what; so we look, and ask autograd's graph. Afterwards the model and all random numbers are what they were.
"""

import random
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial, reduce
from itertools import count
from operator import or_
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from layerlr_helpers.inputs import candidate_inputs, described, mapped

# Functions that put a parameter beside the data, as position embeddings are, rather than multiply the data by it.
_BESIDE = {"add", "sub", "mul", "div", "cat", "stack", "expand", "expand_as", "repeat", "unsqueeze", "where", "getitem"}
_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)


@dataclass
class Trace:
    """What a forward pass showed. Modules are known by their name in ``model.named_modules()``, parameters by id.

    Sets of parameters are whole numbers: parameter number k of the model is in the set if bit k is 1.
    """

    first_calls: dict[str, int] = field(default_factory=dict)  # the moment of each module's first call
    first_returns: dict[str, int] = field(default_factory=dict)  # the moment at which that call ended
    first_uses: dict[int, int] = field(default_factory=dict)  # the moment at which each parameter first entered a computation
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # the shape of each module's first output tensor
    beside: set[int] = field(default_factory=set)  # the parameters that are added to the data or stand beside it
    numbers: dict[int, int] = field(default_factory=dict)  # the number of each parameter
    behind: dict[str | int, int] = field(default_factory=dict)  # the parameters behind what a module or parameter was given
    behind_last_use: dict[int, int] = field(default_factory=dict)  # the same for the last use of each parameter alone
    behind_output: int = 0  # the parameters that the model's output depends on
    outputs: list[tuple[int, ...]] = field(default_factory=list)  # the shapes of the tensors that the model returns
    ends_open: bool = False  # an nn.Identity stands at the end, where a head was taken away

    @property
    def used(self) -> set[int]:
        """The parameters that took part in the forward pass."""
        return self.first_uses.keys() | {key for key, k in self.numbers.items() if self.behind_output >> k & 1}

    def set_of(self, params: Iterable[nn.Parameter]) -> int:
        """Some parameters as a set."""
        return sum(1 << number for number in {self.numbers[id(p)] for p in params})


class _Recorder(TorchFunctionMode):
    """Notes when each parameter first enters a computation, and with what, since some belong to no module that is called."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.trace, self.moments = Trace(numbers={id(p): k for k, p in enumerate(model.parameters())}), count()
        self.given: dict[str | int, list] = {}  # the autograd nodes of the tensors that each module or parameter met
        self.last_given: dict[int, list] = {}
        self.calls: Counter = Counter()  # how often each parameter's own module was called
        self.open_ends: dict[int, Tensor] = {}  # what an nn.Identity returned that no layer just before it made, by its id
        self.made_by_layers: set = set()  # the nodes of what modules with parameters returned
        self.with_parameters = {module for module in model.modules() if next(module.parameters(), None) is not None}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        numbers = self.trace.numbers
        nested = kwargs or any(type(arg) in (tuple, list) for arg in args)
        tensors = [*tensors_in((args, kwargs))] if nested else [arg for arg in args if isinstance(arg, Tensor)]
        met = [t for t in tensors if id(t) in numbers]
        if met and next(tensors_in(result), None) is not None:  # reading a shape or a device is no use
            moment = next(self.moments)  # the same for a weight and its bias
            for p in met:
                key = id(p)
                if key not in self.trace.first_uses:
                    self.trace.first_uses[key] = moment
                    if func.__name__.strip("_") in _BESIDE:
                        self.trace.beside.add(key)
                self.last_given[key] = _nodes(t for t in tensors if t is not p)
                self.given.setdefault(key, []).extend(self.last_given[key])
        return result

    def before_call(self, name: str, module: nn.Module, args, kwargs) -> None:
        moment, nodes = next(self.moments), _nodes(tensors_in((args, kwargs)))
        self.trace.first_calls.setdefault(name, moment)
        self.given.setdefault(name, []).extend(nodes)
        is_layer = name and not module._modules  # a model that holds its parameters itself may be many layers
        own = [p for p in module._parameters.values() if p is not None] if is_layer else []
        for p in own:
            self.trace.first_uses.setdefault(id(p), moment)
            self.last_given[id(p)] = nodes
            self.calls[id(p)] += 1

    def after_call(self, name: str, module: nn.Module, args, output) -> None:
        tensors = list(tensors_in(output))
        if tensors:
            self.trace.shapes.setdefault(name, tuple(tensors[0].shape))
        self.trace.first_returns.setdefault(name, next(self.moments))
        if type(module) is nn.Identity:
            self.open_ends |= {id(t): t for t in tensors if t.grad_fn not in self.made_by_layers}
        elif module in self.with_parameters:
            self.made_by_layers.update(_nodes(tensors))

    def finished(self, output) -> Trace:
        """The trace, after the pass: autograd's graph is read once, for all."""
        trace, outputs = self.trace, list(tensors_in(output))
        nodes = [*_nodes(outputs), *(node for nodes in self.given.values() for node in nodes)]
        behind, self.uses_in_graph = _parameters_behind(nodes, trace.numbers)

        def union(nodes: list) -> int:
            return reduce(or_, (behind[node] for node in nodes), 0)

        trace.behind = {key: union(nodes) for key, nodes in self.given.items()}
        trace.behind_last_use = {key: union(nodes) for key, nodes in self.last_given.items()}
        trace.behind_output = union(_nodes(outputs)) | trace.set_of(t for t in outputs if id(t) in trace.numbers)
        trace.outputs = [tuple(t.shape) for t in outputs if t.grad_fn is not None]
        trace.ends_open = any(id(t) in self.open_ends for t in outputs)
        return trace


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside ``torch.compile``, averages of weights and (Distributed)DataParallel wrappers."""
    while isinstance(model, _WRAPPERS) or hasattr(model, "_orig_mod"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def is_compiled(model: nn.Module) -> bool:
    """Whether ``torch.compile`` was called on a model or on a part of it."""
    return any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None for m in model.modules())


def trace_forward(model: nn.Module, example_input=None) -> Trace:
    """Run ``model`` once in eval mode, and once in train mode if something was not used, and record a :class:`Trace`.

    ``example_input`` is a tensor, a tuple of arguments, a dictionary of keyword arguments, or anything else as the only
    argument. None takes what the model declares, or guesses from the first layer; a ValueError says what was tried.
    """
    given = example_input is not None
    trace = _traced_call(model, example_input) if given else _first_that_runs(model)
    used = trace.used
    if all(id(p) in used for p in model.parameters() if p.requires_grad):
        return trace
    # Auxiliary classifiers, masks for training: some parts run in train mode only, and not on every input.
    for candidate in [example_input] if given else candidate_inputs(model):
        with suppress(Exception):  # a model that needs labels or more examples in train mode
            return _both(trace, _traced_call(model, candidate, training=True))
    return trace


def _first_that_runs(model: nn.Module) -> Trace:
    failures = []
    for candidate in candidate_inputs(model):
        try:
            return _traced_call(model, candidate)
        except Exception as error:  # a wrong guess may fail in any way
            failures.append(f"{described(candidate)} ({type(error).__name__}: "
                            f"{str(error).strip().partition(chr(10))[0][:120]})")
    tried = "tried " + "; ".join(failures) if failures else "it has no layer whose input shape we know"
    raise ValueError("pass example_input=, a tensor, a tuple of arguments or a dictionary of keyword arguments that the model "
                     f"can be called with. We cannot guess an input for {type(model).__name__}: {tried}. So example_input= is "
                     "needed.")


def _traced_call(model: nn.Module, example_input, *, training: bool = False) -> Trace:
    """Hooks alone see everything if each parameter is used only when its own module is called; else watch every function."""
    if not any(module._parameters and module._modules for module in model.modules()):
        trace, complete = _look(model, example_input, training=training, at_functions=False)
        if complete:
            return trace
    return _look(model, example_input, training=training, at_functions=True)[0]


def _look(model: nn.Module, example_input, *, training: bool, at_functions: bool) -> tuple[Trace, bool]:
    """One forward pass, and whether nothing but calls of modules used their parameters."""
    # Parts that were compiled run as they are written, since compiling them for one look would take minutes.
    uncompiled = torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext()
    recorder = _Recorder(model)
    with _undone(model), uncompiled, ExitStack() as hooks:
        model.train(training)
        for module in model.modules():
            if isinstance(module, _NormBase):  # in train mode it refuses a single example
                module.eval()
        for name, module in model.named_modules():
            hooks.enter_context(module.register_forward_pre_hook(partial(recorder.before_call, name), with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(partial(recorder.after_call, name)))
        with recorder if at_functions else nullcontext():
            example_input = mapped(example_input, partial(_as_input, next(model.parameters()).device))
            args = example_input if isinstance(example_input, tuple) else (example_input,)
            output = model(**example_input) if isinstance(example_input, Mapping) else model(*args)
        trace = recorder.finished(output)
    calls = [recorder.calls[id(p)] for p in model.parameters()]
    return trace, all(calls) and all(used <= recorder.calls[key] for key, used in recorder.uses_in_graph.items())


def _as_input(device: torch.device, tensor: Tensor) -> Tensor:
    """A tensor on the model's device, if it is still on the CPU, and one that autograd accepts."""
    tensor = tensor.clone() if tensor.is_inference() else tensor
    return tensor.to(device) if tensor.device.type == "cpu" else tensor


@contextmanager
def _undone(model: nn.Module) -> Iterator[None]:
    """A gradient for every parameter, so that autograd sees them all; in the end everything is as it was."""
    frozen = [p for p in model.parameters() if not p.requires_grad and (p.is_floating_point() or p.is_complex())]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with (torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.enable_grad(),
          _attributes_put_back(model), patch.object(CheckpointFunction, "apply", lambda run, _, *args: run(*args))):
        # What a reentrant checkpoint computes is in no graph until the backward pass, so it is computed openly here.
        try:
            for p in frozen:
                p.requires_grad_(True)
            yield
        finally:
            for p in frozen:
                p.requires_grad_(False)
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


@contextmanager
def _attributes_put_back(model: nn.Module) -> Iterator[None]:
    """Let a forward pass work on copies of all tensors that modules keep beside parameters, and put back what it changes.

    A tensor that got a history by the pass could not be copied or scripted afterwards.
    """
    kept = [(module, dict(vars(module)), [(value, value.copy()) for value in vars(module).values()
                                          if type(value) in (dict, OrderedDict, list, set)]) for module in model.modules()]
    copies: dict[int, Tensor] = {}  # by id, since two modules may keep the same one
    for module, attributes, _ in kept:
        for values in (attributes, module._buffers):
            for name, value in values.items():
                if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                    copy = copies.setdefault(id(value), value.detach().clone().requires_grad_(value.requires_grad))
                    (vars(module) if values is attributes else module._buffers)[name] = copy
    try:
        yield
    finally:
        for module, attributes, contents in kept:
            vars(module).clear()
            vars(module).update(attributes)
            for value, content in contents:
                value.clear()
                (value.extend if type(value) is list else value.update)(content)


def _both(eval_mode: Trace, train_mode: Trace) -> Trace:
    """What either of two passes showed; in the order of training, unless that left something out."""
    complete = eval_mode.first_calls.keys() <= train_mode.first_calls.keys()
    base, other = (train_mode, eval_mode) if complete else (eval_mode, train_mode)
    end = 1 + max([*base.first_returns.values(), *base.first_uses.values()], default=0)
    for name in ("first_calls", "first_returns", "first_uses"):
        later = {key: end + moment for key, moment in getattr(other, name).items()}
        setattr(base, name, later | getattr(base, name))
    base.shapes = other.shapes | base.shapes
    base.beside |= other.beside
    for name in ("behind", "behind_last_use"):
        mine, others = getattr(base, name), getattr(other, name)
        setattr(base, name, {key: mine.get(key, 0) | others.get(key, 0) for key in mine | others})
    base.behind_output |= other.behind_output
    base.ends_open = eval_mode.ends_open
    return base


def tensors_in(output) -> Iterator[Tensor]:
    """The tensors in what a module returned: in tuples, lists, dictionaries, dataclasses."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (Mapping, tuple, list)):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from tensors_in(part)
    elif is_dataclass(output) and not isinstance(output, type):
        yield from tensors_in([getattr(output, part.name) for part in fields(output)])
    elif not isinstance(output, (nn.Module, type)):  # such as a distribution
        yield from tensors_in([part for part in getattr(output, "__dict__", {}).values() if isinstance(part, Tensor)])


def _nodes(tensors: Iterable[Tensor]) -> list:
    """The nodes of autograd's graph from which some tensors come."""
    return [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]


def _parameters_behind(nodes: list, numbers: dict[int, int]) -> tuple[dict[object, int], Counter]:
    """For each node of autograd's graph that leads to ``nodes``: the set of parameters that it depends on.

    Also how often the graph uses each parameter, by id.
    """
    behind: dict[object, int] = {}
    uses: Counter = Counter()
    parameter_of: dict[object, int] = {}
    stack = list(dict.fromkeys(nodes))
    while stack:
        node = stack[-1]
        if node in behind:
            stack.pop()
            continue
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        if missing := [parent for parent in parents if parent not in behind]:
            stack.extend(missing)
            continue
        behind[node] = reduce(or_, (behind[parent] for parent in parents), 0)
        if hasattr(node, "variable") and id(node.variable) in numbers:
            parameter_of[node] = id(node.variable)
            behind[node] = 1 << numbers[id(node.variable)]
        uses.update(parameter_of[parent] for parent in parents if parent in parameter_of)
        stack.pop()
    return behind, uses
