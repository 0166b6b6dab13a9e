"""Unfreezing under DistributedDataParallel with two processes."""

import pytest
import torch
import torch.distributed as dist
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


def train_in_parallel(rank):
    net = small_net()
    train(DistributedDataParallel(net, find_unused_parameters=True), batches(slice(rank, None, 2)))
    return net.state_dict()


@pytest.mark.slow
def test_a_layer_unfrozen_mid_run_has_the_same_weights_on_both_processes_and_in_one_process():
    first, second = in_two_processes(train_in_parallel)
    alone = small_net()
    train(alone, batches())
    for name, value in alone.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value)


@pytest.fixture
def process_group(tmp_path):
    """A group of this process alone, which is enough to see what is refused before training."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_model_that_was_frozen_before_it_was_wrapped_is_refused(process_group):
    net = small_net()
    groups = layer_groups(net)
    ProgressiveUnfreezing(groups, UnfreezePlan.top_down(groups, every=3)).apply(0)
    with pytest.raises(ValueError, match=r"made before the model is frozen.*averages 2 of the model's 6 parameters"):
        train(DistributedDataParallel(net, find_unused_parameters=True), batches())


def test_a_wrapper_that_waits_for_the_gradients_of_frozen_parameters_is_refused(process_group):
    with pytest.raises(ValueError, match="find_unused_parameters=True"):
        train(DistributedDataParallel(small_net()), batches())
