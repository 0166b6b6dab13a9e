"""The recorded studies: their tasks and candidates, and the recorded winners run again."""

from pathlib import Path

import pandas as pd
import pytest

from layerlr_helpers import Strategy, Task, few_shot_split, param_groups, uniform
from layerlr_helpers.layers import layer_groups
from layerlr_helpers.models import load_resnet18
from layerlr_helpers.studies import catalogue, compare
from layerlr_helpers.studies.catalogue import PHOTOGRAPHS, STUDIES, Study, run_again
from layerlr_helpers.studies.results import chosen_rows, read_rows
from layerlr_helpers.studies.search import check_fair, every_candidate, search

RESULTS = Path(__file__).parents[2] / "data" / "results"
SEARCHED = sorted(name for name, study in STUDIES.items()
                  if study.choose and (RESULTS / f"{name}.csv").exists())


@pytest.fixture(scope="module")
def groups():
    return layer_groups(load_resnet18(None))


@pytest.mark.parametrize("name", [name for name in STUDIES if not name.startswith("text-")])
def test_the_strategies_of_a_study_have_as_many_candidates_which_differ_and_can_be_carried_out(name, groups, small_digits):
    for new_head in (True, False):
        candidates = STUDIES[name].candidates(Task(small_digits, new_head=new_head))
        check_fair(candidates)
        for strategies in map(every_candidate, candidates.values()):
            assert len({strategy.name for strategy in strategies}) == len(strategies)
            for strategy in strategies:
                if not strategy.look_first:
                    rates = strategy.rates(groups)
                    assert list(rates) == [group.name for group in groups]
                    assert float(strategy.name.split(",")[0]) in [pytest.approx(lr) for lr in rates.values()]
                if strategy.plan is not None:
                    assert strategy.plan(groups, 40).resolved([g.name for g in groups]).trainable_at(40)


@pytest.mark.slow
def test_the_studies_have_named_tasks_with_room_for_every_seed():
    for name, study in STUDIES.items():
        if name in PHOTOGRAPHS:
            continue
        tasks = study.tasks()
        assert len({task.name for task in tasks}) == len(tasks)
        assert all(task.name for task in tasks)
        for task in tasks:
            few_shot_split(task.data, task.per_class, val_per_class=task.val_per_class)  # or it raises


def test_stages_are_those_of_the_network(groups):
    assert [group.name for group in groups] == list(catalogue.STAGES)


@pytest.mark.slow
def test_the_fixed_schedule_multiplies_by_the_ratios_of_another_run(small_digits, monkeypatch):
    task = Task(small_digits, per_class=2, val_per_class=2, epochs=4, autocast=False)
    given = []

    def run(strategy, task, seed, **options):
        given.append(seed)
        return compare.run(strategy, task, seed, **options)

    monkeypatch.setattr(catalogue, "run", run)
    candidates = catalogue.ablation(task)
    one, fixed = (next(each for each in candidates[f"Adam direction, {name}"]) for name in ("one ratio", "fixed schedule"))
    assert one.rates(groups_of(task)) == fixed.rates(groups_of(task))
    rates = {}
    for strategy in (one, fixed):
        optimizer = strategy.optimizer(param_groups(groups_of(task), strategy.rates))
        scheduler = strategy.schedule(optimizer, 4)
        rates[strategy] = []
        for _ in range(4):
            rates[strategy].append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    ratios = [low / high for low, high in zip(rates[fixed], rates[one], strict=True)]
    assert given == [catalogue.SEED_OF_RATIOS]  # once, and on a seed of its own
    assert all(0 < ratio <= 1.2 for ratio in ratios)
    assert len(set(ratios)) == 4


def groups_of(task):
    return layer_groups(task.load(None))


@pytest.fixture
def recorded_study(small_digits, monkeypatch, tmp_path):
    """The folder with the record of a study "s" of two tasks, whose second candidates won and were tested on five seeds."""
    tasks = [Task(small_digits.subset(range(120)), per_class=1, val_per_class=2, epochs=1, name=name) for name in ("a", "b")]
    candidates = {name: [Strategy(f"{lr:g}", uniform(lr)) for lr in lrs]
                  for name, lrs in {"low": (1e-5, 1e-4), "high": (1e-3, 1e-2), "higher": (1e-3, 1e-2)}.items()}
    monkeypatch.setitem(STUDIES, "s", Study("which?", lambda: tasks, lambda task: candidates))
    rows = [{"split": split, "task": task.name, "strategy": name, "rates": each.name, "seed": seed,
             "accuracy": 0.5 + index / 4 + seed / 100, "loss": 1.0}
            for task in tasks for name, strategies in candidates.items() for index, each in enumerate(strategies)
            for split, seeds in (("validation", 2), ("test", 5 * index)) for seed in range(seeds)]
    pd.DataFrame(rows).to_csv(tmp_path / "s.csv", index=False)
    return tmp_path


def test_recorded_winners_are_run_again_and_put_beside_the_record(recorded_study, made):
    again = run_again("s", ["high", "low"], task="b", seeds=[1, 7], folder=recorded_study, progress=False)
    assert made == [("b", rates, seed, "test") for seed in (1, 7) for rates in ("0.01", "0.0001")]
    assert list(again["strategy"]) == ["high", "low"] * 2
    assert again["recorded"].fillna(0).tolist() == pytest.approx([0.76, 0.76, 0, 0])  # seed 7 is not in the record
    assert again["accuracy"].tolist() == pytest.approx([0.76, 0.76, 0.82, 0.82])


def test_other_rates_than_the_winners_can_be_run_again(recorded_study, made):
    run_again("s", ["high"], task="a", rates="0.001", folder=recorded_study, progress=False)
    assert made == [("a", "0.001", seed, "test") for seed in (0, 1)]


@pytest.mark.parametrize(("strategies", "task", "problem"), [
    (["low"], "c", "unknown task of s 'c'; known are 'a', 'b'"),
    (["low"], None, "unknown task of s None; known are 'a', 'b'"),
    (["middle", "low"], "a", "unknown strategy of s 'middle'; known are 'low', 'high', 'higher'")])
def test_what_is_not_in_the_study_cannot_be_run_again(recorded_study, made, strategies, task, problem):
    with pytest.raises(ValueError, match=problem):
        run_again("s", strategies, task=task, folder=recorded_study)
    assert not made


@pytest.mark.slow
@pytest.mark.parametrize("name", SEARCHED)
def test_the_recorded_search_is_whole_and_what_it_chose_was_tested_on_ten_seeds(name, small_digits):
    study = STUDIES[name]
    rows = read_rows(RESULTS / f"{name}.csv")
    if name in PHOTOGRAPHS:  # whose images are not here; the candidates do not depend on them
        tasks = {task: Task(small_digits, name=task) for task in rows["task"]}
    else:
        tasks = {task.name: task for task in study.tasks()}
    assert set(rows["task"]) == set(tasks)
    for task, of_task in rows.groupby("task"):
        def validate(runs, of_task=of_task, task=task):
            return chosen_rows(of_task, [("validation", task, *run) for run in runs])  # a KeyError if one is not recorded

        ways = {way: given for way, given in study.candidates(tasks[task]).items() if len(every_candidate(given)) > 1}
        best = search(ways, validate, finalists=3)
        tested = of_task[of_task["split"] == "test"]
        for way, rates in best.items():
            runs = tested[tested["strategy"] == way]
            assert set(runs["rates"]) == {rates}, (task, way)
            assert sorted(runs["seed"]) == list(range(10)), (task, way)
