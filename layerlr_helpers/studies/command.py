"""The recorded studies: ``python -m layerlr_helpers.studies NAME [--seeds N]``, ``--list`` names them.

In a study every strategy has the same number of tries of its rates, each on the validation images of two seeds. The best
try (by mean accuracy, the lower loss where two tie) is then tested once on every seed. All have the same steps, batches,
schedule and seeds. Each run is a row of ``data/results/NAME.csv``; a study that was interrupted goes on where it stopped.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from layerlr_helpers.studies import results
from layerlr_helpers.studies.catalogue import PHOTOGRAPHS, STUDIES, Study, photograph_study
from layerlr_helpers.studies.compare import compare


def conduct(study: Study, path: str | Path, seeds: Sequence[int], *, tasks: Sequence[str] = (),
            progress: bool = True) -> pd.DataFrame:
    """Make the runs of a study that its file does not have yet; returns all of its rows.

    ``tasks`` are the names of those to do; none means all.

    Raises:
        ValueError: a name that is no task of the study.
    """
    all_tasks = {task.name: task for task in study.tasks()}
    if unknown := set(tasks) - set(all_tasks):
        raise ValueError(f"no task {', '.join(sorted(unknown))} in this study; its tasks are {', '.join(all_tasks)}")
    for name in tasks or all_tasks:
        compare(study.tries(all_tasks[name]), all_tasks[name], seeds=seeds, choose=study.choose, results=path,
                progress=progress)
    return results.read_rows(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.list or options.name is None:
        questions = {name: study.question for name, study in STUDIES.items()}
        questions |= {name: f"{question} (needs --folder)" for name, (question, *_) in PHOTOGRAPHS.items()}
        print("\n".join(f"{name}: {question}" for name, question in questions.items()))
        return
    _check(parser, options)
    study = STUDIES.get(options.name) or photograph_study(options.name, dict(options.folder), options.model)
    path = Path(options.results) / f"{options.name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        rows = conduct(study, path, range(options.seeds), tasks=options.task)
    except results.RecordError as error:
        parser.error(f"{error}, with --results FOLDER")
    tested = rows[rows["split"] == "test"].groupby(["task", "strategy", "rates"], sort=False)["accuracy"]
    print((100 * tested.agg(["mean", "std"])).round(1).assign(seeds=tested.count()).to_string())
    print(f"every run is a row of {path}")


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    names = [name for name, _ in options.folder]
    if options.name in PHOTOGRAPHS and not names:
        parser.error(f"{options.name} needs at least one --folder NAME=PATH")
    if options.name in STUDIES and (names or options.model != parser.get_default("model")):
        parser.error(f"{options.name} has its own images and network; --folder and --model are for {' and '.join(PHOTOGRAPHS)}")
    if len(set(names)) < len(names):
        parser.error(f"each --folder needs a name of its own, got {', '.join(names)}")
    if missing := [path for _, path in options.folder if not Path(path).is_dir()]:
        parser.error(f"no folder {', '.join(missing)}")
    if options.seeds < 1:
        parser.error(f"--seeds must be 1 or above, not {options.seeds}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m layerlr_helpers.studies", description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", choices=[*STUDIES, *PHOTOGRAPHS], help="the study to run, or to go on with")
    parser.add_argument("--seeds", type=int, default=10, help="test on seeds 0 to N - 1 (default %(default)s)")
    parser.add_argument("--task", action="append", default=[], help="only this task of the study (may be repeated)")
    parser.add_argument("--results", default="data/results", help="folder of the results (default %(default)s)")
    parser.add_argument("--folder", action="append", default=[], type=_named_folder, metavar="NAME=PATH",
                        help="photographs, one subfolder a class, and the name to record them under (may be repeated)")
    parser.add_argument("--model", default="resnet18", help="a classifier of torchvision (default %(default)s)")
    parser.add_argument("--list", action="store_true", help="list the studies")
    return parser


def _named_folder(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"give NAME=PATH, not {text!r}")
    return name, path
