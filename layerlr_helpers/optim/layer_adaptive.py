"""LayerAdaptiveLR: an optimizer that sets each layer's rate from the signal-to-noise ratio of its gradient.

The rule itself is in ``rule``, in plain torch. Faster implementations of it are in ``fast``, and what sums over several
processes is in ``processes``.
"""

import math
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _default_to_fused_or_foreach, _device_dtype_check_for_fused, _get_scalar_dtype

from layerlr_helpers.optim import fast
from layerlr_helpers.optim.processes import Reduction, calling_zero_optimizer, local_shard, process_groups_of
from layerlr_helpers.optim.rule import Batch, exact, single_tensor

DIRECTIONS = ("momentum", "adam", "adam_mini")
POOLS = ("tensor", "group")


class LayerAdaptiveLR(Optimizer):
    """Adam's moments, pooled into one learning rate a layer.

    With Adam's bias-corrected moments m and v of the gradient, a layer l steps by ``lr * k_l * d``, where
    ``k_l = mean over the layer of |m| / (sqrt(v) + eps)`` is about 0.2 where its gradient is steady noise, at the
    default betas, and about 1 where it keeps its sign and size. It is lower while gradients shrink, and above 1 only while
    they grow. It is clamped to ``ratio_range``. Weight decay is decoupled, as in AdamW. It can be put in the place of
    ``torch.optim.Adam``, but needs an ``lr`` of its own: ``direction`` says where to start.

    Args:
        params: parameters, named parameters or parameter groups. Every option can be set in a group.
        lr, betas, eps, weight_decay: as in AdamW (Loshchilov and Hutter, 2019); ``lr`` is the rate before the ratio.
            Always set it, since the default is Adam's.
        direction: what d is, and so which ``lr`` to start from.
            ``"momentum"``: d = m, so a layer's step grows with its gradient. Start at 30 times the rate of SGD with momentum.
            ``"adam"``: d = m/(sqrt(v)+eps) (Kingma and Ba, 2015). Start at 3 times the rate of AdamW.
            ``"adam_mini"``: d = m/(sqrt(mean of v over the layer)+eps), the block rule of Adam-mini (Zhang et al., 2025),
            which stores one number for each tensor in place of v. Start at 3 times the rate of AdamW.
        pool: what a layer is: each ``"tensor"`` on its own, or all tensors of a parameter ``"group"`` together.
        ratio_range: lowest and highest ratio.
        foreach, fused: which implementation to use, as in Adam; None takes the fastest one that fits: block by block
            in the cache on a CPU, many tensors at once on a GPU, otherwise one tensor after the other.
        maximize, capturable, differentiable: as in Adam.

    What is out of range is a ValueError, flags that exclude each other and sparse gradients are a RuntimeError, as in Adam.
    """

    _zero: weakref.ref | None = None  # a ZeroRedundancyOptimizer; None also in a copy and after unpickling

    def __init__(self, params, lr: float | Tensor = 1e-3, betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0, *, direction: str = "momentum", pool: str = "tensor",
                 ratio_range: tuple[float, float] = (0.0, math.inf), foreach: bool | None = None, maximize: bool = False,
                 capturable: bool = False, differentiable: bool = False, fused: bool | None = None):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "direction": direction,
                    "pool": pool, "ratio_range": ratio_range, "foreach": foreach, "maximize": maximize,
                    "capturable": capturable, "differentiable": differentiable, "fused": fused}
        _check(defaults)
        if (zero := calling_zero_optimizer()) is not None:
            self._zero = weakref.ref(zero)
        super().__init__(params, defaults)
        if defaults["fused"]:
            self._step_supports_amp_scaling = True  # a GradScaler then leaves scaling and skipping to the step

    def add_param_group(self, param_group: dict) -> None:
        """Add a group, with the defaults for what it does not say; a bad value is refused before anything is added."""
        if isinstance(param_group, dict):
            _check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Make one step; ``closure`` may compute the loss anew, which is then returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            self._step([self._batch(group) for group in self.param_groups])
        return loss

    def _step(self, batches: Sequence[Batch]) -> None:
        zero = self._zero() if self._zero is not None else None
        filled = [batch for batch in batches if batch.params]
        if zero is None:
            batches, names = filled, [_implementation(batch) for batch in filled]
        else:  # one for all groups, so that every process sums once, also a process that has nothing of a group
            names = [_implementation(filled[0]) if filled else "single"] * len(batches)
        for implementation in dict.fromkeys(names):
            chosen = [batch for name, batch in zip(names, batches, strict=True) if name == implementation]
            in_parts = zero is not None or any(any(batch.process_groups) for batch in chosen)  # else this process has all
            reduction = Reduction(zero) if in_parts else None
            if implementation == "fused":
                fast.fused(chosen, reduction, getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
            elif implementation == "foreach":
                fast.multi_tensor(chosen, reduction)
            else:
                single_tensor(chosen, reduction)

    def _batch(self, group: dict) -> Batch:
        params, grads, exp_avgs, exp_avg_sqs, steps, rates = lists = [], [], [], [], [], []
        self._init_group(group, *lists)
        indices = list(range(len(params)))
        shards = [[torch.view_as_real(t) if t.is_complex() else t for t in map(local_shard, tensors)]
                  for tensors in (params, grads, exp_avgs, exp_avg_sqs)]
        return Batch(group, *shards, steps, rates, entries=[p.numel() * (2 if p.is_complex() else 1) for p in params],
                     process_groups=[process_groups_of(p) for p in params],
                     layers=[indices] if group["pool"] == "group" else [[i] for i in indices])

    def _init_group(self, group: dict, *lists: list[Tensor]) -> None:
        """Fill the lists with the tensors that have a gradient and with their state. (torch.compile relies on this name.)"""
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise RuntimeError("LayerAdaptiveLR does not support sparse gradients")
            if group["fused"]:
                _device_dtype_check_for_fused(p)
            state = self.state[p]
            if "step" not in state:
                # Steps are counted on the CPU, where reading them makes no GPU wait, unless they must not be read at all.
                state["step"] = torch.zeros((), dtype=_get_scalar_dtype(bool(group["fused"])),
                                            device=p.device if group["capturable"] or group["fused"] else "cpu")
                rate = torch.zeros((), dtype=p.dtype.to_real(), device=p.device)
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(rate if group["direction"] == "adam_mini" else p)
                state["rate"] = rate
            if group["direction"] == "adam_mini":  # in half precision a running mean would stand still
                state["exp_avg_sq"] = exact(state["exp_avg_sq"])
            if p.numel():
                names = ("exp_avg", "exp_avg_sq", "step", "rate")
                for tensors, tensor in zip(lists, (p, p.grad, *(state[name] for name in names)), strict=True):
                    tensors.append(tensor)

    def layer_rates(self) -> dict[str, float]:
        """The effective rate ``lr * k`` of each layer at its last step; layers that have not stepped are left out.

        A layer is named after its parameter group; with ``pool="tensor"`` also after the parameter, if the optimizer
        was given names, or its number in the group.
        """
        rates = {}
        for i, group in enumerate(self.param_groups):
            name = group.get("name", f"group {i}")
            for j, p in enumerate(group["params"]):
                if p in self.state:
                    tensor = group["param_names"][j] if "param_names" in group else f"{name}/{j}"
                    rates[name if group["pool"] == "group" else tensor] = float(self.state[p]["rate"])
        return rates


def _implementation(batch: Batch) -> str:
    """The name of the fastest implementation that fits a group, or of the one that was asked for."""
    group = batch.group
    if group["fused"] or group["foreach"]:
        return "fused" if group["fused"] else "foreach"
    refused = group["fused"] is not None or group["foreach"] is not None
    if refused or group["differentiable"] or torch.compiler.is_compiling() or isinstance(group["betas"][0], Tensor):
        return "single"
    if all(p.device.type == "cpu" and p.dtype in (torch.float32, torch.float64) for p in batch.params):
        return "fused"
    foreach = _default_to_fused_or_foreach(batch.params, differentiable=False)[1]
    return "foreach" if foreach and (group["capturable"] or not isinstance(group["lr"], Tensor)) else "single"


def _check(group: dict) -> None:
    """Refuse hyper-parameters out of range, in the words of torch's Adam where it has them too."""
    lr, betas = group["lr"], group["betas"]
    for name, value in (("lr", lr), ("betas[0]", betas[0]), ("betas[1]", betas[1])):
        if isinstance(value, Tensor) and group["foreach"] and not group["capturable"]:
            raise ValueError(f"{name} as a Tensor is not supported for capturable=False and foreach=True")
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element")
    for name, value in (("learning rate", lr), ("epsilon value", group["eps"]), ("weight_decay value", group["weight_decay"])):
        if not 0.0 <= value:
            raise ValueError(f"Invalid {name}: {value}")
    for index, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
    if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
        raise ValueError("betas must be either both floats or both Tensors")
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
