"""An optimizer's state comes back bit for bit, and one whose state_dict() is not all of it is told."""

import math
from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from layerlr_helpers.optimizer_state import kept_outside, load_exactly, what_is_missing
from tests.runs import same


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((4, 3), (4,))]


def stepped(optimizer, steps, first=0):
    for step in range(first, first + steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(p.dtype)
        optimizer.step()


class OwnPrecision(Optimizer):
    """Keeps weights, a momentum and a number of types of its own, whatever the parameters' type is."""

    def __init__(self, params, kinds=(torch.float32, torch.bfloat16)):
        super().__init__(params, {"lr": 0.1})
        self.kinds = kinds

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= {"weights": p.detach().to(self.kinds[0]), "momentum": torch.zeros_like(p, dtype=self.kinds[1]),
                              "count": torch.tensor(0), "not_a_number": torch.tensor(math.nan)}
                state["momentum"].mul_(0.9).add_(p.grad.to(self.kinds[1]))
                state["count"] += 1
                state["weights"] -= group["lr"] * state["momentum"].to(self.kinds[0])
                p.copy_(state["weights"])


class Wrapper:
    """Steps another optimizer and then does something to the weights. A subclass says what it keeps, and what it saves."""

    def __init__(self, optimizer):
        self.optimizer, self.every, self.count, self.started = optimizer, 2, 0, False
        self.average = [p.detach().clone() for p in self.params]

    param_groups = property(lambda self: self.optimizer.param_groups)
    params = property(lambda self: [p for group in self.optimizer.param_groups for p in group["params"]])

    @torch.no_grad()
    def step(self):
        self.optimizer.step()
        self.started = True
        self.after()

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state)

    def after(self):
        """Nothing."""


class Averaging(Wrapper):
    """Forgets its averages."""

    def after(self):
        for average, p in zip(self.average, self.params, strict=True):
            average.lerp_(p, 0.5)


class Counting(Wrapper):
    """Forgets how many steps it has made."""

    def after(self):
        self.count += 1


class KeepsAll(Averaging, Counting):
    """Saves both, the averages as copies."""

    def after(self):
        Averaging.after(self)
        Counting.after(self)

    def state_dict(self):
        return {"inner": self.optimizer.state_dict(), "average": [a.clone() for a in self.average], "count": self.count}

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state["inner"])
        self.count, self.average = state["count"], [a.clone() for a in state["average"]]


class TwoInOne(Optimizer):
    """Steps another optimizer of the same groups, whose momentum is in no state_dict()."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1, "momentum": 0.9})
        self.inner = SGD(self.param_groups, momentum=0.9)

    def step(self):
        self.inner.step()


class Several(Wrapper):
    """Has others in a list, and saves only the first one's state."""

    def __init__(self, *optimizers):
        self.optimizer, self.optimizers = optimizers[0], optimizers

    param_groups = property(lambda self: [group for optimizer in self.optimizers for group in optimizer.param_groups])

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()


class ByAddress(Wrapper):
    """Names its averages by the place of the parameters in memory."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.average = defaultdict(dict, {p: {"average": a} for p, a in zip(self.params, self.average, strict=True)})

    def state_dict(self):
        return {"inner": self.optimizer.state_dict(), "average": {id(p): value for p, value in self.average.items()}}


FAITHFUL = {
    **{kind.__name__: kind for kind in (AdamW, torch.optim.NAdam, torch.optim.ASGD, torch.optim.Adafactor)},
    "SGD": lambda params: SGD(params, 0.1, momentum=0.9), "own precision": OwnPrecision,
    "changes nothing": lambda params: Wrapper(AdamW(params)), "keeps all": lambda params: KeepsAll(SGD(params, 0.1)),
}
FORGETFUL = {
    "averages": (lambda params: Averaging(SGD(params, 0.1)), "of Averaging does not hold its average / 0, which training has"),
    "a number": (lambda params: Counting(SGD(params, 0.1, momentum=0.9)), "of Counting does not hold its count"),
    "another optimizer's state": (TwoInOne, "of TwoInOne does not hold its inner / state / 0 / momentum_buffer"),
    "one of several": (lambda params: Several(SGD(params[:1], 0.1, momentum=0.9), SGD(params[1:], 0.1, momentum=0.9)),
                       "of Several does not hold its optimizers / 1 / state / 0 / momentum_buffer"),
    "addresses": (lambda params: ByAddress(SGD(params, 0.1)), "of ByAddress names parameters by their place in memory"),
}


@pytest.mark.parametrize("make", FAITHFUL.values(), ids=FAITHFUL)
def test_nothing_is_missing_where_the_state_dict_is_all(make):
    optimizer = make(parameters())
    began = kept_outside(optimizer)
    for step in range(3):
        assert what_is_missing(optimizer, optimizer.state_dict(), began) is None
        stepped(optimizer, 1, step)


@pytest.mark.parametrize(("make", "problem"), FORGETFUL.values(), ids=FORGETFUL)
def test_what_a_state_dict_does_not_hold_is_named_once_training_has_changed_it(make, problem):
    optimizer = make(parameters())
    began = kept_outside(optimizer)
    stepped(optimizer, 3)
    assert problem in what_is_missing(optimizer, optimizer.state_dict(), began)


@pytest.mark.parametrize("make", FAITHFUL.values(), ids=FAITHFUL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_that_is_loaded_goes_on_as_the_one_that_was_saved(tmp_path, make, dtype):
    whole, stopped, resumed = (make(parameters(dtype)) for _ in range(3))
    stepped(whole, 7)
    stepped(stopped, 4)
    torch.save(stopped.state_dict(), tmp_path / "state.pt")
    with torch.no_grad():
        for group, saved in zip(resumed.param_groups, stopped.param_groups, strict=True):
            for p, value in zip(group["params"], saved["params"], strict=True):
                p.copy_(value)
    load_exactly(resumed, torch.load(tmp_path / "state.pt", weights_only=True))
    stepped(resumed, 3, first=4)
    for group, expected in zip(resumed.param_groups, whole.param_groups, strict=True):
        assert same(group["params"], expected["params"])


@settings(max_examples=15)
@given(parameter=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
       kinds=st.tuples(*2 * [st.sampled_from([torch.float32, torch.float64, torch.bfloat16])]))
def test_the_precision_of_a_state_is_kept_whatever_the_parameters_are(parameter, kinds):
    saved, resumed = (OwnPrecision(parameters(parameter), kinds) for _ in range(2))
    stepped(saved, 3)
    load_exactly(resumed, saved.state_dict())
    for state, expected in zip(resumed.state.values(), saved.state.values(), strict=True):
        assert {name: value.dtype for name, value in state.items()} == {name: value.dtype for name, value in expected.items()}
        assert torch.equal(state["weights"], expected["weights"])


def test_an_optimizer_that_does_not_take_its_state_back_is_told():
    class Deaf(SGD):
        def load_state_dict(self, state):
            """Do nothing."""

    saved, resumed = (Deaf(parameters(), 0.1, momentum=0.9) for _ in range(2))
    stepped(saved, 2)
    with pytest.raises(ValueError, match=r"Deaf did not take back its state: .*state / 0 / momentum_buffer is not what was"):
        load_exactly(resumed, saved.state_dict())
