"""How long a step of an optimizer takes on ResNet-18's parameters, as a ratio to torch's fused Adam.

Run with ``python benchmarks/optimizers.py [threads]``. The table also says how many numbers a step must move between memory
and processor for each weight, and how long that takes at the bandwidth that is measured here. LARS, LAMB and NovoGrad are
measured if timm and pytorch_optimizer are installed. Goal: our default takes at most 1.7 times as long as Adam(fused=True).
"""

import sys
from collections.abc import Callable

import torch
from libraries import optional
from timing import alternately
from torchvision.models import resnet18

from layerlr_helpers import LayerAdaptiveLR


class SourceRule(torch.optim.Adam):
    """The update rule that the course began from, in a plain Python loop."""

    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                state["m"] = beta1 * state.get("m", 0) + (1 - beta1) * p.grad.data
                state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * p.grad.data**2
                k = (state["m"].abs() / (state["v"].sqrt() + group["eps"])).mean().item()
                p.data -= group["lr"] * k * state["m"]


# The optimizer's class, its options, and the numbers that a step must at least read and write for each weight. A layer's ratio
# needs a second pass over m, and over v where there is one.
CONTESTANTS = {
    "Adam(fused=True)": (torch.optim.Adam, {"fused": True}, 7),
    "Adam": (torch.optim.Adam, {}, 7),
    "Adam(foreach=True)": (torch.optim.Adam, {"foreach": True}, 7),
    "AdamW(fused=True)": (torch.optim.AdamW, {"fused": True}, 7),
    "SGD(momentum=0.9)": (torch.optim.SGD, {"momentum": 0.9}, 5),
    "the source's rule": (SourceRule, {}, 8),
}
VARIANTS = {"one ratio": {"pool": "group"}, "foreach": {"foreach": True}, "plain loop": {"foreach": False}}
for direction, numbers in {"momentum": 8, "adam": 9, "adam_mini": 6}.items():
    CONTESTANTS[f"ours, {direction}"] = (LayerAdaptiveLR, {"direction": direction}, numbers)
    for name, option in VARIANTS.items():
        CONTESTANTS[f"ours, {direction}, {name}"] = (LayerAdaptiveLR, {"direction": direction} | option, None)
OTHERS = {"timm.optim": {"Lars": {"momentum": 0.9}, "Lamb": {}}, "pytorch_optimizer": {"LARS": {}, "Lamb": {}, "NovoGrad": {}}}


def from_other_libraries() -> dict[str, tuple]:
    """The layer-wise optimizers of other libraries that are installed."""
    contestants = {}
    for name, optimizers in OTHERS.items():
        if (module := optional(name)) is None:
            print(f"{name} is left out: it is not installed")
        else:
            contestants |= {f"{name} {each}": (getattr(module, each), options, None) for each, options in optimizers.items()}
    return contestants


def new_step(optimizer: type[torch.optim.Optimizer], options: dict) -> Callable[[], object]:
    """The step of a new optimizer on a ResNet-18's parameters, which have random gradients."""
    params = [p.detach().clone().requires_grad_() for p in resnet18().parameters()]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    return optimizer(params, lr=1e-6, **options).step


def seconds_per_number(weights: int) -> float:
    """How long it takes to move one number for each weight: a copy reads one and writes one."""
    source, target = torch.rand(weights), torch.rand(weights)
    return alternately({"copy": lambda: target.copy_(source)}, repeats=15)["seconds"].iloc[0] / 2


def main(threads: int | None = None) -> None:
    """Print the table."""
    if threads:
        torch.set_num_threads(threads)
    contestants = CONTESTANTS | from_other_libraries()
    steps = {name: new_step(optimizer, options) for name, (optimizer, options, _) in contestants.items()}
    table = alternately(steps, repeats=15)
    table["numbers a weight"] = [numbers for _, _, numbers in contestants.values()]
    table["limit (s)"] = table["numbers a weight"] * seconds_per_number(sum(p.numel() for p in resnet18().parameters()))
    print(f"\nA step on ResNet-18's parameters, {torch.get_num_threads()} thread(s)")
    print(table.round(4).to_string(na_rep=""))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
