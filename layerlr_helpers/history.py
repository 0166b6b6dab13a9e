"""The record of a run, and the error that ends one which has diverged."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pandas as pd


@dataclass
class History:
    """What a run did, one plain dictionary a step: step, epoch, loss, metrics, the rates, validation metrics."""

    rows: list[dict] = field(default_factory=list)

    def to_frame(self) -> pd.DataFrame:
        """One row per step: ``step, epoch, loss, accuracy``, ``lr/NAME`` of every group (0 while it is frozen).

        ``val_loss`` and ``val_accuracy`` stand on the last step of each epoch, if there was a validation loader.
        Loss and accuracy are those of the step's own batches, before its update. Where ``fit`` was given other metrics they
        are in place of the accuracy, and where nothing says what a right answer is there is none.
        """
        return pd.json_normalize(self.rows, sep="/")


class DivergedError(FloatingPointError):
    """A loss, a gradient or a weight that is not finite, found before the next step and before the next checkpoint.

    Attributes:
        what, value: what was found.
        rates: each group's rate at that time.
        step: the number of the step that was not made; None outside ``fit``.
        history: the :class:`History` of the steps before; None outside ``fit``.
    """

    def __init__(self, what: str, value: float, rates: Mapping[str, float]):
        super().__init__(what, value, rates)
        self.what, self.value, self.rates = what, value, rates
        self.step: int | None = None
        self.history: History | None = None

    def __str__(self) -> str:
        where = f" at step {self.step}" if self.step is not None else ""
        rates = ", ".join(f"{name} {lr:.3g}" for name, lr in self.rates.items())
        return (f"{self.what} is {self.value}{where}, with the rates {rates}. Training has stopped, and no checkpoint "
                "was saved since. Try lower rates, a warmup or clip_grad_norm=1.0, and look for inputs that are not finite")
