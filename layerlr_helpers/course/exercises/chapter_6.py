"""Checks of the exercises of notebook 06, on transformers."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torchvision.models import VisionTransformer

from layerlr_helpers.course.exercises.exercise import Exercise, require, require_function, require_same, same
from layerlr_helpers.layers import LayerGroup, layer_groups


class Encoder(nn.Module):
    """A small text encoder with a pooler, which layer_groups puts beside the top layer: both have depth 1."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embeddings, self.LayerNorm = nn.Embedding(11, 8), nn.LayerNorm(8)  # named as in BERT; the layers have other names
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True) for _ in range(layers))
        self.pooler, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.LayerNorm(self.embeddings(tokens))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.pooler(x[:, 0]).tanh())


class WordGuesser(nn.Module):
    """Four parts with weights of the same size. ``tied`` names parts, and all of these have the weight of the first."""

    def __init__(self, *tied: str) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(6, 6)
        self.norm, self.second_norm = nn.LayerNorm(6), nn.LayerNorm(6)  # both begin as ones, yet they are not tied
        self.body, self.decoder = nn.Linear(6, 6), nn.Linear(6, 6)
        for name in tied:
            self.get_submodule(name).weight = self.get_submodule(tied[0]).weight


def _lists_of_groups() -> list[list[LayerGroup]]:
    vit = VisionTransformer(image_size=8, patch_size=4, num_layers=3, num_heads=2, hidden_dim=8, mlp_dim=8, num_classes=3)
    tokens = torch.zeros(1, 4, dtype=torch.long)
    return [layer_groups(Encoder(2), tokens), layer_groups(vit, torch.zeros(1, 3, 8, 8)), layer_groups(Encoder(4), tokens)]


def _settings(parameter_groups, key: str) -> dict[int, float]:
    """The rate or the weight decay of each parameter, by its id, after a look at whether these are parameter groups."""
    require(isinstance(parameter_groups, list | tuple) and len(parameter_groups) > 0
            and all(isinstance(group, dict) and {"params", key} <= group.keys() for group in parameter_groups),
            f'the function has to return a list of dictionaries that have "params" and "{key}", as an optimizer takes them')
    for group in parameter_groups:
        params = group["params"]
        group["params"] = [params] if isinstance(params, Tensor) else list(params)
    settings = [(id(p), group[key]) for group in parameter_groups for p in group["params"]]
    require(len(dict(settings)) == len(settings), "a tensor is in two groups, or twice in one, and optimizers refuse that")
    return dict(settings)


def _check_encoder_groups(answer) -> None:
    require_function(answer)
    settings = ((1e-3, 0.5, 0.1), (2e-2, 0.8, 0.01), (3e-4, 0.9, 0.05))
    for groups, (head_lr, decay, weight_decay) in zip(_lists_of_groups(), settings, strict=True):
        found = answer(groups, head_lr, decay, weight_decay)
        _require_rates(_settings(found, "lr"), groups, head_lr, decay)
        _require_weight_decays(_settings(found, "weight_decay"), groups, weight_decay)


def _require_rates(found: dict[int, float], groups: list[LayerGroup], head_lr: float, decay: float) -> None:
    params = {name: p for group in groups for name, p in group.params.items()}
    missing = [name for name, p in params.items() if id(p) not in found]
    require(not missing, f"{len(missing)} parameters are in no group and would never train, such as {', '.join(missing[:2])}")

    def rates(exponent: Callable[[int, LayerGroup], int]) -> dict[int, float]:
        return {id(p): head_lr * decay ** exponent(i, group) for i, group in enumerate(groups) for p in group.params.values()}

    deepest = max(group.depth for group in groups)
    require_same(found, rates(lambda i, group: group.depth), {
        "all layers have the same rate so far; the rate has to depend on group.depth": rates(lambda i, group: 0),
        "the layers are counted by their place in the list. This model has a pooler, which has the depth of the top layer, so "
        "the layers below are not one level deeper; use group.depth": rates(lambda i, group: len(groups) - 1 - i),
        "the rates fall from the input to the head, and the head has to have the highest one":
            rates(lambda i, group: deepest - group.depth),
        "each rate is one factor of the decay too low: the head itself gets head_lr": rates(lambda i, group: group.depth + 1),
    }, f"with head_lr={head_lr:g} and decay={decay:g}, a layer at depth 1 needs the rate {head_lr * decay:g}, and one at "
       f"depth 2 needs {head_lr * decay ** 2:g}; some of your layers have another one")


def _require_weight_decays(found: dict[int, float], groups: list[LayerGroup], weight_decay: float) -> None:
    params = {name: p for group in groups for name, p in group.params.items()}

    def decays(spared: Callable[[str, Tensor], bool]) -> dict[int, float]:
        return {id(p): 0.0 if spared(name, p) else weight_decay for name, p in params.items()}

    wrong = next((name for name, p in params.items() if not same(found[id(p)], 0.0 if p.ndim < 2 else weight_decay)), "")
    require_same(found, decays(lambda name, p: p.ndim < 2), {
        f"the rates are right, but {wrong} still has weight decay, and it is the weight of a norm. Each library gives its "
        "norms other names. What do all norms and biases have in common that matrices do not?":
            decays(lambda name, p: name.endswith(("bias", "LayerNorm.weight"))),
        "the rates are right, and the biases are free of weight decay. But a norm has a weight as well as a bias":
            decays(lambda name, p: name.endswith("bias")),
        "the weight decay is the wrong way round: norms and biases have it, and matrices do not":
            decays(lambda name, p: p.ndim >= 2),
        "the rates are right, but everything has weight decay, norms and biases too": decays(lambda name, p: False),
        "the rates are right, but nothing has weight decay, not even the matrices": decays(lambda name, p: True),
    }, f"the rates are right, but the weight decay of {wrong} is not. Tensors with fewer than two dimensions need 0, and all "
       f"others need {weight_decay:g}")


def _check_recipe(answer) -> None:
    require_function(answer)
    programs = ((1e-3, 0.8, 1), (2e-2, 0.9, 2), (4e-4, 0.65, 0))  # rate of the head, decay, levels above the top layer
    for groups in _lists_of_groups():
        for head_lr, decay, extra in programs:
            _check_carried_over(answer, groups, head_lr, head_lr * decay ** (1 + extra), head_lr * decay ** (2 + extra))


def _check_carried_over(answer, groups: list[LayerGroup], head_lr: float, top_lr: float, below_lr: float) -> None:
    found = answer(groups, head_lr, top_lr, below_lr)
    require(isinstance(found, dict) and set(found) == {group.name for group in groups},
            "the function has to return a dictionary with one rate for the name of each group")
    decay = below_lr / top_lr

    def rates(rate_at: Callable[[int], float], head: float = head_lr) -> dict[str, float]:
        return {group.name: rate_at(group.depth) if group.depth else head for group in groups}

    require_same(found, rates(lambda depth: top_lr * decay ** (depth - 1)), {
        "the decay was read off the head and the top layer. Between these two the other program may count levels that you do "
        "not have; which two rates are sure to be one level apart?": rates(lambda depth: head_lr * (top_lr / head_lr) ** depth),
        "the decay is right, but your top layer does not have the rate that the other program printed for it":
            rates(lambda depth: head_lr * decay ** depth),
        "every layer is one factor of the decay too low; the layer at depth 1 gets top_lr itself":
            rates(lambda depth: top_lr * decay ** depth),
        "the layers are right, but the head does not have the rate that was printed for it":
            rates(lambda depth: top_lr * decay ** (depth - 1), head=top_lr / decay),
        "the layers are counted by their place in the list; a pooler and the top layer both have depth 1, and get one rate":
            {group.name: head_lr if i == 0 else top_lr * decay ** (i - 1) for i, group in enumerate(reversed(groups))},
    }, f"the other program printed {head_lr:.3g} for the head, {top_lr:.3g} for the top layer and {below_lr:.3g} for the one "
       f"below. So depth 3 needs {top_lr * decay ** 2:.3g}, and your rates are "
       f"{ {name: float(f'{lr:.3g}') if isinstance(lr, int | float) else lr for name, lr in found.items()} }")


def _check_lora(answer) -> None:
    require_function(answer)
    for inputs, outputs, rank, alpha, bias in ((6, 5, 2, 8, True), (4, 9, 3, 1, False), (7, 8, 1, 3, True)):
        base, x = nn.Linear(inputs, outputs, bias=bias), torch.randn(2, 3, inputs)
        before = base(x).detach()
        layer = answer(base, rank, alpha)
        require(isinstance(layer, nn.Module),
                f"the answer has to be a class that makes a module, and it made a {type(layer).__name__}")
        _require_the_start(layer(x), before)
        a, b = _trained_matrices(layer, base, rank)
        _require_the_formula(layer, x, before, a, b, alpha)


def _require_the_start(found, before: Tensor) -> None:
    require(not same(found, torch.zeros_like(before)), "the output is all zeros at the start: base(x) is missing from it")
    require(same(found, before, tolerance=1e-5), "before any training the layer does not give what base gives, so the network "
                                                 "does not begin as it was. Which matrix can begin at zero?")


def _trained_matrices(layer: nn.Module, base: nn.Linear, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    trained = [p for p in layer.parameters() if p.requires_grad]
    wanted, numbers = rank * (base.in_features + base.out_features), sum(p.numel() for p in trained)
    of_base = sum(p.numel() for p in base.parameters() if p.requires_grad)
    require(not of_base, f"{of_base} numbers of base would be trained as well; all of base has to be frozen, its bias too")
    by_shape = {tuple(p.shape): p for p in trained}
    shapes = [(rank, base.in_features), (base.out_features, rank)]
    require(numbers == wanted and by_shape.keys() == set(shapes),
            f"beside {base} with rank {rank}, A is {list(shapes[0])} and B is {list(shapes[1])}, {wanted} numbers together; "
            f"your layer trains {numbers}, in the shapes {[list(shape) for shape in by_shape]}")
    return by_shape[shapes[0]], by_shape[shapes[1]]


def _require_the_formula(layer: nn.Module, x: Tensor, before: Tensor, a: nn.Parameter, b: nn.Parameter, alpha: float) -> None:
    layer.train()
    x.requires_grad_()  # a layer below may be trained too
    output = layer(x)
    if output.requires_grad:
        (output - 1).square().sum().backward()
    require(a.grad is not None and b.grad is not None, "A and B do not get a gradient; does forward use both of them?")
    require(bool(a.grad.any() or b.grad.any()),
            "the gradients of A and of B are all zero, so neither can ever change. Only one of them may begin at zero")
    require(x.grad is not None and bool(x.grad.any()),
            "no gradient reaches the layers below; freeze base's parameters, and not its output")
    with torch.no_grad():
        a.normal_(), b.normal_()
        added = x @ a.T @ b.T
        rank = len(a)
        require_same(layer(x) - before, alpha / rank * added, {
            "the factor s is missing from s · B A x": added,
            "the factor s is alpha / rank, and yours is alpha": alpha * added,
            "the factor s is alpha / rank, and yours is the inverse of that": rank / alpha * added,
            "the factor s is alpha / rank, and yours is 1 / rank": added / rank,
        }, "with other numbers in A and B, the layer does not give base(x) + s · B A x with s = alpha / rank", tolerance=1e-3)


def _check_clipping(answer) -> None:
    require_function(answer)
    for norms, limit in (([3.0, 4.0, 12.0], 6.5), ([0.2, 0.9], 0.5), ([0.3, 0.4], 1.0), ([0.6, 0.7, 0.8], 1.0)):
        for together in (True, False):
            found = answer(list(norms), limit, together)
            if isinstance(found, Tensor | np.ndarray):
                found = found.tolist()
            require(found is None or isinstance(found, list | tuple), f"the function has to return a list, and not {found!r}")
            _require_norms(found, norms, limit, together)


def _require_norms(found, norms: list[float], limit: float, together: bool) -> None:
    length = sum(norm ** 2 for norm in norms) ** 0.5
    mistakes = {"nothing is clipped": norms}
    if together:
        mistakes |= {
            "the gradients keep their ratios when they are clipped together: all are multiplied by the same factor":
                [min(norm, limit) for norm in norms],
            "clipping makes a long gradient shorter, but never a short one longer": [norm * limit / length for norm in norms],
            "the norm of all gradients together is not the sum of their norms. Think of the sides of a right triangle":
                [norm * min(limit / sum(norms), 1) for norm in norms],
            "the limit is for the norm of all gradients together, and not for the largest of their norms":
                [norm * min(limit / max(norms), 1) for norm in norms]}
    else:
        mistakes |= {
            "a group that is clipped by itself does not know about the others: only its own norm counts":
                [norm * min(limit / length, 1) for norm in norms],
            "a group whose norm is below the limit stays as it is": [limit for _ in norms]}
    start = f"the norms {norms}, the limit {limit:g}, clipped {'together' if together else 'each by itself'}: "
    require_same(found, _clipped(norms, limit, together), {start + hint: wrong for hint, wrong in mistakes.items()},
                 start + f"{found} is not what comes out", tolerance=1e-4)


def _clipped(norms: list[float], limit: float, together: bool) -> list[float]:
    """What torch makes of gradients with these norms."""
    parameters = [nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in norms]
    for p, norm in zip(parameters, norms, strict=True):
        p.grad = torch.tensor([norm], dtype=torch.float64)
    for group in [parameters] if together else [[p] for p in parameters]:
        clip_grad_norm_(group, limit)
    return [p.grad.item() for p in parameters]


def _check_tied(answer) -> None:
    require_function(answer)
    for tied in (("embeddings", "decoder"), (), ("body", "decoder"), ("embeddings", "body", "decoder")):
        model = WordGuesser(*tied)
        before = dict(model.named_parameters(remove_duplicate=False))
        rates = {name: 10.0 ** -i for i, (name, _) in enumerate(model.named_children())}
        found = _settings(answer(model, dict(rates)), "lr")
        after = dict(model.named_parameters(remove_duplicate=False))
        require(all(after[name] is p for name, p in before.items()),
                "the model has other tensors now than before, and its weights are no longer tied; leave the model as it is")
        _require_first_owner(found, before, rates)


def _require_first_owner(found: dict[int, float], params: dict[str, nn.Parameter], rates: dict[str, float]) -> None:
    owners = [(id(p), rates[name.partition(".")[0]]) for name, p in params.items()]
    wanted, last = dict(reversed(owners)), dict(owners)
    shared = [name for name, p in params.items() if sum(p is other for other in params.values()) > 1]
    unshared = {key: rate for key, rate in wanted.items() if all(key != id(params[name]) for name in shared)}
    wrong = next((name for name, p in params.items() if found.get(id(p)) != wanted[id(p)]), "")
    one_tensor = f"{' and '.join(shared)} are one tensor"
    require_same(found, wanted, {
        f"{one_tensor}. It has the rate of the last part that uses it, and it should have that of the first": last,
        f"{one_tensor}, and no group has it, so it would never train": unshared,
    }, f"{wrong} does not have the rate of its part" if wrong and id(params[wrong]) in found else
       f"{wrong} is in no group and would never train. Two tensors can hold equal numbers and still be two: the weights of "
       "every new LayerNorm are ones. So compare tensors with `is`, or by their id")


EXERCISES = {
    "6.1": Exercise("Rates and weight decay for any encoder", _check_encoder_groups,
                    "the rate needs group.depth. For the weight decay, look at p.ndim of a bias, of a norm's weight and of a "
                    "matrix.",
                    "ll.param_groups does the same with decay_norm_and_bias=False."),
    "6.2": Exercise("Carry a recipe over from another program", _check_recipe,
                    "two neighbouring layers below the head are one level apart in any program, so they tell you the decay. "
                    "Then count from the top layer and not from the head.",
                    "This works for ELECTRA's program too, although it counts one level more."),
    "6.3": Exercise("A LoRA layer that begins as nothing", _check_lora,
                    "the product B A is zero if one of the two is zero. If both are, no gradient reaches either.",
                    "Beside a matrix of 384 × 1536, with rank 8, it trains 8 · (384 + 1536) = 15,360 numbers, 2.6 % of the "
                    "matrix."),
    "6.4": Exercise("Two ways to clip", _check_clipping,
                    "the gradients of all groups together are one long vector. Its squared length is the sum of the squared "
                    "norms.",
                    "Only clipping all groups together keeps the ratios between your layers."),
    "6.5": Exercise("Tied weights have one rate", _check_tied,
                    "go through the parts in their order, and remember the `id` of each tensor that has a group; `in` on a "
                    "list compares numbers.",
                    "ll.layer_groups does the same: a tied tensor belongs where it is used first."),
}
