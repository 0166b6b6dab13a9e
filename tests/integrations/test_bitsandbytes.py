"""8-bit optimizers take the groups, train, unfreeze and resume, and a quantised base stays what it is."""

import bitsandbytes
import pytest
import torch
from torch import nn

from layerlr_helpers import ProgressiveUnfreezing, UnfreezePlan, fit, layer_decay, layer_groups, param_groups
from tests.integrations.small import batches, small

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the library are its affair


@pytest.mark.parametrize("name", ["AdamW8bit", "Adam8bit", "Lion8bit"])
def test_they_train_unfreeze_and_resume(tmp_path, name):
    def run(steps, checkpoint=None):
        model = small()
        groups = layer_groups(model)
        optimizer = getattr(bitsandbytes.optim, name)(param_groups(groups, layer_decay(1e-2, 0.5)))
        history = fit(model, optimizer, batches(), steps=steps, checkpoint=checkpoint, progress=False,
                      unfreezing=ProgressiveUnfreezing(groups, UnfreezePlan.top_down(groups, every=2)))
        assert any(value.dtype == torch.uint8 for state in optimizer.state.values() for value in state.values()
                   if isinstance(value, torch.Tensor)) or steps < 6  # the middle layer, 64 by 64, is large enough for 8 bits
        return list(model.parameters()), history

    run(3, tmp_path / "run.pt")
    whole, history = run(12)
    assert history.rows[-1]["loss"] < history.rows[0]["loss"]
    assert all(map(torch.equal, whole, run(12, tmp_path / "run.pt")[0]))


def test_a_quantised_base_is_listed_and_never_moves():
    model = nn.Sequential(nn.Linear(8, 64), bitsandbytes.nn.Linear4bit(64, 64), nn.ReLU(), nn.Linear(64, 2)).to("cpu")
    groups = layer_groups(model, torch.randn(1, 8))
    base = model[1].weight
    before = base.detach().clone()
    optimizer = torch.optim.AdamW(param_groups(groups, layer_decay(1e-2, 0.5)), fused=True)
    fit(model, optimizer, batches(), steps=4, progress=False,
        unfreezing=ProgressiveUnfreezing(groups, UnfreezePlan.top_down(groups, every=1)))
    assert not base.is_floating_point()
    assert any(p is base for group in optimizer.param_groups for p in group["params"])
    assert torch.equal(base, before)
