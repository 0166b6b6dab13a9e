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
class Grid(Sequence[Named]):
    """Candidates on a grid of one number or more, such as the rate and the decay, of which the search begins with a few.

    As a sequence it is those that the search begins with. The search goes on until all neighbours of the best candidate have
    been tried, so that the best is at no edge but that of the grid. A grid of one candidate says that there is nothing to
    choose.

    Attributes:
        candidates: all of them, by their position along each axis.
        first: the positions of those to begin with.
    """

    candidates: Mapping[tuple[int, ...], Named]
    first: Sequence[tuple[int, ...]]

    def __getitem__(self, index: int) -> Named:
        return self.candidates[self.first[index]]

    def __len__(self) -> int:
        return len(self.first)

    def next_to(self, name: str) -> list[str]:
        """Return the names of those that are one step along one axis from a candidate."""
        here = next(position for position, each in self.candidates.items() if each.name == name)
        return [each.name for position, each in self.candidates.items()
                if sum(abs(there - i) for there, i in zip(position, here, strict=True)) == 1]


def every_candidate(given: Sequence[Named]) -> Sequence[Named]:
    """Return all candidates of a strategy, also those of a :class:`Grid` that the search does not begin with."""
    return list(given.candidates.values()) if isinstance(given, Grid) else given


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
        if finalists and not _neighbours(strategies, tried, best):
            for name, rows in searched.groupby("strategy", sort=False):
                in_final[name] = list(dict.fromkeys([*in_final[name], *ranked(rows)["rates"][:finalists]]))
            best = winners(validate(_runs(in_final, SEARCH_SEEDS + FINAL_SEEDS)))
        if not (further := _neighbours(strategies, tried, best)):
            return best
        tried = {name: [*rates, *further.get(name, ())] for name, rates in tried.items()}


def _runs(candidates: Mapping[str, Sequence[str]], seeds: Sequence[int]) -> list[tuple]:
    return [(name, rates, seed) for name in candidates for rates in candidates[name] for seed in seeds]


def _neighbours(strategies: Mapping[str, Sequence[Named]], tried: Mapping[str, Sequence[str]],
                best: Mapping[str, str]) -> dict[str, list[str]]:
    """Return, for each strategy on a grid, the neighbours of its best candidate that were not tried."""
    near = {name: [rates for rates in given.next_to(best[name]) if rates not in tried[name]]
            for name, given in strategies.items() if isinstance(given, Grid)}
    return {name: rates for name, rates in near.items() if rates}


def check_fair(strategies: Sequence[Named] | Mapping[str, Sequence[Named]]) -> None:
    """Raise a ValueError if the search begins with more candidates for one strategy than for another."""
    if not isinstance(strategies, Mapping):
        return
    numbers = {name: len(given) for name, given in strategies.items()
               if not (isinstance(given, Grid) and len(given.candidates) == 1)}
    if len(set(numbers.values())) > 1:
        raise ValueError("a fair search has as many candidates for one strategy as for another, got "
                         + ", ".join(f"{number} for {name}" for name, number in numbers.items()))
