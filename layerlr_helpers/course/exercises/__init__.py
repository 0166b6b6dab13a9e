"""Exercises that check themselves, offline: ``check("2.1", my_function)``, ``hint("2.1")``, ``solution("2.1")``.

The texts, the starters and the solutions are the tagged cells of ``notebooks/exercises/source/``; this package has the checks.
"""

import warnings
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import nbformat
import torch

from layerlr_helpers.course.exercises.exercise import Exercise, Wrong
from layerlr_helpers.guards import seeded

CHAPTERS = [import_module(f"{__name__}.{name}") for _, name, _ in iter_modules(__path__) if name.startswith("chapter_")]
EXERCISES: dict[str, Exercise] = {number: exercise for chapter in CHAPTERS for number, exercise in chapter.EXERCISES.items()}
SOURCE = Path(__file__).resolve().parents[3] / "notebooks" / "exercises" / "source"


def check(number: str, answer: object) -> None:
    """Say at once whether an answer to an exercise is right, or what is wrong with it."""
    problem = verdict(number, answer)
    if problem is None:
        print(f"{number} is right. {_exercise(number).remark}".strip())
    else:
        print(f"{number}, not yet: {problem}")


def verdict(number: str, answer: object) -> str | None:
    """What is wrong with an answer, or None if it is right. Torch's random numbers go on as if nothing had been tried."""
    exercise = _exercise(number)
    if answer is ...:
        return "put your answer where the dots are"
    try:
        with seeded(0), torch.enable_grad(), warnings.catch_warnings(action="ignore"):
            exercise.check(answer)
    except Wrong as wrong:
        return str(wrong)
    except Exception as error:  # whatever the learner's code raises
        return f"your code raised {type(error).__name__} when it was tried: {error}"
    return None


def hint(number: str) -> None:
    """Print a push in the right direction."""
    print(f"{number}, a hint: {_exercise(number).hint}")


def solution(number: str) -> None:
    """Print a solution; there can be others that are as good."""
    print(cell_source(number, "solution"))


def cell_source(number: str, tag: str) -> str:
    """The source of an exercise's cell with this tag, ``"exercise"``, ``"starter"``, ``"solution"`` or ``"check"``."""
    _exercise(number)
    chapter = number.partition(".")[0]
    path = SOURCE / f"{int(chapter):02}.ipynb"
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: the exercises' texts are in the course's repository, not in the package")
    current = None
    for cell in nbformat.read(path, as_version=4).cells:
        tags = cell.metadata.get("tags", [])
        if "exercise" in tags:
            current = cell.source.removeprefix("##").split()[0]
        if current == number and tag in tags:
            return cell.source
    raise LookupError(f"{path.name} has no cell {tag} for exercise {number}")


def _exercise(number: str) -> Exercise:
    if number not in EXERCISES:
        raise ValueError(f"no exercise {number!r}; there are {', '.join(EXERCISES)}")
    return EXERCISES[number]
