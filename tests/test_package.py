"""The package as a whole: its public names, and that an import changes nothing."""

import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest

import layerlr_helpers

MODULES = sorted(module.name for module in pkgutil.walk_packages(layerlr_helpers.__path__, "layerlr_helpers.")
                 if not module.name.endswith("__main__"))


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_print_what_they_say(name):
    assert doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0


@pytest.mark.parametrize("name", layerlr_helpers.__all__)
def test_every_public_name_exists_and_says_what_it_is(name):
    thing = getattr(layerlr_helpers, name)
    assert thing.__doc__
    # A dataclass without a docstring gets one made of its signature, which says nothing.
    assert not thing.__doc__.startswith(f"{name}(")
    if inspect.isclass(thing):
        methods = {method for method, value in vars(thing).items() if inspect.isfunction(value) and not method.startswith("_")}
        undocumented = {method for method in methods if not getattr(thing, method).__doc__}
        assert not undocumented


def test_public_names_are_sorted_and_named_once():
    names = layerlr_helpers.__all__
    assert len(set(names)) == len(names)
    assert names == sorted(names)


def test_the_contract_of_the_course_is_there():
    assert {
        "layer_groups", "LayerGroup", "uniform", "head_and_backbone", "layer_decay", "per_group", "param_groups", "describe",
        "slanted_triangular", "warmup_cosine", "one_cycle", "preview", "UnfreezePlan", "ProgressiveUnfreezing",
        "LayerAdaptiveLR", "fit", "evaluate", "History", "printed_glyphs", "handwritten_digits", "image_folder",
        "load_resnet18", "layer_statistics", "probe_layers", "lr_range_test", "Strategy", "compare",
    } <= set(layerlr_helpers.__all__)


LOOK = """
import os, random, sys, warnings
# What others do on import is their affair (one that nbconvert uses adds a filter for warnings), so they come first.
import ipywidgets, lightning, matplotlib, nbclient, nbconvert, numpy, pandas, sklearn, torch, torchvision, tqdm.auto
import transformers.trainer
from matplotlib import pyplot

def look():
    return [torch.get_rng_state().tolist(), repr(numpy.random.get_state()), random.getstate(), torch.get_default_dtype(),
            torch.is_grad_enabled(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(),
            torch.get_default_device(), torch.backends.cudnn.benchmark, dict(matplotlib.rcParams), matplotlib.get_backend(),
            warnings.filters[:], os.getcwd(), dict(os.environ), sorted(os.listdir('.')), pyplot.get_fignums()]

before = look()
import pkgutil, importlib, layerlr_helpers
imported = look()
for module in pkgutil.walk_packages(layerlr_helpers.__path__, 'layerlr_helpers.'):
    if not module.name.endswith('__main__'):
        importlib.import_module(module.name)
after = look()
print([i for i, (a, b, c) in enumerate(zip(before, imported, after)) if not a == b == c])
"""


@pytest.mark.slow
def test_importing_the_package_and_every_module_changes_no_global_state(tmp_path):
    done = subprocess.run([sys.executable, "-W", "error", "-c", LOOK], capture_output=True, text=True, check=False,
                          cwd=tmp_path)
    assert done.stderr == ""
    assert done.stdout.strip() == "[]"
    assert list(tmp_path.iterdir()) == []
