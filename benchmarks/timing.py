"""Fair timing on a noisy machine: alternate the contestants in one process and report ratios of medians."""

from collections.abc import Callable, Mapping
from time import perf_counter

import pandas as pd


def alternately(tasks: Mapping[str, Callable[[], object]], *, repeats: int = 7, warmup: int = 1) -> pd.DataFrame:
    """Time each task ``repeats`` times, taking turns; one row a task: median seconds, ratio to the first, its range.

    The range is of the ratios round by round, from the lower to the upper quartile.
    """
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(warmup + repeats):
        for name, task in tasks.items():
            start = perf_counter()
            task()
            if turn >= warmup:
                times[name].append(perf_counter() - start)
    frame = pd.DataFrame(times)
    ratios = frame.div(frame.iloc[:, 0], axis=0)
    return pd.DataFrame({"seconds": frame.median(), "ratio": frame.median() / frame.iloc[:, 0].median(),
                         "lower": ratios.quantile(0.25), "upper": ratios.quantile(0.75)})
