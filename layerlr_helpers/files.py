"""Writing a file so that at any moment it is there as a whole or not at all, and saying which one could not be written."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch


def write_whole(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let ``write(temporary_path)`` make a file beside ``path``, then rename it into place.

    Readers find the old file or the new one, never a part, also after a power cut. If writing fails, the old file stays
    and the temporary file is removed. A full disk, a folder that is read-only and the like are an OSError that names
    ``path`` and the cause. A link is followed: the file that it points to is written, and the link stays.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(target.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # on the disk before the rename
        os.replace(temporary, target)
    except BaseException as error:
        with suppress(OSError):  # where nothing can be written, there is nothing to remove either
            temporary.unlink(missing_ok=True)
        if cause := _system_error(error):
            message = f"cannot write {shown(path)}: {cause.strerror or cause}"
            raise (OSError(cause.errno, message) if cause.errno else OSError(message)) from error
        raise


def save_whole(path: str | Path, content: object) -> None:
    """Let ``torch.save`` write a file as :func:`write_whole` does."""
    write_whole(path, lambda temporary: torch_save(content, temporary))


def torch_save(content: object, path: Path) -> None:
    """Call ``torch.save`` with an open file: given a path, it hides from its errors whether the disk was full."""
    with open(path, "wb") as file:
        torch.save(content, file)


def shown(path: str | Path) -> str:
    """A path as it can be printed: one that is not UTF-8, which would break ``print`` and JSON, as its bytes."""
    return str(path) if is_utf8(path) else str(os.fsencode(path))


def is_utf8(path: str | Path) -> bool:
    """Whether a path can be written into a text file; on Linux a name may be any bytes."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _system_error(error: BaseException | None) -> OSError | None:
    """The operating system's error behind an error: itself, or what torch's writer, which calls ours, met with its own."""
    while isinstance(error, RuntimeError):
        error = error.__context__
    return error if isinstance(error, OSError) else None
