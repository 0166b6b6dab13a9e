"""Checks of the exercises of notebook 07, on fair comparisons."""

import math
from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
from torch import Tensor

from layerlr_helpers.course.exercises.exercise import Exercise, require, require_function, require_returned, require_same, same


def _accuracies(seeds: range, seed: int) -> tuple[dict[int, float], dict[int, float]]:
    """Two ways on these seeds. Some seeds are harder than others, for both ways alike."""
    draw = np.random.default_rng(seed)
    hard = draw.normal(0.8, 0.05, len(seeds))
    return ({s: float(a) for s, a in zip(seeds, hard + draw.normal(0.02, 0.01, len(seeds)), strict=True)},
            {s: float(a) for s, a in zip(seeds, hard + draw.normal(0.0, 0.01, len(seeds)), strict=True)})


def _check_paired_interval(answer) -> None:
    require_function(answer)
    for seeds, random_seed in ((range(5), 1), (range(10), 2)):
        way, baseline = _accuracies(seeds, random_seed)
        dealt = dict(zip(baseline, [*list(baseline.values())[1:], baseline[0]], strict=True))
        require(not same(_three_numbers(answer(way, dealt)), _three_numbers(answer(way, baseline))),
                "the interval does not change when the baseline's accuracies are dealt to other seeds, so nothing is compared "
                "seed by seed. Take the difference of each seed first")
        _require_interval(answer, way, baseline)
    way, baseline = _accuracies(range(6), 3)
    backwards = dict(reversed(baseline.items()))
    _require_interval(answer, way, backwards, "the two dictionaries may have their seeds in different orders; pair by seed. ")
    one_seed_less = {seed: accuracy for seed, accuracy in baseline.items() if seed != 2}
    _require_interval(answer, way, one_seed_less, "where only one of the two ways has a seed, leave it out. ")
    _require_interval(answer, one_seed_less, way, "where only one of the two ways has a seed, leave it out. ")


def _three_numbers(found: object) -> list[float]:
    """What was found as a list of three plain numbers."""
    require_returned(found)
    numbers = list(found) if isinstance(found, tuple | list | np.ndarray | Tensor | pd.Series) else []
    require(len(numbers) == 3 and all(_is_number(number) for number in numbers),
            f"the function has to return three numbers: the mean difference, then low and high; it returned {found!r}")
    return [float(number) for number in numbers]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number | Tensor) and np.ndim(value) == 0


def _require_interval(answer: Callable, way: dict[int, float], baseline: dict[int, float], about: str = "") -> None:
    from scipy.stats import t

    found = _three_numbers(answer(dict(way), dict(baseline)))
    gaps = 100 * np.array([way[seed] - baseline[seed] for seed in way if seed in baseline])
    n, mean, spread = len(gaps), gaps.mean(), gaps.std(ddof=1)

    def interval(half: float, mean: float = mean) -> list[float]:
        return [mean, mean - half, mean + half]

    quantile, error = t.ppf(0.975, n - 1), spread / math.sqrt(n)
    require_same(found, interval(quantile * error), {
        "accuracies are parts of one, and so is this difference; 0.01 is one point":
            interval(quantile * error / 100, mean / 100),
        "the sign is wrong: the difference is that of way minus baseline": interval(quantile * error, -mean),
        f"1.96 is for very many seeds. With {n} the spread itself is uncertain, so take Student's t": interval(1.96 * error),
        "that interval says where the difference of a single seed lies. The mean of n seeds is surer, by the root of n":
            interval(quantile * spread),
        "the standard deviation divides by n, and of a sample it has to divide by n - 1":
            interval(quantile * error * math.sqrt((n - 1) / n)),
        "95 % inside leaves 2.5 % at each end, so the quantile is that of 0.975": interval(t.ppf(0.95, n - 1) * error),
        f"with {n} differences Student's t has {n - 1} degrees of freedom": interval(t.ppf(0.975, n) * error),
        "the mean is right, but it is not in the middle of the interval; low comes before high": [
            mean, mean + quantile * error, mean - quantile * error],
    }, f"{about}The differences are {', '.join(f'{gap:+.2f}' for gap in gaps)} points. Their mean and interval are not "
       f"{found[0]:.2f}, {found[1]:.2f} to {found[2]:.2f}")


def _contest(seed: int, ways: tuple[str, ...]) -> pd.DataFrame:
    """Runs of each way on validation and test images, several rates and seeds, in no order."""
    draw = np.random.default_rng(seed)
    rows = [{"split": split, "strategy": way, "rates": rates, "seed": s, "accuracy": round(draw.normal(0.8, 0.04), 4)}
            for way in ways for rates in ("0.0003", "0.001", "0.003", "0.01") for s in range(3)
            for split in ("validation", "test")]
    losses = np.random.default_rng(seed + 1).normal(0.6, 0.1, len(rows)).round(4)
    return pd.DataFrame(rows).assign(loss=losses).sample(frac=1, random_state=seed).reset_index(drop=True)


def _check_choice(answer) -> None:
    require_function(answer)
    ways = ("uniform", "two rates", "layer decay")
    for seed, tried in ((18, ways), (34, ways), (2, ("head only",))):  # in the first two each mistake makes another choice
        _require_choice(answer, _contest(seed, tried))


def _require_choice(answer: Callable, runs: pd.DataFrame) -> None:
    found = answer(runs.copy())
    if isinstance(found, pd.Series):
        found = found.to_dict()
    require_returned(found)
    ways = sorted(runs["strategy"].unique())
    require(isinstance(found, dict) and sorted(map(str, found)) == ways,
            f"the function has to return a dictionary with the chosen rates of each strategy, here of {', '.join(ways)}")
    validation, test = (runs[runs["split"] == split] for split in ("validation", "test"))

    def best(rows: pd.DataFrame, score: str = "mean") -> dict[str, str]:
        scores = rows.groupby(["strategy", "rates"])["accuracy"].agg(score).reset_index().sort_values("accuracy")
        return scores.groupby("strategy")["rates"].last().to_dict()

    require_same(found, best(validation), {
        "the rates are chosen by single runs. One lucky seed decides then; take the mean over the seeds":
            best(validation, "max"),
        "the rates are chosen by single runs, and test images are among them. Which rows may decide, and what of them?":
            best(runs, "max"),
        "the rates are chosen on the test images, and the test accuracy of the winner would look better than it is": best(test),
        "the means are those of validation and test rows together; the test rows must not take part in the choice": best(runs),
        "these are the rates of the lucky runs on the test images": best(test, "max"),
        "one seed decides; take the mean over all": best(validation[validation["seed"] == 0]),
        "these are the worst rates of each way": best(validation.assign(accuracy=-validation["accuracy"])),
        "that is the accuracy; the rates that reached it are asked for":
            validation.groupby(["strategy", "rates"])["accuracy"].mean().groupby("strategy").max().to_dict(),
    }, f"by their mean accuracy on the validation rows {best(validation)} are the best, and the function chose {found}")


def _runs(**ways: Mapping[str, object]) -> pd.DataFrame:
    """Runs of ways that tried these rates on validation images, and were tested on these seeds, all with these steps."""
    rows = []
    for way, settings in ways.items():
        tried, tested, steps = settings.get("rates", (0.001, 0.01)), settings.get("seeds", (0, 1, 2)), settings.get("steps", 40)
        keys = [("validation", rate, seed) for rate in tried for seed in settings.get("tried_on", (0, 1))]
        keys += [("test", tried[0], seed) for seed in tested]
        rows += [{"split": split, "strategy": way, "rates": str(rate), "seed": seed, "steps": steps}
                 for split, rate, seed in keys]
    return pd.DataFrame(rows)


def _check_fairness(answer) -> None:
    require_function(answer)
    for runs in (_runs(ours={"rates": (0.001, 0.003, 0.01)}, theirs={}),
                 _runs(ours={"rates": (0.003, 0.01)}, theirs={"rates": (0.0003, 0.001)}),
                 _runs(ours={"seeds": (3, 4, 5)}, theirs={}), _runs(ours={"steps": 100}, theirs={}),
                 _runs(ours={"seeds": (1, 2)}, theirs={"seeds": (0, 1, 2)}),
                 _runs(ours={"rates": (0.001, 0.003, 0.01), "tried_on": (0, 1)}, theirs={"tried_on": (0, 1, 2)}),
                 _runs(first={}, second={"steps": 50, "seeds": (0, 1)}, third={}), _runs(first={}, second={}, third={})):
        _require_faults(answer, runs)


def _require_faults(answer: Callable, runs: pd.DataFrame) -> None:
    found = answer(runs.copy())
    require(isinstance(found, set | list | tuple | frozenset) and set(map(str, found)) <= {"tries", "seeds", "steps"},
            f'the function has to return a set with those of "tries", "seeds" and "steps" that are unfair, and not {found!r}')
    validation, test = (runs[runs["split"] == split] for split in ("validation", "test"))

    def faults(tries: str | Callable = "nunique", seeds: str | Callable = frozenset,
               tested: pd.DataFrame = test) -> list[str]:
        values = {"tries": validation.groupby("strategy")["rates"].agg(tries),
                  "seeds": tested.groupby("strategy")["seed"].agg(seeds),
                  "steps": runs.groupby("strategy")["steps"].agg(frozenset)}
        return sorted(name for name, by_way in values.items() if by_way.nunique() > 1)

    summary = "; ".join(f"{way} tried {group[group['split'] == 'validation']['rates'].nunique()} rates, was tested on seeds "
                        f"{sorted(group[group['split'] == 'test']['seed'])} and has {group['steps'].iloc[0]} steps"
                        for way, group in runs.groupby("strategy"))
    require_same(sorted(set(map(str, found))), faults(), {
        f"other rates are no fault, since each way needs its own. How many different ones did each try? {summary}":
            faults(tries=frozenset),
        f"each try has several rows, one for each seed; count different rates, and not rows. {summary}":
            faults(tries="size"),
        f"the number of seeds is the same, but they are other seeds. {summary}": faults(seeds="nunique"),
        f"the seeds on which rates were chosen are mixed with those of the test rows, which count. {summary}":
            faults(tested=runs),
        f"nothing was found, and something is unfair. {summary}": [],
    }, f"{summary}. What is unfair is {' and '.join(faults()) or 'nothing'}, and the function said "
       f"{' and '.join(sorted(found)) or 'nothing'}")


def _check_next_try(answer) -> None:
    require_function(answer)
    grids = ([1e-3, 3e-3, 9e-3], [2e-4, 1e-3, 5e-3, 2.5e-2], [1e-2, 1e-4, 1e-3])
    for rates in grids:
        for best in sorted(rates):
            _require_next(answer, {rate: 0.8 - 0.02 * abs(math.log(rate / best)) for rate in rates}, best)


def _require_next(answer: Callable, scores: dict[float, float], best: float) -> None:
    found, rates = answer(dict(scores)), sorted(scores)
    low, high = rates[0] / (rates[1] / rates[0]), rates[-1] * (rates[-1] / rates[-2])
    start = f"of {', '.join(f'{rate:g} ({100 * accuracy:.1f} %)' for rate, accuracy in scores.items())} the best is {best:g}. "
    if rates != list(scores):
        start += "These tries are not in order. "
    expected = {rates[0]: low, rates[-1]: high}.get(best)
    if expected is None:
        require(found is None, start + f"It is not at an edge, so the function has to return None, and it returned {found!r}")
        return
    require(found is not None, start + "It is at an edge, so the function has to return the rate beyond it, and not None")
    require_same(found, expected, {
        start + "The next rate is asked for, and not only whether there is one": True,
        start + "That is the best try itself; go one step beyond it": best,
        start + "That is the wrong end: the best is at the other edge": high if best == rates[0] else low,
        start + "Rates are spaced by a factor, so multiply or divide by it. Differences would lead to zero and below":
            2 * rates[0] - rates[1] if best == rates[0] else 2 * rates[-1] - rates[-2],
        start + "The factor has to be that between the tries, which is not always the same as in the example":
            best / 3 if best == rates[0] else 3 * best,
    }, start + f"The tries are a factor of {rates[1] / rates[0]:g} apart, so the next one is not {found!r}")


EXERCISES = {
    "7.1": Exercise("The interval of a difference", _check_paired_interval,
                    "subtract seed by seed first. Then you have one list of differences, and need its mean, its standard "
                    "deviation and the number of its elements.",
                    "In the example the differences have a standard deviation of 0.6 points, and the two ways have 5.1 and "
                    "5.6. What makes a seed hard for both ways has fallen out."),
    "7.2": Exercise("Choose the rates", _check_choice,
                    "which rows may decide, and what does one lucky seed do to the highest run?",
                    "The validation accuracy of the winner flatters it a little; the test rows have not been looked at."),
    "7.3": Exercise("What is unfair here?", _check_fairness,
                    "for each of the three, find one value for each strategy, and see whether they differ. Seeds are a set; "
                    "pandas counts different values of `frozenset`, but not of `set`.",
                    "A comparison with such a fault compares luck or effort, and not ways of fine-tuning."),
    "7.4": Exercise("Is the best try at the edge?", _check_next_try,
                    "sort the rates first. The edges are the first and the last, and the step is a factor.",
                    "After the next try ask again; the best may lie still further out."),
}
