"""Writing a file so that at any moment it is there as a whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path


def write_whole(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let ``write(temporary path)`` make a file beside ``path``, then rename it: it is there as a whole or not at all."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    put_in_place(temporary, path)


def put_in_place(temporary: Path, path: Path) -> None:
    """Rename a file that was written beside its place, once it is on the disk: a power cut too leaves the old or the new."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
