"""What the helpers cost: fit compared with a bare loop, grouping with a forward pass, the import with that of torch.

Run with ``python benchmarks/overhead.py``.
"""

import subprocess
import sys

import torch
import torch.nn.functional as F
from timing import alternately
from torch.utils.data import DataLoader
from torchvision.models import resnet18, vit_l_16

from layerlr_helpers import fit, layer_decay, layer_groups, one_cycle, param_groups, printed_glyphs


def loop_overhead() -> None:
    """Print how long two steps of ResNet-18 take in a bare loop and in ``fit`` (goal: within 3 %)."""
    loader = DataLoader(printed_glyphs(40), 20)
    model = resnet18(num_classes=64)
    optimizer = torch.optim.AdamW(param_groups(layer_groups(model), layer_decay(1e-3, 0.7)))

    def bare():
        schedule = one_cycle(optimizer, len(loader))
        model.train()
        losses, accuracies = [], []
        for inputs, labels in loader:
            optimizer.zero_grad()
            logits = model(inputs)
            loss = F.cross_entropy(logits, labels)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            accuracies.append((logits.argmax(1) == labels).float().mean().item())

    def ours():
        fit(model, optimizer, loader, epochs=1, schedule=one_cycle(optimizer, len(loader)), progress=False)

    print("\n2 steps of ResNet-18\n", alternately({"bare loop": bare, "fit": ours}, repeats=41).round(3), sep="")


def grouping() -> None:
    """Print how long layer_groups and param_groups take on ViT-L/16 (goal: less than two forward passes)."""
    model = vit_l_16().eval()
    image = torch.zeros(1, 3, 224, 224)

    def forward():
        with torch.no_grad():
            model(image)

    tasks = {"one forward pass": forward, "layer_groups + param_groups": lambda: param_groups(model, layer_decay(1e-3, 0.8))}
    print("\nViT-L/16\n", alternately(tasks, repeats=7).round(3), sep="")


def importing() -> None:
    """Print how much longer the import takes with this package than of torch and torchvision alone (goal: at most 15 %).

    Most of it is pandas, which the tables need.
    """
    def python(code):
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)

    tasks = {"torch, torchvision": python("import torch, torchvision"),
             "and layerlr_helpers": python("import torch, torchvision, layerlr_helpers")}
    print("\nimport\n", alternately(tasks, repeats=9).round(3), sep="")


if __name__ == "__main__":
    loop_overhead()
    grouping()
    importing()
