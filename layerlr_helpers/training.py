"""A training loop, an evaluation and the record of what happened.

The loop is the one that notebook 02 writes out in the open, plus what a long run needs: a progress bar, a
checkpoint that is never half written, and a resume that continues exactly where the run stopped.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from tqdm.auto import tqdm

from layerlr_helpers import checkpoints
from layerlr_helpers.guards import preserved
from layerlr_helpers.naming import check_choice
from layerlr_helpers.param_groups import current_rates


@dataclass
class History:
    """What a run did, one plain dictionary a step: step, epoch, loss, accuracy, the rates, validation metrics."""

    rows: list[dict] = field(default_factory=list)

    def to_frame(self) -> pd.DataFrame:
        """One row a step: ``step, epoch, loss, accuracy``, ``lr/NAME`` of every group (0 while it is frozen).

        ``val_loss`` and ``val_accuracy`` stand on the last step of each epoch, if there was a validation loader.
        Loss and accuracy are those of the step's own batch, before its update.
        """
        return pd.json_normalize(self.rows, sep="/")


def fit(model: nn.Module, optimizer: Optimizer, train_loader: Iterable, *, epochs: int | None = None,
        steps: int | None = None, schedule: LRScheduler | ReduceLROnPlateau | None = None, schedule_every: str = "step",
        unfreezing=None, val_loader: Iterable | None = None, checkpoint: str | Path | None = None,
        checkpoint_every: int | None = None, loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        autocast: torch.dtype | None = None, progress: bool = True) -> History:
    """Train ``model`` for a number of ``epochs`` or of ``steps`` and return the :class:`History`.

    A batch is ``(inputs, labels)``; inputs may be a tensor or a dictionary of keyword arguments. Everything runs on
    the device that the model is on. The model is left in train mode.

    Args:
        schedule: a torch scheduler of this optimizer, stepped after every optimizer step, or after every epoch with
            ``schedule_every="epoch"`` (``ReduceLROnPlateau`` always is, with the validation loss if there is one, else
            with the epoch's mean training loss).
        unfreezing: anything with ``apply(step)``, called before every step: a ``ProgressiveUnfreezing``. If it has a
            ``report(step, metrics)``, that is called after every epoch's validation: a ``PlateauUnfreezing``.
        val_loader: evaluated after every epoch, and at the end.
        checkpoint: a file to save to after every epoch, at the end and, with ``checkpoint_every``, every so many steps.
            If it exists, the run resumes from it, with the order of batches and torch's random numbers it would have had.
        loss_fn: of (logits, labels).
        autocast: a lower precision for the forward pass, e.g. ``torch.bfloat16``; None leaves all as it is.
        progress: show a bar (the environment variable TQDM_DISABLE=1 turns all bars off).

    Before anything changes, arguments that do not fit together are a ValueError, and so is a checkpoint that is damaged, of
    another run, or of one that began with other rates, options or first steps.
    """
    _check(model, optimizer, epochs, steps, schedule, schedule_every, unfreezing, val_loader, checkpoint, checkpoint_every)
    batches = checkpoints.length(train_loader)
    resuming = checkpoint is not None and Path(checkpoint).exists()
    total = _total_steps(epochs, steps, batches, schedule, schedule_every, resuming)

    rows: list[dict] = []
    state = checkpoints.RunState()
    if checkpoint is not None:
        parts = {"model": model, "optimizer": optimizer, "schedule": schedule,
                 "unfreezing": unfreezing if hasattr(unfreezing, "state_dict") else None}
        description = checkpoints.run_description(parts, train_loader, unfreezing)
    if resuming:
        rows, state, description = checkpoints.load(checkpoint, parts, train_loader, description, total)
    scheduled = "plateau" if isinstance(schedule, ReduceLROnPlateau) else schedule_every if schedule is not None else "never"

    def train_batch(inputs, labels: Tensor) -> None:
        if unfreezing is not None:
            unfreezing.apply(state.step)
        rates = current_rates(optimizer)
        batch_metrics = train_step(model, optimizer, inputs, labels, loss_fn, autocast)
        rows.append({"step": state.step, "epoch": state.epoch, **batch_metrics, "lr": rates})
        if scheduled == "step":
            schedule.step()
        state.step, state.batch = state.step + 1, state.batch + 1

    def validate() -> dict[str, float]:
        metrics = evaluate(model, val_loader, loss_fn=loss_fn, autocast=autocast) if val_loader is not None else {}
        return {f"val_{name}": metrics[name] for name in ("loss", "accuracy") if metrics}

    def end_epoch() -> None:
        metrics = validate()
        rows[-1] |= metrics
        if hasattr(unfreezing, "report"):
            unfreezing.report(state.step, metrics)
        if scheduled == "epoch":
            schedule.step()
        elif scheduled == "plateau":
            losses = [row["loss"] for row in rows if row["epoch"] == state.epoch]
            schedule.step(metrics.get("val_loss", sum(losses) / len(losses)))
        state.epoch, state.batch = state.epoch + 1, 0

    def save() -> None:
        checkpoints.save(checkpoint, parts, rows, state, train_loader, description)

    with progress_bar(total=total, initial=min(state.step, total), unit="step", shown=progress) as bar:
        while state.step < total:
            model.train()
            for inputs, labels in state.remaining_batches(train_loader):
                train_batch(inputs, labels)
                _show(bar, rows[-1])
                if checkpoint_every is not None and state.step % checkpoint_every == 0:
                    save()
                if state.step == total and state.batch != batches:
                    break  # the run ends within this epoch, and a run that goes on from here will end the epoch
            else:
                end_epoch()
            if checkpoint is not None:
                save()
    if state.batch:
        rows[-1] |= validate()  # not in the checkpoint: a run that goes on has no validation at this step
    return History(rows)


def train_step(model: nn.Module, optimizer: Optimizer, inputs, labels: Tensor,
               loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
               autocast: torch.dtype | None = None) -> dict[str, float]:
    """One step of training on one batch; returns the batch's ``loss`` and ``accuracy`` before the update."""
    device = next(model.parameters()).device
    labels = labels.to(device)
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(device.type, autocast) if autocast is not None else nullcontext():
        logits = logits_of(call_model(model, inputs))
        loss = loss_fn(logits, labels)
    loss.backward()
    optimizer.step()
    return {"loss": float(loss.detach()), "accuracy": float((logits.detach().argmax(1) == labels).float().mean())}


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable, *, loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
             autocast: torch.dtype | None = None) -> dict[str, float]:
    """Mean ``loss``, ``accuracy`` (0..1) and number ``n`` of examples over a loader, in eval mode.

    The modes of all submodules and all buffers are afterwards what they were. An empty loader is a ValueError.
    """
    device = next(model.parameters()).device
    examples, loss, correct, predictions = 0, 0.0, 0, 0
    with preserved(model):
        model.eval()
        for inputs, labels in loader:
            labels = labels.to(device)
            with torch.autocast(device.type, autocast) if autocast is not None else nullcontext():
                logits = logits_of(call_model(model, inputs))
            examples += len(labels)
            loss += float(loss_fn(logits.float(), labels)) * len(labels)
            correct += int((logits.argmax(1) == labels).sum())
            predictions += labels.numel()  # more than one an example where each pixel has a label
    if examples == 0:
        raise ValueError("the loader to evaluate on gave no batch")
    return {"loss": loss / examples, "accuracy": correct / predictions, "n": examples}


def call_model(model: nn.Module, inputs):
    """Call ``model`` on a batch's inputs, a tensor or a dictionary of keyword arguments, on the model's device."""
    device = next(model.parameters()).device
    if isinstance(inputs, Mapping):
        return model(**{name: value.to(device) for name, value in inputs.items()})
    return model(inputs.to(device))


def logits_of(output) -> Tensor:
    """The logits tensor in a model's output: the output itself, or its ``logits``."""
    return getattr(output, "logits", output)


def fast_autocast() -> torch.dtype | None:
    """``torch.bfloat16`` where this machine's CPU computes it natively (about 1.5 times faster), else None."""
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else None


def progress_bar(*arguments, shown: bool = True, **options) -> tqdm:
    """A tqdm bar that vanishes when it is done; not ``shown``, or with TQDM_DISABLE set, there is none at all."""
    # tqdm's notebook bar reads the variable too late and leaves an empty bar behind, so it is read here.
    return tqdm(*arguments, leave=False, disable=not shown or bool(os.environ.get("TQDM_DISABLE")), **options)


def _show(bar: tqdm, row: dict) -> None:
    active = [lr for lr in row["lr"].values() if lr] or [0.0]
    rates = " to ".join(dict.fromkeys(f"{lr:.1e}" for lr in (min(active), max(active))))
    bar.set_postfix_str(f"epoch {row['epoch'] + 1}, loss {row['loss']:.3f}, accuracy {row['accuracy']:.0%}, lr {rates}",
                        refresh=False)
    bar.update()


def _check(model, optimizer, epochs, steps, schedule, schedule_every, unfreezing, val_loader, checkpoint,
           checkpoint_every) -> None:
    number = epochs if steps is None else steps
    in_optimizer = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [group.name for group in getattr(unfreezing, "groups", ())
               if not in_optimizer.issuperset(map(id, group.params.values()))]
    problems = [
        (None not in (epochs, steps) or not isinstance(number, Integral) or number < 0,
         f"give exactly one of epochs and steps, a whole number, 0 or above; got epochs={epochs}, steps={steps}"),
        (in_optimizer.isdisjoint(map(id, model.parameters())),
         "this optimizer was made for another model: none of its parameters is in the model that is passed to fit; make the "
         "optimizer again after the model"),
        (missing, f"the unfreezing's groups {missing} are not in the optimizer, so they would never train; give the optimizer "
                  "all groups from the start"),
        (hasattr(unfreezing, "report") and val_loader is None,
         f"{type(unfreezing).__name__} decides by validation metrics; give fit a val_loader"),
        (schedule is not None and getattr(schedule, "optimizer", None) is not optimizer,
         "schedule must be a torch scheduler of the optimizer that is passed to fit, for example one_cycle(optimizer, steps)"),
        (checkpoint_every is not None
         and (checkpoint is None or not isinstance(checkpoint_every, Integral) or checkpoint_every < 1),
         f"checkpoint_every={checkpoint_every} must be a whole number, 1 or above; it needs checkpoint=…, the file to save to")]
    for wrong, message in problems:
        if wrong:
            raise ValueError(message)
    check_choice("schedule_every", schedule_every, ("step", "epoch"))
    if checkpoint is not None and not Path(checkpoint).parent.is_dir():
        raise FileNotFoundError(f"no folder {Path(checkpoint).parent} to save the checkpoint in; make it first")
    if unfreezing is not None and isinstance(model, DistributedDataParallel):
        # It waits for the gradients of frozen parameters, unless told not to, and never averages those of parameters that were
        # frozen when it was made: they would become different ones in each process.
        averaged, total = model._get_ddp_logging_data()["num_parameter_tensors"], len(list(model.parameters()))
        if not model.find_unused_parameters or averaged < total:
            raise ValueError("unfreezing needs DistributedDataParallel(model, find_unused_parameters=True), made before the "
                             f"model is frozen; this one has find_unused_parameters={model.find_unused_parameters} "
                             f"and averages {averaged} of the model's {total} parameters")


def _total_steps(epochs, steps, batches, schedule, schedule_every, resuming) -> int:
    if batches == 0:
        raise ValueError("the train loader has no batch (is its batch_size above the number of images, with drop_last?)")
    if steps is None and batches is None:
        raise ValueError("this train loader has no length; pass steps=… in place of epochs=…")
    total = steps if steps is not None else epochs * batches
    if schedule_every == "step" and hasattr(schedule, "total_steps"):  # OneCycleLR, which raises after its last step
        left = schedule.total_steps - (0 if resuming else schedule.last_epoch)
        if total > left:
            raise ValueError(f"the schedule has {left} steps left and the run has {total}; make the schedule with "
                             f"total_steps={total}")
    return total
