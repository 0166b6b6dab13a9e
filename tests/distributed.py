"""Running a function in two processes that are connected by gloo, for the tests of distributed training."""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_two_processes(work, *args) -> list:
    """``[work(0, *args), work(1, *args)]``, each in a process of its own within one process group."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_entry, (work, folder, args), nprocs=2, start_method="spawn")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _entry(rank: int, work, folder: str, args) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        torch.save(work(rank, *args), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
