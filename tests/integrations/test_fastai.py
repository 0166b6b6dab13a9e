"""fastai: a Learner that is split into our groups trains each at its own rate, and the one-cycle keeps the ratios."""

import contextlib
import copy
import io
import re
import warnings
from functools import partial
from pathlib import Path

import nbformat
import pytest
import torch
from torch.utils.data import DataLoader

import layerlr_helpers
from layerlr_helpers import layer_decay, layer_groups
from layerlr_helpers.minilm import load_minilm
from layerlr_helpers.texts import text_set
from tests.integrations.small import batches, small

with warnings.catch_warnings(action="ignore"):  # it uses what torch is giving up
    import fastai.callback.schedule  # noqa: F401  gives Learner its fit_one_cycle
    from fastai.basics import DataLoaders, Learner, OptimWrapper

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.filterwarnings("ignore")  # those of the library are its affair


def test_each_group_has_its_rate_throughout_the_cycle(tmp_path):
    model = small()
    groups = layer_groups(model)
    rates = layer_decay(1e-2, 0.5)(groups)
    learner = Learner(DataLoaders(batches(), batches()), model, loss_func=torch.nn.CrossEntropyLoss(), path=tmp_path,
                      opt_func=partial(OptimWrapper, opt=torch.optim.AdamW),
                      splitter=lambda model: [list(group.params.values()) for group in groups])
    before = copy.deepcopy(model.state_dict())
    with learner.no_logging():
        learner.fit_one_cycle(2, lr_max=list(rates.values()))
    recorded = [hyper["lr"] for hyper in learner.opt.hypers]
    assert [lr / recorded[-1] for lr in recorded] == pytest.approx([lr / 1e-2 for lr in rates.values()])
    assert not any(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_block_of_the_notebook_on_transformers_gives_each_layer_its_rate():
    cells = nbformat.read(ROOT / "notebooks" / "06_transformers.ipynb", as_version=4).cells
    (block,) = re.findall(r"```python\n(.*?)```", "\n".join(cell.source for cell in cells if cell.id == "fastai"), re.DOTALL)
    words = ("sort", "plot", "graph", "tensor", "mean", "axis", "node", "root")
    data = text_set([f"{word} the values number {i}" for word in words for i in range(4)], [i // 4 for i in range(32)], words)
    names = {"torch": torch, "ll": layerlr_helpers, "load_minilm": load_minilm, "DataLoader": DataLoader, "train": data,
             "val": data, "cross_entropy": torch.nn.functional.cross_entropy}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(block.replace("fit_one_cycle(4,", "fit_one_cycle(1,"), names)
    rates = [hyper["lr"] for hyper in names["learner"].opt.hypers]
    assert [rate / rates[-1] for rate in rates] == pytest.approx([0.8 ** depth for depth in (7, 6, 5, 4, 3, 2, 1, 0)])
