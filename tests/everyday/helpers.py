"""What the everyday tests share: models that are written in a few lines, and the depths that their parameters get."""

import itertools

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from layerlr_helpers import LayerGroup

SEQUENCES = torch.ones(2, 5, 6)  # what an Encoder takes: 2 sequences of 5 tokens of 6 numbers


class Model(nn.Module):
    """A model of named parts and parameters, and of a function that gets the model and the inputs."""

    def __init__(self, call, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.call = call

    def forward(self, *args, **kwargs):
        return self.call(self, *args, **kwargs)


class Block(nn.Module):
    """An encoder layer with its norms in front, on tokens [N, T, 8]."""

    def __init__(self):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm2, self.mlp = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x):
        tokens = self.norm1(x)
        x = x + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """A patch embedding of [N, T, 6], ``layers`` encoder layers, and the mean over the tokens, [N, 8]."""

    def __init__(self, layers=3):
        super().__init__()
        self.patch, self.blocks = nn.Linear(6, 8), blocks(layers)

    def forward(self, x):
        return through(self.blocks, self.patch(x)).mean(1)


def blocks(n):
    return nn.ModuleList(Block() for _ in range(n))


def through(modules, x):
    """What comes out of modules that run one after the other."""
    for module in modules:
        x = module(x)
    return x


def mlp(outputs=3):
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, outputs))


def numbered(name, n):
    return [f"{name}.{i}" for i in range(n)]


def holder(groups, parameter) -> LayerGroup:
    """The group that a parameter is in."""
    return next(group for group in groups if parameter in group.params)


def depths(groups, *parts) -> list[int]:
    """The depth of each part, a module or a parameter, of which all must be at one depth; no parameter may be in two groups."""
    model = groups[0].model
    grouped = [id(p) for group in groups for p in group.params.values()]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    depth_of = {name: group.depth for group in groups for name in group.params}
    found = [{depth for name, depth in depth_of.items() if f"{name}.".startswith(f"{part}.")} for part in parts]
    assert all(len(of_part) == 1 for of_part in found), dict(zip(parts, found, strict=True))
    return list(itertools.chain(*found))


def batches(*tensors, batch_size=8, **options):
    return DataLoader(TensorDataset(*tensors), batch_size, **options)


def examples(n, classes=3, seed=1):
    """``n`` vectors of 6 numbers and their labels, the same ones in every call."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator), torch.randint(classes, (n,), generator=generator)


def equal(a, b):
    """Whether two models have the same state, bit for bit."""
    return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


def by_hand(model, optimizer, loader, loss_of_batch, clip=float("inf")):
    """The loop that every learner writes."""
    model.train()
    for batch in loader:
        optimizer.zero_grad()
        loss_of_batch(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
