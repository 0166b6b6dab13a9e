"""The libraries that ours is compared with. One that is not installed is left out, and a printed line says how to get it."""

import importlib
import logging
import warnings
from collections.abc import Mapping
from types import ModuleType

OURS = "layerlr_helpers"
PEERS = {"timm": "timm", "fastai": "fastai", "Lightning": "lightning"}  # each library's name and the package to install


def optional(name: str) -> ModuleType | None:
    """Import a module, without the warnings that some give then; None if it or a module that it needs is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            return None


def installed(modules: Mapping[str, object | None]) -> list[str]:
    """The names of the libraries whose module was imported; the others are printed."""
    for library, package in PEERS.items():
        if modules[library] is None:
            print(f"{library} is left out: the package {package} is not installed; pip install .[compare] installs it")
    return [library for library, module in modules.items() if module is not None]


def silence_lightning() -> None:
    """Keep Lightning from describing the machine and giving general advice on every run."""
    warnings.filterwarnings("ignore", module=r"lightning\.")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
