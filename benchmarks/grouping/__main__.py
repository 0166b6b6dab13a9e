"""Are the layers that `layer_groups` finds those that an expert would choose? Measured on the models of timm and Hugging Face.

    pip install .[compare]
    python -m benchmarks.grouping

in the repository's root groups some 400 models in a few minutes, prints a line for each that is not as expected, with its
groups, and writes the tables to docs/grouping.md. `--only PATTERN` takes the models whose name or family matches a regular
expression, `--jobs N` works in N processes, `--json FILE` writes all results; the document is left as it is by `--only`
and where a library is not installed.

timm_models.py and hugging_face_models.py say which models and what is expected of each, shared.py measures.
"""

import argparse
import json
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

from benchmarks.grouping.document import DOCUMENT, document
from benchmarks.grouping.shared import CHECKS, Result
from benchmarks.grouping.subjects import FILES, measure_named, subjects


def results(names: list[str], jobs: int) -> Iterator[Result]:
    if jobs == 1:
        yield from map(measure_named, names)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(measure_named, name) for name in names]):
            yield future.result()


def report(result: Result, *, verbose: bool) -> None:
    """A line for each thing that is wrong with a model, then its groups with their depths."""
    for kind, fault in result.wrong.items():
        print(f"{result.library} {result.name} {kind.upper()}: {fault}", flush=True)
    if result.wrong or verbose:
        for granularity, groups in result.groups.items():
            print(f"    {granularity}: {' '.join(f'{name}@{depth}' for name, depth in groups)}")
        for message in result.warnings:
            print(f"    warning: {message}")


def summary(all_results: list[Result]) -> str:
    lines = []
    for library in dict.fromkeys(result.library for result in all_results):
        of_library = [result for result in all_results if result.library == library]
        counts = []
        for kind in CHECKS:
            checked = [result for result in of_library if kind in result.checked or "error" in result.wrong]
            right = sum(kind not in result.wrong and "error" not in result.wrong for result in checked)
            counts.append(f"{kind} right {right} of {len(checked)}")
        guessed = sum(not result.needs_input and "error" not in result.wrong for result in of_library)
        counts.append(f"input found {guessed} of {len(of_library)}")
        lines.append(f"{library}: {', '.join(counts)}; {sum(result.seconds for result in of_library):.0f} s")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grouping")
    parser.add_argument("--only", default="", help="a regular expression for library, family or name")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, help="a file to write all results to")
    parser.add_argument("--verbose", action="store_true", help="print the groups of every model")
    args = parser.parse_args()
    names = [name for name, subject in subjects().items()
             if re.search(args.only, f"{subject.library}/{subject.family}/{name}", re.IGNORECASE)]
    if not names:
        parser.error(f"no model matches {args.only!r}; there are {', '.join(subjects())}")
    all_results = []
    for result in results(names, min(args.jobs, len(names))):
        report(result, verbose=args.verbose)
        all_results.append(result)
    all_results.sort(key=lambda result: names.index(result.name))
    print(summary(all_results))
    if not args.only and {result.library for result in all_results} == FILES.keys():
        DOCUMENT.write_text(document(all_results), encoding="utf-8")
    if args.json:
        args.json.write_text(json.dumps([asdict(result) for result in all_results], indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
