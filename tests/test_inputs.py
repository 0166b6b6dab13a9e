"""What a model is called with, for one look at it: what it declares first, then guesses in the order of its layers."""

from collections import namedtuple
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from layerlr_helpers.inputs import candidate_inputs, described, mapped


def first(model):
    return next(candidate_inputs(model))


def shapes(model, most=20):
    return [tuple(candidate.shape) for candidate in islice(candidate_inputs(model), most)]


# --- what models declare ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["example_input_array", "dummy_inputs"])
@pytest.mark.parametrize("declared", [torch.ones(2, 5), (torch.ones(1, 3), torch.ones(1, 2)), {"x": torch.ones(1, 3)}],
                         ids=["tensor", "arguments", "keywords"])
def test_what_a_model_declares_comes_before_any_guess(name, declared):
    model = nn.Linear(3, 2)
    setattr(model, name, declared)
    candidate = first(model)
    assert type(candidate) is type(declared)
    assert described(candidate) == described(declared)


@pytest.mark.parametrize("settings", [{"input_size": (3, 40, 48)}, SimpleNamespace(input_size=(3, 40, 48))],
                         ids=["dictionary", "object"])
@pytest.mark.parametrize("name", ["default_cfg", "pretrained_cfg"])
def test_the_size_of_image_in_a_models_settings_comes_first(name, settings):
    model = nn.Conv2d(3, 4, 3)
    setattr(model, name, settings)
    assert shapes(model)[:2] == [(1, 3, 40, 48), (1, 3, 224, 224)]


@pytest.mark.parametrize("declared", [None, {}, {"input_size": None}, "a text"], ids=str)
def test_settings_without_a_size_say_nothing(declared):
    model = nn.Linear(3, 2)
    model.default_cfg = declared
    assert shapes(model) == [(1, 3), (1, 8, 3)]


def test_a_declared_input_gets_the_models_dtype_but_tokens_stay_whole_numbers():
    model = nn.Linear(3, 2).double()
    model.dummy_inputs = {"pixels": torch.ones(1, 3), "ids": torch.ones(1, 4, dtype=torch.long), "mask": torch.ones(1, 4) > 0}
    assert {name: value.dtype for name, value in first(model).items()} == {
        "pixels": torch.float64, "ids": torch.int64, "mask": torch.bool}


def test_inputs_are_on_the_models_device():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2)).to("meta")
    model.dummy_inputs = {"ids": torch.ones(1, 4, dtype=torch.long), "nested": [torch.ones(2)]}
    declared = first(model)
    assert declared["ids"].device.type == declared["nested"][0].device.type == "meta"
    assert all(candidate.device.type == "meta" for candidate in islice(candidate_inputs(model), 1, None))


# --- guesses ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("layer", "shape", "dtype"), [
    (nn.Linear(5, 2), (1, 5), torch.float32), (nn.Embedding(9, 4), (1, 8), torch.int64),
    (nn.Conv1d(3, 4, 3), (1, 3, 1024), torch.float32), (nn.Conv2d(3, 4, 3), (1, 3, 224, 224), torch.float32),
    (nn.Conv3d(2, 4, 3), (1, 2, 16, 64, 64), torch.float32), (nn.GRU(6, 4), (1, 8, 6), torch.float32),
    (nn.Linear(5, 2).half(), (1, 5), torch.float16),
])
def test_each_kind_of_layer_has_its_input(layer, shape, dtype):
    guess = first(layer)
    assert tuple(guess.shape) == shape
    assert guess.dtype == dtype


def test_kinds_are_tried_in_the_order_in_which_they_occur_in_the_model():
    assert [len(shape) for shape in shapes(nn.Sequential(nn.Embedding(9, 4), nn.GRU(4, 4), nn.Linear(4, 2)))] == [2, 3, 2, 3]
    assert len(shapes(nn.Sequential(nn.Conv1d(2, 4, 3), nn.Conv2d(3, 4, 3)))[0]) == 3


def test_an_image_may_have_the_fewest_channels_of_any_convolution():
    model = nn.ModuleDict({"last": nn.Conv2d(16, 4, 1), "first": nn.Conv2d(1, 16, 3)})
    channels = [shape[1] for shape in shapes(model)]
    assert set(channels) == {16, 1}


@pytest.mark.parametrize("size", [48, (48, 48)])
@pytest.mark.parametrize("name", ["image_size", "img_size"])
def test_the_size_that_a_part_says_it_was_made_for_comes_before_the_usual_ones(name, size):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(3, 2))
    setattr(model[0], name, size)
    assert shapes(model)[:2] == [(1, 3, 48, 48), (1, 3, 224, 224)]


def test_a_sound_may_come_without_its_channel():
    assert shapes(nn.Conv1d(1, 4, 3)) == [(1, 1, 1024), (1, 4096)]


def test_a_model_with_none_of_these_layers_gives_no_guess():
    assert shapes(nn.LayerNorm(3)) == []


# --- inputs of any form -----------------------------------------------------------------------------------------------

nests = st.recursive(st.sampled_from([torch.ones(2), None, 3, "text"]), lambda parts: st.one_of(
    st.lists(parts, max_size=3), st.lists(parts, max_size=3).map(tuple), st.dictionaries(st.sampled_from("ab"), parts)))


def tensor_count(nest):
    if isinstance(nest, torch.Tensor):
        return 1
    parts = nest.values() if isinstance(nest, dict) else nest if isinstance(nest, (list, tuple)) else ()
    return sum(map(tensor_count, parts))


@given(nests)
def test_mapped_changes_every_tensor_once_and_nothing_else(nest):
    changed = []

    def note(tensor):
        changed.append(tensor)
        return tensor

    assert repr(mapped(nest, note)) == repr(nest)
    assert len(changed) == tensor_count(nest)


def test_a_container_of_the_users_own_is_passed_on_as_it_is():
    pair = namedtuple("Pair", "a b")(torch.ones(1), torch.ones(1))
    assert mapped(pair, torch.zeros_like) is pair


@pytest.mark.parametrize(("inputs", "text"), [
    (torch.ones(2, 3), "a float32 tensor of shape [2, 3]"),
    ({"ids": 1, "mask": 2}, "a dictionary of ids, mask"), ((1, 2), "2 arguments"), ("text", "str"),
])
def test_an_input_in_words(inputs, text):
    assert described(inputs) == text
