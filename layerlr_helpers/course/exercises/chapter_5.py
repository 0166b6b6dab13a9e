"""Checks of the exercises of notebook 05, on the ratio of an adaptive optimizer and on what is left of a gain."""

import math
from collections.abc import Callable, Iterable
from statistics import mean, pstdev, stdev

import torch
from torch import Tensor, nn

from layerlr_helpers.course.exercises.exercise import (
    Exercise,
    Wrong,
    require,
    require_function,
    require_returned,
    require_same,
    same,
)
from layerlr_helpers.layers import LayerGroup, layer_groups
from layerlr_helpers.models import load_resnet18


def _check_ratio(answer) -> None:
    require_function(answer)
    for betas, steps, shape in (((0.9, 0.999), 1, (5, 3)), ((0.9, 0.999), 30, (50,)), ((0.7, 0.95), 8, (6, 5))):
        p = nn.Parameter(torch.zeros(shape))
        optimizer = torch.optim.Adam([p], betas=betas)
        for _ in range(steps):
            p.grad = 0.01 * (torch.randn(shape) - 0.3)
            optimizer.step()
        _check_ratio_of(answer(optimizer, p), optimizer.state[p], betas)


def _check_ratio_of(found, state: dict, betas: tuple[float, float]) -> None:
    m, v, step = state["exp_avg"], state["exp_avg_sq"], int(state["step"])
    first, second = [1 - beta**step for beta in betas]
    uncorrected = (m.abs() / v.sqrt()).mean()
    correction = second**0.5 / first
    signed, right = (m / v.sqrt()).mean() * correction, uncorrected * correction
    when = f"after {step} step{'s' if step > 1 else ''} with betas={betas}"
    require_same(found, right, {
        f"bias correction is missing: both moments begin at 0, and {when} they are still too small": uncorrected,
        "the correction of v is missing": uncorrected / first,
        "the correction of m is missing": uncorrected * second**0.5,
        "v is corrected after its root was taken. Correct v first": uncorrected * second / first,
        "both moments are corrected with beta1; v has beta2": uncorrected * first**-0.5,
        "the betas are taken for 0.9 and 0.999, and this optimizer has others":
            uncorrected * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step),
        "positive and negative m cancel in this mean; their absolute values do not": signed,
        "positive and negative m cancel in this mean, so the absolute values have to be taken before it": signed.abs(),
        "here v is a mean over the weights, as in adam_mini. Divide weight by weight, and then take the mean":
            m.abs().mean() / v.mean().sqrt() * correction,
        "that is a ratio of two means. Divide weight by weight, and then take the mean":
            m.abs().mean() / v.sqrt().mean() * correction,
        "the root of v is missing: v has the square of the gradient's unit": (m.abs() / v).mean() * second / first,
        "that is the ratio of each weight; k is their mean": m.abs() / v.sqrt() * correction,
    }, f"{when}, k is {right:.3f}, and the function says {found}", tolerance=1e-3)


def _check_settled_ratio(answer) -> None:
    require_function(answer)
    for signal, noise, beta1 in ((2.0, 0.0, 0.9), (-0.5, 0.0, 0.9), (0.0, 1.0, 0.9), (0.0, 3.0, 0.9), (0.0, 1.0, 0.5),
                                 (0.0, 2.0, 0.97), (6.0, 3.0, 0.9), (-2.0, 2.0, 0.9), (-1.5, 1.0, 0.8)):
        try:
            found = answer(signal, noise, beta1)
        except ZeroDivisionError:
            raise Wrong(f"with mean={signal:g} and std={noise:g}, the function divides by 0. What do m and v settle at "
                        "then?") from None
        _check_settled(found, signal, noise, beta1)


def _check_settled(found, signal: float, noise: float, beta1: float) -> None:
    share = (1 - beta1) / (1 + beta1)
    measured = _measured_ratio(signal, noise, beta1)
    usual_floor = math.sqrt(2 / math.pi * 0.1 / 1.9)
    mistakes = {"noise does not cancel completely in m, so k does not reach 0": 0.0,
                "m is a mean of more gradients when beta1 is larger, so the floor depends on beta1": usual_floor,
                "the root of (1 - beta1) / (1 + beta1) is missing": math.sqrt(2 / math.pi) * share,
                "that is the standard deviation of m. Its mean absolute value is smaller, by the factor sqrt(2 / pi)":
                    math.sqrt(share)}
    if signal:
        mistakes = {"k has no sign: a clear gradient has the same k whether it is positive or negative":
                        signal / math.hypot(signal, noise),
                    "that is mean / std. But k has sqrt(v) below the line, and v holds the square of the mean as well":
                        abs(signal / noise) if noise else math.inf,
                    "the squares of mean and std add up in v, and not the two numbers": abs(signal) / (abs(signal) + noise),
                    "noise makes k smaller than 1, also where the mean is larger than the noise": 1.0}
    require_same(found, measured, mistakes, f"with mean={signal:g}, std={noise:g} and beta1={beta1:g}, a measured k is "
                                            f"{measured:.2f}, and the function says {found}", tolerance=0.05)


def _measured_ratio(signal: float, noise: float, beta1: float) -> float:
    """The ratio of 3,000 weights after 300 steps with such gradients."""
    m = v = torch.zeros(3000)
    for gradient in signal + noise * torch.randn(300, 3000):
        m, v = beta1 * m + (1 - beta1) * gradient, 0.999 * v + 0.001 * gradient**2
    return float((m.abs() / v.sqrt()).mean()) * math.sqrt(1 - 0.999**300) / (1 - beta1**300)


def _check_stage_ratios(answer) -> None:
    require_function(answer)
    chain = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 2))
    for groups in (layer_groups(load_resnet18(None, num_classes=3)), layer_groups(chain, torch.zeros(1, 4))):
        ratios = {name: float(torch.rand(())) for group in groups for name in group.params}
        _check_ratios_of(answer(groups, ratios), groups, ratios)


def _check_ratios_of(found, groups: list[LayerGroup], ratios: dict[str, float]) -> None:
    def by(combine: Callable[[list[float], list[int]], float]) -> dict[str, float]:
        return {group.name: combine([ratios[name] for name in group.params], [p.numel() for p in group.params.values()])
                for group in groups}

    require_same(found, by(lambda k, sizes: sum(map(math.prod, zip(k, sizes, strict=True))) / sum(sizes)), {
        "each tensor counts alike here, a bias of five weights as much as a kernel of a million. The mean is over the weights":
            by(lambda k, sizes: mean(k)),
        "these are the sums over the weights; they still have to be divided by the number of weights of the stage":
            by(lambda k, sizes: sum(map(math.prod, zip(k, sizes, strict=True)))),
        "the sum over the weights has to be divided by the number of weights, and not by the number of tensors":
            by(lambda k, sizes: sum(map(math.prod, zip(k, sizes, strict=True))) / len(k)),
        "that is the ratio of the first tensor of each stage only": by(lambda k, sizes: k[0]),
        "that is the ratio of the largest tensor of each stage only; the others count as well":
            by(lambda k, sizes: k[sizes.index(max(sizes))]),
        "these are sums of the tensors' ratios, and a ratio of a stage is a mean": by(lambda k, sizes: sum(k)),
    }, f"the function has to return a dictionary with a ratio for each of {', '.join(group.name for group in groups)}: the "
       "mean over all weights of that stage")


def _check_relative_gradient(answer) -> None:
    require_function(answer)
    for shapes in (((3, 4), (3,)), ((5,), (2, 2), (4, 3))):
        _check_relative(answer, [_random(shape) for shape in shapes])
    _check_relative(answer, [_random((3, 4)), _random((3,), weight=0.0)])
    _check_relative(answer, [_random((6,), gradient=None), _random((3, 4))])
    found = answer([_random((3,), weight=0.0), _random((2, 3), weight=0.0)])
    require(isinstance(found, float | Tensor) and math.isnan(found),
            "if all weights are 0, as in some new heads, there is nothing to compare the gradient with. Return nan in place of "
            f"{found}")


def _random(shape: tuple[int, ...], weight: float = 1.0, gradient: float | None = 1.0) -> nn.Parameter:
    """A parameter with random numbers and a random gradient of these sizes."""
    p = nn.Parameter(weight * (torch.randn(shape) + 0.5))
    p.grad = None if gradient is None else gradient * torch.randn(shape)
    return p


def _check_relative(answer, params: list[nn.Parameter]) -> None:
    weights = [p.detach() for p in params]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    each = [float(gradient.norm() / weight.norm()) for gradient, weight in zip(gradients, weights, strict=True)]
    of_weights, of_gradients = _norm(weights), _norm(gradients)
    found = answer(params)
    require_same(found, of_gradients / of_weights, {
        "the weights of a parameter without a gradient count as well":
            of_gradients / _norm(p.detach() for p in params if p.grad is not None),
        "that is the mean of the tensors' relative gradients; here all tensors together have one norm": mean(each),
        "that is the sum of the tensors' relative gradients; here all tensors together have one norm": sum(each),
        "norms do not add up, only their squares do": sum(map(Tensor.norm, gradients)) / sum(map(Tensor.norm, weights)),
        "the roots are missing: these are squared norms": (of_gradients / of_weights) ** 2,
        "it is upside down: the norm of the weights is what to divide by": of_weights / of_gradients,
        "that is the norm of the gradients alone": of_gradients,
        "that compares sums of absolute values; a norm is the root of the sum of the squares":
            sum(g.abs().sum() for g in gradients) / sum(w.abs().sum() for w in weights),
    }, f"here the norm of the gradients is {of_gradients:.3f}, that of the weights is {of_weights:.3f}, and the function says "
       f"{found}", tolerance=1e-5)


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in tensors))


THEIRS = {0: 71.0, 1: 83.5, 2: 64.5, 3: 77.0, 4: 90.0}  # accuracies by seed: seeds differ more than two ways do
PAIRS = [({0: 72.0, 1: 84.0, 2: 65.8, 3: 78.1, 4: 90.9}, THEIRS),  # better, though the seeds differ a lot
         ({0: 74.0, 1: 82.5, 2: 67.5, 3: 75.5, 4: 93.0}, THEIRS),  # a higher mean, and no more than noise
         ({0: 74.0, 1: 82.5, 2: 66.5, 3: 75.0, 4: 91.5}, THEIRS),  # the same, and less than a standard error
         ({4: 89.0, 3: 75.9, 2: 63.7, 1: 82.0, 0: 70.2}, THEIRS),  # worse, in another order
         ({3: 78.0, 7: 99.0, 4: 91.2, 1: 84.3, 2: 65.6, 0: 72.1}, THEIRS),  # better, with a seed that only one has
         ({0: 71.95, 1: 83.8, 2: 65.0}, {0: 71.0, 1: 83.5, 2: 64.5}),  # clear with 1.96, but three seeds need more
         ({0: 71.9, 1: 83.85, 2: 65.3}, {0: 71.0, 1: 83.5, 2: 64.5}),  # clear with a standard deviation divided by n
         ({seed: 80 + 0.5 + 0.6 * (-1) ** seed for seed in range(10)}, dict.fromkeys(range(10), 80.0))]  # ten seeds help


def _check_verdict(answer) -> None:
    require_function(answer)
    found = [answer(dict(ours), dict(theirs)) for ours, theirs in PAIRS]
    require_returned(*found)
    expected = _verdicts(_half)
    shown = next((f"{ours} against {theirs} is {right!r}, and the function says {said!r}"
                  for (ours, theirs), right, said in zip(PAIRS, expected, found, strict=True) if not same(said, right)), "")
    require_same(found, expected, {
        "it takes the difference the wrong way round": _verdicts(_half, sign=-1),
        "a higher mean is not enough: the interval of the difference may still hold 0": _verdicts(lambda gaps: 0),
        "it does not compare seed by seed. What a seed does to both ways alike goes away only in the difference on each seed":
            [_word(mean(ours.values()) - mean(theirs.values()), _half_unpaired(ours, theirs)) for ours, theirs in PAIRS],
        "runs are paired by their place in the dictionary; pair those that have the same seed":
            [_verdict(list(map(float.__sub__, ours.values(), theirs.values())), _half) for ours, theirs in PAIRS],
        "that is the spread of the differences of single seeds; their mean is surer, by the factor sqrt(n)":
            _verdicts(lambda gaps: _half(gaps) * math.sqrt(len(gaps))),
        "the interval is too narrow: what the standard error is multiplied by is too small for so few seeds":
            _verdicts(lambda gaps: 1.96 * stdev(gaps) / math.sqrt(len(gaps))),
        "it misses the factor t: a standard error on each side holds the mean in two of three cases only":
            _verdicts(lambda gaps: stdev(gaps) / math.sqrt(len(gaps))),
        "the standard deviation has to be divided by n - 1 here, not by n": _verdicts(lambda gaps: _half(gaps, pstdev)),
        "it is \"better\" only if every seed is better; the interval of the mean decides":
            ["better" if min(gaps) > 0 else "worse" if max(gaps) < 0 else "cannot be told" for gaps in map(_gaps, PAIRS)],
    }, shown)


def _gaps(pair: tuple[dict, dict]) -> list[float]:
    """The differences on the seeds that both have."""
    ours, theirs = pair
    return [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]


def _half(gaps: list[float], deviation: Callable = stdev) -> float:
    """Half of the 95 % interval of the mean."""
    return _student(len(gaps)) * deviation(gaps) / math.sqrt(len(gaps))


def _half_unpaired(ours: dict, theirs: dict) -> float:
    return _student(len(ours)) * math.sqrt(sum(stdev(way.values()) ** 2 / len(way) for way in (ours, theirs)))


def _student(n: int) -> float:
    from scipy.stats import t

    return t.ppf(0.975, n - 1)


def _verdicts(half: Callable[[list[float]], float], sign: int = 1) -> list[str]:
    return [_verdict([sign * gap for gap in _gaps(pair)], half) for pair in PAIRS]


def _verdict(gaps: list[float], half: Callable[[list[float]], float]) -> str:
    return _word(mean(gaps), half(gaps))


def _word(difference: float, half: float) -> str:
    return "better" if difference > half else "worse" if difference < -half else "cannot be told"


EXERCISES = {
    "5.1": Exercise("Read the ratio off Adam", _check_ratio,
                    "both moments begin at 0, and each has to be corrected with its own beta. The mean over the weights comes "
                    "last.",
                    "So you can watch the ratio in any run that uses Adam."),
    "5.2": Exercise("What will the ratio be?", _check_settled_ratio,
                    "take the three cases one by one, as in section 2. What does m settle at, and what does sqrt(v)?",
                    "It depends neither on the unit of the gradient nor on its sign."),
    "5.3": Exercise("From a ratio a tensor to a ratio a stage", _check_stage_ratios,
                    "how many weights stand behind the ratio of each tensor? p.numel() tells.",
                    "This is what pool=\"group\" does in Adam's direction. The large kernels decide, and biases hardly count."),
    "5.4": Exercise("A relative gradient", _check_relative_gradient,
                    "the norm of several tensors together is the root of the sum of all their squares.",
                    "A bias of zeros beside a kernel does no harm, because only all weights together have to differ from 0."),
    "5.5": Exercise("A gain, or only noise?", _check_verdict,
                    "first make a list of the differences, one for each seed that both have. The rest needs only this list.",
                    "When each seed moves two ways alike, one point can be told although the seeds differ by twenty."),
}
