"""Whether an optimizer's state_dict() is all that it needs to go on, and loading it bit for bit.

torch's own optimizers keep everything in their state_dict(). Those that wrap another one, or keep averages of the weights, may
not: then a resumed run would train on, but otherwise than one that was never stopped.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer


def kept_outside(optimizer: Optimizer) -> dict[str, float | str]:
    """What an optimizer, or one that it wraps, keeps beside its state_dict(): its own numbers, and its tensors as text.

    ``{"k": 5, "slow_weights / 0": "12.75 in all of (8, 4)"}``. Of the numbers in its parameter groups there are none.
    """
    known = {id(tensor) for tensor in (*_tensors(optimizer.state_dict()).values(), *_parameters(optimizer))}
    return {name: _fingerprint(value) if isinstance(value, Tensor) else value
            for name, value in _attributes(optimizer) if id(value) not in known}


def what_is_missing(optimizer: Optimizer, state: Mapping, began: Mapping[str, float | str]) -> str | None:
    """What a state_dict() lacks of all that has changed in an optimizer since ``began``, its :func:`kept_outside` then.

    None if it lacks nothing.
    """
    name = type(optimizer).__name__
    if not {id(p) for p in _parameters(optimizer)}.isdisjoint(_keys(state)):
        return f"the state_dict() of {name} names parameters by their place in memory, which is another in the next process"
    changed = {kept: value for kept, value in kept_outside(optimizer).items() if began.get(kept) != value}
    saved = {*map(_fingerprint, _tensors(state).values()), *_numbers(state)} if changed else set()
    missing = [kept for kept, value in changed.items() if value not in saved]
    return f"the state_dict() of {name} does not hold its {missing[0]}, which training has changed" if missing else None


def load_exactly(optimizer: Optimizer, state: Mapping) -> None:
    """Load what ``optimizer.state_dict()`` gave, bit for bit; a ValueError if the optimizer's state is then another.

    torch itself gives every tensor of the state its parameter's type, which rounds the single precision that an optimizer may
    keep for parameters of half precision.
    """
    optimizer.load_state_dict(state)
    if "state" in state and hasattr(optimizer, "state"):
        indices = [index for group in state["param_groups"] for index in group["params"]]
        for index, p in zip(indices, _parameters(optimizer), strict=False):
            own = optimizer.state.get(p, {})
            own.update({name: value.to(p.device) for name, value in state["state"].get(index, {}).items()
                        if isinstance(value, Tensor) and name in own and own[name].dtype != value.dtype})
    loaded = _tensors(optimizer.state_dict())
    for name, value in _tensors(state).items():
        if name not in loaded or not _same_bits(loaded[name], value):
            raise ValueError(f"{type(optimizer).__name__} did not take back its state: {name} is not what was saved")


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _attributes(optimizer: Optimizer, prefix: str = "", within: tuple[int, ...] = ()) -> Iterator[tuple[str, float | Tensor]]:
    """The numbers of an optimizer, the tensors in its attributes, and those of the optimizers within it, by name."""
    for name, value in vars(optimizer).items():
        if name == "param_groups":
            continue
        if isinstance(value, (int, float)) and not isinstance(value, bool):  # many note by a flag that they made a step
            yield prefix + name, value
        yield from ((f"{prefix}{name}{place}", tensor) for place, tensor in _tensors(value).items())
        for key, part in [(None, value), *_entries(value)]:
            if hasattr(part, "param_groups") and id(part) not in within:
                place = name if key is None else f"{name} / {key}"
                yield from _attributes(part, f"{prefix}{place} / ", (*within, id(optimizer)))


def _tensors(value, place: str = "") -> dict[str, Tensor]:
    """The tensors in a nest of dictionaries and lists, by their place, ``" / state / 0 / exp_avg"``."""
    if isinstance(value, Tensor):
        return {place: value}
    return {name: tensor for key, entry in _entries(value) for name, tensor in _tensors(entry, f"{place} / {key}").items()}


def _numbers(state) -> set[float]:
    """The numbers in a state, but for those of single parameters."""
    if isinstance(state, (int, float)):
        return {state}
    return {number for key, entry in _entries(state) if key not in ("state", "params") for number in _numbers(entry)}


def _keys(state) -> set:
    return {key for key, _ in _entries(state)}.union(*(_keys(entry) for _, entry in _entries(state)))


def _entries(value) -> list[tuple]:
    """``(key, entry)`` of a dictionary or a list, where a parameter as a key is known by its number."""
    if isinstance(value, Mapping):
        return [(i if isinstance(key, Tensor) else key, entry) for i, (key, entry) in enumerate(value.items())]
    return list(enumerate(value)) if isinstance(value, (list, tuple)) else []


def _fingerprint(tensor: Tensor) -> str:
    total = (tensor.detach().abs() if tensor.is_complex() else tensor.detach()).double().sum().item()
    return f"{total!r} in all of {tuple(tensor.shape)}"


def _same_bits(a: Tensor, b: Tensor) -> bool:
    same_kind = a.dtype == b.dtype and a.shape == b.shape
    return same_kind and torch.equal(*(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))
