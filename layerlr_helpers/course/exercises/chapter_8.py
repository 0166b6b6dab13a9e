"""Checks of the exercises of notebook 08, on the learner's own data."""

import math
import textwrap
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from layerlr_helpers.course.exercises.exercise import Exercise, Wrong, require, require_function, require_returned, require_same


def _check_split(answer) -> None:
    require_function(answer)
    for images_of_each, per_class in (((9, 12, 7), 3), ((20, 8), 5), ((6, 30, 11, 9), 2)):
        labels = torch.cat([torch.full((images,), label) for label, images in enumerate(images_of_each)])
        labels = labels[torch.randperm(len(labels))]
        splits = [_split(answer, labels, per_class, seed) for seed in range(4)]
        for train, test in splits:
            _require_split(train, test, labels, per_class)
        require(_split(answer, labels, per_class, 2) == splits[2],
                "the same seed gave two different splits. Use a generator of your own: torch.Generator().manual_seed(seed)")
        require(any(split != splits[0] for split in splits),
                "every seed gives the same split; the seed has to decide which images of a class are trained on")


def _split(answer: Callable, labels: Tensor, per_class: int, seed: int) -> tuple[list[int], list[int]]:
    """The numbers of the training and of the test images, sorted; other things have drawn random numbers before."""
    torch.rand(1)
    found = answer(labels.clone(), per_class, seed)
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise Wrong("the function has to return two lists, with the numbers of the training and of the test images, and not "
                    f"{found!r}")
    return _numbers(found[0]), _numbers(found[1])


def _numbers(found: object) -> list[int]:
    """The numbers of images that were found, sorted; of a mask those of the images that are true."""
    values = found.tolist() if isinstance(found, Tensor | np.ndarray) else found
    if not isinstance(values, list | tuple | set | range):
        raise Wrong(f"a list with the numbers of images was expected, and not {found!r}")
    values = [value.tolist() if isinstance(value, Tensor | np.generic) else value for value in values]
    if values and all(isinstance(value, bool) for value in values):
        return [number for number, chosen in enumerate(values) if chosen]
    if others := [value for value in values if not isinstance(value, int)]:
        raise Wrong("a list with the numbers of images was expected, such as [0, 5, 9], and this list has other things in it, "
                    f"such as {textwrap.shorten(repr(others[0]), 40, placeholder=' …')}")
    return sorted(values)


def _require_split(train: list[int], test: list[int], labels: Tensor, per_class: int) -> None:
    images, classes = len(labels), int(labels.max()) + 1
    require(all(0 <= row < images for row in train + test),
            f"of {images} images the first has the number 0 and the last {images - 1}, and you have others")
    require(len(set(train)) == len(train), "an image is among the training images twice; draw without putting back")
    require(len(train) != per_class, f"these are {per_class} training images altogether; take {per_class} of each class")
    counts = labels[train].bincount(minlength=classes).tolist()
    require(counts == [per_class] * classes,
            f"the classes have {counts} training images, and each should have {per_class}; draw from each class by itself")
    shared = set(train) & set(test)
    require(not shared, f"{len(shared)} images are on both sides, so the network is tested on what it was trained on")
    require(len(train) + len(set(test)) == images,
            f"of {images} images {len(train)} are for training and {len(set(test))} for testing; the test needs all others")
    require(len(set(test)) == len(test), "an image is among the test images twice")


def _check_seen_before(answer) -> None:
    require_function(answer)
    for copies in ({3: 3, 0: 5}, {}, {1: 5, 2: 4, 4: 3}):  # number of the test image: that of the training image
        train, test = (torch.randint(256, (images, 3, 4, 4), dtype=torch.uint8) for images in (6, 9))
        for row, copied in copies.items():
            test[row] = train[copied]
        test[5], test[6] = train[0].flip(2), test[7]  # a mirror image, and two of the same that are in the test images only
        test[8] = train[1]
        test[8, 0, 0, 0] ^= 1  # differs in one number, by 1
        _require_seen(_numbers(answer(train.clone(), test.clone())), train, test)


def _require_seen(found: list[int], train: Tensor, test: Tensor) -> None:
    def rows(alike: Callable[[Tensor, Tensor], bool], images: Tensor = test, others: Tensor = train) -> list[int]:
        return [row for row, image in enumerate(images) if any(alike(image, other) for other in others)]

    seen = rows(torch.equal)
    require_same(found, seen, {
        "only images with the same number are compared, and an image can be anywhere on the other side":
            [row for row in range(len(train)) if torch.equal(test[row], train[row])],
        "these are the numbers of the training images; those of the test images are asked for":
            rows(torch.equal, train, test),
        "two images are taken for the same as soon as one pixel is the same; `in` does that with tensors, too. All have to be":
            rows(lambda image, other: bool((image == other).any())),
        "two images can have the same mean and differ: one of these is the mirror image of a training image":
            rows(lambda image, other: bool(image.sum() == other.sum())),
        "two images are taken for the same although one number in them differs by 1. All numbers have to be equal":
            rows(lambda image, other: bool((image.float() - other.float()).abs().mean() < 1)),
        "two test images are the same, and neither is a training image. Compare across the two sides only":
            sorted({*seen, 6, 7}),
    }, f"{seen or 'none'} of the test images are also training images, and the function found {found or 'none'}")


def _check_wilson(answer) -> None:
    require_function(answer)
    for right, total in ((18, 20), (45, 50), (0, 30), (12, 12), (1286, 1497)):
        found = answer(right, total)
        require_returned(found)
        ends = found.tolist() if isinstance(found, Tensor | np.ndarray) else found
        require(isinstance(ends, tuple | list) and len(ends) == 2, f"the function has to return two numbers, and not {found!r}")
        _require_wilson([float(end) for end in ends], right, total)


def _require_wilson(found: list[float], right: int, total: int) -> None:
    share, p = right / total, torch.linspace(0, 1, 10_001, dtype=torch.float64)

    def shifted(low: float, high: float) -> list[float]:
        return [1 + low, 1 + high]  # so that a tolerance of one in a thousand is one of 0.001

    def within(reach: Tensor) -> list[float]:
        inside = p[(share - p).abs() <= reach]
        return shifted(inside.min().item(), inside.max().item()) if len(inside) else []

    error = (p * (1 - p) / total).sqrt()
    low, high = (end - 1 for end in within(1.96 * error))
    measured = 1.96 * math.sqrt(share * (1 - share) / total)
    start = f"{right} of {total} are right: "
    require_same(shifted(*found), shifted(low, high), {
        start + "the standard error is that of the measured accuracy, so the interval goes on beyond 1. It has to be that of "
                "p, the accuracy which is tried": shifted(share - measured, share + measured),
        start + "cutting the interval off at 0 and 1 does not help. The standard error has to be that of p, the accuracy which "
                "is tried, and not that of the measured accuracy": shifted(max(share - measured, 0), min(share + measured, 1)),
        start + "the root is missing in the standard error": within(1.96 * error ** 2),
        start + "the more images, the smaller is the standard error; divide by their number":
            within(1.96 * (p * (1 - p)).sqrt()),
        start + "one standard error is not enough for 95 %; it takes 1.96": within(error),
        start + "1.645 standard errors leave 5 % at each end; for 95 % in all it takes 1.96": within(1.645 * error),
        start + "the interval is in percent; give parts of one": shifted(100 * low, 100 * high),
        start + "low comes before high": shifted(high, low),
    }, start + f"the interval is not from {found[0]:.4f} to {found[1]:.4f}", tolerance=1e-3)


def _check_confusion(answer) -> None:
    require_function(answer)
    for names, counts in ((("ant", "bee", "cat"), [[40, 9, 1], [8, 25, 2], [12, 3, 10]]),
                          (("3", "5", "8", "9"), [[50, 4, 10, 0], [9, 30, 2, 1], [2, 5, 41, 6], [0, 0, 3, 70]]),
                          (("yes", "no"), [[5, 1], [0, 7]])):
        _require_confusion(answer, pd.DataFrame(counts, pd.Index(names, name="true"), pd.Index(names, name="predicted")))


def _require_confusion(answer: Callable, matrix: pd.DataFrame) -> None:
    found = answer(matrix.copy())
    require(isinstance(found, tuple | list) and len(found) == 2,
            f"the function has to return two things, the recalls and the pair of names, and not {found!r}")
    recalls = found[0].to_dict() if isinstance(found[0], pd.Series) else found[0]
    names, counts = list(matrix.index), matrix.to_numpy()
    require(all(part is not ... for part in found), "put your answers where the dots are")
    require(isinstance(recalls, dict) and set(recalls) == set(names),
            f"the recalls have to be a dictionary with a number for each of {', '.join(names)}, and not {recalls!r}")
    right = counts.diagonal()

    def by_name(values: np.ndarray) -> dict[str, float]:
        return dict(zip(names, values.tolist(), strict=True))

    require_same(recalls, by_name(right / counts.sum(1)), {
        "these are the parts of the answers that were right, the precision. The true classes are in the rows":
            by_name(right / counts.sum(0)),
        "the right answers are divided by the number of all images; divide by that of the class's images":
            by_name(right / counts.sum()),
        "these are the numbers of right answers; the parts are asked for": by_name(right),
        "the recalls are in percent; give parts of one": by_name(100 * right / counts.sum(1)),
        "that is one accuracy for all classes; each class has its own": by_name(right.sum() / counts.sum() + 0 * right),
    }, f"{names[0]} has {counts[0].sum()} images, of which {right[0]} were recognised; your recalls are {recalls}")
    _require_pair(found[1], names, counts)


def _require_pair(found: object, names: list[str], counts: np.ndarray) -> None:
    require(isinstance(found, tuple | list | set | frozenset | pd.Index | np.ndarray) and all(name in names for name in found),
            f"the recalls are right. The pair has to be two of the names, and not {found!r}")
    require(len(set(found)) == 2, "the recalls are right. But the pair is one class only: the diagonal has the right answers")

    def most(values: np.ndarray) -> list[str]:
        wrong = np.where(np.eye(len(names), dtype=bool), -1.0, values)
        return sorted(names[i] for i in np.unravel_index(wrong.argmax(), wrong.shape))

    both = counts + counts.T - 2 * np.diag(counts.diagonal())
    start = "the recalls are right. But the pair is not: "
    require_same(sorted(found), most(both), {
        start + "only one direction is counted, and those that were taken the other way round count as well": most(counts),
        start + "parts of a class are compared; the pair with the largest number of images is asked for":
            most(counts / counts.sum(1, keepdims=True)),
    }, start + f"two classes were confused {both.max()} times, both directions together, and {' and '.join(sorted(found))} "
               "less often")


def _check_tries(answer) -> None:
    require_function(answer)
    for suggestion, head_lr, number, shift in ((1.4, 1e-3, 3, 0), (0.2, 5e-3, 5, 0), (30.0, 1e-4, 3, 2), (0.7, 1e-3, 5, -1),
                                               (math.nan, 2e-3, 3, 0), (math.nan, 1e-3, 3, 1)):
        found = answer(suggestion, head_lr, number, shift)
        values = found.tolist() if isinstance(found, Tensor | np.ndarray) else found
        require(isinstance(values, list | tuple) and len(values) == number,
                f"the function has to return a list of {number} rates, and it returned {found!r}")
        _require_tries(sorted(map(float, values)), suggestion, head_lr, number, shift)


def _require_tries(found: list[float], suggestion: float, head_lr: float, number: int, shift: int) -> None:
    height = head_lr if math.isnan(suggestion) else head_lr * suggestion

    def around(middle: float, factor: float = 3.0) -> list[float]:
        return [middle * factor ** (i - number // 2) for i in range(number)]

    right = around(height * 3.0 ** shift)
    start = f"suggestion {suggestion:g}, head_lr {head_lr:g}, {number} tries, shift {shift}: "
    require(not any(map(math.isnan, found)),
            start + "without a suggestion head_lr itself is the height. Mind that nan == nan is false, and ask math.isnan")
    require_same(found, right, {
        start + "the suggestion is a factor for the rates that the range test began with, and not a rate":
            around(suggestion * 3.0 ** shift),
        start + "the height is not head_lr, but what the range test suggests, head_lr · suggestion":
            around(head_lr * 3.0 ** shift),
        start + "the height is the lowest try, and it should be the middle one": [
            right[number // 2] * 3.0 ** i for i in range(number)],
        start + "the height is the highest try, and it should be the middle one": [
            right[number // 2] / 3.0 ** (number - 1 - i) for i in range(number)],
        start + "the tries have equal distances, and should be a factor of three apart": torch.linspace(
            right[0], right[-1], number, dtype=torch.float64).tolist(),
        start + "the tries are a factor of ten apart, and should be one of three": around(height * 10.0 ** shift, 10.0),
        start + "shift has made no difference": around(height),
        start + "shift goes the wrong way: with a positive one the tries are higher": around(height / 3.0 ** shift),
        start + "the middle is multiplied by 3 · shift; it should be by 3 to the power of shift": around(height * 3.0 * shift),
    }, start + f"the middle of the tries should be {right[number // 2]:.3g}, a factor of three between neighbours, and yours "
               f"are {', '.join(f'{lr:.3g}' for lr in found)}")


EXERCISES = {
    "8.1": Exercise("Split so that the last number is honest", _check_split,
                    "for each class take the numbers of its images, and bring them into an order that is drawn by a generator "
                    "with this seed (torch.randperm(n, generator=…)). The first few are for the training, and the rest is "
                    "for the test.",
                    "If an image is there twice, even this split can have it on both sides; the next exercise is about that."),
    "8.2": Exercise("The same picture on both sides", _check_seen_before,
                    "each test image has to be compared with each training image, and torch.equal compares two of them.",
                    "Two photographs of the same minute are not equal, and do the same harm; these you have to look for."),
    "8.3": Exercise("How sure is an accuracy?", _check_wilson,
                    "try many accuracies p from 0 to 1, keep those that fit what was measured, and return the ends.",
                    "If 12 of 12 are right, it begins at 0.76: so few images leave much open, even without a mistake."),
    "8.4": Exercise("Read a confusion matrix", _check_confusion,
                    "the diagonal has the right answers, and the sum of a row is the number of its class's images. The two "
                    "numbers of a pair stand opposite each other, mirrored at the diagonal.",
                    "Look at some of the images of this pair before you change any rate."),
    "8.5": Exercise("Choose the tries", _check_tries,
                    "compute the middle first. The others are that times 3 to the power of …, -1, 0, 1, …",
                    "If the best of them is at an edge, move shift by one and try again."),
}
