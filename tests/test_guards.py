"""Putting things back: modes, buffers, weights and random numbers."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from layerlr_helpers.guards import preserved, random_state, seeded, set_random_state, training_undone
from layerlr_helpers.training import train_step
from tests.runs import Counting, model_state, same


def untidy_model():
    model = nn.Sequential(nn.BatchNorm1d(3), Counting()).train()
    model[0].eval()
    return model


def data_loader():
    return DataLoader(TensorDataset(torch.randn(8, 3), torch.arange(8) % 2), 4, shuffle=True, generator=torch.Generator())


def test_preserved_brings_back_modes_and_buffers_and_leaves_parameters_to_training():
    model = untidy_model()
    before, weight = copy.deepcopy(model.state_dict()), model[1].linear.weight
    with preserved(model):
        model.train()
        model(torch.randn(8, 3))
        with torch.no_grad():
            weight += 1
    assert [module.training for module in model] == [False, True]
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])
    assert torch.equal(weight, before["1.linear.weight"] + 1)


def test_modes_and_buffers_come_back_after_a_failure_too():
    model = untidy_model()

    def train_and_fail():
        with preserved(model):
            model.train()
            model(torch.randn(8, 3))
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        train_and_fail()
    assert [module.training for module in model] == [False, True]
    assert model[1].calls == 0


def test_training_is_undone_with_gradients_and_the_loaders_random_numbers():
    model, loader = untidy_model(), data_loader()
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    train_step(model, optimizer, *next(iter(loader)))
    before, optimizer_state, generator = model_state(model), copy.deepcopy(optimizer.state_dict()), loader.generator.get_state()
    with training_undone(model, optimizer, loader):
        assert all(p.grad is None for p in model.parameters())
        model.train()
        for inputs, labels in loader:
            train_step(model, optimizer, inputs, labels)
    assert same(before, model_state(model))
    assert same(optimizer_state, optimizer.state_dict())
    assert torch.equal(loader.generator.get_state(), generator)


def test_seeded_numbers_depend_on_the_seed_alone_and_take_none_of_the_global_ones():
    before, drawn = torch.get_rng_state(), []
    for seed in (3, 3, 4):
        with seeded(seed):
            drawn.append(torch.rand(5))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_recorded_random_state_gives_the_same_batches_and_numbers_again():
    """Also those of Python and of NumPy, from which many augmentations draw."""
    def drawn():
        return [torch.rand(2), random.random(), np.random.rand(), *(inputs for inputs, _ in loader)]  # noqa: NPY002

    loader = data_loader()
    state = random_state(loader)
    first = drawn()
    set_random_state(state, loader)
    assert same(first, drawn())
