"""All models by name, so that each process that measures some of them can find them."""

import warnings
from functools import cache

import torch

from benchmarks.grouping.shared import Result, Subject, measure
from benchmarks.libraries import optional

FILES = {"timm": "timm_models", "Hugging Face": "hugging_face_models"}


@cache
def subjects() -> dict[str, Subject]:
    """The models of all libraries that are installed."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    modules = [optional(f"benchmarks.grouping.{file}") for file in FILES.values()]
    return {subject.name: subject for module in modules if module for subject in module.subjects()}


def measure_named(name: str) -> Result:
    torch.manual_seed(0)
    return measure(subjects()[name])
