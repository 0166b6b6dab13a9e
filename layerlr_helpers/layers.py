"""What "a layer" is, and how far each one is from the output: the one list that everything else in this package reads.

The list is in order of execution. Its depths follow the data: autograd's graph of one forward pass tells which layer feeds
which, a layer's depth is the longest way from it to an output, and what is beside the way counts as no step of it.
"""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import reduce
from itertools import takewhile

from torch import nn
from torch.nn.parameter import is_lazy

from layerlr_helpers.naming import check_choice, listed, matching
from layerlr_helpers.stages import find_heads, join_to_layers, run_name
from layerlr_helpers.tracing import Trace, trace_forward, unwrap
from layerlr_helpers.units import Unit, cut_into_units, fold_norms, fold_parameterless

GRANULARITIES = ("stage", "child", "block", "tensor")
FROZEN_BY_PLAN = "_frozen_by_plan"  # a model's attribute: the names of the parameters that a plan of ours froze


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


def check_current(groups: Iterable[LayerGroup]) -> None:
    """Raise a ValueError if parameters of the groups are no longer in their model, so that to freeze them would do nothing."""
    for model in {id(group.model): group.model for group in groups if group.model is not None}.values():
        grouped = {name: p for group in groups if group.model is model for name, p in group.params.items()}
        present = {id(p) for p in model.parameters()}
        if gone := [name for name, p in grouped.items() if id(p) not in present]:
            raise ValueError(f"{listed(gone, 6)} of {type(model).__name__} were replaced after the model was grouped, by a new "
                             "layer, a parametrization or load_state_dict(assign=True); call layer_groups again")


def layer_groups(model: nn.Module, example_input=None, *, granularity: str = "stage",
                 head: str | None = None) -> list[LayerGroup]:
    """Divide a model's parameters into an ordered list of groups, from the input to the output, the heads last.

    The order is that of execution, seen in one forward pass in eval mode, which leaves the model as it was (if something is
    not used in it, a second one in train mode is looked at too). Every parameter is in exactly one group, a tied one under
    its first name. Each group's ``depth`` counts the layers from it to the output along the flow of the data.

    Args:
        example_input: what to call the model with (a tensor, a tuple of arguments or a dictionary of keyword arguments;
            anything else is its only argument). None takes what the model declares, or guesses from the first layer.
        granularity: ``"stage"``: runs of blocks between changes of resolution, in a transformer each encoder layer,
            ResNet-18 gives stem, layer1, layer2, layer3, layer4, head. ``"child"``: the model's direct children by
            their own names (conv1, bn1, layer1, …, fc). ``"block"``: every residual or encoder block on its own.
            ``"tensor"``: every parameter on its own; a norm counts as a layer of its own here.
        head: the name or a pattern of the modules that are the head, where you know better than the flow of the data.

    The last layer before an output is ``head``; of several outputs each has one, ``head.NAME``. A model that has none, a
    backbone or one whose output layer shares the embeddings' weights, gets no group of depth 0, with a warning. A part
    that the forward pass did not use is a group of its own, ``NAME (unused)``, at the depth of its neighbour, with a warning.
    A model without parameters or with lazy ones, a ``head`` that does not exist, and an input that cannot be guessed are a
    ValueError.

    >>> layer_groups(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
    [LayerGroup('stem', 2 tensors, 40 parameters), LayerGroup('head', 2 tensors, 27 parameters)]
    """
    check_choice("granularity", granularity, GRANULARITIES)
    model = unwrap(model)
    if next(model.parameters(), None) is None:
        raise ValueError(f"{type(model).__name__} has no parameters, so there is nothing to group")
    if lazy := [name for name, p in model.named_parameters() if is_lazy(p)]:
        raise ValueError(f"{listed(lazy)} of {type(model).__name__} have no shape yet; call the model once, then group it")
    if head is not None:
        _modules_matching(head, model)
    return groups_seen(trace_forward(model, example_input), model, granularity=granularity, head=head)


def groups_seen(trace: Trace, model: nn.Module, *, granularity: str = "stage", head: str | None = None) -> list[LayerGroup]:
    """The :func:`layer_groups` that a forward pass showed, which has been looked at already."""
    chosen = None if head is None else _modules_matching(head, model)
    units = cut_into_units(model, trace, granularity, chosen or ())
    unused = [unit for unit in units if not unit.runs and unit.params]
    fixed = _fixed(model)
    layers, heads = _layers_and_heads(units, model, trace, granularity, chosen,
                                      trace.set_of(p for name, p in model.named_parameters() if name in fixed))
    depth_of = _depths(layers, heads, units, trace, fixed)
    _warn(model, layers, heads, unused, trace, fixed)
    unused = [unit.renamed(f"{_not_head(run_name([unit], [], model))} (unused)") for unit in unused]
    body = [layer for layer in layers if layer not in heads]
    return [LayerGroup(name, params, layer.modules, depth_of(layer), fixed & params.keys(), model)
            for layer in [*body, *unused, *heads] for name, params in _named_parameters(layer, granularity)]


def _layers_and_heads(units: list[Unit], model: nn.Module, trace: Trace, granularity: str, chosen: dict[str, str] | None,
                      fixed: int) -> tuple[list[Unit], list[Unit]]:
    """The layers in order of execution under their names in the list, and those of them that are heads."""
    whole = granularity in ("stage", "block")
    blocks = fold_norms(unit for unit in (units if whole else cut_into_units(model, trace, "block", chosen or ())) if unit.runs)
    if chosen is None:
        head_units = find_heads(blocks, trace, fixed)
    else:
        head_units = {name: [unit for unit in blocks if f"{unit.name}.".startswith(f"{module}.")]
                      for module, name in chosen.items()}
    if not whole:
        in_heads = trace.set_of(p for head in head_units.values() for unit in head for p in unit.params.values())
        layers = fold_parameterless(unit for unit in units if unit.runs)
        return layers, [layer for layer in layers if layer.members & in_heads]
    heads = [reduce(Unit.joined_with, head).renamed(name) for name, head in head_units.items() if head]
    runs = join_to_layers([unit for unit in blocks if not any(unit in head for head in head_units.values())], model,
                          one_block_each=granularity == "block")
    body: dict[str, Unit] = {}
    for run in runs:
        is_stem = not body and (any(unit.kernels == 1 for unit in run) or not any(unit.kernels for unit in run))
        name = "stem" if is_stem else _not_head(run_name(run, runs, model))
        while name in body:
            name += " (2)"
        body[name] = reduce(Unit.joined_with, run).renamed(name)
    return [*body.values(), *heads], heads


def _depths(layers: list[Unit], heads: list[Unit], units: list[Unit], trace: Trace, fixed: set[str]) -> Callable[[Unit], int]:
    """A function from a layer to its depth: the longest way from it to an output, in layers along the flow of the data.

    The last layer of a model without a head is at depth 1. Three kinds of layers do not add to the depth of those before
    them: one that never trains, a lone one without a gradient, and a lone one between the last block and the head, such as a
    pooler, which is at that block's depth.
    """
    def follows(layer: Unit) -> list[Unit]:
        if not layer.members & trace.behind_output:  # without gradients there is no flow to see, only the order
            return [other for other in layers if other.first_run > layer.first_run]
        return [other for other in layers if layer.feeds(other) and other.members & trace.behind_output]

    def is_step(layer: Unit) -> bool:
        if layer in heads:
            return True
        lone = sum(part.kernels for part in layer.atoms) <= 1
        appended = (all(other in heads for other in follows(layer))
                    and any(part.kernels > 1 and part.feeds(layer) for unit in layers for part in unit.atoms))
        without_gradient = bool(trace.behind_output) and not layer.members & trace.behind_output
        return not ((lone and (appended or without_gradient)) or layer.params.keys() <= fixed)

    steps = {id(layer): is_step(layer) for layer in layers}
    depths: dict[int, int] = {}
    for layer in sorted(layers, key=lambda layer: layer.first_run, reverse=True):
        depths[id(layer)] = 0 if layer in heads else max(
            (depths[id(other)] + steps[id(other)] for other in follows(layer)), default=1)
    depth_of_part = {id(part): depths[id(layer)] for layer in layers if layer not in heads for part in layer.atoms}

    def depth_of(layer: Unit) -> int:
        """Of a part that did not run: the depth of its nearest neighbour in the tree of modules that is no head."""
        if id(layer) in depths:
            return depths[id(layer)]
        here = units.index(layer.atoms[0])

        def nearness(i: int) -> tuple:
            pairs = zip(units[i].name.split("."), units[here].name.split("."), strict=False)
            return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs))), i < here, -abs(i - here)

        neighbour = max((i for i, unit in enumerate(units) if id(unit) in depth_of_part), key=nearness, default=None)
        return 1 if neighbour is None else depth_of_part[id(units[neighbour])]

    return depth_of


def _warn(model: nn.Module, layers: list[Unit], heads: list[Unit], unused: list[Unit], trace: Trace, fixed: set[str]) -> None:
    """Say what is not as in one chain of layers that ends in a head, of the parameters that can train."""
    idle = [unit.name for unit in unused if unit.params.keys() - fixed]
    without_gradient = [layer.name for layer in layers if trace.behind_output and not layer.members & trace.behind_output
                        and layer.params.keys() - fixed]
    last = max(layers, key=lambda layer: layer.first_run).name if layers else ""
    all_heads = len(heads) == len(layers) and any(sum(part.kernels for part in head.atoms) > 1 for head in heads)
    for wrong, message in (
            (idle, f"the forward pass did not use {listed(idle)}; each is a group of its own, at the depth of its neighbour"),
            (without_gradient, f"no gradient of the output reaches {listed(without_gradient)}; their depth is by the order"),
            (not heads, f"{type(model).__name__} has no head of its own, since it ends in {last}, or its output layer is tied: "
                        "no group is at depth 0. If a layer is the head, name it: layer_groups(…, head=…)"),
            (all_heads, f"all layers of {type(model).__name__} are at depth 0 and would get the head's rate, since there is an "
                        "output layer in each group. Name the output layers, layer_groups(…, head=…), or make each layer a "
                        "module of its own")):
        if wrong:
            warnings.warn(message, stacklevel=4)


def _named_parameters(layer: Unit, granularity: str) -> list[tuple[str, dict[str, nn.Parameter]]]:
    if granularity != "tensor":
        return [(layer.name, layer.params)]
    return [(f"{name} (unused)" if layer.name.endswith("(unused)") else name, {name: p}) for name, p in layer.params.items()]


def _modules_matching(pattern: str, model: nn.Module) -> dict[str, str]:
    """The outermost modules that match, each with the name of its head: ``head``, or ``head.NAME`` if there are several."""
    modules = [name for name, module in model.named_modules() if name and next(module.parameters(), None) is not None]
    names = matching(pattern, modules, what="module")
    outermost = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
    return {name: "head" if len(outermost) == 1 else f"head.{name}" for name in outermost}


def _fixed(model: nn.Module) -> set[str]:
    """The names of the parameters that the model's author froze, not a plan of ours."""
    frozen_by_plan = vars(model).get(FROZEN_BY_PLAN, ())  # a wrapper that forwards attributes may have an inner model's
    return {name for name, p in model.named_parameters() if not p.requires_grad and name not in frozen_by_plan}


def _not_head(name: str) -> str:
    """A name that ``head*`` does not match, for a part that is called head but is none."""
    return f"body.{name}" if name.startswith("head") else name
