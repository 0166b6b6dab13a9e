"""What ``fit`` refuses, or warns of, before anything has changed."""

import warnings
from collections.abc import Iterable
from numbers import Integral, Real
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau

from layerlr_helpers.layers import LayerGroup
from layerlr_helpers.metrics import check_metrics
from layerlr_helpers.naming import check_choice, listed
from layerlr_helpers.param_groups import named


def check_run(model: nn.Module, optimizer: Optimizer, *, epochs, steps, batches, schedule, schedule_every, unfreezing,
              val_loader, checkpoint, checkpoint_every, loss_fn, autocast, clip_grad_norm, accumulate, metrics) -> None:
    """Raise a ValueError about arguments of ``fit`` that do not fit together."""
    number = epochs if steps is None else steps
    missing = groups_outside(optimizer.param_groups, getattr(unfreezing, "groups", ()))
    problems = [
        (None not in (epochs, steps) or not isinstance(number, Integral) or number < 0,
         f"give exactly one of epochs and steps, a whole number, 0 or above; got epochs={epochs}, steps={steps}"),
        (missing, f"the unfreezing's groups {missing} are not in the optimizer, so they would never train; give the optimizer "
                  "all groups from the start"),
        (hasattr(unfreezing, "report") and val_loader is None,
         f"{type(unfreezing).__name__} decides by validation metrics; give fit a val_loader"),
        (schedule is not None and getattr(schedule, "optimizer", None) is not optimizer,
         "schedule must be a torch scheduler of the optimizer that is passed to fit, for example one_cycle(optimizer, steps)"),
        (isinstance(schedule, ReduceLROnPlateau) and schedule.mode != "min",
         "fit gives ReduceLROnPlateau the loss, which is best where it is lowest; make it with mode='min'"),
        (not isinstance(accumulate, Integral) or accumulate < 1,
         f"accumulate={accumulate!r} must be the number of batches that make one step, 1 or above"),
        (clip_grad_norm is not None and not (isinstance(clip_grad_norm, Real) and clip_grad_norm > 0),
         f"clip_grad_norm={clip_grad_norm!r} must be the largest norm that the gradient may have, a number above 0"),
        (checkpoint_every is not None
         and (checkpoint is None or not isinstance(checkpoint_every, Integral) or checkpoint_every < 1),
         f"checkpoint_every={checkpoint_every} must be a whole number, 1 or above; it needs checkpoint=…, the file to save to"),
        (isinstance(optimizer, LBFGS), "LBFGS calls the model several times in a step, which fit cannot do; use AdamW or SGD"),
        (number and not _something_trains(model, loss_fn, unfreezing),
         "nothing trains at step 0: every parameter is frozen, or the plan has no group yet; let one train from the start"),
        (batches == 0, "the train loader has no batch (is its batch_size above the number of images, with drop_last?)"),
        (steps is None and batches is None, "this train loader has no length; pass steps=… in place of epochs=…")]
    for wrong, message in problems:
        if wrong:
            raise ValueError(message)
    check_choice("schedule_every", schedule_every, ("step", "epoch"))
    check_metrics(metrics)
    reported = [f"val_{name}" for name in ("loss", *metrics)] if metrics is not None else None
    if reported and getattr(unfreezing, "metric", reported[0]) not in reported:
        raise ValueError(f"{type(unfreezing).__name__} waits for {unfreezing.metric!r}, and fit will report {listed(reported)}")
    check_precision(autocast, model)
    _check_optimizer(model, optimizer, loss_fn)
    if checkpoint is not None and not Path(checkpoint).parent.is_dir():
        raise FileNotFoundError(f"no folder {Path(checkpoint).parent} to save the checkpoint in; make it first")
    if unfreezing is not None and isinstance(model, DistributedDataParallel):
        _check_distributed(model)


def check_precision(autocast: torch.dtype | None, model: nn.Module | None = None) -> None:
    """Raise a ValueError if gradients would be computed in float16, in which small ones are 0 unless the loss is scaled."""
    parameters = [] if model is None else model.named_parameters()  # a compiled model is not true or false
    half = [name for name, p in parameters if p.dtype == torch.float16 and p.requires_grad]
    if half or autocast == torch.float16:
        what = f"the parameters {listed(half, 4)} are float16" if half else "autocast is torch.float16"
        raise ValueError(f"{what}: it cannot hold small gradients, which become 0 unless the loss is scaled, and it is not "
                         "scaled here; keep the model in float32 and pass autocast=torch.bfloat16, which can")


def check_schedule(schedule, schedule_every: str, total: int, resuming: bool) -> None:
    """Refuse a OneCycleLR that has fewer steps left than the run, since it would end it; warn of another such schedule."""
    if schedule_every == "step" and hasattr(schedule, "total_steps"):
        left = schedule.total_steps - (0 if resuming else schedule.last_epoch)
        if total > left:
            found = f"the schedule has {left} steps left and the run has {total}"
            if isinstance(schedule, OneCycleLR):
                raise ValueError(f"{found}; make the schedule with total_steps={total}")
            warnings.warn(f"{found}; after these it stays at its last rates, which may be 0. Make the schedule with "
                          f"total_steps={total}", stacklevel=3)


def _something_trains(model: nn.Module, loss_fn, unfreezing) -> bool:
    """Whether a parameter of the model or of the loss requires a gradient at the first step."""
    planned = {id(p) for group in getattr(unfreezing, "groups", ()) for p in group.params.values()}
    at_start = unfreezing.training_at(0) if planned and hasattr(unfreezing, "training_at") else None
    return any(p.requires_grad if at_start is None or id(p) not in planned else id(p) in at_start
               for module in (model, loss_fn) if isinstance(module, nn.Module) for p in module.parameters())


def groups_outside(param_groups: Iterable[dict], groups: Iterable[LayerGroup]) -> list[str]:
    """The names of the layer groups with parameters that could train, if they were in the optimizer's groups."""
    inside = {id(p) for group in param_groups for p in group["params"]}
    return [group.name for group in groups
            if not inside.issuperset(id(p) for name, p in group.params.items() if name not in group.fixed)]


def _check_optimizer(model: nn.Module, optimizer: Optimizer, loss_fn) -> None:
    """Refuse an optimizer that moves tensors of another model or of a layer that was replaced; warn of layers it does not have.

    Frozen tensors of others do no harm: a head that is trained by itself may have the optimizer of the whole model.
    """
    trained = {id(p) for module in (model, loss_fn) if isinstance(module, nn.Module) for p in module.parameters()}
    strange = {name: [list(p.shape) for p in group["params"] if id(p) not in trained and p.requires_grad]
               for name, group in named(optimizer).items()}
    strange = {name: shapes for name, shapes in strange.items() if shapes}
    inside = {id(p) for group in optimizer.param_groups for p in group["params"]}
    left_out = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside]
    if strange or (inside and inside.isdisjoint(trained)):
        lacks = f", and it lacks the model's {listed(left_out, 6)}" if left_out else ""
        holds = "; ".join(f"in {name!r}, shapes {listed(map(str, shapes), 4)}" for name, shapes in strange.items())
        raise ValueError("this optimizer was made for another model, or before layers of this one were replaced: it holds "
                         f"tensors that are not in the model that is passed to fit ({holds or 'all of them frozen'}){lacks}; "
                         "make the optimizer again after the model (a loss with parameters of its own must be a module)")
    if left_out:
        warnings.warn(f"the model's parameters {listed(left_out, 6)} require gradients and are not in the optimizer, so they "
                      "will never change; give them to the optimizer, or freeze them, which saves computing their gradients",
                      stacklevel=4)


def _check_distributed(model: DistributedDataParallel) -> None:
    # It waits for the gradients of frozen parameters, unless told not to, and never averages those of parameters that were
    # frozen when it was made: they would become different ones in each process.
    averaged, total = model._get_ddp_logging_data()["num_parameter_tensors"], len(list(model.parameters()))
    if not model.find_unused_parameters or averaged < total:
        raise ValueError("unfreezing needs DistributedDataParallel(model, find_unused_parameters=True), made before the "
                         f"model is frozen; this one has find_unused_parameters={model.find_unused_parameters} "
                         f"and averages {averaged} of the model's {total} parameters")
