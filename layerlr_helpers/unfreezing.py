"""Progressive unfreezing: a plan as plain data, and what carries it out.

Which groups train is a pure function of the step number. Nothing has to be remembered, so a run that is resumed at
any step does what an uninterrupted one does. All groups stay in the optimizer from the start.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral

from torch import nn
from torch.nn.modules.batchnorm import _NormBase  # the common base of all kinds, SyncBatchNorm and InstanceNorm too

from layerlr_helpers.layers import LayerGroup
from layerlr_helpers.naming import assigned, listed, matching

BATCH_NORM_MODES = ("freeze", "statistics", "train")


@dataclass(frozen=True)
class UnfreezePlan:
    """The first step at which each group trains: ``UnfreezePlan({"head": 0, "layer4": 100, "layer3": 200})``.

    A group that is not named never trains. Patterns stand for several groups, ``UnfreezePlan({"head": 0, "layer*": 100})``;
    a group's own name goes before any pattern, and of several patterns that match, the last one wins.

    Raises:
        ValueError: a first step that is no whole number or is below 0.
    """

    first_steps: Mapping[str, int]

    def __post_init__(self):
        for name, first in self.first_steps.items():
            if not isinstance(first, Integral) or isinstance(first, bool) or first < 0:
                raise ValueError(f"the first step of {name!r} must be a whole number, 0 or above, not {first!r}")
        object.__setattr__(self, "first_steps", {name: int(first) for name, first in self.first_steps.items()})

    @classmethod
    def top_down(cls, groups: Sequence[LayerGroup], every: int, first: int = 0) -> "UnfreezePlan":
        """The head at step ``first``, then one group more, from the last to the first, ``every`` so many steps.

        Gradual unfreezing of ULMFiT (Howard and Ruder, 2018).
        """
        return cls({group.name: first + i * every for i, group in enumerate(reversed(groups))})

    def in_epochs(self, steps_per_epoch: int) -> "UnfreezePlan":
        """The plan in steps, of one that was written in epochs: ``UnfreezePlan({"head": 0, "*": 2}).in_epochs(len(loader))``.

        Raises:
            ValueError: ``steps_per_epoch`` is no whole number, or below 1.
        """
        if not isinstance(steps_per_epoch, Integral) or steps_per_epoch < 1:
            raise ValueError(f"steps_per_epoch must be a whole number, 1 or above, not {steps_per_epoch!r}")
        return UnfreezePlan({name: first * steps_per_epoch for name, first in self.first_steps.items()})

    def trainable_at(self, step: int) -> set[str]:
        """The names (of a plan with patterns: the names and patterns) of what trains at this step."""
        return {name for name, first in self.first_steps.items() if first <= step}

    def of(self, names: Sequence[str]) -> "UnfreezePlan":
        """The plan with the groups' ``names`` in place of patterns.

        Raises:
            ValueError: a name or pattern that fits none of them (says which come close).
        """
        return UnfreezePlan(assigned(self.first_steps, names))

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(dict(self.first_steps))

    @classmethod
    def from_json(cls, text: str) -> "UnfreezePlan":
        """The plan that :meth:`to_json` wrote.

        Raises:
            ValueError: text that is no such plan.
        """
        first_steps = json.loads(text)
        if not isinstance(first_steps, dict):
            raise ValueError(f"expected a JSON object of group names and first steps, not {text[:60]!r}")
        return cls(first_steps)


class ProgressiveUnfreezing:
    """Carries out a plan: call :meth:`apply` before each step.

    A frozen group's parameters do not ask for gradients and have none, so no optimizer moves them, whatever its
    momentum or weight decay. Its BatchNorm layers are treated as ``batch_norm`` says, also after ``model.train()``:

    - ``"freeze"``: they run as in eval mode, on the stored statistics, which do not move. Frozen means frozen.
    - ``"statistics"``: they run in the model's mode; in train mode they normalise by the batch and go on averaging
      their statistics, only their scale and shift are frozen. This is what ``requires_grad = False`` alone does.
    - ``"train"``: they are not frozen at all: statistics, scale and shift train from the start.

    A BatchNorm layer whose scale and shift are in different groups is frozen until both train. InstanceNorm layers
    that keep statistics are treated in the same way. Dropout stays as it is in a frozen group: it is noise, not state.

    Raises:
        ValueError: a plan that names a group that does not exist, or an unknown ``batch_norm``.
    """

    def __init__(self, groups: Sequence[LayerGroup], plan: UnfreezePlan, *, batch_norm: str = "freeze"):
        _check_mode(batch_norm)
        self.groups, self.plan, self.batch_norm = list(groups), plan.of([group.name for group in groups]), batch_norm

    def apply(self, step: int) -> set[str]:
        """Freeze and unfreeze so that exactly the plan's groups for this step train; returns their names."""
        active, training = self.plan.trainable_at(step), self.training_at(step)
        for group in self.groups:
            for p in group.params.values():
                p.requires_grad_(id(p) in training)
                if id(p) not in training:
                    p.grad = None
        for norm, groups in _norms(self.groups).items():
            own = list(norm.parameters())  # none where affine=False: then the groups that it is in decide
            trains = all(id(p) in training for p in own) if own else groups <= active
            _hold(norm, self.batch_norm == "freeze" and not trains)
        return active

    def training_at(self, step: int) -> set[int]:
        """The ids of the parameters that train at this step, a pure function of the step."""
        active = self.plan.trainable_at(step)
        training = {id(p) for group in self.groups if group.name in active for p in group.params.values()}
        if self.batch_norm == "train":
            training |= {id(p) for norm in _norms(self.groups) for p in norm.parameters()}
        return training

    def release(self) -> None:
        """Unfreeze everything and let the BatchNorm layers run in the model's mode again."""
        unfreeze(self.groups, "*")


def freeze(groups: Sequence[LayerGroup], *patterns: str, batch_norm: str = "freeze") -> set[str]:
    """Freeze groups from now on, by name or pattern, ``freeze(groups, "stem", "layer*")``; returns their names.

    What is not named stays as it is. ``batch_norm`` is as in :class:`ProgressiveUnfreezing`, which is for groups that
    shall unfreeze later: it decides anew before each step.

    Raises:
        ValueError: no pattern, one that fits no group (says which come close), or an unknown ``batch_norm``.
    """
    _check_mode(batch_norm)
    chosen = _chosen(groups, patterns)
    norms = {norm for norm, owners in _norms(groups).items() if owners & chosen}
    spared = {id(p) for norm in norms for p in norm.parameters()} if batch_norm == "train" else set()
    for group in groups:
        for p in group.params.values():
            if group.name in chosen and id(p) not in spared:
                p.requires_grad_(False)
                p.grad = None
    for norm in norms:
        _hold(norm, batch_norm == "freeze")
    return chosen


def unfreeze(groups: Sequence[LayerGroup], *patterns: str) -> set[str]:
    """Undo :func:`freeze` for groups by name or pattern; returns their names.

    A BatchNorm layer whose scale and shift are in different groups is let go when both train.

    Raises:
        ValueError: no pattern, or one that fits no group (says which come close).
    """
    chosen = _chosen(groups, patterns)
    for group in groups:
        for p in group.params.values():
            if group.name in chosen:
                p.requires_grad_(True)
    for norm, owners in _norms(groups).items():
        if owners & chosen and all(p.requires_grad for p in norm.parameters()):
            _hold(norm, False)
    return chosen


def _chosen(groups: Sequence[LayerGroup], patterns: Sequence[str]) -> set[str]:
    names = [group.name for group in groups]
    if not patterns:
        raise ValueError(f"name the groups, or give patterns such as 'layer*'; there are: {listed(names)}")
    return {name for pattern in patterns for name in matching(pattern, names)}


def _check_mode(batch_norm: str) -> None:
    if batch_norm not in BATCH_NORM_MODES:
        raise ValueError(f"unknown batch_norm {batch_norm!r}; known are {', '.join(map(repr, BATCH_NORM_MODES))}")


def _norms(groups: Sequence[LayerGroup]) -> dict[nn.Module, set[str]]:
    """The norms that keep statistics, each with the names of the groups that it is in."""
    found: dict[nn.Module, set[str]] = {}
    for group in groups:
        for module in group.modules.values():
            for part in module.modules():
                if isinstance(part, _NormBase):
                    found.setdefault(part, set()).add(group.name)
    return found


def _hold(norm: nn.Module, still: bool) -> None:
    """Make a norm run as in eval mode, or no longer.

    The handles are kept on the norm, so that a copy of the model, or a second ProgressiveUnfreezing, can let go too.
    """
    if still and not hasattr(norm, "_held_still"):
        norm._held_still = (norm.register_forward_pre_hook(_run_as_eval),
                            norm.register_forward_hook(_back_to_mode, always_call=True))
    elif not still:
        for handle in norm.__dict__.pop("_held_still", ()):
            handle.remove()


# The mode is changed for the forward pass alone, so that model.train() and model.eval() mean what they always do.
def _run_as_eval(norm: nn.Module, args) -> None:
    norm._mode_outside, norm.training = norm.training, False


def _back_to_mode(norm: nn.Module, args, output) -> None:
    norm.training = norm.__dict__.pop("_mode_outside", norm.training)


MODES = ("max", "min")


class PlateauUnfreezing(ProgressiveUnfreezing):
    """Unfreezes one group more, from the last to the first, each time a validation metric has stopped improving.

    ``fit`` reports the metrics after each epoch; in a loop of your own call :meth:`report`. What has been unfrozen so
    far is an ordinary ``plan`` with the steps at which it happened, and with :meth:`state_dict` a run resumes where
    it was (``fit`` puts it into its checkpoint).

    Args:
        groups: from ``layer_groups``; the last one, the head, trains from the start.
        metric: the name of the metric to watch, ``"val_accuracy"`` or ``"val_loss"``.
        mode: ``"max"`` if larger is better, ``"min"`` if smaller is.
        patience: how many reports without an improvement unfreeze the next group.
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
        """Take note of the metrics before step number ``step``; unfreezes the next group from that step on if due.

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
        """What has been unfrozen and when, the best value and how long it has been."""
        return {"plan": self.plan.to_json(), "best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict) -> None:
        """Go on from what :meth:`state_dict` gave.

        Raises:
            ValueError: its plan names a group that is not here.
        """
        plan = UnfreezePlan.from_json(state["plan"]).of([group.name for group in self.groups])
        self.plan, self.best, self.waited = plan, state["best"], state["waited"]
