"""Looking inside: what each layer knows, how far it moved, which rates it can stand."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from layerlr_helpers import training
from layerlr_helpers.layers import LayerGroup
from layerlr_helpers.naming import matching
from layerlr_helpers.param_groups import Rates, named
from layerlr_helpers.schedules import peak_rate
from layerlr_helpers.tracing import preserved, tensors_in

if TYPE_CHECKING:
    import pandas as pd


def snapshot(groups: Sequence[LayerGroup]) -> dict[str, Tensor]:
    """A copy of every parameter of the groups, by name: something to measure movement from."""
    return {name: p.detach().clone() for group in groups for name, p in group.params.items()}


def layer_statistics(groups: Sequence[LayerGroup], before: Mapping[str, Tensor] | None = None) -> "pd.DataFrame":
    """One row a group: depth, parameters, ``weight_norm``, ``grad_norm``, ``relative_gradient``, ``moved``.

    ``relative_gradient`` is the gradient's norm over the weights' (Auto-RGN, Lee et al., 2023), not a number where there is
    no gradient. ``moved`` is the distance from ``before`` (a :func:`snapshot`) over the norm of ``before``; it is
    there only if ``before`` was given. All norms are Euclidean over all tensors of the group.
    """
    import pandas as pd  # here: slow to import

    rows = []
    for depth, group in enumerate(groups):
        weight = _norm(group.params.values())
        gradients = [p.grad for p in group.params.values() if p.grad is not None]
        gradient = _norm(gradients) if gradients else float("nan")
        row = {"group": group.name, "depth": depth, "parameters": group.size, "weight_norm": weight,
               "grad_norm": gradient, "relative_gradient": gradient / weight if weight else float("nan")}
        if before is not None:
            distance = _norm(p.detach() - before[name] for name, p in group.params.items())
            start = _norm(before[name] for name in group.params)
            row["moved"] = distance / start if start else float("nan")
        rows.append(row)
    return pd.DataFrame(rows)


def relative_gradient_rates(highest_lr: float) -> Rates:
    """Each group's rate in proportion to its relative gradient norm, as it is now; the largest gets ``highest_lr``.

    It reads the gradients of a backward pass that has been made, such as the first batch's.

    Raises:
        ValueError: a group has no gradient, or all its weights are 0 (says which).
    """
    def of(groups):
        table = layer_statistics(groups).set_index("group")
        norms, none, zero = table["relative_gradient"], table["grad_norm"].isna(), table["weight_norm"] == 0
        if none.any():
            raise ValueError(f"no gradient in {', '.join(table.index[none])}; call backward() on a batch's loss first")
        if zero.any():
            raise ValueError(f"the weights of {', '.join(table.index[zero])} are all 0, and a gradient has no size relative to "
                             "0; start them at random, or choose rates that do not depend on the weights")
        return {name: float(highest_lr * norm / norms.max()) for name, norm in norms.items()}

    return of


@torch.no_grad()
def layer_features(model: nn.Module, data: Dataset, groups: Sequence[LayerGroup], *,
                   batch_size: int = 256) -> dict[str, np.ndarray]:
    """What each group passes on, in eval mode: float32 arrays [N, channels], averaged over all places or tokens.

    A group's output is that of the last of its modules to run; a group of which no module runs is left out. Three
    dimensions are read as [N, tokens, channels], more as [N, channels, height, width].
    """
    device = next(model.parameters()).device
    kept: dict[str, list[Tensor]] = {group.name: [] for group in groups}
    last: dict[str, Tensor] = {}

    def keep(name):
        def hook(module, args, output):
            if (tensor := next(tensors_in(output), None)) is not None:
                last[name] = tensor
        return hook

    handles = [module.register_forward_hook(keep(group.name)) for group in groups for module in group.modules.values()]
    try:
        with preserved(model):
            model.eval()
            # A generator of its own: a loader without one takes a number from torch's global generator.
            for inputs, _ in DataLoader(data, batch_size, generator=torch.Generator()):
                last.clear()
                model(inputs.to(device))
                for name, output in last.items():
                    kept[name].append(_channels(output).float().cpu())
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts).numpy() for name, parts in kept.items() if parts}


def _channels(output: Tensor) -> Tensor:
    if output.ndim == 3:
        return output.mean(1)
    return output.flatten(2).mean(2) if output.ndim > 3 else output


def probe_layers(features: Mapping[str, np.ndarray], targets: Mapping[str, Tensor], *, seed: int = 0) -> "pd.DataFrame":
    """How well a linear classifier can read each target off each layer (Alain and Bengio, 2017).

    Args:
        features: of each layer, from :func:`layer_features`; add your own, e.g. the pixels, to compare with.
        targets: whole-number labels [N] under a name.
        seed: of the split in halves, one to train the probe (logistic regression on standardised features), the
            other to test it.

    Returns one row a layer and target: ``layer, target, accuracy, standard_error, chance`` (the commonest class).
    """
    import pandas as pd  # here: slow to import
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows = []
    for target, labels in targets.items():
        labels = np.asarray(labels)
        train, test = train_test_split(np.arange(len(labels)), test_size=0.5, random_state=seed, stratify=labels)
        chance = np.bincount(labels[test]).max() / len(test)
        for layer, values in features.items():
            probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300, tol=1e-3))
            accuracy = probe.fit(values[train], labels[train]).score(values[test], labels[test])
            error = (accuracy * (1 - accuracy) / len(test)) ** 0.5
            rows.append({"layer": layer, "target": target, "accuracy": accuracy, "standard_error": error, "chance": chance})
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class RangeTest:
    """The result of :func:`lr_range_test`: a frame with ``factor``, ``loss``, ``smooth_loss``, and the suggestion."""

    frame: "pd.DataFrame"
    suggestion: float


def lr_range_test(model: nn.Module, optimizer: Optimizer, train_loader: Iterable, *, steps: int = 60,
                  low: float = 1e-2, high: float = 1e2, sweep: str = "*", diverged: float = 4.0,
                  loss_fn=F.cross_entropy, autocast: torch.dtype | None = None) -> RangeTest:
    """Train with every group's rate times a factor that grows from ``low`` to ``high``, and watch the loss.

    All groups grow together, so the ratios between them stay (Smith, 2017, has one rate). With ``sweep``, the name of a
    layer group or a pattern, only those groups move and the others stand still, at a rate of 0. The test stops when the
    smoothed loss exceeds ``diverged`` times its lowest or is not finite. The suggestion is the factor at which the loss
    falls fastest, by a line through several neighbouring steps; not a number if it never falls. Model, optimizer and
    random numbers are afterwards what they were. A group's rate is the one that it was made with, wherever a schedule has
    moved it since. ``loss_fn`` and ``autocast`` are as in ``fit``.

    Raises:
        ValueError: fewer than 10 steps, ``low`` not below ``high``, a ``sweep`` that fits no group, a loss that is not
            finite from the start, or a loader without a batch.
    """
    import pandas as pd  # here: slow to import

    if steps < 10 or not 0 < low < high:
        raise ValueError(f"need at least 10 steps and 0 < low < high, not steps={steps}, low={low}, high={high}")
    layers = [group.get("layer", name) for name, group in named(optimizer).items()]
    swept = set(matching(sweep, list(dict.fromkeys(layers))))
    factors = low * (high / low) ** (np.arange(steps) / (steps - 1))
    losses: list[float] = []
    smooth: list[float] = []
    with _undone(model, optimizer, train_loader):
        peaks = [peak_rate(group) for group in optimizer.param_groups]
        model.train()
        batches = _endless(train_loader)
        for factor in factors:
            for group, layer, peak in zip(optimizer.param_groups, layers, peaks, strict=True):
                group["lr"] = peak * factor if layer in swept else 0.0
            losses.append(training.train_step(model, optimizer, *next(batches), loss_fn, autocast)["loss"])
            smooth.append(_smoothed(losses))
            if not np.isfinite(smooth[-1]) or smooth[-1] > diverged * min(smooth):
                break
    frame = pd.DataFrame({"factor": factors[:len(losses)], "loss": losses, "smooth_loss": smooth})
    steady = frame[np.isfinite(frame.smooth_loss)]
    if len(steady) < 2:
        raise ValueError(f"the loss was {losses} from the start, so no factor can be suggested; try a smaller low than {low}")
    return RangeTest(frame, _steepest_fall(steady))


def _steepest_fall(frame: "pd.DataFrame", window: int = 9) -> float:
    """The factor in the middle of the window in which a line through the losses falls most steeply."""
    falling = frame.iloc[:int(np.argmin(frame.smooth_loss)) + 1]  # later falls are only the way back from a spike
    window = min(window, len(falling))
    if window < 2:
        return float("nan")
    logs, losses = np.log(falling.factor.to_numpy()), falling.loss.to_numpy()
    starts = range(len(falling) - window + 1)
    slopes = [np.polyfit(logs[i:i + window], losses[i:i + window], 1)[0] for i in starts]
    best = int(np.argmin(slopes))
    return float(falling.factor.iloc[best + window // 2]) if slopes[best] < 0 else float("nan")


@contextmanager
def _undone(model: nn.Module, optimizer: Optimizer, loader: Iterable) -> Iterator[None]:
    """Let training happen inside; afterwards model, optimizer, gradients and random numbers are what they were."""
    weights = [(p, p.detach().clone(), p.grad) for p in model.parameters()]
    optimizer_state = copy.deepcopy(optimizer.state_dict())
    generators = training.checkpoints.random_state(loader)
    try:
        with preserved(model):
            for p, _, _ in weights:
                p.grad = None  # the old gradient is put aside, not added to
            yield
    finally:
        with torch.no_grad():
            for p, before, grad in weights:
                p.copy_(before)
                p.grad = grad
        optimizer.load_state_dict(optimizer_state)
        training.checkpoints.set_random_state(generators, loader)


def _smoothed(losses: Sequence[float], beta: float = 0.9) -> float:
    weights = beta ** np.arange(len(losses))[::-1]
    return float(np.dot(weights, losses) / weights.sum())


def _endless(loader: Iterable) -> Iterator:
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise ValueError("the train loader gave no batch")


def _norm(tensors: Iterable[Tensor]) -> float:
    return float(sum(t.detach().double().square().sum() for t in tensors) ** 0.5)
