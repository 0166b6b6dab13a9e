"""Choosing rates on validation images: every candidate on two seeds, the best few on five."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import pandas as pd

from layerlr_helpers.studies.results import ranked, winners

SEARCH_SEEDS = (0, 1)  # on which every candidate is tried
FINAL_SEEDS = (2, 3, 4)  # on which the best of them are tried as well


class Named(Protocol):
    """What can be a candidate."""

    name: str


@dataclass(frozen=True)
class Line(Sequence[Named]):
    """Candidates in the order of one number, such as the rate, of which the search begins with a few.

    As a sequence it is those that the search begins with. If the best of them is the lowest or the highest that was tried,
    the search takes the next one as well, until the best lies inside. A line of one candidate says that there is nothing to
    choose.

    Attributes:
        candidates: all of them, in order.
        first: the positions of those to begin with.
    """

    candidates: Sequence[Named]
    first: range

    def __getitem__(self, index: int) -> Named:
        return self.candidates[self.first[index]]

    def __len__(self) -> int:
        return len(self.first)


def every_candidate(given: Sequence[Named]) -> Sequence[Named]:
    """Return all candidates of a strategy, also those of a :class:`Line` that the search does not begin with."""
    return given.candidates if isinstance(given, Line) else given


def search(strategies: Mapping[str, Sequence[Named]], validate: Callable[[Sequence[tuple]], pd.DataFrame],
           finalists: int) -> dict[str, str]:
    """Return the name of the best candidate of each strategy, by successive halving (Jamieson and Talwalkar, 2016).

    ``validate`` gets tuples of strategy, candidate and seed, and returns the rows of these runs. It may be asked again for
    runs that it has made. With 0 ``finalists`` the choice falls after the first two seeds.
    """
    tried = {name: [each.name for each in given] for name, given in strategies.items()}
    in_final: dict[str, list[str]] = {name: [] for name in strategies}
    while True:
        searched = validate(_runs(tried, SEARCH_SEEDS))
        best = winners(searched)
        if finalists and not _one_further(strategies, tried, best):
            for name, rows in searched.groupby("strategy", sort=False):
                in_final[name] = list(dict.fromkeys([*in_final[name], *ranked(rows)["rates"][:finalists]]))
            best = winners(validate(_runs(in_final, SEARCH_SEEDS + FINAL_SEEDS)))
        if not (further := _one_further(strategies, tried, best)):
            return best
        tried |= further


def _runs(candidates: Mapping[str, Sequence[str]], seeds: Sequence[int]) -> list[tuple]:
    return [(name, rates, seed) for name in candidates for rates in candidates[name] for seed in seeds]


def _one_further(strategies: Mapping[str, Sequence[Named]], tried: Mapping[str, Sequence[str]],
                 best: Mapping[str, str]) -> dict[str, list[str]]:
    """Return, for each strategy whose best candidate is the last on its line that was tried, those and the next one."""
    further = {}
    for name, rates in tried.items():
        if isinstance(strategies[name], Line):
            line = [each.name for each in strategies[name].candidates]
            low, high = line.index(rates[0]), line.index(rates[-1])
            wider = line[max(low - (best[name] == rates[0]), 0):high + 1 + (best[name] == rates[-1])]
            if len(wider) > len(rates):
                further[name] = wider
    return further


def check_fair(strategies: Sequence[Named] | Mapping[str, Sequence[Named]]) -> None:
    """Raise a ValueError if the search begins with more candidates for one strategy than for another."""
    if not isinstance(strategies, Mapping):
        return
    numbers = {name: len(given) for name, given in strategies.items()
               if not (isinstance(given, Line) and len(given.candidates) == 1)}
    if len(set(numbers.values())) > 1:
        raise ValueError("a fair search has as many candidates for one strategy as for another, got "
                         + ", ".join(f"{number} for {name}" for name, number in numbers.items()))
