from dataclasses import replace

import pytest
import torch
from torch.optim import SGD

from layerlr_helpers import (
    Strategy,
    Task,
    UnfreezePlan,
    compare,
    experiments,
    head_and_backbone,
    load_resnet18,
    shifted,
    slanted_triangular,
    uniform,
)

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
    assert list(frame) == ["strategy", "seed", "accuracy", "loss", "steps", "seconds"]
    assert list(zip(frame["strategy"], frame["seed"], strict=True)) == [
        ("one rate", 0), ("two rates", 0), ("one rate", 1), ("two rates", 1)]
    assert frame["accuracy"].between(0, 1).all()
    assert (frame["steps"] == 2).all()
    assert (frame["seconds"] > 0).all()


def test_the_same_call_gives_the_same_numbers_and_takes_none_of_the_global_generators(frame, task):
    torch.rand(3)
    before = torch.get_rng_state()
    again = compare([ONE_RATE, TWO_RATES], task, seeds=(seed for seed in (0, 1)), progress=False)
    assert again.drop(columns="seconds").equals(frame.drop(columns="seconds"))
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


@pytest.mark.parametrize(("arguments", "problem"), [
    ({"strategies": [ONE_RATE, ONE_RATE]}, "strategies need different names, got"),
    ({"split": "train"}, "split must be 'validation' or 'test', not 'train'"),
    ({"seeds": []}, "at least one strategy and one seed"),
    ({"strategies": []}, "at least one strategy and one seed"),
])
def test_what_cannot_be_compared_is_refused(task, arguments, problem):
    with pytest.raises(ValueError, match=problem):
        compare(**{"strategies": [ONE_RATE], "task": task, "seeds": [0]} | arguments)
