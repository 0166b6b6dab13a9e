"""Progressive unfreezing: a plan as plain data, and what carries it out.

Which groups train is a pure function of the step number. Nothing has to be remembered, so a run that is resumed at
any step does what an uninterrupted one does. All groups stay in the optimizer from the start.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # the common base of all kinds, SyncBatchNorm too

from layerlr_helpers.layers import LayerGroup
from layerlr_helpers.naming import listed, matching

BATCH_NORM_MODES = ("freeze", "statistics", "train")


@dataclass(frozen=True)
class UnfreezePlan:
    """The first step at which each group trains: ``UnfreezePlan({"head": 0, "layer4": 100, "layer3": 200})``.

    A group that is not named never trains.

    Raises:
        ValueError: a first step that is no whole number or is below 0.
    """

    first_steps: Mapping[str, int]

    def __post_init__(self):
        for name, first in self.first_steps.items():
            if not isinstance(first, int) or isinstance(first, bool) or first < 0:
                raise ValueError(f"the first step of {name!r} must be a whole number, 0 or above, not {first!r}")
        object.__setattr__(self, "first_steps", dict(self.first_steps))

    @classmethod
    def top_down(cls, groups: Sequence[LayerGroup], every: int, first: int = 0) -> "UnfreezePlan":
        """The head at step ``first``, then one group more, from the last to the first, ``every`` so many steps.

        Gradual unfreezing of ULMFiT (Howard and Ruder, 2018).
        """
        return cls({group.name: first + i * every for i, group in enumerate(reversed(groups))})

    def trainable_at(self, step: int) -> set[str]:
        """The names of the groups that train at this step."""
        return {name for name, first in self.first_steps.items() if first <= step}

    def check(self, names: Sequence[str]) -> None:
        """Raise a ValueError if the plan names a group that is not among ``names``."""
        for name in self.first_steps:
            if name not in names:
                matching(name.replace("*", "?"), names)  # raises, with the names that come close
                raise ValueError(f"a plan takes names, not patterns like {name!r}; there are: {listed(names)}")

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

    Raises:
        ValueError: a plan that names a group that does not exist, or an unknown ``batch_norm``.
    """

    def __init__(self, groups: Sequence[LayerGroup], plan: UnfreezePlan, *, batch_norm: str = "freeze"):
        if batch_norm not in BATCH_NORM_MODES:
            raise ValueError(f"unknown batch_norm {batch_norm!r}; known are {', '.join(map(repr, BATCH_NORM_MODES))}")
        plan.check([group.name for group in groups])
        self.groups, self.plan, self.batch_norm = list(groups), plan, batch_norm
        self._handles: dict[nn.Module, list] = {}

    def apply(self, step: int) -> set[str]:
        """Freeze and thaw so that exactly the plan's groups for this step train; returns their names."""
        active = self.plan.trainable_at(step)
        for group in self.groups:
            norms = _batch_norms(group)
            spared = {id(p) for norm in norms for p in norm.parameters()} if self.batch_norm == "train" else set()
            for p in group.params.values():
                train = group.name in active or id(p) in spared
                p.requires_grad_(train)
                if not train:
                    p.grad = None
            for norm in norms:
                self._hold(norm, group.name not in active and self.batch_norm == "freeze")
        return active

    def release(self) -> None:
        """Thaw everything and take the hooks off the BatchNorm layers."""
        for group in self.groups:
            for p in group.params.values():
                p.requires_grad_(True)
        for norm in list(self._handles):
            self._hold(norm, False)

    def _hold(self, norm: nn.Module, still: bool) -> None:
        if still and norm not in self._handles:
            self._handles[norm] = [norm.register_forward_pre_hook(_run_as_eval),
                                   norm.register_forward_hook(_back_to_mode, always_call=True)]
        elif not still:
            for handle in self._handles.pop(norm, ()):
                handle.remove()


def _batch_norms(group: LayerGroup) -> list[nn.Module]:
    return list(dict.fromkeys(part for module in group.modules.values() for part in module.modules()
                              if isinstance(part, _BatchNorm)))


# The mode is changed for the forward pass alone, so that model.train() and model.eval() mean what they always do.
def _run_as_eval(norm: nn.Module, args) -> None:
    norm._mode_outside, norm.training = norm.training, False


def _back_to_mode(norm: nn.Module, args, output) -> None:
    norm.training = norm.__dict__.pop("_mode_outside", norm.training)
