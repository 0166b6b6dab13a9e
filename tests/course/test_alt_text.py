import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure

from layerlr_helpers.course.alt_text import alt_text, describe, describe_lines


def test_two_drawings_into_the_same_axes_are_both_described():
    axes = Figure().subplots()
    describe(axes, "First.")
    axes.set(title="t", xlabel="x")
    describe(axes, "Second.", "Third.")
    assert alt_text(axes.figure) == "First. Second. Third."


def test_what_panels_share_is_said_once_and_the_rest_after_their_titles():
    figure = Figure()
    left, middle, right = figure.subplots(1, 3)
    left.set_title("blurred")
    describe(left, "Points.", "stem 1.")
    describe(right, "Points.", "stem 2.")
    assert alt_text(figure) == "Points. blurred: stem 1. Panel 2: stem 2."
    assert alt_text(Figure()) == ""
    describe(middle, "Points.")  # and no more
    assert alt_text(figure) == "Points. blurred: stem 1. Panel 3: stem 2."


def test_lines_that_were_drawn_by_hand_are_described_by_their_labels_and_values():
    axes = Figure().subplots()
    axes.plot(np.arange(300), np.r_[5.0, np.linspace(1, 9, 298), 2.0], label="noisy")
    axes.plot(["a", "b"], [0.25, 1500], label="short")
    axes.plot([0, 1, 2], [7, 7, 7], label="steady")
    axes.plot([0, 1], [3, 3])  # without a label
    axes.axhline(4, label="floor")
    axes.set(xlabel="step", ylabel="loss (nats)", yscale="log")
    describe_lines(axes)
    assert alt_text(axes.figure) == (
        "Lines of loss (nats) (logarithmic) over step. noisy: 5 at 0, 1 at 1 (lowest), 9 at 298 (highest), 2 at 299; "
        "short: 0.25 at a, 1500 at b; steady: 7 from 0 to 2.")


def test_lines_without_a_label_are_refused():
    axes = plt.figure().subplots()
    axes.plot([1, 2])
    with pytest.raises(ValueError, match="no line here has a label"):
        describe_lines(axes)
    plt.close(axes.figure)
