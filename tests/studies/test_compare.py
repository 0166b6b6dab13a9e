from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch.optim import SGD
from torch.utils.data import DataLoader

from layerlr_helpers import (
    Strategy,
    Task,
    UnfreezePlan,
    compare,
    evaluate,
    few_shot_split,
    head_and_backbone,
    layer_groups,
    load_resnet18,
    recipes,
    relative_gradient_rates,
    shifted,
    slanted_triangular,
    uniform,
)
from layerlr_helpers.studies import compare as experiments
from layerlr_helpers.studies import results

ONE_RATE = Strategy("one rate", uniform(1e-3))
TWO_RATES = Strategy("two rates", head_and_backbone(backbone_lr=1e-4, head_lr=1e-3))
SCRATCH = Strategy("scratch", uniform(1e-3), weights=None)


@pytest.fixture(scope="module")
def task(small_digits):
    return Task(small_digits.subset(range(120)), per_class=1, val_per_class=2, epochs=1, batch_size=5)


@pytest.fixture(scope="module")
def frame(task):
    return compare([ONE_RATE, TWO_RATES], task, seeds=[0, 1], progress=False)


@pytest.fixture
def seen(monkeypatch):
    """What every run passes to ``fit``: the new head before training, the labels in their order, the optimizer's groups."""
    runs = []

    def fit(model, optimizer, loader, *, fit=experiments.fit, **options):
        order = loader.generator.get_state()
        labels = torch.cat([labels for _, labels in loader])
        loader.generator.set_state(order)
        runs.append({"head": model.fc.weight.detach().clone(), "body": model.conv1.weight.detach().clone(), "labels": labels,
                     "images": sorted(loader.dataset.factors["stripe_phase"].tolist()), "options": options,
                     "rates": {group["name"]: group["lr"] for group in optimizer.param_groups}, "optimizer": optimizer})
        return fit(model, optimizer, loader, **options)

    monkeypatch.setattr(experiments, "fit", fit)
    return runs


def test_there_is_one_row_a_run(frame):
    assert list(frame) == ["split", "task", "strategy", "rates", "seed", "accuracy", "loss", "steps", "images", "seconds",
                           "precision", "torch", "threads", "device"]
    assert list(frame["rates"]) == ["0.001", "0.0001, 0.001"] * 2
    assert set(frame["images"]) == {10}
    assert list(zip(frame["strategy"], frame["seed"], strict=True)) == [
        ("one rate", 0), ("two rates", 0), ("one rate", 1), ("two rates", 1)]
    assert frame["accuracy"].between(0, 1).all()
    assert (frame["steps"] == 2).all()
    assert (frame["seconds"] > 0).all()


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
    experiments.run(strategy, replace(task, epochs=10, batch_size=10), seed=0)
    run = seen[0]
    rates = list(run["rates"].values())
    assert rates == pytest.approx([rates[-1] / 2] * (len(rates) - 1) + [rates[-1]])
    assert isinstance(run["optimizer"], SGD)
    assert run["options"]["unfreezing"].batch_norm == "statistics"
    assert run["options"]["unfreezing"].plan.first_steps["head"] == 0
    assert run["options"]["steps"] == 10
    assert all(group["weight_decay"] == 0.01 for group in run["optimizer"].param_groups)


def test_without_a_new_head_the_pretrained_one_is_kept(task, seen):
    experiments.run(ONE_RATE, replace(task, new_head=False), seed=0)
    assert torch.equal(seen[0]["head"], load_resnet18().fc.weight)


def test_validation_and_test_are_scored_on_their_own_images(task, monkeypatch):
    scored = []

    def evaluate(model, loader, *, evaluate=experiments.evaluate, **options):
        scored.append(set(loader.dataset.factors["scan"].tolist()))
        return evaluate(model, loader, **options)

    monkeypatch.setattr(experiments, "evaluate", evaluate)
    for split in ("validation", "test"):
        compare([ONE_RATE], task, seeds=[0], split=split, progress=False)
    validation, test = scored
    assert (len(validation), len(test)) == (20, 120 - 20 - 10)
    assert not validation & test


def test_a_shifted_task_has_as_many_outputs_as_classes(task, seen):
    regrouped = replace(task, data=shifted(task.data, "odd_even"))
    compare([ONE_RATE], regrouped, seeds=[0], progress=False)
    assert seen[0]["head"].shape == (2, 512)


TRIES = {name: [Strategy(f"{lr:g}", uniform(lr)) for lr in lrs]
         for name, lrs in {"low": (1e-5, 1e-4), "high": (1e-3, 1e-2)}.items()}


@pytest.fixture
def made(monkeypatch):
    """The runs that are made; their scores are made up: the second rate is the better one, the seed adds a little."""
    runs = []

    def run(strategy, task, seed, *, split):
        runs.append((strategy.name, seed, split))
        return {"accuracy": 0.5 + (strategy.name in ("0.0001", "0.01")) / 4 + seed / 100, "loss": 1.0}

    monkeypatch.setattr(experiments, "run", run)
    return runs


def test_rates_are_chosen_on_validation_images_and_only_the_winners_are_tested(task, made):
    frame = compare(TRIES, task, seeds=range(3), progress=False)
    searched = [(lr, seed, "validation") for lr in ("1e-05", "0.0001", "0.001", "0.01") for seed in (0, 1)]
    assert sorted(made[:8]) == sorted(searched)
    assert made[8:] == [(lr, seed, "test") for seed in range(3) for lr in ("0.0001", "0.01")]
    assert list(zip(frame["strategy"], frame["rates"], frame["seed"], strict=True)) == [
        (name, lr, seed) for seed in range(3) for name, lr in (("low", "0.0001"), ("high", "0.01"))]
    assert set(frame["split"]) == {"test"}


def test_without_a_choice_every_try_is_tested_on_every_seed(task, made):
    frame = compare(TRIES, task, seeds=[4, 5], choose=False, progress=False)
    assert made == [(lr, seed, "test") for seed in (4, 5) for lr in ("1e-05", "0.0001", "0.001", "0.01")]
    assert len(frame) == 8


@pytest.mark.parametrize("stop", [1, 7, 8, 10])
def test_a_comparison_that_was_interrupted_goes_on_where_it_stopped(task, made, tmp_path, monkeypatch, stop):
    path, task = tmp_path / "rows.csv", replace(task, name="digits")
    append, written = results.append_row, []

    def interrupted(*args):
        if len(written) == stop:
            raise KeyboardInterrupt
        written.append(args)
        append(*args)

    monkeypatch.setattr(results, "append_row", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(TRIES, task, seeds=range(2), results=path, progress=False)
    monkeypatch.setattr(results, "append_row", append)
    made.clear()
    compare(TRIES, task, seeds=range(2), results=path, progress=False)
    assert len(made) == 12 - stop
    rows = results.read_rows(path)
    assert len(rows) == len(rows.drop_duplicates(results.KEY)) == 12
    made.clear()
    compare(TRIES, task, seeds=range(3), results=path, progress=False)  # more seeds: only the new ones are made
    assert made == [("0.0001", 2, "test"), ("0.01", 2, "test")]
    made.clear()
    compare(TRIES, replace(task, name="another"), seeds=range(2), results=path, progress=False)  # shares no run with it
    assert len(made) == 12


def test_the_head_on_cached_features_is_the_head_on_the_frozen_network(task, monkeypatch):
    monkeypatch.setattr(experiments, "fast_autocast", lambda: None)  # in lower precision sums depend on the batch
    fitted = []
    monkeypatch.setattr(experiments, "fit", lambda model, *rest, fit=experiments.fit, **options: (
        fitted.append(type(model).__name__), fit(model, *rest, **options)))
    frozen = Strategy("head", uniform(1e-2), plan=recipes.head_only)
    cached = experiments.run(frozen, task, 0)
    long_way = experiments.run(replace(frozen, plan=lambda groups, steps: UnfreezePlan({"head": 0, "stem": steps})), task, 0)
    assert fitted == ["Linear", "ResNet"]
    for what in ("accuracy", "loss", "steps", "images"):
        assert cached[what] == pytest.approx(long_way[what], rel=1e-3)


class Small(torch.nn.Module):
    """A network of any kind: dropout before its head, or something after it."""

    def __init__(self, dropout=0.0, factor=1.0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self._build(dropout)
        self.factor = factor

    def _build(self, dropout):
        self.body = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
                                        torch.nn.Flatten(), torch.nn.Dropout(dropout))
        self.classifier = torch.nn.Linear(4, 7)

    def forward(self, x):
        return self.factor * self.classifier(self.body(x))


def test_dropout_is_the_same_for_the_same_seed_and_takes_none_of_the_users_random_numbers(task):
    noisy = replace(task, load=lambda weights: Small(0.5))
    first = experiments.run(ONE_RATE, noisy, 0)
    torch.rand(3)
    before = torch.get_rng_state()
    again = experiments.run(ONE_RATE, noisy, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert {**first, "seconds": 0} == {**again, "seconds": 0}


@pytest.mark.parametrize(("network", "fitted"), [(Small(), "Linear"), (Small(0.5), "Small"), (Small(factor=2.0), "Small")])
def test_the_head_has_cached_features_only_where_they_are_what_it_would_be_given(task, network, fitted, monkeypatch):
    seen = []
    monkeypatch.setattr(experiments, "fit", lambda model, *rest, fit=experiments.fit, **options: (
        seen.append(type(model).__name__), fit(model, *rest, **options)))
    frozen = Strategy("head", uniform(1e-2), plan=recipes.head_only)
    before = [p.clone() for p in network.body.parameters()]
    experiments.run(frozen, replace(task, load=lambda weights: network), 0)
    assert seen == [fitted]
    assert all(torch.equal(p, q) for p, q in zip(network.body.parameters(), before, strict=True))


def test_dropout_before_the_head_is_noticed_whatever_it_drops(task, monkeypatch):
    fitted = []
    monkeypatch.setattr(experiments, "fit", lambda model, *rest, **options: fitted.append(type(model).__name__))
    frozen = Strategy("head", uniform(1e-2), plan=recipes.head_only)
    for seed in range(30):
        experiments.run(frozen, replace(task, load=lambda weights: Small(0.5)), seed)
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
            compare(TRIES, task, seeds=[0], results=path, progress=False)
    with pytest.raises(ValueError, match="under the name of their task; give it one"):
        compare(TRIES, replace(task, name=""), seeds=[0], results=path, progress=False)
    assert not made


def test_the_choice_is_made_on_two_seeds_however_many_were_validated(task, tmp_path, monkeypatch):
    path, task = tmp_path / "rows.csv", replace(task, name="digits")
    monkeypatch.setattr(experiments, "run", lambda strategy, task, seed, split: {
        "accuracy": 0.9 - 0.3 * seed if strategy.name == "high" else 0.7, "loss": 1.0})  # the best on the first seeds alone
    tries = {"a": [Strategy("low", uniform(1e-4)), Strategy("high", uniform(1e-3))]}
    frames = [compare(tries, task, seeds=range(5), split="validation", results=path, progress=False) for _ in range(2)]
    assert set(frames[0]["rates"]) == set(frames[1]["rates"]) == {"high"}


def test_the_first_stages_are_kept_and_the_others_start_anew(task):
    start = experiments.prepared_model(None, 10, seed=3)
    pretrained = load_resnet18()
    model = experiments.prepared_model("glyphs", 10, seed=3, keep=2)
    for name, value in model.state_dict().items():
        kept = name.startswith(("conv1", "bn1", "layer1"))
        assert torch.equal(value, (pretrained if kept else start).state_dict()[name]), name
    for keep, weights in ((0, None), (5, "glyphs")):
        whole = experiments.prepared_model(weights, 10, seed=3).state_dict()
        parts = experiments.prepared_model("glyphs", 10, seed=3, keep=keep).state_dict()
        assert all(torch.equal(value, whole[name]) for name, value in parts.items())


def test_rates_that_look_at_gradients_see_those_of_the_first_batch(task, seen, monkeypatch):
    monkeypatch.setattr(experiments, "fast_autocast", lambda: None)
    experiments.run(Strategy("looks", relative_gradient_rates(1e-3), look_first=True, schedule=None), task, 0)
    train, _, _ = few_shot_split(task.data, 1, val_per_class=2, seed=0)
    images, labels = next(iter(DataLoader(train, 5, shuffle=True, generator=torch.Generator().manual_seed(0))))
    model = experiments.prepared_model("glyphs", 10, 0).eval()
    torch.nn.functional.cross_entropy(model(images), labels).backward()
    assert torch.equal(seen[0]["labels"][:5], labels)
    assert seen[0]["rates"] == pytest.approx(relative_gradient_rates(1e-3)(layer_groups(model)), rel=1e-3)


def test_any_network_can_be_compared_and_test_images_limited(task, monkeypatch):
    scored = []
    monkeypatch.setattr(experiments, "evaluate", lambda model, loader, **options: (
        scored.append(loader.dataset.labels.bincount().tolist()), evaluate(model, loader, **options))[1])
    small = replace(task, load=lambda weights: Small(), test_per_class=3)
    frame = compare([ONE_RATE, SCRATCH], small, seeds=[0], progress=False)
    assert frame["accuracy"].nunique() == 1  # Small knows no weights
    assert scored == [[3] * 10] * 2


@pytest.mark.parametrize(("arguments", "problem"), [
    ({"strategies": [ONE_RATE, ONE_RATE]}, "strategies need different names, got"),
    ({"split": "train"}, "split must be 'validation' or 'test', not 'train'"),
    ({"seeds": []}, "at least one strategy and one seed"),
    ({"seeds": [0, 1, 0]}, r"each seed is run once, got \[0, 1, 0\]"),
    ({"strategies": []}, "at least one strategy and one seed"),
    ({"strategies": {"a": [ONE_RATE, ONE_RATE]}}, "the tries of a strategy need different names; not so a"),
    ({"strategies": {"a": [ONE_RATE], "b": [ONE_RATE, TWO_RATES]}}, "as many tries .* got 1 for a, 2 for b"),
])
def test_what_cannot_be_compared_is_refused(task, arguments, problem):
    with pytest.raises(ValueError, match=problem):
        compare(**{"strategies": [ONE_RATE], "task": task, "seeds": [0]} | arguments)


def test_a_missing_folder_of_results_is_named_before_anything_runs(task, made, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere to record results in"):
        compare([ONE_RATE], task, seeds=[0], results=tmp_path / "nowhere" / "rows.csv")
    assert not made
