"""The smallest parts that layer groups are made of: a module with all below it, or a parameter that a container holds.

A model is a tree of modules. Walking down it we open what only holds other parts (lists, stages, whole backbones), and keep
whole what is one step of the computation: a layer, a residual block, an encoder layer.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import pairwise
from operator import or_

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from layerlr_helpers.tracing import Trace

MOST = 0.75  # the share of its kernels that a stage has in its blocks
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
PARAMETER_LISTS = (nn.ParameterList, nn.ParameterDict)


@dataclass(eq=False)
class Unit:
    """One part of the model and its place in the flow of the data; sets of parameters are as in :class:`Trace`."""

    name: str
    params: dict[str, nn.Parameter]
    modules: dict[str, nn.Module] = field(default_factory=dict)
    first_run: int = 0  # its moment in the forward pass
    end: int = 0  # the moment at which that run ended
    shape: tuple[int, ...] = ()  # of the output, if that is a tensor
    kernels: int = 0  # 0 for a norm, a scale, an embedding of positions, 1 for one layer, more for a block
    members: int = 0  # its parameters, as a set
    behind: int = 0  # the parameters behind what it is given, as a set
    kind: type | None = None  # the class of its module
    region: str = ""  # the outermost list, or module with several blocks of one class, around it
    in_flow: bool = True  # whether the output depends on it by a gradient
    runs: bool = True  # whether the forward pass used it
    parts: tuple["Unit", ...] = ()  # the units that it was joined from; see ``atoms``

    @property
    def atoms(self) -> tuple["Unit", ...]:
        """The units as they were cut, of which this one is made."""
        return self.parts or (self,)

    def renamed(self, name: str) -> "Unit":
        """The same unit under another name."""
        return replace(self, name=name, parts=self.atoms)

    @property
    def fed(self) -> bool:
        """Whether other parameters stand before it; if not, it is where data enter the model, or parameters alone."""
        return bool(self.behind & ~self.members)

    def feeds(self, other: "Unit") -> bool:
        """Whether the data flow from this unit to the other one."""
        return bool(self.members & other.behind) and self.first_run < other.first_run

    def joined_with(self, other: "Unit") -> "Unit":
        """Both as one unit, which goes by the name, the place and the kind of this one."""
        return replace(self, params=self.params | other.params, modules=self.modules | other.modules,
                       members=self.members | other.members, behind=self.behind | other.behind,
                       in_flow=self.in_flow or other.in_flow, parts=(*self.atoms, *other.atoms))


def cut_into_units(model: nn.Module, trace: Trace, granularity: str, whole: Iterable[str] = ()) -> list[Unit]:
    """All units, used or not, in the order of the module tree. ``whole`` names modules to keep whole."""
    claimed: set[int] = set()
    units: list[Unit] = []
    whole = set(whole)
    tree = _Tree(model)

    def claim(named_parameters) -> dict[str, nn.Parameter]:
        """The parameters that no earlier unit has: by identity, since two fresh layers may be equal in value."""
        unclaimed = {name: p for name, p in named_parameters if id(p) not in claimed}
        claimed.update(map(id, unclaimed.values()))
        return unclaimed

    def behind(keys: Iterable) -> int:
        return reduce(or_, (trace.behind.get(key, 0) for key in keys), 0)

    def in_flow(params: dict[str, nn.Parameter]) -> bool:
        return bool(trace.set_of(params.values()) & trace.behind_output)

    def walk(name: str, module: nn.Module, parent: nn.Module | None, parent_run: int, region: str | None) -> None:
        within = name.rpartition(".")[0] if region is None else region
        first_run = trace.first_calls.get(name)
        if first_run is None:  # a list of modules is not called itself: it runs when anything in it first runs
            inner = [trace.first_calls[name] for name, _ in module.named_modules(prefix=name) if name in trace.first_calls]
            uses = [trace.first_uses[id(p)] for p in module.parameters() if id(p) in trace.first_uses]
            first_run = min(inner + uses, default=parent_run)
        children = [(child_name, child) for child_name, child in module.named_children() if tree.holds[child]]
        above_whole = any(not name or other.startswith(f"{name}.") for other in whole)
        opened = name not in whole and (above_whole or _is_opened(name, module, parent, tree, granularity, trace))
        is_chain = (module is model or isinstance(module, PARAMETER_LISTS)) and _is_chain_of_parameters(module, trace)
        if not (opened and (children or (is_chain and granularity != "child"))):
            params = claim(module.named_parameters(name))
            called = [inner for inner, _ in module.named_modules(prefix=name) if inner in trace.first_calls]
            last = name if name in trace.shapes else max(called, key=trace.first_calls.get, default=name)
            kernels = tree.kernels[module] if any(p.ndim > 1 for p in params.values()) else 0  # a tied layer's bias is no layer
            units.append(Unit(name or "root", params, {name: module}, first_run, trace.first_returns.get(name, first_run),
                              trace.shapes.get(last, ()), kernels, trace.set_of(params.values()),
                              behind([*called, *map(id, params.values())]), type(module), within,
                              in_flow(params), bool(called) or any(id(p) in trace.first_uses for p in params.values())))
            return
        for param_name, p in claim(module.named_parameters(name, recurse=False)).items():
            used = id(p) in trace.first_uses or not trace.first_uses  # some passes show no use at all
            use = trace.first_uses.get(id(p), first_run)
            kernels = int(_is_kernel(p) and id(p) not in trace.beside)
            units.append(Unit(param_name, {param_name: p}, {}, use, use, (), kernels, trace.set_of([p]), behind([id(p)]), None,
                              within, in_flow({param_name: p}), used))
        if region is None and ((isinstance(module, CONTAINERS) and name) or tree.has_alike(module)):
            region = name
        for child_name, child in children:
            walk(f"{name}.{child_name}" if name else child_name, child, module, first_run, region)

    walk("", model, None, 0, None)
    return units


def fold_norms(units: Iterable[Unit]) -> list[Unit]:
    """Units in order of execution, each norm or scale joined to what ran before it and feeds it (without that: to the next).

    Parts without parameters, such as a norm that has only statistics, are folded in the same way.
    """
    folded: list[Unit] = []
    for unit in sorted(units, key=lambda unit: (unit.first_run, unit.kernels == 0)):
        weights = [i for i, other in enumerate(folded) if other.first_run == unit.first_run and other.kernels]  # of this bias
        if unit.kernels == 0 and (unit.fed or not unit.params or weights):
            before = weights or [i for i, other in enumerate(folded) if other.feeds(unit)] or [len(folded) - 1] * bool(folded)
            if before:
                folded[before[-1]] = folded[before[-1]].joined_with(unit)
                continue
        if folded and not folded[-1].params:
            unit = unit.joined_with(folded.pop())
        folded.append(unit)
    return [unit for unit in folded if unit.params]


def fold_parameterless(units: Iterable[Unit]) -> list[Unit]:
    """Units in order of execution; those without parameters are joined to what ran before them (else after them)."""
    folded: list[Unit] = []
    for unit in sorted(units, key=lambda unit: unit.first_run):
        if folded and not unit.params:
            folded[-1] = folded[-1].joined_with(unit)
        else:
            folded.append(unit.joined_with(folded.pop()) if folded and not folded[-1].params else unit)
    return [unit for unit in folded if unit.params]


def _is_kernel(p: nn.Parameter) -> bool:
    """Whether a parameter is a kernel or a matrix, rather than a bias or a scale, also one of shape [1, C, 1, 1]."""
    return p.ndim == 2 or (p.ndim > 2 and sum(size > 1 for size in p.shape) > 1)


class _Tree:
    """What is asked of many modules of a model, counted once: how many kernels and matrices are in them, what repeats."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.kernels: dict[nn.Module, int] = {}
        self.holds: dict[nn.Module, bool] = {}  # whether there is a parameter or a buffer in it
        self._count(model)
        self.often = Counter(map(type, model.modules()))

    def _count(self, module: nn.Module) -> int:
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        kernels = sum(map(_is_kernel, module.parameters(recurse=False))) + sum(map(self._count, module.children()))
        if isinstance(module, (_ConvNd, nn.Linear)):  # whatever shape its weight has, or several parts under weight norm
            kernels = 1
        elif isinstance(module, (_NormBase, nn.LayerNorm, nn.GroupNorm)):  # also one whose scale is a map
            kernels = 0
        self.kernels[module] = kernels
        self.holds[module] = bool(own) or any(self.holds[child] for child in module.children())
        return self.kernels[module]

    def has_alike(self, module: nn.Module) -> bool:
        """Whether some children of a module are blocks of one class."""
        blocks = [type(child) for child in module.children() if self.kernels[child] > 1 and type(child) not in CONTAINERS]
        return len(set(blocks)) < len(blocks)

    def repeated(self, module: nn.Module, *, numbered: bool) -> Iterator[tuple[str, nn.Module]]:
        """The outermost blocks in a module that a list in it repeats, or (``numbered``) that its attributes repeat: b1, b2.

        The only block of a list counts, too, if it is most of the module and there are more of its class elsewhere.
        """
        found: list[str] = []
        for prefix, holder in module.named_modules():
            listed = isinstance(holder, CONTAINERS)
            if not (listed or (numbered and holder is module)) or any(f"{prefix}.".startswith(f"{name}.") for name in found):
                continue
            blocks = {name: child for name, child in holder.named_children()
                      if self.kernels[child] > 1 and type(child) not in (CONTAINERS[1:] if listed else CONTAINERS)
                      and (listed or _is_numbered(name))}
            often = Counter(map(type, blocks.values()))
            for name, child in blocks.items():
                alone = len(blocks) == 1 and self.often[type(child)] > 1 and self.kernels[child] >= MOST * self.kernels[module]
                if often[type(child)] > 1 or alone:
                    found.append(f"{prefix}.{name}" if prefix else name)
                    yield found[-1], child


def _is_numbered(name: str) -> bool:
    """``b1``, ``tree2``, ``res2a``: names that count."""
    return name[-1:].isdigit() or (name[-2:-1].isdigit() and name[-1:].isalpha())


def _is_opened(name: str, module: nn.Module, parent: nn.Module | None, tree: _Tree, granularity: str, trace: Trace) -> bool:
    """Whether to look into a module, as into a stage, rather than keep it whole, as a block."""
    if granularity == "child":
        return module is tree.model
    if granularity == "tensor":
        return True
    if [*module._modules] == ["parametrizations"]:  # one layer, whose weight is computed from others, as under weight norm
        return False
    if module is tree.model or isinstance(module, PARAMETER_LISTS):
        return True
    if _is_tower(name, module, parent, tree, trace):
        return True
    kernels = tree.kernels[module]
    if type(module) in CONTAINERS:
        of_layers = type(module) is nn.Sequential and all(tree.kernels[child] <= 1 for child in module.children())
        one_of_many = isinstance(parent, nn.ModuleList) and sum(tree.kernels[child] > 1 for child in parent.children()) > 1
        return kernels > 1 and not (of_layers and one_of_many)  # no layer with its norm, no block that is written so
    if isinstance(module, CONTAINERS) and not any(tree.kernels[child] > 1 for child in module.children()):
        return False
    if isinstance(parent, CONTAINERS) and tree.often[type(module)] > 1:  # a block, or a stage: little more than a row of blocks
        blocks = list(tree.repeated(module, numbered=isinstance(module, CONTAINERS)))
        outside = kernels - sum(tree.kernels[block] for _, block in blocks)
        in_list_of_stages = all(type(sibling) is type(module) for sibling in parent.children() if tree.kernels[sibling] > 1)
        return outside <= (1 - MOST) * kernels and (outside <= 2 or in_list_of_stages) and _in_a_row(name, blocks, trace)
    if isinstance(module, CONTAINERS) or next(tree.repeated(module, numbered=True), None) is not None:
        return True
    # The backbone of a larger model: the only one of its class, and too large for a block, or most of what there is.
    large = kernels > 4 and any(type(part) in CONTAINERS for part in module.modules())
    most = not isinstance(parent, CONTAINERS) and kernels > MOST * tree.kernels[tree.model]
    return tree.often[type(module)] == 1 and (large or most)


def _is_tower(name: str, module: nn.Module, parent: nn.Module, tree: _Tree, trace: Trace) -> bool:
    """Whether a module and its siblings of one class are networks beside each other, and together most of the model.

    Each begins where data enter the model; what works on another layer's output is a block, an expert, a branch or a head.
    Two layers are a block, too.
    """
    alike = {child_name: child for child_name, child in parent.named_children() if type(child) is type(module)}
    if len(alike) < 2 or sum(tree.kernels[child] for child in alike.values()) < MOST * tree.kernels[tree.model]:
        return False
    prefix = name.rpartition(".")[0]
    towers = {f"{prefix}.{child_name}" if prefix else child_name: child for child_name, child in alike.items()
              if trace.set_of(child.parameters()) & trace.behind_output}
    return tree.kernels[module] > 2 and name in towers and not any(_is_fed(*tower, trace) for tower in towers.items())


def _is_fed(name: str, module: nn.Module, trace: Trace) -> bool:
    """Whether parameters of other modules stand before some part of a module."""
    keys = [*(inner for inner, _ in module.named_modules(prefix=name)), *map(id, module.parameters())]
    return bool(reduce(or_, (trace.behind.get(key, 0) for key in keys), 0) & ~trace.set_of(module.parameters()))


def _is_chain_of_parameters(module: nn.Module, trace: Trace) -> bool:
    """Whether a module's own parameters are several layers: one is used on what another one gave."""
    own = list(module.parameters(recurse=False))
    return any(trace.behind.get(id(p), 0) & trace.set_of(own) & ~trace.set_of([p]) for p in own)


def _in_a_row(prefix: str, blocks: list[tuple[str, nn.Module]], trace: Trace) -> bool:
    """Whether blocks run one after the other, each on what the one before it gave: a stage does, a mixture of experts not."""
    blocks = [(f"{prefix}.{name}", block) for name, block in blocks]
    if not trace.behind_output:  # a forward pass without gradients shows no flow
        return True
    if not all(name in trace.first_calls for name, _ in blocks):
        return False
    blocks.sort(key=lambda item: trace.first_calls[item[0]])
    return all(trace.set_of(block.parameters()) & trace.behind[name]
               for (_, block), (name, _) in pairwise(blocks))
