"""Finding groups by name or pattern, with errors that name what was asked for and what is there."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TypeVar

Value = TypeVar("Value")


def matching(pattern: str, names: Sequence[str], *, what: str = "group") -> list[str]:
    """The names that equal ``pattern`` or match it as a shell pattern (``layer*``).

    Raises:
        ValueError: none does; says which names there are and which come close.
    """
    found = [pattern] if pattern in names else [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        close = get_close_matches(pattern, names, n=3, cutoff=0.6)
        hint = f" (did you mean {', '.join(map(repr, close))}?)" if close else ""
        raise ValueError(f"no {what} matches {pattern!r}{hint}; there are: {listed(names)}")
    return found


def assigned(values: Mapping[str, Value], names: Sequence[str]) -> dict[str, Value]:
    """For each name that is meant, in the order of ``names``, the value that names and patterns give it.

    A name itself goes before any pattern; of several patterns that match, the last one wins.

    Raises:
        ValueError: a pattern that matches nothing, or one whose every match a later pattern takes away.
    """
    winner = {name: pattern for pattern in values for name in matching(pattern, names)}
    for pattern in values:
        if pattern not in names and pattern not in winner.values():
            raise ValueError(f"{pattern!r} decides nothing, because a later pattern takes all that it fits; of several "
                             "patterns the last one wins, so put the general one, such as '*', first")
    winner |= {name: name for name in values if name in names}
    return {name: values[winner[name]] for name in names if name in winner}


def listed(names: Iterable[str], most: int = 20) -> str:
    """Names as text, the middle left out when there are very many."""
    names = list(names)
    if len(names) > most:
        names = [*names[:most // 2], f"… {len(names) - most} more …", *names[-(most // 2):]]
    return ", ".join(names)
