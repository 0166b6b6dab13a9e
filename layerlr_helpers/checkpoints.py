"""Saving a run so that it can go on as if it had never stopped.

A checkpoint holds the state of all that trains, and a description of the run, which must fit the run that resumes. It holds
tensors, numbers and words only, and is read with ``weights_only=True``.
"""

import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from layerlr_helpers.files import write_whole
from layerlr_helpers.guards import generators, random_state, samplers, set_random_state
from layerlr_helpers.param_groups import named
from layerlr_helpers.schedules import peak_rate

FORMAT = 3

# What a schedule was made with, where torch's schedulers have it in their state; the rest is how far it has come.
_SCHEDULE_SETTINGS = ("total_steps", "total_iters", "T_max", "T_0", "step_size", "milestones", "gamma", "base_lrs",
                      "lr_lambdas")
# Not compared: a run may go on elsewhere, with the implementation that is fast there.
_IMPLEMENTATION = {"params", "foreach", "fused", "capturable", "differentiable"}


class CheckpointError(ValueError):
    """A checkpoint that a run cannot go on from."""


@dataclass
class RunState:
    """How far a run has come: ``step`` steps in all, ``batch`` batches of epoch number ``epoch``."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    epoch_rng: dict | None = None  # the random state at the start of this epoch, which fixes its order of batches
    rng: dict | None = None  # the random state to go on with after the batches of a resumed epoch were drawn again

    def remaining_batches(self, loader: Iterable) -> Iterator:
        """The batches of this epoch that are still to do; those done before a resume are drawn again and dropped."""
        done = self.batch
        if done:
            set_random_state(self.epoch_rng, loader)
        self.epoch_rng = random_state(loader)
        for sampler in samplers(loader):
            if hasattr(sampler, "set_epoch"):  # a DistributedSampler shuffles only when it is given the epoch
                sampler.set_epoch(self.epoch)
        drawn = 0
        for drawn, batch in enumerate(loader, start=1):
            if drawn > done:
                yield batch
            elif drawn == done:
                set_random_state(self.rng, loader)
        if drawn == 0:
            raise ValueError("the train loader gave no batch")


def run_description(parts: dict, loader: Iterable, unfreezing=None) -> dict:
    """What a run was given, in plain numbers and words, to compare with the run that resumes it.

    Of two lists each entry must be the same. Of two dictionaries, what only one of them has is not compared.
    """
    groups = named(parts["optimizer"])
    schedule_state = _plain(parts["schedule"].state_dict()) if parts["schedule"] is not None else {}
    return {
        "model": sorted(f"{name} {tuple(getattr(value, 'shape', ()))}" for name, value in parts["model"].state_dict().items()),
        "type": {name: type(part).__name__ for name, part in parts.items() if name != "model"},
        "parameter group": [f"{name} {[tuple(p.shape) for p in group['params']]}" for name, group in groups.items()],
        "options": {name: _options(group) for name, group in groups.items()},
        "schedule": {name: repr(schedule_state[name]) for name in _SCHEDULE_SETTINGS if name in schedule_state},
        "train loader": {"batches": str(length(loader)), "generators": len(generators(loader))},
        **_unfreezing_settings(unfreezing)}


def save(path: str | Path, parts: dict, rows: list[dict], state: RunState, loader: Iterable, run: dict) -> None:
    """Save the ``state_dict`` of each of ``parts`` (None stays None), the history and how far the run is, atomically.

    ``run`` is the :func:`run_description` of the beginning. Options that the run itself has moved since are left out of it.
    A state with an object that a reader with ``weights_only=True`` would refuse is a ValueError.
    """
    now = {name: _options(group) for name, group in named(parts["optimizer"]).items()}
    options = {name: {option: value for option, value in began.items() if now[name].get(option) == value}
               for name, began in run["options"].items()}
    content = {"format": FORMAT, "run": run | {"options": options}, "rows": rows,
               "state": vars(replace(state, rng=random_state(loader))),
               "parts": {name: None if part is None else _plain(part.state_dict()) for name, part in parts.items()}}

    def write(temporary: Path) -> None:
        torch.save(content, temporary)
        if unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(temporary):
            raise ValueError(f"cannot save to {path}: the model, the optimizer or the schedule has {', '.join(unsafe)} in its "
                             "state_dict(), where only tensors, numbers and text can be read back safely")

    write_whole(path, write)


def load(path: str | Path, parts: dict, loader: Iterable, run: dict, last_step: int) -> tuple[list[dict], RunState, dict]:
    """Load what :func:`save` wrote into ``parts``; return the history's rows, how far the run is, and its description.

    A file that is damaged, is of a run that began otherwise than ``run`` describes, or is further than ``last_step``, is a
    CheckpointError, and changes nothing.
    """
    saved = _read(path)
    state = RunState(**saved["state"])
    problem = _first_difference(saved["run"], run)
    if problem is None and state.step > last_step:
        problem = f"it is at step {state.step}, further than the {last_step} steps that are asked for"
    if problem is not None:
        raise CheckpointError(f"cannot resume from {path}: {problem}; move it away to start anew")
    for name, part in parts.items():
        if part is not None:
            part.load_state_dict(saved["parts"][name])
    set_random_state(state.rng, loader)
    return saved["rows"], state, saved["run"]


def step(path: str | Path) -> int:
    """How many steps the run in a checkpoint has done; a file that is damaged is a CheckpointError."""
    return _read(path)["state"]["step"]


def length(loader: Iterable) -> int | None:
    """The number of batches of an epoch; None if the loader does not know."""
    try:
        return len(loader)
    except TypeError:
        return None


def _read(path: str | Path) -> dict:
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch itself does not compare the checksums
                raise ValueError(f"{damaged} in it is not as it was written")
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises a different error for each way of being damaged
        raise CheckpointError(f"cannot read {path} ({str(error)[:200]}); move it away to start anew") from error
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise CheckpointError(f"{path} was not written by this version of fit; move it away to start anew")
    return saved


def _plain(state):
    """The same state with NumPy's numbers, which a safe reader refuses, as Python's."""
    if isinstance(state, np.generic):
        return state.item()
    if type(state) is dict:
        return {name: _plain(value) for name, value in state.items()}
    return type(state)(map(_plain, state)) if type(state) in (list, tuple) else state


def _first_difference(saved, present, where: str = "") -> str | None:
    """The first difference between two descriptions, in words."""
    if isinstance(saved, dict):
        pairs = [(f"{where} / {name}", saved[name], present[name]) for name in saved if name in present]
    elif isinstance(saved, list):
        pairs = [(where, *pair) for pair in zip_longest(saved, present, fillvalue="nothing")]
    elif saved != present:
        return f"it is of another run, where {where[3:]} was {str(saved)[:80]}; in this run it is {str(present)[:80]}"
    else:
        return None
    return next(filter(None, (_first_difference(before, now, what) for what, before, now in pairs)), None)


def _options(group: dict) -> dict:
    """The numbers in a parameter group, as they were before a schedule moved them."""
    options = {name: value for name, value in group.items() if name not in _IMPLEMENTATION}
    if "lr" in group:
        options["lr"] = peak_rate(group)
    if "max_momentum" in group:  # a one-cycle schedule moves the momentum between this and base_momentum
        options.pop("momentum", None)
        options["betas"] = tuple(group.get("betas", ()))[1:]
    return {name: number for name, value in options.items() if (number := _number_or_numbers(value)) is not None}


def _number_or_numbers(value) -> float | tuple | None:
    if isinstance(value, (list, tuple)):
        numbers = tuple(map(_number_or_numbers, value))
        return None if None in numbers else numbers
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.numel() == 1):
        value = value.item()
    return value if isinstance(value, (bool, int, float)) else None


def _unfreezing_settings(unfreezing) -> dict[str, list[str]]:
    """When layers unfreeze; nothing, if an unfreezing of the user's own has no plan and no ``batch_norm`` to tell it by."""
    changes = hasattr(unfreezing, "state_dict")  # then the plan is a part of its state
    plan = getattr(unfreezing, "plan", None) if not changes else None
    settings = [f"first step of {name} {first}" for name, first in getattr(plan, "first_steps", {}).items()]
    if isinstance(batch_norm := getattr(unfreezing, "batch_norm", None), str):
        settings.append(f"batch_norm {batch_norm}")
    return {"unfreezing": settings} if settings or unfreezing is None else {}
