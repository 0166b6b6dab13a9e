"""The loss and the metrics of some batches, averaged as if all their examples had come at once."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from layerlr_helpers.batches import map_output
from layerlr_helpers.objectives import Objective, Outcome

TAKEN = ("step", "epoch", "loss", "lr", "n")  # the other columns of a history and of an evaluation


class Tally:
    """Takes in the outcome of one batch after the other, and gives the averages.

    ``metrics`` maps names to functions of (outputs, labels), which are averaged over the examples, or to objects with
    ``update``, ``compute`` and ``reset``, such as those of torchmetrics, which see every batch before they compute. None counts
    the right answers, where the loss and the shapes say what a right answer is.
    """

    def __init__(self, objective: Objective, metrics: Mapping[str, object] | None = None):
        self.objective = objective
        self.examples, self.weight, self.loss = 0, 0.0, 0.0
        self.right, self.answers = 0, 0 if metrics is None else None  # None: there is no accuracy
        self.running = {name: metric for name, metric in (metrics or {}).items() if _is_running(metric)}
        self.functions = {name: metric for name, metric in (metrics or {}).items() if name not in self.running}
        self.means = dict.fromkeys(self.functions, 0.0)
        for metric in self.running.values():
            metric.reset()

    @torch.no_grad()
    def add(self, outcome: Outcome, weight: float) -> None:
        """Take in a batch whose loss has this weight. A loss without any weight is no number, and does not count."""
        outputs = map_output(Tensor.detach, outcome.outputs)
        self.examples += outcome.examples
        if weight:
            self.weight += weight
            self.loss += float(outcome.loss.detach()) * weight
        if self.answers is not None:
            right = self.objective.right(outcome)
            self.answers = None if right is None else self.answers + right.numel()
            self.right += 0 if right is None else int(right.sum())
        for name, function in self.functions.items():
            value = _number(name, function(outputs, outcome.labels))
            self.means[name] += (value - self.means[name]) * (outcome.examples / self.examples)
        for metric in self.running.values():
            if hasattr(metric, "to") and isinstance(outputs, Tensor):
                metric.to(outputs.device)
            metric.update(outputs, outcome.labels)

    def averages(self, *, single_precision: bool = False) -> dict[str, float]:
        """The ``loss`` (not a number if no batch had any weight), and each metric or else the ``accuracy``, 0..1.

        In ``single_precision`` the accuracy is to the last bit what ``(logits.argmax(1) == labels).float().mean()`` is.
        """
        loss = self.loss / (1 if self.objective.is_sum else self.weight) if self.weight else float("nan")
        accuracy = {"accuracy": self.right / self.answers} if self.answers else {}
        if single_precision:
            accuracy = {name: float(np.float32(value)) for name, value in accuracy.items()}
        values = {name: _number(name, metric.compute()) for name, metric in self.running.items()}
        for metric in self.running.values():
            metric.reset()
        return {"loss": loss, **accuracy, **self.means, **values}


def check_metrics(metrics: Mapping[str, Callable | object] | None) -> None:
    """Raise a ValueError that names the metrics that are none, or have a name that is taken."""
    for name, metric in (metrics or {}).items():
        if name in TAKEN or not (callable(metric) or _is_running(metric)):
            raise ValueError("metrics are functions of (outputs, labels), or objects with update, compute and reset, under "
                             f"names other than {', '.join(TAKEN)}; got {name!r}: {metric!r}")


def _is_running(metric) -> bool:
    return all(callable(getattr(metric, method, None)) for method in ("update", "compute", "reset"))


def _number(name: str, value) -> float:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"the metric {name!r} gave a tensor of shape {list(value.shape)}, and must give one number")
    return float(value)
