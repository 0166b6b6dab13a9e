"""Every check, three ways: the starter fails, typical wrong answers fail, each with a hint of its own, the solution passes."""

import ast
import importlib
import re
from pathlib import Path

import nbformat
import pytest

from layerlr_helpers.course import exercises
from layerlr_helpers.course.exercises import EXERCISES, cell_source, check, hint, solution, verdict
from layerlr_helpers.course.exercises.exercise import Exercise, Wrong, same
from tools.build_exercises import NOTEBOOKS, SOURCE, solutions, starters

CHAPTERS = sorted(path.stem for path in SOURCE.glob("*.ipynb"))
ANSWERS = [importlib.import_module(f"tests.course.exercises.wrong_{chapter}") for chapter in CHAPTERS]
WRONG = {number: answers for chapter in ANSWERS for number, answers in chapter.WRONG.items()}
RIGHT = {number: answers for chapter in ANSWERS for number, answers in getattr(chapter, "RIGHT", {}).items()}
NUMBERS = list(EXERCISES)
CONSTANTS = [None, 0, 1.0, "", [], {}, True]


@pytest.fixture(autouse=True, scope="module")
def in_the_folder_of_the_notebooks():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(NOTEBOOKS / "exercises")
        yield


def answer_of(number, tag):
    """What the check of an exercise gets from the learner after the setup and the cell with this tag have run."""
    source = nbformat.read(SOURCE / f"{int(number.split('.')[0]):02}.ipynb", as_version=4)
    names = {}
    for cell in source.cells:
        if cell.cell_type == "code" and not cell.metadata.get("tags"):
            exec(cell.source, names)
    exec(cell_source(number, tag), names)
    (call,) = (node for node in ast.walk(ast.parse(cell_source(number, "check")))
               if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "check")
    assert ast.literal_eval(call.args[0]) == number
    return eval(compile(ast.Expression(call.args[1]), number, "eval"), names)


def test_every_exercise_has_its_cells_and_its_wrong_answers():
    written = {cell.source.removeprefix("##").split()[0] for chapter in CHAPTERS
               for cell in nbformat.read(SOURCE / f"{chapter}.ipynb", as_version=4).cells
               if "exercise" in cell.metadata.get("tags", [])}
    assert written == set(NUMBERS) == set(WRONG)
    assert all(re.fullmatch(r"[1-8]\.[1-9]", number) for number in NUMBERS)


@pytest.mark.parametrize("number", NUMBERS)
def test_the_starter_is_not_right_and_runs(number):
    problem = verdict(number, answer_of(number, "starter"))
    assert problem is not None
    assert "your code raised" not in problem


@pytest.mark.parametrize("number", NUMBERS)
def test_the_solution_is_right(number):
    assert verdict(number, answer_of(number, "solution")) is None


@pytest.mark.parametrize("number", RIGHT)
def test_other_right_answers_are_right(number):
    assert [verdict(number, answer) for answer in RIGHT[number]] == [None] * len(RIGHT[number])


@pytest.mark.parametrize("number", NUMBERS)
def test_wrong_answers_are_told_apart(number):
    problems = [verdict(number, answer) for answer in WRONG[number]]
    assert len(problems) >= 3
    assert None not in problems
    assert len(set(problems)) == len(problems)
    assert not [problem for problem in problems if problem.startswith("your code raised")]


@pytest.mark.parametrize("number", NUMBERS)
def test_no_constant_passes(number):
    for constant in CONSTANTS:
        assert verdict(number, constant) is not None
        assert verdict(number, lambda *arguments, constant=constant, **options: constant) is not None


@pytest.mark.parametrize("number", NUMBERS)
def test_the_title_in_the_notebook_is_that_of_the_exercise(number):
    assert cell_source(number, "exercise").splitlines()[0] == f"## {number} {EXERCISES[number].title}"


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_both_notebooks_are_what_the_source_gives(chapter):
    source = nbformat.read(SOURCE / f"{chapter}.ipynb", as_version=4)
    (name,) = (path.name for path in Path(NOTEBOOKS).glob(f"{chapter}_*.ipynb"))
    assert nbformat.read(NOTEBOOKS / "exercises" / name, as_version=4) == starters(source)
    stored = nbformat.read(NOTEBOOKS / "solutions" / name, as_version=4)
    wanted = solutions(source, run=lambda notebook: None)
    assert [(cell.id, cell.source) for cell in stored.cells] == [(cell.id, cell.source) for cell in wanted.cells]
    said = [output.text for cell in stored.cells if "check" in cell.metadata.get("tags", []) for output in cell.outputs]
    assert len(said) == sum("exercise" in cell.metadata.get("tags", []) for cell in source.cells)
    assert all(" is right." in text for text in said)


def test_check_hint_and_solution_print(capsys):
    check("2.1", lambda groups, head_lr, decay: {})
    hint("2.1")
    solution("2.1")
    check("2.1", answer_of("2.1", "solution"))
    said = capsys.readouterr().out
    assert said.startswith("2.1, not yet: the function has to return a dictionary")
    assert "2.1, a hint: " in said
    assert "def my_layer_decay" in said
    assert "2.1 is right." in said


def test_an_exercise_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"no exercise '9\.9'; there are .*2\.1"):
        check("9.9", None)


def test_what_the_learners_code_raises_is_told(monkeypatch):
    def broken(groups, head_lr, decay):
        return groups["head"]

    assert verdict("2.1", broken).startswith("your code raised TypeError when it was tried: list indices must be integers")
    assert verdict("2.1", ...) == "put your answer where the dots are"
    assert "pass its name, without brackets" in verdict("2.1", {"head": 1e-3})


def test_the_learners_random_numbers_go_on(monkeypatch):
    import torch

    def check_with_noise(answer):
        torch.manual_seed(1)
        raise Wrong("no")

    monkeypatch.setitem(exercises.EXERCISES, "2.1", Exercise("", check_with_noise, ""))
    torch.manual_seed(7)
    verdict("2.1", 0)
    after = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(after, torch.rand(3))


@pytest.mark.parametrize(("found", "expected", "equal"), [
    (1.0, 1.0 + 1e-9, True), (1.0, 1.1, False), ({"a": 1}, {"a": 1.0}, True), ({"a": 1}, {"b": 1}, False),
    ([1, 2], (1, 2), True), ([1, 2], [1, 2, 3], False), ("a", "a", True), (1, True, False), (None, 0.0, False),
    ([], 0.0, False), ("x", 1.0, False)])
def test_same_is_equal_up_to_rounding(found, expected, equal):
    assert same(found, expected) is equal
