"""What the bridges refuse before training begins, and that they need their library only where a callback is made."""

import importlib
import subprocess
import sys

import pytest
import torch
from torch import nn

from layerlr_helpers import PlateauUnfreezing, ProgressiveUnfreezing, UnfreezePlan, layer_groups, param_groups, uniform
from layerlr_helpers.integrations.checks import check_distributed, check_in_optimizer, check_is_plan
from layerlr_helpers.layers import LayerGroup


def small():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def unfreezing(groups):
    return ProgressiveUnfreezing(groups, UnfreezePlan({"head": 0}))


@pytest.mark.parametrize(("module", "name", "library"), [
    ("hugging_face", "UnfreezingTrainerCallback", "transformers"), ("lightning", "UnfreezingCallback", "lightning")])
def test_without_its_library_a_callback_says_what_to_install(monkeypatch, module, name, library):
    with monkeypatch.context() as patch:
        for missing in (library, f"{library}.pytorch"):
            patch.setitem(sys.modules, missing, None)
        bridge = importlib.import_module(f"layerlr_helpers.integrations.{module}")
        importlib.reload(bridge)
        with pytest.raises(ImportError, match=f"{name} needs the package {library}, .*pip install {library}"):
            getattr(bridge, name)(unfreezing(layer_groups(small())))
    importlib.reload(bridge)


@pytest.mark.slow
def test_importing_the_package_imports_none_of_the_libraries():
    code = ("import sys, layerlr_helpers, layerlr_helpers.integrations\n"
            "print({'transformers', 'lightning', 'accelerate', 'timm', 'fastai'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_an_unfreezing_that_is_no_plan_is_refused():
    groups = layer_groups(small())
    check_is_plan(unfreezing(groups))
    with pytest.raises(ValueError, match="PlateauUnfreezing decides by validation metrics"):
        check_is_plan(PlateauUnfreezing(groups))
    with pytest.raises(TypeError, match=r"expected a ProgressiveUnfreezing.*got a UnfreezePlan"):
        check_is_plan(UnfreezePlan({"*": 0}))


def test_all_that_the_plan_could_train_must_be_in_the_optimizer():
    groups = layer_groups(small())
    made = param_groups(groups, uniform(0.1))
    check_in_optimizer(unfreezing(groups), made)
    with pytest.raises(ValueError, match="groups stem are not in the optimizer"):
        check_in_optimizer(unfreezing(groups), made[1:])
    check_in_optimizer(unfreezing(groups), torch.optim.SGD(made).param_groups)


def test_what_the_author_fixed_need_not_be_in_the_optimizer_nor_be_averaged():
    model = small()
    model[0].requires_grad_(False)
    fixed = LayerGroup("stem", {f"0.{name}": p for name, p in model[0].named_parameters()}, depth=1,
                       fixed={"0.weight", "0.bias"})
    head = LayerGroup("head", {f"4.{name}": p for name, p in model[4].named_parameters()})
    check_in_optimizer(unfreezing([fixed, head]), param_groups([head], uniform(0.1)))
    check_distributed(unfreezing([fixed, head]), True, "")


def test_in_several_processes_unused_parameters_must_be_looked_for_and_nothing_be_frozen_before():
    groups = layer_groups(small())
    check_distributed(unfreezing(groups), True, "")
    with pytest.raises(ValueError, match="find_unused_parameters=True; do this"):
        check_distributed(unfreezing(groups), False, "do this")
    unfreezing(groups).apply(0)
    with pytest.raises(ValueError, match=r"0\.weight, .* were frozen before the training began"):
        check_distributed(unfreezing(groups), True, "")
