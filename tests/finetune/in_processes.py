"""What the tests of the command let other processes do: ``python -m tests.finetune.in_processes killed …``."""

import os
import signal
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from layerlr_helpers import checkpoints
from layerlr_helpers.finetune import job


def in_double_precision(prepared_model):
    """``prepared_model`` for networks that compute in double precision."""
    def prepared(*args, **kwargs):
        model = prepared_model(*args, **kwargs).double()
        model.register_forward_pre_hook(lambda model, inputs: tuple(images.double() for images in inputs))
        return model

    return prepared


def killed(threads: str, *arguments: str) -> None:
    """Run the command and be killed at the worst moment: the checkpoint of a second epoch is written and not in its place."""
    torch.set_num_threads(int(threads))
    replace = os.replace

    def replace_or_be_killed(temporary, path):
        if Path(path).name == "checkpoint-0.pt" and Path(path).exists() and checkpoints.step(path) > 0:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(temporary, path)

    os.replace = replace_or_be_killed
    job.main(arguments)


def whole_and_interrupted(whole: str, interrupted: str, *arguments: str) -> None:
    """One of two processes of torchrun: a whole run, and one that is interrupted when one of two checkpoints is written."""
    warnings.simplefilter("error")
    job.prepared_model = in_double_precision(job.prepared_model)
    job.main([*arguments, "--output", whole])  # connects as torchrun says
    dist.init_process_group("gloo", init_method=f"file://{interrupted}.store", rank=int(os.environ["RANK"]), world_size=2)
    save, saved = checkpoints.save, []

    def save_or_be_interrupted(path, parts, rows, *args):
        after_the_first_epoch = bool(rows) and not saved
        saved.extend([path] if rows else [])
        if after_the_first_epoch and path.name == "checkpoint-1.pt":
            raise KeyboardInterrupt
        save(path, parts, rows, *args)
        if after_the_first_epoch:
            raise KeyboardInterrupt

    checkpoints.save = save_or_be_interrupted
    try:
        job.main([*arguments, "--output", interrupted])
    except KeyboardInterrupt:
        job.main([*arguments, "--output", interrupted])
    dist.destroy_process_group()  # main leaves a group that it did not make


if __name__ == "__main__":
    {"killed": killed, "whole_and_interrupted": whole_and_interrupted}[sys.argv[1]](*sys.argv[2:])
