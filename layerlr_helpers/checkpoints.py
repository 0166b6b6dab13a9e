"""Saving a run so that it can go on as if it had never stopped.

A checkpoint is written to a temporary file and renamed, so that at any moment there is one whole checkpoint or
none. It holds plain tensors and numbers only and is read with ``weights_only=True``.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

FORMAT = 1


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
        if hasattr(getattr(loader, "sampler", None), "set_epoch"):  # a DistributedSampler shuffles only when told
            loader.sampler.set_epoch(self.epoch)
        drawn = 0
        for drawn, batch in enumerate(loader, start=1):
            if drawn > done:
                yield batch
            elif drawn == done:
                set_random_state(self.rng, loader)
        if drawn == 0:
            raise ValueError("the train loader gave no batch")


def save(path: str | Path, parts: dict, rows: list[dict], place: Place, loader: Iterable) -> None:
    """Save the ``state_dict`` of each of ``parts`` (None stays None), the history and the place, atomically."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    states = {name: None if part is None else part.state_dict() for name, part in parts.items()}
    place = {"step": place.step, "epoch": place.epoch, "batch": place.batch, "epoch_rng": place.epoch_rng,
             "rng": random_state(loader)}
    torch.save({"format": FORMAT, "parts": states, "rows": rows, "place": place}, temporary)
    os.replace(temporary, path)


def load(path: str | Path, parts: dict, loader: Iterable) -> tuple[list[dict], Place]:
    """Load what :func:`save` wrote into ``parts`` and return the history's rows and the place.

    Raises:
        ValueError: the file is damaged, is no checkpoint of ``fit``, or is of another model, optimizer or loader.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises a different error for each way of being damaged
        raise ValueError(f"cannot read {path} ({error}); move it away to start anew") from error
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise ValueError(f"{path} was not written by fit; move it away to start anew")
    place = Place(**saved["place"])
    problem = (_model_problem(parts["model"], saved["parts"]["model"])
               or _optimizer_problem(parts["optimizer"], saved["parts"]["optimizer"])
               or _presence_problem(parts, saved["parts"])
               or _loader_problem(place, loader))
    if problem:
        raise ValueError(f"cannot resume from {path}: {problem}")
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
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def _generators(loader: Iterable) -> list[torch.Generator]:
    owners = (loader, getattr(loader, "sampler", None))
    return [g for owner in owners if isinstance(g := getattr(owner, "generator", None), torch.Generator)]


def _model_problem(model: nn.Module, saved: dict[str, Tensor]) -> str | None:
    own = {name: value.shape for name, value in model.state_dict().items()}
    other = {name: value.shape for name, value in saved.items()}
    differ = sorted(name for name in own.keys() | other.keys() if own.get(name) != other.get(name))
    return f"it holds another model, which differs in {', '.join(differ[:3])}{' …' * (len(differ) > 3)}" if differ else None


def _optimizer_problem(optimizer: torch.optim.Optimizer, saved: dict) -> str | None:
    own = [len(group["params"]) for group in optimizer.param_groups]
    other = [len(group["params"]) for group in saved["param_groups"]]
    return f"its optimizer had groups of {other} tensors, this one has {own}" if own != other else None


def _presence_problem(parts: dict, saved: dict) -> str | None:
    differ = [name for name, part in parts.items() if (part is None) != (saved[name] is None)]
    return f"one of the two runs has a {differ[0]}, the other has none" if differ else None


def _loader_problem(place: Place, loader: Iterable) -> str | None:
    if len(_generators(loader)) != len(place.rng["loader"]):
        return "its train loader had a random generator of its own where this one has none, or the reverse"
    return None
