"""One look at a forward pass: what it sees, what it guesses, and that nothing of the model stays changed."""

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from layerlr_helpers.tracing import trace_forward, unwrap
from tests.runs import Counting, model_state, same


class RunsBackwards(nn.Module):
    """Attributes in the order opposite to that of execution; a parameter on the root that is used last."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2, 2))
        self.last = nn.Linear(4, 2)
        self.first = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.last(self.first(x).mean((2, 3))) @ self.scale


def untidy_resnet():
    """A model in the middle of something: mixed modes, some frozen, some with gradients, a hook."""
    model = resnet18(weights=None).train()
    model.layer2.eval()
    model.layer4[1].bn2.eval()
    for p in model.layer1.parameters():
        p.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    model.layer3.register_forward_hook(lambda module, args, output: None)
    return model


@pytest.mark.parametrize(("make", "shape"), [(untidy_resnet, (1, 3, 32, 32)), (Counting, (1, 3))], ids=["resnet18", "counting"])
def test_the_model_and_the_random_numbers_come_back_as_they_were(make, shape):
    model = make()
    before = model_state(model)
    trace_forward(model, torch.zeros(shape))
    assert same(before, model_state(model))


def test_the_model_comes_back_as_it_was_when_the_forward_pass_fails():
    model = nn.Sequential(Counting(), nn.Linear(99, 1)).train()
    before = model_state(model)
    with pytest.raises(ValueError, match="cannot guess"):
        trace_forward(model)
    with pytest.raises(RuntimeError):
        trace_forward(model, torch.zeros(1, 3))
    assert same(before, model_state(model))


def test_it_works_under_no_grad_and_leaves_it_on():
    with torch.no_grad():
        trace = trace_forward(nn.Linear(3, 2))
        assert not torch.is_grad_enabled()
    assert len(trace.used) == 2


def test_order_is_that_of_execution_for_modules_and_for_parameters_on_their_own():
    model = RunsBackwards()
    trace = trace_forward(model)
    assert trace.first_calls["first"] < trace.first_calls["last"] < trace.first_uses[id(model.scale)]
    assert trace.used == {id(p) for p in model.parameters()}
    assert trace.shapes["last"] == (1, 2)


def test_reading_a_parameters_device_or_shape_is_no_use_of_it():
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.idle, self.linear = nn.Parameter(torch.ones(3)), nn.Linear(3, 2)

        def forward(self, x):
            return self.linear(x.to(self.idle.device).view(-1, self.idle.shape[0]))

    model = Looks()
    assert id(model.idle) not in trace_forward(model).used


def test_a_module_that_does_not_run_has_no_place():
    model = nn.Sequential(nn.Linear(3, 2))
    model.idle = nn.Linear(2, 2)
    model.forward = lambda x: model[0](x)
    trace = trace_forward(model)
    assert "idle" not in trace.first_calls
    assert id(model.idle.weight) not in trace.used


@pytest.mark.parametrize("model", [
    nn.Linear(5, 2),
    nn.Conv2d(4, 2, 3),
    nn.Sequential(nn.Conv1d(2, 4, 5), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3)),
    nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2)),
    nn.LSTM(4, 3, batch_first=True),
    nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
    RunsBackwards(),  # the layer that is defined first runs last
    nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 30 * 30, 2)),  # 32 pixels, one channel
    nn.Linear(5, 2).double(),
    nn.Linear(5, 2).to("meta"),
], ids=lambda model: type(model).__name__)
def test_an_input_is_guessed_from_the_first_layer(model):
    assert trace_forward(model).used == {id(p) for p in model.parameters()}


def test_when_no_guess_runs_the_error_has_every_shape_that_was_tried_and_says_what_to_pass():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(7, 2))
    with pytest.raises(ValueError, match="cannot guess an input for Sequential") as error:
        trace_forward(model)
    for text in ("[1, 3, 224, 224]", "[1, 3, 64, 64]", "[1, 3, 32, 32]", "[1, 7]", "example_input="):
        assert text in str(error.value)


def test_when_there_is_nothing_to_guess_from_the_error_says_so():
    model = nn.Module()
    model.p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="it has no layer whose input shape we know"):
        trace_forward(model)


@pytest.mark.parametrize("example", [{"a": torch.ones(1, 3), "b": torch.ones(1, 3)}, (torch.ones(1, 3), torch.ones(1, 3))],
                         ids=["dictionary", "tuple"])
def test_inputs_may_be_keyword_or_several_arguments(example):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, a, b):
            return {"logits": [self.left(a) + self.right(b)]}  # outputs may be nested too

    model = Two()
    trace = trace_forward(model, example)
    assert trace.used == {id(p) for p in model.parameters()}
    assert trace.first_calls["left"] < trace.first_calls["right"]


def test_a_wrapper_comes_off():
    model = nn.Linear(2, 2)
    assert unwrap(model) is model
    assert unwrap(nn.DataParallel(model)) is model


@pytest.mark.slow  # the first call of torch.compile imports the compiler
def test_wrappers_come_off_in_any_order():
    model = nn.Linear(2, 2)
    assert unwrap(torch.compile(nn.DataParallel(model))) is model
    assert unwrap(nn.DataParallel(torch.compile(model))) is model


@pytest.mark.slow
def test_a_part_that_was_compiled_is_looked_at_as_it_is_written():
    def never(graph, inputs):
        raise AssertionError("the look must not compile anything")

    whole, part = nn.Sequential(nn.Linear(3, 2)), nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    whole.compile(backend=never)
    part[0] = torch.compile(part[0], backend=never)
    for model in (whole, part):
        assert trace_forward(model).used == {id(p) for p in model.parameters()}
