"""From units to layers: the stem before the first block, stages or blocks, and the heads before the outputs."""

from collections import Counter
from collections.abc import Sequence
from functools import cache, reduce
from math import prod

from torch import nn

from layerlr_helpers.tracing import Trace
from layerlr_helpers.units import CONTAINERS, Unit


def find_heads(units: Sequence[Unit], trace: Trace, fixed: int = 0) -> dict[str, list[Unit]]:
    """The last layers before the outputs, under the names ``head``, or ``head.NAME`` if there are several.

    ``units`` are in order of execution, with their norms; ``fixed`` is the set of parameters that never train. A model that
    ends in one of its blocks, in an output layer that it shares with its embeddings, or where its head was taken away, has
    no head of its own. Of several heads that branch off one trunk, each is the whole branch.
    """
    if not trace.behind_output:  # a forward pass without gradients shows no flow: the last layer is the head
        return {"head": [units[-1]]}
    ends = [unit for unit in units if unit.members & trace.behind_output and not any(map(unit.feeds, units))]
    learning = [end for end in ends if (end.members | end.behind) & ~fixed] or ends  # not those of a frozen teacher
    heads = [end for end in learning if not (_is_block(end, units) or _is_tied(end, units, trace) or trace.ends_open
                                             or end.kernels == 0)]
    if len(heads) < 2:
        return {"head": heads} if heads else {}
    paths = [head.name.split(".") for head in heads]
    shared = next((i for i, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1), 0)
    trunk = ".".join(paths[0][:shared])
    branches = {path[shared]: ".".join(path[:shared + 1]) for path in paths}
    found = {name: _branch(prefix, units, heads) for name, prefix in branches.items()}
    if trunk and all(name.isdigit() for name in found):  # a list of alike outputs, as for several scales, is one head
        return {"head": [unit for branch in found.values() for unit in branch]}
    return {f"head.{name}": branch for name, branch in found.items()}


def _branch(prefix: str, units: Sequence[Unit], heads: Sequence[Unit]) -> list[Unit]:
    """All units of a branch that serves one output only, else the heads in it."""
    inside = [unit for unit in units if f"{unit.name}.".startswith(f"{prefix}.")]
    outside = [unit for unit in units if unit not in inside]
    serves_one = not any(unit.feeds(other) for unit in inside for other in outside)
    is_fed = all(any(other.feeds(unit) for other in outside) for unit in inside)  # a tower of its own begins at an input
    small = sum(unit.kernels for unit in inside) <= sum(unit.kernels for unit in outside)
    if serves_one and is_fed and small and not any(_is_block(unit, inside) for unit in inside):
        return inside
    return [head for head in heads if head in inside]


def _is_block(unit: Unit, units: Sequence[Unit]) -> bool:
    """Whether a unit is one more of a kind that came before it in the flow."""
    alike = [other for other in units if other.kind is unit.kind and other is not unit]
    return unit.kernels > 1 and unit.kind not in CONTAINERS and any(other.feeds(unit) for other in alike)


def _is_tied(end: Unit, units: Sequence[Unit], trace: Trace) -> bool:
    """Whether the layer that makes the output uses a parameter of an earlier layer once more, such as the embeddings."""
    earlier = {id(p) for unit in units if unit.first_run < end.first_run for p in unit.params.values()}
    own = {id(p) for module in end.atoms[0].modules.values() for p in module.parameters()}
    return any(trace.behind_last_use.get(key, 0) & end.members for key in earlier - own)


def join_to_layers(body: Sequence[Unit], model: nn.Module, *, one_block_each: bool) -> list[list[Unit]]:
    """Divide the units before the head, in order of execution, into runs, each of which becomes a layer group.

    A stem is what comes before the first block of a tower. A stage is a run of blocks at one resolution, with the layer
    that changed the resolution before it; blocks that all work at one resolution are a run each, as in a transformer.
    """
    often = Counter(unit.kind for unit in body)
    within = {id(unit): other for unit in body for other in body if other.first_run < unit.first_run < other.end}
    blocks = [unit for unit in body if unit.kernels > 1 and often[unit.kind] > 1 and id(unit) not in within]
    stems, entered = _before_the_blocks([unit for unit in body if id(unit) not in within], blocks)
    entered |= within  # a part that several blocks share, and that runs within each of them
    runs: list[list[Unit]] = []
    stem_runs: dict[int, list[Unit]] = {}  # by the id of the first block that a stem feeds
    for unit in body:
        if id(unit) in entered:
            continue
        if id(unit) in stems:
            block = id(stems[id(unit)])
            if block not in stem_runs:
                stem_runs[block] = []
                runs.append(stem_runs[block])
            stem_runs[block].append(unit)
        elif runs and runs[-1] not in stem_runs.values() and _continues(runs[-1], unit, body, blocks, one_block_each):
            runs[-1].append(unit)
        elif (len(runs) > 1 and unit in blocks and not any(other in blocks for other in runs[-1])
              and _continues(runs[-2], unit, body, blocks, one_block_each)):  # a layer between two blocks of a stage
            runs[-2:] = [[*runs[-2], *runs[-1], unit]]
        elif abreast := [run for run in runs if all(_are_abreast(other, unit, model) for other in run)]:
            abreast[0].append(unit)
        else:
            runs.append([unit])
    for unit in body:
        if id(unit) in entered:
            next(run for run in runs if entered[id(unit)] in run).append(unit)
    return runs


def _before_the_blocks(body: Sequence[Unit], blocks: Sequence[Unit]) -> tuple[dict[int, Unit], dict[int, Unit]]:
    """Which block each unit without a block before it leads to: as a part of that tower's stem, or beside the flow.

    What enters a block that other blocks feed too, such as the embedding of a decoder's positions, belongs to that block.
    """
    stems: dict[int, Unit] = {}
    entered: dict[int, Unit] = {}
    for unit in body:
        if unit in blocks or (unit.kernels > 1 and unit.fed) or any(block.feeds(unit) for block in blocks):
            continue
        block = next((block for block in blocks if unit.feeds(block)), None)
        if block is None and not any(other.fed for other in body):  # no flow is known, only the order
            block = next((block for block in blocks if block.first_run > unit.first_run), None)
            before = [other for other in blocks if block and other.first_run < block.first_run]
        else:
            before = [other for other in blocks if block and other.feeds(block)]
        if block is None:
            continue
        if not before:
            stems[id(unit)] = block
        elif not unit.fed:
            entered[id(unit)] = block
    in_stems = sum(unit.kernels for unit in body if id(unit) in stems)
    if in_stems > sum(unit.kernels for unit in body) / 2:  # the larger part of a backbone is no stem
        stems = {}
    return stems, entered


def _continues(run: list[Unit], unit: Unit, body: Sequence[Unit], blocks: Sequence[Unit], one_block_each: bool) -> bool:
    """Whether a unit belongs to the run of units before it."""
    last = run[-1]
    if not unit.kernels:
        return True
    if unit.fed and not any(other.feeds(unit) for other in run):  # a branch beside it
        return False
    has_block = any(other in blocks for other in run)
    if one_block_each and (has_block or unit not in blocks):
        return False
    resolution = _resolution(unit.shape)
    before = _resolution(next((other.shape for other in reversed(run) if other.shape), ()))
    if resolution is None or resolution != before:
        return False
    if unit in blocks and not has_block:  # if the layer before it changed the resolution, that opened this stage
        fed_by = next((other for other in reversed(body) if other.feeds(run[0]) and other.shape), None)
        return fed_by is not None and _resolution(fed_by.shape) != resolution
    return _changes_resolution(unit, blocks) and unit.region == last.region


def _are_abreast(unit: Unit, other: Unit, model: nn.Module) -> bool:
    """Whether two layers are in one list and neither works on what the other gave, as one embedding for each column."""
    parent = unit.name.rpartition(".")[0]
    return (unit.in_flow and other.in_flow and unit.kernels <= 1 and other.kernels <= 1 and not unit.feeds(other)
            and parent == other.name.rpartition(".")[0] and parent != "" and type(model.get_submodule(parent)) in CONTAINERS)


def _resolution(shape: tuple[int, ...]) -> int | None:
    """The number of places in a feature map [N, C, H, W] or [N, H, W, C], of tokens in [N, L, C]; else None."""
    if len(shape) < 3:
        return None
    if len(shape) == 3:
        return shape[1]
    channels_last = shape[1] == shape[2] and shape[2] != shape[3]
    return prod(shape[1:-1] if channels_last else shape[2:])


def _changes_resolution(unit: Unit, blocks: Sequence[Unit]) -> bool:
    """Whether stages of one resolution each are what this unit's network is made of, as they are not in a transformer."""
    alike = [block for block in blocks if block.kind is unit.kind] or [unit]
    if len(unit.shape) == 3:  # tokens: their number may change, but only stages change the number of features
        return len({block.shape[-1] for block in alike if block.shape and block.region == unit.region}) > 1
    nearby = alike + [block for block in blocks if block.region == unit.region]
    return unit not in blocks or len({_resolution(block.shape) for block in nearby}) > 1


def run_name(run: Sequence[Unit], runs: Sequence[Sequence[Unit]], model: nn.Module) -> str:
    """``layer1``, or ``inception3a..inception3b``: the largest modules that are wholly in this run, first and last."""
    in_run = {id(p) for unit in run for p in unit.params.values()}
    most = max(min(unit.kernels, 2) for unit in run)
    named = [unit.name for unit in run if min(unit.kernels, 2) == most]
    others = [unit.name for other in runs if other is not run for unit in other if unit.kernels >= most]

    @cache
    def is_whole(name: str) -> bool:
        return bool(name) and {id(p) for p in model.get_submodule(name).parameters()} <= in_run

    names = []
    for name in named:
        while is_whole(name.rpartition(".")[0]):
            name = name.rpartition(".")[0]
        if name not in names:
            names.append(name)
    if len(names) == 1:
        return names[0]
    paths = [name.split(".") for name in names]
    shared = ".".join(reduce(lambda a, b: a[:next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y),
                                                  min(len(a), len(b)))], paths))
    if shared and not any(f"{name}.".startswith(f"{shared}.") for name in others):
        return shared
    first, last = names[0], names[-1]
    return f"{first}..{last[len(shared) + 1:] if shared else last}"
