"""Unfreezing under DistributedDataParallel with two processes."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from layerlr_helpers import ProgressiveUnfreezing, UnfreezePlan, fit, layer_decay, layer_groups, param_groups
from tests.distributed import in_two_processes

STEPS, BATCH = 9, 8


def small_net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def batches(part=slice(None)):
    """A loader of STEPS batches; ``part`` takes some rows of each batch."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(STEPS, BATCH, 4, generator=generator)[:, part]
    labels = torch.randint(3, (STEPS, BATCH), generator=generator)[:, part]
    return DataLoader(TensorDataset(inputs.flatten(0, 1), labels.flatten()), inputs.shape[1])


def train(model, loader):
    groups = layer_groups(model, torch.zeros(1, 4))
    optimizer = torch.optim.SGD(param_groups(groups, layer_decay(0.1, 0.5)), momentum=0.9)
    unfreezing = ProgressiveUnfreezing(groups, UnfreezePlan.top_down(groups, every=3))
    fit(model, optimizer, loader, steps=STEPS, unfreezing=unfreezing, progress=False)


def train_ddp(rank):
    net = small_net()
    train(DistributedDataParallel(net, find_unused_parameters=True), batches(slice(rank, None, 2)))
    return net.state_dict()


def train_ddp_frozen_too_early(rank):
    net = small_net()
    groups = layer_groups(net)
    ProgressiveUnfreezing(groups, UnfreezePlan.top_down(groups, every=3)).apply(0)
    try:
        train(DistributedDataParallel(net, find_unused_parameters=True), batches(slice(rank, None, 2)))
    except ValueError as error:
        return str(error)


def train_ddp_without_unused(rank):
    try:
        train(DistributedDataParallel(small_net()), batches(slice(rank, None, 2)))
    except ValueError as error:
        return str(error)


def test_a_layer_unfrozen_mid_run_has_the_same_weights_on_both_processes_and_in_one_process():
    first, second = in_two_processes(train_ddp)
    alone = small_net()
    train(alone, batches())
    for name, value in alone.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value)


@pytest.mark.parametrize(("work", "word"), [(train_ddp_frozen_too_early, "before it is frozen"),
                                            (train_ddp_without_unused, "find_unused_parameters=True")])
def test_a_wrapper_that_would_let_the_processes_drift_apart_is_refused(work, word):
    assert all(word in message for message in in_two_processes(work))
