from contextlib import contextmanager
from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from layerlr_helpers import fit
from layerlr_helpers.finetune.distributed import (
    DistributedBatchSampler,
    distributed_context,
    distributed_cross_entropy,
    synchronise_checkpoints,
)

SIZES = {"images": st.integers(1, 60), "batch_size": st.integers(1, 25), "world_size": st.integers(1, 4)}


def seeded():
    return torch.Generator().manual_seed(0)


@given(**SIZES)
def test_the_parts_of_a_batch_make_up_the_batch_that_one_process_would_see(images, batch_size, world_size):
    whole = DistributedBatchSampler(images, batch_size, seeded())
    samplers = [DistributedBatchSampler(images, batch_size, seeded(), rank=rank, world_size=world_size)
                for rank in range(world_size)]
    for _ in range(2):  # epochs
        for batch, *parts in zip(whole, *samplers, strict=True):
            assert sorted(batch) == sorted(chain(*parts))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
            assert min(map(len, parts)) >= samplers[0].smallest_part


@given(images=SIZES["images"], batch_size=SIZES["batch_size"])
def test_an_epoch_has_every_image_once_in_batches_of_nearly_equal_size(images, batch_size):
    batches = DistributedBatchSampler(images, batch_size, seeded())
    first, second = list(batches), list(batches)
    assert sorted(chain(*first)) == list(range(images))
    assert len(first) == len(batches) == -(-images // batch_size)
    sizes = [len(batch) for batch in first]
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    assert batches.smallest_part == min(sizes)
    assert images < 10 or first != second  # another order


@pytest.mark.parametrize("sizes", [(3, 2), (1, 5), (4, 4)])
def test_the_gradients_average_over_processes_is_the_gradient_of_the_mean_over_the_batch(monkeypatch, sizes):
    logits, labels = torch.randn(sum(sizes), 4, generator=seeded()), torch.arange(sum(sizes)) % 4
    parts = [(x.requires_grad_(), y) for x, y in zip(logits.split(sizes), labels.split(sizes), strict=True)]
    totals = torch.tensor([float(F.cross_entropy(logits, labels, reduction="sum")), float(sum(sizes))])
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: total.copy_(totals))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    losses = [distributed_cross_entropy(x, y) for x, y in parts]
    whole = logits.clone().requires_grad_()
    mean = F.cross_entropy(whole, labels)
    mean.backward()
    for loss in losses:
        torch.testing.assert_close(loss, mean)  # every process records the whole batch's loss
        loss.backward()
    torch.testing.assert_close(torch.cat([x.grad for x, _ in parts]) / 2, whole.grad)


def checkpoint_of(path, epochs):
    model = torch.nn.Linear(2, 2)
    fit(model, torch.optim.SGD(model.parameters(), lr=0.1), [(torch.ones(1, 2), torch.tensor([0]))], epochs=epochs,
        checkpoint=path, progress=False)


def step_of(path):
    return torch.load(path, weights_only=True)["state"]["step"]


@pytest.mark.parametrize("epochs", [(2, 1), (1, 2), (1, None), (None, 1), (2, 2), (None, None)])
def test_checkpoints_that_a_kill_left_at_different_steps_are_brought_to_the_later_one(tmp_path, epochs):
    paths = [tmp_path / f"{rank}.pt" for rank in range(2)]
    for path, number in zip(paths, epochs, strict=True):
        if number is not None:
            checkpoint_of(path, number)
    before = {path: path.read_bytes() for path in paths if path.exists()}
    synchronise_checkpoints(paths)
    latest = max((number or 0) for number in epochs)
    for path, number in zip(paths, epochs, strict=True):
        assert step_of(path) == latest if latest else not path.exists()
        assert number != latest or path.read_bytes() == before[path]  # a process that is as far keeps its random numbers
    assert {entry.suffix for entry in tmp_path.iterdir()} <= {".pt"}


@pytest.mark.parametrize("content", [b"", b"PK", None])
def test_a_damaged_checkpoint_is_named_and_nothing_is_changed(tmp_path, content):
    paths = [tmp_path / f"{rank}.pt" for rank in range(3)]  # the last one is missing
    for path in paths[:2]:
        checkpoint_of(path, 2)
    whole = paths[1].read_bytes()
    paths[1].write_bytes(whole[:len(whole) // 2] if content is None else content)
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"cannot read .*1\.pt .*; move it away to start anew"):
        synchronise_checkpoints(paths)
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before
    paths[1].unlink()
    synchronise_checkpoints(paths)
    assert [step_of(path) for path in paths] == [2, 2, 2]


def test_without_torchrun_a_process_is_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    model = torch.nn.Linear(2, 2)
    with distributed_context("cpu") as context:
        assert (context.rank, context.world_size, context.device) == (0, 1, torch.device("cpu"))
        context.barrier()  # waits for nobody
        assert context.wrap(model, find_unused_parameters=True) is model


def test_inside_the_context_the_current_gpu_is_that_of_the_process(monkeypatch):
    current = []

    @contextmanager
    def chosen(device):
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device", chosen)
    monkeypatch.setenv("LOCAL_RANK", "1")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with distributed_context("cuda") as context:
        assert current == [context.device] == [torch.device("cuda", 1)]
    assert current == []
    with distributed_context("cpu"):
        assert current == []


def test_more_processes_than_gpus_are_refused_before_they_connect(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"each of the 2 process.* which has 1; start fewer"), distributed_context("cuda"):
        pass
    assert not torch.distributed.is_initialized()
