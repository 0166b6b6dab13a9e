"""Progressive unfreezing: a plan as plain data, and the objects that carry it out.

Which groups train is a pure function of the step number, so a run that is resumed at any step does what an
uninterrupted one does. All groups stay in the optimizer from the start.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral

from torch import nn
from torch.nn.modules.batchnorm import _NormBase  # the common base of all kinds, SyncBatchNorm and InstanceNorm too

from layerlr_helpers.layers import LayerGroup
from layerlr_helpers.naming import assigned, check_choice, listed, matching


@dataclass(frozen=True)
class UnfreezePlan:
    """The first step at which each group trains: ``UnfreezePlan({"head": 0, "layer4": 100, "layer[123]": 200})``.

    A group that is not named never trains. A group's name goes before any pattern, and of several patterns that match,
    the last one wins. A first step must be a whole number, 0 or above; otherwise it is a ValueError.
    """

    first_steps: Mapping[str, int]

    def __post_init__(self):
        for name, first in self.first_steps.items():
            if not isinstance(first, Integral) or isinstance(first, bool) or first < 0:
                raise ValueError(f"the first step of {name!r} must be a whole number, 0 or above, not {first!r}")
        object.__setattr__(self, "first_steps", {name: int(first) for name, first in self.first_steps.items()})

    @classmethod
    def top_down(cls, groups: Sequence[LayerGroup], every: int, first: int = 0) -> "UnfreezePlan":
        """The head at step ``first``, then one group more each ``every`` steps (ULMFiT, Howard and Ruder, 2018)."""
        return cls({group.name: first + i * every for i, group in enumerate(reversed(groups))})

    def in_epochs(self, steps_per_epoch: int) -> "UnfreezePlan":
        """The plan in steps, if its numbers are epochs: ``UnfreezePlan({"head": 0, "*": 2}).in_epochs(len(loader))``."""
        if not isinstance(steps_per_epoch, Integral) or steps_per_epoch < 1:
            raise ValueError(f"steps_per_epoch must be a whole number, 1 or above, not {steps_per_epoch!r}")
        return UnfreezePlan({name: first * steps_per_epoch for name, first in self.first_steps.items()})

    def trainable_at(self, step: int) -> set[str]:
        """The names and patterns in this plan whose groups train at this step."""
        return {name for name, first in self.first_steps.items() if first <= step}

    def resolved(self, names: Sequence[str]) -> "UnfreezePlan":
        """The plan with the names of groups in place of patterns; a ValueError if one matches none of ``names``.

        >>> UnfreezePlan({"head": 0, "layer*": 100}).resolved(["stem", "layer1", "layer2", "head"]).to_json()
        '{"layer1": 100, "layer2": 100, "head": 0}'
        """
        return UnfreezePlan(assigned(self.first_steps, names))

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(self.first_steps)

    @classmethod
    def from_json(cls, text: str) -> "UnfreezePlan":
        """The plan that :meth:`to_json` wrote; a ValueError if the text is not such a plan."""
        first_steps = json.loads(text)
        if not isinstance(first_steps, dict):
            raise ValueError(f"expected a JSON object of group names and first steps, not {text[:60]!r}")
        return cls(first_steps)


class ProgressiveUnfreezing:
    """Carries out a plan: call :meth:`apply` before each step.

    A frozen group's parameters require no gradients and have none, so no optimizer moves them, whatever its momentum
    or weight decay. Its BatchNorm layers are treated as ``batch_norm`` says, also after ``model.train()``:

    - ``"freeze"``: they run as in eval mode, on the stored statistics, which do not move. Frozen means frozen.
    - ``"statistics"``: they run in the model's mode; in train mode they normalise by the batch and go on averaging
      their statistics, only their scale and shift are frozen. This is what ``requires_grad = False`` alone does.
    - ``"train"``: they are not frozen at all: statistics, scale and shift train from the start.

    A BatchNorm layer whose scale and shift are in different groups is frozen until both train. InstanceNorm layers
    that keep statistics are treated in the same way. Dropout stays as it is in a frozen group: it is noise, not state.
    A plan that names a group that does not exist and an unknown ``batch_norm`` are a ValueError.
    """

    def __init__(self, groups: Sequence[LayerGroup], plan: UnfreezePlan, *, batch_norm: str = "freeze"):
        check_choice("batch_norm", batch_norm, ("freeze", "statistics", "train"))
        self.groups, self.batch_norm = list(groups), batch_norm
        self.plan = plan.resolved([group.name for group in groups])

    def apply(self, step: int) -> set[str]:
        """Freeze and unfreeze so that exactly the plan's groups for this step train; returns their names."""
        active, training = self.plan.trainable_at(step), self.training_at(step)
        for group in self.groups:
            for p in group.params.values():
                p.requires_grad_(id(p) in training)
                if not p.requires_grad:
                    p.grad = None
        for norm, groups in _norm_groups(self.groups).items():
            params = list(norm.parameters())  # none if affine=False: then the groups that the norm is in decide
            trains = all(id(p) in training for p in params) if params else groups <= active
            hold_batch_norm(norm, self.batch_norm == "freeze" and not trains)
        return active

    def training_at(self, step: int) -> set[int]:
        """The ids of the parameters that train at this step, a pure function of the step."""
        active = self.plan.trainable_at(step)
        training = {id(p) for group in self.groups if group.name in active for p in group.params.values()}
        if self.batch_norm == "train":
            training |= {id(p) for norm in _norm_groups(self.groups) for p in norm.parameters()}
        return training

    def release(self) -> None:
        """Unfreeze everything and let the BatchNorm layers run in the model's mode again."""
        unfreeze(self.groups, "*")


class PlateauUnfreezing(ProgressiveUnfreezing):
    """Unfreezes one group more, from the last to the first, each time a validation metric has stopped improving.

    ``fit`` reports the metrics after each epoch; in a loop of your own call :meth:`report`. ``plan`` holds what has been
    unfrozen so far and at which steps. ``fit`` puts the :meth:`state_dict` into its checkpoint, so a run can be resumed.

    Args:
        groups: from ``layer_groups``; the last one, the head, trains from the start.
        metric, mode: what to watch, ``"val_accuracy"`` or ``"val_loss"``, and whether its ``"max"`` or its ``"min"`` is best.
        patience: how many reports without an improvement of more than ``min_delta`` unfreeze the next group, 1 or more.
        batch_norm: of frozen groups, as in :class:`ProgressiveUnfreezing`.
    """

    def __init__(self, groups: Sequence[LayerGroup], *, metric: str = "val_accuracy", mode: str = "max", patience: int = 1,
                 min_delta: float = 0.0, batch_norm: str = "freeze"):
        check_choice("mode", mode, ("max", "min"))
        if patience < 1:
            raise ValueError(f"patience must be at least 1, not {patience}")
        super().__init__(groups, UnfreezePlan({groups[-1].name: 0}), batch_norm=batch_norm)
        self.metric, self.mode, self.patience, self.min_delta = metric, mode, patience, min_delta
        self.best: float | None = None
        self.waited = 0

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take note of the metrics before step number ``step``; unfreezes the next group from that step on if due."""
        if self.metric not in metrics:
            raise ValueError(f"no metric {self.metric!r} was reported, only {', '.join(metrics)}; fit needs a val_loader")
        value = metrics[self.metric]
        sign = 1 if self.mode == "max" else -1
        if self.best is None or sign * (value - self.best) > self.min_delta:
            self.best, self.waited = value, 0
            return
        self.waited += 1
        frozen = [group.name for group in self.groups if group.name not in self.plan.first_steps]
        if self.waited >= self.patience and frozen:
            self.plan = UnfreezePlan({**self.plan.first_steps, frozen[-1]: step})
            self.waited = 0

    def state_dict(self) -> dict:
        """What has been unfrozen and when, the best value and the number of reports since."""
        return {"plan": self.plan.to_json(), "best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict) -> None:
        """Go on from what :meth:`state_dict` gave; a ValueError if its plan names a group that does not exist."""
        self.plan = UnfreezePlan.from_json(state["plan"]).resolved([group.name for group in self.groups])
        self.best, self.waited = state["best"], state["waited"]


def freeze(groups: Sequence[LayerGroup], *patterns: str, batch_norm: str = "freeze") -> set[str]:
    """Freeze groups from now on, by name or pattern, ``freeze(groups, "stem", "layer*")``; returns their names.

    The other groups stay as they are. ``batch_norm`` is as in :class:`ProgressiveUnfreezing`, which is for groups that
    shall unfreeze later. No pattern, one that matches no group and an unknown ``batch_norm`` are a ValueError.
    """
    chosen = _chosen(groups, patterns)
    to_freeze = [group for group in groups if group.name in chosen]
    ProgressiveUnfreezing(to_freeze, UnfreezePlan({}), batch_norm=batch_norm).apply(0)  # a plan by which nothing ever trains
    return chosen


def unfreeze(groups: Sequence[LayerGroup], *patterns: str) -> set[str]:
    """Undo :func:`freeze` for groups by name or pattern; returns their names.

    A BatchNorm layer whose scale and shift are in different groups is let go when both train. No pattern, or one that
    matches no group, is a ValueError.
    """
    chosen = _chosen(groups, patterns)
    for group in groups:
        if group.name in chosen:
            for p in group.params.values():
                p.requires_grad_(True)
    for norm, names in _norm_groups(groups).items():
        if names & chosen and all(p.requires_grad for p in norm.parameters()):
            hold_batch_norm(norm, False)
    return chosen


def hold_batch_norm(norm: nn.Module, still: bool) -> None:
    """Let a norm run as in eval mode whatever its mode (``still``), or no longer.

    The hooks' handles are kept on the norm, so that a copy of the model, or a second ProgressiveUnfreezing, can remove them.
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


def _chosen(groups: Sequence[LayerGroup], patterns: Sequence[str]) -> set[str]:
    names = [group.name for group in groups]
    if not patterns:
        raise ValueError(f"name the groups, or give patterns such as 'layer*'; there are: {listed(names)}")
    return {name for pattern in patterns for name in matching(pattern, names)}


def _norm_groups(groups: Sequence[LayerGroup]) -> dict[nn.Module, set[str]]:
    """The norms that keep statistics, each with the names of the groups that it is in."""
    names_of_norm: dict[nn.Module, set[str]] = {}
    for group in groups:
        for norm in (part for module in group.modules.values() for part in module.modules() if isinstance(part, _NormBase)):
            names_of_norm.setdefault(norm, set()).add(group.name)
    return names_of_norm
