"""Splitting labelled examples, images or texts, into those to train on, to choose rates on, and to test on."""

from collections.abc import Callable, Sequence
from typing import Protocol, Self

import torch
from torch import Tensor


class Examples(Protocol):
    """What can be split: an ``ImageSet``, a ``TextSet``, or a dataset with these three."""

    labels: Tensor  # int64 [N]
    class_names: tuple[str, ...]

    def subset(self, indices: Sequence[int] | Tensor) -> Self:
        """The examples at ``indices``, numbers or a boolean mask."""


def few_shot_split(data: Examples, per_class: int = 10, *, val_per_class: int = 20,
                   seed: int = 0) -> tuple[Examples, Examples, Examples]:
    """Split into ``per_class`` training examples of each class, ``val_per_class`` for validation, the rest for testing.

    Choose learning rates on the validation part; the test part is for the one final number. The validation examples are
    the same for every ``seed``, which draws the training examples: so none of them is a test example of another seed.
    A ValueError names a class that has too few to leave at least one for testing.
    """
    if per_class < 1 or val_per_class < 0:
        raise ValueError(f"per_class is 1 or above and val_per_class 0 or above, not {per_class} and {val_per_class}")
    return _split_by_class(data, lambda examples: (per_class, val_per_class), seed, ("training", "validation", "testing"))


def fraction_split(data: Examples, val_fraction: float, test_fraction: float, seed: int) -> tuple[Examples, Examples, Examples]:
    """Split into training, validation and test examples by fractions of each class, at least one each.

    The test examples are the same for every ``seed``, so that rates which were chosen on the validation examples of one seed
    can be tested on another. A ValueError names a class that is too small for all three.
    """
    if not (val_fraction > 0 and test_fraction > 0 and val_fraction + test_fraction < 1):
        raise ValueError("the fractions for validation and testing must be above 0 and below 1 together, not "
                         f"{val_fraction} and {test_fraction}")
    val, test, train = _split_by_class(
        data, lambda examples: (max(round(val_fraction * examples), 1), max(round(test_fraction * examples), 1)), seed,
        ("validation", "testing", "training"))
    return train, val, test


def _split_by_class(data: Examples, sizes: Callable[[int], tuple[int, int]], seed: int,
                    purposes: tuple[str, str, str]) -> tuple[Examples, Examples, Examples]:
    """Split every class into examples drawn by ``seed``, examples that are the same for every seed, and the rest.

    ``sizes(number of examples)`` says how many the first two parts get; ``purposes`` says what the three parts are for.
    """
    always_same, by_seed = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    rows_by_class = []
    for label, name in enumerate(data.class_names):
        rows = torch.nonzero(data.labels == label).flatten()
        drawn_size, fixed_size = sizes(len(rows))
        if drawn_size + fixed_size >= len(rows):
            raise ValueError(f"class {name!r} has {len(rows)} example(s), too few for {drawn_size} for {purposes[0]}, "
                             f"{fixed_size} for {purposes[1]} and one for {purposes[2]}; add some, or leave the class out")
        fixed, others = rows[torch.randperm(len(rows), generator=always_same)].tensor_split((fixed_size,))
        drawn, rest = others[torch.randperm(len(others), generator=by_seed)].tensor_split((drawn_size,))
        rows_by_class.append((drawn, fixed, rest))
    return tuple(data.subset(torch.cat(rows)) for rows in zip(*rows_by_class, strict=True))
