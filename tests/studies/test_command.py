"""The command that runs the recorded studies."""

from pathlib import Path

import pytest

from layerlr_helpers import Strategy, Task, uniform
from layerlr_helpers.studies import results
from layerlr_helpers.studies.catalogue import STUDIES, Study
from layerlr_helpers.studies.command import main


@pytest.fixture
def study(small_digits):
    tasks = [Task(small_digits.subset(range(120)), per_class=1, val_per_class=2, epochs=1, batch_size=5, name=name)
             for name in ("first", "second")]
    candidates = {name: [Strategy(f"{lr:g}", uniform(lr)) for lr in lrs]
                  for name, lrs in {"low": (1e-5, 1e-4), "high": (1e-3, 1e-2)}.items()}
    return Study("which?", lambda: tasks, lambda task: candidates)


def test_every_task_of_a_study_is_searched_and_tested_into_one_file(study, made, tmp_path, monkeypatch):
    monkeypatch.setitem(STUDIES, "strategies", study)
    main(["strategies", "--seeds", "3", "--results", str(tmp_path)])
    rows = results.read_rows(tmp_path / "strategies.csv")
    assert len(made) == 2 * (2 * 2 * 5 + 2 * 3)  # both candidates of both are finalists
    assert made[20:26] == [("first", lr, seed, "test") for seed in range(3) for lr in ("0.0001", "0.01")]
    assert set(rows["task"]) == {"first", "second"}
    assert len(rows) == len(rows.drop_duplicates(results.KEY)) == len(made)


def test_the_command_lists_the_studies_and_runs_one(study, made, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(STUDIES, "strategies", study)
    main(["--list"])
    listed = capsys.readouterr().out
    assert "strategies: which?" in listed
    assert all(f"{name}:" in listed for name in STUDIES)
    main(["strategies", "--seeds", "2", "--results", str(tmp_path / "new")])
    said = capsys.readouterr().out
    assert "0.0001" in said
    assert len(results.read_rows(tmp_path / "new" / "strategies.csv")) == 2 * (20 + 4)
    with pytest.raises(SystemExit):
        main(["strategy"])


def test_a_record_from_another_kind_of_machine_is_shown_and_not_gone_on_with(study, made, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(STUDIES, "strategies", study)
    command = ["strategies", "--results", str(tmp_path), "--seeds"]
    main([*command, "2"])
    path = tmp_path / "strategies.csv"
    rows = results.read_rows(path).assign(precision="float16")
    rows.to_csv(path, index=False)
    made.clear()
    main([*command, "2"])  # nothing is lacking
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*command, "3"])
    assert "with precision float16, and this one has" in (said := capsys.readouterr().err)
    assert "another file, with --results FOLDER" in said
    assert not made
    assert results.read_rows(path).equals(rows)


def test_photographs_are_recorded_under_the_name_that_they_are_given(made, tmp_path, capsys, small_digits):
    folder = tmp_path / "photos"
    for label in range(2):
        (folder / str(label)).mkdir(parents=True)
        for i, image in enumerate(small_digits.images[:40]):
            save(image, folder / str(label) / f"{i}.png")
    main(["photographs-robustness", "--folder", f"strokes, untrained={folder}", "--seeds", "1", "--results", str(tmp_path)])
    rows = results.read_rows(tmp_path / "photographs-robustness.csv")
    assert set(rows["task"]) == {"strokes, untrained"}
    assert len(rows) == 4 * 6
    made.clear()
    main(["photographs-robustness", "--folder", f"strokes, untrained={folder}", "--seeds", "1", "--results", str(tmp_path),
          "--model", "resnet34"])
    assert {name for name, *_ in made} == {"strokes, untrained, resnet34"}


@pytest.mark.parametrize(("arguments", "problem"), [
    (["photographs"], "photographs needs at least one --folder NAME=PATH"),
    (["photographs", "--folder", "tests"], "give NAME=PATH, not 'tests'"),
    (["photographs", "--folder", "a=tests", "--folder", "a=data"], "each --folder needs a name of its own, got a, a"),
    (["photographs", "--folder", "a=nowhere/b"], "no folder nowhere/b"),
    (["labels", "--model", "resnet34"], "labels has its own images and network"),
    (["labels", "--seeds", "0"], "--seeds must be 1 or above, not 0")])
def test_a_command_that_cannot_be_carried_out_is_refused(made, capsys, monkeypatch, arguments, problem):
    monkeypatch.chdir(Path(__file__).parent.parent.parent)
    with pytest.raises(SystemExit):
        main(arguments)
    assert problem in capsys.readouterr().err
    assert not made


def save(image, path):
    from PIL import Image

    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
