"""PlateauUnfreezing: unfreezes on a plateau, from the head down, and resumes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from layerlr_helpers import layer_groups
from layerlr_helpers.unfreezing import PlateauUnfreezing


def groups():
    return layer_groups(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)))


def unfrozen(unfreezing):
    return list(unfreezing.plan.first_steps.items())


def test_only_the_head_trains_while_the_metric_improves():
    unfreezing = PlateauUnfreezing(groups())
    for step in range(5):
        unfreezing.report(step, {"val_accuracy": 0.1 * step})
    assert unfrozen(unfreezing) == [("head", 0)]


def test_each_plateau_unfreezes_the_next_group_from_that_step_on():
    unfreezing = PlateauUnfreezing(groups(), patience=2)
    for step in (10, 20, 30, 40, 50, 60, 70):
        unfreezing.report(step, {"val_accuracy": 0.5})
    assert unfrozen(unfreezing) == [("head", 0), ("2", 30), ("stem", 50)]
    assert unfreezing.apply(29) == {"head"}
    assert unfreezing.apply(30) == {"head", "2"}
    assert unfreezing.groups[0].params["0.weight"].requires_grad is False


def test_a_falling_loss_is_an_improvement_in_mode_min_and_a_plateau_in_mode_max():
    down, up = (PlateauUnfreezing(groups(), metric="val_loss", mode=mode) for mode in ("min", "max"))
    for step in range(3):
        for unfreezing in (down, up):
            unfreezing.report(step, {"val_loss": 1.0 - 0.1 * step})
    assert unfrozen(down) == [("head", 0)]
    assert unfrozen(up) == [("head", 0), ("2", 1), ("stem", 2)]


def test_a_change_within_min_delta_is_no_improvement():
    unfreezing = PlateauUnfreezing(groups(), min_delta=0.05)
    unfreezing.report(1, {"val_accuracy": 0.50})
    unfreezing.report(2, {"val_accuracy": 0.54})
    assert unfrozen(unfreezing) == [("head", 0), ("2", 2)]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.integers(0, 12), st.integers(1, 3))
def test_resuming_after_any_report_unfreezes_the_same_at_the_same_steps(values, cut, patience):
    whole = PlateauUnfreezing(groups(), patience=patience)
    first = PlateauUnfreezing(groups(), patience=patience)
    for step, value in enumerate(values):
        whole.report(step, {"val_accuracy": value})
        if step == cut:
            second = PlateauUnfreezing(groups(), patience=patience)
            second.load_state_dict(first.state_dict())
            first = second
        first.report(step, {"val_accuracy": value})
    assert dict(unfrozen(first)) == dict(unfrozen(whole))


def test_the_state_can_be_saved_with_plain_types(tmp_path):
    unfreezing = PlateauUnfreezing(groups())
    unfreezing.report(3, {"val_accuracy": 0.5})
    torch.save(unfreezing.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == unfreezing.state_dict()


@pytest.mark.parametrize(("options", "word"), [({"mode": "up"}, "mode"), ({"patience": 0}, "patience")])
def test_bad_options_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        PlateauUnfreezing(groups(), **options)


def test_a_metric_that_is_not_reported_is_an_error_that_names_what_was():
    with pytest.raises(ValueError, match=r"val_accuracy.*loss"):
        PlateauUnfreezing(groups()).report(1, {"loss": 1.0})


def test_a_state_of_another_model_is_refused_and_changes_nothing():
    unfreezing = PlateauUnfreezing(groups())
    with pytest.raises(ValueError, match="layer9"):
        unfreezing.load_state_dict({"plan": '{"layer9": 3}', "best": 0.1, "waited": 0})
    assert unfrozen(unfreezing) == [("head", 0)]
    assert unfreezing.best is None
