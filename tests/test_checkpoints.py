import copy
import math
import os
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from layerlr_helpers import ProgressiveUnfreezing, UnfreezePlan, checkpoints, fit, one_cycle
from layerlr_helpers.training import evaluate
from tests.runs import BATCHES, EPOCHS, LOADERS, SCHEDULES, STEPS, UNFREEZINGS, Augmented, Run, same


class Interrupted(Exception):
    """Stands for a lost connection, a full disk, a person at the keyboard."""


def interrupted_after(steps):
    """A loss that breaks the run off in the middle of step number ``steps``, counted from 0."""
    seen = []

    def loss(logits, labels):
        if torch.is_grad_enabled():  # not while validating
            if len(seen) == steps:
                raise Interrupted
            seen.append(1)
        return cross_entropy(logits, labels)

    return loss


def finish(path, kinds, *, epochs=EPOCHS, **arguments):
    """Start or resume the run in a process that has other random numbers, and take it to its end."""
    run = Run(**kinds)
    if path.exists():
        torch.manual_seed(random.randrange(2**40))
    history = fit(**run.arguments | arguments, epochs=epochs, checkpoint=path)
    return run, history


KINDS = st.fixed_dictionaries({"schedule": st.sampled_from(list(SCHEDULES)), "loader": st.sampled_from(list(LOADERS)),
                               "unfreezing": st.sampled_from(list(UNFREEZINGS))})


def uninterrupted(kinds):
    run = Run(**kinds)
    return run, fit(**run.arguments, epochs=EPOCHS)


@pytest.mark.slow
@settings(max_examples=20)
@given(kinds=KINDS, stops=st.lists(st.integers(0, STEPS - 1), min_size=1, max_size=3), every=st.none() | st.integers(1, 8))
def test_a_run_that_breaks_off_anywhere_goes_on_as_if_it_had_not(tmp_path_factory, kinds, stops, every):
    path = tmp_path_factory.mktemp("run") / "x.pt"
    expected, history = uninterrupted(kinds)
    for stop in stops:
        run = Run(**kinds)
        if path.exists():
            torch.manual_seed(stop)
        try:
            fit(**run.arguments, epochs=EPOCHS, checkpoint=path, checkpoint_every=every, loss_fn=interrupted_after(stop))
        except Interrupted:
            continue
    run, resumed = finish(path, kinds)
    assert same(run.model.state_dict(), expected.model.state_dict())
    assert same(run.optimizer.state_dict(), expected.optimizer.state_dict())
    if run.schedule is not None:
        assert same(run.schedule.state_dict(), expected.schedule.state_dict())
    assert resumed.rows == history.rows


@pytest.mark.slow
@settings(max_examples=20)
@given(kinds=KINDS, first=st.integers(1, STEPS))
def test_a_run_that_is_given_more_steps_goes_on_as_if_it_had_had_them(tmp_path_factory, kinds, first):
    path = tmp_path_factory.mktemp("run") / "x.pt"
    expected, history = uninterrupted(kinds)
    short = fit(**Run(**kinds).arguments, steps=first, checkpoint=path)
    assert "val_loss" in short.rows[-1]  # told to the caller, though no epoch ends here
    run, resumed = finish(path, kinds)
    assert same(run.model.state_dict(), expected.model.state_dict())
    assert resumed.rows == history.rows


def test_a_resumed_epoch_is_validated_at_its_end_with_what_was_learned_until_then(tmp_path):
    path = tmp_path / "x.pt"
    with pytest.raises(Interrupted):
        fit(**Run().arguments, epochs=2, checkpoint=path, checkpoint_every=4, loss_fn=interrupted_after(BATCHES + 3))
    run, history = finish(path, {}, epochs=2)
    frame = history.to_frame()
    assert frame["step"][frame["val_loss"].notna()].tolist() == [BATCHES - 1, 2 * BATCHES - 1]
    assert frame["val_loss"].iloc[-1] == evaluate(run.model, run.val)["loss"]


def test_a_finished_run_is_not_trained_again(tmp_path):
    path = tmp_path / "x.pt"
    run, history = finish(path, {})
    again, same_history = finish(path, {}, loss_fn=interrupted_after(0))
    assert same_history.rows == history.rows
    assert same(again.model.state_dict(), run.model.state_dict())


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_worker_processes_resume_too(tmp_path, workers):
    def started(arguments):
        loader = DataLoader(Augmented(), 4, shuffle=True, num_workers=workers)
        return arguments | {"train_loader": loader}

    whole, path = Run(), tmp_path / "x.pt"
    history = fit(**started(whole.arguments), epochs=2)
    with pytest.raises(Interrupted):
        fit(**started(Run().arguments), epochs=2, checkpoint=path, checkpoint_every=3, loss_fn=interrupted_after(4))
    resumed = Run(seed=1)
    assert fit(**started(resumed.arguments), epochs=2, checkpoint=path).rows == history.rows
    assert same(resumed.model.state_dict(), whole.model.state_dict())


@pytest.mark.parametrize("unfreezing", UNFREEZINGS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_call_that_is_interrupted_can_be_made_again_with_the_same_objects(tmp_path, schedule, unfreezing):
    """As in a notebook, where the schedule and the unfreezing have moved on by then."""
    kinds = {"schedule": schedule, "unfreezing": unfreezing}
    expected, history = uninterrupted(kinds)
    run = Run(**kinds)
    with pytest.raises(Interrupted):
        fit(**run.arguments, epochs=EPOCHS, checkpoint=tmp_path / "x.pt", loss_fn=interrupted_after(2 * BATCHES + 2))
    assert fit(**run.arguments, epochs=EPOCHS, checkpoint=tmp_path / "x.pt").rows == history.rows
    assert same(run.model.state_dict(), expected.model.state_dict())


def test_a_run_may_go_on_with_another_implementation_of_its_optimizer(tmp_path):
    fit(**Run().arguments, steps=3, checkpoint=tmp_path / "x.pt")
    run = Run(optimizer=lambda groups: torch.optim.AdamW(groups, foreach=False))
    assert len(fit(**run.arguments, steps=5, checkpoint=tmp_path / "x.pt").rows) == 5


def test_a_process_killed_while_saving_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    expected, history = uninterrupted({})
    fit(**Run().arguments, steps=BATCHES, checkpoint=path)
    before = path.read_bytes()

    def killed(*args):
        raise Interrupted

    def killed_half_way(content, file):
        file.write(b"PK half of it")
        raise Interrupted

    for module, name, replacement in ((os, "replace", killed), (torch, "save", killed_half_way)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, replacement)
            with pytest.raises(Interrupted):
                finish(path, {})
        assert path.read_bytes() == before
    run, resumed = finish(path, {})
    assert resumed.rows == history.rows
    assert same(run.model.state_dict(), expected.model.state_dict())
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.pt"]


def test_a_checkpoint_is_read_without_running_code(tmp_path):
    """Also with NumPy numbers as rates, which a safe reader would refuse."""
    path = tmp_path / "x.pt"
    run, _ = finish(path, {"schedule": "sequential", "unfreezing": "plateau"})
    assert "numpy" in str(type(run.optimizer.param_groups[0]["initial_lr"]))
    assert torch.load(path, weights_only=True)["state"]["step"] == STEPS


def test_a_state_that_could_not_be_read_back_is_refused_when_saving(tmp_path):
    run = Run()
    run.optimizer.param_groups[0]["home"] = tmp_path
    with pytest.raises(ValueError, match=r"cannot save to .*pathlib.*in its state_dict"):
        fit(**run.arguments, steps=1, checkpoint=tmp_path / "x.pt")
    assert not list(tmp_path.iterdir())


# What is refused, with nothing changed


def other_order(run):
    """The same tensors in the same groups, but in another order: moments would land on the wrong ones."""
    for group in run.optimizer.param_groups:
        group["params"].reverse()


OTHER_RUNS = {
    "another width": (lambda: Run(width=9), r"model was body\.0\.bias \(8,\); in this run it is body\.0\.bias \(9,\)"),
    "another optimizer": (lambda: Run(optimizer=torch.optim.RAdam), "type / optimizer was AdamW; in this run it is RAdam"),
    "another schedule": (lambda: Run(schedule="warmup_cosine"), "type / schedule was OneCycleLR; in this run it is LambdaLR"),
    "no schedule": (lambda: Run(schedule="none"), "type / schedule was OneCycleLR; in this run it is NoneType"),
    "another loader": (lambda: Run(loader="global generator"), "train loader / generators was 1; in this run it is 0"),
    "more data": (lambda: Run(n=30), "train loader / batches was 4; in this run it is 8"),
    "another unfreezing": (lambda: Run(unfreezing="plateau"),
                           "type / unfreezing was NoneType; in this run it is PlateauUnfreezing"),
}


@pytest.mark.parametrize(("other", "problem"), OTHER_RUNS.values(), ids=OTHER_RUNS)
def test_a_checkpoint_of_another_run_is_refused_and_changes_nothing(tmp_path, other, problem):
    path = tmp_path / "x.pt"
    fit(**Run().arguments, steps=3, checkpoint=path)
    run = other()
    before, file = copy.deepcopy(run.state()), path.read_bytes()
    with pytest.raises(ValueError, match=rf"cannot resume from .*x\.pt: .*{problem}"):
        fit(**run.arguments, epochs=1, checkpoint=path)
    assert same(run.state(), before)
    assert path.read_bytes() == file


OTHER_OPTIONS = {
    "rate": (lambda groups: torch.optim.AdamW([group | {"lr": group["lr"] / 100} for group in groups]),
             r"stem / lr was 0\.0125; in this run it is 0\.000125"),
    "rate of one group": (lambda groups: torch.optim.AdamW([*groups[:-1], groups[-1] | {"lr": 1e-6}]),
                          r"head / lr was 0\.05; in this run it is 1e-06"),
    "weight decay": (lambda groups: torch.optim.AdamW([group | {"weight_decay": 0.5} for group in groups]),
                     r"stem / weight_decay was 0\.01; in this run it is 0\.5"),
    "betas": (lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.5)),
              r"stem / betas was .*0\.999\S*; in this run it is .*0\.5"),
    "flag": (lambda groups: torch.optim.AdamW(groups, amsgrad=True), "stem / amsgrad was False; in this run it is True"),
}


@pytest.mark.parametrize("schedule", ["none", "one_cycle", "warmup_cosine", "plateau"])
@pytest.mark.parametrize(("optimizer", "problem"), OTHER_OPTIONS.values(), ids=OTHER_OPTIONS)
def test_options_other_than_those_that_the_run_began_with_are_refused(tmp_path, schedule, optimizer, problem):
    fit(**Run(schedule=schedule).arguments, steps=3, checkpoint=tmp_path / "x.pt")
    run = Run(schedule=schedule, optimizer=optimizer)
    before = copy.deepcopy(run.state())
    with pytest.raises(ValueError, match=f"cannot resume from .*options / {problem}"):
        fit(**run.arguments, epochs=EPOCHS, checkpoint=tmp_path / "x.pt")
    assert same(run.state(), before)


def test_the_options_of_the_beginning_are_known_after_a_resume_too(tmp_path):
    def with_momentum(momentum):
        return Run(schedule="none", optimizer=lambda groups: torch.optim.SGD(groups, momentum=momentum)).arguments

    for steps in (3, 5):
        fit(**with_momentum(0.0), steps=steps, checkpoint=tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"momentum was 0\.0; in this run it is 0\.9"):
        fit(**with_momentum(0.9), steps=7, checkpoint=tmp_path / "x.pt")


@pytest.mark.parametrize(("other", "problem"), [
    (lambda groups: ProgressiveUnfreezing(groups, UnfreezePlan.top_down(groups, every=6)),
     "was first step of stem 10; in this run it is first step of stem 12"),
    (lambda groups: ProgressiveUnfreezing(groups, UnfreezePlan.top_down(groups, every=5), batch_norm="train"),
     "was batch_norm freeze; in this run it is batch_norm train"),
    (lambda groups: None, "was first step of stem 10; in this run it is nothing"),
])
def test_layers_that_would_unfreeze_otherwise_are_refused(tmp_path, monkeypatch, other, problem):
    fit(**Run(unfreezing="plan").arguments, steps=3, checkpoint=tmp_path / "x.pt")
    monkeypatch.setitem(UNFREEZINGS, "other", other)
    with pytest.raises(ValueError, match=f"cannot resume from .*unfreezing {problem}"):
        fit(**Run(unfreezing="other").arguments, epochs=EPOCHS, checkpoint=tmp_path / "x.pt")


def test_parameters_in_another_order_are_refused(tmp_path):
    path = tmp_path / "x.pt"
    fit(**Run().arguments, steps=3, checkpoint=path)
    run = Run()
    other_order(run)
    with pytest.raises(ValueError, match=r"of another run, where parameter group was stem .*; in this run it is stem"):
        fit(**run.arguments, epochs=1, checkpoint=path)


def test_a_schedule_of_another_length_is_refused_before_training(tmp_path):
    path = tmp_path / "x.pt"
    fit(**Run().arguments, steps=3, checkpoint=path)
    run = Run()
    schedule = one_cycle(run.optimizer, 2 * STEPS)
    with pytest.raises(ValueError, match=f"schedule / total_steps was {STEPS}; in this run it is {2 * STEPS}"):
        fit(**run.arguments | {"schedule": schedule}, epochs=2 * EPOCHS, checkpoint=path)


def test_a_run_that_asks_for_less_than_was_done_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    fit(**Run().arguments, steps=5, checkpoint=path)
    with pytest.raises(ValueError, match="at step 5, further than the 4 steps"):
        fit(**Run().arguments, steps=4, checkpoint=path)


@pytest.mark.slow
@settings(max_examples=20)
@given(data=st.data())
def test_a_damaged_checkpoint_is_refused_or_does_no_harm(tmp_path_factory, data):
    """One byte may be one that nothing depends on, as in a name or in padding; then the run ends as it should."""
    path = tmp_path_factory.mktemp("run") / "x.pt"
    fit(**Run().arguments, steps=4, checkpoint=path)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans(), label="truncate"):
        content = content[:data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    run = Run()
    before = copy.deepcopy(run.state())
    try:
        history = fit(**run.arguments, epochs=1, checkpoint=path).rows
    except ValueError as error:
        assert "move it away to start anew" in str(error)  # noqa: PT017 (it need not be raised)
        assert same(run.state(), before)
    else:
        assert history == fit(**Run().arguments, epochs=1).rows


def test_a_weight_that_was_changed_in_the_file_is_noticed(tmp_path):
    """torch.load itself does not notice."""
    path, first = tmp_path / "x.pt", Run()
    fit(**first.arguments, steps=4, checkpoint=path)
    content = bytearray(path.read_bytes())
    content[content.find(first.model.head.weight.detach().numpy().tobytes())] ^= 1
    path.write_bytes(content)
    run = Run()
    before = copy.deepcopy(run.state())
    with pytest.raises(ValueError, match="not as it was written"):
        fit(**run.arguments, epochs=1, checkpoint=path)
    assert same(run.state(), before)


@pytest.mark.parametrize("content", [[1, 2], {"model": {}}, {"format": 1}])
def test_a_file_that_is_no_checkpoint_of_fit_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="not written by this version of fit; move it away"):
        fit(**Run().arguments, epochs=1, checkpoint=tmp_path / "x.pt")


# What cannot be resumed is refused before it is trained, and what can is resumed bit for bit


OTHER_SCHEDULES = {
    "eta_min": (lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS), lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS, 0.01),
                r"schedule / eta_min was 0\.0; in this run it is 0\.01"),
    "within": (lambda o: warmup_and_cosine(o, 6), lambda o: warmup_and_cosine(o, STEPS),
               "schedule / _schedulers / 1 / T_max was 6; in this run it is 12"),
    "function": (lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9 ** step),
                 lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.5 ** step),
                 r"schedule / lr_lambdas / 0 was 0\.9 at step 1; in this run it is 0\.5 at step 1"),
    "plateau": (lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=3), lambda o: lr_scheduler.ReduceLROnPlateau(o),
                "schedule / patience was 3; in this run it is 10"),
}


def warmup_and_cosine(optimizer, steps):
    return lr_scheduler.SequentialLR(optimizer, [lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 2),
                                                 lr_scheduler.CosineAnnealingLR(optimizer, steps)], [2])


@pytest.mark.parametrize(("first", "second", "problem"), OTHER_SCHEDULES.values(), ids=OTHER_SCHEDULES)
def test_a_schedule_with_another_setting_is_refused_and_changes_nothing(tmp_path, first, second, problem):
    def scheduled(run, make):
        return run.arguments | {"schedule": make(run.optimizer)}

    fit(**scheduled(Run(schedule="none"), first), epochs=1, checkpoint=tmp_path / "x.pt")
    run = Run(schedule="none")
    arguments = scheduled(run, second)
    before = copy.deepcopy(run.state())
    with pytest.raises(ValueError, match=f"cannot resume from .*{problem}; move it away to start anew"):
        fit(**arguments, epochs=EPOCHS, checkpoint=tmp_path / "x.pt")
    assert same(run.state(), before)
    same_again = scheduled(Run(schedule="none"), first)
    assert len(fit(**same_again, epochs=EPOCHS, checkpoint=tmp_path / "x.pt").rows) == STEPS


def test_a_model_in_another_precision_is_refused(tmp_path):
    fit(**Run().arguments, steps=3, checkpoint=tmp_path / "x.pt")
    run = Run()
    run.model.double()
    with pytest.raises(ValueError, match=r"precision / body\.0\.weight was torch\.float32; in this run it is torch\.float64"):
        fit(**run.arguments, epochs=1, checkpoint=tmp_path / "x.pt")


@pytest.mark.parametrize(("options", "problem"), [
    ({"num_workers": 1, "persistent_workers": True}, "persistent_workers=False: workers that live on"),
    ({"num_workers": 2, "in_order": False}, "in_order=True: otherwise batches come as the workers finish them")])
def test_a_loader_whose_batches_could_not_come_again_is_refused_before_training(tmp_path, options, problem):
    run = Run()
    run.loader = DataLoader(Augmented(), 4, shuffle=True, **options)
    before = copy.deepcopy(run.state())
    with pytest.raises(ValueError, match=f"a run with a checkpoint needs a DataLoader with {problem}"):
        fit(**run.arguments, epochs=2, checkpoint=tmp_path / "x.pt")
    assert same(run.state(), before)
    assert not list(tmp_path.iterdir())


class ForgetsItsAverages(torch.optim.SGD):
    """Averages the weights, and leaves the averages out of its state_dict()."""

    def step(self):
        super().step()
        params = [p for group in self.param_groups for p in group["params"]]
        self.averages = [(average + p.detach()) / 2
                         for average, p in zip(getattr(self, "averages", params), params, strict=True)]


def test_an_optimizer_with_more_state_than_it_gives_away_is_refused_when_it_is_saved(tmp_path):
    path = tmp_path / "x.pt"
    with pytest.raises(ValueError, match=r"cannot save to .*x\.pt: .* ForgetsItsAverages does not hold its averages / 0"):
        fit(**Run(schedule="none", optimizer=ForgetsItsAverages).arguments, epochs=EPOCHS, checkpoint=path)
    assert not path.with_name("x.pt.tmp").exists()
    assert len(fit(**Run(schedule="none", optimizer=ForgetsItsAverages).arguments, epochs=1).rows) == BATCHES


class SingleMomentum(torch.optim.Optimizer):
    """Keeps weights and momentum in single precision, whatever precision the parameters have."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state |= {"weights": p.detach().float().clone(), "momentum": torch.zeros_like(p, dtype=torch.float32)}
                state["momentum"].mul_(0.9).add_(p.grad.float())
                p.copy_(state["weights"].sub_(group["lr"] * state["momentum"]))


def test_a_state_of_another_precision_than_the_parameters_resumes_bit_for_bit(tmp_path):
    def half(seed=0):
        run = Run(seed=seed, optimizer=SingleMomentum)
        run.model.bfloat16()
        cast = [(inputs.bfloat16(), labels) for inputs, labels in LOADERS["list"](Augmented())]
        return run, run.arguments | {"train_loader": cast, "val_loader": None}

    whole, arguments = half()
    history = fit(**arguments, epochs=EPOCHS)
    fit(**half()[1], steps=5, checkpoint=tmp_path / "x.pt")
    resumed, arguments = half(seed=1)
    assert fit(**arguments, epochs=EPOCHS, checkpoint=tmp_path / "x.pt").rows == history.rows
    assert same(resumed.model.state_dict(), whole.model.state_dict())
    assert same(resumed.optimizer.state_dict(), whole.optimizer.state_dict())


class Shaken(Augmented):
    """Examples with noise from Python's and NumPy's generators, as many augmentations have it."""

    def __getitem__(self, index):
        inputs, label = super().__getitem__(index)
        return inputs + 0.1 * random.random() + 0.1 * np.random.rand(), label  # noqa: NPY002


def test_augmentations_with_random_numbers_of_python_and_numpy_resume_too(tmp_path):
    def arguments():
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002
        return Run().arguments | {"train_loader": DataLoader(Shaken(), 4, shuffle=True)}

    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    history = fit(**arguments(), epochs=2)
    with pytest.raises(Interrupted):
        fit(**arguments(), epochs=2, checkpoint=tmp_path / "x.pt", checkpoint_every=3, loss_fn=interrupted_after(5))
    rows = fit(**arguments(), epochs=2, checkpoint=tmp_path / "x.pt").rows
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    assert rows == history.rows


class Modal(torch.optim.SGD):
    """Trains other weights than those that one will use, and keeps which ones the model has to itself."""

    training = False

    def train(self):
        self._switch(True)

    def eval(self):
        self._switch(False)

    @torch.no_grad()
    def _switch(self, training):
        if self.training is not training:
            for p in (p for group in self.param_groups for p in group["params"]):
                self.state[p].setdefault("other", p.detach().clone())
                self.state[p]["other"], values = p.detach().clone(), self.state[p]["other"]
                p.copy_(values)
        self.training = training


def test_an_optimizer_with_modes_of_its_own_resumes_in_the_mode_that_it_was_saved_in(tmp_path):
    whole = Run(schedule="none", optimizer=Modal)
    history = fit(**whole.arguments, epochs=EPOCHS)
    fit(**Run(schedule="none", optimizer=Modal).arguments, steps=5, checkpoint=tmp_path / "x.pt")
    resumed = Run(seed=1, schedule="none", optimizer=Modal)
    assert fit(**resumed.arguments, epochs=EPOCHS, checkpoint=tmp_path / "x.pt").rows == history.rows
    assert same(resumed.model.state_dict(), whole.model.state_dict())


@pytest.mark.parametrize("best", [None, 0.5, math.nan, -math.inf])
def test_what_an_unfreezing_remembers_comes_back_also_if_it_is_not_a_number(tmp_path, best):
    path = tmp_path / "x.pt"
    runs = [Run(schedule="none", unfreezing="plateau") for _ in range(2)]
    parts, parts_of_another = ({"model": run.model, "optimizer": run.optimizer, "schedule": None, "unfreezing": run.unfreezing}
                               for run in runs)
    runs[0].unfreezing.best, runs[0].unfreezing.waited = best, 3
    description = checkpoints.run_description(parts, [0], runs[0].unfreezing)
    checkpoints.save(path, parts, [], checkpoints.RunState(), [0], description)
    checkpoints.load(path, parts_of_another, [0], description, steps=1, epochs=None)
    assert repr(runs[1].unfreezing.state_dict()) == repr(runs[0].unfreezing.state_dict())


def test_a_file_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def full(file):
        raise OSError(28, "No space left on device")

    path = tmp_path / "x.pt"
    fit(**Run().arguments, steps=2, checkpoint=path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*x\.pt: No space left on device"):
        fit(**Run().arguments, epochs=EPOCHS, checkpoint=path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.pt"]


def test_further_settings_are_compared_too(tmp_path):
    run = Run()
    parts = {"model": run.model, "optimizer": run.optimizer, "schedule": run.schedule, "unfreezing": None}
    before, now = (checkpoints.run_description(parts, run.loader, settings={"clip": clip}) for clip in (None, 1.0))
    checkpoints.save(tmp_path / "x.pt", parts, [], checkpoints.RunState(), run.loader, before)
    with pytest.raises(ValueError, match=r"settings / clip was None; in this run it is 1\.0"):
        checkpoints.load(tmp_path / "x.pt", parts, run.loader, now, steps=1, epochs=None)


def test_what_cannot_be_saved_is_found_before_the_first_step(tmp_path, monkeypatch):
    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    run = Run()
    weights = copy.deepcopy(run.model.state_dict())
    with pytest.raises(OSError, match=r"cannot write .*x\.pt: No space left on device"):
        fit(**run.arguments, epochs=EPOCHS, checkpoint=tmp_path / "x.pt")
    assert same(run.model.state_dict(), weights)
