"""LayerAdaptiveLR: an optimizer that sets each layer's rate from the signal-to-noise ratio of its gradient."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

DIRECTIONS = ("momentum", "adam", "layernorm")
POOLS = ("tensor", "group")


class LayerAdaptiveLR(Optimizer):
    """Adam's moments, pooled into one learning rate a layer.

    With Adam's bias-corrected moments m and v of the gradient, a layer l steps by ``lr * k_l * d``, where
    ``k_l = mean over the layer of |m| / (sqrt(v) + eps)`` lies between 0 (its gradient is noise, which averages out)
    and about 1 (it keeps its sign and size), clamped to ``ratio_range``. Weight decay is decoupled, as in AdamW.

    Args:
        params: parameters or parameter groups. Every option can be set in a group.
        lr: learning rate before the ratio.
        betas: how slowly the two moments forget.
        eps: added to the denominator.
        weight_decay: decoupled (Loshchilov and Hutter, 2019).
        direction: ``"momentum"``: d = m, so a layer's step grows with its gradient. ``"adam"``: d = m/(sqrt(v)+eps)
            (Kingma and Ba, 2015). ``"layernorm"``: d = m/(sqrt(mean of v over the layer)+eps), the block rule of
            Adam-mini (Zhang et al., 2025), which stores one number for each tensor in place of v.
        pool: what a layer is: each ``"tensor"`` on its own, or all tensors of a parameter ``"group"`` together.
        ratio_range: lowest and highest ratio.
        maximize: go up instead of down.

    Raises:
        ValueError: a hyper-parameter out of range (when made or when a group is added).
        RuntimeError: sparse or complex gradients (at the step).
    """

    def __init__(self, params, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0, *, direction: str = "momentum", pool: str = "tensor",
                 ratio_range: tuple[float, float] = (0.0, math.inf), maximize: bool = False):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "direction": direction,
                    "pool": pool, "ratio_range": ratio_range, "maximize": maximize}
        _check(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        """Add a group, with the defaults for what it does not say; a bad value is refused before anything is added."""
        if isinstance(param_group, dict):
            _check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Make one step; ``closure`` may compute the loss anew, which is then returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None and p.numel()]
            layers = [params] if group["pool"] == "group" else [[p] for p in params]
            for layer in layers:
                if layer:
                    self._step_layer(layer, group)
        return loss

    def _step_layer(self, layer: list[Tensor], group: dict) -> None:
        moments, squares = zip(*(self._moments(p, group) for p in layer), strict=True)
        entries = sum(p.numel() for p in layer)
        if group["direction"] == "layernorm":  # one v for the whole layer: the mean over all its entries
            mean = sum(v * p.numel() for v, p in zip(squares, layer, strict=True)) / entries
            squares = [mean] * len(layer)
        normalised = [m / (v.sqrt() + group["eps"]) for m, v in zip(moments, squares, strict=True)]
        ratio = (sum(n.abs().sum() for n in normalised) / entries).clamp(*group["ratio_range"])
        rate = group["lr"] * ratio
        directions = moments if group["direction"] == "momentum" else normalised
        for p, d in zip(layer, directions, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(rate * d)
            self.state[p] |= {"ratio": ratio, "rate": rate}

    def _moments(self, p: Tensor, group: dict) -> tuple[Tensor, Tensor]:
        """Update and return the bias-corrected moments of one tensor; v is a single number for ``"layernorm"``."""
        if p.grad.is_sparse or p.is_complex():
            raise RuntimeError("LayerAdaptiveLR does not support sparse gradients or complex parameters")
        gradient = -p.grad if group["maximize"] else p.grad
        square = gradient.square().mean() if group["direction"] == "layernorm" else gradient.square()
        state, (beta1, beta2) = self.state[p], group["betas"]
        if not state:
            state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(square)}
        state["step"] += 1
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].lerp_(square, 1 - beta2)
        step = state["step"].double()  # in single precision 1 - 0.999 is already off by 1e-5
        return (state["exp_avg"] / (1 - beta1 ** step).to(p.dtype),
                state["exp_avg_sq"] / (1 - beta2 ** step).to(p.dtype))

    def layer_rates(self) -> dict[str, float]:
        """The effective rate ``lr * k`` of each layer at its last step; layers that have not stepped are left out.

        A layer is named after its parameter group; with ``pool="tensor"`` also after the parameter, if the optimizer
        was given names, or its place in the group.
        """
        rates = {}
        for i, group in enumerate(self.param_groups):
            name = group.get("name", f"group {i}")
            for j, p in enumerate(group["params"]):
                if "rate" in self.state.get(p, {}):
                    tensor = group["param_names"][j] if "param_names" in group else f"{name}/{j}"
                    label = name if group["pool"] == "group" else tensor
                    rates[label] = float(self.state[p]["rate"])
        return rates


def _check(group: dict) -> None:
    if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not 0.0 <= group["lr"]:
        raise ValueError(f"Invalid learning rate: {group['lr']}")
    if not 0.0 <= group["eps"]:
        raise ValueError(f"Invalid epsilon value: {group['eps']}")
    for index, beta in enumerate(group["betas"]):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
    if not 0.0 <= group["weight_decay"]:
        raise ValueError(f"Invalid weight_decay value: {group['weight_decay']}")
    low, high = group["ratio_range"]
    if not 0.0 <= low <= high:
        raise ValueError(f"Invalid ratio_range: {group['ratio_range']}; it is (lowest, highest), both 0 or above")
    for option, known in (("direction", DIRECTIONS), ("pool", POOLS)):
        if group[option] not in known:
            raise ValueError(f"Invalid {option}: {group[option]!r}; known are {', '.join(map(repr, known))}")
