"""What both libraries' models share: what is expected of a model's groups, and how the groups are measured against it."""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from layerlr_helpers import LayerGroup, layer_groups

GRANULARITIES = ("stage", "block")
CHECKS = ("heads", "order", "levels")
Depths = Mapping[str, int]  # by the name of a parameter


@dataclass(frozen=True)
class Order:
    """A reference order: each parameter's place, which rises from the input to the output; ``strict`` allows no merging."""

    source: str
    granularity: str
    places: Mapping[str, float]
    strict: bool = False


@dataclass(frozen=True)
class Expected:
    """A model and what an expert says of its layers.

    ``heads`` are the names of the modules that are heads, none if the model has no head of its own. ``with_head`` are
    modules that may be at depth 0 besides. ``levels`` is the number of distinct depths for a granularity, where a
    published recipe says it. ``inputs`` are what to call the model with where ``layer_groups`` cannot find out.
    """

    model: nn.Module
    heads: Sequence[str]
    orders: Sequence[Order] = ()
    levels: Mapping[str, int] = field(default_factory=dict)
    with_head: Sequence[str] = ()
    inputs: object = None


@dataclass(frozen=True)
class Subject:
    """A model to group, which is built only when its turn comes."""

    library: str
    family: str
    name: str
    build: Callable[[], Expected]


@dataclass
class Result:
    """What came out for one model: a sentence for each thing that is wrong, by the kind of check."""

    library: str
    family: str
    name: str
    wrong: dict[str, str] = field(default_factory=dict)
    checked: list[str] = field(default_factory=list)  # the kinds of check that applied
    levels: dict[str, int] = field(default_factory=dict)  # ours, by granularity
    reference_levels: dict[str, int] = field(default_factory=dict)  # the reference's, by granularity
    groups: dict[str, list[tuple[str, int]]] = field(default_factory=dict)  # names and depths, by granularity
    warnings: list[str] = field(default_factory=list)
    needs_input: bool = False
    seconds: float = 0.0


def measure(subject: Subject) -> Result:
    """Build a model, group it in both granularities and compare with what is expected."""
    start, result = time.perf_counter(), Result(subject.library, subject.family, subject.name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = subject.build()
        _compare(expected, result)
    except Exception as error:  # of any kind: it is what came out
        result.wrong["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
    result.seconds = time.perf_counter() - start
    return result


def _compare(expected: Expected, result: Result) -> None:
    inputs = None
    depths = {}
    for granularity in GRANULARITIES:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                groups = layer_groups(expected.model, inputs, granularity=granularity)
            except ValueError:
                if expected.inputs is None or inputs is not None:
                    raise
                inputs, result.needs_input = expected.inputs, True
                groups = layer_groups(expected.model, inputs, granularity=granularity)
        depths[granularity] = {name: group.depth for group in groups for name in group.params}
        result.groups[granularity] = [(group.name, group.depth) for group in groups]
        result.levels[granularity] = levels(groups)
        result.warnings += [str(w.message) for w in caught if str(w.message) not in result.warnings]
    faults = {
        "heads": _first(wrong_heads(expected, depths[granularity], result.warnings) for granularity in GRANULARITIES),
        "order": _first(contradiction(order, depths[order.granularity]) for order in expected.orders),
        "levels": _first(f"{result.levels[granularity]} levels of granularity {granularity!r}, {number} expected"
                         for granularity, number in expected.levels.items() if result.levels[granularity] != number),
    }
    result.checked = ["heads"] + ["order"] * bool(expected.orders) + ["levels"] * bool(expected.levels)
    result.reference_levels = {order.granularity: len(set(order.places.values()))
                               for order in expected.orders if not order.strict}
    result.wrong = {kind: fault for kind, fault in faults.items() if fault}


def _first(faults: Iterator[str]) -> str:
    return next((fault for fault in faults if fault), "")


def levels(groups: Sequence[LayerGroup]) -> int:
    """The number of distinct depths, of which each gets its own learning rate under layer decay."""
    return len({group.depth for group in groups})


def is_under(name: str, modules: Sequence[str]) -> bool:
    """Whether a parameter belongs to one of the modules."""
    return any(name == module or name.startswith(module + ".") for module in modules)


def wrong_heads(expected: Expected, depths: Depths, messages: Sequence[str]) -> str:
    """What is wrong with depth 0, or an empty string.

    All of each head has to be there. What is beside it in the same part of the model may be (the norm and the hidden
    layer of a head), and so may a norm before it, but no other matrix or kernel.
    """
    at_zero = {name for name, depth in depths.items() if depth == 0}
    if not expected.heads:
        if at_zero:
            return f"no head expected, but {', '.join(sorted(at_zero)[:3])} at depth 0"
        return "" if any("head" in message for message in messages) else "no warning that there is no head"
    params = dict(expected.model.named_parameters())
    absent = [head for head in expected.heads if not any(is_under(name, [head]) for name in params)]
    if absent:
        return f"the model has no parameters under {', '.join(absent)}"
    deep = [name for name in depths if is_under(name, expected.heads) and name not in at_zero]
    if deep:
        return f"{deep[0]} is a head's and is at depth {depths[deep[0]]}"
    parts = [head.partition(".")[0] for head in expected.heads]
    beside = [name for name in at_zero if params[name].ndim > 1 and not is_under(name, [*parts, *expected.with_head])]
    return f"{sorted(beside)[0]} is no head's and is at depth 0" if beside else ""


def contradiction(order: Order, depths: Depths) -> str:
    """A pair of parameters that are in one order in the reference and in the other order by depth, or an empty string."""
    nearest = None  # the parameter with the least depth of all before this place
    places = sorted(set(order.places.values()))
    for place in places:
        here = [name for name, its_place in order.places.items() if its_place == place and name in depths]
        if not here:
            continue
        deepest = max(here, key=depths.get)
        if nearest and (depths[deepest] > depths[nearest] or (order.strict and depths[deepest] == depths[nearest])):
            return (f"{order.source} has {nearest} before {deepest}; their depths with granularity {order.granularity!r} are "
                    f"{depths[nearest]} and {depths[deepest]}")
        nearest = min([*here, *[nearest] * bool(nearest)], key=depths.get)
    return ""

