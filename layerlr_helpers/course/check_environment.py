"""Is everything there that the course needs? ``python -m layerlr_helpers.course.check_environment`` says so, a line each.

`make lab` runs it before JupyterLab opens. It ends with 1 if something is missing, and says what to do about it.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil
import torch
from jupyter_client import KernelManager
from jupyter_client.kernelspec import NoSuchKernel
from packaging.requirements import Requirement

from layerlr_helpers.minilm import minilm_weights
from layerlr_helpers.models import CHECKPOINT_SHA256, checkpoint_path, read_checkpoint
from layerlr_helpers.training import fast_autocast

EXTRAS = ("", "course", "text")  # of this package: what the notebooks import
PYTHON = (3, 11)
MAIN_PACKAGES = ("torch", "torchvision", "transformers", "jupyterlab")
MEMORY, DISK = 3, 1  # GiB that a notebook takes at most, and that checkpoints and pages take
INSTALL = "run `make setup`, or: python -m pip install -r requirements.txt"


@dataclass(frozen=True)
class Finding:
    """What was found out about one thing, and what to do if it will not do: an empty remedy says that all is well."""

    thing: str
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{'FAIL' if self.remedy else 'ok':5}{self.thing}: {self.found}" + (f"; {self.remedy}" if self.remedy else "")


def main() -> int:
    """Print a line for each thing that was looked at; returns 1 if one of them will not do, else 0."""
    failed = 0
    for finding in findings():
        print(finding, flush=True)
        failed += bool(finding.remedy)
    print(f"{failed} of these will not do." if failed else "Everything is there.", flush=True)
    return int(failed > 0)


def findings() -> Iterator[Finding]:
    """Look at one thing after the other."""
    yield python(sys.version_info[:3])
    yield from packages(needed())
    yield memory(psutil.virtual_memory().available / 2**30)
    yield Finding("cores", str(os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count()))
    yield Finding("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none, and the course needs none")
    yield Finding("bfloat16", "this processor computes it fast" if fast_autocast() else
                  "not fast on this processor, so the notebooks take the longer of the times that they name")
    yield disk(shutil.disk_usage(Path.cwd()).free / 2**30)
    yield weights("ResNet-18's weights", lambda: read_checkpoint(checkpoint_path(), CHECKPOINT_SHA256))
    yield weights("MiniLM's weights", minilm_weights)
    yield kernel()


def needed() -> list[Requirement]:
    """What this package says that the course requires."""
    return [requirement for requirement in map(Requirement, requires("layerlr-helpers") or [])
            if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in EXTRAS)]


def python(found: tuple[int, ...]) -> Finding:
    """Is Python new enough?"""
    text, wanted = ".".join(map(str, found)), ".".join(map(str, PYTHON))
    return Finding("Python", text, "" if found >= PYTHON else
                   f"{wanted} or newer is needed; make the environment anew, for instance make PYTHON=python3.12 setup")


def packages(requirements: Iterable[Requirement]) -> Iterator[Finding]:
    """Are the packages there, in versions that will do? One line for all that are, and one for each that is not."""
    right = {}
    for requirement in requirements:
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            yield Finding(requirement.name, "not installed", INSTALL)
            continue
        if requirement.specifier.contains(found, prereleases=True):
            right[requirement.name] = found
        else:
            yield Finding(requirement.name, found, f"{requirement.specifier} is needed; {INSTALL}")
    main_ones = ", ".join(f"{name} {right[name]}" for name in MAIN_PACKAGES if name in right)
    yield Finding("packages", f"{len(right)} in versions that will do ({main_ones})")


def memory(gibibytes: float) -> Finding:
    """Is there enough memory that no other program uses?"""
    return Finding("memory", f"{gibibytes:.1f} GiB available", "" if gibibytes >= MEMORY else
                   f"a notebook takes up to {MEMORY} GiB; close other programs")


def disk(gibibytes: float) -> Finding:
    """Is there enough room on the disk?"""
    return Finding("disk", f"{gibibytes:.1f} GiB free", "" if gibibytes >= DISK else f"{DISK} GiB is needed; free some")


def weights(name: str, read: Callable[[], object]) -> Finding:
    """Can the weights be read, and are they, byte for byte, the right ones?"""
    try:
        read()
    except (OSError, ValueError, ImportError) as error:  # a ConnectionError is an OSError
        return Finding(name, "cannot be used", str(error))
    return Finding(name, "the right ones, by their SHA-256")


def kernel() -> Finding:
    """Does Jupyter start the notebooks' kernel with this Python?"""
    manager = KernelManager(kernel_name="python3")
    try:
        program = Path(manager.format_kernel_cmd()[0]).absolute()
    except NoSuchKernel:
        return Finding("Jupyter's kernel", "there is none called python3", INSTALL)
    # By folders, since the program of an environment is often a link to that of the system, which has other packages.
    right = program.parent == Path(sys.executable).absolute().parent
    return Finding("Jupyter's kernel", f"python3 starts {'this Python' if right else program}", "" if right else
                   f"another Python does not have the course's packages; delete the folder {manager.kernel_spec.resource_dir}")


if __name__ == "__main__":
    sys.exit(main())
