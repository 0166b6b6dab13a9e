"""What "a layer" is, and in which order layers come: the one list that everything else in this package reads."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import reduce

from torch import nn
from torch.nn.parameter import is_lazy

from layerlr_helpers.naming import check_choice, listed
from layerlr_helpers.tracing import Trace, trace_forward, unwrap

GRANULARITIES = ("stage", "child", "block", "tensor")
FROZEN_BY_PLAN = "_frozen_by_plan"  # a model's attribute: the names of the parameters that a plan of ours froze
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True, eq=False)
class LayerGroup:
    """A named part of a model: parameters and modules under their names in the model, in order of execution.

    ``depth`` counts the layers between it and the output along the flow of the data: 0 is a head, and several groups
    may share a depth. ``fixed`` has the names of the parameters that required no gradient when the model was grouped:
    its author froze them, and no plan trains them. ``model`` is the model that all names are relative to.
    """

    name: str
    params: dict[str, nn.Parameter]
    modules: dict[str, nn.Module] = field(default_factory=dict)
    depth: int = 0
    fixed: set[str] = field(default_factory=set)
    model: nn.Module | None = None

    @property
    def size(self) -> int:
        """Number of scalar parameters."""
        return sum(p.numel() for p in self.params.values())

    def __repr__(self) -> str:
        return f"LayerGroup({self.name!r}, {len(self.params)} tensors, {self.size:,} parameters)"


@dataclass(frozen=True, eq=False)
class _Unit(LayerGroup):
    """The smallest thing that groups are made of: a module with all below it, or a parameter that a container holds."""

    first_run: int = 0  # its moment in the forward pass
    shape: tuple[int, ...] = ()  # of the output, if that is a tensor

    @property
    def kernels(self) -> int:
        """0 for a norm or a lone scale, 1 for a convolution or a linear layer, more for a block."""
        return _kernels(self.params.values())

    def followed_by(self, other: "_Unit") -> "_Unit":
        """Both units as one, which is named after the first that has parameters."""
        main = self if self.params else other
        return _Unit(main.name, self.params | other.params, self.modules | other.modules,
                     first_run=main.first_run, shape=main.shape)


def layer_groups(model: nn.Module, example_input=None, *, granularity: str = "stage") -> list[LayerGroup]:
    """Divide a model's parameters into an ordered list of groups, from the input to the output, the head last.

    The order is that of execution, seen in one forward pass in eval mode, which leaves the model as it was. Every
    parameter is in exactly one group, a tied one under its first name.

    Args:
        example_input: what to call the model with (a tensor, a tuple of arguments or a dictionary of keyword
            arguments). None guesses from the first layer.
        granularity: ``"stage"``: runs of blocks between changes of resolution, in a transformer each encoder layer,
            ResNet-18 gives stem, layer1, layer2, layer3, layer4, head. ``"child"``: the model's direct children by
            their own names (conv1, bn1, layer1, …, fc). ``"block"``: every residual or encoder block on its own.
            ``"tensor"``: every parameter on its own.

    A part that the forward pass did not use is a group of its own before the head, ``NAME (unused)``, with a warning.
    A model without parameters or with lazy ones, and an input that cannot be guessed, are a ValueError.

    >>> layer_groups(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
    [LayerGroup('stem', 2 tensors, 40 parameters), LayerGroup('head', 2 tensors, 27 parameters)]
    """
    check_choice("granularity", granularity, GRANULARITIES)
    model = unwrap(model)
    if next(model.parameters(), None) is None:
        raise ValueError(f"{type(model).__name__} has no parameters, so there is nothing to group")
    if lazy := [name for name, p in model.named_parameters() if is_lazy(p)]:
        raise ValueError(f"{listed(lazy)} of {type(model).__name__} have no shape yet; call the model once, then group it")
    trace = trace_forward(model, example_input)
    used, unused = _cut_into_units(model, trace, granularity)
    used = _fold_parameterless(sorted(used, key=lambda unit: unit.first_run))
    if unused:
        warnings.warn(f"the forward pass did not use {listed(unit.name for unit in unused)}; grouped on their own",
                      stacklevel=2)
    if granularity == "tensor":
        body, head, idle = ([LayerGroup(name, {name: p}, unit.modules) for unit in units for name, p in unit.params.items()]
                            for units in (used[:-1], used[-1:], unused))
    else:
        groups = ([LayerGroup(unit.name, unit.params, unit.modules) for unit in used] if granularity == "child"
                  else _named_groups(_joined(used, one_block_each=granularity == "block"), model))
        body, head = groups[:-1], groups[-1:]
        idle = [LayerGroup(_run_name([unit], model), unit.params, unit.modules) for unit in unused]
    groups = [*body, *(replace(group, name=f"{group.name} (unused)") for group in idle), *head]
    frozen_by_plan = getattr(model, FROZEN_BY_PLAN, ())
    return [replace(group, depth=len(groups) - 1 - i, model=model,
                    fixed={name for name, p in group.params.items() if not p.requires_grad and name not in frozen_by_plan})
            for i, group in enumerate(groups)]


def _cut_into_units(model: nn.Module, trace: Trace, granularity: str) -> tuple[list[_Unit], list[_Unit]]:
    """The units that the forward pass used, and the units with parameters that it did not use.

    Walks down the module tree; a module that is opened gives way to the parameters that it holds and its children.
    """
    claimed: set[int] = set()
    units: list[tuple[_Unit, bool]] = []  # each with whether it was used

    def claim(named_parameters) -> dict[str, nn.Parameter]:
        """The parameters that no earlier unit has: by identity, since two fresh layers may be equal in value."""
        unclaimed = {name: p for name, p in named_parameters if id(p) not in claimed}
        claimed.update(map(id, unclaimed.values()))
        return unclaimed

    def walk(name: str, module: nn.Module, parent_run: int) -> None:
        calls = [trace.first_calls[inner] for inner, _ in module.named_modules(prefix=name) if inner in trace.first_calls]
        uses = [trace.first_uses[id(p)] for p in module.parameters() if id(p) in trace.first_uses]
        # A list of modules is not called itself: it runs when anything in it first runs.
        first_run = trace.first_calls.get(name, min([*calls, *uses], default=parent_run))
        children = [(child_name, child) for child_name, child in module.named_children()
                    if [*child.parameters(), *child.buffers()]]
        if not children or not _is_opened(module, model, granularity):
            params = claim(module.named_parameters(name))
            used = bool(calls) or any(id(p) in trace.used for p in params.values())
            units.append((_Unit(name or "root", params, {name: module}, first_run=first_run, shape=trace.shapes.get(name, ())), used))
            return
        for param_name, p in claim(module.named_parameters(name, recurse=False)).items():
            used = id(p) in trace.used or not trace.used  # a forward pass without gradients shows no use at all
            units.append((_Unit(param_name, {param_name: p}, {}, first_run=trace.first_uses.get(id(p), first_run)), used))
        for child_name, child in children:
            walk(f"{name}.{child_name}" if name else child_name, child, first_run)

    walk("", model, 0)
    return [unit for unit, used in units if used], [unit for unit, used in units if not used and unit.params]


def _is_opened(module: nn.Module, model: nn.Module, granularity: str) -> bool:
    """Whether to look into a module, as into a stage, rather than keep it whole, as a block."""
    if granularity == "child":
        return module is model
    if granularity == "tensor" or module is model or type(module) in _CONTAINERS:
        return True
    if isinstance(module, _CONTAINERS):  # a subclass: a stage of blocks is opened, a convolution with its norm is not
        return any(_kernels(child.parameters()) > 1 for child in module.children())
    for container in (part for part in module.modules() if isinstance(part, _CONTAINERS)):
        blocks = [type(child) for child in container.children() if _kernels(child.parameters()) > 1]
        if len(set(blocks)) < len(blocks):  # a stage repeats a block
            return True
    # The backbone of a larger model: the only one of its class, and too large for a block.
    only_one = sum(type(other) is type(module) for other in model.modules()) == 1
    return only_one and _kernels(module.parameters()) > 4 and any(type(part) in _CONTAINERS for part in module.modules())


def _kernels(params: Iterable[nn.Parameter]) -> int:
    """Number of tensors of two or more dimensions: kernels and matrices, not biases and norms."""
    return sum(p.ndim > 1 for p in params)


def _fold_parameterless(units: list[_Unit]) -> list[_Unit]:
    """Fold units without parameters, such as a norm without scale and shift, into what ran before them (else after them)."""
    folded: list[_Unit] = []
    for unit in units:
        if folded and not (unit.params and folded[-1].params):
            folded[-1] = folded[-1].followed_by(unit)
        else:
            folded.append(unit)
    return [unit for unit in folded if unit.params]


def _joined(units: list[_Unit], *, one_block_each: bool) -> list[list[_Unit]]:
    """Join ordered units to runs: the stem (all layers before the first block), runs of blocks, the head."""
    while len(units) > 1 and not units[-1].kernels:  # a norm after the last layer belongs to it
        units = [*units[:-2], units[-2].followed_by(units[-1])]
    body, head = units[:-1], units[-1:]
    runs: list[list[_Unit]] = []
    in_stem = any(unit.kernels > 1 for unit in body)  # in a model without blocks the stem is one layer, as any group is
    for unit in body:
        in_stem = in_stem and unit.kernels <= 1
        if runs and (in_stem or _continues(runs[-1], unit, one_block_each)):
            runs[-1].append(unit)
        else:
            runs.append([unit])
    return [*runs, head] if head else []


def _continues(run: list[_Unit], unit: _Unit, one_block_each: bool) -> bool:
    """Whether a unit belongs to the run of units before it."""
    if not unit.kernels:  # a norm belongs to what ran before it
        return True
    after_stem = unit.kernels > 1 and all(before.kernels <= 1 for before in run)
    if one_block_each or after_stem:
        return False
    resolution = _resolution(unit.shape)
    return resolution is not None and resolution == _resolution(next((u.shape for u in reversed(run) if u.shape), ()))


def _resolution(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Height and width of a feature map [N, C, H, W] or [N, H, W, C]; None for tokens and vectors."""
    if len(shape) < 4:
        return None
    channels_last = shape[1] == shape[2] and shape[2] != shape[3]
    return shape[1:3] if channels_last else shape[2:]


def _named_groups(runs: list[list[_Unit]], model: nn.Module) -> list[LayerGroup]:
    """Each run as a group, named stem, head, or after the modules that it is made of."""
    groups: dict[str, LayerGroup] = {}
    for number, run in enumerate(runs):
        if run is runs[-1]:
            name = "head"
        elif number == 0 and all(unit.kernels <= 1 for unit in run):
            name = "stem"
        else:
            name = _run_name(run, model)
            while name in groups or name == "head":  # a part that is called head or stem but is not
                name += "_"
        unit = reduce(_Unit.followed_by, run)
        groups[name] = LayerGroup(name, unit.params, unit.modules)
    return list(groups.values())


def _run_name(run: list[_Unit], model: nn.Module) -> str:
    """``layer1``, or ``inception3a..inception3b``: the largest modules that are wholly in this run, first and last."""
    in_run = {id(p) for unit in run for p in unit.params.values()}
    names = []
    for unit in [unit for unit in run if unit.kernels] or run:
        name = unit.name
        while "." in name and {id(p) for p in model.get_submodule(name.rpartition(".")[0]).parameters()} <= in_run:
            name = name.rpartition(".")[0]
        if name not in names:
            names.append(name)
    return names[0] if len(names) == 1 else f"{names[0]}..{names[-1]}"
