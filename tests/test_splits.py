import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerlr_helpers import few_shot_split
from layerlr_helpers.images import ImageSet
from layerlr_helpers.splits import fraction_split


@given(per_class=st.integers(1, 20), val_per_class=st.integers(0, 20), seed=st.integers(0, 1000))
def test_a_few_shot_split_deals_out_every_example_once(small_digits, per_class, val_per_class, seed):
    parts = few_shot_split(small_digits, per_class, val_per_class=val_per_class, seed=seed)
    train, val, _ = parts
    assert train.labels.bincount(minlength=10).tolist() == [per_class] * 10
    assert val.labels.bincount(minlength=10).tolist() == [val_per_class] * 10
    assert sorted(torch.cat([part.factors["scan"] for part in parts]).tolist()) == list(range(1797))


@given(sizes=st.lists(st.integers(3, 30), min_size=1, max_size=4), val=st.floats(0.05, 0.35), test=st.floats(0.05, 0.35),
       seed=st.integers(0, 5))
def test_a_split_by_fractions_shares_each_class_out_and_leaves_no_part_empty(sizes, val, test, seed):
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    data = ImageSet(torch.zeros(len(labels), 3, 1, 1, dtype=torch.uint8), labels, tuple("abcd"[:len(sizes)]),
                    {"place": torch.arange(len(labels))})
    parts = fraction_split(data, val, test, seed)
    assert sorted(torch.cat([part.factors["place"] for part in parts]).tolist()) == list(range(len(labels)))
    for label, size in enumerate(sizes):
        counts = [int((part.labels == label).sum()) for part in parts]
        assert min(counts) >= 1
        assert counts[1:] == [max(round(fraction * size), 1) for fraction in (val, test)]


@pytest.mark.parametrize(("split", "same"), [
    (few_shot_split, 1), (lambda data, seed: fraction_split(data, 0.2, 0.2, seed), 2)])
def test_the_seed_decides_the_split_but_for_the_part_that_all_seeds_share(small_digits, split, same):
    first, again, other = ([part.factors["scan"] for part in split(small_digits, seed=seed)] for seed in (0, 0, 1))
    for part in range(3):
        assert torch.equal(first[part], again[part])
        assert torch.equal(first[part], other[part]) == (part == same)  # validation of a few-shot split, tests of the other


def test_the_same_seed_gives_the_same_split_in_every_version_as_recorded_studies_need(small_digits):
    train, val, _ = few_shot_split(small_digits, 1, val_per_class=1, seed=7)
    assert train.factors["scan"].tolist() == [78, 797, 1689, 89, 733, 1259, 1055, 610, 1423, 1554]
    assert val.factors["scan"].tolist() == [565, 745, 1241, 1513, 1681, 521, 882, 870, 773, 807]
    _, val, test = fraction_split(small_digits, 0.001, 0.001, seed=7)
    assert val.factors["scan"].tolist() == [78, 797, 1689, 89, 733, 1259, 1055, 610, 1423, 1554]
    assert test.factors["scan"].tolist() == [565, 745, 1241, 1513, 1681, 521, 882, 870, 773, 807]


@pytest.mark.parametrize(("sizes", "problem"), [
    ((160, 20), r"class '0' has 178 example\(s\), too few for 160 for training, 20 for validation and one for testing"),
    ((0, 20), "per_class is 1 or above"),
    ((10, -1), "val_per_class 0 or above"),
])
def test_a_split_that_cannot_be_is_refused(small_digits, sizes, problem):
    with pytest.raises(ValueError, match=problem):
        few_shot_split(small_digits, sizes[0], val_per_class=sizes[1])


@pytest.mark.parametrize(("fractions", "problem"), [
    ((0.5, 0.5), "below 1 together, not 0.5 and 0.5"),
    ((0, 0.5), "above 0"),
    ((0.5, 0.4999), r"class '0' has 178 example\(s\), too few for 89 for validation, 89 for testing and one for training"),
])
def test_fractions_that_leave_a_part_empty_are_refused(small_digits, fractions, problem):
    with pytest.raises(ValueError, match=problem):
        fraction_split(small_digits, *fractions, seed=0)
