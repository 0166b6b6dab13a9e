"""Checks of the exercises of notebook 02, on parameter groups."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from layerlr_helpers.course.exercises.exercise import Exercise, require, require_function, require_same, same, weights_of
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
        "the model is in eval mode all the time, so BatchNorm uses its stored statistics and never updates them":
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
        returned = answer(groups)
        require([group["lr"] for group in groups] == rates,
                "the groups have to keep their rates; only the weight decay changes")
        decays = [group["weight_decay"] for group in groups]
        require(not isinstance(returned, list) or returned is groups or decays != [weight_decay for _ in rates],
                "the groups that the function got are as they were. Change these, since the optimizer knows nothing of a copy")
        head = rates[-1]
        require_same(decays, [weight_decay * head / lr for lr in rates], {
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


def _check_held_in_vain(answer) -> None:
    require_function(answer)
    cases = _changed_models()
    found = [answer(optimizer, model) for optimizer, model in cases.values()]
    for number in found:
        require(isinstance(number, int) and not isinstance(number, bool),
                f"the function has to return a whole number, and it returned {number!r}")

    def counted(count: Callable[[list[Tensor], list[Tensor]], int], groups: slice = slice(None)) -> list[int]:
        return [count([p for group in optimizer.param_groups[groups] for p in group["params"]], list(model.parameters()))
                for optimizer, model in cases.values()]

    right = counted(lambda held, own: len(_without(held, own)))
    missed = [f"{case}: the optimizer holds {wanted} tensors in vain, and the function said {number}"
              for case, wanted, number in zip(cases, right, found, strict=True) if number != wanted]
    require_same(found, right, {
        "these are the model's parameters that the optimizer lacks; here it is the other way round":
            counted(lambda held, own: len(_without(own, held))),
        "it compares numbers, and a fresh BatchNorm holds the same ones as the old. Compare with `is` or by id":
            counted(lambda held, own: sum(not any(torch.equal(p, q) for q in own) for p in held)),
        "it compares shapes, and a new layer can have the shape of the old one. Compare with `is` or by id":
            counted(lambda held, own: sum(p.shape not in {q.shape for q in own} for p in held)),
        "two lengths do not tell: if the head is replaced by one of the same size, both lists are equally long":
            counted(lambda held, own: len(held) - len(own)),
        "it looks into the first group only; an optimizer can have several":
            counted(lambda held, own: len(_without(held, own)), slice(1)),
        "it counts the numbers in the tensors; count the tensors":
            counted(lambda held, own: sum(p.numel() for p in _without(held, own))),
        "it counts all tensors of the optimizer, also those that the model still has": counted(lambda held, own: len(held)),
        "it finds nothing, although some models have changed": counted(lambda held, own: 0),
    }, "; ".join(missed[:1]))


def _without(tensors: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    return [p for p in tensors if not any(p is q for q in others)]


def _changed_models() -> dict[str, tuple[torch.optim.Optimizer, nn.Module]]:
    """Models that were changed after their optimizers were made, or not, with these optimizers."""
    def case(new: Callable[[], dict[str, nn.Module]], left_out: int = 0) -> tuple[torch.optim.Optimizer, nn.Module]:
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        first, second, *others, weight, bias = list(model.parameters())[left_out:]
        optimizer = torch.optim.SGD([{"params": [first, second]}, {"params": others}, {"params": [weight, bias]}], lr=0.1)
        for name, module in new().items():
            setattr(model, name, module)
        return optimizer, model

    return {"nothing was replaced": case(dict),
            "the head was replaced": case(lambda: {"4": nn.Linear(8, 2)}),
            "the head was replaced by one without a bias": case(lambda: {"4": nn.Linear(8, 2, bias=False)}),
            "a BatchNorm was replaced by a fresh one": case(lambda: {"1": nn.BatchNorm1d(8)}),
            "the first layer and the head were replaced": case(lambda: {"0": nn.Linear(4, 8), "4": nn.Linear(8, 3)}),
            "the first layer was not given to the optimizer": case(dict, left_out=2)}


EXERCISES = {
    "2.1": Exercise("Write layer decay yourself", _check_layer_decay,
                    "each group knows its depth: 0 for the head, 1 for the layer before it. Take one factor of the decay for "
                    "each level.", "That is all of layer_decay."),
    "2.2": Exercise("A loop that never learns", _check_training_loop,
                    "follow one batch through the loop, and ask after each line: what is in p.grad now? And in which mode is "
                    "the model?"),
    "2.3": Exercise("The same pull for all layers", _check_same_pull,
                    "AdamW multiplies a weight by 1 - lr · weight_decay. At another lr, which weight decay gives the same?",
                    "The pulls stay equal under every schedule that multiplies all rates alike (notebook 03)."),
    "2.4": Exercise("The same decay, counted in other layers", _check_decay_for_other_depths,
                    "write down the first layer's share of the head's rate, once for each depth, and make the two equal.",
                    "A decay means little unless you also say which layers it counts."),
    "2.5": Exercise("What does the optimizer hold in vain?", _check_held_in_vain,
                    "left_out in the notebook goes through the model and asks what the optimizer lacks. Which of the two do "
                    "you have to go through here?",
                    "If your function gives more than 0, the model was changed after the optimizer was made."),
}
