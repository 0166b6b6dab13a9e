"""How long a step of an optimizer takes on ResNet-18's parameters, as a ratio to torch's fused Adam.

Run with ``python benchmarks/optimizers.py [threads]``. Beside each stands what it must move between memory and processor, in
numbers a weight, and how long that takes at the bandwidth that is measured here. LARS, LAMB and NovoGrad are measured if timm
and pytorch_optimizer are installed. Goal: our default at most 1.7 times Adam(fused=True).
"""

import sys

import torch
from timing import alternately
from torchvision.models import resnet18

from layerlr_helpers import LayerAdaptiveLR


class SourceRule(torch.optim.Adam):
    """The rule that the course began from, with its shortcuts."""

    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                state["m"] = beta1 * state.get("m", 0) + (1 - beta1) * p.grad.data
                state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * p.grad.data**2
                k = (state["m"].abs() / (state["v"].sqrt() + group["eps"])).mean().item()
                p.data -= group["lr"] * k * state["m"]


OURS = {direction: {"direction": direction} for direction in ("momentum", "adam", "layernorm")}
# The least that must be moved: numbers read and written for each weight. A layer's ratio takes a second round over m (and v).
CONTESTANTS = {
    "Adam(fused=True)": (torch.optim.Adam, {"fused": True}, 7),
    "Adam": (torch.optim.Adam, {}, 7),
    "Adam(foreach=True)": (torch.optim.Adam, {"foreach": True}, 7),
    "AdamW(fused=True)": (torch.optim.AdamW, {"fused": True}, 7),
    "SGD(momentum=0.9)": (torch.optim.SGD, {"momentum": 0.9}, 5),
    "the source's rule": (SourceRule, {}, 8),
    **{f"ours, {name}": (LayerAdaptiveLR, options, {"momentum": 8, "adam": 9, "layernorm": 6}[name])
       for name, options in OURS.items()},
    **{f"ours, {name}, one ratio": (LayerAdaptiveLR, {**options, "pool": "group"}, None) for name, options in OURS.items()},
    **{f"ours, {name}, foreach": (LayerAdaptiveLR, {**options, "foreach": True}, None) for name, options in OURS.items()},
    **{f"ours, {name}, plain loop": (LayerAdaptiveLR, {**options, "foreach": False}, None) for name, options in OURS.items()},
}


def peers() -> dict:
    """Layer-wise optimizers of other libraries, those that are installed."""
    found = {}
    try:
        from timm.optim import Lamb, Lars
        found |= {"timm LARS": (Lars, {"momentum": 0.9}, None), "timm LAMB": (Lamb, {}, None)}
    except ImportError:
        print("timm is not installed; its LARS and LAMB are left out")
    try:
        from pytorch_optimizer import LARS, Lamb, NovoGrad
        found |= {"pytorch_optimizer LARS": (LARS, {}, None), "pytorch_optimizer LAMB": (Lamb, {}, None),
                  "pytorch_optimizer NovoGrad": (NovoGrad, {}, None)}
    except ImportError:
        print("pytorch_optimizer is not installed; its LARS, LAMB and NovoGrad are left out")
    return found


def step_of(kind, options):
    params = [p.detach().clone().requires_grad_() for p in resnet18().parameters()]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    return kind(params, lr=1e-6, **options).step


def seconds_for_a_number(weights: int) -> float:
    """How long one number a weight takes to be moved: a copy reads one and writes one."""
    source, target = torch.rand(weights), torch.rand(weights)
    return alternately({"copy": lambda: target.copy_(source)}, repeats=15)["seconds"].iloc[0] / 2


def main(threads: int | None = None) -> None:
    """Print the table."""
    if threads:
        torch.set_num_threads(threads)
    contestants = CONTESTANTS | peers()
    table = alternately({name: step_of(kind, options) for name, (kind, options, _) in contestants.items()}, repeats=15)
    unit = seconds_for_a_number(sum(p.numel() for p in resnet18().parameters()))
    table["numbers a weight"] = [moved for _, _, moved in contestants.values()]
    table["limit (s)"] = table["numbers a weight"] * unit
    print(f"\nA step on ResNet-18's parameters, {torch.get_num_threads()} thread(s)")
    print(table.round(4).to_string(na_rep=""))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
