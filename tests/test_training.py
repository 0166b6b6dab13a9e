import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from layerlr_helpers import (
    DivergedError,
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


# Tasks other than one class an example


class Tokens(nn.Module):
    """Logits for each token of a sequence, with the classes in the dimension ``classes``."""

    def __init__(self, classes=1):
        super().__init__()
        self.table, self.classes = nn.Embedding(5, 4), classes

    def forward(self, tokens):
        return self.table(tokens).movedim(-1, self.classes)


class OwnLoss(nn.Module):
    """Takes keywords and returns its own loss beside the logits, as the models of several libraries do."""

    def __init__(self, shift=0):
        super().__init__()
        self.net, self.shift = Tokens(classes=-1), shift

    def forward(self, tokens, labels=None):
        logits = self.net(tokens)
        if labels is None:
            return {"logits": logits}
        places = logits.shape[1] - self.shift
        return {"loss": F.cross_entropy(logits[:, :places].flatten(0, 1), labels[:, self.shift:].flatten()), "logits": logits}


def tagged(n, seed=0, unlabelled=0.4):
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = torch.randint(5, (n, 6), generator=generator), torch.randint(4, (n, 6), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < unlabelled] = -100
    return tokens, labels


def numbers(n, columns):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 6, generator=generator), torch.rand(n, columns, generator=generator)


def as_dictionaries(tokens, labels):
    return {"tokens": tokens, "labels": labels}


X, SOFT = numbers(9, 3)
TOKENS, TAGS = tagged(9)
KINDS = torch.arange(9) % 3
TASKS = {  # name: model, inputs, labels, loss_fn, the form of a batch, is there an accuracy?
    "classes": (lambda: nn.Linear(6, 3), X, KINDS, None, None, True),
    "class weights": (lambda: nn.Linear(6, 3), X, KINDS, nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.2])), None, True),
    "summed": (lambda: nn.Linear(6, 3), X, KINDS, nn.CrossEntropyLoss(reduction="sum"), None, True),
    "soft labels": (lambda: nn.Linear(6, 3), X, SOFT, None, None, False),
    "many labels": (lambda: nn.Linear(6, 3), X, SOFT.round(), F.binary_cross_entropy_with_logits, None, False),
    "yes or no": (lambda: nn.Linear(6, 1), X, SOFT[:, :1].round(), nn.BCEWithLogitsLoss(), None, True),
    "yes or no, whole numbers": (lambda: nn.Linear(6, 1), X, KINDS % 2, nn.BCEWithLogitsLoss(), None, True),
    "regression": (lambda: nn.Linear(6, 1), X, SOFT[:, 0], F.mse_loss, None, False),
    "tokens": (Tokens, TOKENS, TAGS, None, None, True),
    "tokens, classes last": (lambda: Tokens(-1), TOKENS, TAGS, None, None, True),
    "tokens, a loss of one's own": (lambda: Tokens(-1), TOKENS, TAGS,
                                    lambda o, y: F.cross_entropy(o.flatten(0, 1), y.flatten()), None, True),
    "the model's own loss": (OwnLoss, TOKENS, TAGS, None, as_dictionaries, True),
    "a language model's": (lambda: OwnLoss(shift=1), TOKENS, TAGS, None, as_dictionaries, True)}


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("sizes", [(3, 1, 5), (4, 4, 1)], ids=str)
def test_every_task_has_the_same_step_and_scores_from_small_batches_as_from_a_large_one(task, sizes):
    make, inputs, labels, loss_fn, form, has_accuracy = task
    batches = [(form or (lambda *pair: pair))(*part)
               for part in zip(inputs.split(sizes), labels.split(sizes), strict=True)]
    whole = [(form or (lambda *pair: pair))(inputs, labels)]
    torch.manual_seed(0)
    first, scores, rows = make(), [], []
    for loader in (batches, whole):
        model = copy.deepcopy(first)
        history = fit(model, torch.optim.SGD(model.parameters(), 0.1), loader, steps=1, accumulate=len(loader), loss_fn=loss_fn,
                      val_loader=loader, progress=False)
        rows.append({name: value for name, value in history.rows[0].items() if name != "lr"})
        scores.append({**evaluate(model, loader, loss_fn=loss_fn), "weights": [p.tolist() for p in model.parameters()]})
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rows[0], rows[1], rtol=1e-5, atol=1e-6)
    assert ("accuracy" in rows[0]) == ("val_accuracy" in rows[0]) == ("accuracy" in scores[0]) == has_accuracy
    assert scores[0]["n"] == 9


@settings(max_examples=60)
@given(outputs=st.sampled_from([(4, 3), (4, 3, 2), (4, 2, 3), (4, 3, 3), (4, 1), (4,), (3, 3)]),
       labels=st.sampled_from([(4,), (4, 1), (4, 2), (4, 3), (3,), (3, 3)]), whole=st.booleans(), ignored=st.booleans(),
       loss_fn=st.sampled_from([None, F.binary_cross_entropy_with_logits, F.mse_loss, lambda o, y: o.mean()]))
def test_an_accuracy_is_between_0_and_1_or_there_is_none(outputs, labels, whole, ignored, loss_fn):
    class Fixed(nn.Linear):
        def forward(self, x):
            return torch.randn(outputs)

    y = torch.randint(3, labels) if whole else torch.rand(labels)
    if ignored:
        y.view(-1)[0] = -100
    try:
        scores = evaluate(Fixed(1, 1), [(torch.zeros(len(y), 1), y)] * 2, loss_fn=loss_fn)
    except (RuntimeError, ValueError, IndexError, UserWarning):  # no such loss is defined for these shapes
        return
    assert 0 <= scores.get("accuracy", 0.5) <= 1


def test_several_inputs_are_taken_from_a_loader_of_pairs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 2)

        def forward(self, a, b):
            return self.fc(torch.cat([a, b], 1))

    data = [((torch.randn(4), torch.randn(4)), i % 2) for i in range(6)]
    model = Two()
    history = fit(model, torch.optim.SGD(model.parameters(), 0.1), DataLoader(data, 3), epochs=2, progress=False)
    assert len(history.rows) == 4
    assert evaluate(model, DataLoader(data, 4))["n"] == 6


@pytest.mark.parametrize("batch", [(X, KINDS, KINDS), {"input": X, "mask": X, "labels": KINDS}, {"input": X}, X, "text"],
                         ids=["three", "unknown key", "no labels", "tensor", "text"])
def test_a_batch_that_fit_cannot_take_is_an_error_before_a_weight_moves(batch):
    model = nn.Linear(6, 3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"a batch is|the batch has mask"):
        fit(model, torch.optim.SGD(model.parameters(), 0.1), [batch], epochs=1, progress=False)
    assert same(model.state_dict(), before)


def test_metrics_are_in_place_of_the_accuracy_and_are_seen_wherever_it_is(capfd, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "")
    monkeypatch.setattr(training, "tqdm", partial(training.tqdm, mininterval=0))
    model = nn.Linear(6, 1)
    loader = DataLoader(TensorDataset(X, SOFT[:, :1]), 4)

    def error(outputs, labels):
        return (outputs - labels).abs().mean()

    history = fit(model, torch.optim.SGD(model.parameters(), 0.1), loader, epochs=2, loss_fn=F.mse_loss, val_loader=loader,
                  metrics={"error": error})
    assert list(history.to_frame()) == ["step", "epoch", "loss", "error", "lr/group 0", "val_loss", "val_error"]
    assert history.rows[-1]["val_error"] == pytest.approx(float(error(model(X), SOFT[:, :1]).detach()))
    assert list(evaluate(model, loader, loss_fn=F.mse_loss, metrics={})) == ["loss", "n"]
    assert "epoch 2, loss" in (bar := capfd.readouterr().err)
    assert ", error 0." in bar


# Steps of several batches, and of one that is too steep


@pytest.mark.parametrize("every", [2, 3, 5])
def test_steps_of_several_batches_count_as_one_for_schedules_plans_and_checkpoints(tmp_path, every):
    def run(**arguments):
        made = Run(unfreezing="plan", n=50)
        schedule = one_cycle(made.optimizer, EPOCHS * -(-13 // every))
        return made, made.arguments | {"schedule": schedule, "accumulate": every} | arguments

    whole, arguments = run()
    history = fit(**arguments, epochs=EPOCHS)
    steps = -(-len(whole.loader) // every)
    assert [row["epoch"] for row in history.rows] == [epoch for epoch in range(EPOCHS) for _ in range(steps)]
    assert history.to_frame()["lr/stem"].gt(0).idxmax() == min(10, len(history.rows)) or len(history.rows) <= 10
    calls = []

    def interrupted(logits, labels):
        calls.append(1)
        if len(calls) == len(whole.loader) + every + 1:
            raise KeyboardInterrupt
        return F.cross_entropy(logits, labels)

    with pytest.raises(KeyboardInterrupt):
        fit(**run(loss_fn=interrupted, val_loader=None)[1], epochs=EPOCHS, checkpoint=tmp_path / "x.pt", checkpoint_every=1)
    resumed, arguments = run(val_loader=None)
    resumed_rows = fit(**arguments, epochs=EPOCHS, checkpoint=tmp_path / "x.pt").rows
    unbroken, arguments = run(val_loader=None)
    assert resumed_rows == fit(**arguments, epochs=EPOCHS).rows
    assert same(resumed.model.state_dict(), unbroken.model.state_dict())


@pytest.mark.parametrize("changes", [{"accumulate": 2}, {"clip_grad_norm": 1.0}])
def test_a_run_with_other_steps_does_not_resume(tmp_path, changes):
    fit(**Run().arguments, steps=2, checkpoint=tmp_path / "x.pt")
    with pytest.raises(ValueError, match=f"where settings / {next(iter(changes))} was"):
        fit(**Run().arguments | changes, steps=4, checkpoint=tmp_path / "x.pt")


def test_a_long_gradient_is_scaled_down_to_its_largest_norm():
    models = [nn.Linear(6, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    batch = (100 * X, KINDS)
    for model, clip in zip(models, (None, 0.5), strict=True):
        fit(model, torch.optim.SGD(model.parameters(), 1.0), [batch], steps=1, clip_grad_norm=clip, progress=False)
    gradients = [torch.cat([p.grad.flatten() for p in model.parameters()]) for model in models]
    assert gradients[0].norm() > 1
    torch.testing.assert_close(gradients[1], gradients[0] * 0.5 / gradients[0].norm())


def test_a_batch_without_a_label_that_counts_teaches_nothing_and_stops_nothing():
    torch.manual_seed(0)
    model = Tokens()
    before, nothing = copy.deepcopy(model.state_dict()), (TOKENS, torch.full_like(TAGS, -100))
    history = fit(model, torch.optim.SGD(model.parameters(), 0.1), [nothing], epochs=1, progress=False)
    assert same(model.state_dict(), before)
    assert history.to_frame()["loss"].isna().all()
    with_it, without = (copy.deepcopy(model) for _ in range(2))
    for each, loader in ((with_it, [(TOKENS, TAGS), nothing]), (without, [(TOKENS, TAGS)])):
        fit(each, torch.optim.SGD(each.parameters(), 0.1), loader, epochs=1, accumulate=2, progress=False)
    assert same(with_it.state_dict(), without.state_dict())
    with pytest.raises(ValueError, match="no label that counts"):
        evaluate(model, [nothing])


@pytest.mark.parametrize("found", ["loss", "gradient", "validation", "weight"])
def test_a_run_that_diverges_stops_with_its_history_and_keeps_the_last_good_checkpoint(tmp_path, found):
    run, calls = Run(schedule="none"), []

    def breaks(logits, labels):
        calls.append(logits.requires_grad)
        loss = F.cross_entropy(logits, labels)
        if calls.count(True) < 2 * BATCHES or found == "weight" or (found == "validation") == logits.requires_grad:
            return loss
        return loss + (0 * logits).abs().sqrt().sum() if found == "gradient" else loss * float("nan")

    arguments = run.arguments | {"loss_fn": breaks, "val_loader": None if found == "weight" else run.val}
    if found == "gradient":
        arguments["clip_grad_norm"] = 1.0
    if found == "weight":  # the loss is still finite, and then the step is too large
        step = run.optimizer.step
        run.optimizer.step = lambda: (step(), run.model.head.bias.data.fill_(1.0 if len(calls) < 2 * BATCHES else float("inf")))
    path = tmp_path / "x.pt"
    with pytest.raises(DivergedError, match=r"(nan|inf) at step \d, with the rates stem .*, head 0.05\. Training") as error:
        fit(**arguments, epochs=EPOCHS, checkpoint=path)
    steps = 2 * BATCHES - (found in ("loss", "gradient"))
    assert error.value.step == len(error.value.history.rows) == steps
    assert list(error.value.rates) == list(error.value.history.rows[-1]["lr"])
    saved = torch.load(path, weights_only=True)
    assert saved["state"]["epoch"] == 1
    assert all(value.isfinite().all() for value in saved["parts"]["model"].values())


def test_the_weights_are_those_before_the_step_that_failed():
    model = nn.Linear(6, 3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DivergedError, match=r"the loss is nan, with the rates group 0 0\.1"):
        train_step(model, torch.optim.SGD(model.parameters(), 0.1), X * float("nan"), KINDS)
    assert same(model.state_dict(), before)


# Optimizers and loaders that are not what they seem


class Averaging(torch.optim.SGD):
    """Trains fast weights, and shows their mean in eval mode, as schedule-free optimizers do."""

    def __init__(self, params):
        super().__init__(params, 0.5)
        for group in self.param_groups:
            group["training"], group["steps"] = False, 0

    def swap(self, training):
        for group in self.param_groups:
            if group["training"] != training:
                for p in group["params"]:
                    if "other" in self.state[p]:
                        other = self.state[p]["other"]
                        self.state[p]["other"] = p.detach().clone()
                        p.data.copy_(other)
            group["training"] = training

    def train(self):
        self.swap(True)

    def eval(self):
        self.swap(False)

    def step(self, closure=None):
        assert all(group["training"] for group in self.param_groups)
        super().step(closure)
        for group in self.param_groups:
            group["steps"] += 1
            for p in group["params"]:
                mean = self.state[p].get("other", torch.zeros_like(p))
                self.state[p]["other"] = mean + (p.detach() - mean) / group["steps"]


def test_an_optimizer_with_modes_trains_in_one_and_is_judged_and_left_in_the_other():
    torch.manual_seed(0)
    model, loader = nn.Linear(6, 3), [(X[:5], KINDS[:5]), (X[5:], KINDS[5:])]
    optimizer = Averaging(model.parameters())
    history = fit(model, optimizer, loader, epochs=3, val_loader=loader, progress=False)
    assert not optimizer.param_groups[0]["training"]
    assert history.rows[-1]["val_loss"] == evaluate(model, loader)["loss"]
    steps = fit(model, optimizer, loader, steps=1, val_loader=loader, progress=False)  # ends within an epoch
    assert steps.rows[-1]["val_loss"] == evaluate(model, loader)["loss"]
    optimizer.train()
    assert steps.rows[-1]["val_loss"] != evaluate(model, loader)["loss"]


def test_an_optimizer_with_modes_resumes_exactly(tmp_path):
    def run(**arguments):
        torch.manual_seed(0)
        model, loader = nn.Linear(6, 3), [(X[:5], KINDS[:5]), (X[5:], KINDS[5:])]
        optimizer = Averaging(model.parameters())
        rows = fit(model, optimizer, loader, val_loader=loader, progress=False, **arguments).rows
        return rows, model.state_dict(), optimizer.state_dict()

    run(epochs=2, checkpoint=tmp_path / "x.pt")
    assert same(run(epochs=4, checkpoint=tmp_path / "x.pt"), run(epochs=4))
    assert same(run(epochs=4, checkpoint=tmp_path / "x.pt"), run(epochs=4))  # a run that is done already


class Mistaken:
    """A loader that gives another number of batches than it says."""

    def __init__(self, says, gives):
        self.says, self.gives = says, gives

    def __len__(self):
        return self.says

    def __iter__(self):
        return iter([(X, KINDS)] * self.gives)


@pytest.mark.parametrize("gives", [2, 6])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_loader_that_gives_more_or_fewer_batches_than_it_said_has_the_epochs_that_were_asked_for(tmp_path, gives, accumulate):
    def run(**arguments):
        model = nn.Linear(6, 3)
        return fit(model, torch.optim.SGD(model.parameters(), 0.1), Mistaken(4, gives), val_loader=[(X, KINDS)], progress=False,
                   accumulate=accumulate, **arguments).to_frame()

    each = -(-gives // accumulate)
    frame = run(epochs=3, checkpoint=tmp_path / "x.pt")
    assert frame["epoch"].tolist() == [epoch for epoch in range(3) for _ in range(each)]
    assert frame["val_loss"].notna().sum() == 3
    assert len(run(epochs=4, checkpoint=tmp_path / "x.pt")) == 4 * each
    for steps in range(1, 9):
        frame = run(steps=steps)
        assert frame["epoch"].tolist() == [step // each for step in range(steps)]
        assert frame["val_loss"].notna().iloc[-1]


def test_a_schedule_that_was_made_for_a_mistaken_length_is_warned_of():
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(UserWarning, match="said that it has 4 batches and gave 3.*give fit steps in place of epochs"):
        fit(model, optimizer, Mistaken(4, 3), epochs=1, schedule=one_cycle(optimizer, 4), progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_is_compiled_for_each_step_of_a_plan(in_place):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(12)])
    groups = layer_groups(model)
    optimizer = torch.optim.SGD(param_groups(groups, uniform(0.01)))
    compiled = model if in_place else torch.compile(model, backend="eager")
    if in_place:
        model.compile(backend="eager")
    limit = 8  # torch's own; timm raises it to a million
    with torch._dynamo.config.patch(recompile_limit=limit):
        fit(compiled, optimizer, [(X, KINDS)], steps=len(groups), val_loader=[(X, KINDS)], progress=False,
            unfreezing=ProgressiveUnfreezing(groups, UnfreezePlan.top_down(groups, every=1)))
        assert len(groups) > limit == torch._dynamo.config.recompile_limit
    assert not torch._dynamo.utils.counters["unimplemented"]
