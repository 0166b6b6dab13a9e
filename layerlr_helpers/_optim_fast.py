"""Faster ways to the numbers of ``_optim_rule``: block by block in the cache (CPU), and many tensors at once (GPU)."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim.optimizer import _get_value

from layerlr_helpers._optim_processes import ALONE
from layerlr_helpers._optim_rule import Batch, corrections, exact, layer_sums, move, observe, ratio_of, ratios, scalar

BLOCK = 2**17  # entries: a few blocks of single precision fit into a core's second-level cache

# --- block by block ---------------------------------------------------------------------------------------------------
# A step has to go over the weights twice, since a layer's ratio is known only after all of its entries have been seen.
# torch's fused kernel does the first round in one sweep: run with rate 1 on a block of zeros in place of the weights, it
# updates both moments and leaves m / (sqrt(v) + eps) behind, whose absolute sum is taken while it is still in the cache.


def fused(batches: list[Batch], across, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
    """Step the parameters; ``grad_scale`` divides the gradients first, with ``found_inf`` nothing at all changes."""
    if found_inf is not None and found_inf.item():
        return
    for batch in batches if grad_scale is not None else ():
        torch._foreach_div_(batch.grads, grad_scale)
    scratch: dict = {}
    if across is not ALONE:
        seen = [[_observe_blocks(batch, i, scratch) for i in range(len(batch.params))] for batch in batches]
        for batch, layer, ratio, scale in ratios(batches, seen, across):
            _move_blocks(batch, layer, ratio, scale, scratch)
        return
    for batch in batches:
        for layer in filter(None, batch.layers):  # one after the other: then more of it is still in the cache
            seen = {i: _observe_blocks(batch, i, scratch) for i in layer}
            _move_blocks(batch, layer, *ratio_of(batch, *layer_sums(batch, layer, seen)), scratch)


def _observe_blocks(batch: Batch, i: int, scratch: dict) -> tuple[Tensor, Tensor | None]:
    """What ``observe`` does, block by block."""
    g, m, v = batch.grads[i], batch.exp_avgs[i], batch.exp_avg_sqs[i]
    if not _is_flat(batch, i):
        return observe(batch, i)
    group, sizes, squares = batch.group, [], []
    beta1, beta2 = (float(beta) for beta in group["betas"])
    batch.steps[i] += 1
    if group["direction"] == "layernorm":
        for g_block, m_block in _blocks(g, m):
            m_block.mul_(beta1).add_(g_block, alpha=beta1 - 1 if group["maximize"] else 1 - beta1)
            sizes.append(exact(torch.abs(m_block, out=_like(scratch, m_block))).sum())
            squares.append(torch.dot(exact(g_block), exact(g_block)))
        return _sum(sizes) / _corrections(batch, i)[0], _sum(squares)
    for g_block, m_block, v_block in _blocks(g, m, v):
        normalised = _like(scratch, g_block).zero_()
        torch._fused_adam_([normalised], [g_block], [m_block], [v_block], [], [batch.steps[i]], lr=1.0, beta1=beta1,
                           beta2=beta2, weight_decay=0.0, eps=group["eps"], amsgrad=False, maximize=group["maximize"])
        sizes.append(exact(normalised.abs_()).sum())  # several times faster than a norm of order 1
    return _sum(sizes), None


def _move_blocks(batch: Batch, layer: list[int], ratio: Tensor, scale: Tensor | None, scratch: dict) -> None:
    """What ``move`` does, block by block."""
    if not all(_is_flat(batch, i) and batch.params[i].dtype.itemsize > 2 for i in layer):
        move(batch, layer, ratio, scale)
        return
    group, lr = batch.group, scalar(batch.group["lr"])
    rate = lr * ratio.clamp(*group["ratio_range"])
    for i in layer:
        p, m, v = batch.params[i], batch.exp_avgs[i], batch.exp_avg_sqs[i]
        first, second = _corrections(batch, i)
        by_entry = [v] if group["direction"] == "adam" else []
        step = rate * (second / first if by_entry else 1 / first)
        step = step if scale is None else step / scale
        for p_block, m_block, *v_block in _blocks(p, m, *by_entry):
            if group["weight_decay"]:
                p_block.mul_(1 - lr * group["weight_decay"])
            if v_block:
                size = torch.sqrt(v_block[0], out=_like(scratch, p_block)).add_(group["eps"] * second)
                m_block = torch.div(m_block, size, out=size)
            p_block.addcmul_(m_block, step, value=-1)
        batch.rates[i].copy_(rate)


def _is_flat(batch: Batch, i: int) -> bool:
    """Whether a tensor and its state can be cut into blocks as they lie in memory."""
    tensors = (batch.params[i], batch.grads[i], batch.exp_avgs[i])
    return all(t.is_contiguous() for t in tensors) and batch.grads[i].dtype == batch.params[i].dtype


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same entries of all tensors, a block of them at a time."""
    flat = [t.view(-1) for t in tensors]
    if tensors[0].numel() <= BLOCK:
        yield tuple(flat)
    else:
        yield from zip(*(t.split(BLOCK) for t in flat), strict=True)


def _sum(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


def _like(scratch: dict, block: Tensor) -> Tensor:
    """A block to work in, the same memory each time."""
    if block.dtype not in scratch:
        scratch[block.dtype] = torch.empty(BLOCK, dtype=block.dtype, device=block.device)
    return scratch[block.dtype][:block.numel()]


# --- many tensors at once ---------------------------------------------------------------------------------------------

def multi_tensor(batches: list[Batch], across) -> None:
    """Step the parameters with few calls for each group, as torch's ``foreach`` optimizers do."""
    for part in [batches] if across is not ALONE else [[batch] for batch in batches]:  # one by one, to hold less at a time
        seen, kept = zip(*(_observe_together(batch) for batch in part), strict=True) if part else ((), ())
        steps = [[None] * len(batch.params) for batch in part]
        where = {id(batch): number for number, batch in enumerate(part)}
        for batch, layer, ratio, scale in ratios(part, list(seen), across):
            rate = scalar(batch.group["lr"]) * ratio.clamp(*batch.group["ratio_range"])
            for i in layer:
                batch.rates[i].copy_(rate)
                steps[where[id(batch)]][i] = rate if scale is None else rate / scale
        for batch, step, normalised in zip(part, steps, kept, strict=True):
            _move_together(batch, step, normalised)


def _observe_together(batch: Batch) -> tuple[list[tuple], list[Tensor]]:
    """What ``observe`` does for all tensors of a group, and m / (sqrt(v) + eps), which "adam" moves by."""
    group = batch.group
    beta1, beta2 = group["betas"]
    seen: list = [None] * len(batch.params)
    kept: list = [None] * len(batch.params)
    for chosen in _alike(batch):
        def of(tensors, chosen=chosen):
            return [tensors[i] for i in chosen]
        grads, m = of(batch.grads), of(batch.exp_avgs)
        grads = torch._foreach_neg(grads) if group["maximize"] else grads
        torch._foreach_add_(of(batch.steps), 1)
        torch._foreach_lerp_(m, grads, 1 - beta1)
        precise = exact(m[0]).dtype
        firsts, seconds = zip(*(_corrections(batch, i) for i in chosen), strict=True)
        if group["direction"] == "layernorm":
            sizes, squares = torch._foreach_norm(m, 1, dtype=precise), torch._foreach_norm(grads, 2, dtype=precise)
            for i, size, first, square in zip(chosen, sizes, firsts, squares, strict=True):
                seen[i] = size / first, square.square()
            continue
        v = of(batch.exp_avg_sqs)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
        normalised = torch._foreach_sqrt(v)
        torch._foreach_div_(normalised, seconds)
        torch._foreach_add_(normalised, group["eps"])
        torch._foreach_reciprocal_(normalised)
        torch._foreach_mul_(normalised, m)
        sizes = torch._foreach_norm(normalised, 1, dtype=precise)
        for i, size, first, each in zip(chosen, sizes, firsts, normalised, strict=True):
            seen[i], kept[i] = (size / first, None), each if group["direction"] == "adam" else None
    return seen, kept


def _move_together(batch: Batch, steps: list[Tensor], normalised: list[Tensor]) -> None:
    """What ``move`` does for all tensors of a group."""
    for chosen in _alike(batch):
        p = [batch.params[i] for i in chosen]
        sizes = [(steps[i] / _corrections(batch, i)[0]).to(batch.params[i].dtype) for i in chosen]
        if batch.group["direction"] == "adam":
            d = [normalised[i] for i in chosen]
            torch._foreach_mul_(d, sizes)
        else:
            d = torch._foreach_mul([batch.exp_avgs[i] for i in chosen], sizes)
        if batch.group["weight_decay"]:
            torch._foreach_mul_(p, 1 - scalar(batch.group["lr"]) * batch.group["weight_decay"])
        torch._foreach_sub_(p, d)


def _corrections(batch: Batch, i: int):
    """As numbers where the step is counted on the CPU: reading it there makes no GPU wait."""
    if batch.group["capturable"]:
        return corrections(batch.group, batch.steps[i])
    t, (beta1, beta2) = _get_value(batch.steps[i]), batch.group["betas"]
    return 1 - beta1**t, (1 - beta2**t) ** 0.5


def _alike(batch: Batch) -> list[list[int]]:
    """The places of the tensors, those of one device and type together."""
    found: dict = {}
    for i, p in enumerate(batch.params):
        found.setdefault((p.device, p.dtype, batch.grads[i].dtype), []).append(i)
    return list(found.values())
