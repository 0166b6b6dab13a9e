"""Several processes that train one network as one process would: the same batches, the same gradient.

``torchrun`` starts the processes; torch's DistributedDataParallel averages their gradients. What is here makes that average
the mean over the whole batch, also where the batch cannot be shared evenly, and keeps the processes' checkpoints in step.
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
class Team:
    """The processes that train together, seen from process number ``rank`` of ``size``, which computes on ``device``."""

    rank: int
    size: int
    device: torch.device

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def wrapped(self, model: nn.Module, *, unused: bool) -> nn.Module:
        """The model, within DistributedDataParallel if there are several processes; ``unused`` if some layers may be frozen."""
        if self.size == 1:
            return model
        gpus = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=gpus, find_unused_parameters=unused)


@contextmanager
def team(device: str) -> Iterator[Team]:
    """The team that torchrun describes in the environment, connected inside: by gloo on ``"cpu"``, by nccl on ``"cuda"``.

    A process group that is there already is used, and left as it is. Without either, it is a team of one.

    Raises:
        ValueError: fewer GPUs on this machine than processes that want one.
    """
    there = dist.is_initialized()
    rank, size = (dist.get_rank(), dist.get_world_size()) if there else (_number("RANK", 0), _number("WORLD_SIZE", 1))
    here = torch.device("cpu")
    if device == "cuda":
        gpus, wanted = torch.cuda.device_count(), _number("LOCAL_WORLD_SIZE", 1)
        if gpus < wanted:
            raise ValueError(f"cuda takes a GPU for each of the {wanted} process(es) on this machine, which has {gpus}; start "
                             "fewer processes, or use the device cpu")
        here = torch.device("cuda", _number("LOCAL_RANK", 0))
    if size > 1 and not there:
        dist.init_process_group("nccl" if device == "cuda" else "gloo", device_id=here if device == "cuda" else None)
    try:
        # What names no device (a seed, a barrier) is then about this process's GPU too.
        with torch.cuda.device(here) if device == "cuda" else nullcontext():
            yield Team(rank, size, here)
    finally:
        if size > 1 and not there:
            dist.destroy_process_group()


class SharedBatches(Sampler):
    """Each epoch's images in random order, in batches of nearly equal size, and of each batch one process's part.

    A last batch of two images would make a poor step, and leave a third process without any. So the images are spread over as
    many batches as are needed: 101 images in batches of at most 20 are five of 17 and one of 16. All processes need a
    ``generator`` in the same state.
    """

    def __init__(self, images: int, batch_size: int, generator: torch.Generator, *, rank: int = 0, processes: int = 1):
        self.images, self.generator, self.rank, self.processes = images, generator, rank, processes
        self.batches = -(-images // batch_size)

    @property
    def smallest(self) -> int:
        """The number of images of the smallest part."""
        return self.images // self.batches // self.processes

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in torch.randperm(self.images, generator=self.generator).tensor_split(self.batches):
            yield batch[self.rank::self.processes].tolist()


def shared_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy over the images of all processes; the gradient is this process's part of the mean's.

    DistributedDataParallel averages the processes' gradients as if all had as many images. Where one has 9 and the other 8,
    each of the 8 would count for more; so here every process counts by its number of images.
    """
    own = F.cross_entropy(logits, labels, reduction="sum")
    total = torch.stack([own.detach(), own.new_tensor(len(labels))])
    dist.all_reduce(total)
    share = own * (dist.get_world_size() / total[1])
    return share + (total[0] / total[1] - share.detach())


def level(paths: Sequence[Path]) -> None:
    """Bring the processes' checkpoints of ``fit`` to one step, if a kill came when some were written and others not yet.

    Those behind become copies of the first of the furthest. All hold the same weights, which the processes keep equal; only
    random numbers in the network (dropout) are then those of the process that was copied.

    Raises:
        CheckpointError: one of them is damaged, or no checkpoint of ``fit``.
    """
    steps = [checkpoints.step(path) if path.exists() else -1 for path in paths]
    furthest = paths[steps.index(max(steps))]
    for path, step in zip(paths, steps, strict=True):
        if step < max(steps):
            write_whole(path, lambda temporary: temporary.write_bytes(furthest.read_bytes()))


def _number(variable: str, otherwise: int) -> int:
    return int(os.environ.get(variable, otherwise))
