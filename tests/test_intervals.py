"""Intervals: numbers from the literature, and differences between runs that belong together."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerlr_helpers.intervals import accuracy_interval, interval_text, mean_interval, paired_intervals


@pytest.mark.parametrize(("correct", "total", "low", "high"), [  # Newcombe, 1998, table I, method 3
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)])
def test_the_interval_has_the_values_of_the_literature(correct, total, low, high):
    assert accuracy_interval(correct, total) == pytest.approx((low, high), abs=5e-5)


@given(total=st.integers(1, 5000), part=st.floats(0, 1))
def test_the_interval_is_where_the_score_test_would_just_not_reject(total, part):
    correct = round(part * total)
    low, high = accuracy_interval(correct, total)
    assert 0 <= low <= correct / total <= high <= 1
    assert low < high
    mirrored = accuracy_interval(total - correct, total)
    assert mirrored == pytest.approx((1 - high, 1 - low))
    z = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(0.975, dtype=torch.float64)).item()
    for end in {low, high} - {0.0, 1.0}:
        assert abs(correct / total - end) / (end * (1 - end) / total) ** 0.5 == pytest.approx(z, rel=1e-4)


@given(correct=st.integers(0, 50), more=st.integers(2, 20))
def test_more_images_narrow_the_interval(correct, more):
    (low, high), (narrow_low, narrow_high) = accuracy_interval(correct, 50), accuracy_interval(correct * more, 50 * more)
    assert narrow_high - narrow_low < high - low


@pytest.mark.parametrize(("correct", "total"), [(1, 0), (3, 2), (-1, 2)])
def test_an_interval_of_nothing_is_refused(correct, total):
    with pytest.raises(ValueError, match="must"):
        accuracy_interval(correct, total)


def scores(*named):
    return pd.DataFrame([{"strategy": name, "seed": seed, "split": split, "accuracy": accuracy(seed)}
                         for seed in range(10) for name, split, accuracy in named])


def test_intervals_are_of_differences_on_the_same_seeds():
    rows = scores(("hard", "test", lambda seed: 0.5 + seed / 20), ("better", "test", lambda seed: 0.51 + seed / 20),
                  ("mixed", "test", lambda seed: 0.6), ("hard", "validation", lambda seed: 0.0))
    table = paired_intervals(rows, "hard")
    assert list(table.index) == ["hard", "better", "mixed"]
    assert (table["seeds"] == 10).all()
    assert table.loc["better", ["difference", "low", "high"]].tolist() == pytest.approx([1, 1, 1])  # the seeds' spread is gone
    assert table.loc["better", "mean"] == pytest.approx(100 * (0.51 + 4.5 / 20))
    assert table.loc["hard", ["difference", "low", "high"]].tolist() == [0, 0, 0]
    assert table.loc["mixed", "low"] < table.loc["mixed", "difference"] < table.loc["mixed", "high"]


def test_intervals_of_what_was_not_tested_or_twice_are_refused():
    rows = scores(("hard", "test", lambda seed: 0.5), ("better", "test", lambda seed: 0.6))
    with pytest.raises(ValueError, match="no strategy 'easy' was tested, only better, hard"):
        paired_intervals(rows, "easy")
    with pytest.raises(ValueError, match="'better' and 'hard' were tested on different seeds"):
        paired_intervals(rows[(rows["strategy"] == "hard") == (rows["seed"] < 5)], "hard")
    with pytest.raises(ValueError, match="hard was tested more than once on a seed; choose the rows of one task"):
        paired_intervals(pd.concat([rows, rows[rows["strategy"] == "hard"].assign(task="other")]), "hard")


def test_the_interval_of_a_mean_holds_it_and_is_a_point_where_the_runs_are_the_same():
    same, spread = mean_interval([0.5] * 4), mean_interval([0.1, 0.4, 0.7, 0.8])
    assert same == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert spread["mean"] == pytest.approx(0.5)
    assert spread["high"] - 0.5 == pytest.approx(0.5 - spread["low"]) == pytest.approx(3.182 * 0.3162 / 2, rel=1e-3)
    assert mean_interval([0.5]) == {"mean": 0.5, "low": -math.inf, "high": math.inf}
    assert interval_text({"difference": 1.5, "low": -0.25, "high": 2}) == "+1.5 (-0.2 to +2.0)"


@pytest.mark.parametrize("draw", [lambda random: random.normal(size=10), lambda random: random.gamma(2, size=10) - 2,
                                  lambda random: random.standard_t(4, size=10)], ids=["normal", "skewed", "heavy tails"])
def test_about_95_of_100_intervals_hold_the_true_mean(draw):
    random = np.random.default_rng(0)
    intervals = [mean_interval(draw(random)) for _ in range(2000)]
    assert 0.92 < sum(each["low"] <= 0 <= each["high"] for each in intervals) / 2000 < 0.97
