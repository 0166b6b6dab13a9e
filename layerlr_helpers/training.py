"""A training loop, an evaluation and the record of what happened.

The loop is the one that notebook 02 writes out in the open, plus what a long run needs: a progress bar, a
checkpoint that is never half written, and a resume that continues exactly where the run stopped.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
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
from layerlr_helpers.guards import modes_preserved
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

    Raises:
        ValueError: neither or both of epochs and steps; an optimizer of another model; a schedule or an unfreezing of
            other parameters than the optimizer's; an unfreezing that waits for reports without a validation loader;
            a one-cycle schedule shorter than the run; an unknown ``schedule_every``; a damaged checkpoint, or one of
            another run or of one that began with other rates, options or first steps; a loader without a batch.
        FileNotFoundError: no folder for the checkpoint.
    """
    _check_run(model, optimizer, epochs, steps, unfreezing, val_loader)
    _check_checkpoint(checkpoint, checkpoint_every)
    batches = checkpoints.length(train_loader)
    total = _total_steps(epochs, steps, batches)
    resuming = checkpoint is not None and Path(checkpoint).exists()
    _check_schedule(schedule, schedule_every, optimizer, total, resuming)

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
    device = _device(model)
    labels = labels.to(device)
    optimizer.zero_grad(set_to_none=True)
    with _autocast(device, autocast):
        logits = logits_of(call_model(model, inputs))
        loss = loss_fn(logits, labels)
    loss.backward()
    optimizer.step()
    return {"loss": float(loss.detach()), "accuracy": float((logits.detach().argmax(1) == labels).float().mean())}


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable, *, loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
             autocast: torch.dtype | None = None) -> dict[str, float]:
    """Mean ``loss``, ``accuracy`` (0..1) and number ``n`` of examples over a loader, in eval mode.

    The mode of the model and of each submodule is afterwards what it was.

    Raises:
        ValueError: an empty loader.
    """
    device = _device(model)
    examples, loss, correct, predictions = 0, 0.0, 0, 0
    with modes_preserved(model):
        model.eval()
        for inputs, labels in loader:
            labels = labels.to(device)
            with _autocast(device, autocast):
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
    device = _device(model)
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


def _autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    return torch.autocast(device.type, dtype) if dtype is not None else nullcontext()


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


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


def _check_run(model, optimizer, epochs, steps, unfreezing, val_loader) -> None:
    if (epochs is None) == (steps is None):
        raise ValueError(f"give exactly one of epochs and steps, not epochs={epochs} and steps={steps}")
    number = epochs if steps is None else steps
    if not isinstance(number, Integral) or number < 0:
        raise ValueError(f"epochs and steps are whole numbers, 0 or above; got epochs={epochs}, steps={steps}")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in model.parameters()):
        raise ValueError("this optimizer was made for another model: none of its parameters is in the model that is passed "
                         "to fit; make the optimizer again after the model")
    missing = [group.name for group in getattr(unfreezing, "groups", ())
               if any(id(p) not in held for p in group.params.values())]
    if missing:
        raise ValueError(f"the unfreezing's groups {missing} are not in the optimizer, so they would never train; "
                         "give the optimizer all groups from the start")
    if hasattr(unfreezing, "report") and val_loader is None:
        raise ValueError(f"{type(unfreezing).__name__} decides by validation metrics; give fit a val_loader")
    if unfreezing is not None and isinstance(model, DistributedDataParallel):
        _check_distributed(model)


def _check_distributed(model: DistributedDataParallel) -> None:
    """Refuse a wrapper under which a layer that unfreezes would learn something else in each process."""
    if not model.find_unused_parameters:
        raise ValueError("unfreezing needs DistributedDataParallel(model, find_unused_parameters=True): frozen parameters have "
                         "no gradients to wait for")
    averaged = model._get_ddp_logging_data()["num_parameter_tensors"]  # those that asked for a gradient when it was wrapped
    total = sum(1 for _ in model.module.parameters())
    if averaged < total:
        raise ValueError(f"DistributedDataParallel knows {averaged} of the model's {total} parameters, and the others would "
                         "never be averaged between the processes; wrap the model before it is frozen")


def _check_schedule(schedule, schedule_every, optimizer, total, resuming) -> None:
    if schedule_every not in ("step", "epoch"):
        raise ValueError(f"schedule_every must be 'step' or 'epoch', not {schedule_every!r}")
    if schedule is None:
        return
    if not hasattr(schedule, "step"):
        raise ValueError(f"schedule must be a torch scheduler, not {schedule!r}; make one of the optimizer first, for example "
                         "one_cycle(optimizer, steps)")
    if schedule.optimizer is not optimizer:
        raise ValueError("this schedule was made for another optimizer; make it with the one that is passed to fit")
    if schedule_every == "step" and hasattr(schedule, "total_steps"):  # OneCycleLR, which raises after its last step
        done = 0 if resuming else schedule.last_epoch
        if done + total > schedule.total_steps:
            raise ValueError(f"the schedule has {schedule.total_steps - done} steps left and the run has {total}; make the "
                             f"schedule with total_steps={total}")


def _check_checkpoint(checkpoint, checkpoint_every) -> None:
    if checkpoint_every is not None and checkpoint is None:
        raise ValueError(f"checkpoint_every={checkpoint_every} needs checkpoint=…, the file to save to")
    if checkpoint_every is not None and (not isinstance(checkpoint_every, Integral) or checkpoint_every < 1):
        raise ValueError(f"checkpoint_every is a whole number, 1 or above, not {checkpoint_every!r}")
    if checkpoint is not None and not Path(checkpoint).parent.is_dir():
        raise FileNotFoundError(f"no folder {Path(checkpoint).parent} to save the checkpoint in; make it first")


def _total_steps(epochs: int | None, steps: int | None, length: int | None) -> int:
    if length == 0:
        raise ValueError("the train loader has no batch (is its batch_size above the number of images, with drop_last?)")
    if steps is not None:
        return steps
    if length is None:
        raise ValueError("this train loader has no length; pass steps=… in place of epochs=…")
    return epochs * length
