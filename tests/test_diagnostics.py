"""Measurements of layers: numbers that a hand can check."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from layerlr_helpers import (
    LayerGroup,
    layer_groups,
    layer_statistics,
    probe_layers,
    snapshot,
)
from layerlr_helpers.diagnostics import relative_gradient_rates


def pair():
    """A group of the tensors (3, 4) and (0,), and one of (2, 0)."""
    a, b, c = (nn.Parameter(torch.tensor(values)) for values in ([3.0, 4.0], [0.0], [2.0, 0.0]))
    return [LayerGroup("first", {"a": a, "b": b}), LayerGroup("second", {"c": c})]


# --- statistics -------------------------------------------------------------------------------------------------------

def test_statistics_are_norms_over_all_tensors_of_a_group():
    groups = pair()
    groups[0].params["a"].grad = torch.tensor([0.0, 2.0])
    groups[0].params["b"].grad = torch.tensor([1.5])
    table = layer_statistics(groups)
    assert list(table) == ["group", "depth", "parameters", "weight_norm", "grad_norm", "relative_gradient"]
    assert list(table.iloc[0]) == ["first", 1, 3, 5.0, 2.5, 0.5]
    assert list(table.iloc[1][:4]) == ["second", 0, 2, 2.0]
    assert table.iloc[1][["grad_norm", "relative_gradient"]].isna().all()  # no gradient is not a gradient of zero


def test_moved_is_the_distance_from_the_snapshot_over_its_norm():
    groups = pair()
    before = snapshot(groups)
    with torch.no_grad():
        groups[0].params["a"] += torch.tensor([0.0, 1.0])
        groups[0].params["b"] += 2.0
    moved = layer_statistics(groups, before).moved
    assert list(moved) == pytest.approx([math.sqrt(5) / 5, 0.0])


def test_a_snapshot_is_a_copy_that_training_does_not_touch():
    groups = pair()
    before = snapshot(groups)
    with torch.no_grad():
        groups[0].params["a"].zero_()
    assert before["a"].tolist() == [3.0, 4.0]
    assert list(before) == ["a", "b", "c"]
    assert not any(value.requires_grad for value in before.values())


def test_a_group_that_starts_at_zero_has_no_relative_numbers():
    groups = [LayerGroup("zero", {"z": nn.Parameter(torch.zeros(2))})]
    groups[0].params["z"].grad = torch.ones(2)
    row = layer_statistics(groups, snapshot(groups)).iloc[0]
    assert row.grad_norm == pytest.approx(math.sqrt(2))
    assert math.isnan(row.relative_gradient)
    assert math.isnan(row.moved)


def test_norms_of_small_numbers_in_low_precision_do_not_vanish():
    group = LayerGroup("half", {"h": nn.Parameter(torch.full((4,), 1e-4, dtype=torch.float16))})
    assert layer_statistics([group]).weight_norm[0] == pytest.approx(2e-4, rel=1e-3)


def test_rates_by_relative_gradient_are_in_proportion_to_it():
    groups = pair()
    for p in (p for group in groups for p in group.params.values()):
        p.grad = torch.ones_like(p)
    rates = relative_gradient_rates(0.1)(groups)
    assert rates == pytest.approx({"first": 0.1 * (3 ** 0.5 / 5) / (2 ** 0.5 / 2), "second": 0.1})


def test_rates_by_relative_gradient_name_groups_without_a_gradient_or_with_weights_of_zero():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    groups = layer_groups(model, torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"no relative gradient for stem, head: call backward\(\)"):
        relative_gradient_rates(0.1)(groups)
    nn.functional.cross_entropy(model(torch.ones(2, 4)), torch.tensor([0, 1])).backward()
    with pytest.raises(ValueError, match=r"no relative gradient for head: .*weights are all 0"):
        relative_gradient_rates(0.1)(groups)
    nn.init.ones_(model[2].weight)
    model.zero_grad(set_to_none=False)
    with pytest.raises(ValueError, match="every group's gradient is 0"):
        relative_gradient_rates(0.1)(groups)


# --- probes -----------------------------------------------------------------------------------------------------------

def test_a_probe_reads_what_is_there_and_is_at_chance_where_nothing_is():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 100)
    other = rng.permutation(labels)
    features = {"clear": np.eye(4, dtype=np.float32)[labels] + 0.01 * rng.normal(size=(400, 4)).astype(np.float32),
                "noise": rng.normal(size=(400, 4)).astype(np.float32)}
    table = probe_layers(features, {"own": torch.tensor(labels), "other": other})
    assert list(table) == ["layer", "target", "accuracy", "standard_error", "chance"]
    assert list(zip(table.layer, table.target, strict=True)) == [
        ("clear", "own"), ("noise", "own"), ("clear", "other"), ("noise", "other")]
    assert (table.chance == 0.25).all()
    by = table.set_index(["layer", "target"])
    assert by.accuracy["clear", "own"] == 1.0
    assert by.standard_error["clear", "own"] == 0.0
    for key in (("noise", "own"), ("clear", "other"), ("noise", "other")):
        accuracy, error = by.accuracy[key], by.standard_error[key]
        assert abs(accuracy - 0.25) < 4 * error
        assert error == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / 200))


def test_the_split_depends_on_the_seed_alone_and_chance_is_the_commonest_class():
    rng = np.random.default_rng(0)
    features, labels = {"x": rng.normal(size=(60, 3))}, np.repeat([0, 1], [45, 15])
    first, again, other = (probe_layers(features, {"y": labels}, seed=seed) for seed in (0, 0, 1))
    assert first.equals(again)
    assert not first.equals(other)
    assert first.chance[0] == pytest.approx(0.75, abs=0.02)


def test_a_probe_of_labels_for_other_examples_is_refused():
    with pytest.raises(ValueError, match=r"the target 'y' has 5 labels, .*'stem': 16"):
        probe_layers({"stem": np.zeros((16, 3))}, {"y": torch.tensor([0, 1, 0, 1, 0])})
