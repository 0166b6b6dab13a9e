"""Ratios of layers that are spread over several processes: one small sum over the processes in each step.

FSDP2 (``fully_shard``) and tensor parallelism give each process a part of each tensor. ``ZeroRedundancyOptimizer`` gives
each process some of the tensors. In both cases a process sees only a part of the sums behind a layer's ratio.
"""

import sys

import torch
from torch import Tensor, distributed


class _Alone:
    """Every layer is whole in this process: nothing to add up."""

    def tensors(self, batches, seen):
        return seen

    def layers(self, batches, summed):
        return summed


ALONE = _Alone()


class _Parts:
    """Adds up the sums of tensors that are sharded, and of layers whose tensors are dealt out to the processes."""

    def __init__(self, zero=None):
        self.zero = zero

    def tensors(self, batches, seen):
        """One all-reduce for each set of process groups that tensors are sharded over: usually one in all."""
        seen = [dict(sums) if isinstance(sums, dict) else dict(enumerate(sums)) for sums in seen]
        spread: dict = {}
        for number, batch in enumerate(batches):
            for i in seen[number]:
                if batch.spread[i]:
                    spread.setdefault(batch.spread[i], []).append((number, i))
        for groups, places in spread.items():
            sums = torch.stack([value for number, i in places for value in seen[number][i] if value is not None])
            for group in groups:
                distributed.all_reduce(sums, group=group)
            values = iter(sums.unbind())
            for number, i in places:
                seen[number][i] = tuple(None if value is None else next(values) for value in seen[number][i])
        return seen

    def layers(self, batches, summed):
        """Layers of a whole parameter group, in one all-reduce, where each process has some of the group's tensors."""
        if self.zero is None:
            return summed
        shared = [number for number, batch in enumerate(batches) if batch.group["pool"] == "group"]
        if not shared:
            return summed
        rows = [[torch.as_tensor(0 if value is None else value, dtype=torch.float64, device=self.zero._default_device)
                 for value in summed[number][0]] for number in shared]
        sums = torch.stack([torch.stack(row) for row in rows])
        distributed.all_reduce(sums, group=self.zero.process_group)
        for number, (size, square, entries) in zip(shared, sums.unbind(), strict=True):
            has_square = batches[number].group["direction"] == "adam_mini"
            summed[number] = [(size, square if has_square else None, entries)]
        return summed


def across(batches, zero=None):
    """What adds up over processes in this step."""
    return _Parts(zero) if zero is not None or any(spread for batch in batches for spread in batch.spread) else ALONE


def spread_over(p: Tensor) -> tuple:
    """The process groups over which a distributed tensor is sharded; of a replicated or an ordinary tensor none."""
    if not hasattr(p, "placements"):
        return ()
    return tuple(p.device_mesh.get_group(dim) for dim, placement in enumerate(p.placements) if placement.is_shard())


def local(tensor: Tensor) -> Tensor:
    """The part of a distributed tensor that this process holds; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "placements") else tensor


def building_zero():
    """The ``ZeroRedundancyOptimizer`` that is making an optimizer for its part of the parameters, if that is going on.

    It does not introduce itself, but is further up in the calls. Without it a layer's ratio would silently be that of
    the tensors that this process happens to have.
    """
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(owner).__mro__):
            return owner
        frame = frame.f_back
    return None
