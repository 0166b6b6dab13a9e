"""Saving a run so that it can go on as if it had never stopped.

A checkpoint is written to a temporary file and renamed, so that at any moment there is one whole checkpoint or
none. It holds plain tensors and numbers only and is read with ``weights_only=True``.
"""

import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from layerlr_helpers.files import put_in_place
from layerlr_helpers.guards import generators, random_state, samplers, set_random_state
from layerlr_helpers.param_groups import named
from layerlr_helpers.schedules import peak_rate

FORMAT = 2

# What a schedule is, where torch's schedulers say it in their state; the rest of the state is how far it has come.
_SCHEDULE_SETTINGS = ("total_steps", "total_iters", "T_max", "T_0", "step_size", "milestones", "gamma", "base_lrs",
                      "lr_lambdas")
# In a parameter group, but no setting: most say how a step is computed, and a run may go on elsewhere in the way that is fast.
_NO_SETTINGS = {"params", "foreach", "fused", "capturable", "differentiable"}


class CheckpointError(ValueError):
    """A checkpoint that a run cannot go on from."""


@dataclass
class Place:
    """Where a run is: ``step`` steps done in all, ``batch`` batches done of epoch number ``epoch``."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    epoch_rng: dict | None = None  # the random state at the start of this epoch, which fixes its order of batches
    rng: dict | None = None  # the random state to go on with after the batches of a resumed epoch were replayed

    def remaining_batches(self, loader: Iterable) -> Iterator:
        """The batches of this epoch that are still to do; those done before a resume are drawn again and dropped."""
        done = self.batch
        if done:
            set_random_state(self.epoch_rng, loader)
        self.epoch_rng = random_state(loader)
        for sampler in samplers(loader):
            if hasattr(sampler, "set_epoch"):  # a DistributedSampler shuffles only when told
                sampler.set_epoch(self.epoch)
        drawn = 0
        for drawn, batch in enumerate(loader, start=1):
            if drawn > done:
                yield batch
            elif drawn == done:
                set_random_state(self.rng, loader)
        if drawn == 0:
            raise ValueError("the train loader gave no batch")


def save(path: str | Path, parts: dict, rows: list[dict], place: Place, loader: Iterable, settings: dict) -> None:
    """Save the ``state_dict`` of each of ``parts`` (None stays None), the history and the place, atomically.

    ``settings`` are the :func:`settings_of` the run when it began.

    Raises:
        ValueError: a state holds an object that a reader with ``weights_only=True`` would refuse.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    states = {name: None if part is None else _plain(part.state_dict()) for name, part in parts.items()}
    place = {"step": place.step, "epoch": place.epoch, "batch": place.batch, "epoch_rng": place.epoch_rng,
             "rng": random_state(loader)}
    torch.save({"format": FORMAT, "run": _run(parts, loader), "settings": settings, "parts": states, "rows": rows,
                "place": place}, temporary)
    if unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(temporary):
        temporary.unlink()
        raise ValueError(f"cannot save to {path}: the model, the optimizer or the schedule has {', '.join(unsafe)} in its "
                         "state_dict(), where only tensors, numbers and text can be read back safely")
    put_in_place(temporary, path)


def load(path: str | Path, parts: dict, loader: Iterable, settings: dict,
         last_step: int | None = None) -> tuple[list[dict], Place, dict]:
    """Load what :func:`save` wrote into ``parts`` and return the history's rows, the place and the settings of the beginning.

    Nothing is changed if the file cannot be used. A file of an older version has no settings to compare with.

    Raises:
        CheckpointError: the file is damaged, is no checkpoint of ``fit``, is of another model, optimizer, schedule or
            loader, began with other ``settings``, or is further than ``last_step``.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch itself does not compare the checksums
                raise ValueError(f"{damaged} in it is not as it was written")
    except Exception as error:  # a damaged file raises a different error for each way of being damaged
        raise _unreadable(path, error) from error
    saved = _read(path)
    place = Place(**saved["place"])
    began = saved.get("settings", settings)
    problem = (_model_problem(parts["model"], saved["parts"]["model"])
               or _run_problem(_run(parts, loader), saved["run"])
               or _settings_problem(settings, began, saved["parts"]["optimizer"]["param_groups"])
               or _schedule_problem(parts["schedule"], saved["parts"]["schedule"]))
    if last_step is not None and place.step > last_step:
        problem = problem or f"it is at step {place.step}, further than the {last_step} steps that are asked for"
    if problem:
        raise CheckpointError(f"cannot resume from {path}: {problem}; move it away to start anew")
    for name, part in parts.items():
        if part is not None:
            part.load_state_dict(saved["parts"][name])
    set_random_state(place.rng, loader)
    return saved["rows"], place, began


def step(path: str | Path) -> int:
    """How many steps the run in a checkpoint has done; the rest of the file is not read.

    Raises:
        CheckpointError: the file is damaged, or no checkpoint of ``fit``.
    """
    return _read(path, mmap=True)["place"]["step"]


def settings_of(optimizer: Optimizer, unfreezing=None) -> dict:
    """What a run was given, in plain numbers: the options of each parameter group, and how layers unfreeze.

    Of what a schedule moves, it is where the schedule starts from.
    """
    # An unfreezing with a state writes its own plan, which is no setting.
    plan = getattr(unfreezing, "plan", None) if not hasattr(unfreezing, "state_dict") else None
    first_steps = {f"first step of {name}": first for name, first in getattr(plan, "first_steps", {}).items()}
    batch_norm = getattr(unfreezing, "batch_norm", None)
    told = first_steps | ({"batch_norm": batch_norm} if isinstance(batch_norm, str) else {})
    # One of the user's own may tell nothing of itself, so there is nothing to compare.
    return {"groups": _options(optimizer.param_groups), "unfreezing": told if told or unfreezing is None else None}


def length(loader: Iterable) -> int | None:
    """The number of batches of an epoch; None if the loader does not know."""
    try:
        return len(loader)
    except TypeError:
        return None


def _plain(state):
    """The same state with NumPy's numbers, which a safe reader refuses, as Python's."""
    if isinstance(state, np.generic):
        return state.item()
    if type(state) is dict:
        return {name: _plain(value) for name, value in state.items()}
    return type(state)(map(_plain, state)) if type(state) in (list, tuple) else state


def _read(path: str | Path, **how) -> dict:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, **how)
    except Exception as error:  # a damaged file raises a different error for each way of being damaged
        raise _unreadable(path, error) from error
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise CheckpointError(f"{path} was not written by this version of fit; move it away to start anew")
    return saved


def _unreadable(path: str | Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"cannot read {path} ({str(error)[:200]}); move it away to start anew")


def _options(groups: Iterable[dict]) -> list[dict]:
    found = []
    for group in groups:
        options = {name: value for name, value in group.items() if name not in _NO_SETTINGS}
        if "lr" in group:
            options["lr"] = peak_rate(group)
        if "max_momentum" in group:  # a one-cycle schedule moves the momentum between this and base_momentum
            options.pop("momentum", None)
            options["betas"] = tuple(group.get("betas", ()))[1:]
        numbers = {name: _number_or_numbers(value) for name, value in options.items()}
        found.append({name: value for name, value in numbers.items() if value is not None})
    return found


def _number_or_numbers(value) -> float | tuple | None:
    if isinstance(value, (list, tuple)):
        numbers = tuple(map(_number_or_numbers, value))
        return None if None in numbers else numbers
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.numel() == 1):
        value = value.item()
    return value if isinstance(value, (bool, int, float)) else None


def _run(parts: dict, loader: Iterable) -> dict[str, str]:
    """What must be the same in the run that resumes, in words."""
    names = {f"kind of {name}": type(part).__name__ for name, part in parts.items() if name != "model"}
    groups = {f"parameter group {i}": f"{group.get('name', '')} {[tuple(p.shape) for p in group['params']]}"
              for i, group in enumerate(parts["optimizer"].param_groups)}
    return names | groups | {"number of batches": str(length(loader)), "number of generators": str(len(generators(loader)))}


def _run_problem(own: dict[str, str], saved: dict[str, str]) -> str | None:
    for what in saved | own:
        if own.get(what) != saved.get(what):
            return f"it is of another run, with {what} {str(saved.get(what))[:80]} and not {str(own.get(what))[:80]}"
    return None


def _settings_problem(own: dict, began: dict, later: list[dict]) -> str | None:
    """``later`` are the parameter groups at the checkpoint: an option that the run itself has moved since is no setting."""
    for name, here, there, now in zip(named(later), own["groups"], began["groups"], _options(later), strict=True):
        for option in there:  # those of another version of torch may not be here
            if here.get(option, there[option]) != there[option] == now.get(option):
                return f"its parameter group {name!r} began with {option} {there[option]}, and here it has {here[option]}"
    if None in (own["unfreezing"], began["unfreezing"]):
        return None
    for what in began["unfreezing"] | own["unfreezing"]:
        here, there = (settings["unfreezing"].get(what, "not set") for settings in (own, began))
        if here != there:
            return f"its unfreezing had {what} {there}, this one has {here}"
    return None


def _model_problem(model: nn.Module, saved: dict[str, Tensor]) -> str | None:
    own = {name: getattr(value, "shape", None) for name, value in model.state_dict().items()}
    other = {name: getattr(value, "shape", None) for name, value in saved.items()}
    differ = [name for name in own | other if (name in own) != (name in other) or own[name] != other[name]]
    return f"it holds another model, which differs in {', '.join(differ[:3])}{' …' * (len(differ) > 3)}" if differ else None


def _schedule_problem(schedule, saved: dict | None) -> str | None:
    own = _plain(schedule.state_dict()) if schedule is not None else {}
    for name in _SCHEDULE_SETTINGS:
        if name in own and repr(own[name]) != repr(saved.get(name)):
            return f"its schedule had {name} {saved.get(name)}, this one has {own[name]}"
    return None
