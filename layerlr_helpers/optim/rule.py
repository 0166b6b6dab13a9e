"""The rule of LayerAdaptiveLR, one tensor after the other: the definition that the faster implementations must agree with.

    k = mean over a layer's entries of |m| / (sqrt(v) + eps), clamped to the ratio range       the layer's ratio
    p ← p − lr · decay · p − lr · k · d                                                        the step

m and v are Adam's moments with its bias correction. d is m ("momentum"), m / (sqrt(v) + eps) ("adam"), or the same with
the mean of v over the layer in place of v ("adam_mini", the block rule of Adam-mini; Zhang et al., 2025).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TensorSums = tuple[Tensor, Tensor | None]  # what observe returns


@dataclass
class Batch:
    """The tensors of one parameter group that are stepped together, with their state: lists of one length.

    ``layers`` has the indices of the tensors that share a ratio. ``entries`` counts the scalars of each whole tensor, also
    where ``params`` and their state are the shard that this process holds; ``process_groups`` then have the other shards.
    """

    group: dict
    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    rates: list[Tensor]
    entries: list[int]
    process_groups: list[tuple]
    layers: list[list[int]]


def single_tensor(batches: Sequence[Batch], reduction) -> None:
    """Step the parameters. ``reduction`` adds up the sums of several processes; None if this one has all of every layer."""
    tensor_sums = [{i: observe(batch, i) for i in range(len(batch.params))} for batch in batches]
    for batch, layer_ratios in zip(batches, ratios(batches, tensor_sums, reduction), strict=True):
        for layer, ratio, scale in layer_ratios:
            rate = scalar(batch.group["lr"]) * ratio.clamp(*batch.group["ratio_range"])
            for i in layer:
                batch.rates[i].copy_(rate)
            move(batch, layer, rate, scale)


def observe(batch: Batch, i: int) -> TensorSums:
    """Update the moments of tensor ``i``; return sum(|m| / (sqrt(v) + eps)), or for "adam_mini" sum(|m|) and sum(g²)."""
    group, m, v = batch.group, batch.exp_avgs[i], batch.exp_avg_sqs[i]
    g = -batch.grads[i] if group["maximize"] else batch.grads[i]
    batch.steps[i] += 1
    m.lerp_(g, weight(group, 0, m))
    first, second = corrections(group, batch.steps[i])
    if group["direction"] == "adam_mini":
        return exact(m).abs().sum() / first, exact(g).square().sum()
    v.copy_(exact(v).lerp(exact(g).square(), weight(group, 1, exact(v))))
    return (exact(m).abs() / (exact(v).sqrt() / second + group["eps"])).sum() / first, None


def ratios(batches: Sequence[Batch], tensor_sums: Sequence[dict[int, TensorSums]], reduction) -> list[list[tuple]]:
    """For each batch (layer, ratio, scale) of each layer, as from :func:`ratio_of`; for "adam_mini" v is updated."""
    if reduction is not None:
        tensor_sums = reduction.over_shards(batches, tensor_sums)
    summed = [[layer_sums(batch, layer, sums) for layer in batch.layers]
              for batch, sums in zip(batches, tensor_sums, strict=True)]
    if reduction is not None:
        summed = reduction.over_tensors(batches, summed)
    return [[(layer, *ratio_of(batch, *sums)) for layer, sums in zip(batch.layers, layers, strict=True) if layer]
            for batch, layers in zip(batches, summed, strict=True)]


def layer_sums(batch: Batch, layer: list[int], tensor_sums: dict[int, TensorSums]) -> tuple[Tensor, Tensor | None, int]:
    """Add up the tensors of a layer: |m| (for "adam_mini") or |m| / (sqrt(v) + eps); v (for "adam_mini"); the entries."""
    size, entries = sum(tensor_sums[i][0] for i in layer), sum(batch.entries[i] for i in layer)
    if batch.group["direction"] != "adam_mini":
        return size, None, entries
    for i in layer:  # here v is one number per tensor: the running mean of its mean square
        v = batch.exp_avg_sqs[i]
        v.lerp_((tensor_sums[i][1] / batch.entries[i]).to(v.dtype), weight(batch.group, 1, v))
    squares = [batch.exp_avg_sqs[i] * batch.entries[i] / corrections(batch.group, batch.steps[i])[1] ** 2 for i in layer]
    return size, sum(squares), entries


def ratio_of(batch: Batch, size: Tensor, square: Tensor | None, entries: int) -> tuple[Tensor, Tensor | None]:
    """The ratio of a layer from its sums; for "adam_mini" also the scale, sqrt(mean v) + eps."""
    if square is None:
        return size / entries, None
    scale = (square / entries).sqrt() + batch.group["eps"]
    return size / entries / scale, scale


def move(batch: Batch, layer: list[int], rate: Tensor, scale: Tensor | None) -> None:
    """Step the tensors of a layer by its rate, lr · k."""
    group = batch.group
    for i in layer:
        first, second = corrections(group, batch.steps[i])
        d = exact(batch.exp_avgs[i]) / first
        if group["direction"] != "momentum":
            d = d / (scale if scale is not None else exact(batch.exp_avg_sqs[i]).sqrt() / second + group["eps"])
        batch.params[i].mul_(1 - scalar(group["lr"]) * group["weight_decay"]).sub_(rate * d)


def corrections(group: dict, step: Tensor) -> tuple[Tensor, Tensor]:
    """Adam's bias corrections of m and of sqrt(v), in double precision: in single, 1 - 0.999 is already off by 1e-5."""
    t = step.double()
    return 1 - group["betas"][0] ** t, (1 - group["betas"][1] ** t).sqrt()


def weight(group: dict, moment: int, like: Tensor) -> float | Tensor:
    """How much of the new value goes into a moment, 1 - beta; in the precision of ``like`` if beta is a tensor."""
    beta = group["betas"][moment]
    return 1 - beta.to(like) if isinstance(beta, Tensor) else 1 - beta


def scalar(lr: float | Tensor) -> float | Tensor:
    """A rate in a tensor of one element as a tensor without dimensions; a number as it is."""
    return lr.squeeze() if isinstance(lr, Tensor) else lr


def exact(tensor: Tensor) -> Tensor:
    """A tensor of half precision in single precision, any other as it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
