"""What "a layer" is, and in which order layers come: the one list that everything else in this package reads."""

import warnings
from collections import Counter
from dataclasses import dataclass, field

from torch import nn
from torch.nn.parameter import is_lazy

from layerlr_helpers.naming import listed
from layerlr_helpers.tracing import Trace, trace, unwrap

GRANULARITIES = ("stage", "child", "block", "tensor")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True, eq=False)
class LayerGroup:
    """A named part of a model: parameters and modules under their names in the model, in order of execution."""

    name: str
    params: dict[str, nn.Parameter]
    modules: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of scalar parameters."""
        return sum(p.numel() for p in self.params.values())

    def __repr__(self) -> str:
        return f"LayerGroup({self.name!r}, {len(self.params)} tensors, {self.size:,} parameters)"


@dataclass
class _Unit:
    """The smallest thing that a group is made of: a module with all below it, or a parameter held directly."""

    name: str
    params: dict[str, nn.Parameter]
    modules: dict[str, nn.Module]
    place: float  # in the order of execution
    shape: tuple[int, ...] = ()  # of the output, of a module that returns a tensor
    used: bool = True

    @property
    def title(self) -> str:
        """The name for a group of this unit alone."""
        return self.name if self.used else f"{self.name} (unused)"

    @property
    def weights(self) -> int:
        """Number of tensors of two or more dimensions: kernels and matrices, not biases and norms."""
        return sum(p.ndim > 1 for p in self.params.values())

    @property
    def simple(self) -> bool:
        """A single convolution or matrix, perhaps with its norm; not a block of several."""
        return self.weights <= 1


def layer_groups(model: nn.Module, example_input=None, *, granularity: str = "stage") -> list[LayerGroup]:
    """Divide a model's parameters into an ordered list of groups, from the input to the output, the head last.

    The order is that of execution, seen in one forward pass in eval mode; the model comes back as it was. Every
    parameter is in exactly one group, a tied one under its first name.

    Args:
        example_input: what to call the model with (a tensor, a tuple of arguments or a dictionary of keyword
            arguments). None guesses from the first layer.
        granularity: ``"stage"``: runs of blocks between changes of resolution, in a transformer each encoder layer,
            ResNet-18 gives stem, layer1, layer2, layer3, layer4, head. ``"child"``: the model's direct children by
            their own names (conv1, bn1, layer1, …, fc). ``"block"``: every residual or encoder block on its own.
            ``"tensor"``: every parameter on its own.

    A part that the forward pass did not use is a group of its own before the head, ``NAME (unused)``, with a warning.

    Raises:
        ValueError: a model without parameters or with lazy ones, an unknown granularity, or an input that cannot be
            guessed.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"unknown granularity {granularity!r}; known are {', '.join(map(repr, GRANULARITIES))}")
    model = unwrap(model)
    if next(model.parameters(), None) is None:
        raise ValueError(f"{type(model).__name__} has no parameters, so there is nothing to group")
    if lazy := [name for name, p in model.named_parameters() if is_lazy(p)]:
        raise ValueError(f"{listed(lazy)} of {type(model).__name__} have no shape yet; call the model once, then group it")
    found = trace(model, example_input)
    opened = {"child": lambda module: module is model, "tensor": lambda module: True}.get(granularity)
    units = _units(model, found, opened or (lambda module: module is model or _is_opened(module, model)))
    run = sorted((unit for unit in units if unit.used), key=lambda unit: unit.place)
    run = _with_trailing_norms(run) if opened is None else _without_empty(run)
    unused = [unit for unit in units if not unit.used and unit.params]
    if unused:
        warnings.warn(f"the forward pass did not use {listed(unit.name for unit in unused)}; grouped on their own",
                      stacklevel=2)
    units = [*run[:-1], *unused, *run[-1:]]
    if granularity == "tensor":
        units = [tensor for unit in units for tensor in _tensors_of(unit)]
    if opened is not None:
        return [LayerGroup(unit.title, unit.params, unit.modules) for unit in units]
    return _named(_runs(units, one_each=granularity == "block"), model)


def _units(model: nn.Module, found: Trace, opened) -> list[_Unit]:
    """Walk down from the model; a module that is ``opened`` gives way to its direct parameters and its children."""
    taken: set[int] = set()
    units = []

    def walk(name: str, module: nn.Module, place: float) -> None:
        place = _first_moment(name, module, found, place)
        children = [(n, child) for n, child in module.named_children() if _has_state(child)]
        if children and opened(module):
            for own_name, p in _claim(module.named_parameters(name, recurse=False), taken).items():
                used = id(p) in found.used or not found.used  # nothing at all is what a forward without gradients shows
                units.append(_Unit(own_name, {own_name: p}, {}, found.uses.get(id(p), place), used=used))
            for child_name, child in children:
                walk(f"{name}.{child_name}" if name else child_name, child, place)
        else:
            params = _claim(module.named_parameters(name), taken)
            used = _called(name, module, found) or any(id(p) in found.used for p in params.values())
            units.append(_Unit(name or "root", params, {name: module}, place, found.shapes.get(name, ()), used))

    walk("", model, 0)
    return units


def _first_moment(name: str, module: nn.Module, found: Trace, otherwise: float) -> float:
    """When a module was called; of a list of modules, which is not called itself, when the first one in it was."""
    if name in found.order:
        return found.order[name]
    calls = [found.order[inner] for inner, _ in module.named_modules(prefix=name) if inner in found.order]
    uses = [found.uses[id(p)] for p in module.parameters() if id(p) in found.uses]
    return min([*calls, *uses], default=otherwise)


def _called(name: str, module: nn.Module, found: Trace) -> bool:
    return any(inner in found.order for inner, _ in module.named_modules(prefix=name))


def _claim(named, taken: set[int]) -> dict[str, nn.Parameter]:
    """Those of the parameters that no earlier unit has: by identity, since two fresh layers may be equal in value."""
    mine = {}
    for name, p in named:
        if id(p) not in taken:
            taken.add(id(p))
            mine[name] = p
    return mine


def _has_state(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


def _is_opened(module: nn.Module, model: nn.Module) -> bool:
    """Whether a module is a container to look into, rather than a block to keep whole."""
    if type(module) in _CONTAINERS:
        return True
    inside = [child for child in module.children() if _has_state(child)]
    if isinstance(module, _CONTAINERS):  # a subclass: a stage is opened, a convolution with its norm is not
        return any(_weights(child) > 1 for child in inside)
    if any(_repeats(part) for part in module.modules() if isinstance(part, _CONTAINERS)):
        return True
    once = sum(type(other) is type(module) for other in model.modules()) == 1
    return once and _weights(module) > 4 and any(type(part) in _CONTAINERS for part in module.modules())  # a backbone


def _repeats(container: nn.Module) -> bool:
    kinds = Counter(type(child) for child in container.children() if _weights(child) > 1)
    return max(kinds.values(), default=0) > 1


def _weights(module: nn.Module) -> int:
    return sum(p.ndim > 1 for p in module.parameters())


def _tensors_of(unit: _Unit) -> list[_Unit]:
    return [_Unit(name, {name: p}, unit.modules, unit.place, unit.shape, unit.used) for name, p in unit.params.items()]


def _without_empty(units: list[_Unit]) -> list[_Unit]:
    """Fold modules without parameters, such as a norm without scale and shift, into what ran before them."""
    kept: list[_Unit] = []
    early: dict[str, nn.Module] = {}  # what ran before the first parameter
    for unit in units:
        if unit.params:
            kept.append(unit)
            unit.modules, early = early | unit.modules, {}
        elif kept:
            kept[-1].modules = kept[-1].modules | unit.modules
        else:
            early |= unit.modules
    return kept


def _runs(units: list[_Unit], *, one_each: bool) -> list[list[_Unit]]:
    """Split ordered units into groups: a stem, runs of blocks, a head."""
    *body, head = units
    has_blocks = any(not unit.simple for unit in body)
    runs: list[list[_Unit]] = []
    in_stem = has_blocks
    for unit in body:
        in_stem = in_stem and unit.simple and unit.used
        if not runs or (not in_stem and _starts_run(unit, runs[-1], one_each)):
            runs.append([unit])
        else:
            runs[-1].append(unit)
    return [*runs, [head]]


def _with_trailing_norms(units: list[_Unit]) -> list[_Unit]:
    """Fold norms and parameterless modules after the last layer into it, so that the head is a layer."""
    if len(units) < 2 or units[-1].weights:
        return units
    *rest, layer, norm = units
    head = _Unit(layer.name, layer.params | norm.params, layer.modules | norm.modules, layer.place, layer.shape)
    return _with_trailing_norms([*rest, head])


def _starts_run(unit: _Unit, run: list[_Unit], one_each: bool) -> bool:
    if not unit.used or not run[-1].used:
        return True
    if not unit.weights:  # a norm, or no parameters at all, belongs to what ran before it
        return False
    if run[0].simple and not unit.simple and all(before.simple for before in run):  # the first block ends the stem
        return True
    if one_each:
        return True
    here, there = _resolution(unit.shape), _resolution(next((u.shape for u in reversed(run) if u.shape), ()))
    return here is None or here != there


def _resolution(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Height and width of a feature map [N, C, H, W] or [N, H, W, C]; None for tokens and vectors."""
    if len(shape) < 4:
        return None
    channels_last = shape[1] == shape[2] and shape[2] != shape[3]
    return shape[1:3] if channels_last else shape[2:]


def _named(runs: list[list[_Unit]], model: nn.Module) -> list[LayerGroup]:
    """Name runs: stem, head, or the modules that they are made of."""
    everything = dict(model.named_modules())
    groups: dict[str, LayerGroup] = {}
    for number, run in enumerate(runs):
        params = {name: p for unit in run for name, p in unit.params.items()}
        modules = {name: module for unit in run for name, module in unit.modules.items()}
        if number == len(runs) - 1:
            name = "head"
        elif number == 0 and all(unit.simple and unit.used for unit in run):
            name = "stem"
        else:
            name = _run_name(run, params, everything)
            while name in groups or name == "head":  # a part that is called head or stem but is not
                name += "_"
        if params:
            groups[name] = LayerGroup(name, params, modules)
    return list(groups.values())


def _run_name(run: list[_Unit], params: dict[str, nn.Parameter], modules: dict[str, nn.Module]) -> str:
    """``layer1``, or ``inception3a..inception3b``: the largest modules that are wholly in this run, first and last."""
    inside = {id(p) for p in params.values()}
    holders = []
    for unit in [unit for unit in run if unit.weights] or run:
        name = unit.name
        while "." in name and {id(p) for p in modules[name.rpartition(".")[0]].parameters()} <= inside:
            name = name.rpartition(".")[0]
        if name not in holders:
            holders.append(name)
    name = holders[0] if len(holders) == 1 else f"{holders[0]}..{holders[-1]}"
    return name if run[0].used else f"{name} (unused)"
