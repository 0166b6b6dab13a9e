"""Wrong answers to the exercises of notebook 07 that somebody could well give, and a right one beside the solution."""

import numpy as np
import pandas as pd
from scipy.stats import t

from layerlr_helpers.studies.results import winners


def interval(gaps=lambda way, baseline: (100 * (pd.Series(way) - pd.Series(baseline))).dropna(),
             half=lambda gaps: t.ppf(0.975, len(gaps) - 1) * gaps.std() / np.sqrt(len(gaps))):
    def paired_interval(way, baseline):
        differences = gaps(way, baseline)
        return differences.mean(), differences.mean() - half(differences), differences.mean() + half(differences)
    return paired_interval


def seeds_by_place(way, baseline):
    n = min(len(way), len(baseline))
    return 100 * (pd.Series(list(way.values())[:n]) - pd.Series(list(baseline.values())[:n]))


def a_lacking_seed_is_zero(way, baseline):
    return pd.Series([100 * (way.get(seed, 0) - baseline.get(seed, 0)) for seed in way | baseline])


def not_paired(way, baseline):
    a, b = 100 * np.array(list(way.values())), 100 * np.array(list(baseline.values()))
    mean = a.mean() - b.mean()
    half = t.ppf(0.975, len(a) + len(b) - 2) * np.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
    return mean, mean - half, mean + half


def only_the_mean(way, baseline):
    return 100 * np.mean([way[seed] - baseline[seed] for seed in way if seed in baseline])


def choice(rows=lambda runs: runs[runs["split"] == "validation"], score="mean", key="rates"):
    def chosen_rates(runs):
        scores = rows(runs).groupby(["strategy", "rates"], as_index=False)["accuracy"].agg(score)
        return scores.sort_values("accuracy").groupby("strategy").last()[key].to_dict()
    return chosen_rates


def one_choice_for_all(runs):
    return runs[runs["split"] == "validation"].groupby("rates")["accuracy"].mean().idxmax()


def the_worst(runs):
    means = runs[runs["split"] == "validation"].groupby(["strategy", "rates"], as_index=False)["accuracy"].mean()
    return means.sort_values("accuracy").groupby("strategy").first()["rates"].to_dict()


def faults(tries="nunique", seeds=frozenset, tested=("test",)):
    def unfair(runs):
        validation, test = runs[runs["split"] == "validation"], runs[runs["split"].isin(tested)]
        values = {"tries": validation.groupby("strategy")["rates"].agg(tries),
                  "seeds": test.groupby("strategy")["seed"].agg(seeds),
                  "steps": runs.groupby("strategy")["steps"].agg(frozenset)}
        return [name for name, of_each in values.items() if of_each.nunique() > 1]
    return unfair


def all_is_unfair(runs):
    return {"tries", "seeds", "steps"}


def in_other_words(runs):
    return {"number of tries"}


def yes_or_no(scores):
    best = max(scores, key=scores.get)
    return True if best in (min(scores), max(scores)) else None


def upper_edge_only(scores):
    rates = sorted(scores)
    return rates[-1] * rates[1] / rates[0] if scores[rates[-1]] == max(scores.values()) else None


def beyond(step, order=sorted):
    def next_try(scores):
        rates, best = list(order(scores)), max(scores, key=scores.get)
        if best == rates[0]:
            return step(rates[0], rates[1])
        return step(rates[-1], rates[-2]) if best == rates[-1] else None
    return next_try


def always_further_up(scores):
    rates = sorted(scores)
    return rates[-1] * rates[1] / rates[0]


WRONG = {
    "7.1": [not_paired, interval(gaps=lambda way, baseline: pd.Series(way) - pd.Series(baseline)),
            lambda way, baseline: interval()(baseline, way),
            interval(half=lambda gaps: 1.96 * gaps.std() / np.sqrt(len(gaps))),
            interval(half=lambda gaps: t.ppf(0.975, len(gaps) - 1) * gaps.std()),
            interval(half=lambda gaps: t.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=0) / np.sqrt(len(gaps))),
            interval(half=lambda gaps: t.ppf(0.95, len(gaps) - 1) * gaps.std() / np.sqrt(len(gaps))),
            interval(half=lambda gaps: -t.ppf(0.975, len(gaps) - 1) * gaps.std() / np.sqrt(len(gaps))),
            interval(gaps=seeds_by_place), interval(gaps=a_lacking_seed_is_zero), only_the_mean],
    "7.2": [choice(score="max"), choice(rows=lambda runs: runs[runs["split"] == "test"]), choice(rows=lambda runs: runs),
            choice(rows=lambda runs: runs[(runs["split"] == "validation") & (runs["seed"] == 0)]), choice(key="accuracy"),
            the_worst, one_choice_for_all],
    "7.3": [faults(tries="size"), faults(tries=frozenset), faults(seeds="nunique"), faults(tested=("validation", "test")),
            all_is_unfair, lambda runs: set(), in_other_words],
    "7.4": [yes_or_no, upper_edge_only, beyond(lambda edge, inner: edge), beyond(lambda edge, inner: 2 * edge - inner),
            beyond(lambda edge, inner: edge * edge / inner, order=list),
            beyond(lambda edge, inner: 3 * edge if edge > inner else edge / 3), beyond(lambda edge, inner: inner),
            always_further_up],
}

RIGHT = {"7.2": [winners]}
