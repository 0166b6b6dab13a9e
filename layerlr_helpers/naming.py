"""Finding groups by name or pattern, with errors that name what was asked for and what there is."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase


def matching(pattern: str, names: Sequence[str], *, what: str = "group") -> list[str]:
    """The names that equal ``pattern`` or match it as a shell pattern, else those below it; without any, a ValueError.

    >>> matching("layer*", ["stem", "layer1", "layer2", "head"])
    ['layer1', 'layer2']
    >>> matching("head", ["stem", "head.classes", "head.boxes"])
    ['head.classes', 'head.boxes']
    """
    matches = [pattern] if pattern in names else [name for name in names if fnmatchcase(name, pattern)]
    matches = matches or [name for name in names if name.startswith(f"{pattern}.")]
    if not matches:
        close = get_close_matches(pattern, names, n=3, cutoff=0.6)
        hint = f" (did you mean {', '.join(map(repr, close))}?)" if close else ""
        raise ValueError(f"no {what} matches {pattern!r}{hint}; there are: {listed(names)}")
    return matches


def assigned(values: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """The value of each name, from a dictionary of names and patterns; names that nothing matches are left out.

    A name itself, or one that stands for those below it, goes before any pattern; of several patterns that match, the last
    one wins. A pattern that matches nothing, or whose every match goes to a later pattern, is a ValueError.
    """
    matches = [(pattern, name) for pattern in values for name in matching(pattern, names)]
    by_name = {name: name for name in values if name in names}
    by_prefix = {name: pattern for pattern, name in matches if name.startswith(f"{pattern}.")}
    by_pattern = {name: pattern for pattern, name in matches if pattern not in {*by_name, *by_prefix.values()}}
    for pattern in values:
        if pattern not in {*by_name, *by_prefix.values(), *by_pattern.values()}:
            raise ValueError(f"{pattern!r} decides nothing, because later patterns match all that it matches; of several "
                             "patterns the last one wins, so put the general one, such as '*', first")
    winner = by_pattern | by_prefix | by_name
    return {name: values[winner[name]] for name in names if name in winner}


def listed(names: Iterable[str], most: int = 20) -> str:
    """Names as text; the middle is left out if there are more than ``most``."""
    names = list(names)
    if len(names) > most:
        names = [*names[:most // 2], f"… {len(names) - most} more …", *names[-(most // 2):]]
    return ", ".join(names)


def check_choice(what: str, value: str, choices: Iterable[str]) -> None:
    """Raise a ValueError that names the choices unless ``value`` is one of them."""
    if value not in choices:
        raise ValueError(f"unknown {what} {value!r}; known are {', '.join(map(repr, choices))}")
