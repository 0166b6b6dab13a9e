"""Run a recorded study, or go on with it: ``python -m layerlr_helpers.studies NAME``; ``--list`` names the studies.

Each run is a row of ``data/results/NAME.csv``; the same command goes on with a study that was interrupted.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from layerlr_helpers.studies.catalogue import PHOTOGRAPHS, STUDIES
from layerlr_helpers.studies.compare import compare
from layerlr_helpers.studies.results import RecordError, read_rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.list or options.name is None:
        for name, study in STUDIES.items():
            print(f"{name}: {study.question}{' (needs --folder)' if name in PHOTOGRAPHS else ''}")
        return
    _check(parser, options)
    study = STUDIES[options.name]
    tasks = study.tasks(dict(options.folder), options.model) if options.name in PHOTOGRAPHS else study.tasks()
    path = Path(options.results) / f"{options.name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        for task in tasks:
            compare(study.candidates(task), task, seeds=range(options.seeds), choose=study.choose, results=path)
    except RecordError as error:
        parser.error(f"{error}, with --results FOLDER")
    tested = read_rows(path).query("split == 'test'").groupby(["task", "strategy", "rates"], sort=False)["accuracy"]
    print((100 * tested.agg(["mean", "std"])).round(1).assign(seeds=tested.count()).to_string())
    print(f"every run is a row of {path}")


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    names = [name for name, _ in options.folder]
    if options.name in PHOTOGRAPHS and not names:
        parser.error(f"{options.name} needs at least one --folder NAME=PATH")
    if options.name not in PHOTOGRAPHS and (names or options.model != parser.get_default("model")):
        parser.error(f"{options.name} has its own images and network; --folder and --model are for {' and '.join(PHOTOGRAPHS)}")
    if len(set(names)) < len(names):
        parser.error(f"each --folder needs a name of its own, got {', '.join(names)}")
    if missing := [path for _, path in options.folder if not Path(path).is_dir()]:
        parser.error(f"no folder {', '.join(missing)}")
    if options.seeds < 1:
        parser.error(f"--seeds must be 1 or above, not {options.seeds}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m layerlr_helpers.studies", description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", choices=STUDIES, help="the study to run, or to go on with")
    parser.add_argument("--seeds", type=int, default=10, help="test on seeds 0 to N - 1 (default %(default)s)")
    parser.add_argument("--results", default="data/results", help="folder of the results (default %(default)s)")
    parser.add_argument("--folder", action="append", default=[], type=_named_folder, metavar="NAME=PATH",
                        help="photographs, one subfolder per class, and the name to record them under (may be repeated)")
    parser.add_argument("--model", default="resnet18", help="a classifier of torchvision (default %(default)s)")
    parser.add_argument("--list", action="store_true", help="list the studies")
    return parser


def _named_folder(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"give NAME=PATH, not {text!r}")
    return name, path
