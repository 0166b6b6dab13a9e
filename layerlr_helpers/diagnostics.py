"""Looking inside: what each layer knows, how far it moved, which rates it can stand."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from torch import Tensor

from layerlr_helpers.layers import LayerGroup
from layerlr_helpers.param_groups import Rates


def snapshot(groups: Sequence[LayerGroup]) -> dict[str, Tensor]:
    """A copy of every parameter of the groups, by name: something to measure movement from."""
    return {name: p.detach().clone() for group in groups for name, p in group.params.items()}


def layer_statistics(groups: Sequence[LayerGroup], before: Mapping[str, Tensor] | None = None) -> pd.DataFrame:
    """One row a group: depth, parameters, ``weight_norm``, ``grad_norm``, ``relative_gradient``, ``moved``.

    ``relative_gradient`` is the gradient's norm over the weights' (Auto-RGN, Lee et al., 2023), not a number where there is
    no gradient. ``moved`` is the distance from ``before`` (a :func:`snapshot`) over the norm of ``before``; it is
    there only if ``before`` was given. All norms are Euclidean over all tensors of the group.
    """
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


def probe_layers(features: Mapping[str, np.ndarray], targets: Mapping[str, Tensor], *, seed: int = 0) -> pd.DataFrame:
    """How well a linear classifier can read each target off each layer (Alain and Bengio, 2017).

    Args:
        features: of each layer, from :func:`layer_features`; add your own, e.g. the pixels, to compare with.
        targets: whole-number labels [N] under a name.
        seed: of the split in halves, one to train the probe (logistic regression on standardised features), the
            other to test it.

    Returns one row a layer and target: ``layer, target, accuracy, standard_error, chance`` (the commonest class).
    """
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


def _norm(tensors: Iterable[Tensor]) -> float:
    return float(sum(t.detach().double().square().sum() for t in tensors) ** 0.5)
