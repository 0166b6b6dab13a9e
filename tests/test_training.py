import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from layerlr_helpers import (
    History,
    ProgressiveUnfreezing,
    UnfreezePlan,
    evaluate,
    fit,
    layer_groups,
    one_cycle,
    param_groups,
    preview,
    train_step,
    training,
    uniform,
)
from layerlr_helpers.training import fast_autocast
from tests.runs import BATCHES, EPOCHS, SCHEDULES, STEPS, Augmented, Net, Run, same

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def loop_by_hand(run, epochs):
    """What a course would write on the board."""
    rows = []
    for epoch in range(epochs):
        run.model.train()
        for inputs, labels in run.loader:
            rates = [group["lr"] for group in run.optimizer.param_groups]
            run.optimizer.zero_grad()
            logits = run.model(inputs)
            loss = F.cross_entropy(logits, labels)
            loss.backward()
            run.optimizer.step()
            run.schedule.step()
            rows.append((epoch, loss.item(), float((logits.argmax(1) == labels).float().mean()), rates))
    return rows


@pytest.mark.parametrize("loader", ["own generator", "global generator", "list"])
def test_fit_is_the_loop_that_one_writes_by_hand_bit_for_bit(loader):
    by_hand, by_fit = Run(loader=loader), Run(loader=loader)
    torch.manual_seed(5)
    expected = loop_by_hand(by_hand, EPOCHS)
    torch.manual_seed(5)
    history = fit(**by_fit.arguments | {"val_loader": None}, epochs=EPOCHS)
    assert same(by_hand.model.state_dict(), by_fit.model.state_dict())
    assert same(by_hand.optimizer.state_dict(), by_fit.optimizer.state_dict())
    assert [(r["epoch"], r["loss"], r["accuracy"], list(r["lr"].values())) for r in history.rows] == expected


def test_fit_learns():
    run = Run(schedule="none")
    before = evaluate(run.model, run.val)["loss"]
    history = fit(**run.arguments, epochs=4 * EPOCHS)
    assert evaluate(run.model, run.val)["loss"] < before
    frame = history.to_frame()
    assert frame["loss"].tail(10).mean() < frame["loss"].head(10).mean()


def test_the_history_is_a_table_of_steps():
    run = Run()
    frame = fit(**run.arguments, epochs=EPOCHS).to_frame()
    names = [group["name"] for group in run.optimizer.param_groups]
    assert list(frame) == ["step", "epoch", "loss", "accuracy", *(f"lr/{name}" for name in names), "val_loss", "val_accuracy"]
    assert frame["step"].tolist() == list(range(STEPS))
    assert frame["epoch"].tolist() == [epoch for epoch in range(EPOCHS) for _ in range(BATCHES)]
    validated = frame["val_loss"].notna()
    assert frame["step"][validated].tolist() == [BATCHES - 1, 2 * BATCHES - 1, 3 * BATCHES - 1]
    final = evaluate(run.model, run.val)
    assert frame["val_loss"].iloc[-1] == final["loss"]
    assert frame["val_accuracy"].iloc[-1] == final["accuracy"]


def test_an_empty_history_is_an_empty_table():
    assert History().to_frame().empty
    assert fit(**Run().arguments, steps=0).rows == []


@pytest.mark.parametrize("steps", [1, BATCHES - 1, BATCHES, BATCHES + 1, 2 * BATCHES + 3])
def test_steps_may_end_anywhere_and_the_last_one_is_validated(steps):
    run = Run()
    frame = fit(**run.arguments, steps=steps).to_frame()
    assert frame["step"].tolist() == list(range(steps))
    ends = sorted({*range(BATCHES, steps + 1, BATCHES), steps})
    assert (frame["step"][frame["val_loss"].notna()] + 1).tolist() == ends


def test_no_batch_is_drawn_that_is_not_trained_on():
    drawn = []

    class Counting(Augmented):
        def __getitem__(self, index):
            drawn.append(index)
            return super().__getitem__(index)

    run = Run()
    fit(**run.arguments | {"train_loader": DataLoader(Counting(), 4)}, steps=2)
    assert len(drawn) == 8


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name not in ("each epoch", "plateau", "none", "sequential")])
def test_the_rates_of_the_history_are_those_of_the_preview(name):
    run = Run(schedule=name)
    expected = preview(Run(schedule="none").optimizer, SCHEDULES[name], STEPS)
    frame = fit(**run.arguments, epochs=EPOCHS).to_frame()
    for group in expected:
        assert frame[f"lr/{group}"].tolist() == pytest.approx(expected[group].tolist(), rel=1e-9)


def test_a_schedule_by_the_epoch_moves_after_each_epoch():
    run = Run(schedule="each epoch")
    rates = fit(**run.arguments, epochs=EPOCHS).to_frame()["lr/head"]
    assert rates.tolist() == [0.05 * 0.5**epoch for epoch in range(EPOCHS) for _ in range(BATCHES)]


class Recorder(ReduceLROnPlateau):
    def step(self, metrics):
        self.seen = [*getattr(self, "seen", []), metrics]
        super().step(metrics)


@pytest.mark.parametrize("validate", [True, False])
def test_reduce_on_plateau_sees_the_validation_loss_or_else_the_mean_training_loss(validate):
    run = Run(schedule="none")
    schedule = Recorder(run.optimizer, patience=0, threshold=0.9)
    val = {} if validate else {"val_loader": None}
    frame = fit(**run.arguments | {"schedule": schedule} | val, epochs=EPOCHS).to_frame()
    by_epoch = frame.groupby("epoch")
    expected = frame["val_loss"].dropna() if validate else by_epoch["loss"].mean()
    assert schedule.seen == pytest.approx(expected.tolist())
    assert by_epoch["lr/head"].nunique().tolist() == [1] * EPOCHS
    assert by_epoch["lr/head"].first().tolist() == pytest.approx([0.05, 0.05, 0.005])  # nothing improves by nine tenths


def test_a_frozen_group_has_rate_0_in_the_history_and_does_not_move():
    run = Run(unfreezing="plan")
    before = copy.deepcopy(run.model.state_dict())
    rates = fit(**run.arguments, steps=7).to_frame()
    names = [group["name"] for group in run.optimizer.param_groups]
    for place, name in enumerate(reversed(names)):
        frozen = rates["step"] < 5 * place  # one group more every 5 steps, from the head
        assert (rates.loc[frozen, f"lr/{name}"] == 0).all()
        assert (rates.loc[~frozen, f"lr/{name}"] > 0).all()
    after = run.model.state_dict()
    assert torch.equal(before["body.0.weight"], after["body.0.weight"])
    assert not torch.equal(before["head.weight"], after["head.weight"])


def test_an_unfreezing_by_plateau_is_told_the_metrics_of_every_epoch():
    run = Run(unfreezing="plateau")
    frame = fit(**run.arguments, epochs=EPOCHS).to_frame()
    assert run.unfreezing.best == frame["val_loss"].iloc[BATCHES - 1]  # no later epoch improves by half a nat
    assert sorted(run.unfreezing.plan.first_steps.values())[:3] == [0, 2 * BATCHES, 3 * BATCHES]


class Keyworded(nn.Module):
    """Takes a dictionary and gives an object with logits, as the models of Hugging Face do."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, *, values, scale):
        return type("Output", (), {"logits": self.net(values * scale)})()


def test_inputs_may_be_dictionaries_and_outputs_objects_with_logits():
    plain, keyworded = Run(), Keyworded()
    keyworded.net.load_state_dict(plain.model.state_dict())
    batches = list(DataLoader(TensorDataset(plain.loader.dataset.x, plain.loader.dataset.y), 4))
    dictionaries = [({"values": x, "scale": torch.ones(())}, y) for x, y in batches]
    histories = []
    for model, loader in ((plain.model, batches), (keyworded, dictionaries)):
        torch.manual_seed(0)
        histories.append(fit(model, torch.optim.SGD(model.parameters(), 0.1), loader, epochs=2, val_loader=loader).rows)
    assert [row["val_loss"] for row in histories[0][BATCHES - 1::BATCHES]] \
        == [row["val_loss"] for row in histories[1][BATCHES - 1::BATCHES]]


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.full((6,), float(i)), i % 3) for i in range(10)])


def test_a_loader_without_a_length_takes_steps():
    run = Run()
    loader = DataLoader(Stream(), 4)
    frame = fit(**run.arguments | {"train_loader": loader}, steps=7).to_frame()
    assert frame["epoch"].tolist() == [0, 0, 0, 1, 1, 1, 2]
    with pytest.raises(ValueError, match="no length; pass steps"):
        fit(**run.arguments | {"train_loader": loader}, epochs=1)


def test_a_distributed_sampler_is_told_the_epoch_also_inside_a_batch_sampler():
    for nested in (False, True):
        told = []

        class Sampler(DistributedSampler):
            def set_epoch(self, epoch, told=told):
                told.append(epoch)
                super().set_epoch(epoch)

        data = Augmented()
        sampler = Sampler(data, num_replicas=2, rank=0)
        loader = DataLoader(data, batch_sampler=torch.utils.data.BatchSampler(sampler, 4, False)) if nested \
            else DataLoader(data, 4, sampler=sampler)
        fit(**Run().arguments | {"train_loader": loader}, epochs=3)
        assert told == [0, 1, 2]


@pytest.mark.parametrize("device", DEVICES)
def test_a_lower_precision_trains_and_leaves_the_weights_as_they_are(device):
    run = Run(schedule="none")
    run.model.to(device)
    history = fit(**run.arguments, epochs=10, autocast=torch.bfloat16)
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert {p.device.type for p in run.model.parameters()} == {device}
    assert history.rows[-1]["val_loss"] < history.rows[BATCHES - 1]["val_loss"]
    assert fast_autocast() in (None, torch.bfloat16)


@pytest.mark.parametrize(("progress", "variable", "visible"), [(True, "", True), (False, "", False), (True, "1", False)])
def test_the_bar_is_shown_as_asked(capfd, monkeypatch, progress, variable, visible):
    monkeypatch.setenv("TQDM_DISABLE", variable)
    monkeypatch.setattr(training, "tqdm", partial(training.tqdm, mininterval=0))  # else a fast run shows only its start
    fit(**Run().arguments | {"progress": progress}, epochs=1)
    shown = capfd.readouterr()
    assert ("4/4" in shown.err and "epoch 1, loss" in shown.err) == visible
    assert shown.out == ""


# What is refused, before anything has changed


def other_unfreezing(run):
    groups = layer_groups(Net(), torch.zeros(2, 6))
    return ProgressiveUnfreezing(groups, UnfreezePlan({groups[-1].name: 0}))


REFUSED = {
    "neither": (lambda run: {}, "exactly one of epochs and steps"),
    "both": (lambda run: {"epochs": 1, "steps": 1}, "exactly one of epochs and steps"),
    "negative": (lambda run: {"epochs": -1}, "0 or above; got epochs=-1"),
    "half a step": (lambda run: {"steps": 2.5}, "a whole number, 0 or above; got epochs=None, steps=2.5"),
    "when": (lambda run: {"epochs": 1, "schedule_every": "batch"}, "unknown schedule_every 'batch'; known are 'step', 'epoch'"),
    "other schedule": (lambda run: {"epochs": 1, "schedule": Run().schedule}, "a torch scheduler of the optimizer"),
    "a function": (lambda run: {"epochs": 1, "schedule": one_cycle}, "a torch scheduler of the optimizer"),
    "short schedule": (lambda run: {"epochs": EPOCHS + 1}, f"{STEPS} steps left and the run has {STEPS + BATCHES}"),
    "other optimizer": (lambda run: {"epochs": 1, "optimizer": Run().optimizer, "schedule": None}, "made for another model"),
    "other groups": (lambda run: {"epochs": 1, "unfreezing": other_unfreezing(run)}, "not in the optimizer"),
    "no metrics": (lambda run: {"epochs": 1, "unfreezing": Run(unfreezing="plateau").unfreezing, "val_loader": None},
                   "not in the optimizer"),
    "no batch": (lambda run: {"epochs": 1, "train_loader": []}, "train loader has no batch"),
    "dropped": (lambda run: {"steps": 1, "train_loader": DataLoader(Augmented(3), 4, drop_last=True)}, "has no batch"),
    "no file": (lambda run: {"epochs": 1, "checkpoint_every": 1}, "needs checkpoint="),
    "never": (lambda run: {"epochs": 1, "checkpoint_every": 0, "checkpoint": "x"}, "checkpoint_every=0 must be a whole number"),
}


@pytest.mark.parametrize(("change", "problem"), REFUSED.values(), ids=REFUSED)
def test_arguments_that_cannot_be_are_refused_before_anything_has_changed(change, problem):
    run = Run()
    run.model.eval()
    changes = change(run)
    before = copy.deepcopy(run.state())
    with pytest.raises(ValueError, match=problem):
        fit(**run.arguments | changes)
    assert same(run.state(), before)


def test_an_unfreezing_by_plateau_needs_a_val_loader():
    with pytest.raises(ValueError, match="PlateauUnfreezing decides by validation metrics; give fit a val_loader"):
        fit(**Run(unfreezing="plateau").arguments | {"val_loader": None}, epochs=1)


def test_a_folder_that_is_not_there_is_found_before_training(tmp_path):
    run = Run()
    before = copy.deepcopy(run.state())
    with pytest.raises(FileNotFoundError, match=r"no folder .*missing"):
        fit(**run.arguments, epochs=1, checkpoint=tmp_path / "missing" / "x.pt")
    assert same(run.state(), before)


def test_a_stream_that_has_run_dry_is_an_error_and_not_an_endless_loop():
    run = Run()
    batches = iter([(torch.randn(4, 6), torch.zeros(4, dtype=torch.long))] * 3)
    with pytest.raises(ValueError, match="the train loader gave no batch"):
        fit(**run.arguments | {"train_loader": batches}, steps=5)


def test_a_one_cycle_schedule_can_be_used_up_in_two_calls():
    run = Run()
    fit(**run.arguments, epochs=1)
    fit(**run.arguments, epochs=EPOCHS - 1)
    with pytest.raises(ValueError, match="has 0 steps left"):
        fit(**run.arguments, steps=1)


# A single step, and evaluation


def test_a_step_reports_the_batch_before_its_update():
    model = nn.Linear(6, 3)
    x, y = torch.randn(8, 6), torch.randint(3, (8,))
    loss, accuracy = F.cross_entropy(model(x), y), (model(x).argmax(1) == y).float().mean()
    by_hand = model.weight - 0.1 * torch.autograd.grad(loss, model.weight)[0]
    row = train_step(model, torch.optim.SGD(model.parameters(), 0.1), x, y)
    assert row == {"loss": pytest.approx(loss.item()), "accuracy": float(accuracy)}
    assert torch.allclose(model.weight, by_hand)


def test_a_loss_of_ones_own_is_used_throughout():
    run = Run(schedule="none")
    plain = evaluate(run.model, run.val)["loss"]
    assert evaluate(run.model, run.val, loss_fn=lambda a, b: 2 * F.cross_entropy(a, b))["loss"] == pytest.approx(2 * plain)
    history = fit(**run.arguments, steps=BATCHES, loss_fn=lambda a, b: F.cross_entropy(a, b) + 100)
    assert all(row["loss"] > 100 for row in history.rows)
    assert history.rows[-1]["val_loss"] > 100


@pytest.mark.parametrize("batch_size", [1, 3, 8, 14])
def test_evaluate_gives_the_mean_over_examples_whatever_the_batches(batch_size):
    run = Run()
    x, y = run.loader.dataset.x, run.loader.dataset.y
    run.model.eval()
    logits = run.model(x).detach()
    metrics = evaluate(run.model, DataLoader(TensorDataset(x, y), batch_size))
    assert metrics == {"loss": pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-5),
                       "accuracy": float((logits.argmax(1) == y).double().mean()), "n": 14}


def test_evaluate_leaves_every_mode_and_every_weight_as_it_was():
    run = Run()
    run.model.train()
    run.model.body[1].eval()  # as a learner does who freezes BatchNorm by hand
    before = copy.deepcopy(run.state())
    evaluate(run.model, [(torch.randn(4, 6), torch.zeros(4, dtype=torch.long))])
    del before["generator"]  # torch.randn took from it
    assert same({name: value for name, value in run.state().items() if name != "generator"}, before)
    assert all(p.grad is None for p in run.model.parameters())
    with pytest.raises(RuntimeError):
        evaluate(run.model, [(torch.randn(4, 7), torch.zeros(4, dtype=torch.long))])
    assert [module.training for module in run.model.modules()] == before["modes"]


def test_evaluate_counts_labels_where_each_pixel_has_one():
    model = nn.Conv2d(1, 2, 1)
    x, y = torch.randn(4, 1, 5, 5), torch.randint(2, (4, 5, 5))
    metrics = evaluate(model, [(x, y)])
    assert metrics["accuracy"] == pytest.approx(float((model(x).detach().argmax(1) == y).float().mean()))
    assert metrics["n"] == 4


def test_an_empty_loader_has_nothing_to_evaluate():
    with pytest.raises(ValueError, match="gave no batch"):
        evaluate(nn.Linear(2, 2), [])


@pytest.mark.parametrize("device", DEVICES)
def test_batches_go_to_where_the_model_is(device):
    run = Run(schedule="none")
    run.model.to(device)
    optimizer = torch.optim.AdamW(param_groups(layer_groups(run.model, torch.zeros(2, 6, device=device)), uniform(0.05)))
    fit(run.model, optimizer, run.loader, epochs=5, schedule=StepLR(optimizer, 10), progress=False)
    assert evaluate(run.model, run.val)["n"] == 4
    assert next(run.model.parameters()).device.type == device
