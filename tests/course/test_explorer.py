"""The explorer's numbers are those of preview, and its knobs redraw the figure."""

import base64

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from layerlr_helpers import layer_decay, layer_groups, load_resnet18, one_cycle, param_groups, preview
from layerlr_helpers.course.explorer import SCHEDULES, explorer, rates_over_time, ratio_drift

KEEP_RATIOS = ["constant", "one-cycle", "slanted triangular", "warm-up and cosine", "StepLR, ×0.1 at each third"]


@pytest.fixture(scope="module")
def groups():
    return layer_groups(load_resnet18(None, num_classes=10), torch.zeros(1, 3, 64, 64))


def test_rates_are_those_of_preview(groups):
    rates = rates_over_time(groups, head_lr=1e-2, decay=0.5, schedule="one-cycle", total_steps=40)
    expected = preview(param_groups(groups, layer_decay(1e-2, 0.5)), lambda o: one_cycle(o, 40), 40)
    pd.testing.assert_frame_equal(rates, expected)


def test_the_constant_schedule_leaves_the_rates_as_they_are(groups):
    rates = rates_over_time(groups, head_lr=1e-2, decay=0.5, schedule="constant", total_steps=40)
    pd.testing.assert_frame_equal(rates, preview(param_groups(groups, layer_decay(1e-2, 0.5)), None, 40))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_gives_a_rate_to_every_group_at_every_step(groups, schedule):
    rates = rates_over_time(groups, head_lr=1e-2, decay=0.5, schedule=schedule, total_steps=30)
    assert rates.shape == (30, len(groups))
    assert (rates > 0).all(axis=None)


def test_a_plan_keeps_lower_groups_at_zero_until_their_step(groups):
    rates = rates_over_time(groups, head_lr=1e-2, decay=0.5, schedule="constant", plan_every=10, total_steps=60)
    assert rates["head"].gt(0).all()
    assert rates["layer4"].gt(0).idxmax() == 10
    assert rates["stem"].gt(0).sum() == 10


def test_no_plan_is_the_same_as_a_plan_of_zero_steps(groups):
    none, zero = (rates_over_time(groups, head_lr=1e-3, decay=1, plan_every=every) for every in (None, 0))
    pd.testing.assert_frame_equal(none, zero)


def test_an_unknown_schedule_is_named_with_the_known_ones(groups):
    with pytest.raises(ValueError, match=r"'linear'; known are 'constant', 'one-cycle'"):
        rates_over_time(groups, head_lr=1e-3, decay=0.5, schedule="linear")


@pytest.mark.parametrize("plan_every", [None, 7])
@pytest.mark.parametrize("schedule", KEEP_RATIOS)
def test_schedules_that_multiply_leave_the_ratios(groups, schedule, plan_every):
    rates = rates_over_time(groups, head_lr=1e-2, decay=0.4, schedule=schedule, plan_every=plan_every, total_steps=90)
    assert ratio_drift(rates) == pytest.approx(1, abs=1e-9)


def test_a_floor_shared_by_all_groups_shows_in_the_drift(groups):
    rates = rates_over_time(groups, head_lr=1e-2, decay=0.4, schedule="cosine to eta_min=1e-5", total_steps=400)
    assert ratio_drift(rates) == pytest.approx(0.4 ** -5, rel=0.05)  # at the end all groups are at the floor


def test_drift_of_known_numbers():
    assert ratio_drift(pd.DataFrame({"a": [1.0, 1.0], "b": [10.0, 5.0]})) == pytest.approx(2)
    assert ratio_drift(pd.DataFrame({"a": [0.0, 1.0, 0.5], "b": [7.0, 4.0, 2.0]})) == pytest.approx(1)
    assert ratio_drift(pd.DataFrame({"a": [1.0, 0.0], "b": [0.0, 1.0]})) == 1  # never both: there is no ratio
    assert ratio_drift(pd.DataFrame({"only": [1.0, 2.0]})) == 1


@pytest.fixture
def shown(monkeypatch):
    """What the explorer shows, oldest first: the lines of each figure and the text for those who do not see it."""
    figures = []

    def show(axes, alt):
        figures.append((np.array([line.get_ydata() for line in axes.lines]), alt))
        plt.close(axes.figure)

    monkeypatch.setattr("layerlr_helpers.course.explorer.show", show)
    return figures


def move(box, knob, value):
    next(child for child in box.children if getattr(child, "description", None) == knob).value = value


@pytest.mark.parametrize(("knob", "value"), [("head rate", 1e-4), ("decay per group", 1.0),
                                             ("schedule", "cosine to eta_min=1e-5"), ("unfreeze one every (steps)", 5)])
def test_every_knob_redraws_the_figure_and_the_sentence(groups, shown, knob, value):
    box = explorer(groups)
    move(box, knob, value)
    (before, words_before), (after, words_after) = shown
    assert before.shape == after.shape == (6, 200)
    assert not np.array_equal(before, after, equal_nan=True)
    assert words_before != words_after


def test_the_sentence_says_what_the_figure_shows(groups, shown, capsys):
    box = explorer(groups)
    move(box, "schedule", "cosine to eta_min=1e-5")
    first, second = (words for _, words in shown)
    assert "ratios between groups stay" in first
    assert "100% of all" in first
    assert "changes by a factor of" in second
    printed = capsys.readouterr().out
    assert printed.index(first) < printed.index(second)


@pytest.mark.slow
def test_in_a_notebook_there_is_one_figure_with_its_text_which_is_that_of_the_moved_knob():
    notebook = new_notebook(cells=[
        new_code_cell("from torch import nn, zeros\n"
                      "from layerlr_helpers import layer_groups\n"
                      "from layerlr_helpers.course.explorer import explorer\n"
                      "net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))\n"
                      "box = explorer(layer_groups(net, zeros(1, 2)))"),
        new_code_cell("box.children[0].value = 1e-2  # the head's rate")])
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    widgets = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"].values()
    figure, sentence = next(widget for widget in widgets if widget["model_name"] == "OutputModel")["state"]["outputs"]
    assert base64.b64decode(figure["data"]["image/png"]).startswith(b"\x89PNG")
    assert "1.0e-02 in head" in figure["metadata"]["image/png"]["alt"]
    assert "1.0e-02 in head" in sentence["text"]


def test_drawing_leaves_no_figure_open(groups):
    before = plt.get_fignums()
    explorer(groups)
    assert plt.get_fignums() == before


def test_a_page_without_a_kernel_shows_words_in_its_place(groups):
    assert explorer(groups)._repr_mimebundle_()["text/plain"] == "(an explorer with sliders: run this notebook to use it)"
