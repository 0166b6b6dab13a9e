"""``fit`` and ``evaluate`` on the batches, tasks and loaders of everyday projects equal the loop that one writes by hand."""

import copy
import math
from collections import UserDict, namedtuple
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from layerlr_helpers import (
    PlateauUnfreezing,
    ProgressiveUnfreezing,
    UnfreezePlan,
    describe,
    evaluate,
    fit,
    layer_decay,
    layer_groups,
    one_cycle,
    param_groups,
    uniform,
)
from tests.everyday.helpers import Model, batches, by_hand, examples, mlp

run = partial(fit, progress=False)


def assert_same(model, other, tolerance=1e-6):
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=tolerance)


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr)


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


# --- batches and outputs ----------------------------------------------------------------------------------------------

class Keyworded(nn.Module):
    """Takes keywords, labels among them if it is to compute its own loss, and returns a dictionary, as transformers do."""

    def __init__(self):
        super().__init__()
        self.words, self.classifier = nn.Embedding(20, 8), nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.classifier(self.words(input_ids).mean(1))
        loss = {} if labels is None else {"loss": F.cross_entropy(logits, labels, label_smoothing=0.1)}
        return {"logits": logits} | loss


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_dictionaries_of_tokens_and_labels_train_by_the_models_own_loss(kind):
    data = [kind(input_ids=torch.randint(20, (4, 5)), attention_mask=torch.ones(4, 5), labels=torch.randint(3, (4,)))
            for _ in range(4)]
    model = Keyworded()
    twin = copy.deepcopy(model)
    history = run(model, sgd(model), data, epochs=2)
    by_hand(twin, sgd(twin), data * 2, lambda m, batch: m(**batch)["loss"])
    assert_same(model, twin)
    assert len(history.rows) == 8
    scores = evaluate(model, data)
    assert scores["loss"] == pytest.approx(sum(model(**batch)["loss"].item() for batch in data) / 4)
    right = torch.cat([model(**batch)["logits"].argmax(-1) == batch["labels"] for batch in data])
    assert scores["accuracy"] == pytest.approx(right.float().mean().item())


def test_a_dictionary_with_other_names_than_the_models_is_an_error_that_names_them():
    model = mlp()
    before = copy.deepcopy(model)
    data = [{"image": torch.randn(4, 6), "label": torch.randint(3, (4,))}]
    with pytest.raises(ValueError, match=r"the batch has image, label, which Sequential\.forward does not take"):
        run(model, sgd(model), data, epochs=1)
    assert_same(model, before, 0)


Batch = namedtuple("Batch", "inputs labels")


@pytest.mark.parametrize("kind", [lambda *pair: pair, Batch])
def test_two_inputs_and_named_tuples_train_as_by_hand(kind):
    data = [kind((torch.randn(4, 6), torch.randn(4, 2)), torch.randint(3, (4,))) for _ in range(3)]
    model = Model(lambda m, image, table: m.head(torch.cat([m.body(image).relu(), table], 1)),
                  body=nn.Linear(6, 8), head=nn.Linear(10, 3))
    twin = copy.deepcopy(model)
    run(model, sgd(model), data, epochs=1)
    by_hand(twin, sgd(twin), data, lambda m, batch: F.cross_entropy(m(*batch[0]), batch[1]))
    assert_same(model, twin)
    assert evaluate(model, data)["n"] == 12


def test_a_loss_of_ones_own_gets_the_auxiliary_output_too():
    def loss_fn(outputs, labels):
        return F.cross_entropy(outputs[0], labels) + 0.4 * F.cross_entropy(outputs[1], labels)

    x, y = examples(16)
    model = Model(lambda m, x: (m.main(m.body(x).relu()), m.auxiliary(m.body(x).relu())),
                  body=nn.Linear(6, 8), main=nn.Linear(8, 3), auxiliary=nn.Linear(8, 3))
    twin = copy.deepcopy(model)
    history = run(model, sgd(model), batches(x, y), epochs=1, loss_fn=loss_fn, val_loader=batches(x, y, batch_size=5))
    by_hand(twin, sgd(twin), batches(x, y), lambda m, batch: loss_fn(m(batch[0]), batch[1]))
    assert_same(model, twin)
    assert history.rows[-1]["val_loss"] == pytest.approx(loss_fn(model(x), y).item())


# --- tasks and metrics ------------------------------------------------------------------------------------------------

def test_mixup_trains_on_soft_labels_and_is_judged_on_classes():
    x, y = examples(24)
    mixed = batches(x, torch.softmax(torch.randn(24, 3), 1))
    model = mlp()
    twin = copy.deepcopy(model)
    history = run(model, sgd(model), mixed, epochs=2, val_loader=batches(x, y, batch_size=7))
    for _ in range(2):
        by_hand(twin, sgd(twin), mixed, cross_entropy)
    assert_same(model, twin)
    assert not any("accuracy" in row for row in history.rows)  # of soft labels there is none
    assert history.rows[-1]["val_accuracy"] == pytest.approx((model(x).argmax(1) == y).float().mean().item())


@pytest.mark.parametrize("loss_fn", [nn.CrossEntropyLoss(ignore_index=255), partial(F.cross_entropy, ignore_index=255)],
                         ids=["module", "partial"])
def test_pixels_that_the_loss_ignores_count_nowhere_however_they_are_spread_over_batches(loss_fn):
    model, x, y = nn.Conv2d(3, 4, 1), torch.randn(10, 3, 6, 6), torch.randint(4, (10, 6, 6))
    y[:4, 1:], y[4:6] = 255, 255  # one row of each picture in the first batch, no pixel of half the second
    scores, outputs = evaluate(model, batches(x, y, batch_size=4), loss_fn=loss_fn), model(x)
    assert scores["loss"] == pytest.approx(loss_fn(outputs, y).item())
    assert scores["accuracy"] == pytest.approx((outputs.argmax(1) == y)[y != 255].float().mean().item())


def test_a_regression_has_its_own_metric_which_a_plateau_can_watch():
    def error(outputs, labels):
        return (outputs - labels).abs().mean()

    x, _ = examples(21)
    loader = batches(x, x.sum(1, keepdim=True), batch_size=10)
    groups = layer_groups(model := mlp(1))
    plateau = PlateauUnfreezing(groups, metric="val_error", mode="min", patience=1)
    history = run(model, torch.optim.Adam(param_groups(groups, uniform(1e-2))), loader, epochs=3, val_loader=loader,
                  loss_fn=F.mse_loss, metrics={"error": error}, unfreezing=plateau)
    found = history.to_frame()["val_error"].dropna()
    assert "accuracy" not in history.to_frame()
    assert found.iloc[-1] == pytest.approx(error(model(x), x.sum(1, keepdim=True)).item())
    assert plateau.best == pytest.approx(found.min())


class Recall:
    """The part of the examples of class 1 that is found, which no mean over batches gives."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.found, self.all = 0, 0

    def update(self, outputs, labels):
        self.found += int(((outputs.argmax(1) == 1) & (labels == 1)).sum())
        self.all += int((labels == 1).sum())

    def compute(self):
        return torch.tensor(self.found / max(self.all, 1))


def test_a_metric_with_a_state_begins_anew_at_each_epoch():
    x, y = torch.randn(23, 6), torch.tensor([1] * 3 + [0] * 20)
    model = mlp(2)
    loader = batches(x, y, batch_size=2)
    history = run(model, sgd(model), loader, epochs=3, val_loader=loader, metrics={"recall": Recall()})
    expected = ((model(x).argmax(1) == 1) & (y == 1)).sum().item() / 3
    assert history.rows[-1]["val_recall"] == pytest.approx(expected)


# --- steps ------------------------------------------------------------------------------------------------------------

def test_four_small_batches_a_step_are_one_large_batch_for_weights_schedule_and_plan():
    x, y = examples(64)
    small = mlp()
    large, schedules = copy.deepcopy(small), []
    for model, size, accumulate in ((small, 4, 4), (large, 16, 1)):
        groups = layer_groups(model)
        optimizer = torch.optim.SGD(param_groups(groups, layer_decay(0.3, 0.5)), momentum=0.9)
        schedules.append(one_cycle(optimizer, 8))
        run(model, optimizer, batches(x, y, batch_size=size), epochs=2, schedule=schedules[-1], accumulate=accumulate,
            unfreezing=ProgressiveUnfreezing(groups, UnfreezePlan({"head": 0, "*": 3})))
    assert_same(small, large, 1e-5)
    assert [schedule.last_epoch for schedule in schedules] == [8, 8]


def test_a_step_of_the_batches_that_are_left_has_their_whole_gradient():
    x, y = examples(20)
    model = mlp()
    twin = copy.deepcopy(model)
    run(model, sgd(model), batches(x, y, batch_size=4), epochs=1, accumulate=2)
    by_hand(twin, sgd(twin), [(x[:8], y[:8]), (x[8:16], y[8:16]), (x[16:], y[16:])], cross_entropy)
    assert_same(model, twin)


def test_clipping_is_of_the_accumulated_gradient_of_what_trains():
    def loss_fn(outputs, labels):
        return 50 * F.cross_entropy(outputs, labels)

    x, y = examples(32)
    groups = layer_groups(model := mlp())
    twin = copy.deepcopy(model)
    twin[0].requires_grad_(False)
    run(model, torch.optim.SGD(param_groups(groups, uniform(0.1)), momentum=0.9), batches(x, y, batch_size=4), epochs=1,
        loss_fn=loss_fn, clip_grad_norm=0.5, accumulate=2, unfreezing=ProgressiveUnfreezing(groups, UnfreezePlan({"head": 0})))
    by_hand(twin, torch.optim.SGD(twin[2].parameters(), 0.1, momentum=0.9), batches(x, y),
            lambda m, batch: loss_fn(m(batch[0]), batch[1]), clip=0.5)
    assert_same(model, twin, 1e-5)


# --- loaders and optimizers -------------------------------------------------------------------------------------------

class Stream(IterableDataset):
    """24 examples, of whatever length it says that it is."""

    def __init__(self, says):
        self.says = says

    def __iter__(self):
        return iter([(torch.ones(6), i % 3) for i in range(24)])

    def __len__(self):
        return self.says


@pytest.mark.filterwarnings("ignore:Length of IterableDataset")  # torch notices the shorter of the two itself
@pytest.mark.parametrize("says", [40, 12])
def test_an_epoch_of_a_stream_is_what_it_gives_and_not_what_it_says(says):
    model = mlp()
    history = run(model, sgd(model), DataLoader(Stream(says), 4), epochs=2)
    assert [row["epoch"] for row in history.rows] == [0] * 6 + [1] * 6


def test_a_generator_that_is_used_up_after_one_validation_is_an_error():
    model, data = mlp(), [examples(4), examples(4)]
    with pytest.raises(ValueError, match="the loader to evaluate on gave no batch"):
        run(model, sgd(model), data, epochs=3, val_loader=(batch for batch in data))


def test_parameters_that_took_the_place_of_others_after_the_optimizer_was_made_are_named():
    model = mlp()
    optimizer = torch.optim.SGD(param_groups(layer_groups(model), uniform(0.1)))
    model[0] = nn.utils.parametrizations.weight_norm(nn.Linear(6, 8))
    with pytest.raises(ValueError, match=r"in 'stem'.* it lacks the model's 0\.bias, 0\.parametrizations\.weight\.original0"):
        run(model, optimizer, [examples(4)], epochs=1)


class OwnRate(torch.optim.Optimizer):
    """An optimizer that finds its rate itself, as D-Adaptation does."""

    def __init__(self, params):
        super().__init__(params, {"lr": None})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.sub_(0.1 * p.grad)


def test_a_rate_that_is_a_tensor_is_a_number_in_the_history_and_one_that_is_missing_is_none():
    rates = []
    for make in (partial(torch.optim.Adam, lr=torch.tensor(0.25)), OwnRate):
        model = mlp()
        optimizer = make(model.parameters())
        rates += run(model, optimizer, [examples(4)], epochs=1).rows[-1]["lr"].values()
        describe(optimizer, model)
    assert rates[0] == 0.25
    assert math.isnan(rates[1])
