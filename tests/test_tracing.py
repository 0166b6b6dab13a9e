"""One look at a forward pass: what it sees, what it guesses, and that nothing of the model stays changed."""

import copy
import random
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torchvision.models import resnet18

from layerlr_helpers.tracing import tensors_in, trace_forward, unwrap
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


class Keeps(nn.Module):
    """Keeps all it can of a forward pass: new attributes, replaced ones, and what lists, dictionaries and sets hold."""

    def __init__(self):
        super().__init__()
        self.linear, self.calls, self.last = nn.Linear(3, 2), 0, None
        self.outputs, self.by_name, self.seen = [torch.ones(1)], {"first": 1}, {"nothing"}
        self.register_buffer("memory", torch.zeros(2))

    def forward(self, x):
        y = self.linear(x)
        self.calls, self.last, self.new = self.calls + 1, y, y
        self.memory = y[0]
        self.outputs.append(y)
        self.by_name.update(first=y, second=y)
        self.seen.add("a call")
        return y


def test_what_modules_keep_of_a_forward_pass_is_put_back():
    model = nn.Sequential(Keeps())
    kept = model[0]
    outputs, by_name, seen, memory = kept.outputs, kept.by_name, kept.seen, kept.memory
    attributes = set(vars(kept))
    trace_forward(model)
    assert (kept.calls, kept.last, set(vars(kept))) == (0, None, attributes)
    assert kept.outputs is outputs
    assert same(outputs, [torch.ones(1)])
    assert kept.by_name is by_name
    assert by_name == {"first": 1}
    assert kept.seen is seen
    assert seen == {"nothing"}
    assert kept.memory is memory
    assert not memory.requires_grad


def test_it_is_put_back_too_when_the_forward_pass_fails():
    model = nn.Sequential(Keeps(), nn.Linear(99, 1))
    attributes = set(vars(model[0]))
    with pytest.raises(RuntimeError):
        trace_forward(model, torch.zeros(1, 3))
    assert set(vars(model[0])) == attributes
    assert len(model[0].outputs) == 1


def test_a_module_that_is_made_in_the_forward_pass_goes_again():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            if not hasattr(self, "late"):
                self.late = nn.Linear(2, 2)
            return self.late(self.linear(x))

    model = Late()
    trace_forward(model)
    assert [name for name, _ in model.named_children()] == ["linear"]


def test_afterwards_the_model_can_be_copied_and_scripted():
    model = nn.Sequential(Keeps())
    trace_forward(model)
    copied = copy.deepcopy(model)
    assert same(model.state_dict(), copied.state_dict())
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    trace_forward(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer torch calls its scripts outdated, but people still use them
        scripted = torch.jit.script(plain)
    image = torch.randn(1, 3, 8, 8)
    assert torch.equal(scripted(image), plain(image))


def test_the_random_numbers_of_torch_python_and_numpy_go_on_as_if_nothing_had_happened():
    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            return self.linear(x) + random.random() + float(np.random.rand()) + torch.rand(1)  # noqa: NPY002

    def numbers():
        return random.random(), float(np.random.rand()), float(torch.rand(1))  # noqa: NPY002

    model = Draws()
    with torch.random.fork_rng():
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
        expected = numbers()
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])  # noqa: NPY002
        trace_forward(model)
        assert numbers() == expected


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_flow_is_seen_where_gradients_are_off_and_they_stay_off(mode):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with mode():
        trace = trace_forward(model, torch.ones(1, 3))  # under inference_mode this is an inference tensor
        assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
    assert trace.behind_output == 0b1111
    assert trace.behind["1"] == 0b11


# --- what stands behind what ------------------------------------------------------------------------------------------

def test_sets_of_parameters_have_one_bit_for_each_and_a_tied_one_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, bias=False), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    trace = trace_forward(model)
    assert [trace.numbers[id(p)] for p in model.parameters()] == [0, 1, 2, 3]
    assert trace.set_of(model[0].parameters()) == 0b11
    assert trace.set_of([model[1].weight, model[0].weight]) == 0b1
    assert trace.set_of([]) == 0
    assert [trace.behind[name] for name in ("", "0", "1", "2")] == [0, 0, 0b11, 0b11]
    assert trace.behind_last_use[id(model[0].weight)] == 0b11  # the second layer uses it once more
    assert trace.behind_output == 0b1111


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=5))
def test_behind_each_module_of_a_random_graph_is_all_that_leads_to_it(wires):
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.nodes = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in wires)

        def forward(self, x):
            outputs = []
            for node, wire in zip(self.nodes, wires, strict=True):
                outputs.append(node(x + sum(output for output, wired in zip(outputs, wire, strict=False) if wired)))
            return outputs[-1]

    behind = []
    for wire in wires:
        before = [i for i, wired in zip(range(len(behind)), wire, strict=False) if wired]
        behind.append(set(before).union(*(behind[i] for i in before)))
    trace = trace_forward(Graph(), torch.ones(1, 2))
    for i, expected in enumerate(behind):
        assert trace.behind[f"nodes.{i}"] == sum(1 << k for k in expected)
    last = len(wires) - 1
    assert trace.behind_output == sum(1 << k for k in behind[last] | {last})


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_a_checkpoint_computes_is_in_the_flow(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.row, self.last = nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), nn.Linear(3, 2)

        def forward(self, x):
            x = checkpoint(self.first, x, use_reentrant=reentrant)
            return self.last(checkpoint_sequential(self.row, 2, x, use_reentrant=reentrant))

    model = Checkpointed()
    trace = trace_forward(model)
    assert trace.behind_output == trace.set_of(model.parameters())
    assert trace.behind["last"] == trace.set_of([*model.first.parameters(), *model.row.parameters()])


def test_what_runs_in_train_mode_only_is_looked_at_too_and_does_not_hide_what_runs_in_eval_mode_only():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.fc, self.auxiliary = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)
            self.calibration = nn.Linear(2, 2)

        def forward(self, x):
            x = self.body(x)
            return (self.fc(x), self.auxiliary(x)) if self.training else self.calibration(self.fc(x))

    model = Auxiliary().train()
    before = model_state(model)
    trace = trace_forward(model)
    assert same(before, model_state(model))
    assert trace.used == {id(p) for p in model.parameters()}
    assert trace.first_calls["body"] < trace.first_calls["fc"] < trace.first_calls["calibration"]
    assert trace.behind["auxiliary"] == trace.set_of(model.body.parameters())
    assert trace.behind_output == trace.set_of(model.parameters())


def test_a_train_mode_that_fails_takes_nothing_from_what_eval_mode_showed():
    class NeedsLabels(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.spare = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x, labels=None):
            if self.training and labels is None:
                raise ValueError("labels, please")
            return self.fc(x)

    model = NeedsLabels().train()
    trace = trace_forward(model)
    assert trace.used == {id(p) for p in model.fc.parameters()}
    assert model.training


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_norm_takes_one_example_in_both_modes_and_keeps_its_statistics(training):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc, self.spare = nn.BatchNorm1d(3), nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            x = self.norm(x)
            return self.spare(x) if self.training else self.fc(x)

    model = Odd().train(training)
    before = model_state(model)
    assert trace_forward(model).used == {id(p) for p in model.parameters()}
    assert same(before, model_state(model))


@dataclass
class Answer:
    scores: Tensor
    others: list


def test_tensors_are_found_in_tuples_lists_dictionaries_and_dataclasses():
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    assert [*tensors_in({"x": (a, [b]), "y": Answer(c, [None, "text", a])})] == [a, b, c, a]
    assert [*tensors_in(Answer)] == [*tensors_in(None)] == [*tensors_in("text")] == []


def test_an_output_in_a_dataclass_counts():
    class Answers(nn.Module):
        def __init__(self):
            super().__init__()
            self.scores, self.boxes = nn.Linear(3, 2), nn.Linear(3, 4)

        def forward(self, x):
            return Answer(self.scores(x), [{"boxes": self.boxes(x)}])

    model = Answers()
    trace = trace_forward(model)
    assert trace.outputs == [(1, 2), (1, 4)]
    assert trace.behind_output == trace.set_of(model.parameters())


def test_a_parameter_added_to_the_data_is_beside_it_and_one_that_multiplies_them_is_not():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.position, self.projection = nn.Parameter(torch.ones(1, 3)), nn.Parameter(torch.ones(3, 2))
            self.token, self.linear = nn.Parameter(torch.ones(1, 3)), nn.Linear(3, 3)

        def forward(self, x):
            return torch.cat([self.token.expand(len(x), -1), self.linear(x) + self.position], 0) @ self.projection

    model = Both()
    trace = trace_forward(model, torch.ones(1, 3))
    assert trace.beside == {id(model.position), id(model.token)}


@pytest.mark.parametrize(("last", "ends_open"), [(nn.Identity(), True), (nn.Linear(4, 2), False),
                                                 (nn.Sequential(nn.Linear(4, 2), nn.Identity()), False)],
                         ids=["taken away", "there", "there, and an identity after it"])
def test_it_shows_where_a_head_was_taken_away(last, ends_open):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), last)
    assert trace_forward(model).ends_open == ends_open


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
