"""What freezing saves: time and memory of a step with parts of ResNet-18 frozen, and of an epoch on cached features.

Run with ``python benchmarks/freezing.py``. Goals: a step of the head alone is at least 2.5 times faster than a full one, and
an epoch on cached features at least 20 times faster than one through the frozen network.
"""

import pandas as pd
import torch
import torch.nn.functional as F
from timing import alternately
from torch.utils.data import DataLoader

import layerlr_helpers as ours

TRAINED = {"everything": ["*"], "layer3, layer4, head": ["layer[34]", "head"], "layer4, head": ["layer4", "head"],
           "head": ["head"]}
DIGITS = ours.handwritten_digits().subset(range(100))


def new_run(patterns):
    """A pretrained network in which only the groups that match the patterns train, its groups and optimizer."""
    model = ours.load_resnet18("glyphs", num_classes=10)
    groups = ours.layer_groups(model)
    unfreezing = ours.ProgressiveUnfreezing(groups, ours.UnfreezePlan(dict.fromkeys(patterns, 0)))
    unfreezing.apply(0)
    return model, groups, torch.optim.AdamW(ours.param_groups(groups, ours.uniform(1e-3))), unfreezing


def memory(patterns) -> dict[str, float]:
    """MiB that one step of batch 20 needs beside the weights: activations, gradients and the optimizer's state."""
    model, _, optimizer, _ = new_run(patterns)
    weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    activations: dict[int, int] = {}  # bytes that are kept for the backward pass

    def record(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            activations[storage.data_ptr()] = storage.nbytes()
        return tensor

    inputs, labels = next(iter(DataLoader(DIGITS, 20)))
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        loss = F.cross_entropy(model.train()(inputs), labels)
    loss.backward()
    optimizer.step()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    state = [value for values in optimizer.state.values() for value in values.values()]
    sizes = {"activations": sum(activations.values()), "gradients": sum(t.nbytes for t in gradients),
             "optimizer": sum(t.nbytes for t in state)}
    return {name: size / 2**20 for name, size in sizes.items()}


def steps() -> None:
    """Print how an epoch of five steps with parts frozen compares with full fine-tuning."""
    def epoch(patterns):
        model, _, optimizer, unfreezing = new_run(patterns)
        loader = DataLoader(DIGITS, 20)
        return lambda: ours.fit(model, optimizer, loader, epochs=1, unfreezing=unfreezing, progress=False)

    table = alternately({name: epoch(patterns) for name, patterns in TRAINED.items()}, repeats=9)
    table["times faster"] = 1 / table["ratio"]
    table = table.join(pd.DataFrame({name: memory(patterns) for name, patterns in TRAINED.items()}).T.add_suffix(" (MiB)"))
    print("\nFive steps of batch 20 on ResNet-18, 64 pixels; what is trained:\n", table.round(2).to_string(), sep="")


def cached() -> None:
    """Print how an epoch of training the head on cached features compares with one through the frozen network."""
    model, groups, optimizer, unfreezing = new_run(["head"])
    head = ours.head_module(groups)
    features = DataLoader(ours.cache_features(model, DIGITS, groups), 20)
    head_optimizer, loader = torch.optim.AdamW(head.parameters()), DataLoader(DIGITS, 20)
    tasks = {"through the network": lambda: ours.fit(model, optimizer, loader, epochs=1, unfreezing=unfreezing, progress=False),
             "cached features": lambda: ours.fit(head, head_optimizer, features, epochs=1, progress=False),
             "making the cache": lambda: ours.cache_features(model, DIGITS, groups)}
    table = alternately(tasks, repeats=15)
    table["times faster"] = 1 / table["ratio"]
    print("\nAn epoch of head training, 100 images\n", table.round(3).to_string(), sep="")


if __name__ == "__main__":
    steps()
    cached()
