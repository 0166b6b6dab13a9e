"""Reading folders of examples, one subfolder per class, with errors that say what is wrong with a folder or a file."""

import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from layerlr_helpers.files import is_utf8, shown
from layerlr_helpers.naming import listed

SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
# Endings, and names without one, of files that often lie beside the examples: they are left out without a warning.
NOTES = {".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".md", ".rst", ".html", ".htm", ".ini", ".log",
         ".pdf", ".db", ".py", ".ipynb",
         "license", "licence", "readme", "notice", "copying", "authors", "citation", "changelog", "source"}


@dataclass(frozen=True)
class FileKind:
    """What is read from the files of a folder.

    Attributes:
        name: of one of them, such as "image".
        is_one: whether a file is one, by its name.
        endings: what such names end in, for an error.
        advice: what to do with files of this kind that end in something else.
    """

    name: str
    is_one: Callable[[Path], bool]
    endings: str
    advice: str


def read_class_folders(path: str | Path, read: Callable[[Path], object], kind: FileKind,
                       unreadable: str) -> tuple[list, list[int], list[int], tuple[str, ...]]:
    """Read every file of a kind; return what ``read`` made of them, their labels, their places, and the classes' names.

    The labels are numbers of the subfolders in their order, and the place of a file is its number among all files, sorted by
    class and name. A file for which ``read`` raises an error is unreadable: with ``"raise"`` that is a ValueError, with
    ``"skip"`` a warning. Links are followed. A ValueError also says what is wrong with a folder: no classes, splits (train,
    val, …) in their place, a class without files, a class that is a link to nothing or has a name that is not UTF-8.
    """
    if unreadable not in ("raise", "skip"):
        raise ValueError(f"unreadable must be 'raise' or 'skip', not {unreadable!r}")
    path = Path(path).expanduser()
    folders = _class_folders(path, kind)
    contents, labels, places, errors = [], [], [], {}
    for place, (label, file, problem) in enumerate(_files(path, folders, kind)):
        try:
            if problem:
                raise OSError(problem)
            contents.append(read(file))
            labels.append(label)
            places.append(place)
        except Exception as error:  # Pillow raises a different error for each way of being damaged
            errors[file] = error
    if errors and unreadable == "raise":
        file, error = next(iter(errors.items()))
        raise ValueError(f"{len(errors)} unreadable file(s), the first is {shown(file)} ({error}); mend it, or pass "
                         "unreadable='skip' (on the command line --skip-unreadable)") from error
    if errors:
        warnings.warn(f"skipped {len(errors)} unreadable file(s): {', '.join(map(shown, errors))}", stacklevel=3)
    if empty := [folder.name for label, folder in enumerate(folders) if label not in set(labels)]:
        raise ValueError(f"class folder(s) {empty} of {shown(path)} contain no {kind.name} that can be read ({kind.endings})")
    return contents, labels, places, tuple(folder.name for folder in folders)


def check_labels(labels: Tensor, examples: int, class_names: Sequence[str], what: str) -> None:
    """Raise a ValueError unless each example has a label, and each label is the number of a class."""
    if len(labels) != examples:
        raise ValueError(f"each {what} needs a label, got {examples} {what}s and {len(labels)} labels")
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels are whole numbers, not {labels.dtype}")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(class_names):
        raise ValueError(f"labels are numbers of the {len(class_names)} classes, from 0 to {len(class_names) - 1}; these go "
                         f"from {int(labels.min())} to {int(labels.max())}")


def _class_folders(path: Path, kind: FileKind) -> list[Path]:
    if not path.is_dir():
        raise FileNotFoundError(f"no folder {shown(path)}")
    folders = _subfolders(path)
    named_like_splits = all(SPLITS & set(re.split(r"[_\-\d]+", folder.name.lower())) for folder in folders)  # seg_train as well
    if named_like_splits and any(map(_subfolders, folders)):
        example = next((folder for folder in folders if "train" in folder.name.lower()), folders[0])
        raise ValueError(f"the folders {', '.join(folder.name for folder in folders)} in {shown(path)} are parts of the data "
                         f"and no classes; pass one whose subfolders are the classes, e.g. {shown(example)}")
    if len(folders) == 1 and _subfolders(folders[0]):
        raise ValueError(f"{shown(path)} has one subfolder, {folders[0].name}, which has the subfolders "
                         f"{listed([folder.name for folder in _subfolders(folders[0])], 6)}; if these are the classes, pass "
                         f"{shown(folders[0])}")
    for entry in _not_hidden(path):
        if (problem := _link_problem(entry, [path.resolve()])) and not (kind.is_one(entry) or _is_note(entry, kind)):
            raise ValueError(f"the class {shown(entry)} cannot be read: {problem}; mend the link or remove it")
    if not folders:
        raise ValueError(f"{shown(path)} has no subfolders; put the {kind.name}s of each class into a subfolder of its own")
    if bad := [str(os.fsencode(folder.name)) for folder in folders if not is_utf8(folder.name)]:
        raise ValueError(f"the names of the class folders {', '.join(bad)} in {shown(path)} are not UTF-8, so that no report "
                         "could name these classes; rename them")
    return folders


def _files(path: Path, folders: Sequence[Path], kind: FileKind) -> list[tuple[int, Path, str | None]]:
    """``(label, file, problem)`` of all files of a kind in the class folders, sorted; warns of other files.

    The problem is why a link cannot be followed. Nobody knows what it led to, so it is among them.
    """
    files = [(label, file, problem) for label, folder in enumerate(folders)
             for file, problem in sorted(_walk(folder, [path.resolve()])) if not _is_note(file, kind)]
    if loose := [file.name for file in _not_hidden(path) if file.is_file() and kind.is_one(file) and not _is_note(file, kind)]:
        warnings.warn(f"left out {len(loose)} {kind.name}(s) in {shown(path)} that are in no class's folder: "
                      f"{listed(loose, 6)}", stacklevel=4)
    others = Counter(file.suffix.lower() or "without an ending" for _, file, problem in files
                     if not (problem or kind.is_one(file)))
    if others:
        warnings.warn(f"left out {others.total()} file(s) that do not end like {kind.name}s that can be read here ("
                      f"{', '.join(f'{n} {ending}' for ending, n in others.most_common())}); if they are {kind.name}s, "
                      f"{kind.advice}", stacklevel=4)
    return [(label, file, problem) for label, file, problem in files if problem or kind.is_one(file)]


def _walk(folder: Path, above: Sequence[Path]) -> Iterator[tuple[Path, str | None]]:
    """``(file, None)`` of each file below a folder, links followed, and ``(link, problem)`` of those that cannot be followed.

    ``above`` are the true places of the folders through which this one was reached.
    """
    above = [*above, folder.resolve()]
    for entry in _not_hidden(folder):
        problem = _link_problem(entry, above)
        if entry.is_dir() and not problem:
            yield from _walk(entry, above)
        elif entry.is_file() or problem:
            yield entry, problem


def _link_problem(entry: Path, above: Sequence[Path]) -> str | None:
    """Why a link cannot be followed; None if it can, or is no link."""
    if not entry.is_symlink():
        return None
    if not entry.exists():
        return f"it is a link to {shown(os.readlink(entry))}, which is not there"
    if any(place.is_relative_to(entry.resolve()) for place in above):
        return f"it is a link to {shown(os.readlink(entry))}, a folder that it is in itself"
    return None


def _not_hidden(folder: Path) -> list[Path]:
    """What lies in a folder, sorted, without hidden files such as macOS's ._a.jpg and Jupyter's copies."""
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _subfolders(path: Path) -> list[Path]:
    return [entry for entry in _not_hidden(path) if entry.is_dir()]


def _is_note(file: Path, kind: FileKind) -> bool:
    return (file.suffix or file.name).lower() in NOTES and not kind.is_one(file)
