"""Small training runs, for the tests of training and of checkpoints."""

import random

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, SequentialLR, StepLR
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset

from layerlr_helpers import ProgressiveUnfreezing, UnfreezePlan, layer_decay, layer_groups, one_cycle, param_groups
from layerlr_helpers import slanted_triangular as triangle
from layerlr_helpers import warmup_cosine as cosine
from layerlr_helpers.unfreezing import PlateauUnfreezing

EPOCHS, BATCHES = 3, 4
STEPS = EPOCHS * BATCHES


class Net(nn.Module):
    """Has all that makes a run depend on more than its weights: dropout and BatchNorm."""

    def __init__(self, width=8):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.3))
        self.middle = nn.Linear(width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(torch.relu(self.middle(self.body(x))))


class Counting(nn.Module):
    """Draws random numbers and writes to its buffers in every mode, in place and by a new tensor."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(3))

    def forward(self, x):
        self.calls += 1
        self.last = x.detach().mean(0) + torch.rand(3)
        return self.linear(x + torch.randn_like(x))


class Augmented(Dataset):
    """Examples with noise from torch's global generator."""

    def __init__(self, n=14, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(n, 6, generator=generator)
        self.y = (self.x[:, :3] + 0.3 * torch.randn(n, 3, generator=generator)).argmax(1)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index] + 0.1 * torch.randn(6), self.y[index]


SCHEDULES = {
    "none": lambda optimizer: None,
    "one_cycle": lambda optimizer: one_cycle(optimizer, STEPS),
    "slanted_triangular": lambda optimizer: triangle(optimizer, STEPS, cut_frac=0.3),
    "warmup_cosine": lambda optimizer: cosine(optimizer, STEPS, warmup_steps=4),
    "each epoch": lambda optimizer: StepLR(optimizer, 1, gamma=0.5),
    "sequential": lambda optimizer: SequentialLR(optimizer, [cosine(optimizer, 6, warmup_steps=4), StepLR(optimizer, 2)], [6]),
    "plateau": lambda optimizer: ReduceLROnPlateau(optimizer, patience=0, threshold=0.5),
}

LOADERS = {
    "global generator": lambda data: DataLoader(data, 4, shuffle=True),
    "own generator": lambda data: DataLoader(data, 4, shuffle=True, generator=torch.Generator().manual_seed(1)),
    "batch sampler": lambda data: DataLoader(data, batch_sampler=BatchSampler(
        RandomSampler(data, generator=torch.Generator().manual_seed(1)), 4, drop_last=False)),
    "list": lambda data: [(data.x[i:i + 4], data.y[i:i + 4]) for i in range(0, len(data), 4)],
}

UNFREEZINGS = {
    "none": lambda groups: None,
    "plan": lambda groups: ProgressiveUnfreezing(groups, UnfreezePlan.top_down(groups, every=5)),
    "plateau": lambda groups: PlateauUnfreezing(groups, metric="val_loss", mode="min", min_delta=0.5),
}


class Run:
    """A new run, up to the call of ``fit``; ``arguments`` is what to pass on."""

    def __init__(self, *, seed=0, schedule="one_cycle", loader="own generator", unfreezing="none", width=8, n=14,
                 optimizer=torch.optim.AdamW):
        torch.manual_seed(seed)
        self.model = Net(width)
        groups = layer_groups(self.model, torch.zeros(2, 6))
        self.optimizer = optimizer(param_groups(groups, layer_decay(np.float64(0.05), 0.5), weight_decay=0.01))
        self.loader = LOADERS[loader](Augmented(n))
        self.schedule = SCHEDULES[schedule](self.optimizer)
        self.unfreezing = UNFREEZINGS[unfreezing](groups)
        # Without a generator of its own this loader takes a number from the global one.
        self.val = DataLoader(TensorDataset(*LOADERS["list"](Augmented(8, seed=9))[0]), 4)

    @property
    def arguments(self):
        return {"model": self.model, "optimizer": self.optimizer, "train_loader": self.loader, "schedule": self.schedule,
                "schedule_every": "epoch" if isinstance(self.schedule, StepLR) else "step", "unfreezing": self.unfreezing,
                "val_loader": self.val, "progress": False}

    def state(self):
        """All that a refused call must leave as it was."""
        states = {name: part.state_dict() for name, part in
                  (("model", self.model), ("optimizer", self.optimizer), ("schedule", self.schedule)) if part is not None}
        return {**states, "modes": [module.training for module in self.model.modules()],
                "generator": torch.get_rng_state(), "python": random.getstate(),
                "asks": [p.requires_grad for p in self.model.parameters()]}


def model_state(model):
    """All that looking at a model must leave as it was; a later change of the model does not change it."""
    return {"values": {name: value.clone() for name, value in model.state_dict().items()},
            "modes": [module.training for module in model.modules()],
            "identities": [id(tensor) for tensor in (*model.parameters(), *model.buffers())],
            "requires_grad": [p.requires_grad for p in model.parameters()],
            "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
            "hooks": [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()],
            "generator": torch.get_rng_state()}


def same(a, b):
    """Whether two nests of containers, tensors and numbers are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
