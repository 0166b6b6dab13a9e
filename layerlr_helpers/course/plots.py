"""The course's figures: one function each, which draws into the Axes it is given (or new ones) and returns them."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from torch import Tensor

from layerlr_helpers.images import ImageSet
from layerlr_helpers.intervals import mean_interval
from layerlr_helpers.range_test import RangeTest


def depth_colours(n: int) -> list:
    """``n`` colours from dark (first layer) to light (head): the course's colours of depth."""
    return [plt.cm.viridis(x) for x in np.linspace(0.05, 0.85, n)]


def show(figure_or_axes, alt: str) -> None:
    """Show a figure in a notebook with a text alternative, and close it.

    The text goes into the notebook's metadata, from where a rendered page takes it for people who do not see the picture.

    Raises:
        ValueError: an empty text.
    """
    from IPython.display import display

    if not alt.strip():
        raise ValueError("alt must say what is to be seen in the figure, for those who do not see it")

    first = figure_or_axes if not isinstance(figure_or_axes, (np.ndarray, list, tuple)) else np.ravel(figure_or_axes)[0]
    figure = getattr(first, "figure", first)
    display(figure, metadata={"image/png": {"alt": alt}})
    plt.close(figure)


def _axes(axes: Axes | None, width: float = 7, height: float = 4) -> Axes:
    return axes if axes is not None else plt.subplots(figsize=(width, height), layout="constrained")[1]


def plot_images(data: ImageSet, n: int = 12, *, columns: int = 12, titles: Sequence[str] | None = None) -> np.ndarray:
    """The first ``n`` images with the names of their classes; returns the array of Axes."""
    n = min(n, len(data))
    columns = min(columns, n)
    rows = -(-n // columns)
    _, grid = plt.subplots(rows, columns, figsize=(columns * 0.85, rows * 1.05), squeeze=False, layout="constrained")
    for i, axes in enumerate(grid.flat):
        axes.axis("off")
        if i < n:
            axes.imshow(data.images[i].permute(1, 2, 0).numpy())
            axes.set_title(titles[i] if titles is not None else data.class_names[int(data.labels[i])], fontsize=8)
    return grid


def plot_filters(weight: Tensor, *, columns: int = 16) -> Axes:
    """The kernels [N, 3, k, k] of a first convolution as little pictures, each stretched to its own range."""
    low, high = weight.detach().amin((1, 2, 3), keepdim=True), weight.detach().amax((1, 2, 3), keepdim=True)
    tiles = torch.nn.functional.pad((weight.detach() - low) / (high - low).clamp_min(1e-12), (1, 1, 1, 1), value=1.0)
    rows = -(-len(tiles) // columns)
    tiles = torch.cat([tiles, torch.ones(rows * columns - len(tiles), *tiles.shape[1:])])
    k = tiles.shape[-1]
    picture = tiles.view(rows, columns, 3, k, k).permute(0, 3, 1, 4, 2).reshape(rows * k, columns * k, 3)
    axes = _axes(None, columns * 0.5, rows * 0.5)
    axes.imshow(picture.numpy())
    axes.axis("off")
    return axes


def plot_rates(frame: pd.DataFrame, axes: Axes | None = None, *, log: bool = True) -> Axes:
    """Learning rates over steps, one line a group: a frame from ``preview``, or ``History.to_frame()``.

    Steps at which a group is frozen (rate 0) are left out of its line.
    """
    axes = _axes(axes)
    columns = [name for name in frame if str(name).startswith("lr/")] or list(frame)
    steps = frame.get("step", frame.index)
    for name, colour in zip(columns, depth_colours(len(columns)), strict=True):
        axes.plot(steps, frame[name].where(frame[name] > 0), label=str(name).removeprefix("lr/"), color=colour, lw=2)
    axes.set(xlabel="step", ylabel="learning rate", yscale="log" if log else "linear")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), title="group", reverse=True)
    return axes


def plot_history(frame: pd.DataFrame, axes: Axes | None = None, *, smooth: int = 10) -> Axes:
    """Training loss over steps, as it was and averaged over ``smooth`` steps, with the validation loss if there is one."""
    axes = _axes(axes)
    axes.plot(frame["step"], frame["loss"], color="tab:blue", alpha=0.3, label="train, each batch")
    axes.plot(frame["step"], frame["loss"].rolling(smooth, min_periods=1).mean(), color="tab:blue",
              label=f"train, mean of {smooth}")
    if "val_loss" in frame:
        seen = frame[frame["val_loss"].notna()]
        axes.plot(seen["step"], seen["val_loss"], "o-", color="tab:orange", label="validation")
    axes.set(xlabel="step", ylabel="cross-entropy (nats)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return axes


def plot_range_test(result: RangeTest, axes: Axes | None = None) -> Axes:
    """The losses of an ``lr_range_test`` over the factor on the rates, with a line at the suggested one, if there is one."""
    axes = _axes(axes)
    axes.plot(result.frame["factor"], result.frame["loss"], color="tab:blue", alpha=0.3, label="each batch")
    axes.plot(result.frame["factor"], result.frame["smooth_loss"], color="tab:blue", label="smoothed")
    if np.isfinite(result.suggestion):
        axes.axvline(result.suggestion, color="tab:orange", ls="--", label=f"suggested: {result.suggestion:.2g}")
    axes.set(xscale="log", xlabel="factor on the rates", ylabel="cross-entropy (nats)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return axes


def plot_probes(frame: pd.DataFrame, axes: Axes | None = None) -> Axes:
    """Probe accuracy by layer, one line a target, with two standard errors and the level of chance (dotted)."""
    axes = _axes(axes)
    for (target, rows), colour in zip(frame.groupby("target", sort=False), plt.cm.tab10.colors, strict=False):
        axes.errorbar(rows["layer"], 100 * rows["accuracy"], 200 * rows["standard_error"], color=colour, marker="o",
                      capsize=3, label=target)
        axes.axhline(100 * rows["chance"].iloc[0], color=colour, ls=":", lw=1)
    axes.set(xlabel="layer that the probe reads", ylabel="probe accuracy (%)", ylim=(0, 102))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return axes


def plot_by_layer(frame: pd.DataFrame, value: str, axes: Axes | None = None, *, label: str | None = None,
                  log: bool = False) -> Axes:
    """One bar a group of a frame with a ``group`` column, such as ``layer_statistics``."""
    axes = _axes(axes)
    axes.bar(frame["group"], frame[value], color=depth_colours(len(frame)))
    axes.set(xlabel="layer group", ylabel=label or value, yscale="log" if log else "linear")
    axes.grid(alpha=0.3, axis="y")
    return axes


def plot_comparison(frame: pd.DataFrame, axes: Axes | None = None, *, value: str = "accuracy") -> Axes:
    """Each run as a dot, each strategy's mean as a bar of ink; the strategies in the frame's order.

    ``value`` is a column of the frame; accuracies (0..1) are drawn in percent.
    """
    strategies = list(dict.fromkeys(frame["strategy"]))
    axes = _axes(axes, 7, 0.5 * len(strategies) + 1.2)
    scale = 100 if value == "accuracy" else 1
    label = {"accuracy": "accuracy (%)", "loss": "cross-entropy (nats)", "seconds": "training time (s)"}.get(value, value)
    for y, strategy in enumerate(strategies):
        values = scale * frame.loc[frame["strategy"] == strategy, value]
        axes.plot(values, np.full(len(values), y), "o", color="tab:blue", alpha=0.6, label="one run" if y == 0 else None)
        axes.plot([values.mean()] * 2, [y - 0.3, y + 0.3], color="black", lw=2, label="mean" if y == 0 else None)
    axes.set(yticks=range(len(strategies)), yticklabels=strategies, xlabel=label)
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return axes


def plot_intervals(table: pd.DataFrame, baseline: str, axes: Axes | None = None, *, live: pd.DataFrame | None = None) -> Axes:
    """The differences of ``results.paired_intervals`` with their intervals, and a line at the baseline.

    ``live``, the frame of a ``compare`` that has the baseline too, adds a cross for each run: the difference on its seed.
    """
    rows = table.drop(index=baseline)
    axes = _axes(axes, 7, 0.35 * len(rows) + 1.2)
    place = {name: i for i, name in enumerate(rows.index)}
    axes.errorbar(rows["difference"], list(place.values()),
                  xerr=[rows["difference"] - rows["low"], rows["high"] - rows["difference"]],
                  fmt="o", color="tab:blue", capsize=3, label=f"{rows['seeds'].max()} recorded seeds, mean and 95 %")
    if live is not None:
        runs = 100 * live.pivot(index="seed", columns="strategy", values="accuracy")
        gaps = runs.sub(runs[baseline], axis=0).drop(columns=baseline).melt(var_name="strategy").dropna()
        below = gaps["strategy"].map(place) + 0.25  # beside the interval, not under it
        axes.plot(gaps["value"], below, "x", color="tab:orange", label="run here, one seed")
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    axes.axvline(0, color="black", lw=1)
    axes.set(xlabel=f"accuracy minus that of {baseline} on the same seeds (points)", ylim=(len(rows) - 0.5, -0.5))
    axes.set_yticks(list(place.values()), list(place))
    axes.grid(alpha=0.3, axis="x")
    return axes


def plot_curves(rows: pd.DataFrame, x: str, axes: Axes | None = None, *, live: pd.DataFrame | None = None,
                label: str | None = None) -> Axes:
    """Accuracy over the column ``x``, one line a strategy: the mean of its runs with a 95 % interval (bootstrap over runs).

    Numbers are put on a logarithmic axis, anything else side by side. ``live`` are further runs, drawn as crosses.
    """
    axes = _axes(axes)
    for (strategy, runs), colour in zip(rows.groupby("strategy", sort=False), plt.cm.tab10.colors, strict=False):
        means = pd.DataFrame({at: mean_interval(100 * of_it["accuracy"]) for at, of_it in runs.groupby(x, sort=False)}).T
        axes.errorbar(means.index, means["mean"], [means["mean"] - means["low"], means["high"] - means["mean"]],
                      color=colour, marker="o", ms=4, capsize=3, label=strategy)
        if live is not None:
            mine = live[live["strategy"] == strategy]
            axes.plot(mine[x], 100 * mine["accuracy"], "x", color=colour, ms=8)
    if live is not None:
        axes.plot([], [], "x", color="black", label="run here, one seed")
    axes.set(xlabel=label or x, ylabel="test accuracy (%)")
    if pd.api.types.is_numeric_dtype(rows[x]):  # setting any scale, even "linear", would wipe the names of categories
        axes.set_xscale("log")
        axes.set_xticks(ticks := sorted(rows[x].unique()), [f"{value:g}" for value in ticks])
        axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return axes


def plot_heatmap(table: pd.DataFrame, axes: Axes | None = None, *, label: str = "accuracy (%)") -> Axes:
    """A table of numbers as coloured cells with the numbers, rounded to whole ones, in them; missing ones stay empty."""
    axes = _axes(axes, 1.1 * table.shape[1] + 2, 0.5 * table.shape[0] + 1.3)
    picture = axes.imshow(table.to_numpy(dtype=float), aspect="auto", cmap="viridis")
    middle = np.nanmean(picture.get_clim())
    for (row, column), number in np.ndenumerate(table.to_numpy(dtype=float)):
        if not np.isnan(number):
            axes.text(column, row, f"{number:.0f}", ha="center", va="center", color="black" if number > middle else "white")
    axes.set(xticks=range(table.shape[1]), xticklabels=table.columns, yticks=range(table.shape[0]), yticklabels=table.index)
    axes.figure.colorbar(picture, ax=axes, label=label)
    return axes
