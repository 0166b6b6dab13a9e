from collections import OrderedDict, UserDict, namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from layerlr_helpers.batches import (
    batch_size,
    call_model,
    logits_of,
    loss_of,
    map_output,
    split_batch,
    takes_keyword,
    to_device,
)

X, Y = torch.randn(3, 4), torch.arange(3)
META = torch.device("meta")


class TakesTwo(nn.Module):
    """Takes two inputs, of which the second may be left out, and returns what it was called with."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, a, b=None):
        return a, b


class TakesAnything(TakesTwo):
    def forward(self, *args, **kwargs):
        return args, kwargs


@pytest.mark.parametrize(("batch", "inputs", "labels"), [
    ((X, Y), X, Y), ([X, Y], X, Y), (X, X, None), ((X,), X, None), (((X, X), Y), (X, X), Y), (({"a": X}, Y), {"a": X}, Y),
    ({"a": X, "labels": Y}, {"a": X}, Y), (UserDict(a=X, labels=Y), {"a": X}, Y), ({"a": X}, {"a": X}, None),
    ((X, {"mask": Y}), X, {"mask": Y})])
def test_a_batch_is_taken_apart_whatever_its_form(batch, inputs, labels):
    assert split_batch(batch) == (inputs, labels)


@pytest.mark.parametrize(("batch", "what"), [
    ((X, Y, Y), r"a tuple of 3: tensor \[3, 4\], tensor \[3\], tensor \[3\]"), ([], "a list of 0"), ("text", "a str"),
    (None, "a NoneType")])
def test_a_batch_of_another_form_is_an_error_that_names_the_forms_and_what_came(batch, what):
    with pytest.raises(ValueError, match=rf"a batch is \(inputs, labels\), a dictionary .*This one is {what}"):
        split_batch(batch)


@pytest.mark.parametrize(("inputs", "labels", "size"), [(X, Y[:2], 2), (X, None, 3), ({"a": X}, {"b": (Y,)}, 3),
                                                        ((torch.zeros(()), X), None, 3), ("text", None, 1)])
def test_the_number_of_examples_is_the_length_of_the_labels_or_else_of_the_inputs(inputs, labels, size):
    assert batch_size(inputs, labels) == size


def test_everything_in_a_nest_moves_to_the_device_and_keeps_its_form():
    Pair = namedtuple("Pair", ["first", "second"])
    nest = {"a": X, "b": [X, (Y, "text", None)], "c": Pair(X, 1)}
    moved = to_device(nest, META)
    assert moved["a"].device == moved["b"][0].device == moved["b"][1][0].device == moved["c"].first.device == META
    assert moved["b"][1][1:] == ("text", None)
    assert type(moved["c"]) is Pair
    assert type(moved["b"]) is list
    assert nest["a"] is X  # the user's own batch stays where it is


def test_what_can_move_itself_does():
    packed = nn.utils.rnn.pack_sequence([X[0], X[1][:2]], enforce_sorted=False)
    assert to_device(packed, torch.device("cpu")).batch_sizes.tolist() == packed.batch_sizes.tolist()


def test_several_inputs_are_positional_arguments_if_the_model_takes_as_many():
    assert call_model(TakesTwo(), (X, Y)) == (X, Y)
    assert call_model(TakesTwo(), [X, Y]) == (X, Y)  # a DataLoader makes lists of tuples
    assert call_model(TakesTwo(), {"b": X, "a": Y}) == (Y, X)
    assert call_model(TakesTwo(), X) == (X, None)


def test_a_list_for_a_model_with_one_input_stays_a_list():
    assert call_model(TakesTwo(), [X, X, X]) == ([X, X, X], None)
    assert call_model(TakesTwo(), [X]) == ([X], None)


def test_keywords_that_the_model_does_not_take_are_named():
    with pytest.raises(ValueError, match=r"the batch has idx, mask, which TakesTwo.forward does not take \(it takes a, b\)"):
        call_model(TakesTwo(), {"a": X, "idx": Y, "mask": Y})
    assert call_model(TakesAnything(), {"idx": 1}) == ((), {"idx": 1})


def test_a_compiled_model_takes_what_its_own_forward_takes():
    compiled = torch.compile(TakesTwo(), backend="eager")
    assert takes_keyword(compiled, "a")
    assert not takes_keyword(compiled, "labels")
    assert takes_keyword(TakesAnything(), "labels")


@pytest.mark.parametrize("output", [X, (X,), [X], {"logits": X, "loss": Y}, OrderedDict(logits=X), SimpleNamespace(logits=X)])
def test_logits_are_found_in_every_kind_of_output(output):
    assert logits_of(output) is X


def test_an_output_without_logits_is_given_on_as_it_is():
    for output in ((X, Y), {"out": X}, SimpleNamespace(out=X)):
        assert logits_of(output) is output


def test_the_loss_of_a_model_is_found_where_it_returns_one():
    loss = torch.ones(())
    for output in ({"loss": loss, "logits": X}, SimpleNamespace(loss=loss), (loss, X), (X, loss)):
        assert loss_of(output) is loss
    for output in (X, {"logits": X}, {"loss": None}, SimpleNamespace(), (X, X)):
        assert loss_of(output) is None


def test_an_output_is_mapped_within_tuples_and_lists_alone():
    doubled = map_output(lambda t: 2 * t, (X, [Y]))
    assert torch.equal(doubled[0], 2 * X)
    assert torch.equal(doubled[1][0], 2 * Y)
    output = {"out": X}
    assert map_output(lambda t: 2 * t, output) is output
