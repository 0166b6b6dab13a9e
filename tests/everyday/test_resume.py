"""Runs as people interrupt them: with any schedule they end where an unbroken one does, and a wrong place shows at once."""

import copy
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.optim import lr_scheduler

from layerlr_helpers import (
    ProgressiveUnfreezing,
    UnfreezePlan,
    fit,
    layer_decay,
    layer_groups,
    one_cycle,
    param_groups,
    slanted_triangular,
)
from tests.everyday.helpers import batches, equal, examples, mlp

sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def trained(steps, path=None, make_schedule=None, make_optimizer=sgd):
    """A model after so many steps of a run of 12, with shuffled batches and a plan, the same at each call."""
    torch.manual_seed(0)
    model = mlp()
    groups = layer_groups(model)
    optimizer = make_optimizer(param_groups(groups, layer_decay(0.1, 0.5)))
    fit(model, optimizer, batches(*examples(24), batch_size=4, shuffle=True), steps=steps, checkpoint=path, progress=False,
        schedule=make_schedule and make_schedule(optimizer),
        unfreezing=ProgressiveUnfreezing(groups, UnfreezePlan.top_down(groups, every=3)))
    return model


def one_after_the_other(optimizer):
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, 1, 3), lr_scheduler.ConstantLR(optimizer, 1, 99),
             lr_scheduler.CosineAnnealingLR(optimizer, 5)]
    return lr_scheduler.SequentialLR(optimizer, parts, [3, 7])


def all_at_once(optimizer):
    parts = [lr_scheduler.ConstantLR(optimizer, 0.5, 6), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return lr_scheduler.ChainedScheduler(parts)


SCHEDULES = {
    "with restarts": lambda optimizer: slanted_triangular(optimizer, 12, cut_frac=0.5, restarts=[6]),
    "linear one cycle": lambda optimizer: one_cycle(optimizer, 12, anneal_strategy="linear"),
    "steps": lambda optimizer: lr_scheduler.StepLR(optimizer, 6, 0.5),
    "milestones": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [3, 6, 10]),
    "exponential": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9),
    "triangles": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, 3),
    "warm restarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3, 2),
    "a function": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 0.9 ** step),
    "one after the other": one_after_the_other,
    "all at once": all_at_once,
}


@pytest.mark.parametrize("make_schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_schedule_that_was_made_anew_by_the_same_line_resumes_bit_for_bit(tmp_path, make_schedule):
    whole = trained(12, None, make_schedule)
    trained(4, tmp_path / "run.pt", make_schedule)
    assert equal(trained(12, tmp_path / "run.pt", make_schedule), whole)


class Lookahead:
    """A wrapper as one finds them: it shares the other optimizer's groups, and has a state_dict of a form of its own."""

    def __init__(self, params):
        self.base, self.steps = sgd(params), 0
        self.slow = [p.detach().clone() for p in self.params()]

    param_groups = property(lambda self: self.base.param_groups)
    state = property(lambda self: self.base.state)

    def params(self):
        return [p for group in self.base.param_groups for p in group["params"]]

    def zero_grad(self, set_to_none=True):
        self.base.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self):
        self.base.step()
        self.steps += 1
        if self.steps % 3 == 0:
            for slow, p in zip(self.slow, self.params(), strict=True):
                p.copy_(slow.lerp_(p, 0.5))

    def state_dict(self):
        return {"base": self.base.state_dict(), "slow": [slow.clone() for slow in self.slow], "steps": self.steps}

    def load_state_dict(self, state):
        self.base.load_state_dict(state["base"])
        self.slow, self.steps = [slow.clone() for slow in state["slow"]], state["steps"]


def test_a_wrapper_around_an_optimizer_resumes_bit_for_bit(tmp_path):
    whole = trained(10, make_optimizer=Lookahead)
    trained(4, tmp_path / "run.pt", make_optimizer=Lookahead)
    assert equal(trained(10, tmp_path / "run.pt", make_optimizer=Lookahead), whole)


# --- where the checkpoint is ------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "problem"), [("file/run.pt", "file"), ("folder", "folder"), ("link.pt", r"link\.pt"),
                                               ("x" * 300 + ".pt", "File name too long")])
def test_a_place_where_no_checkpoint_can_be_is_an_error_before_the_first_step(tmp_path, name, problem):
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.pt").symlink_to(tmp_path / "not mounted" / "run.pt")
    model = mlp()
    before = copy.deepcopy(model)
    with pytest.raises((OSError, ValueError), match=problem):
        fit(model, sgd(model.parameters()), [examples(4)], steps=3, checkpoint=tmp_path / name, progress=False)
    assert equal(model, before)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder", "link.pt"]
    assert not list((tmp_path / "folder").iterdir())


def test_a_run_resumes_through_a_link_to_another_disk_and_the_link_stays_one(tmp_path):
    (tmp_path / "disk").mkdir()
    real, link = tmp_path / "disk" / "real.pt", tmp_path / "run.pt"
    trained(2, real)
    link.symlink_to(real)
    assert equal(trained(6, link), trained(6))
    assert link.is_symlink()
    assert [entry.name for entry in (tmp_path / "disk").iterdir()] == ["real.pt"]
    assert equal(trained(8, real), trained(8))  # the file behind the link is the one of 6 steps


def test_a_run_resumes_in_a_folder_from_an_old_disk_whose_name_is_not_utf8(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/gr\xfc\xdfe"))
    folder.mkdir()
    trained(4, folder / "run.pt")
    assert equal(trained(6, folder / "run.pt"), trained(6))
