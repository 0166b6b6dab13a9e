"""Progressive unfreezing: a plan as plain data, and the objects that carry it out.

Which groups train is a pure function of the step number, so a run that is resumed at any step does what an
uninterrupted one does. All groups stay in the optimizer from the start.
"""

import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from layerlr_helpers.holding import hold_still, layers_with_state
from layerlr_helpers.layers import FROZEN_BY_PLAN, LayerGroup, check_current
from layerlr_helpers.naming import assigned, check_choice, listed, matching
from layerlr_helpers.param_groups import depth_by_name


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
        """The head at step ``first``, then one depth more each ``every`` steps (ULMFiT, Howard and Ruder, 2018).

        Groups of one depth unfreeze together: two heads, or the same layer of two towers. A model without a head of its
        own begins with what is nearest to its output.
        """
        depths = depth_by_name(groups)
        order = sorted(set(depths.values()))
        return cls({name: first + order.index(depth) * every for name, depth in reversed(depths.items())})

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
    or weight decay. Its layers that keep a state, such as BatchNorm, are treated as ``batch_norm`` says, also after
    ``model.train()``:

    - ``"freeze"``: they run as in eval mode, on the stored statistics, which do not move. Frozen means frozen.
    - ``"statistics"``: they run in the model's mode; in train mode they normalise by the batch and go on averaging
      their statistics, only their scale and shift are frozen. This is what ``requires_grad = False`` alone does.
    - ``"train"``: BatchNorm is not frozen at all: statistics, scale and shift train from the start.
    - ``"hold"``: as ``"freeze"``, and in groups that train as well: no statistics move, only scale and shift train with their
      group. With the plan ``{"*": 0}`` everything trains on the statistics that the model came with.

    Layers with a state are BatchNorm, InstanceNorm, spectral norm, and layers of one's own with floating-point buffers
    that are saved with the model. One whose scale and shift are in different groups is frozen until both train. Dropout
    stays as it is in a frozen group: it is noise, not state.

    What a group names as ``fixed``, because it required no gradient when the model was grouped, never trains, nor do whole
    numbers. A name or pattern that stands for nothing else gets a warning, unless other groups have both kinds, as under
    LoRA. A plan that names a group that does not exist, an unknown ``batch_norm``, and groups whose parameters were replaced
    in the model since are a ValueError.
    """

    def __init__(self, groups: Sequence[LayerGroup], plan: UnfreezePlan, *, batch_norm: str = "freeze"):
        check_choice("batch_norm", batch_norm, ("freeze", "statistics", "train", "hold"))
        check_current(groups)
        self.groups, self.batch_norm = list(groups), batch_norm
        self.plan = plan.resolved([group.name for group in groups])
        if not any(group.fixed and may_train(group) for group in groups):
            _warn_of_fixed(groups, plan.first_steps)

    def apply(self, step: int) -> set[str]:
        """Freeze and unfreeze so that exactly the plan's groups for this step train; returns their names."""
        training = self.training_at(step)
        for group in self.groups:
            _set_training(group, training)
        in_training = {group.name for group in self.groups if not training.isdisjoint(map(id, group.params.values()))}
        for layer, names in layers_with_state(self.groups).items():
            own = [id(p) for p in layer.parameters(recurse=False)]  # a layer that has none trains with its groups
            trains = training.issuperset(own) if own else names <= in_training
            hold_still(layer, self.batch_norm == "hold" or (self.batch_norm == "freeze" and not trains))
        return self.plan.trainable_at(step)

    def training_at(self, step: int) -> set[int]:
        """The ids of the parameters that train at this step, a pure function of the step."""
        active = self.plan.trainable_at(step)
        training = {id(p) for group in self.groups if group.name in active for p in may_train(group).values()}
        if self.batch_norm == "train":
            norms = [layer for layer in layers_with_state(self.groups) if isinstance(layer, _NormBase)]
            able = {id(p) for group in self.groups for p in may_train(group).values()}
            training |= able & {id(p) for norm in norms for p in norm.parameters()}
        return training

    def release(self) -> None:
        """Unfreeze everything that the plan may train, and let all layers run in the model's mode again."""
        unfreeze(self.groups, "*")


class PlateauUnfreezing(ProgressiveUnfreezing):
    """Unfreezes one depth more, from the head down, each time a validation metric has stopped improving.

    ``fit`` reports the metrics after each epoch; in a loop of your own call :meth:`report`. ``plan`` holds what has been
    unfrozen so far and at which steps. ``fit`` puts the :meth:`state_dict` into its checkpoint, so a run can be resumed.

    Args:
        groups: from ``layer_groups``; the heads train from the start, or what is nearest to the output if there is none.
        metric, mode: what to watch, ``"val_accuracy"`` or ``"val_loss"``, and whether its ``"max"`` or its ``"min"`` is best.
        patience: how many reports without an improvement of more than ``min_delta`` unfreeze the next groups, 1 or more.
            A value that is infinite or not a number is no improvement.
        batch_norm: of frozen groups, as in :class:`ProgressiveUnfreezing`.

    Groups of which the model's author fixed every parameter are passed over. If that is all of them, it is a ValueError.
    """

    def __init__(self, groups: Sequence[LayerGroup], *, metric: str = "val_accuracy", mode: str = "max", patience: int = 1,
                 min_delta: float = 0.0, batch_norm: str = "freeze"):
        check_choice("mode", mode, ("max", "min"))
        if patience < 1:
            raise ValueError(f"patience must be at least 1, not {patience}")
        if not any(map(may_train, groups)):
            raise ValueError("there is no group that may train: no parameter required a gradient when the model was grouped; "
                             "call unfreeze(groups, '*', fixed=True) first")
        super().__init__(groups, UnfreezePlan({group.name: 0 for group in groups}), batch_norm=batch_norm)
        self.plan = UnfreezePlan({})
        self.plan = UnfreezePlan(dict.fromkeys(self._next(), 0))
        self.metric, self.mode, self.patience, self.min_delta = metric, mode, patience, min_delta
        self.best: float | None = None
        self.waited = 0

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take note of the metrics before step number ``step``; unfreezes the next group from that step on if due."""
        if self.metric not in metrics:
            raise ValueError(f"no metric {self.metric!r} was reported, only {', '.join(metrics)}; fit needs a val_loader")
        value = float(metrics[self.metric])
        sign = 1 if self.mode == "max" else -1
        if math.isfinite(value) and (self.best is None or sign * (value - self.best) > self.min_delta):
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited >= self.patience and (due := self._next()):
            self.plan = UnfreezePlan({**self.plan.first_steps, **dict.fromkeys(due, step)})
            self.waited = 0

    def _next(self) -> list[str]:
        """The names of the groups to unfreeze next: of those that are frozen and may train, the nearest to the output."""
        depths = depth_by_name(self.groups)
        frozen = [group.name for group in self.groups if may_train(group) and group.name not in self.plan.first_steps]
        return [name for name in frozen if depths[name] == min(depths[name] for name in frozen)]

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


def unfreeze(groups: Sequence[LayerGroup], *patterns: str, fixed: bool = False) -> set[str]:
    """Undo :func:`freeze` for groups by name or pattern; returns their names.

    What the model's author fixed stays as it is, with a warning if a pattern stands for nothing else; with ``fixed=True`` it
    trains as well, and so it does in plans from now on. Whole numbers never train. A layer with a state whose scale and
    shift are in different groups is let go when both train. No pattern, or one that matches no group, is a ValueError.
    """
    check_current(groups)
    chosen = _chosen(groups, patterns)
    if fixed:
        for group in groups:
            if group.name in chosen:
                group.fixed.difference_update([name for name, p in group.params.items() if _can_require_gradient(p)])
    else:
        _warn_of_fixed(groups, patterns)
    for group in groups:
        if group.name in chosen:
            _set_training(group, {id(p) for p in group.params.values()})
    able = {id(p) for group in groups for p in may_train(group).values()}
    for layer, names in layers_with_state(groups).items():
        if names & chosen and all(p.requires_grad for p in layer.parameters(recurse=False) if id(p) in able):
            hold_still(layer, False)
    return chosen


def may_train(group: LayerGroup) -> dict[str, nn.Parameter]:
    """The parameters of a group that a plan may train, by name: not those that are fixed, and no whole numbers.

    Whoever lets a fixed one require gradients by hand has decided that it is fixed no longer.
    """
    group.fixed.difference_update([name for name, p in group.params.items() if p.requires_grad])
    return {name: p for name, p in group.params.items() if name not in group.fixed and _can_require_gradient(p)}


def _can_require_gradient(p: nn.Parameter) -> bool:
    return p.is_floating_point() or p.is_complex()


def _set_training(group: LayerGroup, training: set[int]) -> None:
    """Let those parameters of a group that may train require gradients if their ids are in ``training``, and no others.

    The model notes the names of those that are frozen now, so that whoever groups it again, or a copy of it, does not take
    them for fixed by its author.
    """
    able = may_train(group)
    for p in able.values():
        p.requires_grad_(id(p) in training)
        if not p.requires_grad:
            p.grad = None
    if group.model is not None:
        frozen = {name for name, p in able.items() if not p.requires_grad}
        noted = group.model.__dict__.pop(FROZEN_BY_PLAN, set()) - able.keys() | frozen
        if noted:
            setattr(group.model, FROZEN_BY_PLAN, noted)


def _warn_of_fixed(groups: Sequence[LayerGroup], patterns: Iterable[str]) -> None:
    """Warn of names and patterns that stand for nothing but groups of which no parameter may train."""
    never = {group.name for group in groups if not may_train(group)}
    if idle := [pattern for pattern in patterns if never.issuperset(matching(pattern, [group.name for group in groups]))]:
        warnings.warn(f"nothing will ever train in {listed(idle)}: all parameters there had requires_grad=False when the model "
                      "was grouped, so they are taken for fixed by its author. If you froze them yourself and want them to "
                      f"train, call unfreeze(groups, {idle[0]!r}, fixed=True) first; else leave them out", stacklevel=3)


def _chosen(groups: Sequence[LayerGroup], patterns: Sequence[str]) -> set[str]:
    names = [group.name for group in groups]
    if not patterns:
        raise ValueError(f"name the groups, or give patterns such as 'layer*'; there are: {listed(names)}")
    return {name for pattern in patterns for name in matching(pattern, names)}
