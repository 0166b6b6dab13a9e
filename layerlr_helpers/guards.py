"""Putting things back: modes, buffers, weights and random numbers, after a model was looked at or tried out."""

import copy
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from layerlr_helpers.optimizer_state import load_exactly


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Put back every module's mode, train or eval, and the values of every buffer, whatever happens inside."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(module, name, buffer, buffer.detach().clone())
               for module in model.modules() for name, buffer in module.named_buffers(recurse=False)]
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for module, name, buffer, values in buffers:
                setattr(module, name, buffer)
                if not buffer.is_meta and not torch.equal(buffer, values):
                    buffer.copy_(values)


@contextmanager
def training_undone(model: nn.Module, optimizer: Optimizer, loader: Iterable) -> Iterator[None]:
    """Let training happen inside, without gradients at first; then put back model, optimizer, gradients and random numbers."""
    weights = [(p, p.detach().clone(), p.grad) for p in model.parameters()]
    optimizer_state = copy.deepcopy(optimizer.state_dict())
    random_numbers = random_state(loader)
    try:
        with preserved(model):
            for p, _, _ in weights:
                p.grad = None
            yield
    finally:
        with torch.no_grad():
            for p, values, grad in weights:
                p.copy_(values)
                p.grad = grad
        set_random_state(random_numbers, loader)
        load_exactly(optimizer, optimizer_state)


@contextmanager
def seeded(seed: int, device: str = "cpu") -> Iterator[None]:
    """Let torch's random numbers depend on ``seed`` alone inside; afterwards its generators are where they were."""
    on_gpu = torch.device(device).type == "cuda"
    with torch.random.fork_rng(devices=[torch.device(device)] if on_gpu else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed all of the GPUs' generators, too
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def random_state(loader: Iterable) -> dict:
    """The state of torch's, Python's and NumPy's random generators and of the loader's own, in tensors and plain numbers."""
    name, key, *rest = np.random.get_state()  # noqa: NPY002 (the global generator is what many augmentations draw from)
    return {"cpu": torch.get_rng_state(), "loader": [g.get_state() for g in generators(loader)],
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
            "python": random.getstate(), "numpy": (name, key.tolist(), *rest)}


def set_random_state(state: dict, loader: Iterable) -> None:
    """Put the random generators of :func:`random_state` into a recorded state."""
    torch.set_rng_state(state["cpu"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    for generator, saved in zip(generators(loader), state["loader"], strict=True):
        generator.set_state(saved)
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):  # else the run has moved to another machine
        torch.cuda.set_rng_state_all(state["cuda"])


def samplers(loader: Iterable) -> list:
    """The samplers of a DataLoader, also the one within its batch sampler; none of another loader."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    candidates = (getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    return list({id(sampler): sampler for sampler in candidates if sampler is not None}.values())


def generators(loader: Iterable) -> list[torch.Generator]:
    """The random generators of a loader and of its samplers, each once."""
    candidates = [getattr(owner, "generator", None) for owner in (loader, *samplers(loader))]
    return list({id(g): g for g in candidates if isinstance(g, torch.Generator)}.values())
