"""Layers that several processes share: one small all-reduce in each step completes the sums behind their ratios.

FSDP2 (``fully_shard``) and tensor parallelism give each process a shard of each tensor. ``ZeroRedundancyOptimizer`` gives
each process some of the tensors. In both cases a process computes only a part of the sums.
"""

import sys
from collections.abc import Sequence
from traceback import walk_stack

import torch
from torch import Tensor, distributed

from layerlr_helpers.optim.rule import Batch, TensorSums


class Reduction:
    """Adds up the sums of sharded tensors, and of layers whose tensors ``zero`` has dealt out to the processes."""

    def __init__(self, zero):
        self.zero = zero

    def over_shards(self, batches: Sequence[Batch], tensor_sums: Sequence[dict[int, TensorSums]]) -> list[dict]:
        """Complete the sums of sharded tensors: one all-reduce for each set of process groups, usually one in all."""
        completed = [dict(sums) for sums in tensor_sums]
        sharded: dict[tuple, list[tuple[int, int]]] = {}  # process groups -> numbers of batch and tensor
        for b, batch in enumerate(batches):
            for i, process_groups in enumerate(batch.process_groups):
                if process_groups:
                    sharded.setdefault(process_groups, []).append((b, i))
        for process_groups, tensors in sharded.items():
            values = torch.stack([value for b, i in tensors for value in completed[b][i] if value is not None])
            for process_group in process_groups:
                distributed.all_reduce(values, group=process_group)
            totals = iter(values.unbind())
            for b, i in tensors:
                completed[b][i] = tuple(None if value is None else next(totals) for value in completed[b][i])
        return completed

    def over_tensors(self, batches: Sequence[Batch], layer_sums: list[list[tuple]]) -> list[list[tuple]]:
        """Complete the sums of layers that are whole parameter groups, of whose tensors ``zero`` gave this process some."""
        pooled = [b for b, batch in enumerate(batches) if batch.group["pool"] == "group"]
        if self.zero is None or not pooled:
            return layer_sums
        device = self.zero._default_device
        values = torch.stack([torch.stack([torch.as_tensor(0 if value is None else value, dtype=torch.float64, device=device)
                                           for value in layer_sums[b][0]]) for b in pooled])
        distributed.all_reduce(values, group=self.zero.process_group)
        for b, (size, square, entries) in zip(pooled, values.unbind(), strict=True):
            layer_sums[b] = [(size, square if batches[b].group["direction"] == "adam_mini" else None, entries)]
        return layer_sums


def process_groups_of(p: Tensor) -> tuple:
    """The process groups over which a distributed tensor is sharded; none for a replicated or an ordinary tensor."""
    if not hasattr(p, "placements"):
        return ()
    return tuple(p.device_mesh.get_group(dim) for dim, placement in enumerate(p.placements) if placement.is_shard())


def local_shard(tensor: Tensor) -> Tensor:
    """The shard of a distributed tensor that this process holds; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "placements") else tensor


def calling_zero_optimizer():
    """The ``ZeroRedundancyOptimizer`` that is making an optimizer for its share of the parameters, or None.

    It passes nothing of itself on, so it is looked for among the callers. Without it, the ratio of a layer would silently be
    that of the tensors that this process happens to have.
    """
    for frame, _ in walk_stack(sys._getframe(1)):
        caller = frame.f_locals.get("self")
        if any(base.__name__ == "ZeroRedundancyOptimizer" for base in type(caller).__mro__):
            return caller
    return None
