"""The loss of a batch, its weight among other batches, and which answers were right.

The mean of several batches' losses is to be the loss of all their examples at once. Torch's losses for classes average over the
labels that count, in proportion to their classes' weights, so batches have to be averaged in that proportion too.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerlr_helpers.batches import (
    FORMS,
    batch_size,
    call_model,
    device_of,
    logits_of,
    loss_of,
    map_output,
    split_batch,
    takes_keyword,
    to_device,
)

IGNORED = -100  # the label that torch's losses, and those who write their own, leave out by default
FOR_CLASSES = {F.cross_entropy, F.nll_loss, nn.CrossEntropyLoss, nn.NLLLoss}
# For a yes or no in each place; an output above this number says yes.
YES_ABOVE = {F.binary_cross_entropy_with_logits: 0.0, nn.BCEWithLogitsLoss: 0.0, F.binary_cross_entropy: 0.5, nn.BCELoss: 0.5}
FOR_NUMBERS = {F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss}
_KNOWN = FOR_CLASSES | YES_ABOVE.keys() | FOR_NUMBERS


class Outcome(NamedTuple):
    """What a model made of a batch."""

    loss: Tensor
    outputs: object  # the logits, or whatever else the model returned
    labels: object
    examples: int


class Objective:
    """What is minimised, and how much each batch's part of it weighs.

    ``loss_fn`` is a function of (outputs, labels). None takes the loss that the model returns itself; if it returns none, it is
    cross-entropy with the classes in dimension 1, or in the last one where only that fits the labels.
    """

    def __init__(self, loss_fn: Callable | None = None):
        self.loss_fn = loss_fn
        self.kind, options = _kind_and_options(loss_fn)
        self.is_sum = options.get("reduction") == "sum"
        self.ignored = IGNORED if options.get("ignore_index") is None else options["ignore_index"]
        self.class_weights = options.get("weight") if self.kind in FOR_CLASSES else None
        self.by_place = self.kind in YES_ABOVE or self.kind in FOR_NUMBERS  # compares each output with the label in its place
        self.shift: int | None = 0  # the label that belongs to an output is so many places on; None if nothing shows it
        self._shift_is_known = loss_fn is not None

    def outcome(self, model: nn.Module, batch, prepare: Callable[[Tensor], Tensor] = lambda outputs: outputs) -> Outcome:
        """Call the model on a batch of any form that ``split_batch`` takes, and compute the loss.

        ``prepare`` is applied to the outputs before the loss is. A loss that is not one number is a ValueError.
        """
        inputs, labels = split_batch(batch)
        labels = to_device(labels, device_of(model))
        if self.loss_fn is None and isinstance(batch, Mapping) and labels is not None and takes_keyword(model, "labels"):
            inputs = batch  # it may compute its own loss
        output = call_model(model, inputs)
        outputs = map_output(prepare, logits_of(output))
        loss = self._loss(output, outputs, labels)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise ValueError(f"the loss of a batch must be a tensor with one number, not {what}; torch's losses give it with "
                             "reduction='mean'")
        return Outcome(loss, outputs, labels, batch_size(inputs, labels))

    def weight(self, batch) -> float:
        """How much a batch counts in the mean of several: its labels by the weights of their classes, or its examples."""
        inputs, labels = split_batch(batch)
        if self.is_sum:
            return 1
        if self.by_place or not _are_classes(labels):
            return batch_size(inputs, labels)
        labels = labels[:, self.shift or 0:] if labels.ndim == 2 else labels
        counted = labels != self.ignored
        if self.class_weights is None:
            return int(counted.sum())
        return float(self.class_weights.to(labels.device)[labels[counted]].sum())

    def right(self, outcome: Outcome) -> Tensor | None:
        """Whether each label that counts was predicted; None where loss and shapes do not say what a right answer is."""
        outputs, labels = outcome.outputs, outcome.labels
        if not (isinstance(outputs, Tensor) and isinstance(labels, Tensor)) or self.kind in FOR_NUMBERS:
            return None
        if self.kind in YES_ABOVE:
            one_answer_each = outputs.ndim == 1 or (outputs.ndim > 1 and outputs.shape[1] == 1)
            return (outputs > YES_ABOVE[self.kind]) == (_like(outputs, labels) > 0.5) if one_answer_each else None
        readings = list(_readings(outputs, labels, self.shift)) if self.shift is not None or labels.ndim == 1 else []
        if len(readings) > 1 and self.kind not in FOR_CLASSES:
            readings = [reading for reading in readings if _agree(reading, outcome.loss)]
        if not readings:
            return None
        logits, labels = readings[0]
        counted = labels != self.ignored
        answers, classes = labels[counted], logits.shape[1]
        if classes < 2 or (len(answers) and not 0 <= answers.min() <= answers.max() < classes):
            return None  # whole numbers, but no classes
        return logits.argmax(1)[counted] == answers

    def _loss(self, output, outputs, labels) -> Tensor:
        if self.loss_fn is not None and (labels is not None or self.kind is None):
            return self.loss_fn(outputs, _like(outputs, labels) if self.by_place else labels)
        if self.loss_fn is None and (loss := loss_of(output)) is not None:
            self._look_for_shift(outputs, labels, loss.detach())
            return loss
        if labels is None:
            raise ValueError(f"the batch has no labels{'' if self.loss_fn else ', and the output has no loss'}; {FORMS}")
        if not isinstance(outputs, Tensor):
            raise ValueError(f"the model returns a {type(outputs).__name__} with neither logits nor a loss; give loss_fn=…, a "
                             "function of what it returns and the labels")
        logits, classes = next(_readings(outputs, labels), (outputs, labels))
        if logits.ndim > 1 and logits.shape[1] == 1 and _are_classes(classes):
            raise ValueError(f"cross-entropy needs an output for each class, and the model has one, of shape "
                             f"{list(outputs.shape)}; give it one for each class, or pass loss_fn=torch.nn.BCEWithLogitsLoss()")
        return F.cross_entropy(logits, classes)

    def _look_for_shift(self, outputs, labels, loss: Tensor) -> None:
        """Find out whether a model's own loss takes the label in each place or, as language models do, in the next one."""
        if self._shift_is_known or not loss.isfinite() or not (_are_classes(labels) and labels.ndim == 2):
            return
        agreeing = [shift for shift in (0, 1) if any(_agree(reading, loss) for reading in _readings(outputs, labels, shift))]
        self.shift = agreeing[0] if agreeing else None
        self._shift_is_known = len(agreeing) < 2  # an untrained model may be as wrong about the one as about the other


def _kind_and_options(loss_fn) -> tuple[Callable | type | None, dict]:
    """Torch's own loss function or class that this is, and what it was made with."""
    if isinstance(loss_fn, partial):
        kind, options = _kind_and_options(loss_fn.func)
        return kind, options | loss_fn.keywords
    if isinstance(loss_fn, nn.Module):
        options = {name: getattr(loss_fn, name) for name in ("weight", "ignore_index", "reduction") if hasattr(loss_fn, name)}
        return next((kind for kind in type(loss_fn).__mro__ if kind in _KNOWN), None), options
    return next((kind for kind in _KNOWN if kind is loss_fn), None), {}


def _are_classes(labels) -> bool:
    """Whether labels are whole numbers."""
    return isinstance(labels, Tensor) and not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)


def _readings(outputs, labels: Tensor, shift: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of logits with the classes in dimension 1 and the labels that belong to them, as the shapes allow."""
    if not isinstance(outputs, Tensor) or not _are_classes(labels) or outputs.ndim != labels.ndim + 1:
        return
    candidates = [(outputs.shape[:1] + outputs.shape[2:], outputs), (outputs.shape[:-1], outputs.movedim(-1, 1))]
    for places, logits in candidates[:1] if outputs.ndim == 2 else candidates:
        if places == labels.shape:
            yield (logits[..., :-1], labels[:, 1:]) if shift and labels.ndim == 2 else (logits, labels)


def _agree(reading: tuple[Tensor, Tensor], loss: Tensor) -> bool:
    """Whether this is how a loss reads logits and labels: whether it is their cross-entropy."""
    logits, labels = reading
    with torch.no_grad():
        return bool(torch.isclose(F.cross_entropy(logits.float(), labels), loss.float(), rtol=1e-4))


def _like(outputs, labels):
    """Labels in the shape of the outputs, if these have only dimensions of length 1 more or fewer, and in their precision.

    Otherwise outputs [N] and labels [N, 1] would be compared each with each, and whole numbers not at all.
    """
    if not (isinstance(outputs, Tensor) and isinstance(labels, Tensor)):
        return labels
    if outputs.shape != labels.shape and outputs.squeeze().shape == labels.squeeze().shape:
        labels = labels.reshape(outputs.shape)
    return labels.to(torch.promote_types(outputs.dtype, torch.float32))
