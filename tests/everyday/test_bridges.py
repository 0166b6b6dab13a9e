"""Optimizers of other makes beside each other, in a loop by hand and in ``fit``, without any further library."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from layerlr_helpers import (
    ProgressiveUnfreezing,
    UnfreezePlan,
    current_rates,
    describe,
    fit,
    layer_decay,
    layer_groups,
    one_cycle,
    param_groups,
)
from tests.everyday.helpers import Model, batches, blocks, through

TOKENS = torch.randint(20, (16, 5), generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(16) % 3


def classifier():
    torch.manual_seed(0)
    return Model(lambda m, tokens: m.head(through(m.blocks, m.words(tokens)).mean(1)),
                 words=nn.Embedding(20, 8), blocks=blocks(2), head=nn.Linear(8, 3))


def muon_and_adamw(groups):
    """Muon for the matrices beside AdamW for the rest, each layer at its own rate in both."""
    rates = layer_decay(1e-2, 0.5)
    return (torch.optim.Muon(param_groups(groups, rates, select=lambda p: p.ndim == 2)),
            torch.optim.AdamW(param_groups(groups, rates, select=lambda p: p.ndim != 2)))


def test_one_plan_holds_and_trains_layers_in_two_optimizers_with_a_schedule_each():
    groups = layer_groups(model := classifier(), TOKENS)
    optimizers = muon_and_adamw(groups)
    schedules = [one_cycle(optimizer, 4) for optimizer in optimizers]
    unfreezing = ProgressiveUnfreezing(groups, UnfreezePlan({"head": 0, "*": 2}))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    moved = []
    for step in range(4):
        unfreezing.apply(step)
        F.cross_entropy(model(TOKENS), LABELS).backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        moved.append({name for name, p in model.named_parameters() if not torch.equal(p, before[name])})
    assert moved[1] == {"head.weight", "head.bias"}
    assert moved[3] == before.keys()
    names = {group.name for group in groups}
    for optimizer in optimizers:
        assert set(describe(optimizer)["group"]) <= names
        assert set(current_rates(optimizer)) <= names


def test_with_only_one_of_two_optimizers_fit_names_what_will_not_train():
    model = classifier()
    muon, _ = muon_and_adamw(layer_groups(model, TOKENS))
    with pytest.warns(UserWarning, match=r"parameters .*norm1\.weight.* are not in the optimizer"):
        fit(model, muon, batches(TOKENS, LABELS), epochs=1, progress=False)


class EightBit(torch.optim.AdamW):
    """Takes the number of bits from each group, as optimizers with short states do."""

    def __init__(self, params):
        super().__init__(params)
        for group in self.param_groups:
            group.setdefault("optim_bits", 8)


def test_an_option_that_the_user_gives_one_group_is_the_optimizers_and_the_history_has_all_groups():
    groups = layer_groups(model := classifier(), TOKENS)
    made = param_groups(groups, layer_decay(1e-2, 0.5))
    made[0]["optim_bits"] = 32  # the embeddings
    optimizer = EightBit(made)
    row = fit(model, optimizer, batches(TOKENS, LABELS), epochs=1, progress=False).rows[-1]
    assert [group["optim_bits"] for group in optimizer.param_groups] == [32, 8, 8, 8]
    assert list(row["lr"]) == [group.name for group in groups]
