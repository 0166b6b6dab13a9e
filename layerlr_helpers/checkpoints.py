"""Saving a run so that it can go on as if it had never stopped.

A checkpoint is written to a temporary file and renamed, so that at any moment there is one whole checkpoint or
none. It holds plain tensors and numbers only and is read with ``weights_only=True``.
"""

import os
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

FORMAT = 2

# What a schedule is, where torch's schedulers say it in their state; the rest of the state is how far it has come.
_SCHEDULE_SETTINGS = ("total_steps", "total_iters", "T_max", "T_0", "step_size", "milestones", "gamma", "base_lrs",
                      "lr_lambdas")


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
        for sampler in _samplers(loader):
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


def save(path: str | Path, parts: dict, rows: list[dict], place: Place, loader: Iterable) -> None:
    """Save the ``state_dict`` of each of ``parts`` (None stays None), the history and the place, atomically.

    Raises:
        ValueError: a state holds an object that a reader with ``weights_only=True`` would refuse.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    states = {name: None if part is None else _plain(part.state_dict()) for name, part in parts.items()}
    place = {"step": place.step, "epoch": place.epoch, "batch": place.batch, "epoch_rng": place.epoch_rng,
             "rng": random_state(loader)}
    torch.save({"format": FORMAT, "run": _run(parts, loader), "parts": states, "rows": rows, "place": place}, temporary)
    if unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(temporary):
        temporary.unlink()
        raise ValueError(f"cannot save to {path}: the model, the optimizer or the schedule has {', '.join(unsafe)} in its "
                         "state_dict(), where only tensors, numbers and text can be read back safely")
    os.replace(temporary, path)


def load(path: str | Path, parts: dict, loader: Iterable, last_step: int | None = None) -> tuple[list[dict], Place]:
    """Load what :func:`save` wrote into ``parts`` and return the history's rows and the place.

    Nothing is changed if the file cannot be used.

    Raises:
        ValueError: the file is damaged, is no checkpoint of ``fit``, is of another model, optimizer, schedule or
            loader, or is further than ``last_step``.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch itself does not compare the checksums
                raise ValueError(f"{damaged} in it is not as it was written")
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises a different error for each way of being damaged
        raise ValueError(f"cannot read {path} ({str(error)[:200]}); move it away to start anew") from error
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise ValueError(f"{path} was not written by this version of fit; move it away to start anew")
    place = Place(**saved["place"])
    problem = (_model_problem(parts["model"], saved["parts"]["model"])
               or _run_problem(_run(parts, loader), saved["run"])
               or _schedule_problem(parts["schedule"], saved["parts"]["schedule"]))
    if last_step is not None and place.step > last_step:
        problem = problem or f"it is at step {place.step}, further than the {last_step} steps that are asked for"
    if problem:
        raise ValueError(f"cannot resume from {path}: {problem}; move it away to start anew")
    for name, part in parts.items():
        if part is not None:
            part.load_state_dict(saved["parts"][name])
    set_random_state(place.rng, loader)
    return saved["rows"], place


def random_state(loader: Iterable) -> dict:
    """The state of torch's random generators and of the loader's own."""
    return {"cpu": torch.get_rng_state(), "loader": [g.get_state() for g in _generators(loader)],
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []}


def set_random_state(state: dict, loader: Iterable) -> None:
    """Put torch's random generators and the loader's own into a recorded state."""
    torch.set_rng_state(state["cpu"])
    for generator, saved in zip(_generators(loader), state["loader"], strict=True):
        generator.set_state(saved)
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):  # else the run has moved to another machine
        torch.cuda.set_rng_state_all(state["cuda"])


def length(loader: Iterable) -> int | None:
    """The number of batches of an epoch; None if the loader does not know."""
    try:
        return len(loader)
    except TypeError:
        return None


def _samplers(loader: Iterable) -> list:
    batches = getattr(loader, "batch_sampler", None)
    found = (getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    return list({id(sampler): sampler for sampler in found if sampler is not None}.values())


def _generators(loader: Iterable) -> list[torch.Generator]:
    found = [getattr(owner, "generator", None) for owner in (loader, *_samplers(loader))]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _plain(state):
    """The same state with NumPy's numbers, which a safe reader refuses, as Python's."""
    if isinstance(state, np.generic):
        return state.item()
    if type(state) is dict:
        return {name: _plain(value) for name, value in state.items()}
    return type(state)(map(_plain, state)) if type(state) in (list, tuple) else state


def _run(parts: dict, loader: Iterable) -> dict[str, str]:
    """What must be the same in the run that resumes, in words."""
    names = {f"kind of {name}": type(part).__name__ for name, part in parts.items() if name != "model"}
    groups = {f"parameter group {i}": f"{group.get('name', '')} {[tuple(p.shape) for p in group['params']]}"
              for i, group in enumerate(parts["optimizer"].param_groups)}
    return names | groups | {"number of batches": str(length(loader)), "number of generators": str(len(_generators(loader)))}


def _run_problem(own: dict[str, str], saved: dict[str, str]) -> str | None:
    for what in saved | own:
        if own.get(what) != saved.get(what):
            return f"it is of another run, with {what} {str(saved.get(what))[:80]} and not {str(own.get(what))[:80]}"
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
