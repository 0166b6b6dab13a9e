"""The search for rates: who is tried on how many seeds, how far a grid is followed, and what is fair."""

from dataclasses import dataclass

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerlr_helpers.studies.search import FINAL_SEEDS, SEARCH_SEEDS, Grid, check_fair, every_candidate, search


@dataclass(frozen=True)
class Candidate:
    name: str


def candidates(*names):
    return [Candidate(name) for name in names]


def line(names, first):
    """A grid of one axis, of which the search begins with the positions in ``first``."""
    return Grid({(i,): each for i, each in enumerate(candidates(*names))}, [(i,) for i in first])


def validate_by(accuracy, asked):
    """Runs without training: ``accuracy(candidate, seed)``; what was asked for is appended to ``asked``."""
    def validate(runs):
        asked.extend(run for run in runs if run not in asked)
        return pd.DataFrame([{"split": "validation", "strategy": name, "rates": rates, "seed": seed, "loss": 1.0,
                              "accuracy": accuracy(rates, seed)} for name, rates, seed in runs])

    return validate


def test_every_candidate_is_tried_on_two_seeds_and_the_best_three_on_five():
    asked = []
    best = search({"a": candidates("1", "2", "3", "4", "5")}, validate_by(lambda rates, seed: int(rates) / 10, asked), 3)
    assert best == {"a": "5"}
    assert set(asked) == ({("a", rates, seed) for rates in "12345" for seed in SEARCH_SEEDS}
                          | {("a", rates, seed) for rates in "345" for seed in FINAL_SEEDS})


def test_further_seeds_can_change_the_choice_unless_there_are_no_finalists():
    def accuracy(rates, seed):
        return 0.9 - 0.3 * seed if rates == "lucky" else 0.7

    given = {"a": candidates("steady", "lucky")}
    assert search(given, validate_by(accuracy, []), 2) == {"a": "steady"}
    assert search(given, validate_by(accuracy, []), 0) == {"a": "lucky"}


@given(peak=st.integers(0, 9), first=st.integers(0, 7), finalists=st.sampled_from([0, 2, 3]))
def test_a_line_is_followed_until_its_best_lies_inside(peak, first, finalists):
    asked = []
    best = search({"a": line(map(str, range(10)), range(first, first + 3))},
                  validate_by(lambda rates, seed: 1 - abs(int(rates) - peak) / 10, asked), finalists)
    tried = {int(rates) for _, rates, _ in asked}
    assert best == {"a": str(peak)}
    assert {peak - 1, peak, peak + 1} & set(range(10)) <= tried
    assert tried == set(range(min(tried), max(tried) + 1))


@given(peak=st.tuples(st.integers(0, 4), st.integers(0, 4)), finalists=st.sampled_from([0, 2, 3]),
       first=st.sets(st.sampled_from(["02", "13", "22", "41"]), min_size=1))
def test_with_two_numbers_the_search_goes_on_until_all_neighbours_of_the_best_were_tried(peak, first, finalists):
    points = {(i, j): Candidate(f"{i}{j}") for i in range(5) for j in range(5)}
    grid = Grid(points, [(int(i), int(j)) for i, j in sorted(first)])
    asked = []
    best = search({"a": grid}, validate_by(
        lambda rates, seed: 1 - (abs(int(rates[0]) - peak[0]) + abs(int(rates[1]) - peak[1])) / 10, asked), finalists)
    tried = {rates for _, rates, _ in asked}
    assert best == {"a": f"{peak[0]}{peak[1]}"}
    assert first | set(grid.next_to(best["a"])) <= tried
    assert all(rates in first or any(rates in grid.next_to(other) for other in tried) for rates in tried)


def test_a_candidate_that_five_seeds_put_at_the_edge_widens_the_line_too():
    ranks = {"0": 0.1, "1": 0.5, "2": 0.6, "3": 0.5}
    asked = []
    best = search({"a": line("012345", range(1, 4))},
                  validate_by(lambda rates, seed: ranks.get(rates, 0) + (rates == "1") * (seed > 1), asked), 3)
    assert best == {"a": "1"}
    assert ("a", "0", 0) in asked


def test_a_grid_is_a_sequence_of_what_the_search_begins_with():
    given = line("abcd", range(1, 3))
    assert [each.name for each in given] == ["b", "c"]
    assert [each.name for each in every_candidate(given)] == ["a", "b", "c", "d"]
    assert every_candidate(list(given)) == list(given)


def test_neighbours_are_one_step_away_along_one_axis():
    grid = Grid({(i, j): Candidate(f"{i}{j}") for i in range(3) for j in range(2)}, [(0, 0)])
    assert grid.next_to("10") == ["00", "11", "20"]
    assert grid.next_to("01") == ["00", "11"]


def test_a_fair_search_begins_with_as_many_candidates_for_all():
    two = candidates("1", "2")
    check_fair({"a": two, "b": line("123", range(2)), "nothing to choose": line("0", range(1))})
    with pytest.raises(ValueError, match=r"as many candidates .* got 2 for a, 1 for b"):
        check_fair({"a": two, "b": candidates("1")})
