import dataclasses
import sys
from itertools import pairwise

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from layerlr_helpers import evaluate, layer_decay, layer_groups, report, snapshot
from layerlr_helpers.intervals import accuracy_interval

NAMES = ("cat", "dog", "a|b")
LABELS, PREDICTED = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 1, 0, 2, 0, 1])
CONFIDENCE = torch.tensor([0.9, 0.5, 0.8, 0.6, 0.99, 0.7, 0.8, 0.4])


@pytest.fixture(scope="module")
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5),
                             nn.Linear(256, 10))


# --- predictions ------------------------------------------------------------------------------------------------------

def test_predictions_agree_with_evaluate_whatever_the_batches(net, small_digits):
    data = small_digits.subset(range(50))
    labels, predicted, confidence = report.predictions(net, data, batch_size=7)
    assert torch.equal(labels, data.labels)
    again = report.predictions(net, data)
    assert torch.equal(predicted, again[1])
    torch.testing.assert_close(confidence, again[2])
    accuracy = evaluate(net, torch.utils.data.DataLoader(data, 50))["accuracy"]
    assert float((labels == predicted).float().mean()) == pytest.approx(accuracy)
    logits = net.eval()(torch.stack([image for image, _ in data])).detach()
    torch.testing.assert_close(confidence, logits.softmax(1).amax(1))


def test_predictions_leave_modes_and_random_numbers_as_they_were(net, small_digits):
    net.train()
    net[1].eval()
    before = torch.get_rng_state()
    report.predictions(net, small_digits.subset(range(5)), autocast=torch.bfloat16)
    assert [module.training for module in net] == [True, False, True, True, True, True]
    assert torch.equal(before, torch.get_rng_state())


def test_nothing_to_predict_is_refused(net, small_digits):
    with pytest.raises(ValueError, match="no images to predict"):
        report.predictions(net, small_digits.subset([]))


# --- numbers ----------------------------------------------------------------------------------------------------------

def test_the_confusion_matrix_has_true_classes_in_rows():
    matrix = report.confusion_matrix(LABELS, PREDICTED, NAMES)
    assert matrix.to_numpy().tolist() == [[1, 2, 0], [1, 1, 0], [1, 1, 1]]
    assert list(matrix.index) == list(matrix.columns) == list(NAMES)
    assert (matrix.index.name, matrix.columns.name) == ("true", "predicted")


@given(pairs=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=40))
def test_the_confusion_matrix_is_scikit_learns(pairs):
    from sklearn.metrics import confusion_matrix

    labels, predicted = (list(column) for column in zip(*pairs, strict=True)) if pairs else ([], [])
    ours = report.confusion_matrix(labels, predicted, "abcde").to_numpy()
    assert ours.sum() == len(pairs)
    if pairs:
        assert (ours == confusion_matrix(labels, predicted, labels=range(5))).all()


@pytest.mark.parametrize(("labels", "predicted", "problem"), [
    ([0, 1], [0], "there are 2, 1 of them"), ([0, 3], [0, 1], "labels go from 0 to 3"),
    ([0, 1], [-1, 0], "predicted go from -1")])
def test_predictions_of_other_classes_are_refused(labels, predicted, problem):
    with pytest.raises(ValueError, match=problem):
        report.confusion_matrix(labels, predicted, NAMES)


def test_the_table_of_classes_says_what_each_was_taken_for():
    table = report.class_report(report.confusion_matrix(LABELS, PREDICTED, (*NAMES, "never"))).set_index("class")
    assert list(table["images"]) == [3, 2, 3, 0]
    assert list(table["recall"][:3]) == pytest.approx([1 / 3, 1 / 2, 1 / 3])
    assert list(table["precision"][:3]) == pytest.approx([1 / 3, 1 / 4, 1])
    assert list(table["taken for"]) == ["dog (2)", "cat (1)", "cat (1)", ""]
    assert table.loc["never", ["recall", "low", "high", "precision"]].isna().all()
    assert tuple(table.loc["dog", ["low", "high"]]) == accuracy_interval(1, 2)


def test_mistakes_come_most_confident_first():
    assert report.mistakes(LABELS, PREDICTED, CONFIDENCE).tolist() == [4, 2, 6, 1, 7]  # of two equals, the first
    assert report.mistakes(LABELS, PREDICTED, CONFIDENCE, n=2).tolist() == [4, 2]
    assert report.mistakes(LABELS, LABELS, CONFIDENCE).tolist() == []
    with pytest.raises(ValueError, match="there are 8, 8, 7 of them"):
        report.mistakes(LABELS, PREDICTED, CONFIDENCE[1:])


def test_the_table_of_layers_tells_rates_and_movement(net):
    groups = layer_groups(net, torch.zeros(1, 3, 32, 32))
    before = snapshot(groups)
    rates = layer_decay(0.1, 0.5)(groups)
    with torch.no_grad():
        net[-1].weight.mul_(1.5)
        net[-1].bias.mul_(1.5)
    table = report.layer_report(groups, before, rates).set_index("layer")
    assert table["rate"].to_dict() == rates
    assert table["parameters"].sum() == sum(p.numel() for p in net.parameters())
    assert table["moved"].iloc[-1] == pytest.approx(0.5)
    assert (table["moved"].iloc[:-1] == 0).all()
    planned = report.layer_report(groups, before, rates, {groups[-1].name: 7}).set_index("layer")
    assert list(planned["from step"]) == ["never"] * (len(groups) - 1) + ["7"]
    assert list(planned["rate"]) == [0.0] * (len(groups) - 1) + [0.1]


# --- figures and the page ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("classes", [2, 10, 60])
def test_every_count_in_the_figure_can_be_read(classes):
    labels = np.repeat(np.arange(classes), 30)
    predicted = np.where(np.arange(len(labels)) % 4 == 0, (labels + 1) % classes, labels)
    axes = report.plot_confusion(report.confusion_matrix(labels, predicted, [f"number {i} of $x" for i in range(classes)]))
    axes.figure.draw_without_rendering()
    cell = axes.get_window_extent().width / classes
    assert len(axes.texts) == 2 * classes  # empty cells stay empty
    assert sum(int(text.get_text()) for text in axes.texts) == len(labels)
    assert all(text.get_window_extent().width < cell for text in axes.texts)
    names = axes.get_xticklabels()
    assert names[0].get_text() == r"number 0 of \$x"  # the dollar is shown, and starts no formula
    texts = [text for part in axes.figure.axes for text in (
        part.xaxis.label, part.yaxis.label, *part.get_xticklabels(), *part.get_yticklabels())]
    boxes, whole = [text.get_window_extent() for text in texts], axes.figure.bbox
    assert min(box.x0 for box in boxes) >= whole.x0  # nothing is cut off at an edge
    assert min(box.y0 for box in boxes) >= whole.y0
    assert max(box.x1 for box in boxes) <= whole.x1
    assert max(box.y1 for box in boxes) <= whole.y1
    ends = [name.get_window_extent() for name in names]
    assert all(a.x1 < b.x0 for a, b in pairwise(ends))  # no name lies on the next


@pytest.mark.parametrize("classes", [60, 61, 300])
def test_the_figure_of_many_classes_stays_small_enough_to_be_drawn_and_seen(classes):
    labels = np.repeat(np.arange(classes), 2)
    predicted = np.where(np.arange(len(labels)) % 2 == 0, (labels + 1) % classes, labels)
    axes = report.plot_confusion(report.confusion_matrix(labels, predicted, [f"a long name of class {i}" for i in labels[::2]]))
    assert axes.figure.get_size_inches().max() <= 25
    assert axes.images[0].get_array().shape == (classes, classes)
    if classes > 60:
        axes.figure.draw_without_rendering()
        assert not axes.texts
        ticks = [text for text in axes.get_xticklabels() if text.get_text()]
        assert len(ticks) < 20
        assert all(a.get_window_extent().x1 < b.get_window_extent().x0 for a, b in pairwise(ticks))


def test_a_report_on_many_classes_does_not_speak_of_numbers_that_are_not_shown(small_digits, tmp_path):
    data = dataclasses.replace(small_digits.subset(range(8)), class_names=tuple(f"class {i}" for i in range(100)))
    layers = pd.DataFrame({"layer": ["head"], "rate": [0.1], "parameters": [3], "moved": [0.5]})
    path = report.write_report(tmp_path, data, LABELS, PREDICTED, CONFIDENCE, layers=layers, settings={})
    alt = next(line for line in path.read_text(encoding="utf-8").splitlines() if "confusion.png" in line)
    assert "both by number" in alt
    assert "number of test images" not in alt


def test_figures_can_be_drawn_into_axes_of_ones_own_and_pyplot_never_sees_the_others(small_digits):
    matrix = report.confusion_matrix(LABELS, PREDICTED, NAMES)
    figure, axes = plt.subplots()
    assert report.plot_confusion(matrix, axes) is axes
    plt.close(figure)
    report.plot_confusion(matrix)
    report.plot_mistakes(small_digits.subset(range(8)), LABELS, PREDICTED, CONFIDENCE)
    assert plt.get_fignums() == []


def test_the_wrong_images_are_shown_with_the_answer(small_digits):
    data = small_digits.subset(range(8))
    grid = report.plot_mistakes(data, LABELS, PREDICTED, CONFIDENCE, n=4, columns=3)
    assert grid.shape == (2, 3)
    shown = [axes for axes in grid.flat if axes.images]
    assert len(shown) == 4
    assert shown[0].get_title() == "is 1\nseen as 0\n(99% sure)"
    assert (shown[0].images[0].get_array() == data.images[4].permute(1, 2, 0).numpy()).all()
    shown[0].figure.draw_without_rendering()
    edge = shown[0].figure.bbox
    assert all(axes.title.get_window_extent().y1 <= edge.y1 for axes in shown)  # no title is cut off
    assert report.plot_mistakes(data, LABELS, LABELS, CONFIDENCE)[0, 0].texts[0].get_text() == "no mistakes"


@pytest.fixture(scope="module")
def page(net, small_digits, tmp_path_factory):
    """The path of a report on a network's predictions, and these predictions."""
    data = small_digits.subset(range(40))
    predictions = report.predictions(net, data)
    groups = layer_groups(net, torch.zeros(1, 3, 32, 32))
    layers = report.layer_report(groups, snapshot(groups), layer_decay(0.1, 0.5)(groups))
    path = report.write_report(tmp_path_factory.mktemp("report"), data, *predictions, layers=layers, notes="The end.",
                               settings={"pipe | in": "a\nvalue", "not set": None, "rate": 0.003})
    return path, predictions


def test_the_report_holds_the_numbers_of_the_predictions(page):
    path, (labels, predicted, _) = page
    text = path.read_text(encoding="utf-8")
    right = int((labels == predicted).sum())
    low, high = accuracy_interval(right, 40)
    assert (f"**Accuracy on the test images: {100 * right / 40:.1f} %** ({right} of 40 right; 95 % interval {100 * low:.1f} % "
            f"to {100 * high:.1f} %)") in text
    assert f"commonest class would give {100 * int(labels.bincount().max()) / 40:.1f} %" in text
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("| ")]
    for name in "0123456789":
        images = int((labels == int(name)).sum())
        recognised = int(((labels == int(name)) & (predicted == int(name))).sum())
        assert any(row[:3] == [name, str(images), f"{100 * recognised / images:.1f} %"] for row in rows), name
    assert any(row[:2] == ["head", "0.1"] for row in rows)
    assert ["torch", torch.__version__] in rows
    assert r"| pipe \| in | a value |" in text
    assert "| not set | None |\n| rate | 0.003 |" in text
    assert text.endswith("The end.\n")


def test_the_report_shows_its_figures_and_leaves_no_half_files(page):
    path, _ = page
    text = path.read_text(encoding="utf-8")
    assert sorted(entry.name for entry in path.parent.iterdir()) == sorted(report.FILES)
    for name in ("confusion.png", "mistakes.png"):
        assert f"]({name})" in text
        assert plt.imread(path.parent / name).std() > 0
    assert plt.get_fignums() == []


def test_a_report_of_other_images_is_refused(small_digits, tmp_path):
    with pytest.raises(ValueError, match="there are 7, 8, 8, 8 of them"):
        report.write_report(tmp_path, small_digits.subset(range(7)), LABELS, PREDICTED, CONFIDENCE, layers=None, settings={})
    assert not list(tmp_path.iterdir())


def test_figures_need_no_display_and_change_no_settings(small_digits, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # pyplot, which may want a display, cannot be imported
    before = dict(matplotlib.rcParams)
    report.plot_confusion(report.confusion_matrix(LABELS, PREDICTED, NAMES)).figure.savefig(tmp_path / "confusion.png")
    grid = report.plot_mistakes(small_digits.subset(range(8)), LABELS, PREDICTED, CONFIDENCE)
    grid[0, 0].figure.savefig(tmp_path / "mistakes.png")
    assert dict(matplotlib.rcParams) == before
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("confusion.png", "mistakes.png"))
