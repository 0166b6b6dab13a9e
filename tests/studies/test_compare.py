"""A fair contest of strategies: what is the same for all runs, what is chosen, and what is recorded."""

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader

from layerlr_helpers import (
    Strategy,
    Task,
    UnfreezePlan,
    compare,
    few_shot_split,
    head_and_backbone,
    layer_groups,
    load_resnet18,
    recipes,
    relative_gradient_rates,
    slanted_triangular,
    uniform,
)
from layerlr_helpers.models import prepared_model
from layerlr_helpers.studies import compare as compare_module
from layerlr_helpers.studies import results

ONE_RATE = Strategy("one rate", uniform(1e-3))
TWO_RATES = Strategy("two rates", head_and_backbone(backbone_lr=1e-4, head_lr=1e-3))
SCRATCH = Strategy("scratch", uniform(1e-3), weights=None)


class Small(nn.Module):
    """A network with BatchNorm and, if asked for, dropout before its head and a factor after it."""

    def __init__(self, dropout=0.0, factor=1.0):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, stride=2)
        self.bn1 = nn.BatchNorm2d(4)
        self.pool = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(dropout))
        self.fc = nn.Linear(16, 12)
        self.factor = factor

    def forward(self, x):
        return self.factor * self.fc(self.pool(self.bn1(self.conv1(x))))


def load_small(weights, **options):
    """A small network with random weights, or with those of its only recording."""
    if weights is None:
        return Small(**options)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        return Small(**options)


@pytest.fixture(scope="module")
def task(small_digits):
    return Task(small_digits.subset(range(120)), per_class=1, val_per_class=2, epochs=1, batch_size=5, load=load_small)


@pytest.fixture(scope="module")
def frame(task):
    return compare([ONE_RATE, TWO_RATES], task, seeds=[0, 1], progress=False)


@pytest.fixture
def seen(monkeypatch):
    """What every run passes to ``fit``: the new head before training, the labels in their order, the optimizer's groups."""
    runs = []

    def fit(model, optimizer, loader, *, fit=compare_module.fit, **options):
        order = loader.generator.get_state()
        labels = torch.cat([labels for _, labels in loader])
        loader.generator.set_state(order)
        runs.append({"head": model.fc.weight.detach().clone(), "body": model.conv1.weight.detach().clone(), "labels": labels,
                     "images": sorted(loader.dataset.factors["stripe_phase"].tolist()), "options": options,
                     "rates": {group["name"]: group["lr"] for group in optimizer.param_groups}, "optimizer": optimizer})
        return fit(model, optimizer, loader, **options)

    monkeypatch.setattr(compare_module, "fit", fit)
    return runs


@pytest.fixture
def fitted(monkeypatch):
    """The class of what each run passes to ``fit``: the whole network, or its head alone."""
    names = []

    def fit(model, *rest, fit=compare_module.fit, **options):
        names.append(type(model).__name__)
        fit(model, *rest, **options)

    monkeypatch.setattr(compare_module, "fit", fit)
    return names


def test_there_is_one_row_a_run(frame):
    assert list(frame) == ["split", "task", "strategy", "rates", "seed", "accuracy", "loss", "steps", "images", "seconds",
                           "precision", "torch", "threads", "device"]
    assert list(frame["rates"]) == ["0.001", "0.0001, 0.001"] * 2
    assert set(frame["images"]) == {10}
    assert list(zip(frame["strategy"], frame["seed"], strict=True)) == [
        ("one rate", 0), ("two rates", 0), ("one rate", 1), ("two rates", 1)]
    assert frame["accuracy"].between(0, 1).all()
    assert (frame["steps"] == 2).all()
    assert (frame["seconds"] >= 0).all()


def test_the_same_call_gives_the_same_numbers_and_takes_none_of_the_global_generators(frame, task):
    torch.rand(3)
    before = torch.get_rng_state()
    again = compare([ONE_RATE, TWO_RATES], task, seeds=(seed for seed in (0, 1)), progress=False)
    pd.testing.assert_frame_equal(again.drop(columns="seconds"), frame.drop(columns="seconds"))
    assert torch.equal(torch.get_rng_state(), before)


def test_runs_with_one_seed_differ_in_their_strategy_alone(task, seen):
    compare([ONE_RATE, TWO_RATES, SCRATCH], task, seeds=[0, 1], progress=False)
    for first in (0, 3):
        for other in seen[first + 1:first + 3]:
            for what in ("head", "labels"):
                assert torch.equal(other[what], seen[first][what])
            assert other["images"] == seen[first]["images"]
    for what in ("head", "labels"):
        assert not torch.equal(seen[0][what], seen[3][what])
    assert seen[0]["images"] != seen[3]["images"]
    assert torch.equal(seen[0]["body"], seen[1]["body"])
    assert not torch.equal(seen[0]["body"], seen[2]["body"])


def test_a_strategy_is_carried_out_as_it_says(task, seen):
    strategy = Strategy("all", head_and_backbone(backbone_lr=0.01, head_lr=0.02), schedule=slanted_triangular,
                        optimizer=lambda groups: SGD(groups, momentum=0.5), batch_norm="statistics",
                        plan=lambda groups, steps: UnfreezePlan.top_down(groups, every=steps // 10))
    compare_module.run(strategy, replace(task, epochs=10, batch_size=10), seed=0)
    run = seen[0]
    rates = list(run["rates"].values())
    assert rates == pytest.approx([rates[-1] / 2] * (len(rates) - 1) + [rates[-1]])
    assert isinstance(run["optimizer"], SGD)
    assert run["options"]["unfreezing"].batch_norm == "statistics"
    assert run["options"]["unfreezing"].plan.first_steps["head"] == 0
    assert run["options"]["steps"] == 10
    assert all(group["weight_decay"] == 0.01 for group in run["optimizer"].param_groups)


def test_the_pretrained_head_is_kept_if_there_is_to_be_no_new_one(task, seen):
    compare_module.run(ONE_RATE, replace(task, new_head=False, load=load_resnet18, test_per_class=1), seed=0)
    assert torch.equal(seen[0]["head"], load_resnet18().fc.weight)


def test_validation_and_test_are_scored_on_their_own_images(task, monkeypatch):
    scored = []

    def evaluate(model, loader, *, evaluate=compare_module.evaluate, **options):
        scored.append(set(loader.dataset.factors["scan"].tolist()))
        return evaluate(model, loader, **options)

    monkeypatch.setattr(compare_module, "evaluate", evaluate)
    for split in ("validation", "test"):
        compare([ONE_RATE], task, seeds=[0], split=split, progress=False)
    validation, test = scored
    assert (len(validation), len(test)) == (20, 120 - 20 - 10)
    assert not validation & test


def test_a_network_gets_as_many_outputs_as_the_task_has_classes(task, seen):
    even_or_odd = replace(task.data, labels=task.data.labels % 2, class_names=("even", "odd"))
    compare([ONE_RATE], replace(task, data=even_or_odd), seeds=[0], progress=False)
    assert seen[0]["head"].shape == (2, 16)


CANDIDATES = {name: [Strategy(f"{lr:g}", uniform(lr)) for lr in lrs]
         for name, lrs in {"low": (1e-5, 1e-4), "high": (1e-3, 1e-2)}.items()}


def test_rates_are_chosen_on_validation_images_and_only_the_winners_are_tested(task, made):
    frame = compare(CANDIDATES, task, seeds=range(3), finalists=0, progress=False)
    searched = [("", lr, seed, "validation") for lr in ("1e-05", "0.0001", "0.001", "0.01") for seed in (0, 1)]
    assert sorted(made[:8]) == sorted(searched)
    assert made[8:] == [("", lr, seed, "test") for seed in range(3) for lr in ("0.0001", "0.01")]
    assert list(zip(frame["strategy"], frame["rates"], frame["seed"], strict=True)) == [
        (name, lr, seed) for seed in range(3) for name, lr in (("low", "0.0001"), ("high", "0.01"))]
    assert set(frame["split"]) == {"test"}


def test_without_a_choice_every_candidate_is_tested_on_every_seed(task, made):
    frame = compare(CANDIDATES, task, seeds=[4, 5], choose=False, progress=False)
    assert made == [("", lr, seed, "test") for seed in (4, 5) for lr in ("1e-05", "0.0001", "0.001", "0.01")]
    assert len(frame) == 8


@pytest.mark.parametrize("stop", [1, 7, 8, 12, 20, 22])
def test_a_comparison_that_was_interrupted_goes_on_where_it_stopped(task, made, tmp_path, monkeypatch, stop):
    path, task = tmp_path / "rows.csv", replace(task, name="digits")
    append, written = compare_module.append_row, []

    def interrupted(*args):
        if len(written) == stop:
            raise KeyboardInterrupt
        written.append(args)
        append(*args)

    monkeypatch.setattr(compare_module, "append_row", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(CANDIDATES, task, seeds=range(2), results=path, progress=False)
    monkeypatch.setattr(compare_module, "append_row", append)
    made.clear()
    compare(CANDIDATES, task, seeds=range(2), results=path, progress=False)
    assert len(made) == 24 - stop
    rows = results.read_rows(path)
    assert len(rows) == len(rows.drop_duplicates(results.KEY)) == 24
    made.clear()
    compare(CANDIDATES, task, seeds=range(3), results=path, progress=False)  # more seeds: only the new ones are made
    assert made == [("digits", "0.0001", 2, "test"), ("digits", "0.01", 2, "test")]
    made.clear()
    compare(CANDIDATES, replace(task, name="another"), seeds=range(2), results=path, progress=False)  # shares no run with it
    assert len(made) == 24


def test_the_head_on_cached_features_is_the_head_on_the_frozen_network(task, fitted, monkeypatch):
    monkeypatch.setattr(compare_module, "fast_autocast", lambda: None)  # in lower precision sums depend on the batch
    frozen = Strategy("head", uniform(1e-2), plan=recipes.head_only)
    cached = compare_module.run(frozen, task, 0)
    unfrozen_at_the_end = replace(frozen, plan=lambda groups, steps: UnfreezePlan({"head": 0, "stem": steps}))
    through_the_network = compare_module.run(unfrozen_at_the_end, task, 0)
    assert fitted == ["Linear", "Small"]
    for what in ("accuracy", "loss", "steps", "images"):
        assert cached[what] == pytest.approx(through_the_network[what], rel=1e-3)


def test_dropout_is_the_same_for_the_same_seed_and_takes_none_of_the_users_random_numbers(task):
    noisy = replace(task, load=lambda weights: load_small(weights, dropout=0.5))
    first = compare_module.run(ONE_RATE, noisy, 0)
    torch.rand(3)
    before = torch.get_rng_state()
    again = compare_module.run(ONE_RATE, noisy, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert {**first, "seconds": 0} == {**again, "seconds": 0}


@pytest.mark.parametrize(("options", "trained"), [({}, "Linear"), ({"dropout": 0.5}, "Small"), ({"factor": 2.0}, "Small")])
def test_the_head_trains_on_cached_features_only_if_it_would_see_the_same_in_the_network(task, fitted, options, trained):
    network = load_small("glyphs", **options)
    before = network.conv1.weight.clone()
    frozen = Strategy("head", uniform(1e-2), plan=recipes.head_only)
    compare_module.run(frozen, replace(task, load=lambda weights: network), 0)
    assert fitted == [trained]
    assert torch.equal(network.conv1.weight, before)


def test_dropout_before_the_head_is_noticed_whatever_it_drops(task, monkeypatch):
    fitted = []
    monkeypatch.setattr(compare_module, "fit", lambda model, *rest, **options: fitted.append(type(model).__name__))
    frozen = Strategy("head", uniform(1e-2), plan=recipes.head_only)
    for seed in range(30):
        compare_module.run(frozen, replace(task, load=lambda weights: load_small(weights, dropout=0.5)), seed)
    assert set(fitted) == {"Small"}


def test_recorded_runs_of_another_budget_or_precision_are_not_taken_for_this_tasks(task, tmp_path, made):
    path, task = tmp_path / "rows.csv", replace(task, name="digits")
    for columns, problem in (({"steps": 99, "images": 10}, r"'digits' with steps 99, and this one has 2"),
                             ({"steps": 2, "images": 500}, r"'digits' with images 500, and this one has 10"),
                             ({"precision": "float16"}, r"with precision float16, and this one has (float32|bfloat16)"),
                             ({"device": "cuda"}, r"with device cuda, and this one has cpu")):
        path.unlink(missing_ok=True)
        results.append_row(path, {"split": "test", "task": "digits", "strategy": "a", "rates": "", "seed": 0, **columns})
        with pytest.raises(ValueError, match=problem + "; give the task another name"):
            compare(CANDIDATES, task, seeds=[0], results=path, progress=False)
    with pytest.raises(ValueError, match="under the name of their task; give it one"):
        compare(CANDIDATES, replace(task, name=""), seeds=[0], results=path, progress=False)
    assert not made


@pytest.mark.parametrize(("finalists", "best"), [(0, "high"), (3, "low")])
def test_the_choice_is_made_on_two_or_five_seeds_however_many_were_validated(task, tmp_path, monkeypatch, finalists, best):
    path, task = tmp_path / "rows.csv", replace(task, name="digits")
    monkeypatch.setattr(compare_module, "run", lambda strategy, task, seed, split: {
        "accuracy": 0.9 - 0.3 * seed if strategy.name == "high" else 0.7, "loss": 1.0})  # high: best on the first seeds alone
    candidates = {"a": [Strategy("low", uniform(1e-4)), Strategy("high", uniform(1e-3))]}
    frames = [compare(candidates, task, seeds=range(7), split="validation", finalists=finalists, results=path, progress=False)
              for _ in range(2)]
    assert set(frames[0]["rates"]) == set(frames[1]["rates"]) == {best}


def test_rates_that_look_at_gradients_see_those_of_the_first_batch(task, seen, monkeypatch):
    monkeypatch.setattr(compare_module, "fast_autocast", lambda: None)
    compare_module.run(Strategy("looks", relative_gradient_rates(1e-3), look_first=True, schedule=None), task, 0)
    train, _, _ = few_shot_split(task.data, 1, val_per_class=2, seed=0)
    images, labels = next(iter(DataLoader(train, 5, shuffle=True, generator=torch.Generator().manual_seed(0))))
    model = prepared_model("glyphs", 10, 0, load=load_small).eval()
    torch.nn.functional.cross_entropy(model(images), labels).backward()
    assert torch.equal(seen[0]["labels"][:5], labels)
    assert seen[0]["rates"] == pytest.approx(relative_gradient_rates(1e-3)(layer_groups(model)), rel=1e-3)


def test_test_images_can_be_limited(task, monkeypatch):
    scored = []

    def evaluate(model, loader, *, evaluate=compare_module.evaluate, **options):
        scored.append(loader.dataset.labels.bincount().tolist())
        return evaluate(model, loader, **options)

    monkeypatch.setattr(compare_module, "evaluate", evaluate)
    compare([ONE_RATE, SCRATCH], replace(task, test_per_class=3), seeds=[0], progress=False)
    assert scored == [[3] * 10] * 2


@pytest.mark.parametrize(("arguments", "problem"), [
    ({"strategies": [ONE_RATE, ONE_RATE]}, "strategies and candidates need different names, got .*'one rate', 'one rate'"),
    ({"split": "train"}, "unknown split 'train'; known are 'validation', 'test'"),
    ({"seeds": []}, "at least one strategy and one seed"),
    ({"seeds": [0, 1, 0]}, r"each seed is run once, got \[0, 1, 0\]"),
    ({"strategies": []}, "at least one strategy and one seed"),
    ({"strategies": {"a": [ONE_RATE, ONE_RATE]}}, "strategies and candidates need different names, got"),
    ({"strategies": {"a": [ONE_RATE], "b": [ONE_RATE, TWO_RATES]}}, "as many candidates .* got 1 for a, 2 for b"),
    ({"finalists": 1}, "finalists must be 0, or 2 or more, not 1"),
])
def test_what_cannot_be_compared_is_refused(task, arguments, problem):
    with pytest.raises(ValueError, match=problem):
        compare(**{"strategies": [ONE_RATE], "task": task, "seeds": [0]} | arguments)


def test_a_missing_folder_of_results_is_named_before_anything_runs(task, made, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere to record results in"):
        compare([ONE_RATE], task, seeds=[0], results=tmp_path / "nowhere" / "rows.csv")
    assert not made


def test_a_run_that_diverges_is_a_result_like_any_other(task):
    task = replace(task, epochs=4)
    test = few_shot_split(task.data, 1, val_per_class=2, seed=0)[2]
    for plan in (None, lambda groups, steps: UnfreezePlan({"head": 0})):  # through the network, and on cached features
        row = compare_module.run(Strategy("steep", uniform(1e30), plan=plan, schedule=None), task, 0)
        assert math.isnan(row["loss"])
        assert row["accuracy"] == round(float((test.labels == 0).double().mean()), 4)  # it always names the first class
        assert row["steps"] == 8
