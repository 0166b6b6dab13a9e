import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerlr_helpers.metrics import Tally, check_metrics
from layerlr_helpers.objectives import Objective, Outcome


class Extreme:
    """The largest output of all batches, as an object of torchmetrics would find it."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.largest = float("-inf")

    def update(self, outputs, labels):
        self.largest = max(self.largest, float(outputs.max()))

    def compute(self):
        return torch.tensor([self.largest])


def outcome(outputs, labels, loss=1.0):
    return Outcome(torch.tensor(loss), outputs, labels, len(labels))


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_metrics_are_those_of_all_examples_at_once(sizes):
    outputs, labels = torch.randn(sum(sizes), 3), torch.randint(3, (sum(sizes),))
    metrics = {"error": lambda o, y: (o.sum(1) - y).abs().mean(), "largest": Extreme()}
    for given_metrics in (metrics, None):
        tally, whole = Tally(Objective(), given_metrics), Tally(Objective(), given_metrics)
        for part in zip(outputs.split(sizes), labels.split(sizes), strict=True):
            tally.add(outcome(*part), len(part[1]))
        found = tally.averages()
        whole.add(outcome(outputs, labels), len(labels))
        assert found == pytest.approx(whole.averages())
        assert list(found) == ["loss", *(given_metrics or ["accuracy"])]


def test_the_metric_of_one_batch_is_not_rounded_on_the_way():
    tally = Tally(Objective(), {"third": lambda o, y: 0.1 + 0.2})
    tally.add(outcome(torch.zeros(3, 2), torch.zeros(3)), 3)
    assert tally.averages()["third"] == 0.1 + 0.2


def test_a_batch_without_weight_does_not_spoil_the_loss():
    tally = Tally(Objective())
    tally.add(outcome(torch.zeros(2, 3), torch.full((2,), -100), loss=float("nan")), 0)
    tally.add(outcome(torch.eye(3), torch.arange(3), loss=2.0), 3)
    assert tally.averages() == {"loss": 2.0, "accuracy": 1.0}
    assert tally.examples == 5


def test_an_accuracy_that_one_batch_lacks_is_left_out():
    tally = Tally(Objective())
    tally.add(outcome(torch.eye(3), torch.arange(3)), 3)
    tally.add(outcome(torch.eye(3), torch.rand(3)), 3)
    assert list(tally.averages()) == ["loss"]


def test_an_object_sees_outputs_without_a_graph_and_is_left_empty():
    class Keeps(Extreme):
        def update(self, outputs, labels):
            assert not outputs.requires_grad
            super().update(outputs, labels)

    metric = Keeps()
    metric.update(torch.full((1,), 99.0), None)  # left from before
    tally = Tally(Objective(), {"largest": metric})
    tally.add(outcome(torch.ones(3, 2, requires_grad=True), torch.zeros(3)), 3)
    assert tally.averages()["largest"] == 1.0
    assert metric.largest == float("-inf")


@pytest.mark.parametrize("metrics", [{"loss": max}, {"lr": max}, {"f1": 3}, {"f1": object()}])
def test_what_is_no_metric_is_named(metrics):
    with pytest.raises(ValueError, match=r"metrics are functions of .*names other than step, epoch, loss, lr, n; got"):
        check_metrics(metrics)


def test_a_metric_gives_one_number():
    tally = Tally(Objective(), {"each": lambda o, y: o})
    with pytest.raises(ValueError, match=r"the metric 'each' gave a tensor of shape \[3\], and must give one number"):
        tally.add(outcome(torch.zeros(3), torch.zeros(3)), 3)
