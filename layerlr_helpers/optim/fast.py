"""Faster ways to the numbers of ``rule``: block by block in the cache (CPU), and many tensors at once (GPU)."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.optim.optimizer import _get_value

from layerlr_helpers.optim.processes import ALONE
from layerlr_helpers.optim.rule import Batch, corrections, exact, move, observe, ratios, scalar, weight

BLOCK = 2**17  # entries: a block to work in has 512 KiB in single precision and stays in the cache
SMALL = 2**13  # entries: for smaller tensors the calls cost more than the numbers, so they go many to a call

# --- block by block ---------------------------------------------------------------------------------------------------
# A step has to go over the weights twice, since a layer's ratio is known only after all of its entries have been seen.
# torch's fused kernel does the first round in one sweep: run with rate 1 on a block of zeros in place of the weights, it
# updates both moments and leaves m / (sqrt(v) + eps) behind, whose absolute sum is taken while it is still in the cache.
# A decay of 1 makes the next block start from zeros again, without a sweep of its own: a finite x less 1 · x is 0. Only what
# is not finite stays, and then the tensor's sum is not finite anyway; so each tensor starts with true zeros.


def fused(batches: list[Batch], across, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
    """Step the parameters; ``grad_scale`` divides the gradients first, with ``found_inf`` nothing at all changes."""
    if found_inf is not None and found_inf.item():
        return
    for batch in batches if grad_scale is not None else ():
        torch._foreach_div_(batch.grads, grad_scale)
    scratch: dict = {}
    small = [[i for i, p in enumerate(batch.params) if p.numel() <= SMALL and _is_flat(batch, i)] for batch in batches]
    large = [[i for i in range(len(batch.params)) if i not in few] for batch, few in zip(batches, map(set, small), strict=True)]
    observed = [(_observe_small if batch.group["direction"] == "momentum" else _observe_together)(batch, few)
                for batch, few in zip(batches, small, strict=True)]
    for batch, places, (seen, _) in zip(batches, large, observed, strict=True):
        for i in places:
            seen[i] = _observe_blocks(batch, i, scratch)
    found = _rates(batches, [seen for seen, _ in observed], across)
    for batch, few, many, (_, normalised), (rates, scales) in zip(batches, small, large, observed, found, strict=True):
        _move_together(batch, few, rates, scales, normalised)
        for i in many:
            _move_blocks(batch, i, rates[i], scales[i], scratch)


def _observe_blocks(batch: Batch, i: int, scratch: dict) -> tuple[Tensor, Tensor | None]:
    """What ``observe`` does, block by block."""
    g, m, v = batch.grads[i], batch.exp_avgs[i], batch.exp_avg_sqs[i]
    if not _is_flat(batch, i):
        return observe(batch, i)
    group, sizes, squares = batch.group, [], []
    beta1, beta2 = group["betas"]
    batch.steps[i] += 1
    if group["direction"] == "adam_mini":
        for g_block, m_block in _blocks(g, m):
            m_block.mul_(beta1).add_(g_block, alpha=beta1 - 1 if group["maximize"] else 1 - beta1)
            sizes.append(torch.abs(m_block, out=_like(scratch, m_block)).sum())
            squares.append(torch.dot(g_block, g_block))
        return _sum(sizes) / _corrections(batch, i)[0], _sum(squares)
    for g_block, m_block, v_block in _blocks(g, m, v):
        normalised = _like(scratch, g_block)
        if not sizes or not group["eps"]:  # without eps a zero of v makes a ratio infinite, which ratio_range can still mend
            normalised.zero_()
        torch._fused_adamw_([normalised], [g_block], [m_block], [v_block], [], [batch.steps[i]], lr=1.0, beta1=beta1,
                            beta2=beta2, weight_decay=1.0, eps=group["eps"], amsgrad=False, maximize=group["maximize"])
        sizes.append(normalised.abs_().sum())  # several times faster than a norm of order 1
    return _sum(sizes), None


def _observe_small(batch: Batch, places: Sequence[int]) -> tuple[list[tuple], list[None]]:
    """The same for small tensors of "momentum", with one call of the kernel for all of them."""
    group, nothing = batch.group, [None] * len(batch.params)
    seen: list = list(nothing)
    for chosen in _alike(batch, places):
        tensors = [[of[i] for i in chosen] for of in (batch.grads, batch.exp_avgs, batch.exp_avg_sqs)]
        steps = [batch.steps[i] for i in chosen]
        torch._foreach_add_(steps, torch.ones((), device=steps[0].device))
        zeros = tensors[0][0].new_zeros(sum(g.numel() for g in tensors[0]))
        normalised = [part.view_as(g) for part, g in zip(zeros.split([g.numel() for g in tensors[0]]), tensors[0], strict=True)]
        torch._fused_adam_(normalised, *tensors, [], steps, lr=1.0, beta1=group["betas"][0], beta2=group["betas"][1],
                           weight_decay=0.0, eps=group["eps"], amsgrad=False, maximize=group["maximize"])
        for i, size in zip(chosen, torch._foreach_norm(normalised, 1), strict=True):
            seen[i] = size, None
    return seen, nothing


def _move_blocks(batch: Batch, i: int, rate: Tensor, scale: Tensor | None, scratch: dict) -> None:
    """What ``move`` does with one tensor, block by block."""
    if not _is_flat(batch, i):
        move(batch, [i], rate, scale)
        return
    group, (first, second) = batch.group, _corrections(batch, i)
    shrink = 1 - scalar(group["lr"]) * group["weight_decay"] if group["weight_decay"] else None
    if group["direction"] != "adam":
        step = rate / first if scale is None else rate / (first * scale)
        if shrink is None:  # a single sweep, which blocks would only interrupt
            batch.params[i].addcmul_(batch.exp_avgs[i], step, value=-1)
            return
        for p, m in _blocks(batch.params[i], batch.exp_avgs[i]):
            p.mul_(shrink).addcmul_(m, step, value=-1)
        return
    step = rate * (second / first)
    for p, m, v in _blocks(batch.params[i], batch.exp_avgs[i], batch.exp_avg_sqs[i]):
        size = torch.sqrt(v, out=_like(scratch, v)).add_(group["eps"] * second)
        (p if shrink is None else p.mul_(shrink)).addcmul_(torch.div(m, size, out=size), step, value=-1)


def _is_flat(batch: Batch, i: int) -> bool:
    """Whether a tensor and its state can be cut into blocks as they lie in memory, and need no second precision."""
    p, g = batch.params[i], batch.grads[i]
    return (p.is_contiguous() and g.is_contiguous() and batch.exp_avgs[i].is_contiguous() and p.dtype == g.dtype
            and p.dtype.itemsize > 2 and not isinstance(batch.group["betas"][0], Tensor))


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same entries of all tensors, a block of them at a time."""
    flat = [t.view(-1) for t in tensors]
    return iter([flat]) if flat[0].numel() <= BLOCK else zip(*(t.split(BLOCK) for t in flat), strict=True)


def _like(scratch: dict, block: Tensor) -> Tensor:
    """A block to work in, the same memory each time."""
    kept = scratch.get(block.dtype)
    if kept is None:
        kept = scratch[block.dtype] = torch.empty(BLOCK, dtype=block.dtype, device=block.device)
    return kept[:block.numel()]


def _sum(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


# --- the rates of all tensors -----------------------------------------------------------------------------------------

def _rates(batches: list[Batch], seen: list[list[tuple]], across) -> Iterator[tuple[list[Tensor], list[Tensor | None]]]:
    """For each batch the rate of every tensor, which is also noted, and its scale, in a few calls for all of them."""
    if across is ALONE:
        found = [_ratios_together(batch, sums) for batch, sums in zip(batches, seen, strict=True)]
    else:
        found = [([None] * len(batch.params), [None] * len(batch.params)) for batch in batches]
        place = {id(batch): each for batch, each in zip(batches, found, strict=True)}
        for batch, layer, ratio, scale in ratios(batches, seen, across):
            for i in layer:
                place[id(batch)][0][i], place[id(batch)][1][i] = ratio, scale
    for batch, (each, scales) in zip(batches, found, strict=True):
        yield _noted(batch, each), scales


def _noted(batch: Batch, each: list[Tensor]) -> list[Tensor]:
    if not each:
        return []
    device = each[0].device
    rates = scalar(batch.group["lr"]) * torch.stack([ratio.to(device) for ratio in each]).clamp(*batch.group["ratio_range"])
    rates = list(rates.unbind())
    torch._foreach_copy_(batch.rates, rates)
    return rates


def _ratios_together(batch: Batch, seen: list[tuple]) -> tuple[list[Tensor], list[Tensor | None]]:
    """What ``ratios`` gives for one group that is whole in this process: a ratio and a scale for each tensor."""
    n = len(batch.params)
    if not n:
        return [], []
    size = torch.stack([size for size, _ in seen])
    entries = torch.tensor(batch.entries, dtype=size.dtype, device=size.device)
    together = batch.group["pool"] == "group"
    square = None
    if batch.group["direction"] == "adam_mini":
        v = batch.exp_avg_sqs
        means = (torch.stack([square for _, square in seen]) / entries).unbind()
        for running, mean in zip(v, means, strict=True):
            running.lerp_(mean.to(running.dtype), weight(batch.group, 1, running))
        seconds = [_corrections(batch, i)[1] for i in range(n)]
        square = torch.stack([running / second**2 for running, second in zip(v, seconds, strict=True)]) * entries
    if together:
        size, entries, square = size.sum(), entries.sum(), square.sum() if square is not None else None
    ratio = size / entries
    if square is None:
        return list(ratio.expand(n).unbind()), [None] * n
    scale = (square / entries).sqrt() + batch.group["eps"]
    return list((ratio / scale).expand(n).unbind()), list(scale.expand(n).unbind())


# --- many tensors at once ---------------------------------------------------------------------------------------------

def multi_tensor(batches: list[Batch], across) -> None:
    """Step the parameters with few calls for each group, as torch's ``foreach`` optimizers do."""
    for part in [batches] if across is not ALONE else [[batch] for batch in batches]:  # one by one, to hold less at a time
        observed = [_observe_together(batch, range(len(batch.params))) for batch in part]
        found = _rates(part, [seen for seen, _ in observed], across)
        for batch, (_, normalised), (rates, scales) in zip(part, observed, found, strict=True):
            _move_together(batch, range(len(batch.params)), rates, scales, normalised)


def _observe_together(batch: Batch, places: Sequence[int]) -> tuple[list[tuple], list[Tensor]]:
    """What ``observe`` does, for the tensors at ``places``, and m / (sqrt(v) + eps), which "adam" moves by."""
    group = batch.group
    beta1, beta2 = group["betas"]
    seen: list = [None] * len(batch.params)
    kept: list = [None] * len(batch.params)
    for chosen in _alike(batch, places):
        def of(tensors, chosen=chosen):
            return [tensors[i] for i in chosen]
        grads, m = of(batch.grads), of(batch.exp_avgs)
        grads = torch._foreach_neg(grads) if group["maximize"] else grads
        one = torch.ones((), device=batch.steps[chosen[0]].device)  # a plain number would be made a tensor for each step
        torch._foreach_add_(of(batch.steps), one)
        torch._foreach_lerp_(m, grads, 1 - beta1)
        precise = exact(m[0]).dtype
        firsts, seconds = zip(*(_corrections(batch, i) for i in chosen), strict=True)
        if group["direction"] == "adam_mini":
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


def _move_together(batch: Batch, places: Sequence[int], rates: list[Tensor], scales: list[Tensor | None],
                   normalised: list[Tensor]) -> None:
    """What ``move`` does, for the tensors at ``places``."""
    for chosen in _alike(batch, places):
        p = [batch.params[i] for i in chosen]
        steps = [rates[i] / _corrections(batch, i)[0] for i in chosen]
        steps = [(step if scales[i] is None else step / scales[i]).to(p[0]) for step, i in zip(steps, chosen, strict=True)]
        if batch.group["direction"] == "adam":
            d = [normalised[i] for i in chosen]
            torch._foreach_mul_(d, steps)
        else:
            d = torch._foreach_mul([batch.exp_avgs[i] for i in chosen], steps)
        if batch.group["weight_decay"]:
            torch._foreach_mul_(p, 1 - scalar(batch.group["lr"]) * batch.group["weight_decay"])
        torch._foreach_sub_(p, d)


def _corrections(batch: Batch, i: int):
    """As numbers where the step is counted on the CPU: reading it there makes no GPU wait."""
    if batch.group["capturable"]:
        return corrections(batch.group, batch.steps[i])
    t, (beta1, beta2) = _get_value(batch.steps[i]), batch.group["betas"]
    return 1 - beta1**t, (1 - beta2**t) ** 0.5


def _alike(batch: Batch, places: Sequence[int]) -> list[list[int]]:
    """The places, those of tensors of one device and type together."""
    found: dict = {}
    for i in places:
        found.setdefault((batch.params[i].device, batch.params[i].dtype, batch.grads[i].dtype), []).append(i)
    return list(found.values())
