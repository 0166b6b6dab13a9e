"""Looking inside: how large each layer's weights and gradients are, how far it moved, and what it knows."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from torch import Tensor

from layerlr_helpers.layers import LayerGroup
from layerlr_helpers.param_groups import Rates, depth_by_name


def snapshot(groups: Sequence[LayerGroup]) -> dict[str, Tensor]:
    """A copy of every parameter of the groups, by name: something to measure movement from."""
    return {name: p.detach().clone() for group in groups for name, p in group.params.items()}


def layer_statistics(groups: Sequence[LayerGroup], before: Mapping[str, Tensor] | None = None) -> pd.DataFrame:
    """One row per group: depth, parameters, ``weight_norm``, ``grad_norm``, ``relative_gradient``, ``moved``.

    ``depth`` counts the layers to the output, 0 for a head.
    ``relative_gradient`` is the gradient's norm over the weights' (Auto-RGN, Lee et al., 2023), not a number where there is
    no gradient. ``moved`` is the distance from ``before`` (a :func:`snapshot`) over the norm of ``before``; it is
    there only if ``before`` was given. All norms are Euclidean over all tensors of the group.
    """
    rows, depths = [], depth_by_name(groups)
    for group in groups:
        params = list(group.params.values())
        row = {"group": group.name, "depth": depths[group.name], "parameters": group.size, "weight_norm": _norm(params),
               "grad_norm": _gradient_norm(params), "relative_gradient": relative_gradient_norm(params)}
        if before is not None:
            distance = _norm(p.detach() - before[name] for name, p in group.params.items())
            start = _norm(before[name] for name in group.params)
            row["moved"] = distance / start if start else float("nan")
        rows.append(row)
    return pd.DataFrame(rows)


def relative_gradient_norm(params: Iterable[Tensor]) -> float:
    """The norm of the gradients over the norm of the weights; not a number without a gradient or if all weights are 0."""
    params = list(params)
    weight_norm = _norm(params)
    return _gradient_norm(params) / weight_norm if weight_norm else float("nan")


def relative_gradient_rates(highest_lr: float) -> Rates:
    """Each group's rate in proportion to its relative gradient norm, as it is now; the largest gets ``highest_lr``.

    It reads the gradients of a backward pass that has been made, such as the first batch's. A group without a gradient or
    whose weights are all 0 is a ValueError, and so are gradients that are 0 in all groups.
    """
    def rates(groups: Sequence[LayerGroup]) -> dict[str, float]:
        norms = layer_statistics(groups).set_index("group")["relative_gradient"]
        if norms.isna().any():
            raise ValueError(f"there is no relative gradient for {', '.join(norms.index[norms.isna()])}: call backward() on a "
                             "batch's loss first, and give a group whose weights are all 0 random ones")
        if norms.max() == 0:
            raise ValueError("every group's gradient is 0, so there are no proportions; does the loss depend on the model?")
        return {name: float(highest_lr * norm / norms.max()) for name, norm in norms.items()}

    return rates


def probe_layers(features: Mapping[str, np.ndarray], targets: Mapping[str, Tensor], *, seed: int = 0) -> pd.DataFrame:
    """How well a linear classifier can read each target off each layer (Alain and Bengio, 2017).

    ``features`` of each layer are from :func:`layer_features`; add your own, e.g. the pixels, to compare with. ``targets`` are
    whole-number labels [N] under a name. One half of the examples, drawn with ``seed``, trains the probe (logistic regression
    on standardised features), and the other tests it. Returns one row per layer and target: ``layer, target, accuracy,
    standard_error, chance`` (the commonest class).
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows = []
    for target, labels in targets.items():
        labels = np.asarray(labels)
        if wrong := {layer: len(values) for layer, values in features.items() if len(values) != len(labels)}:
            raise ValueError(f"the target {target!r} has {len(labels)} labels, and these layers have features of another "
                             f"number of examples: {wrong}")
        train, test = train_test_split(np.arange(len(labels)), test_size=0.5, random_state=seed, stratify=labels)
        chance = np.bincount(labels[test]).max() / len(test)
        for layer, values in features.items():
            probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300, tol=1e-3))
            accuracy = probe.fit(values[train], labels[train]).score(values[test], labels[test])
            error = (accuracy * (1 - accuracy) / len(test)) ** 0.5
            rows.append({"layer": layer, "target": target, "accuracy": accuracy, "standard_error": error, "chance": chance})
    return pd.DataFrame(rows)


def _gradient_norm(params: Iterable[Tensor]) -> float:
    gradients = [p.grad for p in params if p.grad is not None]
    return _norm(gradients) if gradients else float("nan")


def _norm(tensors: Iterable[Tensor]) -> float:
    return float(sum(t.detach().double().square().sum() for t in tensors) ** 0.5)
