"""Unfreezing when the validation metric stops improving: a plan that writes itself as training goes on."""

from collections.abc import Mapping, Sequence

from layerlr_helpers.layers import LayerGroup
from layerlr_helpers.unfreezing import ProgressiveUnfreezing, UnfreezePlan

MODES = ("max", "min")


class PlateauUnfreezing(ProgressiveUnfreezing):
    """Thaws one group more, from the last to the first, each time a validation metric has stopped improving.

    ``fit`` reports the metrics after each epoch; in a loop of your own call :meth:`report`. What has been thawed so
    far is an ordinary ``plan`` with the steps at which it happened, and with :meth:`state_dict` a run resumes where
    it was (``fit`` puts it into its checkpoint).

    Args:
        groups: from ``layer_groups``; the last one, the head, trains from the start.
        metric: the name of the metric to watch, ``"val_accuracy"`` or ``"val_loss"``.
        mode: ``"max"`` if larger is better, ``"min"`` if smaller is.
        patience: how many reports without an improvement thaw the next group.
        min_delta: an improvement is a change of more than this.
        batch_norm: of frozen groups, as in :class:`ProgressiveUnfreezing`.

    Raises:
        ValueError: an unknown mode, or a patience below 1.
    """

    def __init__(self, groups: Sequence[LayerGroup], *, metric: str = "val_accuracy", mode: str = "max", patience: int = 1,
                 min_delta: float = 0.0, batch_norm: str = "freeze"):
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}; known are {', '.join(map(repr, MODES))}")
        if patience < 1:
            raise ValueError(f"patience must be at least 1, not {patience}")
        super().__init__(groups, UnfreezePlan({groups[-1].name: 0}), batch_norm=batch_norm)
        self.metric, self.mode, self.patience, self.min_delta = metric, mode, patience, min_delta
        self.best: float | None = None
        self.waited = 0

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take note of the metrics before step number ``step``; thaws the next group from that step on if due.

        Raises:
            ValueError: the metric to watch is not among them.
        """
        if self.metric not in metrics:
            raise ValueError(f"no metric {self.metric!r} was reported, only {', '.join(metrics)}; fit needs a val_loader")
        value = metrics[self.metric]
        gain = None if self.best is None else (value - self.best) * (1 if self.mode == "max" else -1)
        if gain is None or gain > self.min_delta:
            self.best, self.waited = value, 0
            return
        self.waited += 1
        frozen = [group.name for group in self.groups if group.name not in self.plan.first_steps]
        if self.waited >= self.patience and frozen:
            self.plan = UnfreezePlan({**self.plan.first_steps, frozen[-1]: step})
            self.waited = 0

    def state_dict(self) -> dict:
        """What has been thawed and when, the best value and how long it has been."""
        return {"plan": self.plan.to_json(), "best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict) -> None:
        """Go on from what :meth:`state_dict` gave.

        Raises:
            ValueError: its plan names a group that is not here.
        """
        plan = UnfreezePlan.from_json(state["plan"]).of([group.name for group in self.groups])
        self.plan, self.best, self.waited = plan, state["best"], state["waited"]
