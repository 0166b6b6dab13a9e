"""schedule-free optimizers have two sets of weights: fit trains one and validates the other, as they ask."""

import pytest
import schedulefree
import torch

from layerlr_helpers import evaluate, fit, layer_decay, param_groups
from layerlr_helpers.optim import CombinedOptimizer
from tests.integrations.small import batches, small


def adamw(model):
    return schedulefree.AdamWScheduleFree(param_groups(model, layer_decay(1e-2, 0.5)))


@pytest.mark.parametrize("make", [adamw, lambda model: CombinedOptimizer(adamw(model))])
def test_the_validation_is_that_of_the_weights_that_one_will_use(make):
    model = small()
    optimizer = make(model)
    history = fit(model, optimizer, batches(), epochs=3, val_loader=batches(), progress=False)
    optimizer.eval()
    assert history.rows[-1]["val_loss"] == evaluate(model, batches())["loss"]
    assert history.rows[-1]["loss"] < history.rows[0]["loss"]


def test_a_resumed_run_has_the_same_weights_bit_for_bit(tmp_path):
    def run(steps, checkpoint=None):
        model = small()
        optimizer = adamw(model)
        fit(model, optimizer, batches(), steps=steps, checkpoint=checkpoint, progress=False)
        optimizer.eval()
        return list(model.parameters())

    run(3, tmp_path / "run.pt")
    assert all(map(torch.equal, run(8), run(8, tmp_path / "run.pt")))
