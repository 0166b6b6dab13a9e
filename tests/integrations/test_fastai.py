"""fastai: a Learner that is split into our groups trains each at its own rate, and the one-cycle keeps the ratios."""

import copy
import warnings
from functools import partial

import pytest
import torch

from layerlr_helpers import layer_decay, layer_groups
from tests.integrations.small import batches, small

with warnings.catch_warnings(action="ignore"):  # it uses what torch is giving up
    import fastai.callback.schedule  # noqa: F401  gives Learner its fit_one_cycle
    from fastai.basics import DataLoaders, Learner, OptimWrapper

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the library are its affair


def test_each_group_has_its_rate_throughout_the_cycle(tmp_path):
    model = small()
    groups = layer_groups(model)
    rates = layer_decay(1e-2, 0.5)(groups)
    learner = Learner(DataLoaders(batches(), batches()), model, loss_func=torch.nn.CrossEntropyLoss(), path=tmp_path,
                      opt_func=partial(OptimWrapper, opt=torch.optim.AdamW),
                      splitter=lambda model: [list(group.params.values()) for group in groups])
    before = copy.deepcopy(model.state_dict())
    with learner.no_logging():
        learner.fit_one_cycle(2, lr_max=list(rates.values()))
    recorded = [hyper["lr"] for hyper in learner.opt.hypers]
    assert [lr / recorded[-1] for lr in recorded] == pytest.approx([lr / 1e-2 for lr in rates.values()])
    assert not any(torch.equal(value, before[name]) for name, value in model.state_dict().items())
