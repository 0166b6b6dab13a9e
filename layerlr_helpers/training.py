"""A training loop, one step of it, and an evaluation.

The loop is the one that notebook 02 writes out in the open, plus what a long run needs: a progress bar, a
checkpoint that is never half written, and a resume that continues exactly where the run stopped.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from tqdm.auto import tqdm

from layerlr_helpers import checkpoints
from layerlr_helpers.batches import Accumulated, device_of
from layerlr_helpers.guards import preserved
from layerlr_helpers.history import DivergedError, History
from layerlr_helpers.metrics import TAKEN, Tally, check_metrics
from layerlr_helpers.objectives import Objective
from layerlr_helpers.param_groups import current_rates
from layerlr_helpers.preflight import check_precision, check_run, check_schedule
from layerlr_helpers.tracing import is_compiled


def fit(model: nn.Module, optimizer: Optimizer, train_loader: Iterable, *, epochs: int | None = None,
        steps: int | None = None, schedule: LRScheduler | ReduceLROnPlateau | None = None, schedule_every: str = "step",
        unfreezing=None, val_loader: Iterable | None = None, checkpoint: str | Path | None = None,
        checkpoint_every: int | None = None, loss_fn: Callable[[object, object], Tensor] | None = None,
        metrics: Mapping[str, object] | None = None, autocast: torch.dtype | None = None, clip_grad_norm: float | None = None,
        accumulate: int = 1, progress: bool = True) -> History:
    """Train ``model`` for a number of ``epochs`` or of ``steps`` and return the :class:`History`.

    A batch is ``(inputs, labels)``, or a dictionary of keyword arguments with the labels under ``"labels"``. Inputs are a
    tensor, several in a tuple or list, or a dictionary of keyword arguments. Everything runs on the device that the model is
    on. The model is left in train mode; an optimizer that has modes of its own (schedule-free ones), in eval mode.

    Args:
        schedule: a torch scheduler of this optimizer, stepped after every optimizer step, or after every epoch with
            ``schedule_every="epoch"`` (``ReduceLROnPlateau`` always is, with the validation loss if there is one, else
            with the epoch's mean training loss).
        unfreezing: anything with ``apply(step)``, called before every step: a ``ProgressiveUnfreezing``. If it has a
            ``report(step, metrics)``, that is called after every epoch's validation: a ``PlateauUnfreezing``.
        val_loader: evaluated after every epoch, and at the end.
        checkpoint: a file to save to after every epoch, at the end and, with ``checkpoint_every``, every so many steps.
            If it exists, the run resumes from it, with the order of batches and the random numbers (torch's, Python's and
            NumPy's) that it would have had.
        loss_fn: of (outputs, labels), where outputs are the logits, or whatever else the model returns. None takes the loss
            that a model returns itself, or else cross-entropy.
        metrics: functions of (outputs, labels) that give a number, averaged over the examples, or objects with ``update``,
            ``compute`` and ``reset``, by name. None gives the accuracy, where loss and shapes say what a right answer is.
        autocast: a lower precision for the forward pass, e.g. ``torch.bfloat16``; None leaves all as it is.
        clip_grad_norm: the largest norm of the whole gradient; a longer one is scaled down to it.
        accumulate: how many batches make one step, with the gradient of their examples in one batch. Steps, schedules and
            plans count such steps; the last step of an epoch takes the batches that are left. BatchNorm layers still
            normalise by one batch.
        progress: show a bar (the environment variable TQDM_DISABLE=1 turns all bars off).

    Before anything changes, arguments that do not fit together are a ValueError, and so is a checkpoint that is damaged, of
    another run, or of one that began with other rates, options or first steps. A loss that is not finite is a
    :class:`DivergedError`, raised before the step that it would have made and before the next checkpoint.
    """
    batches = checkpoints.length(train_loader)
    check_run(model, optimizer, epochs=epochs, steps=steps, batches=batches, schedule=schedule, schedule_every=schedule_every,
              unfreezing=unfreezing, val_loader=val_loader, checkpoint=checkpoint, checkpoint_every=checkpoint_every,
              loss_fn=loss_fn, autocast=autocast, clip_grad_norm=clip_grad_norm, accumulate=accumulate, metrics=metrics)
    total = steps if steps is not None else epochs * -(-batches // accumulate)
    check_schedule(schedule, schedule_every, total, resuming=checkpoint is not None and Path(checkpoint).exists())

    rows, state, save = _new_or_resumed(checkpoint, model, optimizer, schedule, unfreezing, train_loader, steps=steps,
                                        epochs=epochs, settings={"accumulate": accumulate, "clip_grad_norm": clip_grad_norm,
                                                                  "schedule_every": schedule_every})
    objective = Objective(loss_fn)
    by_loss = isinstance(schedule, ReduceLROnPlateau)
    by_step = schedule is not None and schedule_every == "step" and not by_loss

    def train(step_batches: list) -> None:
        if unfreezing is not None:
            unfreezing.apply(state.step)
        rates = current_rates(optimizer)
        scores = train_step(model, optimizer, Accumulated(step_batches), None, objective, autocast, metrics, clip_grad_norm)
        rows.append({"step": state.step, "epoch": state.epoch, **scores, "lr": rates})
        if by_step:
            schedule.step()
        state.step, state.batch = state.step + 1, state.batch + len(step_batches)

    def validate() -> dict[str, float]:
        if val_loader is None:
            return {}
        scores = evaluate(model, val_loader, loss_fn=objective, metrics=metrics, autocast=autocast)
        if not math.isfinite(scores["loss"]):
            raise DivergedError("the validation loss", scores["loss"], rows[-1]["lr"])
        return {f"val_{name}": score for name, score in scores.items() if name != "n"}

    def end_epoch() -> None:
        with optimizer_mode(optimizer, "eval", afterwards="train"):
            scores = validate()
        rows[-1] |= scores
        if hasattr(unfreezing, "report"):
            unfreezing.report(state.step, scores)
        if by_loss:
            schedule.step(scores["val_loss"] if scores else _mean_loss(rows, state.epoch))
        elif schedule is not None and not by_step:
            schedule.step()
        elif by_step and epochs is not None:
            _warn_of_length(said=batches, gave=state.batch)
        state.epoch, state.batch = state.epoch + 1, 0

    try:
        with (optimizer_mode(optimizer, "train", afterwards="eval"), _room_to_recompile(model, unfreezing),
              progress_bar(total=total, initial=min(state.step, total), unit="step", shown=progress) as bar):
            while state.step < steps if epochs is None else state.epoch < epochs:
                model.train()
                for step_batches in _grouped(state.remaining_batches(train_loader), accumulate):
                    if state.step == steps:
                        break  # the loader has more batches than it said
                    train(step_batches)
                    _show(bar, rows[-1])
                    if checkpoint_every is not None and state.step % checkpoint_every == 0:
                        save()
                    if state.step == steps and state.batch != batches:
                        break  # the run ends within this epoch, and a run that goes on from here will end the epoch
                else:
                    end_epoch()
                save()
        if state.batch:
            rows[-1] |= validate()  # not in the checkpoint: a run that goes on has no validation at this step
    except DivergedError as error:
        error.step, error.history = state.step, History(rows)
        raise
    return History(rows)


def train_step(model: nn.Module, optimizer: Optimizer, inputs, labels=None,
               loss_fn: Callable[[object, object], Tensor] | Objective | None = None, autocast: torch.dtype | None = None,
               metrics: Mapping[str, object] | None = None, clip_grad_norm: float | None = None) -> dict[str, float]:
    """One step of training; returns the ``loss`` and the metrics before the update. Arguments are as in :func:`fit`.

    ``inputs`` and ``labels`` are those of one batch; without labels, ``inputs`` is a whole batch of any form, or several,
    :class:`Accumulated`. A loss that is not finite is a :class:`DivergedError`, and then the weights stay as they are.
    """
    check_precision(autocast)
    objective = loss_fn if isinstance(loss_fn, Objective) else Objective(loss_fn)
    batches = inputs if isinstance(inputs, Accumulated) else [inputs if labels is None else (inputs, labels)]
    tally = Tally(objective, metrics)
    optimizer.zero_grad(set_to_none=True)
    for i, batch in enumerate(batches):
        # DistributedDataParallel need not average the gradients before the last batch has added its own.
        with nullcontext() if i + 1 == len(batches) else getattr(model, "no_sync", nullcontext)():
            with _precision(model, autocast):
                outcome = objective.outcome(model, batch)
            if i == 0:  # now the objective knows which labels a loss of the model's own counts
                weights = [objective.weight(each) for each in batches]
            share = weights[i] if objective.is_sum else weights[i] / (sum(weights) or 1)
            # Without any label that counts the loss is 0 / 0; as a loss of 0 it adds nothing.
            (share * (outcome.loss if weights[i] else outcome.loss.nan_to_num())).backward()
        tally.add(outcome, weights[i])
    scores = tally.averages(single_precision=True)
    if tally.weight and not math.isfinite(scores["loss"]):
        raise DivergedError("the loss", scores["loss"], current_rates(optimizer))
    if clip_grad_norm is not None:
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        norm = float(nn.utils.clip_grad_norm_(trained, clip_grad_norm))
        if not math.isfinite(norm):
            raise DivergedError("the norm of the gradient", norm, current_rates(optimizer))
    optimizer.step()
    return scores


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable, *, loss_fn: Callable[[object, object], Tensor] | Objective | None = None,
             metrics: Mapping[str, object] | None = None, autocast: torch.dtype | None = None) -> dict[str, float]:
    """``loss``, ``accuracy`` (0..1) and number ``n`` of examples over a loader, in eval mode. Arguments are as in :func:`fit`.

    The loss is that of all examples at once: labels that are ignored and the weights of classes count as they do in one batch.
    ``metrics`` are in place of the accuracy. The modes of all submodules and all buffers are afterwards what they were. A
    loader without a batch, or without a label that counts, is a ValueError.
    """
    check_metrics(metrics)
    objective = loss_fn if isinstance(loss_fn, Objective) else Objective(loss_fn)
    tally = Tally(objective, metrics)
    with preserved(model):
        model.eval()
        for batch in loader:
            with _precision(model, autocast):
                outcome = objective.outcome(model, batch, prepare=_at_least_single)
            tally.add(outcome, objective.weight(batch))
    if tally.weight == 0:
        raise ValueError("the loader to evaluate on gave no batch" if tally.examples == 0 else
                         "the loader to evaluate on gave no label that counts: the loss ignores all of them")
    return {**tally.averages(), "n": tally.examples}


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
    scores = "".join(f", {name} {value:.0%}" if name == "accuracy" else f", {name} {value:.3g}"
                     for name, value in row.items() if name not in TAKEN)
    bar.set_postfix_str(f"epoch {row['epoch'] + 1}, loss {row['loss']:.3f}{scores}, lr {rates}", refresh=False)
    bar.update()


def _mean_loss(rows: list[dict], epoch: int) -> float:
    """The mean training loss of an epoch, without the steps in which no label counted."""
    losses = [row["loss"] for row in rows if row["epoch"] == epoch and math.isfinite(row["loss"])]
    return sum(losses) / len(losses) if losses else math.nan


def _warn_of_length(*, said: int, gave: int) -> None:
    if said != gave:
        warnings.warn(f"the train loader said that it has {said} batches and gave {gave}, so a schedule that was made for the "
                      "number it said ends elsewhere; give fit steps in place of epochs", stacklevel=4)


def _grouped(batches: Iterator, size: int) -> Iterator[list]:
    """Lists of ``size`` batches, and of what is left at the end; none is drawn before it is needed."""
    return iter(lambda: list(islice(batches, size)), [])


def _precision(model: nn.Module, autocast: torch.dtype | None):
    return torch.autocast(device_of(model).type, autocast) if autocast is not None else nullcontext()


def _at_least_single(outputs: Tensor) -> Tensor:
    return outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs


@contextmanager
def optimizer_mode(optimizer: Optimizer, mode: str, *, afterwards: str) -> Iterator[None]:
    """Tell an optimizer with the methods ``train()`` and ``eval()`` which weights the model shall have, inside and afterwards.

    Schedule-free optimizers have them: they train other weights than those that one will use.
    """
    has_modes = all(callable(getattr(optimizer, method, None)) for method in ("train", "eval"))
    if has_modes:
        getattr(optimizer, mode)()
    try:
        yield
    finally:
        if has_modes:
            getattr(optimizer, afterwards)()


def _room_to_recompile(model: nn.Module, unfreezing):
    """Let ``torch.compile`` compile a model anew for each state of an unfreezing; at its limit it would give up in silence."""
    if unfreezing is None or not is_compiled(model):
        return nullcontext()
    config, states = torch._dynamo.config, len(getattr(unfreezing, "groups", ())) + 1
    return config.patch({name: states * getattr(config, name) for name in ("recompile_limit", "accumulated_recompile_limit")})


def _new_or_resumed(checkpoint: str | Path | None, model: nn.Module, optimizer: Optimizer, schedule, unfreezing,
                    loader: Iterable, *, steps: int | None, epochs: int | None,
                    settings: dict) -> tuple[list[dict], checkpoints.RunState, Callable[[], None]]:
    """The history's rows and how far the run is, at first or from its checkpoint, and the function that saves them."""
    rows, state = [], checkpoints.RunState()
    if checkpoint is None:
        return rows, state, lambda: None
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule,
             "unfreezing": unfreezing if hasattr(unfreezing, "state_dict") else None}
    run = checkpoints.run_description(parts, loader, unfreezing, settings=settings)
    if Path(checkpoint).exists():
        rows, state, run = checkpoints.load(checkpoint, parts, loader, run, steps=steps, epochs=epochs)

    def save() -> None:
        _check_weights(model, optimizer)
        checkpoints.save(checkpoint, parts, rows, state, loader, run)

    if not rows:
        save()  # a place that cannot be written, and a state that cannot be saved, are found before hours are lost
    return rows, state, save


def _check_weights(model: nn.Module, optimizer: Optimizer) -> None:
    """Raise a DivergedError for weights that are not finite, which shall not replace those of the last checkpoint."""
    for name, p in model.named_parameters():
        if p.requires_grad and not p.isfinite().all():
            raise DivergedError(f"a weight in {name}", float(p.detach()[~p.isfinite()][0]), current_rates(optimizer))
