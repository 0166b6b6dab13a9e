"""LayerAdaptiveLR: an optimizer that sets each layer's rate from the signal-to-noise ratio of its gradient.

The rule itself is in ``rule``, one screen of plain torch. Faster ways to the same numbers are in ``fast``,
and what it takes to sum over several processes in ``processes``.
"""

import math
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _default_to_fused_or_foreach, _device_dtype_check_for_fused, _get_scalar_dtype

from layerlr_helpers.optim.fast import fused as _fused_layeradaptivelr
from layerlr_helpers.optim.fast import multi_tensor as _multi_tensor_layeradaptivelr
from layerlr_helpers.optim.processes import across, building_zero, local, spread_over
from layerlr_helpers.optim.rule import Batch
from layerlr_helpers.optim.rule import single_tensor as _single_tensor_layeradaptivelr

DIRECTIONS = ("momentum", "adam", "adam_mini")
POOLS = ("tensor", "group")


class LayerAdaptiveLR(Optimizer):
    """Adam's moments, pooled into one learning rate a layer.

    With Adam's bias-corrected moments m and v of the gradient, a layer l steps by ``lr * k_l * d``, where
    ``k_l = mean over the layer of |m| / (sqrt(v) + eps)`` lies between 0 (its gradient is noise, which averages out)
    and about 1 (it keeps its sign and size; above 1 only while gradients grow), clamped to ``ratio_range``. Weight decay
    is decoupled, as in AdamW. It can be put in the place of ``torch.optim.Adam``; choose its ``lr`` anew: about that of Adam
    times 3 for "adam" and "adam_mini", far higher for "momentum", whose step is as large as the gradient.

    Args:
        params: parameters, named parameters or parameter groups. Every option can be set in a group.
        lr: learning rate before the ratio.
        betas: how slowly the two moments forget.
        eps: added to the denominator.
        weight_decay: decoupled (Loshchilov and Hutter, 2019).
        direction: ``"momentum"``: d = m, so a layer's step grows with its gradient. ``"adam"``: d = m/(sqrt(v)+eps)
            (Kingma and Ba, 2015). ``"adam_mini"``: d = m/(sqrt(mean of v over the layer)+eps), the block rule of
            Adam-mini (Zhang et al., 2025), which stores one number for each tensor in place of v.
        pool: what a layer is: each ``"tensor"`` on its own, or all tensors of a parameter ``"group"`` together.
        ratio_range: lowest and highest ratio.
        foreach, fused: which implementation to use, as in Adam; None takes the fastest one that fits: block by block
            in the cache on a CPU, many tensors at once on a GPU, otherwise one tensor after the other.
        maximize, capturable, differentiable: as in Adam.

    Raises:
        ValueError: a hyper-parameter out of range (when made or when a group is added).
        RuntimeError: ``fused`` with ``foreach`` or ``differentiable``; sparse gradients (at the step).
    """

    def __init__(self, params, lr: float | Tensor = 1e-3, betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0, *, direction: str = "momentum", pool: str = "tensor",
                 ratio_range: tuple[float, float] = (0.0, math.inf), foreach: bool | None = None, maximize: bool = False,
                 capturable: bool = False, differentiable: bool = False, fused: bool | None = None):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "direction": direction,
                    "pool": pool, "ratio_range": ratio_range, "foreach": foreach, "maximize": maximize,
                    "capturable": capturable, "differentiable": differentiable, "fused": fused}
        _check(defaults)
        zero = building_zero()
        self._zero = weakref.ref(zero) if zero is not None else None
        super().__init__(params, defaults)
        if fused:
            self._step_supports_amp_scaling = True  # a GradScaler then leaves scaling and skipping to the step

    def add_param_group(self, param_group: dict) -> None:
        """Add a group, with the defaults for what it does not say; a bad value is refused before anything is added."""
        if isinstance(param_group, dict):
            _check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_zero", None)
        for group in self.param_groups:
            for option, value in OLDER.items():
                group.setdefault(option, value)
            for p in group["params"]:
                step = self.state[p].get("step") if p in self.state else None
                if step is not None and not isinstance(step, Tensor):
                    self.state[p]["step"] = _step(p, group, float(step))

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Make one step; ``closure`` may compute the loss anew, which is then returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            self._step([self._batch(group) for group in self.param_groups])
        return loss

    def _step(self, batches: list[Batch]) -> None:
        zero = self._zero() if self._zero is not None else None
        chosen = [_implementation(batch) for batch in batches]
        if zero is not None:  # one for all groups, so that every process sums once, also one that has nothing of a group
            chosen = [next((its for batch, its in zip(batches, chosen, strict=True) if batch.params), "single")] * len(batches)
        for name in dict.fromkeys(chosen):
            mine = [batch for batch, its in zip(batches, chosen, strict=True) if its == name]
            if name == "fused":
                _fused_layeradaptivelr(mine, across(mine, zero), getattr(self, "grad_scale", None),
                                       getattr(self, "found_inf", None))
            elif name == "foreach":
                _multi_tensor_layeradaptivelr(mine, across(mine, zero))
            else:
                _single_tensor_layeradaptivelr(mine, across(mine, zero))

    def _batch(self, group: dict) -> Batch:
        batch = Batch(group, [], [], [], [], [], [], [], [], [])
        self._init_group(group, batch.params, batch.grads, batch.exp_avgs, batch.exp_avg_sqs, batch.steps, batch.rates)
        batch.spread.extend(spread_over(p) for p in batch.params)
        batch.entries.extend(p.numel() * (2 if p.is_complex() else 1) for p in batch.params)
        places = range(len(batch.params))
        batch.layers.extend([list(places)] if group["pool"] == "group" else [[i] for i in places])
        for tensors in (batch.params, batch.grads, batch.exp_avgs, batch.exp_avg_sqs):
            tensors[:] = [_real(local(t)) for t in tensors]
        return batch

    def _init_group(self, group, params, grads, exp_avgs, exp_avg_sqs, steps, rates) -> None:
        """Fill the lists with the tensors that have a gradient and with their state, which is made where there is none."""
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise RuntimeError("LayerAdaptiveLR does not support sparse gradients")
            if group["fused"]:
                _device_dtype_check_for_fused(p)
            state = self.state[p]
            if "step" not in state:
                state["step"] = _step(p, group, 0.0)
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = (_number(p) if group["direction"] == "adam_mini"
                                       else torch.zeros_like(p, memory_format=torch.preserve_format))
            if "rate" not in state:
                state["rate"] = _number(p)
            if group["direction"] == "adam_mini":  # in half precision a running mean would stand still
                exact = torch.promote_types(state["exp_avg_sq"].dtype, torch.float32)
                state["exp_avg_sq"] = state["exp_avg_sq"].to(exact)
            if p.numel():
                params.append(p)
                grads.append(p.grad)
                exp_avgs.append(state["exp_avg"])
                exp_avg_sqs.append(state["exp_avg_sq"])
                steps.append(state["step"])
                rates.append(state["rate"])

    def layer_rates(self) -> dict[str, float]:
        """The effective rate ``lr * k`` of each layer at its last step; layers that have not stepped are left out.

        A layer is named after its parameter group; with ``pool="tensor"`` also after the parameter, if the optimizer
        was given names, or its place in the group.
        """
        rates = {}
        for i, group in enumerate(self.param_groups):
            name = group.get("name", f"group {i}")
            for j, p in enumerate(group["params"]):
                if p in self.state and "rate" in self.state[p]:
                    tensor = group["param_names"][j] if "param_names" in group else f"{name}/{j}"
                    rates[name if group["pool"] == "group" else tensor] = float(self.state[p]["rate"])
        return rates


# What groups of older state dicts may lack.
OLDER = {"direction": "momentum", "pool": "tensor", "ratio_range": (0.0, math.inf), "foreach": None, "maximize": False,
         "capturable": False, "differentiable": False, "fused": None}


def _implementation(batch: Batch) -> str:
    """The name of the fastest implementation that fits a group, or of the one that was asked for."""
    group = batch.group
    if group["fused"] or group["foreach"]:
        return "fused" if group["fused"] else "foreach"
    if group["fused"] is not None or group["foreach"] is not None or group["differentiable"]:
        return "single"
    if torch.compiler.is_compiling() or isinstance(group["betas"][0], Tensor):
        return "single"
    if all(p.device.type == "cpu" and p.dtype in (torch.float32, torch.float64) for p in batch.params):
        return "fused"
    foreach = _default_to_fused_or_foreach(batch.params, differentiable=False)[1]
    return "foreach" if foreach and (group["capturable"] or not isinstance(group["lr"], Tensor)) else "single"


def _step(p: Tensor, group: dict, value: float) -> Tensor:
    """The number of steps so far: on the CPU, where reading it makes no GPU wait, unless it must not be read at all."""
    on_device = group["capturable"] or group["fused"]
    return torch.tensor(value, dtype=_get_scalar_dtype(bool(group["fused"])), device=p.device if on_device else "cpu")


def _number(p: Tensor) -> Tensor:
    """A zero to keep a number of a tensor in."""
    dtype = p.real.dtype if p.is_complex() else p.dtype
    return torch.zeros((), dtype=dtype, device=p.device)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _check(group: dict) -> None:
    lr, betas = group["lr"], group["betas"]
    for name, value in (("lr", lr), ("betas[0]", betas[0]), ("betas[1]", betas[1])):
        if isinstance(value, Tensor) and group["foreach"] and not group["capturable"]:
            raise ValueError(f"{name} as a Tensor is not supported for capturable=False and foreach=True")
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element")
    if not 0.0 <= lr:
        raise ValueError(f"Invalid learning rate: {lr}")
    if not 0.0 <= group["eps"]:
        raise ValueError(f"Invalid epsilon value: {group['eps']}")
    for index, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
    if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
        raise ValueError("betas must be either both floats or both Tensors")
    if not 0.0 <= group["weight_decay"]:
        raise ValueError(f"Invalid weight_decay value: {group['weight_decay']}")
    low, high = group["ratio_range"]
    if not 0.0 <= low <= high:
        raise ValueError(f"Invalid ratio_range: {group['ratio_range']}; it is (lowest, highest), both 0 or above")
    for option, known in (("direction", DIRECTIONS), ("pool", POOLS)):
        if group[option] not in known:
            raise ValueError(f"Invalid {option}: {group[option]!r}; known are {', '.join(map(repr, known))}")
    if group["fused"] and group["differentiable"]:
        raise RuntimeError("`fused` does not support `differentiable`")
    if group["fused"] and group["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
