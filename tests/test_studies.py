"""Recorded studies: the same tries for all, rates chosen on validation images, and no run made twice."""

import pandas as pd
import pytest

from layerlr_helpers import Strategy, Task, results, studies, uniform
from layerlr_helpers.layers import layer_groups
from layerlr_helpers.models import load_resnet18
from layerlr_helpers.studies import STUDIES, Study, conduct, main, paired_intervals, reversed_decay, winners


@pytest.fixture
def study(small_digits):
    task = Task(small_digits.subset(range(120)), per_class=1, val_per_class=2, epochs=1, batch_size=5)
    tries = {name: [Strategy(f"{lr:g}", uniform(lr)) for lr in lrs]
             for name, lrs in {"low": (1e-5, 1e-4), "high": (1e-3, 1e-2)}.items()}
    return Study("which?", lambda: task, lambda: tries)


@pytest.fixture
def made(monkeypatch):
    """The runs that are made; their scores are made up: the second rate is the better one, the seed adds a little."""
    runs = []

    def run(strategy, task, seed, *, split):
        runs.append((strategy.name, seed, split))
        accuracy = 0.5 + (strategy.name in ("0.0001", "0.01")) / 4 + seed / 100
        return {"accuracy": accuracy, "loss": 1.0, "steps": 2, "seconds": 0.1}

    monkeypatch.setattr(studies.experiments, "run", run)
    return runs


def test_rates_are_chosen_on_validation_images_and_only_the_winners_are_tested(study, made, tmp_path):
    rows = conduct(study, tmp_path / "rows.csv", range(3), progress=False)
    searched = [(lr, seed, "validation") for lr in ("1e-05", "0.0001", "0.001", "0.01") for seed in (0, 1)]
    assert sorted(made[:8]) == sorted(searched)
    assert made[8:] == [(lr, seed, "test") for seed in range(3) for lr in ("0.0001", "0.01")]
    assert winners(rows) == {"low": "0.0001", "high": "0.01"}
    assert set(rows["images"]) == {10}


@pytest.mark.parametrize("stop", [1, 7, 8, 10])
def test_a_study_that_was_interrupted_goes_on_where_it_stopped(study, made, tmp_path, monkeypatch, stop):
    path = tmp_path / "rows.csv"
    append, written = results.append_row, []

    def interrupted(*args):
        if len(written) == stop:
            raise KeyboardInterrupt
        written.append(args)
        append(*args)

    monkeypatch.setattr(results, "append_row", interrupted)
    with pytest.raises(KeyboardInterrupt):
        conduct(study, path, range(2), progress=False)
    monkeypatch.setattr(results, "append_row", append)
    made.clear()
    rows = conduct(study, path, range(2), progress=False)
    assert len(made) == 12 - stop
    assert len(rows) == len(rows.drop_duplicates(["split", "strategy", "rates", "seed"])) == 12
    made.clear()
    conduct(study, path, range(3), progress=False)  # more seeds: only the new ones are made
    assert made == [("0.0001", 2, "test"), ("0.01", 2, "test")]


def test_of_equal_accuracies_the_lower_loss_wins(study, made, tmp_path, monkeypatch):
    losses = {"1e-05": 2.0, "0.0001": 3.0, "0.001": 1.0, "0.01": 0.5}
    monkeypatch.setattr(studies.experiments, "run", lambda strategy, task, seed, *, split: {
        "accuracy": 0.5, "loss": losses[strategy.name], "steps": 2, "seconds": 0.1})
    assert winners(conduct(study, tmp_path / "rows.csv", [0], progress=False)) == {"low": "1e-05", "high": "0.01"}


@pytest.mark.parametrize("name", STUDIES)
def test_every_strategy_of_a_study_has_the_same_number_of_tries_under_different_names(name):
    tries = STUDIES[name].tries()
    assert len({len(strategies) for strategies in tries.values()}) == 1
    for strategies in tries.values():
        assert len({strategy.name for strategy in strategies}) == len(strategies)


def test_intervals_are_of_differences_on_the_same_seeds():
    rows = pd.DataFrame([{"split": split, "strategy": name, "seed": seed, "accuracy": accuracy}
                         for seed in range(10) for name, split, accuracy in (
                             ("hard", "test", 0.5 + seed / 20), ("better", "test", 0.51 + seed / 20), ("mixed", "test", 0.6),
                             ("hard", "validation", 0.0))])
    table = paired_intervals(rows, "hard")
    assert list(table.index) == ["hard", "better", "mixed"]
    assert (table["seeds"] == 10).all()
    assert table.loc["better", ["difference", "low", "high"]].tolist() == pytest.approx([1, 1, 1])  # the seeds' spread is gone
    assert table.loc["better", "mean"] == pytest.approx(100 * (0.51 + 4.5 / 20))
    assert table.loc["hard", ["difference", "low", "high"]].tolist() == [0, 0, 0]
    assert table.loc["mixed", "low"] < table.loc["mixed", "difference"] < table.loc["mixed", "high"]
    with pytest.raises(ValueError, match="no strategy 'easy' was tested, only better, hard, mixed"):
        paired_intervals(rows, "easy")


def test_reversed_decay_is_layer_decay_upside_down():
    rates = reversed_decay(1e-2, 0.5)(layer_groups(load_resnet18(None)))
    assert list(rates) == ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
    assert list(rates.values()) == pytest.approx([1e-2 * 0.5**i for i in range(6)])


def test_the_command_lists_the_studies_and_runs_one(study, made, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(studies.STUDIES, "strategies", study)
    main(["--list"])
    assert "strategies: which?" in capsys.readouterr().out
    main(["strategies", "--seeds", "2", "--results", str(tmp_path / "new")])
    said = capsys.readouterr().out
    assert "0.0001" in said
    assert len(results.read_rows(tmp_path / "new" / "strategies.csv")) == 12
    with pytest.raises(SystemExit):
        main(["strategy"])
