from base64 import b64decode
from io import BytesIO

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.pylabtools import select_figure_formats
from IPython.utils.capture import capture_output
from PIL import Image
from traitlets.config import Config

from layerlr_helpers.course import plots
from layerlr_helpers.course.alt_text import alt_text
from layerlr_helpers.images import ImageSet
from layerlr_helpers.range_test import RangeTest

STEPS = range(20)
RATES = pd.DataFrame({"stem": np.linspace(1e-5, 1e-4, 20), "layer1": 0.0, "head": 1e-3}, index=pd.RangeIndex(20, name="step"))
RATES.loc[10:, "layer1"] = 5e-4
HISTORY = pd.DataFrame({"step": STEPS, "epoch": 0, "loss": np.linspace(2, 1, 20),
                        **{f"lr/{name}": RATES[name].to_numpy() for name in RATES}})
PROBES = pd.DataFrame({"target": ["class"] * 3 + ["colour"] * 3, "layer": ["stem", "layer1", "head"] * 2,
                       "accuracy": [0.1, 0.4, 0.9, 0.8, 0.6, 0.3], "standard_error": 0.02, "chance": [0.05] * 3 + [0.25] * 3})
RUNS = pd.DataFrame({"strategy": ["b", "a", "b", "a"], "seed": [0, 0, 1, 1], "accuracy": [0.8, 0.7, 0.9, 0.5]})
BY_LAYER = pd.DataFrame({"group": ["stem", "layer1", "head"], "moved": [0.01, 0.1, 1.0]})
RANGE = RangeTest(pd.DataFrame({"factor": [0.01, 0.1, 1.0, 10.0], "loss": [2.3, 2.2, 1.5, 6.0],
                                "smooth_loss": [2.3, 2.25, 1.9, 4.0]}), suggestion=1.0)
GAPS = pd.DataFrame({"difference": [1.0, 0.0], "low": [-0.5, 0.0], "high": [2.0, 0.0], "seeds": [10, 10]},
                    index=["b", "a"])
CURVES = pd.DataFrame([{"strategy": name, "lr": lr, "seed": seed, "accuracy": 0.5 + seed / 10 + (name == "a") / 5}
                       for name in "ab" for lr in (1e-3, 1e-2) for seed in range(3)])
TABLE = pd.DataFrame([[10.0, 90.0], [float("nan"), 50.0]], index=["stem", "head"], columns=["blurred", "permuted"])

DRAWN = {  # every function that draws into Axes
    "rates": lambda axes=None: plots.plot_rates(RATES, axes),
    "probes": lambda axes=None: plots.plot_probes(PROBES, axes),
    "by layer": lambda axes=None: plots.plot_by_layer(BY_LAYER, "moved", axes),
    "comparison": lambda axes=None: plots.plot_comparison(RUNS, axes),
    "range test": lambda axes=None: plots.plot_range_test(RANGE, axes),
    "intervals": lambda axes=None: plots.plot_intervals(GAPS, "a", axes),
    "intervals and live runs": lambda axes=None: plots.plot_intervals(GAPS, "a", axes, live=RUNS),
    "curves": lambda axes=None: plots.plot_curves(CURVES, "lr", axes, live=CURVES[CURVES["seed"] == 0]),
    "heatmap": lambda axes=None: plots.plot_heatmap(TABLE, axes),
}




def images(names):
    pixels = torch.randint(256, (len(names), 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet(pixels, torch.arange(len(names)), tuple(names))


def numbered(n):
    return [f"name{i}" for i in range(n)]


LONG = pd.DataFrame([{"strategy": name, "seed": seed, "accuracy": seed / 2, "lr": lr} for name in numbered(30)
                     for seed in (0, 1) for lr in (1.0, 2.0)])
MANY = {"difference": 1.0, "low": 0.0, "high": 2.0, "seeds": 3}

# Of every plot function: a figure and what its text must say, a figure of other data, and a figure of very much data.
DESCRIBED = {
    "plot_images": (
        lambda: plots.plot_images(images("xyz")), "3 pictures of 8 by 8 pixels, 3 in a row, with a title above each. x; y; z.",
        lambda: plots.plot_images(images("xyw")), lambda: plots.plot_images(images(["x" * 30] * 40), 40)),
    "plot_filters": (
        lambda: plots.plot_filters(torch.arange(27.0).view(1, 3, 3, 3)), "1 are smooth",
        lambda: plots.plot_filters(torch.tensor([1.0, -1.0] * 13 + [1.0]).view(1, 3, 3, 3)),
        lambda: plots.plot_filters(torch.rand(500, 3, 7, 7))),
    "plot_rates": (
        lambda: plots.plot_rates(RATES),
        "Lines of learning rate (logarithmic) over step. stem: 1e-05 at 0 (lowest), 0.0001 at 19 "
        "(highest); layer1: 0.0005 from 10 to 19; head: 0.001 from 0 to 19.",
        lambda: plots.plot_rates(2 * RATES),
        lambda: plots.plot_rates(pd.DataFrame({name: np.linspace(1, 2, 30) for name in numbered(60)} | {"frozen": 0.0}))),
    "plot_range_test": (
        lambda: plots.plot_range_test(RANGE),
        "smoothed: 2.3 at 0.01, 2.25 at 0.1, 1.9 at 1, 4 at 10. A vertical line at 1 (suggested: 1).",
        lambda: plots.plot_range_test(RangeTest(RANGE.frame, suggestion=float("nan"))),
        lambda: plots.plot_range_test(RangeTest(pd.concat([RANGE.frame] * 50), suggestion=1.0))),
    "plot_probes": (
        lambda: plots.plot_probes(PROBES),
        "class: 10 at stem, 40 at layer1, 90 at head, chance 5; colour: 80 at stem, 60 at layer1, 30 at head, chance 25.",
        lambda: plots.plot_probes(PROBES.assign(accuracy=0.5)),
        lambda: plots.plot_probes(pd.concat([PROBES.assign(layer=PROBES["layer"] + name) for name in numbered(30)]))),
    "plot_by_layer": (
        lambda: plots.plot_by_layer(BY_LAYER, "moved", label="distance"),
        "Bars of distance, one for each layer group. 0.01 at stem, 0.1 at layer1, 1 at head.",
        lambda: plots.plot_by_layer(BY_LAYER.assign(moved=0.7), "moved"),
        lambda: plots.plot_by_layer(pd.DataFrame({"group": numbered(62), "moved": np.linspace(1, 2, 62)}), "moved")),
    "plot_comparison": (
        lambda: plots.plot_comparison(RUNS),
        "accuracy (%) as a dot and each strategy's mean as a bar, 4 runs in all. "
        "Means, with the lowest and the highest run: b 85 (80 to 90); a 60 (50 to 70).",
        lambda: plots.plot_comparison(RUNS.assign(accuracy=0.5)), lambda: plots.plot_comparison(LONG)),
    "plot_intervals": (
        lambda: plots.plot_intervals(GAPS, "a", live=RUNS),
        "Accuracy minus that of a on the same seeds, in points: 10 recorded seeds, mean and 95 % interval, and a line at 0. "
        "b +1.0 (-0.5 to +2.0). Crosses, one seed run here: b +10.0 and +40.0.",
        lambda: plots.plot_intervals(GAPS + 1, "a"),
        lambda: plots.plot_intervals(pd.DataFrame(MANY, index=numbered(30)), "name0", live=LONG[LONG["lr"] == 1])),
    "plot_curves": (
        lambda: plots.plot_curves(CURVES, "lr", live=CURVES.query("seed == 0 and strategy == 'a'"), label="rate"),
        "Test accuracy (%) over rate, one line for each strategy: mean and 95 %. a: 80 at 0.001, 80 at 0.01; b: 60 at 0.001, "
        "60 at 0.01. Crosses, one seed run here: a 70 at 0.001, 70 at 0.01.",
        lambda: plots.plot_curves(CURVES.assign(accuracy=0.5), "lr"), lambda: plots.plot_curves(LONG, "lr", live=LONG)),
    "plot_heatmap": (
        lambda: plots.plot_heatmap(TABLE),
        "accuracy (%), 2 rows and 2 columns. stem: 10 at blurred, 90 at permuted; head: 50 at permuted.",
        lambda: plots.plot_heatmap(TABLE + 1),
        lambda: plots.plot_heatmap(pd.DataFrame(np.arange(150.0).reshape(30, 5), numbered(30), numbered(5)))),
}


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def shell():
    """An IPython that shows figures as pictures, as a notebook does."""
    config = Config()
    config.HistoryManager.enabled = False
    shell = InteractiveShell.instance(config=config)
    select_figure_formats(shell, ["png"])
    yield shell
    InteractiveShell.clear_instance()


def labels(axes):
    axes.figure.canvas.draw()
    return [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
def test_each_figure_goes_into_the_axes_it_is_given_or_into_new_ones_and_leaves_the_settings_alone(draw):
    before = dict(matplotlib.rcParams)
    _, (left, right) = plt.subplots(1, 2)
    assert draw(right) is right
    assert not left.has_data()
    new = draw()
    assert isinstance(new, plt.Axes)
    assert new.figure is not left.figure
    new.figure.canvas.draw()  # nothing warns, even with gaps in the data
    assert dict(matplotlib.rcParams) == before


def description(axes):
    return alt_text(np.ravel(axes)[0].figure)


def test_every_plot_function_is_tried_here():
    assert {name for name in vars(plots) if name.startswith("plot_")} == set(DESCRIBED)


@pytest.mark.parametrize(("draw", "words", "draw_other", "draw_much"), DESCRIBED.values(), ids=DESCRIBED)
def test_every_figure_says_in_words_what_it_shows_in_at_most_about_700_characters(draw, words, draw_other, draw_much):
    assert words in description(draw())
    assert words not in description(draw_other())
    assert len(description(draw_much())) < 770


def test_a_long_description_gives_the_first_the_extremes_and_the_last():
    values = np.r_[3.0, 1.0, np.linspace(2, 2.5, 60), 9.0, 2000.0]
    text = description(plots.plot_by_layer(pd.DataFrame({"group": numbered(64), "moved": values}), "moved"))
    assert "3 at name0, 1 at name1 (lowest), 2000 at name63 (highest)." in text
    text = description(plots.plot_rates(pd.DataFrame({name: np.linspace(1, 2, 30) for name in numbered(60)} | {"frozen": 0.0})))
    assert "name0: 1 at 0 (lowest), 2 at 29 (highest); " in text
    assert text.endswith("more; frozen: no value.")


@pytest.mark.parametrize("frame", [RATES, HISTORY], ids=["preview", "history"])
def test_rates_are_one_line_a_group_with_gaps_while_it_is_frozen(frame):
    axes = plots.plot_rates(frame)
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines) == ["stem", "layer1", "head"]
    for name, line in lines.items():
        assert list(line.get_xdata()) == list(STEPS)
        drawn = np.asarray(line.get_ydata(), dtype=float)
        assert np.array_equal(drawn, RATES[name].where(RATES[name] > 0), equal_nan=True)
    assert np.isnan(lines["layer1"].get_ydata()).sum() == 10
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_yscale()) == ("step", "learning rate", "log")
    assert sorted(labels(axes)) == sorted(lines)


def test_each_group_has_a_colour_of_its_own_the_same_in_every_figure():
    colours = plots.depth_colours(6)
    assert len(set(colours)) == 6
    assert [sum(colour[:3]) for colour in colours] == sorted(sum(colour[:3]) for colour in colours)  # dark to light
    assert [line.get_color() for line in plots.plot_rates(RATES).get_lines()] == plots.depth_colours(3)
    assert [bar.get_facecolor() for bar in plots.plot_by_layer(BY_LAYER, "moved").patches] == plots.depth_colours(3)


def test_probes_are_one_line_a_target_in_percent_with_errors_and_chance():
    axes = plots.plot_probes(PROBES)
    assert labels(axes) == ["class", "colour"]
    for container, chance, expected in zip(axes.containers, (5, 25), ([10, 40, 90], [80, 60, 30]), strict=True):
        assert list(container.lines[0].get_ydata()) == pytest.approx(expected)
        assert any(line.get_linestyle() == ":" and line.get_ydata()[0] == chance for line in axes.get_lines())
        low, high = container.lines[2][0].get_segments()[0][:, 1]
        assert (low, high) == pytest.approx((expected[0] - 4, expected[0] + 4))  # two standard errors
    assert "(%)" in axes.get_ylabel()
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["stem", "layer1", "head"]


def test_by_layer_is_one_bar_a_group():
    axes = plots.plot_by_layer(BY_LAYER, "moved", label="relative distance")
    assert [bar.get_height() for bar in axes.patches] == [0.01, 0.1, 1.0]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("relative distance", "layer group")
    assert plots.plot_by_layer(BY_LAYER, "moved").get_ylabel() == "moved"


def test_a_comparison_has_a_dot_a_run_and_the_mean_in_the_order_of_the_frame():
    axes = plots.plot_comparison(RUNS)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["b", "a"]
    b, b_mean, a, a_mean = axes.get_lines()
    assert sorted(b.get_xdata()) == pytest.approx([80, 90])
    assert sorted(a.get_xdata()) == pytest.approx([50, 70])
    assert list(b_mean.get_xdata()) == pytest.approx([85, 85])
    assert list(a_mean.get_xdata()) == pytest.approx([60, 60])
    assert axes.yaxis_inverted()  # the first strategy is at the top
    assert labels(axes) == ["one run", "mean"]
    assert axes.get_xlabel() == "accuracy (%)"


def test_a_heatmap_has_every_number_in_its_cell_and_none_where_there_is_none():
    axes = plots.plot_heatmap(TABLE, label="accuracy (%)")
    assert {text.get_position(): text.get_text() for text in axes.texts} == {(0, 0): "10", (1, 0): "90", (1, 1): "50"}
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["blurred", "permuted"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["stem", "head"]
    assert axes.figure.axes[-1].get_ylabel() == "accuracy (%)"
    dark, light = (text.get_color() for text in axes.texts[:2])
    assert (dark, light) == ("white", "black")  # legible on viridis' dark and light ends


def test_a_heatmap_of_differences_has_signs_and_a_white_zero():
    axes = plots.plot_heatmap(pd.DataFrame([[0.2, -0.4, 7.0, -60.0]]), differences_to=10)
    assert [text.get_text() for text in axes.texts] == ["0", "0", "+7", "-60"]
    (picture,) = axes.get_images()
    assert picture.get_clim() == (-10, 10)
    assert min(picture.cmap(picture.norm(0.0))[:3]) > 0.95
    assert axes.texts[3].get_color() == "white"  # legible on the dark end


def test_images_are_shown_as_they_are_with_the_names_of_their_classes():
    data = images("vwxyz")
    grid = plots.plot_images(data, 5, columns=3)
    assert grid.shape == (2, 3)
    for i, axes in enumerate(grid.flat[:5]):
        assert np.array_equal(axes.get_images()[0].get_array(), data.images[i].permute(1, 2, 0).numpy())
        assert axes.get_title() == data.class_names[data.labels[i]]
    assert not grid.flat[5].has_data()
    assert plots.plot_images(data, 2).shape == (1, 2)  # no empty columns
    assert plots.plot_images(data.subset([0, 1, 2]), 12, titles=["a", "b", "c"])[0, 2].get_title() == "c"


def test_filters_are_tiles_each_stretched_to_its_own_range():
    sizes = torch.tensor([1e-3, 1, 1, 1, 1e3]).view(5, 1, 1, 1)
    weight = torch.randn(5, 3, 7, 7, generator=torch.Generator().manual_seed(0)) * sizes
    picture = plots.plot_filters(weight, columns=3).get_images()[0].get_array()
    assert picture.shape == (2 * 9, 3 * 9, 3)
    for tile in (picture[1:8, 1:8], picture[10:17, 10:17]):
        assert tile.min() == pytest.approx(0, abs=1e-6)
        assert tile.max() == pytest.approx(1, abs=1e-6)
    first = (weight[0] - weight[0].min()) / (weight[0].max() - weight[0].min())
    assert np.allclose(picture[1:8, 1:8], first.permute(1, 2, 0).numpy(), atol=1e-6)
    assert (picture[9:, 18:] == 1).all()  # the sixth place stays white
    assert not plots.plot_filters(torch.zeros(1, 3, 3, 3, requires_grad=True)).axison


@pytest.mark.parametrize("what", ["figure", "axes", "grid"])
def test_show_puts_the_alt_text_beside_the_picture_and_closes_the_figure(what, shell):
    figure, grid = plt.subplots(1, 2)
    with capture_output() as captured:
        plots.show({"figure": figure, "axes": grid[0], "grid": grid}[what], alt="two empty frames")
    (output,) = captured.outputs
    assert output.data["image/png"]
    assert output.metadata["image/png"]["alt"] == "two empty frames"
    assert not plt.fignum_exists(figure.number)


def test_show_takes_the_text_of_the_figure_itself_and_settings_of_the_figure(shell):
    axes = plots.plot_heatmap(TABLE)
    with capture_output() as captured:
        plots.show(axes, dpi=50, size_inches=(4, 2))
    (output,) = captured.outputs
    assert output.metadata["image/png"]["alt"] == description(axes)
    picture = Image.open(BytesIO(b64decode(output.data["image/png"])))
    assert picture.size == pytest.approx((4 * 50, 2 * 50), abs=20)  # the margin around the figure is cut
    assert picture.mode == "P"  # few colours: small in a stored notebook


@pytest.mark.parametrize("alt", [None, "", "  "])
def test_a_figure_without_alt_text_is_refused(alt):
    with pytest.raises(ValueError, match=r"alt must say what is to be seen.*describe_lines"):
        plots.show(plt.figure(), alt)


def test_a_reference_line_has_a_legend_entry_and_is_described():
    axes = plots.plot_by_layer(BY_LAYER, "moved")
    plots.reference_line(axes, "guessing", y=1.5625, ls=":")
    plots.reference_line(axes, "the middle", x=1, color="red")
    axes.legend()
    assert labels(axes) == ["guessing", "the middle"]
    assert [(line.get_color(), line.get_linestyle()) for line in axes.get_lines()] == [("black", ":"), ("red", "--")]
    assert description(axes).endswith("A horizontal line at 1.56 (guessing). A vertical line at 1 (the middle).")


def test_panels_have_a_title_each_and_share_the_longest_legend():
    gaps = dict.fromkeys(["first", "second", "third"], GAPS)
    for title, axes in plots.panels(gaps, columns=2, sharex=True):
        plots.plot_intervals(gaps[title], "a", axes, live=RUNS if title == "second" else None)
    figure = axes.figure
    assert [panel.get_title() for panel in figure.axes] == ["first", "second", "third", ""]
    plots.shared_legend(figure, ncols=2)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["run here, one seed", "10 recorded seeds, mean and 95 %"]
    assert not any(panel.get_legend() for panel in figure.axes)


def test_live_runs_are_drawn_as_differences_on_their_own_seed():
    axes = plots.plot_intervals(GAPS, "a", live=RUNS)
    crosses = [line for line in axes.get_lines() if line.get_marker() == "x"]
    assert [x for line in crosses for x in line.get_xdata()] == pytest.approx([10, 40])
    assert labels(axes) == ["run here, one seed", "10 recorded seeds, mean and 95 %"]


def test_curves_of_ordered_strategies_go_from_dark_to_light_and_rates_are_written_as_powers_of_ten():
    axes = plots.plot_curves(CURVES, "lr", ordered=True)
    lightness = [sum(line.get_color()[:3]) for line in axes.get_lines() if line.get_marker() in ("o", "s")]
    assert lightness == sorted(lightness)
    assert len(set(lightness)) == 2
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1e-3", "1e-2"]
    assert [plots.rate_text(value) for value in (0.00013, 0.5, 20, 0)] == ["1.3e-4", "0.5", "20", "0"]


def test_curves_go_through_the_means_and_hold_every_live_run():
    axes = plots.plot_curves(CURVES, "lr", live=CURVES[CURVES["seed"] == 2], label="rate")
    means = {line.get_marker(): list(line.get_ydata()) for line in axes.get_lines() if line.get_marker() in ("o", "s")}
    assert list(means.values()) == [pytest.approx([80, 80]), pytest.approx([60, 60])]
    crosses = [list(line.get_ydata()) for line in axes.get_lines() if line.get_marker() == "x" and len(line.get_ydata())]
    assert crosses == [pytest.approx([90, 90]), pytest.approx([70, 70])]
    assert (axes.get_xscale(), axes.get_xlabel()) == ("log", "rate")
    side_by_side = plots.plot_curves(CURVES.assign(lr=CURVES["lr"].map({1e-3: "low", 1e-2: "high"})), "lr")
    side_by_side.figure.canvas.draw()
    assert [tick.get_text() for tick in side_by_side.get_xticklabels()] == ["low", "high"]
