"""Names and patterns: what matches, and errors that help."""

import string
from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerlr_helpers.naming import assigned, check_choice, listed, matching

NAMES = ["stem", "layer1", "layer2", "layer3", "layer4", "head"]


def test_a_name_matches_itself_and_a_pattern_all_that_fit_in_the_order_of_the_names():
    assert matching("head", NAMES) == ["head"]
    assert matching("layer*", NAMES) == ["layer1", "layer2", "layer3", "layer4"]
    assert matching("layer[12]", NAMES) == ["layer1", "layer2"]
    assert matching("*", NAMES) == NAMES


def test_a_name_with_the_letters_of_a_pattern_in_it_is_first_of_all_a_name():
    assert matching("blocks[0]", ["blocks[0]", "blocks0"]) == ["blocks[0]"]


def test_a_name_stands_for_those_below_it_unless_it_is_one_itself_or_a_pattern():
    heads = ["stem", "head.classes", "head.boxes", "header"]
    assert matching("head", heads) == ["head.classes", "head.boxes"]
    assert matching("head", [*heads, "head"]) == ["head"]
    assert matching("head*", heads) == ["head.classes", "head.boxes", "header"]
    assert assigned({"head": 1, "*": 2}, ["stem", "head"]) == {"stem": 2, "head": 1}
    assert assigned({"head": 1, "*": 2}, [*heads, "head"]) == dict.fromkeys(heads, 2) | {"head": 1}
    with pytest.raises(ValueError, match=r"no group matches 'head\.'"):
        matching("head.", ["stem", "head.classes"])


@given(st.lists(st.text("ab", min_size=1, max_size=2), min_size=1, max_size=4), st.integers(1, 3))
def test_what_a_name_stands_for_is_all_that_begins_with_it_and_a_dot(parts, depth):
    below = [f"{'.'.join(parts[:depth])}.{end}" for end in "xyz"]
    others = ["stem", f"{below[0][:-2]}c", "z"]
    assert matching(below[0][:-2], [*others, *below]) == below


def test_case_matters():
    with pytest.raises(ValueError, match="no group matches 'Head'"):
        matching("Head", NAMES)


def test_the_error_has_what_was_asked_for_what_comes_close_and_all_there_is():
    with pytest.raises(ValueError, match="no layer matches 'layer5'") as error:
        matching("layer5", NAMES, what="layer")
    assert "did you mean 'layer4'" in str(error.value)
    assert ", ".join(NAMES) in str(error.value)


def test_without_a_close_match_the_error_suggests_none():
    with pytest.raises(ValueError, match="there are: stem") as error:
        matching("zzz", NAMES)
    assert "did you mean" not in str(error.value)


names = st.lists(st.text(string.ascii_lowercase + ".0123456789", min_size=1, max_size=6), min_size=1, max_size=8, unique=True)


@given(names, st.data())
def test_every_name_finds_itself_and_a_star_finds_all(names, data):
    name = data.draw(st.sampled_from(names))
    assert matching(name, names) == [name]
    assert name in matching(name[:1] + "*", names)
    assert matching("*", names) == names


def test_a_long_list_keeps_its_ends_and_says_how_many_are_left_out():
    text = listed((f"n{i}" for i in range(100)), most=6)
    assert text == "n0, n1, n2, … 94 more …, n97, n98, n99"
    assert listed(["a", "b"]) == "a, b"


@given(st.dictionaries(st.sampled_from(["a", "b", "layer1", "layer2", "*", "layer*", "[ab]", "?"]), st.integers(), max_size=6))
def test_assigned_gives_each_name_its_own_value_or_that_of_the_last_pattern_that_fits(values):
    names = ["layer2", "a", "layer1", "b"]
    patterns = [pattern for pattern in values if pattern not in names]
    last = {name: [pattern for pattern in patterns if fnmatchcase(name, pattern)][-1:] for name in names}
    if any([pattern] not in last.values() for pattern in patterns):
        with pytest.raises(ValueError, match="decides nothing"):
            assigned(values, names)
        return
    value_of_each = assigned(values, names)
    assert list(value_of_each) == [name for name in names if name in value_of_each]
    for name in names:
        fitting = [value for pattern, value in values.items() if fnmatchcase(name, pattern)]
        if name in values:
            assert value_of_each[name] == values[name]
        elif fitting:
            assert value_of_each[name] == fitting[-1]
        else:
            assert name not in value_of_each


def test_a_pattern_that_a_later_one_covers_is_an_error_and_not_ignored():
    with pytest.raises(ValueError, match=r"'layer\[34\]' decides nothing, because later patterns match all that it matches"):
        assigned({"head": 0, "layer[34]": 3, "*": 8}, NAMES)
    assert assigned({"*": 8, "layer[34]": 3, "head": 0}, NAMES) == {"stem": 8, "layer1": 8, "layer2": 8, "layer3": 3,
                                                                    "layer4": 3, "head": 0}


@given(st.permutations([*NAMES, "*"]))
def test_a_pattern_that_is_not_needed_because_each_name_has_a_value_is_no_error_in_any_order(keys):
    values = {key: number for number, key in enumerate(keys)}
    assert assigned(values, NAMES) == {name: values[name] for name in NAMES}


def test_a_choice_that_does_not_exist_is_refused_with_those_that_do():
    check_choice("mode", "max", ("max", "min"))
    with pytest.raises(ValueError, match="unknown mode 'up'; known are 'max', 'min'"):
        check_choice("mode", "up", ("max", "min"))
