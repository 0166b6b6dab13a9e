"""What ``fit`` refuses before anything has changed; tests/test_training.py tries that nothing has."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from layerlr_helpers import (
    ProgressiveUnfreezing,
    UnfreezePlan,
    fit,
    freeze,
    layer_decay,
    layer_groups,
    new_head,
    param_groups,
    slanted_triangular,
    uniform,
    warmup_cosine,
)
from layerlr_helpers.preflight import check_precision
from layerlr_helpers.unfreezing import PlateauUnfreezing

BATCHES = [(torch.randn(4, 8), torch.randint(3, (4,))) for _ in range(2)]


def learner(width=8):
    model = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 3))
    groups = layer_groups(model)
    return model, groups, torch.optim.AdamW(param_groups(groups, layer_decay(1e-2, 0.5)))


def test_a_head_that_was_replaced_after_the_optimizer_was_made_is_named():
    model, _, optimizer = learner()
    new_head(model, 5)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"made for another model, or before layers .*in 'head', shapes \[3, 8\], \[3\]\), and "
                                         r"it lacks the model's 2.weight, 2.bias; make the optimizer again"):
        fit(model, optimizer, BATCHES, epochs=1, progress=False)
    assert all(map(torch.equal, before, model.parameters()))


def test_an_optimizer_with_a_second_models_parameters_is_refused():
    (model, _, optimizer), (other, _, _) = learner(), learner()
    optimizer.add_param_group({"params": list(other.parameters()), "name": "other"})
    with pytest.raises(ValueError, match=r"holds tensors that are not in the model .*in 'other', shapes"):
        fit(model, optimizer, BATCHES, epochs=1, progress=False)


def test_a_loss_with_parameters_of_its_own_is_trained_too():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, logits, labels):
            return F.cross_entropy(self.scale * logits, labels)

    (model, _, optimizer), loss_fn = learner(), Scaled()
    optimizer.add_param_group({"params": list(loss_fn.parameters()), "name": "loss"})
    fit(model, optimizer, BATCHES, epochs=1, loss_fn=loss_fn, progress=False)
    assert loss_fn.scale != 1


def test_a_head_may_be_trained_with_the_optimizer_of_the_whole_frozen_model():
    model, groups, optimizer = learner()
    unfreezing = ProgressiveUnfreezing(groups, UnfreezePlan({"head": 0}))
    unfreezing.apply(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(model[2], optimizer, BATCHES, epochs=1, unfreezing=unfreezing, progress=False)


def test_layers_that_nothing_trains_are_named_in_a_warning():
    model, _, _ = learner()
    optimizer = torch.optim.SGD(model[2].parameters(), 0.1)
    with pytest.warns(UserWarning, match=r"parameters 0.weight, 0.bias require gradients and are not in the optimizer"):
        fit(model, optimizer, BATCHES, epochs=1, progress=False)
    model[0].requires_grad_(False)  # left out on purpose
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(model, optimizer, BATCHES, epochs=1, progress=False)


def test_float16_is_refused_where_gradients_would_vanish_and_nowhere_else():
    model, _, optimizer = learner()
    with pytest.raises(ValueError, match=r"autocast is torch.float16: .*autocast=torch.bfloat16"):
        fit(model, optimizer, BATCHES, epochs=1, autocast=torch.float16, progress=False)
    with pytest.raises(ValueError, match=r"the parameters 0.weight, 0.bias, 2.weight, 2.bias are float16"):
        fit(model.half(), optimizer, BATCHES, epochs=1, progress=False)
    model.requires_grad_(False)[2].float().requires_grad_(True)
    check_precision(None, model)  # a frozen backbone may be as short as it likes
    check_precision(torch.bfloat16, model)


@pytest.mark.parametrize(("arguments", "problem"), [
    ({"accumulate": 0}, "accumulate=0 must be the number of batches"), ({"accumulate": 1.5}, "accumulate=1.5 must be"),
    ({"clip_grad_norm": 0.0}, "clip_grad_norm=0.0 must be the largest norm"), ({"clip_grad_norm": "1"}, "clip_grad_norm='1'"),
    ({"metrics": {"lr": max}}, "metrics are functions of")])
def test_arguments_that_cannot_be_are_refused(arguments, problem):
    model, _, optimizer = learner()
    with pytest.raises(ValueError, match=problem):
        fit(model, optimizer, BATCHES, epochs=1, progress=False, **arguments)


def test_a_plateau_schedule_that_waits_for_a_higher_loss_is_refused():
    model, _, optimizer = learner()
    with pytest.raises(ValueError, match="the loss, which is best where it is lowest; make it with mode='min'"):
        fit(model, optimizer, BATCHES, epochs=1, schedule=ReduceLROnPlateau(optimizer, mode="max"), progress=False)


def test_an_unfreezing_that_waits_for_a_metric_that_will_not_come_is_refused():
    model, groups, optimizer = learner()
    for metrics, metric, refused in (({"f1": max}, "val_accuracy", True), ({"f1": lambda o, y: 0.5}, "val_f1", False),
                                     ({}, "val_loss", False)):
        unfreezing = PlateauUnfreezing(groups, metric=metric)
        if refused:
            with pytest.raises(ValueError, match="waits for 'val_accuracy', and fit will report val_loss, val_f1"):
                fit(model, optimizer, BATCHES, epochs=1, unfreezing=unfreezing, val_loader=BATCHES, metrics=metrics)
        else:
            fit(model, optimizer, BATCHES, epochs=1, unfreezing=unfreezing, val_loader=BATCHES, metrics=metrics, progress=False)


def test_a_run_in_which_nothing_trains_is_refused_before_anything_changes():
    model, loader = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), [(torch.ones(2, 4), torch.tensor([0, 1]))]
    groups = layer_groups(model)
    optimizer = torch.optim.SGD(param_groups(groups, uniform(0.1)))
    late = ProgressiveUnfreezing(groups, UnfreezePlan({"head": 1}))
    with pytest.raises(ValueError, match="nothing trains at step 0"):
        fit(model, optimizer, loader, steps=2, unfreezing=late, progress=False)
    assert all(p.requires_grad for p in model.parameters())
    freeze(groups, "*")
    with pytest.raises(ValueError, match="nothing trains at step 0"):
        fit(model, optimizer, loader, steps=2, progress=False)
    from_the_start = ProgressiveUnfreezing(groups, UnfreezePlan({"head": 0}))
    assert len(fit(model, optimizer, loader, steps=2, unfreezing=from_the_start, progress=False).rows) == 2


def test_an_optimizer_that_calls_the_model_itself_is_refused():
    model = nn.Linear(4, 2)
    with pytest.raises(ValueError, match="LBFGS"):
        fit(model, torch.optim.LBFGS(model.parameters()), [], steps=1)


@pytest.mark.parametrize("schedule", [lambda o: warmup_cosine(o, 12, warmup_steps=1), lambda o: slanted_triangular(o, 12)])
def test_a_run_that_goes_on_after_its_schedule_has_ended_gets_a_warning(schedule, recwarn):
    model, loader = nn.Linear(4, 2), [(torch.ones(2, 4), torch.tensor([0, 1]))] * 12
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    made = schedule(optimizer)
    fit(model, optimizer, loader, steps=12, schedule=made, progress=False)
    assert not recwarn
    with pytest.warns(UserWarning, match="the schedule has 0 steps left and the run has 2; after these"):
        fit(model, optimizer, loader, steps=2, schedule=made, progress=False)
