"""Fair timing on a noisy machine: the contestants take turns in one process, and the ratios of their medians are reported."""

from collections.abc import Callable, Mapping
from time import perf_counter

import pandas as pd


def alternately(tasks: Mapping[str, Callable[[], object]], *, repeats: int = 7, warmup: int = 1) -> pd.DataFrame:
    """Time each task ``repeats`` times, taking turns.

    Returns a row for each task: its median seconds, their ratio to the first task's, and the quartiles of that ratio.
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
