"""Writing a file so that at any moment it is there as a whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path


def write_whole(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let ``write(temporary_path)`` make a file beside ``path``, then rename it into place.

    Readers find the old file or the new one, never a part, also after a power cut. If writing fails, the old file stays
    and the temporary file is removed.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # on the disk before the rename
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
