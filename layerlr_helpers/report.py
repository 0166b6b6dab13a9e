"""What a fine-tuned classifier does, on one page: its accuracy, its mistakes class by class, how far each layer moved.

Every function but :func:`predictions` takes plain data: labels, predicted labels, confidences. The figures are drawn
without pyplot, so they need no display and are not kept open.
"""

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torchvision
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot, which would keep the figures and may open a window
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from layerlr_helpers.batches import logits_of
from layerlr_helpers.diagnostics import layer_statistics
from layerlr_helpers.files import write_whole
from layerlr_helpers.guards import preserved
from layerlr_helpers.images import ImageSet
from layerlr_helpers.intervals import accuracy_interval
from layerlr_helpers.layers import LayerGroup

FILES = ("report.md", "confusion.png", "mistakes.png")  # what write_report writes
MOST_NAMED = 60  # classes whose names and counts are written into the confusion matrix's figure


@torch.no_grad()
def predictions(model: nn.Module, data: Dataset, *, batch_size: int = 256,
                autocast: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """``(labels, predicted, confidence)`` of each image, on the CPU: int64, int64, and the predicted class's softmax, 0..1.

    In eval mode and on the model's device; the model's modes are afterwards what they were. None for ``autocast`` turns it off.
    """
    if len(data) == 0:
        raise ValueError("there are no images to predict; the data set is empty")
    device = next(model.parameters()).device
    labels, probabilities = [], []
    with preserved(model), torch.autocast(device.type, autocast, enabled=autocast is not None):
        model.eval()
        for inputs, truth in DataLoader(data, batch_size, generator=torch.Generator()):  # not torch's global generator
            probabilities.append(logits_of(model(inputs.to(device))).float().softmax(1).cpu())
            labels.append(truth)
    confidence, predicted = torch.cat(probabilities).max(1)
    return torch.cat(labels), predicted, confidence


def confusion_matrix(labels, predicted, class_names: Sequence[str]) -> pd.DataFrame:
    """How many images of each true class (rows) were taken for each class (columns); a ValueError for numbers of no class."""
    labels, predicted = (values.astype(int) for values in _same_length(labels, predicted))
    names, n = list(class_names), len(class_names)
    for what, values in (("labels", labels), ("predicted", predicted)):
        if len(values) and not (values.min() >= 0 and values.max() < n):
            raise ValueError(f"{what} go from {values.min()} to {values.max()}, but {n} class names stand for 0 to {n - 1}")
    counts = np.bincount(n * labels + predicted, minlength=n * n).reshape(n, n)
    return pd.DataFrame(counts, pd.Index(names, name="true"), pd.Index(names, name="predicted"))


def class_report(matrix: pd.DataFrame) -> pd.DataFrame:
    """One row per class of a :func:`confusion_matrix`: how often it was recognised, and what it was taken for.

    Columns: ``class, images, recall`` (the part of its images that were recognised), ``low`` and ``high``
    (:func:`accuracy_interval` of the recall), ``precision`` (the part of the answers with its name that were right), ``taken
    for`` (the commonest wrong answer, with its number). What no image decides is not a number.

    >>> matrix = confusion_matrix([0, 0, 1, 1], [0, 1, 1, 1], ["cat", "dog"])
    >>> class_report(matrix)[["class", "recall", "taken for"]].values.tolist()
    [['cat', 0.5, 'dog (1)'], ['dog', 1.0, '']]
    """
    counts = matrix.to_numpy()
    images, right, answers = (pd.Series(values) for values in (counts.sum(1), counts.diagonal(), counts.sum(0)))
    wrong = np.where(np.eye(len(counts), dtype=bool), 0, counts)
    intervals = np.array([accuracy_interval(k, n) if n else (np.nan, np.nan) for k, n in zip(right, images, strict=True)])
    return pd.DataFrame({
        "class": matrix.index, "images": images, "recall": right / images, "low": intervals[:, 0], "high": intervals[:, 1],
        "precision": right / answers,
        "taken for": [f"{matrix.columns[row.argmax()]} ({row.max()})" if row.any() else "" for row in wrong]})


def mistakes(labels, predicted, confidence, n: int = 12) -> np.ndarray:
    """The indices of at most ``n`` wrong predictions, the most confident first."""
    labels, predicted, confidence = _same_length(labels, predicted, confidence)
    wrong = np.flatnonzero(labels != predicted)
    return wrong[np.argsort(-confidence[wrong], kind="stable")][:n]


def layer_report(groups: Sequence[LayerGroup], before: Mapping[str, Tensor], rates: Mapping[str, float],
                 first_steps: Mapping[str, int] | None = None) -> pd.DataFrame:
    """One row per layer group, from the input to the head: ``layer, rate, parameters, moved``.

    ``moved`` is the distance from ``before``, a ``snapshot`` from before the training, over its own norm. ``rates`` are the
    peak rates, such as ``layer_decay(3e-3, 0.5)(groups)``. ``first_steps``, of a plan, adds the column ``from step``: when
    each group begins to train. A group that is not in it never trains, and its rate is given as 0.
    """
    frame = layer_statistics(groups, before)[["group", "parameters", "moved"]].rename(columns={"group": "layer"})
    trained = frame["layer"].isin(list(rates if first_steps is None else first_steps))
    frame.insert(1, "rate", frame["layer"].map(rates).where(trained, 0.0))
    if first_steps is not None:
        frame.insert(2, "from step", [str(first_steps.get(name, "never")) for name in frame["layer"]])
    return frame


def plot_confusion(matrix: pd.DataFrame, axes: Axes | None = None) -> Axes:
    """A :func:`confusion_matrix` as counts on colours: the darker, the larger the part of the true class's images.

    New Axes grow with the number of classes, to 25 inches, so that every count can be read; cells without an image stay
    empty. Above 60 classes there are the colours alone, and the classes' numbers in place of their names.
    """
    counts, names = matrix.to_numpy(), _short(matrix.index)
    named = len(counts) <= MOST_NAMED
    longest = max(map(len, names)) if named else len(str(len(counts)))
    # Inches: small cells hold a number of three digits, few cells the colours' title.
    side = min(max(0.42 * len(counts), 2.5), 20.5) if named else 12
    if axes is None:
        axes = Figure((side + 2 + 0.1 * longest, side + 0.7 + 0.1 * longest), layout="constrained").add_subplot()
    shares = 100 * counts / counts.sum(1, keepdims=True).clip(1)  # no division by 0 for a class without images
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    by = "" if named else ", by number"
    axes.set(xlabel="predicted class" + by, ylabel="true class" + by)
    if named:
        for row, column in np.argwhere(counts):
            count = counts[row, column]
            axes.text(column, row, str(count), ha="center", va="center", fontsize=9 if count < 1000 else 7,
                      color="white" if shares[row, column] > 55 else "black", fontweight="bold" if row == column else None)
        axes.set_yticks(range(len(counts)), names)
        axes.set_xticks(range(len(counts)), names, rotation=90 if longest > 2 else 0)
    axes.figure.colorbar(picture, ax=axes, label="part of the true class (%)")
    return axes


def plot_mistakes(data: ImageSet, labels, predicted, confidence, *, n: int = 12, columns: int = 6) -> np.ndarray:
    """The most confident of the :func:`mistakes` as pictures, with the true class, the answer and its confidence.

    Returns the array of Axes; a single empty one says so if nothing is wrong.
    """
    chosen = mistakes(labels, predicted, confidence, n)
    columns = max(min(columns, len(chosen)), 1)
    rows = max(-(-len(chosen) // columns), 1)
    grid = Figure((max(1.7 * columns, 3), 2.25 * rows), layout="constrained").subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, i in zip(grid.flat, chosen, strict=False):
        axes.imshow(data.images[i].permute(1, 2, 0).numpy())
        true, seen = _short([data.class_names[int(labels[i])], data.class_names[int(predicted[i])]], 18)
        axes.set_title(f"is {true}\nseen as {seen}\n({float(confidence[i]):.0%} sure)", fontsize=8)
    if not len(chosen):
        grid[0, 0].text(0.5, 0.5, "no mistakes", ha="center", va="center")
    return grid


def write_report(folder: str | Path, data: ImageSet, labels, predicted, confidence, *, layers: pd.DataFrame,
                 settings: Mapping[str, object], notes: str = "") -> Path:
    """Write ``report.md`` with ``confusion.png`` and ``mistakes.png`` beside it into ``folder``; returns the report's path.

    Each file is written whole, the report last. The folder must exist. ``data`` are the test images, in the order of
    ``labels``, ``predicted`` and ``confidence`` (from :func:`predictions`); ``layers`` is from :func:`layer_report`.
    ``settings`` are what the run was made with, to which the versions of Python, torch and torchvision are added;
    ``notes`` is Markdown to end with.
    """
    folder = Path(folder)
    _same_length(data.labels, labels, predicted, confidence)
    matrix = confusion_matrix(labels, predicted, data.class_names)
    page = _page(matrix, layers, {**settings, "python": platform.python_version(), "torch": torch.__version__,
                                  "torchvision": torchvision.__version__}, notes)
    for name, axes in (("confusion.png", plot_confusion(matrix)),
                       ("mistakes.png", plot_mistakes(data, labels, predicted, confidence).flat[0])):
        write_whole(folder / name, lambda path, axes=axes: axes.figure.savefig(path, format="png", dpi=120))
    write_whole(folder / "report.md", lambda path: path.write_text(page + "\n", encoding="utf-8"))
    return folder / "report.md"


def _page(matrix: pd.DataFrame, layers: pd.DataFrame, settings: Mapping[str, object], notes: str) -> str:
    images_of_class = matrix.sum(axis=1)
    total, right = int(images_of_class.sum()), int(np.trace(matrix))
    low, high = accuracy_interval(right, total)
    classes = class_report(matrix)
    classes["95 % interval"] = classes["low"].map(_percent) + " to " + classes["high"].map(_percent)
    classes[["recall", "precision"]] = classes[["recall", "precision"]].map(_percent)
    layers = layers.assign(rate=layers["rate"].map("{:.3g}".format), parameters=layers["parameters"].map("{:,}".format),
                           moved=layers["moved"].map(_percent))
    sections = [
        "# Fine-tuning report",
        f"**Accuracy on the test images: {_percent(right / total)}** ({right:,} of {total:,} right; 95 % interval "
        f"{_percent(low)} to {_percent(high)}). Always naming the commonest class would give "
        f"{_percent(images_of_class.max() / total)}.",
        "The interval is Wilson's (1927). It tells what this number of test images leaves open, not what other training "
        "images or another seed would change.",
        "## Class by class",
        "*recall* is the part of a class's images that were recognised, *precision* the part of the answers with its name that "
        "were right.",
        _markdown(classes[["class", "images", "recall", "95 % interval", "precision", "taken for"]]),
        "![Confusion matrix: true classes in rows, predicted ones in columns, "
        f"{'with the number of test images' if len(matrix) <= MOST_NAMED else 'both by number'}](confusion.png)",
        "## The most confident mistakes",
        "![The wrongly classified test images of which the network was surest](mistakes.png)",
        "## Layer by layer",
        "From the input to the head. *rate* is the peak learning rate, *moved* the distance that the weights went, over their "
        "norm at the start.",
        _markdown(layers),
        "## Settings",
        _markdown(pd.DataFrame(settings.items(), columns=["setting", "value"], dtype=object)),
        notes]
    return "\n\n".join(filter(None, sections))


def _markdown(frame: pd.DataFrame) -> str:
    lines = [list(frame.columns), ["---"] * frame.shape[1], *frame.itertuples(index=False)]
    cells = [[str(value).replace("|", "\\|").replace("\n", " ") for value in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _percent(share: float) -> str:
    return "–" if np.isnan(share) else f"{100 * share:.1f} %"


def _short(names: Sequence[str], most: int = 24) -> list[str]:
    """Names for a figure: shortened, and with $ as a plain character, which matplotlib would take for a formula's."""
    cut = [name if len(name) <= most else name[:most - 1] + "…" for name in map(str, names)]
    return [name.replace("$", r"\$") for name in cut]


def _same_length(*values) -> list[np.ndarray]:
    arrays = [np.asarray(value) for value in values]
    if len({len(array) for array in arrays}) > 1:
        raise ValueError(f"each image has one label, one prediction and one confidence, but there are "
                         f"{', '.join(str(len(array)) for array in arrays)} of them")
    return arrays
