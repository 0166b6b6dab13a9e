"""Several processes that train one network as one process would: the same batches, the same gradient.

``torchrun`` starts the processes, and torch's DistributedDataParallel averages their gradients. This module makes that average
the gradient of the mean over the whole batch, also where the batch cannot be divided evenly, and synchronises checkpoints.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Sampler

from layerlr_helpers import checkpoints
from layerlr_helpers.files import write_whole


@dataclass(frozen=True)
class DistributedContext:
    """This process among those that train together: number ``rank`` of ``world_size``, computing on ``device``."""

    rank: int
    world_size: int
    device: torch.device

    def barrier(self) -> None:
        """Wait until all processes have come this far."""
        if self.world_size > 1:
            dist.barrier()

    def wrap(self, model: nn.Module, *, find_unused_parameters: bool) -> nn.Module:
        """Return the model, in DistributedDataParallel if there are several processes."""
        if self.world_size == 1:
            return model
        return DistributedDataParallel(model, device_ids=[self.device.index] if self.device.type == "cuda" else None,
                                       find_unused_parameters=find_unused_parameters)


@contextmanager
def distributed_context(device: str) -> Iterator[DistributedContext]:
    """Connect the processes that torchrun started: by gloo on the device ``"cpu"``, by nccl on ``"cuda"``.

    A process group that exists already is used, and not closed at the end. Without either, this process trains alone.
    Fewer GPUs than processes on this machine are a ValueError.
    """
    connected, on_gpu = dist.is_initialized(), device == "cuda"
    rank = dist.get_rank() if connected else int(os.environ.get("RANK", 0))
    world_size = dist.get_world_size() if connected else int(os.environ.get("WORLD_SIZE", 1))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if on_gpu and (gpus := torch.cuda.device_count()) < processes:
        raise ValueError(f"cuda takes a GPU for each of the {processes} process(es) on this machine, which has {gpus}; start "
                         "fewer processes, or use the device cpu")
    process_device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    must_connect = world_size > 1 and not connected
    if must_connect:
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=process_device if on_gpu else None)
    try:
        # Calls that name no device (seeds, barriers) then use this process's GPU.
        with torch.cuda.device(process_device) if on_gpu else nullcontext():
            yield DistributedContext(rank, world_size, process_device)
    finally:
        if must_connect:
            dist.destroy_process_group()


class DistributedBatchSampler(Sampler):
    """Random batches of nearly equal size, and of each batch the part of one process.

    As few batches as possible share the images evenly: 101 images in batches of at most 20 are five of 17 and one of 16,
    because a last batch of a single image would make a poor step, and leave a second process without any image.
    The ``generator`` must be in the same state in all processes.
    """

    def __init__(self, images: int, batch_size: int, generator: torch.Generator, *, rank: int = 0, world_size: int = 1):
        self.images, self.generator, self.rank, self.world_size = images, generator, rank, world_size
        self.batches = -(-images // batch_size)

    @property
    def smallest_part(self) -> int:
        """The number of images of the smallest part that a process gets."""
        return self.images // self.batches // self.world_size

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in torch.randperm(self.images, generator=self.generator).tensor_split(self.batches):
            yield batch[self.rank::self.world_size].tolist()


def distributed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy over the images of all processes, with the gradient that DistributedDataParallel needs.

    DistributedDataParallel averages the gradients as if every process had the same number of images. So each process's sum is
    divided by the mean number of images a process, and the average is the gradient of the mean over the whole batch.
    """
    local_sum = F.cross_entropy(logits, labels, reduction="sum")
    totals = torch.stack([local_sum.detach(), local_sum.new_tensor(len(labels))])  # sum of the losses, number of images
    dist.all_reduce(totals)
    local_part = local_sum * (dist.get_world_size() / totals[1])
    return local_part + (totals[0] / totals[1] - local_part.detach())  # the whole batch's value, the local part's gradient


def synchronise_checkpoints(paths: Sequence[Path]) -> None:
    """Bring the processes' checkpoints of ``fit`` to one step, if the run was killed between writing one and another.

    Those that are behind become copies of the first of the latest. The weights are the same in all processes; only random
    numbers in the network (dropout) are then those of the process whose checkpoint was copied. A damaged file and one that
    is no checkpoint of ``fit`` are a CheckpointError.
    """
    steps = [checkpoints.step(path) if path.exists() else -1 for path in paths]
    latest = paths[steps.index(max(steps))]
    for path, step in zip(paths, steps, strict=True):
        if step < max(steps):
            write_whole(path, lambda temporary: temporary.write_bytes(latest.read_bytes()))
