"""What a batch's loss weighs, and which answers are right; every mean is compared with torch's over all examples at once."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from layerlr_helpers.objectives import Objective, Outcome

CLASSES, WEIGHTS = 4, torch.tensor([0.5, 1.0, 2.0, 0.0])


class Same(nn.Module):
    """Returns its inputs, through ``form``; it has a parameter, as every model."""

    def __init__(self, form=lambda outputs: outputs):
        super().__init__()
        self.shift, self.form = nn.Parameter(torch.zeros(())), form

    def forward(self, x):
        return self.form(x + self.shift)


class OwnLoss(Same):
    """Computes its own loss, if it gets labels, as the models of several libraries do; ``loss`` is of (logits, labels)."""

    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, x, labels=None):
        return {"loss": None if labels is None else self.loss(x + self.shift, labels), "logits": x + self.shift}


def each_token(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def next_token(logits, labels):
    return each_token(logits[:, :-1], labels[:, 1:])


def mean_of_batches(objective, model, batches):
    """The weighted mean of the batches' losses."""
    outcomes = [(objective.outcome(model, batch), objective.weight(batch)) for batch in batches]
    total = sum(float(outcome.loss.detach()) * weight for outcome, weight in outcomes if weight)
    return total / (1 if objective.is_sum else sum(weight for _, weight in outcomes))


def pieces(sizes, *tensors):
    """Tensors cut into batches of these sizes."""
    return zip(*(tensor.split(sizes) for tensor in tensors), strict=True)


SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=4)
FOR_CLASSES = {
    "default": None, "function": F.cross_entropy, "module": nn.CrossEntropyLoss(),
    "weights": nn.CrossEntropyLoss(weight=WEIGHTS), "partial": partial(F.cross_entropy, weight=WEIGHTS, ignore_index=2),
    "ignore": nn.CrossEntropyLoss(ignore_index=1), "smoothed": nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.2),
    "sum": nn.CrossEntropyLoss(reduction="sum"), "partial sum": partial(F.nll_loss, reduction="sum"),
    "nll": nn.NLLLoss(weight=WEIGHTS), "of one's own": lambda logits, labels: F.cross_entropy(logits, labels)}


@pytest.mark.parametrize("loss_fn", FOR_CLASSES.values(), ids=FOR_CLASSES)
@given(sizes=SIZES, places=st.sampled_from([(), (3,), (2, 5)]), seed=st.integers(0, 99))
def test_the_mean_of_batches_is_the_loss_of_all_examples_at_once(loss_fn, sizes, places, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(sum(sizes), CLASSES, *places, generator=generator).log_softmax(1)
    labels = torch.randint(CLASSES - 1, (sum(sizes), *places), generator=generator)
    if not isinstance(loss_fn, nn.Module) or loss_fn.ignore_index == -100:
        labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
    labels.view(-1)[0] = 0  # at least one label counts
    if getattr(loss_fn, "keywords", {}).get("ignore_index") == 2:
        labels[labels == -100] = 2
    whole = (loss_fn or F.cross_entropy)(logits, labels)
    assert mean_of_batches(Objective(loss_fn), Same(), pieces(sizes, logits, labels)) == pytest.approx(float(whole), rel=1e-4)


@given(sizes=SIZES)
def test_other_losses_are_averaged_over_the_examples(sizes):
    outputs, targets = torch.randn(sum(sizes), 3), torch.rand(sum(sizes), 3)
    for loss_fn in (F.mse_loss, nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0)), F.cross_entropy,  # soft labels
                    lambda o, t: (o - t).abs().mean()):
        expected = float(loss_fn(outputs, targets))
        assert mean_of_batches(Objective(loss_fn), Same(), pieces(sizes, outputs, targets)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("loss", [each_token, next_token])
@given(sizes=SIZES, seed=st.integers(0, 99))
def test_a_models_own_loss_is_averaged_over_the_labels_that_it_counts(loss, sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(sum(sizes), 5, CLASSES, generator=generator)
    labels = torch.randint(CLASSES, (sum(sizes), 5), generator=generator)
    labels[torch.arange(5) >= torch.randint(2, 6, (sum(sizes), 1), generator=generator)] = -100
    model, objective = OwnLoss(loss), Objective()
    batches = [{"x": x, "labels": y} for x, y in pieces(sizes, logits, labels)]
    objective.outcome(model, batches[0])
    assert mean_of_batches(objective, model, batches) == pytest.approx(float(loss(logits, labels)), rel=1e-4)


LOGITS = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 3.0, 1.0]])  # says 0, 2, 1


@pytest.mark.parametrize(("loss_fn", "outputs", "labels", "right"), [
    (None, LOGITS, torch.tensor([0, 2, 2]), [True, True, False]),
    (None, LOGITS, torch.tensor([0, -100, 1]), [True, True]),
    (nn.CrossEntropyLoss(ignore_index=2), LOGITS, torch.tensor([0, 2, 0]), [True, False]),
    (None, LOGITS[None], torch.tensor([[0, 2, 0]]), [True, True, False]),  # the classes are last; [1, 3, 3] fits both ways
    (lambda o, y: F.binary_cross_entropy_with_logits(o, y.float()), LOGITS, torch.eye(3).long(), None),
    (F.mse_loss, LOGITS[:, :1], torch.tensor([1, 0, 0]), None),
    (F.mse_loss, LOGITS, torch.tensor([0, 2, 2]), None),
    (lambda o, y: o.sum(), LOGITS, torch.tensor([0, 2, 9]), None),  # 9 is no class
    (lambda o, y: o.sum(), LOGITS[:, :1], torch.tensor([0, 0, 0]), None),  # whoever has one class is always right
    (lambda o, y: o[0].sum(), (LOGITS, LOGITS), torch.tensor([0, 2, 2]), None),
    (lambda o, y: o.sum(), LOGITS, torch.rand(3, 3), None),
    (F.binary_cross_entropy_with_logits, torch.tensor([-1.0, 2.0]), torch.tensor([0.0, 0.0]), [True, False]),
    (nn.BCEWithLogitsLoss(), torch.tensor([[-1.0], [0.2]]), torch.tensor([0, 1]), [[True], [True]]),
    (F.binary_cross_entropy, torch.tensor([[0.2], [0.4]]), torch.tensor([[0], [1]]), [[True], [False]]),
    (nn.BCEWithLogitsLoss(), LOGITS, torch.eye(3), None)])
def test_right_answers_are_counted_where_loss_and_shapes_say_what_is_right(loss_fn, outputs, labels, right):
    objective = Objective(loss_fn)
    loss = objective.outcome(Same(lambda _: outputs), (torch.zeros(3), labels)).loss if loss_fn is None else torch.zeros(())
    if outputs is not None and getattr(outputs, "ndim", 0) == 3:
        loss = F.cross_entropy(outputs.movedim(-1, 1), labels)
    found = objective.right(Outcome(loss, outputs, labels, len(labels)))
    assert (found.tolist() if found is not None else None) == right


def test_of_a_language_models_own_loss_the_right_answer_is_the_next_token():
    logits = F.one_hot(torch.tensor([[1, 2, 3, 0]]), CLASSES) * 9.0
    labels = torch.tensor([[0, 1, 2, 3]])
    for loss, expected in ((next_token, [True, True, True]), (each_token, [False] * 4)):
        objective = Objective()
        outcome = objective.outcome(OwnLoss(loss), {"x": logits, "labels": labels})
        assert objective.right(outcome).flatten().tolist() == expected


def test_a_models_own_loss_that_is_no_cross_entropy_has_no_accuracy_by_token():
    objective = Objective()
    batch = {"x": torch.randn(2, 3, CLASSES), "labels": torch.zeros(2, 3, dtype=torch.long)}
    assert objective.right(objective.outcome(OwnLoss(lambda o, y: 2 * each_token(o, y) + 1), batch)) is None
    assert objective.weight(batch) == 6


def test_a_model_that_is_as_wrong_about_each_label_as_about_the_next_is_looked_at_again():
    objective, model = Objective(), OwnLoss(next_token)
    labels = torch.randint(CLASSES, (2, 5))
    objective.outcome(model, {"x": torch.zeros(2, 5, CLASSES), "labels": labels})  # a head of zeros
    assert objective.weight({"x": None, "labels": labels}) == 10
    objective.outcome(model, {"x": torch.randn(2, 5, CLASSES), "labels": labels})
    assert objective.weight({"x": None, "labels": labels}) == 8


@pytest.mark.parametrize(("outputs", "labels"), [((4, 1), (4,)), ((4,), (4, 1)), ((4, 1, 2, 2), (4, 2, 2))])
@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float64, torch.float32])
@pytest.mark.parametrize("loss_fn", [F.mse_loss, F.binary_cross_entropy_with_logits, nn.L1Loss()])
def test_labels_are_compared_in_the_shape_and_precision_of_the_outputs(loss_fn, outputs, labels, dtype):
    outputs, labels = torch.randn(outputs), torch.randint(2, labels).to(dtype)
    loss = Objective(loss_fn).outcome(Same(), (outputs, labels)).loss
    assert torch.equal(loss, loss_fn(outputs, labels.reshape(outputs.shape).float()))
    loss.backward()


def test_losses_that_are_used_are_the_given_one_the_models_own_or_else_cross_entropy():
    batch = {"x": LOGITS, "labels": torch.tensor([0, 2, 2])}
    own = OwnLoss(lambda logits, labels: logits.sum())
    plain = F.cross_entropy(LOGITS, batch["labels"])
    assert Objective().outcome(own, batch).loss == LOGITS.sum()
    assert Objective(F.cross_entropy).outcome(own, batch).loss == plain
    assert Objective().outcome(own, ({"x": LOGITS}, batch["labels"])).loss == plain
    assert Objective().outcome(Same(), batch).loss == plain
    assert Objective().outcome(Same(lambda x: {"loss": x.sum()}), LOGITS).loss == LOGITS.sum()
    assert Objective(lambda o, y: o["out"].sum()).outcome(Same(lambda x: {"out": x}), LOGITS).loss == LOGITS.sum()


def test_a_loss_that_cannot_be_computed_is_an_error_that_says_why():
    labels = torch.tensor([0, 2, 2])
    with pytest.raises(ValueError, match=r"one number, not a tensor of shape \[3\].*reduction='mean'"):
        Objective(nn.CrossEntropyLoss(reduction="none")).outcome(Same(), (LOGITS, labels))
    with pytest.raises(ValueError, match="one number, not a float"):
        Objective(lambda o, y: 1.0).outcome(Same(), (LOGITS, labels))
    with pytest.raises(ValueError, match="has no labels, and the output has no loss"):
        Objective().outcome(Same(), LOGITS)
    with pytest.raises(ValueError, match="has no labels; a batch is"):
        Objective(F.mse_loss).outcome(Same(), LOGITS)
    with pytest.raises(ValueError, match="returns a tuple with neither logits nor a loss; give loss_fn"):
        Objective().outcome(Same(lambda x: (x, x)), (LOGITS, labels))


def test_any_callable_may_be_a_loss():
    class Unhashable:
        __hash__ = None

        def __call__(self, outputs, labels):
            return outputs.mean()

    assert Objective(Unhashable()).outcome(Same(), (LOGITS, torch.tensor([0, 2, 2]))).loss == LOGITS.mean()


def test_a_loss_of_ones_own_says_what_it_ignores():
    class Focal(nn.Module):
        def __init__(self, ignore_index):
            super().__init__()
            self.ignore_index = ignore_index

        def forward(self, logits, labels):
            return F.cross_entropy(logits, labels)

    labels = torch.tensor([0, 2, -100])
    assert [Objective(Focal(ignored)).weight((LOGITS, labels)) for ignored in (2, -100, None)] == [2, 2, 2]
    assert Objective(Focal(2)).weight((LOGITS, torch.tensor([2, 2, 1]))) == 1


def test_a_single_output_with_classes_as_labels_is_refused_and_not_a_loss_of_zero():
    with pytest.raises(ValueError, match=r"the model has one, of shape \[4, 1\]; .*BCEWithLogitsLoss"):
        Objective().outcome(nn.Linear(3, 1), (torch.ones(4, 3), torch.zeros(4, dtype=torch.long)))
