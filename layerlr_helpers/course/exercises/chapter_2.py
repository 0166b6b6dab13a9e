"""Checks of the exercises of notebook 02, on parameter groups."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from layerlr_helpers.course.exercises.exercise import Exercise, Wrong, require, require_function, require_same, same, weights_of
from layerlr_helpers.layers import LayerGroup, layer_groups
from layerlr_helpers.models import load_resnet18


class TwoBranches(nn.Module):
    """Two layers side by side, then a head: both have depth 1."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.out = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([self.left(x), self.right(x)], dim=1))


def _lists_of_groups() -> list[list[LayerGroup]]:
    chain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    return [layer_groups(load_resnet18(None, num_classes=3)), layer_groups(chain, torch.zeros(1, 4)),
            layer_groups(TwoBranches(), torch.zeros(1, 4))]


def _check_layer_decay(answer) -> None:
    require_function(answer)
    for groups in _lists_of_groups():
        for head_lr, decay in ((1e-3, 0.5), (2e-2, 0.9)):
            _check_rates(answer(groups, head_lr, decay), groups, head_lr, decay)


def _check_rates(found, groups: list[LayerGroup], head_lr: float, decay: float) -> None:
    require(isinstance(found, dict) and set(found) == {group.name for group in groups},
            "the function has to return a dictionary with one rate for the name of each group")
    deepest = max(group.depth for group in groups)

    def rates(exponent: Callable[[int, LayerGroup], int]) -> dict[str, float]:
        return {group.name: head_lr * decay ** exponent(i, group) for i, group in enumerate(groups)}

    require_same(found, rates(lambda i, group: group.depth), {
        "the rates fall from the stem to the head; the head has the highest rate":
            rates(lambda i, group: deepest - group.depth),
        "every rate is one factor of the decay too low; the head itself gets head_lr": rates(lambda i, group: group.depth + 1),
        "it counts groups from the end of the list. Two layers side by side have the same depth, and need the same rate":
            rates(lambda i, group: len(groups) - 1 - i),
        "the rates fall by the same amount at each layer; they have to fall by the same factor":
            {group.name: head_lr * (1 - (1 - decay) * group.depth) for group in groups},
        "all layers have the same rate": rates(lambda i, group: 0),
    }, f"with head_lr={head_lr:g} and decay={decay:g}, a group at depth 1 needs the rate {head_lr * decay:g}, and one at depth "
       f"2 needs {head_lr * decay ** 2:g}; your rates are {found}")


def _check_training_loop(answer) -> None:
    require_function(answer)
    for width in (5, 9):
        torch.manual_seed(width)
        _check_trained(answer, nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3)).eval())


def _check_trained(answer, start: nn.Module) -> None:
    batches = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(4)]

    def after(loop, training: bool = True) -> dict[str, Tensor]:
        model = copy.deepcopy(start).train(training)
        loop(model, torch.optim.SGD(model.parameters(), lr=0.1), batches)
        return weights_of(model)

    found = after(answer, training=False)
    require(not same(found, weights_of(start)), "nothing in the model has changed. In which order do backward, step and "
                                                "zero_grad have to come?")
    require_same(found, after(_loop("zero_grad", "backward", "step")), {
        "the weights do not move, only BatchNorm's statistics do: the step finds no gradient. What has emptied it?":
            after(_loop("backward", "zero_grad", "step")),
        "the gradients of earlier batches are still there at each step; they have to be set to zero once for each batch":
            after(_loop("backward", "step")),
        "the step comes before the gradient of its batch, so it uses that of the batch before":
            after(_loop("step", "zero_grad", "backward")),
        "the model is still in eval mode, in which BatchNorm uses its stored statistics; call model.train() first":
            after(_loop("zero_grad", "backward", "step"), training=False),
    }, "the weights are not those after one step for each batch, with the gradient of that batch only", tolerance=1e-5)


def _loop(*order: str) -> Callable[[nn.Module, torch.optim.Optimizer, list], None]:
    """A training loop with its three parts in this order."""
    def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list) -> None:
        for inputs, labels in batches:
            for part in order:
                if part == "backward":
                    nn.functional.cross_entropy(model(inputs), labels).backward()
                else:
                    getattr(optimizer, part)()

    return train


def _check_same_pull(answer) -> None:
    require_function(answer)
    for rates, weight_decay in (([1e-4, 1e-3, 1e-2], 0.05), ([3e-3, 3e-3, 6e-3, 2e-2], 0.2)):
        groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": lr, "weight_decay": weight_decay} for lr in rates]
        groups = answer(groups) or groups  # changed in place, or returned
        require(isinstance(groups, list) and all(isinstance(group, dict) for group in groups)
                and [group["lr"] for group in groups] == rates,
                "the groups have to keep their rates; only the weight decay changes")
        head = rates[-1]
        require_same([group["weight_decay"] for group in groups], [weight_decay * head / lr for lr in rates], {
            "nothing has changed: the pull lr · weight_decay still is proportional to the rate": [weight_decay for _ in rates],
            "it is the wrong way round: now the layers with low rates are pulled even less":
                [weight_decay * lr / head for lr in rates],
            "the pull is the same for all, but it is not that of the head as it was": [weight_decay / lr for lr in rates],
        }, "the product lr · weight_decay is not that of the last group for every group")


def _check_decay_for_other_depths(answer) -> None:
    require_function(answer)
    for decay, depth, other in ((0.6, 5, 9), (0.8, 12, 6), (0.5, 2, 4)):
        require_same(answer(decay, depth, other), decay ** (depth / other), {
            "that is the old decay: over more layers it would give the first one a much lower rate": decay,
            "the exponent is upside down: with more layers, each step has to be smaller": decay ** (other / depth),
            "depths count steps from the head, so there is nothing to add or to subtract": decay ** ((depth + 1) / (other + 1)),
            "a decay is a factor, so it does not scale in proportion; think of the product of all factors":
                decay * depth / other,
            "1 - decay does not scale in proportion either; think of the product of all factors from the head to the stem":
                1 - (1 - decay) * depth / other,
        }, f"with {decay:g} and a first layer at depth {depth}, that layer has {decay ** depth:.3g} of the head's rate; at "
           f"depth {other} your decay gives it another share")


def _check_loose_parameters(answer) -> None:
    require_function(answer)
    for make in (TwoBranches, lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))):
        names = [name for name, _ in make().named_parameters()]
        for missing in ([], names[:1], names[-2:], names[1:]):
            _check_names(answer, make(), missing)


def _check_names(answer, model: nn.Module, missing: list[str]) -> None:
    parameters = dict(model.named_parameters())
    first, *others = [p for name, p in parameters.items() if name not in missing]
    groups = [{"params": [first]}, *([{"params": others}] if others else [])]
    found = answer(model, torch.optim.SGD(groups, lr=0.1))
    if not isinstance(found, list | set | tuple):
        raise Wrong(f"the function has to return a list of names, and it returned {found!r}")
    require_same(sorted(map(str, found)), sorted(missing), {
        "these are the names of what the optimizer has; which of the model's parameters are not among them?":
            sorted(parameters.keys() - set(missing)),
        "it looks into the first group only; an optimizer can have several":
            sorted(name for name, p in parameters.items() if p is not first),
        "it finds nothing, although parameters are missing": [],
    }, f"of {', '.join(parameters)} the optimizer lacks {', '.join(missing) or 'none'}, and the function said "
       f"{', '.join(map(str, found)) or 'none'}. Compare parameters with `is` or by their id, since == compares their numbers")


EXERCISES = {
    "2.1": Exercise("Write layer decay yourself", _check_layer_decay,
                    "each group knows its depth: 0 for the head, 1 for the layer before it. Take one factor of the decay for "
                    "each level.", "That is all of layer_decay."),
    "2.2": Exercise("A loop that never learns", _check_training_loop,
                    "follow one batch through the loop, and ask after each line: what is in p.grad now?"),
    "2.3": Exercise("The same pull for all layers", _check_same_pull,
                    "AdamW multiplies a weight by 1 - lr · weight_decay. At another lr, which weight decay gives the same?",
                    "A schedule multiplies all rates alike, so the pulls stay equal during the run."),
    "2.4": Exercise("The same decay, counted in other layers", _check_decay_for_other_depths,
                    "write down the first layer's share of the head's rate, once for each depth, and make the two equal.",
                    "A decay means little unless you also say which layers it counts."),
    "2.5": Exercise("Which parameters did the optimizer not get?", _check_loose_parameters,
                    "optimizer.param_groups is a list of dictionaries, and each has a list under \"params\"."),
}
