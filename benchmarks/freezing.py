"""What freezing saves: seconds and memory of a step with parts of ResNet-18 frozen, and an epoch on cached features.

Run with ``python benchmarks/freezing.py``. Goals: a head-only step at least 2.5 times faster than a full one, an epoch
on cached features at least 20 times faster than one through the frozen network.
"""

import pandas as pd
import torch
import torch.nn.functional as F
from timing import alternately
from torch.utils.data import DataLoader

from layerlr_helpers import (
    ProgressiveUnfreezing,
    UnfreezePlan,
    cache_features,
    fit,
    handwritten_digits,
    head_module,
    layer_groups,
    load_resnet18,
    param_groups,
    uniform,
)

TRAINED = {"everything": ["*"], "layer3, layer4, head": ["layer[34]", "head"], "layer4, head": ["layer4", "head"],
           "head": ["head"]}
DIGITS = handwritten_digits().subset(range(100))


def prepared(patterns):
    model = load_resnet18("glyphs", num_classes=10)
    groups = layer_groups(model)
    unfreezing = ProgressiveUnfreezing(groups, UnfreezePlan(dict.fromkeys(patterns, 0)))
    unfreezing.apply(0)
    return model, groups, torch.optim.AdamW(param_groups(groups, uniform(1e-3))), unfreezing


def memory(patterns) -> dict[str, float]:
    """MiB that one step of batch 20 holds on top of the weights: kept for the backward pass, gradients, optimizer state."""
    model, _, optimizer, _ = prepared(patterns)
    weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    inputs, labels = next(iter(DataLoader(DIGITS, 20)))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = F.cross_entropy(model.train()(inputs), labels)
    loss.backward()
    optimizer.step()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    state = [value for values in optimizer.state.values() for value in values.values()]
    sizes = {"activations": sum(kept.values()), "gradients": sum(t.nbytes for t in gradients),
             "optimizer": sum(t.nbytes for t in state)}
    return {name: size / 2**20 for name, size in sizes.items()}


def steps() -> None:
    """An epoch of five steps of batch 20 with parts frozen, beside full fine-tuning."""
    def epoch(patterns):
        model, _, optimizer, unfreezing = prepared(patterns)
        loader = DataLoader(DIGITS, 20)
        return lambda: fit(model, optimizer, loader, epochs=1, unfreezing=unfreezing, progress=False)

    table = alternately({name: epoch(patterns) for name, patterns in TRAINED.items()}, repeats=9)
    table["times faster"] = 1 / table["ratio"]
    used = pd.DataFrame({name: memory(patterns) for name, patterns in TRAINED.items()}).T.add_suffix(" (MiB)")
    print("\nFive steps of batch 20 on ResNet-18, 64 pixels; what is trained:\n", table.join(used).round(2).to_string(), sep="")


def cached() -> None:
    """An epoch of head training on cached features, beside one through the frozen network."""
    model, groups, optimizer, unfreezing = prepared(["head"])
    head = head_module(groups)
    features = DataLoader(cache_features(model, DIGITS, groups), 20)
    on_head, loader = torch.optim.AdamW(head.parameters()), DataLoader(DIGITS, 20)
    tasks = {"through the network": lambda: fit(model, optimizer, loader, epochs=1, unfreezing=unfreezing, progress=False),
             "cached features": lambda: fit(head, on_head, features, epochs=1, progress=False),
             "making the cache": lambda: cache_features(model, DIGITS, groups)}
    table = alternately(tasks, repeats=15)
    table["times faster"] = 1 / table["ratio"]
    print("\nAn epoch of head training, 100 images\n", table.round(3).to_string(), sep="")


if __name__ == "__main__":
    steps()
    cached()
