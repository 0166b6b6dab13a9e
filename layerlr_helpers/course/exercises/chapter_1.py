"""Checks of the exercises of notebook 01, on what each layer knows and which rate that asks for."""

import copy
from collections.abc import Collection, Mapping

import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from layerlr_helpers.course.exercises.exercise import Exercise, Wrong, require, require_function, require_same, same

STAGES = ["stem", "layer1", "layer2", "layer3", "layer4", "head"]

#: A probe's accuracies for three questions: in a trained network, in an untrained one, and the margin to be counted.
PROBES = [
    ([0.29, 0.55, 0.69, 0.50, 0.34, 0.23, 0.26], [0.29, 0.45, 0.40, 0.36, 0.31, 0.25, 0.24], 0.05),
    ([0.77, 0.73, 0.68, 0.58, 0.46, 0.32, 0.33], [0.77, 0.73, 0.72, 0.70, 0.67, 0.65, 0.63], 0.06),
    ([0.40, 0.62, 0.70, 0.51, 0.45, 0.30, 0.20], [0.40, 0.52, 0.58, 0.49, 0.43, 0.41, 0.38], 0.03),
]


def _check_control(answer) -> None:
    require_function(answer)
    for trained, untrained, margin in PROBES:
        trained, untrained = (dict(zip(["input", *STAGES], values, strict=True)) for values in (trained, untrained))
        _check_added(answer(dict(trained), dict(untrained), margin), trained, untrained, margin)


def _check_added(found, trained: dict[str, float], untrained: dict[str, float], margin: float) -> None:
    if not (isinstance(found, tuple | list) and len(found) == 2 and all(isinstance(names, Collection) for names in found)):
        raise Wrong("the function has to return two lists of names: first the stages at which training has added something, "
                    "then those at which it has thrown something away")

    def lists(control: Mapping[str, float], margin: float = margin) -> list[list[str]]:
        gain = {stage: trained[stage] - control[stage] for stage in trained}
        return [sorted(stage for stage in gain if sign * gain[stage] > margin) for sign in (1, -1)]

    right = lists(untrained)
    stages = list(trained)
    require_same([sorted(map(str, names)) for names in found], right, {
        "the two lists are in the wrong order; what training has added comes first": right[::-1],
        "each stage is compared with the pixels of the input. The architecture alone adds and loses something on the way; "
        "which network shows how much?": lists(dict.fromkeys(stages, trained["input"])),
        "each stage is compared with the one before it in the trained network. But a fact can fade with depth in an untrained "
        "network, too": lists(dict(zip(stages, [trained["input"], *trained.values()], strict=False))),
        "each stage is compared with the best stage of the untrained network; compare it with the same stage":
            lists(dict.fromkeys(stages, max(untrained.values()))),
        "differences smaller than the margin are counted, too; they may be chance": lists(untrained, 0),
    }, f"the margin is {margin}, and the accuracies, trained and untrained, are "
       + ", ".join(f"{stage} {trained[stage]:.2f} and {untrained[stage]:.2f}" for stage in stages)
       + f". Your lists are {[list(names) for names in found]}, and at least one stage is missing there or is too many")


def _check_moved(answer) -> None:
    require_function(answer)
    for shapes, step in (({"conv.weight": (8, 3, 3, 3), "bn.weight": (8,), "bn.bias": (8,)}, 0.01),
                         ({"fc.weight": (4, 16), "fc.bias": (4,)}, 0.05),
                         ({"a.weight": (6, 4, 3, 3), "norm.weight": (6,), "b.weight": (20, 6, 1, 1)}, 0.1)):
        before = {name: torch.randn(shape) * 0.1 + (len(shape) == 1) for name, shape in shapes.items()}  # scales near 1
        before[next(iter(before))] *= 3  # so that two kernels of one stage differ in size
        after = {name: value + step * torch.randn_like(value) for name, value in before.items()}
        _check_distance(answer(dict(before), dict(after)), before, after)


def _check_distance(found, before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    kernels = [name for name in before if before[name].ndim > 1]

    def length(tensors: Mapping[str, Tensor], names: Collection[str]) -> Tensor:
        return torch.cat([tensors[name].flatten() for name in names]).norm()

    change = {name: after[name] - before[name] for name in before}
    distance, start = length(change, kernels), length(before, kernels)
    by_kernel = torch.stack([length(change, [name]) / length(before, [name]) for name in kernels])
    require_same(found, distance / start, {
        "that counts the scales and biases, too, and they hide how the kernels move":
            length(change, before) / length(before, before),
        "that is the distance itself; it still has to be divided by the length at the start": distance,
        "it is divided by the length after the training, and not by the length at the start":
            distance / length(after, kernels),
        "that is how much longer or shorter the kernels have become. They can turn a long way and keep their length":
            (length(after, kernels) - start) / start,
        "that is the length after the training over the length before; what is the length of the change?":
            length(after, kernels) / start,
        "the square root is missing: these are squared lengths": (distance / start) ** 2,
        "it is a percentage; give the part itself, 0.1 for ten percent": 100 * distance / start,
        "it takes a ratio for each kernel and averages these. Take all kernels of the stage together, as one long vector":
            by_kernel.mean(),
        "it adds up one ratio for each kernel. Take all kernels of the stage together, as one long vector": by_kernel.sum(),
        "it adds up the lengths of several kernels. Lengths do not add up, their squares do":
            sum(length(change, [name]) for name in kernels) / sum(length(before, [name]) for name in kernels),
    }, "that is not the Euclidean length of the change of all kernels, divided by their length at the start", tolerance=1e-4)


def _check_even_movement(answer) -> None:
    require_function(answer)
    for shapes, goal in (({"conv": (16, 3, 3, 3), "fc": (10, 16)}, 0.01),
                         ({"first": (40, 8), "middle": (30, 40), "last": (3, 30)}, 0.004)):
        layers = {name: (torch.randn(shape) + 0.5) * 0.03 * 4 ** i for i, (name, shape) in enumerate(shapes.items())}
        rates = answer({name: weight.clone() for name, weight in layers.items()}, goal)
        if not (isinstance(rates, dict) and rates.keys() == layers.keys() and all(map(_is_rate, rates.values()))):
            raise Wrong(f"the function has to return a dictionary with a rate above 0 for each of {', '.join(layers)}, and it "
                        f"returned {rates!r}")
        _check_first_step(rates, layers, goal)


def _is_rate(value: object) -> bool:
    one_number = isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
    return one_number and 0 < float(value) < float("inf")


def _check_first_step(rates: dict[str, float], layers: dict[str, Tensor], goal: float) -> None:
    moved = _moved_by_first_step(rates, layers)
    size = {name: weight.square().mean().sqrt() for name, weight in layers.items()}
    for correction in (0, 1):  # numpy's standard deviation, and torch's
        spread = {name: goal * weight.std(correction=correction) for name, weight in layers.items()}
        require(not same(moved, _moved_by_first_step(spread, layers), tolerance=1e-3),
                "you are close: the standard deviation subtracts the mean first, and a length does not")
    require_same(moved, dict.fromkeys(layers, goal), {
        hint: _moved_by_first_step(wrong, layers) for hint, wrong in {
            "all layers have the same rate, so those with small weights move further": dict.fromkeys(layers, goal),
            "these rates grow with the number of weights. But with more weights the change of a layer is longer, too, just as "
            "the layer itself is": {name: goal * weight.norm() for name, weight in layers.items()},
            "it is the wrong way round: now layers with small weights move further still":
                {name: goal / size[name] for name in layers},
            "you are close: the mean of absolute values is not quite the typical weight here. Lengths are made of squares":
                {name: goal * weight.abs().mean() for name, weight in layers.items()},
            "the rates have the right ratios, but not the right height: the goal is missing": size,
        }.items()
    }, f"the first step shall move every layer by {goal:.2%} of its length. With your rates it moves "
       + ", ".join(f"{name} by {part:.2%}" for name, part in moved.items()), tolerance=1e-3)


def _moved_by_first_step(rates: Mapping[str, float], layers: dict[str, Tensor]) -> dict[str, float]:
    """How far each layer moves in one step of AdamW, as a part of its length; the gradients are random."""
    params = {name: nn.Parameter(weight.double()) for name, weight in layers.items()}
    optimizer = torch.optim.AdamW([{"params": [params[name]], "lr": float(rates[name])} for name in layers], weight_decay=0.0)
    for p in params.values():
        p.grad = torch.randn_like(p)
    optimizer.step()
    return {name: ((params[name] - layers[name]).norm() / layers[name].norm()).item() for name in layers}


def _check_new_statistics(answer) -> None:
    require_function(answer)
    for n_batches, training, share in ((3, False, 0.3), (2, True, 0.6), (4, False, 1.0)):
        for network in (nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4)),
                        nn.Sequential(nn.Flatten(), nn.Linear(108, 8), nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 2)))):
            batches = [2 * torch.randn(12, 3, 6, 6) + i for i in range(n_batches)]
            start = _after_passes(network, [torch.randn(32, 3, 6, 6)], momentum=0.5).train(training)
            model = copy.deepcopy(start)
            answer(model, [batch.clone() for batch in batches], share)
            _check_untouched(model, start)
            _check_blend(_statistics(model), start, batches, share)


def _check_untouched(model: nn.Module, start: nn.Module) -> None:
    """Whether all but the statistics is as it was."""
    require(all(torch.equal(p, old) for p, old in zip(model.parameters(), start.parameters(), strict=True)),
            "a weight has moved; only the running means and variances may change")
    for module, old in zip(model.modules(), start.modules(), strict=True):
        require(module.training == old.training,
                f"the model came in {'train' if old.training else 'eval'} mode and has to come back in it")
        require(getattr(module, "momentum", None) == getattr(old, "momentum", None),
                "the momentum of a BatchNorm layer is another one than it was, which would change all further training")


def _check_blend(found: dict[str, Tensor], start: nn.Module, batches: list[Tensor], share: float) -> None:
    def blend(new: dict[str, Tensor], share: float = share) -> dict[str, Tensor]:
        return {name: share * new[name] + (1 - share) * old[name] for name in old}

    old, new = _statistics(start), _statistics(_measured(start, batches))
    if same(found, blend(_statistics(_measured(start, [torch.cat(batches)]))), tolerance=1e-3):  # one large batch is as good
        return
    one_dimensional = any(isinstance(module, nn.BatchNorm1d) for module in start.modules())
    require(not one_dimensional or share == 1 or not (same(found, old) or same(found, new, tolerance=1e-3)),
            "some BatchNorm layers are not blended: there is BatchNorm1d, too, and a layer may sit in a module of the model")
    require_same(found, blend(new), {
        "the statistics are still the old ones. BatchNorm measures in train mode only, and the blend has to end up in the "
        "model's own running_mean and running_var": old,
        "the old statistics are gone: the share is not used, or the old ones were no longer there to be blended with": new,
        "the shares are the wrong way round: the share is that of the new statistics": blend(new, 1 - share),
        "each batch has moved the statistics once more by the share, so the last batch counts most. Measure on all batches "
        "first, then blend once": _statistics(_after_passes(start, batches, momentum=share)),
        "the share is not used. Each batch has moved the statistics by BatchNorm's usual momentum, a tenth of the way":
            _statistics(_after_passes(start, batches, momentum=0.1)),
        "what you take for the new statistics is mostly the old ones: in each batch BatchNorm moves them only a tenth of the "
        "way. They have to be measured afresh": blend(_statistics(_after_passes(start, batches, momentum=0.1))),
        "the new statistics are those of the last batch only": blend(_statistics(_measured(start, batches[-1:]))),
        "the new statistics are those of the first batch only": blend(_statistics(_measured(start, batches[:1]))),
        "only the running means are right, not the running variances":
            {name: value if "mean" in name else old[name] for name, value in blend(new).items()},
    }, f"with a share of {share:g}, every running mean and variance has to be {share:g} times the one that update_bn measures "
       f"on the new batches plus {1 - share:g} times the old one", tolerance=1e-3)


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers() if "running" in name}


def _measured(start: nn.Module, batches: list[Tensor]) -> nn.Module:
    """A copy with new statistics."""
    model = copy.deepcopy(start)
    update_bn(batches, model)
    return model


def _after_passes(start: nn.Module, batches: list[Tensor], momentum: float) -> nn.Module:
    """A copy that has seen the batches in train mode, with this momentum in its BatchNorm layers."""
    model = copy.deepcopy(start).train()
    norms = [module for module in model.modules() if hasattr(module, "momentum")]
    for module in norms:
        module.momentum = momentum
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for module in norms:
        module.momentum = 0.1
    return model


def _check_choice(answer) -> None:
    require_function(answer)
    for best, held, tested, easy, lucky, close in (("layer1", "layer4", "head", "layer3", "stem", "layer2"),
                                                   ("layer3", "stem", "layer1", "head", "layer4", "layer2"),
                                                   ("all", "layer2", "layer4", "stem", "layer1", "head"),
                                                   ("layer2", "head", "stem", "layer2", "layer1", "layer3")):
        _check_chosen(answer, _trial_runs(best, held, tested, easy, lucky, close))


def _check_chosen(answer, rows: pd.DataFrame) -> None:
    found = answer(rows.copy())
    require(isinstance(found, str) and found in [*STAGES, "all"],
            f"the function has to return the name of a stage, or 'all', and it returned {found!r}")
    follow, validation = rows["statistics"] == "follow", rows["split"] == "validation"
    gain = _gains(rows[follow & validation])
    right = gain.idxmax()
    require_same(found, right, {
        "runs in which BatchNorm kept its old statistics have helped to choose. With these another stage is ahead than with "
        "statistics that follow": _gains(rows[validation]).idxmax(),
        "test rows have helped to choose. After that they can no longer tell you how good the choice is":
            _gains(rows[follow]).idxmax(),
        "that stage was tried only on seeds on which every stage does well. Compare each run with that of \"all\" on the same "
        "seed": rows[follow & validation].groupby("stage")["accuracy"].mean().idxmax(),
        "that is the stage of the best single run. One lucky seed is not enough; take the mean over the seeds":
            rows[follow & validation].set_index("stage")["accuracy"].idxmax(),
        "on these rows no single stage is ahead of training all of them, so the answer is \"all\"": gain.drop("all").idxmax(),
        "you dropped the seeds on which some stage is missing; use all seeds of each stage":
            _gains(rows[follow & validation], complete=True).idxmax(),
    }, f"on the same seeds {found} is {100 * gain[found]:+.1f} points from \"all\" in the mean, and another choice has "
       f"{100 * gain.max():+.1f}")


def _gains(rows: pd.DataFrame, *, complete: bool = False) -> pd.Series:
    """Each stage's mean difference from all stages, seed by seed; on request only over the seeds that every stage has."""
    accuracy = rows.pivot_table(index="seed", columns="stage", values="accuracy")
    if complete:
        accuracy = accuracy.dropna()
    return accuracy.sub(accuracy["all"], axis=0).mean()


def _trial_runs(best: str, held: str, tested: str, easy: str, lucky: str, close: str) -> pd.DataFrame:
    """Runs of five seeds in which ``best`` is ahead, and each of the others looks ahead to somebody who makes one mistake.

    ``held`` is ahead with held statistics, ``tested`` in the test rows, ``easy`` was tried on easy seeds only (and may be
    ``best``), ``lucky`` has one very good run, and ``close`` is ahead on the seeds of ``easy``, and the best of the stages if
    ``best`` is ``"all"``.
    """
    ease = {0: 0.40, 1: 0.50, 2: 0.45, 3: 0.62, 4: 0.66}
    from_all = dict.fromkeys(STAGES, -0.06) | {easy: -0.01, best: 0.03, "all": 0.0}
    rows = []
    for split, statistics in (("validation", "follow"), ("validation", "held"), ("test", "follow")):
        for seed in ease:
            for stage, difference in from_all.items():
                if stage == easy and seed < 3:
                    continue
                if stage == lucky:
                    difference = 0.15 if seed == 4 else -0.12
                if stage == close:
                    difference = 0.05 if seed >= 3 else -0.04
                if (stage, statistics) == (held, "held") or (stage, split) == (tested, "test"):
                    difference = 0.3
                rows.append({"stage": stage, "split": split, "statistics": statistics, "seed": seed,
                             "accuracy": round(ease[seed] + difference, 3)})
    return pd.DataFrame(rows).sample(frac=1, random_state=0, ignore_index=True)


EXERCISES = {
    "1.1": Exercise("What training added, and what it threw away", _check_control,
                    "the untrained network has the same stages. Subtract its accuracy from that of the trained network, stage "
                    "by stage.", "Some facts fade with depth in every network, trained or not. Only the control shows that."),
    "1.2": Exercise("How far has a stage moved?", _check_moved,
                    "p.ndim tells a kernel from a scale or a bias. Add up squares over all kernels, and take the root at the "
                    "end.",
                    "This is what layer_statistics calls moved."),
    "1.3": Exercise("Rates that move all layers equally far", _check_even_movement,
                    "if each of n weights moves by the rate, the change has the length rate · √n. And how long is a layer of n "
                    "weights, if each of them has the size w?",
                    "In the course's network layer1 has the largest weights and the head the smallest. To move evenly, layer1 "
                    "would need the larger rate, which is the opposite of layer decay."),
    "1.4": Exercise("New statistics from a few images", _check_new_statistics,
                    "update_bn measures, but it forgets the old statistics first. So copy them before you call it. They are "
                    "among the model's buffers: model.named_buffers().", "It took no label, and no weight was trained."),
    "1.5": Exercise("Which stage to tune for a shift that nobody has seen", _check_choice,
                    "make a pivot table with a row for each seed and a column for each stage. Then you can subtract the column "
                    "\"all\" from every column.",
                    "It is the trial runs that decide here, and so the choice can be right for a shift that is in no list."),
}
