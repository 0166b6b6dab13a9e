"""LayerAdaptiveLR on two processes: the weights of one process, whatever wrapper spreads the layers."""

import copy
import itertools
from contextlib import contextmanager
from functools import lru_cache

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
    first, *rest = (part for part in getattr(model, "module", model) if isinstance(part, nn.Linear))
    return [{"params": list(first.parameters()), "name": "first"},
            {"params": [p for part in rest for p in part.parameters()], "name": "rest", "weight_decay": 0.1}]


def batches(part=slice(None)):
    x = torch.randn(STEPS, 8, 4, generator=torch.Generator().manual_seed(1))
    return [each[part] for each in x]


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
        for part in (*(part for part in model if isinstance(part, nn.Linear)), model):
            fully_shard(part, mesh=mesh)
        return model, optimizer_of(model, direction, pool, **options)
    model = DistributedDataParallel(model)
    if wrapper == "ddp":
        return model, optimizer_of(model, direction, pool, **options)
    return model, ZeroRedundancyOptimizer(groups_of(model), LayerAdaptiveLR, lr=0.1, direction=direction, pool=pool, **options)


def weights_of(model):
    return {name.removeprefix("module."): value for name, value in get_model_state_dict(model, options=FULL).items()}


def all_wrappers(rank):
    """The weights after six steps, of every wrapper, width, rule and implementation, and the size of each all-reduce."""
    found = {}
    for wrapper, width, rule, foreach in itertools.product(WRAPPERS, WIDTHS, RULES, (None, False, True)):
        model, optimizer = wrapped(wrapper, width, *rule, foreach=foreach)
        with sums_in_steps(getattr(optimizer, "optim", optimizer)) as sizes:  # ZeRO's own is inside
            train(model, optimizer, batches(slice(rank, None, 2)))
        found[wrapper, width, *rule, foreach] = weights_of(model), sizes
    return found


@contextmanager
def sums_in_steps(optimizer):
    """Notes the size of each all-reduce that the optimizer itself makes."""
    sizes, stepping, all_reduce = [], [], distributed.all_reduce

    def noted(tensor, *args, **kwargs):
        sizes.extend([tensor.numel()] * len(stepping))
        return all_reduce(tensor, *args, **kwargs)

    optimizer.register_step_pre_hook(lambda *args: stepping.append(1))
    optimizer.register_step_post_hook(lambda *args: stepping.clear())
    distributed.all_reduce = noted
    try:
        yield sizes
    finally:
        distributed.all_reduce = all_reduce


@lru_cache
def on_two():
    return in_two_processes(all_wrappers)


@lru_cache
def alone(width, direction, pool):
    model = network(width)
    train(model, optimizer_of(model, direction, pool, foreach=False), batches())
    return model.state_dict()


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("direction", "pool"), RULES)
def test_the_weights_are_those_of_one_process(wrapper, width, direction, pool):
    for foreach in (None, False, True):
        first, second = (found[wrapper, width, direction, pool, foreach][0] for found in on_two())
        for name, value in alone(width, direction, pool).items():
            if second:  # fully sharded weights are gathered on the first process only
                assert torch.equal(first[name], second[name]), name
            torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_there_is_at_most_one_small_sum_over_the_processes_in_a_step(rule):
    for wrapper, width, foreach in itertools.product(WRAPPERS, WIDTHS, (None, False, True)):
        _, sizes = on_two()[0][wrapper, width, *rule, foreach]
        needed = wrapper in ("fsdp", "hsdp") or (wrapper == "zero" and rule[1] == "group")
        assert len(sizes) == needed * STEPS
        assert max(sizes, default=0) <= 12  # one or two numbers a tensor, or three a group


def resume(rank):
    """Three steps, the state out and into a new model, three more; beside six at a stretch, and what a file would have."""
    data = batches(slice(rank, None, 2))
    model, optimizer = wrapped("fsdp", "uneven", "adam_mini", "group")
    train(model, optimizer, data[:3])
    saved = copy.deepcopy((get_model_state_dict(model), get_optimizer_state_dict(model, optimizer)))  # they are no copies
    full = copy.deepcopy((get_model_state_dict(model, options=FULL), get_optimizer_state_dict(model, optimizer, options=FULL)))
    fresh, again = wrapped("fsdp", "uneven", "adam_mini", "group")
    set_model_state_dict(fresh, saved[0])
    set_optimizer_state_dict(fresh, again, saved[1])
    train(fresh, again, data[3:])
    train(model, optimizer, data[3:])
    return weights_of(fresh), weights_of(model), full


def test_a_sharded_state_goes_on_in_other_objects_and_on_a_single_process():
    (resumed, straight, (model_state, optimizer_state)), _ = in_two_processes(resume)
    for name, value in straight.items():
        assert torch.equal(resumed[name], value), name
    model = network("uneven")
    optimizer = optimizer_of(model, "adam_mini", "group")
    set_model_state_dict(model, model_state)
    set_optimizer_state_dict(model, optimizer, optimizer_state)
    train(model, optimizer, batches()[3:])
    for name, value in straight.items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-6)
