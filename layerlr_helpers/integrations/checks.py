"""What must hold before a plan of unfreezing is carried out in a training loop that is not ours."""

from collections.abc import Iterable

from layerlr_helpers.naming import listed
from layerlr_helpers.preflight import groups_outside
from layerlr_helpers.unfreezing import ProgressiveUnfreezing


def check_installed(base: type, callback: str, package: str) -> None:
    """Raise an ImportError unless ``base`` is the class of the library, for which ``object`` stands in where it is missing."""
    if base is object:
        raise ImportError(f"{callback} needs the package {package}, which is not installed; pip install {package}")


def check_is_plan(unfreezing: ProgressiveUnfreezing) -> None:
    """Raise an error unless what to unfreeze is a function of the step number."""
    if not isinstance(unfreezing, ProgressiveUnfreezing):
        raise TypeError("expected a ProgressiveUnfreezing(groups, plan), as fit takes it, and got a "
                        f"{type(unfreezing).__name__}")
    if hasattr(unfreezing, "report"):
        raise ValueError(f"{type(unfreezing).__name__} decides by validation metrics, which only fit hands on and keeps in its "
                         "checkpoint; use ProgressiveUnfreezing(groups, UnfreezePlan(…))")


def check_in_optimizer(unfreezing: ProgressiveUnfreezing, param_groups: Iterable[dict]) -> None:
    """Raise a ValueError if the optimizer lacks parameters of the plan's groups that could train."""
    if missing := groups_outside(param_groups, unfreezing.groups):
        raise ValueError(f"the unfreezing's groups {listed(missing)} are not in the optimizer, so they would never train; make "
                         "the optimizer of param_groups(groups, …), with the same groups")


def check_distributed(unfreezing: ProgressiveUnfreezing, finds_unused: bool, remedy: str) -> None:
    """Raise a ValueError if several processes would not average the gradients of all that the plan trains.

    DistributedDataParallel waits for the gradients of frozen parameters, unless told not to, and never averages those of
    parameters that were frozen when it was made: they would become different ones in each process.
    """
    if not finds_unused:
        raise ValueError("in several processes a plan needs DistributedDataParallel with find_unused_parameters=True; "
                         + remedy)
    frozen = [name for group in unfreezing.groups for name, p in group.params.items()
              if not p.requires_grad and name not in group.fixed]
    if frozen:
        raise ValueError(f"{listed(frozen, most=4)} were frozen before the training began, so DistributedDataParallel would "
                         "never average their gradients; leave all freezing to the plan")
