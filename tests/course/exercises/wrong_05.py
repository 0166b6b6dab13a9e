"""Wrong answers to the exercises of notebook 05 that somebody could well give."""

import math
from statistics import mean, pstdev, stdev

import torch
from scipy.stats import t


def ratio(first=lambda m, step, betas: m / (1 - betas[0] ** step), second=lambda v, step, betas: v / (1 - betas[1] ** step),
          combine=lambda m, v: (m.abs() / v.sqrt()).mean()):
    def of(optimizer, p):
        state, betas = optimizer.state[p], optimizer.param_groups[0]["betas"]
        step = int(state["step"])
        return combine(first(state["exp_avg"], step, betas), second(state["exp_avg_sq"], step, betas))
    return of


def uncorrected(moment, step, betas):
    return moment


def curve(signal, noise, beta1):
    return abs(signal) / math.hypot(signal, noise)


def settled(floor=lambda beta1: math.sqrt(2 / math.pi * (1 - beta1) / (1 + beta1)), above=curve):
    return lambda signal, noise, beta1: above(signal, noise, beta1) if signal else floor(beta1)


def stage(combine):
    return lambda groups, ratios: {
        group.name: combine([ratios[name] for name in group.params], [p.numel() for p in group.params.values()])
        for group in groups}


def total(k, sizes):
    return sum(one * size for one, size in zip(k, sizes, strict=True))


def gradients(params):
    return [p.grad for p in params if p.grad is not None]


def weights(params):
    return [p.detach() for p in params]


def norm(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors]).norm()


def zero_gives_zero(params):
    size = norm(weights(params))
    return norm(gradients(params)) / size if size > 0 else 0.0


def verdict(gaps=lambda ours, theirs: [ours[seed] - theirs[seed] for seed in ours if seed in theirs],
            half=lambda gaps: t.ppf(0.975, len(gaps) - 1) * stdev(gaps) / math.sqrt(len(gaps))):
    def word(ours, theirs):
        found = gaps(ours, theirs)
        return "better" if mean(found) > half(found) else "worse" if mean(found) < -half(found) else "cannot be told"
    return word


def not_paired(ours, theirs):
    errors = [stdev(way.values()) / math.sqrt(len(way)) for way in (ours, theirs)]
    difference, half = mean(ours.values()) - mean(theirs.values()), t.ppf(0.975, len(ours) - 1) * math.hypot(*errors)
    return "better" if difference > half else "worse" if difference < -half else "cannot be told"


def every_seed(ours, theirs):
    gaps = [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]
    return "better" if min(gaps) > 0 else "worse" if max(gaps) < 0 else "cannot be told"


WRONG = {
    "5.1": [ratio(uncorrected, uncorrected), ratio(second=uncorrected), ratio(first=uncorrected),
            ratio(second=lambda v, step, betas: v / (1 - betas[0] ** step)),
            ratio(second=lambda v, step, betas: v / (1 - betas[1] ** step) ** 2),
            ratio(lambda m, step, betas: m / (1 - 0.9**step), lambda v, step, betas: v / (1 - 0.999**step)),
            ratio(combine=lambda m, v: (m / v.sqrt()).mean()), ratio(combine=lambda m, v: (m / v.sqrt()).mean().abs()),
            ratio(combine=lambda m, v: m.abs().mean() / v.sqrt().mean()), ratio(combine=lambda m, v: (m.abs() / v).mean()),
            ratio(combine=lambda m, v: m.abs() / v.sqrt()), ratio(combine=lambda m, v: m.abs().mean() / v.mean().sqrt())],
    "5.2": [settled(lambda beta1: 0.0), settled(lambda beta1: 0.18), settled(lambda beta1: (1 - beta1) / (1 + beta1)),
            settled(lambda beta1: math.sqrt(2 / math.pi) * (1 - beta1) / (1 + beta1)),
            settled(lambda beta1: math.sqrt((1 - beta1) / (1 + beta1))),
            settled(above=lambda signal, noise, beta1: signal / math.hypot(signal, noise)),
            settled(above=lambda signal, noise, beta1: abs(signal) / noise if noise else 1.0),
            settled(above=lambda signal, noise, beta1: abs(signal) / noise),
            settled(above=lambda signal, noise, beta1: abs(signal) / (abs(signal) + noise)),
            settled(above=lambda signal, noise, beta1: 1.0)],
    "5.3": [stage(lambda k, sizes: mean(k)), stage(total), stage(lambda k, sizes: total(k, sizes) / len(k)),
            stage(lambda k, sizes: k[0]), stage(lambda k, sizes: k[sizes.index(max(sizes))]),
            stage(lambda k, sizes: sum(k)), lambda groups, ratios: mean(ratios.values())],
    "5.4": [lambda params: mean(float(p.grad.norm() / p.detach().norm()) for p in params if p.grad is not None),
            lambda params: sum(float(p.grad.norm() / p.detach().norm()) for p in params if p.grad is not None),
            lambda params: sum(map(torch.Tensor.norm, gradients(params))) / sum(map(torch.Tensor.norm, weights(params))),
            lambda params: (norm(gradients(params)) / norm(weights(params))) ** 2,
            lambda params: norm(weights(params)) / norm(gradients(params)), lambda params: norm(gradients(params)),
            lambda params: norm(gradients(params)) / norm(weights([p for p in params if p.grad is not None])),
            lambda params: sum(g.abs().sum() for g in gradients(params)) / sum(w.abs().sum() for w in weights(params)),
            lambda params: norm(gradients(params)) / norm(weights(params)), zero_gives_zero],
    "5.5": [lambda ours, theirs: verdict()(theirs, ours), verdict(half=lambda gaps: 0), not_paired,
            verdict(gaps=lambda ours, theirs: list(map(float.__sub__, ours.values(), theirs.values()))),
            verdict(half=lambda gaps: t.ppf(0.975, len(gaps) - 1) * stdev(gaps)),
            verdict(half=lambda gaps: 1.96 * stdev(gaps) / math.sqrt(len(gaps))),
            verdict(half=lambda gaps: stdev(gaps) / math.sqrt(len(gaps))),
            verdict(half=lambda gaps: t.ppf(0.975, len(gaps) - 1) * pstdev(gaps) / math.sqrt(len(gaps))),
            every_seed, lambda ours, theirs: "cannot be told",
            lambda ours, theirs: mean(ours.values()) > mean(theirs.values())],
}
