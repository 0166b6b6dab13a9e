"""Predictions and quizzes: buttons to answer a question, and what comes of it.

A notebook asks before it shows. In a learner's copy (`make lab`) each *Predict first* has buttons, and after the result a line
says whether the guess was right. The texts are in ``notebooks/predictions/`` and ``notebooks/quizzes/``.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import ipywidgets as widgets
from IPython.display import Markdown, display

from layerlr_helpers.files import write_whole

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
GUESSES = Path("guesses.json")  # in the folder of the learner's copies, so that a restarted kernel knows them


def guess(chapter: str, number: int) -> None:
    """Show a row of buttons for the prediction of this number (from 1) of a chapter such as ``"03"``; a click is recorded."""
    question = predictions(chapter)[number - 1]
    row = widgets.ToggleButtons(options=list(question["reasons"]), value=_guessed(chapter, number),
                                style={"button_width": "4em"})
    row.observe(lambda change: _record(chapter, number, guess=change["new"]), names="value")
    display(widgets.HBox([widgets.Label(" ".join(["Your prediction", question.get("part", "")]).strip() + ":"), row]))


def reveal(chapter: str, number: int, answer: str) -> None:
    """Say whether a guess was right, and if not, why it was tempting. ``answer`` holds the letter: ``"(b), by a little"``."""
    question = predictions(chapter)[number - 1]
    reasons = question["reasons"]
    found = re.search(r"\(([a-z])\)|^([a-z])$", answer)
    right = (found[1] or found[2]) if found else None
    guessed = _guessed(chapter, number)
    _record(chapter, number, right=guessed is not None and guessed == right)
    outcome = f"the answer is ({right})" if right in reasons else "it was none of the options"
    if guessed is None:
        text = f"You made no prediction; {outcome}."
    elif guessed == right:
        text = f"You predicted ({guessed}), and that is **right**."
    else:
        text = f"You predicted ({guessed}), and {outcome}. {reasons[guessed]}"
    part = question.get("part", "")
    display(Markdown(f"{part[:1].upper()}{part[1:]}: {text}" if part else text))


def score(chapter: str) -> None:
    """Say how many of a chapter's predictions were right."""
    recorded = _read().get(chapter, {})
    total, right = len(predictions(chapter)), sum(each.get("right", False) for each in recorded.values())
    without = total - sum(each.get("guess") is not None for each in recorded.values())
    display(Markdown(f"You predicted **{right} of {total}** results of this notebook"
                     + (f", and made no prediction for {without}." if without else ".")))


def quiz(chapter: str) -> None:
    """Show the questions at the end of a chapter. Each click on an option says whether it is right, and why."""
    for number, question in enumerate(questions(chapter), start=1):
        letters = "abcdef"[:len(question["options"])]
        options = [f"- ({letter}) {option['text']}" for letter, option in zip(letters, question["options"], strict=True)]
        display(Markdown("\n".join([f"**{number}.** {question['question']}\n", *options])))
        answer = widgets.Output()
        buttons = [widgets.Button(description=letter, layout={"width": "4em"}) for letter in letters]
        for button, option in zip(buttons, question["options"], strict=True):
            button.on_click(_say(button.description, option, answer))
        display(widgets.HBox(buttons), answer)


def predictions(chapter: str) -> list[dict]:
    """The predictions of a chapter, each a dictionary.

    ``cell`` and ``seen`` are the ids of the cells that ask and that show the result. ``answer`` is the letter, or ``variable``
    the name of the notebook's variable that has it. ``reasons`` says of each option why one might choose it, and why it is
    wrong if it is. ``part`` names the question where a cell asks several.
    """
    return _texts("predictions", chapter)


def questions(chapter: str) -> list[dict]:
    """The questions of a chapter's quiz: ``question`` and ``options``, each with ``text``, ``right`` and ``reason``."""
    return _texts("quizzes", chapter)


def _texts(folder: str, chapter: str) -> list[dict]:
    path = NOTEBOOKS / folder / f"{chapter}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def _guessed(chapter: str, number: int) -> str | None:
    return _read().get(chapter, {}).get(str(number), {}).get("guess")


def _say(letter: str, option: dict, answer: widgets.Output) -> Callable[[object], None]:
    def clicked(_) -> None:
        answer.clear_output(wait=True)
        with answer:
            display(Markdown(f"({letter}) is **{'right' if option['right'] else 'wrong'}**. {option['reason']}"))

    return clicked


def _read() -> dict[str, dict]:
    """What has been guessed, by chapter and number."""
    return json.loads(GUESSES.read_text(encoding="utf-8")) if GUESSES.exists() else {}


def _record(chapter: str, number: int, **what) -> None:
    recorded = _read()
    recorded.setdefault(chapter, {}).setdefault(str(number), {}).update(what)
    write_whole(GUESSES, lambda temporary: temporary.write_text(json.dumps(recorded, indent=1), encoding="utf-8"))
