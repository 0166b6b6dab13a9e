"""What a run was made with, in plain numbers and words that can be saved and compared: options, schedule, unfreezing."""

import types
import warnings
from collections.abc import Callable, Mapping
from itertools import zip_longest

import numpy as np
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from layerlr_helpers.schedules import peak_rate

# What the steps of torch's schedules move. All else in a schedule is taken for what it was made with.
_PROGRESS = {"last_epoch", "_last_lr", "_step_count", "_is_initial", "_get_lr_called_within_step", "T_cur", "T_i", "best",
             "num_bad_epochs", "cooldown_counter"}
# Not compared: a run may go on elsewhere, with the implementation that is fast there.
_IMPLEMENTATION = {"params", "foreach", "fused", "capturable", "differentiable"}
# The steps at which a function of the step is looked at: all the first ones, then each 2 % later than the one before.
_SAMPLED_STEPS = [*range(200), *(int(200 * 1.02 ** i) for i in range(1, 430))]


def schedule_settings(schedule: LRScheduler | ReduceLROnPlateau | None) -> dict[str, object]:
    """What a schedule was made with, and every schedule within it: ``{"T_max": 100, "eta_min": 0.0, "base_lrs": [0.1]}``.

    From its attributes, since its state_dict() leaves functions out. Of a function the values at many steps are given.
    """
    return {} if schedule is None else {name: value for name, value in _leaves(schedule).items() if name != "type"}


def options(group: dict) -> dict[str, object]:
    """The numbers in a parameter group, as they were before a schedule moved them."""
    found = {name: value for name, value in group.items() if name not in _IMPLEMENTATION}
    if group.get("lr") is not None:  # some optimizers find their own
        found["lr"] = peak_rate(group)
    if "max_momentum" in group:  # a one-cycle schedule moves the momentum between this and base_momentum
        found.pop("momentum", None)
        found["betas"] = tuple(group.get("betas", ()))[1:]
    return {name: number for name, value in found.items() if (number := _number_or_numbers(value)) is not None}


def unfreezing_settings(unfreezing) -> dict[str, list[str]]:
    """When layers unfreeze; nothing, if an unfreezing of the user's own has no plan and no ``batch_norm`` to tell it by."""
    changes = hasattr(unfreezing, "state_dict")  # then the plan is a part of its state
    plan = getattr(unfreezing, "plan", None) if not changes else None
    settings = [f"first step of {name} {first}" for name, first in getattr(plan, "first_steps", {}).items()]
    if isinstance(batch_norm := getattr(unfreezing, "batch_norm", None), str):
        settings.append(f"batch_norm {batch_norm}")
    return {"unfreezing": settings} if settings or unfreezing is None else {}


def unmoved(began: Mapping[str, object], now: Mapping[str, object]) -> dict[str, object]:
    """Those of the settings of the beginning that are still the same: what a run moves itself is none of its settings."""
    return {name: value for name, value in began.items() if name in now and _same(now[name], value)}


def first_difference(saved, present, where: str = "") -> str | None:
    """The first difference between two descriptions in words, or None.

    Of two lists each entry must be the same. Of two dictionaries, what only one of them has is not compared.
    """
    if isinstance(saved, dict):
        pairs = [(f"{where} / {name}", saved[name], present[name]) for name in saved if name in present]
    elif isinstance(saved, list):
        pairs = [(where, *pair) for pair in zip_longest(saved, present, fillvalue="nothing")]
    elif not _same(saved, present):
        return f"it is of another run, where {where[3:]} was {str(saved)[:80]}; in this run it is {str(present)[:80]}"
    else:
        return None
    return next(filter(None, (first_difference(before, now, what) for what, before, now in pairs)), None)


def _same(a, b) -> bool:
    return a == b or repr(a) == repr(b)  # the second for what is not a number, which does not equal itself


def _leaves(value, name: str = "", within: tuple[int, ...] = ()) -> dict[str, object]:
    """The plain values in a value, each named by the way to it, ``{"_schedulers / 1 / T_max": 8}``."""
    if value is None or isinstance(value, str) or (number := _number(value)) is not None:
        return {name: value if value is None or isinstance(value, str) else number}
    if id(value) in within:  # it refers to what holds it
        return {}
    function = callable(value) and not isinstance(value, (type, nn.Module))
    if isinstance(value, (LRScheduler, ReduceLROnPlateau)) or (function and _is_an_object(value)):
        inner = {"type": type(value).__name__} | {key: entry for key, entry in vars(value).items() if key not in _PROGRESS}
    elif isinstance(value, Mapping):
        inner = {"keys": sorted(map(str, value))} | {str(key): entry for key, entry in value.items()}
    elif isinstance(value, (list, tuple)):
        inner = {"length": len(value)} | {str(place): entry for place, entry in enumerate(value)}
    else:
        return {name: _values_by_step(value)} if function else {}
    prefix = f"{name} / " if name else ""
    return {leaf: plain for key, entry in inner.items()
            for leaf, plain in _leaves(entry, prefix + key, (*within, id(value))).items()}


def _is_an_object(function: Callable) -> bool:
    """Whether something that can be called has attributes, which then are its settings."""
    return not isinstance(function, (types.FunctionType, types.MethodType)) and bool(getattr(function, "__dict__", None))


def _values_by_step(function: Callable[[int], float]) -> list[str]:
    values = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is called at steps that the run may never come to
        for step in _SAMPLED_STEPS:
            try:
                values.append(f"{float(function(step))!r} at step {step}")
            except Exception:  # nobody knows for which steps a function of the user's own was made
                continue
    return values


def _number(value) -> bool | int | float | None:
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.numel() == 1):
        value = value.item()
    return value if isinstance(value, (bool, int, float)) else None


def _number_or_numbers(value) -> bool | float | tuple | None:
    if isinstance(value, (list, tuple)):
        numbers = tuple(map(_number_or_numbers, value))
        return None if None in numbers else numbers
    return _number(value)
