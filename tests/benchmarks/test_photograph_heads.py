"""The heads on photographs: what a seed draws, and that a trained head has learned from the features."""

import torch
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.photograph_heads import drawn, trained_head
from layerlr_helpers import evaluate


def features_of_two_classes(examples=60):
    labels = torch.arange(examples) % 2
    random = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(examples, 512, generator=random) + 0.5 * labels[:, None], labels)


def test_a_seed_draws_as_many_of_each_class_or_all():
    features = features_of_two_classes()
    labels = drawn(features, 5, seed=1).tensors[1]
    assert labels.bincount().tolist() == [5, 5]
    assert torch.equal(drawn(features, 5, seed=1).tensors[0], drawn(features, 5, seed=1).tensors[0])
    assert not torch.equal(drawn(features, 5, seed=1).tensors[0], drawn(features, 5, seed=2).tensors[0])
    assert len(drawn(features, None, seed=1)) == len(features)


def test_a_head_learns_from_the_features_and_is_the_same_for_the_same_seed():
    features = features_of_two_classes()
    first, again = (trained_head(features, classes=2, seed=3) for _ in range(2))
    assert torch.equal(first.weight, again.weight)
    assert evaluate(first, DataLoader(features, 20))["accuracy"] > 0.9
