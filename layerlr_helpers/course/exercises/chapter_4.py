"""Checks of the exercises of notebook 04, on freezing and unfreezing."""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from layerlr_helpers.course.exercises.exercise import (
    Exercise,
    Wrong,
    require,
    require_function,
    require_returned,
    require_same,
    same,
    weights_of,
)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def _cnn() -> nn.Module:
    block = nn.Sequential(nn.Conv2d(1, 5, 2), nn.BatchNorm2d(5), nn.ReLU())
    return nn.Sequential(nn.Unflatten(1, (1, 2, 2)), block, nn.Flatten(), nn.Linear(5, 3))


def _check_train_head(answer) -> None:
    require_function(answer)
    for make in (_mlp, _cnn):
        _check_head_alone(answer, make)


def _check_head_alone(answer, make: Callable[[], nn.Module]) -> None:
    model, optimizer, batches = _already_trained(make)
    before, head = weights_of(model), model[-1]
    frozen = {name: p for name, p in model.named_parameters() if all(p is not q for q in head.parameters())}
    try:
        answer(model, head, optimizer, batches)
    except RuntimeError as error:
        require("does not require grad" not in str(error), "backward() raises an error, because no parameter at all requires "
                                                           "a gradient now, not even the head's")
        raise
    if any(not torch.equal(p, before[name]) for name, p in frozen.items()):
        raise Wrong(_why_it_moved(list(frozen.values())))
    require(all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers()),
            "the parameters outside the head stay as they are, but BatchNorm's running statistics have moved: no gradient is "
            "needed for that. In which mode are these layers when a batch passes through them?")
    _check_numbers_of_head(head, make)


def _why_it_moved(frozen: list[nn.Parameter]) -> str:
    if any(p.requires_grad for p in frozen):
        return ("parameters outside the head still require gradients, and they train. Setting an attribute requires_grad on a "
                "module makes a new attribute that nobody reads")
    if any(p.grad is not None and not p.grad.any() for p in frozen):
        return ("parameters outside the head require no gradient, and yet they move. What is in their .grad when the "
                "optimizer steps, and which value would it pass over?")
    return ("parameters outside the head require no gradient, and yet they move: at a step, the gradient from the training "
            "before was still there")


def _check_numbers_of_head(head: nn.Module, make: Callable[[], nn.Module]) -> None:
    def after(**options: bool) -> dict[str, Tensor]:
        model, optimizer, batches = _already_trained(make)
        return _train_head(model, model[-1], optimizer, batches, **options)

    start = weights_of(_already_trained(make)[0][-1])
    require(not same(weights_of(head), start), "everything stays as it is, but so does the head; it has to train")
    require_same(weights_of(head), after(), {
        "the running statistics do not move, but BatchNorm does not use them either: it still normalises by the batch":
            after(batch_statistics=True),
        "only the head changes now, but the gradients of earlier batches are still there at each step":
            after(emptied=False),
    }, "only the head changes now, but not as the optimizer moves it with one step for each batch", tolerance=1e-5)


def _already_trained(make: Callable[[], nn.Module]) -> tuple[nn.Module, torch.optim.Optimizer, list]:
    """A model of which everything has trained, with gradients and momenta left over, its optimizer, and new batches."""
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    batches = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(4)]
    cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    optimizer.step()
    return model, optimizer, batches[1:]


def _train_head(model: nn.Module, head: nn.Module, optimizer: torch.optim.Optimizer, batches: list, *,
                batch_statistics: bool = False, emptied: bool = True) -> dict[str, Tensor]:
    """Train the head alone, rightly or with a mistake; returns its numbers."""
    model.train(batch_statistics)
    optimizer.zero_grad()
    for inputs, labels in batches:
        if emptied:
            optimizer.zero_grad()
        cross_entropy(model(inputs), labels).backward(inputs=list(head.parameters()))
        optimizer.step()
    return weights_of(head)


def _require_all(found: list, expected: list, mistakes: Mapping[str, list], cases: list[str]) -> None:
    """Check the answers to several cases; the message names a mistake that explains all of them, or the first wrong answer."""
    require_returned(*found)
    otherwise = next((f"{case}, the answer is {_listed(right)}, and the function says {_listed(answer)}"
                      for case, right, answer in zip(cases, expected, found, strict=True) if not same(answer, right)), "")
    require_same(found, expected, mistakes, otherwise)


def _listed(answer: object) -> str:
    return (", ".join(map(str, answer)) or "nothing") if isinstance(answer, list) else repr(answer)


def _names(found: object) -> list[str] | None:
    """Names in any order and in any collection, sorted; one that is there twice stays twice."""
    if isinstance(found, str) or not isinstance(found, Iterable | None):
        raise Wrong(f"the function has to return a list of names, and it returned {found!r}")
    return None if found is None else sorted(map(str, found))


def _once(names: list[str] | None) -> list[str] | None:
    return None if names is None else sorted(set(names))


class HeadWithNorm(nn.Module):
    """A network in which the name of another layer begins with that of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc_norm, self.fc = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.fc_norm(self.body(x)))


class HeadInside(nn.Module):
    """A network with its head inside another module, so that there is a dot in the head's name."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.classifier = nn.Linear(4, 5), nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.body(x))


BARELY_MOVED = ("body.bias", "0.bias")  # parameters that move by a millionth of their size only


def _check_changed_outside(answer) -> None:
    require_function(answer)
    cases = [(make, head, touched) for make, head in ((HeadWithNorm, "fc"), (_mlp, "3"), (HeadInside, "classifier.1"))
             for touched in _what_trainings_touch(make(), head)]
    found = [_once(_names(answer(head, make(), partial(_nudge, names=touched)))) for make, head, touched in cases]

    def named(reports: Callable[[str], bool]) -> list[list[str]]:
        return [sorted(name for name in touched if not name.startswith(f"{head}.") and reports(name))
                for _, head, touched in cases]

    expected = named(lambda name: True)
    _require_all(found, expected, {
        "it never finds anything, although things change. Does what you kept from before change together with the model?":
            named(lambda name: False),
        "it looks at parameters only; what else is stored with a model, and moves without a gradient?":
            named(lambda name: not _is_buffer(name)),
        "it looks at buffers only, and a parameter can move as well": named(_is_buffer),
        "a layer whose name only begins with that of the head, as fc_norm does with fc, is not part of the head":
            named(lambda name: not name.startswith("fc")),
        "it misses a parameter that has moved by a millionth of its size; a frozen one stays the same bit for bit":
            named(lambda name: name not in BARELY_MOVED),
        "it also names what has changed in the head, where it should": [sorted(touched) for _, _, touched in cases],
        "a head may be inside another module, as classifier.1 is, and then there is a dot in its name":
            [sorted(name for name in touched if name.split(".")[0] != head) for _, head, touched in cases],
        "it leaves out all of the module that the head is in; of classifier, only classifier.1 is the head":
            [sorted(name for name in touched if name.split(".")[0] != head.split(".")[0]) for _, head, touched in cases],
    }, [f"when the head is {head}, and training has changed {', '.join(touched)}" for _, head, touched in cases])


def _what_trainings_touch(model: nn.Module, head: str) -> list[list[str]]:
    """The names of what several trainings change: only the head; the statistics as well; parameters as well."""
    in_head = [name for name in model.state_dict() if name.startswith(f"{head}.")]
    buffers = [name for name, _ in model.named_buffers()]
    parameters = [name for name, _ in model.named_parameters() if name not in in_head]
    return [in_head, in_head + buffers, in_head + parameters[:1], in_head + parameters[1:3], in_head + parameters + buffers]


@torch.no_grad()
def _nudge(model: nn.Module, names: Iterable[str]) -> None:
    for name in names:
        value = model.state_dict()[name]
        value.copy_(value * (1 + 1e-6) if name in BARELY_MOVED else value + 1)


def _is_buffer(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def _check_bottom_up(answer) -> None:
    require_function(answer)
    for names, every in ((["stem", "layer1", "layer2", "layer3", "layer4", "head"], 15), (["a", "b", "c"], 4), (["a", "b"], 1)):
        steps = [0, every - 1, every, 2 * every - 1, 2 * every, 3 * every, 100 * every]
        found = [_names(answer(step, list(names), every)) for step in steps]
        again = [_names(answer(step, list(names), every)) for step in reversed(steps)]
        require(found == again[::-1], "when it is asked for the same step again, after others, its answer is another one. "
                                      "A run that is resumed asks for its step without having asked for those before")
        _check_bottom_up_at(steps, found, names, every)


def _check_bottom_up_at(steps: list[int], found: list, names: list[str], every: int) -> None:
    *body, head = names

    def at_each(trains: Callable[[int], list[str]]) -> list[list[str]]:
        return [sorted(set(trains(step))) for step in steps]

    _require_all(list(map(_once, found)), at_each(lambda step: [*body[:1 + step // every], head]), {
        "the head does not train from the start, as it has to": at_each(lambda step: names[:1 + step // every]),
        "that is the plan from the top down; here the layers join from the input upwards":
            at_each(lambda step: names[-1 - step // every:]),
        f"each layer joins {every} steps too late; the first one trains from step 0":
            at_each(lambda step: [*body[:step // every], head]),
        f"each layer joins one step too late; with every={every}, the second one trains at step {every} already":
            at_each(lambda step: [*body[:1 + max(step - 1, 0) // every], head]),
        "when a layer joins, the one below it stops; it has to go on training":
            at_each(lambda step: [*body[step // every:][:1], head]),
        "a layer joins at every step; one joins each time that `every` steps have passed":
            at_each(lambda step: [*body[:1 + step], head]),
    }, [f"at step {step} with every={every} and the layers {', '.join(names)}" for step in steps])
    for step, answer in zip(steps, found, strict=True):
        require(answer == _once(answer), f"at step {step} with every={every} it names a layer twice: {_listed(answer)}")


LOSSES = [([0.9, 0.7, 0.8, 0.7, 0.6, 0.65, 0.62, 0.61, 0.59, 0.5], 2), ([1.0, 1.0, 1.0, 0.5, 0.6, 0.4, 0.5, 0.45, 0.42], 3),
          ([3.0, 2.0, 2.5, 2.4, 2.3, 2.2, 2.1], 1), ([2.0, 3.0, 4.0, 5.0, 6.0, 5.5, 5.0], 2), ([0.5, 0.4, 0.3], 2)]


def _check_plateau(answer) -> None:
    require_function(answer)
    found = [answer(list(losses), patience) for losses, patience in LOSSES]
    found = [list(epochs) if isinstance(epochs, tuple) else epochs for epochs in found]

    def epochs_by(**options: object) -> list[list[int]]:
        return [_unfreezing_epochs(losses, patience, **options) for losses, patience in LOSSES]

    expected = epochs_by()
    _require_all(found, expected, {
        "the epochs are counted from 0; count them from 1": [[epoch - 1 for epoch in epochs] for epochs in expected],
        "it compares each loss with the one before; what counts is the lowest loss so far": epochs_by(before_only=True),
        "a loss that equals the lowest one is no improvement": epochs_by(equal_is_better=True),
        "after an unfreezing the count of epochs has to begin again": epochs_by(count_again=False),
        "it waits one epoch too long: with patience=1, the first epoch without an improvement unfreezes": epochs_by(longer=1),
        "it counts all epochs without an improvement; after one with an improvement the count begins again":
            epochs_by(in_a_row=False),
        "a loss is better when it is lower, and this waits for a higher one": epochs_by(sign=-1),
        "after an unfreezing it forgets the lowest loss; that stays the one to beat": epochs_by(forget=True),
    }, [f"with losses {losses} and patience={patience}" for losses, patience in LOSSES])


def _unfreezing_epochs(losses: list[float], patience: int, *, before_only: bool = False, equal_is_better: bool = False,
                       count_again: bool = True, longer: int = 0, in_a_row: bool = True, sign: int = 1,
                       forget: bool = False) -> list[int]:
    """The epochs after which a group unfreezes, rightly or with a mistake."""
    best, waited, epochs = math.inf, 0, []
    for epoch, loss in enumerate(losses, start=1):
        value = sign * loss
        improved = value <= best if equal_is_better else value < best
        best = value if improved or before_only else best
        if improved:
            waited = 0 if in_a_row else waited
            continue
        waited += 1
        if waited >= patience + longer:
            epochs.append(epoch)
            waited = 0 if count_again else waited
            best = math.inf if forget else best
    return epochs


LAYERS = ["stem", "layer1", "layer2", "layer3", "head"]
PLANS = [{"head": 0}, {"head": 0, "layer3": 10, "layer2": 20, "layer1": 30, "stem": 40},
         {"stem": 0, "layer1": 10, "layer2": 20, "head": 0}, {"layer1": 5, "layer2": 15}, {"layer3": 7, "stem": 25, "head": 3}]


def _check_backward(answer) -> None:
    require_function(answer)
    cases = [(plan, step) for plan in PLANS for step in (0, 5, 10, 19, 30, 100) if min(plan.values()) <= step]
    found = [answer(dict(plan), list(LAYERS), step) for plan, step in cases]

    def at_each(count: Callable[[list[int]], int], late: int = 0) -> list[int]:
        """What somebody answers who makes this count of the places of the layers that train, or sees them train too late."""
        places = [[i for i, name in enumerate(LAYERS) if plan.get(name, math.inf) <= step - late] for plan, step in cases]
        return [count(training) if training else 0 for training in places]

    layers = len(LAYERS)
    _require_all(found, at_each(lambda places: layers - min(places)), {
        "you count the layers that train; on its way down, the gradient also has to pass through the frozen ones between them":
            at_each(len),
        "the layer in which the backward pass ends counts as well": at_each(lambda places: layers - min(places) - 1),
        "the backward pass goes on down to the lowest layer that trains; you stop at the highest":
            at_each(lambda places: layers - max(places)),
        "you count from the input; the backward pass begins at the loss": at_each(lambda places: min(places) + 1),
        "a layer trains at its first step already, and not only from the next one on":
            at_each(lambda places: layers - min(places), late=1),
        "a layer that does not train yet is no reason for the backward pass to go down to it":
            [layers - min(map(LAYERS.index, plan)) for plan, _ in cases],
        "the backward pass does not go through every layer at each step; it ends at the lowest one that trains":
            [layers for _ in cases],
    }, [f"at step {step} of the plan {plan}, with the layers {', '.join(LAYERS)}" for plan, step in cases])
    nothing = answer({"head": 10, "stem": 20}, list(LAYERS), 9)
    require(same(nothing, 0), f"when nothing trains yet, the answer is 0, and the function says {nothing!r}")


EXERCISES = {
    "4.1": Exercise("Only the head shall train", _check_train_head,
                    "run the check after each repair, because it says what still moves. Sections 1, 2 and 3 of the notebook "
                    "have one of the mistakes each.", "Parameters and buffers outside the head are the same, bit for bit."),
    "4.2": Exercise("What has moved that should be frozen?", _check_changed_outside,
                    "model.state_dict() has parameters and buffers, but what it returns are the model's own tensors, and no "
                    "copies.", "Put it around a training of your own: no error message would tell you."),
    "4.3": Exercise("A plan from the bottom up", _check_bottom_up,
                    "step // every says how many times `every` steps have passed.",
                    "It remembers nothing, so a run can be resumed at any step."),
    "4.4": Exercise("Unfreeze when the loss stalls", _check_plateau,
                    "keep two numbers: the lowest loss so far, and for how many epochs there has been no lower one.",
                    "This is the rule of PlateauUnfreezing."),
    "4.5": Exercise("How far does the backward pass go?", _check_backward,
                    "first find the lowest layer that trains at this step, and then count from there up to the output.",
                    "With a plan from the bottom up, the backward pass goes through every layer from the first step on."),
}
