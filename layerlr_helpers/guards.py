"""Leaving things as they were: modes, buffers and random numbers are put back after something was looked at or tried."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside: every module is afterwards in its mode again, every buffer has its values again."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(module, name, buffer, buffer.detach().clone())
               for module in modes for name, buffer in module.named_buffers(recurse=False)]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, values in buffers:
                setattr(module, name, buffer)
                if not buffer.is_meta and not torch.equal(buffer, values):
                    buffer.copy_(values)
        for module, training in modes.items():
            module.training = training


@contextmanager
def seeded(seed: int, device: str = "cpu") -> Iterator[None]:
    """Random numbers depend on ``seed`` alone inside; torch's generators, of this device too, are then as they were."""
    on_gpu = torch.device(device).type == "cuda"
    with torch.random.fork_rng(devices=[torch.device(device)] if on_gpu else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed all of the GPUs' generators, too
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def random_state(loader: Iterable) -> dict:
    """The state of torch's random generators and of the loader's own."""
    return {"cpu": torch.get_rng_state(), "loader": [g.get_state() for g in generators(loader)],
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []}


def set_random_state(state: dict, loader: Iterable) -> None:
    """Put torch's random generators and the loader's own into a recorded state."""
    torch.set_rng_state(state["cpu"])
    for generator, saved in zip(generators(loader), state["loader"], strict=True):
        generator.set_state(saved)
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):  # else the run has moved to another machine
        torch.cuda.set_rng_state_all(state["cuda"])


def samplers(loader: Iterable) -> list:
    batches = getattr(loader, "batch_sampler", None)
    found = (getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    return list({id(sampler): sampler for sampler in found if sampler is not None}.values())


def generators(loader: Iterable) -> list[torch.Generator]:
    found = [getattr(owner, "generator", None) for owner in (loader, *samplers(loader))]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())
