"""Several optimizers as one, each for parameters of its own."""

import torch
from torch.optim import Optimizer


class CombinedOptimizer(Optimizer):
    """Several optimizers that are stepped together and look like one, e.g. Muon for matrices beside AdamW for the rest.

    ::

        def is_matrix(p): return p.ndim == 2
        muon = torch.optim.Muon(param_groups(groups, rates, select=is_matrix))
        adamw = torch.optim.AdamW(param_groups(groups, rates, select=lambda p: not is_matrix(p)))
        optimizer = CombinedOptimizer(muon, adamw)

    Its parameter groups are those of its members, in order: one schedule moves them all, and what needs every group in one
    optimizer, such as ``fit`` and plans of unfreezing, finds them. Its state is theirs. No member at all, and a parameter
    that two members share, are a ValueError, and so is a new group; members have theirs from the start.
    """

    def __init__(self, *optimizers: Optimizer):
        self.optimizers = optimizers
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        # torch's schedulers look into the defaults for the kind of momentum, so these name what all groups have.
        super().__init__(groups, {name: value for name, value in (optimizers[0].defaults if optimizers else {}).items()
                                  if all(name in group for group in groups)})

    @property
    def state(self) -> dict:
        """The state of every parameter, from the member that has it."""
        return {p: state for optimizer in self.optimizers for p, state in optimizer.state.items()}

    @state.setter
    def state(self, empty: dict) -> None:
        """Ignore the empty state that torch's constructor sets."""

    @torch.no_grad()
    def step(self, closure=None):
        """Step every member; a closure, which computes the loss, is called once before."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def train(self) -> None:
        """Put those members into train mode that have modes."""
        self._set_mode("train")

    def eval(self) -> None:
        """Put those members into eval mode that have modes."""
        self._set_mode("eval")

    def _set_mode(self, mode: str) -> None:
        for optimizer in self.optimizers:
            if hasattr(optimizer, mode):
                getattr(optimizer, mode)()

    def state_dict(self) -> dict:
        """The members' own state dictionaries, in order."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict) -> None:
        """Load what :meth:`state_dict` gave, each member's its own way; a ValueError if it is of other optimizers."""
        saved = state_dict.get("optimizers", ())
        if len(saved) != len(self.optimizers):
            raise ValueError(f"expected the state of {len(self.optimizers)} optimizers together, and got that of "
                             f"{len(saved) or 'one'}")
        for optimizer, state in zip(self.optimizers, saved, strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def add_param_group(self, param_group: dict) -> None:
        """Take a member's group, when the optimizer is made; any other is a ValueError, since no member would step it."""
        if not any(param_group is group for optimizer in self.optimizers for group in optimizer.param_groups):
            raise ValueError("no member would step this group; give it to one of the optimizers before combining them")
        super().add_param_group(param_group)

    def __reduce__(self):  # torch would copy and pickle the groups and forget the members
        return type(self), self.optimizers
