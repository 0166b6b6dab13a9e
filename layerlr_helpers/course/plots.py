"""The course's figures: one function each, which draws into the Axes it is given (or new ones) and returns them.

Each function also writes down what it drew, in words. :func:`show` puts these words beside the picture, for people who
cannot see it.
"""

from base64 import b64encode
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import make_grid

from layerlr_helpers.course.alt_text import ROOM, alt_text, describe, describe_lines, listed, number, path
from layerlr_helpers.images import ImageSet
from layerlr_helpers.intervals import interval_text, mean_interval
from layerlr_helpers.range_test import RangeTest

COLOURS = [*plt.cm.tab10.colors[:2], *plt.cm.tab10.colors[4:]]  # of things in no order: tab10 without green and red
MARKERS = "osD^vPX*"


def depth_colours(n: int) -> list:
    """``n`` colours from dark (first layer) to light (head): the course's colours of depth."""
    return [plt.cm.viridis(x) for x in np.linspace(0.05, 0.85, n)]


def rate_text(value: float) -> str:
    """A number as a text, the small ones as rates are written: 1e-4 and not 0.0001.

    >>> rate_text(0.0003), rate_text(0.00013), rate_text(0.5), rate_text(20)
    ('3e-4', '1.3e-4', '0.5', '20')
    """
    if not 0 < abs(value) < 0.1:
        return f"{value:g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def show(figure_or_axes, alt: str | None = None, **settings) -> None:
    """Show a figure (given by itself, one of its Axes, or an array of them) in a notebook with a text alternative; close it.

    The text goes into the notebook's metadata, from where a rendered page takes it for people who do not see the picture.
    It is ``alt``, or else the descriptions in the Axes; a figure without any is a ValueError. ``settings`` change the
    figure before, such as ``dpi=70`` and ``size_inches=(7, 3)``. The picture has 256 colours, so that the notebook is small.
    """
    from IPython.core.pylabtools import print_figure
    from IPython.display import display

    figure = np.ravel(figure_or_axes)[0].figure
    alt = alt_text(figure) if alt is None else alt
    if not alt.strip():
        raise ValueError("alt must say what is to be seen in the figure, for those who do not see it: draw with a plots.plot_* "
                         "function, call plots.describe_lines(axes) or plots.describe(axes, '...') before, or pass alt='...'")
    figure.set(**settings)
    small = BytesIO()
    picture = Image.open(BytesIO(print_figure(figure))).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(small, "png", optimize=True)
    display({"image/png": b64encode(small.getvalue()).decode(), "text/plain": str(figure)}, raw=True,
            metadata={"image/png": {"alt": alt}})
    plt.close(figure)


def reference_line(axes: Axes, label: str, *, x: float | None = None, y: float | None = None, **style) -> None:
    """Draw and describe a straight line across the Axes, at ``x`` or at ``y``; make the legend, if any, afterwards."""
    draw, place, direction = (axes.axhline, y, "horizontal") if x is None else (axes.axvline, x, "vertical")
    draw(place, label=label, **{"color": "black", "ls": "--"} | style)
    describe(axes, f"A {direction} line at {number(place)} ({label}).")


def panels(titles: Iterable[str], *, columns: int | None = None, **subplots) -> Iterator[tuple[str, Axes]]:
    """One new figure with Axes for each title, ``columns`` of them side by side (all, if None): gives (title, Axes) pairs.

    ``subplots`` are options of ``plt.subplots``, such as ``figsize`` and ``sharey``.
    """
    titles = list(titles)
    columns = columns or len(titles)
    _, grid = plt.subplots(-(-len(titles) // columns), columns, squeeze=False, layout="constrained", **subplots)
    for title, axes in zip(titles, grid.flat, strict=False):
        axes.set_title(title)
        yield title, axes


def shared_legend(figure, loc: str = "outside lower center", **options) -> None:
    """Put one legend beside all panels, that of the panel with the most entries, and remove the panels' legends."""
    handles, labels = max((axes.get_legend_handles_labels() for axes in figure.axes), key=lambda entries: len(entries[1]))
    for axes in figure.axes:
        if axes.get_legend() is not None:
            axes.get_legend().remove()
    figure.legend(handles, labels, loc=loc, fontsize=9, **options)


def plot_images(data: ImageSet, n: int = 12, *, columns: int = 12, titles: Sequence[str] | None = None) -> np.ndarray:
    """The first ``n`` images with the names of their classes, or with ``titles``; returns the array of Axes."""
    n = min(n, len(data))
    columns = min(columns, n)
    rows = -(-n // columns)
    titles = titles if titles is not None else [data.class_names[label] for label in data.labels[:n].tolist()]
    _, grid = plt.subplots(rows, columns, figsize=(columns * 1.15, rows * 1.4), squeeze=False, layout="constrained")
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, title in zip(grid.flat, data.images[:n], titles, strict=False):
        axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_title(title, fontsize=9)
    height, width = data.images.shape[-2:]
    describe(grid[0, 0], f"{n} pictures of {height} by {width} pixels, {columns} in a row, with a title above each.",
             listed(titles[:n]))
    return grid


def filter_smoothness(weight: Tensor) -> Tensor:
    """For each filter [N, 3, k, k], the correlation of neighbouring pixels: near 0 for noise, near 1 for a smooth picture."""
    w = weight.detach() - weight.detach().mean((2, 3), keepdim=True)
    along = (w[..., 1:] * w[..., :-1]).sum((1, 2, 3)) + (w[..., 1:, :] * w[..., :-1, :]).sum((1, 2, 3))
    return along / (2 * w.square().sum((1, 2, 3)))


def plot_filters(weight: Tensor, *, columns: int = 16) -> Axes:
    """The kernels [N, 3, k, k] of a first convolution as little pictures, each stretched to its own range."""
    weight = weight.detach()
    low, high = weight.amin((1, 2, 3), keepdim=True), weight.amax((1, 2, 3), keepdim=True)
    tiles = F.pad((weight - low) / (high - low).clamp_min(1e-12), (1, 1, 1, 1), value=1.0)
    axes = _axes(None, columns * 0.5, -(-len(tiles) // columns) * 0.5, grid=None)
    axes.imshow(make_grid(tiles, nrow=columns, padding=0, pad_value=1.0).permute(1, 2, 0).numpy())
    axes.axis("off")
    smooth = int((filter_smoothness(weight) > 0.2).sum())
    describe(axes, f"{len(weight)} filters as small colour pictures, {columns} in a row. {smooth} are smooth, with light and "
                   "dark sides or bars (neighbouring pixels correlate above 0.2); the others look like noise.")
    return axes


def plot_rates(frame: pd.DataFrame, axes: Axes | None = None) -> Axes:
    """Learning rates over steps, one line per group: a frame from ``preview``, or ``History.to_frame()``.

    Steps at which a group is frozen (rate 0) are left out of its line.
    """
    axes = _axes(axes)
    columns = [name for name in frame if str(name).startswith("lr/")] or list(frame)
    steps = frame.get("step", frame.index)
    for name, colour in zip(columns, depth_colours(len(columns)), strict=True):
        axes.plot(steps, frame[name].where(frame[name] > 0), label=str(name).removeprefix("lr/"), color=colour, lw=2)
    axes.set(xlabel="step", ylabel="learning rate", yscale="log")
    axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5), title="group", reverse=True)
    describe_lines(axes)
    return axes


def plot_range_test(result: RangeTest, axes: Axes | None = None) -> Axes:
    """The losses of an ``lr_range_test`` over the factor on the rates, with a line at the suggested one, if there is one."""
    axes = _axes(axes)
    axes.plot(result.frame["factor"], result.frame["loss"], color="tab:blue", alpha=0.3, label="each batch")
    axes.plot(result.frame["factor"], result.frame["smooth_loss"], color="tab:blue", label="smoothed")
    axes.set(xscale="log", xlabel="factor on the rates", ylabel="cross-entropy (nats)")
    describe_lines(axes)
    if np.isfinite(result.suggestion):
        reference_line(axes, f"suggested: {result.suggestion:.2g}", x=result.suggestion, color="tab:orange")
    axes.legend(fontsize=9)
    return axes


def plot_probes(frame: pd.DataFrame, axes: Axes | None = None) -> Axes:
    """Probe accuracy by layer, one line per target, with two standard errors and the level of chance (dotted)."""
    axes = _axes(axes)
    targets = frame.groupby("target", sort=False)
    items = []
    for (target, rows), colour, marker in zip(targets, cycle(COLOURS), cycle(MARKERS), strict=False):
        chance = 100 * rows["chance"].iloc[0]
        axes.errorbar(rows["layer"], 100 * rows["accuracy"], 200 * rows["standard_error"], color=colour,
                      marker=marker, capsize=3, label=target)
        axes.axhline(chance, color=colour, ls=":", lw=1)
        items.append(f"{target}: {path(rows['layer'], 100 * rows['accuracy'], len(targets))}, chance {number(chance)}")
    axes.set(xlabel="layer that the probe reads", ylabel="probe accuracy (%)", ylim=(0, 102))
    axes.legend(fontsize=9)
    describe(axes, "Probe accuracy (%) by the layer that the probe reads, one line for each target.", listed(items))
    return axes


def plot_by_layer(frame: pd.DataFrame, value: str, axes: Axes | None = None, *, label: str | None = None) -> Axes:
    """One bar a group of a frame with a ``group`` column, such as ``layer_statistics``."""
    axes = _axes(axes, grid="y")
    axes.bar(frame["group"], frame[value], color=depth_colours(len(frame)))
    axes.set(xlabel="layer group", ylabel=label or value)
    describe(axes, f"Bars of {label or value}, one for each layer group.", f"{path(frame['group'], frame[value])}.")
    return axes


def plot_comparison(frame: pd.DataFrame, axes: Axes | None = None) -> Axes:
    """Each run's accuracy as a dot, each strategy's mean as a bar of ink; the strategies in the frame's order."""
    runs = {strategy: 100 * rows["accuracy"] for strategy, rows in frame.groupby("strategy", sort=False)}
    axes = _axes(axes, 7, 0.5 * len(runs) + 1.2, grid="x")
    for y, values in enumerate(runs.values()):
        axes.plot(values, np.full(len(values), y), "o", color="tab:blue", alpha=0.6, label="one run" if y == 0 else None)
        axes.plot([values.mean()] * 2, [y - 0.3, y + 0.3], color="black", lw=2, label="mean" if y == 0 else None)
    axes.set(yticks=range(len(runs)), yticklabels=runs, xlabel="accuracy (%)")
    axes.invert_yaxis()
    axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    describe(axes, f"Each run's accuracy (%) as a dot and each strategy's mean as a bar, {len(frame)} runs in all.",
             "Means, with the lowest and the highest run: " + listed(
                 [f"{name} {number(values.mean())} ({number(values.min())} to {number(values.max())})"
                  for name, values in runs.items()]))
    return axes


def plot_intervals(table: pd.DataFrame, baseline: str, axes: Axes | None = None, *, live: pd.DataFrame | None = None) -> Axes:
    """The differences of ``paired_intervals`` with their intervals, and a line at the baseline.

    ``live``, the frame of a ``compare`` that has the baseline too, adds a cross for each run: the difference on its seed.
    """
    rows = table.drop(index=baseline)
    axes = _axes(axes, 7, 0.35 * len(rows) + 1.2, grid="x")
    place = {name: i for i, name in enumerate(rows.index)}
    recorded = f"{rows['seeds'].max()} recorded seeds, mean and 95 %"
    axes.errorbar(rows["difference"], list(place.values()),
                  xerr=[rows["difference"] - rows["low"], rows["high"] - rows["difference"]],
                  fmt="o", color="tab:blue", capsize=3, label=recorded)
    describe(axes, f"Accuracy minus that of {baseline} on the same seeds, in points: {recorded} interval, and a line at 0.",
             listed([f"{name} {interval_text(row)}" for name, row in rows.iterrows()], ROOM - 100))
    if live is not None:
        runs = 100 * live.pivot(index="seed", columns="strategy", values="accuracy")
        gaps = runs.sub(runs[baseline], axis=0).drop(columns=baseline).melt(var_name="strategy").dropna()
        below = gaps["strategy"].map(place) + 0.25  # beside the interval, not under it
        axes.plot(gaps["value"], below, "x", color="tab:orange", label="run here, one seed")
        axes.legend(fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
        crosses = [f"{name} {' and '.join(f'{value:+.1f}' for value in values)}"
                   for name, values in gaps.groupby("strategy", sort=False)["value"] if name in place]
        describe(axes, "Crosses, one seed run here: " + listed(crosses, room=150))
    axes.axvline(0, color="black", lw=1)
    axes.set(xlabel=f"accuracy minus that of {baseline} on the same seeds (points)", ylim=(len(rows) - 0.5, -0.5),
             yticks=list(place.values()), yticklabels=place)
    return axes


def plot_curves(rows: pd.DataFrame, x: str, axes: Axes | None = None, *, live: pd.DataFrame | None = None,
                label: str | None = None, ordered: bool = False) -> Axes:
    """Accuracy over the column ``x``, one line per strategy: the mean of its runs with the interval of ``mean_interval``.

    Numbers are put on a logarithmic axis, anything else side by side. ``live`` are further runs, drawn as crosses. If the
    strategies are ``ordered``, such as decays from weak to strong, their colours go from dark to light.
    """
    axes = _axes(axes)
    strategies = rows.groupby("strategy", sort=False)
    colours = cycle(depth_colours(len(strategies)) if ordered else COLOURS)
    items, crosses = [], []
    for (strategy, runs), colour, marker in zip(strategies, colours, cycle(MARKERS), strict=False):
        means = pd.DataFrame({place: mean_interval(100 * same["accuracy"]) for place, same in runs.groupby(x, sort=False)}).T
        axes.errorbar(means.index, means["mean"], [means["mean"] - means["low"], means["high"] - means["mean"]],
                      color=colour, marker=marker, ms=5, capsize=3, label=strategy)
        items.append(f"{strategy}: {path(means.index, means['mean'], len(strategies))}")
        if live is not None and not (live_runs := live[live["strategy"] == strategy]).empty:
            axes.plot(live_runs[x], 100 * live_runs["accuracy"], "x", color=colour, ms=8)
            crosses.append(f"{strategy} {path(live_runs[x], 100 * live_runs['accuracy'])}")
    axes.set(xlabel=label or x, ylabel="test accuracy (%)")
    describe(axes, f"Test accuracy (%) over {label or x}, one line for each strategy: mean and 95 %.",
             listed(items, ROOM - 100))
    if live is not None:
        axes.plot([], [], "x", color="black", label="run here, one seed")
        describe(axes, "Crosses, one seed run here: " + listed(crosses, room=150))
    if pd.api.types.is_numeric_dtype(rows[x]):  # setting any scale, even "linear", would wipe the names of categories
        axes.set_xscale("log")
        axes.set_xticks(ticks := sorted(rows[x].unique()), [rate_text(value) for value in ticks])
        axes.minorticks_off()
    axes.legend(fontsize=9)
    return axes


def plot_heatmap(table: pd.DataFrame, axes: Axes | None = None, *, label: str = "accuracy (%)",
                 differences_to: float | None = None) -> Axes:
    """A table of numbers as coloured cells with the numbers, rounded to whole ones, in them; missing ones stay empty.

    With ``differences_to`` the numbers are differences: they have their sign, 0 is white, and one colour goes up to that
    number, the other down to its negative.
    """
    axes = _axes(axes, 1.1 * table.shape[1] + 2, 0.5 * table.shape[0] + 1.3, grid=None)
    numbers = table.to_numpy(dtype=float)
    if differences_to is None:
        picture = axes.imshow(numbers, aspect="auto", cmap="viridis")
    else:
        picture = axes.imshow(numbers, aspect="auto", cmap="PuOr_r", vmin=-differences_to, vmax=differences_to)
    for (row, column), value in np.ndenumerate(numbers):
        if not np.isnan(value):
            text = f"{value:.0f}" if differences_to is None else f"{value:+.0f}".replace("-0", "0").replace("+0", "0")
            red, green, blue, _ = picture.cmap(picture.norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            axes.text(column, row, text, ha="center", va="center", color="white" if dark else "black")
    axes.set(xticks=range(table.shape[1]), xticklabels=table.columns, yticks=range(table.shape[0]), yticklabels=table.index)
    axes.figure.colorbar(picture, ax=axes, label=label, extend="neither" if differences_to is None else "both")
    describe(axes, f"A table in colours of {label}, {table.shape[0]} rows and {table.shape[1]} columns.",
             listed([f"{name}: {path(row.index, row, len(table))}" for name, row in table.iterrows()]))
    return axes


def _axes(axes: Axes | None, width: float = 7, height: float = 4, *, grid: str | None = "both") -> Axes:
    """The Axes, or else new ones of that many inches, with a light grid along "x", "y" or "both"."""
    axes = axes if axes is not None else plt.subplots(figsize=(width, height), layout="constrained")[1]
    if grid:
        axes.grid(alpha=0.3, axis=grid)
    return axes
