"""What an exercise is, and what its check uses to tell a right answer from a wrong one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Exercise:
    """One exercise.

    Attributes:
        title: what is to be done, in a few words.
        check: takes the learner's answer, and raises :class:`Wrong` if it is not right. It tries the answer on several models
            or data, so that no constant passes, and names the mistake where it recognises one.
        hint: a push in the right direction that does not give the answer away.
        remark: what to say when the answer is right.
    """

    title: str
    check: Callable[[object], None]
    hint: str
    remark: str = ""


class Wrong(Exception):
    """The answer is not right; the message says what is wrong, in words that help."""


def require(right: bool, message: str) -> None:
    """Raise :class:`Wrong` with the message unless something is right."""
    if not right:
        raise Wrong(message)


def require_function(answer: object) -> None:
    """Raise :class:`Wrong` unless the answer is something that can be called."""
    require(callable(answer), f"the answer has to be a function, and this is {answer!r}; pass its name, without brackets")


def require_returned(*answers: object) -> None:
    """Raise :class:`Wrong` if one of the answers is None, which is what a function without ``return`` gives."""
    require(all(answer is not None for answer in answers),
            "the function returned nothing, that is None; does each way through it end with return?")


def same(found: object, expected: object, tolerance: float = 1e-6) -> bool:
    """Whether two answers are equal up to rounding: numbers, tensors, or dictionaries and lists of them."""
    if isinstance(expected, Mapping):
        return (isinstance(found, Mapping) and found.keys() == expected.keys()
                and all(same(found[key], value, tolerance) for key, value in expected.items()))
    if isinstance(expected, list | tuple):
        return (isinstance(found, list | tuple) and len(found) == len(expected)
                and all(same(one, other, tolerance) for one, other in zip(found, expected, strict=True)))
    if isinstance(expected, str | bool | type(None)):
        return type(found) is type(expected) and found == expected
    try:
        found, expected = torch.as_tensor(found, dtype=torch.float64), torch.as_tensor(expected, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        return False
    return found.shape == expected.shape and bool(torch.allclose(found, expected, rtol=tolerance, atol=1e-12))


def require_same(found: object, expected: object, mistakes: Mapping[str, object], otherwise: str,
                 tolerance: float = 1e-6) -> None:
    """Raise :class:`Wrong` unless two answers are :func:`same`.

    ``mistakes`` has, for each hint, the answer that somebody gets who makes that mistake. The message is the hint of the first
    that fits, or else ``otherwise``.
    """
    if same(found, expected, tolerance):
        return
    require_returned(found)
    for hint, wrong in mistakes.items():
        if same(found, wrong, tolerance):
            raise Wrong(hint)
    raise Wrong(otherwise)


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of everything in a model's ``state_dict``."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
