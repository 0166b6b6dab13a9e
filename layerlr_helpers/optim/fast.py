"""Faster implementations of ``rule``: block by block in the cache (CPU), and many tensors in each call (GPU)."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.optim.optimizer import _get_value

from layerlr_helpers.optim.rule import Batch, TensorSums, corrections, exact, move, observe, ratio_of, ratios, scalar, weight

BLOCK = 2**17  # entries: a block of them in single precision has 512 KiB and stays in the cache
SMALL = 2**13  # entries: for smaller tensors the calls cost more than the computation, so they go many to a call

# --- block by block ---------------------------------------------------------------------------------------------------
# A step has to go over the weights twice, since a layer's ratio is known only after all of its entries have been seen.
# torch's fused kernel does the first round in one sweep: run with rate 1 on a block of zeros in place of the weights, it
# updates both moments and leaves m / (sqrt(v) + eps) behind, whose absolute sum is taken while it is still in the cache.
# A decay of 1 makes the next block start from zeros again, without a sweep of its own: a finite x less 1 · x is 0. Only what
# is not finite stays, and then the tensor's sum is not finite anyway; so each tensor starts with true zeros.


def fused(batches: Sequence[Batch], reduction, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
    """Step the parameters; ``grad_scale`` divides the gradients first, and a true ``found_inf`` skips the step."""
    if found_inf is not None and found_inf.item():
        return
    for batch in batches if grad_scale is not None else ():
        torch._foreach_div_(batch.grads, grad_scale)
    small = [[i for i, p in enumerate(batch.params) if p.numel() <= SMALL and _is_flat(batch, i)] for batch in batches]
    tensor_sums, normalised = [], []
    for batch, indices in zip(batches, small, strict=True):
        observe_small = _observe_small if batch.group["direction"] == "momentum" else _observe_together
        sums, u = observe_small(batch, indices)
        sums |= {i: _observe_blocks(batch, i) for i in range(len(batch.params)) if i not in sums}
        tensor_sums.append(sums)
        normalised.append(u)
    all_rates = _rates(batches, tensor_sums, reduction)
    for batch, indices, u, (rates, scales) in zip(batches, small, normalised, all_rates, strict=True):
        _move_together(batch, indices, rates, scales, u)
        for i in set(range(len(batch.params))) - set(indices):
            _move_blocks(batch, i, rates[i], scales[i])


def _observe_blocks(batch: Batch, i: int) -> TensorSums:
    """``rule.observe``, block by block."""
    if not _is_flat(batch, i):
        return observe(batch, i)
    group, g, m, v = batch.group, batch.grads[i], batch.exp_avgs[i], batch.exp_avg_sqs[i]
    beta1, beta2 = group["betas"]
    scratch = g.new_zeros(min(g.numel(), BLOCK))
    sizes, squares = [], []
    batch.steps[i] += 1
    if group["direction"] == "adam_mini":
        for g_block, m_block in _blocks(g, m):
            m_block.mul_(beta1).add_(g_block, alpha=beta1 - 1 if group["maximize"] else 1 - beta1)
            sizes.append(torch.abs(m_block, out=scratch[:m_block.numel()]).sum())
            squares.append(torch.dot(g_block, g_block))
        return torch.stack(sizes).sum() / _corrections(batch, i)[0], torch.stack(squares).sum()
    for g_block, m_block, v_block in _blocks(g, m, v):
        normalised = scratch[:g_block.numel()]
        if not group["eps"]:  # then a zero of v makes a ratio infinite, which ratio_range can still mend
            normalised.zero_()
        torch._fused_adamw_([normalised], [g_block], [m_block], [v_block], [], [batch.steps[i]], lr=1.0, beta1=beta1,
                            beta2=beta2, weight_decay=1.0, eps=group["eps"], amsgrad=False, maximize=group["maximize"])
        sizes.append(normalised.abs_().sum())  # several times faster than a norm of order 1
    return torch.stack(sizes).sum(), None


def _observe_small(batch: Batch, indices: Sequence[int]) -> tuple[dict[int, TensorSums], dict]:
    """``rule.observe`` for small tensors of "momentum", with one call of the kernel for all of them."""
    sums = {}
    for alike in _alike(batch, indices):
        grads, m, v, steps = (_at(tensors, alike) for tensors in (batch.grads, batch.exp_avgs, batch.exp_avg_sqs, batch.steps))
        torch._foreach_add_(steps, torch.ones(()) if steps[0].is_cpu else 1)
        lengths = [g.numel() for g in grads]
        parts = grads[0].new_zeros(sum(lengths)).split(lengths)
        normalised = [part.view_as(g) for part, g in zip(parts, grads, strict=True)]
        torch._fused_adam_(normalised, grads, m, v, [], steps, lr=1.0, beta1=batch.group["betas"][0],
                           beta2=batch.group["betas"][1], weight_decay=0.0, eps=batch.group["eps"], amsgrad=False,
                           maximize=batch.group["maximize"])
        sums |= {i: (size, None) for i, size in zip(alike, torch._foreach_norm(normalised, 1), strict=True)}
    return sums, {}


def _move_blocks(batch: Batch, i: int, rate: Tensor, scale: Tensor | None) -> None:
    """``rule.move`` for one tensor, block by block."""
    if not _is_flat(batch, i):
        move(batch, [i], rate, scale)
        return
    group, p, m, (first, second) = batch.group, batch.params[i], batch.exp_avgs[i], _corrections(batch, i)
    keep = 1 - scalar(group["lr"]) * group["weight_decay"] if group["weight_decay"] else None
    if group["direction"] == "adam":
        step, scratch = rate * (second / first), p.new_empty(min(p.numel(), BLOCK))
        for p_block, m_block, v_block in _blocks(p, m, batch.exp_avg_sqs[i]):
            u = torch.sqrt(v_block, out=scratch[:v_block.numel()]).add_(group["eps"] * second)
            torch.div(m_block, u, out=u)
            (p_block if keep is None else p_block.mul_(keep)).addcmul_(u, step, value=-1)
        return
    step = rate / first if scale is None else rate / (first * scale)
    for p_block, m_block in [(p, m)] if keep is None else _blocks(p, m):  # blocks would only interrupt a single sweep
        (p_block if keep is None else p_block.mul_(keep)).addcmul_(m_block, step, value=-1)


def _is_flat(batch: Batch, i: int) -> bool:
    """Whether a tensor and its state can be cut into blocks as they lie in memory, and need no second precision."""
    p, g = batch.params[i], batch.grads[i]
    return (p.is_contiguous() and g.is_contiguous() and batch.exp_avgs[i].is_contiguous() and p.dtype == g.dtype
            and p.dtype.itemsize > 2 and not isinstance(batch.group["betas"][0], Tensor))


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same entries of all tensors, a block of them at a time."""
    return zip(*(t.view(-1).split(BLOCK) for t in tensors), strict=True)


# --- many tensors in each call ----------------------------------------------------------------------------------------

def multi_tensor(batches: Sequence[Batch], reduction) -> None:
    """Step the parameters with few calls for each group, as torch's ``foreach`` optimizers do."""
    # Without a sum over processes one batch after the other, which needs less memory at a time.
    for part in [batches] if reduction is not None else [[batch] for batch in batches]:
        tensor_sums, normalised = zip(*(_observe_together(batch, range(len(batch.params))) for batch in part), strict=True)
        for batch, u, (rates, scales) in zip(part, normalised, _rates(part, tensor_sums, reduction), strict=True):
            _move_together(batch, range(len(batch.params)), rates, scales, u)


def _observe_together(batch: Batch, indices: Sequence[int]) -> tuple[dict[int, TensorSums], dict[int, Tensor]]:
    """``rule.observe`` for the tensors at ``indices``; also returns the m / (sqrt(v) + eps) of "adam", not yet corrected."""
    group, sums, normalised = batch.group, {}, {}
    beta1, beta2 = group["betas"]
    for alike in _alike(batch, indices):
        grads, m, v, steps = (_at(tensors, alike) for tensors in (batch.grads, batch.exp_avgs, batch.exp_avg_sqs, batch.steps))
        grads = torch._foreach_neg(grads) if group["maximize"] else grads
        # On the CPU torch would make a tensor of 1 for each step; on a GPU it would wait to read the one that it is given.
        torch._foreach_add_(steps, torch.ones(()) if steps[0].is_cpu else 1)
        torch._foreach_lerp_(m, grads, 1 - beta1)
        precise = exact(m[0]).dtype
        firsts, seconds = zip(*(_corrections(batch, i) for i in alike), strict=True)
        if group["direction"] == "adam_mini":
            sizes, squares = torch._foreach_norm(m, 1, dtype=precise), torch._foreach_norm(grads, 2, dtype=precise)
            for i, size, first, square in zip(alike, sizes, firsts, squares, strict=True):
                sums[i] = size / first, square.square()
            continue
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
        u = torch._foreach_sqrt(v)
        torch._foreach_div_(u, seconds)
        torch._foreach_add_(u, group["eps"])
        torch._foreach_reciprocal_(u)
        torch._foreach_mul_(u, m)
        for i, size, first in zip(alike, torch._foreach_norm(u, 1, dtype=precise), firsts, strict=True):
            sums[i] = size / first, None
        normalised |= zip(alike, u, strict=True) if group["direction"] == "adam" else ()
    return sums, normalised


def _move_together(batch: Batch, indices: Sequence[int], rates: list[Tensor], scales: list[Tensor | None],
                   normalised: dict[int, Tensor]) -> None:
    """``rule.move`` for the tensors at ``indices``."""
    for alike in _alike(batch, indices):
        p = _at(batch.params, alike)
        steps = [rates[i] / _corrections(batch, i)[0] for i in alike]
        steps = [(step if scales[i] is None else step / scales[i]).to(p[0]) for step, i in zip(steps, alike, strict=True)]
        if batch.group["direction"] == "adam":
            d = _at(normalised, alike)
            torch._foreach_mul_(d, steps)
        else:
            d = torch._foreach_mul(_at(batch.exp_avgs, alike), steps)
        if batch.group["weight_decay"]:
            torch._foreach_mul_(p, 1 - scalar(batch.group["lr"]) * batch.group["weight_decay"])
        torch._foreach_sub_(p, d)


# --- the rates of all tensors -----------------------------------------------------------------------------------------

def _rates(batches: Sequence[Batch], tensor_sums: Sequence[dict], reduction) -> Iterator[tuple[list, list]]:
    """For each batch the rate of every tensor, which is also recorded, and its scale, in a few calls for all of them."""
    layer_ratios = ratios(batches, tensor_sums, reduction) if reduction is not None else map(_ratios, batches, tensor_sums)
    for batch, layers in zip(batches, layer_ratios, strict=True):
        by_tensor = {i: (ratio, scale) for layer, ratio, scale in layers for i in layer}
        tensor_ratios, scales = ([by_tensor[i][k] for i in range(len(batch.params))] for k in (0, 1))
        rates = []
        if tensor_ratios:
            device = tensor_ratios[0].device
            stacked = torch.stack([ratio.to(device) for ratio in tensor_ratios]).clamp(*batch.group["ratio_range"])
            rates = list((scalar(batch.group["lr"]) * stacked).unbind())
            torch._foreach_copy_(batch.rates, rates)
        yield rates, scales


def _ratios(batch: Batch, tensor_sums: dict[int, TensorSums]) -> Iterator[tuple]:
    """``rule.ratios`` for one batch whose layers are whole in this process, in a few calls for all of its tensors."""
    sizes, squares = zip(*(tensor_sums[i] for i in range(len(batch.params))), strict=True)
    size, square = torch.stack(sizes), None
    if batch.group["capturable"]:  # a CUDA graph cannot capture a copy from the CPU
        entries = torch.stack([torch.full_like(one, count) for one, count in zip(sizes, batch.entries, strict=True)])
    else:
        entries = torch.tensor(batch.entries, dtype=size.dtype, device=size.device)
    if batch.group["direction"] == "adam_mini":
        means = (torch.stack(squares) / entries).unbind()
        for v, mean in zip(batch.exp_avg_sqs, means, strict=True):
            v.lerp_(mean.to(v.dtype), weight(batch.group, 1, v))
        square = torch.stack([v / _corrections(batch, i)[1] ** 2 for i, v in enumerate(batch.exp_avg_sqs)]) * entries
    if batch.group["pool"] == "group":
        size, entries, square = size.sum(0, True), entries.sum(0, True), square.sum(0, True) if square is not None else None
    ratio, scale = ratio_of(batch, size, square, entries)
    return zip(batch.layers, ratio.unbind(), scale.unbind() if scale is not None else [None] * len(ratio), strict=True)


def _corrections(batch: Batch, i: int):
    """``rule.corrections`` as numbers where the steps are counted on the CPU: reading them there makes no GPU wait."""
    if batch.group["capturable"]:
        return corrections(batch.group, batch.steps[i])
    t, (beta1, beta2) = _get_value(batch.steps[i]), batch.group["betas"]
    return 1 - beta1**t, (1 - beta2**t) ** 0.5


def _at(tensors: Sequence[Tensor] | dict[int, Tensor], indices: Sequence[int]) -> list[Tensor]:
    return [tensors[i] for i in indices]


def _alike(batch: Batch, indices: Sequence[int]) -> Iterator[list[int]]:
    """The indices, those of tensors of one device and type together."""
    kinds: dict = {}
    for i in indices:
        kinds.setdefault((batch.params[i].device, batch.params[i].dtype, batch.grads[i].dtype), []).append(i)
    return kinds.values()
