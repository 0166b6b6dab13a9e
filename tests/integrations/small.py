"""What the tests of the bridges train: a small network on a few random vectors."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))


def batches():
    generator = torch.Generator().manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(16, 8, generator=generator), torch.arange(16) % 2), 4)
