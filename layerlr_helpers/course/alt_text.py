"""Figures in words: what a figure shows, in sentences for people who cannot see it.

Whoever draws into Axes adds sentences with :func:`describe`; they stay with the Axes in ``axes.alt_text``. :func:`alt_text`
joins those of a whole figure.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

ROOM = 540  # characters for the values that one description lists, so that with its first sentence it stays below 700


def describe(axes: Axes, *sentences: str) -> None:
    """Add sentences to the description of what is drawn in the Axes."""
    axes.alt_text = [*getattr(axes, "alt_text", []), *sentences]


def describe_lines(axes: Axes) -> None:
    """Describe all lines in the Axes that have a label; call it after ``axes.set``, whose labels it uses."""
    lines = [line for line in axes.get_lines()
             if not line.get_label().startswith("_") and line.get_transform() == axes.transData]  # not axhline and axvline
    if not lines:
        raise ValueError("no line here has a label to describe it with; pass label='...' to axes.plot")
    names = [axis.get_label_text() + (" (logarithmic)" if axis.get_scale() == "log" else "")
             for axis in (axes.yaxis, axes.xaxis)]
    describe(axes, f"Lines of {' over '.join(names)}.",
             listed([f"{line.get_label()}: {path(np.asarray(line.get_xdata()), line.get_ydata(orig=False), len(lines))}"
                     for line in lines]))


def alt_text(figure) -> str:
    """All descriptions in a figure: what several Axes share, once, then the rest of each, after its title."""
    described = [axes for axes in figure.axes if hasattr(axes, "alt_text")]
    counts = Counter(sentence for axes in described for sentence in axes.alt_text)
    parts = [sentence for sentence, count in counts.items() if count > 1]
    for number_of_panel, axes in enumerate(described, start=1):
        title = f"{' '.join(axes.get_title().split()) or f'Panel {number_of_panel}'}: " if len(described) > 1 else ""
        if rest := [sentence for sentence in axes.alt_text if counts[sentence] == 1]:
            parts.append(title + " ".join(rest))
    return " ".join(parts)


def number(value) -> str:
    """A number with three digits, or whole from 1000 on; anything else as it is printed."""
    if not isinstance(value, (int, float, np.number)):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def path(places: Iterable, values: Iterable[float], lines: int = 1) -> str:
    """The values along one of several ``lines`` in words: all if there is room, else the first, the extremes and the last."""
    points = pd.Series(np.asarray(values, dtype=float), index=list(places)).dropna()
    if points.empty:
        return "no value"
    if len(points) > 2 and points.nunique() == 1:
        return f"{number(points.iloc[0])} from {number(points.index[0])} to {number(points.index[-1])}"
    texts = [f"{number(value)} at {number(place)}" for place, value in points.items()]
    if len(", ".join(texts)) > ROOM / lines - 20:
        notes = {0: "", len(points) - 1: "", int(points.argmin()): " (lowest)", int(points.argmax()): " (highest)"}
        texts = [texts[i] + notes[i] for i in sorted(notes)]
    return ", ".join(texts)


def listed(items: Sequence[str], room: int = ROOM) -> str:
    """A sentence of the items; where there is no room for all, those before the last are left out and counted."""
    kept = list(items)
    while len(kept) > 2 and len("; ".join(kept)) > room:
        del kept[-2]
    if left_out := len(items) - len(kept):
        kept.insert(-1, f"{left_out} more")
    return "; ".join(kept) + "."
