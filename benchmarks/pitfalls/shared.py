"""What the probes share: the data and the model, what they measure, and how they put it into words.

A probe is a function without arguments that uses one library as its documentation says and returns a :class:`Finding`.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

LR = 1e-3  # the head's learning rate
CLASSES, IMAGE_SIZE, BATCH_SIZE, STEPS_PER_EPOCH = 5, 32, 4, 2


@dataclass
class Finding:
    """Whether a library falls into a pitfall (None if it has no such feature), and a note of what was measured."""

    falls_in: bool | None
    note: str

    @property
    def verdict(self) -> str:
        return {True: "falls in", False: "avoids", None: "n/a"}[self.falls_in]


Probe = Callable[[], Finding]


def not_applicable(reason: str) -> Probe:
    """The probe for a library that has no such feature."""
    return lambda: Finding(None, reason)


def error_name(call: Callable[[], object]) -> str | None:
    """The name of the exception that a call raises, or None."""
    try:
        call()
    except Exception as error:  # any of them is a result
        return type(error).__name__
    return None


def listed(results: Mapping[str, str]) -> str:
    return ", ".join(f"{name}: {result}" for name, result in results.items())


# Data and models


def noise() -> DataLoader:
    """The same few images of noise in the same order, every time."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(STEPS_PER_EPOCH * BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(len(images)) % CLASSES), batch_size=BATCH_SIZE)


def resnet18() -> nn.Module:
    """torchvision's ResNet-18 with the same random weights every time."""
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=CLASSES)


class DefinedInReverse(nn.Module):
    """ResNet-18 with its layers defined in the reverse of the order in which they run."""

    def __init__(self):
        super().__init__()
        network = resnet18()
        self.order = [name for name, _ in network.named_children()]
        for name in reversed(self.order):
            self.add_module(name, getattr(network, name))

    def forward(self, images: Tensor) -> Tensor:
        for name in self.order[:-1]:
            images = getattr(self, name)(images)
        return self.fc(images.flatten(1))


# What has changed in a model


def is_head(name: str) -> bool:
    return name.startswith(("fc.", "head."))


def copied_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def compared(a: nn.Module, b: nn.Module) -> str:
    """``"bit-identical"`` or ``"differs"``: two models' parameters and buffers."""
    state, other = a.state_dict(), b.state_dict()
    identical = state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)
    return "bit-identical" if identical else "differs"


def largest_change(before: Mapping[str, Tensor], after: Mapping[str, Tensor], chosen: Callable[[str, Tensor], bool]) -> float:
    """The largest change of a number in any of the chosen tensors."""
    tensors = [(value, after[name]) for name, value in before.items() if name in after and chosen(name, value)]
    return max(float((new - old).abs().max()) for old, new in tensors)


def untrained(model: nn.Module, before: Mapping[str, Tensor]) -> int:
    """How many parameters require gradients and still have the values that they had before."""
    return sum(p.requires_grad and torch.equal(p, before[name]) for name, p in model.named_parameters())


def trained_on_frozen(model: nn.Module, head: nn.Module, train: Callable[[], object]) -> tuple[float, float, float]:
    """Train the head of a frozen backbone and return how much the backbone's BatchNorm changed.

    The first two numbers are the largest change of a running statistic and of a scale or shift. The third is the relative
    difference between the backbone's output at the last training step and its output for the same images in eval mode.
    """
    before, outputs = copied_state(model), {}
    hook = head.register_forward_pre_hook(lambda head, inputs: outputs.update({head.training: inputs[0].detach().clone()}))
    train()
    after = copied_state(model)
    *_, (images, _) = noise()
    with torch.no_grad():
        model.eval()(images)
    hook.remove()
    return (largest_change(before, after, lambda name, value: "running_" in name),
            largest_change(before, after, lambda name, value: value.ndim == 1 and "running_" not in name and not is_head(name)),
            float((outputs[True] - outputs[False]).norm() / outputs[False].norm()))


MEASURES_OF_FROZEN = ("largest change of a running statistic", "largest change of a scale or shift",
                      "relative difference between the backbone's output at the last step and in eval mode")


def frozen_backbone_probes(ways: Mapping[str, Callable[[], tuple[float, float, float]]]) -> list[Probe]:
    """A probe for each number of :func:`trained_on_frozen`; the first way to freeze is the default, the others are options."""
    ways = {name: functools.cache(train) for name, train in ways.items()}

    def probe(i: int) -> Finding:
        (default, value), *options = ((name, train()[i]) for name, train in ways.items())
        note = "; ".join([f"{default}: {MEASURES_OF_FROZEN[i]} {value:.2g}", *(f"{name}: {x:.2g}" for name, x in options)])
        return Finding(value > 0, note)

    return [functools.partial(probe, i) for i in range(len(MEASURES_OF_FROZEN))]


def trained_then_frozen(model: nn.Module, before: Mapping[str, Tensor], train: Callable[[], object]) -> Finding:
    """Whether training still changes the kernels of a backbone that was trained, then frozen with the state ``before``."""
    train()
    change = largest_change(before, model.state_dict(), lambda name, value: value.ndim > 1 and not is_head(name))
    return Finding(change > 0, f"largest change of a kernel in an epoch after it was frozen: {change:.2g}")


# Learning rates and schedules

SCHEDULERS: dict[str, Callable[[Optimizer], object]] = {  # for runs of three epochs
    "LambdaLR": lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "OneCycleLR": lambda optimizer: OneCycleLR(optimizer, LR, total_steps=3 * STEPS_PER_EPOCH + 1),
    "CosineAnnealingLR": lambda optimizer: CosineAnnealingLR(optimizer, 3 * STEPS_PER_EPOCH),
    "StepLR": lambda optimizer: StepLR(optimizer, STEPS_PER_EPOCH, 0.5),
}


def head_over_first(optimizer: Optimizer) -> float:
    """The learning rate of the last group, the head, over that of the first."""
    return optimizer.param_groups[-1]["lr"] / optimizer.param_groups[0]["lr"]


def rates_in_torch_finding(name: str, optimizer: AdamW, other_scheduler: Callable[[Optimizer], object], other: str) -> Finding:
    """Whether the layers' rates are equal in torch's AdamW or half way through CosineAnnealingLR; notes another scheduler."""
    in_adamw, scheduler = head_over_first(optimizer), CosineAnnealingLR(optimizer, 10)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    in_cosine = head_over_first(optimizer)
    other_scheduler(optimizer)
    return Finding(1 in (in_adamw, in_cosine),
                   f"head's rate over the first layer's after {name}: {in_adamw:.3g} in torch's AdamW, {in_cosine:.3g} under "
                   f"torch's CosineAnnealingLR; {head_over_first(optimizer):.3g} under {other}")


def layer_order_finding(name: str, factors: Mapping[str, float]) -> Finding:
    """Whether the layer of :class:`DefinedInReverse` that runs first has a higher rate than its last block."""
    first, last = factors["conv1.weight"], factors["layer4.1.conv2.weight"]
    return Finding(first > last, f"{name} a model defined back to front: {first:.3g} for the layer that runs first, {last:.3g} "
                                 "for the last block")


def is_steady(ratios: Sequence[float]) -> bool:
    return all(math.isclose(ratio, ratios[0], rel_tol=1e-6) for ratio in ratios)


def first_and_last(ratios: Sequence[float]) -> str:
    return f"{ratios[0]:.3g} at first, {ratios[-1]:.3g} at last"


def ratio_finding(name: str, ratios: Sequence[float]) -> Finding:
    """Whether the ratio between two layers' rates changes during a run."""
    return Finding(not is_steady(ratios), f"{name}: {first_and_last(ratios)}")


def schedulers_finding(start: str, ratios_under: Callable[[Callable], Sequence[float]],
                       schedulers: Mapping[str, Callable[[Optimizer], object]] = SCHEDULERS, end: str = "") -> Finding:
    """Whether a run under any of the schedulers raises an error, or changes the ratio of the head's rate to a new group's."""
    steady, changed, outcomes = "no error, a steady ratio", "goes on in silence, head over new group ", {}
    for name, scheduler in schedulers.items():
        try:
            ratios = ratios_under(scheduler)
            outcomes[name] = steady if is_steady(ratios) else changed + first_and_last(ratios)
        except Exception as error:  # any of them is a result
            outcomes[name] = type(error).__name__
    return Finding(set(outcomes.values()) != {steady}, f"{start}: {listed(outcomes)}{end}")
