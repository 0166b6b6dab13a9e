"""LayerAdaptiveLR on two processes: the weights of one process, whatever wrapper spreads the layers."""

import copy
import itertools
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from layerlr_helpers import LayerAdaptiveLR
from layerlr_helpers.optim import DIRECTIONS, POOLS
from layerlr_helpers.optim.processes import Reduction, local_shard, process_groups_of
from tests.distributed import in_two_processes

STEPS, WIDTHS = 6, {"even": (4, 8, 6, 2), "uneven": (4, 7, 5, 3)}  # uneven: no dimension can be halved
RULES = list(itertools.product(DIRECTIONS, POOLS))
WRAPPERS = ("ddp", "zero", "fsdp", "hsdp")
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def network(width):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        a, b, c, d = WIDTHS[width]
        return nn.Sequential(nn.Linear(a, b), nn.Tanh(), nn.Linear(b, c), nn.Tanh(), nn.Linear(c, d))


def groups_of(model):
    """Two groups of several tensors each."""
    first, *rest = (layer for layer in getattr(model, "module", model) if isinstance(layer, nn.Linear))
    return [{"params": list(first.parameters()), "name": "first"},
            {"params": [p for layer in rest for p in layer.parameters()], "name": "rest", "weight_decay": 0.1}]


def batches(images=slice(None)):
    x = torch.randn(STEPS, 8, 4, generator=torch.Generator().manual_seed(1))
    return [batch[images] for batch in x]


def train(model, optimizer, data):
    for x in data:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def optimizer_of(model, direction, pool, **options):
    return LayerAdaptiveLR(groups_of(model), lr=0.1, direction=direction, pool=pool, **options)


def wrapped(wrapper, width, direction, pool, **options):
    model = network(width)
    if wrapper in ("fsdp", "hsdp"):
        shape, names = ((2,), ("shard",)) if wrapper == "fsdp" else ((2, 1), ("replicate", "shard"))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for layer in (*(layer for layer in model if isinstance(layer, nn.Linear)), model):
            fully_shard(layer, mesh=mesh)
        return model, optimizer_of(model, direction, pool, **options)
    model = DistributedDataParallel(model)
    if wrapper == "ddp":
        return model, optimizer_of(model, direction, pool, **options)
    return model, ZeroRedundancyOptimizer(groups_of(model), LayerAdaptiveLR, lr=0.1, direction=direction, pool=pool, **options)


def weights_of(model):
    return {name.removeprefix("module."): value for name, value in get_model_state_dict(model, options=FULL).items()}


def all_wrappers(rank):
    """The weights after six steps, of every wrapper, width, rule and implementation, and the size of each all-reduce."""
    results = {}
    for wrapper, width, rule, foreach in itertools.product(WRAPPERS, WIDTHS, RULES, (None, False, True)):
        model, optimizer = wrapped(wrapper, width, *rule, foreach=foreach)
        with recorded_all_reduces(getattr(optimizer, "optim", optimizer)) as sizes:  # ours is inside of ZeRO's
            train(model, optimizer, batches(slice(rank, None, 2)))
        results[wrapper, width, *rule, foreach] = weights_of(model), sizes
    return results


@contextmanager
def recorded_all_reduces(optimizer):
    """The size of each all-reduce that the optimizer itself makes."""
    sizes, stepping, all_reduce = [], [], distributed.all_reduce

    def recorded(tensor, *args, **kwargs):
        sizes.extend([tensor.numel()] * len(stepping))
        return all_reduce(tensor, *args, **kwargs)

    optimizer.register_step_pre_hook(lambda *args: stepping.append(1))
    optimizer.register_step_post_hook(lambda *args: stepping.clear())
    distributed.all_reduce = recorded
    try:
        yield sizes
    finally:
        distributed.all_reduce = all_reduce


def resumed(rank):
    """Weights after three steps, saving, loading into a new model and three more; after six at a stretch; the full state."""
    data = batches(slice(rank, None, 2))
    model, optimizer = wrapped("fsdp", "uneven", "adam_mini", "group")
    train(model, optimizer, data[:3])
    saved = copy.deepcopy((get_model_state_dict(model), get_optimizer_state_dict(model, optimizer)))  # they are no copies
    full = copy.deepcopy((get_model_state_dict(model, options=FULL), get_optimizer_state_dict(model, optimizer, options=FULL)))
    new_model, new_optimizer = wrapped("fsdp", "uneven", "adam_mini", "group")
    set_model_state_dict(new_model, saved[0])
    set_optimizer_state_dict(new_model, new_optimizer, saved[1])
    train(new_model, new_optimizer, data[3:])
    train(model, optimizer, data[3:])
    return weights_of(new_model), weights_of(model), full


def all_wrappers_and_resumed(rank):
    return all_wrappers(rank), resumed(rank)


@pytest.fixture(scope="module")
def two_processes():
    """What ``all_wrappers`` and ``resumed`` return in each of two processes."""
    return in_two_processes(all_wrappers_and_resumed)


@cache
def weights_of_one_process(width, direction, pool):
    model = network(width)
    train(model, optimizer_of(model, direction, pool, foreach=False), batches())
    return model.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("direction", "pool"), RULES)
def test_the_weights_are_those_of_one_process(two_processes, wrapper, width, direction, pool):
    for foreach in (None, False, True):
        first, second = (results[wrapper, width, direction, pool, foreach][0] for results, _ in two_processes)
        for name, value in weights_of_one_process(width, direction, pool).items():
            if second:  # fully sharded weights are gathered on the first process only
                assert torch.equal(first[name], second[name]), name
            torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_there_is_at_most_one_small_all_reduce_in_a_step(two_processes, rule):
    for wrapper, width, foreach in itertools.product(WRAPPERS, WIDTHS, (None, False, True)):
        _, sizes = two_processes[0][0][wrapper, width, *rule, foreach]
        needed = wrapper in ("fsdp", "hsdp") or (wrapper == "zero" and rule[1] == "group")
        assert len(sizes) == needed * STEPS
        assert max(sizes, default=0) <= 12  # one or two numbers a tensor, or three a group


@pytest.mark.slow
def test_a_sharded_state_goes_on_in_other_objects_and_on_a_single_process(two_processes):
    resumed_weights, uninterrupted, (model_state, optimizer_state) = two_processes[0][1]
    for name, value in uninterrupted.items():
        assert torch.equal(resumed_weights[name], value), name
    model = network("uneven")
    optimizer = optimizer_of(model, "adam_mini", "group")
    set_model_state_dict(model, model_state)
    set_optimizer_state_dict(model, optimizer, optimizer_state)
    train(model, optimizer, batches()[3:])
    for name, value in uninterrupted.items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-6)


# --- without other processes ------------------------------------------------------------------------------------------

def test_one_all_reduce_completes_the_sums_of_the_sharded_tensors_and_leaves_the_others(monkeypatch):
    reduced = []

    def all_reduce(values, group):  # as if another process had the same
        reduced.append((group, values.numel()))
        values.mul_(2)

    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    batches = [SimpleNamespace(process_groups=[("shards",), ()]), SimpleNamespace(process_groups=[("shards",)])]
    one, two, three = torch.tensor([1.0, 2.0, 3.0])
    tensor_sums = [{0: (one, two), 1: (one, two)}, {0: (three, None)}]
    assert Reduction(None).over_shards(batches, tensor_sums) == [{0: (2.0, 4.0), 1: (1.0, 2.0)}, {0: (6.0, None)}]
    assert reduced == [("shards", 3)]


def test_ordinary_tensors_need_no_reduction():
    p = torch.ones(2)
    assert process_groups_of(p) == ()
    assert local_shard(p) is p


def test_the_optimizer_knows_the_zero_redundancy_optimizer_that_makes_it():
    class ZeroRedundancyOptimizer:
        def __init__(self):
            self.optim = LayerAdaptiveLR([nn.Parameter(torch.ones(2))])

    zero = ZeroRedundancyOptimizer()
    assert zero.optim._zero() is zero
    assert LayerAdaptiveLR([nn.Parameter(torch.ones(2))])._zero is None
