"""Saving a run so that it can go on as if it had never stopped.

A checkpoint holds the state of all that trains, and a description of the run, which must fit the run that resumes. It holds
tensors, numbers and words only, and is read with ``weights_only=True``.
"""

import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from layerlr_helpers.files import torch_save, write_whole
from layerlr_helpers.guards import generators, random_state, samplers, set_random_state
from layerlr_helpers.optimizer_state import kept_outside, load_exactly, what_is_missing
from layerlr_helpers.param_groups import named
from layerlr_helpers.run_settings import first_difference, options, schedule_settings, unfreezing_settings, unmoved

FORMAT = 4


class CheckpointError(ValueError):
    """A checkpoint that a run cannot go on from, also one that would be, if it were saved."""


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


def run_description(parts: dict, loader: Iterable, unfreezing=None, settings: Mapping[str, object] | None = None) -> dict:
    """What a run was given, in plain numbers and words, to compare with the run that resumes it.

    ``settings`` are further plain values to compare, such as ``{"accumulate": 4}``. A loader whose batches a resumed run could
    not have again is a ValueError.
    """
    if getattr(loader, "persistent_workers", False):
        raise ValueError("a run with a checkpoint needs a DataLoader with persistent_workers=False: workers that live on from "
                         "epoch to epoch keep random numbers that no checkpoint can hold, so that a resumed run would have "
                         "other batches")
    if not getattr(loader, "in_order", True):
        raise ValueError("a run with a checkpoint needs a DataLoader with in_order=True: otherwise batches come as the workers "
                         "finish them, and a resumed run would leave out others than those that it had")
    model_state, groups = parts["model"].state_dict(), named(parts["optimizer"])
    return {
        "model": sorted(f"{name} {tuple(getattr(value, 'shape', ()))}" for name, value in model_state.items()),
        "precision": {name: str(value.dtype) for name, value in model_state.items() if isinstance(value, Tensor)},
        "type": {name: type(part).__name__ for name, part in parts.items() if name != "model"},
        "parameter group": [f"{name} {[tuple(p.shape) for p in group['params']]}" for name, group in groups.items()],
        "options": {name: options(group) for name, group in groups.items()},
        "optimizer": kept_outside(parts["optimizer"]),
        "schedule": schedule_settings(parts["schedule"]),
        "train loader": {"batches": str(length(loader)), "generators": len(generators(loader))},
        "settings": dict(settings or {}),
        **unfreezing_settings(unfreezing)}


def save(path: str | Path, parts: dict, rows: list[dict], state: RunState, loader: Iterable, run: dict) -> None:
    """Save the ``state_dict`` of each of ``parts`` (None stays None), the history and how far the run is, atomically.

    ``run`` is the :func:`run_description` of the beginning. What the run itself has moved since is left out of it.
    A state with an object that a reader with ``weights_only=True`` would refuse is a ValueError, and so is an optimizer
    that keeps more than its state_dict() holds. A file that cannot be written is an OSError.
    """
    states = {name: None if part is None else _plain(part.state_dict()) for name, part in parts.items()}
    if problem := what_is_missing(parts["optimizer"], states["optimizer"], run["optimizer"]):
        raise CheckpointError(f"cannot save to {path}: {problem}, so a run could not go on from there; train without a "
                              "checkpoint, or let its state_dict() hold all of its state")
    now = {name: options(group) for name, group in named(parts["optimizer"]).items()}
    numbers = {name: value for name, value in kept_outside(parts["optimizer"]).items() if not isinstance(value, str)}
    run = run | {"options": {name: unmoved(began, now[name]) for name, began in run["options"].items()},
                 "optimizer": unmoved(run["optimizer"], numbers),  # without tensors, which may have begun at random
                 "schedule": unmoved(run["schedule"], schedule_settings(parts["schedule"]))}
    content = {"format": FORMAT, "run": run, "rows": rows, "state": vars(replace(state, rng=random_state(loader))),
               "parts": states}

    def write(temporary: Path) -> None:
        torch_save(content, temporary)
        if unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(temporary):
            raise ValueError(f"cannot save to {path}: the model, the optimizer or the schedule has {', '.join(unsafe)} in its "
                             "state_dict(), where only tensors, numbers and text can be read back safely")

    write_whole(path, write)


def load(path: str | Path, parts: dict, loader: Iterable, run: dict, *, steps: int | None,
         epochs: int | None) -> tuple[list[dict], RunState, dict]:
    """Load what :func:`save` wrote into ``parts``; return the history's rows, how far the run is, and its description.

    A file that is damaged, is of a run that began otherwise than ``run`` describes, or is further than ``steps`` or ``epochs``
    (whichever is not None), is a CheckpointError, and changes nothing.
    """
    saved = _read(path)
    state = RunState(**saved["state"])
    problem = first_difference(saved["run"], run)
    if problem is None and steps is not None and state.step > steps:
        problem = f"it is at step {state.step}, further than the {steps} steps that are asked for"
    if problem is None and epochs is not None and (state.epoch, state.batch) > (epochs, 0):
        problem = f"it is at batch {state.batch} of epoch {state.epoch}, counted from 0, and {epochs} epochs are asked for"
    if problem is not None:
        raise CheckpointError(f"cannot resume from {path}: {problem}; move it away to start anew")
    if all(callable(getattr(parts["optimizer"], mode, None)) for mode in ("train", "eval")):
        parts["optimizer"].train()  # as when it was saved: not every optimizer with modes has its mode in its state_dict()
    for name, part in parts.items():
        if name == "optimizer":
            load_exactly(part, saved["parts"][name])
        elif part is not None:
            part.load_state_dict(saved["parts"][name])
    set_random_state(state.rng, loader)
    return saved["rows"], state, saved["run"] | {"optimizer": run["optimizer"] | saved["run"]["optimizer"]}


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
